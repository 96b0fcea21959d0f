//! The checks of `fabricctl doctor` of the VTEP, and of what stands beside it: other overlays, other routes.

use fabric_core::model::{Family, MacAddr, Subnet};

use super::Inspection;
use super::finding::{Finding, Problem};
use super::host_checks::read;
use crate::kernel::routing::fib::{Action, Packet, Route};

/// Whose a VXLAN device is, by its name.
const OVERLAYS: [(&str, &str, &str); 7] = [
    ("cilium_vxlan", "Cilium", "remove Cilium first, if it is still installed"),
    ("flannel.", "flannel", "end flanneld first: systemctl disable --now flanneld, or delete its DaemonSet"),
    ("vxlan.calico", "Calico", "remove Calico first, if it is still installed"),
    ("vxlan-v6.calico", "Calico", "remove Calico first, if it is still installed"),
    ("vxlan_sys_", "Open vSwitch", "it is Open vSwitch's: remove the tunnel there with ovs-vsctl"),
    ("vxlan-6784", "Weave", "remove Weave first: weave reset"),
    ("antrea-", "Antrea", "remove Antrea first, if it is still installed"),
];

/// Other VXLAN devices. One that has our port while ours is missing is the cause of all else, so this comes first.
pub(super) fn other_overlays(inspection: &Inspection) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    let ours = inspection.view.network.map(|network| (network.vxlan.port, network.vxlan.vni.get()));
    let standing = ours.is_some_and(|(port, _)| observed.ours.links.values().any(|link| link.up && link.port == port));
    let problems = observed.foreign.links.iter().filter_map(|(name, link)| {
        let (vni, port, _) = link.vxlan?;
        let owner = OVERLAYS.iter().find(|(prefix, ..)| name.as_str().starts_with(prefix));
        let whose = owner.map_or(String::new(), |(_, whose, _)| format!(" ({whose})"));
        let fix = owner.map_or(String::new(), |(.., first)| format!("{first}\n")) + &format!("ip link del {name}");
        Some(match ours {
            Some((our_port, our_vni)) if port == our_port && !standing => {
                let keeps = if vni == our_vni { "VNI and UDP port" } else { "UDP port" };
                Problem::failure(
                    format!("{name}{whose} has our {keeps} ({vni}, {port}): fabricd can't make its device"),
                    fix,
                )
            }
            _ => Problem::warning(
                format!("{name}{whose} with VNI {vni} on UDP port {port}"),
                format!("if nobody uses it any more:\n{fix}"),
            ),
        })
    });
    Finding::of(problems.collect(), "no VXLAN device but fabricd's")
}

/// The kernel opens the port with the first device that is up: nobody else can have it then, and it can't be had while
/// somebody else has it.
pub(super) fn udp_port(inspection: &Inspection) -> Finding {
    let Some(port) = inspection.view.network.map(|network| network.vxlan.port) else {
        return Finding::skipped("the network is not known yet");
    };
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    if observed.ours.links.values().any(|link| link.up && link.port == port) {
        return Finding::fine(format!("the kernel listens at UDP port {port}"));
    }
    // Its socket is the kernel's: no program shows in ss.
    let device =
        observed.foreign.links.iter().find(|(_, link)| link.vxlan.is_some_and(|(_, theirs, _)| theirs == port));
    if let Some((name, _)) = device {
        return Finding::skipped(format!("the device {name} has UDP port {port}: see the check foreign-vxlan"));
    }
    match socket_at(inspection, port) {
        true => Finding::failed(
            format!("another program has UDP port {port}"),
            format!(
                "end the program that this shows, or choose another port for all nodes with fabricctl network\n\
                 ss -ulpn sport = :{port}"
            ),
        ),
        false => Finding::skipped("there is no VTEP yet"),
    }
}

/// Whether a socket of a program is bound to this UDP port.
pub(super) fn socket_at(inspection: &Inspection, port: u16) -> bool {
    let local = format!(":{port:04X}");
    ["proc/net/udp", "proc/net/udp6"].into_iter().any(|file| {
        let table = read(inspection, file).unwrap_or_default();
        table.lines().any(|line| line.split_whitespace().nth(1).is_some_and(|at| at.ends_with(&local)))
    })
}

pub(super) fn underlay_mtu(inspection: &Inspection) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    let problems = inspection.view.vteps.iter().filter_map(|end| {
        let link = observed.host.links.iter().find(|link| link.name == end.underlay)?;
        // What the device has, not what it is to have: that always fits, since it follows the interface.
        let needs = observed.ours.links.get(&end.device)?.mtu + Family::of(end.vtep.local).vxlan_overhead();
        (link.mtu < needs).then(|| {
            Problem::failure(
                format!("packets of {} become {needs} bytes long, {} takes {}", end.device, link.name, link.mtu),
                format!("ip link set {} mtu {needs}", link.name),
            )
        })
    });
    Finding::of(problems.collect(), "packets fit with the headers of VXLAN")
}

pub(super) fn mac(inspection: &Inspection) -> Finding {
    let (Some(observed), Some(own)) = (&inspection.snapshot.observed, &inspection.view.holding.own) else {
        return Finding::skipped("there is no VTEP yet");
    };
    let mut seen = 0;
    let mut problems = vec![];
    for end in &inspection.view.vteps {
        // Without a device there is nothing to compare; why there is none, others say.
        let Some(there) = observed.ours.links.get(&end.device).map(|link| link.mac) else { continue };
        seen += 1;
        let published = own.endpoints.get(Family::of(end.vtep.local)).map(|endpoint| endpoint.vtep_mac);
        if Some(there) != published {
            let published = published.map_or("none".to_owned(), |mac: MacAddr| mac.to_string());
            problems.push(Problem::failure(
                format!("{} has {there}, {published} is published", end.device),
                "fabricd sets it again; the checks udev and networkd look for who changes it",
            ));
        }
    }
    match seen {
        0 => Finding::skipped("there is no VTEP yet"),
        _ => Finding::of(problems, "as published in this node's lease"),
    }
}

/// Routes of others that lead into the network. Those that hide a subnet that is leased hurt.
pub(super) fn overlap(inspection: &Inspection) -> Finding {
    let Some(network) = inspection.view.network else { return Finding::skipped("the network is not known yet") };
    let inside =
        |prefix: &Subnet| network.spaces.get(prefix.family()).is_some_and(|space| space.network.covers(*prefix));
    let bridges = inspection.pod_bridges();
    let of_bridge = |device: &str| bridges.iter().any(|name| name.as_str() == device);
    let consulted = |table: u32| inspection.fib.rules.iter().any(|rule| rule.action == Action::Table(table));
    let others = inspection.fib.routes.iter().filter(|route| {
        let ours = route.ours
            || route.device.as_deref().is_some_and(|device| of_bridge(device) || is_vtep(inspection, device));
        let of_the_host = ["local", "broadcast", "anycast", "multicast"].contains(&route.kind.as_str());
        inside(&route.dst) && !ours && !of_the_host && consulted(route.table)
    });
    // A policy rule may have its table looked up before ours: then a shorter prefix wins too.
    let hides = |route: &Route, subnet: Subnet| {
        let own = inspection.view.holding.own.as_ref().and_then(|own| own.key.subnets().get(subnet.family()));
        let iif = bridges.first().map_or("lo", |bridge| bridge.as_str());
        let packet = Packet { from: own.unwrap_or(&subnet).base(), to: subnet.base(), iif };
        let decides = || inspection.fib.decide(&packet).is_some_and(|decision| decision.route == Some(route));
        // Before the first pod there is no route to this node's own subnet.
        subnet.covers(route.dst) || own != Some(&subnet) && decides()
    };
    let mut problems: Vec<(u8, Problem)> = others
        .map(|route| {
            let leases = inspection.view.leases.iter().flat_map(|leases| leases.iter());
            let met = leases.filter_map(|lease| {
                let subnet = lease.key.subnets().get(route.dst.family()).copied()?;
                (subnet.covers(route.dst) || route.dst.covers(subnet)).then(|| (subnet, lease.holder()))
            });
            let met = met.map(|(subnet, node)| (hides(route, subnet), subnet, node));
            match met.max_by_key(|(hides, ..)| *hides) {
                Some((true, subnet, node)) => {
                    (0, Problem::failure(format!("{route} hides {subnet} of {node}"), route.delete()))
                }
                Some((false, subnet, node)) => (
                    1,
                    Problem::warning(format!("{route} covers {subnet} of {node}, which ours hides"), route.delete()),
                ),
                None => (2, Problem::warning(format!("{route} leads into the network"), route.delete())),
            }
        })
        .collect();
    problems.sort_by_key(|(rank, _)| *rank);
    Finding::of(problems.into_iter().map(|(_, problem)| problem).collect(), "no foreign route leads into the network")
}

fn is_vtep(inspection: &Inspection, device: &str) -> bool {
    inspection.view.vteps.iter().any(|end| end.device.as_str() == device)
}
