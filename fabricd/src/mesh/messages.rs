//! [`Verdict`]: a cause in words an operator can act on. Nodes have their names in it, and commands can be pasted.

use std::net::IpAddr;

use super::path::Path;
use super::probe::Reply;
use super::verdict::{Cause, Evidence, Seen};
use super::{PORT, Target};

/// The smallest `Backend.MTU`, in bytes.
const SMALLEST_MTU: u32 = 1350;

/// A cause, the evidence in a sentence, and what to do about it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// The cause.
    pub cause: Cause,
    /// What was seen.
    pub evidence: String,
    /// What to do.
    pub fix: String,
}

/// Who is at both ends.
struct Ends<'a> {
    us: &'a str,
    peer: String,
    local: IpAddr,
    remote: IpAddr,
    overlay: IpAddr,
    port: u16,
    target: &'a Target,
}

/// What is wrong with a path.
#[must_use]
pub fn verdict(path: &Path) -> Verdict {
    let target = &path.target;
    let ends = Ends {
        us: target.ours.node.as_str(),
        peer: target.name(),
        local: target.ours.local,
        remote: target.public_ip,
        overlay: target.overlay,
        port: target.ours.port,
        target,
    };
    let cause = path.cause();
    let (evidence, fix) = match (cause, &path.seen) {
        (Cause::Lossy, _) => lossy(path, &ends),
        (Cause::UnknownYet, Some(seen)) => unknown_yet(seen, &ends),
        (_, None | Some(Seen::Both)) => (String::new(), String::new()),
        (_, Some(Seen::KernelBoth)) => (
            format!(
                "{}'s kernel answers through the tunnel; no fabricd does, as none does on a flannel node",
                ends.peer
            ),
            format!("only if {} should run fabricd: systemctl status fabricd there", ends.peer),
        ),
        (_, Some(Seen::SmallOnly { largest, full })) => mtu_black_hole(*largest, *full, &ends),
        (_, Some(Seen::Nothing(evidence))) => silence(cause, evidence, &ends),
    };
    Verdict { cause, evidence, fix }
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

fn lossy(path: &Path, ends: &Ends<'_>) -> (String, String) {
    let Ends { us, peer, local, remote, .. } = ends;
    let Some(loss) = path.loss() else { return Default::default() };
    let mut evidence = format!("{} of the last {} probes got no answer", percent(loss.share), loss.probes);
    if let Some((there, back)) = loss.halves {
        evidence += &format!(" ({} lost from {us} to {peer}, {} from {peer} to {us})", percent(there), percent(back));
    }
    if let Some(trip) = path.round_trip() {
        evidence += &format!("; round trip {:.2} ms", trip.as_secs_f64() * 1e3);
    }
    let fix = format!(
        "the underlay between {local} and {remote} loses packets (ping -c 100 -i 0.2 {remote}), or one of the nodes is \
         overloaded: ip -s link show {}",
        path.target.ours.underlay
    );
    (evidence, fix)
}

fn unknown_yet(seen: &Seen, ends: &Ends<'_>) -> (String, String) {
    let Ends { peer, remote, port, .. } = ends;
    let seen = match seen {
        Seen::SmallOnly { full, .. } => format!("packets of {full} bytes get no answer, small ones do"),
        Seen::Nothing(evidence) => {
            format!("unreachable: {peer} doesn't answer through the tunnel; {}", at_host(evidence, *remote, *port))
        }
        Seen::Both | Seen::KernelBoth => "it has begun to answer".into(),
    };
    (
        format!("cause not known yet, it is being tried again; {seen}"),
        format!("see it as soon as it is known: fabricctl mesh --probe {peer}"),
    )
}

/// What came back from the host in the underlay.
fn at_host(evidence: &Evidence, remote: IpAddr, port: u16) -> String {
    match (evidence.vxlan, evidence.host) {
        (Reply::Rejected { by, why }, _) => format!("{by} rejects UDP port {port}: {why}"),
        (Reply::Refused, _) => format!("{remote} answers that its UDP port {port} is closed"),
        (_, Reply::Rejected { by, why }) => format!("{by} rejects packets: {why}"),
        (_, Reply::Refused | Reply::Answer) => format!("{remote} itself answers; UDP port {port} of it doesn't"),
        _ => format!("{remote} itself doesn't answer either"),
    }
}

fn mtu_black_hole(largest: u32, full: u32, ends: &Ends<'_>) -> (String, String) {
    let Ends { us, peer, target, .. } = ends;
    let overhead = fabric_core::model::Family::of(target.ours.local).vxlan_overhead();
    let (needs, takes) = (full + overhead, largest + overhead);
    // The network config takes no smaller one.
    let smaller = if takes >= SMALLEST_MTU {
        format!("; or for all nodes: fabricctl network set --mtu {takes}")
    } else {
        String::new()
    };
    (
        format!("packets of {largest} bytes come through between {us} and {peer}, those of {full} bytes don't"),
        format!("let the underlay carry packets of {needs} bytes all the way; it does up to {takes}{smaller}"),
    )
}

/// What is said of a peer that doesn't answer: the evidence, and what to do.
fn silence(cause: Cause, evidence: &Evidence, ends: &Ends<'_>) -> (String, String) {
    let Ends { us, peer, local, remote, overlay, port, target } = ends;
    match cause {
        Cause::UnderlayDown => (
            evidence.underlay.clone().unwrap_or_default(),
            format!("ip link show {}; ip route get {remote}", target.ours.underlay),
        ),
        Cause::RouteOverride => {
            let lines: Vec<&str> = evidence.overriding.iter().map(|found| found.line.as_str()).collect();
            let fixes: Vec<&str> = evidence.overriding.iter().map(|found| found.remedy.as_str()).collect();
            (
                format!("on {us} packets for {peer} don't follow fabricd's route; overriding: {}", lines.join("; ")),
                fixes.join("; "),
            )
        }
        Cause::LocalFirewall => match &evidence.local {
            Some(local) => (format!("a firewall on {us} itself: {}", local.rule), local.remedy.clone()),
            None => Default::default(),
        },
        Cause::OwnFilter => (
            format!(
                "fabricd's packet filter on {us} drops what {peer} sends: {} packets as it was probed",
                evidence.dropped
            ),
            format!(
                "{peer} sends from another address than {remote}: see which with tcpdump -ni any udp port {port}, and \
                 publish that one there with --public-ip, or allow it on {us} with --allow-sender"
            ),
        ),
        Cause::ChecksumOffload => (
            "UDP without a checksum comes through, with one it doesn't, by turns: a network card or driver breaks \
             checksums inside the tunnel"
                .into(),
            format!("on {us} and on {peer}: ethtool -K {} tx-checksum-ip-generic off", target.ours.device),
        ),
        Cause::NoDaemon => (
            format!("{peer}'s kernel answers through the tunnel, UDP port {PORT} (fabricd's probes) doesn't"),
            format!(
                "on {peer}: systemctl status fabricd; or a firewall there drops UDP port {PORT} on the VXLAN device"
            ),
        ),
        Cause::StaleFdb => (
            format!(
                "{peer} answers what is encapsulated per its lease, and not what the kernel of {us} sends: a stale or \
                 foreign entry"
            ),
            format!(
                "on {us}: fabricctl plan; ip route get {overlay}; ip neigh show {overlay}; bridge fdb show dev {}",
                target.ours.device
            ),
        ),
        Cause::StaleMac => (
            format!(
                "{peer}'s VTEP answers to any MAC address but the one in its lease, {}: it has another",
                target.mac
            ),
            format!(
                "on {peer}: systemctl restart fabricd, or ip link set {} address {}; keep udev off the device \
                 (MACAddressPolicy=none)",
                target.ours.device, target.mac
            ),
        ),
        Cause::Asymmetric => {
            let why = if evidence.it_drops {
                format!(": {peer} says that its packet filter drops them")
            } else {
                String::new()
            };
            (
                format!("one-way: receiving from {peer}, not reaching it{why}; {}", at_host(evidence, *remote, *port)),
                format!(
                    "let UDP port {port} through from {local} to {remote}: the firewall of {peer}, a security group, the \
                     network between; on {peer}: fabricctl mesh"
                ),
            )
        }
        Cause::PortClosed => (
            format!(
                "{remote} answers that its UDP port {port} is closed: {peer} has no VXLAN device there (yet), or its firewall \
                 rejects the port"
            ),
            format!("on {peer}: fabricctl status; ip -d link show type vxlan; nft list ruleset"),
        ),
        Cause::PortBlocked => {
            let doubt = match evidence.any_mac {
                None => format!("; or its VTEP has another MAC address than {}", target.mac),
                Some(_) => String::new(),
            };
            (
                format!("nothing comes through the tunnel; {}{doubt}", at_host(evidence, *remote, *port)),
                format!(
                    "let UDP port {port} through between {local} and {remote}: the firewall of {peer}, a security group, \
                     the hypervisor"
                ),
            )
        }
        Cause::PeerDown | Cause::Unknown | Cause::UnknownYet | Cause::Fine | Cause::Lossy | Cause::MtuBlackHole => (
            format!("nothing answers, neither in the tunnel nor at {remote}"),
            format!(
                "is {peer} up, and is {remote} its address? If it is: a firewall drops all that {local} sends. If it is gone \
                 for good: fabricctl lease release {peer}"
            ),
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::Instant;

    use super::*;
    use crate::mesh::diagnose::Round;
    use crate::mesh::probe::Answer;
    use crate::mesh::routes::Override;
    use crate::mesh::tests::target;
    use crate::mesh::verdict::LocalDrop;

    const ANSWERED: Answer = Answer::Daemon { rtt: Duration::from_millis(80), arrived: u64::MAX };

    /// The verdict on a path of which two rounds have shown this, a day after both ends were known.
    fn told(seen: Seen) -> Verdict {
        let begin = Instant::now().checked_sub(Duration::from_secs(90)).unwrap();
        verdict(&Path::new(target(), begin).after(Answer::Nothing, Answer::Nothing, seen))
    }

    fn nothing(change: impl FnOnce(&mut Evidence)) -> Verdict {
        let mut evidence = Evidence { any_mac: Some(false), host: Reply::Refused, ..Evidence::default() };
        change(&mut evidence);
        told(Seen::Nothing(Box::new(evidence)))
    }

    #[test]
    fn every_verdict_names_the_nodes_and_a_fix_without_placeholders() {
        let overriding =
            vec![Override { line: "blackhole 10.244.2.0/26 proto bird".into(), remedy: "ip route del x".into() }];
        let local = Some(LocalDrop { rule: "a chain".into(), remedy: "nft list ruleset".into() });
        let by: IpAddr = "192.0.2.2".parse().unwrap();
        let verdicts = [
            told(Seen::KernelBoth),
            told(Seen::SmallOnly { largest: 1350, full: 1450 }),
            nothing(|_| {}),
            nothing(|e| e.host = Reply::Silence),
            nothing(|e| e.vxlan = Reply::Rejected { by, why: "host administratively prohibited" }),
            nothing(|e| e.vxlan = Reply::Refused),
            nothing(|e| e.received = true),
            nothing(|e| e.dropped = 8),
            nothing(|e| e.no_checksum = true),
            nothing(|e| e.kernel = true),
            nothing(|e| e.by_hand = true),
            nothing(|e| e.any_mac = Some(true)),
            nothing(|e| e.overriding = overriding),
            nothing(|e| e.local = local),
            nothing(|e| e.underlay = Some("this node has no route to 192.0.2.2".into())),
        ];
        for Verdict { cause, evidence, fix } in &verdicts {
            assert!(!evidence.is_empty() && !fix.is_empty(), "{cause:?}");
            for text in [evidence, fix] {
                for wrong in ["…", "DEV", "MAC;", "NODE", "{", " here", "there:"] {
                    assert!(!text.contains(wrong), "{cause:?} says {wrong:?}: {text}");
                }
            }
        }
        let causes: std::collections::BTreeSet<Cause> = verdicts.iter().map(|verdict| verdict.cause).collect();
        assert_eq!(causes.len(), verdicts.len() - 2, "port_blocked and no_daemon are seen in two ways: {causes:?}");
    }

    #[test]
    fn what_was_seen_is_what_is_said() {
        let by: IpAddr = "192.0.2.254".parse().unwrap();
        for (verdict, evidence, fix) in [
            (
                nothing(|e| e.received = true),
                "one-way: receiving from node-2, not reaching it",
                "192.0.2.1 to 192.0.2.2",
            ),
            (nothing(|e| (e.received, e.it_drops) = (true, true)), "node-2 says that its packet filter drops", ""),
            (
                nothing(|e| e.vxlan = Reply::Rejected { by, why: "host administratively prohibited" }),
                "192.0.2.254 rejects UDP port 8472: host administratively prohibited",
                "let UDP port 8472 through",
            ),
            (nothing(|e| e.any_mac = None), "or its VTEP has another MAC address than 02:00:00:00:00:02", ""),
            (nothing(|e| e.host = Reply::Silence), "neither in the tunnel nor at 192.0.2.2", "lease release node-2"),
            (nothing(|e| e.no_checksum = true), "by turns", "ethtool -K fabric.1 tx-checksum-ip-generic off"),
            (told(Seen::SmallOnly { largest: 1350, full: 1450 }), "1350 bytes", "fabricctl network set --mtu 1400"),
            (told(Seen::KernelBoth), "flannel", "systemctl status fabricd"),
        ] {
            assert!(verdict.evidence.contains(evidence), "{verdict:?}");
            assert!(verdict.fix.contains(fix), "{verdict:?}");
        }
        let smaller = told(Seen::SmallOnly { largest: 1250, full: 1450 });
        assert!(!smaller.fix.contains("--mtu"), "the network config takes no MTU of 1300: {smaller:?}");
    }

    #[test]
    fn what_one_round_has_shown_is_not_known_yet() {
        let path = Path::new(target(), Instant::now());
        let evidence = Evidence { host: Reply::Refused, received: true, ..Evidence::default() };
        let verdict = verdict(&path.after(Answer::Nothing, Answer::Nothing, Seen::Nothing(Box::new(evidence))));
        assert_eq!(verdict.cause, Cause::UnknownYet, "the peer is new");
        assert!(verdict.evidence.starts_with("cause not known yet"), "{verdict:?}");
        assert_eq!(verdict.fix, "see it as soon as it is known: fabricctl mesh --probe node-2");
    }

    #[test]
    fn loss_is_told_with_its_share_on_each_half_of_the_path_and_the_round_trip() {
        let mut path = Path::new(target(), Instant::now());
        for lost in [5, 0] {
            let answer = |n| if n < lost { Answer::Nothing } else { ANSWERED };
            let samples: Vec<_> = (0..11).map(|n| (path.next.wrapping_add(n), answer(n))).collect();
            let (target, begun) = (path.target.clone(), Instant::now());
            path.round(Round { target, begun, small: ANSWERED, full: ANSWERED, seen: Seen::Both, samples });
        }
        let want = "23 % of the last 22 probes got no answer (0 % lost from node-1 to node-2, 23 % from node-2 to node-1); \
                    round trip 80.00 ms";
        assert_eq!(verdict(&path).evidence, want);
    }
}
