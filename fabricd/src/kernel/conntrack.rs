//! Connections that the kernel tracks (ctnetlink): listed, deleted, and marked. Each function gives the command of
//! `conntrack` that would do the same.
//!
//! A listing is streamed: of a table of a million nothing is kept but what the caller keeps. The kernel sifts by family, and
//! since 5.8 by protocol and addresses; older ones send all, and what doesn't fit is passed over here. IPv6 addresses it is
//! not asked to sift: Linux 6.18 sends those that do *not* fit (`ctnetlink_filter_match_tuple` returns 0 where
//! `ipv6_addr_cmp` finds them equal).

use std::net::IpAddr;

use fabric_core::model::Family;
use fabric_netlink::{Frame, Refusal, Request, RequestSocket};
use netlink_packet_core::NLM_F_ACK;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::KernelError;
use super::nft::{Attributes, Nfnetlink as _, Values};

/// `NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_*`: a new entry or a changed one, a listing, one that goes.
const SUBSYSTEM: u16 = 1 << 8;
const CHANGE: u16 = SUBSYSTEM;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;

/// `CTA_TUPLE_ORIG` and its like.
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const MARK: u16 = 8;
const ID: u16 = 12;
const ZONE: u16 = 18;
const MARK_MASK: u16 = 21;
const LABELS: u16 = 22;
const LABELS_MASK: u16 = 23;
const FILTER: u16 = 25;

/// `CTA_FILTER_F_CTA_*`: which parts of a tuple have to fit.
const IP_SOURCE: u32 = 1 << 0;
const IP_TARGET: u32 = 1 << 1;
const PROTOCOL: u32 = 1 << 3;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Bytes of the labels of a connection.
const LABEL_BYTES: usize = 16;

const MODULE: &str = "does the kernel have ctnetlink? Load it with: modprobe nf_conntrack_netlink";
const NO_LABELS: &str =
    "the connection began before any rule sets a label, and has no room for one; mark it by ct mark instead";

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tuple {
    /// Where packets of this direction come from.
    pub source: IpAddr,
    /// Where they go to.
    pub target: IpAddr,
    /// Protocol over IP (`IPPROTO_*`).
    pub protocol: u8,
    /// Source port; of ICMP the id.
    pub source_port: u16,
    /// Destination port; of ICMP type and code, a byte each.
    pub target_port: u16,
}

/// A connection that the kernel tracks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// As its first packet went, before any translation.
    pub original: Tuple,
    /// As the answers go, before they are translated back. Where a Service was reached its source is the backend.
    pub reply: Tuple,
    /// Its zone; 0 unless somebody sets one.
    pub zone: u16,
    /// What it has been through (`IPS_*`, [`fabric_core::state::nft::ct_status`]).
    pub status: u32,
    /// Its mark.
    pub mark: u32,
    /// Its labels; `None` when it has no room for any.
    pub labels: Option<[u8; LABEL_BYTES]>,
    /// What tells it from one of the same tuple that comes after it, as long as the kernel puts that elsewhere in its memory.
    pub id: u32,
}

/// Which connections are listed: those for which all of this holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of this family.
    pub family: Option<Family>,
    /// Of this protocol.
    pub protocol: Option<u8>,
    /// From this address.
    pub original_source: Option<IpAddr>,
    /// To this address, before translation.
    pub original_target: Option<IpAddr>,
    /// Answered by this address.
    pub reply_source: Option<IpAddr>,
    /// In this zone.
    pub zone: Option<u16>,
}

/// What happens to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is forgotten: what comes next begins anew.
    Delete,
    /// These bits of its mark become so.
    Mark {
        /// Bits that change.
        mask: u32,
        /// What they are then.
        value: u32,
    },
    /// It gets this label (0 to 127), or loses it.
    Label {
        /// The label's number.
        bit: u8,
        /// Whether it has it then.
        on: bool,
    },
}

impl Filter {
    /// The family that all that it asks for is of.
    fn family(&self) -> Option<Family> {
        let addresses = [self.original_source, self.original_target, self.reply_source];
        self.family.or_else(|| addresses.into_iter().flatten().next().map(Family::of))
    }

    /// Whether a connection is one of these.
    #[must_use]
    pub fn covers(&self, connection: &Connection) -> bool {
        let Connection { original, reply, .. } = connection;
        let is = |wanted: Option<IpAddr>, ip: IpAddr| wanted.is_none_or(|wanted| wanted == ip);
        self.family.is_none_or(|family| Family::of(original.source) == family)
            && self.protocol.is_none_or(|protocol| protocol == original.protocol)
            && is(self.original_source, original.source)
            && is(self.original_target, original.target)
            && is(self.reply_source, reply.source)
            && self.zone.is_none_or(|zone| zone == connection.zone)
    }

    /// The listing, as far as the kernel sifts.
    fn request(&self) -> Request {
        let family = self.family();
        let mut body = Attributes::message(nfproto(family), 0);
        // Which parts count the kernel wants to know for both directions; it takes no filter without a family.
        let parts = |source: Option<IpAddr>, target: Option<IpAddr>, protocol: Option<u8>| {
            let flags = [(source.is_some(), IP_SOURCE), (target.is_some(), IP_TARGET), (protocol.is_some(), PROTOCOL)];
            flags.into_iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag)
        };
        let of_v4 = |ip: Option<IpAddr>| ip.filter(IpAddr::is_ipv4);
        let [source, target] = [of_v4(self.original_source), of_v4(self.original_target)];
        let answers = of_v4(self.reply_source);
        let original = parts(source, target, self.protocol);
        let reply = parts(answers, None, None);
        if family.is_some() && (original, reply) != (0, 0) {
            // CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS: in this machine's byte order.
            body = body.nested(FILTER, |flags| flags.bytes(1, &original.to_ne_bytes()).bytes(2, &reply.to_ne_bytes()));
            if original != 0 {
                body = put_tuple(body, ORIGINAL, source, target, self.protocol, None);
            }
            if reply != 0 {
                body = put_tuple(body, REPLY, answers, None, None, None);
            }
        }
        Request::raw(GET, 0, body.into_bytes())
    }
}

/// The kernel's table of connections, in the network namespace of the thread that opened it.
pub struct Connections {
    socket: RequestSocket,
}

impl Connections {
    /// Opens it.
    ///
    /// # Errors
    /// When there is no netlink socket to be had.
    pub fn open() -> Result<Self, KernelError> {
        let failed = |source| KernelError::Dump { table: "connections", source };
        RequestSocket::open(NETLINK_NETFILTER).map(|socket| Self { socket }).map_err(failed)
    }

    /// `conntrack -L`: shows each connection of a kind to `visit`. One that begins or ends meanwhile may be seen or not.
    ///
    /// # Errors
    /// When the table can't be read.
    pub fn each(&mut self, filter: &Filter, mut visit: impl FnMut(&Connection)) -> Result<(), KernelError> {
        let shown = self.socket.dump(&filter.request(), |frame| {
            connection(frame).iter().filter(|connection| filter.covers(connection)).for_each(&mut visit);
            None::<()>
        });
        shown.map(drop).map_err(|error| refused("conntrack -L".to_owned(), error.into()))
    }

    /// `conntrack -D`, `conntrack -U --mark VALUE/MASK`, `conntrack -U --label-add LABEL`: one result for each, in their
    /// order. False for a connection that is gone: there is nothing left to do.
    pub fn change(&mut self, changes: &[(Connection, Change)]) -> Vec<Result<bool, KernelError>> {
        let requests: Vec<Request> = changes.iter().map(|(connection, change)| request(connection, *change)).collect();
        let answers = self.socket.write(&requests);
        let result = |((connection, change), answer): (&(Connection, Change), Result<(), Refusal>)| match answer {
            Ok(()) => Ok(true),
            Err(refusal) if refusal.error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(refusal) => Err(refused(line(connection, *change), refusal)),
        };
        changes.iter().zip(answers).map(result).collect()
    }
}

/// The step as `conntrack` has it.
fn line(connection: &Connection, change: Change) -> String {
    let Tuple { source, target, protocol, source_port, target_port } = connection.original;
    let which = format!("-s {source} -d {target} -p {protocol} --sport {source_port} --dport {target_port}");
    match change {
        Change::Delete => format!("conntrack -D {which}"),
        Change::Mark { mask, value } => format!("conntrack -U {which} --mark {value:#x}/{mask:#x}"),
        Change::Label { bit, on: true } => format!("conntrack -U {which} --label-add {bit}"),
        Change::Label { bit, on: false } => format!("conntrack -U {which} --label-del {bit}"),
    }
}

fn refused(op: String, refusal: Refusal) -> KernelError {
    let advice = match refusal.error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::EPROTONOSUPPORT) => MODULE,
        Some(libc::ENOSPC) => NO_LABELS,
        _ => super::refusal::general(&refusal.error),
    };
    let words = [refusal.words, Some(advice.to_owned())];
    KernelError::Refused {
        op,
        detail: words.into_iter().flatten().collect::<Vec<_>>().join("; "),
        source: refusal.error,
    }
}

/// A change names the whole tuple: without one the kernel would take all connections for meant.
fn request(connection: &Connection, change: Change) -> Request {
    let Tuple { source, target, protocol, source_port, target_port } = connection.original;
    let start = Attributes::message(nfproto(Some(Family::of(source))), 0);
    let ports = Some((source_port, target_port));
    let body = put_tuple(start, ORIGINAL, Some(source), Some(target), Some(protocol), ports);
    let zone = (connection.zone != 0).then_some(connection.zone);
    let body = body.maybe(zone, |body, zone| body.bytes(ZONE, &zone.to_be_bytes()));
    match change {
        Change::Delete => Request::raw(DELETE, NLM_F_ACK, body.number(ID, connection.id).into_bytes()),
        Change::Mark { mask, value } => {
            Request::raw(CHANGE, NLM_F_ACK, body.number(MARK, value & mask).number(MARK_MASK, mask).into_bytes())
        }
        Change::Label { bit, on } => {
            let label = label(bit);
            let value = if on { label } else { [0; LABEL_BYTES] };
            Request::raw(CHANGE, NLM_F_ACK, body.bytes(LABELS, &value).bytes(LABELS_MASK, &label).into_bytes())
        }
    }
}

/// A label's bit among all, as [`fabric_core::state::nft::Step::SetCtLabel`] sets it: in words of this machine.
fn label(bit: u8) -> [u8; LABEL_BYTES] {
    let mut labels = [0; LABEL_BYTES];
    let word = usize::from(bit / 32 % 4) * 4;
    labels[word..word + 4].copy_from_slice(&(1_u32 << (bit % 32)).to_ne_bytes());
    labels
}

impl Connection {
    /// Whether it has a label (0 to 127).
    #[must_use]
    pub fn has_label(&self, bit: u8) -> bool {
        self.labels.is_some_and(|labels| labels.iter().zip(label(bit)).any(|(had, wanted)| had & wanted != 0))
    }
}

/// `NFPROTO_UNSPEC`, `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const fn nfproto(family: Option<Family>) -> u8 {
    match family {
        None => 0,
        Some(Family::V4) => 2,
        Some(Family::V6) => 10,
    }
}

/// Adds a tuple, or what of it has to fit.
fn put_tuple(
    to: Attributes,
    direction: u16,
    source: Option<IpAddr>,
    target: Option<IpAddr>,
    protocol: Option<u8>,
    ports: Option<(u16, u16)>,
) -> Attributes {
    let ip = |list: Attributes, ip: IpAddr, v4: u16| match ip {
        IpAddr::V4(ip) => list.bytes(v4, &ip.octets()),
        IpAddr::V6(ip) => list.bytes(v4 + 2, &ip.octets()),
    };
    let has_address = source.or(target);
    to.nested(direction, |tuple| {
        // CTA_TUPLE_IP: CTA_IP_V4_SRC, _DST, CTA_IP_V6_SRC, _DST
        let tuple = tuple.maybe(has_address, |tuple, _| {
            tuple.nested(1, |list| {
                list.maybe(source, |list, source| ip(list, source, 1)).maybe(target, |list, target| ip(list, target, 2))
            })
        });
        // CTA_TUPLE_PROTO: CTA_PROTO_NUM, and behind it what the protocol has.
        tuple.maybe(protocol, |tuple, protocol| {
            tuple.nested(2, |list| {
                list.bytes(1, &[protocol])
                    .maybe(ports, |list, (first, second)| put_ports(list, protocol, first, second))
            })
        })
    })
}

/// `CTA_PROTO_SRC_PORT`, `_DST_PORT`; `CTA_PROTO_ICMP_ID`, `_TYPE`, `_CODE`; the same for ICMPv6.
fn put_ports(to: Attributes, protocol: u8, first: u16, second: u16) -> Attributes {
    let [kind, code] = second.to_be_bytes();
    match protocol {
        ICMP => to.bytes(4, &first.to_be_bytes()).bytes(5, &[kind]).bytes(6, &[code]),
        ICMPV6 => to.bytes(7, &first.to_be_bytes()).bytes(8, &[kind]).bytes(9, &[code]),
        _ => to.bytes(2, &first.to_be_bytes()).bytes(3, &second.to_be_bytes()),
    }
}

fn connection(frame: &Frame<'_>) -> Option<Connection> {
    let values = Values::of(frame);
    let [original, reply] = [ORIGINAL, REPLY].map(|direction| tuple(&values.nested(direction)?));
    Some(Connection {
        original: original?,
        reply: reply?,
        zone: values.bytes(ZONE).and_then(port).unwrap_or(0),
        status: values.number(STATUS).unwrap_or(0),
        mark: values.number(MARK).unwrap_or(0),
        labels: values.bytes(LABELS).and_then(|labels| labels.try_into().ok()),
        id: values.number(ID)?,
    })
}

fn tuple(values: &Values<'_>) -> Option<Tuple> {
    let (addresses, protocol) = (values.nested(1)?, values.nested(2)?);
    let address = |v4: u16| {
        let of_v4 = addresses.bytes(v4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()).map(IpAddr::from);
        of_v4.or_else(|| addresses.bytes(v4 + 2).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok()).map(IpAddr::from))
    };
    let number = *protocol.bytes(1)?.first()?;
    let of_port = |attribute: u16| protocol.bytes(attribute).and_then(port).unwrap_or(0);
    let byte = |attribute: u16| protocol.bytes(attribute).and_then(|bytes| bytes.first().copied()).unwrap_or(0);
    let icmp = |id: u16| (of_port(id), u16::from_be_bytes([byte(id + 1), byte(id + 2)]));
    let (source_port, target_port) = match number {
        ICMP => icmp(4),
        ICMPV6 => icmp(7),
        _ => (of_port(2), of_port(3)),
    };
    Some(Tuple { source: address(1)?, target: address(2)?, protocol: number, source_port, target_port })
}

fn port(bytes: &[u8]) -> Option<u16> {
    bytes.try_into().ok().map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(source: &str, target: &str, protocol: u8) -> Tuple {
        let [source, target] = [source, target].map(|ip| ip.parse().expect("an address"));
        Tuple { source, target, protocol, source_port: 40_000, target_port: 0x0800 }
    }

    fn connections() -> Vec<Connection> {
        let connection =
            |original: Tuple, reply, id| Connection { original, reply, zone: 0, status: 8, mark: 0, labels: None, id };
        vec![
            connection(tuple("198.51.100.2", "203.0.113.1", 17), tuple("10.64.1.2", "198.51.100.2", 17), 1),
            connection(tuple("2001:db8::2", "2001:db8::3", ICMPV6), tuple("2001:db8::3", "2001:db8::2", ICMPV6), 2),
            connection(tuple("198.51.100.2", "10.64.1.2", ICMP), tuple("10.64.1.2", "198.51.100.2", ICMP), 3),
        ]
    }

    #[test]
    fn filters_take_what_all_of_their_parts_fit() {
        let all = connections();
        let fit = |filter: Filter| all.iter().filter(|one| filter.covers(one)).map(|one| one.id).collect::<Vec<_>>();
        let ip = |text: &str| text.parse().ok();
        assert_eq!(fit(Filter::default()), [1, 2, 3]);
        assert_eq!(fit(Filter { family: Some(Family::V6), ..Filter::default() }), [2]);
        assert_eq!(fit(Filter { protocol: Some(17), ..Filter::default() }), [1]);
        assert_eq!(fit(Filter { reply_source: ip("10.64.1.2"), ..Filter::default() }), [1, 3]);
        let both = Filter { reply_source: ip("10.64.1.2"), original_target: ip("203.0.113.1"), ..Filter::default() };
        assert_eq!(fit(both), [1]);
        assert!(fit(Filter { zone: Some(7), ..Filter::default() }).is_empty());
    }

    #[test]
    fn every_change_names_its_connection_whole() {
        for connection in connections() {
            for change in [Change::Delete, Change::Mark { mask: 1, value: 1 }, Change::Label { bit: 0, on: true }] {
                let mut datagram = vec![];
                request(&connection, change).put(1, 0, &mut datagram);
                let frame = fabric_netlink::frames(&datagram).next().expect("one message");
                let named = Values::of(&frame).nested(ORIGINAL).and_then(|values| super::tuple(&values));
                assert_eq!(named, Some(connection.original), "{change:?}");
            }
        }
    }

    #[test]
    fn labels_are_single_bits() {
        let bits = |bit| label(bit).iter().map(|byte| byte.count_ones()).sum::<u32>();
        assert!((0..128).all(|bit| bits(bit) == 1));
        let different: std::collections::BTreeSet<[u8; LABEL_BYTES]> = (0..128).map(label).collect();
        assert_eq!(different.len(), 128);
    }
}
