//! The checks of `fabricctl doctor` that need no more than what the daemon knows. Those that look at the host's files are
//! in [`super::host_checks`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::{Family, Subnet};
use tokio::time::{Instant, timeout};

use super::{Inspector, Outcome, Scene};
use super::{addresses, host_checks as host};
use crate::kernel;
use crate::mesh::Cause;
use crate::store::Connection;
use crate::view::PeerTrouble;

/// What a check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How it is.
    pub outcome: Outcome,
    /// What was seen.
    pub evidence: String,
    /// What to do; empty when there is nothing to do.
    pub fix: String,
}

impl Finding {
    /// All is well.
    pub fn fine(evidence: impl Into<String>) -> Self {
        Self { outcome: Outcome::Fine, evidence: evidence.into(), fix: String::new() }
    }

    /// It may hurt.
    pub fn warning(evidence: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { outcome: Outcome::Warning, evidence: evidence.into(), fix: fix.into() }
    }

    /// It hurts.
    pub fn failed(evidence: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { outcome: Outcome::Failed, evidence: evidence.into(), fix: fix.into() }
    }

    /// There is nothing to look at.
    pub fn skipped(why: impl Into<String>) -> Self {
        Self { outcome: Outcome::Skipped, evidence: why.into(), fix: String::new() }
    }
}

/// A check: its name, what is checked, and how. It may read files and ask the kernel.
pub type Check = (&'static str, &'static str, fn(&Scene) -> Finding);

/// All checks but that of the store's speed, in the order in which they are made: what others follow from comes first.
pub const ALL: [Check; 28] = [
    ("ready", "this node may add pods", ready),
    ("lease", "this node holds its lease", lease),
    ("kernel-version", "the kernel has what is used", host::kernel_version),
    ("kernel-state", "the kernel holds what is wanted", kernel_state),
    ("udp-port", "the VXLAN port is ours", host::udp_port),
    ("underlay-mtu", "the underlay takes what the tunnel makes", underlay_mtu),
    ("mac", "the VTEP has the MAC address that is published", mac),
    ("duplicates", "no two nodes have one address", duplicates),
    ("peers", "every peer is programmed", peers),
    ("mesh", "every peer is reached, with packets of full size", mesh),
    ("forward-drop", "nobody drops forwarded packets", forward_drop),
    ("filter-drops", "our filter drops nothing of peers", filter_drops),
    ("forwarding", "this host forwards", host::forwarding),
    ("rp-filter", "return paths are not filtered", host::rp_filter),
    ("br-netfilter", "services reach pods of their own node", host::br_netfilter),
    ("conntrack", "the table of connections has room", host::conntrack),
    ("networkd", "systemd-networkd leaves routes and devices alone", host::networkd),
    ("networkmanager", "NetworkManager leaves our devices alone", host::network_manager),
    ("udev", "udev leaves the MAC address alone", host::udev),
    ("bridge", "the bridge has this node's subnet", bridge),
    ("bridge-mtu", "pods send no larger packets than the tunnel takes", bridge_mtu),
    ("addresses", "the pods' addresses", addresses::check),
    ("foreign-vxlan", "no other overlay is left over", foreign_vxlan),
    ("overlap", "the network overlaps no other route", overlap),
    ("clock", "the clock is right", host::clock),
    ("certificates", "certificates are valid for a while", host::certificates),
    ("disk", "there is room for the daemon's files", host::disk),
    ("warnings", "the daemon warns of nothing", warnings),
];

/// How long the store takes to answer.
pub async fn store(inspector: &Inspector, scene: &Scene) -> Finding {
    if let Connection::Down(reason) = &scene.view.connection {
        return Finding::failed(
            format!("away: {reason}"),
            "is etcd up and reached? etcdctl endpoint health; pods that run go on",
        );
    }
    let Some(probe) = &inspector.store else { return Finding::skipped("there is none") };
    let begin = Instant::now();
    match timeout(Duration::from_secs(5), probe()).await {
        Err(_) => Finding::failed(
            "a read took more than 5 s",
            "is etcd overloaded? etcdctl endpoint status; its disk must be fast",
        ),
        Ok(Err(error)) => Finding::failed(format!("a read failed: {error}"), "see docs/operations.md for this message"),
        Ok(Ok(())) => {
            let took = begin.elapsed();
            let evidence = format!("a read took {:.1} ms", took.as_secs_f64() * 1e3);
            if took < Duration::from_millis(200) {
                Finding::fine(evidence)
            } else {
                Finding::warning(
                    evidence,
                    "etcd should answer within 100 ms: look at its disk (etcd_disk_wal_fsync_duration_seconds)",
                )
            }
        }
    }
}

fn ready(scene: &Scene) -> Finding {
    match &scene.view.readiness {
        Readiness::Ready => Finding::fine("ready"),
        Readiness::NotReady { reason, .. } => {
            Finding::failed(reason, "the reason says it; docs/operations.md has a line for each")
        }
    }
}

fn lease(scene: &Scene) -> Finding {
    let holding = &scene.view.holding;
    match (&holding.own, &holding.trouble, holding.expires) {
        (_, Some((NotReady::Quarantine, reason)), _) => Finding::failed(
            format!("in quarantine: {reason}"),
            "who has it: fabricctl lease list; to take another: fabricctl lease renumber",
        ),
        (None, trouble, _) => Finding::failed(
            trouble.as_ref().map_or("none is held", |(_, reason)| reason),
            "fabricctl events says what was tried",
        ),
        (Some(own), _, expires) => {
            let left = expires.map(|at| at.saturating_duration_since(Instant::now()).as_secs());
            Finding::fine(format!("{} for {} s more", own.key, left.map_or("unknown".into(), |left| left.to_string())))
        }
    }
}

fn kernel_state(scene: &Scene) -> Finding {
    match (&scene.looked.wanted, &scene.looked.observed) {
        (Some(wanted), Some(observed)) => {
            let left = fabric_core::diff::diff(&wanted.state, &observed.ours).ops().len();
            if left == 0 {
                Finding::fine(format!("{} entries", wanted.state.len()))
            } else {
                Finding::failed(
                    format!("{left} steps are left"),
                    "see fabricctl plan, and the log for what the kernel says",
                )
            }
        }
        _ => Finding::skipped(format!("nothing is planned: {}", scene.looked.blocked)),
    }
}

fn underlay_mtu(scene: &Scene) -> Finding {
    let Some(observed) = &scene.looked.observed else { return Finding::skipped("the kernel can't be read") };
    for end in &scene.view.vteps {
        let Some(link) = observed.host.links.iter().find(|link| link.name == end.underlay) else { continue };
        let needs = end.vtep.mtu + Family::of(end.vtep.local).vxlan_overhead();
        if link.mtu < needs {
            return Finding::failed(
                format!("packets of {} become {needs} bytes long, {} takes {}", end.device, link.name, link.mtu),
                format!(
                    "ip link set {} mtu {needs}, or on all nodes: fabricctl network init --force --mtu …",
                    link.name
                ),
            );
        }
    }
    Finding::fine("with what VXLAN adds")
}

fn mac(scene: &Scene) -> Finding {
    let (Some(observed), Some(own)) = (&scene.looked.observed, &scene.view.holding.own) else {
        return Finding::skipped("there is no VTEP yet");
    };
    for end in &scene.view.vteps {
        let published = own.endpoints.get(Family::of(end.vtep.local)).map(|endpoint| endpoint.vtep_mac);
        let there = observed.ours.links.get(&end.device).map(|link| link.mac);
        if there != published {
            let word =
                |mac: Option<_>| mac.map_or("none".to_owned(), |mac: fabric_core::model::MacAddr| mac.to_string());
            return Finding::failed(
                format!("{} has {}, {} is published", end.device, word(there), word(published)),
                "fabricd sets it; who changes it? see the check udev",
            );
        }
    }
    Finding::fine(format!("{} devices", scene.view.vteps.len()))
}

fn duplicates(scene: &Scene) -> Finding {
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    for lease in scene.view.leases.iter().flat_map(|leases| leases.iter()) {
        for endpoint in lease.record.endpoints().values() {
            for what in [format!("address {}", endpoint.public_ip), format!("MAC {}", endpoint.vtep_mac)] {
                if let Some(other) = seen.insert(what.clone(), lease.holder()) {
                    return Finding::failed(
                        format!("{} and {other} both have the {what}", lease.holder()),
                        "cloned hosts, or NAT: give each its own with --iface or --public-ip; one that is gone: \
                         fabricctl lease release NODE",
                    );
                }
            }
        }
    }
    Finding::fine(format!("{} addresses", seen.len()))
}

fn peers(scene: &Scene) -> Finding {
    let count = |refused: bool| {
        scene.view.troubles.values().filter(|t| matches!(t, PeerTrouble::Refused(_)) == refused).count()
    };
    match scene.view.troubles.iter().next() {
        None => Finding::fine(format!("{} peers", scene.view.peers().count())),
        Some((key, trouble)) => Finding::failed(
            format!("{} refused, {} pending; the first: {key}: {trouble}", count(true), count(false)),
            "fabricctl peers says why for each",
        ),
    }
}

fn mesh(scene: &Scene) -> Finding {
    let (mut probed, mut bad, mut first) = (0, 0, None);
    scene.mesh.each(|way| {
        probed += usize::from(way.cause() != Cause::Unknown);
        if way.cause().hurts() {
            bad += 1;
            first.get_or_insert_with(|| (way.target.name(), way.verdict()));
        }
    });
    match first {
        None if probed == 0 => Finding::skipped("no peer has been probed yet"),
        None => Finding::fine(format!("{probed} paths")),
        Some((name, verdict)) => Finding::failed(
            format!("{bad} of {probed} are bad; {name}: {}: {}", verdict.cause.word(), verdict.evidence),
            verdict.fix,
        ),
    }
}

fn forward_drop(scene: &Scene) -> Finding {
    let Some(observed) = &scene.looked.observed else { return Finding::skipped("the kernel can't be read") };
    let network = scene.view.network.as_ref();
    let hurts = observed.forward_drops.iter().find_map(|drop| {
        let space = network?.spaces.get(drop.family)?;
        Some((drop, drop.remedy.replace("{network}", &space.network.to_string()).replace('\n', "; ")))
    });
    match hurts {
        None => Finding::fine("no chain does so by its policy"),
        Some((drop, remedy)) => {
            Finding::failed(format!("{} drops what no rule accepts, {}", drop.chain, drop.family), remedy)
        }
    }
}

fn filter_drops(_: &Scene) -> Finding {
    match kernel::drops() {
        Err(error) => Finding::skipped(format!("the counters can't be read: {error}")),
        Ok(all) => {
            let of_peers = |drops: &&kernel::Drops| drops.chain == "senders" && drops.packets > 0;
            match all.iter().find(of_peers) {
                None => Finding::fine("none since the table was made"),
                Some(drops) => Finding::warning(
                    format!("{} encapsulated packets: {}", drops.packets, drops.why),
                    "who sends them: tcpdump -ni any udp port 8472; a node behind NAT: --public-ip there, --allow-sender here",
                ),
            }
        }
    }
}

fn bridge(scene: &Scene) -> Finding {
    let Some(observed) = &scene.looked.observed else { return Finding::skipped("the kernel can't be read") };
    let bridges = scene.pod_bridges();
    let there: Vec<_> = observed.host.links.iter().filter(|link| bridges.contains(&link.name)).collect();
    if there.is_empty() {
        let names = bridges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        return Finding::skipped(format!("there is no {names}: no pod has been added yet"));
    }
    let Some(own) = &scene.view.holding.own else { return Finding::skipped("no lease is held") };
    let lacks = there.iter().find_map(|link| {
        let has = |subnet: &&Subnet| link.addresses.iter().any(|(_, prefix)| prefix == *subnet);
        own.key.subnets().values().find(|subnet| !has(subnet)).map(|subnet| (link.name, *subnet))
    });
    match lacks {
        None => Finding::fine(own.key.to_string()),
        Some((name, subnet)) => Finding::failed(
            format!("{name} has no address of {subnet}"),
            format!("it is of an earlier subnet: remove this node's pods, then ip link del {name}"),
        ),
    }
}

fn bridge_mtu(scene: &Scene) -> Finding {
    let Some(observed) = &scene.looked.observed else { return Finding::skipped("the kernel can't be read") };
    let bridges = scene.pod_bridges();
    let ports: BTreeSet<_> = bridges.iter().filter_map(|name| observed.bridges.get(name)).flatten().collect();
    let mtu = scene.view.mtu;
    let large = observed.host.links.iter().find(|link| ports.contains(&link.name) && link.mtu > mtu && mtu > 0);
    match large {
        None => Finding::fine(format!("at most {mtu} bytes")),
        Some(link) => Finding::failed(
            format!("{} takes {} bytes, the tunnel {mtu}", link.name, link.mtu),
            "that pod was added before the MTU became smaller: recreate it",
        ),
    }
}

fn foreign_vxlan(scene: &Scene) -> Finding {
    let Some(observed) = &scene.looked.observed else { return Finding::skipped("the kernel can't be read") };
    match observed.foreign.links.iter().find(|(_, link)| link.vxlan.is_some()) {
        None => Finding::fine("no VXLAN device but ours"),
        Some((name, link)) => {
            let (vni, port, _) = link.vxlan.expect("just found");
            Finding::warning(
                format!("{name} with VNI {vni} on port {port}"),
                format!("if nobody uses it any more: ip link del {name}"),
            )
        }
    }
}

fn overlap(scene: &Scene) -> Finding {
    let Some((observed, network)) = scene.looked.observed.as_ref().zip(scene.view.network) else {
        return Finding::skipped("the network is not known yet");
    };
    let inside =
        |prefix: &Subnet| network.spaces.get(prefix.family()).is_some_and(|space| space.network.covers(*prefix));
    let bridges = scene.pod_bridges();
    let ours = |line: &str| bridges.iter().any(|name| line.contains(&format!("dev {name}")));
    match observed.foreign.routes.iter().find(|(prefix, line)| inside(prefix) && !ours(line)) {
        None => Finding::fine("no foreign route leads into it"),
        Some((_, line)) => Finding::warning(format!("{line} leads into the network"), format!("ip route del {line}")),
    }
}

fn warnings(scene: &Scene) -> Finding {
    match scene.view.warnings.first() {
        None => Finding::fine("none"),
        Some(first) => Finding::warning(
            format!("{} warnings; the first: {first}", scene.view.warnings.len()),
            "each says the way out: fabricctl status",
        ),
    }
}
