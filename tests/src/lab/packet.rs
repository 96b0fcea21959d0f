//! A captured frame, taken apart as far as a VXLAN packet goes: what is outside, and what is inside.
//!
//! ```text
//!  Ethernet │ IP │ UDP │ VXLAN: VNI │ Ethernet │ IP │ …          RFC 7348 section 5
//!  └──────── outer ───────────────┘ └──── inner ─────┘
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The UDP port of VXLAN on Linux, and fabricd's default.
pub const VXLAN_PORT: u16 = 8472;

/// IP protocol numbers.
const UDP: u8 = 17;
const TCP: u8 = 6;

/// One IP packet in its Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Who put it on this wire. Not a `MacAddr` of the model, which holds no broadcast.
    pub source_mac: [u8; 6],
    /// For whom.
    pub target_mac: [u8; 6],
    /// IP source address.
    pub source: IpAddr,
    /// IP destination address.
    pub target: IpAddr,
    /// IP protocol: 1 ICMP, 6 TCP, 17 UDP, 58 ICMPv6.
    pub protocol: u8,
    /// Source and destination port of TCP and UDP.
    pub ports: Option<(u16, u16)>,
    /// What a VXLAN packet carries.
    pub vxlan: Option<Vxlan>,
}

/// The inside of a VXLAN packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vxlan {
    /// Which overlay.
    pub vni: u32,
    /// The packet inside; none if it isn't IP (ARP, say).
    pub inner: Option<Box<Packet>>,
}

impl Packet {
    /// Takes a frame apart. Nothing if it isn't IP. UDP to `vxlan_port` is taken for VXLAN.
    #[must_use]
    pub fn parse(frame: &[u8], vxlan_port: u16) -> Option<Self> {
        let (target_mac, rest) = frame.split_first_chunk::<6>()?;
        let (source_mac, rest) = rest.split_first_chunk::<6>()?;
        let (ether_type, ip) = rest.split_first_chunk::<2>()?;
        let (source, target, protocol, payload) = match u16::from_be_bytes(*ether_type) {
            0x0800 => {
                let header = usize::from(ip.first()? & 0x0f) * 4;
                let (source, target) = (bytes::<4>(ip, 12)?, bytes::<4>(ip, 16)?);
                (Ipv4Addr::from(source).into(), Ipv4Addr::from(target).into(), *ip.get(9)?, ip.get(header..)?)
            }
            0x86dd => {
                let (source, target) = (bytes::<16>(ip, 8)?, bytes::<16>(ip, 24)?);
                (Ipv6Addr::from(source).into(), Ipv6Addr::from(target).into(), *ip.get(6)?, ip.get(40..)?)
            }
            _ => return None,
        };
        let ports = match protocol {
            TCP | UDP => Some((u16::from_be_bytes(bytes(payload, 0)?), u16::from_be_bytes(bytes(payload, 2)?))),
            _ => None,
        };
        let vxlan = match ports {
            Some((_, to)) if protocol == UDP && to == vxlan_port => Vxlan::parse(payload.get(8..)?, vxlan_port),
            _ => None,
        };
        Some(Self { source_mac: *source_mac, target_mac: *target_mac, source, target, protocol, ports, vxlan })
    }

    /// The packet inside, if this is VXLAN with one.
    #[must_use]
    pub fn inner(&self) -> Option<&Self> {
        self.vxlan.as_ref()?.inner.as_deref()
    }
}

impl Vxlan {
    fn parse(packet: &[u8], vxlan_port: u16) -> Option<Self> {
        let [flags, _, _, _, a, b, c, _] = bytes::<8>(packet, 0)?;
        let valid_vni = flags & 0x08 != 0;
        let inner = Packet::parse(packet.get(8..)?, vxlan_port).map(Box::new);
        valid_vni.then_some(Self { vni: u32::from_be_bytes([0, a, b, c]), inner })
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.protocol {
            1 => "ICMP".to_owned(),
            58 => "ICMPv6".to_owned(),
            TCP => "TCP".to_owned(),
            UDP => "UDP".to_owned(),
            other => format!("protocol {other}"),
        };
        match self.ports {
            Some((_, to)) => write!(f, "{} → {} {name} port {to}", self.source, self.target)?,
            None => write!(f, "{} → {} {name}", self.source, self.target)?,
        }
        match &self.vxlan {
            Some(Vxlan { vni, inner: Some(inner) }) => write!(f, ", VXLAN VNI {vni} [ {inner} ]"),
            Some(Vxlan { vni, inner: None }) => write!(f, ", VXLAN VNI {vni} [ not IP ]"),
            None => Ok(()),
        }
    }
}

fn bytes<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
    packet.get(at..)?.first_chunk().copied()
}
