//! Sets and maps: what their elements are made of, and the elements as the kernel keeps them.

use std::net::IpAddr;

use smallvec::SmallVec;

use super::{Name, Verdict};
use crate::cow_map::CowSet;
use crate::model::{IfName, MacAddr, Subnet};

/// A set or a map that rules look into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// Its declaration.
    pub kind: SetKind,
    /// When its elements are written.
    pub order: Order,
    /// The elements; none of a set that packets add to. What is there shares them with what is wanted once it is written, so
    /// that thousands are neither kept nor compared twice.
    pub elements: CowSet<Element>,
}

/// When the elements of a set are written. Those of a verdict map come after the chains that they name, and go before them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// They come and go before the chains are written.
    #[default]
    BeforeChains,
    /// They come before the chains and before the elements that lead to them, and go after these: addresses of a pool.
    AroundChains,
    /// They come and go after the chains and after the elements that they lead to: frontends of Services.
    AfterChains,
}

/// How a set is declared: what its elements are made of, and who adds them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SetKind {
    /// What an element is found by.
    pub key: Fields,
    /// What it leads to.
    pub data: Data,
    /// Whether a key is a range, with a lowest and a highest value of each field. Looking into such a set costs more the more
    /// elements there are, and so does each change of it. Of one field since always, of several since kernel 5.6.
    pub ranges: bool,
    /// Elements that packets add. Such a set is owned as a whole: its elements are neither read nor compared.
    pub dynamic: Option<DynamicSet>,
}

/// What an element leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Data {
    /// Nothing: it is in the set, or not.
    None,
    /// Values.
    Fields(Fields),
    /// What happens to the packet.
    Verdict,
}

/// A set that packets add to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DynamicSet {
    /// How many elements it may have.
    pub most: u32,
    /// Whether elements end by themselves. When is said by the rule that adds them.
    pub timeout: bool,
}

impl SetKind {
    /// A set with these fields.
    #[must_use]
    pub const fn of(key: &[Datatype]) -> Self {
        Self { key: Fields::of(key), data: Data::None, ranges: false, dynamic: None }
    }

    /// A map to such values.
    #[must_use]
    pub const fn to(self, data: &[Datatype]) -> Self {
        Self { data: Data::Fields(Fields::of(data)), ..self }
    }

    /// A verdict map.
    #[must_use]
    pub const fn to_verdicts(self) -> Self {
        Self { data: Data::Verdict, ..self }
    }

    /// The same with ranges as keys.
    #[must_use]
    pub const fn of_ranges(self) -> Self {
        Self { ranges: true, ..self }
    }

    /// One that packets add to: so many elements at most, which end by themselves.
    #[must_use]
    pub const fn dynamic(self, most: u32) -> Self {
        Self { dynamic: Some(DynamicSet { most, timeout: true }), ..self }
    }

    /// Bytes of a key in an element: of both ends where it is a range.
    #[must_use]
    pub fn key_size(self) -> usize {
        self.key.size() * if self.ranges { 2 } else { 1 }
    }
}

/// One field of a key or of data, by the kernel's widths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Datatype {
    /// IPv4 address.
    V4,
    /// IPv6 address.
    V6,
    /// Protocol over IP (`IPPROTO_*`).
    Protocol,
    /// Port of TCP, UDP or SCTP.
    Port,
    /// A number of 32 bits in this machine's byte order: an id, a mark. `nft` has it for a mark.
    Number,
    /// Name of an interface.
    Interface,
    /// Ethernet address.
    Mac,
}

impl Datatype {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::V4, Self::V6, Self::Protocol, Self::Port, Self::Number, Self::Interface, Self::Mac];

    /// Bytes that it has.
    #[must_use]
    pub const fn width(self) -> usize {
        match self {
            Self::Protocol => 1,
            Self::Port => 2,
            Self::V4 | Self::Number => 4,
            Self::Mac => 6,
            Self::V6 | Self::Interface => 16,
        }
    }

    /// Bytes that it takes in a key of several: a multiple of four, as registers are.
    #[must_use]
    pub const fn padded(self) -> usize {
        self.width().next_multiple_of(4)
    }
}

/// The fields of a key or of data, five at most (`ipv4_addr . inet_proto . inet_service`).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fields {
    types: [Datatype; Self::MOST],
    len: u8,
}

impl Fields {
    /// `nft` can't show more: it has 6 bits for each in a number of 32.
    pub const MOST: usize = 5;

    /// These fields.
    ///
    /// # Panics
    /// Of none, or more than [`Fields::MOST`].
    #[must_use]
    pub const fn of(fields: &[Datatype]) -> Self {
        assert!(!fields.is_empty() && fields.len() <= Self::MOST, "a key has one to five fields");
        let (mut types, mut at) = ([fields[0]; Self::MOST], 0);
        while at < Self::MOST {
            // The rest repeats the first, so that equal fields are equal.
            types[at] = fields[if at < fields.len() { at } else { 0 }];
            at += 1;
        }
        #[expect(clippy::cast_possible_truncation, reason = "five at most")]
        Self { types, len: fields.len() as u8 }
    }

    /// The fields, in order.
    #[must_use]
    pub fn as_slice(&self) -> &[Datatype] {
        &self.types[..usize::from(self.len)]
    }

    /// Bytes of all, each filled up to a multiple of four.
    #[must_use]
    pub fn size(&self) -> usize {
        self.as_slice().iter().map(|field| field.padded()).sum()
    }
}

impl std::fmt::Debug for Fields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.as_slice().fmt(f)
    }
}

/// Bytes of an element that are kept in place; a longer one has them on the heap.
const IN_PLACE: usize = 40;

/// An element of a set or map, packed as the kernel keeps it: the key (of a range its lowest and then its highest value),
/// and then the data. Each field is filled up to four bytes. Elements are ordered by their keys, and with the set's
/// [`SetKind`] it is known where the key ends.
///
/// There may be 100,000, so one takes 48 bytes, with what is in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element(SmallVec<[u8; IN_PLACE]>);

/// One part of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// An address.
    Ip(IpAddr),
    /// The addresses of a prefix, where ranges are looked up; elsewhere its first.
    Net(Subnet),
    /// Protocol over IP.
    Protocol(u8),
    /// A port.
    Port(u16),
    /// Ports from the first to the last, where ranges are looked up; elsewhere the first.
    Ports(u16, u16),
    /// Every protocol, where ranges are looked up.
    AnyProtocol,
    /// An id or a mark.
    Number(u32),
    /// An interface.
    Interface(IfName),
    /// An Ethernet address.
    Mac(MacAddr),
}

impl Part {
    /// Appends its lowest value, or its highest, filled up to a multiple of four bytes.
    fn put(self, highest: bool, to: &mut SmallVec<[u8; IN_PLACE]>) {
        let mut ip = |ip| match ip {
            IpAddr::V4(ip) => to.extend_from_slice(&ip.octets()),
            IpAddr::V6(ip) => to.extend_from_slice(&ip.octets()),
        };
        match self {
            Self::Ip(address) => ip(address),
            Self::Net(net) => ip(if highest { net.last() } else { net.base() }),
            Self::Protocol(number) => to.push(number),
            Self::AnyProtocol => to.push(if highest { u8::MAX } else { 0 }),
            Self::Port(port) => to.extend_from_slice(&port.to_be_bytes()),
            Self::Ports(first, last) => to.extend_from_slice(&if highest { last } else { first }.to_be_bytes()),
            Self::Number(number) => to.extend_from_slice(&number.to_ne_bytes()),
            Self::Interface(name) => to.extend_from_slice(&name.bytes()),
            Self::Mac(mac) => to.extend_from_slice(&mac.octets()),
        }
        to.resize(to.len().next_multiple_of(4), 0);
    }
}

impl Element {
    /// An element of a set; of a map see [`Element::to`].
    pub fn new(key: impl IntoIterator<Item = Part>) -> Self {
        let mut bytes = SmallVec::new();
        key.into_iter().for_each(|part| part.put(false, &mut bytes));
        Self(bytes)
    }

    /// An element of a set of ranges: prefixes and ports from both ends, anything else as it is.
    #[must_use]
    pub fn range(key: &[Part]) -> Self {
        let mut bytes = SmallVec::new();
        for highest in [false, true] {
            key.iter().for_each(|part| part.put(highest, &mut bytes));
        }
        Self(bytes)
    }

    /// The same, leading to these values.
    #[must_use]
    pub fn to(mut self, data: impl IntoIterator<Item = Part>) -> Self {
        data.into_iter().for_each(|part| part.put(false, &mut self.0));
        self
    }

    /// The same, leading to what happens to the packet.
    #[must_use]
    pub fn to_verdict(mut self, verdict: Verdict) -> Self {
        self.0.push(verdict.code());
        self.0.extend_from_slice(verdict.chain().as_ref().map_or("", Name::as_str).as_bytes());
        self
    }

    /// An element that the kernel keeps: the key's bytes as told above, and those of the data.
    #[must_use]
    pub fn packed(key: &[u8], data: &[u8]) -> Self {
        let mut bytes = SmallVec::from_slice(key);
        bytes.extend_from_slice(data);
        Self(bytes)
    }

    /// Whether its first fields are those of another.
    #[must_use]
    pub fn starts_with(&self, first: &Self) -> bool {
        self.0.starts_with(&first.0)
    }

    /// Key and data of an element of such a set. All of it is key where it has no more bytes.
    #[must_use]
    pub fn split(&self, kind: SetKind) -> (&[u8], &[u8]) {
        self.0.split_at(kind.key_size().min(self.0.len()))
    }

    /// The bytes of the lowest key and of the highest, which is the same but for a range.
    #[must_use]
    pub fn ends(&self, kind: SetKind) -> (&[u8], &[u8]) {
        let (key, _) = self.split(kind);
        match kind.ranges {
            true => key.split_at(key.len() / 2),
            false => (key, key),
        }
    }

    /// What it leads to in a verdict map; `None` when it is nothing of ours.
    #[must_use]
    pub fn verdict(&self, kind: SetKind) -> Option<Verdict> {
        let (_, data) = self.split(kind);
        let (code, chain) = data.split_first()?;
        Verdict::of(*code, std::str::from_utf8(chain).ok()?)
    }
}

impl<const N: usize> From<[Part; N]> for Element {
    fn from(parts: [Part; N]) -> Self {
        Self::new(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FRONTENDS: SetKind =
        SetKind::of(&[Datatype::V6, Datatype::Protocol, Datatype::Port]).to(&[Datatype::Number; 3]);

    fn frontend(data: [u32; 3]) -> Element {
        let key = [Part::Ip("2001:db8::1".parse().expect("valid")), Part::Protocol(6), Part::Port(80)];
        Element::from(key).to(data.map(Part::Number))
    }

    #[test]
    fn element_of_the_longest_frontend_takes_48_bytes_in_all() {
        assert_eq!(size_of::<Element>(), 48);
        assert!(!frontend([1, 2, 3]).0.spilled());
    }

    #[test]
    fn elements_are_ordered_by_key_and_show_what_they_lead_to() {
        let (one, other) = (frontend([1, 2, 3]), frontend([1, 4, 1]));
        assert_eq!(one.split(FRONTENDS).0, other.split(FRONTENDS).0);
        assert_ne!(one, other);
        assert_eq!(one.shown(FRONTENDS).to_string(), "2001:db8::1 . 6 . 80 : 1 . 2 . 3");
        let verdicts = SetKind::of(&[Datatype::Interface]).to_verdicts();
        let port = Part::Interface("veth1".parse().expect("valid"));
        for verdict in
            [Verdict::Accept, Verdict::Drop, Verdict::Return, Verdict::Jump("c-1".into()), Verdict::Goto("c-2".into())]
        {
            let element = Element::from([port]).to_verdict(verdict);
            assert_eq!(element.verdict(verdicts), Some(verdict));
            assert_eq!(element.shown(verdicts).to_string(), format!("\"veth1\" : {verdict}"));
        }
    }

    #[test]
    fn ranges_are_shown_as_prefixes_where_they_are_some() {
        let kind = SetKind::of(&[Datatype::Number, Datatype::V4]).of_ranges();
        let block = Element::range(&[Part::Number(7), Part::Net("198.51.100.0/25".parse().expect("valid"))]);
        assert_eq!(block.shown(kind).to_string(), "7 . 198.51.100.0/25");
        let ports = SetKind::of(&[Datatype::Number, Datatype::Protocol, Datatype::Port]).of_ranges();
        let range = Element::range(&[Part::Number(7), Part::AnyProtocol, Part::Ports(80, 89)]);
        assert_eq!(range.shown(ports).to_string(), "7 . 0-255 . 80-89");
        // What somebody else put there is shown too, whatever it is.
        let odd = Element::packed(&[198, 51, 100, 3, 198, 51, 100, 5], &[]);
        assert_eq!(odd.shown(SetKind::of(&[Datatype::V4]).of_ranges()).to_string(), "198.51.100.3-198.51.100.5");
        assert_eq!(Element::packed(&[1], &[]).shown(kind).to_string(), "? . ?");
    }
}
