//! From the plan's steps to netlink messages. Each function gives the iproute2 command that would send the same.
//!
//! rtnetlink's builders make the messages; they go out through our own socket because a batch of thousands takes one
//! `send` per 64 KiB there, not one per message.

use std::net::IpAddr;

use fabric_core::diff::Change;
use fabric_core::diff::routing::Op;
use fabric_core::model::{Family, IfName, MacAddr, Subnet};
use fabric_core::state::{ROUTE_PROTOCOL, Via, VxlanLink};
use fabric_netlink::Request;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::InfoKind;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use rtnetlink::{AddressMessageBuilder, LinkMessageBuilder, LinkUnspec, LinkVxlan, RouteMessageBuilder};

use super::nexthop;

/// Metric that the kernel gives an IPv6 route that names none (`IP6_RT_PRIO_USER`). IPv4's is 0.
pub(in crate::kernel) const IPV6_METRIC: u32 = 1024;

/// A device that an op names, as the kernel has it at this moment.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Device {
    pub(in crate::kernel) index: u32,
    pub(in crate::kernel) ours: bool,
}

const FAMILIES: Unsendable = Unsendable::Senseless("the gateway has another address family than the route");

/// Why a step makes no message.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Unsendable {
    /// The device isn't there.
    NoDevice,
    /// The step asks for what can't be.
    Senseless(&'static str),
}

/// The messages of one step, in their order; none when a deletion's device is gone, which took all along.
///
/// # Errors
/// When the step names a device that isn't there, or makes no sense.
pub(in crate::kernel) fn encode(
    op: &Op,
    device: impl Fn(&IfName) -> Option<Device>,
) -> Result<Vec<Request>, Unsendable> {
    let index = |name: &IfName| device(name).map(|device| device.index).ok_or(Unsendable::NoDevice);
    // A link under our device's name that isn't one of ours is not touched: somebody put it there a moment ago.
    let our_link = |name: &IfName| device(name).filter(|device| device.ours).map(|device| device.index);
    let requests = match op {
        Op::Sysctl(..) => Ok(vec![]),
        Op::Link(name, Change::Create(link)) => Ok(vec![create_link(name, link)]),
        Op::Link(name, Change::Replace { was, now }) => {
            our_link(name).map(|index| change_link(index, was, now)).ok_or(Unsendable::NoDevice)
        }
        Op::Link(name, Change::Delete(_)) | Op::Outgrown(name, _) => {
            Ok(our_link(name).map(delete_link).into_iter().collect())
        }
        Op::Address(dev, Change::Create(address) | Change::Replace { now: address, .. }) => {
            index(dev).map(|index| vec![set_address(index, *address)])
        }
        Op::Address(dev, Change::Delete(address)) => index(dev).map(|index| vec![delete_address(index, *address)]),
        Op::Fdb(dev, mac, change) => index(dev).map(|index| vec![fdb(index, *mac, change)]),
        Op::Neighbour(dev, ip, change) => index(dev).map(|index| vec![neighbour(index, *ip, change)]),
        Op::Nexthop(id, Change::Create(to)) => {
            index(&to.dev).map(|index| vec![nexthop::set(*id, to.gateway, index, false)])
        }
        Op::Nexthop(id, Change::Replace { now: to, .. }) => {
            index(&to.dev).map(|index| vec![nexthop::set(*id, to.gateway, index, true)])
        }
        Op::Nexthop(id, Change::Delete(_)) => Ok(vec![nexthop::delete(*id)]),
        // The kernel refuses when somebody else has a route there.
        Op::Route(dst, Change::Create(via)) => set_route(*dst, None, via, index, NLM_F_EXCL),
        Op::Route(dst, Change::Replace { was, now }) => set_route(*dst, Some(was), now, index, NLM_F_REPLACE),
        // ip route del DST ... proto 250
        Op::Route(dst, Change::Delete(via)) => {
            route(*dst, via, index).map(|route| vec![Request::new(&Rtnl::DelRoute(route), 0)])
        }
    };
    match requests {
        Err(Unsendable::NoDevice) if op.is_delete() => Ok(vec![]),
        requests => requests,
    }
}

/// `ip link add NAME address MAC mtu MTU up type vxlan id VNI dstport PORT local IP [no]learning [gbp]`.
///
/// No parent device, so that the link survives the underlay interface; everything unnamed (TTL, checksums, source
/// ports) stays at the kernel's default. The link-local IPv6 address that the kernel adds is left to it.
fn create_link(name: &IfName, link: &VxlanLink) -> Request {
    let mut vxlan =
        LinkVxlan::new(name.as_str(), link.vni.get()).address(link.mac.octets().to_vec()).mtu(link.mtu).port(link.port);
    vxlan = with_source(vxlan, link);
    if link.gbp {
        vxlan = vxlan.gbp();
    }
    if link.up {
        vxlan = vxlan.up();
    }
    Request::new(&Rtnl::NewLink(vxlan.build()), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip link set DEV address MAC mtu MTU up` and `ip link set DEV type vxlan local IP [no]learning`: apart, since the
/// vxlan driver refuses an MTU beside settings of its own.
fn change_link(index: u32, was: &VxlanLink, now: &VxlanLink) -> Vec<Request> {
    let mut requests = vec![];
    if (was.local, was.learning) != (now.local, now.learning) {
        let vxlan = LinkMessageBuilder::<LinkVxlan>::new_with_info_kind(InfoKind::Vxlan).index(index);
        requests.push(Request::new(&Rtnl::NewLink(with_source(vxlan, now).build()), 0));
    }
    if (was.mac, was.mtu, was.up) != (now.mac, now.mtu, now.up) {
        let mut link = LinkUnspec::new_with_index(index);
        if was.mac != now.mac {
            link = link.address(now.mac.octets().to_vec());
        }
        if was.mtu != now.mtu {
            link = link.mtu(now.mtu);
        }
        link = if now.up { link.up() } else { link.down() };
        requests.push(Request::new(&Rtnl::SetLink(link.build()), 0));
    }
    requests
}

fn with_source(vxlan: LinkMessageBuilder<LinkVxlan>, link: &VxlanLink) -> LinkMessageBuilder<LinkVxlan> {
    let vxlan = vxlan.learning(link.learning);
    match link.local {
        IpAddr::V4(local) => vxlan.local(local),
        IpAddr::V6(local) => vxlan.local6(local),
    }
}

/// `ip link del DEV`.
fn delete_link(index: u32) -> Request {
    Request::new(&Rtnl::DelLink(LinkUnspec::new_with_index(index).build()), 0)
}

/// `ip address add ADDRESS dev DEV [nodad]`. Without duplicate address detection: on an overlay nobody would answer,
/// and a tentative address can't be used.
fn set_address(index: u32, address: Subnet) -> Request {
    let mut message = address_message(index, address);
    if address.family() == Family::V6 {
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    Request::new(&Rtnl::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip address del ADDRESS dev DEV`.
fn delete_address(index: u32, address: Subnet) -> Request {
    Request::new(&Rtnl::DelAddress(address_message(index, address)), 0)
}

fn address_message(index: u32, address: Subnet) -> AddressMessage {
    match address.base() {
        IpAddr::V4(ip) => {
            AddressMessageBuilder::<std::net::Ipv4Addr>::new().address(ip, address.prefix_len()).index(index).build()
        }
        IpAddr::V6(ip) => {
            AddressMessageBuilder::<std::net::Ipv6Addr>::new().address(ip, address.prefix_len()).index(index).build()
        }
    }
}

/// `bridge fdb replace MAC dev DEV dst IP self permanent`, `bridge fdb del MAC dev DEV dst IP self`.
fn fdb(index: u32, mac: MacAddr, change: &Change<IpAddr>) -> Request {
    let (Change::Create(dst) | Change::Replace { now: dst, .. } | Change::Delete(dst)) = change;
    let mut message = neighbour_message(AddressFamily::Bridge, index, *dst);
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    neighbour_request(message, change.wanted().is_some())
}

/// `ip neighbour replace IP lladdr MAC dev DEV nud permanent`, `ip neighbour del IP dev DEV`.
fn neighbour(index: u32, ip: IpAddr, change: &Change<MacAddr>) -> Request {
    let mut message = neighbour_message(family(ip), index, ip);
    if let Some(mac) = change.wanted() {
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
    }
    neighbour_request(message, change.wanted().is_some())
}

fn neighbour_message(family: AddressFamily, index: u32, dst: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(match dst {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }));
    message
}

/// Creating replaces too: an entry that the kernel learned by itself, or somebody changed, is in the way otherwise.
fn neighbour_request(message: NeighbourMessage, wanted: bool) -> Request {
    if wanted {
        Request::new(&Rtnl::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    } else {
        Request::new(&Rtnl::DelNeighbour(message), 0)
    }
}

/// `ip route add DST ... proto 250`, or `replace`.
///
/// IPv6 refuses an on-link gateway to which its own table leads over another device (`ip6_route_check_nh_onlink`): by
/// somebody's wider route, or by the very route to be replaced, in whose subnet the gateway lies. So for that moment a
/// route for the gateway alone points to the right device; no packet to the subnet finds its route missing.
fn set_route(
    dst: Subnet,
    was: Option<&Via>,
    now: &Via,
    index: impl Fn(&IfName) -> Result<u32, Unsendable>,
    how: u16,
) -> Result<Vec<Request>, Unsendable> {
    let set = Request::new(&Rtnl::NewRoute(route(dst, now, &index)?), NLM_F_CREATE | how);
    match now {
        Via::Gateway(to) if dst.family() == Family::V6 && dst.prefix_len() < Family::V6.bits() => {
            if matches!(was, Some(Via::Gateway(was)) if was.dev == to.dev) {
                return Ok(vec![set]);
            }
            let pointer = RouteMessageBuilder::<IpAddr>::new()
                .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
                .destination_prefix(to.gateway, Family::V6.bits())
                .map_err(|_| FAMILIES)?
                .output_interface(index(&to.dev)?)
                .build();
            let point = Request::new(&Rtnl::NewRoute(pointer.clone()), NLM_F_CREATE | NLM_F_EXCL);
            Ok(vec![point, set, Request::new(&Rtnl::DelRoute(pointer), 0)])
        }
        _ => Ok(vec![set]),
    }
}

/// `DST nhid ID proto 250`, `DST via IP dev DEV onlink proto 250` or `DST via IP dev DEV proto 250`, in the main table
/// with the metric that a route without one gets.
fn route(
    dst: Subnet,
    via: &Via,
    index: impl Fn(&IfName) -> Result<u32, Unsendable>,
) -> Result<RouteMessage, Unsendable> {
    let mut route = RouteMessageBuilder::<IpAddr>::new()
        .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
        .destination_prefix(dst.base(), dst.prefix_len())
        .map_err(|_| FAMILIES)?;
    if dst.family() == Family::V6 {
        route = route.priority(IPV6_METRIC);
    }
    route = match via {
        Via::Nexthop(id) => route.nhid(id.0),
        Via::Gateway(to) => route.gateway(to.gateway).map_err(|_| FAMILIES)?.output_interface(index(&to.dev)?).onlink(),
        Via::Direct(to) => route.gateway(to.gateway).map_err(|_| FAMILIES)?.output_interface(index(&to.dev)?),
        // Found, hence to be deleted: by its destination and our protocol, whatever its shape.
        Via::Other(_) => route.kind(RouteType::Unspec).scope(RouteScope::NoWhere),
    };
    Ok(route.build())
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
