//! What can't be understood of a policy matches nothing, is named, and widens nothing.

use fabric_core::policy::Policy;
use serde_json::{Value, json};

use crate::world::{TCP, UDP, World};

const WEB: &str = "192.0.2.1";
const DB: &str = "192.0.2.2";

/// A policy for all pods with this rule alone: whether the rule lets web through, and what was said of it.
fn with_rule(rule: &Value) -> (bool, Vec<String>) {
    with_spec(&json!({"podSelector": {}, "ingress": [rule]}))
}

fn with_spec(spec: &Value) -> (bool, Vec<String>) {
    let world = World::default()
        .namespace("shop", "")
        .pod("shop/web", WEB, "app=web")
        .pod("shop/db", DB, "app=db")
        .ports("shop/db", "http=TCP:80")
        .policy("shop/p", spec);
    let problems = world.state.policies.values().flat_map(|policy| &policy.problems).map(ToString::to_string).collect();
    (world.may(WEB, DB, TCP, 80), problems)
}

#[test]
fn peer_that_cannot_be_read_is_nobody_and_named() {
    for peer in [
        json!({}),
        json!({"serviceAccountSelector": {}}),
        json!({"podSelector": {}, "serviceAccountSelector": {}}),
        json!({"podSelector": {"matchLabel": {"app": "web"}}}),
        json!({"podSelector": {"matchExpressions": [{"key": "app", "operator": "Like", "values": ["w*"]}]}}),
        json!({"namespaceSelector": {"matchLabels": {"a": 1}}}),
        json!({"ipBlock": {"cidr": "192.0.2.1"}}),
        json!({"ipBlock": {"cidr": "192.0.2.0/33"}}),
        json!({"ipBlock": {"cidr": "::ffff:192.0.2.0/120"}}),
        json!({"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.999/32"]}}),
        json!({"ipBlock": {"cidr": "192.0.2.0/25", "except": ["192.0.2.0/24"]}}),
        json!({"ipBlock": {"cidr": "192.0.2.0/24", "exceptPorts": [80]}}),
        json!({"ipBlock": {"cidr": "192.0.2.0/24"}, "podSelector": {}}),
        json!("everybody"),
    ] {
        let (may, problems) = with_rule(&json!({"from": [peer]}));
        assert!(!may, "a list of which nothing is readable is not an empty list: {peer}");
        assert!(problems.len() == 1 && problems[0].starts_with("spec.ingress[0].from[0]: "), "{peer}: {problems:?}");
        let (may, _) = with_rule(&json!({"from": [peer, {"podSelector": {}}]}));
        assert!(may, "the others of the list count: {peer}");
    }
}

#[test]
fn port_that_cannot_be_read_is_none_and_named() {
    for port in [
        json!({"port": 0}),
        json!({"port": 65536}),
        json!({"port": -80}),
        json!({"port": 80.5}),
        json!({"port": [80]}),
        json!({"protocol": "tcp", "port": 80}),
        json!({"protocol": "ICMP"}),
        json!({"port": 80, "endPort": 79}),
        json!({"port": "http", "endPort": 90}),
        json!({"endPort": 90}),
        json!({"port": 80, "endPort": "90"}),
        json!({"port": 80, "action": "Log"}),
    ] {
        let (may, problems) = with_rule(&json!({"ports": [port]}));
        assert!(!may, "{port}");
        assert!(problems.len() == 1 && problems[0].starts_with("spec.ingress[0].ports[0]: "), "{port}: {problems:?}");
    }
}

#[test]
fn rule_with_something_unknown_allows_nothing() {
    for rule in [json!({"icmp": {"type": 8}}), json!({"to": []}), json!({"from": {}}), json!(null), json!([])] {
        let (may, problems) = with_rule(&rule);
        assert!(!may, "{rule}");
        assert!(problems[0].starts_with("spec.ingress[0]: "), "{problems:?}");
    }
    let spec = json!({"podSelector": {}, "ingress": [{"icmp": {}}, {}]});
    assert!(with_spec(&spec).0, "the others of the list count");
}

#[test]
fn unknown_member_of_the_spec_isolates_and_allows_nothing() {
    let (may, problems) = with_spec(&json!({"podSelector": {}, "ingress": [{}], "priority": 1}));
    assert_eq!(
        (may, problems),
        (false, vec!["spec.priority: it is not known here, so the policy allows nothing".to_owned()])
    );
}

#[test]
fn unknown_policy_type_is_named_and_the_others_count() {
    let (may, problems) = with_spec(&json!({"podSelector": {}, "policyTypes": ["Forward", "Ingress"]}));
    assert_eq!((may, problems.len()), (false, 1));
    assert!(problems[0].starts_with("spec.policyTypes[0]: "));
}

#[test]
fn policy_of_which_it_is_not_known_whom_it_isolates_is_refused() {
    for (spec, place) in [
        (json!(null), "spec: "),
        (json!({"podSelector": {"matchLabels": []}}), "spec.podSelector: "),
        (json!({"podSelector": {}, "policyTypes": ["Forward"]}), "spec.policyTypes: "),
        (json!({"podSelector": {}, "policyTypes": "Ingress"}), "spec.policyTypes: "),
        (json!({"podSelector": {}, "ingress": {}}), "spec.ingress: "),
        (json!({"podSelector": {}, "egress": "all"}), "spec.egress: "),
    ] {
        let refused = Policy::decode("shop", &spec).expect_err("unreadable").to_string();
        assert!(refused.starts_with(place), "{refused}");
    }
}

#[test]
fn rules_keep_their_index_when_others_cannot_be_read() {
    let spec = json!({"podSelector": {}, "ingress": [{"icmp": {}}, {"ports": [{"protocol": "UDP"}]}]});
    let policy = Policy::decode("shop", &spec).expect("readable");
    let rules: Vec<usize> = policy.ingress.iter().flatten().map(|rule| rule.index).collect();
    assert_eq!(rules, [1]);
    let world = World::default().namespace("shop", "").pod("shop/db", DB, "").policy("shop/p", &spec);
    assert!(world.may(WEB, DB, UDP, 1));
}
