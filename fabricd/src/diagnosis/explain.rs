//! The way of a packet from one pod to another, as far as this node decides on it.
//!
//! ```text
//!   the node of the source:  veth ▸ bridge ▸ lease ▸ route ▸ nexthop ▸ neighbour ▸ fdb ▸ filter ▸ underlay
//!   the node of the target:  filter ▸ device ▸ bridge ▸ veth, and the same way back
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::leases::Lease;
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::rules::TableFamily;
use fabric_core::rules::senders;
use fabric_core::state::{KernelState, Via, VxlanLink};

use super::{Outcome, Scene};
use crate::kernel;
use crate::mesh::Cause;
use crate::view::PeerTrouble;

/// One thing that decides on a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hop {
    /// What it is.
    pub layer: &'static str,
    /// What is there.
    pub found: String,
    /// How that is.
    pub outcome: Outcome,
    /// What should be there, and what to do.
    pub expected: String,
}

impl Hop {
    fn fine(layer: &'static str, found: impl Into<String>) -> Self {
        Self { layer, found: found.into(), outcome: Outcome::Fine, expected: String::new() }
    }

    fn failed(layer: &'static str, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { layer, found: found.into(), outcome: Outcome::Failed, expected: expected.into() }
    }

    fn unknown(layer: &'static str, found: impl Into<String>) -> Self {
        Self { layer, found: found.into(), outcome: Outcome::Skipped, expected: String::new() }
    }
}

/// Where two addresses are.
#[derive(Clone, Debug)]
pub struct Question {
    /// Where packets come from.
    pub source: IpAddr,
    /// Where they go to.
    pub target: IpAddr,
    /// The lease that has the source.
    pub from: Option<Arc<Lease>>,
    /// The lease that has the target.
    pub to: Option<Arc<Lease>>,
}

impl Question {
    /// Looks for the leases of both addresses.
    #[must_use]
    pub fn new(scene: &Scene, source: IpAddr, target: IpAddr) -> Self {
        let lease = |ip: IpAddr| {
            let mut leases = scene.view.leases.iter().flat_map(|leases| leases.iter());
            leases.find(|lease| lease.key.subnets().values().any(|subnet| subnet.contains(ip))).cloned()
        };
        Self { source, target, from: lease(source), to: lease(target) }
    }
}

/// The hops on this node. Reads files and asks the kernel: for a thread that may wait.
#[must_use]
pub fn explain(scene: &Scene, question: &Question) -> Vec<Hop> {
    let own = scene.view.holding.own.as_ref().map(|own| own.key);
    let ours = |lease: &Option<Arc<Lease>>| lease.as_ref().is_some_and(|lease| Some(lease.key) == own);
    let mut hops = vec![];
    if ours(&question.from) {
        hops.extend(pod(scene, question.source));
        if ours(&question.to) {
            hops.extend(pod(scene, question.target));
        } else {
            hops.extend(towards(scene, question.target, question.to.as_deref()));
        }
    } else if ours(&question.to) {
        hops.extend(arrival(scene, question));
        hops.extend(pod(scene, question.target));
        // What is answered goes back.
        hops.extend(towards(scene, question.source, question.from.as_deref()));
    }
    hops
}

/// The bridge and the veth of a pod of this node.
fn pod(scene: &Scene, ip: IpAddr) -> Vec<Hop> {
    let Some(observed) = &scene.looked.observed else {
        return vec![Hop::unknown("bridge", "the kernel can't be read")];
    };
    let addresses = match scene.addresses() {
        Ok(addresses) => addresses,
        Err(why) => return vec![Hop::unknown("veth", why)],
    };
    let pod = addresses.pod_with(ip);
    let Some(name) = pod.map_or_else(|| addresses.bridges.first().copied(), |pod| pod.saved.bridge) else {
        return vec![Hop::unknown("bridge", format!("the pod with {ip} is attached to no bridge"))];
    };
    let own = scene.view.holding.own.as_ref().and_then(|own| own.key.subnets().get(Family::of(ip)).copied());
    let bridge = observed.host.links.iter().find(|link| link.name == name);
    let mut hops = vec![match (bridge, own) {
        (None, _) => Hop::failed(
            "bridge",
            format!("there is no {name}"),
            "the CNI plugin makes it with the first pod: is there one?",
        ),
        (Some(link), _) if !link.up => {
            Hop::failed("bridge", format!("{name} is down"), format!("ip link set {name} up"))
        }
        (Some(link), Some(own)) if !link.addresses.iter().any(|(_, prefix)| *prefix == own) => Hop::failed(
            "bridge",
            format!("{name} has {}", list(link.addresses.iter().map(|(_, prefix)| prefix.to_string()))),
            format!("an address of {own}: remove this node's pods, then ip link del {name}"),
        ),
        (Some(link), _) => {
            Hop::fine("bridge", format!("{name} up, {}", list(link.addresses.iter().map(|(ip, _)| ip.to_string()))))
        }
    }];
    let taken = addresses.attached.iter().chain(&addresses.leaked).find(|entry| entry.ip == ip);
    hops.push(match (pod, taken) {
        (Some(pod), _) => {
            let ports = pod.saved.attached.as_ref().map_or(&[] as &[String], |attached| &attached.ports);
            let there = observed.bridges.get(&name);
            let attached = |port: &String| there.is_some_and(|all| all.iter().any(|name| name.as_str() == port));
            let (ports, container) = (ports.join(" "), &pod.owner.container);
            if ports.split(' ').map(str::to_owned).any(|port| attached(&port)) {
                Hop::fine("veth", format!("{ports} on {name}, of container {container}"))
            } else {
                Hop::failed(
                    "veth",
                    format!("container {container} should be at {ports}, which is not on {name}"),
                    "recreate the pod",
                )
            }
        }
        (None, Some(entry)) => {
            let container = entry.owner.as_ref().map_or("no container", |owner| &owner.container);
            Hop::unknown(
                "veth",
                format!("by {} {container} has {ip}; no attachment is saved for it", entry.file.display()),
            )
        }
        (None, None) => Hop::failed(
            "veth",
            format!("no pod of this node has {ip}"),
            "is the pod still there? kubectl get pod -o wide",
        ),
    });
    hops
}

/// From this node to the one that has `ip`.
fn towards(scene: &Scene, ip: IpAddr, lease: Option<&Lease>) -> Vec<Hop> {
    let family = Family::of(ip);
    let Some(lease) = lease else {
        return vec![Hop::failed(
            "lease",
            format!("no node has a lease with {ip}"),
            "is it a pod's address? fabricctl leases",
        )];
    };
    let name = lease.record.node().map_or_else(|| "a flannel node".to_owned(), ToString::to_string);
    let (Some(subnet), endpoints) = (lease.key.subnets().get(family).copied(), lease.record.endpoints()) else {
        return vec![Hop::failed("lease", lease.key.to_string(), format!("a subnet of {family}"))];
    };
    let mut hops = vec![match scene.view.troubles.get(&lease.key) {
        Some(trouble @ PeerTrouble::Refused(_)) => {
            Hop::failed("lease", format!("{subnet} is {name}'s, refused: {trouble}"), "see fabricctl peers")
        }
        Some(trouble) => Hop::failed(
            "lease",
            format!("{subnet} is {name}'s, pending: {trouble}"),
            "it is being retried: see fabricctl plan",
        ),
        None => Hop::fine(
            "lease",
            format!("{subnet} is {name}'s, at {}", list(endpoints.get(family).map(|e| e.public_ip.to_string()))),
        ),
    }];
    let (Some(wanted), Some(observed)) = (&scene.looked.wanted, &scene.looked.observed) else {
        hops.push(Hop::unknown("route", format!("nothing is planned: {}", scene.looked.blocked)));
        return hops;
    };
    hops.extend(entries(&wanted.state, &observed.ours, subnet, ip));
    let forward = observed.forward_drops.iter().find(|drop| drop.family == family);
    hops.push(match forward {
        Some(drop) => Hop::failed(
            "filter",
            format!("{} drops forwarded {family} packets", drop.chain),
            drop.remedy.replace('\n', "; "),
        ),
        None => Hop::fine("filter", "no chain drops forwarded packets by its policy"),
    });
    hops.push(underlay(scene, lease, family));
    hops
}

/// Route, nexthop, neighbour and FDB entry: what is there beside what should be.
fn entries(wanted: &KernelState, had: &KernelState, subnet: Subnet, ip: IpAddr) -> Vec<Hop> {
    let mut hops = vec![];
    let via = wanted.routes.get(&subnet);
    hops.push(compare("route", had.routes.get(&subnet).map(via_line), via.map(via_line), &subnet.to_string()));
    let nexthop = match via {
        Some(Via::Nexthop(id)) => {
            let line = |state: &KernelState| {
                state.nexthops.get(id).map(|n| format!("id {id} via {} dev {}", n.gateway, n.dev))
            };
            hops.push(compare("nexthop", line(had), line(wanted), &format!("id {id}")));
            wanted.nexthops.get(id).copied()
        }
        Some(Via::Gateway(nexthop)) => Some(*nexthop),
        Some(Via::Direct(nexthop)) => {
            hops.push(routed(ip, nexthop.dev));
            return hops;
        }
        Some(Via::Other(_)) | None => None,
    };
    let Some(nexthop) = nexthop else { return hops };
    hops.push(routed(ip, nexthop.dev));
    let key = (nexthop.dev, nexthop.gateway);
    let mac = wanted.neighbours.get(&key).copied();
    let line =
        |state: &KernelState| state.neighbours.get(&key).map(|mac| format!("{} lladdr {mac} dev {}", key.1, key.0));
    hops.push(compare("neighbour", line(had), line(wanted), &nexthop.gateway.to_string()));
    if let Some(mac) = mac {
        let line =
            |state: &KernelState| state.fdb.get(&(key.0, mac)).map(|dst| format!("{mac} dev {} dst {dst}", key.0));
        hops.push(compare("fdb", line(had), line(wanted), &mac.to_string()));
    }
    let link = |tables: &KernelState| {
        let state = |link: &VxlanLink| if link.up { "up" } else { "down" };
        let line = |link: &VxlanLink| format!("{} {} {}, MTU {}", key.0, link.mac, state(link), link.mtu);
        tables.links.get(&key.0).map(line)
    };
    hops.push(compare("device", link(had), link(wanted), key.0.as_str()));
    hops
}

/// What the kernel itself says: somebody's more specific route or rule may lead packets elsewhere.
fn routed(ip: IpAddr, dev: IfName) -> Hop {
    match kernel::route_to(ip) {
        Err(error) => Hop::failed(
            "route",
            format!("ip route get {ip}: {error}"),
            format!("dev {dev}; who leads it astray: ip rule; ip route show table all"),
        ),
        Ok(Some((by, _))) if by != dev => Hop::failed(
            "route",
            format!("ip route get {ip}: dev {by}"),
            format!("dev {dev}; who leads it astray: ip rule; ip route show table all"),
        ),
        Ok(Some((by, source))) => Hop::fine("route", format!("ip route get {ip}: dev {by} src {source}")),
        Ok(None) => Hop::failed("route", format!("ip route get {ip}: nowhere"), format!("dev {dev}")),
    }
}

fn compare(layer: &'static str, had: Option<String>, wanted: Option<String>, what: &str) -> Hop {
    match (had, wanted) {
        (Some(had), Some(wanted)) if had == wanted => Hop::fine(layer, had),
        (Some(had), Some(wanted)) => Hop::failed(layer, had, format!("{wanted}; see fabricctl plan")),
        (None, Some(wanted)) => Hop::failed(layer, format!("{what}: none"), format!("{wanted}; see fabricctl plan")),
        (had, None) => Hop::failed(
            layer,
            had.unwrap_or_else(|| format!("{what}: none")),
            "its lease is not programmed: see fabricctl peers",
        ),
    }
}

fn via_line(via: &Via) -> String {
    match via {
        Via::Nexthop(id) => format!("nhid {id}"),
        Via::Gateway(n) => format!("via {} dev {} onlink", n.gateway, n.dev),
        Via::Direct(n) => format!("via {} dev {}", n.gateway, n.dev),
        Via::Other(words) => words.clone(),
    }
}

/// What the mesh knows of the way.
fn underlay(scene: &Scene, lease: &Lease, family: Family) -> Hop {
    let overlay = lease.key.subnets().get(family).map(|subnet| subnet.base());
    let mut hop = Hop::unknown("underlay", "not probed yet: see fabricctl mesh");
    scene.mesh.each(|way| {
        if Some(way.target.overlay) == overlay {
            let (verdict, host) = (way.verdict(), way.target.public_ip);
            hop = match verdict.cause {
                Cause::Unknown => hop.clone(),
                cause if cause.hurts() => {
                    Hop::failed("underlay", format!("{host}: {}: {}", cause.word(), verdict.evidence), verdict.fix)
                }
                cause => Hop::fine(
                    "underlay",
                    format!("{host}: {}, packets of {} bytes come through", cause.word(), way.path_mtu),
                ),
            };
        }
    });
    hop
}

/// What meets a packet that comes from the source's node.
fn arrival(scene: &Scene, question: &Question) -> Vec<Hop> {
    let family = Family::of(question.target);
    let Some(observed) = &scene.looked.observed else {
        return vec![Hop::unknown("device", "the kernel can't be read")];
    };
    let Some(from) = &question.from else {
        return vec![Hop::failed(
            "lease",
            format!("no node has a lease with {}", question.source),
            "its packets are dropped: fabricctl leases",
        )];
    };
    let subnet = from.key.subnets().get(family).copied();
    let public_ip = from.record.endpoints().get(family).map(|endpoint| endpoint.public_ip);
    let table = observed.rules.get(&TableFamily::Inet);
    let mut hops = vec![match (table, subnet, public_ip) {
        (Some(table), Some(subnet), Some(public_ip)) => match senders::may_send(table, public_ip, subnet) {
            None => Hop::unknown("filter", "who sends is not checked"),
            Some(true) => Hop::fine("filter", format!("{public_ip} may send from {subnet}")),
            Some(false) => Hop::failed(
                "filter",
                format!("{public_ip} may not send from {subnet}"),
                "it is no peer of this node (yet): see fabricctl peers here",
            ),
        },
        (None, ..) => Hop::unknown("filter", "there is no filter"),
        _ => Hop::failed("filter", format!("{} has no {family}", from.key), "a subnet of that family"),
    }];
    let published = question.to.as_ref().and_then(|to| to.record.endpoints().get(family).copied());
    let devices: BTreeMap<_, _> = scene
        .view
        .vteps
        .iter()
        .filter(|end| Family::of(end.vtep.local) == family)
        .map(|end| (end.device, end))
        .collect();
    for (device, _) in devices {
        hops.push(match (observed.ours.links.get(&device), published) {
            (None, _) => {
                Hop::failed("device", format!("{device}: none"), "it is made by fabricd: see fabricctl status")
            }
            (Some(link), Some(published)) if link.mac != published.vtep_mac => Hop::failed(
                "device",
                format!("{device} has {}", link.mac),
                format!("{}, as published; see fabricctl plan", published.vtep_mac),
            ),
            (Some(link), _) if !link.up => {
                Hop::failed("device", format!("{device} is down"), format!("ip link set {device} up"))
            }
            (Some(link), _) => Hop::fine("device", format!("{device} {} up, MTU {}", link.mac, link.mtu)),
        });
    }
    hops
}

fn list(words: impl IntoIterator<Item = String>) -> String {
    words.into_iter().collect::<Vec<_>>().join(" ")
}
