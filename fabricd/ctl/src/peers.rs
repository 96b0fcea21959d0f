//! `fabricctl peers` and `fabricctl leases`: which nodes there are, and how that changes.

use std::fmt::Write as _;
use std::path::Path;

use fabric_proto::Word as _;
use fabric_proto::v1::{
    LeaseEvent, LeaseRecord, ListLeasesRequest, ListPeersRequest, Peer, PeerEvent, PeerState, WatchLeasesRequest,
    WatchPeersRequest,
};

use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render, span};
use crate::{Answer, NOT_ALL_WELL, daemon, mesh, print};

/// Lists the peers; exit code 4 when not all of them are programmed and reached.
pub async fn peers(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let peers = daemon::connect(socket).await?.list_peers(ListPeersRequest {}).await?.into_inner();
    let is_well = |peer: &Peer| peer.state() == PeerState::Programmed && mesh::severity(peer.mesh()) != Severity::Bad;
    let well = peers.peers.iter().all(is_well);
    Ok(Answer::well_if(well, output.show(&peers, |screen| peer_table(screen, &peers.peers))?, NOT_ALL_WELL))
}

/// Prints what becomes of the peers, until the daemon ends or the reader goes.
pub async fn watch_peers(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let mut changes = daemon::connect(socket).await?.watch_peers(WatchPeersRequest {}).await?.into_inner();
    while let Some(change) = changes.message().await? {
        let line = output.show_next(&change, |_| peer_line(&change))?;
        if !print(&line) {
            break;
        }
    }
    Ok(Answer::fine(String::new()))
}

/// Lists the leases that the daemon knows.
pub async fn leases(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let leases = daemon::connect(socket).await?.list_leases(ListLeasesRequest {}).await?.into_inner();
    Ok(Answer::fine(output.show(&leases, |screen| lease_table(screen, &leases.leases))?))
}

/// Prints what becomes of the leases, until the daemon ends or the reader goes.
pub async fn watch_leases(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let mut changes = daemon::connect(socket).await?.watch_leases(WatchLeasesRequest {}).await?.into_inner();
    while let Some(change) = changes.message().await? {
        let line = output.show_next(&change, |_| lease_line(&change))?;
        if !print(&line) {
            break;
        }
    }
    Ok(Answer::fine(String::new()))
}

/// The peers as a table, what matters first: the terminal may cut the rest. Reasons stand below it.
pub fn peer_table(screen: &Screen, peers: &[Peer]) -> String {
    let rows: Vec<[Cell; 9]> = peers.iter().map(peer_row).collect();
    let header = ["PEER", "STATE", "MESH", "SINCE", "SUBNET", "UNDERLAY", "VTEP", "FAST SENT", "FAST RECEIVED"];
    let mut text = render(screen, header, &rows);
    for (place, peer) in peers.iter().filter(|peer| !peer.reason.is_empty()).enumerate() {
        let (word, severity) = state(peer);
        let gap = if place == 0 { "\n" } else { "" };
        let word = screen.paint(&word, severity);
        let _ = writeln!(text, "{gap}{} {} {word}: {}", named(&peer.node), peer.subnets.join(" "), peer.reason);
    }
    text
}

fn state(peer: &Peer) -> (String, Severity) {
    let severity = match peer.state() {
        PeerState::Programmed => Severity::Good,
        PeerState::Pending => Severity::Doubtful,
        PeerState::Refused => Severity::Bad,
        PeerState::Unspecified => Severity::Plain,
    };
    (peer.state().word(), severity)
}

fn peer_row(peer: &Peer) -> [Cell; 9] {
    let (word, severity) = state(peer);
    let carried = |packets: u64, bytes: u64| Cell::from(format!("{packets} packets, {bytes} bytes"));
    let traffic = peer.fast_path.as_ref();
    #[expect(clippy::cast_possible_truncation, reason = "seconds")]
    let since = peer.mesh_since_seconds as i64;
    [
        named(&peer.node).into(),
        Cell::coloured(word, severity),
        Cell::coloured(peer.mesh().word(), mesh::severity(peer.mesh())),
        if since < 0 { Cell::default() } else { span(since).into() },
        peer.subnets.join(" ").into(),
        peer.public_addresses.join(" ").into(),
        peer.vtep_macs.join(" ").into(),
        traffic.map(|traffic| carried(traffic.sent_packets, traffic.sent_bytes)).unwrap_or_default(),
        traffic.map(|traffic| carried(traffic.received_packets, traffic.received_bytes)).unwrap_or_default(),
    ]
}

fn peer_line(change: &PeerEvent) -> String {
    let peer = change.peer.clone().unwrap_or_default();
    let reason = if peer.reason.is_empty() { String::new() } else { format!(": {}", peer.reason) };
    let (what, node, state) = (change.r#type().word(), named(&peer.node), peer.state().word());
    format!("{what:8} {node} {} {state}{reason}\n", peer.subnets.join(" "))
}

fn lease_table(screen: &Screen, leases: &[LeaseRecord]) -> String {
    let row = |lease: &LeaseRecord| -> [Cell; 7] {
        let state = match (lease.own, lease.reserved) {
            (true, _) => Cell::coloured("ours", Severity::Good),
            (_, true) => Cell::coloured("reserved, node away", Severity::Doubtful),
            _ => "held".into(),
        };
        [
            named(&lease.node).into(),
            state,
            lease.subnets.join(" ").into(),
            lease.public_addresses.join(" ").into(),
            lease.vtep_macs.join(" ").into(),
            lease.epoch.to_string().into(),
            lease.mod_revision.to_string().into(),
        ]
    };
    let rows: Vec<[Cell; 7]> = leases.iter().map(row).collect();
    render(screen, ["NODE", "STATE", "SUBNET", "UNDERLAY", "VTEP", "EPOCH", "REVISION"], &rows)
}

fn lease_line(change: &LeaseEvent) -> String {
    let lease = change.lease.clone().unwrap_or_default();
    let (what, node) = (change.r#type().word(), named(&lease.node));
    format!("{what:8} {} {node} revision {}\n", lease.subnets.join(" "), lease.mod_revision)
}

fn named(node: &str) -> String {
    if node.is_empty() { "(flannel)".into() } else { node.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::{FastPathTraffic, MeshCause};

    #[test]
    fn state_and_mesh_of_a_dual_stack_peer_are_seen_on_a_terminal_of_80_columns() {
        let peer = Peer {
            node: "node-2".into(),
            subnets: vec!["10.244.14.0/24".into(), "fd00:10:244:e::/64".into()],
            public_addresses: vec!["192.0.2.12".into(), "2001:db8::12".into()],
            vtep_macs: vec!["02:42:c0:00:02:0c".into(), "02:42:c0:00:02:0d".into()],
            state: PeerState::Pending.into(),
            reason: "a route that is not ours leads to 10.244.14.0/24".into(),
            mesh: MeshCause::MtuBlackHole.into(),
            mesh_since_seconds: 400.0,
            fast_path: None,
        };
        let traffic = FastPathTraffic { sent_packets: 7, sent_bytes: 700, received_packets: 5, received_bytes: 500 };
        let fast = Peer { fast_path: Some(traffic), ..peer.clone() };
        let wide = |peer: &Peer| peer_table(&Screen { width: None, colour: false }, std::slice::from_ref(peer));
        assert!(wide(&fast).contains("7 packets, 700 bytes  5 packets, 500 bytes"), "{}", wide(&fast));
        assert!(!wide(&peer).contains("FAST"), "{}", wide(&peer));
        let told = peer_table(&Screen { width: Some(80), colour: false }, &[peer]);
        assert!(told.contains("node-2  pending  mtu_black_hole  6 min  10.244.14.0/24 fd00:"), "{told}");
        let reason =
            "node-2 10.244.14.0/24 fd00:10:244:e::/64 pending: a route that is not ours leads to 10.244.14.0/24\n";
        assert!(told.ends_with(reason), "{told}");
    }
}
