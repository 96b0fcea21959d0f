//! The underlay: which interface and address of this host carry the encapsulated packets.

use std::net::IpAddr;

use fabric_core::model::{Family, IfName, Subnet};
use regex::Regex;

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
    /// Addresses of global scope, in the kernel's order; deprecated and tentative ones left out.
    pub addresses: Vec<(IpAddr, Subnet)>,
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
    /// The source address it prefers.
    pub source: Option<IpAddr>,
}

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
}

/// Chooses the underlay of one family: by the first selector that fits, without any by the default route with the
/// smallest metric.
///
/// # Errors
/// [`UnderlayError`], which lists the interfaces that there are.
pub fn choose(selectors: &[Selector], host: &Host, family: Family) -> Result<Underlay, UnderlayError> {
    let (link, wished) = if selectors.is_empty() {
        let routes = host.default_routes.iter().filter(|route| route.family == family);
        let route = routes.min_by_key(|route| route.metric);
        let found = route.and_then(|route| Some((link_named(host, &route.dev)?, route.source)));
        found.ok_or_else(|| UnderlayError::NoDefaultRoute { family, present: present(host) })?
    } else {
        let found = selectors.iter().find_map(|selector| selected(selector, host, family));
        found.ok_or_else(|| UnderlayError::NoMatch { wanted: describe(selectors), present: present(host) })?
    };
    let mut addresses = link.addresses.iter().map(|(ip, _)| *ip).filter(|ip| Family::of(*ip) == family);
    let local = wished.filter(|ip| Family::of(*ip) == family).or_else(|| addresses.next());
    match local {
        Some(local) => Ok(Underlay { dev: link.name, local, mtu: link.mtu }),
        None => Err(UnderlayError::NoAddress { dev: link.name, family }),
    }
}

/// The link that a selector names, and the address on it if the selector names that.
fn selected<'a>(selector: &Selector, host: &'a Host, family: Family) -> Option<(&'a HostLink, Option<IpAddr>)> {
    let by_address = |fits: &dyn Fn(IpAddr) -> bool| {
        host.links.iter().find_map(|link| {
            // Of an interface with several fitting addresses, one of the asked family comes first.
            let mut fitting: Vec<IpAddr> = link.addresses.iter().map(|(ip, _)| *ip).filter(|ip| fits(*ip)).collect();
            fitting.sort_by_key(|ip| Family::of(*ip) != family);
            Some((link, Some(*fitting.first()?)))
        })
    };
    match selector {
        Selector::Iface(name) => match name.parse::<IpAddr>() {
            Ok(ip) => by_address(&|candidate| candidate == ip),
            Err(_) => host.links.iter().find(|link| link.name.as_str() == name).map(|link| (link, None)),
        },
        Selector::Matching(regex) => {
            let by_name = host.links.iter().find(|link| !link.loopback && regex.is_match(link.name.as_str()));
            by_name.map(|link| (link, None)).or_else(|| by_address(&|ip| regex.is_match(&ip.to_string())))
        }
        Selector::CanReach(ip) => {
            let (_, dev, source) = host.reaches.iter().find(|(target, ..)| target == ip)?;
            Some((link_named(host, dev)?, Some(*source)))
        }
    }
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
        let addresses: Vec<String> = link.addresses.iter().map(|(ip, _)| ip.to_string()).collect();
        let addresses = if addresses.is_empty() { "no address".into() } else { addresses.join(" ") };
        format!("{} ({addresses})", link.name)
    };
    host.links.iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Host {
        let link = |index, name: &str, addresses: &[&str]| HostLink {
            index,
            name: name.parse().expect(name),
            mtu: 1500,
            up: true,
            loopback: name == "lo",
            addresses: addresses
                .iter()
                .map(|text| {
                    let net: ipnetwork::IpNetwork = text.parse().expect(text);
                    (net.ip(), Subnet::holding(net.ip(), net.prefix()).expect(text))
                })
                .collect(),
        };
        let route =
            |family, dev: &str, metric| DefaultRoute { family, dev: dev.parse().expect(dev), metric, source: None };
        Host {
            links: vec![
                link(1, "lo", &[]),
                link(2, "eth0", &["10.0.2.15/24", "2001:db8::15/64"]),
                link(3, "eth1", &["192.0.2.7/24", "192.0.2.8/24", "2001:db8:1::7/64"]),
                link(4, "eth2", &[]),
            ],
            default_routes: vec![
                route(Family::V4, "eth1", 100),
                route(Family::V4, "eth0", 10),
                route(Family::V6, "eth1", 1024),
            ],
            reaches: vec![(
                "198.51.100.1".parse().expect("ip"),
                "eth1".parse().expect("name"),
                "192.0.2.8".parse().expect("ip"),
            )],
        }
    }

    fn chosen(selectors: &[Selector], family: Family) -> String {
        match choose(selectors, &host(), family) {
            Ok(underlay) => format!("{} {}", underlay.dev, underlay.local),
            Err(error) => error.to_string(),
        }
    }

    fn regex(text: &str) -> Selector {
        Selector::Matching(Regex::new(text).expect(text))
    }

    #[test]
    fn default_route_with_the_smallest_metric_decides_in_each_family() {
        assert_eq!(chosen(&[], Family::V4), "eth0 10.0.2.15");
        assert_eq!(chosen(&[], Family::V6), "eth1 2001:db8:1::7");
    }

    #[test]
    fn interface_is_named_in_every_way() {
        let iface = |name: &str| Selector::Iface(name.into());
        for (selector, v4, v6) in &[
            (iface("eth1"), "eth1 192.0.2.7", "eth1 2001:db8:1::7"),
            (iface("192.0.2.8"), "eth1 192.0.2.8", "eth1 2001:db8:1::7"),
            (iface("2001:db8::15"), "eth0 10.0.2.15", "eth0 2001:db8::15"),
            (regex("^eth[1-9]$"), "eth1 192.0.2.7", "eth1 2001:db8:1::7"),
            (regex(r"^192\.0\.2\.8"), "eth1 192.0.2.8", "eth1 2001:db8:1::7"),
            (Selector::CanReach("198.51.100.1".parse().expect("ip")), "eth1 192.0.2.8", "eth1 2001:db8:1::7"),
        ] {
            assert_eq!(chosen(std::slice::from_ref(selector), Family::V4), *v4, "{selector:?}");
            assert_eq!(chosen(std::slice::from_ref(selector), Family::V6), *v6, "{selector:?}");
        }
    }

    #[test]
    fn first_selector_that_fits_wins() {
        let selectors = [Selector::Iface("eth7".into()), Selector::Iface("eth1".into())];
        assert_eq!(chosen(&selectors, Family::V4), "eth1 192.0.2.7");
    }

    #[test]
    fn unknown_interface_is_answered_with_those_that_exist() {
        assert_eq!(
            chosen(&[Selector::Iface("eth7".into())], Family::V4),
            "no interface fits --iface eth7; this host has lo (no address), eth0 (10.0.2.15 2001:db8::15), \
             eth1 (192.0.2.7 192.0.2.8 2001:db8:1::7), eth2 (no address)"
        );
        assert!(
            chosen(&[Selector::Iface("eth2".into())], Family::V6).starts_with("the interface eth2 has no IPv6 address")
        );
    }
}
