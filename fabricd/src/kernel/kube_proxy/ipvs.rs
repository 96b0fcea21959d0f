//! What kube-proxy has in IPVS mode beside its chains of iptables: the interface `kube-ipvs0` with the address of every
//! Service, virtual servers of IPVS (linux/ip_vs.h, by generic netlink), and sets of `ipset`.
//!
//! Others use IPVS too, keepalived among them. kube-proxy's virtual servers are those at addresses of its interface, and those
//! at this host's own addresses with a port of the range that NodePorts are from.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fabric_netlink::{Attributes, Frame, Request, RequestSocket};
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE};
use nix::net::if_::if_nametoindex;
use rtnetlink::LinkUnspec;

use super::names::ITS;
use crate::kernel::links::HostLinks;
use crate::kernel::nft::{Nfnetlink as _, Values};

/// The interface.
const DEVICE: &str = "kube-ipvs0";
/// `--service-node-port-range` of the API server, unless it says another one.
const NODE_PORTS: std::ops::RangeInclusive<u16> = 30_000..=32_767;

/// `GENL_ID_CTRL`, `CTRL_CMD_GETFAMILY`, `CTRL_ATTR_FAMILY_ID`, `CTRL_ATTR_FAMILY_NAME`.
const CONTROL: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// `IPVS_CMD_DEL_SERVICE`, `IPVS_CMD_GET_SERVICE`, `IPVS_CMD_ATTR_SERVICE`.
const DELETE_SERVER: u8 = 3;
const GET_SERVERS: u8 = 4;
const SERVER: u16 = 1;
/// `IPVS_SVC_ATTR_AF`, `_PROTOCOL`, `_ADDR`, `_PORT`.
const AF: u16 = 1;
const PROTOCOL: u16 = 2;
const ADDRESS: u16 = 3;
const PORT: u16 = 4;

/// `AF_INET` and `AF_INET6`, as the attribute has them.
const INET: u16 = 2;
const INET6: u16 = 10;

/// `NFNL_SUBSYS_IPSET << 8`, with `IPSET_CMD_DESTROY` and `IPSET_CMD_LIST`.
const DESTROY_SET: u16 = 6 << 8 | 3;
const LIST_SETS: u16 = 6 << 8 | 7;
/// `IPSET_ATTR_PROTOCOL`, `_SETNAME`, `_FLAGS`; the version since Linux 2.6.39, and `IPSET_FLAG_LIST_SETNAME`.
const SET_PROTOCOL: u16 = 1;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 6;
const VERSION: u8 = 6;
const NAMES_ALONE: u32 = 1 << 1;

/// A virtual server: address, protocol and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct VirtualServer {
    ip: IpAddr,
    protocol: u16,
    port: u16,
}

/// Whether kube-proxy is or was here.
pub(super) fn is_here() -> bool {
    if_nametoindex(DEVICE).is_ok()
}

/// Removes its virtual servers, its interface and its sets; says in words what there was.
///
/// # Errors
/// When it can't be read, or the kernel refuses.
pub(super) fn remove() -> io::Result<Vec<String>> {
    let mut removed = vec![];
    if is_here() {
        let links = HostLinks::ask().map_err(io::Error::other)?;
        let of = |is_its: bool| {
            let links = links.addresses.iter().filter(move |(name, _)| (name.as_str() == DEVICE) == is_its);
            links.flat_map(|(_, addresses)| addresses).map(|(ip, _)| *ip).collect::<BTreeSet<_>>()
        };
        let servers = remove_servers(&of(true), &of(false))?;
        if servers > 0 {
            removed.push(format!("{servers} virtual servers of IPVS"));
        }
        // ip link delete kube-ipvs0
        let delete = Request::new(&Rtnl::DelLink(LinkUnspec::new_with_name(DEVICE).build()), 0);
        done(&mut RequestSocket::open(NETLINK_ROUTE)?, &[delete])?;
        removed.push(format!("interface {DEVICE}"));
    }
    let sets = remove_sets()?;
    if sets > 0 {
        removed.push(format!("{sets} sets of ipset"));
    }
    Ok(removed)
}

fn done(socket: &mut RequestSocket, requests: &[Request]) -> io::Result<()> {
    socket.write(requests).into_iter().try_for_each(|result| result.map_err(|refusal| refusal.error))
}

/// How many there were; none where the kernel has no IPVS.
fn remove_servers(at: &BTreeSet<IpAddr>, host: &BTreeSet<IpAddr>) -> io::Result<usize> {
    let mut socket = RequestSocket::open(NETLINK_GENERIC)?;
    let family = Attributes::behind([GET_FAMILY, 1, 0, 0]).text(FAMILY_NAME, "IPVS");
    let family = socket.ask(&Request::raw(CONTROL, 0, family.into_bytes()), family_id);
    let Ok(Some(family)) = family else { return Ok(0) };
    let all = socket.dump(&Request::raw(family, 0, Attributes::behind([GET_SERVERS, 1, 0, 0]).into_bytes()), server)?;
    let its: Vec<Request> = all
        .into_iter()
        .filter(|server| server.is_its(at, host))
        .map(|server| Request::raw(family, 0, server.deletion().into_bytes()))
        .collect();
    done(&mut socket, &its)?;
    Ok(its.len())
}

fn family_id(frame: &Frame<'_>) -> Option<u16> {
    Values::of(frame).bytes(FAMILY_ID)?.try_into().ok().map(u16::from_ne_bytes)
}

/// A virtual server that is told of. One that is found by a mark has no address.
fn server(frame: &Frame<'_>) -> Option<VirtualServer> {
    let values = Values::of(frame).nested(SERVER)?;
    let short = |kind| values.bytes(kind).and_then(|bytes| <[u8; 2]>::try_from(bytes).ok());
    let address = values.bytes(ADDRESS)?;
    let ip = match u16::from_ne_bytes(short(AF)?) {
        INET => Ipv4Addr::from(*address.first_chunk::<4>()?).into(),
        INET6 => Ipv6Addr::from(*address.first_chunk::<16>()?).into(),
        _ => return None,
    };
    let (protocol, port) = (u16::from_ne_bytes(short(PROTOCOL)?), u16::from_be_bytes(short(PORT)?));
    Some(VirtualServer { ip, protocol, port })
}

impl VirtualServer {
    /// Whether it is kube-proxy's, whose interface has the addresses `at`, on a host with these.
    fn is_its(&self, at: &BTreeSet<IpAddr>, host: &BTreeSet<IpAddr>) -> bool {
        at.contains(&self.ip) || host.contains(&self.ip) && NODE_PORTS.contains(&self.port)
    }

    /// `ipvsadm --delete-service --tcp-service ADDRESS:PORT`.
    fn deletion(self) -> Attributes {
        // `union nf_inet_addr`
        let mut address = [0; 16];
        let family: u16 = match self.ip {
            IpAddr::V4(ip) => {
                address[..4].copy_from_slice(&ip.octets());
                INET
            }
            IpAddr::V6(ip) => {
                address = ip.octets();
                INET6
            }
        };
        Attributes::behind([DELETE_SERVER, 1, 0, 0]).nested(SERVER, |server| {
            server
                .bytes(AF, &family.to_ne_bytes())
                .bytes(PROTOCOL, &self.protocol.to_ne_bytes())
                .bytes(ADDRESS, &address)
                .bytes(PORT, &self.port.to_be_bytes())
        })
    }
}

/// How many there were; none where the kernel has no sets.
fn remove_sets() -> io::Result<usize> {
    let mut socket = RequestSocket::open(NETLINK_NETFILTER)?;
    // AF_INET, as for every command of ipset.
    let of_sets = || Attributes::message(2, 0).bytes(SET_PROTOCOL, &[VERSION]);
    // NLA_F_NET_BYTEORDER
    let names = of_sets().number(SET_FLAGS | 0x4000, NAMES_ALONE);
    let name =
        |frame: &Frame<'_>| Values::of(frame).text(SET_NAME).filter(|name| name.starts_with(ITS)).map(str::to_owned);
    let Ok(names) = socket.dump(&Request::raw(LIST_SETS, 0, names.into_bytes()), name) else { return Ok(0) };
    let destroy = |name: &String| Request::raw(DESTROY_SET, 0, of_sets().text(SET_NAME, name).into_bytes());
    done(&mut socket, &names.iter().map(destroy).collect::<Vec<_>>())?;
    Ok(names.len())
}

#[cfg(test)]
mod tests {
    use fabric_netlink::frames;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    /// Decodes a message of the kernel, which is made here as linux/ip_vs.h says: no kernel with IPVS was asked.
    fn read<T>(body: Attributes, decode: impl Fn(&Frame<'_>) -> Option<T>) -> Option<T> {
        let mut datagram = vec![];
        Request::raw(0x20, 0, body.into_bytes()).put(1, 0, &mut datagram);
        frames(&datagram).find_map(|frame| decode(&frame))
    }

    fn told(family: u16, protocol: u16, address: &[u8], port: u16) -> Attributes {
        // IPVS_CMD_NEW_SERVICE; with IPVS_SVC_ATTR_SCHED_NAME, IPVS_SVC_ATTR_FLAGS, IPVS_SVC_ATTR_TIMEOUT.
        Attributes::behind([1, 1, 0, 0]).nested(1, |server| {
            let server = server.bytes(1, &family.to_ne_bytes()).bytes(2, &protocol.to_ne_bytes());
            let server = server.bytes(3, address).bytes(4, &port.to_be_bytes());
            server.text(6, "rr").bytes(7, &[0; 8]).bytes(8, &10_800_u32.to_ne_bytes())
        })
    }

    #[test]
    fn virtual_servers_are_read_as_the_kernel_tells_of_them_and_deleted_by_the_same_members() {
        let v4 = [&[192, 0, 2, 1][..], &[0; 12]].concat();
        let Some(server) = read(told(2, 6, &v4, 80), server) else { panic!("not read") };
        assert_eq!(server, VirtualServer { ip: ip("192.0.2.1"), protocol: 6, port: 80 });
        let IpAddr::V6(v6) = ip("2001:db8::1") else { unreachable!("an address of IPv6") };
        let other = read(told(10, 17, &v6.octets(), 53), super::server);
        assert_eq!(other, Some(VirtualServer { ip: v6.into(), protocol: 17, port: 53 }));
        // The kernel reads it as it tells it.
        for server in [Some(server), other].into_iter().flatten() {
            assert_eq!(read(server.deletion(), super::server), Some(server));
            assert_eq!(server.deletion().into_bytes()[0], DELETE_SERVER);
        }
    }

    #[test]
    fn virtual_server_by_a_mark_and_what_is_cut_off_are_none() {
        let by_mark = Attributes::behind([1, 1, 0, 0]).nested(1, |to| to.bytes(1, &[2, 0]).bytes(5, &[7, 0, 0, 0]));
        assert_eq!(read(by_mark, server), None);
        assert_eq!(read(told(2, 6, &[192, 0], 80), server), None);
        assert_eq!(read(told(7, 6, &[0; 16], 80), server), None);
        assert_eq!(read(Attributes::behind([1, 1, 0, 0]), server), None);
    }

    #[test]
    fn family_has_the_number_that_the_kernel_gave_it() {
        let answer = Attributes::behind([1, 2, 0, 0]).text(2, "IPVS").bytes(1, &0x21_u16.to_ne_bytes());
        assert_eq!(read(answer, family_id), Some(0x21));
    }

    #[test]
    fn virtual_servers_of_others_stay() {
        let (at, host) = ([ip("10.96.0.10")].into(), [ip("192.0.2.11")].into());
        let is_its = |address, port| VirtualServer { ip: ip(address), protocol: 6, port }.is_its(&at, &host);
        assert!(is_its("10.96.0.10", 80) && is_its("192.0.2.11", 30_080));
        assert!(!is_its("192.0.2.11", 80), "keepalived's");
        assert!(!is_its("203.0.113.1", 30_080), "at an address that is not kube-proxy's");
    }
}
