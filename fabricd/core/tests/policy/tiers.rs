//! What a ClusterNetworkPolicy means: a test for each promise of policy.networking.k8s.io/v1alpha2, and for each answer of
//! ours where that leaves it open.

use fabric_core::policy::Side;
use fabric_core::policy::tiers::{PolicyName, RuleName, Tier};
use fabric_core::policy::{Cluster, ObjectName};
use serde_json::{Value, json};

use crate::world::{DB, ICMP, OTHER, OUTSIDE, SCTP, TCP, UDP, WEB, World, name};

fn world() -> World {
    World::shop_and_lab("app=web")
}

/// A policy for the pods of `shop`: what becomes of what comes to them.
fn ingress(tier: &str, priority: u16, rules: Value) -> Value {
    json!({"tier": tier, "priority": priority, "subject": {"namespaces": {"matchLabels": {"team": "shop"}}},
        "ingress": rules})
}

/// The same of what they send.
fn egress(tier: &str, priority: u16, rules: Value) -> Value {
    json!({"tier": tier, "priority": priority, "subject": {"namespaces": {"matchLabels": {"team": "shop"}}},
        "egress": rules})
}

fn from_all(action: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {}}]})
}

fn from_lab(action: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {"matchLabels": {"team": "lab"}}}]})
}

fn to(action: &str, peer: Value) -> Value {
    json!({"action": action, "to": [peer]})
}

fn who_reaches_db(world: &World) -> Vec<&'static str> {
    [WEB, OTHER, OUTSIDE].into_iter().filter(|src| world.may(src, DB, TCP, 5432)).collect()
}

fn rule(tier: Tier, policy: &str, rule: usize) -> RuleName {
    RuleName { policy: PolicyName { tier, name: ObjectName::of_cluster(policy) }, rule, name: None }
}

/// A NetworkPolicy that allows what comes from the web servers of any namespace.
fn allows_web() -> Value {
    let web = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}});
    json!({"podSelector": {}, "ingress": [{"from": [web]}]})
}

#[test]
fn admin_deny_is_final_whatever_network_policies_allow() {
    let world = world().cluster_policy("first", &ingress("Admin", 1, json!([from_lab("Deny")])));
    assert_eq!(who_reaches_db(&world), [WEB, OUTSIDE]);
    let world = world.policy("shop/p", &allows_web());
    assert_eq!(world.ingress(OTHER, DB, 1), Side::Refused(rule(Tier::Admin, "first", 0)));
    assert_eq!(who_reaches_db(&world), [WEB]);
}

#[test]
fn admin_accept_is_final_whatever_network_policies_isolate() {
    let world = world().policy("shop/closed", &json!({"podSelector": {}}));
    assert_eq!(who_reaches_db(&world), [""; 0]);
    let world = world.cluster_policy("first", &ingress("Admin", 1, json!([from_lab("Accept")])));
    assert_eq!(world.ingress(OTHER, DB, 1), Side::Accepted(rule(Tier::Admin, "first", 0)));
    assert_eq!(world.ingress(WEB, DB, 1), Side::Denied(vec![name("shop/closed")]), "no rule is about it");
}

#[test]
fn accept_of_one_end_says_nothing_of_the_other() {
    let world = world()
        .cluster_policy("first", &egress("Admin", 1, json!([to("Accept", json!({"namespaces": {}}))])))
        .policy("lab/closed", &json!({"podSelector": {}}));
    assert_eq!(world.verdict(WEB, OTHER, TCP, 1).egress, Side::Accepted(rule(Tier::Admin, "first", 0)));
    assert!(!world.may(WEB, OTHER, TCP, 1));
}

#[test]
fn pass_skips_the_rest_of_its_tier_and_goes_to_network_policies() {
    let passes = ingress("Admin", 1, json!([from_lab("Pass"), from_all("Deny")]));
    let world = world()
        .cluster_policy("first", &passes)
        .cluster_policy("second", &ingress("Admin", 2, json!([from_lab("Deny")])));
    assert_eq!(who_reaches_db(&world), [OTHER, OUTSIDE], "no policy is left that is about it");
    assert!(who_reaches_db(&world.clone().policy("shop/closed", &json!({"podSelector": {}}))).is_empty());
    assert_eq!(who_reaches_db(&world.policy("shop/p", &allows_web())), [OTHER]);
}

#[test]
fn pass_goes_on_to_the_baseline_where_no_network_policy_selects_the_pod() {
    let world = world()
        .cluster_policy("first", &ingress("Admin", 1, json!([from_lab("Pass")])))
        .cluster_policy("last", &ingress("Baseline", 1, json!([from_all("Deny")])));
    assert_eq!(world.ingress(OTHER, DB, 1), Side::Refused(rule(Tier::Baseline, "last", 0)));
    let world = world.policy("shop/p", &allows_web());
    assert_eq!(world.ingress(OTHER, DB, 1), Side::Allowed { policy: name("shop/p"), rule: 0 });
}

#[test]
fn pass_of_the_baseline_allows() {
    let world = world().cluster_policy("last", &ingress("Baseline", 1, json!([from_lab("Pass"), from_all("Deny")])));
    assert_eq!(who_reaches_db(&world), [OTHER, OUTSIDE]);
    assert_eq!(world.ingress(OTHER, DB, 1), Side::Undecided);
}

#[test]
fn network_policies_are_final_for_pods_that_they_select_in_that_direction() {
    let baseline = json!({"tier": "Baseline", "priority": 1, "subject": {"namespaces": {}},
        "ingress": [from_all("Accept")], "egress": [to("Deny", json!({"namespaces": {}}))]});
    let isolated = json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"]});
    let world = world().cluster_policy("last", &baseline).policy("shop/db", &isolated);
    assert_eq!(world.ingress(WEB, DB, 1), Side::Denied(vec![name("shop/db")]), "the baseline isn't asked");
    let egress = world.verdict(DB, OTHER, TCP, 1).egress;
    assert_eq!(egress, Side::Refused(rule(Tier::Baseline, "last", 0)), "nor is the policy about what it sends");
}

#[test]
fn connection_that_no_tier_decides_is_allowed() {
    let world = world()
        .cluster_policy("first", &ingress("Admin", 1, json!([from_lab("Accept")])))
        .cluster_policy("last", &ingress("Baseline", 1, json!([from_lab("Deny")])));
    assert_eq!((world.ingress(WEB, DB, 1), world.may(OUTSIDE, DB, ICMP, 0)), (Side::Undecided, true));
    assert_eq!(
        world.verdict(DB, WEB, TCP, 1).egress,
        Side::NotIsolated,
        "without rules it says nothing of a direction"
    );
}

#[test]
fn rules_are_asked_in_their_order() {
    for (rules, reached) in [
        (json!([from_lab("Accept"), from_all("Deny")]), vec![OTHER, OUTSIDE]),
        (json!([from_all("Deny"), from_lab("Accept")]), vec![OUTSIDE]),
    ] {
        for tier in ["Admin", "Baseline"] {
            assert_eq!(
                who_reaches_db(&world().cluster_policy("p", &ingress(tier, 1, rules.clone()))),
                reached,
                "{tier}"
            );
        }
    }
}

#[test]
fn policy_of_lower_priority_is_asked_first_and_of_two_alike_the_first_by_name() {
    let of = |accepts: (&str, u16), denies: (&str, u16)| {
        let world = world()
            .cluster_policy(accepts.0, &ingress("Admin", accepts.1, json!([from_all("Accept")])))
            .cluster_policy(denies.0, &ingress("Admin", denies.1, json!([from_all("Deny")])));
        world.may(WEB, DB, TCP, 1)
    };
    assert!(of(("b", 0), ("a", 1000)) && !of(("b", 1000), ("a", 999)));
    assert!(of(("a", 5), ("b", 5)) && !of(("b", 5), ("a", 5)));
}

#[test]
fn admin_tier_comes_first_whatever_the_priorities() {
    let world = world()
        .cluster_policy("last", &ingress("Baseline", 0, json!([from_all("Accept")])))
        .cluster_policy("first", &ingress("Admin", 1000, json!([from_all("Deny")])));
    assert!(!world.may(WEB, DB, TCP, 1));
}

#[test]
fn subject_is_namespaces_or_pods_of_namespaces() {
    let of = |subject: Value| {
        let spec = json!({"tier": "Admin", "priority": 1, "subject": subject, "ingress": [from_all("Deny")]});
        let world = world().cluster_policy("p", &spec);
        [WEB, DB, OTHER].into_iter().filter(|dst| !world.may(OTHER, dst, TCP, 1)).collect::<Vec<_>>()
    };
    let (web, shop) = (json!({"matchLabels": {"app": "web"}}), json!({"matchLabels": {"team": "shop"}}));
    assert_eq!(of(json!({"namespaces": {}})), [WEB, DB, OTHER]);
    assert_eq!(of(json!({"namespaces": shop})), [WEB, DB]);
    assert_eq!(of(json!({"pods": {"namespaceSelector": {}, "podSelector": web}})), [WEB, OTHER]);
    assert_eq!(of(json!({"pods": {"podSelector": web}})), [WEB, OTHER], "of all namespaces");
    assert_eq!(of(json!({"pods": {"namespaceSelector": shop, "podSelector": web}})), [WEB]);
}

#[test]
fn labels_of_namespaces_and_pods_count_as_they_are_now_for_subjects_and_peers() {
    let world = world().cluster_policy("p", &ingress("Admin", 1, json!([from_lab("Deny")])));
    assert_eq!(who_reaches_db(&world), [WEB, OUTSIDE]);
    assert_eq!(who_reaches_db(&world.clone().namespace("lab", "team=other")), [WEB, OTHER, OUTSIDE]);
    assert_eq!(who_reaches_db(&world.clone().namespace("shop", "team=other")), [WEB, OTHER, OUTSIDE]);
}

#[test]
fn pods_in_their_nodes_network_are_neither_subject_nor_peer() {
    let world = world()
        .pod("shop/agent", "203.0.113.2", "")
        .with("shop/agent", |pod| pod.host_network = true)
        .cluster_policy("p", &ingress("Admin", 1, json!([from_all("Deny")])));
    assert!(world.may(OTHER, "203.0.113.2", TCP, 1), "not a subject");
    assert!(world.may("203.0.113.2", DB, TCP, 1), "not a peer");
}

#[test]
fn networks_are_addresses_also_of_pods_and_for_every_protocol() {
    let networks = |all: Value| egress("Admin", 1, json!([to("Deny", json!({"networks": all}))]));
    let world = world().cluster_policy("p", &networks(json!(["198.51.100.0/24", "192.0.2.3/32"])));
    for (dst, may) in [(OUTSIDE, false), (OTHER, false), (DB, true), ("203.0.113.9", true)] {
        assert_eq!((world.may(WEB, dst, TCP, 1), world.may(WEB, dst, ICMP, 0)), (may, may), "{dst}");
    }
    assert!(world.may(OTHER, OUTSIDE, TCP, 1), "not a subject");
}

#[test]
fn protocols_are_numbers_and_ranges_and_none_is_everything() {
    let of = |protocols: Value| {
        let mut rule = from_all("Deny");
        rule["protocols"] = protocols;
        world().cluster_policy("p", &ingress("Admin", 1, json!([rule])))
    };
    let tcp = of(json!([{"tcp": {"destinationPort": {"number": 80}}}]));
    assert!(!tcp.may(WEB, DB, TCP, 80) && tcp.may(WEB, DB, TCP, 81) && tcp.may(WEB, DB, UDP, 80));
    assert!(tcp.may(WEB, DB, ICMP, 0));
    let two = of(json!([{"udp": {"destinationPort": {"range": {"start": 50, "end": 53}}}},
        {"sctp": {"destinationPort": {"number": 80}}}]));
    assert!(!two.may(WEB, DB, UDP, 50) && !two.may(WEB, DB, UDP, 53) && !two.may(WEB, DB, SCTP, 80));
    assert!(two.may(WEB, DB, UDP, 54) && two.may(WEB, DB, TCP, 80));
    for all in [json!(null), json!([])] {
        let all = of(all);
        assert!(![TCP, UDP, SCTP, ICMP, 47].into_iter().any(|protocol| all.may(WEB, DB, protocol, 1)));
    }
}

#[test]
fn named_port_is_the_destinations_own_whatever_its_protocol() {
    let named = |name: &str| json!([{"destinationNamedPort": name}]);
    let with_ports = || world().ports("shop/db", "sql=TCP:5432 dns=UDP:53").ports("lab/other", "sql=TCP:3306");
    let of = |name: &str| {
        let mut rule = from_all("Deny");
        rule["protocols"] = named(name);
        with_ports().cluster_policy("p", &ingress("Admin", 1, json!([rule])))
    };
    assert!(!of("sql").may(WEB, DB, TCP, 5432) && of("sql").may(WEB, DB, TCP, 80));
    assert!(!of("dns").may(WEB, DB, UDP, 53) && of("dns").may(WEB, DB, TCP, 53));
    assert!(of("nothing").may(WEB, DB, TCP, 5432), "no such name: it matches nothing");
    let mut rule = to("Deny", json!({"namespaces": {}}));
    rule["protocols"] = named("sql");
    let egress = with_ports().cluster_policy("p", &egress("Admin", 1, json!([rule])));
    assert!(!egress.may(WEB, DB, TCP, 5432) && !egress.may(WEB, OTHER, TCP, 3306) && egress.may(WEB, OTHER, TCP, 5432));
}

#[test]
fn pod_to_itself_through_a_service_is_subject_to_cluster_policies_and_to_no_network_policy() {
    let itself = |world: &World| world.verdict(DB, DB, TCP, 80);
    let isolated = world().policy("shop/p", &json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
    for tier in ["Admin", "Baseline"] {
        let deny = ingress(tier, 1, json!([from_all("Deny")]));
        let verdict = itself(&world().cluster_policy("p", &deny));
        assert!(matches!(verdict.ingress, Side::Refused(_)) && verdict.egress == Side::Itself, "{tier}");
        let verdict = itself(&isolated.clone().cluster_policy("p", &deny));
        assert_eq!(verdict.is_allowed(), tier == "Baseline", "the policy selects it, and lets it through");
    }
    let other = world().cluster_policy("p", &ingress("Admin", 1, json!([from_lab("Deny")])));
    assert_eq!(itself(&other).ingress, Side::Itself);
}

#[test]
fn own_node_reaches_its_pods_and_is_reached_where_rules_let_it() {
    let mut world = world().attached("shop/db", DB);
    world.state.local.host = ["203.0.113.1"].map(|ip| ip.parse().expect("valid")).into();
    let all = json!({"networks": ["0.0.0.0/0"]});
    let world = world
        .cluster_policy("p", &egress("Admin", 1, json!([to("Deny", all)])))
        .cluster_policy("q", &ingress("Admin", 1, json!([{"action": "Deny", "from": [{"unknown": {}}]}])));
    assert_eq!(world.ingress("203.0.113.1", DB, 1), Side::OwnNode);
    assert!(!world.may(DB, "203.0.113.1", UDP, 53));
    let mut allowed = world;
    allowed.state.local.own_node_allowed = true;
    assert!(allowed.may(DB, "203.0.113.1", UDP, 53));
}

#[test]
fn pod_of_this_node_whose_namespace_is_not_told_yet_is_closed_while_there_are_cluster_policies() {
    let world = world().pod("new/pod", "192.0.2.9", "").attached("new/pod", "192.0.2.9");
    assert!(world.may(WEB, "192.0.2.9", TCP, 1));
    let world = world.cluster_policy("p", &ingress("Admin", 1, json!([from_lab("Deny")])));
    assert_eq!(world.ingress(WEB, "192.0.2.9", 1), Side::NotYetKnown(name("new/pod")));
    assert!(world.namespace("new", "").may(WEB, "192.0.2.9", TCP, 1));
}

#[test]
fn policies_that_select_a_pod_are_told_in_the_order_in_which_they_are_asked() {
    let rules = json!([from_all("Deny")]);
    let world = world()
        .cluster_policy("c", &ingress("Admin", 1, rules.clone()))
        .cluster_policy("b", &ingress("Admin", 1, rules.clone()))
        .cluster_policy("z", &ingress("Admin", 0, rules.clone()))
        .cluster_policy("a", &ingress("Baseline", 0, rules));
    let cluster = Cluster::new(&world.state);
    let db = world.state.pods.get(&name("shop/db")).expect("there");
    let names: Vec<String> =
        cluster.cluster_policies_of(Tier::Admin, db).map(|(policy, _)| policy.to_string()).collect();
    assert_eq!(names, ["z", "b", "c"]);
}

#[test]
fn verdicts_name_tier_policy_and_rule() {
    let mut named = from_lab("Deny");
    named["name"] = json!("no lab");
    let world = world().cluster_policy("first", &ingress("Admin", 1, json!([from_lab("Pass"), named])));
    assert!(world.ingress(OTHER, DB, 1).is_allowed());
    let mut named = from_lab("Deny");
    named["name"] = json!("no lab");
    let world = world.cluster_policy("first", &ingress("Admin", 1, json!([named])));
    let words = world.ingress(OTHER, DB, 1).to_string();
    assert_eq!(words, "dropped by rule 0 \"no lab\" of ClusterNetworkPolicy first (Admin)");
}
