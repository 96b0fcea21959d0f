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

mod map;
mod template;

use std::mem::offset_of;
use std::net::{Ipv4Addr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use self::map::{COUNTERS, Map, MapKind, NAT_WORDS_OF_POD, counter, nat_bit};
pub use self::template::{
    OVERHEAD4, OVERHEAD6, TEMPLATE_INNER, TEMPLATE_IP, TEMPLATE_SIZE, TEMPLATE_UDP, TEMPLATE_VXLAN, template_sum,
    template4, template6, vxlan_vni,
};
pub use crate::reason::{Program, Reason};

/// The number of this layout: a part of the path that the maps are pinned at.
pub const LAYOUT: u32 = 3;
/// What the programs are under, as the kernel asks when it loads them. None of their helpers needs one of the GPL.
pub const LICENSE: &std::ffi::CStr = c"Apache-2.0";
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
    /// To the peer. Segments that travel together through a tunnel count as one.
    pub sent_packets: u64,
    /// To the peer.
    pub sent_bytes: u64,
    /// From the peer.
    pub received_packets: u64,
    /// From the peer.
    pub received_bytes: u64,
}

impl Traffic {
    /// The sum of both.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            sent_packets: self.sent_packets.wrapping_add(other.sent_packets),
            sent_bytes: self.sent_bytes.wrapping_add(other.sent_bytes),
            received_packets: self.received_packets.wrapping_add(other.received_packets),
            received_bytes: self.received_bytes.wrapping_add(other.received_bytes),
        }
    }
}

impl Default for Peer {
    fn default() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
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
mod tests;
