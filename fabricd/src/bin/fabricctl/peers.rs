//! `fabricctl peers` and `fabricctl leases`: who is there, and who comes and goes.

use std::path::Path;

use fabric_proto::Word as _;
use fabric_proto::v1::{
    LeaseEvent, LeaseRecord, ListLeasesRequest, ListPeersRequest, Peer, PeerEvent, PeerState, WatchLeasesRequest,
    WatchPeersRequest,
};

use crate::output::{Output, Screen, Tone};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon, print};

/// Lists the peers; exit code 4 when not all of them are programmed.
pub async fn peers(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let peers = daemon::connect(socket).await?.list_peers(ListPeersRequest {}).await?.into_inner();
    let well = peers.peers.iter().all(|peer| peer.state() == PeerState::Programmed);
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

/// The peers as a table.
pub fn peer_table(screen: &Screen, peers: &[Peer]) -> String {
    let rows: Vec<[Cell; 5]> = peers.iter().map(peer_row).collect();
    render(screen, ["PEER", "SUBNET", "UNDERLAY", "VTEP", "STATE"], &rows)
}

fn peer_row(peer: &Peer) -> [Cell; 5] {
    let state = match peer.state() {
        PeerState::Programmed => Cell::toned("programmed", Tone::Good),
        PeerState::Pending => Cell::toned(format!("pending: {}", peer.reason), Tone::Doubtful),
        PeerState::Refused => Cell::toned(format!("refused: {}", peer.reason), Tone::Bad),
        PeerState::Unspecified => "unknown".into(),
    };
    let (subnets, underlay) = (peer.subnets.join(" "), peer.public_addresses.join(" "));
    [named(&peer.node).into(), subnets.into(), underlay.into(), peer.vtep_macs.join(" ").into(), state]
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
            (true, _) => Cell::toned("ours", Tone::Good),
            (_, true) => Cell::toned("reserved, node away", Tone::Doubtful),
            _ => "held".into(),
        };
        [
            lease.subnets.join(" ").into(),
            named(&lease.node).into(),
            state,
            lease.public_addresses.join(" ").into(),
            lease.vtep_macs.join(" ").into(),
            lease.epoch.to_string().into(),
            lease.mod_revision.to_string().into(),
        ]
    };
    let rows: Vec<[Cell; 7]> = leases.iter().map(row).collect();
    render(screen, ["SUBNET", "NODE", "STATE", "UNDERLAY", "VTEP", "CLAIM", "REVISION"], &rows)
}

fn lease_line(change: &LeaseEvent) -> String {
    let lease = change.lease.clone().unwrap_or_default();
    let (what, node) = (change.r#type().word(), named(&lease.node));
    format!("{what:8} {} {node} revision {}\n", lease.subnets.join(" "), lease.mod_revision)
}

fn named(node: &str) -> String {
    if node.is_empty() { "(flannel)".into() } else { node.into() }
}
