//! One probe, and the answers to those of others.
//!
//! A probe is a UDP packet from a socket of its own, connected to the peer: so an answer comes by it alone, and so does
//! the word of the peer's kernel that nobody listens there (`ECONNREFUSED`).
//!
//! ```text
//! 0      4        5     6      7 8            16
//! | FABM | version | kind | flags | | number      | zeros, up to the size |
//! ```

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fabric_core::model::Family;
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

use super::{PATIENCE, PORT};

const MAGIC: &[u8; 4] = b"FABM";
const VERSION: u8 = 1;
const QUESTION: u8 = 0;
const ANSWER: u8 = 1;
/// The sender's packet filter throws packets of other nodes away.
const DROPPING: u8 = 1;
/// Bytes of the smallest probe.
const SMALL: usize = 32;

/// How a packet is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As small as it may be.
    Small,
    /// Small, and without a checksum of UDP.
    Unsummed,
    /// So many bytes, IP header included.
    Packet(u32),
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The peer's daemon answered.
    Daemon(Duration),
    /// The peer's kernel answered that nobody listens.
    Kernel(Duration),
    /// Nothing did.
    Nothing,
}

impl Answer {
    /// The time there and back, if anything came.
    #[must_use]
    pub fn rtt(self) -> Option<Duration> {
        match self {
            Self::Daemon(rtt) | Self::Kernel(rtt) => Some(rtt),
            Self::Nothing => None,
        }
    }
}

/// Sends one packet from `from` to the prober of `to`, and waits for what comes back.
pub async fn ask(from: IpAddr, to: IpAddr, size: Size) -> Answer {
    send(from, to, size).await.unwrap_or(Answer::Nothing)
}

async fn send(from: IpAddr, to: IpAddr, size: Size) -> io::Result<Answer> {
    let socket = bind(SocketAddr::new(from, 0))?;
    if size == Size::Unsummed {
        set(&socket, unsummed(from))?;
    }
    socket.connect(SocketAddr::new(to, PORT)).await?;
    let number = fastrand::u64(..);
    let bytes = match size {
        Size::Small | Size::Unsummed => SMALL,
        Size::Packet(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(headers(from)).max(SMALL),
    };
    let question = packet(QUESTION, 0, number, bytes.min(usize::from(u16::MAX)));
    let begin = Instant::now();
    socket.send(&question).await?;
    let mut buffer = [0; 64];
    let answer = timeout(PATIENCE, async {
        loop {
            match socket.recv(&mut buffer).await {
                Ok(length) if parse(&buffer[..length]).is_some_and(|p| (p.kind, p.number) == (ANSWER, number)) => {
                    return Answer::Daemon(begin.elapsed());
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Answer::Kernel(begin.elapsed());
                }
                // Such as a router's word that the packet was too large.
                Err(_) => return Answer::Nothing,
            }
        }
    });
    Ok(answer.await.unwrap_or(Answer::Nothing))
}

/// Whether anything lives at an address of the underlay: nobody listens at this port there, and its kernel says so.
pub async fn is_alive(from: IpAddr, to: IpAddr) -> bool {
    send(from, to, Size::Small).await.is_ok_and(|answer| answer.rtt().is_some())
}

/// When we heard of whom. Only those that are here are answered.
#[derive(Debug, Default)]
pub struct Heard(Mutex<HashMap<IpAddr, Option<(Instant, bool)>>>);

impl Heard {
    /// Listens to these from now on.
    pub fn mind(&self, peers: impl IntoIterator<Item = IpAddr>) {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *heard = peers.into_iter().map(|peer| (peer, heard.get(&peer).copied().flatten())).collect();
    }

    /// How long ago a peer's probe came, and whether it said that its filter throws packets away.
    pub fn last(&self, peer: IpAddr) -> Option<(Duration, bool)> {
        let heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get(&peer).copied().flatten().map(|(at, dropping)| (at.elapsed(), dropping))
    }

    fn hear(&self, peer: IpAddr, dropping: bool) -> bool {
        let mut heard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        heard.get_mut(&peer).map(|last| *last = Some((Instant::now(), dropping))).is_some()
    }
}

/// Answers the probes of peers at our address, until that breaks.
///
/// # Errors
/// When the address is not there (yet).
pub async fn answer(at: IpAddr, heard: &Heard) -> io::Result<()> {
    let socket = bind(SocketAddr::new(at, PORT))?;
    if Family::of(at) == Family::V6 {
        // UDP_NO_CHECK6_RX: in IPv6 a packet without a checksum is refused otherwise.
        set(&socket, (libc::SOL_UDP, 102, 1))?;
    }
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        // An error here is about an earlier answer.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let Some(question) = parse(&buffer[..length]).filter(|packet| packet.kind == QUESTION) else { continue };
        if heard.hear(from.ip(), question.flags & DROPPING != 0) {
            // As large as the question, never larger. What can't be sent is lost, as the asker will see.
            let _ = socket.send_to(&packet(ANSWER, 0, question.number, length), from).await;
        }
    }
}

/// Tells a peer that our filter throws packets away, so that it knows why it gets no answers.
///
/// # Errors
/// When it can't be sent.
pub async fn complain(from: IpAddr, to: IpAddr) -> io::Result<()> {
    let socket = bind(SocketAddr::new(from, 0))?;
    socket.send_to(&packet(QUESTION, DROPPING, 0, SMALL), SocketAddr::new(to, PORT)).await.map(drop)
}

struct Packet {
    kind: u8,
    flags: u8,
    number: u64,
}

fn packet(kind: u8, flags: u8, number: u64, bytes: usize) -> Vec<u8> {
    let mut packet = vec![0; bytes];
    packet[..4].copy_from_slice(MAGIC);
    packet[4..7].copy_from_slice(&[VERSION, kind, flags]);
    packet[8..16].copy_from_slice(&number.to_be_bytes());
    packet
}

fn parse(bytes: &[u8]) -> Option<Packet> {
    match bytes {
        [b'F', b'A', b'B', b'M', VERSION, kind, flags, _, rest @ ..] if bytes.len() >= SMALL => {
            let number = u64::from_be_bytes(rest.get(..8)?.try_into().ok()?);
            Some(Packet { kind: *kind, flags: *flags, number })
        }
        _ => None,
    }
}

/// Bytes of the headers of IP and UDP.
fn headers(ip: IpAddr) -> usize {
    if ip.is_ipv4() { 20 + 8 } else { 40 + 8 }
}

/// A socket whose packets are never fragmented, and whatever the kernel believes of the path: it is what is measured.
fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    let probe = match address {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
    };
    set(&socket, probe)?;
    UdpSocket::from_std(socket)
}

/// `SO_NO_CHECK`, in IPv6 `UDP_NO_CHECK6_TX`.
fn unsummed(ip: IpAddr) -> (i32, i32, i32) {
    if ip.is_ipv4() { (libc::SOL_SOCKET, libc::SO_NO_CHECK, 1) } else { (libc::SOL_UDP, 101, 1) }
}

#[expect(unsafe_code, reason = "no crate in use knows these options")]
fn set(socket: &impl AsFd, (level, name, value): (i32, i32, i32)) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).expect("four bytes");
    // SAFETY: the descriptor is open, and the kernel reads `length` bytes of `value`.
    let result =
        unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, std::ptr::from_ref(&value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn packets_come_back_as_they_were_made_and_others_are_not_taken_for_one() {
        let bytes = packet(ANSWER, DROPPING, 7, 1400);
        let parsed = parse(&bytes).unwrap();
        assert_eq!((parsed.kind, parsed.flags, parsed.number, bytes.len()), (ANSWER, DROPPING, 7, 1400));
        for wrong in [&bytes[..31], b"", b"FABX\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", &[0; 64]] {
            assert!(parse(wrong).is_none());
        }
    }

    #[tokio::test]
    async fn known_peers_are_answered_others_are_not_and_a_closed_port_is_told_by_the_kernel() {
        let (us, peer): (IpAddr, IpAddr) = ("127.0.0.1".parse().unwrap(), "127.9.4.74".parse().unwrap());
        let heard = Arc::new(Heard::default());
        assert!(matches!(ask(us, peer, Size::Small).await, Answer::Kernel(_)), "nobody listens yet");
        let listening = Arc::clone(&heard);
        let answering = tokio::spawn(async move { answer(peer, &listening).await });
        tokio::task::yield_now().await;
        assert_eq!(ask(us, peer, Size::Small).await, Answer::Nothing, "we are not known");
        heard.mind([us]);
        for size in [Size::Small, Size::Unsummed, Size::Packet(1450)] {
            assert!(matches!(ask(us, peer, size).await, Answer::Daemon(_)), "{size:?}");
        }
        assert!(heard.last(us).is_some_and(|(_, dropping)| !dropping));
        answering.abort();
    }
}
