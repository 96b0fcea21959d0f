//! What a person is told of a connection that is dropped, and that it is true.

use fabric_core::policy::reasons::Remedy;
use fabric_core::policy::{Cluster, Conn, Direction, Side};
use serde_json::{Value, json};

use crate::world::{DB, ICMP, OTHER, OUTSIDE, TCP, UDP, WEB, World, name};

const STRANGE: &str = "192.0.2.4";
/// A label of every namespace.
const NAME: &str = "kubernetes.io/metadata.name";

fn world() -> World {
    World::default()
        .namespace("shop", "kubernetes.io/metadata.name=shop")
        .namespace("lab", "team=lab")
        .pod("shop/web", WEB, "app=web,tier=front")
        .pod("shop/db", DB, "app=db")
        .pod("lab/other", OTHER, "app=web")
        .pod("nowhere/strange", STRANGE, "")
}

fn conn(src: &str, dst: &str, protocol: u8, port: u16) -> Conn {
    Conn { src: src.parse().expect("valid"), dst: dst.parse().expect("valid"), protocol, port }
}

/// A spec as RFC 6902 changes it, as far as our patches go.
fn patched(spec: &Value, patch: &Value) -> Value {
    let mut spec = spec.clone();
    for change in patch.as_array().expect("a list") {
        assert_eq!(change["op"], "add");
        let path = change["path"].as_str().expect("a path").strip_prefix("/spec/").expect("of the spec").to_owned();
        match path.split_once('/') {
            Some((list, at)) => {
                let list = spec[list].as_array_mut().expect("a list is there");
                let at = if at == "-" { list.len() } else { at.parse().expect("an index") };
                list.insert(at, change["value"].clone());
            }
            None => spec[path] = change["value"].clone(),
        }
    }
    spec
}

#[test]
fn rule_that_is_printed_allows_the_connection() {
    let web = json!({"matchLabels": {"app": "web"}});
    let specs = [
        json!({"podSelector": {}}),
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": null}),
        json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
               "ingress": [{"from": [{"podSelector": web}], "ports": [{"port": 5432}]}],
               "egress": [{"to": [{"ipBlock": {"cidr": "203.0.113.0/24"}}]}]}),
    ];
    let mut judged = 0;
    for spec in specs {
        let world = world().policy("shop/p", &spec);
        for (src, dst) in [(OTHER, DB), (WEB, DB), (STRANGE, DB), (OUTSIDE, DB), (DB, OTHER), (DB, OUTSIDE), (DB, WEB)]
        {
            for conn in [(TCP, 80), (UDP, 53), (ICMP, 0)].map(|(protocol, port)| conn(src, dst, protocol, port)) {
                let (own, direction) = match dst {
                    DB => (DB, Direction::Ingress),
                    _ => (DB, Direction::Egress),
                };
                let side = |world: &World| {
                    let verdict = Cluster::new(&world.state).evaluate(&conn);
                    if direction == Direction::Ingress { verdict.ingress } else { verdict.egress }
                };
                if side(&world).is_allowed() {
                    continue;
                }
                let remedy: Remedy = Cluster::new(&world.state).remedy(direction, &conn).expect("a rule");
                assert_eq!(remedy.policy.name, name("shop/p"), "{own}");
                let patch = remedy.patch().expect("all of it is understood");
                let patched = World::policy(world.clone(), "shop/p", &patched(&spec, &patch));
                assert!(side(&patched).is_allowed(), "{conn:?} with {patch}");
                assert!(remedy.to_string().starts_with("kubectl -n shop patch networkpolicy p --type=json -p '[{"));
                judged += 1;
            }
        }
    }
    assert!(judged > 30, "{judged} connections were dropped");
}

#[test]
fn rule_for_a_policy_that_is_not_understood_is_shown_and_no_command() {
    let odd = json!({"podSelector": {}, "ingress": [{"from": [{"serviceSelector": {}}]}]});
    let world = world().policy("shop/odd", &odd);
    let remedy = Cluster::new(&world.state).remedy(Direction::Ingress, &conn(WEB, DB, TCP, 80)).expect("a rule");
    assert_eq!(remedy.patch(), None);
    assert!(remedy.to_string().starts_with("this ingress rule in NetworkPolicy shop/odd: {"), "{remedy}");
}

#[test]
fn rules_that_do_not_allow_it_are_told_with_what_they_allow() {
    let rules = json!([
        {"from": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 5432}, {"port": "metrics"}]},
        {"from": [{"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.1/32"]}}]},
        {"from": [{"namespaceSelector": {"matchLabels": {"team": "lab"}}}], "ports": [{"protocol": "UDP"}]},
    ]);
    let world = world().policy("shop/p", &json!({"podSelector": {}, "ingress": rules}));
    let misses = Cluster::new(&world.state).misses(Direction::Ingress, &conn(WEB, DB, TCP, 80));
    let words: Vec<String> = misses.iter().map(ToString::to_string).collect();
    assert_eq!(
        words,
        [
            "rule 0 of NetworkPolicy shop/p allows tcp 5432, tcp port \"metrics\" from pods app=web of namespace shop: this is another port",
            "rule 1 of NetworkPolicy shop/p allows everything from 192.0.2.0/24 but 192.0.2.1/32: this is another peer",
            "rule 2 of NetworkPolicy shop/p allows all of udp from all pods of namespaces team=lab: this is another peer and port",
        ]
    );
}

#[test]
fn rule_that_is_printed_for_a_denied_connection_comes_before_the_rule_that_denies_it() {
    let web = json!({"pods": {"podSelector": {"matchLabels": {"app": "web"}}}});
    let mut judged = 0;
    for tier in ["Admin", "Baseline"] {
        let spec = json!({"tier": tier, "priority": 1, "subject": {"namespaces": {"matchLabels": {NAME: "shop"}}},
            "ingress": [{"action": "Pass", "from": [{"namespaces": {"matchLabels": {"team": "none"}}}]},
                {"action": "Deny", "from": [web]}],
            "egress": [{"action": "Deny", "to": [{"networks": ["198.51.100.0/24"]}, web]}]});
        let world = world().cluster_policy("p", &spec);
        for (src, dst, direction) in [
            (OTHER, DB, Direction::Ingress),
            (WEB, DB, Direction::Ingress),
            (DB, OUTSIDE, Direction::Egress),
            (DB, OTHER, Direction::Egress),
        ] {
            for conn in [(TCP, 80), (UDP, 53), (ICMP, 0)].map(|(protocol, port)| conn(src, dst, protocol, port)) {
                let side = |world: &World| {
                    let verdict = Cluster::new(&world.state).evaluate(&conn);
                    if direction == Direction::Ingress { verdict.ingress } else { verdict.egress }
                };
                let Side::Refused(rule) = side(&world) else { panic!("{conn:?}: {}", side(&world)) };
                let cluster = Cluster::new(&world.state);
                let remedy = cluster.remedy(direction, &conn).expect("a rule");
                let patch = remedy.patch().expect("all of it is understood");
                let patched = World::cluster_policy(world.clone(), "p", &patched(&spec, &patch));
                assert!(matches!(side(&patched), Side::Accepted(_)), "{conn:?} with {patch}");
                assert!(remedy.to_string().starts_with("kubectl patch clusternetworkpolicy p --type=json -p '[{"));
                let told = cluster.denied_by(direction, &rule).expect("a rule");
                let words = match direction {
                    Direction::Ingress => "denies everything from pods app=web of all namespaces",
                    Direction::Egress => "denies everything to pods app=web of all namespaces, 198.51.100.0/24",
                };
                assert_eq!(told, format!("{rule} {words}"));
                judged += 1;
            }
        }
    }
    assert_eq!(judged, 24);
}

#[test]
fn rule_that_fails_closed_is_told_with_what_cannot_be_understood() {
    let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "ingress": [{"action": "Deny", "from": [{"serviceAccounts": {}}]}]});
    let world = world().cluster_policy("odd", &spec);
    let (cluster, conn) = (Cluster::new(&world.state), conn(OUTSIDE, DB, TCP, 80));
    let Side::Refused(rule) = cluster.evaluate(&conn).ingress else { panic!("it denies everything") };
    assert_eq!(cluster.remedy(Direction::Ingress, &conn), None, "no peer of ingress is an address");
    assert_eq!(
        cluster.denied_by(Direction::Ingress, &rule).expect("a rule"),
        "rule 0 of ClusterNetworkPolicy odd (Admin) denies everything, as it can't be understood: \
         spec.ingress[0].from[0]: serviceAccounts is no peer that is known here"
    );
}
