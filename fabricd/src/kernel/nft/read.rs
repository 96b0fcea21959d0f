//! What is there of our tables, as far as it has to be known: see [`fabric_core::state::nft`].

use std::io;

use fabric_core::cow_map::CowSet;
use fabric_core::model::{Family, Subnet, from_bits};
use fabric_core::state::nft::{ChainKind, Element, Hook, KeyField, Part, Place, Set, TABLE, TableFamily, reason};
use fabric_core::state::nft::{FoundRuleset, FoundSet, FoundTable, NO_HOOK};
use fabric_netlink::{Frame, Request, RequestSocket};

use super::attributes::{Attributes, Nfnetlink as _, Values};
use super::rule::comment;
use super::uapi::{
    CONCATENATED, GET_CHAIN, GET_ELEMENTS, GET_GENERATION, GET_RULE, GET_SET, GET_TABLE, INTERVAL, TYPE_BITS,
    chain_kind, datatype, message, nfproto, width,
};
use crate::kernel::{Count, Dropped};

/// In the place of what no chain and no set of ours has: it is going to be replaced.
const FOREIGN: &str = "of somebody else";

/// The number of the generation of rules: every transaction of anybody in this namespace begins another. `None` from a kernel
/// without nftables.
pub(in crate::kernel) fn generation(socket: &mut RequestSocket) -> io::Result<Option<u32>> {
    let question = Request::raw(message(GET_GENERATION), 0, Attributes::message(0, 0).into_bytes());
    // NFTA_GEN_ID
    match socket.ask(&question, |frame| Values::of(frame).number(1)) {
        Err(error) if lacks_nftables(&error) => Ok(None),
        answer => answer,
    }
}

/// What the rules of our tables have dropped.
pub(super) fn dropped(socket: &mut RequestSocket) -> io::Result<Dropped> {
    let mut dropped = Dropped::new();
    for family in [TableFamily::Inet, TableFamily::Bridge] {
        rules(socket, family)?.iter().for_each(|rule| rule.count(&mut dropped));
    }
    Ok(dropped)
}

/// `nft list table inet fabric`, `nft list table bridge fabric`.
pub(super) fn tables(socket: &mut RequestSocket) -> io::Result<(FoundRuleset, Dropped)> {
    let (mut found, mut dropped) = (FoundRuleset::new(), Dropped::new());
    for family in [TableFamily::Inet, TableFamily::Bridge] {
        if let Some(table) = table(socket, family, &mut dropped)? {
            found.insert(family, table);
        }
    }
    Ok((found, dropped))
}

fn table(socket: &mut RequestSocket, family: TableFamily, dropped: &mut Dropped) -> io::Result<Option<FoundTable>> {
    let ours = || ours(family);
    let flags = match socket.ask(&ask(GET_TABLE, ours()), |frame| Some(Values::of(frame).number(2).unwrap_or(0))) {
        Ok(Some(flags)) => flags,
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) && !lacks_nftables(&error) => return Err(error),
        _ => return Ok(None),
    };
    // Dormant, or owned by another program.
    let mut found = FoundTable { disabled: flags != 0, ..FoundTable::default() };
    found
        .chains
        .extend(socket.dump(&ask(GET_CHAIN, ours()), chain)?.into_iter().map(|(name, hook)| (name, vec![hook])));
    for rule in rules(socket, family)? {
        rule.count(dropped);
        found.chains.entry(rule.chain).or_default().push(rule.comment.unwrap_or_else(|| FOREIGN.to_owned()));
    }
    for (name, set) in socket.dump(&ask(GET_SET, ours()), set)? {
        let there = match set {
            Some(set) => elements(socket, &ask(GET_ELEMENTS, ours().text(2, &name)), &set)?,
            None => FoundSet { declaration: FOREIGN.to_owned(), ..FoundSet::default() },
        };
        found.sets.insert(name, there);
    }
    Ok(Some(found))
}

/// The netlink ports of the programs that own tables of ours (`NFT_TABLE_F_OWNER`).
pub(super) fn owners(socket: &mut RequestSocket) -> Vec<(TableFamily, u32)> {
    let mut owners = vec![];
    for family in [TableFamily::Inet, TableFamily::Bridge] {
        // NFTA_TABLE_OWNER
        let owner = socket.ask(&ask(GET_TABLE, ours(family)), |frame| Values::of(frame).number(7));
        owners.extend(owner.ok().flatten().map(|port| (family, port)));
    }
    owners
}

fn ask(kind: u16, body: Attributes) -> Request {
    Request::raw(message(kind), 0, body.into_bytes())
}

fn ours(family: TableFamily) -> Attributes {
    Attributes::message(nfproto(family), 0).text(1, TABLE)
}

/// By what a kernel shows that it has no nftables, or not this family.
pub(in crate::kernel) fn lacks_nftables(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT))
}

/// The rules of our table, in their order.
fn rules(socket: &mut RequestSocket, family: TableFamily) -> io::Result<Vec<RuleFound>> {
    match socket.dump(&ask(GET_RULE, ours(family)), rule) {
        Err(error) if lacks_nftables(&error) => Ok(vec![]),
        rules => rules,
    }
}

fn elements(socket: &mut RequestSocket, listing: &Request, set: &Set) -> io::Result<FoundSet> {
    let listed: Vec<_> = socket.dump(listing, |frame| Some(elements_of(frame, set)))?.into_iter().flatten().collect();
    let foreign = listed.contains(&None);
    let declaration = if foreign { format!("with an element {FOREIGN}") } else { set.declaration() };
    Ok(FoundSet { declaration, elements: listed.into_iter().flatten().collect() })
}

/// Whether an event of nftables is about a table of ours.
pub(super) fn concerns_us(frame: &Frame<'_>) -> bool {
    let family = frame.body.first().copied();
    let families = [TableFamily::Inet, TableFamily::Bridge].map(|family| Some(nfproto(family)));
    families.contains(&family) && Values::of(frame).is_ours()
}

/// A chain's name and hook.
fn chain(frame: &Frame<'_>) -> Option<(String, String)> {
    let values = Values::of(frame);
    let name = values.is_ours().then(|| values.text(3))??.to_owned();
    let Some(place) = values.nested(4) else { return Some((name, NO_HOOK.to_owned())) };
    let hook = || {
        let place = [Place::Prerouting, Place::Input, Place::Forward, Place::Output, Place::Postrouting]
            .into_iter()
            .find(|known| Some(*known as u32) == place.number(1))?;
        let kind = values.text(7)?;
        let kind = [ChainKind::Filter, ChainKind::Nat].into_iter().find(|known| chain_kind(*known) == kind)?;
        let priority = place_priority(&values)?;
        (values.number(5) == Some(1)).then(|| Hook { kind, place, priority }.to_string())
    };
    Some((name, hook().unwrap_or_else(|| FOREIGN.to_owned())))
}

fn place_priority(values: &Values<'_>) -> Option<i32> {
    Some(values.nested(4)?.number(2)?.cast_signed())
}

/// A rule, as far as it has to be known.
pub(super) struct RuleFound {
    pub(super) chain: String,
    pub(super) comment: Option<String>,
    pub(super) counter: Option<Count>,
}

impl RuleFound {
    /// Adds its packets to those of its reason.
    fn count(&self, dropped: &mut Dropped) {
        if let Some((reason, counter)) = self.comment.as_deref().and_then(reason).zip(self.counter) {
            let sum = dropped.entry(reason.to_owned()).or_default();
            sum.packets += counter.packets;
            sum.bytes += counter.bytes;
        }
    }
}

pub(super) fn rule(frame: &Frame<'_>) -> Option<RuleFound> {
    let values = Values::of(frame);
    let chain = values.is_ours().then(|| values.text(2))??.to_owned();
    let comment = comment(&values);
    Some(RuleFound {
        chain,
        comment: comment.map(str::to_owned),
        counter: values.nested(4).and_then(|list| counter(&list)),
    })
}

/// The counter among a rule's expressions.
fn counter(list: &Values<'_>) -> Option<Count> {
    let data = list.list().find(|expression| expression.text(1) == Some("counter"))?.nested(2)?;
    // NFTA_COUNTER_BYTES, NFTA_COUNTER_PACKETS
    let number = |kind| Some(u64::from_be_bytes(data.bytes(kind)?.try_into().ok()?));
    Some(Count { bytes: number(1)?, packets: number(2)? })
}

/// A set by its name; `None` when it isn't of a kind that we make.
fn set(frame: &Frame<'_>) -> Option<(String, Option<Set>)> {
    const KEYS: [&[KeyField]; 7] = [
        &[KeyField::V4],
        &[KeyField::V6],
        &[KeyField::Interface],
        &[KeyField::V4, KeyField::V4],
        &[KeyField::V6, KeyField::V6],
        &[KeyField::Interface, KeyField::Mac, KeyField::V4],
        &[KeyField::Interface, KeyField::Mac, KeyField::V6],
    ];
    let values = Values::of(frame);
    let name = values.is_ours().then(|| values.text(2))??.to_owned();
    let (flags, kind) = (values.number(3).unwrap_or(0), values.number(4).unwrap_or(0));
    let key = KEYS.into_iter().find(|key| key.iter().fold(0, |kind, f| kind << TYPE_BITS | datatype(*f)) == kind);
    let known = flags & !(INTERVAL | CONCATENATED) == 0;
    let set = key.filter(|_| known).map(|key| Set { key, ranges: flags & INTERVAL != 0, elements: CowSet::default() });
    Some((name, set))
}

/// The elements of one message of a set's listing; `None` for one that we don't make.
fn elements_of(frame: &Frame<'_>, set: &Set) -> Vec<Option<Element>> {
    let Some(list) = Values::of(frame).nested(3) else { return vec![] };
    list.list().map(|element| element_of(&element, set)).collect()
}

fn element_of(element: &Values<'_>, set: &Set) -> Option<Element> {
    let first = element.nested(1)?.bytes(1)?;
    let last = element.nested(10).and_then(|end| end.bytes(1)).unwrap_or(first);
    let mut at = 0;
    let mut parts = vec![];
    for field in set.key {
        let (low, high) = (first.get(at..at + width(*field))?, last.get(at..at + width(*field))?);
        parts.push(match field {
            KeyField::V4 => Part::Net(net(Family::V4, low, high)?),
            KeyField::V6 => Part::Net(net(Family::V6, low, high)?),
            KeyField::Interface => Part::Interface(std::str::from_utf8(low).ok()?.trim_end_matches('\0').parse().ok()?),
            KeyField::Mac => Part::Mac(<[u8; 6]>::try_from(low).ok()?.try_into().ok()?),
        });
        at += width(*field).next_multiple_of(4);
    }
    Some(parts.into_iter().collect())
}

/// The prefix that begins and ends there, if it is one.
fn net(family: Family, first: &[u8], last: &[u8]) -> Option<Subnet> {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |number, byte| number << 8 | u128::from(*byte));
    let (first, last) = (number(first), number(last));
    let length = family.bits() - u8::try_from((first ^ last).checked_ilog2().map_or(0, |bit| bit + 1)).ok()?;
    let net = Subnet::holding(from_bits(family, first), length).ok()?;
    let same = |ip, bits| fabric_core::model::to_bits(ip) == bits;
    (same(net.base(), first) && same(net.last(), last)).then_some(net)
}
