//! What a kernel holds, whoever made it, and what goes in silence with a link or a nexthop object.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::device;
use fabric_core::firewall::Firewall;
use fabric_core::model::{Family, IfName, MacAddr, Subnet};
use fabric_core::plan::bypass::Shaping;
use fabric_core::plan::fast_path::Port;
use fabric_core::state::fast_path::FastPath;
use fabric_core::state::nft::FoundRuleset;
use fabric_core::state::{NEXTHOP_ID_BASE, Nexthop, NexthopId, ROUTE_PROTOCOL, Sysctl, Via, VxlanLink};
use fabricd::host::underlay::DefaultRoute;

/// `RTPROT_STATIC`: what an administrator's `ip route add … proto static` has.
pub const STATIC: u8 = 4;

/// `RTPROT_BOOT`: what a route has that was made without naming a protocol, flannel's among them.
pub const BOOT: u8 = 3;

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index, never used again.
    pub index: u32,
    /// Type: `veth`, `vxlan`, …
    pub kind: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// All of it when it is a VXLAN device.
    pub vxlan: Option<VxlanLink>,
    /// An alternative name.
    pub altname: Option<IfName>,
}

/// Everything that the kernel holds, ours and others'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Links by name.
    pub links: BTreeMap<IfName, Link>,
    /// Addresses with the prefix that they make reachable.
    pub addresses: BTreeSet<(IfName, IpAddr, Subnet)>,
    /// FDB entries of VXLAN devices.
    pub fdb: BTreeMap<(IfName, MacAddr), IpAddr>,
    /// Permanent neighbours.
    pub neighbours: BTreeMap<(IfName, IpAddr), MacAddr>,
    /// Nexthop objects with their protocol.
    pub nexthops: BTreeMap<NexthopId, (u8, Nexthop)>,
    /// Routes of the main table with our metric, with their protocol.
    pub routes: BTreeMap<Subnet, (u8, Via)>,
    /// Default routes.
    pub default_routes: Vec<DefaultRoute>,
    /// Answers to `--iface-can-reach`.
    pub reaches: Vec<(IpAddr, IfName, IpAddr)>,
    /// Settings.
    pub sysctls: BTreeMap<Sysctl, u32>,
    /// Firewall chains of others.
    pub firewall: Arc<Firewall>,
    /// Our tables of nftables.
    pub filter: FoundRuleset,
    /// The fast path.
    pub fast_path: FastPath,
    /// Ports of bridges.
    pub ports: BTreeMap<IfName, Port>,
    /// Why there can be no fast path.
    pub fast_path_trouble: Option<String>,
    /// Whether programs are attached as filters of tc (a kernel before 6.6).
    pub without_tcx: bool,
    /// What of others shapes packets.
    pub shaping: Shaping,
    /// Whether nexthop objects are unknown (a kernel before 5.3).
    pub without_nexthop_objects: bool,
    last_index: u32,
}

impl Tables {
    /// A host with one interface: `eth0`, up, with these addresses.
    #[must_use]
    pub fn host(addresses: &[(IpAddr, Subnet)]) -> Self {
        let mut tables = Self::default();
        let eth0: IfName = "eth0".parse().expect("valid");
        tables.add_link(eth0, "veth", 1500);
        tables.addresses = addresses.iter().map(|(ip, prefix)| (eth0, *ip, *prefix)).collect();
        tables.sysctls = [(Sysctl::Ipv4Forward, 0), (Sysctl::Ipv6Forward, 0)].into();
        tables
    }

    /// `ip link add NAME mtu MTU up type KIND`.
    pub fn add_link(&mut self, name: IfName, kind: &str, mtu: u32) {
        self.last_index += 1;
        self.links.insert(
            name,
            Link { index: self.last_index, kind: kind.into(), mtu, up: true, vxlan: None, altname: None },
        );
    }

    /// `ip link add NAME type vxlan …`.
    ///
    /// # Errors
    /// `EEXIST` when the name, or the VNI and port, are taken.
    pub fn add_vxlan(&mut self, name: IfName, vxlan: VxlanLink) -> Result<(), i32> {
        let same = |other: &VxlanLink| {
            (other.vni, other.port, Family::of(other.local)) == (vxlan.vni, vxlan.port, Family::of(vxlan.local))
        };
        if self.links.contains_key(&name) || self.links.values().filter_map(|l| l.vxlan.as_ref()).any(same) {
            return Err(libc::EEXIST);
        }
        self.add_link(name, "vxlan", vxlan.mtu);
        self.sysctls.extend([(Sysctl::AcceptRa(name), 1), (Sysctl::RpFilter(name), 0)]);
        let link = self.links.get_mut(&name).expect("just added");
        link.up = vxlan.up;
        link.vxlan = Some(vxlan);
        Ok(())
    }

    /// `ip link del DEV`: takes all that hangs on it along.
    pub fn delete_link(&mut self, dev: &IfName) {
        self.set_down(dev);
        let gone = self.links.remove(dev);
        self.ports.remove(dev);
        // With an interface go the links of programs at it.
        self.fast_path.links.retain(|place, _| gone.as_ref().is_none_or(|link| link.index != place.ifindex));
        self.addresses.retain(|(d, _, _)| d != dev);
        self.fdb.retain(|(d, _), _| d != dev);
        self.sysctls.retain(|sysctl, _| sysctl.device() != Some(*dev));
    }

    /// `ip link set DEV down`: routes, nexthop objects, permanent neighbours and IPv6 addresses go; FDB entries and
    /// IPv4 addresses stay.
    pub fn set_down(&mut self, dev: &IfName) {
        if let Some(link) = self.links.get_mut(dev) {
            link.up = false;
            if let Some(vxlan) = &mut link.vxlan {
                vxlan.up = false;
            }
        }
        self.addresses.retain(|(d, ip, _)| d != dev || ip.is_ipv4());
        self.neighbours.retain(|(d, _), _| d != dev);
        self.nexthops.retain(|_, (_, nexthop)| nexthop.dev != *dev);
        self.routes.retain(|_, (_, via)| !matches!(via, Via::Gateway(to) | Via::Direct(to) if to.dev == *dev));
        self.default_routes.retain(|route| route.dev != *dev);
        self.drop_routes_without_nexthop();
    }

    /// `ip nexthop del id ID`: takes the routes through it along.
    pub fn delete_nexthop(&mut self, id: NexthopId) {
        self.nexthops.remove(&id);
        self.drop_routes_without_nexthop();
    }

    fn drop_routes_without_nexthop(&mut self) {
        let nexthops = &self.nexthops;
        self.routes.retain(|_, (_, via)| !matches!(via, Via::Nexthop(id) if !nexthops.contains_key(id)));
    }

    /// A VXLAN device of which a name says that it is ours.
    pub(super) fn our_link(&self, dev: &IfName) -> Option<&VxlanLink> {
        let link = self.links.get(dev)?;
        let mut names = link.altname.iter().chain([dev]);
        link.vxlan.as_ref().filter(|vxlan| names.any(|name| device::is_ours(name, vxlan.vni)))
    }

    /// Routes with our metric that are not ours.
    pub(super) fn routes_of_others(&self, which: impl Fn(&Subnet, &Via) -> bool) -> BTreeMap<Subnet, String> {
        let others = self.routes.iter().filter(|(dst, (protocol, via))| *protocol != ROUTE_PROTOCOL && which(dst, via));
        others.map(|(dst, (protocol, via))| (*dst, format!("{dst} {via:?} proto {protocol}"))).collect()
    }

    /// What flannel makes for a peer, over our own device.
    pub(super) fn is_plain(&self, dst: &Subnet, via: &Via) -> bool {
        matches!(via, Via::Gateway(to) | Via::Direct(to) if to.gateway == dst.base() && self.our_link(&to.dev).is_some())
    }

    pub(super) fn is_our_nexthop(&self, id: NexthopId, protocol: u8, nexthop: &Nexthop) -> bool {
        protocol == ROUTE_PROTOCOL && id.0 >= NEXTHOP_ID_BASE && self.our_link(&nexthop.dev).is_some()
    }
}
