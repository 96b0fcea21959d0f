//! A packet that is evaluated. Addresses may be prefixes: then all packets of the prefix are evaluated at once.

use super::Hook;
use super::bits::{Bits, Unknown};
use crate::model::{Family, IfName, Subnet, Vni};
use crate::subnet::to_bits;

/// A kind of packets of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Flow {
    /// Encapsulated, from peers.
    Received,
    /// Encapsulated, to peers.
    Sent,
    /// Between a pod of this node and one of another.
    Pods,
    /// Between a pod of this node and the world beyond the network.
    Outside,
}

/// A packet, as it meets the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Where it comes from; a prefix stands for each address in it.
    pub source: Subnet,
    /// Where it goes to, of the same family.
    pub target: Subnet,
    /// What is in it.
    pub content: Content,
    /// Which hooks it passes.
    pub path: Path,
    /// Where it comes in; none for what this host sends. What it has encapsulated comes from the VXLAN device: the
    /// postrouting hook sees that (since Linux 5.7).
    pub input: Option<Interface>,
    /// Where it goes out; none for what is for this host.
    pub output: Option<Interface>,
    /// What connection tracking says of it.
    pub connection: Connection,
    /// Whether its source is reached by the interface that it came in by; `None` where that isn't known.
    pub reverse_path: Option<bool>,
}

/// The transport header and what is behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// VXLAN in UDP. The source port is any.
    Vxlan {
        /// Destination port.
        port: u16,
        /// VXLAN network identifier.
        vni: Vni,
    },
    /// UDP.
    Udp {
        /// Source port.
        from: u16,
        /// Destination port.
        to: u16,
    },
    /// TCP: the first packet of a connection, or another, as [`Packet::connection`] says.
    Tcp {
        /// Source port.
        from: u16,
        /// Destination port.
        to: u16,
    },
    /// TCP with any ports and flags.
    AnyTcp,
    /// UDP with any ports.
    AnyUdp,
    /// An echo request, or its reply.
    Icmp {
        /// Whether it is the reply.
        reply: bool,
    },
}

/// Which hooks a packet passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// To this host.
    Received,
    /// Through it.
    Forwarded,
    /// From it.
    Sent,
}

/// An interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: IfName,
    /// Its index, where known.
    pub index: Option<u32>,
    /// What kind it is (`bridge`, `vxlan`), where known. Such are of the type Ethernet.
    pub kind: Option<&'static str>,
}

/// What connection tracking says of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connection {
    /// The first of its connection.
    New,
    /// It belongs to a connection that has been answered.
    Established,
    /// Rules of ours keep it out of connection tracking.
    Untracked,
    /// Any of these: to see whether it matters.
    Open,
}

impl Path {
    /// The hooks, in their order.
    #[must_use]
    pub fn hooks(self) -> &'static [Hook] {
        match self {
            Self::Received => &[Hook::Prerouting, Hook::Input],
            Self::Forwarded => &[Hook::Prerouting, Hook::Forward, Hook::Postrouting],
            Self::Sent => &[Hook::Output, Hook::Postrouting],
        }
    }
}

/// `SYN`; `ACK`.
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Bytes behind the IP header that are looked at.
const TRANSPORT: usize = 64;

impl Packet {
    /// The address family.
    #[must_use]
    pub fn family(&self) -> Family {
        self.source.family()
    }

    /// The interfaces that rules of a hook see, in and out (`struct nf_hook_state`). Before routing the packet has no
    /// output interface yet, and what this host sends has no input interface in the output hook.
    pub(super) fn interfaces(&self, hook: Hook) -> [Option<&Interface>; 2] {
        let (input, output) = (self.input.as_ref(), self.output.as_ref());
        match hook {
            Hook::Prerouting | Hook::Input => [input, None],
            Hook::Output => [None, output],
            Hook::Forward | Hook::Postrouting => [input, output],
        }
    }

    /// The number of the protocol behind the IP header.
    #[must_use]
    pub fn protocol(&self) -> u8 {
        match (self.content, self.family()) {
            (Content::Vxlan { .. } | Content::Udp { .. } | Content::AnyUdp, _) => 17,
            (Content::Tcp { .. } | Content::AnyTcp, _) => 6,
            (Content::Icmp { .. }, Family::V4) => 1,
            (Content::Icmp { .. }, Family::V6) => 58,
        }
    }

    /// The IP header (RFC 791 section 3.1, RFC 8200 section 3), without options or extensions. Open are lengths, hop
    /// limit, traffic class and the like.
    pub(super) fn network_header(&self) -> Bits {
        let other = || Unknown::Condition("a field of the IP header".to_owned());
        let mut header = match self.family() {
            Family::V4 => {
                let mut header = Bits::open(20, other());
                header.put(0, &Bits::known([0x45]));
                // No offset, and no more fragments; whether it may be cut is open.
                header.put(6, &Bits::partly([0, 0], [0xbf, 0xff], other()));
                header.put(9, &Bits::known([self.protocol()]));
                header
            }
            Family::V6 => {
                let mut header = Bits::open(40, other());
                header.put(0, &Bits::partly([0x60], [0xf0], other()));
                header.put(6, &Bits::known([self.protocol()]));
                header
            }
        };
        let (source, target) = match self.family() {
            Family::V4 => (12, 16),
            Family::V6 => (8, 24),
        };
        header.put(source, &address(self.source));
        header.put(target, &address(self.target));
        header
    }

    /// The transport header and what follows, as far as it is the same for all such packets.
    pub(super) fn transport(&self) -> Bits {
        let mut bytes = Bits::open(TRANSPORT, Unknown::Condition("a field behind the IP header".to_owned()));
        let mut number = |at, port: u16| bytes.put(at, &Bits::known(port.to_be_bytes()));
        match self.content {
            Content::Vxlan { port, vni } => {
                number(2, port);
                // The flag that there is a VNI, and the VNI (RFC 7348 section 5).
                bytes.put(8, &Bits::known([0x08, 0, 0, 0]));
                bytes.put(12, &Bits::known((vni.get() << 8).to_be_bytes()));
            }
            Content::Udp { from, to } => {
                number(0, from);
                number(2, to);
            }
            Content::Tcp { from, to } => {
                number(0, from);
                number(2, to);
                let flags = if self.connection == Connection::Established { ACK } else { SYN };
                bytes.put(13, &Bits::known([flags]));
            }
            Content::AnyTcp | Content::AnyUdp => {}
            Content::Icmp { reply } => {
                let kind = match (self.family(), reply) {
                    (Family::V4, false) => 8,
                    (Family::V4, true) => 0,
                    (Family::V6, false) => 128,
                    (Family::V6, true) => 129,
                };
                bytes.put(0, &Bits::known([kind, 0]));
            }
        }
        bytes
    }

    /// Source and destination port, as bytes; none for a packet without.
    pub(super) fn ports(&self) -> Option<[Bits; 2]> {
        match self.content {
            Content::Icmp { .. } => None,
            _ => Some([self.transport().part(0, 2), self.transport().part(2, 2)]),
        }
    }
}

/// An address as bytes; of a prefix what is behind it is open.
pub(super) fn address(net: Subnet) -> Bits {
    let skip = 16 - usize::from(net.family().bits() / 8);
    let bytes = |bits: u128| bits.to_be_bytes()[skip..].to_vec();
    let open = u32::from(net.family().bits() - net.prefix_len());
    let host = 1_u128.checked_shl(open).map_or(u128::MAX, |size| size - 1);
    match net.prefix_len() == net.family().bits() {
        true => Bits::known(bytes(to_bits(net.base()))),
        false => Bits::partly(bytes(to_bits(net.base())), bytes(!host), Unknown::Address),
    }
}
