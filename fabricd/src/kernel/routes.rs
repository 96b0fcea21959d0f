//! Routes: ours, the others of the main table that could stand in our way, default routes, and the kernel's answer to
//! "how would you get there".

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::state::{Nexthop, NexthopId, ROUTE_PROTOCOL, Via};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use rtnetlink::RouteMessageBuilder;

use super::KernelError;
use super::encode::IPV6_METRIC;
use super::socket::RequestSocket;
use super::tables::{Links, reading};
use super::wire::{Frame, Request};
use crate::underlay::DefaultRoute;

/// The main table's routes of others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostRoutes {
    /// Those with the metric that ours have: two routes can't share destination and metric.
    pub(super) beside_ours: BTreeMap<Subnet, String>,
    /// Default routes.
    pub(super) defaults: Vec<DefaultRoute>,
    /// Indexes of the links that any of them leads out of.
    pub(super) devices: Vec<u32>,
}

/// `ip route show table main proto 250`, of both families: ours, whatever device they lead out of.
pub(super) fn ours(socket: &mut RequestSocket, links: &Links) -> Result<BTreeMap<Subnet, Via>, KernelError> {
    let routes = dump(socket, RouteProtocol::Other(ROUTE_PROTOCOL))?;
    Ok(routes
        .iter()
        .filter(|route| is_ours(route) && metric(route) == our_metric(route))
        .filter_map(|route| Some((destination(route)?, via(route, links))))
        .collect())
}

/// `ip route show table main`, of both families, without ours.
pub(super) fn of_others(socket: &mut RequestSocket, links: &Links) -> Result<HostRoutes, KernelError> {
    let mut found = HostRoutes::default();
    for route in dump(socket, RouteProtocol::Unspec)?.iter().filter(|route| !is_ours(route)) {
        let Some(dst) = destination(route) else { continue };
        if metric(route) == our_metric(route) && route.header.tos == 0 {
            found.beside_ours.insert(dst, words(dst, route, links));
        }
        found.devices.extend(device(route));
        if let Some(dev) = device(route).and_then(|index| links.get(&index))
            && dst.prefix_len() == 0
            && route.header.kind == RouteType::Unicast
            && !route.header.flags.contains(RouteFlags::Dead)
        {
            found.defaults.push(DefaultRoute {
                family: dst.family(),
                dev: dev.name.clone(),
                metric: metric(route),
                source: source(route),
            });
        }
    }
    found.devices.sort_unstable();
    found.devices.dedup();
    Ok(found)
}

/// `ip route get IP`: the device and source address that the kernel would use; `None` when it sees no way, whatever it
/// objects (unreachable, a blackhole, prohibited).
pub(super) fn reach(socket: &mut RequestSocket, links: &Links, ip: IpAddr) -> Option<(IfName, IpAddr)> {
    let mut question = RouteMessageBuilder::<IpAddr>::new().destination_prefix(ip, Family::of(ip).bits()).ok()?.build();
    // Strict checking takes a lookup without any of the header fields that describe a route.
    question.header = RouteHeader {
        address_family: question.header.address_family,
        destination_prefix_length: question.header.destination_prefix_length,
        ..RouteHeader::default()
    };
    let route = socket.ask(&Request::new(&Rtnl::GetRoute(question), 0), route_of).ok()??;
    Some((links.get(&device(&route)?)?.name.clone(), source(&route)?))
}

/// True for a route that has our mark: our protocol, in the main table.
pub(super) fn is_ours(route: &RouteMessage) -> bool {
    route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
}

/// True when [`HostRoutes`] would show it.
pub(super) fn is_of_interest(route: &RouteMessage) -> bool {
    in_main_table(route) && (metric(route) == our_metric(route) || route.header.destination_prefix_length == 0)
}

/// True for the table that packets of the host itself and of pods are looked up in, after `local`.
pub(super) fn in_main_table(route: &RouteMessage) -> bool {
    let wide = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    wide.unwrap_or_else(|| route.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
}

fn dump(socket: &mut RequestSocket, protocol: RouteProtocol) -> Result<Vec<RouteMessage>, KernelError> {
    let mut all = vec![];
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut filter = RouteMessage::default();
        filter.header.address_family = family;
        filter.header.table = RouteHeader::RT_TABLE_MAIN;
        filter.header.protocol = protocol;
        let rows = socket.dump(&Request::new(&Rtnl::GetRoute(filter), 0), route_of);
        match rows {
            Ok(rows) => all.extend(
                // Kernels before 4.20 don't filter for us, and one without IPv6 answers with all families.
                rows.into_iter().filter(|r| {
                    in_main_table(r)
                        && r.header.address_family == family
                        && !r.header.flags.contains(RouteFlags::Cloned)
                        && (protocol == RouteProtocol::Unspec || r.header.protocol == protocol)
                }),
            ),
            // A namespace in which no IPv4 route was ever made has no main table yet; a kernel may lack IPv6.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => {}
            Err(error) => return Err(reading("routes")(error)),
        }
    }
    Ok(all)
}

fn route_of(frame: &Frame<'_>) -> Option<RouteMessage> {
    match frame.route_message()? {
        Rtnl::NewRoute(route) => Some(route),
        _ => None,
    }
}

/// Where a route of ours leads. Only what fabricd itself would write has a shape of its own; anything beyond (a source
/// address, metrics, an encapsulation) makes it [`Via::Other`].
fn via(route: &RouteMessage, links: &Links) -> Via {
    let other = || Via::Other(destination(route).map(|dst| words(dst, route, links)).unwrap_or_default());
    let (mut gateway, mut oif, mut nexthop) = (None, None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::NhId(id) => nexthop = Some(NexthopId(*id)),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Oif(index) => oif = links.get(index),
            RouteAttribute::MultiPath(_)
            | RouteAttribute::Via(_)
            | RouteAttribute::PrefSource(_)
            | RouteAttribute::Metrics(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::Source(_) => return other(),
            _ => {}
        }
    }
    if route.header.kind != RouteType::Unicast || route.header.tos != 0 {
        return other();
    }
    let onlink = route.header.flags.contains(RouteFlags::Onlink);
    match (nexthop, gateway, oif) {
        // The kernel adds the gateway and device of the object, for readers that don't know objects.
        (Some(id), _, _) => Via::Nexthop(id),
        (None, Some(gateway), Some(dev)) => match (onlink, dev.ours.is_some()) {
            (true, true) => Via::Gateway(Nexthop { gateway, dev: dev.name.clone() }),
            (false, false) => Via::Direct(Nexthop { gateway, dev: dev.name.clone() }),
            _ => other(),
        },
        _ => other(),
    }
}

/// A route roughly as `ip route` prints it, without its protocol when that is ours.
fn words(dst: Subnet, route: &RouteMessage, links: &Links) -> String {
    let mut text = String::new();
    if route.header.kind != RouteType::Unicast {
        let _ = write!(text, "{} ", format!("{:?}", route.header.kind).to_lowercase());
    }
    if !is_ours(route) {
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
    if !is_ours(route) {
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

fn metric(route: &RouteMessage) -> u32 {
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
fn device(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

fn source(route: &RouteMessage) -> Option<IpAddr> {
    route.attributes.iter().find_map(|a| if let RouteAttribute::PrefSource(address) = a { ip(address) } else { None })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
