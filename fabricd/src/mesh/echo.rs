//! Pings that go around parts of our own kernel, which tell whose entries are stale.
//!
//! | ping | route, neighbour, FDB | destination MAC address |
//! |---|---|---|
//! | by the kernel | our kernel's | our kernel's |
//! | wrapped | not used: wrapped here, and sent to the peer's underlay address | the published one |
//! | broadcast | the same | everybody's |
//!
//! If the wrapped one is answered and the kernel's isn't, our kernel sends astray. If only the broadcast is answered, the
//! peer's VTEP has another address than it has published.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::Instant;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, bind, recv, sendto, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

use super::{PATIENCE, Target};

/// Which pings were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Echoes {
    /// The one that the kernel sent.
    pub kernel: bool,
    /// The one with the published MAC address.
    pub wrapped: bool,
    /// The one to every MAC address.
    pub broadcast: bool,
}

/// The three pings, by their sequence numbers.
const KERNEL: u16 = 1;
const WRAPPED: u16 = 2;
const BROADCAST: u16 = 3;

/// Sends all three and waits for the answers, on a thread that may wait.
///
/// # Errors
/// When this process may not open a raw socket (`CAP_NET_RAW`).
pub async fn echoes(to: &Target) -> io::Result<Echoes> {
    let to = to.clone();
    tokio::task::spawn_blocking(move || exchange(&to)).await.map_err(io::Error::other)?
}

fn exchange(to: &Target) -> io::Result<Echoes> {
    let (from, id) = (to.ours.overlay, fastrand::u16(..));
    let answers = raw(from)?;
    // A ping that can't be sent is one that isn't answered.
    let _ = send_raw(&answers, to.overlay, &ping(from, to.overlay, id, KERNEL));
    let everybody = if from.is_ipv4() { [0xff; 6] } else { [0x33, 0x33, 0, 0, 0, 1] };
    let tunnel = UdpSocket::bind(SocketAddr::new(to.ours.local, 0))?;
    for (number, mac) in [(WRAPPED, to.mac.octets()), (BROADCAST, everybody)] {
        let frame = wrap(to, mac, &ping(from, to.overlay, id, number));
        let _ = tunnel.send_to(&frame, SocketAddr::new(to.public_ip, to.ours.port));
    }
    let mut seen = Echoes::default();
    let end = Instant::now() + PATIENCE;
    while seen != (Echoes { kernel: true, wrapped: true, broadcast: true }) {
        let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| left.as_millis() > 0) else { break };
        setsockopt(
            &answers,
            sockopt::ReceiveTimeout,
            &TimeVal::milliseconds(left.as_millis().try_into().unwrap_or(1)),
        )?;
        let mut buffer = [0; 256];
        let Ok(length) = recv(answers.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
        match answered(from, &buffer[..length], id) {
            Some(KERNEL) => seen.kernel = true,
            Some(WRAPPED) => seen.wrapped = true,
            Some(BROADCAST) => seen.broadcast = true,
            _ => {}
        }
    }
    Ok(seen)
}

/// A raw socket of ICMP at our address.
fn raw(at: IpAddr) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    match at {
        IpAddr::V4(ip) => {
            let fd = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Icmp)?;
            bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0)))?;
            Ok(fd)
        }
        IpAddr::V6(ip) => {
            let fd = socket(AddressFamily::Inet6, SockType::Raw, flags, SockProtocol::IcmpV6)?;
            bind(fd.as_raw_fd(), &SockaddrIn6::from(std::net::SocketAddrV6::new(ip, 0, 0, 0)))?;
            Ok(fd)
        }
    }
}

fn send_raw(socket: &OwnedFd, to: IpAddr, packet: &[u8]) -> io::Result<usize> {
    let (fd, flags) = (socket.as_raw_fd(), MsgFlags::MSG_DONTWAIT);
    Ok(match to {
        IpAddr::V4(ip) => sendto(fd, packet, &SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0)), flags)?,
        IpAddr::V6(ip) => sendto(fd, packet, &SockaddrIn6::from(std::net::SocketAddrV6::new(ip, 0, 0, 0)), flags)?,
    })
}

/// The number of the ping that this answers. Raw sockets of IPv4 show the IP header, those of IPv6 don't.
fn answered(at: IpAddr, packet: &[u8], id: u16) -> Option<u16> {
    let (icmp, answer) = match at {
        IpAddr::V4(_) => (packet.get(usize::from(packet.first()? & 0xf) * 4..)?, 0),
        IpAddr::V6(_) => (packet, 129),
    };
    let number = |at: usize| Some(u16::from_be_bytes(icmp.get(at..at + 2)?.try_into().ok()?));
    (*icmp.first()? == answer && number(4)? == id).then(|| number(6))?
}

/// An echo request (RFC 792, RFC 4443).
fn ping(from: IpAddr, to: IpAddr, id: u16, number: u16) -> Vec<u8> {
    let mut packet = vec![if from.is_ipv4() { 8 } else { 128 }, 0, 0, 0];
    packet.extend(id.to_be_bytes());
    packet.extend(number.to_be_bytes());
    packet.extend(b"fabricd?");
    let sum = match (from, to) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            // The pseudo-header of RFC 8200: addresses, length, next header.
            let length = u32::try_from(packet.len()).expect("16 bytes").to_be_bytes();
            checksum(&[&from.octets()[..], &to.octets(), &length, &[0, 0, 0, 58], &packet].concat())
        }
        _ => checksum(&packet),
    };
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// A packet of ICMP, in IP, in Ethernet, in VXLAN (RFC 7348 section 5).
fn wrap(to: &Target, mac: [u8; 6], icmp: &[u8]) -> Vec<u8> {
    let vni = to.ours.vni.get().to_be_bytes();
    let mut frame = vec![0x08, 0, 0, 0, vni[1], vni[2], vni[3], 0];
    frame.extend(mac);
    frame.extend(to.ours.mac.octets());
    match (to.ours.overlay, to.overlay) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend([0x08, 0x00]);
            frame.extend(header_v4(from, to, icmp.len()));
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            frame.extend([0x86, 0xdd]);
            frame.extend(header_v6(from, to, icmp.len()));
        }
        _ => unreachable!("a target and our side are of one family"),
    }
    frame.extend(icmp);
    frame
}

fn header_v4(from: Ipv4Addr, to: Ipv4Addr, length: usize) -> Vec<u8> {
    let total = u16::try_from(20 + length).expect("a ping is small").to_be_bytes();
    // Version and length, TOS, total length, id, don't fragment, 64 hops, ICMP.
    let mut header = vec![0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 1, 0, 0];
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn header_v6(from: Ipv6Addr, to: Ipv6Addr, length: usize) -> Vec<u8> {
    let length = u16::try_from(length).expect("a ping is small").to_be_bytes();
    let mut header = vec![0x60, 0, 0, 0, length[0], length[1], 58, 64];
    header.extend(from.octets());
    header.extend(to.octets());
    header
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
        assert_eq!(checksum(&header_v4(from, to, 16)), 0);
        assert_eq!(checksum(&ping(from.into(), to.into(), 7, 1)), 0);
        // RFC 1071, section 3.
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }

    #[test]
    fn only_the_answer_to_our_own_ping_counts() {
        let v4: IpAddr = "192.0.2.1".parse().unwrap();
        let answer = |id: u16| {
            [
                &header_v4("192.0.2.2".parse().unwrap(), "192.0.2.1".parse().unwrap(), 8)[..],
                &[0, 0, 0, 0],
                &id.to_be_bytes(),
                &[0, 2],
            ]
            .concat()
        };
        assert_eq!(answered(v4, &answer(7), 7), Some(2));
        assert_eq!(answered(v4, &answer(8), 7), None);
        assert_eq!(answered(v4, &[], 7), None);
        assert_eq!(answered(v4, &[0x4f; 20], 7), None);
    }
}
