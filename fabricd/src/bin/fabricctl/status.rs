//! `fabricctl status`.

use std::fmt::Write as _;
use std::path::Path;

use fabric_proto::v1::{Dropped, GetStatusRequest, GetStatusResponse};

use crate::output::{Output, Screen, Tone};
use crate::peers::peer_table;
use crate::{Answer, NOT_READY, daemon};

pub async fn show(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let status = daemon::connect(socket).await?.get_status(GetStatusRequest {}).await?.into_inner();
    Ok(Answer::well_if(status.ready, output.show(&status, |screen| describe(screen, &status))?, NOT_READY))
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
            true => screen.paint("ready", Tone::Good),
            false => screen.paint(&format!("NOT READY: {}", status.reason), Tone::Bad),
        },
    );
    if let Some(store) = &status.store {
        let state = if store.connected {
            "connected".into()
        } else {
            screen.paint(&format!("NOT CONNECTED: {}", store.reason), Tone::Bad)
        };
        line("Store", format!("{state}, revision {}", store.revision));
    }
    if let Some(network) = &status.network {
        line("Network", format!("{}, VNI {}, UDP port {}", network.spaces.join(" and "), network.vni, network.port));
    }
    match &status.lease {
        Some(lease) => {
            line("Subnet", lease.subnets.join(" and "));
            line(
                "Lease",
                format!("ends in {} unless kept alive, claim {}", span(lease.expires_in_seconds), lease.epoch),
            );
        }
        None => line("Lease", "none".into()),
    }
    for vtep in &status.vteps {
        let public = match vtep.public_address == vtep.underlay_address {
            true => String::new(),
            false => format!(", announced as {}", vtep.public_address),
        };
        let (device, mac, mtu) = (&vtep.device, &vtep.mac, vtep.mtu);
        line(
            "VTEP",
            format!("{device} {mac}, MTU {mtu}, from {} on {}{public}", vtep.underlay_address, vtep.underlay_device),
        );
    }
    line("Peers", format!("{} known, {} programmed", status.peers.len(), status.peers_programmed));
    for change in &status.pending {
        line("Pending", screen.paint(change, Tone::Doubtful));
    }
    for warning in &status.warnings {
        line("Warning", screen.paint(warning, Tone::Doubtful));
    }
    for Dropped { reason, packets, .. } in &status.dropped {
        line("Dropped", format!("{packets} packets: {reason}"));
    }
    if !status.open_ports.is_empty() {
        line("Open", format!("{}: nobody has told which pods are there", status.open_ports.join(", ")));
    }
    if !status.peers.is_empty() {
        let _ = write!(text, "\n{}", peer_table(screen, &status.peers));
    }
    text
}

pub fn span(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::{Lease, Network, Peer, PeerState, Store, Vtep};

    #[test]
    fn status_reads_as_a_page() {
        let peer = |node: &str, n: u8, state: PeerState, reason: &str| Peer {
            node: node.into(),
            subnets: vec![format!("10.244.{n}.0/24")],
            public_addresses: vec![format!("192.0.2.{n}")],
            vtep_macs: vec![format!("02:42:c0:00:02:0{n}")],
            state: state.into(),
            reason: reason.into(),
        };
        let status = GetStatusResponse {
            node: "node-1".into(),
            version: "0.1.0".into(),
            ready: true,
            reason: String::new(),
            store: Some(Store { connected: true, reason: String::new(), revision: 7 }),
            network: Some(Network { spaces: vec!["10.244.0.0/16".into()], vni: 1, port: 8472 }),
            lease: Some(Lease { subnets: vec!["10.244.1.0/24".into()], expires_in_seconds: 86_399, epoch: 2 }),
            vteps: vec![Vtep {
                device: "fabric.1".into(),
                mac: "02:42:c0:00:02:01".into(),
                underlay_device: "eth0".into(),
                underlay_address: "192.0.2.1".into(),
                public_address: "198.51.100.1".into(),
                mtu: 1450,
            }],
            peers: vec![
                peer("node-2", 2, PeerState::Programmed, ""),
                peer("", 3, PeerState::Refused, "its VNI is 2, ours is 1"),
            ],
            peers_programmed: 1,
            warnings: vec!["look here".into()],
            pending: vec!["VNI: 1 → 2".into()],
            dropped: vec![Dropped { reason: "from no peer".into(), packets: 3, bytes: 300 }],
            open_ports: vec!["veth1".into(), "veth2".into()],
        };
        let want = "\
Node      node-1
State     ready
Store     connected, revision 7
Network   10.244.0.0/16, VNI 1, UDP port 8472
Subnet    10.244.1.0/24
Lease     ends in 23 h unless kept alive, claim 2
VTEP      fabric.1 02:42:c0:00:02:01, MTU 1450, from 192.0.2.1 on eth0, announced as 198.51.100.1
Peers     2 known, 1 programmed
Pending   VNI: 1 → 2
Warning   look here
Dropped   3 packets: from no peer
Open      veth1, veth2: nobody has told which pods are there

PEER       SUBNET         UNDERLAY   VTEP               STATE
node-2     10.244.2.0/24  192.0.2.2  02:42:c0:00:02:02  programmed
(flannel)  10.244.3.0/24  192.0.2.3  02:42:c0:00:02:03  refused: its VNI is 2, ours is 1
";
        assert_eq!(describe(&Screen::default(), &status), want);
        let json = serde_json::to_value(&status).unwrap();
        assert_eq!(json["peers"][0]["state"], "programmed");
    }
}
