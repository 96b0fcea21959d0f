//! [`desired`]: what the kernel of one node should hold, given the leases of all.
//!
//! A packet for a peer's pod meets, in this order: the route of the peer's subnet, which names a nexthop (the
//! peer's overlay address on our VXLAN device); the neighbour entry, which turns that address into the MAC of
//! the peer's VTEP; and the FDB entry, which turns that MAC into the underlay address that the packet is
//! sent to. So a peer costs four entries (three in IPv6), and all of them are made here from its lease.

pub mod filter;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use crate::device;
use crate::leases::{Lease, LeaseSet};
use crate::model::{Family, IfName, MacAddr, PerFamily, Subnet, Vni};
use crate::network::NetworkConfig;
use crate::record::{Backend, Endpoint, LeaseKey};
use crate::state::{Foreign, NEXTHOP_ID_BASE, Nexthop, NexthopId, Routing, Sysctl, Via, VxlanLink};

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

/// All that decides what the kernel should hold.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
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

/// What the kernel should hold.
#[must_use]
pub fn desired(inputs: &Inputs<'_>) -> Desired {
    let mut desired = Desired::default();
    let mut devices = vec![];
    for (family, vtep) in inputs.vteps.iter() {
        let (Some(own), Some(_)) = (inputs.own.subnets().get(family), inputs.network.spaces.get(family)) else {
            continue;
        };
        let link = own_link(inputs.network, *vtep);
        match own_device(inputs, family, &link) {
            Ok(dev) => {
                let ipv6 = inputs.facts.ipv6 && link.mtu >= IPV6_MIN_MTU;
                own_entries(&mut desired.state, ipv6, family, *own, &dev);
                desired.state.links.insert(dev, link);
                devices.push((family, dev));
            }
            Err(conflict) => desired.conflicts.push(conflict),
        }
    }

    desired.devices = devices.into_iter().collect();
    let devices = desired.devices;
    let mut accepted = Accepted::default();
    let mut nexthop_ids = NexthopIds::new(inputs);
    // Of two leases that clash the older one counts, whatever order they are listed in.
    let others = inputs.leases.iter().map(AsRef::as_ref).filter(|l| l.key != *inputs.own);
    let mut peers: Vec<&Lease> = others.filter(|lease| !lease.record.is_placeholder()).collect();
    peers.sort_by_key(|lease| (lease.create_revision, lease.key));
    for lease in peers {
        match accepted.check(inputs, lease) {
            Ok(endpoints) => {
                desired.peers += 1;
                for (family, dev) in devices.iter() {
                    if let (Some(subnet), Some(endpoint)) = (lease.key.subnets().get(family), endpoints.get(family)) {
                        peer_entries(&mut desired, inputs, &mut nexthop_ids, *subnet, endpoint, *dev);
                    }
                }
            }
            Err(refusal) => {
                desired.refused.insert(lease.key, refusal);
            }
        }
    }
    desired.state = desired.state.packed();
    desired
}

fn own_device(inputs: &Inputs<'_>, family: Family, want: &VxlanLink) -> Result<IfName, Conflict> {
    let vxlan = &inputs.network.vxlan;
    let name = device::choose(family, want, &inputs.have.links, &inputs.foreign.links);
    if let Some(link) = inputs.foreign.links.get(&name) {
        let what = match link.vxlan {
            Some((vni, port, _)) => format!("vxlan with VNI {vni}, UDP port {port}"),
            None if link.kind.is_empty() => "a physical interface".into(),
            None => link.kind.clone(),
        };
        return Err(Conflict::Name { name, what });
    }
    let same = (vxlan.vni.get(), vxlan.port, Family::of(want.local));
    match inputs.foreign.links.iter().find(|(_, link)| link.vxlan == Some(same)) {
        Some((other, _)) => Err(Conflict::Vni { name: *other, vni: vxlan.vni, port: vxlan.port }),
        None => Ok(name),
    }
}

fn own_link(network: &NetworkConfig, vtep: Vtep) -> VxlanLink {
    let vxlan = &network.vxlan;
    VxlanLink {
        vni: vxlan.vni,
        port: vxlan.port,
        gbp: vxlan.gbp,
        mac: vtep.mac,
        local: vtep.local,
        mtu: vtep.mtu,
        learning: vxlan.learning,
        up: true,
    }
}

/// RFC 8200 section 5. A device with less has no IPv6, and none of its settings.
const IPV6_MIN_MTU: u32 = 1280;

fn own_entries(state: &mut Routing, ipv6: bool, family: Family, own: Subnet, dev: &IfName) {
    state.addresses.insert((*dev, Subnet::host(own.base())));
    if ipv6 {
        state.sysctls.insert(Sysctl::AcceptRa(*dev), 0);
    }
    if family == Family::V4 {
        // A peer with a route past the tunnel (DirectRouting, a flannel node) may send by it all the same.
        state.sysctls.insert(Sysctl::RpFilter(*dev), 2);
    }
    let forward = match family {
        Family::V4 => Sysctl::Ipv4Forward,
        Family::V6 => Sysctl::Ipv6Forward,
    };
    state.sysctls.insert(forward, 1);
}

pub(crate) fn peer_entries(
    desired: &mut Desired,
    inputs: &Inputs<'_>,
    nexthop_ids: &mut NexthopIds<'_>,
    subnet: Subnet,
    endpoint: &Endpoint,
    dev: IfName,
) {
    if let Some(route) = inputs.foreign.routes.get(&subnet) {
        desired.conflicts.push(Conflict::Route { dst: subnet, route: route.clone() });
        return;
    }
    let state = &mut desired.state;
    state.fdb.insert((dev, endpoint.vtep_mac), endpoint.public_ip);
    state.neighbours.insert((dev, subnet.base()), endpoint.vtep_mac);
    let via = match direct_link(inputs, endpoint.public_ip) {
        Some(link) => Via::Direct(Nexthop { gateway: endpoint.public_ip, dev: link }),
        None => {
            let nexthop = Nexthop { gateway: subnet.base(), dev };
            // IPv6 routes cost the kernel the same with and without nexthop objects.
            if subnet.family() == Family::V4 && inputs.facts.nexthop_objects {
                let id = nexthop_ids.of(&nexthop);
                state.nexthops.insert(id, nexthop);
                Via::Nexthop(id)
            } else {
                Via::Gateway(nexthop)
            }
        }
    };
    state.routes.insert(subnet, via);
}

fn direct_link(inputs: &Inputs<'_>, peer: IpAddr) -> Option<IfName> {
    if !inputs.network.vxlan.direct_routing {
        return None;
    }
    let links = inputs.facts.on_link.iter().filter(|(prefix, _)| prefix.contains(peer));
    links.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, link)| *link)
}

/// What earlier leases have claimed, so that a later one can't take it from them.
#[derive(Default)]
struct Accepted<'a> {
    subnets: BTreeMap<IpAddr, (Subnet, &'a Lease)>,
    macs: HashMap<(Family, MacAddr), &'a Lease>,
}

impl<'a> Accepted<'a> {
    /// The endpoints of `lease` in the families that are in use here, or why none of it is to be programmed.
    fn check(&mut self, inputs: &Inputs<'_>, lease: &'a Lease) -> Result<PerFamily<Endpoint>, Refusal> {
        let endpoints = usable(inputs, lease)?;
        for (family, subnet) in lease.key.subnets().iter() {
            let (Some(_), Some(endpoint)) = (inputs.network.spaces.get(family), endpoints.get(family)) else {
                continue;
            };
            // Subnets nest or lie apart, so only the nearest ones before and after can overlap.
            let before = self.subnets.range(..=subnet.base()).next_back();
            let after = self.subnets.range(subnet.base()..).next();
            if let Some((_, (_, holder))) =
                [before, after].into_iter().flatten().find(|(_, (other, _))| other.overlaps(*subnet))
            {
                return Err(Refusal::Overlaps(*subnet, holder.holder()));
            }
            if let Some(holder) = self.macs.get(&(family, endpoint.vtep_mac)) {
                return Err(Refusal::SameMac(endpoint.vtep_mac, holder.holder()));
            }
        }
        for (family, subnet) in lease.key.subnets().iter() {
            self.subnets.insert(subnet.base(), (*subnet, lease));
            if let Some(endpoint) = endpoints.get(family) {
                self.macs.insert((family, endpoint.vtep_mac), lease);
            }
        }
        Ok(endpoints)
    }
}

/// The endpoints of a lease that can be used here, whatever others hold, or why it can't.
pub(crate) fn usable(inputs: &Inputs<'_>, lease: &Lease) -> Result<PerFamily<Endpoint>, Refusal> {
    let endpoints = match &lease.record.backend {
        Backend::Vxlan(endpoints) => *endpoints,
        Backend::Reserved(_) => return Ok(PerFamily::default()),
        Backend::Other(name) => return Err(Refusal::Backend(name.clone())),
    };
    for (family, subnet) in lease.key.subnets().iter() {
        let (Some(space), Some(endpoint)) = (inputs.network.spaces.get(family), endpoints.get(family)) else {
            continue;
        };
        if !space.network.covers(*subnet) || subnet.prefix_len() < space.network.prefix_len() + 2 {
            return Err(Refusal::OutsideNetwork(*subnet, space.network));
        }
        if let Some(own) = inputs.own.subnets().get(family).filter(|own| own.overlaps(*subnet)) {
            return Err(Refusal::OverlapsOurs(*subnet, *own));
        }
        if inputs.vteps.values().any(|vtep| vtep.local == endpoint.public_ip) {
            return Err(Refusal::OurAddress(endpoint.public_ip));
        }
        if endpoint.vni != inputs.network.vxlan.vni {
            return Err(Refusal::Vni(endpoint.vni, inputs.network.vxlan.vni));
        }
        if inputs.vteps.get(family).is_some_and(|vtep| vtep.mac == endpoint.vtep_mac) {
            return Err(Refusal::SameMac(endpoint.vtep_mac, "this node".into()));
        }
    }
    Ok(endpoints)
}

/// Gives every nexthop an id: the one it has, else the lowest that nobody uses.
pub(crate) struct NexthopIds<'a> {
    held: Held<'a>,
    /// What is planned already, but not yet there.
    planned: &'a BTreeMap<NexthopId, Nexthop>,
    inputs: &'a Inputs<'a>,
    next: u32,
}

enum Held<'a> {
    ByNexthop(HashMap<&'a Nexthop, NexthopId>),
    /// For a few it costs more to sort them than to look through them.
    Unsorted,
}

impl<'a> NexthopIds<'a> {
    fn new(inputs: &'a Inputs<'a>) -> Self {
        static NONE: BTreeMap<NexthopId, Nexthop> = BTreeMap::new();
        // Of doubles (another daemon's doing) the lowest id stays, the others are swept.
        let held = inputs.have.nexthops.iter().rev().map(|(id, nexthop)| (nexthop, *id)).collect();
        Self { held: Held::ByNexthop(held), planned: &NONE, inputs, next: NEXTHOP_ID_BASE }
    }

    /// For a few more nexthops beside those planned already.
    pub(crate) fn beside(inputs: &'a Inputs<'a>, planned: &'a BTreeMap<NexthopId, Nexthop>) -> Self {
        Self { held: Held::Unsorted, planned, inputs, next: NEXTHOP_ID_BASE }
    }

    pub(crate) fn of(&mut self, nexthop: &Nexthop) -> NexthopId {
        let have = &self.inputs.have.nexthops;
        let held = match &self.held {
            Held::ByNexthop(held) => held.get(nexthop).copied(),
            Held::Unsorted => have.iter().find(|(_, other)| *other == nexthop).map(|(id, _)| *id),
        };
        if let Some(id) = held {
            return id;
        }
        let used = |id| {
            have.contains_key(&id) || self.planned.contains_key(&id) || self.inputs.foreign.nexthop_ids.contains(&id)
        };
        while used(NexthopId(self.next)) {
            self.next += 1;
        }
        self.next += 1;
        NexthopId(self.next - 1)
    }
}
