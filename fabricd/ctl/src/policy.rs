//! `fabricctl policy`: which pods of this node network policies isolate, and what their rules have counted; `fabricctl
//! drops`: what they drop.

use std::fmt::Write as _;
use std::path::Path;

use fabric_proto::v1::{Drop, GetPoliciesRequest, GetPoliciesResponse, PolicyPod, PolicyRule, WatchDropsRequest};

use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon, events, print};

/// Shows them; exit code 4 when they are not enforced, or something needs attention.
pub async fn show(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let answer = daemon::connect(socket).await?.get_policies(GetPoliciesRequest {}).await;
    let policies = answer.map_err(|status| daemon::told(&status))?.into_inner();
    let well = policies.reason.is_empty() && policies.warnings.is_empty();
    Ok(Answer::well_if(well, output.show(&policies, |screen| describe(screen, &policies))?, NOT_ALL_WELL))
}

fn describe(screen: &Screen, policies: &GetPoliciesResponse) -> String {
    if !policies.on {
        return "Network policies are not enforced here; fabricd does it with --network-policy on.\n".to_owned();
    }
    let selected = policies.pods.iter().filter(|pod| !pod.ingress.is_empty() || !pod.egress.is_empty()).count();
    let state = match policies.reason.as_str() {
        "" => screen.paint("enforced", Severity::Good),
        reason => format!("{}: {reason}", screen.paint("not up to date", Severity::Bad)),
    };
    let mut text = format!(
        "Network policies: {state}; {} in the cluster{}, which select {selected} of {} pods here\n",
        policies.policies,
        match policies.cluster_policies {
            0 => String::new(),
            of_cluster => format!(" and {of_cluster} of the whole cluster"),
        },
        policies.pods.len()
    );
    for warning in &policies.warnings {
        let _ = writeln!(text, "{}: {warning}", screen.paint("Warning", Severity::Doubtful));
    }
    if !policies.pods.is_empty() {
        let rows: Vec<[Cell; 4]> = policies.pods.iter().map(pod).collect();
        text.push('\n');
        text += &render(screen, ["POD", "ADDRESSES", "INGRESS", "EGRESS"], &rows);
    }
    if !policies.rules.is_empty() {
        let rows: Vec<[Cell; 4]> = policies.rules.iter().map(rule).collect();
        text.push('\n');
        text += &render(screen, ["DIRECTION", "POLICY", "RULE", "PACKETS"], &rows);
    }
    text
}

fn pod(pod: &PolicyPod) -> [Cell; 4] {
    let name = if pod.pod.is_empty() { "(none of Kubernetes)".to_owned() } else { pod.pod.clone() };
    let isolation = |policies: &Vec<String>| match (pod.applied, policies.is_empty()) {
        (false, _) => Cell::coloured("closed: policies not applied yet", Severity::Doubtful),
        (true, true) => "open".into(),
        (true, false) => policies.join(", ").into(),
    };
    [name.into(), pod.addresses.join(", ").into(), isolation(&pod.ingress), isolation(&pod.egress)]
}

fn rule(rule: &PolicyRule) -> [Cell; 4] {
    let is_of_cluster = matches!(rule.tier.as_str(), "Admin" | "Baseline");
    let what = match (rule.drops, is_of_cluster) {
        (true, _) => "none: dropped".to_owned(),
        (false, true) => format!("{} {}", rule.rule, rule.action),
        (false, false) => rule.rule.to_string(),
    };
    let policies = rule.policies.join(", ");
    let policies = if is_of_cluster { format!("{policies} ({})", rule.tier) } else { policies };
    let drops = rule.drops || rule.action == "Deny";
    let severity = if drops && rule.packets > 0 { Severity::Doubtful } else { Severity::Plain };
    [rule.direction.clone().into(), policies.into(), what.into(), Cell::coloured(rule.packets.to_string(), severity)]
}

/// Prints what is dropped from now on, as it comes, until nobody reads on.
pub async fn drops(socket: &Path, output: Output) -> anyhow::Result<Answer> {
    let answer = daemon::connect(socket).await?.watch_drops(WatchDropsRequest {}).await;
    let mut drops = answer.map_err(|status| daemon::told(&status))?.into_inner();
    while let Some(drop) = drops.message().await.map_err(|status| daemon::told(&status))? {
        if drop.missed {
            let how_many = if drop.missed_packets == 0 { "some".to_owned() } else { drop.missed_packets.to_string() };
            eprintln!("fabricctl: {how_many} dropped packets were not seen: there are too many");
        }
        if (!drop.missed || output.is_data()) && !print(&output.show_next(&drop, |_| line(&drop))?) {
            break;
        }
    }
    Ok(Answer::fine(String::new()))
}

/// A packet in one line.
fn line(drop: &Drop) -> String {
    let end = |ip: &str, port: u32, pod: &str| {
        let ip = if ip.contains(':') && port > 0 { format!("[{ip}]") } else { ip.to_owned() };
        let ip = if port > 0 { format!("{ip}:{port}") } else { ip };
        if pod.is_empty() { ip } else { format!("{pod} ({ip})") }
    };
    let source = end(&drop.source, drop.source_port, &drop.source_pod);
    let target = end(&drop.target, drop.target_port, &drop.target_pod);
    let why = if drop.reasons.is_empty() { drop.words.clone() } else { drop.reasons.join("; ") };
    format!("{}  {} {source} → {target}: {why}\n", events::clock(drop.unix_millis), drop.protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_are_two_tables_of_pods_and_of_rules() {
        let pod = |pod: &str, ip: &str, ingress: &[&str]| PolicyPod {
            pod: pod.into(),
            addresses: vec![ip.into()],
            applied: true,
            ingress: ingress.iter().map(|name| (*name).into()).collect(),
            egress: vec![],
        };
        let rule = |rule, drops, packets| {
            let (policies, direction) = (vec!["shop/web".into()], "ingress".into());
            let (tier, action) = ("NetworkPolicy".into(), if drops { "Deny" } else { "Accept" }.into());
            PolicyRule { policies, direction, drops, rule, packets, tier, action }
        };
        let policies = GetPoliciesResponse {
            on: true,
            policies: 3,
            cluster_policies: 1,
            warnings: vec!["NetworkPolicy shop/odd: spec.ingress[0]: it is no object".into()],
            pods: vec![
                pod("", "192.0.2.3", &[]),
                PolicyPod { applied: false, ..pod("shop/new", "192.0.2.2", &[]) },
                pod("shop/web", "192.0.2.1", &["no-lab (Admin)", "shop/web"]),
            ],
            rules: vec![
                PolicyRule {
                    policies: vec!["no-lab".into()],
                    tier: "Admin".into(),
                    action: "Deny".into(),
                    ..rule(1, false, 7)
                },
                rule(0, false, 12),
                rule(0, true, 3),
            ],
            ..GetPoliciesResponse::default()
        };
        let want =
            "Network policies: enforced; 3 in the cluster and 1 of the whole cluster, which select 1 of 3 pods here
Warning: NetworkPolicy shop/odd: spec.ingress[0]: it is no object

POD                   ADDRESSES  INGRESS                           EGRESS
(none of Kubernetes)  192.0.2.3  open                              open
shop/new              192.0.2.2  closed: policies not applied yet  closed: policies not applied yet
shop/web              192.0.2.1  no-lab (Admin), shop/web          open

DIRECTION  POLICY          RULE           PACKETS
ingress    no-lab (Admin)  1 Deny         7
ingress    shop/web        0              12
ingress    shop/web        none: dropped  3
";
        assert_eq!(describe(&Screen::default(), &policies), want);
        assert!(describe(&Screen::default(), &GetPoliciesResponse::default()).contains("--network-policy on"));
    }

    #[test]
    fn packet_that_is_dropped_is_a_line_with_pods_ports_and_policies() {
        let drop = Drop {
            unix_millis: 1_000_000_000_000,
            words: "no rule allows it".into(),
            protocol: "tcp".into(),
            source: "2001:db8::1".into(),
            source_port: 40000,
            source_pod: "shop/web".into(),
            target: "2001:db8::2".into(),
            target_port: 80,
            reasons: vec!["ingress dropped: no rule allows it of NetworkPolicy shop/db".into()],
            ..Drop::default()
        };
        assert_eq!(
            line(&drop),
            "2001-09-09T01:46:40Z  tcp shop/web ([2001:db8::1]:40000) → [2001:db8::2]:80: ingress dropped: no rule allows it of \
             NetworkPolicy shop/db\n"
        );
    }
}
