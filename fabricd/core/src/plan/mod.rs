//! [`desired`]: what the kernel of one node should hold, given the leases of all.
//!
//! A packet for a peer's pod meets, in this order: the route of the peer's subnet, which names a nexthop (the
//! peer's overlay address on our VXLAN device); the neighbour entry, which turns that address into the MAC of
//! the peer's VTEP; and the FDB entry, which turns that MAC into the underlay address that the packet is
//! sent to. So a peer costs four entries (three in IPv6), and all of them are made here from its lease.

pub mod bypass;
pub mod fast_path;
pub mod filter;
mod own_device;
mod peers;

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::leases::LeaseSet;
use crate::model::{IfName, MacAddr, PerFamily, Subnet, Vni};
use crate::network::NetworkConfig;
use crate::record::LeaseKey;
use crate::state::{Foreign, Routing};

pub use self::own_device::device_conflict;
pub use self::peers::{Context, PeerKey, PeerPlan};

/// This node's end of the tunnels in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vtep {
    /// Address of the VXLAN device, as published.
    pub mac: MacAddr,
    /// Underlay address that packets are sent from.
    pub local: IpAddr,
    /// MTU of the VXLAN device in bytes.
    pub mtu: u32,
}

/// What the planner has to know of this host; everything is derived, nothing asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The kernel has nexthop objects (5.3 and later).
    pub nexthop_objects: bool,
    /// The kernel has IPv6, so a device has IPv6 settings.
    pub ipv6: bool,
    /// Prefixes that an underlay link reaches without a gateway, with the link.
    pub on_link: Vec<(Subnet, IfName)>,
}

/// All that decides which entries of peers, and which devices, the kernel should hold.
#[derive(Clone, Copy, Debug)]
pub struct PeerInputs<'a> {
    /// The cluster's config.
    pub network: &'a NetworkConfig,
    /// The subnets that this node holds.
    pub own: &'a LeaseKey,
    /// Its VTEPs.
    pub vteps: &'a PerFamily<Vtep>,
    /// Everybody's leases, our own among them.
    pub leases: &'a LeaseSet,
    /// The host.
    pub facts: &'a Facts,
    /// What the kernel has of ours: a nexthop keeps its id.
    pub have: &'a Routing,
    /// What the kernel has of others.
    pub foreign: &'a Foreign,
}

/// What the kernel should hold, and what was left out of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Desired {
    /// Every entry.
    pub state: Routing,
    /// Our devices, in the families in which nothing stands in their way.
    pub devices: PerFamily<IfName>,
    /// Peers that are programmed.
    pub peers: usize,
    /// Leases that are not, with the reason.
    pub refused: BTreeMap<LeaseKey, Refusal>,
    /// Objects of others that stand in our way; they are not touched.
    pub conflicts: Vec<Conflict>,
}

/// Why a lease of another node is not programmed. Nothing of it is; others go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The peer speaks something else.
    #[error("its backend is {0:?}, not vxlan")]
    Backend(String),
    /// The peer is in another VXLAN network.
    #[error("its VNI is {0}, ours is {1}")]
    Vni(Vni, Vni),
    /// Not a slice of the network.
    #[error("its subnet {0} is not a part of the network {1}")]
    OutsideNetwork(Subnet, Subnet),
    /// The same addresses are ours.
    #[error("its subnet {0} overlaps our own, {1}")]
    OverlapsOurs(Subnet, Subnet),
    /// The same addresses belong to an older lease.
    #[error("its subnet {0} overlaps that of {1}, which is older")]
    Overlaps(Subnet, String),
    /// Packets for it would come to us.
    #[error("its underlay address {0} is our own")]
    OurAddress(IpAddr),
    /// The MAC address is ours or an older lease's.
    #[error("its VTEP address {0} is also that of {1}")]
    SameMac(MacAddr, String),
}

/// An object that is not ours where one of ours should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// An interface has our device's name.
    #[error("the interface {name} exists and is not ours ({what}); rename it or remove it with: ip link del {name}")]
    Name {
        /// The name.
        name: IfName,
        /// What it is.
        what: String,
    },
    /// A VXLAN device has our VNI and port.
    #[error(
        "the interface {name} already uses VNI {vni} on UDP port {port}; remove it with: ip link del {name}, \
         or choose another VNI or Port in the network config"
    )]
    Vni {
        /// The interface.
        name: IfName,
        /// Our VNI.
        vni: Vni,
        /// Our port.
        port: u16,
    },
    /// A route leads to a peer's subnet already.
    #[error("a route that is not ours leads to {dst} ({route}); remove it with: ip route del {route}")]
    Route {
        /// The peer's subnet.
        dst: Subnet,
        /// The route as `ip route` prints it.
        route: String,
    },
}

/// What the kernel should hold. [`PeerPlan`] keeps it up to date.
#[must_use]
pub fn desired(inputs: &PeerInputs<'_>) -> Desired {
    PeerPlan::new(inputs).into_desired()
}
