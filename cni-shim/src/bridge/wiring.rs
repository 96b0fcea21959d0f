//! Bridge, veth and pod's interface: what is said to the kernel, and what it says of them.
//!
//! Each request's name is the `ip` or `bridge` command that would do the same.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;

use fabric_core::model::{IfName, MacAddr};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage, State,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};

use super::conf::Route;
use crate::netlink::{Netlink, Refused, Request};

/// A link as the kernel shows it.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Its number in its namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address; none for a bridge that has neither ports nor an address of its own.
    pub mac: Option<MacAddr>,
    /// Set up by somebody.
    pub up: bool,
    /// Sees all frames.
    pub promiscuous: bool,
    /// It carries frames: set up, attached, and known to the bridge as such.
    pub operational: bool,
    /// It is a bridge.
    pub is_bridge: bool,
    /// It is one end of a veth.
    pub is_veth: bool,
    /// The bridge that it is a port of.
    pub controller: Option<u32>,
}

/// `ip link show NAME`.
pub fn link(netlink: &mut Netlink, name: &IfName) -> Result<Option<Link>, Refused> {
    let mut message = named(name);
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let shown = netlink.get(&Request::new(format!("ip link show {name}"), &Rtnl::GetLink(message), 0))?;
    Ok(shown.and_then(decode_link))
}

/// `ip link show`.
pub fn links(netlink: &mut Netlink) -> Result<Vec<Link>, Refused> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let shown = netlink.dump(&Request::new("ip link show", &Rtnl::GetLink(message), 0))?;
    Ok(shown.into_iter().filter_map(decode_link).collect())
}

fn decode_link(message: Rtnl) -> Option<Link> {
    let Rtnl::NewLink(message) = message else { return None };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        up: flags.contains(LinkFlags::Up),
        promiscuous: flags.contains(LinkFlags::Promisc),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::Address(mac) => link.mac = <[u8; 6]>::try_from(mac).ok().and_then(|mac| mac.try_into().ok()),
            LinkAttribute::Controller(index) => link.controller = Some(index),
            LinkAttribute::OperState(state) => link.operational = state == State::Up,
            LinkAttribute::LinkInfo(infos) => {
                link.is_bridge |= infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                link.is_veth |= infos.contains(&LinkInfo::Kind(InfoKind::Veth));
            }
            _ => {}
        }
    }
    Some(link)
}

fn named(name: &IfName) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    message
}

fn set_up(message: &mut LinkMessage) {
    message.header.flags |= LinkFlags::Up;
    message.header.change_mask |= LinkFlags::Up;
}

fn mtu_of(mtu: u32) -> (Option<LinkAttribute>, String) {
    if mtu == 0 { (None, String::new()) } else { (Some(LinkAttribute::Mtu(mtu)), format!(" mtu {mtu}")) }
}

/// `ip link add NAME address MAC mtu MTU up type bridge`. With an address of its own it keeps it whatever its ports
/// are; otherwise it takes the lowest of theirs, and changes when that pod goes.
pub fn add_bridge(name: &IfName, mac: MacAddr, mtu: u32) -> Request {
    let (mtu, words) = mtu_of(mtu);
    let mut message = named(name);
    set_up(&mut message);
    message.attributes.push(LinkAttribute::Address(mac.octets().to_vec()));
    message.attributes.extend(mtu);
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
    let command = format!("ip link add {name} address {mac}{words} up type bridge");
    Request::new(command, &Rtnl::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip link set NAME up [promisc on]`.
pub fn raise(index: u32, name: &IfName, promiscuous: bool) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    set_up(&mut message);
    if promiscuous {
        message.header.flags |= LinkFlags::Promisc;
        message.header.change_mask |= LinkFlags::Promisc;
    }
    let command = format!("ip link set {name} up{}", if promiscuous { " promisc on" } else { "" });
    Request::new(command, &Rtnl::SetLink(message), 0)
}

/// The two ends of a pod's veth.
#[derive(Clone, Debug)]
pub struct Veth {
    /// The end in the host.
    pub port: IfName,
    /// Its hardware address.
    pub port_mac: MacAddr,
    /// The end in the pod.
    pub ifname: IfName,
    /// Its hardware address.
    pub mac: MacAddr,
    /// Of both ends, in bytes; 0 for the kernel's default.
    pub mtu: u32,
}

impl Veth {
    /// `ip link add PORT address MAC mtu MTU master BRIDGE up type veth peer name IFNAME address MAC netns NETNS`: the
    /// whole veth, attached on both sides. The pod's end is still down: it can't be raised from here (ENOTCONN).
    pub fn add(&self, bridge: &Link, netns: &File) -> Request {
        let (mtu, words) = mtu_of(self.mtu);
        let mut peer = named(&self.ifname);
        peer.attributes.push(LinkAttribute::Address(self.mac.octets().to_vec()));
        peer.attributes.push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
        peer.attributes.extend(mtu.clone());
        let mut message = named(&self.port);
        set_up(&mut message);
        message.attributes.extend([
            LinkAttribute::Address(self.port_mac.octets().to_vec()),
            LinkAttribute::Controller(bridge.index),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ]);
        message.attributes.extend(mtu);
        let command = format!(
            "ip link add {} address {}{words} master {} up type veth peer name {} address {}{words} netns ...",
            self.port, self.port_mac, bridge.name, self.ifname, self.mac,
        );
        Request::new(command, &Rtnl::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    /// `bridge link set dev PORT hairpin on`.
    pub fn hairpin(&self) -> Request {
        let mut message = named(&self.port);
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(true)])),
        ]));
        Request::new(format!("bridge link set dev {} hairpin on", self.port), &Rtnl::NewLink(message), 0)
    }

    /// `ip link set IFNAME address MAC`, in the pod, to the address that it has: what the pod's sysctls `arp_notify`
    /// and `ndisc_notify` make of it is a gratuitous ARP and an unsolicited neighbour advertisement of each address
    /// (`inetdev_event` and `ndisc_netdev_event` on NETDEV_CHANGEADDR). So whoever knew the address's former owner
    /// learns of the new one, and no packet socket has to be opened, whose closing takes a grace period.
    pub fn announce(&self, index: u32) -> Request {
        set_mac(index, self.ifname.as_str(), self.mac)
    }
}

/// `ip link set NAME address MAC`.
pub fn set_mac(index: u32, name: &str, mac: MacAddr) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::Address(mac.octets().to_vec()));
    Request::new(format!("ip link set {name} address {mac}"), &Rtnl::SetLink(message), 0)
}

/// `ip link del NAME`; with one end of a veth goes the other.
pub fn delete(name: &IfName) -> Request {
    Request::new(format!("ip link del {name}"), &Rtnl::DelLink(named(name)), 0)
}

/// `ip address show dev NAME scope global`.
pub fn addresses(netlink: &mut Netlink, index: u32, name: &str) -> Result<Vec<IpNetwork>, Refused> {
    let all = global_addresses(netlink, index, &format!("ip address show dev {name}"))?;
    Ok(all.into_iter().filter(|(link, _)| *link == index).map(|(_, address)| address).collect())
}

/// `ip address show scope global`, with the number of each link.
pub fn all_addresses(netlink: &mut Netlink) -> Result<Vec<(u32, IpNetwork)>, Refused> {
    global_addresses(netlink, 0, "ip address show")
}

fn global_addresses(netlink: &mut Netlink, index: u32, command: &str) -> Result<Vec<(u32, IpNetwork)>, Refused> {
    let mut message = AddressMessage::default();
    message.header.index = index;
    let shown = netlink.dump(&Request::new(command, &Rtnl::GetAddress(message), 0))?;
    let address = |message: Rtnl| match message {
        Rtnl::NewAddress(message) if message.header.scope == AddressScope::Universe => {
            // IPv4's own address is `Local`; IPv6 has only `Address`.
            let ip = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let ip = ip.or_else(|| {
                message.attributes.iter().find_map(|attribute| match attribute {
                    AddressAttribute::Address(ip) => Some(*ip),
                    _ => None,
                })
            });
            Some((message.header.index, IpNetwork::new(ip?, message.header.prefix_len).ok()?))
        }
        _ => None,
    };
    Ok(shown.into_iter().filter_map(address).collect())
}

/// `ip address add ADDRESS dev NAME [nodad]`. Whose it is was decided by the IPAM state: to ask the link would
/// leave the pod without it for a second.
pub fn add_address(index: u32, name: &str, address: IpNetwork) -> Request {
    let (message, nodad) = address_message(index, address);
    let command = format!("ip address add {address} dev {name}{nodad}");
    Request::new(command, &Rtnl::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip address del ADDRESS dev NAME`.
pub fn delete_address(index: u32, name: &str, address: IpNetwork) -> Request {
    let (message, _) = address_message(index, address);
    Request::new(format!("ip address del {address} dev {name}"), &Rtnl::DelAddress(message), 0)
}

fn address_message(index: u32, address: IpNetwork) -> (AddressMessage, &'static str) {
    let mut message = AddressMessage::default();
    message.header.family = family(address.ip());
    message.header.prefix_len = address.prefix();
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(address.ip()), AddressAttribute::Address(address.ip())];
    match address {
        IpNetwork::V4(v4) => {
            let broadcast: Ipv4Addr = v4.broadcast();
            message.attributes.push(AddressAttribute::Broadcast(broadcast));
            (message, "")
        }
        IpNetwork::V6(_) => {
            message.header.flags = AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
            (message, " nodad")
        }
    }
}

/// `ip route add DST via GATEWAY dev NAME`.
pub fn add_route(index: u32, name: &str, dst: IpNetwork, gateway: IpAddr) -> Request {
    let command = format!("ip route add {dst} via {gateway} dev {name}");
    Request::new(command, &Rtnl::NewRoute(route(index, dst, gateway)), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip route replace DST via GATEWAY dev NAME mtu MTU`: whatever takes it is no larger, the interface's MTU stays.
pub fn limit_route(index: u32, name: &str, dst: IpNetwork, gateway: IpAddr, mtu: u32) -> Request {
    let mut message = route(index, dst, gateway);
    message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    let command = format!("ip route replace {dst} via {gateway} dev {name} mtu {mtu}");
    Request::new(command, &Rtnl::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
}

fn route(index: u32, dst: IpNetwork, gateway: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: family(dst.ip()),
        destination_prefix_length: dst.prefix(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    if dst.prefix() > 0 {
        message.attributes.push(RouteAttribute::Destination(dst.network().into()));
    }
    message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    message.attributes.push(RouteAttribute::Oif(index));
    message
}

/// `ip route show dev NAME`, of both families: those with a gateway.
pub fn routes(netlink: &mut Netlink, index: u32) -> Result<Vec<Route>, Refused> {
    let mut all = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let shown = netlink.dump(&Request::new("ip route show", &Rtnl::GetRoute(message), 0))?;
        all.extend(shown.into_iter().filter_map(|message| decode_route(message, index)));
    }
    Ok(all)
}

fn decode_route(message: Rtnl, index: u32) -> Option<Route> {
    use netlink_packet_route::route::RouteAddress;
    let Rtnl::NewRoute(message) = message else { return None };
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    };
    let (mut dst, mut gw, mut oif) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => dst = ip(address),
            RouteAttribute::Gateway(address) => gw = ip(address),
            RouteAttribute::Oif(index) => oif = Some(*index),
            _ => {}
        }
    }
    let any = if message.header.address_family == AddressFamily::Inet {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    } else {
        IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
    };
    let dst = IpNetwork::new(dst.unwrap_or(any), message.header.destination_prefix_length).ok()?;
    (oif == Some(index)).then_some(Route { dst, gw })
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
