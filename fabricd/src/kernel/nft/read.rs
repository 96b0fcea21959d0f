//! What is there of our tables, as far as it has to be known: see [`fabric_core::state::nft`].

use std::io;
use std::sync::Arc;

use fabric_core::policy::drops::DropCause;
use fabric_core::state::nft::{
    ChainKind, Data, Datatype, DynamicSet, Element, Fields, FoundSet, FoundTable, Hook, NO_HOOK, Name, Place, SetKind,
    TableFamily, TableKey, Verdict, reason,
};
use fabric_netlink::{Frame, Request, RequestSocket};

use super::attributes::{Attributes, Nfnetlink as _, Values};
use super::encode::{flags, key_type, length, start};
use super::expr::verdict_code;
use super::rule::comment;
use super::uapi::{
    CATCH_ALL, DATA_VALUE, DATA_VERDICT, DYNAMIC, GET_CHAIN, GET_ELEMENTS, GET_GENERATION, GET_RULE, GET_SET,
    GET_TABLE, INTERVAL, INTERVAL_END, MAP, TIMEOUT, TYPE_BITS, VERDICT_DATA, chain_kind, datatype, message, nfproto,
};
use crate::kernel::{Count, Dropped};

/// In the place of what no chain of ours has: it is going to be replaced.
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

/// What the rules of a table have dropped.
pub(super) fn dropped(socket: &mut RequestSocket, table: TableKey) -> io::Result<Dropped> {
    let mut dropped = Dropped::new();
    rules(socket, table)?.iter().for_each(|rule| rule.count(&mut dropped));
    Ok(dropped)
}

/// `nft list table TABLE`: what is there, if it is, and what its rules have dropped.
pub(super) fn table(socket: &mut RequestSocket, table: TableKey) -> io::Result<(Option<FoundTable>, Dropped)> {
    let mut dropped = Dropped::new();
    let flags = match socket.ask(&ask(GET_TABLE, start(table)), |frame| Some(Values::of(frame).number(2).unwrap_or(0)))
    {
        Ok(Some(flags)) => flags,
        Err(error) if error.raw_os_error() != Some(libc::ENOENT) && !lacks_nftables(&error) => return Err(error),
        _ => return Ok((None, dropped)),
    };
    // Dormant, or owned by another program.
    let mut found = FoundTable { disabled: flags != 0, ..FoundTable::default() };
    let chains = socket.dump(&ask(GET_CHAIN, start(table)), |frame| chain(frame, table))?;
    found.chains.extend(chains.into_iter().map(|(name, hook)| (name, Arc::new(vec![hook]))));
    for rule in rules(socket, table)? {
        rule.count(&mut dropped);
        let lines = found.chains.entry(rule.chain).or_default();
        Arc::make_mut(lines).push(rule.comment.unwrap_or_else(|| FOREIGN.to_owned()));
    }
    for (name, kind) in socket.dump(&ask(GET_SET, start(table)), |frame| set(frame, table))? {
        let there = match kind {
            Some(kind) if kind.dynamic.is_none() => elements(socket, table, &name, kind)?,
            kind => FoundSet { kind, ..FoundSet::default() },
        };
        found.sets.insert(name, there);
    }
    Ok((Some(found), dropped))
}

/// The netlink ports of the programs that own tables of ours (`NFT_TABLE_F_OWNER`).
pub(super) fn owners(socket: &mut RequestSocket) -> Vec<(TableKey, u32)> {
    let mut owners = vec![];
    for table in TableKey::ALL {
        // NFTA_TABLE_OWNER
        let owner = socket.ask(&ask(GET_TABLE, start(table)), |frame| Values::of(frame).number(7));
        owners.extend(owner.ok().flatten().map(|port| (table, port)));
    }
    owners
}

fn ask(kind: u16, body: Attributes) -> Request {
    Request::raw(message(kind), 0, body.into_bytes())
}

/// By what a kernel shows that it has no nftables, or not this family.
pub(in crate::kernel) fn lacks_nftables(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT))
}

/// The rules of a table, in their order.
fn rules(socket: &mut RequestSocket, table: TableKey) -> io::Result<Vec<RuleFound>> {
    match socket.dump(&ask(GET_RULE, start(table)), |frame| rule(frame, table)) {
        Err(error) if lacks_nftables(&error) => Ok(vec![]),
        rules => rules,
    }
}

/// The table of ours that an event of nftables is about.
pub(in crate::kernel) fn concerned(frame: &Frame<'_>) -> Option<TableKey> {
    let family = *frame.body.first()?;
    let name = Values::of(frame).text(1)?;
    let families = [TableFamily::Inet, TableFamily::Bridge];
    families.into_iter().filter(|known| nfproto(*known) == family).find_map(|family| TableKey::of(family, name))
}

/// A chain's name and hook.
fn chain(frame: &Frame<'_>, table: TableKey) -> Option<(String, String)> {
    let values = Values::of(frame);
    let name = values.is_of(table).then(|| values.text(3))??.to_owned();
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
    /// What it counts isn't thrown away.
    pub(super) lets_pass: bool,
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

pub(super) fn rule(frame: &Frame<'_>, table: TableKey) -> Option<RuleFound> {
    let values = Values::of(frame);
    let chain = values.is_of(table).then(|| values.text(2))??.to_owned();
    let comment = comment(&values);
    let list = values.nested(4).unwrap_or_else(Values::none);
    let (counter, lets_pass) = (counter(&list), lets_pass(&list));
    Some(RuleFound { chain, comment: comment.map(str::to_owned), counter, lets_pass })
}

/// Whether a rule's expressions end with `accept` or `return`, or go to a chain that needn't drop.
fn lets_pass(list: &Values<'_>) -> bool {
    // NFTA_IMMEDIATE_DATA
    let verdict_of = |expression: Values<'_>| verdict(&expression.nested(2)?.nested(2)?.nested(DATA_VERDICT)?);
    let immediates = list.list().filter(|expression| expression.text(1) == Some("immediate"));
    immediates.filter_map(verdict_of).any(|verdict| match verdict {
        Verdict::Accept | Verdict::Return => true,
        Verdict::Goto(chain) => DropCause::of(chain.as_str()).is_none(),
        Verdict::Drop | Verdict::Jump(_) => false,
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
fn set(frame: &Frame<'_>, table: TableKey) -> Option<(String, Option<SetKind>)> {
    let values = Values::of(frame);
    let name = values.is_of(table).then(|| values.text(2))??.to_owned();
    Some((name, kind(&values)))
}

fn kind(values: &Values<'_>) -> Option<SetKind> {
    // NFTA_SET_FLAGS, _KEY_TYPE, _KEY_LEN, _DATA_TYPE, _DATA_LEN, _DESC, _TIMEOUT
    let had = values.number(3).unwrap_or(0);
    let key = fields(values.number(4)?)?;
    let data = match values.number(6).filter(|_| had & MAP != 0) {
        None => Data::None,
        Some(VERDICT_DATA) => Data::Verdict,
        Some(data) => Data::Fields(fields(data).filter(|data| values.number(7) == Some(length(*data)))?),
    };
    let most = || values.nested(9).and_then(|description| description.number(1)).unwrap_or(0);
    let dynamic = (had & DYNAMIC != 0).then(|| DynamicSet { most: most(), timeout: had & TIMEOUT != 0 });
    let kind = SetKind { key, data, ranges: had & INTERVAL != 0, dynamic };
    (flags(kind) == had && values.number(5) == Some(length(key)) && values.bytes(11).is_none()).then_some(kind)
}

/// The fields that a key's type stands for.
fn fields(kind: u32) -> Option<Fields> {
    let parts = (0..32 / TYPE_BITS).rev().map(|place| kind >> (place * TYPE_BITS) & ((1 << TYPE_BITS) - 1));
    let of = |number| Datatype::ALL.into_iter().find(|known| datatype(*known) == number);
    let types = parts.skip_while(|part| *part == 0).map(of).collect::<Option<Vec<Datatype>>>()?;
    let fields = (!types.is_empty()).then(|| Fields::of(&types))?;
    (key_type(fields) == kind).then_some(fields)
}

/// An element as the kernel lists it.
struct Listed {
    first: Vec<u8>,
    /// Its highest key, in a set of ranges of several fields.
    last: Option<Vec<u8>>,
    /// It only says where a range of one field ends.
    is_end: bool,
    data: To,
}

/// What an element leads to.
enum To {
    Values(Vec<u8>),
    Verdict(Verdict),
}

fn elements(socket: &mut RequestSocket, table: TableKey, name: &str, kind: SetKind) -> io::Result<FoundSet> {
    let listing = ask(GET_ELEMENTS, start(table).text(2, name));
    let all = if kind.ranges && kind.key.as_slice().len() == 1 {
        list(socket, &listing, |element| listed(element, kind))?.and_then(|listed| ranges(listed, kind))
    } else {
        // There may be 100,000: each is packed as it comes.
        list(socket, &listing, |one| {
            let one = listed(one, kind)?;
            Some(element(&one.first, one.last.as_deref(), one.data, kind))
        })?
    };
    // With an element that we don't make it is not a set that we make.
    Ok(all.map_or_else(FoundSet::default, |elements| FoundSet {
        kind: Some(kind),
        elements: elements.into_iter().collect(),
    }))
}

/// What `decode` makes of all elements of a set; `None` when it can't make anything of one.
fn list<T>(
    socket: &mut RequestSocket,
    listing: &Request,
    mut decode: impl FnMut(&Values<'_>) -> Option<T>,
) -> io::Result<Option<Vec<T>>> {
    let listed = socket.dump(listing, |frame| {
        let list = Values::of(frame).nested(3)?;
        Some(list.list().map(|element| decode(&element)).collect::<Option<Vec<T>>>())
    })?;
    Ok(listed.into_iter().collect::<Option<Vec<_>>>().map(|parts| parts.into_iter().flatten().collect()))
}

fn listed(element: &Values<'_>, kind: SetKind) -> Option<Listed> {
    // NFTA_SET_ELEM_KEY, _DATA, _FLAGS, _KEY_END
    let flags = element.number(3).unwrap_or(0);
    (flags & CATCH_ALL == 0).then_some(())?;
    let right = |bytes: &&[u8]| u32::try_from(bytes.len()) == Ok(length(kind.key));
    let key = |attribute| element.nested(attribute).and_then(|key| key.bytes(DATA_VALUE)).filter(right);
    let is_end = flags & INTERVAL_END != 0;
    let data = match kind.data {
        _ if is_end => To::Values(vec![]),
        Data::None => To::Values(vec![]),
        Data::Fields(_) => To::Values(element.nested(2)?.bytes(DATA_VALUE)?.to_vec()),
        Data::Verdict => To::Verdict(verdict(&element.nested(2)?.nested(DATA_VERDICT)?)?),
    };
    Some(Listed { first: key(1)?.to_vec(), last: key(10).map(<[u8]>::to_vec), is_end, data })
}

/// A verdict that is one of ours.
fn verdict(data: &Values<'_>) -> Option<Verdict> {
    let chain = || data.text(2).filter(|chain| (1..=Name::SIZE).contains(&chain.len())).map(Name::new);
    let code = data.number(1)?.cast_signed();
    let plain = [Verdict::Accept, Verdict::Drop, Verdict::Return].into_iter();
    let known = plain.chain(chain().into_iter().flat_map(|chain| [Verdict::Jump(chain), Verdict::Goto(chain)]));
    { known }.find(|known| verdict_code(*known) == code)
}

/// Ranges of one field, from where they begin and the values behind where they end.
fn ranges(mut listed: Vec<Listed>, kind: SetKind) -> Option<Vec<Element>> {
    listed.sort_by(|one, other| (&one.first, !one.is_end).cmp(&(&other.first, !other.is_end)));
    let mut rest = listed.into_iter().skip_while(|one| one.is_end).peekable();
    let mut ranges = vec![];
    while let Some(begin) = rest.next() {
        (!begin.is_end).then_some(())?;
        let last = match rest.next_if(|next| next.is_end) {
            Some(end) => before(end.first),
            None if rest.peek().is_none() => vec![0xff; begin.first.len()],
            None => return None,
        };
        ranges.push(element(&begin.first, Some(&last), begin.data, kind));
    }
    Some(ranges)
}

/// The value before this one, which isn't 0.
fn before(mut bytes: Vec<u8>) -> Vec<u8> {
    for byte in bytes.iter_mut().rev() {
        let (less, under) = byte.overflowing_sub(1);
        *byte = less;
        if !under {
            break;
        }
    }
    bytes
}

/// An element as we keep it: one field alone is filled up to four bytes as well.
fn element(first: &[u8], last: Option<&[u8]>, data: To, kind: SetKind) -> Element {
    let filled = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let mut key = filled(first);
    if kind.ranges {
        key.extend(filled(last.unwrap_or(first)));
    }
    match data {
        To::Values(data) => Element::packed(&key, &filled(&data)),
        To::Verdict(verdict) => Element::packed(&key, &[]).to_verdict(verdict),
    }
}
