//! Who has which address. The same in every lab: none of them is visible outside.
//!
//! | | IPv4 | IPv6 |
//! |---|---|---|
//! | underlay | 10.99.0.0/16 | fd00:99::/64 |
//! | its bridge, default gateway of the nodes | 10.99.0.1 | fd00:99::1 |
//! | etcd members | 10.99.0.2, .3, .4 | fd00:99::2, ::3, ::4 |
//! | node N | 10.99.0.(10+N) | fd00:99::(0x10+N) |
//! | network of the pods | 10.244.0.0/16 | fd00:10:244::/48 |

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use clap::ValueEnum;
use fabric_core::model::Family;
use serde::{Deserialize, Serialize};

/// The address families of a lab, underlay and overlay alike.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
pub enum Families {
    /// IPv4 only.
    #[default]
    V4,
    /// IPv6 only: not one IPv4 address but lo's.
    V6,
    /// Both.
    Dual,
}

impl Families {
    /// All three cases, for tests that hold for each.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Dual];

    /// The families one by one.
    #[must_use]
    pub fn each(self) -> &'static [Family] {
        match self {
            Self::V4 => &[Family::V4],
            Self::V6 => &[Family::V6],
            Self::Dual => &[Family::V4, Family::V6],
        }
    }

    /// The family by which the members of the control plane are addressed.
    #[must_use]
    pub fn first(self) -> Family {
        self.each()[0]
    }
}

impl fmt::Display for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
            Self::Dual => "IPv4 and IPv6",
        })
    }
}

/// The network of the pods.
#[must_use]
pub fn pod_network(family: Family) -> &'static str {
    match family {
        Family::V4 => "10.244.0.0/16",
        Family::V6 => "fd00:10:244::/48",
    }
}

/// The option of `fabricctl network init` that takes it.
#[must_use]
pub(super) fn network_flag(family: Family) -> &'static str {
    match family {
        Family::V4 => "--network",
        Family::V6 => "--ipv6-network",
    }
}

/// The bridge of the underlay.
#[must_use]
pub fn gateway(family: Family) -> IpAddr {
    host(family, 1)
}

/// An etcd member, the first being 1.
#[must_use]
pub fn etcd(family: Family, member: u16) -> IpAddr {
    host(family, 1 + member)
}

/// A node, the first being 1.
#[must_use]
pub fn node(family: Family, index: u16) -> IpAddr {
    match family {
        Family::V4 => host(family, 10 + index),
        Family::V6 => host(family, 0x10 + index),
    }
}

/// An underlay address with the length of its prefix, as `ip address add` wants it.
#[must_use]
pub fn with_prefix(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 16 } else { 64 })
}

/// The MAC address of the underlay's bridge, which stays the same whatever is connected to it.
pub const GATEWAY_MAC: &str = "02:99:00:ff:00:01";

/// A node's MAC address, which stays the same over a reboot.
#[must_use]
pub fn node_mac(index: u16) -> String {
    let [high, low] = index.to_be_bytes();
    format!("02:99:00:00:{high:02x}:{low:02x}")
}

fn host(family: Family, number: u16) -> IpAddr {
    match family {
        Family::V4 => {
            let [high, low] = number.to_be_bytes();
            Ipv4Addr::new(10, 99, high, low).into()
        }
        Family::V6 => Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, number).into(),
    }
}
