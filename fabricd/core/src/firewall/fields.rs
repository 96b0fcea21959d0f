//! What rules look at: the fields that they load, and the matches of iptables.

use super::bits::{Bits, Tristate, Unknown};
use super::packet::{Connection, Interface, Packet, Path, address};
use super::{End, Field, Hook, Test};
use crate::model::Family;

/// Bits of a connection's state, as nftables has them (`NF_CT_STATE_BIT`).
pub mod state {
    /// It belongs to no connection.
    pub const INVALID: u32 = 1;
    /// It belongs to a connection that was answered.
    pub const ESTABLISHED: u32 = 1 << 1;
    /// It belongs to a connection that another one announced.
    pub const RELATED: u32 = 1 << 2;
    /// It begins a connection.
    pub const NEW: u32 = 1 << 3;
    /// No connection is remembered for it.
    pub const UNTRACKED: u32 = 1 << 6;
}

/// Whether connection tracking knows the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tracking {
    NotYet,
    Tracked,
    Untracked,
    Maybe(Unknown),
}

/// What a packet carries along from chain to chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PacketMeta {
    pub(super) mark: Bits,
    pub(super) tracking: Tracking,
}

impl PacketMeta {
    /// This, or what a chain that changes `start` to `end` makes of it: what that chain changes is open.
    pub(super) fn or(self, start: &Self, end: &Self) -> Self {
        let why = || Unknown::Condition("the order of chains of the same priority".to_owned());
        Self {
            mark: if start.mark == end.mark { self.mark } else { Bits::open(4, why()) },
            tracking: if start.tracking == end.tracking { self.tracking } else { Tracking::Maybe(why()) },
        }
    }
}

/// `RTN_UNICAST`, `RTN_LOCAL`.
const UNICAST: u32 = 1;
const LOCAL: u32 = 2;
/// `ARPHRD_ETHER`.
const ETHERNET: u16 = 1;
/// `IFNAMSIZ`.
const NAME: usize = 16;
/// `IPS_EXPECTED`, `IPS_SEEN_REPLY`, `IPS_CONFIRMED`, `IPS_DST_NAT`: bits of `ct status` that are known.
const EXPECTED: u32 = 1;
const ANSWERED: u32 = 1 << 1;
const CONFIRMED: u32 = 1 << 3;
const DESTINATION_NAT: u32 = 1 << 5;

/// What a field holds at a hook; `None` when the packet has no such thing, which ends the rule.
pub(super) fn load(field: &Field, len: u8, packet: &Packet, hook: Hook, meta: &PacketMeta) -> Option<Bits> {
    let len = usize::from(len);
    let [input, output] = packet.interfaces(hook);
    let number = |number: u32| Bits::known(number.to_ne_bytes());
    let unknown = |words: &str| Some(Bits::open(len, Unknown::Condition(words.to_owned())));
    match field {
        Field::Network { offset } => {
            let (header, offset) = (packet.network_header(), usize::try_from(*offset).ok()?);
            match offset + len <= header.len() {
                true => Some(header.part(offset, len)),
                false => unknown("a field behind the IP header"),
            }
        }
        Field::Transport { offset } => {
            let (bytes, offset) = (packet.transport(), usize::try_from(*offset).ok()?);
            match offset + len <= bytes.len() {
                true => Some(bytes.part(offset, len)),
                false => unknown("a field behind the IP header"),
            }
        }
        Field::ExtensionHeader { presence: true, .. } => Some(Bits::known([0])),
        Field::ExtensionHeader { presence: false, .. } => None,
        Field::EtherType => Some(Bits::known(match packet.family() {
            Family::V4 => [0x08, 0x00],
            Family::V6 => [0x86, 0xdd],
        })),
        Field::NetworkFamily => Some(Bits::known([match packet.family() {
            Family::V4 => 2,
            Family::V6 => 10,
        }])),
        Field::Protocol => Some(Bits::known([packet.protocol()])),
        Field::Mark => Some(meta.mark.clone()),
        Field::InIndex => index(input, "iif"),
        Field::OutIndex => index(output, "oif"),
        Field::InName => Some(Bits::known(name(input))),
        Field::OutName => Some(Bits::known(name(output))),
        // Newer kernels have the type of `skb->dev`, which is that of the output by now.
        Field::InType if matches!(hook, Hook::Output | Hook::Postrouting) => unknown("iiftype"),
        Field::InType => kind_number(input?, "iiftype"),
        Field::OutType => kind_number(output?, "oiftype"),
        Field::InKind => kind_name(input?, "iifkind"),
        Field::OutKind => kind_name(output?, "oifkind"),
        // PACKET_HOST, on the way out too.
        Field::PacketType => Some(Bits::known([0])),
        Field::SocketOwner if packet.path == Path::Forwarded => None,
        Field::SocketOwner => unknown("meta skuid"),
        Field::ConnectionState => Some(match state_bits(packet, &meta.tracking) {
            Ok(bits) => number(bits),
            Err(why) => Bits::open(4, why),
        }),
        Field::ConnectionDirection | Field::ConnectionStatus | Field::ConnectionMark | Field::ConnectionHelper => {
            match &meta.tracking {
                Tracking::Tracked => connection(field, packet),
                Tracking::Maybe(why) => Some(Bits::open(len, why.clone())),
                Tracking::NotYet | Tracking::Untracked => None,
            }
        }
        Field::AddressType { source } => Some(number(address_type(packet, *source))),
        Field::ReversePath { presence, name: by_name } => {
            let Some(there) = packet.reverse_path else { return unknown("fib saddr . iif oif") };
            match (presence, by_name) {
                (true, _) => Some(Bits::known([u8::from(there)])),
                (false, _) if !there => Some(Bits::known(vec![0; len])),
                (false, true) => Some(Bits::known(name(input))),
                (false, false) => index(input, "fib saddr . iif oif"),
            }
        }
        Field::Other(words) => unknown(words),
    }
}

/// The bits of the connection's state.
fn state_bits(packet: &Packet, tracking: &Tracking) -> Result<u32, Unknown> {
    match (tracking, packet.connection) {
        (Tracking::NotYet, _) => Ok(state::INVALID),
        (Tracking::Untracked, _) => Ok(state::UNTRACKED),
        (Tracking::Maybe(why), _) => Err(why.clone()),
        (Tracking::Tracked, Connection::New | Connection::Untracked) => Ok(state::NEW),
        (Tracking::Tracked, Connection::Established) => Ok(state::ESTABLISHED),
        (Tracking::Tracked, Connection::Open) => Err(Unknown::State),
    }
}

fn connection(field: &Field, packet: &Packet) -> Option<Bits> {
    let known = |value: u32, bits: u32, words: &str| {
        Some(Bits::partly(value.to_ne_bytes(), bits.to_ne_bytes(), Unknown::Condition(words.to_owned())))
    };
    let is_new = match packet.connection {
        Connection::Open => return Some(Bits::open(4, Unknown::State)),
        Connection::Established => false,
        Connection::New | Connection::Untracked => true,
    };
    match field {
        Field::ConnectionDirection if is_new => Some(Bits::known([0])),
        Field::ConnectionDirection => Some(Bits::open(1, Unknown::Condition("ct direction".to_owned()))),
        Field::ConnectionStatus if is_new => {
            known(0, EXPECTED | ANSWERED | CONFIRMED | DESTINATION_NAT, "a bit of ct status")
        }
        Field::ConnectionStatus => {
            let bits = EXPECTED | ANSWERED | CONFIRMED | DESTINATION_NAT;
            known(ANSWERED | CONFIRMED, bits, "a bit of ct status")
        }
        Field::ConnectionMark if is_new => Some(Bits::known([0; 4])),
        Field::ConnectionMark => known(0, 0, "ct mark"),
        // Nobody helps VXLAN, nor what pods are evaluated by.
        _ => None,
    }
}

fn index(interface: Option<&Interface>, words: &str) -> Option<Bits> {
    Some(match interface {
        None => Bits::known([0; 4]),
        Some(Interface { index: Some(index), .. }) => Bits::known(index.to_ne_bytes()),
        Some(_) => Bits::open(4, Unknown::Condition(words.to_owned())),
    })
}

fn name(interface: Option<&Interface>) -> [u8; NAME] {
    let mut bytes = [0; NAME];
    if let Some(interface) = interface {
        let name = interface.name.as_str().as_bytes();
        bytes[..name.len()].copy_from_slice(name);
    }
    bytes
}

fn kind_number(interface: &Interface, words: &str) -> Option<Bits> {
    Some(match interface.kind {
        Some(_) => Bits::known(ETHERNET.to_ne_bytes()),
        None => Bits::open(2, Unknown::Condition(words.to_owned())),
    })
}

fn kind_name(interface: &Interface, words: &str) -> Option<Bits> {
    Some(match interface.kind {
        Some(kind) => {
            let mut bytes = [0; NAME];
            bytes[..kind.len()].copy_from_slice(kind.as_bytes());
            Bits::known(bytes)
        }
        None => Bits::open(NAME, Unknown::Condition(words.to_owned())),
    })
}

fn address_type(packet: &Packet, source: bool) -> u32 {
    match (packet.path, source) {
        (Path::Received, false) | (Path::Sent, true) => LOCAL,
        _ => UNICAST,
    }
}

/// Whether a match of iptables holds at a hook.
pub(super) fn holds(test: &Test, packet: &Packet, hook: Hook, meta: &PacketMeta) -> Tristate {
    let end_of = |end: &End| match end {
        End::Source => address(packet.source),
        End::Target => address(packet.target),
    };
    match test {
        Test::Address { end, address, mask } => end_of(end).masked(mask, address),
        Test::AddressRange { end, low, high } => end_of(end).within(low, high),
        Test::Interface { end, name: wanted, mask } => {
            let [input, output] = packet.interfaces(hook);
            Bits::known(name(if *end == End::Source { input } else { output })).masked(mask, wanted)
        }
        // `-p all`
        Test::Protocol(0) => Tristate::Yes,
        Test::Protocol(number) => Tristate::from(packet.protocol() == *number),
        Test::Fragment => Tristate::No,
        Test::Ports { end, ranges } => match packet.ports() {
            None => Tristate::No,
            Some([source, target]) => in_ranges(if *end == End::Source { &source } else { &target }, ranges),
        },
        Test::AnyPort(ranges) => match packet.ports() {
            None => Tristate::No,
            Some([source, target]) => in_ranges(&source, ranges).or(|| in_ranges(&target, ranges)),
        },
        Test::State { states, translated } => match state_bits(packet, &meta.tracking) {
            Ok(bits) if bits & states != 0 => Tristate::Yes,
            // Packets of ours have no translated destination; whether a reply's is that of a masqueraded pod is open.
            Ok(_) if *translated && packet.connection == Connection::Established => {
                Tristate::Maybe(Unknown::Condition("a translated connection".to_owned()))
            }
            Ok(_) => Tristate::No,
            Err(why) => Tristate::Maybe(why),
        },
        Test::Mark { mark, mask } => meta.mark.masked(&mask.to_ne_bytes(), &mark.to_ne_bytes()),
        Test::AddressType { end, types } => {
            Tristate::from(types & (1 << address_type(packet, *end == End::Source)) != 0)
        }
        Test::PacketType(kind) => Tristate::from(*kind == 0),
        Test::ReversePath => match packet.reverse_path {
            Some(there) => Tristate::from(there),
            None => Tristate::Maybe(Unknown::Condition("rpfilter".to_owned())),
        },
        Test::Always => Tristate::Yes,
    }
}

fn in_ranges(port: &Bits, ranges: &[(u16, u16)]) -> Tristate {
    let within = |(low, high): &(u16, u16)| port.within(&low.to_be_bytes(), &high.to_be_bytes());
    ranges.iter().fold(Tristate::No, |found, range| found.or(|| within(range)))
}
