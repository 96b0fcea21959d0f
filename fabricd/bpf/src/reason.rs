//! [`Program`] and [`Reason`]: which way a packet took, and why.

use std::fmt;

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Program {
    /// At the ingress of a pod's veth on the host: what the pod sends.
    PodOut = 0,
    /// At the ingress of an uplink: what peers send.
    WireIn = 1,
    /// At the egress of a pod's veth on the host: what comes to the pod by the kernel's path.
    PodIn = 2,
    /// At the egress of what leads to peers: what pods send by the kernel's path.
    WireOut = 3,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::PodOut, Self::WireIn, Self::PodIn, Self::WireOut];

    /// Its name in the object file and in the kernel.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PodOut => "fabric_pod_out",
            Self::WireIn => "fabric_wire_in",
            Self::PodIn => "fabric_pod_in",
            Self::WireOut => "fabric_wire_out",
        }
    }
}

/// Which way a program sent a packet, and why. What a program has no word on is none of the fabric's and isn't counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u32)]
pub enum Reason {
    /// Encapsulated for a peer, or decapsulated from one.
    FastTunnel = 0,
    /// Handed to our VXLAN device, which encapsulates it over IPv6.
    FastDevice = 1,
    /// To or from a peer on the same link, without encapsulation.
    FastDirect = 2,
    /// From one pod of this node to another.
    FastSameNode = 3,
    /// Neither IPv4 nor IPv6, or tagged for a VLAN.
    SlowNotIp = 4,
    /// Lengths that don't agree, or headers cut off.
    SlowTruncated = 5,
    /// Options of IPv4, extension headers of IPv6.
    SlowOptions = 6,
    /// A fragment.
    SlowFragment = 7,
    /// Neither TCP nor UDP.
    SlowProtocol = 8,
    /// Its time to live ends here.
    SlowTtl = 9,
    /// Larger than the MTU.
    SlowTooLarge = 10,
    /// A mark of congestion that the packet inside can't carry (RFC 6040 section 4.2).
    SlowCongestion = 11,
    /// Of a pod: not from its own address, MAC address and interface. From the wire: the outer source isn't the peer that
    /// the inner source belongs to.
    SlowSender = 12,
    /// The pod isn't allowed to be fast (yet).
    SlowPodOff = 13,
    /// Not for the MAC address that it should be for: the gateway's, the other pod's, the VXLAN device's.
    SlowMac = 14,
    /// Its destination is no pod that is known here.
    SlowNotAPod = 15,
    /// The pod's port has talked to something that is no pod: connection tracking may translate it.
    SlowNat = 16,
    /// The flow came in by the kernel's path, which may have translated it, and tracks it.
    SlowFlow = 17,
    /// From a pod to the VXLAN port, which only nodes may use.
    SlowTunnelPort = 18,
    /// No way to the peer that a program could take.
    SlowNoRoute = 19,
    /// To our port, but with another VNI or flags of VXLAN.
    SlowVni = 20,
    /// No outer UDP checksum over IPv6, where our VXLAN device takes none (RFC 6935).
    SlowChecksum = 21,
    /// The kernel refused to make room in it, or to hand it on; it is as it was.
    SlowRefused = 22,
    /// It came to a pod by the kernel's path from a pod, or left so for one of another node: its flow was noted, or its port.
    SlowRecorded = 23,
    /// The kernel had no memory for a header, after the packet was changed.
    DroppedRewrite = 24,
}

impl Reason {
    /// How many there may be before [`super::abi::LAYOUT`] changes for another cause than a new one.
    pub const ROOM: u32 = 32;

    /// All of them.
    pub const ALL: [Self; 25] = [
        Self::FastTunnel,
        Self::FastDevice,
        Self::FastDirect,
        Self::FastSameNode,
        Self::SlowNotIp,
        Self::SlowTruncated,
        Self::SlowOptions,
        Self::SlowFragment,
        Self::SlowProtocol,
        Self::SlowTtl,
        Self::SlowTooLarge,
        Self::SlowCongestion,
        Self::SlowSender,
        Self::SlowPodOff,
        Self::SlowMac,
        Self::SlowNotAPod,
        Self::SlowNat,
        Self::SlowFlow,
        Self::SlowTunnelPort,
        Self::SlowNoRoute,
        Self::SlowVni,
        Self::SlowChecksum,
        Self::SlowRefused,
        Self::SlowRecorded,
        Self::DroppedRewrite,
    ];

    /// Which path it means.
    #[must_use]
    pub const fn path(self) -> Path {
        match self {
            Self::FastTunnel | Self::FastDevice | Self::FastDirect | Self::FastSameNode => Path::Fast,
            Self::DroppedRewrite => Path::Dropped,
            _ => Path::Slow,
        }
    }

    /// One word, for metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::FastTunnel => "tunnel",
            Self::FastDevice => "device",
            Self::FastDirect => "direct",
            Self::FastSameNode => "same_node",
            Self::SlowNotIp => "not_ip",
            Self::SlowTruncated => "truncated",
            Self::SlowOptions => "options",
            Self::SlowFragment => "fragment",
            Self::SlowProtocol => "protocol",
            Self::SlowTtl => "ttl",
            Self::SlowTooLarge => "too_large",
            Self::SlowCongestion => "congestion",
            Self::SlowSender => "sender",
            Self::SlowPodOff => "pod_off",
            Self::SlowMac => "mac",
            Self::SlowNotAPod => "not_a_pod",
            Self::SlowNat => "nat",
            Self::SlowFlow => "flow",
            Self::SlowTunnelPort => "tunnel_port",
            Self::SlowNoRoute => "no_route",
            Self::SlowVni => "vni",
            Self::SlowChecksum => "checksum",
            Self::SlowRefused => "refused",
            Self::SlowRecorded => "recorded",
            Self::DroppedRewrite => "rewrite",
        }
    }
}

/// How a packet goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Path {
    /// By our programs.
    Fast,
    /// By the kernel: VXLAN device, routes, bridge, packet filter.
    Slow,
    /// Not at all.
    Dropped,
}

/// For people: why.
impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FastTunnel => "a TCP or UDP packet between pods of two nodes",
            Self::FastDevice => "a TCP or UDP packet between pods of two nodes, encapsulated by the VXLAN device",
            Self::FastDirect => "a TCP or UDP packet between pods of two nodes on one link",
            Self::FastSameNode => "a TCP or UDP packet between two pods of this node",
            Self::SlowNotIp => "neither IPv4 nor IPv6, or with a VLAN tag",
            Self::SlowTruncated => "its lengths don't agree",
            Self::SlowOptions => "it has IP options or extension headers",
            Self::SlowFragment => "it is a fragment",
            Self::SlowProtocol => "neither TCP nor UDP",
            Self::SlowTtl => "its time to live ends here",
            Self::SlowTooLarge => "it is larger than the MTU",
            Self::SlowCongestion => "it carries a mark of congestion that its sender doesn't understand",
            Self::SlowSender => "its source addresses are not its sender's",
            Self::SlowPodOff => "the pod is not on the fast path",
            Self::SlowMac => "its destination MAC address is another",
            Self::SlowNotAPod => "its destination is no pod known here",
            Self::SlowNat => {
                "the pod's port has talked to something that is no pod, so its connections may be translated"
            }
            Self::SlowFlow => "its flow came in by the kernel's path once, so it may be translated",
            Self::SlowTunnelPort => "it is for the VXLAN port",
            Self::SlowNoRoute => "no next hop to the peer is known",
            Self::SlowVni => "it has another VNI or other VXLAN flags",
            Self::SlowChecksum => "it has no outer UDP checksum",
            Self::SlowRefused => "the kernel refused to change it",
            Self::SlowRecorded => "it came from another pod by the kernel's path",
            Self::DroppedRewrite => "no memory for its new header",
        })
    }
}
