//! The NAT guard: which ports of pods have connections that this node's connection tracking translates.
//!
//! Programs mark a pod's port when it talks to anything that is no pod. Marks have two generations, and both are asked.
//! Programs write to the current one, we to the other: so each has one writer. To forget, the other is filled with what
//! connection tracking has now, and becomes the current one; what was marked until then lives for one more turn.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use fabric_bpf::abi;
use fabric_core::state::fast_path::PodSlot;
use fabric_ebpf::Map;
use fabric_netlink::{Frame, Request, RequestSocket, attribute};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::maps::Maps;

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET`.
const GET: u16 = 0x0101;
/// `AF_INET`, `NFNETLINK_V0`, and no resource.
const IPV4: [u8; 4] = [2, 0, 0, 0];
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tuple {
    source: (IpAddr, u16),
    destination: (IpAddr, u16),
    udp: bool,
}

/// Marks what is translated of the connections of pods with these addresses.
pub(super) fn seed(maps: &Maps, addresses: &BTreeMap<IpAddr, PodSlot>) -> io::Result<()> {
    let (_, other) = maps.generations()?;
    let marks = marks(&translated()?, addresses);
    marks.into_iter().try_for_each(|(word, bits)| {
        let had = other.get(&word.to_ne_bytes())?.map_or(0, |bytes| bits_in(&bytes));
        other.set(&word.to_ne_bytes(), &(had | bits).to_ne_bytes())
    })
}

/// Forgets what no connection needs any more.
pub(super) fn renew(maps: &Maps, addresses: &BTreeMap<IpAddr, PodSlot>) -> io::Result<()> {
    let (current, other) = maps.generations()?;
    replace(other, &marks(&translated()?, addresses))?;
    maps.turn_generation(current)
}

/// Makes the words of a generation these. A bit that stays is never 0 in between.
fn replace(generation: &Map, marks: &BTreeMap<u32, u64>) -> io::Result<()> {
    let mut differing = vec![];
    generation.each_value(|word, bytes| {
        let wanted = marks.get(&word).copied().unwrap_or_default();
        if bits_in(bytes) != wanted {
            differing.push((word, wanted));
        }
    })?;
    differing.into_iter().try_for_each(|(word, bits)| generation.set(&word.to_ne_bytes(), &bits.to_ne_bytes()))
}

fn bits_in(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default()
}

/// The words for these connections. A pod that opened one is marked by the port that it sends from, and by the one that
/// answers come to: that is another where two of its connections would have looked the same to the other end. A pod that
/// another host was led to is marked by the port that it answers from.
fn marks(translated: &[(Tuple, Tuple)], addresses: &BTreeMap<IpAddr, PodSlot>) -> BTreeMap<u32, u64> {
    let mut marks: BTreeMap<u32, u64> = BTreeMap::new();
    for (original, reply) in translated {
        let end = |(ip, port): (IpAddr, u16)| addresses.get(&ip).map(|slot| (slot.0, port));
        let client = [original.source, reply.destination].map(end);
        // Where client and server are both here, the client's port is enough.
        let server = if client[0].is_some() { None } else { end(reply.source) };
        for (slot, port) in client.into_iter().chain([server]).flatten() {
            let (word, bit) = abi::nat_bit(slot, original.udp, port);
            *marks.entry(word).or_default() |= bit;
        }
    }
    marks
}

/// The connections of IPv4 that are translated: those whose answers don't go back the way that the first packet came.
fn translated() -> io::Result<Vec<(Tuple, Tuple)>> {
    let mut socket = match RequestSocket::open(NETLINK_NETFILTER) {
        // No netfilter at all.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(vec![]),
        socket => socket?,
    };
    match socket.dump(&Request::raw(GET, 0, IPV4.to_vec()), |frame| connection(frame).filter(is_translated)) {
        // No connection tracking.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(vec![]),
        found => found,
    }
}

fn is_translated((original, reply): &(Tuple, Tuple)) -> bool {
    (original.source, original.destination) != (reply.destination, reply.source)
}

fn connection(frame: &Frame<'_>) -> Option<(Tuple, Tuple)> {
    let attributes = frame.body.get(IPV4.len()..)?;
    Some((tuple(attribute(attributes, CTA_TUPLE_ORIG)?)?, tuple(attribute(attributes, CTA_TUPLE_REPLY)?)?))
}

fn tuple(body: &[u8]) -> Option<Tuple> {
    let (ip, proto) = (attribute(body, CTA_TUPLE_IP)?, attribute(body, CTA_TUPLE_PROTO)?);
    let address = |kind| <[u8; 4]>::try_from(attribute(ip, kind)?).ok().map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
    let port = |kind| <[u8; 2]>::try_from(attribute(proto, kind)?).ok().map(u16::from_be_bytes);
    let udp = match *attribute(proto, CTA_PROTO_NUM)?.first()? {
        TCP => false,
        UDP => true,
        _ => return None,
    };
    Some(Tuple {
        source: (address(CTA_IP_V4_SRC)?, port(CTA_PROTO_SRC_PORT)?),
        destination: (address(CTA_IP_V4_DST)?, port(CTA_PROTO_DST_PORT)?),
        udp,
    })
}

#[cfg(test)]
mod tests {
    use fabric_netlink::Attributes;

    use super::*;

    fn end(text: &str) -> (IpAddr, u16) {
        let (ip, port) = text.split_once(':').expect("an address and a port");
        (ip.parse().expect("an address"), port.parse().expect("a port"))
    }

    /// `A:1 > B:2, B:2 > A:1`: the first packet, and the answer to it.
    fn pair(text: &str, udp: bool) -> (Tuple, Tuple) {
        let mut tuples = text.split(", ").map(|tuple| {
            let (source, destination) = tuple.split_once(" > ").expect("two ends");
            Tuple { source: end(source), destination: end(destination), udp }
        });
        (tuples.next().expect("the first"), tuples.next().expect("the second"))
    }

    #[test]
    fn translated_connections_mark_the_port_of_the_pod() {
        let addresses =
            [("10.64.1.5", 1), ("10.64.1.6", 2)].map(|(ip, slot)| (ip.parse().expect("valid"), PodSlot(slot)));
        let addresses = addresses.into();
        let marked = |text: &str, udp| {
            let pair = pair(text, udp);
            assert!(is_translated(&pair), "{text}");
            marks(&[pair], &addresses)
        };
        let bit = |slot, udp, port| BTreeMap::from([abi::nat_bit(slot, udp, port)]);
        // A service's address, served elsewhere.
        assert_eq!(
            marked("10.64.1.5:4000 > 203.0.113.1:80, 10.64.2.9:8080 > 10.64.1.5:4000", false),
            bit(1, false, 4000)
        );
        // Masqueraded to the outside.
        assert_eq!(
            marked("10.64.1.6:53000 > 198.51.100.9:53, 198.51.100.9:53 > 192.0.2.1:61000", true),
            bit(2, true, 53000)
        );
        // A port of this node that leads to a pod.
        assert_eq!(
            marked("198.51.100.9:700 > 192.0.2.1:30080, 10.64.1.6:8080 > 198.51.100.9:700", false),
            bit(2, false, 8080)
        );
        // Client and server are both here.
        assert_eq!(
            marked("10.64.1.5:4000 > 203.0.113.1:80, 10.64.1.6:8080 > 10.64.1.5:4000", false),
            bit(1, false, 4000)
        );
        // Two connections to one server, one of them by a service's address: the port was translated as well.
        let both = marked("10.64.1.5:4000 > 203.0.113.1:53, 10.64.2.9:8053 > 10.64.1.5:1027", true);
        assert_eq!(both, [abi::nat_bit(1, true, 4000), abi::nat_bit(1, true, 1027)].into());
        // Nobody's here.
        assert_eq!(marked("10.64.3.5:4000 > 203.0.113.1:80, 10.64.4.6:8080 > 10.64.3.5:4000", false), BTreeMap::new());
        assert!(!is_translated(&pair("10.64.1.5:4000 > 10.64.2.9:80, 10.64.2.9:80 > 10.64.1.5:4000", false)));
    }

    #[test]
    fn tuples_are_read_and_what_has_no_ports_is_passed_over() {
        let body = |protocol: u8| {
            Attributes::default()
                .nested(CTA_TUPLE_IP, |ip| {
                    ip.bytes(CTA_IP_V4_SRC, &[192, 0, 2, 1]).bytes(CTA_IP_V4_DST, &[192, 0, 2, 2])
                })
                .nested(CTA_TUPLE_PROTO, |proto| {
                    let ports = proto.bytes(CTA_PROTO_NUM, &[protocol]).bytes(CTA_PROTO_SRC_PORT, &[0x0f, 0xa0]);
                    ports.bytes(CTA_PROTO_DST_PORT, &[0, 80])
                })
                .into_bytes()
        };
        let read = Tuple { source: end("192.0.2.1:4000"), destination: end("192.0.2.2:80"), udp: false };
        assert_eq!(tuple(&body(TCP)), Some(read));
        assert_eq!(tuple(&body(UDP)), Some(Tuple { udp: true, ..read }));
        assert_eq!(tuple(&body(1)), None);
        assert_eq!(tuple(&[]), None);
    }
}
