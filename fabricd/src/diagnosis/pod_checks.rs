//! The checks of `fabricctl doctor` of the bridge and of the pods that are attached to it.

use std::collections::BTreeSet;

use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::state::nft::TableKey;

use super::Inspection;
use super::finding::{Finding, Problem, all};
use super::host_checks::read;
use crate::host::addresses::Pod;
use crate::host::underlay::HostLink;
use crate::kernel::Observed;

/// The bridges of pods that are there.
fn bridges<'a>(inspection: &Inspection, observed: &'a Observed) -> Vec<&'a HostLink> {
    let names = inspection.pod_bridges();
    observed.host.links.iter().filter(|link| names.contains(&link.name)).collect()
}

pub(super) fn bridge(inspection: &Inspection) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    let there = bridges(inspection, observed);
    if there.is_empty() {
        let names = inspection.pod_bridges().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        return Finding::skipped(format!("there is no {names}: no pod has been added yet"));
    }
    let Some(own) = &inspection.view.holding.own else { return Finding::skipped("no lease is held") };
    let problems =
        there.into_iter().flat_map(|link| bridge_troubles(inspection, link, own.key.subnets().values().copied()));
    Finding::of(problems.collect(), own.key.to_string())
}

/// What is wrong with a bridge that should have the gateway's address of these subnets.
pub(super) fn bridge_troubles(
    inspection: &Inspection,
    link: &HostLink,
    subnets: impl Iterator<Item = Subnet>,
) -> Vec<Problem> {
    let name = link.name;
    let mut problems = vec![];
    if !link.up {
        problems.push(Problem::failure(format!("{name} is down"), format!("ip link set {name} up")));
    }
    for subnet in subnets.filter(|subnet| !link.addresses.iter().any(|(_, prefix)| prefix == subnet)) {
        let network = inspection.view.network.and_then(|network| Some(network.spaces.get(subnet.family())?.network));
        let within = |(ip, _): &&(std::net::IpAddr, Subnet)| network.is_some_and(|network| network.contains(*ip));
        let earlier: Vec<String> = link.addresses.iter().filter(within).map(|(_, prefix)| prefix.to_string()).collect();
        problems.push(match earlier.is_empty() {
            true => Problem::failure(
                format!("{name} has no address of {subnet}"),
                format!("ip address add {}/{} dev {name}", subnet.gateway(), subnet.prefix_len()),
            ),
            false => Problem::failure(
                format!("{name} has addresses of {}, this node's subnet is {subnet}", all(earlier)),
                format!(
                    "it is of an earlier subnet: recreate this node's pods; when the old ones are gone:\n\
                     ip link del {name}"
                ),
            ),
        });
    }
    problems
}

/// Every attached pod's port is on the bridge, up, and the pod's end as well.
pub(super) fn ports(inspection: &Inspection) -> Finding {
    match inspection.addresses() {
        Err(why) => Finding::skipped(why),
        Ok(addresses) => Finding::of(
            addresses.pods.iter().filter_map(|pod| port_trouble(inspection, pod)).collect(),
            format!("{} attached pods, each with its veth on the bridge and a carrier", addresses.pods.len()),
        ),
    }
}

/// What is wrong with a pod's veth; `None` when nothing is, or when it has none.
pub(super) fn port_trouble(inspection: &Inspection, pod: &Pod) -> Option<Problem> {
    let observed = inspection.snapshot.observed.as_ref()?;
    let (bridge, attached) = (pod.saved.bridge?, pod.saved.attached.as_ref()?);
    let there = |port: &IfName| observed.host.links.iter().find(|link| link.name == *port);
    let ports = attached.ports.iter().filter_map(|port| port.parse().ok());
    let (container, interface) = (&pod.owner.container, &pod.owner.ifname);
    let ips = attached.ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
    let Some(link) = ports.filter_map(|port| there(&port)).next() else {
        let port = attached.ports.first()?;
        let what =
            format!("{port} of container {container} ({ips}) is gone, though the pod's network namespace is there");
        return Some(Problem::failure(what, "recreate this pod"));
    };
    let (port, has) = (link.name, format!("{} of container {container} ({ips})", link.name));
    if !observed.bridges.get(&bridge).is_some_and(|ports| ports.contains(&port)) {
        return Some(Problem::failure(
            format!("{has} is not on {bridge}"),
            format!("ip link set {port} master {bridge} up"),
        ));
    }
    if !link.up {
        return Some(Problem::failure(format!("{has} is down"), format!("ip link set {port} up")));
    }
    // A veth has carrier while its other end is up.
    let carrier = read(inspection, &format!("sys/class/net/{port}/carrier"));
    (carrier.as_deref() == Some("0")).then(|| {
        Problem::failure(format!("{has} has no carrier: the pod's {interface} is down"), up_again(inspection, pod))
    })
}

/// The commands that bring a pod's interface up with its routes. IPv6 addresses are gone with the link.
fn up_again(inspection: &Inspection, pod: &Pod) -> String {
    let ips = pod.saved.ips();
    let own = inspection.view.holding.own.as_ref().map(|own| own.key.subnets());
    match (&pod.saved.netns, own.and_then(|own| own.v4)) {
        (Some(netns), Some(subnet)) if ips.iter().all(|ip| subnet.contains(*ip)) => format!(
            "nsenter --net={0} ip link set {1} up\nnsenter --net={0} ip route replace default via {2}",
            netns.display(),
            pod.owner.ifname,
            subnet.gateway()
        ),
        _ => "recreate this pod: IPv6 addresses are lost with the link".into(),
    }
}

pub(super) fn bridge_mtu(inspection: &Inspection) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    let ports: BTreeSet<_> =
        inspection.pod_bridges().iter().filter_map(|name| observed.bridges.get(name)).flatten().collect();
    let mtu = inspection.view.mtu;
    if mtu == 0 {
        return Finding::skipped("there is no VTEP yet");
    }
    let large = observed.host.links.iter().filter(|link| ports.contains(&link.name));
    let problems = large.filter(|link| link.mtu > mtu).map(|link| {
        Problem::failure(
            format!("{} takes {} bytes, the tunnel {mtu}", link.name, link.mtu),
            "these pods were added before the MTU became smaller: recreate them",
        )
    });
    Finding::of(problems.collect(), format!("at most {mtu} bytes"))
}

/// Whether what pods send beyond the network gets an address that answers find back to.
pub(super) fn egress(inspection: &Inspection) -> Finding {
    let (Some(observed), Some(network)) = (&inspection.snapshot.observed, inspection.view.network) else {
        return Finding::skipped("the network is not known yet");
    };
    let spaces: Vec<String> = network.spaces.values().map(|space| space.network.to_string()).collect();
    if masquerades(inspection) {
        return Finding::fine(format!("what leaves {} is masqueraded", spaces.join(" and ")));
    }
    let reached = [Family::V4, Family::V6]
        .into_iter()
        .filter(|family| network.spaces.get(*family).is_some())
        .any(|family| observed.host.default_routes.iter().any(|route| route.family == family));
    if !reached {
        return Finding::skipped("masquerade is off, and this host has no default route");
    }
    Finding::warning(
        format!(
            "masquerade is off: packets that leave {} keep the pods' addresses, and answers come back only if the \
             routers outside know them",
            spaces.join(" and ")
        ),
        how_to_masquerade(inspection),
    )
}

/// Whether our own filter masquerades.
pub(super) fn masquerades(inspection: &Inspection) -> bool {
    let table = inspection.snapshot.observed.as_ref().and_then(|observed| observed.filter.get(&TableKey::Fabric));
    table.is_some_and(|table| table.chains.contains_key("postrouting"))
}

/// The commands that switch masquerade on where fabricd came by the manifests or the chart.
pub const MASQUERADE_IN_KUBERNETES: &str = "\
    kubectl -n fabric-system patch configmap fabricd --type merge --patch '{\"data\":{\"FABRICD_IP_MASQ\":\"true\"}}'\n\
    kubectl -n fabric-system rollout restart daemonset/fabricd";

/// The commands that switch masquerade on, by how the daemon was started.
pub(super) fn how_to_masquerade(inspection: &Inspection) -> String {
    if inspection.places.kubernetes {
        MASQUERADE_IN_KUBERNETES.into()
    } else {
        "echo FABRICD_IP_MASQ=true >> /etc/default/fabricd\nsystemctl restart fabricd".into()
    }
}
