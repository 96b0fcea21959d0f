//! Routes: ours, the others of the main table that could stand in our way, default routes, and the kernel's answer to
//! "how would you get there".

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::state::fast_path::UnderlayPath;
use fabric_core::state::{Nexthop, NexthopId, ROUTE_PROTOCOL, Via};
use fabric_netlink::{Frame, Request, RequestSocket, attributes};
use netlink_packet_core::{parse_ip, parse_u32};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::RouteMessageBuilder;

use super::encode::IPV6_METRIC;
use super::route_message;
use super::tables::{Links, reading};
use crate::kernel::KernelError;
use crate::kernel::host::DefaultRoute;

/// The main table's routes of others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::kernel) struct HostRoutes {
    /// Those with the metric that ours have: two routes can't share destination and metric.
    pub(in crate::kernel) beside_ours: BTreeMap<Subnet, String>,
    /// Of those the ones that flannel, or somebody like it, made for a peer.
    pub(in crate::kernel) plain: BTreeMap<Subnet, String>,
    /// Of those beside ours the ones that flannel's `DirectRouting` makes, with their gateways.
    pub(in crate::kernel) direct: BTreeMap<Subnet, IpAddr>,
    /// Default routes.
    pub(in crate::kernel) defaults: Vec<DefaultRoute>,
    /// Indexes of the links that any of them leads out of.
    pub(in crate::kernel) devices: Vec<u32>,
}

/// What a route with our protocol is now: where it leads, `None` when it is gone.
#[derive(Debug)]
pub(in crate::kernel) struct RouteRow {
    pub(in crate::kernel) dst: Subnet,
    pub(in crate::kernel) target: Option<RouteTarget>,
}

/// Where a route leads, as the kernel says it. Only what fabricd itself would write has a shape of its own.
#[derive(Debug)]
pub(in crate::kernel) enum RouteTarget {
    Nexthop(NexthopId),
    Gateway {
        gateway: IpAddr,
        index: u32,
        onlink: bool,
    },
    /// Anything beyond: a source address, metrics, an encapsulation.
    Strange(Box<RouteMessage>),
}

/// `ip route show table main proto 250`, of both families: ours, whatever device they lead out of.
pub(in crate::kernel) fn ours(socket: &mut RequestSocket, links: &Links) -> Result<Vec<(Subnet, Via)>, KernelError> {
    dump(socket, RouteProtocol::Other(ROUTE_PROTOCOL), |frame| our_row(frame, links))
}

fn our_row(frame: &Frame<'_>, links: &Links) -> Option<(Subnet, Via)> {
    let row = row(frame, false).filter(|_| is_ours(frame))?;
    Some((row.dst, row.target?.via(row.dst, links)))
}

/// `ip route show table main`, of both families: ours, and the others.
pub(in crate::kernel) fn all(
    socket: &mut RequestSocket,
    links: &Links,
) -> Result<(Vec<(Subnet, Via)>, HostRoutes), KernelError> {
    enum Row {
        Ours((Subnet, Via)),
        Other(Box<RouteMessage>),
    }
    // Ours, the most by far, are not read in full.
    let rows = dump(socket, RouteProtocol::Unspec, |frame| match is_ours(frame) {
        true => our_row(frame, links).map(Row::Ours),
        false => route_of(frame).map(|route| Row::Other(Box::new(route))),
    })?;
    let (mut ours, mut others) = (Vec::with_capacity(rows.len()), vec![]);
    for row in rows {
        match row {
            Row::Ours(route) => ours.push(route),
            Row::Other(route) => others.push(*route),
        }
    }
    Ok((ours, of_others(&others, links)))
}

fn of_others(routes: &[RouteMessage], links: &Links) -> HostRoutes {
    let mut found = HostRoutes::default();
    for route in routes.iter().filter(|route| in_main_table(route)) {
        let Some(dst) = destination(route) else { continue };
        if metric(route) == our_metric(route) && route.header.tos == 0 {
            let places = if is_plain(dst, route, links) { &mut found.plain } else { &mut found.beside_ours };
            places.insert(dst, words(dst, route, links));
            found.direct.extend(direct_gateway(route, links).map(|gateway| (dst, gateway)));
        }
        found.devices.extend(device(route));
        if let Some(dev) = device(route).and_then(|index| links.get(&index))
            && dst.prefix_len() == 0
            && route.header.kind == RouteType::Unicast
            && !route.header.flags.contains(RouteFlags::Dead)
        {
            found.defaults.push(DefaultRoute {
                family: dst.family(),
                dev: dev.name,
                metric: metric(route),
                source: source(route),
                gateway: gateway(route),
            });
        }
    }
    found.devices.sort_unstable();
    found.devices.dedup();
    found
}

/// Routes of the main table with the metric that ours have, whoever made them, that lead to one gateway by one device.
pub(in crate::kernel) fn to_gateways(
    socket: &mut RequestSocket,
    name_of: impl Fn(u32) -> Option<IfName>,
) -> Result<Vec<fabric_core::takeover::Route>, KernelError> {
    dump(socket, RouteProtocol::Unspec, |frame| {
        let route = route_of(frame)?;
        let ours = route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
        let gateway = if ours { gateway(&route) } else { simple_gateway(&route) };
        let (dst, dev) = (beside_ours(&route)?, name_of(device(&route)?)?);
        // Older kernels tell no gateway of a nexthop object.
        let gateway = gateway.or_else(|| ours.then(|| dst.base()))?;
        Some(fabric_core::takeover::Route { dst, gateway, dev, ours })
    })
}

/// `ip route get IP`: the device and source address that the kernel would use; `None` when it sees no way, whatever it
/// objects (unreachable, a blackhole, prohibited).
pub(in crate::kernel) fn reach(socket: &mut RequestSocket, links: &Links, ip: IpAddr) -> Option<(IfName, IpAddr)> {
    let mut question = RouteMessageBuilder::<IpAddr>::new().destination_prefix(ip, Family::of(ip).bits()).ok()?.build();
    // Strict checking takes a lookup without any of the header fields that describe a route.
    question.header = RouteHeader {
        address_family: question.header.address_family,
        destination_prefix_length: question.header.destination_prefix_length,
        ..RouteHeader::default()
    };
    let route = socket.ask(&Request::new(&Rtnl::GetRoute(question), 0), route_of).ok()??;
    Some((links.get(&device(&route)?)?.name, source(&route)?))
}

/// `ip route get IP from LOCAL`: the way there, if it leads over an interface that programs can send Ethernet by.
pub(in crate::kernel) fn path(
    socket: &mut RequestSocket,
    links: &Links,
    ip: IpAddr,
    local: Option<IpAddr>,
) -> Option<UnderlayPath> {
    let mut question = RouteMessageBuilder::<IpAddr>::new().destination_prefix(ip, Family::of(ip).bits()).ok()?;
    if let Some(local) = local {
        question = question.source_prefix(local, Family::of(local).bits()).ok()?;
    }
    let mut question = question.build();
    question.header = RouteHeader {
        address_family: question.header.address_family,
        destination_prefix_length: question.header.destination_prefix_length,
        source_prefix_length: question.header.source_prefix_length,
        ..RouteHeader::default()
    };
    let route = socket.ask(&Request::new(&Rtnl::GetRoute(question), 0), route_of).ok()??;
    let link = links.get(&device(&route)?).filter(|link| link.takes_programs())?;
    Some(UnderlayPath { ifindex: link.index, gateway: gateway(&route).unwrap_or(ip) })
}

/// `ip route get IP`, over a socket of its own: the device and source address, or `None` when there is no way.
///
/// # Errors
/// When the kernel can't be asked.
pub fn route_to(ip: IpAddr) -> Result<Option<(IfName, IpAddr)>, KernelError> {
    let socket = RequestSocket::open(NETLINK_ROUTE);
    let mut socket = socket.map_err(|error| KernelError::Disconnected(error.to_string()))?;
    let links = super::tables::links(&mut socket)?;
    Ok(reach(&mut socket, &links, ip))
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteLookup {
    /// Out of a device.
    Out {
        /// The device.
        device: IfName,
        /// The router, if there is one between.
        gateway: Option<IpAddr>,
    },
    /// To this host itself.
    Local,
    /// Nowhere.
    Refused(&'static str),
}

impl std::fmt::Display for RouteLookup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Out { device, gateway: Some(gateway) } => write!(f, "via {gateway} dev {device}"),
            Self::Out { device, gateway: None } => write!(f, "dev {device}"),
            Self::Local => f.write_str("to this node itself"),
            Self::Refused(why) => write!(f, "refused: {why}"),
        }
    }
}

/// `ip route get TO from FROM iif IIF`, over a socket of its own: what the kernel does with a packet that comes in there.
///
/// # Errors
/// When the kernel can't be asked, or has no such interface.
pub fn route_of_packet(from: IpAddr, to: IpAddr, iif: IfName) -> Result<RouteLookup, KernelError> {
    let socket = RequestSocket::open(NETLINK_ROUTE);
    let mut socket = socket.map_err(|error| KernelError::Disconnected(error.to_string()))?;
    let links = super::tables::links(&mut socket)?;
    let index = links.values().find(|link| link.name == iif).map(|link| link.index);
    let index = index.ok_or_else(|| KernelError::Disconnected(format!("there is no {iif}")))?;
    let family = Family::of(to);
    let mut question = RouteMessage::default();
    question.header.address_family = if family == Family::V4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    (question.header.destination_prefix_length, question.header.source_prefix_length) = (family.bits(), family.bits());
    question.attributes =
        vec![RouteAttribute::Destination(to.into()), RouteAttribute::Source(from.into()), RouteAttribute::Iif(index)];
    let answer = match socket.ask(&Request::new(&Rtnl::GetRoute(question), 0), route_of) {
        Err(error) => match error.raw_os_error() {
            Some(libc::EINVAL) => return Ok(RouteLookup::Refused("a blackhole")),
            Some(libc::EHOSTUNREACH) => return Ok(RouteLookup::Refused("unreachable")),
            Some(libc::EACCES) => return Ok(RouteLookup::Refused("prohibited")),
            Some(libc::ENETUNREACH) => return Ok(RouteLookup::Refused("there is no route")),
            Some(libc::EXDEV) => return Ok(RouteLookup::Refused("the reverse path filter drops it")),
            _ => return Err(reading("route for a packet")(error)),
        },
        Ok(answer) => answer,
    };
    let Some(route) = answer else { return Ok(RouteLookup::Refused("there is no route")) };
    let gateway = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Gateway(address) => ip(address),
        _ => None,
    });
    Ok(match (route.header.kind, device(&route).and_then(|index| links.get(&index))) {
        (RouteType::Local, _) => RouteLookup::Local,
        (RouteType::BlackHole, _) => RouteLookup::Refused("a blackhole"),
        (RouteType::Prohibit, _) => RouteLookup::Refused("prohibited"),
        (RouteType::Unreachable, _) => RouteLookup::Refused("unreachable"),
        (_, Some(link)) => RouteLookup::Out { device: link.name, gateway },
        (_, None) => RouteLookup::Refused("there is no route"),
    })
}

/// True for a route that has our mark: our protocol, the sixth byte of a `struct rtmsg`.
pub(in crate::kernel) fn is_ours(frame: &Frame<'_>) -> bool {
    frame.body.get(5) == Some(&ROUTE_PROTOCOL)
}

/// Reads a route with our protocol out of a dump or an event; `None` when it is in another table or has another metric
/// than ours.
///
/// By hand, since there are thousands: a `struct rtmsg` of twelve bytes (family, lengths of destination and source, TOS,
/// table, protocol, scope, type, flags) and attributes.
pub(in crate::kernel) fn row(frame: &Frame<'_>, gone: bool) -> Option<RouteRow> {
    const CLONED: u32 = 0x200;
    const ONLINK: u32 = 4;
    let (head, rest) = frame.body.split_at_checked(12)?;
    let [family, length, source_length, tos, table, _, _, kind, ..] = *head else { return None };
    let flags = parse_u32(&head[8..12]).ok()?;
    let (mut table, mut metric) = (u32::from(table), 0);
    let (mut base, mut gateway, mut index, mut nexthop) = (None, None, None, None);
    let mut strange = kind != u8::from(RouteType::Unicast) || tos != 0 || source_length != 0;
    for (kind, value) in attributes(rest) {
        match kind {
            1 => base = parse_ip(value).ok(),
            4 => index = parse_u32(value).ok(),
            5 => gateway = parse_ip(value).ok(),
            6 => metric = parse_u32(value).ok()?,
            15 => table = parse_u32(value).ok()?,
            30 => nexthop = parse_u32(value).ok().map(NexthopId),
            // Source, preferred source, metrics, several ways, a gateway of another family, encapsulations.
            2 | 7 | 8 | 9 | 18 | 21 | 22 => strange = true,
            _ => {}
        }
    }
    let (any, our_metric) = match i32::from(family) {
        libc::AF_INET => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0),
        libc::AF_INET6 => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), IPV6_METRIC),
        _ => return None,
    };
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || metric != our_metric || flags & CLONED != 0 {
        return None;
    }
    // A default route names no destination.
    let dst = Subnet::holding(base.unwrap_or(any), length).ok()?;
    let target = match (nexthop, gateway, index) {
        _ if gone => return Some(RouteRow { dst, target: None }),
        // The kernel adds the gateway and device of the object, for readers that don't know objects.
        (Some(id), _, _) if !strange => RouteTarget::Nexthop(id),
        (None, Some(gateway), Some(index)) if !strange => {
            RouteTarget::Gateway { gateway, index, onlink: flags & ONLINK != 0 }
        }
        _ => RouteTarget::Strange(Box::new(route_of(frame)?)),
    };
    Some(RouteRow { dst, target: Some(target) })
}

/// `ip route add DST via BASE dev OURS onlink`: over our own device to the first address of the destination, and nothing
/// else. Whoever made it means the peer that ours is for.
fn is_plain(dst: Subnet, route: &RouteMessage, links: &Links) -> bool {
    let over_ours = device(route).and_then(|index| links.get(&index)).is_some_and(|link| link.ours.is_some());
    over_ours && simple_gateway(route) == Some(dst.base())
}

/// The gateway of `ip route add DST via GATEWAY dev UNDERLAY`, of protocol boot as of all that names none: what flannel's
/// `DirectRouting` makes for a peer.
fn direct_gateway(route: &RouteMessage, links: &Links) -> Option<IpAddr> {
    let over_ours = device(route).and_then(|index| links.get(&index)).is_none_or(|link| link.ours.is_some());
    simple_gateway(route).filter(|_| !over_ours && route.header.protocol == RouteProtocol::Boot)
}

/// The gateway of a route that says nothing beyond it and its device.
fn simple_gateway(route: &RouteMessage) -> Option<IpAddr> {
    let simple = !route
        .attributes
        .iter()
        .any(|a| matches!(a, RouteAttribute::PrefSource(_) | RouteAttribute::MultiPath(_) | RouteAttribute::NhId(_)));
    gateway(route).filter(|_| simple && route.header.kind == RouteType::Unicast)
}

/// The destination of a route of others that would stand in the place of one of ours.
pub(in crate::kernel) fn beside_ours(route: &RouteMessage) -> Option<Subnet> {
    (in_main_table(route) && metric(route) == our_metric(route)).then(|| destination(route)).flatten()
}

/// True for a default route of the main table.
pub(in crate::kernel) fn is_default(route: &RouteMessage) -> bool {
    in_main_table(route) && route.header.destination_prefix_length == 0
}

/// True for the table that packets of the host itself and of pods are looked up in, after `local`.
fn in_main_table(route: &RouteMessage) -> bool {
    let wide = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or_else(|| route.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
        && !route.header.flags.contains(RouteFlags::Cloned)
}

/// Both families' routes, of one protocol or all. Kernels before 4.20 don't filter for us: `decode` does it again.
fn dump<T>(
    socket: &mut RequestSocket,
    protocol: RouteProtocol,
    decode: impl Fn(&Frame<'_>) -> Option<T>,
) -> Result<Vec<T>, KernelError> {
    let mut all = vec![];
    for (family, number) in [(AddressFamily::Inet, libc::AF_INET), (AddressFamily::Inet6, libc::AF_INET6)] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.header.table = RouteHeader::RT_TABLE_MAIN;
        filter.header.protocol = protocol;
        // A kernel without IPv6 answers with all families.
        let of_family = |frame: &Frame<'_>| frame.body.first().is_some_and(|first| i32::from(*first) == number);
        let decode = |frame: &Frame<'_>| if of_family(frame) { decode(frame) } else { None };
        match socket.dump(&Request::new(&Rtnl::GetRoute(filter), 0), decode) {
            Ok(mut rows) => all.append(&mut rows),
            // A namespace in which no IPv4 route was ever made has no main table yet; a kernel may lack IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => {}
            Err(error) => return Err(reading("routes")(error)),
        }
    }
    Ok(all)
}

fn route_of(frame: &Frame<'_>) -> Option<RouteMessage> {
    match route_message(frame)? {
        Rtnl::NewRoute(route) => Some(route),
        _ => None,
    }
}

impl RouteTarget {
    /// The same by the names of links.
    pub(in crate::kernel) fn via(&self, dst: Subnet, links: &Links) -> Via {
        match self {
            Self::Nexthop(id) => Via::Nexthop(*id),
            Self::Gateway { gateway, index, onlink } => {
                let to = |dev| Nexthop { gateway: *gateway, dev };
                match (links.get(index), onlink) {
                    (Some(link), true) if link.ours.is_some() => Via::Gateway(to(link.name)),
                    (Some(link), false) if link.ours.is_none() => Via::Direct(to(link.name)),
                    (Some(link), _) => Via::Other(format!("via {gateway} dev {}", link.name)),
                    (None, _) => Via::Other(format!("via {gateway} dev if{index}")),
                }
            }
            Self::Strange(route) => Via::Other(words(dst, route, links)),
        }
    }
}

/// A route roughly as `ip route` prints it, without its protocol when that is ours.
fn words(dst: Subnet, route: &RouteMessage, links: &Links) -> String {
    let mut text = String::new();
    if route.header.kind != RouteType::Unicast {
        let _ = write!(text, "{} ", format!("{:?}", route.header.kind).to_lowercase());
    }
    let ours = route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL);
    if !ours {
        let _ = write!(text, "{dst} ");
    }
    for attribute in &route.attributes {
        let _ = match attribute {
            RouteAttribute::NhId(id) => write!(text, "nhid {id} "),
            RouteAttribute::Gateway(address) => match ip(address) {
                Some(ip) => write!(text, "via {ip} "),
                None => write!(text, "via {address:?} "),
            },
            RouteAttribute::Oif(index) => match links.get(index) {
                Some(link) => write!(text, "dev {} ", link.name),
                None => write!(text, "dev if{index} "),
            },
            RouteAttribute::PrefSource(address) => {
                write!(text, "src {} ", ip(address).map_or(String::new(), |ip| ip.to_string()))
            }
            RouteAttribute::MultiPath(hops) => write!(text, "nexthops {} ", hops.len()),
            _ => Ok(()),
        };
    }
    if !ours {
        let _ = write!(text, "proto {}", format!("{:?}", route.header.protocol).to_lowercase());
    }
    text.trim_end().to_owned()
}

fn destination(route: &RouteMessage) -> Option<Subnet> {
    let base = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    // A default route names no destination.
    let any = match route.header.address_family {
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    Subnet::holding(base.unwrap_or(any), route.header.destination_prefix_length).ok()
}

pub(in crate::kernel) fn metric(route: &RouteMessage) -> u32 {
    route
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Priority(metric) = a { Some(*metric) } else { None })
        .unwrap_or(0)
}

fn our_metric(route: &RouteMessage) -> u32 {
    if route.header.address_family == AddressFamily::Inet6 { IPV6_METRIC } else { 0 }
}

/// The link that a route leads out of; of several, the first.
pub(in crate::kernel) fn device(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

/// The gateway; of several, the first.
fn gateway(route: &RouteMessage) -> Option<IpAddr> {
    let of = |attributes: &[RouteAttribute]| {
        attributes.iter().find_map(|a| if let RouteAttribute::Gateway(address) = a { ip(address) } else { None })
    };
    of(&route.attributes).or_else(|| {
        route.attributes.iter().find_map(|a| match a {
            RouteAttribute::MultiPath(hops) => of(&hops.first()?.attributes),
            _ => None,
        })
    })
}

fn source(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|a| if let RouteAttribute::PrefSource(address) = a { ip(address) } else { None })
}

pub(in crate::kernel) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
