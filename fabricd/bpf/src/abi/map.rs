//! The maps: their names, kinds and sizes, and where an entry of an array is.

use super::{Address6, Config, Flow, Peer, Pod, Program, Reason, Traffic};

/// What kind of table a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MapKind {
    /// `BPF_MAP_TYPE_ARRAY`: by number, all entries are there and zero.
    Array,
    /// `BPF_MAP_TYPE_HASH`.
    Hash,
    /// An array, or where that would be too large a hash: the programs are the same for both, see [`Map::kind`].
    ArrayOrHash,
    /// `BPF_MAP_TYPE_LRU_HASH`: forgets what was not used for longest when it is full.
    LruHash,
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`: an array for each processor.
    PerCpuArray,
}

/// A map, by the name that the programs have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Map {
    /// One [`Config`].
    Config,
    /// Number of an IPv4 subnet, counted from the network's first, to the peer's slot, `u32` to `u32`.
    PeerIndex4,
    /// The same of IPv6.
    PeerIndex6,
    /// A peer's slot to [`Peer`]. A peer of two families has two.
    Peers,
    /// An IPv4 address less its subnet's first, to the pod's slot, `u32` to `u32`.
    PodIndex4,
    /// An [`Address6`] to the pod's slot, `u32`.
    PodIndex6,
    /// A pod's slot to [`Pod`].
    Pods,
    /// One generation of ports that may be translated: `u64` words of bits, see [`nat_bit`].
    NatBits0,
    /// The other generation.
    NatBits1,
    /// One `u32`, 0 or 1: which generation new marks go to. Both are asked.
    NatCurrent,
    /// [`Flow`], as the pod sends it, to the time of the last packet that came to the pod by the slow path: nanoseconds of
    /// `CLOCK_MONOTONIC`, `u64`.
    SlowFlows,
    /// A pod's slot to the time of the last such packet, `u64`; 0 when there was none. Only then is `slow_flows` asked.
    SlowPods,
    /// [`counter`] to a number of packets, `u64`.
    Counters,
    /// A peer's slot to [`Traffic`].
    PeerCounters,
}

impl Map {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Config,
        Self::PeerIndex4,
        Self::PeerIndex6,
        Self::Peers,
        Self::PodIndex4,
        Self::PodIndex6,
        Self::Pods,
        Self::NatBits0,
        Self::NatBits1,
        Self::NatCurrent,
        Self::SlowFlows,
        Self::SlowPods,
        Self::Counters,
        Self::PeerCounters,
    ];

    /// Its name in the object file.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::PeerIndex4 => "peer_index4",
            Self::PeerIndex6 => "peer_index6",
            Self::Peers => "peers",
            Self::PodIndex4 => "pod_index4",
            Self::PodIndex6 => "pod_index6",
            Self::Pods => "pods",
            Self::NatBits0 => "nat_bits0",
            Self::NatBits1 => "nat_bits1",
            Self::NatCurrent => "nat_current",
            Self::SlowFlows => "slow_flows",
            Self::SlowPods => "slow_pods",
            Self::Counters => "counters",
            Self::PeerCounters => "peer_counters",
        }
    }

    /// What kind of table the programs take it for. They look an index up by a `u32`, which an array and a hash both do.
    #[must_use]
    pub const fn kind(self) -> MapKind {
        match self {
            Self::PeerIndex4 | Self::PeerIndex6 | Self::PodIndex4 => MapKind::ArrayOrHash,
            Self::PodIndex6 => MapKind::Hash,
            Self::SlowFlows => MapKind::LruHash,
            Self::Counters | Self::PeerCounters => MapKind::PerCpuArray,
            Self::Config
            | Self::Peers
            | Self::Pods
            | Self::NatBits0
            | Self::NatBits1
            | Self::NatCurrent
            | Self::SlowPods => MapKind::Array,
        }
    }

    /// Bytes of a key.
    #[must_use]
    pub const fn key_size(self) -> usize {
        match self {
            Self::PodIndex6 => size_of::<Address6>(),
            Self::SlowFlows => size_of::<Flow>(),
            _ => size_of::<u32>(),
        }
    }

    /// Bytes of a value.
    #[must_use]
    pub const fn value_size(self) -> usize {
        match self {
            Self::Config => size_of::<Config>(),
            Self::Peers => size_of::<Peer>(),
            Self::Pods => size_of::<Pod>(),
            Self::PeerCounters => size_of::<Traffic>(),
            Self::NatBits0 | Self::NatBits1 | Self::SlowFlows | Self::SlowPods | Self::Counters => size_of::<u64>(),
            Self::PeerIndex4 | Self::PeerIndex6 | Self::PodIndex4 | Self::PodIndex6 | Self::NatCurrent => {
                size_of::<u32>()
            }
        }
    }

    /// How many entries an array has for each slot of a pod or peer; `None` where they are not counted by slots.
    #[must_use]
    pub const fn entries_per_slot(self) -> Option<u32> {
        match self {
            Self::Peers | Self::PeerCounters | Self::Pods | Self::SlowPods => Some(1),
            Self::NatBits0 | Self::NatBits1 => Some(NAT_WORDS_OF_POD),
            _ => None,
        }
    }
}

/// Entries of `counters`.
pub const COUNTERS: u32 = Reason::ROOM * Program::ALL.len() as u32;

/// Where `counters` has how often a program decided so.
#[must_use]
pub const fn counter(program: Program, reason: Reason) -> u32 {
    Reason::ROOM * program as u32 + reason as u32
}

/// Words of `nat_bits` that each slot of a pod has: TCP's ports, then UDP's, 64 a word.
pub const NAT_WORDS_OF_POD: u32 = 2 * NAT_WORDS_OF_PROTOCOL;
pub(super) const NAT_WORDS_OF_PROTOCOL: u32 = 1024;

/// The word of `nat_bits` for a pod's port, and the bit in it. `udp` is false for TCP.
#[must_use]
pub const fn nat_bit(slot: u32, udp: bool, port: u16) -> (u32, u64) {
    let word = slot * NAT_WORDS_OF_POD + udp as u32 * NAT_WORDS_OF_PROTOCOL + port as u32 / 64;
    (word, 1 << (port % 64))
}
