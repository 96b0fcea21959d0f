//! [`Subnet`]: a range of addresses, and the arithmetic on addresses that goes with it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::family::{Family, Invalid};

/// A range of addresses with no host bits set: a node's slice of the network, or the network.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "IpNetwork", into = "IpNetwork")]
pub struct Subnet {
    base: IpAddr,
    len: u8,
}

impl Subnet {
    /// The subnet of `len` bits that holds `ip`.
    ///
    /// # Errors
    /// When `len` is longer than the address.
    pub fn holding(ip: IpAddr, len: u8) -> Result<Self, Invalid> {
        let family = Family::of(ip);
        if len > family.bits() {
            return Err(Invalid::new(
                "subnet",
                &format!("{ip}/{len}"),
                "its length is at most 32 for IPv4, 128 for IPv6",
            ));
        }
        Ok(Self { base: from_bits(family, to_bits(ip) & !host_mask(family, len)), len })
    }

    /// The subnet that is one address alone.
    #[must_use]
    pub fn host(ip: IpAddr) -> Self {
        Self { base: ip, len: Family::of(ip).bits() }
    }

    /// The address family.
    #[must_use]
    pub fn family(self) -> Family {
        Family::of(self.base)
    }

    /// The first address. A node's VTEP owns it.
    #[must_use]
    pub fn base(self) -> IpAddr {
        self.base
    }

    /// The address after the base: the bridge's, which is the pods' gateway.
    #[must_use]
    pub fn gateway(self) -> IpAddr {
        from_bits(self.family(), to_bits(self.base) | u128::from(self.len < self.family().bits()))
    }

    /// The last address.
    #[must_use]
    pub fn last(self) -> IpAddr {
        from_bits(self.family(), to_bits(self.base) | host_mask(self.family(), self.len))
    }

    /// Prefix length in bits.
    #[must_use]
    pub fn prefix_len(self) -> u8 {
        self.len
    }

    /// True when `ip` lies inside.
    #[must_use]
    pub fn contains(self, ip: IpAddr) -> bool {
        Family::of(ip) == self.family() && (self.base..=self.last()).contains(&ip)
    }

    /// True when `other` lies inside, or is the same.
    #[must_use]
    pub fn covers(self, other: Self) -> bool {
        self.contains(other.base) && self.len <= other.len
    }

    /// True when the two share an address.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.covers(other) || other.covers(self)
    }
}

/// An address as a number.
#[must_use]
pub fn to_bits(ip: IpAddr) -> u128 {
    match ip {
        IpAddr::V4(ip) => u128::from(ip.to_bits()),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// The address of a number; of IPv4 the low 32 bits count.
#[must_use]
pub fn from_bits(family: Family, bits: u128) -> IpAddr {
    match family {
        #[expect(clippy::cast_possible_truncation, reason = "the low 32 bits are what is asked for")]
        Family::V4 => IpAddr::V4((bits as u32).into()),
        Family::V6 => IpAddr::V6(bits.into()),
    }
}

fn host_mask(family: Family, len: u8) -> u128 {
    let host_bits = u32::from(family.bits() - len);
    1_u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1)
}

impl TryFrom<IpNetwork> for Subnet {
    type Error = Invalid;

    fn try_from(net: IpNetwork) -> Result<Self, Invalid> {
        if net.network() != net.ip() {
            return Err(Invalid::new(
                "subnet",
                &net.to_string(),
                format!("no bit may be set after the prefix, as in {}/{}", net.network(), net.prefix()),
            ));
        }
        Ok(Self { base: net.ip(), len: net.prefix() })
    }
}

impl From<Subnet> for IpNetwork {
    fn from(subnet: Subnet) -> Self {
        Self::new(subnet.base, subnet.len).expect("a subnet's length fits its family")
    }
}

impl FromStr for Subnet {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        // IpNetwork takes a bare address for a host; a subnet always says its length.
        let net: Option<IpNetwork> = text.contains('/').then(|| text.parse().ok()).flatten();
        net.ok_or_else(|| Invalid::new("subnet", text, "an address and a length, as in 10.244.0.0/16"))?.try_into()
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.base, self.len))
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnet_knows_its_first_addresses_in_both_families() {
        for (text, gateway, last) in [
            ("10.244.3.0/24", "10.244.3.1", "10.244.3.255"),
            ("2001:db8:0:3::/64", "2001:db8:0:3::1", "2001:db8:0:3:ffff:ffff:ffff:ffff"),
            ("0.0.0.0/0", "0.0.0.1", "255.255.255.255"),
            ("::/0", "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"),
        ] {
            let subnet: Subnet = text.parse().expect(text);
            assert_eq!(subnet.gateway().to_string(), gateway);
            assert_eq!(subnet.last().to_string(), last);
            assert_eq!(subnet.to_string(), text);
        }
    }

    #[test]
    fn subnet_with_host_bits_or_without_length_is_refused() {
        for text in ["10.244.3.1/24", "10.244.3.0", "2001:db8::1/64", "10.0.0.0/33", "", "x/8"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }

    #[test]
    fn covers_and_overlaps_never_mix_families() {
        let v4: Subnet = "0.0.0.0/0".parse().expect("valid");
        let v6: Subnet = "::/0".parse().expect("valid");
        assert!(!v4.overlaps(v6) && !v6.overlaps(v4));
        let part: Subnet = "10.244.0.0/16".parse().expect("valid");
        assert!(v4.covers(part) && !part.covers(v4) && part.overlaps(v4));
    }
}
