//! The steps to links, addresses, FDB, neighbours, nexthop objects, routes and settings.
//!
//! What a peer needs is made from the bottom up (link, address, FDB, neighbour, nexthop, route), what is no longer wanted
//! goes from the top down, after that.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::{Change, Key, Stage, TableName, Verb};
use crate::model::{Family, IfName, MacAddr, Subnet};
use crate::state::{Nexthop, NexthopId, ROUTE_PROTOCOL, Routing, Sysctl, Via, VxlanLink};

/// One write to one of these tables. Applying it twice does no more than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A VXLAN device. `Replace` changes it in place.
    Link(IfName, Change<VxlanLink>),
    /// A VXLAN device that can't become what is wanted under its name: it goes, so that the other can be made.
    Outgrown(IfName, VxlanLink),
    /// A kernel setting; never deleted.
    Sysctl(Sysctl, u32),
    /// An address on our device.
    Address(IfName, Change<Subnet>),
    /// An FDB entry.
    Fdb(IfName, MacAddr, Change<IpAddr>),
    /// A permanent neighbour.
    Neighbour(IfName, IpAddr, Change<MacAddr>),
    /// A nexthop object.
    Nexthop(NexthopId, Change<Nexthop>),
    /// A route.
    Route(Subnet, Change<Via>),
}

impl Op {
    /// The entry that this step writes.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Link(name, _) | Self::Outgrown(name, _) => Key::Link(*name),
            Self::Sysctl(sysctl, _) => Key::Sysctl(*sysctl),
            Self::Address(dev, Change::Create(a) | Change::Delete(a) | Change::Replace { now: a, .. }) => {
                Key::Address(*dev, *a)
            }
            Self::Fdb(dev, mac, _) => Key::Fdb(*dev, *mac),
            Self::Neighbour(dev, ip, _) => Key::Neighbour(*dev, *ip),
            Self::Nexthop(id, _) => Key::Nexthop(*id),
            Self::Route(dst, _) => Key::Route(*dst),
        }
    }

    /// What is done to it.
    #[must_use]
    pub fn verb(&self) -> Verb {
        match self {
            Self::Link(_, c) => c.verb(),
            Self::Outgrown(..) => Verb::Delete,
            Self::Sysctl(..) => Verb::Replace,
            Self::Address(_, c) => c.verb(),
            Self::Fdb(_, _, c) => c.verb(),
            Self::Neighbour(_, _, c) => c.verb(),
            Self::Nexthop(_, c) => c.verb(),
            Self::Route(_, c) => c.verb(),
        }
    }

    /// True when something goes.
    #[must_use]
    pub fn is_delete(&self) -> bool {
        self.verb() == Verb::Delete
    }

    /// Its table.
    #[must_use]
    pub fn table(&self) -> TableName {
        match self {
            Self::Link(..) | Self::Outgrown(..) => TableName::Link,
            Self::Sysctl(..) => TableName::Sysctl,
            Self::Address(..) => TableName::Address,
            Self::Fdb(..) => TableName::Fdb,
            Self::Neighbour(..) => TableName::Neighbour,
            Self::Nexthop(..) => TableName::Nexthop,
            Self::Route(..) => TableName::Route,
        }
    }

    /// The entries that must be right before this step makes sense.
    #[must_use]
    pub fn needs(&self) -> Vec<Key> {
        match self {
            // A device takes packets from anybody: one that begins to, or goes for one that would, waits for the chain that
            // judges who may send. One that stands is never touched for it.
            Self::Link(_, Change::Create(link)) if link.up => vec![Key::SendersChain],
            Self::Link(_, Change::Replace { was, now }) if !was.up && now.up => vec![Key::SendersChain],
            Self::Outgrown(..) => vec![Key::SendersChain],
            Self::Link(..) => vec![],
            Self::Sysctl(sysctl, _) => sysctl.device().map(Key::Link).into_iter().collect(),
            Self::Address(dev, c) if c.wanted().is_some() => vec![Key::Link(*dev)],
            Self::Fdb(dev, _, c) if c.wanted().is_some() => vec![Key::Link(*dev)],
            Self::Neighbour(dev, _, c) => {
                c.wanted().map(|mac| vec![Key::Link(*dev), Key::Fdb(*dev, *mac)]).unwrap_or_default()
            }
            Self::Nexthop(_, c) => c.wanted().map(over_vtep).unwrap_or_default(),
            Self::Route(_, c) => c.wanted().map(below_route).unwrap_or_default(),
            Self::Address(..) | Self::Fdb(..) => vec![],
        }
    }

    /// The entries that what was there still uses: they must stay when this step fails.
    #[must_use]
    pub fn holds(&self) -> Vec<Key> {
        match self {
            Self::Neighbour(dev, _, c) => c.found().map(|mac| vec![Key::Fdb(*dev, *mac)]).unwrap_or_default(),
            Self::Nexthop(_, c) => c.found().map(over_vtep).unwrap_or_default(),
            Self::Route(_, c) => c.found().map(below_route).unwrap_or_default(),
            _ => vec![],
        }
    }

    /// When it is taken.
    #[must_use]
    pub fn stage(&self) -> Stage {
        let is_delete = self.is_delete();
        let at = |made, goes| if is_delete { goes } else { made };
        match self {
            Self::Link(..) => at(Stage::Link, Stage::LinkGoes),
            Self::Outgrown(..) => Stage::Outgrown,
            Self::Sysctl(..) => Stage::Sysctl,
            Self::Address(..) => at(Stage::Address, Stage::AddressGoes),
            Self::Fdb(..) => at(Stage::Fdb, Stage::FdbGoes),
            Self::Neighbour(..) => at(Stage::Neighbour, Stage::NeighbourGoes),
            Self::Nexthop(..) => at(Stage::Nexthop, Stage::NexthopGoes),
            Self::Route(..) => at(Stage::Route, Stage::RouteGoes),
        }
    }
}

fn over_vtep(nexthop: &Nexthop) -> Vec<Key> {
    vec![Key::Link(nexthop.dev), Key::Neighbour(nexthop.dev, nexthop.gateway)]
}

fn below_route(via: &Via) -> Vec<Key> {
    match via {
        Via::Nexthop(id) => vec![Key::Nexthop(*id)],
        Via::Gateway(nexthop) => over_vtep(nexthop),
        Via::Direct(_) | Via::Other(_) => vec![],
    }
}

/// The steps from `have` to `want`, in no order.
pub(super) fn diff(want: &Routing, have: &Routing) -> impl Iterator<Item = Op> {
    // A device that can't become what is wanted goes first, and the kernel takes all that hangs on it along.
    let outgrown: BTreeSet<&IfName> = have
        .links
        .iter()
        .filter(|(name, link)| want.links.get(*name).is_some_and(|want| !link.can_become(want)))
        .map(|(name, _)| name)
        .collect();
    let mut ops: Vec<Op> = outgrown.iter().map(|name| Op::Outgrown(**name, have.links[*name])).collect();
    // A new MAC address costs a device its permanent neighbours (`neigh_changeaddr`).
    let renamed: BTreeSet<&IfName> = have
        .links
        .iter()
        .filter(|(name, link)| want.links.get(*name).is_some_and(|want| link.mac != want.mac))
        .map(|(name, _)| name)
        .collect();
    let have = if outgrown.is_empty() && renamed.is_empty() {
        Cow::Borrowed(have)
    } else {
        let mut left = without(have, |name| outgrown.contains(name));
        left.neighbours.retain(|(dev, _), _| !renamed.contains(dev));
        Cow::Owned(left)
    };

    let addresses = |state: &Routing| -> BTreeMap<(IfName, Subnet), Subnet> {
        state.addresses.iter().map(|(dev, a)| ((*dev, *a), *a)).collect()
    };
    ops.extend(changes(&want.links, &have.links).map(|(name, c)| Op::Link(name, c)));
    ops.extend(want.sysctls.iter().filter(|(k, v)| have.sysctls.get(k) != Some(v)).map(|(k, v)| Op::Sysctl(*k, *v)));
    ops.extend(changes(&addresses(want), &addresses(&have)).map(|((dev, _), c)| Op::Address(dev, c)));
    ops.extend(changes(&want.fdb, &have.fdb).map(|((dev, mac), c)| Op::Fdb(dev, mac, c)));
    ops.extend(changes(&want.neighbours, &have.neighbours).map(|((dev, ip), c)| Op::Neighbour(dev, ip, c)));
    ops.extend(changes(&want.nexthops, &have.nexthops).map(|(id, c)| Op::Nexthop(id, c)));
    ops.extend(changes(&want.routes, &have.routes).map(|(dst, c)| Op::Route(dst, c)));
    ops.into_iter()
}

/// The same, where only these entries can differ; `None` when that has to be found among all.
pub(super) fn diff_of(want: &Routing, have: &Routing, keys: &BTreeSet<Key>) -> Option<Vec<Op>> {
    let mut ops = Vec::with_capacity(keys.len());
    for key in keys {
        let op = match *key {
            // With a device goes what hangs on it.
            Key::Link(_) | Key::Sysctl(_) | Key::Address(..) => return None,
            Key::Fdb(dev, mac) => change(&want.fdb, &have.fdb, &(dev, mac)).map(|c| Op::Fdb(dev, mac, c)),
            Key::Neighbour(dev, ip) => {
                change(&want.neighbours, &have.neighbours, &(dev, ip)).map(|c| Op::Neighbour(dev, ip, c))
            }
            Key::Nexthop(id) => change(&want.nexthops, &have.nexthops, &id).map(|c| Op::Nexthop(id, c)),
            Key::Route(dst) => change(&want.routes, &have.routes, &dst).map(|c| Op::Route(dst, c)),
            Key::Table(_)
            | Key::Set(..)
            | Key::Chains(_)
            | Key::Removal(_)
            | Key::SendersChain
            | Key::DockerUser(_)
            | Key::FastPath(_) => None,
        };
        ops.extend(op);
    }
    Some(ops)
}

/// What is missing, other or too much of one entry.
fn change<K: Ord, V: PartialEq + Clone>(want: &BTreeMap<K, V>, have: &BTreeMap<K, V>, key: &K) -> Option<Change<V>> {
    match (want.get(key), have.get(key)) {
        (Some(now), None) => Some(Change::Create(now.clone())),
        (None, Some(was)) => Some(Change::Delete(was.clone())),
        (Some(now), Some(was)) if now != was => Some(Change::Replace { was: was.clone(), now: now.clone() }),
        _ => None,
    }
}

/// `state` after the kernel removed the devices for which `gone` says so: all that hangs on them goes along.
#[must_use]
pub fn without(state: &Routing, gone: impl Fn(&IfName) -> bool) -> Routing {
    let mut left = state.clone();
    left.links.retain(|name, _| !gone(name));
    left.addresses.retain(|(dev, _)| !gone(dev));
    left.fdb.retain(|(dev, _), _| !gone(dev));
    left.neighbours.retain(|(dev, _), _| !gone(dev));
    left.nexthops.retain(|_, nexthop| !gone(&nexthop.dev));
    left.sysctls.retain(|sysctl, _| !sysctl.device().is_some_and(|dev| gone(&dev)));
    let nexthops = &left.nexthops;
    left.routes.retain(|_, via| match via {
        Via::Nexthop(id) => nexthops.contains_key(id),
        Via::Gateway(nexthop) | Via::Direct(nexthop) => !gone(&nexthop.dev),
        Via::Other(_) => true,
    });
    left
}

/// What is missing, other or too much, in the order of the keys: one walk along both tables.
fn changes<K: Ord + Copy, V: PartialEq + Clone>(
    want: &BTreeMap<K, V>,
    have: &BTreeMap<K, V>,
) -> impl Iterator<Item = (K, Change<V>)> {
    let (mut want, mut have) = (want.iter().peekable(), have.iter().peekable());
    std::iter::from_fn(move || {
        loop {
            let order = match (want.peek(), have.peek()) {
                (Some((wanted, _)), Some((found, _))) => wanted.cmp(found),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (None, None) => return None,
            };
            match order {
                Ordering::Less => return want.next().map(|(key, now)| (*key, Change::Create(now.clone()))),
                Ordering::Greater => return have.next().map(|(key, was)| (*key, Change::Delete(was.clone()))),
                Ordering::Equal => {
                    let ((key, now), (_, was)) = (want.next()?, have.next()?);
                    if now != was {
                        return Some((*key, Change::Replace { was: was.clone(), now: now.clone() }));
                    }
                }
            }
        }
    })
}

impl fmt::Display for Op {
    /// The step as a line of iproute2, behind `+` (made), `~` (changed) or `-` (removed).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(name, change) => link_line(f, name, change),
            Self::Outgrown(name, _) => write!(f, "- ip link del {name}"),
            Self::Sysctl(sysctl, value) => write!(f, "~ sysctl -w net/{}={value}", sysctl.path()),
            Self::Address(dev, change) => {
                let (verb, address) = match change {
                    Change::Create(now) | Change::Replace { now, .. } => ("add", now),
                    Change::Delete(was) => ("del", was),
                };
                let nodad = if address.family() == Family::V6 && verb == "add" { " nodad" } else { "" };
                write!(f, "{} ip address {verb} {address} dev {dev}{nodad}", change.verb().sign())
            }
            Self::Fdb(dev, mac, change) => match change.wanted() {
                Some(dst) => {
                    write!(f, "{} bridge fdb replace {mac} dev {dev} dst {dst} self permanent", change.verb().sign())
                }
                None => write!(f, "- bridge fdb del {mac} dev {dev} self"),
            },
            Self::Neighbour(dev, ip, change) => match change.wanted() {
                Some(mac) => {
                    write!(f, "{} ip neighbour replace {ip} lladdr {mac} dev {dev} nud permanent", change.verb().sign())
                }
                None => write!(f, "- ip neighbour del {ip} dev {dev}"),
            },
            Self::Nexthop(id, change) => match change {
                Change::Create(nexthop) => write!(f, "+ ip nexthop add id {id} {}", Onlink(nexthop)),
                Change::Replace { now, .. } => write!(f, "~ ip nexthop replace id {id} {}", Onlink(now)),
                Change::Delete(_) => write!(f, "- ip nexthop del id {id}"),
            },
            Self::Route(dst, change) => {
                let (verb, via) = match change {
                    Change::Create(via) => ("add", via),
                    Change::Replace { now, .. } => ("replace", now),
                    Change::Delete(via) => ("del", via),
                };
                write!(f, "{} ip route {verb} {dst} ", change.verb().sign())?;
                match via {
                    Via::Nexthop(id) => write!(f, "nhid {id} proto {ROUTE_PROTOCOL}"),
                    Via::Gateway(nexthop) => Onlink(nexthop).fmt(f),
                    Via::Direct(Nexthop { gateway, dev }) => {
                        write!(f, "via {gateway} dev {dev} proto {ROUTE_PROTOCOL}")
                    }
                    Via::Other(words) => write!(f, "{words} proto {ROUTE_PROTOCOL}"),
                }
            }
        }
    }
}

struct Onlink<'a>(&'a Nexthop);

impl fmt::Display for Onlink<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "via {} dev {} onlink proto {ROUTE_PROTOCOL}", self.0.gateway, self.0.dev)
    }
}

fn link_line(f: &mut fmt::Formatter<'_>, name: &IfName, change: &Change<VxlanLink>) -> fmt::Result {
    let on = |value: bool, word| if value { word } else { "" };
    match change {
        Change::Create(link) => write!(
            f,
            "+ ip link add {name} address {} mtu {}{} type vxlan id {} dstport {} local {} {}{}",
            link.mac,
            link.mtu,
            on(link.up, " up"),
            link.vni,
            link.port,
            link.local,
            if link.learning { "learning" } else { "nolearning" },
            on(link.gbp, " gbp"),
        ),
        Change::Replace { was, now } => {
            write!(f, "~ ip link set {name}")?;
            if was.mac != now.mac {
                write!(f, " address {}", now.mac)?;
            }
            if was.mtu != now.mtu {
                write!(f, " mtu {}", now.mtu)?;
            }
            if was.up != now.up {
                f.write_str(if now.up { " up" } else { " down" })?;
            }
            if (was.local, was.learning) != (now.local, now.learning) {
                write!(f, " type vxlan local {} {}", now.local, if now.learning { "learning" } else { "nolearning" })?;
            }
            Ok(())
        }
        Change::Delete(_) => write!(f, "- ip link del {name}"),
    }
}
