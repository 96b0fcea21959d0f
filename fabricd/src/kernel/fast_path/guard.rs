//! The NAT guard: which ports of pods have connections that this node's connection tracking translates, and which flows it
//! tracks already when a pod becomes fast.
//!
//! Programs mark a pod's port when it talks to anything that is no pod. Marks have two generations, and both are asked.
//! Programs write to the current one, we to the other: so each has one writer. To forget, the other is filled with what
//! connection tracking has now, and becomes the current one; what was marked until then lives for one more turn.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use fabric_bpf::abi;
use fabric_core::state::fast_path::{LocalVtep, PodSlot};
use fabric_ebpf::Map;

use super::maps::Maps;
use crate::kernel::KernelError;
use crate::kernel::conntrack::{Connection, Connections, Filter, Tuple};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Marks what is translated of the connections of pods with these addresses, and notes those that are tracked as they are:
/// these stay on the kernel's path to their end. One that is idle meanwhile would be noted by no packet; it would go on fast,
/// and be called invalid when the fast path is switched off again.
pub(super) fn seed(maps: &Maps, addresses: &BTreeMap<IpAddr, PodSlot>, node: &LocalVtep) -> io::Result<()> {
    let (_, other) = maps.generations()?;
    let (mut translated, mut flows) = (vec![], vec![]);
    each(|connection| match is_translated(connection) {
        true => translated.push(*connection),
        false => flows.extend(tracked(connection, addresses, node)),
    })?;
    // Those that begin now have their first packet noted by programs.
    flows.iter().try_for_each(|(slot, flow)| maps.set_slow_flow(*slot, flow))?;
    marks(&translated, addresses).into_iter().try_for_each(|(word, bits)| {
        let had = other.get(&word.to_ne_bytes())?.map_or(0, |bytes| bits_in(&bytes));
        other.set(&word.to_ne_bytes(), &(had | bits).to_ne_bytes())
    })
}

/// The flows of a connection that is tracked and not translated, as the pods at its ends send them.
fn tracked(
    connection: &Connection,
    addresses: &BTreeMap<IpAddr, PodSlot>,
    node: &LocalVtep,
) -> Vec<(PodSlot, abi::Flow)> {
    let Connection { original, reply, .. } = connection;
    let of = |tuple: &Tuple| {
        let slot = *addresses.get(&tuple.source).filter(|_| node.has(tuple.target))?;
        let flow = abi::Flow {
            source: abi_address(tuple.source),
            destination: abi_address(tuple.target),
            source_port: tuple.source_port.to_be_bytes(),
            destination_port: tuple.target_port.to_be_bytes(),
            protocol: tuple.protocol,
            reserved: [0; 3],
        };
        matches!(tuple.protocol, TCP | UDP).then_some((slot, flow))
    };
    [original, reply].into_iter().filter_map(of).collect()
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

/// An address as flows have it: of IPv4 mapped to IPv6.
fn abi_address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn bits_in(bytes: &[u8]) -> u64 {
    bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default()
}

/// The words for these connections. A pod that opened one is marked by the port that it sends from, and by the one that
/// answers come to: that is another where two of its connections would have looked the same to the other end. A pod that
/// another host was led to is marked by the port that it answers from.
fn marks(translated: &[Connection], addresses: &BTreeMap<IpAddr, PodSlot>) -> BTreeMap<u32, u64> {
    let mut marks: BTreeMap<u32, u64> = BTreeMap::new();
    for Connection { original, reply, .. } in translated {
        let end = |(ip, port): (IpAddr, u16)| addresses.get(&ip).map(|slot| (slot.0, port));
        let client = [(original.source, original.source_port), (reply.target, reply.target_port)].map(end);
        // Where client and server are both here, the client's port is enough.
        let server = if client[0].is_some() { None } else { end((reply.source, reply.source_port)) };
        for (slot, port) in client.into_iter().chain([server]).flatten() {
            let (word, bit) = abi::nat_bit(slot, original.protocol == UDP, port);
            *marks.entry(word).or_default() |= bit;
        }
    }
    marks
}

/// The connections that are translated.
fn translated() -> io::Result<Vec<Connection>> {
    let mut found = vec![];
    each(|connection| found.extend(Some(*connection).filter(is_translated)))?;
    Ok(found)
}

/// Shows each connection.
fn each(mut see: impl FnMut(&Connection)) -> io::Result<()> {
    let filter = Filter::default();
    let listed =
        Connections::open().and_then(|mut connections| connections.each(&filter, |connection| see(connection)));
    match listed {
        Ok(()) => Ok(()),
        // No netfilter at all, or no connection tracking.
        Err(error) if matches!(error.errno(), Some(libc::EPROTONOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP)) => Ok(()),
        Err(KernelError::Refused { source, .. } | KernelError::Dump { source, .. }) => Err(source),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// Its answers don't go back the way that the first packet came.
fn is_translated(connection: &Connection) -> bool {
    let Connection { original, reply, .. } = connection;
    matches!(original.protocol, TCP | UDP)
        && (original.source, original.source_port, original.target, original.target_port)
            != (reply.target, reply.target_port, reply.source, reply.source_port)
}

#[cfg(test)]
mod tests {
    use fabric_core::model::PerFamily;
    use fabric_core::state::fast_path::End;

    use super::*;

    fn end(text: &str) -> (IpAddr, u16) {
        let (ip, port) = text.rsplit_once(':').expect("an address and a port");
        (ip.trim_matches(['[', ']']).parse().expect("an address"), port.parse().expect("a port"))
    }

    /// `A:1 > B:2, B:2 > A:1`: the first packet, and the answer to it.
    fn pair(text: &str, udp: bool) -> Connection {
        let mut tuples = text.split(", ").map(|tuple| {
            let (source, target) = tuple.split_once(" > ").expect("two ends");
            let ((source, source_port), (target, target_port)) = (end(source), end(target));
            Tuple { source, target, protocol: if udp { UDP } else { TCP }, source_port, target_port }
        });
        let (original, reply) = (tuples.next().expect("the first"), tuples.next().expect("the second"));
        Connection { original, reply, zone: 0, status: 0, mark: 0, labels: None, id: 0 }
    }

    #[test]
    fn translated_connections_mark_the_port_of_the_pod() {
        let addresses = [("10.64.1.5", 1), ("10.64.1.6", 2), ("2001:db8:1:1::5", 3)]
            .map(|(ip, slot)| (ip.parse().expect("valid"), PodSlot(slot)));
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
        // IPv6, masqueraded.
        let (client, reply) = ("[2001:db8:1:1::5]:4000", "[2001:db8:ff::9]:53 > [2001:db8:ff::1]:61000");
        assert_eq!(marked(&format!("{client} > [2001:db8:ff::9]:53, {reply}"), true), bit(3, true, 4000));
        // Nobody's here.
        assert_eq!(marked("10.64.3.5:4000 > 203.0.113.1:80, 10.64.4.6:8080 > 10.64.3.5:4000", false), BTreeMap::new());
        assert!(!is_translated(&pair("10.64.1.5:4000 > 10.64.2.9:80, 10.64.2.9:80 > 10.64.1.5:4000", false)));
        let mut icmp = pair("10.64.1.5:7 > 198.51.100.9:0, 198.51.100.9:0 > 192.0.2.1:7", false);
        icmp.original.protocol = 1;
        assert!(!is_translated(&icmp), "it has no ports");
    }

    #[test]
    fn connections_that_are_tracked_are_noted_as_each_pod_of_this_node_sends_them() {
        let addresses = [("10.64.1.5", 1), ("10.64.1.6", 2), ("2001:db8:1:1::5", 3)]
            .map(|(ip, slot)| (ip.parse().expect("valid"), PodSlot(slot)));
        let addresses = addresses.into();
        let end = |network: &str, local: &str| End {
            vtep_mac: "02:42:c0:00:02:01".parse().expect("valid"),
            local: local.parse().expect("valid"),
            network: network.parse().expect("valid"),
            subnet: network.parse().expect("valid"),
        };
        let ends = PerFamily {
            v4: Some(end("10.64.0.0/12", "192.0.2.1")),
            v6: Some(end("2001:db8:1::/48", "2001:db8:ff::1")),
        };
        let node = LocalVtep { vni: 1_u32.try_into().expect("a VNI"), port: 8472, guard: true, ends };
        let noted = |text: &str| -> Vec<(u32, u16, u16)> {
            let port = u16::from_be_bytes;
            let flows = tracked(&pair(text, false), &addresses, &node);
            flows.iter().map(|(slot, flow)| (slot.0, port(flow.source_port), port(flow.destination_port))).collect()
        };
        assert_eq!(noted("10.64.1.5:4000 > 10.64.2.9:80, 10.64.2.9:80 > 10.64.1.5:4000"), [(1, 4000, 80)]);
        assert_eq!(noted("10.64.2.9:700 > 10.64.1.6:80, 10.64.1.6:80 > 10.64.2.9:700"), [(2, 80, 700)]);
        let of_two_here = noted("10.64.1.5:4000 > 10.64.1.6:80, 10.64.1.6:80 > 10.64.1.5:4000");
        assert_eq!(of_two_here, [(1, 4000, 80), (2, 80, 4000)]);
        assert_eq!(
            noted("10.64.1.5:4000 > 198.51.100.9:80, 198.51.100.9:80 > 10.64.1.5:4000"),
            [],
            "no pod: it is slow"
        );
        assert_eq!(noted("10.64.3.5:4000 > 10.64.2.9:80, 10.64.2.9:80 > 10.64.3.5:4000"), [], "nobody's here");
        let (pod, other) = ("[2001:db8:1:1::5]:4000", "[2001:db8:1:2::9]:80");
        assert_eq!(noted(&format!("{pod} > {other}, {other} > {pod}")), [(3, 4000, 80)]);
    }
}
