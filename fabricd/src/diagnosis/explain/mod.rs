//! The path of a packet from a pod, as far as this node decides on it: what is read of it, and what became of real
//! packets that this node sends on it.
//!
//! ```text
//!   the node of the source:  bridge ▸ veth ▸ policy ▸ path ▸ lease ▸ route ▸ nexthop ▸ neighbour ▸ fdb ▸ filter ▸ underlay
//!   the node of the target:  filter ▸ device ▸ path ▸ policy ▸ bridge ▸ veth, and the same path back
//!   out of the network:      bridge ▸ veth ▸ policy ▸ address ▸ route ▸ filter ▸ masquerade
//! ```

mod fast_path;
mod outside;
mod pod;
mod policy;
mod probes;
mod route;
mod service;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use fabric_core::attachments::DEFAULT_BRIDGE;
use fabric_core::firewall::Verdict;
use fabric_core::leases::Lease;
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::plan::filter::senders;
use fabric_core::policy::Direction;
use fabric_core::policy::model::Protocol;
use fabric_core::services::plan::Described;
use fabric_core::state::nft::TableKey;
use fabric_core::state::{Routing, Via, VxlanLink};

pub use self::outside::Place;
use self::probes::Probes;
use self::route::FromPod;
use super::{Inspection, Outcome};
use crate::mesh::{Cause, messages};
use crate::reconcile::firewall::{self, Asked};
use crate::status::view::PeerTrouble;

/// `IPPROTO_ICMP`, `IPPROTO_ICMPV6`.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// The layer of hops that are packets which were sent.
pub const PACKET: &str = "packet";

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

    fn doubtful(layer: &'static str, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self { layer, found: found.into(), outcome: Outcome::Warning, expected: expected.into() }
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
    /// The Services that have the target as their address, if fabricd translates them.
    pub services: Vec<Described>,
    /// Protocol over IP: of pings, unless it is said.
    pub protocol: u8,
    /// The target's port; 0 for protocols without.
    pub port: u16,
}

impl Question {
    /// Looks for the leases of both addresses. `to` is protocol and port; without these it is about a ping.
    #[must_use]
    pub fn new(inspection: &Inspection, source: IpAddr, target: IpAddr, to: Option<(Protocol, u16)>) -> Self {
        let lease = |ip: IpAddr| {
            let mut leases = inspection.view.leases.iter().flat_map(|leases| leases.iter());
            leases.find(|lease| lease.key.subnets().values().any(|subnet| subnet.contains(ip))).cloned()
        };
        let (protocol, port) = match to {
            Some((protocol, port)) => (protocol.number(), port),
            None => (if target.is_ipv4() { ICMP } else { ICMPV6 }, 0),
        };
        Self { source, target, from: lease(source), to: lease(target), protocol, port, services: vec![] }
    }
}

/// Where a packet of this path can be sent from by a program that may enter the pod's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// The pod's network namespace, as the container runtime named it.
    pub netns: PathBuf,
    /// The pod's address.
    pub from: IpAddr,
    /// The other end.
    pub to: IpAddr,
    /// Whether the other end is no pod: then the daemons send it nothing, and it may answer no pings.
    pub outside: bool,
}

/// The pod of this node that can send on this path: the source's, else, the other way round, the target's.
#[must_use]
pub fn sender(inspection: &Inspection, question: &Question) -> Option<Sender> {
    let Question { source, target, from, to, services, .. } = question;
    let own = inspection.view.holding.own.as_ref().map(|own| own.key)?;
    let ours = |lease: &Option<Arc<Lease>>| lease.as_ref().is_some_and(|lease| lease.key == own);
    let place = to.is_none().then(|| if services.is_empty() { Place::of(inspection, *target) } else { Place::Service });
    let (pod, other) = match (ours(from), ours(to)) {
        // Nobody answers pings in a Service's place.
        (true, _) if !matches!(place, Some(Place::Service | Place::Nobodys)) => (*source, *target),
        (false, true) if from.is_some() => (*target, *source),
        _ => return None,
    };
    let netns = inspection.addresses().ok()?.pod_with(pod)?.saved.netns.clone().unwrap_or_default();
    Some(Sender { netns, from: pod, to: other, outside: place.is_some() })
}

/// The hops on this node. Reads files, asks the kernel, and sends packets: for a thread that may wait.
#[must_use]
pub fn explain(inspection: &Inspection, question: &Question) -> Vec<Hop> {
    let Question { source, target, from, to, services, .. } = question;
    let own = inspection.view.holding.own.as_ref().map(|own| own.key);
    let ours = |lease: &Option<Arc<Lease>>| lease.as_ref().is_some_and(|lease| Some(lease.key) == own);
    if !ours(from) && !ours(to) {
        return vec![];
    }
    let in_network = [(source, from), (target, to)].into_iter().filter(|(_, lease)| lease.is_some());
    let probes = Probes::send(inspection, &in_network.map(|(ip, _)| *ip).collect::<Vec<_>>());
    let mut hops = vec![];
    if ours(from) {
        hops.extend(pod::hops(inspection, *source, &probes));
        hops.extend(policy::hop(inspection, question, Direction::Egress));
        let from_pod = FromPod { ip: *source, bridge: bridge_of(inspection, *source) };
        match to {
            Some(_) if ours(to) => {
                hops.extend(policy::hop(inspection, question, Direction::Ingress));
                hops.extend(fast_path::hop(inspection, &[*source, *target], None));
                hops.extend(pod::hops(inspection, *target, &probes));
            }
            Some(lease) => {
                hops.extend(fast_path::hop(inspection, &[*source], Some(*target)));
                hops.extend(towards(inspection, from_pod, *target, lease, &probes));
            }
            None if !services.is_empty() => {
                hops.extend(services.iter().flat_map(|of| service::hops(of, *source, *target)));
            }
            None => hops.extend(outside::hops(inspection, from_pod, *target)),
        }
    } else {
        hops.extend(arrival(inspection, question));
        hops.extend(from.is_some().then(|| fast_path::hop(inspection, &[*target], Some(*source))).flatten());
        let bridge = bridge_of(inspection, *target);
        hops.extend(not_fine(foreign(inspection, Asked::Between { source: *source, target: *target, bridge })));
        hops.extend(policy::hop(inspection, question, Direction::Ingress));
        hops.extend(pod::hops(inspection, *target, &probes));
        // What is answered goes back.
        if let Some(lease) = from {
            let from_pod = FromPod { ip: *target, bridge };
            hops.extend(towards(inspection, from_pod, *source, lease, &probes));
        }
    }
    hops
}

/// The bridge that the pod with this address is attached to.
fn bridge_of(inspection: &Inspection, ip: IpAddr) -> IfName {
    let addresses = inspection.addresses().unwrap_or_default();
    let own = addresses.pod_with(ip).and_then(|pod| pod.saved.bridge);
    let bridge = own.or_else(|| inspection.pod_bridges().first().copied());
    bridge.unwrap_or_else(|| DEFAULT_BRIDGE.parse().expect("a valid name"))
}

/// What the chains of others make of a packet here.
fn foreign(inspection: &Inspection, asked: Asked) -> Option<Hop> {
    let observed = inspection.snapshot.observed.as_ref()?;
    let what = match asked {
        Asked::Between { source, target, .. } => format!("{source} to {target}"),
        Asked::From(peer) => format!("VXLAN from {peer}"),
        Asked::To(peer) => format!("VXLAN to {peer}"),
    };
    let all = |words: Vec<String>| words.join("; ");
    Some(match firewall::ask(&inspection.view, observed, asked)? {
        (Verdict::Passes, _) => Hop::fine("filter", format!("{what} passes the chains of others")),
        (Verdict::Dropped(by), commands) => Hop::failed(
            "filter",
            format!("{what}: dropped by {}", all(by.iter().map(ToString::to_string).collect())),
            format!("rules that let it pass:\n{}", commands.join("\n")),
        ),
        (Verdict::Unknown(doubts), _) => {
            let doubts = all(doubts.iter().map(ToString::to_string).collect());
            Hop::unknown("filter", format!("{what}: may be dropped by {doubts}"))
        }
    })
}

/// Only what is to be told.
fn not_fine(hop: Option<Hop>) -> Option<Hop> {
    hop.filter(|hop| hop.outcome != Outcome::Fine)
}

/// From this node to the one that has `ip`.
fn towards(inspection: &Inspection, from: FromPod, ip: IpAddr, lease: &Lease, probes: &Probes) -> Vec<Hop> {
    let family = Family::of(ip);
    let name = lease.record.node().map_or_else(|| "a flannel node".to_owned(), ToString::to_string);
    let (Some(subnet), endpoints) = (lease.key.subnets().get(family).copied(), lease.record.endpoints()) else {
        return vec![Hop::failed("lease", lease.key.to_string(), format!("a subnet of {family}"))];
    };
    let mut hops = vec![match inspection.view.troubles.get(&lease.key) {
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
    let (Some(wanted), Some(observed)) = (&inspection.snapshot.wanted, &inspection.snapshot.observed) else {
        hops.push(Hop::unknown("route", format!("nothing is planned: {}", inspection.snapshot.blocked)));
        return hops;
    };
    hops.extend(entries(inspection, from, &wanted.state, &observed.ours, subnet, ip));
    hops.extend(foreign(inspection, Asked::Between { source: from.ip, target: ip, bridge: from.bridge }));
    hops.extend(endpoints.get(family).and_then(|end| not_fine(foreign(inspection, Asked::To(end.public_ip)))));
    hops.push(underlay(inspection, lease, family));
    hops.extend(probes.hop(ip));
    hops
}

/// Route, nexthop, neighbour and FDB entry: what is there beside what should be.
fn entries(
    inspection: &Inspection,
    from: FromPod,
    wanted: &Routing,
    had: &Routing,
    subnet: Subnet,
    ip: IpAddr,
) -> Vec<Hop> {
    let routed = |device| route::hop(inspection, from, ip, Some(device)).0;
    let mut hops = vec![];
    let via = wanted.routes.get(&subnet);
    hops.push(compare("route", had.routes.get(&subnet).map(via_line), via.map(via_line), &subnet.to_string()));
    let nexthop = match via {
        Some(Via::Nexthop(id)) => {
            let line =
                |state: &Routing| state.nexthops.get(id).map(|n| format!("id {id} via {} dev {}", n.gateway, n.dev));
            hops.push(compare("nexthop", line(had), line(wanted), &format!("id {id}")));
            wanted.nexthops.get(id).copied()
        }
        Some(Via::Gateway(nexthop)) => Some(*nexthop),
        Some(Via::Direct(nexthop)) => {
            hops.push(routed(nexthop.dev));
            return hops;
        }
        Some(Via::Other(_)) | None => None,
    };
    let Some(nexthop) = nexthop else { return hops };
    hops.push(routed(nexthop.dev));
    let key = (nexthop.dev, nexthop.gateway);
    let mac = wanted.neighbours.get(&key).copied();
    let line = |state: &Routing| state.neighbours.get(&key).map(|mac| format!("{} lladdr {mac} dev {}", key.1, key.0));
    hops.push(compare("neighbour", line(had), line(wanted), &nexthop.gateway.to_string()));
    if let Some(mac) = mac {
        let line = |state: &Routing| state.fdb.get(&(key.0, mac)).map(|dst| format!("{mac} dev {} dst {dst}", key.0));
        hops.push(compare("fdb", line(had), line(wanted), &mac.to_string()));
    }
    let link = |tables: &Routing| {
        let state = |link: &VxlanLink| if link.up { "up" } else { "down" };
        let line = |link: &VxlanLink| format!("{} {} {}, MTU {}", key.0, link.mac, state(link), link.mtu);
        tables.links.get(&key.0).map(line)
    };
    hops.push(compare("device", link(had), link(wanted), key.0.as_str()));
    hops
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

/// What the mesh knows of the path.
fn underlay(inspection: &Inspection, lease: &Lease, family: Family) -> Hop {
    let overlay = lease.key.subnets().get(family).map(|subnet| subnet.base());
    let mut hop = Hop::unknown("underlay", "not probed yet: see fabricctl mesh");
    inspection.mesh.each(|path| {
        if Some(path.target.overlay) == overlay {
            let (verdict, host) = (messages::verdict(path), path.target.public_ip);
            hop = match verdict.cause {
                Cause::Unknown => hop.clone(),
                cause if cause.hurts() => {
                    Hop::failed("underlay", format!("{host}: {}: {}", cause.word(), verdict.evidence), verdict.fix)
                }
                cause => Hop::fine(
                    "underlay",
                    format!("{host}: {}, packets of {} bytes come through", cause.word(), path.path_mtu),
                ),
            };
        }
    });
    hop
}

/// What meets a packet that comes from the source's node.
fn arrival(inspection: &Inspection, question: &Question) -> Vec<Hop> {
    let family = Family::of(question.target);
    let Some(observed) = &inspection.snapshot.observed else {
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
    let table = observed.filter.get(&TableKey::Fabric);
    let mut hops: Vec<Hop> =
        public_ip.and_then(|peer| not_fine(foreign(inspection, Asked::From(peer)))).into_iter().collect();
    hops.push(match (table, subnet, public_ip) {
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
    });
    let published = question.to.as_ref().and_then(|to| to.record.endpoints().get(family).copied());
    let devices: BTreeMap<_, _> = inspection
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
