//! `fabricctl explain`: the path of a packet from a pod, and where it is lost.
//!
//! The daemons say what they read on both nodes and what became of their own packets. This program adds the packet that
//! proves it: a ping from within the pod's network namespace, which root on the node may enter and the daemon may not
//! (docs/decisions/0052-explain-sends-real-packets.md).

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use clap::ValueEnum;
use fabric_proto::v1::{CheckResult, ExplainRequest, ExplainResponse, Hop, PacketSender};
use fabricd::diagnosis::explain::PACKET;
use fabricd::diagnosis::packet::{self, Seen};
use tokio::task::spawn_blocking;

use crate::doctor::severity;
use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon};

/// The protocol of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    #[default]
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// As the API has it.
    fn word(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// Shows it; exit code 4 when something on the path is wrong, or was not seen.
pub async fn show(
    socket: &Path,
    output: Output,
    (source, target): (IpAddr, IpAddr),
    to: Option<(Protocol, u16)>,
) -> anyhow::Result<Answer> {
    let request = ExplainRequest {
        source: source.to_string(),
        target: target.to_string(),
        local_only: false,
        port: to.map_or(0, |(_, port)| port.into()),
        protocol: to.map_or("", |(protocol, _)| protocol.word()).into(),
    };
    let answer = daemon::connect(socket).await?.explain(request).await;
    let mut path = answer.map_err(|status| daemon::told(&status))?.into_inner();
    let sent = match path.sender.clone() {
        // Policies may allow one direction and not the other.
        Some(sender) if to.is_some() && sender.from != source.to_string() => {
            Err(format!("only the pod with {source} can connect: explain it on its node"))
        }
        Some(sender) => spawn_blocking(move || send(&sender, to)).await?,
        None => Err("neither end is a pod of this node that can send one".to_owned()),
    };
    let well = conclude(&mut path, sent);
    Ok(Answer::well_if(well, output.show(&path, |screen| describe(screen, &path, (source, target)))?, NOT_ALL_WELL))
}

/// What became of the ping from the pod, and of one from this host to a place outside, to compare.
#[derive(Debug)]
struct Sent {
    node: String,
    from: String,
    to: String,
    outside: bool,
    /// Where it was sent to; `None` for a ping.
    port: Option<(Protocol, u16)>,
    pod: Seen,
    host: Option<Seen>,
}

fn send(sender: &PacketSender, port: Option<(Protocol, u16)>) -> Result<Sent, String> {
    let parse = |ip: &str| ip.parse::<IpAddr>().map_err(|error| error.to_string());
    let (from, to) = (parse(&sender.from)?, parse(&sender.to)?);
    let attempt = move || match port {
        None => packet::ping(from, to),
        Some((Protocol::Tcp, port)) => packet::connect(from, to, port),
        Some((Protocol::Udp, port)) => packet::probe_port(from, to, port),
        Some((Protocol::Sctp, _)) => Err(std::io::Error::other("nothing is sent by SCTP")),
    };
    let pod = packet::inside(Path::new(&sender.netns), attempt)
        .map_err(|error| format!("nothing can be sent from the pod's network namespace {}: {error}", sender.netns))?;
    let any = if to.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let host = (sender.outside && port.is_none() && !pod.answered()).then(|| packet::ping(any, to).ok()).flatten();
    let (node, from, to) = (sender.node.clone(), sender.from.clone(), sender.to.clone());
    Ok(Sent { node, from, to, outside: sender.outside, port, pod, host })
}

/// Adds the packet to the path, and judges all of it: what is wrong, what was not seen, and what contradicts it.
fn conclude(path: &mut ExplainResponse, sent: Result<Sent, String>) -> bool {
    let failed = |path: &ExplainResponse| path.hops.iter().any(|hop| hop.result() == CheckResult::Failed);
    match sent {
        Ok(sent) => {
            let mut hop = hop_of(&sent);
            if hop.result() == CheckResult::Failed && !failed(path) {
                // Nothing that was read is wrong, so this is where to go on.
                hop.expected = where_to_look(&sent);
            }
            if hop.result() == CheckResult::Skipped {
                let why = match sent.port {
                    None => "the other end answers no pings, not even this node's",
                    Some(_) => "a program that takes a packet of UDP need not answer",
                };
                add(&mut path.missing, &format!("whether packets get there: {why}"));
            }
            // A pod may answer a ping and nothing else: the daemons' own packets count for what they are then.
            path.hops.push(hop);
        }
        Err(why) => {
            let packets: Vec<&Hop> = path.hops.iter().filter(|hop| hop.layer == PACKET).collect();
            let all_answered = !packets.is_empty() && packets.iter().all(|hop| hop.result() == CheckResult::Ok);
            // To what is no pod only the pod itself can send.
            let to_no_pod = path.sender.as_ref().is_some_and(|sender| sender.outside);
            if !all_answered || to_no_pod {
                add(&mut path.missing, &format!("a packet from the pod itself: {why}"));
            }
        }
    }
    if path.hops.iter().any(|hop| hop.layer == "service") {
        add(
            &mut path.missing,
            "what becomes of the packet behind kube-proxy: explain the address of one of the Service's pods",
        );
    }
    !path.hops.is_empty() && !failed(path) && path.missing.is_empty()
}

fn hop_of(sent: &Sent) -> Hop {
    let Sent { node, from, to, outside, port, pod, host } = sent;
    let mut found = match port {
        None => format!("ping from the pod, {from} to {to}: {pod}"),
        Some((protocol, port)) => format!("{} from the pod, {from} to {to} port {port}: {pod}", protocol.word()),
    };
    let (result, expected) = match (pod, outside, host) {
        (Seen::Answered(_), ..) => (CheckResult::Ok, String::new()),
        (Seen::Nothing, ..) if matches!(port, Some((Protocol::Udp, _))) => (CheckResult::Skipped, String::new()),
        (Seen::Nothing, true, Some(host)) if !host.answered() => {
            let _ = write!(found, "; nor was this node's own");
            (CheckResult::Skipped, String::new())
        }
        (_, true, Some(host)) if host.answered() => {
            let _ = write!(found, "; this node's own was {host}");
            (CheckResult::Failed, "an answer: what is marked above keeps it away".to_owned())
        }
        _ => (CheckResult::Failed, "an answer: what is marked above keeps it away".to_owned()),
    };
    Hop { node: node.clone(), layer: PACKET.into(), found, result: result.into(), expected }
}

/// What a person does when a ping is lost and nothing that was read is wrong.
fn where_to_look(sent: &Sent) -> String {
    let Sent { from, to, pod, .. } = sent;
    match pod {
        Seen::Refused { why, .. } if why.contains("nobody has") => {
            format!("a pod with {to}, and its interface up\nkubectl get pods -A -o wide | grep {to}")
        }
        Seen::Refused { by: Some(by), .. } => {
            format!("no rule that rejects it, on the node that has {by}:\nnft list ruleset\niptables-save")
        }
        _ => format!(
            "an answer; nothing that was read explains it, so look for a firewall rule, on both nodes and in the pods:\n\
             nft list ruleset\niptables-save\ntcpdump -c 10 -ni any host {from} and host {to}"
        ),
    }
}

fn add(text: &mut String, more: &str) {
    if !text.is_empty() {
        text.push_str("; ");
    }
    text.push_str(more);
}

fn describe(screen: &Screen, path: &ExplainResponse, (source, target): (IpAddr, IpAddr)) -> String {
    // Packets show that they are lost, what was read shows where: so that is marked first.
    let first = |result: CheckResult, packets: bool| {
        path.hops.iter().position(|hop| hop.result() == result && (hop.layer == PACKET) == packets)
    };
    // From one end to the other: that a daemon reaches the pod of its own node proves nothing of what lies between.
    let crosses =
        |found: &str| found.contains(&format!("to {target}")) || found.contains(&format!("{target} to {source}"));
    let arrived = path
        .hops
        .last()
        .is_some_and(|hop| hop.layer == PACKET && hop.result() == CheckResult::Ok && crosses(&hop.found));
    let lost = path.hops.iter().any(|hop| hop.layer == PACKET && hop.result() == CheckResult::Failed);
    let marked = first(CheckResult::Failed, false)
        .or_else(|| first(CheckResult::Warning, false).filter(|_| lost))
        .or_else(|| first(CheckResult::Failed, true))
        .or_else(|| first(CheckResult::Warning, true).filter(|_| !arrived));
    let rows: Vec<[Cell; 5]> = path
        .hops
        .iter()
        .enumerate()
        .map(|(place, hop)| {
            let (word, severity) = severity(hop.result());
            let mark = if Some(place) == marked { "→" } else { "" };
            [
                mark.into(),
                hop.node.clone().into(),
                hop.layer.clone().into(),
                Cell::coloured(word, severity),
                hop.found.clone().into(),
            ]
        })
        .collect();
    let mut text =
        if rows.is_empty() { String::new() } else { render(screen, ["", "NODE", "LAYER", "STATE", "FOUND"], &rows) };
    if let Some(hop) = marked.and_then(|place| path.hops.get(place)) {
        let said = match arrived {
            true => screen.paint("The packet was answered, though this is wrong", Severity::Doubtful),
            false => screen.paint("Here packets are lost", Severity::Bad),
        };
        let _ = writeln!(text, "\n{said}: {} of {}: {}", hop.layer, hop.node, hop.found);
        for (place, line) in hop.expected.lines().enumerate() {
            let _ = writeln!(text, "  {} {line}", if place == 0 { "should be:" } else { "          " });
        }
    }
    if !path.missing.is_empty() {
        let _ = writeln!(text, "\n{}: {}", screen.paint("Not seen", Severity::Doubtful), path.missing);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const ENDS: (IpAddr, IpAddr) =
        (IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)), IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2)));

    fn hop(layer: &str, result: CheckResult, expected: &str) -> Hop {
        Hop {
            node: "node-1".into(),
            layer: layer.into(),
            found: "something".into(),
            result: result.into(),
            expected: expected.into(),
        }
    }

    fn path(hops: Vec<Hop>, missing: &str) -> ExplainResponse {
        ExplainResponse { hops, missing: missing.into(), sender: None }
    }

    fn sent(pod: Seen, host: Option<Seen>) -> Result<Sent, String> {
        let outside = host.is_some();
        let (from, to) = ("10.244.1.2".into(), "10.244.2.2".into());
        Ok(Sent { node: "node-1".into(), from, to, outside, port: None, pod, host })
    }

    #[test]
    fn the_first_divergence_is_marked_and_all_lines_of_its_fix_are_shown() {
        let hops = vec![
            hop("lease", CheckResult::Ok, ""),
            hop("route", CheckResult::Failed, "another\nip route del x"),
            hop("fdb", CheckResult::Failed, "third"),
        ];
        let want = "   NODE    LAYER  STATE   FOUND
   node-1  lease  ok      something
→  node-1  route  failed  something
   node-1  fdb    failed  something

Here packets are lost: route of node-1: something
  should be: another
             ip route del x

Not seen: node-2 was not asked
";
        assert_eq!(describe(&Screen::default(), &path(hops, "node-2 was not asked"), ENDS), want);
    }

    #[test]
    fn nothing_is_well_that_was_not_seen_or_was_not_answered() {
        let (ok, warning) = (CheckResult::Ok, CheckResult::Warning);
        let answered = || Seen::Answered(Duration::from_millis(1));
        let refused = Seen::Refused { by: None, why: "no".into() };
        let (fine, packet) = (|| hop("veth", ok, ""), |result| hop(PACKET, result, ""));
        for (case, hops, missing, sent, well) in [
            ("all is fine", vec![fine()], "", sent(answered(), None), true),
            ("no answer", vec![fine()], "", sent(Seen::Nothing, None), false),
            ("refused", vec![fine()], "", sent(refused, None), false),
            ("a half was not seen", vec![fine()], "node-2 was not asked", sent(answered(), None), false),
            (
                "the pod says nothing to UDP, but to a ping",
                vec![fine(), packet(warning)],
                "",
                sent(answered(), None),
                true,
            ),
            ("no packet at all", vec![fine()], "", Err("why".into()), false),
            ("packets of the daemons alone", vec![fine(), packet(ok)], "", Err("why".into()), true),
            ("those are not answered", vec![packet(ok), packet(warning)], "", Err("why".into()), false),
            (
                "a hop is wrong, though a packet passed",
                vec![hop("filter", CheckResult::Failed, "x")],
                "",
                sent(answered(), None),
                false,
            ),
            ("nothing is known", vec![], "", sent(answered(), None), true),
            ("outside, where nobody answers pings", vec![fine()], "", sent(Seen::Nothing, Some(Seen::Nothing)), false),
            ("outside, and only this node is answered", vec![fine()], "", sent(Seen::Nothing, Some(answered())), false),
        ] {
            let mut path = path(hops, missing);
            assert_eq!(conclude(&mut path, sent), well, "{case}: {path:?}");
        }
    }

    #[test]
    fn doubt_before_a_ping_that_is_lost_is_where_it_is_lost() {
        let hops = vec![hop("masquerade", CheckResult::Warning, "switch it on"), hop(PACKET, CheckResult::Failed, "")];
        let text = describe(&Screen::default(), &path(hops, ""), ENDS);
        assert!(text.contains("Here packets are lost: masquerade of node-1"), "{text}");
    }

    #[test]
    fn answer_of_the_pod_on_this_node_is_no_proof_that_the_other_end_is_reached() {
        for (found, said) in [
            ("from this node's 192.0.2.1 to 192.0.2.2: answered in 0.1 ms", "Here packets are lost"),
            ("from this node's 192.0.2.1 to 198.51.100.2: answered in 0.1 ms", "The packet was answered"),
            ("ping from the pod, 198.51.100.2 to 192.0.2.2: answered in 0.1 ms", "The packet was answered"),
        ] {
            let packet = Hop { found: found.into(), ..hop(PACKET, CheckResult::Ok, "") };
            let hops = vec![hop("lease", CheckResult::Failed, "a lease"), packet];
            let text = describe(&Screen::default(), &path(hops, ""), ENDS);
            assert!(text.contains(said), "{found}: {text}");
        }
    }
}
