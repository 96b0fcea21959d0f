//! What a change of hands between flannel and fabricd asks of the kernel: VXLAN devices and routes, whoever made them, and
//! the few writes that no plan of the reconcile loop makes. Each call is a look or a write of its own, over one socket.

use std::net::IpAddr;

use fabric_core::model::{IfName, MacAddr};
use fabric_core::state::{NEXTHOP_ID_BASE, NexthopId, ROUTE_PROTOCOL};
use fabric_core::takeover::{Device, Route};
use fabric_netlink::{Frame, Request, RequestSocket};
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::{InfoData, InfoVxlan, LinkAttribute, LinkInfo, LinkMessage, Prop};
use netlink_sys::protocols::NETLINK_ROUTE;
use rtnetlink::{LinkUnspec, RouteMessageBuilder};

use super::KernelError;
use super::routing::tables::{self, Links, reading};
use super::routing::{nexthop, route_message, routes};

/// A socket of rtnetlink.
#[derive(Debug)]
pub struct TakeoverSocket {
    socket: RequestSocket,
    links: Links,
}

impl TakeoverSocket {
    /// Opens it and looks at the links.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn open() -> Result<Self, KernelError> {
        let socket = RequestSocket::open(NETLINK_ROUTE);
        let mut socket = socket.map_err(|error| KernelError::Disconnected(error.to_string()))?;
        let links = tables::links(&mut socket)?;
        Ok(Self { socket, links })
    }

    /// `ip -details link show type vxlan`, with `ip address show`.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn devices(&mut self) -> Result<Vec<Device>, KernelError> {
        let all = Request::new(&Rtnl::GetLink(LinkMessage::default()), 0);
        let decode = |frame: &Frame<'_>| match route_message(frame)? {
            Rtnl::NewLink(link) => device(&link),
            _ => None,
        };
        let devices = self.socket.dump(&all, decode).map_err(reading("links"))?;
        let addresses = tables::addresses(&mut self.socket)?;
        let of = |index: u32| addresses.iter().filter(move |a| a.index == index).map(|a| a.ip).collect();
        Ok(devices.into_iter().map(|(index, device)| Device { addresses: of(index), ..device }).collect())
    }

    /// All addresses of the host, link-local ones left out.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn addresses(&mut self) -> Result<Vec<IpAddr>, KernelError> {
        Ok(tables::addresses(&mut self.socket)?.into_iter().map(|address| address.ip).collect())
    }

    /// The main table's routes that lead to one gateway by one device and say nothing else but our protocol.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn routes(&mut self) -> Result<Vec<Route>, KernelError> {
        let links = &self.links;
        routes::to_gateways(&mut self.socket, |index| links.get(&index).map(|link| link.name))
    }

    /// `ip nexthop show proto 250`, from the ids on that are ours.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn nexthops(&mut self) -> Result<Vec<NexthopId>, KernelError> {
        let rows = match self.socket.dump(&nexthop::all(), nexthop::decode) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(vec![]),
            rows => rows.map_err(reading("nexthop objects"))?,
        };
        let is_ours = |row: &nexthop::NexthopRow| row.protocol == ROUTE_PROTOCOL && row.id.0 >= NEXTHOP_ID_BASE;
        Ok(rows.into_iter().filter(is_ours).map(|row| row.id).collect())
    }

    /// `ip link set dev FROM name TO`.
    ///
    /// # Errors
    /// When the kernel refuses: before 6.2 for every device that is up.
    pub fn rename(&mut self, from: &IfName, to: &IfName) -> Result<(), KernelError> {
        let link = LinkUnspec::new_with_index(self.index(from)?).name(to.as_str()).build();
        self.write(format!("ip link set dev {from} name {to}"), Request::new(&Rtnl::SetLink(link), 0))
    }

    /// `ip link property add dev DEV altname NAME`: a name beside that which the device has. Since Linux 5.5.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_altname(&mut self, dev: &IfName, name: &IfName) -> Result<(), KernelError> {
        let link = self.with_altname(dev, name)?;
        self.write(format!("ip link property add dev {dev} altname {name}"), Request::new(&Rtnl::NewLinkProp(link), 0))
    }

    /// `ip link property del dev DEV altname NAME`.
    ///
    /// # Errors
    /// When the kernel refuses; that it has no such name is no error.
    pub fn delete_altname(&mut self, dev: &IfName, name: &IfName) -> Result<(), KernelError> {
        let link = self.with_altname(dev, name)?;
        self.write(format!("ip link property del dev {dev} altname {name}"), Request::new(&Rtnl::DelLinkProp(link), 0))
    }

    fn with_altname(&self, dev: &IfName, name: &IfName) -> Result<LinkMessage, KernelError> {
        let mut link = LinkUnspec::new_with_index(self.index(dev)?).build();
        link.attributes.push(LinkAttribute::PropList(vec![Prop::AltIfName(name.to_string())]));
        Ok(link)
    }

    /// `ip route del DST via GATEWAY dev DEV`.
    ///
    /// # Errors
    /// When the kernel refuses; that there is none is no error.
    pub fn delete_route(&mut self, Route { dst, gateway, dev, .. }: &Route) -> Result<(), KernelError> {
        let said = format!("ip route del {dst} via {gateway} dev {dev}");
        let no_route = || KernelError::Disconnected(format!("{said}: no such route can be"));
        let route = RouteMessageBuilder::<IpAddr>::new().destination_prefix(dst.base(), dst.prefix_len());
        let route = route.and_then(|route| route.gateway(*gateway)).map_err(|_| no_route())?;
        let mut route = route.output_interface(self.index(dev)?).build();
        // Whatever protocol it has.
        route.header.protocol = netlink_packet_route::route::RouteProtocol::Unspec;
        self.write(said, Request::new(&Rtnl::DelRoute(route), 0))
    }

    /// `ip nexthop del id ID`, and the routes that still lead through it.
    ///
    /// # Errors
    /// When the kernel refuses; that there is none is no error.
    pub fn delete_nexthop(&mut self, id: NexthopId) -> Result<(), KernelError> {
        self.write(format!("ip nexthop del id {id}"), nexthop::delete(id))
    }

    fn index(&self, dev: &IfName) -> Result<u32, KernelError> {
        let found = self.links.values().find(|link| link.name == *dev).map(|link| link.index);
        found.ok_or_else(|| KernelError::Disconnected(format!("there is no {dev} any more")))
    }

    fn write(&mut self, op: String, request: Request) -> Result<(), KernelError> {
        match self.socket.write(&[request]).pop() {
            Some(Err(refusal)) if !matches!(refusal.error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => {
                let detail = refusal.words.unwrap_or_else(|| super::refusal::general(&refusal.error).to_owned());
                Err(KernelError::Refused { op, source: refusal.error, detail })
            }
            _ => Ok(()),
        }
    }
}

fn device(link: &LinkMessage) -> Option<(u32, Device)> {
    let (mut name, mut mac, mut data): (Option<IfName>, Option<MacAddr>, Option<&[InfoVxlan]>) = (None, None, None);
    let mut altnames = vec![];
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse().ok(),
            LinkAttribute::PropList(properties) => altnames = tables::altnames_of(properties).collect(),
            LinkAttribute::Address(bytes) => mac = <[u8; 6]>::try_from(bytes.as_slice()).ok()?.try_into().ok(),
            LinkAttribute::LinkInfo(infos) => {
                data = infos.iter().find_map(|info| match info {
                    LinkInfo::Data(InfoData::Vxlan(data)) => Some(data.as_slice()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let (mut vni, mut port, mut local) = (0, 0, None);
    for info in data? {
        match info {
            InfoVxlan::Id(id) => vni = *id,
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Local(ip) => local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) => local = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    let device = Device { name: name?, vni, port, local: local?, mac: mac?, altnames, addresses: vec![] };
    Some((link.header.index, device))
}
