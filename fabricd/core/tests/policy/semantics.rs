//! What a NetworkPolicy means: a test for each promise of networking.k8s.io/v1, and for each answer of ours where that
//! leaves it open.

use fabric_core::policy::Side;
use serde_json::{Value, json};

use crate::world::{DB, ICMP, OTHER, OUTSIDE, SCTP, TCP, UDP, WEB, World, name};

fn world() -> World {
    World::shop_and_lab("app=web,env=test")
}

/// A policy for the databases: who may come.
fn ingress(rules: Value) -> Value {
    json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"], "ingress": rules})
}

/// A policy for the web servers: where they may go.
fn egress(rules: Value) -> Value {
    json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Egress"], "egress": rules})
}

fn selected(labels: Value) -> Value {
    json!({"matchLabels": labels})
}

fn who_reaches_db(world: &World) -> Vec<&'static str> {
    [WEB, OTHER, OUTSIDE].into_iter().filter(|src| world.may(src, DB, TCP, 5432)).collect()
}

#[test]
fn without_a_policy_everything_is_allowed() {
    let world = world();
    assert_eq!(who_reaches_db(&world), [WEB, OTHER, OUTSIDE]);
    assert!(world.may(DB, OUTSIDE, ICMP, 0) && world.may(OUTSIDE, DB, 47, 0));
    assert_eq!(world.ingress(WEB, DB, 1), Side::NotIsolated);
    assert_eq!(world.verdict(OUTSIDE, WEB, TCP, 1).egress, Side::NoPod);
}

#[test]
fn isolation_is_each_directions_own() {
    let world = world().policy("shop/closed", &ingress(json!([])));
    assert!(!world.may(WEB, DB, TCP, 5432), "nobody comes in");
    assert!(world.may(DB, WEB, TCP, 80), "it goes where it wants");
    assert!(world.may(WEB, OTHER, TCP, 80), "others are not selected");
}

#[test]
fn policies_of_another_namespace_select_nobody_here() {
    let world = world().policy("lab/closed", &json!({"podSelector": {}}));
    assert_eq!(who_reaches_db(&world), [WEB, OTHER, OUTSIDE]);
    assert!(!world.may(WEB, OTHER, TCP, 80));
}

#[test]
fn allowed_is_what_any_policy_allows_in_any_order() {
    let (web, lab) = (
        json!([{"from": [{"podSelector": selected(json!({"app": "web"}))}]}]),
        json!([{"from": [{"namespaceSelector": selected(json!({"team": "lab"}))}]}]),
    );
    for (first, second) in [("shop/a", "shop/b"), ("shop/b", "shop/a")] {
        let world = world().policy(first, &ingress(web.clone())).policy(second, &ingress(lab.clone()));
        assert_eq!(who_reaches_db(&world), [WEB, OTHER]);
    }
}

#[test]
fn both_ends_must_agree() {
    let from_web = ingress(json!([{"from": [{"podSelector": selected(json!({"app": "web"}))}]}]));
    let world = world().policy("shop/db", &from_web).policy("shop/web", &egress(json!([])));
    let verdict = world.verdict(WEB, DB, TCP, 5432);
    assert_eq!(verdict.ingress, Side::Allowed { policy: name("shop/db"), rule: 0 });
    assert_eq!(verdict.egress, Side::Denied(vec![name("shop/web")]));
    assert!(!verdict.is_allowed());
}

#[test]
fn absent_policy_types_mean_ingress_and_egress_where_there_are_rules() {
    let all = json!({"podSelector": {}});
    let one_way = world().policy("shop/p", &all);
    assert!(!one_way.may(WEB, DB, TCP, 1) && one_way.may(DB, OUTSIDE, TCP, 1));
    let empty = world().policy("shop/p", &json!({"podSelector": {}, "egress": []}));
    assert!(empty.may(DB, OUTSIDE, TCP, 1), "no rule, no isolation");
    let both = world().policy("shop/p", &json!({"podSelector": {}, "egress": [{"ports": [{"port": 53}]}]}));
    assert!(!both.may(WEB, DB, TCP, 53), "ingress always");
    assert!(both.may(DB, OUTSIDE, TCP, 53) && !both.may(DB, OUTSIDE, TCP, 54));
    let said = world().policy("shop/p", &json!({"podSelector": {}, "policyTypes": ["Egress"], "ingress": [{}]}));
    assert!(!said.may(WEB, OTHER, TCP, 1) && said.may(OUTSIDE, DB, TCP, 1));
}

#[test]
fn selectors_of_pods_and_of_namespaces_are_and() {
    let of = |peer: Value| who_reaches_db(&world().policy("shop/p", &ingress(json!([{"from": [peer]}]))));
    let (web, lab) = (selected(json!({"app": "web"})), selected(json!({"team": "lab"})));
    assert_eq!(of(json!({"podSelector": web})), [WEB], "of the policy's own namespace");
    assert_eq!(of(json!({"podSelector": {}})), [WEB]);
    assert_eq!(of(json!({"namespaceSelector": lab})), [OTHER], "all its pods");
    assert_eq!(of(json!({"namespaceSelector": {}})), [WEB, OTHER], "all pods of the cluster, nobody from outside");
    assert_eq!(of(json!({"namespaceSelector": {}, "podSelector": web})), [WEB, OTHER]);
    assert_eq!(of(json!({"namespaceSelector": lab, "podSelector": selected(json!({"app": "db"}))})), [""; 0]);
    let not_test = json!({"matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["test"]}]});
    assert_eq!(of(json!({"namespaceSelector": {}, "podSelector": not_test})), [WEB], "true without the label too");
}

#[test]
fn labels_of_namespaces_and_pods_count_as_they_are_now() {
    let from_lab = ingress(json!([{"from": [{"namespaceSelector": selected(json!({"team": "lab"}))}]}]));
    let world = world().policy("shop/p", &from_lab);
    assert_eq!(who_reaches_db(&world), [OTHER]);
    assert_eq!(who_reaches_db(&world.clone().namespace("lab", "team=other")), [""; 0]);
    assert_eq!(who_reaches_db(&world.clone().namespace("shop", "team=lab")), [WEB, OTHER]);
    assert_eq!(who_reaches_db(&world.pod("shop/db", DB, "app=other")), [WEB, OTHER, OUTSIDE], "not selected any more");
}

#[test]
fn absent_and_empty_peers_are_everybody_and_no_rules_are_nobody() {
    for rule in [json!({}), json!({"from": []}), json!({"from": null, "ports": null})] {
        assert_eq!(who_reaches_db(&world().policy("shop/p", &ingress(json!([rule])))), [WEB, OTHER, OUTSIDE], "{rule}");
    }
    for rules in [json!([]), json!(null)] {
        assert_eq!(who_reaches_db(&world().policy("shop/p", &ingress(rules))), [""; 0]);
    }
}

#[test]
fn absent_and_empty_ports_are_all_ports_and_protocols() {
    for rule in [json!({}), json!({"ports": []})] {
        let world = world().policy("shop/p", &ingress(json!([rule])));
        for protocol in [TCP, UDP, SCTP, ICMP, 47] {
            assert!(world.may(WEB, DB, protocol, 1), "{protocol}");
        }
    }
}

#[test]
fn address_block_is_its_prefix_without_the_exceptions() {
    let block = json!({"ipBlock": {"cidr": "198.51.100.0/24", "except": ["198.51.100.128/25", "198.51.100.7/32"]}});
    let world = world().policy("shop/p", &ingress(json!([{"from": [block]}])));
    for (src, may) in
        [("198.51.100.1", true), ("198.51.100.7", false), ("198.51.100.200", false), ("203.0.113.1", false)]
    {
        assert_eq!(world.may(src, DB, TCP, 1), may, "{src}");
    }
}

#[test]
fn address_that_one_rule_excepts_and_another_names_is_allowed() {
    let but = json!({"ipBlock": {"cidr": "198.51.100.0/24", "except": ["198.51.100.7/32"]}});
    let one = json!({"ipBlock": {"cidr": "198.51.100.7/32"}});
    let in_one_rule = world().policy("shop/p", &ingress(json!([{"from": [but, one]}])));
    let in_two = world().policy("shop/p", &ingress(json!([{"from": [but]}, {"from": [one]}])));
    assert!(in_one_rule.may("198.51.100.7", DB, TCP, 1) && in_two.may("198.51.100.7", DB, TCP, 1));
}

#[test]
fn address_block_matches_pods_and_nodes_too() {
    let world = world().policy("shop/p", &ingress(json!([{"from": [{"ipBlock": {"cidr": "192.0.2.1/32"}}]}])));
    assert_eq!(who_reaches_db(&world), [WEB]);
    let all = world.policy("shop/q", &ingress(json!([{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}])));
    assert_eq!(who_reaches_db(&all), [WEB, OTHER, OUTSIDE]);
    assert!(!all.may("2001:db8::1", "192.0.2.2", TCP, 1), "IPv4 is not IPv6");
}

#[test]
fn ports_are_numbers_ranges_and_whole_protocols() {
    let of = |ports: Value| world().policy("shop/p", &ingress(json!([{"ports": ports}])));
    let one = of(json!([{"port": 80}]));
    assert!(one.may(WEB, DB, TCP, 80) && !one.may(WEB, DB, TCP, 81) && !one.may(WEB, DB, UDP, 80), "TCP by default");
    let range = of(json!([{"protocol": "UDP", "port": 5000, "endPort": 5010}]));
    for (port, may) in [(4999, false), (5000, true), (5010, true), (5011, false)] {
        assert_eq!(range.may(WEB, DB, UDP, port), may, "{port}");
    }
    let whole = of(json!([{"protocol": "UDP"}]));
    assert!(whole.may(WEB, DB, UDP, 1) && !whole.may(WEB, DB, TCP, 1) && !whole.may(WEB, DB, ICMP, 0));
}

#[test]
fn policy_with_sctp_alone_allows_no_tcp() {
    let world = world().policy("shop/p", &ingress(json!([{"ports": [{"protocol": "SCTP", "port": 80}]}])));
    assert!(world.may(WEB, DB, SCTP, 80) && !world.may(WEB, DB, TCP, 80));
}

#[test]
fn peers_and_ports_of_a_rule_are_and_of_two_rules_or() {
    let web = json!([{"podSelector": selected(json!({"app": "web"}))}]);
    let world =
        world().policy("shop/p", &ingress(json!([{"from": web, "ports": [{"port": 80}]}, {"ports": [{"port": 443}]}])));
    assert!(world.may(WEB, DB, TCP, 80) && !world.may(OUTSIDE, DB, TCP, 80));
    assert!(world.may(WEB, DB, TCP, 443) && world.may(OUTSIDE, DB, TCP, 443));
}

#[test]
fn named_port_of_ingress_is_the_destinations_own() {
    let named = |name: &str| ingress(json!([{"ports": [{"port": name}]}]));
    let with_ports = || world().ports("shop/db", "sql=TCP:5432 dns=UDP:53 admin=TCP:80");
    let world = with_ports().policy("shop/p", &named("sql"));
    assert!(world.may(WEB, DB, TCP, 5432) && !world.may(WEB, DB, TCP, 80));
    let other_protocol = with_ports().policy("shop/p", &named("dns"));
    assert!(!other_protocol.may(WEB, DB, TCP, 53) && !other_protocol.may(WEB, DB, UDP, 53), "TCP was meant");
    let nobody = with_ports().policy("shop/p", &named("nothing"));
    assert!(!nobody.may(WEB, DB, TCP, 5432), "no such name: nothing, not everything");
}

#[test]
fn one_name_is_another_number_in_each_pod() {
    let world = world()
        .pod("shop/db2", "192.0.2.4", "app=db")
        .ports("shop/db", "sql=TCP:5432")
        .ports("shop/db2", "sql=TCP:3306")
        .policy("shop/p", &ingress(json!([{"ports": [{"port": "sql"}]}])));
    let reached = [(DB, 5432), (DB, 3306), ("192.0.2.4", 5432), ("192.0.2.4", 3306)]
        .map(|(to, port)| world.may(WEB, to, TCP, port));
    assert_eq!(reached, [true, false, false, true]);
}

#[test]
fn named_port_of_egress_is_each_peers_own() {
    let to_db = json!([{"to": [{"podSelector": selected(json!({"app": "db"}))}], "ports": [{"port": "sql"}]}]);
    let with_ports = || world().ports("shop/db", "sql=TCP:5432").ports("lab/other", "sql=TCP:3306");
    let world = with_ports().policy("shop/p", &egress(to_db));
    assert!(world.may(WEB, DB, TCP, 5432) && !world.may(WEB, DB, TCP, 3306) && !world.may(WEB, OTHER, TCP, 3306));
    let anybody = with_ports().policy("shop/p", &egress(json!([{"ports": [{"port": "sql"}]}])));
    assert!(anybody.may(WEB, DB, TCP, 5432) && anybody.may(WEB, OTHER, TCP, 3306), "the names of all pods count");
    assert!(!anybody.may(WEB, OUTSIDE, TCP, 5432) && !anybody.may(WEB, OTHER, TCP, 5432));
    let block = json!([{"to": [{"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.3/32"]}}], "ports": [{"port": "sql"}]}]);
    let in_block = with_ports().policy("shop/p", &egress(block));
    assert!(in_block.may(WEB, DB, TCP, 5432) && !in_block.may(WEB, OTHER, TCP, 3306));
}

#[test]
fn icmp_passes_where_a_rule_allows_every_protocol() {
    let every = world().policy("shop/p", &ingress(json!([{"from": [{"podSelector": {}}]}])));
    assert!(every.may(WEB, DB, ICMP, 0) && !every.may(OTHER, DB, ICMP, 0));
    let some = world().policy("shop/p", &ingress(json!([{"ports": [{"port": 80}, {"protocol": "UDP"}]}])));
    assert!(!some.may(WEB, DB, ICMP, 0));
}

/// `shop/db` is on this node, whose addresses are these.
fn at_home() -> World {
    let mut world = world().attached("shop/db", DB);
    world.state.local.host = ["203.0.113.1", "192.0.2.254"].map(|ip| ip.parse().expect("valid")).into();
    world
}

#[test]
fn own_node_always_reaches_its_pods_and_other_nodes_do_not() {
    let world = at_home().policy("shop/p", &ingress(json!([])));
    assert_eq!(world.ingress("203.0.113.1", DB, 1), Side::OwnNode);
    assert!(world.may("192.0.2.254", DB, ICMP, 0));
    assert!(!world.may("203.0.113.2", DB, TCP, 1), "another node");
}

#[test]
fn pods_reach_their_own_node_where_egress_allows_it() {
    let to_nobody = json!({"podSelector": {}, "policyTypes": ["Egress"]});
    let mut world = at_home().policy("shop/p", &to_nobody);
    assert!(!world.may(DB, "203.0.113.1", UDP, 53));
    let dns = json!({"podSelector": {}, "egress": [{"to": [{"ipBlock": {"cidr": "203.0.113.1/32"}}]}]});
    assert!(world.clone().policy("shop/dns", &dns).may(DB, "203.0.113.1", UDP, 53));
    world.state.local.own_node_allowed = true;
    assert!(world.may(DB, "203.0.113.1", UDP, 53) && !world.may(DB, "203.0.113.2", UDP, 53));
}

#[test]
fn pods_in_their_nodes_network_are_neither_subject_nor_peer() {
    let world = world()
        .pod("shop/agent", "203.0.113.2", "app=db")
        .with("shop/agent", |pod| pod.host_network = true)
        .policy("shop/p", &ingress(json!([{"from": [{"podSelector": {}}]}])));
    assert!(world.may(OTHER, "203.0.113.2", TCP, 1), "not a subject");
    assert!(!world.may("203.0.113.2", DB, TCP, 1), "not a peer");
}

#[test]
fn pod_reaches_itself_through_a_service() {
    let nothing = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    let verdict = world().policy("shop/p", &nothing).verdict(DB, DB, TCP, 80);
    assert_eq!((verdict.egress, verdict.ingress), (Side::Itself, Side::Itself));
}

#[test]
fn addresses_of_a_pod_that_has_ended_are_nobodys() {
    let from_web = ingress(json!([{"from": [{"podSelector": selected(json!({"app": "web"}))}]}]));
    let world = world().policy("shop/p", &from_web);
    assert!(!world.clone().with("shop/web", |pod| pod.completed = true).may(WEB, DB, TCP, 1));
    let ending = world.with("shop/web", |pod| pod.ends = Some(100));
    let at = |now| {
        let mut then = ending.clone();
        then.state.now = now;
        then
    };
    assert!(at(100).may(WEB, DB, TCP, 1), "in its grace period");
    assert!(!at(101).may(WEB, DB, TCP, 1), "after it");
}

#[test]
fn of_two_pods_with_one_address_the_newer_has_it() {
    let from_web = ingress(json!([{"from": [{"podSelector": selected(json!({"app": "web"}))}]}]));
    let of = |created| {
        world()
            .policy("shop/p", &from_web)
            .pod("shop/next", WEB, "app=next")
            .with("shop/next", |pod| pod.created = created)
            .with("shop/web", |pod| pod.created = 10)
    };
    assert!(!of(11).may(WEB, DB, TCP, 1) && of(9).may(WEB, DB, TCP, 1));
    let ending = of(9).with("shop/web", |pod| pod.ends = Some(100));
    assert!(!ending.may(WEB, DB, TCP, 1), "one that is to go has it no longer");
}

#[test]
fn pod_of_this_node_has_the_addresses_that_it_was_attached_with() {
    let from_web = ingress(json!([{"from": [{"podSelector": selected(json!({"app": "web"}))}]}]));
    // The API server has not told its address, or tells an old one.
    let world = world().policy("shop/p", &from_web).attached("shop/web", "192.0.2.9");
    assert!(world.may("192.0.2.9", DB, TCP, 1) && !world.may(WEB, DB, TCP, 1));
    // A pod of that name that runs elsewhere is another pod.
    let moved = world.with("shop/web", |pod| pod.uid = 99);
    assert!(moved.may(WEB, DB, TCP, 1) && !moved.may("192.0.2.9", DB, TCP, 1));
}

#[test]
fn pod_that_is_not_known_yet_is_closed() {
    let world = world().attached("shop/new", "192.0.2.9");
    assert_eq!(world.ingress(WEB, "192.0.2.9", 1), Side::NotYetKnown(name("shop/new")));
    assert!(!world.may("192.0.2.9", DB, TCP, 1));
    assert!(world.pod("shop/new", "", "app=new").may("192.0.2.9", DB, TCP, 1));
}

#[test]
fn container_that_is_not_kubernetes_is_not_judged() {
    let mut world = world().policy("shop/p", &ingress(json!([{"from": [{"podSelector": {}}]}])));
    let local = fabric_core::policy::model::LocalPod { identity: None };
    world.state.local.pods.insert("192.0.2.9".parse().expect("valid"), local);
    assert!(world.may(OTHER, "192.0.2.9", TCP, 1) && !world.may("192.0.2.9", DB, TCP, 1), "no subject, no peer");
}

#[test]
fn pod_that_was_attached_without_its_name_is_known_by_its_address() {
    let mut world = world().policy("shop/p", &ingress(json!([])));
    let local = fabric_core::policy::model::LocalPod { identity: None };
    world.state.local.pods.insert(DB.parse().expect("valid"), local);
    assert_eq!(world.ingress(WEB, DB, 1), Side::Denied(vec![name("shop/p")]));
}

#[test]
fn both_families_are_judged_by_the_same_rules() {
    let dual = World::default()
        .namespace("shop", "")
        .pod("shop/web", "192.0.2.1 2001:db8::1", "app=web")
        .pod("shop/db", "192.0.2.2 2001:db8::2", "app=db")
        .policy(
            "shop/p",
            &ingress(json!([{"from": [{"podSelector": selected(json!({"app": "web"}))}], "ports": [{"port": 80}]}])),
        );
    for (web, db, nobody) in [(WEB, DB, OTHER), ("2001:db8::1", "2001:db8::2", "2001:db8::3")] {
        assert!(dual.may(web, db, TCP, 80) && !dual.may(web, db, TCP, 81) && !dual.may(nobody, db, TCP, 80));
    }
}
