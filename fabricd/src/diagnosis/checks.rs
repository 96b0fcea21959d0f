//! The checks of `fabricctl doctor` that need no more than what the daemon knows. Those that look at the host's files are
//! in [`super::host_checks`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::firewall::packet::Flow;
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::state::nft::TableKey;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::finding::{Finding, Problem, all};
use super::policy_checks::controllers;
use super::{Inspection, Inspector, addresses, cni_config};
use super::{host_checks as host, manager_checks as managers, overlay_checks as overlay, pod_checks as pods};
use crate::config::StoreKind;
use crate::kernel;
use crate::mesh::{Cause, Mesh, messages};
use crate::status::fast_path::{FastPathView, fast_and_slow};
use crate::status::section::SectionStatus;
use crate::status::view::PeerTrouble;
use crate::store::Connection;

/// A check: its name, what is checked, and how. It may read files and ask the kernel.
pub type Check = (&'static str, &'static str, fn(&Inspection) -> Finding);

/// All checks but that of the store's speed, in the order in which they are made: what others follow from comes first.
/// A title is a noun, so that it reads well before any finding.
pub const ALL: [Check; 36] = [
    ("foreign-vxlan", "other overlays", overlay::other_overlays),
    ("ready", "readiness", ready),
    ("lease", "lease", lease),
    ("kernel-version", "kernel version", host::kernel_version),
    ("kernel-state", "kernel entries", kernel_state),
    ("udp-port", "VXLAN port", overlay::udp_port),
    ("underlay-mtu", "underlay MTU", overlay::underlay_mtu),
    ("mac", "VTEP MAC address", overlay::mac),
    ("duplicates", "duplicate addresses of nodes", duplicates),
    ("bridge", "pod bridge", pods::bridge),
    ("pod-ports", "pod veths", pods::ports),
    ("overlap", "routes into the network", overlay::overlap),
    ("foreign-input", "input chains of other firewalls", foreign_input),
    ("foreign-forward", "forward chains of other firewalls", foreign_forward),
    ("policy-controllers", "programs that enforce NetworkPolicies", controllers),
    ("peers", "peers", peers),
    ("mesh", "reachability of peers", mesh),
    ("filter-drops", "packets dropped by the packet filter", filter_drops),
    ("fast-path", "fast path", fast_path),
    ("forwarding", "IP forwarding", host::forwarding),
    ("rp-filter", "reverse path filter", host::rp_filter),
    ("br-netfilter", "br_netfilter", host::br_netfilter),
    ("conntrack", "connection tracking table", host::conntrack),
    ("networkd", "systemd-networkd", managers::networkd),
    ("networkmanager", "NetworkManager", managers::network_manager),
    ("udev", "udev link files", managers::udev),
    ("bridge-mtu", "MTU of pods", pods::bridge_mtu),
    ("addresses", "pod addresses", addresses::check),
    ("cni-config", "CNI configuration", cni_config::check),
    ("egress", "egress", pods::egress),
    ("clock", "clock", host::clock),
    ("certificates", "certificates", host::certificates),
    ("disk", "disk space", host::disk),
    ("services", "Services of Kubernetes", services),
    ("network-policies", "network policies", policies),
    ("warnings", "warnings of the daemon", warnings),
];

/// Of how many peers the mesh's fixes are told.
const FIXES: usize = 5;
/// A read that takes less than so many round trips of the underlay has spent its time there: one to etcd, one from its
/// leader to the others, and what is lost is sent again.
const TRIPS: u32 = 5;

/// How long the store takes to answer.
pub async fn store(inspector: &Inspector, inspection: &Inspection) -> Finding {
    let (is_up, is_quick) = match inspection.places.store {
        StoreKind::Etcd => (
            "is etcd up and reached? etcdctl endpoint health; pods that run go on",
            "is etcd overloaded? etcdctl endpoint status; its disk must be fast",
        ),
        StoreKind::Kubernetes => (
            "is the API server up and reached? kubectl get --raw /readyz; pods that run go on",
            "is the API server overloaded? kubectl get --raw '/readyz?verbose'",
        ),
    };
    match &inspection.view.connection {
        Connection::Down(reason) => return Finding::failed(format!("away: {reason}"), is_up),
        // What it said has the way out, as far as there is one.
        Connection::Refused(reason) => {
            return Finding::failed(
                reason.clone(),
                "give the right back, as said there; pods that run go on, nodes that come or go stay unknown here",
            );
        }
        Connection::Unknown | Connection::Up => {}
    }
    let Some(probe) = &inspector.store else { return Finding::skipped("there is none") };
    let begin = Instant::now();
    match timeout(Duration::from_secs(5), probe()).await {
        Err(_) => Finding::failed("a read took more than 5 s", is_quick),
        Ok(Err(error)) => Finding::failed(format!("a read failed: {error}"), "see docs/symptoms.md for this message"),
        Ok(Ok(())) => read_took(begin.elapsed(), median_trip(&inspection.mesh), losses(&inspection.mesh)),
    }
}

/// What to think of a read that took so long, where a packet to another node and back takes `trip`, and to so many peers
/// packets are lost: what is lost is sent again after 200 ms at least (`TCP_RTO_MIN`).
fn read_took(took: Duration, trip: Duration, losses: usize) -> Finding {
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let evidence = format!("a read took {:.1} ms", millis(took));
    if took < Duration::from_millis(200) {
        Finding::fine(evidence)
    } else if took < trip * TRIPS {
        Finding::warning(
            format!("{evidence}; so does the underlay: {:.1} ms to another node and back (median)", millis(trip)),
            "the network is slow, not etcd: fabricctl mesh has the round trip and loss of each peer",
        )
    } else if losses > 0 {
        Finding::warning(
            format!("{evidence}; packets are lost on the paths to {losses} peers"),
            "the network loses packets, and waits before it sends them again: fabricctl mesh has the loss of each peer",
        )
    } else {
        Finding::warning(
            evidence,
            "etcd should answer within 100 ms: look at its disk (etcd_disk_wal_fsync_duration_seconds)",
        )
    }
}

/// Round trip to the peers in the tunnel: the median; zero until one is known.
fn median_trip(mesh: &Mesh) -> Duration {
    let mut trips = vec![];
    mesh.each(|path| trips.extend(path.round_trip()));
    trips.sort_unstable();
    trips.get(trips.len() / 2).copied().unwrap_or_default()
}

/// On how many paths packets are lost.
fn losses(mesh: &Mesh) -> usize {
    let mut losses = 0;
    mesh.each(|path| losses += usize::from(path.cause() == Cause::Lossy));
    losses
}

fn ready(inspection: &Inspection) -> Finding {
    match &inspection.view.readiness {
        Readiness::Ready => Finding::fine("ready"),
        Readiness::NotReady { reason, .. } => {
            Finding::failed(reason, "see the reason; docs/symptoms.md has a line for each")
        }
    }
}

fn lease(inspection: &Inspection) -> Finding {
    let holding = &inspection.view.holding;
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

fn kernel_state(inspection: &Inspection) -> Finding {
    match (&inspection.snapshot.wanted, &inspection.snapshot.left) {
        (Some(wanted), Some(left)) => {
            let left = left.ops().len();
            if left == 0 {
                Finding::fine(format!("{} entries", wanted.state.len()))
            } else {
                Finding::failed(
                    format!("{left} steps are left"),
                    "see fabricctl plan, and the log for what the kernel says",
                )
            }
        }
        _ => Finding::skipped(format!("nothing is planned: {}", inspection.snapshot.blocked)),
    }
}

fn duplicates(inspection: &Inspection) -> Finding {
    let mut seen: BTreeMap<String, String> = BTreeMap::new();
    let mut problems = vec![];
    for lease in inspection.view.leases.iter().flat_map(|leases| leases.iter()) {
        for endpoint in lease.record.endpoints().values() {
            for what in [format!("address {}", endpoint.public_ip), format!("MAC {}", endpoint.vtep_mac)] {
                if let Some(other) = seen.insert(what.clone(), lease.holder()) {
                    problems.push(Problem::failure(
                        format!("{} and {other} both have the {what}", lease.holder()),
                        format!(
                            "cloned hosts, or NAT: give each its own with --iface or --public-ip; if one is gone:\n\
                             fabricctl lease release {other}"
                        ),
                    ));
                }
            }
        }
    }
    Finding::of(problems, format!("{} addresses, each of one node", seen.len()))
}

/// Those refused first: the others are retried.
fn peers(inspection: &Inspection) -> Finding {
    let mut troubles: Vec<_> = inspection.view.troubles.iter().collect();
    troubles.sort_by_key(|(_, trouble)| !matches!(trouble, PeerTrouble::Refused(_)));
    let problems = troubles.into_iter().map(|(key, trouble)| {
        let lease = inspection.view.leases.as_ref().and_then(|leases| leases.get(key));
        let name = lease.map_or_else(|| key.to_string(), |lease| lease.holder());
        let word = if matches!(trouble, PeerTrouble::Refused(_)) { "refused" } else { "pending" };
        Problem::failure(format!("{name} {word}: {trouble}"), "fabricctl peers")
    });
    Finding::of(problems.collect(), format!("{} peers, all programmed", inspection.view.peers().count()))
}

fn mesh(inspection: &Inspection) -> Finding {
    let (mut probed, mut bad) = (0, vec![]);
    inspection.mesh.each(|path| {
        probed += usize::from(path.cause() != Cause::Unknown);
        if path.cause().hurts() {
            let (name, verdict) = (path.target.name(), messages::verdict(path));
            // In a large cluster there may be thousands.
            let fix = if bad.len() < FIXES { verdict.fix } else { "the others: fabricctl mesh".into() };
            bad.push(Problem::failure(format!("{name}: {}: {}", verdict.cause.word(), verdict.evidence), fix));
        }
    });
    match (probed, bad.len()) {
        (0, 0) => Finding::skipped("no peer has been probed yet"),
        _ => Finding::of(bad, format!("{probed} paths")),
    }
}

/// What chains of others do to the packets of pods.
fn foreign_forward(inspection: &Inspection) -> Finding {
    foreign(inspection, &[Flow::Pods, Flow::Outside], "packets of pods pass the chains of others")
}

/// What chains of others do to encapsulated packets.
fn foreign_input(inspection: &Inspection) -> Finding {
    let evaluation = &inspection.view.firewall;
    let tracked = match &evaluation.state_rule {
        Some(rule) => format!("; they are tracked, since this rule matches connection states: {rule}"),
        None => String::new(),
    };
    foreign(
        inspection,
        &[Flow::Received, Flow::Sent],
        &format!("encapsulated packets pass the chains of others{tracked}"),
    )
}

fn foreign(inspection: &Inspection, flows: &[Flow], fine: &str) -> Finding {
    if inspection.view.vteps.is_empty() {
        return Finding::skipped("there is no VTEP yet");
    }
    let evaluation = &inspection.view.firewall;
    let problems = evaluation.of(flows).map(|obstacle| Problem {
        hurts: obstacle.is_sure(),
        what: obstacle.to_string(),
        fix: obstacle.remedy.join("\n"),
    });
    let unread = match evaluation.unread.as_slice() {
        [] => String::new(),
        chains => format!("; not evaluated: {}", chains.join(", ")),
    };
    Finding::of(problems.collect(), format!("{fine}{unread}"))
}

fn filter_drops(inspection: &Inspection) -> Finding {
    let there =
        inspection.snapshot.observed.as_ref().is_some_and(|observed| observed.filter.contains_key(&TableKey::Fabric));
    if !there {
        return Finding::skipped("there is no table inet fabric");
    }
    let mut drops = match kernel::drops() {
        Err(error) => return Finding::skipped(format!("the counters can't be read: {error}")),
        Ok(all) => all,
    };
    drops.retain(|drops| drops.chain == "senders" && drops.packets > 0);
    drops.sort_by_key(|drops| std::cmp::Reverse(drops.packets));
    let port = inspection.view.network.map_or(8472, |network| network.vxlan.port);
    let problems = drops.iter().map(|drops| {
        Problem::warning(
            format!("{} encapsulated packets: {}", drops.packets, drops.why),
            format!(
                "look who sends them; for a node behind NAT set --public-ip there, --allow-sender here\n\
                 tcpdump -c 20 -ni any udp port {port}"
            ),
        )
    });
    Finding::of(problems.collect(), "none since the table was made")
}

/// Whether packets of pods take the fast path, if they are to. That `auto` leaves it off is as it was asked for.
fn fast_path(inspection: &Inspection) -> Finding {
    let FastPathView { asked, on, left_off, reason, pods, peers, counts, traffic: _ } = &inspection.view.fast_path;
    let (fast, slow) = fast_and_slow(counts);
    let with_reason = if reason.is_empty() { String::new() } else { format!("; {reason}") };
    match (asked, on) {
        (false, _) => Finding::skipped("switched off"),
        (true, true) => Finding::fine(format!(
            "on, {peers} peers, {pods} pod addresses, {fast} of {} packets{with_reason}",
            fast + slow
        )),
        (true, false) if *left_off => Finding::fine(format!("left off: {reason}")),
        (true, false) if reason.is_empty() => Finding::skipped("not on yet"),
        (true, false) => Finding::warning(
            format!("off, packets take the kernel's path: {reason}"),
            "the message includes its fix; without one, switch it off: --fast-path=off",
        ),
    }
}

fn services(inspection: &Inspection) -> Finding {
    let off = "fabricd doesn't translate them here (--services is off); kube-proxy or another program does";
    section(inspection.sections.services.as_ref(), off, "fabricctl service shows each, and what the kernel holds of it")
}

fn policies(inspection: &Inspection) -> Finding {
    let off = "fabricd doesn't enforce them here (--network-policy is off)";
    section(inspection.sections.policy.as_ref(), off, "each warning includes its fix")
}

/// How it stands with a section that has a loop of its own.
fn section(status: Option<&watch::Receiver<Arc<SectionStatus>>>, off: &str, more: &str) -> Finding {
    let Some(status) = status else { return Finding::skipped(off) };
    let SectionStatus { ready, warnings } = &**status.borrow();
    match ready {
        Err(reason) => Finding::failed(format!("not up to date: {reason}"), more),
        Ok(()) if warnings.is_empty() => Finding::fine("the kernel holds what the API server says"),
        Ok(()) => Finding::warning(all(warnings.iter().cloned()), more),
    }
}

fn warnings(inspection: &Inspection) -> Finding {
    let words = &inspection.view.warnings;
    match words.first() {
        None => Finding::fine("none"),
        Some(_) => Finding::warning(all(words.iter().cloned()), "each warning includes its fix"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_read_of_the_store_is_blamed_on_the_network_where_that_is_slow() {
        for (took, trip, losses, said) in [
            (20, 0, 1, ""),
            (417, 0, 0, "disk"),
            (417, 2, 0, "disk"),
            (417, 187, 0, "the network is slow, not etcd"),
            (417, 460, 3, "the network is slow, not etcd"),
            (551, 80, 1, "the network loses packets"),
            (2000, 100, 0, "disk"),
        ] {
            let found = read_took(Duration::from_millis(took), Duration::from_millis(trip), losses);
            assert_eq!(found.fix.is_empty(), said.is_empty(), "{took} ms: {found:?}");
            assert!(found.fix.contains(said), "{took} ms: {found:?}");
        }
    }
}
