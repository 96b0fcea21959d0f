//! [`Host`]: the host's own links, addresses and default routes, as the kernel shows them.

use std::net::IpAddr;

use fabric_core::model::{Family, IfName, Subnet};

/// A host's links, addresses and default routes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// All links but ours, by interface index.
    pub links: Vec<HostLink>,
    /// Default routes of the main table.
    pub default_routes: Vec<DefaultRoute>,
    /// The kernel's answers for the addresses of `--iface-can-reach`: the interface and source it would use.
    pub reaches: Vec<(IpAddr, IfName, IpAddr)>,
}

/// A link of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLink {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: IfName,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The loopback interface.
    pub loopback: bool,
    /// Addresses of global scope, in the kernel's order, each with the prefix that it makes reachable. Tentative ones are
    /// left out, and those of `passing`.
    pub addresses: Vec<(IpAddr, Subnet)>,
    /// Those that are about to go: deprecated ones, and IPv6's temporary ones (RFC 8981).
    pub passing: Vec<(IpAddr, Subnet)>,
}

/// A default route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Address family.
    pub family: Family,
    /// The interface it leads out of.
    pub dev: IfName,
    /// Its metric: the smallest wins.
    pub metric: u32,
    /// The source address it prefers (`src`).
    pub source: Option<IpAddr>,
    /// Its gateway; without a preferred source the kernel sends from the address whose prefix holds it.
    pub gateway: Option<IpAddr>,
}
