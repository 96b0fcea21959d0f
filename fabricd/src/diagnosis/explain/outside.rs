//! A destination that is no pod's: outside the network, a node's own address, a Service's, or nobody's.

use std::net::IpAddr;

use fabric_core::model::{Family, IfName};

use super::route::{self, FromPod};
use super::{Hop, foreign};
use crate::diagnosis::{Inspection, pod_checks};
use crate::kernel::{self, RouteLookup};
use crate::reconcile::firewall::Asked;

/// What an address is that no lease has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the network, but in nobody's subnet.
    Nobodys,
    /// This node's own, on that interface.
    Ours(IfName),
    /// Another node's, in the underlay.
    Node(String),
    /// A Service's: kube-proxy translates it.
    Service,
    /// Anywhere else.
    Outside,
}

impl Place {
    /// Looks for the address on this host, among the leases, and in kube-proxy's rules.
    #[must_use]
    pub fn of(inspection: &Inspection, ip: IpAddr) -> Self {
        let own = inspection.snapshot.observed.iter().flat_map(|observed| &observed.host.links);
        if let Some(link) = own.into_iter().find(|link| link.addresses.iter().any(|(own, _)| *own == ip)) {
            // With IPVS kube-proxy puts every Service's address on an interface of its own.
            return if link.name.as_str() == "kube-ipvs0" { Self::Service } else { Self::Ours(link.name) };
        }
        let space =
            inspection.view.network.and_then(|network| network.spaces.get(Family::of(ip)).map(|space| space.network));
        if space.is_some_and(|space| space.contains(ip)) {
            return Self::Nobodys;
        }
        let mut leases = inspection.view.leases.iter().flat_map(|leases| leases.iter());
        if let Some(lease) = leases.find(|lease| lease.record.endpoints().values().any(|end| end.public_ip == ip)) {
            return Self::Node(lease.holder());
        }
        if kernel::is_service(ip) { Self::Service } else { Self::Outside }
    }
}

/// The hops of a pod's packet to such an address.
pub(super) fn hops(inspection: &Inspection, pod: FromPod, to: IpAddr) -> Vec<Hop> {
    let spaces =
        inspection.view.network.map(|network| super::list(network.spaces.values().map(|s| s.network.to_string())));
    let what = match Place::of(inspection, to) {
        Place::Nobodys => {
            return vec![Hop::failed(
                "lease",
                format!("no node has a lease with {to}, so no pod has that address"),
                "is it the address of a pod that is gone?\nfabricctl leases",
            )];
        }
        Place::Service => {
            return vec![Hop::unknown(
                "service",
                format!("{to} is a Service's: kube-proxy translates it to a pod's address; explain one of those"),
            )];
        }
        Place::Ours(link) => format!("{to} is this node's own, on {link}"),
        Place::Node(name) => format!("{to} is the underlay address of {name}"),
        Place::Outside => format!("{to} is outside the network {}", spaces.unwrap_or_default()),
    };
    let mut hops = vec![Hop::fine("address", what)];
    let (hop, taken) = route::hop(inspection, pod, to, None);
    hops.push(hop);
    let Some(RouteLookup::Out { device, .. }) = taken else { return hops };
    hops.extend(foreign(inspection, Asked::Between { source: pod.ip, target: to, bridge: pod.bridge }));
    hops.push(if pod_checks::masquerades(inspection) {
        match kernel::route_to(to) {
            Ok(Some((_, source))) => Hop::fine("masquerade", format!("on: it leaves {device} with {source} as source")),
            _ => Hop::fine("masquerade", format!("on: it leaves with the address of {device}")),
        }
    } else {
        Hop::doubtful(
            "masquerade",
            format!("off: it leaves {device} with {} as source", pod.ip),
            format!(
                "answers find back only if the routers outside know this node's subnet; to switch it on:\n{}",
                pod_checks::how_to_masquerade(inspection)
            ),
        )
    });
    hops
}
