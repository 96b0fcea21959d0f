//! The two address families, and what is said of a value that is none of its type.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;

/// An address family. Everything that exists once per family says so with [`PerFamily`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, in the order in which everything is listed.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// Address length in bits: 32 or 128.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// Bytes that VXLAN adds to a packet over an underlay of this family (RFC 7348 section 5):
    /// the outer IP header, UDP 8, VXLAN 8 and the inner Ethernet header 14.
    #[must_use]
    pub fn vxlan_overhead(self) -> u32 {
        match self {
            Self::V4 => 20 + 8 + 8 + 14,
            Self::V6 => 40 + 8 + 8 + 14,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What is wrong with a value of one of these types: which value, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a {what}: {expected}")]
pub struct Invalid {
    what: &'static str,
    value: String,
    expected: Cow<'static, str>,
}

impl Invalid {
    /// Says that `value` is no `what`, and what was expected.
    pub(crate) fn new(what: &'static str, value: &str, expected: impl Into<Cow<'static, str>>) -> Self {
        // What is quoted may come from another node: keep it short whatever it is.
        Self { what, value: value.chars().take(80).collect(), expected: expected.into() }
    }
}
