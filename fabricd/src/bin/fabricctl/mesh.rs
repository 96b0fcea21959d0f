//! `fabricctl mesh`: how the peers are reached, and what is wrong.

use std::fmt::Write as _;
use std::path::Path;

use fabric_proto::Word as _;
use fabric_proto::v1::{GetMeshRequest, GetMeshResponse, MeshCause, MeshPeer};

use crate::output::{Output, Screen, Tone};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon};

/// Shows it; exit code 4 when packets to a peer are lost.
pub async fn show(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let mesh = daemon::connect(socket).await?.get_mesh(GetMeshRequest {}).await?.into_inner();
    let well = mesh.peers.iter().all(|peer| tone(peer.cause()) != Tone::Bad);
    Ok(Answer::well_if(well, output.show(&mesh, |screen| describe(screen, &mesh))?, NOT_ALL_WELL))
}

/// What a cause means for pods.
pub fn tone(cause: MeshCause) -> Tone {
    match cause {
        MeshCause::Fine => Tone::Good,
        MeshCause::Unspecified | MeshCause::Unknown | MeshCause::NoDaemon => Tone::Plain,
        _ => Tone::Bad,
    }
}

/// The paths as a table.
pub fn table(screen: &Screen, peers: &[MeshPeer]) -> String {
    let header = ["PEER", "ADDRESS", "VERDICT", "RTT", "LOSS", "LOSS FULL", "MTU", "LAST ANSWER"];
    let rows: Vec<[Cell; 8]> = peers.iter().map(row).collect();
    render(screen, header, &rows)
}

fn describe(screen: &Screen, mesh: &GetMeshResponse) -> String {
    let mut text = table(screen, &mesh.peers);
    for peer in mesh.peers.iter().filter(|peer| !peer.fix.is_empty()) {
        let verdict = screen.paint(&peer.cause().word(), tone(peer.cause()));
        let _ = writeln!(text, "\n{} {}: {verdict}\n  {}\n  fix: {}", peer.node, peer.address, peer.evidence, peer.fix);
    }
    let (seconds, packets) = (mesh.round_seconds, mesh.packets_per_second);
    let _ = writeln!(
        text,
        "\nEvery peer is probed each {seconds:.0} s; this node sends {packets:.1} packets a second for it."
    );
    if !mesh.limits.is_empty() {
        let _ = writeln!(text, "{}", screen.paint(&mesh.limits, Tone::Doubtful));
    }
    text
}

fn row(peer: &MeshPeer) -> [Cell; 8] {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let probed = peer.cause() != MeshCause::Unknown;
    let if_probed = |text: String| if probed { text } else { String::new() };
    let last = match peer.last_answer_seconds {
        ..0.0 => if_probed("never".into()),
        seconds => format!("{seconds:.0} s ago"),
    };
    [
        peer.node.clone().into(),
        peer.address.clone().into(),
        Cell::toned(peer.cause().word(), tone(peer.cause())),
        if peer.rtt_ms > 0.0 { format!("{:.2} ms", peer.rtt_ms).into() } else { Cell::default() },
        if_probed(percent(peer.loss)).into(),
        if_probed(percent(peer.loss_full)).into(),
        if peer.path_mtu > 0 { peer.path_mtu.to_string().into() } else { Cell::default() },
        last.into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_stands_below_the_table_with_its_fix() {
        let fine = MeshPeer {
            node: "node-2".into(),
            address: "10.244.2.0".into(),
            cause: MeshCause::Fine.into(),
            rtt_ms: 0.321,
            path_mtu: 1450,
            last_answer_seconds: 2.2,
            ..MeshPeer::default()
        };
        let bad = MeshPeer {
            node: "node-3".into(),
            address: "10.244.3.0".into(),
            cause: MeshCause::PortBlocked.into(),
            evidence: "nothing comes".into(),
            fix: "open it".into(),
            loss: 1.0,
            loss_full: 1.0,
            last_answer_seconds: -1.0,
            ..MeshPeer::default()
        };
        let mesh = GetMeshResponse {
            peers: vec![fine, bad],
            round_seconds: 5.0,
            packets_per_second: 1.6,
            limits: String::new(),
        };
        let want = "\
PEER    ADDRESS     VERDICT       RTT      LOSS   LOSS FULL  MTU   LAST ANSWER
node-2  10.244.2.0  fine          0.32 ms  0 %    0 %        1450  2 s ago
node-3  10.244.3.0  port_blocked           100 %  100 %            never

node-3 10.244.3.0: port_blocked
  nothing comes
  fix: open it

Every peer is probed each 5 s; this node sends 1.6 packets a second for it.
";
        assert_eq!(describe(&Screen::default(), &mesh), want);
    }
}
