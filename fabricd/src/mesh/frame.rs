//! Packets as bytes: pings and UDP, in IP, in Ethernet, in VXLAN. What is encapsulated here is sent to the peer's underlay
//! address as ordinary UDP, past our kernel's route, neighbour and FDB entry, and takes no capability.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Target;

const ICMP: u8 = 1;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// The header of VXLAN with no network that anybody has: the port is tried with it, and no filter of ours minds it.
pub const NOBODYS: [u8; 8] = [0x08, 0, 0, 0, 0, 0, 0, 0];

/// An echo request (RFC 792, RFC 4443), or its reply.
#[must_use]
pub fn ping(from: IpAddr, to: IpAddr, id: u16, number: u16) -> Vec<u8> {
    let mut packet = vec![if from.is_ipv4() { 8 } else { 128 }, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.extend(b"fabricd?");
    let sum = match from {
        IpAddr::V4(_) => checksum(&packet),
        IpAddr::V6(_) => checksum(&[pseudo(from, to, packet.len(), ICMPV6), packet.clone()].concat()),
    };
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// A UDP packet (RFC 768), with its checksum.
#[must_use]
pub fn udp((from, from_port): (IpAddr, u16), (to, to_port): (IpAddr, u16), payload: &[u8]) -> Vec<u8> {
    let length = 8 + payload.len();
    let mut packet = [from_port.to_be_bytes(), to_port.to_be_bytes()].concat();
    packet.extend(u16::try_from(length).expect("a small packet").to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    // Zero would say that there is none.
    let sum = match checksum(&[pseudo(from, to, length, UDP), packet.clone()].concat()) {
        0 => u16::MAX,
        sum => sum,
    };
    packet[6..8].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// A packet from our VTEP to the peer's, with the Ethernet destination `mac`, encapsulated (RFC 7348 section 5).
#[must_use]
pub fn encapsulate(to: &Target, mac: [u8; 6], protocol: Inner, inner: &[u8]) -> Vec<u8> {
    let vni = to.ours.vni.get().to_be_bytes();
    let mut frame = vec![0x08, 0, 0, 0, vni[1], vni[2], vni[3], 0];
    frame.extend(mac);
    frame.extend(to.ours.mac.octets());
    match (to.ours.overlay, to.overlay) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let protocol = if protocol == Inner::Udp { UDP } else { ICMP };
            frame.extend([0x08, 0x00]);
            frame.extend(header_v4(from, to, protocol, inner.len()));
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let protocol = if protocol == Inner::Udp { UDP } else { ICMPV6 };
            frame.extend([0x86, 0xdd]);
            frame.extend(header_v6(from, to, protocol, inner.len()));
        }
        _ => unreachable!("a target and our side are of one family"),
    }
    frame.extend(inner);
    frame
}

/// What is encapsulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inner {
    /// What [`ping`] made.
    Icmp,
    /// What [`udp`] made.
    Udp,
}

fn header_v4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, length: usize) -> Vec<u8> {
    let total = u16::try_from(20 + length).expect("a small packet").to_be_bytes();
    // Version and length, TOS, total length, id, don't fragment, 64 hops.
    let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, protocol, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn header_v6(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, length: usize) -> Vec<u8> {
    let length = u16::try_from(length).expect("a small packet").to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], protocol, 64];
    header.extend(from.octets());
    header.extend(to.octets());
    header
}

/// What else is summed up: addresses, length, protocol (RFC 768; RFC 8200 section 8.1).
fn pseudo(from: IpAddr, to: IpAddr, length: usize, protocol: u8) -> Vec<u8> {
    let length = u16::try_from(length).expect("a small packet").to_be_bytes();
    match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            [&from.octets()[..], &to.octets(), &[0, 0, length[0], length[1], 0, 0, 0, protocol]].concat()
        }
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            [&from.octets()[..], &to.octets(), &[0, protocol, length[0], length[1]]].concat()
        }
        _ => unreachable!("both ends are of one family"),
    }
}

/// The checksum of the internet (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded twice")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_have_checksums_that_add_up() {
        let (from, to) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        assert_eq!(checksum(&header_v4(from, to, ICMP, 16)), 0);
        assert_eq!(checksum(&ping(from.into(), to.into(), 7, 1)), 0);
        // RFC 1071, section 3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        for [from, to] in [["192.0.2.1", "192.0.2.2"], ["2001:db8::1", "2001:db8::2"]] {
            let (from, to): (IpAddr, IpAddr) = (from.parse().unwrap(), to.parse().unwrap());
            let packet = udp((from, 1000), (to, 9474), b"odd");
            assert_eq!(checksum(&[pseudo(from, to, packet.len(), UDP), packet].concat()), 0, "{from}");
        }
    }
}
