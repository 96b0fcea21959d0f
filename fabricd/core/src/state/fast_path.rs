//! [`FastPath`]: what the eBPF programs of the fast path are given, and where they are attached.
//!
//! The fast path is a short cut beside [`Routing`](super::Routing): what a program does not find here takes the kernel's
//! path. So each part may be missing, and taking parts away loses nothing. A packet from a pod meets, in this order: the
//! link of the pod's port, which runs `pod_out`; the pod's own entry; the index of its destination, which names a slot; and
//! the peer in that slot, which says where the packet goes. One from a peer meets the link of the underlay's interface,
//! which runs `wire_in`, the same index for its source, and the pod's entry for its destination.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::model::{Family, MacAddr, PerFamily, Subnet, Vni};

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastPath {
    /// The maps, `None` when there are none.
    pub maps: Option<MapSizes>,
    /// This node's own end.
    pub node: Option<LocalVtep>,
    /// Peers by the number of their entry. One that the index names never changes: a peer that moves gets another number.
    pub peers: BTreeMap<PeerSlot, Peer>,
    /// Which peer has a subnet.
    pub index: BTreeMap<Subnet, PeerSlot>,
    /// This node's pods by the number of their entry.
    pub pods: BTreeMap<PodSlot, Pod>,
    /// Which pod has an address.
    pub addresses: BTreeMap<IpAddr, PodSlot>,
    /// Programs that are loaded.
    pub programs: BTreeSet<Program>,
    /// Where they are attached.
    pub links: BTreeMap<Place, Program>,
    /// Maps and programs of another layout are there, which nobody keeps true.
    pub former: bool,
}

/// How large the maps are that depend on the network. No map has no entry: what a family has that is not in use is 1. All
/// are 0 of maps that nobody knows and that go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapSizes {
    /// How many subnets the IPv4 network has.
    pub subnets4: u32,
    /// How many the IPv6 network has.
    pub subnets6: u32,
    /// How many peers there may be. One of two families counts twice.
    pub peers: u32,
    /// How many addresses this node's IPv4 subnet has.
    pub addresses4: u32,
    /// How many pods there may be. One of two families counts twice.
    pub pods: u32,
}

/// This node's own end of the tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalVtep {
    /// VXLAN network identifier.
    pub vni: Vni,
    /// UDP destination port.
    pub port: u16,
    /// Whether connections are translated here: then pods' ports are marked in the NAT guard.
    pub guard: bool,
    /// Of each family whose pods take the fast path.
    pub ends: PerFamily<End>,
}

/// This node's end of one family's tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Address of our VXLAN device.
    pub vtep_mac: MacAddr,
    /// Source address of the outer packets.
    pub local: IpAddr,
    /// The network.
    pub network: Subnet,
    /// The slice of it that is this node's. All slices are of one size.
    pub subnet: Subnet,
}

impl LocalVtep {
    /// Whether an address is of one of the networks: a pod's, somewhere.
    #[must_use]
    pub fn has(&self, ip: IpAddr) -> bool {
        self.ends.values().any(|end| end.network.contains(ip))
    }
}

/// Number of a peer's entry. 0 is nobody's: an empty index entry says that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerSlot(pub u32);

/// Number of a pod's entry. 0 is nobody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodSlot(pub u32);

/// Where a peer is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its underlay address: where packets for it go, and the only one that packets of its pods may come from.
    pub underlay: IpAddr,
    /// Address of its VXLAN device.
    pub vtep_mac: MacAddr,
    /// The way there. Over IPv6 that is our VXLAN device, which makes the UDP checksum, and finds the way itself.
    pub path: UnderlayPath,
    /// Its packets go without encapsulation (`DirectRouting`).
    pub direct: bool,
    /// The longest packet of a pod that gets there, in bytes.
    pub mtu: u32,
}

/// The way to an underlay address, as the kernel routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnderlayPath {
    /// Index of the interface.
    pub ifindex: u32,
    /// The next hop: the address itself on a link that reaches it.
    pub gateway: IpAddr,
}

impl Peer {
    /// Of which family its pods and its underlay address are.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.underlay)
    }
}

/// A pod that is attached to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Index of its port, the end of its veth pair that is on the bridge.
    pub ifindex: u32,
    /// Its own address.
    pub mac: MacAddr,
    /// That of its gateway: the bridge.
    pub gateway_mac: MacAddr,
    /// MTU of its port in bytes.
    pub mtu: u32,
    /// Whether its packets are taken. Until then its ports are only marked in the NAT guard.
    pub fast: bool,
}

/// What a program is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// At what a pod sends.
    PodOut,
    /// At what an underlay interface receives.
    WireIn,
    /// At what a pod is sent by the kernel's path.
    PodIn,
    /// At what leads to peers: what pods send by the kernel's path.
    WireOut,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::PodOut, Self::WireIn, Self::PodIn, Self::WireOut];

    /// The name of its function, and of its pin.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PodOut => "pod_out",
            Self::WireIn => "wire_in",
            Self::PodIn => "pod_in",
            Self::WireOut => "wire_out",
        }
    }

    /// Where it is attached.
    #[must_use]
    pub const fn hook(self) -> Hook {
        match self {
            Self::PodOut | Self::WireIn => Hook::Ingress,
            Self::PodIn | Self::WireOut => Hook::Egress,
        }
    }
}

/// A program, as it was built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Program {
    /// What it is for.
    pub role: Role,
    /// A hash of its code.
    pub fingerprint: u64,
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{:016x}", self.role.as_str(), self.fingerprint)
    }
}

/// A hook of tc (tcx).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    /// What an interface has received.
    Ingress,
    /// What it is about to send.
    Egress,
}

impl Hook {
    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// Where a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Index of the interface.
    pub ifindex: u32,
    /// Which of its hooks.
    pub hook: Hook,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}_{}", self.ifindex, self.hook.as_str())
    }
}

impl FastPath {
    /// Nothing at all.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            maps: None,
            node: None,
            peers: BTreeMap::new(),
            index: BTreeMap::new(),
            pods: BTreeMap::new(),
            addresses: BTreeMap::new(),
            programs: BTreeSet::new(),
            links: BTreeMap::new(),
            former: false,
        }
    }

    /// True when nothing is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::new()
    }
}
