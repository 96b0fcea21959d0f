//! A pod of this node: the bridge, its veth, and whether its kernel answers.

use std::net::IpAddr;

use fabric_core::model::Family;

use super::probes::Probes;
use super::{Hop, list};
use crate::diagnosis::{Inspection, pod_checks};
use crate::host::addresses::Addresses;

/// The hops of an address of this node's subnet.
pub(super) fn hops(inspection: &Inspection, ip: IpAddr, probes: &Probes) -> Vec<Hop> {
    let Some(observed) = &inspection.snapshot.observed else {
        return vec![Hop::unknown("bridge", "the kernel can't be read")];
    };
    let addresses = match inspection.addresses() {
        Ok(addresses) => addresses,
        Err(why) => return vec![Hop::unknown("veth", why)],
    };
    let own = inspection.view.holding.own.as_ref().and_then(|own| own.key.subnets().get(Family::of(ip)).copied());
    if let Some(here) = of_the_node(inspection, ip) {
        return vec![Hop::fine("address", format!("{ip} is an address of this node itself, on {here}: no pod's"))];
    }
    let pod = addresses.pod_with(ip);
    let Some(name) = pod.map_or_else(|| addresses.bridges.first().copied(), |pod| pod.saved.bridge) else {
        return vec![Hop::unknown("bridge", format!("the pod with {ip} is attached to no bridge"))];
    };
    let Some(link) = observed.host.links.iter().find(|link| link.name == name) else {
        return vec![
            Hop::failed(
                "bridge",
                format!("there is no {name}"),
                "the CNI plugin makes it with the first pod: is there one?\nfabricctl doctor",
            ),
            veth(inspection, &addresses, ip),
        ];
    };
    let troubles = pod_checks::bridge_troubles(inspection, link, own.into_iter());
    let mut hops: Vec<Hop> =
        troubles.into_iter().map(|trouble| Hop::failed("bridge", trouble.what, trouble.fix)).collect();
    if hops.is_empty() {
        let ips = list(link.addresses.iter().map(|(ip, _)| ip.to_string()));
        hops.push(Hop::fine("bridge", format!("{name} up, {ips}")));
    }
    hops.push(veth(inspection, &addresses, ip));
    hops.extend(probes.hop(ip));
    hops
}

/// The device that has an address, if it is one of the node itself: a gateway's, or a VTEP's.
fn of_the_node(inspection: &Inspection, ip: IpAddr) -> Option<String> {
    let observed = inspection.snapshot.observed.as_ref()?;
    let link = observed.host.links.iter().find(|link| link.addresses.iter().any(|(own, _)| *own == ip));
    let vtep = || observed.ours.addresses.iter().find(|(_, address)| address.base() == ip).map(|(device, _)| device);
    link.map(|link| &link.name).or_else(vtep).map(ToString::to_string)
}

fn veth(inspection: &Inspection, addresses: &Addresses, ip: IpAddr) -> Hop {
    let taken = addresses.attached.iter().chain(&addresses.leaked).find(|entry| entry.ip == ip);
    match (addresses.pod_with(ip), taken) {
        (Some(pod), _) => match pod_checks::port_trouble(inspection, pod) {
            Some(trouble) => Hop::failed("veth", trouble.what, trouble.fix),
            None => {
                let ports = pod.saved.attached.as_ref().map_or(String::new(), |attached| attached.ports.join(" "));
                Hop::fine("veth", format!("{ports}, of container {}", pod.owner.container))
            }
        },
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
            "is the pod still there, and is this its address?\nkubectl get pods -A -o wide",
        ),
    }
}
