//! `fabricctl status`.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use fabric_proto::Word as _;
use fabric_proto::v1::{AddressUse, Dropped, FastPath, GetStatusRequest, GetStatusResponse, Lease, MeshCause, Peer};
use tokio::time::{Instant, sleep};

use crate::output::{Output, Screen, Severity};
use crate::peers::peer_table;
use crate::table::span;
use crate::{Answer, NOT_ALL_WELL, NOT_READY, daemon, mesh};

/// How often `--wait` looks.
const EVERY: Duration = Duration::from_millis(500);
/// How many peers a line names.
const NAMED: usize = 3;

/// Shows the status, once the node is ready or `wait` is over. The exit code is 3 while it is not ready, 4 when something
/// else is not well.
pub async fn show(socket: &Path, output: Output, wait: Option<Duration>) -> anyhow::Result<Answer> {
    let end = wait.map(|wait| Instant::now() + wait);
    let status = loop {
        let asked = ask(socket).await;
        let ready = asked.as_ref().is_ok_and(|status| status.ready);
        if ready || end.is_none_or(|end| Instant::now() >= end) {
            break asked?;
        }
        sleep(EVERY).await;
    };
    let code = match (status.ready, not_well(&status).is_empty()) {
        (false, _) => NOT_READY,
        (true, false) => NOT_ALL_WELL,
        (true, true) => 0,
    };
    Ok(Answer::well_if(code == 0, output.show(&status, |screen| describe(screen, &status))?, code))
}

async fn ask(socket: &Path) -> anyhow::Result<GetStatusResponse> {
    let status = daemon::connect(socket).await?.get_status(GetStatusRequest {}).await;
    Ok(status.map_err(|status| daemon::told(&status))?.into_inner())
}

/// What needs attention although the node may be ready, each in some words: the datastore, peers, warnings, and changes
/// of the config that wait.
pub fn not_well(status: &GetStatusResponse) -> Vec<String> {
    let mut found = vec![];
    if status.store.as_ref().is_some_and(|store| !store.connected) {
        found.push("datastore not connected".into());
    }
    if usize::try_from(status.peers_programmed).unwrap_or(0) < status.peers.len() {
        let left = status.peers.len() - usize::try_from(status.peers_programmed).unwrap_or(0);
        found.push(format!("{left} peers not programmed"));
    }
    found.extend(mesh_trouble(&status.peers));
    for (list, word) in [(&status.warnings, "warning"), (&status.pending, "pending change")] {
        match list.len() {
            0 => {}
            1 => found.push(format!("1 {word}")),
            more => found.push(format!("{more} {word}s")),
        }
    }
    found
}

/// The peers that are not reached, or not well.
fn mesh_trouble(peers: &[Peer]) -> Option<String> {
    let bad: Vec<&Peer> = peers.iter().filter(|peer| mesh::severity(peer.mesh()) == Severity::Bad).collect();
    let impaired = |peer: &&&Peer| matches!(peer.mesh(), MeshCause::MtuBlackHole | MeshCause::Lossy);
    let count = bad.iter().filter(impaired).count();
    let counts = [(bad.len() - count, "unreachable"), (count, "impaired")];
    let counts = counts.iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts.map(|(count, what)| format!("{count} of {} {what}", peers.len())).collect();
    let named = bad.iter().take(NAMED).map(|peer| {
        let name = if peer.node.is_empty() { peer.subnets.join(" ") } else { peer.node.clone() };
        format!("{name} {}", peer.mesh().word())
    });
    let named: Vec<String> = named.collect();
    let more = if bad.len() > NAMED { format!(" and {} more", bad.len() - NAMED) } else { String::new() };
    (!bad.is_empty()).then(|| format!("{}: {}{more}", counts.join(", "), named.join(", ")))
}

fn mesh_line(screen: &Screen, peers: &[Peer]) -> String {
    if let Some(trouble) = mesh_trouble(peers) {
        return screen.paint(&trouble, Severity::Bad);
    }
    let count = |cause| peers.iter().filter(|peer| peer.mesh() == cause).count();
    let counts = [
        (MeshCause::Fine, "reachable"),
        (MeshCause::NoDaemon, "without a fabricd that answers"),
        (MeshCause::Unknown, "not probed yet"),
    ];
    let counts = counts.map(|(cause, what)| (count(cause), what)).into_iter().filter(|(count, _)| *count > 0);
    let counts: Vec<String> = counts.map(|(count, what)| format!("{count} of {} {what}", peers.len())).collect();
    counts.join(", ")
}

fn describe(screen: &Screen, status: &GetStatusResponse) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:10}{value}");
    };
    line("Node", status.node.clone());
    line(
        "State",
        match status.ready {
            true => screen.paint("ready", Severity::Good),
            false => screen.paint(&format!("NOT READY: {}", status.reason), Severity::Bad),
        },
    );
    if let Some(store) = &status.store {
        let state = if store.connected {
            "connected".into()
        } else {
            screen.paint(&format!("NOT CONNECTED: {}", store.reason), Severity::Bad)
        };
        line("Store", format!("{state}, revision {}", store.revision));
    }
    if let Some(network) = &status.network {
        line("Network", format!("{}, VNI {}, UDP port {}", network.spaces.join(" and "), network.vni, network.port));
    }
    match &status.lease {
        Some(lease) => {
            line("Subnet", subnets(lease, &status.addresses));
            line("Lease", lease_line(lease));
        }
        None => line("Lease", "none".into()),
    }
    for vtep in &status.vteps {
        let public = match vtep.public_address == vtep.underlay_address {
            true => String::new(),
            false => format!(", public address {}", vtep.public_address),
        };
        let (device, mac, mtu) = (&vtep.device, &vtep.mac, vtep.mtu);
        line(
            "VTEP",
            format!("{device} {mac}, MTU {mtu}, {} on {}{public}", vtep.underlay_address, vtep.underlay_device),
        );
    }
    line("Peers", format!("{} known, {} programmed", status.peers.len(), status.peers_programmed));
    if !status.peers.is_empty() {
        line("Mesh", mesh_line(screen, &status.peers));
    }
    if let Some(fast_path) = &status.fast_path {
        line("FastPath", fast_path_line(fast_path));
    }
    for change in &status.pending {
        line("Pending", screen.paint(change, Severity::Doubtful));
    }
    for warning in &status.warnings {
        line("Warning", screen.paint(warning, Severity::Doubtful));
    }
    for Dropped { reason, packets, .. } in &status.dropped {
        line("Dropped", format!("{packets} packets: {reason}"));
    }
    if !status.tracked_for_rule.is_empty() {
        let rule = &status.tracked_for_rule;
        line("Tracked", format!("encapsulated packets, since this rule matches connection states: {rule}"));
    }
    if !status.unguarded_ports.is_empty() {
        let ports = status.unguarded_ports.join(", ");
        line("Unknown", format!("pods on bridge ports {ports}: source addresses are filtered by subnet only"));
    }
    if !status.peers.is_empty() {
        let _ = write!(text, "\n{}", peer_table(screen, &status.peers));
    }
    text
}

/// Whether packets take the fast path, and how many of those that its programs saw did.
fn fast_path_line(fast_path: &FastPath) -> String {
    let FastPath { on, reason, peers, pods, fast_packets, slow_packets, .. } = fast_path;
    let seen = fast_packets + slow_packets;
    let share = (fast_packets * 100).checked_div(seen);
    let share = share.map_or_else(String::new, |share| format!(", {share} % of {seen} packets"));
    let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    if *on { format!("on, {peers} peers, {pods} pod addresses{share}{why}") } else { format!("off{why}") }
}

fn subnets(lease: &Lease, uses: &[AddressUse]) -> String {
    let with_use = lease.subnets.iter().map(|subnet| match uses.iter().find(|addresses| addresses.subnet == *subnet) {
        // As good as without end in IPv6.
        Some(AddressUse { used, free, .. }) if *free < 1 << 32 => {
            format!("{subnet}, {used} addresses used, {free} free")
        }
        Some(AddressUse { used, .. }) => format!("{subnet}, {used} addresses used"),
        None => subnet.clone(),
    });
    with_use.collect::<Vec<_>>().join("; ")
}

fn lease_line(lease: &Lease) -> String {
    match lease.ttl_seconds {
        0 => format!("does not expire, epoch {}", lease.epoch),
        ttl => {
            let renewed = span(ttl.saturating_sub(lease.expires_in_seconds).max(0));
            format!("TTL {}, renewed {renewed} ago, epoch {}", span(ttl), lease.epoch)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::{Network, PeerState, Store, Vtep};

    fn peer(n: u8, state: PeerState, mesh: MeshCause) -> Peer {
        Peer {
            node: format!("node-{n}"),
            subnets: vec![format!("10.244.{n}.0/24")],
            public_addresses: vec![format!("192.0.2.{n}")],
            vtep_macs: vec![format!("02:42:c0:00:02:0{n}")],
            state: state.into(),
            reason: String::new(),
            mesh: mesh.into(),
            mesh_since_seconds: 61.0,
            fast_path: None,
        }
    }

    fn well() -> GetStatusResponse {
        GetStatusResponse {
            node: "node-1".into(),
            version: "0.1.0".into(),
            ready: true,
            store: Some(Store { connected: true, reason: String::new(), revision: 7 }),
            network: Some(Network { spaces: vec!["10.244.0.0/16".into()], vni: 1, port: 8472 }),
            lease: Some(Lease {
                subnets: vec!["10.244.1.0/24".into()],
                expires_in_seconds: 86_280,
                epoch: 2,
                ttl_seconds: 86_400,
            }),
            vteps: vec![Vtep {
                device: "fabric.1".into(),
                mac: "02:42:c0:00:02:01".into(),
                underlay_device: "eth0".into(),
                underlay_address: "192.0.2.1".into(),
                public_address: "198.51.100.1".into(),
                mtu: 1450,
            }],
            peers: vec![peer(2, PeerState::Programmed, MeshCause::Fine)],
            peers_programmed: 1,
            addresses: vec![AddressUse { subnet: "10.244.1.0/24".into(), used: 2, free: 251 }],
            ..GetStatusResponse::default()
        }
    }

    #[test]
    fn status_reads_as_a_page() {
        let mut refused = peer(3, PeerState::Refused, MeshCause::Unknown);
        (refused.node, refused.reason) = (String::new(), "its VNI is 2, ours is 1".into());
        let mut status = well();
        status.peers.extend([refused, peer(4, PeerState::Programmed, MeshCause::PeerDown)]);
        status.warnings = vec!["look here".into()];
        status.pending = vec!["VNI: 1 → 2".into()];
        status.dropped = vec![Dropped { reason: "from no peer".into(), packets: 3, bytes: 300 }];
        status.unguarded_ports = vec!["veth1".into(), "veth2".into()];
        status.tracked_for_rule = "inet filter input: ct state new drop".into();
        let (fast_packets, slow_packets) = (970, 30);
        status.fast_path =
            Some(FastPath { on: true, peers: 2, pods: 5, fast_packets, slow_packets, ..FastPath::default() });
        let want = "\
Node      node-1
State     ready
Store     connected, revision 7
Network   10.244.0.0/16, VNI 1, UDP port 8472
Subnet    10.244.1.0/24, 2 addresses used, 251 free
Lease     TTL 24 h, renewed 2 min ago, epoch 2
VTEP      fabric.1 02:42:c0:00:02:01, MTU 1450, 192.0.2.1 on eth0, public address 198.51.100.1
Peers     3 known, 1 programmed
Mesh      1 of 3 unreachable: node-4 peer_down
FastPath  on, 2 peers, 5 pod addresses, 97 % of 1000 packets
Pending   VNI: 1 → 2
Warning   look here
Dropped   3 packets: from no peer
Tracked   encapsulated packets, since this rule matches connection states: inet filter input: ct state new drop
Unknown   pods on bridge ports veth1, veth2: source addresses are filtered by subnet only

PEER       STATE       MESH       SINCE  SUBNET         UNDERLAY   VTEP
node-2     programmed  fine       61 s   10.244.2.0/24  192.0.2.2  02:42:c0:00:02:02
(flannel)  refused     unknown    61 s   10.244.3.0/24  192.0.2.3  02:42:c0:00:02:03
node-4     programmed  peer_down  61 s   10.244.4.0/24  192.0.2.4  02:42:c0:00:02:04

(flannel) 10.244.3.0/24 refused: its VNI is 2, ours is 1
";
        assert_eq!(describe(&Screen::default(), &status), want);
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!((&json["peers"][0]["state"], &json["peers"][0]["mesh"]), (&"programmed".into(), &"fine".into()));
    }

    #[test]
    fn everything_that_needs_attention_counts_and_nothing_else() {
        assert_eq!(not_well(&well()), Vec::<String>::new());
        let with = |change: fn(&mut GetStatusResponse)| {
            let mut status = well();
            change(&mut status);
            not_well(&status).join("; ")
        };
        for (change, told) in [
            ((|s| s.store = Some(Store::default())) as fn(&mut GetStatusResponse), "datastore not connected"),
            (|s| s.peers_programmed = 0, "1 peers not programmed"),
            (|s| s.peers[0].set_mesh(MeshCause::PortBlocked), "1 of 1 unreachable: node-2 port_blocked"),
            (|s| s.peers[0].set_mesh(MeshCause::MtuBlackHole), "1 of 1 impaired: node-2 mtu_black_hole"),
            (|s| s.warnings = vec!["a".into(), "b".into()], "2 warnings"),
            (|s| s.pending = vec!["a".into()], "1 pending change"),
            // Not known yet, and a flannel node, are no trouble; nor is what the packet filter did its work on.
            (|s| s.peers[0].set_mesh(MeshCause::Unknown), ""),
            (|s| s.peers[0].set_mesh(MeshCause::NoDaemon), ""),
            (|s| s.dropped = vec![Dropped::default()], ""),
        ] {
            assert_eq!(with(change), told);
        }
    }

    #[test]
    fn mesh_line_tells_what_is_known() {
        let of = |causes: &[MeshCause]| {
            let peers: Vec<Peer> = causes.iter().map(|cause| peer(2, PeerState::Programmed, *cause)).collect();
            mesh_line(&Screen::default(), &peers)
        };
        assert_eq!(of(&[MeshCause::Fine, MeshCause::Fine]), "2 of 2 reachable");
        assert_eq!(of(&[MeshCause::Unknown]), "1 of 1 not probed yet");
        let mixed = of(&[MeshCause::Fine, MeshCause::NoDaemon, MeshCause::Unknown]);
        assert_eq!(mixed, "1 of 3 reachable, 1 of 3 without a fabricd that answers, 1 of 3 not probed yet");
    }

    #[test]
    fn many_peers_in_trouble_are_counted_and_few_named() {
        let peers: Vec<Peer> = (2..8).map(|n| peer(n, PeerState::Programmed, MeshCause::PeerDown)).collect();
        let told = mesh_trouble(&peers).unwrap();
        assert_eq!(told, "6 of 6 unreachable: node-2 peer_down, node-3 peer_down, node-4 peer_down and 3 more");
    }
}
