//! The daemon's types in the API's words.

use std::collections::BTreeMap;
use std::path::PathBuf;

use fabric_bpf::{Program, Reason};
use fabric_core::diff::diff;
use fabric_core::handoff::Readiness;
use fabric_core::inquiry::unix_millis;
use fabric_core::leases::Lease;
use fabric_core::state::Routing;
use fabric_proto::v1;
use tokio::time::Instant;

use crate::config::{StoreKind, StoreSettings};
use crate::diagnosis::Outcome;
use crate::diagnosis::explain::{Hop, Sender};
use crate::diagnosis::finding::Finding;
use crate::host::addresses::{self, Use};
use crate::kernel::Count;
use crate::mesh::{Cause, Mesh, Path, messages};
use crate::reconcile::{Snapshot, Written, lines};
use crate::status::events::{Event, Kind};
use crate::status::fast_path::{FastPathView, fast_and_slow};
use crate::status::view::{PeerTrouble, View};
use crate::store::Connection;

/// How many leases that can't be read a status names.
const UNREADABLE: usize = 5;

/// A view in the API's words. `now` is what the lease's end is counted from.
#[must_use]
pub fn status_of(view: &View, now: Instant) -> v1::GetStatusResponse {
    let (ready, reason) = match &view.readiness {
        Readiness::Ready => (true, String::new()),
        Readiness::NotReady { reason, .. } => (false, reason.clone()),
    };
    let peers: Vec<v1::Peer> = view.peers().map(|lease| peer(view, lease)).collect();
    let programmed = peers.iter().filter(|peer| peer.state() == v1::PeerState::Programmed).count();
    let unreadable = view.leases.as_ref().map(|leases| leases.unreadable()).into_iter().flatten();
    let mut unreadable: Vec<String> = unreadable
        .map(|(key, error)| format!("the lease {key} can't be read, its last good value counts: {error}"))
        .collect();
    if let Some(more @ 1..) = unreadable.len().checked_sub(UNREADABLE) {
        unreadable.truncate(UNREADABLE);
        unreadable.push(format!("{more} more leases can't be read"));
    }
    v1::GetStatusResponse {
        node: view.node.to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
        ready,
        reason,
        store: Some(store(view)),
        network: view.network.map(|network| v1::Network {
            spaces: network.spaces.values().map(|space| space.network.to_string()).collect(),
            vni: network.vxlan.vni.get(),
            port: network.vxlan.port.into(),
        }),
        lease: view.holding.own.as_ref().zip(view.holding.expires).map(|(own, expires)| v1::Lease {
            subnets: own.key.subnets().values().map(ToString::to_string).collect(),
            expires_in_seconds: expires.saturating_duration_since(now).as_secs().try_into().unwrap_or(i64::MAX),
            epoch: own.epoch,
            ttl_seconds: view.holding.mark.map_or(0, |mark| mark.ttl.as_secs().try_into().unwrap_or(i64::MAX)),
        }),
        vteps: view
            .vteps
            .iter()
            .map(|end| v1::Vtep {
                device: end.device.to_string(),
                mac: end.vtep.mac.to_string(),
                underlay_device: end.underlay.to_string(),
                underlay_address: end.vtep.local.to_string(),
                public_address: end.public_ip.to_string(),
                mtu: end.vtep.mtu,
            })
            .collect(),
        peers_programmed: number(programmed),
        peers,
        warnings: view.warnings.iter().cloned().chain(unreadable).collect(),
        pending: view.pending.clone(),
        dropped: view.dropped.iter().filter(|(_, count)| count.packets > 0).map(dropped).collect(),
        unguarded_ports: view.unguarded_ports.iter().map(ToString::to_string).collect(),
        addresses: vec![],
        fast_path: Some(&view.fast_path).filter(|fast_path| fast_path.asked).map(fast_path),
        tracked_for_rule: view.firewall.state_rule.as_ref().map(ToString::to_string).unwrap_or_default(),
    }
}

/// The same with what isn't in a view: how the peers are reached, and which addresses are in use.
#[must_use]
pub fn whole_status(view: &View, paths: &Mesh, addresses: &std::path::Path, now: Instant) -> v1::GetStatusResponse {
    let mut status = status_of(view, now);
    add_mesh(&mut status.peers, paths, now);
    if let Some(own) = &view.holding.own {
        // IPAM state that can't be read tells nothing; doctor says so.
        let uses = addresses::uses(addresses, &own.key).unwrap_or_default().into_iter();
        let told = |Use { subnet, used, free }| v1::AddressUse { subnet: subnet.to_string(), used, free };
        status.addresses = uses.map(told).collect();
    }
    status
}

/// Adds to each peer how it is reached: the worse of both families, which is the one that hurts, or was seen last.
pub fn add_mesh(peers: &mut [v1::Peer], paths: &Mesh, now: Instant) {
    let mut by_address = BTreeMap::new();
    paths.each(|path| {
        let since = path.since().map_or(-1.0, |since| now.saturating_duration_since(since).as_secs_f64());
        by_address.insert(path.target.overlay.to_string(), (path.cause(), since));
    });
    for peer in peers {
        let vteps = peer.subnets.iter().filter_map(|subnet| Some(subnet.split_once('/')?.0));
        let paths = vteps.filter_map(|vtep| by_address.get(vtep));
        let worst = paths.max_by(|(a, _), (b, _)| (a.hurts(), *a != Cause::Fine).cmp(&(b.hurts(), *b != Cause::Fine)));
        if let Some((worst, since)) = worst {
            peer.set_mesh(cause(*worst));
            peer.mesh_since_seconds = *since;
        }
    }
}

/// How the datastore is reached. Files are named, never shown.
#[must_use]
pub fn settings(StoreSettings { kind, etcd, kubernetes }: &StoreSettings) -> v1::GetSettingsResponse {
    let path = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    v1::GetSettingsResponse {
        store: match kind {
            StoreKind::Etcd => "etcd".into(),
            StoreKind::Kubernetes => "kubernetes".into(),
        },
        etcd_endpoints: etcd.endpoints.clone(),
        etcd_prefix: etcd.prefix.clone(),
        etcd_cafile: path(&etcd.cafile),
        etcd_certfile: path(&etcd.certfile),
        etcd_keyfile: path(&etcd.keyfile),
        etcd_username: etcd.username.clone().unwrap_or_default(),
        etcd_password_file: path(&etcd.password_file),
        kubeconfig: path(&kubernetes.kubeconfig),
        net_config_path: kubernetes.net_config_path.display().to_string(),
    }
}

fn fast_path(view: &FastPathView) -> v1::FastPath {
    let (fast_packets, slow_packets) = fast_and_slow(&view.counts);
    let count = |((program, reason), packets): (&(Program, Reason), &u64)| v1::FastPathCount {
        program: program.name().trim_start_matches("fabric_").to_owned(),
        reason: reason.label().to_owned(),
        words: reason.to_string(),
        packets: *packets,
    };
    v1::FastPath {
        on: view.on,
        reason: view.reason.clone(),
        peers: number(view.peers),
        pods: number(view.pods),
        fast_packets,
        slow_packets,
        counts: view.counts.iter().map(count).collect(),
    }
}

fn dropped((reason, count): (&String, &Count)) -> v1::Dropped {
    v1::Dropped { reason: reason.clone(), packets: count.packets, bytes: count.bytes }
}

fn store(view: &View) -> v1::Store {
    let (connected, reason) = match &view.connection {
        Connection::Up => (true, String::new()),
        Connection::Unknown => (false, "not tried yet".into()),
        Connection::Down(reason) | Connection::Refused(reason) => (false, reason.clone()),
    };
    v1::Store { connected, reason, revision: view.leases.as_ref().map_or(0, |leases| leases.revision()) }
}

/// Another node, and how far it is programmed.
#[must_use]
pub fn peer(view: &View, lease: &Lease) -> v1::Peer {
    let (state, reason) = match view.troubles.get(&lease.key) {
        None => (v1::PeerState::Programmed, String::new()),
        Some(trouble @ PeerTrouble::Pending(_)) => (v1::PeerState::Pending, trouble.to_string()),
        Some(trouble @ PeerTrouble::Refused(_)) => (v1::PeerState::Refused, trouble.to_string()),
    };
    let endpoints = lease.record.endpoints();
    v1::Peer {
        node: lease.record.node().map(ToString::to_string).unwrap_or_default(),
        subnets: lease.key.subnets().values().map(ToString::to_string).collect(),
        public_addresses: endpoints.values().map(|endpoint| endpoint.public_ip.to_string()).collect(),
        vtep_macs: endpoints.values().map(|endpoint| endpoint.vtep_mac.to_string()).collect(),
        state: state.into(),
        reason,
        mesh: v1::MeshCause::Unknown.into(),
        mesh_since_seconds: -1.0,
        fast_path: None,
    }
}

/// What the fast path carried to and from a peer.
#[must_use]
pub fn traffic(view: &View, lease: &Lease) -> Option<v1::FastPathTraffic> {
    view.fast_path.traffic_of(lease).map(|traffic| v1::FastPathTraffic {
        sent_packets: traffic.sent_packets,
        sent_bytes: traffic.sent_bytes,
        received_packets: traffic.received_packets,
        received_bytes: traffic.received_bytes,
    })
}

/// A lease as the store has it.
#[must_use]
pub fn lease_record(view: &View, lease: &Lease) -> v1::LeaseRecord {
    let endpoints = lease.record.endpoints();
    v1::LeaseRecord {
        node: lease.record.node().map(ToString::to_string).unwrap_or_default(),
        subnets: lease.key.subnets().values().map(ToString::to_string).collect(),
        public_addresses: endpoints.values().map(|endpoint| endpoint.public_ip.to_string()).collect(),
        vtep_macs: endpoints.values().map(|endpoint| endpoint.vtep_mac.to_string()).collect(),
        epoch: lease.record.owner.as_ref().map_or(0, |owner| owner.epoch),
        create_revision: lease.create_revision,
        mod_revision: lease.mod_revision,
        own: view.holding.own.as_ref().is_some_and(|own| own.key == lease.key),
        reserved: lease.record.is_placeholder(),
    }
}

/// Something that happened.
#[must_use]
pub fn event(event: &Event) -> v1::Event {
    let kind = match event.kind {
        Kind::Readiness => v1::EventKind::Readiness,
        Kind::Store => v1::EventKind::Store,
        Kind::Lease => v1::EventKind::Lease,
        Kind::Peer => v1::EventKind::Peer,
        Kind::Mesh => v1::EventKind::Mesh,
        Kind::Warning => v1::EventKind::Warning,
        Kind::Repaired => v1::EventKind::Repaired,
        Kind::FastPath => v1::EventKind::FastPath,
    };
    v1::Event {
        number: event.number,
        unix_millis: event.unix_millis,
        kind: kind.into(),
        subject: event.subject.clone(),
        message: event.message.clone(),
        warning: event.warning,
    }
}

/// What the kernel holds and should hold; every entry too with `entries`.
#[must_use]
pub fn kernel_state(snapshot: &Snapshot, entries: bool) -> v1::GetKernelStateResponse {
    let wanted = snapshot.wanted.as_ref().map(|desired| &desired.state);
    let mut had = snapshot.observed.as_ref().map(|observed| observed.ours.clone());
    if let Some((wanted, had)) = wanted.zip(had.as_mut()) {
        // A setting that is not asked for is left as it is: no difference.
        had.sysctls.retain(|sysctl, _| wanted.sysctls.contains_key(sysctl));
    }
    let had = had.as_ref();
    let conflicts = snapshot.wanted.iter().flat_map(|desired| &desired.conflicts);
    v1::GetKernelStateResponse {
        desired: wanted.map(|state| tables(state, entries)),
        actual: had.map(|state| tables(state, entries)),
        plan: snapshot.left.iter().flat_map(|plan| lines(plan)).collect(),
        last: snapshot.last.as_deref().map(written),
        blocked: snapshot.blocked.clone(),
        conflicts: conflicts.map(ToString::to_string).collect(),
    }
}

fn written(plan: &Written) -> v1::WrittenPlan {
    v1::WrittenPlan {
        unix_millis: unix_millis(plan.at),
        steps: number(plan.steps),
        failed: number(plan.failed),
        lines: plan.lines.clone(),
    }
}

fn tables(state: &Routing, entries: bool) -> v1::KernelTables {
    let lines = || {
        let all = diff(state, &Routing::default());
        // All of them are made, so the sign says nothing.
        all.ops().iter().map(|op| op.to_string().trim_start_matches(['+', '~', ' ']).to_owned()).collect()
    };
    v1::KernelTables {
        links: number(state.links.len()),
        addresses: number(state.addresses.len()),
        fdb: number(state.fdb.len()),
        neighbours: number(state.neighbours.len()),
        nexthops: number(state.nexthops.len()),
        routes: number(state.routes.len()),
        sysctls: number(state.sysctls.len()),
        entries: if entries { lines() } else { vec![] },
    }
}

pub(super) fn number(count: usize) -> u32 {
    count.try_into().unwrap_or(u32::MAX)
}

/// How the peers are reached. `now` is what the last answers are counted from.
#[must_use]
pub fn mesh(mesh: &Mesh, now: Instant) -> v1::GetMeshResponse {
    let mut peers = vec![];
    mesh.each(|path| peers.push(mesh_peer(path, now)));
    let (round_seconds, packets_per_second) = mesh.cost();
    v1::GetMeshResponse { peers, round_seconds, packets_per_second, limits: mesh.limits() }
}

fn mesh_peer(path: &Path, now: Instant) -> v1::MeshPeer {
    let ago = |at: Instant| now.saturating_duration_since(at).as_secs_f64();
    let verdict = messages::verdict(path);
    let halves = path.loss().and_then(|loss| loss.halves);
    v1::MeshPeer {
        node: path.target.name(),
        address: path.target.overlay.to_string(),
        cause: cause(verdict.cause).into(),
        evidence: verdict.evidence,
        fix: verdict.fix,
        rtt_ms: path.round_trip().map_or(0.0, |rtt| rtt.as_secs_f64() * 1e3),
        loss: path.small.loss(),
        loss_full: path.full.loss(),
        path_mtu: path.path_mtu,
        last_answer_seconds: path.answered.map_or(-1.0, ago),
        probes: path.probes,
        since_seconds: path.since().map_or(-1.0, ago),
        loss_there: halves.map_or(-1.0, |(there, _)| there),
        loss_back: halves.map_or(-1.0, |(_, back)| back),
    }
}

/// A cause in the API's words.
#[must_use]
pub fn cause(cause: Cause) -> v1::MeshCause {
    match cause {
        Cause::Unknown => v1::MeshCause::Unknown,
        Cause::Fine => v1::MeshCause::Fine,
        Cause::NoDaemon => v1::MeshCause::NoDaemon,
        Cause::PortBlocked => v1::MeshCause::PortBlocked,
        Cause::MtuBlackHole => v1::MeshCause::MtuBlackHole,
        Cause::ChecksumOffload => v1::MeshCause::ChecksumOffload,
        Cause::StaleMac => v1::MeshCause::StaleMac,
        Cause::StaleFdb => v1::MeshCause::StaleFdb,
        Cause::OwnFilter => v1::MeshCause::OwnFilter,
        Cause::PeerDown => v1::MeshCause::PeerDown,
        Cause::Asymmetric => v1::MeshCause::Asymmetric,
        Cause::UnknownYet => v1::MeshCause::UnknownYet,
        Cause::Lossy => v1::MeshCause::Lossy,
        Cause::RouteOverride => v1::MeshCause::RouteOverride,
        Cause::LocalFirewall => v1::MeshCause::LocalFirewall,
        Cause::PortClosed => v1::MeshCause::PortClosed,
        Cause::UnderlayDown => v1::MeshCause::UnderlayDown,
    }
}

/// What a check found.
#[must_use]
pub fn check(id: &str, title: &str, finding: Finding) -> v1::Check {
    let Finding { outcome, evidence, fix } = finding;
    v1::Check { id: id.into(), title: title.into(), result: result(outcome).into(), evidence, fix }
}

/// One thing on a packet's path, on `node`.
#[must_use]
pub fn hop(node: &str, hop: Hop) -> v1::Hop {
    let Hop { layer, found, outcome, expected } = hop;
    v1::Hop { node: node.into(), layer: layer.into(), found, result: result(outcome).into(), expected }
}

/// Where on `node` a packet can be sent from.
#[must_use]
pub fn sender(node: &str, sender: Sender) -> v1::PacketSender {
    let Sender { netns, from, to, outside } = sender;
    let (netns, from, to) = (netns.display().to_string(), from.to_string(), to.to_string());
    v1::PacketSender { netns, from, to, outside, node: node.into() }
}

fn result(outcome: Outcome) -> v1::CheckResult {
    match outcome {
        Outcome::Fine => v1::CheckResult::Ok,
        Outcome::Warning => v1::CheckResult::Warning,
        Outcome::Failed => v1::CheckResult::Failed,
        Outcome::Skipped => v1::CheckResult::Skipped,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use fabric_core::leases::{Entry, LeaseSet};

    use super::*;

    #[test]
    fn thousands_of_leases_that_can_not_be_read_are_few_lines() {
        let told = |count: usize| {
            let garbage = |n| Entry {
                key: format!("10.{}.{}.0-24", n / 256, n % 256),
                value: b"{".into(),
                create_revision: 1,
                mod_revision: 1,
            };
            let mut view = View::new("node-1".parse().expect("valid"));
            let leases = LeaseSet::snapshot(&LeaseSet::default(), (0..count).map(garbage).collect(), 1);
            view.leases = Some(Arc::new(leases));
            status_of(&view, Instant::now()).warnings
        };
        assert_eq!((told(0).len(), told(5).len(), told(5000).len()), (0, 5, 6));
        assert_eq!(told(5000).last().map(String::as_str), Some("4995 more leases can't be read"));
    }
}
