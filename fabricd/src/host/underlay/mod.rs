//! The underlay: which interface and address of this host carry the encapsulated packets.
//!
//! The address is chosen so that it stays what it is for as long as it can: peers send to it. See [`choose`] for the order
//! and [`HoldDown`] for what happens while it is away.

mod hold_down;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::net::IpAddr;

use fabric_core::model::{Family, IfName, Subnet};
use regex::Regex;

pub use self::hold_down::HoldDown;
pub use crate::kernel::host::{DefaultRoute, Host, HostLink};

/// How the operator names the underlay interface. Several are tried in their order.
#[derive(Clone, Debug)]
pub enum Selector {
    /// By name, or by one of its addresses.
    Iface(String),
    /// By a regular expression that its name or one of its addresses matches.
    Matching(Regex),
    /// The one that the kernel would use towards this address.
    CanReach(IpAddr),
}

/// The underlay in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// The interface.
    pub dev: IfName,
    /// Its address that encapsulated packets are sent from.
    pub local: IpAddr,
    /// Its MTU in bytes.
    pub mtu: u32,
}

/// An underlay that could be chosen, and how good it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The underlay.
    pub underlay: Underlay,
    /// The prefix that its address makes reachable.
    pub prefix: Subnet,
    /// How lasting its address is.
    pub rank: AddressRank,
    /// True when the operator named this very address.
    pub named: bool,
}

/// How lasting an address is likely to be, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressRank {
    /// An address of the interface.
    Lasting,
    /// Deprecated or temporary.
    Passing,
    /// Of host length inside another address's prefix, as keepalived and kube-vip add virtual addresses.
    Virtual,
}

/// Why no underlay could be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnderlayError {
    /// Nothing fits what the operator asked for.
    #[error("no interface fits {wanted}; this host has {}", .present.join(", "))]
    NoMatch {
        /// The flags, as given.
        wanted: String,
        /// The interfaces with their addresses.
        present: Vec<String>,
    },
    /// Nothing was asked for, and there is no default route to go by.
    #[error("there is no {family} default route to choose the underlay by; name the interface with --iface; this host has {}", .present.join(", "))]
    NoDefaultRoute {
        /// The family.
        family: Family,
        /// The interfaces with their addresses.
        present: Vec<String>,
    },
    /// The interface has no address of a family that the network uses.
    #[error(
        "the interface {dev} has no {family} address, and the network has {family} enabled; add one, or choose another with --iface"
    )]
    NoAddress {
        /// The interface.
        dev: IfName,
        /// The family.
        family: Family,
    },
    /// The address in use is gone, and only virtual ones are left.
    #[error(
        "the underlay address {gone} of this node is gone from {dev}, and {left}, which is left there, looks like a virtual \
         address that moves between hosts (it is a /{} inside {within}); put {gone} back, or if {left} is this node's own \
         from now on, start fabricd with --iface {left}",
        .within.family().bits()
    )]
    OnlyVirtual {
        /// The interface.
        dev: IfName,
        /// The address in use.
        gone: IpAddr,
        /// The one that is there.
        left: IpAddr,
        /// The prefix that it lies in.
        within: Subnet,
    },
    /// The address in use is gone, maybe for a moment only.
    #[error(
        "the underlay address {gone} of this node is gone from {dev}; if it does not come back within {seconds} s, {left} is \
         taken in its place"
    )]
    Away {
        /// The interface.
        dev: IfName,
        /// The address in use.
        gone: IpAddr,
        /// The one that is taken then.
        left: IpAddr,
        /// How long it is waited for, from the moment when it went.
        seconds: u64,
    },
}

/// Chooses the underlay of one family.
///
/// The interface: by the first selector that fits. Without any by a default route: one whose interface has an address of
/// `in_use`, then that with the smallest metric. So what a VPN client makes its default route while it runs, or
/// a second uplink, moves nothing while the default route in use stands. Of the interface's addresses the first of
/// 1. those in `in_use`, in that order: the address in the lease, then the VXLAN device's;
/// 2. the preferred source of the default route that chose the interface;
/// 3. lasting ones before passing before virtual ones ([`AddressRank`]), and of these first the one that the kernel would
///    send from: to the address of `--iface-can-reach`, or to the gateway of that default route;
/// 4. the rest, in the kernel's order.
///
/// Where the operator names addresses (`--iface IP`, a regular expression for addresses), only those are taken.
///
/// # Errors
/// [`UnderlayError`], which lists the interfaces that there are.
pub fn choose(selectors: &[Selector], host: &Host, family: Family, in_use: &[IpAddr]) -> Result<Choice, UnderlayError> {
    let found = if selectors.is_empty() {
        let routes = host.default_routes.iter().filter(|route| route.family == family);
        let has = |dev: &IfName, ip: &IpAddr| {
            link_named(host, dev).is_some_and(|link| addresses(link).any(|(of, _)| of == *ip))
        };
        let used = |route: &DefaultRoute| in_use.iter().position(|ip| has(&route.dev, ip)).unwrap_or(usize::MAX);
        let route = routes.min_by_key(|route| (used(route), route.metric));
        let found = route.and_then(|route| Some(Found::of_route(link_named(host, &route.dev)?, route)));
        found.ok_or_else(|| UnderlayError::NoDefaultRoute { family, present: present(host) })?
    } else {
        find(selectors, host, family)?
    };
    let Found { link, named, source, sends_from, gateway } = found;
    let of_family = |ip: &IpAddr| Family::of(*ip) == family;
    let named: Vec<IpAddr> = named.into_iter().filter(of_family).collect();
    let mut candidates: Vec<(IpAddr, Subnet, AddressRank)> =
        ranked(link).filter(|(ip, ..)| of_family(ip) && (named.is_empty() || named.contains(ip))).collect();
    // A source that the kernel prefers may lie on another link, as where loopback addresses are routed.
    for ip in source.into_iter().chain(sends_from).filter(of_family) {
        if named.is_empty() && !candidates.iter().any(|(candidate, ..)| *candidate == ip) {
            candidates.push((ip, Subnet::host(ip), AddressRank::Lasting));
        }
    }
    let best = candidates.into_iter().min_by_key(|(ip, prefix, rank)| {
        let used = in_use.iter().position(|used| used == ip).unwrap_or(usize::MAX);
        let reached_by = sends_from == Some(*ip) || gateway.is_some_and(|gateway| prefix.contains(gateway));
        (used, Reverse(source == Some(*ip)), *rank, Reverse(reached_by))
    });
    let (local, prefix, rank) = best.ok_or(UnderlayError::NoAddress { dev: link.name, family })?;
    let underlay = Underlay { dev: link.name, local, mtu: link.mtu };
    Ok(Choice { underlay, prefix, rank, named: named == [local] })
}

/// Whether an interface fits what the operator asked for, whatever the network will be.
///
/// # Errors
/// [`UnderlayError::NoMatch`] when none does.
pub fn judge(selectors: &[Selector], host: &Host) -> Result<(), UnderlayError> {
    if selectors.is_empty() { Ok(()) } else { find(selectors, host, Family::V4).map(drop) }
}

/// What a selector or a default route leads to.
struct Found<'a> {
    link: &'a HostLink,
    /// The addresses that the operator named; empty for any.
    named: Vec<IpAddr>,
    /// The one that the route names as the source.
    source: Option<IpAddr>,
    /// The one that the kernel said it would send from.
    sends_from: Option<IpAddr>,
    gateway: Option<IpAddr>,
}

impl<'a> Found<'a> {
    fn link(link: &'a HostLink) -> Self {
        Self { link, named: vec![], source: None, sends_from: None, gateway: None }
    }

    fn of_route(link: &'a HostLink, route: &DefaultRoute) -> Self {
        Self { source: route.source, gateway: route.gateway, ..Self::link(link) }
    }
}

fn find<'a>(selectors: &[Selector], host: &'a Host, family: Family) -> Result<Found<'a>, UnderlayError> {
    let found = selectors.iter().find_map(|selector| selected(selector, host, family));
    found.ok_or_else(|| UnderlayError::NoMatch { wanted: describe(selectors), present: present(host) })
}

/// The link that a selector names, and the addresses on it if the selector names those.
fn selected<'a>(selector: &Selector, host: &'a Host, family: Family) -> Option<Found<'a>> {
    let by_address = |fits: &dyn Fn(IpAddr) -> bool| {
        // Of several interfaces one with an address of the asked family comes first.
        let fitting =
            |link: &HostLink| -> Vec<IpAddr> { addresses(link).map(|(ip, _)| ip).filter(|ip| fits(*ip)).collect() };
        let of_family = |named: &[IpAddr]| named.iter().any(|ip| Family::of(*ip) == family);
        let links = host.links.iter().map(|link| Found { named: fitting(link), ..Found::link(link) });
        links.filter(|found| !found.named.is_empty()).min_by_key(|found| !of_family(&found.named))
    };
    match selector {
        Selector::Iface(name) => match name.parse::<IpAddr>() {
            Ok(ip) => by_address(&|candidate| candidate == ip),
            Err(_) => host.links.iter().find(|link| link.name.as_str() == name).map(Found::link),
        },
        Selector::Matching(regex) => {
            let by_name = host.links.iter().find(|link| !link.loopback && regex.is_match(link.name.as_str()));
            by_name.map(Found::link).or_else(|| by_address(&|ip| regex.is_match(&ip.to_string())))
        }
        Selector::CanReach(ip) => {
            let (_, dev, source) = host.reaches.iter().find(|(target, ..)| target == ip)?;
            Some(Found { sends_from: Some(*source), ..Found::link(link_named(host, dev)?) })
        }
    }
}

/// All addresses of a link, the passing ones last.
fn addresses(link: &HostLink) -> impl Iterator<Item = (IpAddr, Subnet)> + '_ {
    link.addresses.iter().chain(&link.passing).copied()
}

/// The same, each with its rank.
fn ranked(link: &HostLink) -> impl Iterator<Item = (IpAddr, Subnet, AddressRank)> + '_ {
    let lasting = link.addresses.iter().map(|address| (address, AddressRank::Lasting));
    let passing = link.passing.iter().map(|address| (address, AddressRank::Passing));
    lasting.chain(passing).map(|((ip, prefix), rank)| {
        let is_virtual = is_host(*prefix) && addresses(link).any(|(other, around)| other != *ip && holds(around, *ip));
        (*ip, *prefix, if is_virtual { AddressRank::Virtual } else { rank })
    })
}

/// Whether an address of host length would be virtual beside one with this prefix.
fn holds(prefix: Subnet, ip: IpAddr) -> bool {
    !is_host(prefix) && prefix.contains(ip)
}

/// A /32 or /128.
fn is_host(prefix: Subnet) -> bool {
    prefix.prefix_len() == prefix.family().bits()
}

fn link_named<'a>(host: &'a Host, name: &IfName) -> Option<&'a HostLink> {
    host.links.iter().find(|link| link.name == *name)
}

fn describe(selectors: &[Selector]) -> String {
    let flag = |selector: &Selector| match selector {
        Selector::Iface(name) => format!("--iface {name}"),
        Selector::Matching(regex) => format!("--iface-regex {regex}"),
        Selector::CanReach(ip) => format!("--iface-can-reach {ip}"),
    };
    selectors.iter().map(flag).collect::<Vec<_>>().join(" or ")
}

fn present(host: &Host) -> Vec<String> {
    let describe = |link: &HostLink| {
        let addresses: Vec<String> = addresses(link).map(|(ip, _)| ip.to_string()).collect();
        let addresses = if addresses.is_empty() { "no address".into() } else { addresses.join(" ") };
        format!("{} ({addresses})", link.name)
    };
    host.links.iter().map(describe).collect()
}
