//! [`fast_path`]: what the programs of the fast path should be given.
//!
//! All of it follows from what the kernel's path has: a peer is fast when [`Routing`] leads to it, and in no other way. So
//! there is one decision about peers, not two. What isn't known yet (the way to a peer, the MAC address of a bridge) leaves
//! out that peer or pod alone, which then takes the kernel's path.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Vtep;
use crate::model::{Family, IfName, MacAddr, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::plan::filter::Pod as AttachedPod;
use crate::state::fast_path::{
    End, FastPath, LocalVtep, MapSizes, Peer, PeerSlot, Place, Pod, PodSlot, Program, Role, UnderlayPath,
};
use crate::state::{Routing, Via};

/// The index is an array over all subnets of the network: that many fit into half a megabyte.
const MOST_SUBNETS: u32 = 1 << 16;
/// So is the one over all addresses of this node's IPv4 subnet.
const MOST_ADDRESSES: u32 = 1 << 16;
/// No map has more entries.
const MOST_ENTRIES: u32 = 1 << 17;
/// Room for that many peers.
const FEWEST_PEERS: u32 = 256;
/// Room for that many pods. The NAT guard has 32 KiB for each.
const FEWEST_PODS: u32 = 128;

/// All that decides.
#[derive(Clone, Copy, Debug)]
pub struct FastPathInputs<'a> {
    /// The cluster's config.
    pub network: &'a NetworkConfig,
    /// The subnets that this node holds.
    pub own: &'a PerFamily<Subnet>,
    /// Its VTEPs.
    pub vteps: &'a PerFamily<Vtep>,
    /// Its VXLAN devices.
    pub devices: &'a PerFamily<IfName>,
    /// Indexes of those that are there.
    pub indexes: &'a BTreeMap<IfName, u32>,
    /// What the kernel should hold.
    pub routing: &'a Routing,
    /// The way to each underlay address, as far as the kernel was asked.
    pub paths: &'a BTreeMap<IpAddr, UnderlayPath>,
    /// The interfaces that peers are reached by, and that their packets come from.
    pub uplinks: &'a BTreeSet<u32>,
    /// The pods of this node, by their port.
    pub pods: &'a BTreeMap<IfName, AttachedPod>,
    /// The ports of the bridges.
    pub ports: &'a BTreeMap<IfName, Port>,
    /// Ports whose packets take the kernel's path, by index, since somebody shapes them, or may yet. They get no programs.
    pub kept_off: &'a BTreeSet<u32>,
    /// The programs, as they were built.
    pub programs: &'a BTreeSet<Program>,
    /// Connections are translated on this node, or were.
    pub tracked: bool,
    /// What is there: a peer keeps its number.
    pub have: &'a FastPath,
}

/// A port of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its index.
    pub ifindex: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The bridge's MAC address: the pods' gateway.
    pub bridge_mac: MacAddr,
}

/// Why a network, or one family of it, can't have a fast path. Its packets take the kernel's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoFastPath {
    /// Group policy is a part of VXLAN's header that programs don't write.
    #[error("the network config has GBP")]
    Gbp,
    /// Arrays would be too large.
    #[error("the network {0} has more subnets of /{1} than the fast path's index ({MOST_SUBNETS})")]
    TooManySubnets(Subnet, u8),
    /// The same.
    #[error("this node's subnet {0} has more addresses than the fast path's index ({MOST_ADDRESSES})")]
    TooManyAddresses(Subnet),
    /// There is nothing that it could be a short cut of.
    #[error("this node has no VXLAN device yet")]
    NoDevice,
}

/// What should be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    /// All of it.
    pub state: FastPath,
    /// Families that are in use and take the kernel's path.
    pub without: PerFamily<NoFastPath>,
}

/// What should be there.
///
/// # Errors
/// See [`NoFastPath`].
pub fn fast_path(inputs: &FastPathInputs<'_>) -> Result<Planned, NoFastPath> {
    if inputs.network.vxlan.gbp {
        return Err(NoFastPath::Gbp);
    }
    let (mut ends, mut without) = (PerFamily::default(), PerFamily::default());
    for family in Family::ALL {
        match end(inputs, family) {
            Some(Ok(end)) => *ends.slot(family) = Some(end),
            Some(Err(why)) => *without.slot(family) = Some(why),
            None => {}
        }
    }
    if ends.is_empty() {
        return Err(without.values().next().copied().unwrap_or(NoFastPath::NoDevice));
    }
    let node =
        LocalVtep { vni: inputs.network.vxlan.vni, port: inputs.network.vxlan.port, guard: inputs.tracked, ends };
    let (peers, pods) = (peers(inputs, &ends), pods(inputs, &ends));
    let had = inputs.have.maps;
    let sizes = MapSizes {
        subnets4: ends.v4.and_then(|end| subnets(&end)).unwrap_or(1),
        subnets6: ends.v6.and_then(|end| subnets(&end)).unwrap_or(1),
        peers: room(peers.len(), FEWEST_PEERS, had.map(|sizes| sizes.peers)),
        addresses4: ends.v4.and_then(|end| addresses4(&end)).unwrap_or(1),
        pods: room(pods.len(), FEWEST_PODS, had.map(|sizes| sizes.pods)),
    };
    let mut state =
        FastPath { maps: Some(sizes), node: Some(node), programs: inputs.programs.clone(), ..FastPath::new() };
    let slots = (1..sizes.peers).map(PeerSlot);
    (state.index, state.peers) = numbered(peers, &inputs.have.index, &inputs.have.peers, Peer::eq, slots);
    // One that isn't taken yet is the same pod.
    let same = |one: &Pod, other: &Pod| Pod { fast: other.fast, ..*one } == *other;
    let slots = (1..sizes.pods).map(PodSlot);
    (state.addresses, state.pods) = numbered(pods, &inputs.have.addresses, &inputs.have.pods, same, slots);
    let program = |role| inputs.programs.iter().find(|program| program.role == role).copied();
    let mut attach = |role: Role, ifindex| {
        if let Some(program) = program(role) {
            state.links.insert(Place { ifindex, hook: role.hook() }, program);
        }
    };
    inputs.uplinks.iter().for_each(|ifindex| attach(Role::WireIn, *ifindex));
    // Where what pods send by the kernel's path leaves.
    let devices = ends.iter().filter_map(|(family, _)| inputs.indexes.get(inputs.devices.get(family)?)).copied();
    let direct = state.peers.values().filter(|peer| peer.direct).map(|peer| peer.path.ifindex);
    devices.chain(direct).for_each(|ifindex| attach(Role::WireOut, ifindex));
    let ports = inputs.pods.keys().filter_map(|port| inputs.ports.get(port));
    for port in ports.filter(|port| !inputs.kept_off.contains(&port.ifindex)) {
        attach(Role::PodOut, port.ifindex);
        attach(Role::PodIn, port.ifindex);
    }
    Ok(Planned { state, without })
}

/// This node's end of one family, `None` where the network has none of it.
fn end(inputs: &FastPathInputs<'_>, family: Family) -> Option<Result<End, NoFastPath>> {
    let network = inputs.network.spaces.get(family)?.network;
    let (Some(subnet), Some(vtep), Some(_)) =
        (inputs.own.get(family), inputs.vteps.get(family), inputs.devices.get(family))
    else {
        return Some(Err(NoFastPath::NoDevice));
    };
    let end = End { vtep_mac: vtep.mac, local: vtep.local, network, subnet: *subnet };
    if subnets(&end).is_none() {
        return Some(Err(NoFastPath::TooManySubnets(network, subnet.prefix_len())));
    }
    // The addresses of IPv6 are in a hash.
    if family == Family::V4 && addresses4(&end).is_none() {
        return Some(Err(NoFastPath::TooManyAddresses(*subnet)));
    }
    Some(Ok(end))
}

/// How many subnets the network has, `None` for too many.
fn subnets(end: &End) -> Option<u32> {
    let bits = end.subnet.prefix_len().saturating_sub(end.network.prefix_len());
    1_u32.checked_shl(u32::from(bits)).filter(|count| *count <= MOST_SUBNETS)
}

/// How many addresses this node's IPv4 subnet has, `None` for too many.
fn addresses4(end: &End) -> Option<u32> {
    let bits = Family::V4.bits().saturating_sub(end.subnet.prefix_len());
    1_u32.checked_shl(u32::from(bits)).filter(|count| *count <= MOST_ADDRESSES)
}

/// The pods by their address. An address that several ports say is theirs is nobody's: whose it is the kernel's path has to
/// find out.
fn pods(inputs: &FastPathInputs<'_>, ends: &PerFamily<End>) -> BTreeMap<IpAddr, Pod> {
    let mut pods = BTreeMap::new();
    let is_own = |ip: &IpAddr| ends.values().any(|end| end.subnet.contains(*ip));
    for (name, pod) in inputs.pods {
        let Some(Port { ifindex, mtu, bridge_mac }) = inputs.ports.get(name).copied() else { continue };
        for ip in pod.ips.iter().filter(|ip| is_own(ip) && !is_shared(inputs, ip)) {
            let fast = !inputs.kept_off.contains(&ifindex);
            pods.insert(*ip, Pod { ifindex, mac: pod.mac, gateway_mac: bridge_mac, mtu, fast });
        }
    }
    pods
}

/// Whether several ports say that they have an address.
fn is_shared(inputs: &FastPathInputs<'_>, ip: &IpAddr) -> bool {
    inputs.pods.iter().filter(|(port, pod)| inputs.ports.contains_key(*port) && pod.ips.contains(ip)).count() > 1
}

/// The peers that the kernel is to reach, and whose way is known. Those of another size than our own subnet have no place
/// in the index.
fn peers(inputs: &FastPathInputs<'_>, ends: &PerFamily<End>) -> BTreeMap<Subnet, Peer> {
    let Routing { routes, neighbours, fdb, .. } = inputs.routing;
    let peer = |(subnet, via): (&Subnet, &Via)| {
        let family = subnet.family();
        let (end, device, vtep) = (ends.get(family)?, inputs.devices.get(family)?, inputs.vteps.get(family)?);
        if subnet.prefix_len() != end.subnet.prefix_len() {
            return None;
        }
        let direct = match via {
            Via::Nexthop(_) | Via::Gateway(_) => false,
            Via::Direct(_) => true,
            Via::Other(_) => return None,
        };
        let vtep_mac = *neighbours.get(&(*device, subnet.base()))?;
        let underlay = *fdb.get(&(*device, vtep_mac))?;
        // Also where our device finds the way by itself: what comes from there is fast only if programs are there.
        let path = *inputs.paths.get(&underlay)?;
        let path = match (family, direct) {
            (Family::V6, false) => UnderlayPath { ifindex: *inputs.indexes.get(device)?, gateway: underlay },
            _ => path,
        };
        Some((*subnet, Peer { underlay, vtep_mac, path, direct, mtu: vtep.mtu }))
    };
    routes.iter().filter_map(peer).collect()
}

/// How many entries a map has: what it had as long as that is enough, else twice what is needed. Entry 0 is nobody's, and
/// what moves has two for a moment.
fn room(entries: usize, fewest: u32, had: Option<u32>) -> u32 {
    let entries = u32::try_from(entries).unwrap_or(MOST_ENTRIES);
    let fits = |room: u32| entries < room / 4 * 3;
    match had {
        Some(room) if fits(room) => room,
        _ => std::iter::successors(Some(fewest), |room| Some(room * 2))
            .find(|room| fits(room / 2) || *room >= MOST_ENTRIES)
            .unwrap_or(MOST_ENTRIES),
    }
}

/// Gives each entry a number: that of an entry which says the same already, else the lowest that is free now. So what an
/// index names never changes, and a packet meets all of the old entry or all of the new one. What finds no room takes the
/// kernel's path.
fn numbered<K: Ord + Copy, S: Ord + Copy, V>(
    wanted: BTreeMap<K, V>,
    index: &BTreeMap<K, S>,
    entries: &BTreeMap<S, V>,
    same: impl Fn(&V, &V) -> bool,
    slots: impl Iterator<Item = S>,
) -> (BTreeMap<K, S>, BTreeMap<S, V>) {
    let (mut numbers, mut numbered, mut fresh) = (BTreeMap::new(), BTreeMap::new(), vec![]);
    let named: BTreeSet<&S> = index.values().collect();
    // What was cut off between an entry and its index is taken up again.
    let mut unnamed: Vec<(&S, &V)> = entries.iter().filter(|(slot, _)| !named.contains(slot)).collect();
    for (key, value) in wanted {
        let of_index = index.get(&key).filter(|slot| !numbered.contains_key(*slot));
        let kept = of_index.filter(|slot| entries.get(*slot).is_some_and(|there| same(there, &value)));
        let of_entries = || {
            let at = unnamed.iter().position(|(_, there)| same(there, &value))?;
            Some(unnamed.swap_remove(at).0)
        };
        match kept.or_else(of_entries) {
            Some(slot) => {
                numbers.insert(key, *slot);
                numbered.insert(*slot, value);
            }
            None => fresh.push((key, value)),
        }
    }
    let free = slots.filter(|slot| !entries.contains_key(slot));
    for ((key, value), slot) in fresh.into_iter().zip(free) {
        numbers.insert(key, slot);
        numbered.insert(slot, value);
    }
    (numbers, numbered)
}

#[cfg(test)]
#[path = "fast_path_tests.rs"]
mod tests;
