//! The host's links as far as they tell of pods: which there are, which are ports of which bridge, and their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use fabric_core::model::{IfName, Subnet};
use fabric_netlink::RequestSocket;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::routing::tables::{self, Address, Fit, Link, Links};
use super::{KernelError, Observed};
use crate::kernel::host::HostLink;

/// The links of this host but for our own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostLinks {
    /// All of them, with their addresses of global scope.
    pub addresses: BTreeMap<IfName, Vec<(IpAddr, Subnet)>>,
    /// The ports of every bridge.
    pub ports: BTreeMap<IfName, BTreeSet<IfName>>,
}

impl HostLinks {
    /// `ip -details link show` and `ip address show`, now.
    ///
    /// # Errors
    /// When the kernel can't be asked.
    pub fn ask() -> Result<Self, KernelError> {
        let socket = RequestSocket::open(NETLINK_ROUTE);
        let mut socket = socket.map_err(|error| KernelError::Disconnected(error.to_string()))?;
        let links = tables::links(&mut socket)?;
        let addresses = tables::addresses(&mut socket)?;
        let others = links.values().filter(|link| link.ours.is_none());
        Ok(Self::of(others.map(|link| host_link(link, &addresses)), bridges(&links)))
    }

    fn of(links: impl Iterator<Item = HostLink>, ports: BTreeMap<IfName, BTreeSet<IfName>>) -> Self {
        Self { addresses: links.map(|link| (link.name, link.addresses)).collect(), ports }
    }

    /// Whether there is a link of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.addresses.keys().any(|link| link.as_str() == name)
    }
}

impl From<&Observed> for HostLinks {
    fn from(observed: &Observed) -> Self {
        Self::of(observed.host.links.iter().cloned(), observed.bridges.clone())
    }
}

/// The ports of every bridge.
pub(super) fn bridges(links: &Links) -> BTreeMap<IfName, BTreeSet<IfName>> {
    let mut bridges: BTreeMap<IfName, BTreeSet<IfName>> = BTreeMap::new();
    for port in links.values() {
        if let Some(bridge) = port.controller.and_then(|index| links.get(&index)) {
            bridges.entry(bridge.name).or_default().insert(port.name);
        }
    }
    bridges
}

/// A link with its addresses.
pub(super) fn host_link(link: &Link, addresses: &[Address]) -> HostLink {
    let fit = |fit| {
        let of_link = addresses.iter().filter(move |address| address.index == link.index && address.fit == Some(fit));
        of_link.map(|address| (address.ip, address.prefix)).collect()
    };
    HostLink {
        index: link.index,
        name: link.name,
        mtu: link.mtu,
        up: link.up,
        loopback: link.loopback,
        addresses: fit(Fit::Lasting),
        passing: fit(Fit::Passing),
    }
}
