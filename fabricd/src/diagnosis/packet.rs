//! Real packets: whether one comes back, and if it is refused, by whom.
//!
//! A ping (ICMP echo) needs a raw socket. Without `CAP_NET_RAW` a UDP packet goes to a port where nobody listens: the
//! other end's kernel answers that nobody does (ICMP port unreachable), which shows as well that packets come and go.
//! Who answers is read from the socket's error queue, since a firewall may answer so in the other end's place.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{MsgFlags, SockType, SockaddrStorage, recvfrom, sendto, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::mesh::frame::ping as echo_request;
use crate::mesh::ping::open;

/// How long an answer may take.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// After this another packet is sent.
const AGAIN: Duration = Duration::from_millis(300);
/// Traceroute's first port: hardly anybody listens there.
const CLOSED_PORT: u16 = 33434;

/// What became of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The other end answered, after so long.
    Answered(Duration),
    /// Somebody said no: a firewall or a router.
    Refused {
        /// Who.
        by: Option<IpAddr>,
        /// What it said.
        why: String,
    },
    /// It could not be sent, for this reason.
    Unsent(String),
    /// Nothing came back.
    Nothing,
}

impl Seen {
    /// Whether the other end answered.
    #[must_use]
    pub fn answered(&self) -> bool {
        matches!(self, Self::Answered(_))
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Answered(rtt) => write!(f, "answered in {:.1} ms", rtt.as_secs_f64() * 1e3),
            Self::Refused { by: Some(by), why } => write!(f, "refused by {by}: {why}"),
            Self::Refused { by: None, why } => write!(f, "refused: {why}"),
            Self::Unsent(why) => write!(f, "not sent: {why}"),
            Self::Nothing => write!(f, "no answer within {} s", PATIENCE.as_secs()),
        }
    }
}

/// Pings from an address of this network namespace, on a thread that may wait.
///
/// # Errors
/// When this process may not open a raw socket.
pub fn ping(from: IpAddr, to: IpAddr) -> io::Result<Seen> {
    let socket = match open(from, SockType::Raw) {
        Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => {
            return Ok(Seen::Unsent(format!("{from} is not an address there")));
        }
        socket => socket?,
    };
    let (begin, id) = (Instant::now(), fastrand::u16(..));
    let mut sent: Vec<Instant> = vec![];
    while begin.elapsed() < PATIENCE {
        if begin.elapsed() >= AGAIN * u32::try_from(sent.len()).unwrap_or(u32::MAX) {
            let number = u16::try_from(sent.len()).unwrap_or(u16::MAX);
            sent.push(Instant::now());
            if let Err(error) = send(&socket, to, &echo_request(from, to, id, number)) {
                return Ok(unsent(&error));
            }
        }
        match receive(&socket, from, to, id)? {
            Some(Received::Reply(number)) => {
                let at = sent.get(usize::from(number)).copied().unwrap_or(begin);
                return Ok(Seen::Answered(at.elapsed()));
            }
            Some(Received::Error(by, why)) => return Ok(Seen::Refused { by: Some(by), why }),
            None => {}
        }
    }
    Ok(Seen::Nothing)
}

/// Sends from within another network namespace.
///
/// # Errors
/// When that can't be entered (`CAP_SYS_ADMIN`, a path of the host), and those of `send`.
pub fn inside(netns: &Path, send: impl FnOnce() -> io::Result<Seen> + Send + 'static) -> io::Result<Seen> {
    let netns = File::open(netns)?;
    // A thread has the namespace for itself, and ends with it.
    let sending = thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        send()
    });
    sending.join().map_err(|_| io::Error::other("the thread that sends has ended"))?
}

/// Begins a connection of TCP to a port, from whichever address of this network namespace leads there. That nobody listens is
/// an answer, too; so says a firewall that rejects by a reset.
///
/// # Errors
/// None: what the system says is what is seen.
pub fn connect(from: IpAddr, to: IpAddr, port: u16) -> io::Result<Seen> {
    let begin = Instant::now();
    Ok(match TcpStream::connect_timeout(&SocketAddr::new(to, port), PATIENCE) {
        Ok(connected) if connected.local_addr().is_ok_and(|own| own.ip() != from) => {
            Seen::Unsent(format!("it goes out from another address than {from}"))
        }
        Ok(_) => Seen::Answered(begin.elapsed()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Seen::Answered(begin.elapsed()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Seen::Nothing,
        Err(error) => unsent(&error),
    })
}

/// A ping, or where no raw socket may be opened a UDP packet to a closed port.
#[must_use]
pub fn probe(from: IpAddr, to: IpAddr) -> Seen {
    let seen = match ping(from, to) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => probe_port(from, to, CLOSED_PORT),
        seen => seen,
    };
    seen.unwrap_or_else(|error| unsent(&error))
}

/// Sends UDP packets to a port. Where nobody listens the other end's kernel says so, which is an answer.
///
/// # Errors
/// When no socket can be opened.
pub fn probe_port(from: IpAddr, to: IpAddr, port: u16) -> io::Result<Seen> {
    let socket = match UdpSocket::bind(SocketAddr::new(from, 0)) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            return Ok(Seen::Unsent(format!("{from} is not an address there")));
        }
        socket => socket?,
    };
    match from {
        IpAddr::V4(_) => setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?,
        IpAddr::V6(_) => setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?,
    }
    socket.connect(SocketAddr::new(to, port))?;
    socket.set_read_timeout(Some(AGAIN))?;
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        let sent = Instant::now();
        let answer = socket.send(b"fabricd?").and_then(|_| socket.recv(&mut [0; 64]));
        let Err(error) = answer else { return Ok(Seen::Answered(sent.elapsed())) };
        if error.kind() == io::ErrorKind::WouldBlock {
            continue;
        }
        return Ok(match last_error(&socket) {
            // Told by the other end's kernel: our packet was there, and its answer is here.
            Some((kind, code, Some(by))) if by == to && is_closed_port(to, kind, code) => {
                Seen::Answered(sent.elapsed())
            }
            Some((kind, code, by)) => Seen::Refused { by, why: words(to, kind, code) },
            None => unsent(&error),
        });
    }
    Ok(Seen::Nothing)
}

fn unsent(error: &io::Error) -> Seen {
    let why = match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENETUNREACH | Errno::EHOSTUNREACH) => "there is no route for it there: is the interface up?".into(),
        Some(Errno::ENETDOWN) => "the interface is down".into(),
        Some(Errno::EPERM) => "a firewall rule there drops what is sent".into(),
        Some(Errno::EINVAL | Errno::EACCES) => "a route there refuses it: ip route get shows which".into(),
        _ => error.to_string(),
    };
    Seen::Unsent(why)
}

fn send(socket: &OwnedFd, to: IpAddr, packet: &[u8]) -> io::Result<()> {
    let to = SockaddrStorage::from(SocketAddr::new(to, 0));
    sendto(socket.as_raw_fd(), packet, &to, MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

/// What came back for a ping.
#[derive(Debug, PartialEq, Eq)]
enum Received {
    Reply(u16),
    Error(IpAddr, String),
}

/// Waits a while for what answers our ping; whatever else is in the air is passed over.
fn receive(socket: &OwnedFd, from: IpAddr, to: IpAddr, id: u16) -> io::Result<Option<Received>> {
    setsockopt(socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50))?;
    let mut buffer = [0; 512];
    match recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) {
        Ok((length, sender)) => {
            let sender = sender.and_then(|sender| match (sender.as_sockaddr_in(), sender.as_sockaddr_in6()) {
                (Some(v4), _) => Some(IpAddr::V4(v4.ip())),
                (_, Some(v6)) => Some(IpAddr::V6(v6.ip())),
                _ => None,
            });
            Ok(sender.and_then(|sender| parse(from, to, id, sender, &buffer[..length])))
        }
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Raw sockets of IPv4 show the IP header, those of IPv6 don't. An error quotes the packet that it is about.
fn parse(from: IpAddr, to: IpAddr, id: u16, sender: IpAddr, packet: &[u8]) -> Option<Received> {
    let v4 = from.is_ipv4();
    let icmp = if v4 { packet.get(usize::from(packet.first()? & 0xf) * 4..)? } else { packet };
    let word = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (reply, request) = if v4 { (0, 8) } else { (129, 128) };
    let (kind, code) = (*icmp.first()?, *icmp.get(1)?);
    if kind == reply {
        return (sender == to && word(icmp, 4)? == id).then(|| word(icmp, 6).map(Received::Reply))?;
    }
    if !is_error(v4, kind) {
        return None;
    }
    let quoted = icmp.get(8..)?;
    let (target, inner): (IpAddr, &[u8]) = if v4 {
        let target: [u8; 4] = quoted.get(16..20)?.try_into().ok()?;
        (target.into(), quoted.get(usize::from(quoted.first()? & 0xf) * 4..)?)
    } else {
        let target: [u8; 16] = quoted.get(24..40)?.try_into().ok()?;
        (target.into(), quoted.get(40..)?)
    };
    let ours = target == to && *inner.first()? == request && word(inner, 4)? == id;
    ours.then(|| Received::Error(sender, words(to, kind, code)))
}

/// Destination unreachable and time exceeded (RFC 792, RFC 4443).
fn is_error(v4: bool, kind: u8) -> bool {
    if v4 { [3, 11].contains(&kind) } else { [1, 3].contains(&kind) }
}

fn is_closed_port(to: IpAddr, kind: u8, code: u8) -> bool {
    (kind, code) == if to.is_ipv4() { (3, 3) } else { (1, 4) }
}

/// An ICMP error in words.
fn words(to: IpAddr, kind: u8, code: u8) -> String {
    let known = match (to.is_ipv4(), kind, code) {
        (true, 3, 0) | (false, 1, 0) => "no route to it",
        (true, 3, 1) | (false, 1, 3) => "host unreachable (nobody has that address there)",
        (true, 3, 3) | (false, 1, 4) => "port unreachable (as firewalls say that reject)",
        (true, 3, 9 | 10 | 13) | (false, 1, 1 | 5) => "administratively prohibited (a firewall rejects it)",
        (false, 1, 6) => "a route rejects it",
        (true, 11, _) | (false, 3, _) => "too many hops (packets go round in a loop)",
        _ => return format!("ICMP type {kind} code {code}"),
    };
    known.to_owned()
}

/// Type and code of the ICMP error that a socket was told of last, and who sent it.
#[expect(unsafe_code, reason = "no feature in use of nix or rustix reads the error queue")]
fn last_error(socket: &UdpSocket) -> Option<(u8, u8, Option<IpAddr>)> {
    // Words, so that the control messages in it are aligned.
    let mut control = [0_u64; 64];
    let mut data = [0_u8; 64];
    let mut slice = libc::iovec { iov_base: data.as_mut_ptr().cast(), iov_len: data.len() };
    // SAFETY: zero is a valid value of every field.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut slice;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: the kernel writes no more than the lengths given to buffers that outlive the call.
    let result =
        unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) };
    if result < 0 {
        return None;
    }
    let control: Vec<u8> = control.iter().flat_map(|word| word.to_ne_bytes()).collect();
    // One control message (no other is asked for): a header, then a struct sock_extended_err of 16 bytes (errno, origin,
    // type, code, …), then the address of who sent it.
    let error = control.get(size_of::<libc::cmsghdr>()..)?;
    let (kind, code, sender) = (*error.get(5)?, *error.get(6)?, error.get(16..)?);
    let by = match i32::from(u16::from_ne_bytes([*sender.first()?, *sender.get(1)?])) {
        libc::AF_INET => <[u8; 4]>::try_from(sender.get(4..8)?).ok().map(|ip| Ipv4Addr::from(ip).into()),
        libc::AF_INET6 => <[u8; 16]>::try_from(sender.get(8..24)?).ok().map(|ip| Ipv6Addr::from(ip).into()),
        _ => None,
    };
    // SO_EE_ORIGIN_LOCAL is 1: then there is no ICMP error in it.
    (*error.get(4)? > 1).then_some((kind, code, by))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv4 packet of ICMP.
    fn v4(icmp: &[u8], target: [u8; 4]) -> Vec<u8> {
        [&[0x45; 1], &[0; 11][..], &[192, 0, 2, 9], &target, icmp].concat()
    }

    #[test]
    fn only_what_answers_our_own_ping_counts() {
        let (from, to): (IpAddr, IpAddr) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let router = "192.0.2.254".parse().unwrap();
        let echo = |kind: u8, id: u8| [kind, 0, 0, 0, 0, id, 0, 3];
        let error = |code: u8, id: u8, target| [&[3, code, 0, 0, 0, 0, 0, 0][..], &v4(&echo(8, id), target)].concat();
        for (packet, sender, want) in [
            (v4(&echo(0, 7), [192, 0, 2, 1]), to, Some(Received::Reply(3))),
            (v4(&echo(0, 8), [192, 0, 2, 1]), to, None),
            (v4(&echo(0, 7), [192, 0, 2, 1]), router, None),
            (v4(&echo(8, 7), [192, 0, 2, 1]), to, None),
            (
                v4(&error(13, 7, [192, 0, 2, 2]), [192, 0, 2, 1]),
                router,
                Some(Received::Error(router, words(to, 3, 13))),
            ),
            (v4(&error(13, 8, [192, 0, 2, 2]), [192, 0, 2, 1]), router, None),
            (v4(&error(13, 7, [192, 0, 2, 3]), [192, 0, 2, 1]), router, None),
        ] {
            assert_eq!(parse(from, to, 7, sender, &packet), want, "{packet:?}");
        }
        for cut in 0..40 {
            let packet = v4(&error(13, 7, [192, 0, 2, 2]), [192, 0, 2, 1]);
            assert_eq!(parse(from, to, 7, router, &packet[..cut]), None, "cut at {cut}");
        }
    }

    #[test]
    fn errors_of_ipv6_quote_the_packet_without_a_header_before_them() {
        let (from, to): (IpAddr, IpAddr) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        let router: IpAddr = "2001:db8::ff".parse().unwrap();
        let IpAddr::V6(target) = to else { unreachable!("it is IPv6") };
        let quoted = [&[0x60; 1][..], &[0; 23], &target.octets(), &[128, 0, 0, 0, 0, 7, 0, 1]].concat();
        let packet = [&[1, 1, 0, 0, 0, 0, 0, 0][..], &quoted].concat();
        assert_eq!(parse(from, to, 7, router, &packet), Some(Received::Error(router, words(to, 1, 1))));
        assert_eq!(parse(from, to, 7, to, &[129, 0, 0, 0, 0, 7, 0, 2]), Some(Received::Reply(2)));
        assert_eq!(parse(from, to, 7, router, &packet[..50]), None);
    }

    #[test]
    fn closed_port_of_the_other_end_is_an_answer_in_both_families() {
        for ip in ["127.0.0.1", "::1"] {
            let ip: IpAddr = ip.parse().unwrap();
            assert!(probe_port(ip, ip, CLOSED_PORT).unwrap().answered(), "{ip}");
        }
        assert!(matches!(
            probe_port("192.0.2.77".parse().unwrap(), "127.0.0.1".parse().unwrap(), 9),
            Ok(Seen::Unsent(_))
        ));
    }
}
