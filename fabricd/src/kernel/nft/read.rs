//! What is there of our tables, as far as it has to be known: see [`fabric_core::rules::change`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use fabric_core::model::{Family, Subnet, from_bits};
use fabric_core::rules::change::{Found, FoundTable, Layout, chain_line, rule_line, set_line};
use fabric_core::rules::{ChainKind, Element, Hook, KeyField, Part, Place, Set, TABLE, TableFamily};
use netlink_packet_core::parse_u32_be;

use super::attributes::Attributes;
use super::encode::{CONCATENATED, RANGES, TYPE_BITS, chain_kind, datatype, width};
use super::{message, nfproto};
use crate::kernel::socket::RequestSocket;
use crate::kernel::wire::{Frame, Request, attributes};

/// `NFT_MSG_GET*`.
const GET_TABLE: u16 = 1;
const GET_CHAIN: u16 = 4;
pub(super) const GET_RULE: u16 = 7;
const GET_SET: u16 = 10;
const GET_ELEMENTS: u16 = 13;

/// A line that no table of ours has: it is going to be replaced.
const FOREIGN: &str = "of somebody else";

/// `nft list table inet fabric`, `nft list table bridge fabric`.
pub(super) fn tables(socket: &mut RequestSocket) -> io::Result<Found> {
    let mut found = Found::new();
    for family in [TableFamily::Inet, TableFamily::Bridge] {
        if let Some(table) = table(socket, family)? {
            found.insert(family, table);
        }
    }
    Ok(found)
}

fn table(socket: &mut RequestSocket, family: TableFamily) -> io::Result<Option<FoundTable>> {
    let ask = |kind, body: Attributes| Request::raw(message(kind), 0, body.into_bytes());
    let ours = || Attributes::message(nfproto(family), 0).text(1, TABLE);
    let flags = match socket.ask(&ask(GET_TABLE, ours()), |frame| Some(Values::of(frame).number(2).unwrap_or(0))) {
        Ok(Some(flags)) => flags,
        // The last three: a kernel without nftables, or without this family.
        Err(error)
            if !matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT)
            ) =>
        {
            return Err(error);
        }
        _ => return Ok(None),
    };
    let mut layout = Layout::new();
    if flags != 0 {
        // Dormant, or owned by another program.
        layout.insert(format!("table with flags {flags:#x}"));
    }
    layout.extend(socket.dump(&ask(GET_CHAIN, ours()), chain)?);

    let mut positions: BTreeMap<String, usize> = BTreeMap::new();
    for (chain, comment) in socket.dump(&ask(GET_RULE, ours()), rule)? {
        let position = positions.entry(chain.clone()).or_default();
        layout.insert(rule_line(&chain, *position, comment.as_deref()));
        *position += 1;
    }
    let mut elements = BTreeMap::new();
    for (name, set) in socket.dump(&ask(GET_SET, ours()), set)? {
        let Some(set) = set else {
            layout.insert(set_line(&name, FOREIGN));
            continue;
        };
        layout.insert(set_line(&name, &set.declaration()));
        let listed = socket.dump(&ask(GET_ELEMENTS, ours().text(2, &name)), |frame| Some(elements_of(frame, &set)))?;
        let listed: Vec<Option<Element>> = listed.into_iter().flatten().collect();
        if listed.contains(&None) {
            layout.insert(set_line(&name, "with an element of somebody else"));
        }
        elements.insert(name, listed.into_iter().flatten().collect::<BTreeSet<Element>>());
    }
    Ok(Some(FoundTable { layout, elements }))
}

/// The attributes of a message.
pub(super) struct Values<'a>(pub(super) &'a [u8]);

impl<'a> Values<'a> {
    /// Those behind the `struct nfgenmsg`.
    pub(super) fn of(frame: &Frame<'a>) -> Self {
        Self(frame.body.get(4..).unwrap_or_default())
    }

    pub(super) fn bytes(&self, wanted: u16) -> Option<&'a [u8]> {
        attributes(self.0).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
    }

    pub(super) fn text(&self, wanted: u16) -> Option<&'a str> {
        std::str::from_utf8(self.bytes(wanted)?).ok().map(|text| text.trim_end_matches('\0'))
    }

    fn number(&self, wanted: u16) -> Option<u32> {
        parse_u32_be(self.bytes(wanted)?).ok()
    }

    pub(super) fn nested(&self, wanted: u16) -> Option<Self> {
        self.bytes(wanted).map(Self)
    }

    /// Whether it is about a table of ours: every kind of message has the table's name first.
    pub(super) fn is_ours(&self) -> bool {
        self.text(1) == Some(TABLE)
    }
}

/// Whether an event of nftables is about a table of ours.
pub(super) fn concerns_us(frame: &Frame<'_>) -> bool {
    let family = frame.body.first().copied();
    let families = [TableFamily::Inet, TableFamily::Bridge].map(|family| Some(nfproto(family)));
    families.contains(&family) && Values::of(frame).is_ours()
}

fn chain(frame: &Frame<'_>) -> Option<String> {
    let values = Values::of(frame);
    let name = values.is_ours().then(|| values.text(3))??;
    let Some(place) = values.nested(4) else { return Some(chain_line(name, None)) };
    let hook = || {
        let place = [Place::Prerouting, Place::Input, Place::Forward, Place::Output, Place::Postrouting]
            .into_iter()
            .find(|known| Some(*known as u32) == place.number(1))?;
        let kind = values.text(7)?;
        let kind = [ChainKind::Filter, ChainKind::Nat].into_iter().find(|known| chain_kind(*known) == kind)?;
        let priority = place_priority(&values)?;
        (values.number(5) == Some(1)).then(|| Hook { kind, place, priority }.to_string())
    };
    Some(chain_line(name, Some(hook().as_deref().unwrap_or(FOREIGN))))
}

fn place_priority(values: &Values<'_>) -> Option<i32> {
    Some(values.nested(4)?.number(2)?.cast_signed())
}

fn rule(frame: &Frame<'_>) -> Option<(String, Option<String>)> {
    let values = Values::of(frame);
    let chain = values.is_ours().then(|| values.text(2))??.to_owned();
    Some((chain, comment_of(&values).map(str::to_owned)))
}

/// The comment of a rule.
pub(super) fn comment_of<'a>(rule: &Values<'a>) -> Option<&'a str> {
    // Type 0 is the comment: type, length, text and a zero.
    let comment = match rule.bytes(7) {
        Some([0, length, text @ ..]) => text.get(..usize::from(*length)),
        _ => None,
    };
    comment.and_then(|text| std::str::from_utf8(text).ok()).map(|text| text.trim_end_matches('\0'))
}

/// A set by its name; `None` when it isn't of a kind that we make.
fn set(frame: &Frame<'_>) -> Option<(String, Option<Set>)> {
    const KEYS: [&[KeyField]; 6] = [
        &[KeyField::V4],
        &[KeyField::V6],
        &[KeyField::Interface],
        &[KeyField::V4, KeyField::V4],
        &[KeyField::V6, KeyField::V6],
        &[KeyField::Interface, KeyField::Mac, KeyField::V4],
    ];
    let values = Values::of(frame);
    let name = values.is_ours().then(|| values.text(2))??.to_owned();
    let (flags, kind) = (values.number(3).unwrap_or(0), values.number(4).unwrap_or(0));
    let key = KEYS.into_iter().find(|key| key.iter().fold(0, |kind, f| kind << TYPE_BITS | datatype(*f)) == kind);
    let known = flags & !(RANGES | CONCATENATED) == 0;
    let set = key.filter(|_| known).map(|key| Set { key, ranges: flags & RANGES != 0, elements: BTreeSet::new() });
    Some((name, set))
}

/// The elements of one message of a set's listing; `None` for one that we don't make.
fn elements_of(frame: &Frame<'_>, set: &Set) -> Vec<Option<Element>> {
    let Some(list) = Values::of(frame).nested(3) else { return vec![] };
    attributes(list.0).map(|(_, element)| element_of(&Values(element), set)).collect()
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
    Some(Element(parts))
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
