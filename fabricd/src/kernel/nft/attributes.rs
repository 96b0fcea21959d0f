//! The attributes of nftables (linux/netfilter/nfnetlink.h): behind a `struct nfgenmsg`, with numbers in network order.

use fabric_core::state::nft::TableKey;
pub(in crate::kernel) use fabric_netlink::Attributes;
use fabric_netlink::{Frame, attribute, attributes};
use netlink_packet_core::parse_u32_be;

/// What nfnetlink adds to [`Attributes`].
pub(in crate::kernel) trait Nfnetlink: Sized {
    /// A message begins with a `struct nfgenmsg`: family, version 0, resource (network order).
    fn message(family: u8, resource: u16) -> Self;

    /// Numbers are in network order.
    fn number(self, kind: u16, value: u32) -> Self;

    /// What there may be to say.
    fn maybe<T>(self, value: Option<T>, add: impl FnOnce(Self, T) -> Self) -> Self {
        match value {
            Some(value) => add(self, value),
            None => self,
        }
    }
}

impl Nfnetlink for Attributes {
    fn message(family: u8, resource: u16) -> Self {
        let [high, low] = resource.to_be_bytes();
        Self::behind([family, 0, high, low])
    }

    fn number(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }
}

/// The attributes of a message.
pub(in crate::kernel) struct Values<'a>(&'a [u8]);

impl<'a> Values<'a> {
    /// Those behind the `struct nfgenmsg`.
    pub(in crate::kernel) fn of(frame: &Frame<'a>) -> Self {
        Self(frame.body.get(4..).unwrap_or_default())
    }

    pub(in crate::kernel) fn bytes(&self, wanted: u16) -> Option<&'a [u8]> {
        attribute(self.0, wanted)
    }

    pub(in crate::kernel) fn text(&self, wanted: u16) -> Option<&'a str> {
        std::str::from_utf8(self.bytes(wanted)?).ok().map(|text| text.trim_end_matches('\0'))
    }

    pub(in crate::kernel) fn number(&self, wanted: u16) -> Option<u32> {
        parse_u32_be(self.bytes(wanted)?).ok()
    }

    pub(in crate::kernel) fn nested(&self, wanted: u16) -> Option<Self> {
        self.bytes(wanted).map(Self)
    }

    /// No attributes.
    pub(in crate::kernel) fn none() -> Self {
        Self(&[])
    }

    /// The attributes of each element of a list.
    pub(in crate::kernel) fn list(&self) -> impl Iterator<Item = Self> + use<'a> {
        attributes(self.0).map(|(_, element)| Self(element))
    }

    /// Whether it is about this table, by its name: every kind of message has that first.
    pub(super) fn is_of(&self, table: TableKey) -> bool {
        self.text(1) == Some(table.name())
    }
}
