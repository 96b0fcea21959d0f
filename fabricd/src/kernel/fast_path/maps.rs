//! The maps: made, opened and written by the layout of [`fabric_bpf::abi`].

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use fabric_bpf::abi::{self, MapKind};
use fabric_bpf::{Program, Reason};
use fabric_core::model::{Family, Subnet, from_bits, to_bits};
use fabric_core::state::fast_path::{End, FastPath, LocalVtep, MapSizes, Peer, PeerSlot, Pod, PodSlot};
use fabric_ebpf::{Kind, Map, Shape};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::encode;
use super::pins::{Pins, owned, remove};

/// Flows that came by the kernel's path and are remembered for their answers.
const SLOW_FLOWS: u32 = 16_384;

/// What the programs have counted: packets by program and reason.
pub type Counts = BTreeMap<(Program, Reason), u64>;

/// What went between the pods of this node and those of each subnet of a peer, since it was known there.
pub type Traffic = BTreeMap<Subnet, abi::Traffic>;

/// All maps, open.
pub(super) struct Maps {
    maps: BTreeMap<abi::Map, Map>,
}

impl Maps {
    /// Makes and pins all maps. What is pinned there of another size goes; what is no map of ours is refused.
    pub(super) fn create(pins: &Pins, sizes: MapSizes) -> io::Result<Self> {
        let mut maps = BTreeMap::new();
        for map in abi::Map::ALL {
            let path = pins.map(map);
            match owned(&path, Map::open) {
                Ok(_) => remove(&path)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            let made = Map::create(&format!("fabric_{}", map.name()), shape(map, sizes))?;
            made.pin(&path)?;
            maps.insert(map, made);
        }
        Ok(Self { maps })
    }

    /// Opens the maps; `None` when one is missing, or has not the shape that goes with the others: then all are made anew.
    /// What is at the place of one and is none is told before that.
    pub(super) fn open(pins: &Pins) -> io::Result<Option<Self>> {
        let mut maps = BTreeMap::new();
        for map in abi::Map::ALL {
            match owned(&pins.map(map), Map::open) {
                Ok(found) => drop(maps.insert(map, found)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if maps.len() < abi::Map::ALL.len() {
            return Ok(None);
        }
        let maps = Self { maps };
        let sizes = maps.sizes();
        Ok(maps.maps.iter().all(|(map, found)| found.shape() == shape(*map, sizes)).then_some(maps))
    }

    /// For programs.
    pub(super) fn by_name(&self) -> Vec<(&str, &Map)> {
        self.maps.iter().map(|(map, found)| (map.name(), found)).collect()
    }

    fn map(&self, map: abi::Map) -> &Map {
        &self.maps[&map]
    }

    fn sizes(&self) -> MapSizes {
        let entries = |map| self.map(map).shape().max_entries;
        MapSizes {
            subnets4: entries(abi::Map::PeerIndex4),
            subnets6: entries(abi::Map::PeerIndex6),
            peers: entries(abi::Map::Peers),
            addresses4: entries(abi::Map::PodIndex4),
            pods: entries(abi::Map::Pods),
        }
    }

    /// Reads what they hold.
    pub(super) fn read_into(&self, found: &mut FastPath) -> io::Result<()> {
        found.maps = Some(self.sizes());
        let config = self.map(abi::Map::Config).get(&0_u32.to_ne_bytes())?;
        found.node = config.and_then(|bytes| encode::local_vtep(&abi::Config::read_from_bytes(&bytes).ok()?));
        let Some(node) = found.node else { return Ok(()) };
        self.map(abi::Map::Peers).each_value(|slot, bytes| {
            let peer = abi::Peer::read_from_bytes(bytes).ok().and_then(|peer| encode::found_peer(&peer, &node));
            found.peers.extend(peer.map(|peer| (PeerSlot(slot), peer)));
        })?;
        for (family, end) in node.ends.iter() {
            self.map(index_of_peers(family)).each_value(|number, slot| {
                let subnet = nth_subnet(end, number).filter(|_| number_in(slot) != 0);
                found.index.extend(subnet.map(|subnet| (subnet, PeerSlot(number_in(slot)))));
            })?;
        }
        self.map(abi::Map::Pods).each_value(|slot, bytes| {
            let pod = abi::Pod::read_from_bytes(bytes).ok().and_then(|pod| encode::found_pod(&pod));
            found.pods.extend(pod.map(|pod| (PodSlot(slot), pod)));
        })?;
        if let Some(end) = &node.ends.v4 {
            let base = to_bits(end.subnet.base());
            self.map(abi::Map::PodIndex4).each_value(|number, slot| {
                if number_in(slot) != 0 {
                    let ip = from_bits(Family::V4, base + u128::from(number));
                    found.addresses.insert(ip, PodSlot(number_in(slot)));
                }
            })?;
        }
        let index6 = self.map(abi::Map::PodIndex6);
        for key in index6.keys()? {
            let (Ok(abi::Address6 { bytes }), Some(slot)) = (abi::Address6::read_from_bytes(&key), index6.get(&key)?)
            else {
                continue;
            };
            found.addresses.insert(IpAddr::from(bytes), PodSlot(number_in(&slot)));
        }
        Ok(())
    }

    pub(super) fn set_node(&self, node: Option<&LocalVtep>) -> io::Result<()> {
        let config = node.map(encode::config).unwrap_or_default();
        self.map(abi::Map::Config).set(&0_u32.to_ne_bytes(), config.as_bytes())
    }

    pub(super) fn set_peer(&self, slot: PeerSlot, peer: Option<&Peer>, node: Option<&LocalVtep>) -> io::Result<()> {
        let value = match (peer, node) {
            (Some(peer), Some(node)) => encode::peer(peer, node).ok_or_else(no_node)?,
            (Some(_), None) => return Err(no_node()),
            (None, _) => abi::Peer::new_zeroed(),
        };
        // What was counted for whoever had the entry before is nothing of this one's.
        self.map(abi::Map::PeerCounters).zero(&slot.0.to_ne_bytes())?;
        self.map(abi::Map::Peers).set(&slot.0.to_ne_bytes(), value.as_bytes())
    }

    pub(super) fn set_index(&self, subnet: Subnet, slot: Option<PeerSlot>, node: Option<&LocalVtep>) -> io::Result<()> {
        let family = subnet.family();
        let end = node.and_then(|node| node.ends.get(family)).ok_or_else(no_node)?;
        let (network, shift) = (to_bits(end.network.base()), shift(end));
        let number = to_bits(subnet.base())
            .checked_sub(network)
            .and_then(|_| abi::subnet_number(network, to_bits(subnet.base()), shift));
        let number = number.ok_or_else(|| io::Error::other(format!("{subnet} is no part of {}", end.network)))?;
        self.map(index_of_peers(family)).set(&number.to_ne_bytes(), &slot.map_or(0, |slot| slot.0).to_ne_bytes())
    }

    pub(super) fn set_pod(&self, slot: PodSlot, pod: Option<&Pod>) -> io::Result<()> {
        let value = pod.map(encode::pod).unwrap_or_default();
        self.map(abi::Map::Pods).set(&slot.0.to_ne_bytes(), value.as_bytes())
    }

    pub(super) fn set_address(&self, ip: IpAddr, slot: Option<PodSlot>, node: Option<&LocalVtep>) -> io::Result<()> {
        let end = node.and_then(|node| node.ends.get(Family::of(ip))).ok_or_else(no_node)?;
        match ip {
            IpAddr::V4(ip) => {
                let number = u128::from(ip.to_bits()).checked_sub(to_bits(end.subnet.base()));
                let number = number.and_then(|number| u32::try_from(number).ok());
                let number = number.ok_or_else(|| io::Error::other(format!("{ip} is no part of {}", end.subnet)))?;
                self.map(abi::Map::PodIndex4).set(&number.to_ne_bytes(), &slot.map_or(0, |slot| slot.0).to_ne_bytes())
            }
            IpAddr::V6(ip) => {
                let (index, key) = (self.map(abi::Map::PodIndex6), ip.octets());
                match slot {
                    Some(slot) => index.set(&key, &slot.0.to_ne_bytes()),
                    None => index.remove(&key).map(drop),
                }
            }
        }
    }

    /// Notes a flow of a pod that takes the kernel's path: the flow before the word that tells of flows.
    pub(super) fn set_slow_flow(&self, slot: PodSlot, flow: &abi::Flow) -> io::Result<()> {
        // When a packet of it last came is not known; 0 would be never.
        let time = 1_u64.to_ne_bytes();
        self.map(abi::Map::SlowFlows).set(flow.as_bytes(), &time)?;
        self.map(abi::Map::SlowPods).set(&slot.0.to_ne_bytes(), &time)
    }

    /// The generation of the NAT guard that programs write to, and the one that only we do.
    pub(super) fn generations(&self) -> io::Result<(u32, &Map)> {
        let current = self.map(abi::Map::NatCurrent).get(&0_u32.to_ne_bytes())?.map_or(0, |bytes| number_in(&bytes));
        let other = if current == 0 { abi::Map::NatBits1 } else { abi::Map::NatBits0 };
        Ok((current, self.map(other)))
    }

    /// Has programs write to the other generation.
    pub(super) fn turn_generation(&self, current: u32) -> io::Result<()> {
        let other = u32::from(current == 0);
        self.map(abi::Map::NatCurrent).set(&0_u32.to_ne_bytes(), &other.to_ne_bytes())
    }

    /// Adds up what each processor has counted for each peer.
    pub(super) fn traffic(&self, index: &BTreeMap<Subnet, PeerSlot>) -> io::Result<Traffic> {
        let mut sums = BTreeMap::new();
        self.map(abi::Map::PeerCounters).each_value(|slot, values| {
            let each = values.chunks_exact(size_of::<abi::Traffic>());
            let each = each.filter_map(|value| abi::Traffic::read_from_bytes(value).ok());
            let sum = each.fold(abi::Traffic::default(), abi::Traffic::plus);
            if sum != abi::Traffic::default() {
                sums.insert(PeerSlot(slot), sum);
            }
        })?;
        let of = |slot: &PeerSlot| sums.get(slot).copied().unwrap_or_default();
        Ok(index.iter().map(|(subnet, slot)| (*subnet, of(slot))).collect())
    }

    /// Adds up what each processor has counted.
    pub(super) fn counts(&self) -> io::Result<Counts> {
        let mut sums = BTreeMap::new();
        self.map(abi::Map::Counters).each_value(|counter, values| {
            let each = values.chunks_exact(8).map(|value| u64::read_from_bytes(value).unwrap_or_default());
            sums.insert(counter, each.fold(0_u64, u64::wrapping_add));
        })?;
        let all = Program::ALL.into_iter().flat_map(|program| Reason::ALL.map(|reason| (program, reason)));
        let sum = |(program, reason)| sums.get(&abi::counter(program, reason)).copied().unwrap_or_default();
        Ok(all.map(|key| (key, sum(key))).filter(|(_, sum)| *sum > 0).collect())
    }
}

/// What a map of this network is like.
fn shape(map: abi::Map, sizes: MapSizes) -> Shape {
    let kind = match map.kind() {
        MapKind::Array | MapKind::ArrayOrHash => Kind::Array,
        MapKind::Hash => Kind::Hash,
        MapKind::LruHash => Kind::LruHash,
        MapKind::PerCpuArray => Kind::PerCpuArray,
    };
    let per_slot = map.entries_per_slot().unwrap_or(1);
    let max_entries = match map {
        abi::Map::Config | abi::Map::NatCurrent => 1,
        abi::Map::PeerIndex4 => sizes.subnets4,
        abi::Map::PeerIndex6 => sizes.subnets6,
        abi::Map::Peers | abi::Map::PeerCounters => sizes.peers,
        abi::Map::PodIndex4 => sizes.addresses4,
        abi::Map::PodIndex6 => sizes.pods,
        abi::Map::Pods | abi::Map::SlowPods | abi::Map::NatBits0 | abi::Map::NatBits1 => sizes.pods * per_slot,
        abi::Map::SlowFlows => SLOW_FLOWS,
        abi::Map::Counters => abi::COUNTERS,
    };
    let size = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
    Shape { kind, key_size: size(map.key_size()), value_size: size(map.value_size()), max_entries, flags: 0 }
}

fn index_of_peers(family: Family) -> abi::Map {
    match family {
        Family::V4 => abi::Map::PeerIndex4,
        Family::V6 => abi::Map::PeerIndex6,
    }
}

/// Bits of an address that are no part of its subnet's number.
fn shift(end: &End) -> u32 {
    u32::from(end.subnet.family().bits() - end.subnet.prefix_len())
}

fn nth_subnet(end: &End, number: u32) -> Option<Subnet> {
    let base = to_bits(end.network.base()) + u128::from(number).checked_shl(shift(end))?;
    Subnet::holding(from_bits(end.subnet.family(), base), end.subnet.prefix_len()).ok()
}

fn number_in(bytes: &[u8]) -> u32 {
    u32::read_from_bytes(bytes).unwrap_or_default()
}

fn no_node() -> io::Error {
    io::Error::other("this node's own end of that family isn't there; the next pass looks again")
}
