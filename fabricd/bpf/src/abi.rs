//! The layout of the maps, which programs and fabricd share: names, keys and values as the kernel has them, reasons.
//!
//! `c/fabric.h` says the same in C. Both sides assert sizes and offsets while they are compiled, and a test compares them
//! line by line. Who changes anything here, the order of [`Reason`] included, raises [`LAYOUT`]: maps of another layout are
//! never touched.
//!
//! Numbers are in this machine's order; what is only compared with a packet or copied into one is bytes. An index or slot
//! of 0 is nobody's: arrays are zero until somebody writes to them, so slots count from 1.
//!
//! ```text
//!  destination ─┬─ in our own subnet ─► pod_index4 / pod_index6 ─► slot ─► pods, nat_bits0 / nat_bits1, slow_pods
//!               └─ elsewhere ─► number of its subnet ─► peer_index4 / peer_index6 ─► slot ─► peers, peer_counters
//! ```

use std::mem::offset_of;
use std::net::{Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use crate::reason::{Program, Reason};

/// The number of this layout: a part of the path that the maps are pinned at.
pub const LAYOUT: u32 = 2;
/// What the programs are under, as the kernel asks when it loads them. None of their helpers needs one of the GPL.
pub const LICENSE: &std::ffi::CStr = c"Apache-2.0";
/// Bytes that encapsulation over IPv4 adds: IPv4, UDP, VXLAN and the Ethernet header inside (RFC 7348 section 5).
pub const OVERHEAD4: usize = 20 + 8 + 8 + 14;
/// Bytes that it adds over IPv6.
pub const OVERHEAD6: usize = 40 + 8 + 8 + 14;

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
const NAT_WORDS_OF_PROTOCOL: u32 = 1024;

/// The word of `nat_bits` for a pod's port, and the bit in it. `udp` is false for TCP.
#[must_use]
pub const fn nat_bit(slot: u32, udp: bool, port: u16) -> (u32, u64) {
    let word = slot * NAT_WORDS_OF_POD + udp as u32 * NAT_WORDS_OF_PROTOCOL + port as u32 / 64;
    (word, 1 << (port % 64))
}

/// [`Config::flags`]: pods have IPv4, and the fields of IPv4 are set.
pub const CONFIG_IPV4: u32 = 1;
/// [`Config::flags`]: pods have IPv6, and the fields of IPv6 are set.
pub const CONFIG_IPV6: u32 = 2;
/// [`Config::flags`]: connections are tracked on this node, so ports that may be translated take the kernel's path.
pub const CONFIG_GUARD: u32 = 4;

/// What the programs know of this node. Written before they are attached; while they are, one field at a time.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Config {
    /// `CONFIG_…`.
    pub flags: u32,
    /// The VNI in network order, and a byte of zero: the second word of a VXLAN header ([`vxlan_vni`]).
    pub vni: [u8; 4],
    /// The whole network's first address, in this machine's order.
    pub network4: u32,
    /// Its mask.
    pub network4_mask: u32,
    /// This node's subnet.
    pub own4: u32,
    /// Its mask.
    pub own4_mask: u32,
    /// Bits of an address that are no part of its subnet's number: 32 less the config's `SubnetLen`.
    pub subnet4_shift: u32,
    /// The same of IPv6, of 128.
    pub subnet6_shift: u32,
    /// IPv6: the whole network's first address in two halves, the upper one first ([`halves`]).
    pub network6: [u64; 2],
    /// Its mask.
    pub network6_mask: [u64; 2],
    /// This node's subnet.
    pub own6: [u64; 2],
    /// Its mask.
    pub own6_mask: [u64; 2],
    /// The underlay address that peers send to.
    pub local4: [u8; 4],
    /// VXLAN's UDP port, in network order.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
    /// The underlay address that IPv6 peers send to.
    pub local6: [u8; 16],
    /// The MAC address of our VXLAN device.
    pub vtep4: [u8; 6],
    /// Zero.
    pub reserved4: [u8; 2],
    /// The same of IPv6.
    pub vtep6: [u8; 6],
    /// Zero.
    pub reserved6: [u8; 2],
}

/// [`Peer::flags`]: on the same link, so its pods' packets go without encapsulation (`DirectRouting`).
pub const PEER_DIRECT: u32 = 1;
/// [`Peer::flags`]: `nexthop` is an IPv6 address.
pub const PEER_NEXTHOP_IPV6: u32 = 2;

/// How one family's subnet of a peer is reached, and who may send from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Peer {
    /// `PEER_…`.
    pub flags: u32,
    /// The interface that packets leave by: the uplink; for a tunnel over IPv6 our VXLAN device, which makes the checksum.
    /// 0: what it sends is taken, what is for it takes the kernel's path.
    pub ifindex: u32,
    /// The largest IP packet that may go to it, in bytes, without what encapsulation adds.
    pub mtu: u32,
    /// The sum of the template's IPv4 header with length, identification, type of service and checksum zero
    /// ([`template_sum`]).
    pub template_sum: u32,
    /// The underlay address that it sends from: four bytes and zeros, or sixteen.
    pub underlay: [u8; 16],
    /// The one that it had until a moment ago; zeros when there is none.
    pub former: [u8; 16],
    /// The next hop's address on the underlay, for [`Peer::ifindex`]: four bytes and zeros, or sixteen.
    pub nexthop: [u8; 16],
    /// All headers that go in front of a packet ([`template4`]); of an IPv6 peer only the Ethernet header inside.
    pub template: [u8; TEMPLATE_SIZE],
}

/// [`Pod::flags`]: its packets may take the fast path, in both directions. Set when `nat_bits` has the ports of its connections
/// that are translated, and `slow_flows` those that are tracked: what the kernel tracks has to stay with it.
pub const POD_FAST: u32 = 1;

/// A pod of this node.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Pod {
    /// Its veth's end on the host. 0: no pod, whatever an index says.
    pub ifindex: u32,
    /// `POD_…`.
    pub flags: u32,
    /// Of its veth, in bytes.
    pub mtu: u32,
    /// The MAC address inside the pod.
    pub mac: [u8; 6],
    /// Zero.
    pub reserved: [u8; 2],
    /// The MAC address of its gateway: of the bridge.
    pub gateway: [u8; 6],
    /// Zero.
    pub reserved_gateway: [u8; 2],
}

/// A key of `pod_index6`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Address6 {
    /// In network order.
    pub bytes: [u8; 16],
}

/// A key of `slow_flows`, as the pod sends: its address and port are the source. IPv4 addresses are mapped
/// (`::ffff:192.0.2.1`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Flow {
    /// The pod.
    pub source: [u8; 16],
    /// The pod elsewhere that it talks to.
    pub destination: [u8; 16],
    /// In network order.
    pub source_port: [u8; 2],
    /// In network order.
    pub destination_port: [u8; 2],
    /// 6 or 17.
    pub protocol: u8,
    /// Zero.
    pub reserved: [u8; 3],
}

/// What went between the pods of this node and those of one peer by the fast path. Each processor has its own; their sum
/// counts. Bytes are those of IP packets; of segments that travel together the headers count once.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Traffic {
    /// To the peer. Segments that travel together count each.
    pub sent_packets: u64,
    /// To the peer.
    pub sent_bytes: u64,
    /// From the peer.
    pub received_packets: u64,
    /// From the peer.
    pub received_bytes: u64,
}

/// Size of [`Peer::template`]: Ethernet, IPv4, UDP, VXLAN, Ethernet.
pub const TEMPLATE_SIZE: usize = 14 + OVERHEAD4;
/// Where the IPv4 header of a template begins.
pub const TEMPLATE_IP: usize = 14;
/// Where its UDP header begins.
pub const TEMPLATE_UDP: usize = 34;
/// Where its VXLAN header begins.
pub const TEMPLATE_VXLAN: usize = 42;
/// Where the Ethernet header inside begins.
pub const TEMPLATE_INNER: usize = 50;

impl Default for Peer {
    fn default() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}

/// The second word of a VXLAN header (RFC 7348 section 5).
#[must_use]
pub const fn vxlan_vni(vni: u32) -> [u8; 4] {
    (vni << 8).to_be_bytes()
}

/// An IPv6 address as the programs calculate with it.
#[must_use]
pub const fn halves(address: Ipv6Addr) -> [u64; 2] {
    let bits = address.to_bits();
    [(bits >> 64) as u64, bits as u64]
}

/// An IPv4 address in a field for either family.
#[must_use]
pub const fn padded(address: Ipv4Addr) -> [u8; 16] {
    let [a, b, c, d] = address.octets();
    [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// The number of a subnet among those of a network; `None` if it has more than 32 bits. `shift` is
/// [`Config::subnet4_shift`] or [`Config::subnet6_shift`].
#[must_use]
pub fn subnet_number(network: u128, address: u128, shift: u32) -> Option<u32> {
    u32::try_from((address - network).checked_shr(shift)?).ok()
}

/// The headers in front of a packet to an IPv4 peer, as our VXLAN device makes them but for the UDP checksum, which is left out:
/// from `local` to `underlay`, TTL 64. The outer MAC addresses are left to the kernel's neighbour table; lengths, checksum, identification, type
/// of service and source port to the program.
#[must_use]
pub fn template4(local: Ipv4Addr, underlay: Ipv4Addr, port: u16, vni: u32, vteps: [[u8; 6]; 2]) -> [u8; TEMPLATE_SIZE] {
    let mut template = [0; TEMPLATE_SIZE];
    let [ours, theirs] = vteps;
    let mut put = |at: usize, bytes: &[u8]| template[at..at + bytes.len()].copy_from_slice(bytes);
    put(TEMPLATE_IP - 2, &ETHERTYPE_IPV4);
    put(TEMPLATE_IP, &[0x45]);
    put(TEMPLATE_IP + 8, &[64, 17]);
    put(TEMPLATE_IP + 12, &local.octets());
    put(TEMPLATE_IP + 16, &underlay.octets());
    put(TEMPLATE_UDP + 2, &port.to_be_bytes());
    put(TEMPLATE_VXLAN, &[0x08]);
    put(TEMPLATE_VXLAN + 4, &vxlan_vni(vni));
    put(TEMPLATE_INNER, &theirs);
    put(TEMPLATE_INNER + 6, &ours);
    put(TEMPLATE_INNER + 12, &ETHERTYPE_IPV4);
    template
}

/// What [`Peer::template`] has for an IPv6 peer: the Ethernet header inside, as our VXLAN device sends it on.
#[must_use]
pub fn template6(vteps: [[u8; 6]; 2]) -> [u8; TEMPLATE_SIZE] {
    let mut template = [0; TEMPLATE_SIZE];
    let [ours, theirs] = vteps;
    template[TEMPLATE_INNER..TEMPLATE_INNER + 6].copy_from_slice(&theirs);
    template[TEMPLATE_INNER + 6..TEMPLATE_INNER + 12].copy_from_slice(&ours);
    template[TEMPLATE_INNER + 12..].copy_from_slice(&ETHERTYPE_IPV6);
    template
}

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// The sum of the sixteen-bit words of a template's IPv4 header (RFC 1071), in network order, not yet folded.
#[must_use]
pub fn template_sum(template: &[u8; TEMPLATE_SIZE]) -> u32 {
    let words = template[TEMPLATE_IP..TEMPLATE_UDP].chunks_exact(2);
    words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum()
}

/// Asserts sizes and offsets, as `c/fabric.h` does, and gives them to the test that compares the two.
macro_rules! layout {
    ($($kind:ident $name:literal $size:literal { $($field:ident $offset:literal),* $(,)? })*) => {
        $(const _: () = assert!(size_of::<$kind>() == $size);
        $(const _: () = assert!(offset_of!($kind, $field) == $offset);)*)*
        #[cfg(test)]
        const ASSERTED: &[(&str, usize, &[(&str, usize)])] =
            &[$(($name, $size, &[$((stringify!($field), $offset)),*])),*];
    };
}

layout! {
    Config "config" 136 {
        flags 0, vni 4, network4 8, network4_mask 12, own4 16, own4_mask 20, subnet4_shift 24, subnet6_shift 28,
        network6 32, network6_mask 48, own6 64, own6_mask 80, local4 96, port 100, local6 104, vtep4 120, vtep6 128,
    }
    Peer "peer" 128 {
        flags 0, ifindex 4, mtu 8, template_sum 12, underlay 16, former 32, nexthop 48, template 64,
    }
    Pod "pod" 28 { flags 4, ifindex 0, mtu 8, mac 12, gateway 20 }
    Address6 "address6" 16 { bytes 0 }
    Flow "flow" 40 { source 0, destination 16, source_port 32, destination_port 34, protocol 36 }
    Traffic "traffic" 32 { sent_packets 0, sent_bytes 8, received_packets 16, received_bytes 24 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const HEADER: &str = include_str!("../c/fabric.h");
    const MAPS: &str = include_str!("../c/maps.h");

    #[test]
    fn header_and_rust_assert_the_same_sizes_and_offsets() {
        let mut ours = BTreeSet::new();
        for (name, size, fields) in ASSERTED {
            ours.insert(format!("SIZE({name}, {size});"));
            ours.extend(fields.iter().map(|(field, offset)| format!("FIELD({name}, {field}, {offset});")));
        }
        let theirs = HEADER.lines().filter(|line| line.starts_with("SIZE(") || line.starts_with("FIELD("));
        assert_eq!(theirs.map(str::to_owned).collect::<BTreeSet<_>>(), ours);
    }

    #[test]
    fn header_and_rust_have_the_same_numbers() {
        let numbers = [
            ("CONFIG_IPV4", CONFIG_IPV4),
            ("CONFIG_IPV6", CONFIG_IPV6),
            ("CONFIG_GUARD", CONFIG_GUARD),
            ("PEER_DIRECT", PEER_DIRECT),
            ("PEER_NEXTHOP_IPV6", PEER_NEXTHOP_IPV6),
            ("POD_FAST", POD_FAST),
            ("TEMPLATE_IP", TEMPLATE_IP as u32),
            ("TEMPLATE_UDP", TEMPLATE_UDP as u32),
            ("TEMPLATE_VXLAN", TEMPLATE_VXLAN as u32),
            ("TEMPLATE_INNER", TEMPLATE_INNER as u32),
            ("TEMPLATE_SIZE", TEMPLATE_SIZE as u32),
            ("NAT_WORDS_OF_PROTOCOL", NAT_WORDS_OF_PROTOCOL),
            ("NAT_WORDS_OF_POD", NAT_WORDS_OF_POD),
            ("REASONS", Reason::ROOM),
        ];
        let ours = numbers.map(|(name, number)| format!("#define {name} {number}"));
        let theirs = HEADER.lines().filter(|line| {
            line.strip_prefix("#define ").is_some_and(|rest| rest.ends_with(|last: char| last.is_ascii_digit()))
        });
        assert_eq!(theirs.map(str::to_owned).collect::<BTreeSet<_>>(), BTreeSet::from(ours));
    }

    #[test]
    fn header_and_rust_have_the_same_programs_and_reasons() {
        let all = Program::ALL.iter().map(|program| (program.name().to_owned(), *program as u32));
        let ours: Vec<_> =
            all.chain(Reason::ALL.iter().map(|reason| (format!("{reason:?}"), *reason as u32))).collect();
        let theirs: Vec<_> = HEADER
            .lines()
            .filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "))
            .map(|(name, number)| (name.to_owned(), number.parse().expect("a number")))
            .collect();
        assert_eq!(ours.len(), theirs.len());
        for ((ours, number), (theirs, there)) in ours.into_iter().zip(theirs) {
            let plain = |name: &str| name.replace('_', "").to_lowercase();
            assert_eq!((plain(ours.trim_start_matches("fabric_")), number), (plain(&theirs), there));
        }
        assert!(Reason::ALL.len() <= Reason::ROOM as usize);
    }

    #[test]
    fn programs_use_the_maps_that_are_described() {
        let declared = MAPS.lines().filter_map(|line| line.strip_prefix("MAP(")?.strip_suffix(");"));
        assert!(declared.eq(Map::ALL.map(Map::name)));
        assert!(Map::ALL.iter().all(|map| map.name().len() <= 15), "the kernel keeps 15 bytes of a name");
    }

    #[test]
    fn template_is_what_a_vxlan_device_sends() {
        let (local, underlay) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let template = template4(local, underlay, 8472, 0x01_0203, [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]]);
        let hex: String = template.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            "0000000000000000000000000800\
             4500000000000000401100 00c0000201c0000202\
             00002118000000000800000001020300\
             0200000000020200000000010800"
                .replace(' ', "")
        );
        assert_eq!(template_sum(&template), 0x4500 + 0x4011 + 0xc000 + 0x0201 + 0xc000 + 0x0202);
    }

    #[test]
    fn each_port_of_each_pod_has_a_bit_of_its_own() {
        assert_eq!(nat_bit(0, false, 0), (0, 1));
        assert_eq!(nat_bit(0, false, u16::MAX), (1023, 1 << 63));
        assert_eq!(nat_bit(0, true, 0), (1024, 1));
        assert_eq!(nat_bit(3, true, 53), (3 * 2048 + 1024, 1 << 53));
    }

    #[test]
    fn subnets_are_counted_from_the_networks_first() {
        let bits = |text: &str| text.parse::<Ipv4Addr>().map(|ip| u128::from(ip.to_bits())).expect("an address");
        let network = bits("198.18.0.0");
        assert_eq!(subnet_number(network, bits("198.18.0.9"), 8), Some(0));
        assert_eq!(subnet_number(network, bits("198.19.255.9"), 8), Some(511));
        let bits = |text: &str| text.parse::<Ipv6Addr>().map(|ip| ip.to_bits()).expect("an address");
        assert_eq!(subnet_number(bits("2001:db8::"), bits("2001:db8:0:7::1"), 64), Some(7));
        assert_eq!(subnet_number(bits("2001:db8::"), bits("2001:db8:1::1"), 32), None, "48 bits are too many");
    }
}
