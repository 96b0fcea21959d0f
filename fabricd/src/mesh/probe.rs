//! One probe, and the answers to those of others.
//!
//! A probe is a UDP packet from a socket of its own, connected to the peer: so an answer comes by it alone, and so does
//! the word of the peer's kernel that nobody listens there (`ECONNREFUSED`). The first two of a round go out with those of
//! other peers: [`batch`](super::batch).
//!
//! ```text
//! 0      4         5      6       7 8            16             20   24                    32
//! | FABM | version | kind | flags | | token      | number       |    | arrived             | zeros, up to the size |
//! ```
//!
//! `number` rises by one with each probe of a peer; an answer has that of its question, and in `arrived` bit n for the
//! probe n before it. Daemons of before send zeros in both, and are told apart by that.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use fabric_core::model::Family;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout};

use super::{PATIENCE, PORT};

const MAGIC: &[u8; 4] = b"FABM";
const VERSION: u8 = 1;
pub(super) const QUESTION: u8 = 0;
pub(super) const ANSWER: u8 = 1;
/// The sender's packet filter throws packets of other nodes away.
const DROPPING: u8 = 1;
/// Bytes of the smallest probe.
pub(super) const SMALL: usize = 32;

/// How a packet is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As small as it may be.
    Small,
    /// Small, and without a checksum of UDP.
    NoChecksum,
    /// So many bytes, IP header included.
    Packet(u32),
}

impl Size {
    /// Bytes behind the header of UDP, in the family of `ip`.
    pub(super) fn payload(self, ip: IpAddr) -> usize {
        let bytes = match self {
            Self::Small | Self::NoChecksum => SMALL,
            Self::Packet(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX).saturating_sub(headers(ip)).max(SMALL),
        };
        bytes.min(usize::from(u16::MAX))
    }
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The peer's daemon answered.
    Daemon {
        /// After how long.
        rtt: Duration,
        /// Which of the last 64 probes have arrived there: bit n is about the one n before. 0 when it doesn't say.
        arrived: u64,
    },
    /// The peer's kernel answered that nobody listens.
    Kernel(Duration),
    /// Nothing did.
    Nothing,
    /// This node's own firewall let nothing out.
    NotSent,
}

impl Answer {
    /// The time there and back, if anything came.
    #[must_use]
    pub fn rtt(self) -> Option<Duration> {
        match self {
            Self::Daemon { rtt, .. } | Self::Kernel(rtt) => Some(rtt),
            Self::Nothing | Self::NotSent => None,
        }
    }

    /// What it says of the probes that arrived.
    #[must_use]
    pub fn arrived(self) -> u64 {
        if let Self::Daemon { arrived, .. } = self { arrived } else { 0 }
    }
}

/// Sends one packet from `from` to the prober of `to`, and waits for what comes back.
pub async fn ask(from: IpAddr, to: IpAddr, size: Size, number: u32) -> Answer {
    match send(from, to, size, number).await {
        Ok(answer) => answer,
        Err(error) if is_own_firewall(&error) => Answer::NotSent,
        Err(_) => Answer::Nothing,
    }
}

async fn send(from: IpAddr, to: IpAddr, size: Size, number: u32) -> io::Result<Answer> {
    let socket = bind(SocketAddr::new(from, 0))?;
    if size == Size::NoChecksum {
        set(&socket, no_checksum(from))?;
    }
    socket.connect(SocketAddr::new(to, PORT)).await?;
    let token = fastrand::u64(..);
    let question = Packet { kind: QUESTION, flags: 0, token, number, arrived: 0 };
    let begin = Instant::now();
    socket.send(&question.bytes(size.payload(from))).await?;
    let mut buffer = [0; 64];
    let answer = timeout(PATIENCE, async {
        loop {
            match socket.recv(&mut buffer).await {
                Ok(length) => match Packet::parse(&buffer[..length]) {
                    Some(packet) if (packet.kind, packet.token) == (ANSWER, token) => {
                        return Answer::Daemon { rtt: begin.elapsed(), arrived: packet.arrived };
                    }
                    _ => {}
                },
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

/// Whether an error of sending is that a chain on the output hook drops: so netfilter tells it.
pub(super) fn is_own_firewall(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EPERM)
}

/// What a packet to a port of somebody brought back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reply {
    /// Nothing.
    #[default]
    Silence,
    /// An answer of the same protocol.
    Answer,
    /// That nobody listens there, or a firewall that says so (ICMP port unreachable).
    Refused,
    /// A firewall's refusal.
    Rejected {
        /// Who says so: the host itself, or somebody before it.
        by: IpAddr,
        /// In the words of ICMP.
        why: &'static str,
    },
    /// This node's own firewall let nothing out.
    NotSent,
}

impl Reply {
    /// Whether the host itself has answered.
    #[must_use]
    pub fn is_from_host(self) -> bool {
        matches!(self, Self::Answer | Self::Refused | Self::Rejected { .. })
    }
}

/// Sends `payload` at once, and waits for what comes back.
pub(super) async fn probe_port(from: IpAddr, to: SocketAddr, payload: &[u8]) -> Reply {
    let send = || {
        let socket = connected(from, to)?;
        socket.send(payload)?;
        UdpSocket::from_std(socket)
    };
    match send() {
        Ok(socket) => reply(&socket).await,
        Err(error) if is_own_firewall(&error) => Reply::NotSent,
        Err(_) => Reply::Silence,
    }
}

/// Waits for what comes back to a [`connected`] socket.
pub(super) async fn reply(socket: &UdpSocket) -> Reply {
    let mut buffer = [0; 64];
    match timeout(PATIENCE, socket.recv(&mut buffer)).await {
        Err(_) => Reply::Silence,
        Ok(Ok(_)) => Reply::Answer,
        Ok(Err(_)) => icmp_error(socket),
    }
}

/// A socket at `from`, connected to `to`, that is told who refuses its packets (`IP_RECVERR`).
pub(super) fn connected(from: IpAddr, to: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = tells_errors(from)?;
    socket.connect(to)?;
    Ok(socket)
}

/// A socket at `from` that is told what ICMP says of its packets.
pub(super) fn tells_errors(from: IpAddr) -> io::Result<std::net::UdpSocket> {
    let socket = open(SocketAddr::new(from, 0))?;
    match from {
        IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
        IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
    }
    Ok(socket)
}

/// What ICMP said of the packet that was sent last: the socket's error queue (ip(7)).
fn icmp_error(socket: &UdpSocket) -> Reply {
    let (mut buffer, mut space) = ([0; 64], nix::cmsg_space!([u8; 128]));
    let mut parts = [io::IoSliceMut::new(&mut buffer)];
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let Ok(told) = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut space[..]), flags) else {
        return Reply::Silence;
    };
    let Ok(messages) = told.cmsgs() else { return Reply::Silence };
    for message in messages {
        let (error, by) = match message {
            ControlMessageOwned::Ipv4RecvErr(error, by) => {
                (error, by.map(|by| IpAddr::from(u32::from_be(by.sin_addr.s_addr).to_be_bytes())))
            }
            ControlMessageOwned::Ipv6RecvErr(error, by) => (error, by.map(|by| IpAddr::from(by.sin6_addr.s6_addr))),
            _ => continue,
        };
        return match (error.ee_origin, error.ee_type, error.ee_code, by) {
            (libc::SO_EE_ORIGIN_ICMP, 3, 3, _) | (libc::SO_EE_ORIGIN_ICMP6, 1, 4, _) => Reply::Refused,
            (libc::SO_EE_ORIGIN_ICMP, 3, code, Some(by)) => match code {
                9 => Reply::Rejected { by, why: "network administratively prohibited" },
                10 => Reply::Rejected { by, why: "host administratively prohibited" },
                13 => Reply::Rejected { by, why: "communication administratively prohibited" },
                _ => Reply::Silence,
            },
            (libc::SO_EE_ORIGIN_ICMP6, 1, code, Some(by)) => match code {
                1 => Reply::Rejected { by, why: "communication administratively prohibited" },
                5 => Reply::Rejected { by, why: "source address failed ingress/egress policy" },
                6 => Reply::Rejected { by, why: "reject route to destination" },
                _ => Reply::Silence,
            },
            _ => Reply::Silence,
        };
    }
    Reply::Silence
}

/// Whether any machine answers at an address of the underlay, from whichever address of this one: by UDP, or by TCP
/// where a firewall lets that through alone.
pub async fn is_host_there(to: IpAddr) -> bool {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let udp = async {
        match probe_port(any, SocketAddr::new(to, PORT), &[]).await {
            Reply::Answer | Reply::Refused => true,
            // A router on the path says such things of a host that isn't there.
            Reply::Rejected { by, .. } => by == to,
            Reply::Silence | Reply::NotSent => false,
        }
    };
    let tcp = async {
        match timeout(PATIENCE, TcpStream::connect((to, PORT))).await {
            Ok(Ok(_)) => true,
            Ok(Err(error)) => error.kind() == io::ErrorKind::ConnectionRefused,
            Err(_) => false,
        }
    };
    let (by_udp, by_tcp) = tokio::join!(udp, tcp);
    by_udp || by_tcp
}

/// When we heard of whom. Only those that are here are answered.
#[derive(Debug, Default)]
pub struct ReceivedProbes(Mutex<HashMap<IpAddr, Peer>>);

/// What is remembered of one that may ask.
#[derive(Clone, Copy, Debug, Default)]
struct Peer {
    /// When its last probe came, and whether it said that its filter throws packets away.
    last: Option<(Instant, bool)>,
    /// The largest number that came, and which of the 64 up to it.
    newest: u32,
    arrived: u64,
}

impl Peer {
    /// Notes a number; gives which of the 64 up to it have arrived.
    fn arrived(&mut self, number: u32) -> u64 {
        match number.wrapping_sub(self.newest) {
            // It has begun anew, or nothing came for long.
            ahead @ 64.. if ahead <= u32::MAX - 63 => (self.newest, self.arrived) = (number, 1),
            ahead @ 0..64 => (self.newest, self.arrived) = (number, self.arrived << ahead | 1),
            behind => {
                let late = behind.wrapping_neg();
                self.arrived |= 1 << late;
                return self.arrived >> late;
            }
        }
        self.arrived
    }
}

impl ReceivedProbes {
    /// Listens to these from now on.
    pub fn set_peers(&self, peers: impl IntoIterator<Item = IpAddr>) {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *received = peers.into_iter().map(|peer| (peer, received.get(&peer).copied().unwrap_or_default())).collect();
    }

    /// When a peer's probe came last, and whether it said that its filter throws packets away.
    pub fn last(&self, peer: IpAddr) -> Option<(Instant, bool)> {
        let received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        received.get(&peer).and_then(|peer| peer.last)
    }

    /// A question came; gives what to answer, if it is from one that may ask.
    fn hear(&self, peer: IpAddr, question: &Packet) -> Option<Packet> {
        let mut received = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = received.get_mut(&peer)?;
        peer.last = Some((Instant::now(), question.flags & DROPPING != 0));
        Some(Packet { kind: ANSWER, flags: 0, arrived: peer.arrived(question.number), ..*question })
    }
}

/// Answers the probes of peers at our address, until that breaks.
///
/// # Errors
/// When the address is not there (yet).
pub async fn answer(at: IpAddr, received: &ReceivedProbes) -> io::Result<()> {
    let socket = bind(SocketAddr::new(at, PORT))?;
    if Family::of(at) == Family::V6 {
        // UDP_NO_CHECK6_RX: in IPv6 a packet without a checksum is refused otherwise.
        set(&socket, (libc::SOL_UDP, 102, 1))?;
    }
    let (mut buffer, mut packet) = (vec![0; usize::from(u16::MAX)], vec![]);
    loop {
        // An error here is about an earlier answer.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let Some(question) = Packet::parse(&buffer[..length]).filter(|packet| packet.kind == QUESTION) else {
            continue;
        };
        if let Some(answer) = received.hear(from.ip(), &question) {
            // As large as the question, never larger. What can't be sent is lost, as the asker will see.
            answer.put(length, &mut packet);
            let _ = socket.send_to(&packet, from).await;
        }
    }
}

/// Tells a peer that our filter throws packets away, so that it knows why it gets no answers.
///
/// # Errors
/// When it can't be sent.
pub async fn complain(from: IpAddr, to: IpAddr, number: u32) -> io::Result<()> {
    let socket = bind(SocketAddr::new(from, 0))?;
    let packet = Packet { kind: QUESTION, flags: DROPPING, token: 0, number, arrived: 0 };
    socket.send_to(&packet.bytes(SMALL), SocketAddr::new(to, PORT)).await.map(drop)
}

/// The payload of a small question, to be sent by other means.
pub(super) fn question(number: u32) -> Vec<u8> {
    Packet { kind: QUESTION, flags: 0, token: fastrand::u64(..), number, arrived: 0 }.bytes(SMALL)
}

/// What a probe or its answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) token: u64,
    pub(super) number: u32,
    pub(super) arrived: u64,
}

impl Packet {
    fn bytes(&self, length: usize) -> Vec<u8> {
        let mut packet = vec![];
        self.put(length, &mut packet);
        packet
    }

    /// Makes `packet` this one, so long: one buffer serves many.
    pub(super) fn put(&self, length: usize, packet: &mut Vec<u8>) {
        packet.clear();
        packet.resize(length.max(SMALL), 0);
        packet[..4].copy_from_slice(MAGIC);
        packet[4..7].copy_from_slice(&[VERSION, self.kind, self.flags]);
        packet[8..16].copy_from_slice(&self.token.to_be_bytes());
        packet[16..20].copy_from_slice(&self.number.to_be_bytes());
        packet[24..32].copy_from_slice(&self.arrived.to_be_bytes());
    }

    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let head: &[u8; SMALL] = bytes.first_chunk()?;
        let [b'F', b'A', b'B', b'M', VERSION, kind, flags, ..] = *head else { return None };
        let token = u64::from_be_bytes(*head[8..].first_chunk()?);
        let number = u32::from_be_bytes(*head[16..].first_chunk()?);
        let arrived = u64::from_be_bytes(*head[24..].first_chunk()?);
        Some(Self { kind, flags, token, number, arrived })
    }
}

/// Bytes of the headers of IP and UDP.
fn headers(ip: IpAddr) -> usize {
    if ip.is_ipv4() { 20 + 8 } else { 40 + 8 }
}

fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::from_std(open(address)?)
}

/// A socket whose packets are never fragmented, and whatever the kernel believes of the path: it is what is measured.
fn open(address: SocketAddr) -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    socket.set_nonblocking(true)?;
    let probe = match address {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_PROBE),
    };
    set(&socket, probe)?;
    Ok(socket)
}

/// `SO_NO_CHECK`, in IPv6 `UDP_NO_CHECK6_TX`.
fn no_checksum(ip: IpAddr) -> (i32, i32, i32) {
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
        let packet = Packet { kind: ANSWER, flags: DROPPING, token: 7, number: 8, arrived: 9 };
        let bytes = packet.bytes(1400);
        assert_eq!((Packet::parse(&bytes), bytes.len()), (Some(packet), 1400));
        for wrong in [&bytes[..31], b"", b"FABX\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00", &[0; 64]] {
            assert_eq!(Packet::parse(wrong), None);
        }
    }

    #[test]
    fn answers_say_which_of_the_last_probes_have_arrived() {
        let mut peer = Peer::default();
        for (number, arrived) in [
            (u32::MAX, 0b1),
            (1, 0b101),
            // Between them, and late.
            (0, 0b11),
            (2, 0b1111),
            (66, 0b1),
            (65, 0b1),
            (67, 0b111),
            (5000, 0b1),
            // The asker has begun anew.
            (9, 0b1),
        ] {
            assert_eq!(peer.arrived(number), arrived, "{number}");
        }
    }

    #[tokio::test]
    async fn known_peers_are_answered_others_are_not_and_a_closed_port_is_told_by_the_kernel() {
        let (us, peer): (IpAddr, IpAddr) = ("127.0.0.1".parse().unwrap(), "127.9.4.74".parse().unwrap());
        let received = Arc::new(ReceivedProbes::default());
        assert!(matches!(ask(us, peer, Size::Small, 1).await, Answer::Kernel(_)), "nobody listens yet");
        assert_eq!(probe_port(us, SocketAddr::new(peer, PORT), &question(1)).await, Reply::Refused);
        assert!(is_host_there(peer).await, "its kernel says so");
        let listening = Arc::clone(&received);
        let answering = tokio::spawn(async move { answer(peer, &listening).await });
        tokio::task::yield_now().await;
        assert_eq!(ask(us, peer, Size::Small, 2).await, Answer::Nothing, "we are not known");
        received.set_peers([us]);
        for (number, size) in [(4, Size::Small), (5, Size::NoChecksum), (6, Size::Packet(1450))] {
            let Answer::Daemon { arrived, .. } = ask(us, peer, size, number).await else { panic!("{size:?}") };
            assert_eq!(arrived, (1 << (number - 3)) - 1, "those from the fourth on have arrived");
        }
        assert!(received.last(us).is_some_and(|(_, dropping)| !dropping));
        answering.abort();
    }
}
