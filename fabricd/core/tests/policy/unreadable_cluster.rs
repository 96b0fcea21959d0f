//! What can't be understood of a ClusterNetworkPolicy fails closed: a rule that accepts matches nothing, one that denies or
//! passes denies everything. It is named, and the other rules count.

use fabric_core::policy::tiers::{Action, ClusterPolicy};
use serde_json::{Value, json};

use crate::world::{TCP, World};

const WEB: &str = "192.0.2.1";
const DB: &str = "192.0.2.2";
const OUTSIDE: &str = "198.51.100.1";

/// Web and database without any policy but this one, whose rules are for what the web server sends.
fn with_rules(rules: &Value) -> (World, Vec<String>) {
    let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": rules});
    let problems = ClusterPolicy::decode(&spec).expect("readable").problems;
    let world = World::default().namespace("shop", "").pod("shop/web", WEB, "app=web").pod("shop/db", DB, "app=db");
    (world.cluster_policy("p", &spec), problems.iter().map(ToString::to_string).collect())
}

/// What web reaches, of a pod and of an address outside.
fn reached(world: &World) -> (bool, bool) {
    (world.may(WEB, DB, TCP, 80), world.may(WEB, OUTSIDE, TCP, 80))
}

/// Items of which nothing is understood, where they stand, and rules with them.
fn odd() -> Vec<(&'static str, Value)> {
    let peers = [
        json!({}),
        json!({"serviceAccounts": {}}),
        json!({"nodes": {}}),
        json!({"domainNames": ["kubernetes.io"]}),
        json!({"namespaces": {}, "networks": ["0.0.0.0/0"]}),
        json!({"namespaces": {"matchLabel": {}}}),
        json!({"namespaces": "all"}),
        json!({"pods": {"namespaceSelector": {}}}),
        json!({"pods": {"namespaceSelector": {}, "podSelector": {}, "serviceAccount": "x"}}),
        json!({"networks": []}),
        json!({"networks": ["198.51.100.0"]}),
        json!({"networks": ["198.51.100.0/24", "no"]}),
        json!("everybody"),
    ];
    let protocols = [
        json!({}),
        json!({"icmp": {}}),
        json!({"tcp": {}}),
        json!({"tcp": {"destinationPort": {}}}),
        json!({"tcp": {"destinationPort": {"number": 0}}}),
        json!({"tcp": {"destinationPort": {"number": 65536}}}),
        json!({"tcp": {"destinationPort": {"number": 80, "range": {"start": 1, "end": 2}}}}),
        json!({"tcp": {"destinationPort": {"range": {"start": 2, "end": 2}}}}),
        json!({"tcp": {"destinationPort": {"range": {"start": 2, "end": 3, "step": 1}}}}),
        json!({"tcp": {"sourcePort": {"number": 80}}}),
        json!({"tcp": {"destinationPort": {"number": 80}}, "udp": {"destinationPort": {"number": 80}}}),
        json!({"destinationNamedPort": ""}),
    ];
    let all = json!([{"namespaces": {}}, {"networks": ["0.0.0.0/0"]}]);
    let with_peer = peers.into_iter().map(|peer| ("spec.egress[0].to[0]", json!({"to": [peer, {"namespaces": {}}]})));
    let with_protocol = protocols.into_iter().map(|protocol| {
        let fine = json!({"tcp": {"destinationPort": {"number": 80}}});
        ("spec.egress[0].protocols[0]", json!({"to": all, "protocols": [protocol, fine]}))
    });
    let others = [
        ("spec.egress[0].to", json!({})),
        ("spec.egress[0].to", json!({"to": []})),
        ("spec.egress[0].to", json!({"to": {}})),
        ("spec.egress[0].protocols", json!({"to": all, "protocols": {}})),
        ("spec.egress[0].from", json!({"to": all, "from": all})),
        ("spec.egress[0].log", json!({"to": all, "log": true})),
        (
            "spec.egress[0].protocols[0]",
            json!({"to": [{"networks": ["0.0.0.0/0"]}], "protocols": [{"destinationNamedPort": "http"}]}),
        ),
    ];
    with_peer.chain(with_protocol).chain(others).collect()
}

#[test]
fn rule_that_accepts_matches_nothing_where_something_is_not_understood() {
    for (place, mut rule) in odd() {
        rule["action"] = json!("Accept");
        let deny = json!({"action": "Deny", "to": [{"namespaces": {}}, {"networks": ["0.0.0.0/0"]}]});
        let (world, problems) = with_rules(&json!([rule, deny]));
        assert_eq!(reached(&world), (false, false), "{rule}");
        assert!(problems.len() == 1 && problems[0].starts_with(&format!("{place}: ")), "{rule}: {problems:?}");
    }
}

#[test]
fn rules_that_deny_or_pass_deny_everything_where_something_is_not_understood() {
    for action in ["Deny", "Pass"] {
        for (place, mut rule) in odd() {
            rule["action"] = json!(action);
            let (world, problems) = with_rules(&json!([rule]));
            assert_eq!(reached(&world), (false, false), "{rule}");
            assert!(problems.len() == 1 && problems[0].starts_with(&format!("{place}: ")), "{rule}: {problems:?}");
        }
    }
}

#[test]
fn rules_before_one_that_is_not_understood_count() {
    let accept = json!({"action": "Accept", "to": [{"pods": {"podSelector": {"matchLabels": {"app": "db"}}}}]});
    let (world, _) = with_rules(&json!([accept, {"action": "Pass", "to": [{"nodes": {}}]}]));
    assert_eq!(reached(&world), (true, false));
}

#[test]
fn action_that_is_not_known_denies_everything() {
    for action in [json!("Allow"), json!(null), json!(1)] {
        let (world, problems) = with_rules(&json!([{"action": action, "to": [{"namespaces": {}}]}]));
        assert_eq!(reached(&world), (false, false), "{action}");
        assert_eq!(problems, ["spec.egress[0].action: it is none of Accept, Deny, Pass"]);
    }
}

#[test]
fn networks_are_no_peers_of_ingress() {
    let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "ingress": [{"action": "Accept", "from": [{"networks": ["0.0.0.0/0"]}]}]});
    let policy = ClusterPolicy::decode(&spec).expect("readable");
    assert!(policy.ingress.is_empty() && policy.problems[0].place == "spec.ingress[0].from[0]");
}

#[test]
fn unknown_member_of_the_spec_makes_each_rule_fail_closed() {
    let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "mode": "audit",
        "egress": [{"action": "Accept", "to": [{"namespaces": {}}]}, {"action": "Pass", "to": [{"namespaces": {}}]}]});
    let policy = ClusterPolicy::decode(&spec).expect("readable");
    let said: Vec<_> =
        policy.egress.iter().map(|rule| (rule.matches.index, rule.action, &rule.matches.peers)).collect();
    assert_eq!(said, [(1, Action::Deny, &None)]);
    assert_eq!(policy.problems[0].to_string(), "spec.mode: it is not known here, so each rule fails closed");
}

#[test]
fn policy_of_which_it_is_not_known_whom_it_is_for_or_where_it_stands_is_refused() {
    let good = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}});
    assert!(ClusterPolicy::decode(&good).is_ok());
    for (member, value) in [
        ("tier", json!("Application")),
        ("tier", json!(null)),
        ("priority", json!(1001)),
        ("priority", json!(-1)),
        ("priority", json!(null)),
        ("subject", json!(null)),
        ("subject", json!({})),
        ("subject", json!({"namespaces": {}, "pods": {"podSelector": {}}})),
        ("subject", json!({"nodes": {}})),
        ("subject", json!({"namespaces": {"matchFields": []}})),
        ("ingress", json!({})),
        ("egress", json!("all")),
    ] {
        let mut spec = good.clone();
        spec[member] = value;
        let refused = ClusterPolicy::decode(&spec).expect_err("unreadable").to_string();
        assert!(refused.starts_with(&format!("spec.{member}: ")), "{refused}");
    }
    assert!(ClusterPolicy::decode(&json!([])).is_err());
}
