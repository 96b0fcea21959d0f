//! The kernel's tables as rows: links, addresses, FDB, neighbours and nexthop objects, each by one dump.
//!
//! Here it is decided what of them is ours (docs/kernel-state.md). Routes are in [`super::routes`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;

use fabric_core::device;
use fabric_core::model::{Family, IfName, MacAddr, Subnet, Vni};
use fabric_core::state::{NEXTHOP_ID_BASE, Nexthop, NexthopId, ROUTE_PROTOCOL, VxlanLink};
use fabric_netlink::{Frame, Request, RequestSocket, attributes};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, Prop,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use rtnetlink::LinkUnspec;

use super::nexthop::{self, NexthopRow};
use super::route_message;
use crate::kernel::KernelError;

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kernel) struct Link {
    pub(in crate::kernel) index: u32,
    pub(in crate::kernel) name: IfName,
    pub(in crate::kernel) mtu: u32,
    pub(in crate::kernel) up: bool,
    pub(in crate::kernel) loopback: bool,
    /// Its hardware address, if it is one of Ethernet.
    pub(in crate::kernel) mac: Option<MacAddr>,
    /// The bridge (or bond) that it is a port of.
    pub(in crate::kernel) controller: Option<u32>,
    pub(in crate::kernel) kind: String,
    /// VNI, port and underlay family of a VXLAN device, whoever made it.
    pub(in crate::kernel) vxlan: Option<(u32, u16, Family)>,
    /// All of it when it is ours.
    pub(in crate::kernel) ours: Option<VxlanLink>,
}

impl Link {
    /// Whether the fast path can use it as an underlay: one end of a cable. Of a bond, a VLAN or a bridge the programs would
    /// have to be somewhere else.
    pub(in crate::kernel) fn takes_programs(&self) -> bool {
        !self.loopback && self.mac.is_some() && matches!(self.kind.as_str(), "" | "veth")
    }
}

/// An address on a link, link-local and host-local ones left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kernel) struct Address {
    pub(in crate::kernel) index: u32,
    pub(in crate::kernel) ip: IpAddr,
    pub(in crate::kernel) prefix: Subnet,
    /// Fit to be a source; `None` when it is not global or about to come.
    pub(in crate::kernel) fit: Option<Fit>,
}

/// How fit an address is to be a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Fit {
    Lasting,
    /// Deprecated, or a temporary one of IPv6 (a privacy address, replaced within a day): about to go.
    Passing,
}

/// Nexthop objects, ours and the ids of all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::kernel) struct Nexthops {
    pub(in crate::kernel) ours: Vec<(NexthopId, Nexthop)>,
    pub(in crate::kernel) foreign: BTreeSet<NexthopId>,
}

/// All links by index: what other tables refer to them by.
pub(in crate::kernel) type Links = BTreeMap<u32, Link>;

/// `ip -details link show`.
pub(in crate::kernel) fn links(socket: &mut RequestSocket) -> Result<Links, KernelError> {
    // Counters would be most of the answer.
    let mut all = LinkMessage::default();
    all.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let rows = socket.dump(&Request::new(&Rtnl::GetLink(all), 0), link_of).map_err(reading("links"))?;
    Ok(rows.into_iter().map(|link| (link.index, link)).collect())
}

/// `ip -details link show dev NAME`; `None` when there is no such link.
pub(in crate::kernel) fn link_named(socket: &mut RequestSocket, name: &IfName) -> io::Result<Option<Link>> {
    let one = Request::new(&Rtnl::GetLink(LinkUnspec::new_with_name(name.as_str()).build()), 0);
    match socket.ask(&one, link_of) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        link => link,
    }
}

fn link_of(frame: &Frame<'_>) -> Option<Link> {
    match route_message(frame)? {
        Rtnl::NewLink(message) => link(&message),
        _ => None,
    }
}

fn link(message: &LinkMessage) -> Option<Link> {
    let mut link = Link {
        index: message.header.index,
        name: message.attributes.iter().find_map(|a| match a {
            LinkAttribute::IfName(name) => name.parse().ok(),
            _ => None,
        })?,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        mac: None,
        controller: None,
        kind: String::new(),
        vxlan: None,
        ours: None,
    };
    let mut mac = None;
    let mut data: &[InfoVxlan] = &[];
    let mut altnames = vec![];
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::PropList(properties) => altnames = altnames_of(properties).collect(),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::Address(bytes) => mac = mac_of(bytes),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.kind = kind.to_string(),
                        LinkInfo::Data(InfoData::Vxlan(found)) => data = found,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link.mac = mac;
    if link.kind == "vxlan" {
        let vxlan = vxlan(data, &link, &altnames, mac);
        link.vxlan = Some((vxlan.0, vxlan.1, Family::of(vxlan.2)));
        link.ours = vxlan.3;
    }
    Some(link)
}

/// `altname`s of a link (`IFLA_ALT_IFNAME`, since Linux 5.5) that are as short as names are.
pub(in crate::kernel) fn altnames_of(properties: &[Prop]) -> impl Iterator<Item = IfName> {
    properties.iter().filter_map(|property| match property {
        Prop::AltIfName(name) => name.parse().ok(),
        _ => None,
    })
}

/// VNI, port and source of a VXLAN device, and all of it when a name of it is one of ours with its own VNI. A device without
/// a source address has the unspecified one; the kernel then goes by IPv4.
fn vxlan(
    data: &[InfoVxlan],
    link: &Link,
    altnames: &[IfName],
    mac: Option<MacAddr>,
) -> (u32, u16, IpAddr, Option<VxlanLink>) {
    let (mut vni, mut port, mut learning, mut gbp) = (0, 0, false, false);
    let mut local = IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED);
    for info in data {
        match info {
            InfoVxlan::Id(id) => vni = *id,
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Learning(on) => learning = *on,
            InfoVxlan::Gbp => gbp = true,
            InfoVxlan::Local(ip) => local = IpAddr::V4(*ip),
            InfoVxlan::Local6(ip) => local = IpAddr::V6(*ip),
            // Without a source the group or remote address tells the family.
            InfoVxlan::Group6(_) if local.is_unspecified() => local = IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
            _ => {}
        }
    }
    let ours = Vni::try_from(vni)
        .ok()
        .filter(|vni| altnames.iter().chain([&link.name]).any(|name| device::is_ours(name, *vni)))
        .and_then(|vni| Some(VxlanLink { vni, port, gbp, mac: mac?, local, mtu: link.mtu, learning, up: link.up }));
    (vni, port, local, ours)
}

/// `ip address show`, without what the kernel makes of itself: link-local and host-local addresses.
pub(in crate::kernel) fn addresses(socket: &mut RequestSocket) -> Result<Vec<Address>, KernelError> {
    let all = Request::new(&Rtnl::GetAddress(AddressMessage::default()), 0);
    let decode = |frame: &Frame<'_>| match route_message(frame)? {
        Rtnl::NewAddress(message) => address(&message),
        _ => None,
    };
    socket.dump(&all, decode).map_err(reading("addresses"))
}

fn address(message: &AddressMessage) -> Option<Address> {
    /// `IFA_F_TEMPORARY`, which IPv4 calls secondary.
    const TEMPORARY: AddressFlags = AddressFlags::Secondary;
    if matches!(message.header.scope, AddressScope::Link | AddressScope::Host | AddressScope::Nowhere) {
        return None;
    }
    let (mut local, mut peer, mut flags) = (None, None, AddressFlags::empty());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let ip = local.or(peer)?;
    let unfit = message.header.scope != AddressScope::Universe
        || flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed);
    let passing = flags.contains(AddressFlags::Deprecated) || (ip.is_ipv6() && flags.contains(TEMPORARY));
    Some(Address {
        index: message.header.index,
        ip,
        // Of a point-to-point link the prefix is the other end's.
        prefix: Subnet::holding(peer.unwrap_or(ip), message.header.prefix_len).ok()?,
        fit: (!unfit).then_some(if passing { Fit::Passing } else { Fit::Lasting }),
    })
}

/// What an FDB entry or a neighbour is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) struct Entry {
    /// Its device.
    pub(in crate::kernel) index: u32,
    pub(in crate::kernel) row: EntryRow,
}

/// By the kernel's key, what ours would say there; `None` when there is no such entry, or none of our making.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum EntryRow {
    Fdb(MacAddr, Option<IpAddr>),
    Neighbour(IpAddr, Option<MacAddr>),
}

/// Reads an entry out of a dump or an event. Ours, on a device of ours, are permanent. In the FDB they are unicast and
/// have a destination, and neither the mark of another daemon (`extern_learn`) nor a port, VNI or device of their own;
/// the kernel's own neighbours are `NOARP`.
///
/// By hand, since there are thousands: a `struct ndmsg` of twelve bytes (family, three of padding, index, state, flags,
/// type) and attributes.
pub(in crate::kernel) fn entry(frame: &Frame<'_>, gone: bool) -> Option<Entry> {
    const PERMANENT: u16 = 0x80;
    const OWN: u8 = 0x02;
    const EXTERN_LEARN: u8 = 0x10;
    let (head, rest) = frame.body.split_at_checked(12)?;
    let (mut dst, mut mac, mut strange, mut whole) = (None, None, false, false);
    for (kind, value) in attributes(rest) {
        match kind {
            1 => dst = netlink_packet_core::parse_ip(value).ok(),
            2 => mac = mac_of(value),
            // The driver's own word has the entry's age (NDA_CACHEINFO).
            3 => whole = true,
            // Port, VNI, device, source VNI.
            6 | 7 | 8 | 11 => strange = true,
            _ => {}
        }
    }
    let there = !gone && u16::from_ne_bytes([head[8], head[9]]) == PERMANENT;
    let row = match i32::from(head[0]) {
        // Older kernels (5.10 does, 6.18 doesn't) tell each write of the FDB once more after the driver has, without
        // destination and age (`rtnl_fdb_notify` in net/core/rtnetlink.c): that says nothing of what the entry is.
        libc::AF_BRIDGE if !gone && dst.is_none() && !whole => return None,
        libc::AF_BRIDGE => {
            let made_as_ours = head[10] & (OWN | EXTERN_LEARN) == OWN && !strange;
            EntryRow::Fdb(mac?, dst.filter(|_| there && made_as_ours))
        }
        libc::AF_INET | libc::AF_INET6 => EntryRow::Neighbour(dst?, mac.filter(|_| there)),
        _ => return None,
    };
    Some(Entry { index: u32::from_ne_bytes(head[4..8].try_into().ok()?), row })
}

/// Rows of a table that is kept by device and something else.
type Rows<K, V> = Vec<((IfName, K), V)>;

/// `bridge fdb show dev DEV`: ours on our devices.
pub(in crate::kernel) fn fdb(socket: &mut RequestSocket, ours: &[&Link]) -> Result<Rows<MacAddr, IpAddr>, KernelError> {
    let mut all = vec![];
    for device in ours {
        // The kernel filters the FDB by the index in the header ...
        let mut filter = NeighbourMessage::default();
        filter.header.family = AddressFamily::Bridge;
        filter.header.ifindex = device.index;
        all.extend(entries(socket, filter, device, "FDB", |row| match row {
            EntryRow::Fdb(mac, dst) => Some(((device.name, mac), dst?)),
            EntryRow::Neighbour(..) => None,
        })?);
    }
    Ok(all)
}

/// `ip neighbour show nud permanent dev DEV`, of both families: ours on our devices.
pub(in crate::kernel) fn neighbours(
    socket: &mut RequestSocket,
    ours: &[&Link],
) -> Result<Rows<IpAddr, MacAddr>, KernelError> {
    let mut all = vec![];
    for device in ours {
        // ... and neighbours by an attribute, in one dump for both families.
        let mut filter = NeighbourMessage::default();
        filter.attributes.push(NeighbourAttribute::IfIndex(device.index));
        all.extend(entries(socket, filter, device, "neighbours", |row| match row {
            EntryRow::Neighbour(ip, mac) => Some(((device.name, ip), mac?)),
            EntryRow::Fdb(..) => None,
        })?);
    }
    Ok(all)
}

/// The entries of one device. Filtered here too: kernels before 4.20 don't filter for us.
fn entries<T>(
    socket: &mut RequestSocket,
    filter: NeighbourMessage,
    device: &Link,
    table: &'static str,
    of: impl Fn(EntryRow) -> Option<T>,
) -> Result<Vec<T>, KernelError> {
    let decode = |frame: &Frame<'_>| {
        let entry = entry(frame, false).filter(|entry| entry.index == device.index)?;
        of(entry.row)
    };
    socket.dump(&Request::new(&Rtnl::GetNeighbour(filter), 0), decode).map_err(reading(table))
}

fn mac_of(bytes: &[u8]) -> Option<MacAddr> {
    <[u8; 6]>::try_from(bytes).ok()?.try_into().ok()
}

/// `ip nexthop show`. Ours have our protocol, an id of our range and lead over a device of ours.
///
/// `None` when the kernel knows no nexthop objects (before 5.3).
pub(in crate::kernel) fn nexthops(socket: &mut RequestSocket, links: &Links) -> Result<Option<Nexthops>, KernelError> {
    let rows = match socket.dump(&nexthop::all(), nexthop::decode) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(None),
        rows => rows.map_err(reading("nexthop objects"))?,
    };
    let mut all = Nexthops::default();
    for row in rows {
        match nexthop_of(&row, links) {
            Some(nexthop) => all.ours.push((row.id, nexthop)),
            None => drop(all.foreign.insert(row.id)),
        }
    }
    Ok(Some(all))
}

/// A nexthop object that is ours.
pub(in crate::kernel) fn nexthop_of(row: &NexthopRow, links: &Links) -> Option<Nexthop> {
    let device = links.get(&row.device?).filter(|link| link.ours.is_some())?;
    (row.protocol == ROUTE_PROTOCOL && row.id.0 >= NEXTHOP_ID_BASE)
        .then_some(Nexthop { gateway: row.gateway?, dev: device.name })
}

/// Puts the table's name to an error.
pub(in crate::kernel) fn reading(table: &'static str) -> impl Fn(io::Error) -> KernelError {
    move |source| KernelError::Dump { table, source }
}
