//! Packets that go around parts of our own kernel, and probes of ports of the peer's host: which of them are answered tells whose
//! entries are stale, and what becomes of packets on the way.
//!
//! | packet | route, neighbour, FDB | destination MAC address |
//! |---|---|---|
//! | by our kernel, to a port at which nobody listens; a ping | our kernel's | our kernel's |
//! | by hand: encapsulated here, and sent to the peer's underlay address | not used | the published one |
//! | by hand, to any MAC address | not used | everybody's |
//!
//! If one by hand is answered and the kernel's isn't, our kernel doesn't send per the lease. If only the one to any MAC
//! address is, the peer's VTEP has another one than it has published.

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::net::{TcpSocket, UdpSocket};
use tokio::time::{Instant, timeout};

use super::frame::{self, Inner};
use super::ping::Pinger;
use super::probe::{self, Reply};
use super::{PATIENCE, PORT, Target};

/// A port at which nobody listens (traceroute's), so that the peer's kernel itself answers.
const CLOSED: u16 = 33434;

/// How often the VXLAN port is probed.
const PORT_PROBES: usize = 3;

/// The pings, by their numbers.
const BY_KERNEL: u16 = 1;
const BY_HAND: u16 = 2;
const ANY_MAC: u16 = 3;

/// What was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answered {
    /// What the kernel sent, by the peer's kernel.
    pub kernel: bool,
    /// What was encapsulated by hand.
    pub by_hand: bool,
    /// What was sent to any MAC address; `None` when nobody could have answered it.
    pub any_mac: Option<bool>,
}

/// What the peer's host said, in the underlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PortReplies {
    /// Of a port at which nobody listens.
    pub host: Reply,
    /// Of the VXLAN port.
    pub vxlan: Reply,
}

impl PortReplies {
    /// Whether what is sent to the VXLAN port is turned away, so that nothing more has to be sent there.
    #[must_use]
    pub fn is_turned_away(&self) -> bool {
        matches!(self.vxlan, Reply::Refused | Reply::Rejected { .. } | Reply::NotSent)
    }
}

/// Probes ports of the peer's host. A host that refuses UDP says so once a second on the average (`net.ipv4.icmp_ratelimit`),
/// and what else is refused counts: so the VXLAN port is probed several times, and the host by TCP too, whose refusals
/// are not limited.
pub async fn probe_ports(to: &Target) -> PortReplies {
    let (local, remote, port) = (to.ours.local, to.public_ip, to.ours.port);
    let at_vxlan = async {
        for _ in 0..PORT_PROBES {
            let reply = probe::probe_port(local, SocketAddr::new(remote, port), &frame::NOBODYS).await;
            if reply != Reply::Silence {
                return reply;
            }
        }
        Reply::Silence
    };
    let closed = SocketAddr::new(remote, PORT);
    let (vxlan, by_udp, by_tcp) =
        tokio::join!(at_vxlan, probe::probe_port(local, closed, b"fabricd?"), probe_tcp_port(local, closed));
    PortReplies { host: if by_udp == Reply::Silence { by_tcp } else { by_udp }, vxlan }
}

async fn probe_tcp_port(from: IpAddr, to: SocketAddr) -> Reply {
    let connect = async {
        let socket = if from.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.bind(SocketAddr::new(from, 0))?;
        socket.connect(to).await
    };
    match timeout(PATIENCE, connect).await {
        Ok(Ok(_)) => Reply::Answer,
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => Reply::Refused,
        Ok(Err(_)) | Err(_) => Reply::Silence,
    }
}

/// Sends all of them at once and waits for the answers; and why pings could not be sent, if so.
pub async fn look(to: &Target, number: u32) -> (Answered, Option<io::Error>) {
    let (ours, overlay) = (&to.ours, to.overlay);
    let (pinger, no_ping) = match Pinger::open(ours.overlay) {
        Ok(pinger) => (Some(pinger), None),
        Err(error) => (None, Some(error)),
    };
    let everybody = if overlay.is_ipv4() { [0xff; 6] } else { [0x33, 0x33, 0, 0, 0, 1] };
    let published = to.mac.octets();
    let (kernel, hand, closed, any, pings) = tokio::join!(
        probe::probe_port(ours.overlay, SocketAddr::new(overlay, CLOSED), b"fabricd?"),
        by_hand(to, published, PORT, number),
        by_hand(to, published, CLOSED, number),
        by_hand(to, everybody, PORT, number),
        pings(to, pinger.as_ref(), published, everybody),
    );
    let came = |reply: Reply| matches!(reply, Reply::Answer | Reply::Refused);
    let pinged = |number: u16| pings.contains(&number);
    let any = came(any) || pinged(ANY_MAC);
    let answered = Answered {
        kernel: came(kernel) || pinged(BY_KERNEL),
        by_hand: came(hand) || came(closed) || pinged(BY_HAND),
        any_mac: (any || pinger.is_some()).then_some(any),
    };
    (answered, no_ping)
}

/// A question that is encapsulated here. Its answer comes as all others do: to a socket that has sent nothing itself.
async fn by_hand(to: &Target, mac: [u8; 6], port: u16, number: u32) -> Reply {
    let send = async || {
        let socket = UdpSocket::from_std(probe::connected(to.ours.overlay, SocketAddr::new(to.overlay, port))?)?;
        let from = (to.ours.overlay, socket.local_addr()?.port());
        let inner = frame::udp(from, (to.overlay, port), &probe::question(number));
        throw(to, &frame::encapsulate(to, mac, Inner::Udp, &inner)).await?;
        io::Result::Ok(socket)
    };
    match send().await {
        Ok(socket) => probe::reply(&socket).await,
        Err(_) => Reply::Silence,
    }
}

/// The numbers of those that are answered.
async fn pings(to: &Target, pinger: Option<&Pinger>, published: [u8; 6], everybody: [u8; 6]) -> Vec<u16> {
    let Some(pinger) = pinger else { return vec![] };
    let (from, overlay) = (to.ours.overlay, to.overlay);
    // One that can't be sent is one that isn't answered.
    let _ = pinger.send(overlay, &frame::ping(from, overlay, pinger.id, BY_KERNEL)).await;
    for (number, mac) in [(BY_HAND, published), (ANY_MAC, everybody)] {
        let ping = frame::ping(from, overlay, pinger.id, number);
        let _ = throw(to, &frame::encapsulate(to, mac, Inner::Icmp, &ping)).await;
    }
    pinger.answered(from, &[BY_KERNEL, BY_HAND, ANY_MAC], Instant::now() + PATIENCE).await
}

async fn throw(to: &Target, frame: &[u8]) -> io::Result<()> {
    let socket = UdpSocket::bind(SocketAddr::new(to.ours.local, 0)).await?;
    socket.send_to(frame, SocketAddr::new(to.public_ip, to.ours.port)).await.map(drop)
}
