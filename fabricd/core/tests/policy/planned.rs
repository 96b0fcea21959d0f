//! The planned table, step by step as the kernel takes it, against the rules of Kubernetes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};

use fabric_core::model::Family;
use fabric_core::policy::chains::Counts;
use fabric_core::policy::plan::{DENIED_LABEL, Planner, PolicyPlan, plan};
use fabric_core::policy::tiers::{PolicyName, Tier};
use fabric_core::policy::{Cluster, Conn};
use fabric_core::state::nft::{CtField, Direction, Field, LOCAL, Name, Place, ct_state};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};

use crate::interpreter::{Interpreter, Packet};
use crate::world::{ICMP, SCTP, TCP, UDP, World, name};

const HOST: [&str; 2] = ["203.0.113.1", "2001:db8:ff::1"];

/// A packet of a connection, as this node's hooks see it.
#[derive(Clone, Copy)]
struct Seen {
    conn: Conn,
    state: u32,
    labels: u32,
    place: Place,
    from_a_pod: bool,
    to_a_pod: bool,
}

impl Seen {
    /// The first one.
    fn first(world: &World, conn: Conn) -> Self {
        let local = &world.state.local;
        let place = if local.host.contains(&conn.dst) { Place::Input } else { Place::Forward };
        let is_local = |ip| local.pods.contains_key(&ip);
        let (from_a_pod, to_a_pod) = (is_local(conn.src), is_local(conn.dst));
        Self { conn, state: ct_state::NEW, labels: 0, place, from_a_pod, to_a_pod }
    }

    fn passes(&self, interpreter: &Interpreter<'_>) -> bool {
        interpreter.passes(self.place, self)
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().into(),
        IpAddr::V6(ip) => ip.octets().into(),
    }
}

impl Packet for Seen {
    fn read(&self, field: Field) -> Option<Vec<u8>> {
        let Self { conn, state, labels, place, from_a_pod, to_a_pod } = self;
        let is_tracked = state & (ct_state::INVALID | ct_state::UNTRACKED) == 0;
        let of = |family: Family, ip: IpAddr| (Family::of(ip) == family).then(|| bytes(ip));
        let interface = |is_a_pod: bool| {
            let mut name = if is_a_pod { b"cni0".to_vec() } else { b"fabric.1".to_vec() };
            name.resize(16, 0);
            name
        };
        match field {
            Field::Number(number) => Some(number.to_ne_bytes().into()),
            Field::Protocol => Some(vec![conn.protocol]),
            Field::NetworkFamily => Some(vec![if conn.src.is_ipv4() { 2 } else { 10 }]),
            Field::Source(family) => of(family, conn.src),
            Field::Target(family) => of(family, conn.dst),
            Field::InInterface => Some(interface(*from_a_pod)),
            Field::OutInterface => (*place == Place::Forward).then(|| interface(*to_a_pod)),
            Field::TargetType => Some(vec![if *place == Place::Input { LOCAL as u8 } else { 1 }]),
            Field::IcmpType => (conn.protocol == 58).then(|| vec![128]),
            Field::HopLimit => Some(vec![64]),
            Field::CtState => Some(state.to_be_bytes().into()),
            Field::CtLabels => is_tracked.then(|| labels.to_be_bytes().into()),
            Field::Ct(..) if !is_tracked => None,
            Field::Ct(Direction::Original, CtField::Source(family)) => of(family, conn.src),
            Field::Ct(Direction::Reply, CtField::Source(family)) => of(family, conn.dst),
            Field::Ct(Direction::Reply, CtField::SourcePort) => Some(conn.port.to_be_bytes().into()),
            other => panic!("not read by these rules: {other}"),
        }
    }
}

fn planned(world: &World) -> PolicyPlan {
    plan(&Cluster::new(&world.state), &BTreeSet::from(["cni0".parse().expect("valid")]))
}

fn labels() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["", "app=web", "app=db", "app=web,env=test", "env=test"])
}

fn selector() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({}),
        json!({"matchLabels": {"app": "web"}}),
        json!({"matchLabels": {"app": "db"}}),
        json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web", "db"]}]}),
        json!({"matchExpressions": [{"key": "env", "operator": "NotIn", "values": ["test"]}]}),
        json!({"matchExpressions": [{"key": "env", "operator": "Exists"}]}),
        json!({"matchExpressions": [{"key": "env", "operator": "DoesNotExist"}]}),
    ])
}

fn peer() -> impl Strategy<Value = Value> {
    let block = |cidr: &str, except: &[&str]| json!({"ipBlock": {"cidr": cidr, "except": except}});
    let blocks = vec![
        block("192.0.2.0/28", &["192.0.2.2/31", "192.0.2.7/32"]),
        block("192.0.2.4/30", &[]),
        block("0.0.0.0/0", &["198.51.100.0/24"]),
        block("203.0.113.1/32", &[]),
        block("2001:db8::/124", &["2001:db8::3/128"]),
        block("::/0", &["2001:db8::/125"]),
        block("198.51.100.1/33", &[]),
    ];
    prop_oneof![
        selector().prop_map(|pods| json!({"podSelector": pods})),
        selector().prop_map(|namespaces| json!({"namespaceSelector": namespaces})),
        (selector(), selector()).prop_map(|(pods, spaces)| json!({"podSelector": pods, "namespaceSelector": spaces})),
        prop::sample::select(blocks),
        Just(json!({"serviceSelector": {}})),
    ]
}

fn port() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({"port": 80}),
        json!({"port": 80, "endPort": 90}),
        json!({"port": 85, "endPort": 443}),
        json!({"protocol": "UDP", "port": 53}),
        json!({"protocol": "UDP"}),
        json!({"protocol": "SCTP", "port": 80}),
        json!({"port": "http"}),
        json!({"port": "dns", "protocol": "UDP"}),
        json!({"port": "nothing"}),
        json!({"port": 0}),
    ])
}

fn rule(peers_are: &'static str) -> impl Strategy<Value = Value> {
    let peers = prop::option::weighted(0.7, prop::collection::vec(peer(), 0..3));
    let ports = prop::option::weighted(0.7, prop::collection::vec(port(), 0..3));
    (peers, ports).prop_map(move |(peers, ports)| json!({ peers_are: peers, "ports": ports }))
}

fn policy() -> impl Strategy<Value = (&'static str, Value)> {
    let types = vec![json!(null), json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"])];
    let (ingress, egress) = (prop::collection::vec(rule("from"), 0..3), prop::collection::vec(rule("to"), 0..3));
    (prop::sample::select(vec!["a", "b", "c"]), selector(), prop::sample::select(types), ingress, egress).prop_map(
        |(namespace, pods, types, ingress, egress)| {
            let spec = json!({"podSelector": pods, "policyTypes": types, "ingress": ingress, "egress": egress});
            (namespace, spec)
        },
    )
}

/// Peers of a ClusterNetworkPolicy's rule; one of seven can't be understood.
fn cluster_peer(direction: &'static str) -> impl Strategy<Value = Value> {
    let networks = vec![
        json!({"networks": ["192.0.2.0/29", "2001:db8::/125"]}),
        json!({"networks": ["0.0.0.0/0"]}),
        json!({"networks": ["203.0.113.1/32", "::/0"]}),
    ];
    let networks = prop::sample::select(networks);
    let pods = (selector(), selector())
        .prop_map(|(spaces, pods)| json!({"pods": {"namespaceSelector": spaces, "podSelector": pods}}));
    prop_oneof![
        2 => selector().prop_map(|namespaces| json!({"namespaces": namespaces})),
        2 => pods,
        2 => networks.prop_filter("ingress has none", move |_| direction == "egress"),
        1 => Just(json!({"serviceAccounts": {}})),
    ]
}

fn cluster_protocol() -> impl Strategy<Value = Value> {
    prop::sample::select(vec![
        json!({"tcp": {"destinationPort": {"number": 80}}}),
        json!({"tcp": {"destinationPort": {"range": {"start": 80, "end": 90}}}}),
        json!({"udp": {"destinationPort": {"range": {"start": 1, "end": 8080}}}}),
        json!({"sctp": {"destinationPort": {"number": 80}}}),
        json!({"destinationNamedPort": "http"}),
        json!({"destinationNamedPort": "dns"}),
        json!({"destinationNamedPort": "nothing"}),
    ])
}

fn cluster_rule(direction: &'static str) -> impl Strategy<Value = Value> {
    let peers_are = if direction == "ingress" { "from" } else { "to" };
    let pods = selector().prop_map(|namespaces| json!({"namespaces": namespaces})).boxed();
    let peer = if direction == "ingress" { pods } else { cluster_peer(direction).boxed() };
    let peers = prop::collection::vec(prop_oneof![4 => peer, 1 => cluster_peer("egress")], 1..3);
    let ports = prop::option::weighted(0.6, prop::collection::vec(cluster_protocol(), 1..3));
    let action = prop::sample::select(vec!["Accept", "Deny", "Pass"]);
    (action, peers, ports)
        .prop_map(move |(action, peers, ports)| json!({"action": action, peers_are: peers, "protocols": ports}))
}

fn cluster_policy() -> impl Strategy<Value = Value> {
    let tier = prop::sample::select(vec!["Admin", "Baseline"]);
    let rules = |direction| prop::collection::vec(cluster_rule(direction), 0..4);
    let subject = prop_oneof![
        selector().prop_map(|namespaces| json!({"namespaces": namespaces})),
        (selector(), selector())
            .prop_map(|(spaces, pods)| { json!({"pods": {"namespaceSelector": spaces, "podSelector": pods}}) }),
    ];
    (tier, 0..4, subject, rules("ingress"), rules("egress")).prop_map(|(tier, priority, subject, ingress, egress)| {
        json!({"tier": tier, "priority": priority, "subject": subject, "ingress": ingress, "egress": egress})
    })
}

/// A pod, and how it may be special.
#[derive(Clone, Debug)]
struct Drawn {
    namespace: &'static str,
    labels: &'static str,
    families: u8,
    ports: &'static str,
    local: bool,
    special: u8,
}

fn pod() -> impl Strategy<Value = Drawn> {
    let ports = vec!["", "http=TCP:80", "http=TCP:85 dns=UDP:53", "http=UDP:53 dns=UDP:8080"];
    (prop::sample::select(vec!["a", "b", "c"]), labels(), 1..4_u8, prop::sample::select(ports), any::<bool>(), 0..12_u8)
        .prop_map(|(namespace, labels, families, ports, local, special)| Drawn {
            namespace,
            labels,
            families,
            ports,
            local,
            special,
        })
}

/// A random cluster of ten pods on two nodes; namespace `c` is not known.
fn world() -> impl Strategy<Value = World> {
    let pods = prop::collection::vec(pod(), 10);
    let policies = (prop::collection::vec(policy(), 0..8), prop::collection::vec(cluster_policy(), 0..6));
    // As many clusters have none of the whole cluster as have some.
    let policies = (policies, any::<bool>());
    (labels(), labels(), pods, policies, any::<bool>()).prop_map(
        |(a, b, pods, ((policies, cluster_policies), is_of_cluster), own_node_allowed)| {
            let mut world = World::default().namespace("a", a).namespace("b", b);
            for (number, drawn) in (1..).zip(pods) {
                let who = format!("{}/pod-{number}", drawn.namespace);
                let ips = [format!("192.0.2.{number}"), format!("2001:db8::{number:x}")];
                let ips = match drawn.families {
                    1 => ips[0].clone(),
                    2 => ips[1].clone(),
                    _ => ips.join(" "),
                };
                world = world.pod(&who, &ips, drawn.labels);
                if !drawn.ports.is_empty() {
                    world = world.ports(&who, drawn.ports);
                }
                if drawn.local {
                    world = world.attached(&who, &ips);
                }
                world = world.with(&who, |pod| match drawn.special {
                    0 => pod.completed = true,
                    1 => pod.host_network = true,
                    2 => pod.ends = Some(0),
                    // This node has an earlier pod of that name.
                    3 => pod.uid = 99,
                    // It says an address that another has too.
                    4 => pod.v4 = Some([192, 0, 2, 3].into()),
                    _ => {}
                });
            }
            world.state.local.host = HOST.map(|ip| ip.parse().expect("valid")).into();
            world
                .state
                .local
                .pods
                .insert("192.0.2.20".parse().expect("valid"), fabric_core::policy::model::LocalPod { identity: None });
            world.state.local.own_node_allowed = own_node_allowed;
            world.state.now = 1;
            for (number, (namespace, spec)) in (1..).zip(policies) {
                world = world.policy(&format!("{namespace}/policy-{number}"), &spec);
            }
            for (number, spec) in (1..).zip(cluster_policies).filter(|_| is_of_cluster) {
                world = world.cluster_policy(&format!("policy-{number}"), &spec);
            }
            world
        },
    )
}

/// Every connection between these: pods, the node, others.
fn connections(family: Family) -> Vec<Conn> {
    let others = match family {
        Family::V4 => ["203.0.113.1", "203.0.113.2", "198.51.100.1", "192.0.2.20"].as_slice(),
        Family::V6 => ["2001:db8:ff::1", "2001:db8:ff::2"].as_slice(),
    };
    let pods = (1..=10).map(|number| match family {
        Family::V4 => format!("192.0.2.{number}"),
        Family::V6 => format!("2001:db8::{number:x}"),
    });
    let addresses = pods.chain(others.iter().map(|ip| (*ip).to_owned()));
    let addresses: Vec<IpAddr> = addresses.map(|ip| ip.parse().expect("valid")).collect();
    let to = [(TCP, 80), (TCP, 85), (TCP, 443), (UDP, 53), (UDP, 8080), (SCTP, 80), (ICMP, 0)];
    let pairs = addresses.iter().flat_map(|src| addresses.iter().map(move |dst| (*src, *dst)));
    pairs.flat_map(|(src, dst)| to.map(|(protocol, port)| Conn { src, dst, protocol, port })).collect()
}

/// Random clusters: for each connection that can be the kernel does what the rules of Kubernetes say.
fn agree(family: Family, clusters: u32, at_least: usize) {
    let (connections, judged, dropped) = (connections(family), AtomicUsize::new(0), AtomicUsize::new(0));
    let config = Config { cases: clusters, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&world(), |world| {
        let (cluster, plan) = (Cluster::new(&world.state), planned(&world));
        let interpreter = Interpreter::new(&plan.table);
        for conn in connections.iter().filter(|conn| !world.state.local.host.contains(&conn.src)) {
            let (said, done) = (cluster.evaluate_here(conn), Seen::first(&world, *conn).passes(&interpreter));
            prop_assert_eq!(said.is_allowed(), done, "{:?}: {:?}\n{}", conn, said, &plan.table);
            judged.fetch_add(1, Ordering::Relaxed);
            dropped.fetch_add(usize::from(!done), Ordering::Relaxed);
        }
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
    let (judged, dropped) = (judged.into_inner(), dropped.into_inner());
    assert!(judged >= at_least, "{judged} connections were judged");
    assert!(
        (judged / 10..judged * 9 / 10).contains(&dropped),
        "{dropped} of {judged} were dropped: clusters say little"
    );
}

#[test]
fn rules_agree_with_kubernetes_on_600_000_connections_of_random_clusters() {
    agree(Family::V4, 480, 600_000);
}

#[test]
fn rules_agree_with_kubernetes_on_400_000_ipv6_connections_of_random_clusters() {
    agree(Family::V6, 440, 400_000);
}

/// Changes one thing of a cluster.
fn changed(world: &World, what: u8, which: usize) -> World {
    let mut world = world.clone();
    let pods: Vec<_> = world.state.pods.iter().map(|pod| pod.name.clone()).collect();
    let Some(name) = pods.get(which % pods.len().max(1)) else { return world };
    let of_pod = |world: &World| world.state.pods.get(name).expect("there").ips().collect::<Vec<IpAddr>>();
    match what {
        0 => drop(world.state.pods.remove(name)),
        1 => world = world.with(&name.to_string(), |pod| pod.template = std::sync::Arc::default()),
        2 => world = world.with(&name.to_string(), |pod| pod.ends = Some(5)),
        3 => world.state.now += 10,
        4 => world = world.namespace(name.namespace(), if which.is_multiple_of(2) { "app=web" } else { "env=test" }),
        5 => of_pod(&world).iter().for_each(|ip| drop(world.state.local.pods.remove(ip))),
        6 => {
            let ips: Vec<String> = of_pod(&world).iter().map(ToString::to_string).collect();
            world = if ips.is_empty() { world } else { world.attached(&name.to_string(), &ips.join(" ")) };
        }
        7 => world = world.with(&name.to_string(), |pod| pod.v4 = Some([192, 0, 2, 3].into())),
        8 => world = world.ports(&name.to_string(), "http=TCP:8443"),
        9 => world.state.cluster_policies = Default::default(),
        10 => {
            let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
                "ingress": [{"action": "Deny", "from": [{"pods": {"podSelector": {"matchLabels": {"app": "db"}}}}]}]});
            world = world.cluster_policy("no-db", &spec);
        }
        _ => {
            let policy = world.state.policies.keys().next().cloned();
            policy.iter().for_each(|policy| drop(world.state.policies.remove(policy)));
        }
    }
    world
}

#[test]
fn table_that_follows_changes_is_the_one_that_is_planned_anew() {
    let steps = prop::collection::vec((0..12_u8, 0..100_usize), 1..30);
    let config = Config { cases: 150, failure_persistence: None, ..Config::default() };
    let outcome = TestRunner::new(config).run(&(world(), world(), steps), |(first, other, steps)| {
        let bridges = BTreeSet::from(["cni0".parse().expect("valid")]);
        let (mut planner, mut is) = (Planner::default(), first);
        for (step, (what, which)) in steps.into_iter().enumerate() {
            let followed = planner.plan(&Cluster::new(&is.state), &bridges);
            prop_assert_eq!(&followed.table, &planned(&is).table, "step {}", step);
            is = if step == 15 { other.clone() } else { changed(&is, what, which) };
        }
        Ok(())
    });
    if let Err(failure) = outcome {
        panic!("{failure}");
    }
}

const WEB: &str = "192.0.2.1";
const DB: &str = "192.0.2.2";

/// A web server of another node, and a database of this one that nobody may connect to.
fn closed() -> World {
    let mut world = World::default()
        .namespace("shop", "")
        .pod("shop/web", WEB, "app=web")
        .pod("shop/db", "", "app=db")
        .attached("shop/db", DB)
        .policy("shop/closed", &json!({"podSelector": {"matchLabels": {"app": "db"}}}));
    world.state.local.host = HOST.map(|ip| ip.parse().expect("valid")).into();
    world
}

fn tcp(src: &str, dst: &str) -> Conn {
    Conn { src: src.parse().expect("valid"), dst: dst.parse().expect("valid"), protocol: TCP, port: 80 }
}

#[test]
fn answers_and_errors_pass_without_a_look_at_the_policies() {
    let world = closed();
    let plan = planned(&world);
    let interpreter = Interpreter::new(&plan.table);
    for (state, passes) in [(ct_state::NEW, false), (ct_state::ESTABLISHED, true), (ct_state::RELATED, true)] {
        assert_eq!(Seen { state, ..Seen::first(&world, tcp(WEB, DB)) }.passes(&interpreter), passes);
    }
}

#[test]
fn established_connection_that_was_denied_since_is_dropped() {
    let world = closed();
    let plan = planned(&world);
    let established = Seen { state: ct_state::ESTABLISHED, ..Seen::first(&world, tcp(DB, WEB)) };
    assert!(established.passes(&Interpreter::new(&plan.table)));
    assert!(!Seen { labels: 1 << DENIED_LABEL, ..established }.passes(&Interpreter::new(&plan.table)));
}

#[test]
fn packet_without_a_connection_never_slips_past_an_isolated_pod() {
    let world = closed().pod("shop/free", "", "app=free").attached("shop/free", "192.0.2.3");
    let plan = planned(&world);
    let interpreter = Interpreter::new(&plan.table);
    for state in [ct_state::INVALID, ct_state::UNTRACKED] {
        let passes = |src, dst| Seen { state, ..Seen::first(&world, tcp(src, dst)) }.passes(&interpreter);
        assert!(!passes(WEB, DB) && !passes(DB, WEB), "either way");
        assert!(passes(WEB, "192.0.2.3") && passes("192.0.2.3", WEB), "nobody isolates it");
    }
}

#[test]
fn neighbour_discovery_passes_from_addresses_of_nobody() {
    let world = closed();
    let plan = planned(&world);
    struct Message {
        seen: Seen,
        kind: u8,
        hop_limit: u8,
    }
    impl Packet for Message {
        fn read(&self, field: Field) -> Option<Vec<u8>> {
            match field {
                Field::IcmpType => Some(vec![self.kind]),
                Field::HopLimit => Some(vec![self.hop_limit]),
                field => self.seen.read(field),
            }
        }
    }
    let conn = Conn { protocol: 58, ..tcp("fe80::1", "ff02::1:ff00:1") };
    let seen = Seen { from_a_pod: true, place: Place::Input, ..Seen::first(&world, conn) };
    let interpreter = Interpreter::new(&plan.table);
    assert!(!seen.passes(&interpreter), "an echo request");
    for kind in [133, 134, 135, 136, 130, 131, 132, 143] {
        assert!(interpreter.passes(Place::Input, &Message { seen, kind, hop_limit: 255 }), "type {kind}");
    }
    let solicitation = |hop_limit| Message { seen, kind: 135, hop_limit };
    assert!(!interpreter.passes(Place::Input, &solicitation(254)), "a router has passed it on");
    let report = |dst: &str| Message {
        seen: Seen { conn: Conn { dst: dst.parse().expect("valid"), ..seen.conn }, ..seen },
        kind: 143,
        hop_limit: 1,
    };
    assert!(interpreter.passes(Place::Input, &report("ff02::16")));
    assert!(!interpreter.passes(Place::Input, &report("2001:db8::1")), "to one alone");
}

#[test]
fn pod_that_is_not_known_yet_reaches_nobody_and_nobody_it() {
    let world = closed().attached("shop/new", "192.0.2.9");
    let (plan, known) = (planned(&world), planned(&world.clone().pod("shop/new", "", "")));
    for (src, dst) in [(WEB, "192.0.2.9"), ("192.0.2.9", WEB), ("192.0.2.9", HOST[0])] {
        let seen = Seen::first(&world, tcp(src, dst));
        assert!(!seen.passes(&Interpreter::new(&plan.table)) && seen.passes(&Interpreter::new(&known.table)));
    }
    assert!(!plan.pods.contains_key(&"192.0.2.9".parse::<IpAddr>().expect("valid")));
}

#[test]
fn equal_pods_share_chains_and_equal_expressions_share_groups() {
    let web = json!([{"podSelector": {"matchLabels": {"app": "web"}}}]);
    let policy =
        json!({"podSelector": {}, "ingress": [{"from": web, "ports": [{"port": 80}]}], "egress": [{"to": web}]});
    let of = |pods: u8| {
        let mut world = World::default().namespace("shop", "").policy("shop/p", &policy);
        for pod in 1..=pods {
            let who = format!("shop/pod-{pod}");
            world = world.pod(&who, "", "app=web").attached(&who, &format!("192.0.2.{pod}"));
        }
        planned(&world)
    };
    let (one, many) = (of(1), of(9));
    assert_eq!(one.table.chains, many.table.chains, "whatever pods there are");
    assert_eq!(many.table.sets["peer4"].elements.len(), 9, "one group for both rules");
    assert_eq!(many.table.sets["ports"].elements.len(), 1);
    let isolation = &many.pods[&"192.0.2.1".parse::<IpAddr>().expect("valid")];
    let by = vec![PolicyName { tier: Tier::NetworkPolicy, name: name("shop/p") }];
    assert_eq!((&isolation.ingress, &isolation.egress), (&by, &by));
}

#[test]
fn showing_what_is_dropped_changes_no_verdict_and_no_chain_of_a_pod() {
    let world = closed();
    let (plan, mut shown) = (planned(&world), planned(&world));
    shown.show_drops(true);
    let differ: Vec<&str> = plan
        .table
        .chains
        .keys()
        .filter(|name| plan.table.chains[*name] != shown.table.chains[*name])
        .map(Name::as_str)
        .collect();
    let causes = ["drop-by-rule", "drop-no-connection", "drop-no-rule", "drop-not-any-more", "drop-not-applied"];
    assert_eq!(differ, causes);
    for conn in [tcp(WEB, DB), tcp(DB, WEB), tcp(WEB, WEB)] {
        let passes = |plan: &PolicyPlan| Seen::first(&world, conn).passes(&Interpreter::new(&plan.table));
        assert_eq!(passes(&plan), passes(&shown), "{conn:?}");
    }
    shown.show_drops(false);
    assert_eq!(plan, shown);
}

#[test]
fn rules_of_each_chain_are_those_that_its_origin_names() {
    let spec = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": {}}, {"ipBlock": {"cidr": "203.0.113.0/24"}}]}, {"ports": [{"port": 80}]}],
        "egress": [{"to": [{"podSelector": {}}], "ports": [{"port": 80}, {"port": "http"}]}]});
    let world = World::default()
        .namespace("shop", "")
        .pod("shop/web", "", "app=web")
        .attached("shop/web", "192.0.2.1 2001:db8::1");
    let peers = json!([{"namespaces": {}}]);
    let admin = json!({"tier": "Admin", "priority": 7, "subject": {"namespaces": {}},
        "ingress": [{"action": "Pass", "from": peers}, {"action": "Deny", "from": peers}],
        "egress": [{"action": "Accept", "to": peers}]});
    let plan = planned(&world.policy("shop/p", &spec).cluster_policy("first", &admin));
    assert_eq!(plan.chains.len(), 8, "both directions of both families of two tiers");
    let mut counted = BTreeSet::new();
    for (name, origin) in &plan.chains {
        let (rules, direction) = (plan.table.chains[name].rules(), origin.direction);
        assert_eq!(rules.len(), origin.rules.len(), "{name}");
        for (rule, counts) in rules.iter().zip(&origin.rules) {
            match counts {
                Counts::Nothing => {
                    assert!(["a pod to itself, through a Service", "the next tier"].contains(&&*rule.why));
                }
                Counts::NoRule(_) => assert_eq!(rule.why, format!("NetworkPolicy: no {direction} rule of shop/p")),
                Counts::Rule { policy, rule: index, action } => {
                    let why = match policy.tier {
                        Tier::NetworkPolicy => format!("NetworkPolicy shop/p {direction} rule {index}"),
                        tier => format!("{tier} {action}: ClusterNetworkPolicy first {direction} rule {index}"),
                    };
                    assert_eq!(rule.why, why);
                    counted.insert(why);
                }
            }
        }
    }
    assert_eq!(counted.len(), 6);
}

#[test]
fn pods_with_one_policy_share_its_chain_whatever_comes_before_it() {
    let peers = json!([{"namespaces": {}}]);
    let admin = json!({"tier": "Admin", "priority": 7,
        "subject": {"pods": {"podSelector": {"matchLabels": {"app": "web"}}}},
        "ingress": [{"action": "Deny", "from": peers}]});
    let world = World::default()
        .namespace("shop", "")
        .pod("shop/web", "", "app=web")
        .pod("shop/db", "", "app=db")
        .attached("shop/web", WEB)
        .attached("shop/db", DB)
        .policy("shop/p", &json!({"podSelector": {}}));
    let (without, with) = (planned(&world), planned(&world.clone().cluster_policy("first", &admin)));
    let chain = without.chains.keys().next().expect("one for both");
    assert_eq!((without.chains.len(), with.chains.len()), (1, 2));
    assert_eq!(with.table.chains[chain], without.table.chains[chain]);
}
