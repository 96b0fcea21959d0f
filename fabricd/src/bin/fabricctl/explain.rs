//! `fabricctl explain`: the way of a packet from one pod to another, and where it is lost.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::Path;

use fabric_proto::v1::{CheckResult, ExplainRequest, ExplainResponse};

use crate::doctor::tone;
use crate::output::{Output, Screen, Tone};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon};

/// Shows it; exit code 4 when something on the way is wrong.
pub async fn show(socket: &Path, output: Output, source: IpAddr, target: IpAddr) -> anyhow::Result<Answer> {
    let request = ExplainRequest { source: source.to_string(), target: target.to_string(), local_only: false };
    let answer = daemon::connect(socket).await?.explain(request).await;
    let way = answer.map_err(|status| daemon::told(&status))?.into_inner();
    let well = !way.hops.is_empty() && way.hops.iter().all(|hop| hop.result() != CheckResult::Failed);
    Ok(Answer::well_if(well, output.show(&way, |screen| describe(screen, &way))?, NOT_ALL_WELL))
}

fn describe(screen: &Screen, way: &ExplainResponse) -> String {
    let first = way.hops.iter().position(|hop| hop.result() == CheckResult::Failed);
    let rows: Vec<[Cell; 5]> = way
        .hops
        .iter()
        .enumerate()
        .map(|(place, hop)| {
            let (word, tone) = tone(hop.result());
            let mark = if Some(place) == first { "→" } else { "" };
            [
                mark.into(),
                hop.node.clone().into(),
                hop.layer.clone().into(),
                Cell::toned(word, tone),
                hop.found.clone().into(),
            ]
        })
        .collect();
    let mut text =
        if rows.is_empty() { String::new() } else { render(screen, ["", "NODE", "LAYER", "STATE", "FOUND"], &rows) };
    if let Some(hop) = first.and_then(|place| way.hops.get(place)) {
        let here = screen.paint("Here packets are lost", Tone::Bad);
        let _ = writeln!(text, "\n{here}: {} of {}: {}\n  should be: {}", hop.layer, hop.node, hop.found, hop.expected);
    }
    if !way.missing.is_empty() {
        let _ = writeln!(text, "\n{}: {}", screen.paint("Not seen", Tone::Doubtful), way.missing);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_proto::v1::Hop;

    #[test]
    fn the_first_divergence_is_marked() {
        let hop = |layer: &str, result: CheckResult, expected: &str| Hop {
            node: "node-1".into(),
            layer: layer.into(),
            found: "something".into(),
            result: result.into(),
            expected: expected.into(),
        };
        let hops = vec![
            hop("lease", CheckResult::Ok, ""),
            hop("route", CheckResult::Failed, "another"),
            hop("fdb", CheckResult::Failed, "third"),
        ];
        let way = ExplainResponse { hops, missing: "node-2 was not asked".into() };
        let want = "   NODE    LAYER  STATE   FOUND
   node-1  lease  ok      something
→  node-1  route  failed  something
   node-1  fdb    failed  something

Here packets are lost: route of node-1: something
  should be: another

Not seen: node-2 was not asked
";
        assert_eq!(describe(&Screen::default(), &way), want);
    }
}
