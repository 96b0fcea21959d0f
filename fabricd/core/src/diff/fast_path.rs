//! The steps to the fast path.
//!
//! Made from the data up: maps, this node's own end, peers, the index that names them, programs, links, pods; an entry that
//! makes packets go fast comes when all that it leads to is there. Taken away from the other end, before anything of the
//! kernel's path changes: links, pods, the index; what they led to goes last of all.
//!
//! What a release with another layout of the maps has made stays until all of this is there beside it; then its links have
//! their programs replaced, and the rest of it goes.
//!
//! A pod comes in three steps. Its entry at first only has programs mark the ports that it uses towards anything but pods;
//! then connections that are already translated are marked too ([`Op::Seed`]); then its packets are taken. Without that
//! order an answer would pass by the translation that its connection has.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::{Change, Key, Stage, Verb};
use crate::model::Subnet;
use crate::state::fast_path::{
    End, FastPath, LocalVtep, MapSizes, Peer, PeerSlot, Place, Pod, PodSlot, Program, Role, UnderlayPath,
};

/// One write to the fast path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// All maps.
    Maps(Change<MapSizes>),
    /// This node's own end.
    Node(Change<LocalVtep>),
    /// A peer.
    Peer(PeerSlot, Change<Peer>),
    /// Which peer has a subnet.
    Index(Subnet, Change<PeerSlot>),
    /// A program is loaded, or goes.
    Program(Change<Program>),
    /// Where a program is attached.
    Link(Place, Change<Program>),
    /// A pod.
    Pod(PodSlot, Change<Pod>),
    /// Which pod has an address.
    Address(IpAddr, Change<PodSlot>),
    /// The NAT guard marks what is translated of the connections of pods with these addresses.
    Seed(BTreeMap<IpAddr, PodSlot>),
    /// Maps and programs of another layout go.
    Former,
}

/// What names a part of the fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// All maps.
    Maps,
    /// This node's own end.
    Node,
    /// A peer.
    Peer(PeerSlot),
    /// A subnet.
    Index(Subnet),
    /// A program.
    Program(Program),
    /// A link.
    Link(Place),
    /// A pod.
    Pod(PodSlot),
    /// A pod's address.
    Address(IpAddr),
    /// The NAT guard.
    Guard,
    /// Another layout.
    Former,
}

impl Op {
    /// What this step writes.
    #[must_use]
    pub fn key(&self) -> Key {
        Key::FastPath(match self {
            Self::Maps(_) => Part::Maps,
            Self::Node(_) => Part::Node,
            Self::Peer(slot, _) => Part::Peer(*slot),
            Self::Index(subnet, _) => Part::Index(*subnet),
            Self::Program(Change::Create(p) | Change::Delete(p) | Change::Replace { now: p, .. }) => Part::Program(*p),
            Self::Link(place, _) => Part::Link(*place),
            Self::Pod(slot, _) => Part::Pod(*slot),
            Self::Address(ip, _) => Part::Address(*ip),
            Self::Seed(_) => Part::Guard,
            Self::Former => Part::Former,
        })
    }

    /// What must be right before this step makes sense.
    #[must_use]
    pub fn needs(&self) -> Vec<Key> {
        let needs = match self {
            Self::Maps(_) | Self::Former => vec![],
            Self::Node(c) if c.wanted().is_some() => vec![Part::Maps],
            Self::Peer(_, c) if c.wanted().is_some() => vec![Part::Maps, Part::Node],
            Self::Index(_, c) => {
                c.wanted().map(|slot| vec![Part::Maps, Part::Node, Part::Peer(*slot)]).unwrap_or_default()
            }
            Self::Program(c) if c.wanted().is_some() => vec![Part::Maps],
            Self::Link(_, c) => c.wanted().map(|p| vec![Part::Maps, Part::Node, Part::Program(*p)]).unwrap_or_default(),
            Self::Pod(_, c) => match c.wanted() {
                // What isn't marked on sending must not be taken on receiving.
                Some(pod) if pod.fast => {
                    let link = |role: Role| Part::Link(Place { ifindex: pod.ifindex, hook: role.hook() });
                    vec![Part::Maps, Part::Node, Part::Guard, link(Role::PodOut), link(Role::PodIn)]
                }
                Some(_) => vec![Part::Maps, Part::Node],
                None => vec![],
            },
            Self::Address(_, c) => {
                c.wanted().map(|slot| vec![Part::Maps, Part::Node, Part::Pod(*slot)]).unwrap_or_default()
            }
            Self::Seed(pods) => pods.keys().map(|ip| Part::Address(*ip)).collect(),
            Self::Node(_) | Self::Peer(..) | Self::Program(_) => vec![],
        };
        needs.into_iter().map(Key::FastPath).collect()
    }

    /// What the value that was there before still uses: it must stay when this step fails.
    #[must_use]
    pub fn holds(&self) -> Vec<Key> {
        let holds = match self {
            Self::Index(_, c) => c.found().map(|slot| vec![Part::Peer(*slot), Part::Node, Part::Maps]),
            Self::Link(_, c) => {
                c.found().map(|program| vec![Part::Program(*program), Part::Node, Part::Maps, Part::Former])
            }
            Self::Address(_, c) => c.found().map(|slot| vec![Part::Pod(*slot), Part::Node, Part::Maps]),
            Self::Pod(_, c) => c.found().map(|_| vec![Part::Node, Part::Maps]),
            Self::Maps(_) | Self::Node(_) | Self::Peer(..) | Self::Program(_) | Self::Seed(_) | Self::Former => None,
        };
        holds.unwrap_or_default().into_iter().map(Key::FastPath).collect()
    }

    /// When it is taken.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match (self, self.verb()) {
            (Self::Link(..), Verb::Delete) => Stage::FastLinkGoes,
            (Self::Address(..), Verb::Delete) => Stage::FastAddressGoes,
            (Self::Pod(..), Verb::Delete) => Stage::FastPodGoes,
            (Self::Index(..), Verb::Delete) => Stage::FastIndexGoes,
            (Self::Maps(_), Verb::Delete) | (Self::Former, _) => Stage::FastMapsGo,
            (Self::Node(_), Verb::Delete) => Stage::FastNodeGoes,
            (Self::Peer(..), Verb::Delete) => Stage::FastPeerGoes,
            (Self::Program(_), Verb::Delete) => Stage::FastProgramGoes,
            (Self::Maps(_), _) => Stage::FastMaps,
            (Self::Node(_), _) => Stage::FastNode,
            (Self::Peer(..), _) => Stage::FastPeer,
            (Self::Index(..), _) => Stage::FastIndex,
            (Self::Program(_), _) => Stage::FastProgram,
            (Self::Link(..), _) => Stage::FastLink,
            (Self::Pod(_, c), _) if c.wanted().is_some_and(|pod| pod.fast) => Stage::FastPodTaken,
            (Self::Pod(..), _) => Stage::FastPod,
            (Self::Address(..), _) => Stage::FastAddress,
            (Self::Seed(_), _) => Stage::FastGuard,
        }
    }

    /// What is done to it.
    #[must_use]
    pub fn verb(&self) -> Verb {
        match self {
            Self::Maps(c) => c.verb(),
            Self::Node(c) => c.verb(),
            Self::Peer(_, c) => c.verb(),
            Self::Index(_, c) => c.verb(),
            Self::Program(c) => c.verb(),
            Self::Link(_, c) => c.verb(),
            Self::Pod(_, c) => c.verb(),
            Self::Address(_, c) => c.verb(),
            Self::Seed(_) => Verb::Replace,
            Self::Former => Verb::Delete,
        }
    }

    /// Whether it goes because of what leases say. Pods and links are decided by what is attached to this node.
    pub(super) fn is_decided_by_leases(&self) -> bool {
        !matches!(self, Self::Pod(..) | Self::Address(..) | Self::Link(..) | Self::Former)
    }

    /// Makes the step in a model of what is there.
    pub fn apply_to(&self, there: &mut FastPath) {
        match self {
            Self::Maps(Change::Delete(_)) => {
                *there = FastPath { maps: None, programs: there.programs.clone(), ..FastPath::new() }
            }
            Self::Maps(c) => there.maps = c.wanted().copied(),
            Self::Node(c) => there.node = c.wanted().copied(),
            Self::Peer(slot, c) => put(&mut there.peers, *slot, c),
            Self::Index(subnet, c) => put(&mut there.index, *subnet, c),
            Self::Program(Change::Delete(program)) => drop(there.programs.remove(program)),
            Self::Program(c) => there.programs.extend(c.wanted()),
            Self::Link(place, c) => put(&mut there.links, *place, c),
            Self::Pod(slot, c) => put(&mut there.pods, *slot, c),
            Self::Address(ip, c) => put(&mut there.addresses, *ip, c),
            Self::Seed(_) => {}
            Self::Former => there.former = false,
        }
    }
}

fn put<K: Ord, V: Copy>(table: &mut BTreeMap<K, V>, key: K, change: &Change<V>) {
    match change.wanted() {
        Some(value) => drop(table.insert(key, *value)),
        None => drop(table.remove(&key)),
    }
}

/// The steps from `have` to `want`. Where maps or this node's own end are others, all goes first, and comes back by the next
/// plan: entries mean something else then, and meanwhile packets take the kernel's path.
pub(super) fn diff(want: &FastPath, have: &FastPath) -> Vec<Op> {
    let nothing = FastPath::new();
    let outgrown = have.maps.is_some() && have.maps != want.maps;
    let moved = have.node.is_some() && have.node != want.node;
    let reduced;
    let want = match (outgrown, moved) {
        (true, _) => &nothing,
        (false, true) => {
            reduced = FastPath { maps: want.maps, programs: want.programs.clone(), ..FastPath::new() };
            &reduced
        }
        (false, false) => want,
    };
    // All parts by name: one more has to be compared too.
    let FastPath { maps, node, peers, index, pods, addresses, programs, links, former } = want;
    let mut ops: Vec<Op> = vec![];
    ops.extend(single(*maps, have.maps).map(Op::Maps));
    ops.extend(single(*node, have.node).map(Op::Node));
    ops.extend(table(peers, &have.peers).map(|(slot, change)| Op::Peer(slot, change)));
    ops.extend(table(index, &have.index).map(|(subnet, change)| Op::Index(subnet, change)));
    ops.extend(programs.difference(&have.programs).map(|program| Op::Program(Change::Create(*program))));
    ops.extend(have.programs.difference(programs).map(|program| Op::Program(Change::Delete(*program))));
    ops.extend(table(links, &have.links).map(|(place, change)| Op::Link(place, change)));
    ops.extend(table(addresses, &have.addresses).map(|(ip, change)| Op::Address(ip, change)));
    ops.extend((have.former && !former).then_some(Op::Former));
    let mut taken = BTreeSet::new();
    for (slot, change) in table(pods, &have.pods) {
        let Some(now) = change.wanted().copied() else {
            ops.push(Op::Pod(slot, change));
            continue;
        };
        let marked = Pod { fast: false, ..now };
        let first = match change.found().copied() {
            None => Some(Change::Create(marked)),
            Some(was) if was == marked => None,
            Some(was) => Some(Change::Replace { was, now: marked }),
        };
        ops.extend(first.map(|first| Op::Pod(slot, first)));
        if now.fast {
            ops.push(Op::Pod(slot, Change::Replace { was: marked, now }));
            taken.insert(slot);
        }
    }
    // While nothing was attached to its port, nothing was marked.
    let unmarked = |pod: &Pod| {
        let place = Place { ifindex: pod.ifindex, hook: Role::PodOut.hook() };
        pod.fast && links.contains_key(&place) && !have.links.contains_key(&place)
    };
    taken.extend(pods.iter().filter(|(_, pod)| unmarked(pod)).map(|(slot, _)| *slot));
    // A pod that has got one more address has connections of that too.
    let fresh = |ip: &IpAddr, slot: &PodSlot| taken.contains(slot) || have.addresses.get(ip) != Some(slot);
    let seeded: BTreeMap<_, _> =
        addresses.iter().filter(|(ip, slot)| fresh(ip, slot)).map(|(ip, slot)| (*ip, *slot)).collect();
    if !seeded.is_empty() {
        ops.push(Op::Seed(seeded));
    }
    ops
}

fn single<T: PartialEq>(want: Option<T>, have: Option<T>) -> Option<Change<T>> {
    match (want, have) {
        (Some(now), None) => Some(Change::Create(now)),
        (Some(now), Some(was)) if now != was => Some(Change::Replace { was, now }),
        (None, Some(was)) => Some(Change::Delete(was)),
        _ => None,
    }
}

fn table<K: Ord + Copy, V: Copy + PartialEq>(
    want: &BTreeMap<K, V>,
    have: &BTreeMap<K, V>,
) -> impl Iterator<Item = (K, Change<V>)> {
    let here = want.iter().filter_map(|(key, now)| Some((*key, single(Some(*now), have.get(key).copied())?)));
    let gone = have.iter().filter(|(key, _)| !want.contains_key(*key));
    here.chain(gone.map(|(key, was)| (*key, Change::Delete(*was))))
}

impl fmt::Display for Op {
    /// A line: what, and its value. There is no command for it, as `bpftool map` knows bytes alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} fast path: ", self.verb().sign())?;
        match self {
            Self::Maps(Change::Delete(_)) => f.write_str("maps"),
            Self::Maps(c) => {
                let Some(MapSizes { subnets4, subnets6, peers, addresses4, pods }) = c.wanted() else { return Ok(()) };
                write!(f, "maps for {subnets4} subnets of IPv4 and {subnets6} of IPv6, {peers} peers, ")?;
                write!(f, "{addresses4} addresses of IPv4, {pods} pods")
            }
            Self::Node(Change::Delete(_)) => f.write_str("this node's own end"),
            Self::Node(Change::Create(own) | Change::Replace { now: own, .. }) => {
                let LocalVtep { vni, port, guard, ends } = own;
                for End { vtep_mac, local, network, subnet } in ends.values() {
                    write!(f, "own subnet {subnet} of {network} local {local} lladdr {vtep_mac}, ")?;
                }
                write!(f, "vni {vni} port {port}{}", if *guard { " nat guard" } else { "" })
            }
            Self::Peer(slot, Change::Delete(peer)) => write!(f, "peer {}, {}", slot.0, peer.underlay),
            Self::Peer(slot, Change::Create(peer) | Change::Replace { now: peer, .. }) => {
                let Peer { underlay, vtep_mac, path: UnderlayPath { ifindex, gateway }, direct, mtu } = peer;
                let way = if *direct { "direct" } else { "vxlan" };
                write!(
                    f,
                    "peer {}, {underlay} lladdr {vtep_mac} {way} via {gateway} interface {ifindex} mtu {mtu}",
                    slot.0
                )
            }
            Self::Index(subnet, c) => match c.wanted() {
                Some(slot) => write!(f, "{subnet} is of peer {}", slot.0),
                None => write!(f, "{subnet}"),
            },
            Self::Program(Change::Create(program) | Change::Delete(program) | Change::Replace { now: program, .. }) => {
                write!(f, "program {program}")
            }
            Self::Link(place, c) => {
                write!(f, "link at {} of interface {}", place.hook.as_str(), place.ifindex)?;
                c.wanted().map_or(Ok(()), |program| write!(f, " to {program}"))
            }
            Self::Address(ip, c) => match c.wanted() {
                Some(slot) => write!(f, "{ip} is of pod {}", slot.0),
                None => write!(f, "{ip}"),
            },
            Self::Pod(slot, Change::Delete(pod)) => write!(f, "pod {}, interface {}", slot.0, pod.ifindex),
            Self::Pod(slot, Change::Create(pod) | Change::Replace { now: pod, .. }) => {
                let Pod { ifindex, mac, gateway_mac, mtu, fast } = pod;
                let how = if *fast { "taken" } else { "marked only" };
                write!(f, "pod {}, interface {ifindex} lladdr {mac} mtu {mtu} gateway {gateway_mac}, {how}", slot.0)
            }
            Self::Former => f.write_str("maps and programs of another layout"),
            Self::Seed(pods) => write!(f, "translated connections of {} addresses are marked", pods.len()),
        }
    }
}

#[cfg(test)]
#[path = "fast_path_tests.rs"]
mod tests;
