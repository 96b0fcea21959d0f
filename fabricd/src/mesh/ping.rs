//! [`Pinger`]: pings by a socket of our own, where we may have one: a raw one with `CAP_NET_RAW`, else the kernel's ping
//! socket where `net.ipv4.ping_group_range` has our group. The packaged daemon has no such capability. What only a ping can
//! tell is little: a peer whose VTEP has another MAC address than its lease says answers UDP to the right address alone.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, bind, socket};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout_at};

/// A socket for pings.
#[derive(Debug)]
pub struct Pinger {
    // The calls of a UDP socket are those of any that sends whole packets.
    socket: UdpSocket,
    raw: bool,
    /// What its pings carry, and no others.
    pub id: u16,
}

impl Pinger {
    /// Pings from `at`.
    ///
    /// # Errors
    /// When we may not.
    pub fn open(at: IpAddr) -> io::Result<Self> {
        let (fd, raw) = match open(at, SockType::Raw) {
            Ok(fd) => (fd, true),
            Err(_) => (open(at, SockType::Datagram)?, false),
        };
        let socket = std::net::UdpSocket::from(fd);
        socket.set_nonblocking(true)?;
        // The kernel gives a ping socket its number, and writes it into what it sends.
        let id = if raw { fastrand::u16(..) } else { socket.local_addr()?.port() };
        Ok(Self { socket: UdpSocket::from_std(socket)?, raw, id })
    }

    /// Lets the kernel send a ping.
    ///
    /// # Errors
    /// When it won't.
    pub async fn send(&self, to: IpAddr, ping: &[u8]) -> io::Result<()> {
        self.socket.send_to(ping, SocketAddr::new(to, 0)).await.map(drop)
    }

    /// The numbers of the pings that are answered until `end`, or until all of `expected` are.
    pub async fn answered(&self, at: IpAddr, expected: &[u16], end: Instant) -> Vec<u16> {
        let (mut numbers, mut buffer) = (vec![], [0; 256]);
        while !expected.iter().all(|number| numbers.contains(number)) {
            match timeout_at(end, self.socket.recv(&mut buffer)).await {
                Err(_) => break,
                // An error is about a ping that could not be delivered.
                Ok(Err(_)) => {}
                Ok(Ok(length)) => numbers.extend(number(at, self.raw, &buffer[..length], self.id)),
            }
        }
        numbers
    }
}

pub(crate) fn open(at: IpAddr, kind: SockType) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    match at {
        IpAddr::V4(ip) => {
            let fd = socket(AddressFamily::Inet, kind, flags, SockProtocol::Icmp)?;
            bind(fd.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(ip, 0)))?;
            Ok(fd)
        }
        IpAddr::V6(ip) => {
            let fd = socket(AddressFamily::Inet6, kind, flags, SockProtocol::IcmpV6)?;
            bind(fd.as_raw_fd(), &SockaddrIn6::from(std::net::SocketAddrV6::new(ip, 0, 0, 0)))?;
            Ok(fd)
        }
    }
}

/// The number of the ping that this answers. A raw socket of IPv4 shows the IP header, the others don't.
fn number(at: IpAddr, raw: bool, packet: &[u8], id: u16) -> Option<u16> {
    let icmp = match at {
        IpAddr::V4(_) if raw => packet.get(usize::from(packet.first()? & 0xf) * 4..)?,
        _ => packet,
    };
    let answer = if at.is_ipv4() { 0 } else { 129 };
    let number = |at: usize| Some(u16::from_be_bytes(icmp.get(at..at + 2)?.try_into().ok()?));
    (*icmp.first()? == answer && number(4)? == id).then(|| number(6))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_our_own_ping_counts() {
        let v4: IpAddr = "192.0.2.1".parse().unwrap();
        let bare = |id: u16| [&[0, 0, 0, 0], &id.to_be_bytes()[..], &[0, 2]].concat();
        let answer = |id: u16| [&[0x45; 20], &bare(id)[..]].concat();
        assert_eq!(number(v4, true, &answer(7), 7), Some(2));
        assert_eq!(number(v4, false, &bare(7), 7), Some(2));
        assert_eq!(number(v4, true, &answer(8), 7), None);
        assert_eq!(number(v4, true, &[], 7), None);
        assert_eq!(number(v4, true, &[0x4f; 20], 7), None);
    }
}
