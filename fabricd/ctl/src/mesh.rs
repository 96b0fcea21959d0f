//! `fabricctl mesh`: how the peers are reached, and what is wrong.

use std::fmt::Write as _;
use std::path::Path;

use fabric_proto::Word as _;
use fabric_proto::v1::{GetMeshRequest, GetMeshResponse, MeshCause, MeshPeer, ProbeMeshRequest};

use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render, span};
use crate::{Answer, NOT_ALL_WELL, daemon};

/// Shows how these peers are reached, all if none is named, and probes them before if `probe`; exit code 4 when packets to
/// one are lost.
pub async fn show(socket: &Path, output: Output, nodes: Vec<String>, probe: bool) -> anyhow::Result<Answer> {
    let mut daemon = daemon::connect(socket).await?;
    let answer = match probe {
        true => daemon.probe_mesh(ProbeMeshRequest { nodes: nodes.clone() }).await,
        false => daemon.get_mesh(GetMeshRequest {}).await,
    };
    let mut mesh = answer.map_err(|status| daemon::told(&status))?.into_inner();
    if let Some(stranger) = nodes.iter().find(|node| !mesh.peers.iter().any(|peer| peer.node == **node)) {
        anyhow::bail!("there is no peer {stranger}; see them with: fabricctl peers");
    }
    mesh.peers.retain(|peer| nodes.is_empty() || nodes.contains(&peer.node));
    let well = mesh.peers.iter().all(|peer| severity(peer.cause()) != Severity::Bad);
    Ok(Answer::well_if(well, output.show(&mesh, |screen| describe(screen, &mesh))?, NOT_ALL_WELL))
}

/// What a cause means for pods.
pub fn severity(cause: MeshCause) -> Severity {
    match cause {
        MeshCause::Fine => Severity::Good,
        MeshCause::Unspecified | MeshCause::Unknown | MeshCause::NoDaemon => Severity::Plain,
        _ => Severity::Bad,
    }
}

/// The paths as a table.
pub fn table(screen: &Screen, peers: &[MeshPeer]) -> String {
    let header = ["PEER", "VERDICT", "SINCE", "RTT", "LOSS", "LOSS FULL", "MTU", "LAST ANSWER", "ADDRESS"];
    let rows: Vec<[Cell; 9]> = peers.iter().map(row).collect();
    render(screen, header, &rows)
}

fn describe(screen: &Screen, mesh: &GetMeshResponse) -> String {
    let mut text = table(screen, &mesh.peers);
    for peer in mesh.peers.iter().filter(|peer| !peer.fix.is_empty()) {
        let verdict = screen.paint(&verdict(peer.cause()), severity(peer.cause()));
        let _ = writeln!(text, "\n{} {}: {verdict}\n  {}\n  fix: {}", peer.node, peer.address, peer.evidence, peer.fix);
    }
    let (seconds, packets) = (mesh.round_seconds, mesh.packets_per_second);
    let _ = writeln!(
        text,
        "\nEvery peer is probed each {seconds:.0} s; this node sends {packets:.1} packets a second for it."
    );
    if !mesh.limits.is_empty() {
        let _ = writeln!(text, "{}", screen.paint(&mesh.limits, Severity::Doubtful));
    }
    text
}

/// The word for a cause, and where there is none yet what is known.
fn verdict(cause: MeshCause) -> String {
    match cause {
        MeshCause::UnknownYet => "cause not known yet".into(),
        cause => cause.word(),
    }
}

fn row(peer: &MeshPeer) -> [Cell; 9] {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let probed = peer.cause() != MeshCause::Unknown;
    let if_probed = |text: String| if probed { text } else { String::new() };
    let last = match peer.last_answer_seconds {
        ..0.0 => if_probed("never".into()),
        seconds => format!("{} ago", ago(seconds)),
    };
    [
        peer.node.clone().into(),
        Cell::coloured(verdict(peer.cause()), severity(peer.cause())),
        if peer.since_seconds >= 0.0 { ago(peer.since_seconds).into() } else { Cell::default() },
        if peer.rtt_ms > 0.0 { format!("{:.2} ms", peer.rtt_ms).into() } else { Cell::default() },
        if_probed(percent(peer.loss)).into(),
        if_probed(percent(peer.loss_full)).into(),
        if peer.path_mtu > 0 { peer.path_mtu.to_string().into() } else { Cell::default() },
        last.into(),
        peer.address.clone().into(),
    ]
}

#[expect(clippy::cast_possible_truncation, reason = "seconds of a daemon's life")]
fn ago(seconds: f64) -> String {
    span(seconds as i64)
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
            since_seconds: 75.0,
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
            since_seconds: 9.0,
            ..MeshPeer::default()
        };
        let open = MeshPeer { node: "node-4".into(), cause: MeshCause::UnknownYet.into(), ..bad.clone() };
        let mesh = GetMeshResponse {
            peers: vec![fine, bad, open],
            round_seconds: 5.0,
            packets_per_second: 1.6,
            limits: String::new(),
        };
        let want = "\
PEER    VERDICT              SINCE  RTT      LOSS   LOSS FULL  MTU   LAST ANSWER  ADDRESS
node-2  fine                 75 s   0.32 ms  0 %    0 %        1450  2 s ago      10.244.2.0
node-3  port_blocked         9 s             100 %  100 %            never        10.244.3.0
node-4  cause not known yet  9 s             100 %  100 %            never        10.244.3.0

node-3 10.244.3.0: port_blocked
  nothing comes
  fix: open it

node-4 10.244.3.0: cause not known yet
  nothing comes
  fix: open it

Every peer is probed each 5 s; this node sends 1.6 packets a second for it.
";
        assert_eq!(describe(&Screen::default(), &mesh), want);
    }
}
