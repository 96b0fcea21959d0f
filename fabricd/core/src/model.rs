//! The words of the domain: small types that can only hold what makes sense.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use crate::family::{Family, Invalid};
pub use crate::subnet::{Subnet, from_bits, to_bits};

/// A value for each address family that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PerFamily<T> {
    /// The IPv4 value, if IPv4 is in use.
    pub v4: Option<T>,
    /// The IPv6 value, if IPv6 is in use.
    pub v6: Option<T>,
}

impl<T> Default for PerFamily<T> {
    fn default() -> Self {
        Self { v4: None, v6: None }
    }
}

impl<T> PerFamily<T> {
    /// The value of one family.
    #[must_use]
    pub fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// The place of one family, to fill or clear.
    pub fn slot(&mut self, family: Family) -> &mut Option<T> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// The families in use with their values, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL.into_iter().filter_map(|family| Some((family, self.get(family)?)))
    }

    /// The families in use.
    pub fn families(&self) -> impl Iterator<Item = Family> {
        self.iter().map(|(family, _)| family)
    }

    /// The values of the families in use, IPv4 first.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.iter().map(|(_, value)| value)
    }

    /// True when no family is in use.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }

    /// The same families with each value replaced.
    #[must_use]
    pub fn map<U>(&self, mut f: impl FnMut(Family, &T) -> U) -> PerFamily<U> {
        PerFamily {
            v4: self.v4.as_ref().map(|value| f(Family::V4, value)),
            v6: self.v6.as_ref().map(|value| f(Family::V6, value)),
        }
    }

    /// As [`PerFamily::map`], stopping at the first error.
    ///
    /// # Errors
    /// The first error of `f`.
    pub fn try_map<U, E>(&self, mut f: impl FnMut(Family, &T) -> Result<U, E>) -> Result<PerFamily<U>, E> {
        Ok(PerFamily {
            v4: self.v4.as_ref().map(|value| f(Family::V4, value)).transpose()?,
            v6: self.v6.as_ref().map(|value| f(Family::V6, value)).transpose()?,
        })
    }
}

impl<T> FromIterator<(Family, T)> for PerFamily<T> {
    fn from_iter<I: IntoIterator<Item = (Family, T)>>(iter: I) -> Self {
        let mut all = Self::default();
        for (family, value) in iter {
            *all.slot(family) = Some(value);
        }
        all
    }
}

/// A node's name: its identity in the store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(String);

impl NodeName {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NodeName {
    type Error = Invalid;

    fn try_from(name: String) -> Result<Self, Invalid> {
        let fine = (1..=253).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b))
            && name.as_bytes()[0].is_ascii_alphanumeric();
        if fine {
            Ok(Self(name))
        } else {
            Err(Invalid::new(
                "node name",
                &name,
                "1 to 253 letters, digits, '-', '.' or '_', the first a letter or digit (RFC 1123)",
            ))
        }
    }
}

impl FromStr for NodeName {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        name.to_owned().try_into()
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348 section 5), 0 excluded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

impl Vni {
    /// flannel's default, and ours.
    pub const DEFAULT: Self = Self(1);

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = Invalid;

    fn try_from(vni: u32) -> Result<Self, Invalid> {
        if (1..1 << 24).contains(&vni) {
            Ok(Self(vni))
        } else {
            Err(Invalid::new("VNI", &vni.to_string(), "1 to 16777215 (RFC 7348)"))
        }
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address that one host may own: not multicast, not all zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The six bytes.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }

    /// The address that a node's VTEP gets when it has none yet: locally administered, and always
    /// the same for the same node, VNI and family, so that it outlives every file and record.
    #[must_use]
    pub fn derived(node: &NodeName, vni: Vni, family: Family) -> Self {
        let seed = stable_hash(format!("{node}/{vni}/{family}").as_bytes()).to_be_bytes();
        let mut mac = [0; 6];
        mac.copy_from_slice(&seed[2..]);
        mac[0] = (mac[0] | 0x02) & 0xfe;
        Self(mac)
    }
}

/// FNV-1a, 64 bits, with a final mix: a hash that is the same on every machine and in every
/// version, for choices that should not move. It is no defence against chosen input.
#[must_use]
pub fn stable_hash(bytes: &[u8]) -> u64 {
    let fnv = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    // FNV alone leaves names that differ in the last letter close together.
    mixed(fnv)
}

/// A number all of whose bits depend on all bits of another one, and which is the same everywhere: the finaliser of
/// SplitMix64.
#[must_use]
pub const fn mixed(number: u64) -> u64 {
    let mixed = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

impl TryFrom<[u8; 6]> for MacAddr {
    type Error = Invalid;

    fn try_from(octets: [u8; 6]) -> Result<Self, Invalid> {
        let mac = Self(octets);
        if octets == [0; 6] || octets[0] & 1 == 1 {
            return Err(Invalid::new(
                "MAC address of a host",
                &mac.to_string(),
                "a unicast address that is not all zero",
            ));
        }
        Ok(mac)
    }
}

impl FromStr for MacAddr {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::new("MAC address", text, "six bytes in hexadecimal, as in 02:42:c0:00:02:07");
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().filter(|part| (1..=2).contains(&part.len())).ok_or_else(wrong)?;
            *octet = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        octets.try_into()
    }
}

impl TryFrom<String> for MacAddr {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A network interface's name, as the kernel allows it (`dev_valid_name` in net/core/dev.c). Kept in place, as the
/// kernel does: it is a part of thousands of keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IfName([u8; Self::SIZE]);

impl IfName {
    /// `IFNAMSIZ`: the longest name and the zero byte that ends it.
    pub const SIZE: usize = 16;

    /// The name as the kernel has it: filled up with zeros.
    #[must_use]
    pub fn bytes(&self) -> [u8; Self::SIZE] {
        self.0
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(Self::SIZE);
        std::str::from_utf8(&self.0[..end]).expect("made from text")
    }
}

impl FromStr for IfName {
    type Err = Invalid;

    fn from_str(name: &str) -> Result<Self, Invalid> {
        let fine = (1..Self::SIZE).contains(&name.len())
            && name != "."
            && name != ".."
            && !name.bytes().any(|b| b == b'/' || b == b':' || b.is_ascii_whitespace() || b == 0);
        if !fine {
            return Err(Invalid::new("interface name", name, "1 to 15 bytes without '/', ':' or white space"));
        }
        let mut bytes = [0; Self::SIZE];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for IfName {
    type Error = Invalid;

    fn try_from(name: String) -> Result<Self, Invalid> {
        name.parse()
    }
}

impl From<IfName> for String {
    fn from(name: IfName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_address_of_a_group_or_of_nobody_is_refused() {
        for text in [
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "02:42",
            "02:42:0:0:0:0:1",
            "+2:42:c0:00:02:07x",
        ] {
            assert!(text.parse::<MacAddr>().is_err(), "{text}");
        }
    }

    #[test]
    fn derived_mac_is_stable_and_local() {
        let node: NodeName = "node-1".parse().expect("valid");
        let mac = MacAddr::derived(&node, Vni::DEFAULT, Family::V4);
        // Pinned: a release that changes this renumbers every VTEP in the field.
        assert_eq!(mac.to_string(), "a6:2d:e0:57:94:2b");
        assert_ne!(mac, MacAddr::derived(&node, Vni::DEFAULT, Family::V6));
    }

    #[test]
    fn names_that_could_be_paths_or_options_are_refused() {
        for name in ["", "../x", "-rf", "a/b", "a b", "é"] {
            assert!(name.parse::<NodeName>().is_err(), "{name}");
        }
        for name in ["", ".", "..", "a/b", "a b", "0123456789abcdef", "a:b"] {
            assert!(name.parse::<IfName>().is_err(), "{name}");
        }
    }
}
