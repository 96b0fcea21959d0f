//! Echo requests (RFC 792, RFC 4443) over raw sockets, with the answers of routers and firewalls that refuse them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, sendto, setsockopt, socket,
    sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// How often one is sent before it is given up.
const TRIES: u32 = 3;

/// Sends echo requests of `size` bytes, IP header included, from the namespace of this thread until one is answered.
/// They are never fragmented. Gives the round trip.
///
/// # Errors
/// What an operator should know: no answer, or who refused.
pub fn ping(to: IpAddr, size: usize, patience: Duration) -> Result<Duration, String> {
    let (family, protocol, header) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, 20),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, 40),
    };
    let cannot = |error: Errno| match error {
        Errno::EPERM | Errno::EACCES => "cannot open a raw socket; root or CAP_NET_RAW is needed".to_owned(),
        other => unsent(to, size, other),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol).map_err(cannot)?;
    let each = patience / TRIES;
    let limit = TimeVal::milliseconds(each.as_millis().try_into().unwrap_or(1000));
    setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(cannot)?;
    let id = u16::try_from(std::process::id() % 65536).unwrap_or(1);
    let mut refused = None;
    for sequence in 1..=TRIES {
        let packet = request(to, id, u16::try_from(sequence).unwrap_or(1), size.saturating_sub(header));
        let begin = Instant::now();
        sendto(socket.as_raw_fd(), &packet, &SockaddrStorage::from(SocketAddr::new(to, 0)), MsgFlags::empty())
            .map_err(|error| unsent(to, size, error))?;
        while begin.elapsed() < each {
            let mut buffer = [0; 65536];
            let length = match recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) {
                Ok((length, _)) => length,
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(unsent(to, size, error)),
            };
            match understood(&buffer[..length], to, id) {
                Some(Ok(())) => return Ok(begin.elapsed()),
                Some(Err(reason)) => {
                    refused = Some(reason);
                    break;
                }
                None => {}
            }
        }
    }
    Err(refused.unwrap_or_else(|| format!("no answer in {} s", patience.as_secs())))
}

/// Why the kernel did not send, in words.
fn unsent(to: IpAddr, size: usize, error: Errno) -> String {
    match error {
        Errno::ENETUNREACH | Errno::EHOSTUNREACH => format!("there is no route to {to}"),
        Errno::EMSGSIZE => format!("{size} bytes are more than the path's MTU"),
        Errno::EPERM | Errno::EACCES => "a packet filter or a prohibit route of this node refuses to send it".into(),
        other => format!("cannot send it: {}", io::Error::from(other)),
    }
}

/// An echo request with so many bytes, at least a header. The kernel fills in the checksum of ICMPv6.
fn request(to: IpAddr, id: u16, sequence: u16, length: usize) -> Vec<u8> {
    let mut packet = vec![0; length.max(8)];
    packet[0] = if to.is_ipv4() { 8 } else { 128 };
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    if to.is_ipv4() {
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// What was received: our answer, a refusal of our request, or something else. IPv4 comes with its IP header.
fn understood(packet: &[u8], to: IpAddr, id: u16) -> Option<Result<(), String>> {
    let (source, message) = match to {
        IpAddr::V4(_) => {
            let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            (Some(IpAddr::from(source)), packet.get(usize::from(packet.first()? & 15) * 4..)?)
        }
        IpAddr::V6(_) => (None, packet),
    };
    let id_at = |at: usize| message.get(at..at + 2) == Some(&id.to_be_bytes()[..]);
    let by = source.map(|source| format!(" by {source}")).unwrap_or_default();
    // Of a refused packet its IP header and 8 bytes come along, behind 8 bytes of ours.
    match (to, message.first()?, message.get(1)?) {
        (IpAddr::V4(_), 0, _) | (IpAddr::V6(_), 129, _) if id_at(4) && source.is_none_or(|source| source == to) => {
            Some(Ok(()))
        }
        (IpAddr::V4(to), 3, code) if message.get(24..28)? == to.octets() => {
            let inner = 8 + usize::from(message.get(8)? & 15) * 4;
            id_at(inner + 4).then(|| {
                Err(match code {
                    4 => format!("too large for the path's MTU, said{by}"),
                    9 | 10 | 13 => format!("rejected{by}: administratively prohibited, by a firewall"),
                    _ => format!("unreachable, said{by}"),
                })
            })
        }
        (IpAddr::V6(to), 1 | 2, code) if message.get(32..48)? == to.octets() && id_at(8 + 40 + 4) => {
            Some(Err(match (message[0], code) {
                (2, _) => "too large for the path's MTU".into(),
                (_, 1 | 5 | 6) => "rejected: administratively prohibited, by a firewall".into(),
                _ => "unreachable, said a router".into(),
            }))
        }
        _ => None,
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let pairs = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 7));

    fn with_header(source: [u8; 4], target: [u8; 4], message: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[12..16].copy_from_slice(&source);
        packet[16..20].copy_from_slice(&target);
        packet.extend(message);
        packet
    }

    #[test]
    fn request_has_its_checksum_and_size() {
        let packet = request(V4, 7, 1, 56);
        assert_eq!((packet.len(), checksum(&packet)), (56, 0));
        assert_eq!(request("2001:db8::7".parse().unwrap(), 7, 1, 0)[..2], [128, 0]);
    }

    #[test]
    fn answers_and_refusals_of_our_request_are_told_from_those_of_others() {
        let ours = request(V4, 7, 1, 8);
        let mut answer = ours.clone();
        answer[0] = 0;
        assert_eq!(understood(&with_header([192, 0, 2, 7], [10, 244, 1, 2], &answer), V4, 7), Some(Ok(())));
        assert_eq!(understood(&with_header([192, 0, 2, 7], [10, 244, 1, 2], &answer), V4, 8), None);
        assert_eq!(understood(&with_header([192, 0, 2, 9], [10, 244, 1, 2], &answer), V4, 7), None);
        let refused = |code: u8, of: &[u8]| {
            let mut message = vec![3, code, 0, 0, 0, 0, 0, 0];
            message.extend(with_header([10, 244, 1, 2], [192, 0, 2, 7], of));
            understood(&with_header([198, 51, 100, 1], [10, 244, 1, 2], &message), V4, 7)
        };
        let told = "rejected by 198.51.100.1: administratively prohibited, by a firewall";
        assert_eq!(refused(13, &ours), Some(Err(told.into())));
        assert_eq!(refused(1, &ours), Some(Err("unreachable, said by 198.51.100.1".into())));
        assert_eq!(refused(13, &request(V4, 8, 1, 8)), None);
        for length in 0..40 {
            let whole = with_header([192, 0, 2, 7], [10, 244, 1, 2], &answer);
            let _ = understood(&whole[..length.min(whole.len())], V4, 7);
        }
    }
}
