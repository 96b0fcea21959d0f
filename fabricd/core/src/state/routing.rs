//! [`Routing`]: what leads packets from pods to peers. One ordered map per kernel table, each keyed as the kernel keys that
//! table.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use crate::leases::LeaseSet;
use crate::model::{Family, IfName, MacAddr, Subnet, Vni};

/// Protocol number that marks our routes and nexthop objects (`RTA_PROTOCOL`, `nh_protocol`): free in
/// iproute2's `rt_protos` and in the numbers that FRR, BIRD, Calico and Cilium use.
pub const ROUTE_PROTOCOL: u8 = 250;

/// Our nexthop objects have ids from here up; one flat space per network namespace is shared with everybody.
pub const NEXTHOP_ID_BASE: u32 = 0xFA00_0000;

/// A VXLAN device. The fields above `mac` can't change without making the device anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VxlanLink {
    /// VXLAN network identifier.
    pub vni: Vni,
    /// UDP destination port.
    pub port: u16,
    /// Group policy extension.
    pub gbp: bool,
    /// Address of the device.
    pub mac: MacAddr,
    /// Source address of the outer packets; its family is the underlay's.
    pub local: IpAddr,
    /// The MTU of what is inside, in bytes.
    pub mtu: u32,
    /// Whether the kernel adds FDB entries by what it receives.
    pub learning: bool,
    /// Administratively up.
    pub up: bool,
}

impl VxlanLink {
    /// True when a device like `self` becomes one like `want` without being made anew.
    #[must_use]
    pub fn can_become(&self, want: &Self) -> bool {
        let family = |link: &Self| Family::of(link.local);
        (self.vni, self.port, self.gbp, family(self)) == (want.vni, want.port, want.gbp, family(want))
    }
}

/// A nexthop object: how to reach a peer's subnet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nexthop {
    /// The peer's overlay address.
    pub gateway: IpAddr,
    /// Our VXLAN device.
    pub dev: IfName,
}

/// Id of a nexthop object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NexthopId(pub u32);

impl fmt::Display for NexthopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a route leads.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Via {
    /// Through a nexthop object (IPv4 from kernel 5.3 on).
    Nexthop(NexthopId),
    /// To an overlay address on our device, on-link (IPv6, and IPv4 before 5.3).
    Gateway(Nexthop),
    /// To an underlay address on an underlay link, without encapsulation.
    Direct(Nexthop),
    /// Somewhere fabricd never leads a route (multipath, blackhole, a source address …), as `ip route` prints it:
    /// somebody changed ours. Found only, never wanted, so that the diff puts it right.
    Other(String),
}

/// A kernel setting below `/proc/sys/net`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Sysctl {
    /// `ipv4/ip_forward`: this host forwards IPv4.
    Ipv4Forward,
    /// `ipv6/conf/all/forwarding`: this host forwards IPv6.
    Ipv6Forward,
    /// `ipv6/conf/<dev>/accept_ra`: router advertisements on our device.
    AcceptRa(IfName),
    /// `ipv4/conf/<dev>/rp_filter`: whether a packet that comes by our device must be answered by it. What counts is the
    /// larger of this and `ipv4/conf/all/rp_filter`; 2 wants any way back at all, and so is milder than 1.
    RpFilter(IfName),
}

impl Sysctl {
    /// The file below `/proc/sys/net`.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Self::Ipv4Forward => "ipv4/ip_forward".into(),
            Self::Ipv6Forward => "ipv6/conf/all/forwarding".into(),
            Self::AcceptRa(dev) => format!("ipv6/conf/{dev}/accept_ra"),
            Self::RpFilter(dev) => format!("ipv4/conf/{dev}/rp_filter"),
        }
    }

    /// The device that it goes with.
    #[must_use]
    pub fn device(&self) -> Option<IfName> {
        match self {
            Self::Ipv4Forward | Self::Ipv6Forward => None,
            Self::AcceptRa(dev) | Self::RpFilter(dev) => Some(*dev),
        }
    }
}

/// Links, addresses, neighbours, FDB, nexthop objects, routes and settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// VXLAN devices by name.
    pub links: BTreeMap<IfName, VxlanLink>,
    /// Addresses on our devices, kernel-made link-local ones left out.
    pub addresses: BTreeSet<(IfName, Subnet)>,
    /// FDB: where a peer's VTEP is reached on the underlay. By device and MAC address.
    pub fdb: BTreeMap<(IfName, MacAddr), IpAddr>,
    /// Permanent neighbours: which VTEP has an overlay address. By device and address.
    pub neighbours: BTreeMap<(IfName, IpAddr), MacAddr>,
    /// Nexthop objects by id.
    pub nexthops: BTreeMap<NexthopId, Nexthop>,
    /// Routes of the main table with metric 0 (IPv6: the kernel's default, 1024), by destination.
    pub routes: BTreeMap<Subnet, Via>,
    /// Settings that we need; those found to hold something else are what `diff` writes.
    pub sysctls: BTreeMap<Sysctl, u32>,
}

impl Routing {
    /// Empty tables.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            links: BTreeMap::new(),
            addresses: BTreeSet::new(),
            fdb: BTreeMap::new(),
            neighbours: BTreeMap::new(),
            nexthops: BTreeMap::new(),
            routes: BTreeMap::new(),
            sysctls: BTreeMap::new(),
        }
    }

    /// How many entries there are, over all tables.
    #[must_use]
    pub fn len(&self) -> usize {
        self.links.len()
            + self.addresses.len()
            + self.fdb.len()
            + self.neighbours.len()
            + self.nexthops.len()
            + self.routes.len()
            + self.sysctls.len()
    }

    /// True when every table is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same, in as little memory as it takes: tables that grew entry by entry are half empty inside.
    #[must_use]
    pub fn packed(self) -> Self {
        Self {
            fdb: self.fdb.into_iter().collect(),
            neighbours: self.neighbours.into_iter().collect(),
            nexthops: self.nexthops.into_iter().collect(),
            routes: self.routes.into_iter().collect(),
            ..self
        }
    }
}

/// What the kernel holds of others that our plans must step around.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Foreign {
    /// Ids of nexthop objects that are not ours.
    pub nexthop_ids: BTreeSet<NexthopId>,
    /// Routes of the main table with our metric that are not ours, by destination, each as `ip route` prints it.
    pub routes: BTreeMap<Subnet, String>,
    /// Such routes again, but those that lead over our own device to the first address of their destination: what
    /// flannel makes for a peer. One of ours takes their place.
    pub plain: BTreeMap<Subnet, String>,
    /// Of [`Foreign::routes`] those that flannel makes with `DirectRouting`: protocol boot, an underlay gateway, and nothing
    /// else. By destination, with the gateway.
    pub direct: BTreeMap<Subnet, IpAddr>,
    /// Every other interface: name, and what it is when it is a VXLAN device.
    pub links: BTreeMap<IfName, ForeignLink>,
}

impl Foreign {
    /// The same, but that direct routes which lead to the very peer that leases their destination stand in nobody's way:
    /// flannel made them for it, and ours takes their place.
    #[must_use]
    pub fn yielding_to(&self, leases: &LeaseSet) -> Cow<'_, Self> {
        let mut yielding = Cow::Borrowed(self);
        if self.direct.is_empty() {
            return yielding;
        }
        for lease in leases.iter() {
            let endpoints = lease.record.endpoints();
            for (family, subnet) in lease.key.subnets().iter() {
                let peer = endpoints.get(family).map(|endpoint| endpoint.public_ip);
                if peer.is_some() && self.direct.get(subnet).copied() == peer {
                    yielding.to_mut().routes.remove(subnet);
                }
            }
        }
        yielding
    }

    /// `have`, and those routes of flannel's kind, [`Foreign::plain`] and [`Foreign::direct`], that stand where `want` has
    /// a route: so they are replaced in place.
    #[must_use]
    pub fn lend<'a>(&self, have: &'a Routing, want: &Routing) -> Cow<'a, Routing> {
        let mut lent = Cow::Borrowed(have);
        let direct = self.direct.keys().filter_map(|dst| self.routes.get_key_value(dst));
        for (dst, words) in self.plain.iter().chain(direct).filter(|(dst, _)| want.routes.contains_key(*dst)) {
            lent.to_mut().routes.insert(*dst, Via::Other(words.clone()));
        }
        lent
    }
}

/// An interface that is not ours, as far as it can stand in our way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignLink {
    /// The kernel's name for its type: `veth`, `bridge`, `vxlan`; empty for a physical one.
    pub kind: String,
    /// VNI, port and underlay family when it is a VXLAN device. Two devices can't share all three.
    pub vxlan: Option<(u32, u16, Family)>,
}
