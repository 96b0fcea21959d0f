//! Chains as people load them, put together by hand.

use std::net::IpAddr;

use super::bits::Unknown;
use super::evaluate::{Verdict, evaluate};
use super::fields::state;
use super::packet::Flow;
use super::traffic::{BlockingChain, Node};
use super::*;
use crate::model::{IfName, Subnet, Vni};

fn v<T: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> T {
    text.parse().expect("valid")
}

fn interface(name: &str, kind: Option<&'static str>) -> Interface {
    Interface { name: v::<IfName>(name), index: None, kind }
}

fn node() -> Node {
    Node {
        network: v("10.244.0.0/16"),
        own: v("10.244.30.0/24"),
        bridge: interface("cni0", Some("bridge")),
        tunnel: interface("fabric.1", Some("vxlan")),
        underlay: interface("eth0", None),
        local: v("192.0.2.11"),
        port: 8472,
        vni: Vni::DEFAULT,
        untracked: false,
        direct: false,
    }
}

fn rule(steps: impl IntoIterator<Item = Vec<Step>>, decision: Decision) -> Rule {
    let steps = steps.into_iter().flatten().chain([Step::Decide(decision)]).collect();
    Rule { handle: Some(7), comment: None, steps }
}

fn equals(field: Field, with: &[u8]) -> Vec<Step> {
    let len = u8::try_from(with.len()).expect("short");
    vec![Step::Load { field, len, to: 0 }, Step::Compare { register: 0, how: Comparison::Equal, with: with.to_vec() }]
}

fn from_net(net: &str) -> Vec<Step> {
    address(12, net)
}

fn to_net(net: &str) -> Vec<Step> {
    address(16, net)
}

fn address(offset: u32, net: &str) -> Vec<Step> {
    let net: Subnet = v(net);
    let IpAddr::V4(base) = net.base() else { panic!("IPv4") };
    let mask = u32::MAX.checked_shl(u32::from(32 - net.prefix_len())).unwrap_or(0).to_be_bytes().to_vec();
    vec![
        Step::Load { field: Field::Network { offset }, len: 4, to: 0 },
        Step::Bitwise { from: 0, to: 0, mask, xor: vec![0; 4] },
        Step::Compare { register: 0, how: Comparison::Equal, with: base.octets().to_vec() },
    ]
}

fn ct_state(bits: u32) -> Vec<Step> {
    vec![
        Step::Load { field: Field::ConnectionState, len: 4, to: 0 },
        Step::Bitwise { from: 0, to: 0, mask: bits.to_ne_bytes().to_vec(), xor: vec![0; 4] },
        Step::Compare { register: 0, how: Comparison::Different, with: vec![0; 4] },
    ]
}

fn udp_to(port: u16) -> Vec<Step> {
    [equals(Field::Protocol, &[17]), equals(Field::Transport { offset: 2 }, &port.to_be_bytes())].concat()
}

fn chain(hook: Hook, drops: bool, rules: Vec<Rule>) -> Chain {
    Chain { base: Some(Base { hook, priority: 0, drops }), rules }
}

fn firewall<const N: usize>(chains: [(&str, Chain); N]) -> Firewall {
    let chains = chains.into_iter().map(|(name, chain)| (name.to_owned(), chain)).collect();
    let table = Table { kind: TableKind::Inet, name: "fw".to_owned(), chains, sets: BTreeMap::new() };
    Firewall { tables: vec![table], unread: BTreeSet::new() }
}

fn drop() -> Decision {
    Decision::Drop("drop")
}

fn said(obstacles: &[BlockingChain]) -> Vec<String> {
    obstacles.iter().map(ToString::to_string).collect()
}

fn new_pod_packet() -> Packet {
    let (source, target) = (v("10.244.30.2/32"), v("10.244.60.2/32"));
    node().forwarded(source, target, packet::Content::Icmp { reply: false }, Connection::New)
}

#[test]
fn reject_at_the_end_of_a_chain_whose_policy_is_accept_is_found_with_chain_and_rule() {
    let rules = vec![
        rule([ct_state(state::ESTABLISHED | state::RELATED)], Decision::Accept),
        rule([ct_state(state::INVALID)], drop()),
        rule([], Decision::Drop("reject with icmpx admin-prohibited")),
    ];
    let mut firewall = firewall([("filter_FORWARD", chain(Hook::Forward, false, rules))]);
    firewall.tables[0].name = "firewalld".to_owned();
    let obstacles = node().obstacles(&firewall, Vec::new);
    assert_eq!(
        said(&obstacles),
        ["inet firewalld filter_FORWARD rule 3 (handle 7): reject with icmpx admin-prohibited drops IPv4 packets \
             between pods of this node and of others"]
    );
    assert_eq!(
        obstacles[0].remedy,
        ["firewall-cmd --permanent --zone=trusted --add-source=10.244.0.0/16", "firewall-cmd --reload"]
    );
}

#[test]
fn policy_drop_is_cleared_by_the_rules_of_its_remedy() {
    let closed = firewall([("through", chain(Hook::Forward, true, vec![]))]);
    let obstacles = node().obstacles(&closed, Vec::new);
    assert_eq!(
        obstacles[0].remedy,
        [
            "nft insert rule inet fw through ip saddr 10.244.0.0/16 accept",
            "nft insert rule inet fw through ip daddr 10.244.0.0/16 accept"
        ]
    );
    let accepts = [from_net("10.244.0.0/16"), to_net("10.244.0.0/16")].map(|net| rule([net], Decision::Accept));
    let open = firewall([("through", chain(Hook::Forward, true, accepts.to_vec()))]);
    assert_eq!(node().obstacles(&open, Vec::new), []);
}

#[test]
fn jumps_gotos_and_returns_are_followed_as_the_kernel_follows_them() {
    let jump = |name: &str| Decision::Jump(name.to_owned());
    let goto = |name: &str| Decision::Goto(name.to_owned());
    let called = |rules| Chain { base: None, rules };
    let evaluated = |first: Decision, called_rules, drops| {
        let rules = vec![rule([], first), rule([], drop())];
        let chains = [("base", chain(Hook::Forward, drops, rules)), ("called", called(called_rules))];
        evaluate(&firewall(chains), &new_pod_packet()) == Verdict::Passes
    };
    assert!(!evaluated(jump("called"), vec![], false), "it comes back, and is dropped");
    assert!(evaluated(jump("called"), vec![rule([], Decision::Accept)], true), "an accept ends the base chain");
    assert!(evaluated(goto("called"), vec![], false), "it does not come back: the policy decides");
    assert!(!evaluated(goto("called"), vec![], true));
    assert!(!evaluated(jump("called"), vec![rule([], Decision::Return), rule([], Decision::Accept)], false));
    assert!(evaluated(Decision::Return, vec![], false), "a return from a base chain is its policy");
}

#[test]
fn accept_ends_one_base_chain_and_a_drop_ends_the_packet() {
    let accept = || vec![rule([], Decision::Accept)];
    let two = [("first", chain(Hook::Forward, false, accept())), ("second", chain(Hook::Forward, true, vec![]))];
    let Verdict::Dropped(by) = evaluate(&firewall(two), &new_pod_packet()) else { panic!("the second drops") };
    assert_eq!(by[0].to_string(), "inet fw second policy drop");
    let raw = [("raw", chain(Hook::Prerouting, false, vec![rule([], drop())]))];
    assert!(matches!(evaluate(&firewall(raw), &new_pod_packet()), Verdict::Dropped(_)));
    let input = [("input", chain(Hook::Input, true, vec![]))];
    assert_eq!(evaluate(&firewall(input), &new_pod_packet()), Verdict::Passes, "it is not for this host");
}

#[test]
fn rules_see_the_interfaces_that_their_hook_has() {
    let padded = |name: &str| {
        let mut bytes = [0; 16];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        bytes
    };
    let by_nft = |field: Field, name| equals(field, &padded(name));
    let by_iptables = |end, name| {
        let test = Test::Interface { end, name: padded(name).to_vec(), mask: vec![0xff; 16] };
        vec![Step::Test { test, inverted: false }]
    };
    let sent = node().sent(None);
    let received = node().received(None);
    for (packet, hook, [input, output]) in [
        (&new_pod_packet(), Hook::Prerouting, ["cni0", ""]),
        (&new_pod_packet(), Hook::Forward, ["cni0", "fabric.1"]),
        (&new_pod_packet(), Hook::Postrouting, ["cni0", "fabric.1"]),
        (&received, Hook::Prerouting, ["eth0", ""]),
        (&received, Hook::Input, ["eth0", ""]),
        (&sent, Hook::Output, ["", "eth0"]),
        (&sent, Hook::Postrouting, ["fabric.1", "eth0"]),
    ] {
        for name in ["cni0", "fabric.1", "eth0", ""] {
            let dropped = |condition: Vec<Step>| {
                let rules = vec![rule([condition], drop())];
                matches!(evaluate(&firewall([("base", chain(hook, false, rules))]), packet), Verdict::Dropped(_))
            };
            let found = [
                dropped(by_nft(Field::InName, name)),
                dropped(by_iptables(End::Source, name)),
                dropped(by_nft(Field::OutName, name)),
                dropped(by_iptables(End::Target, name)),
            ];
            let (of_input, of_output) = (name == input, name == output);
            assert_eq!(found, [of_input, of_input, of_output, of_output], "{hook:?} {name:?} {packet:?}");
        }
    }
}

#[test]
fn mark_that_an_earlier_chain_has_set_is_seen_by_a_later_one() {
    let mark = |number: u32| number.to_ne_bytes().to_vec();
    let set = vec![Step::Constant { data: mark(9), to: 0 }, Step::SetMark(0)];
    let marks = Rule { steps: [from_net("10.244.30.0/24"), set].concat(), ..Rule::default() };
    let drops = || vec![rule([equals(Field::Mark, &mark(9))], drop())];
    let both =
        [("marks", chain(Hook::Prerouting, false, vec![marks])), ("drops", chain(Hook::Forward, false, drops()))];
    assert!(matches!(evaluate(&firewall(both), &new_pod_packet()), Verdict::Dropped(_)));
    let alone = [("drops", chain(Hook::Forward, false, drops()))];
    assert_eq!(evaluate(&firewall(alone), &new_pod_packet()), Verdict::Passes);
}

#[test]
fn mark_of_a_chain_of_the_same_priority_is_seen_or_not() {
    let mark = |number: u32| number.to_ne_bytes().to_vec();
    let marks =
        || vec![Rule { steps: vec![Step::Constant { data: mark(3), to: 0 }, Step::SetMark(0)], ..Rule::default() }];
    let of = |number, hook| chain(hook, false, vec![rule([equals(Field::Mark, &mark(number))], drop())]);
    let evaluated = |other: Chain| {
        let chains = [("one", chain(Hook::Forward, false, marks())), ("other", other)];
        evaluate(&firewall(chains), &new_pod_packet())
    };
    for number in [0, 3] {
        assert!(matches!(evaluated(of(number, Hook::Forward)), Verdict::Unknown(_)), "mark {number}");
    }
    assert!(matches!(evaluated(of(3, Hook::Postrouting)), Verdict::Dropped(_)), "a later hook sees it");
    assert_eq!(evaluated(of(0, Hook::Postrouting)), Verdict::Passes);
    assert_eq!(evaluated(chain(Hook::Forward, false, vec![])), Verdict::Passes);
    let three = [
        ("one", chain(Hook::Forward, false, marks())),
        ("two", chain(Hook::Forward, false, vec![])),
        ("behind", of(3, Hook::Postrouting)),
    ];
    assert!(
        matches!(evaluate(&firewall(three), &new_pod_packet()), Verdict::Dropped(_)),
        "the other leaves it as it is"
    );
}

#[test]
fn type_of_the_input_interface_is_open_on_the_way_out() {
    let evaluated = |hook| {
        let rules = vec![rule([equals(Field::InType, &1_u16.to_ne_bytes())], drop())];
        evaluate(&firewall([("base", chain(hook, false, rules))]), &new_pod_packet())
    };
    assert!(matches!(evaluated(Hook::Forward), Verdict::Dropped(_)));
    assert!(matches!(evaluated(Hook::Postrouting), Verdict::Unknown(_)));
}

#[test]
fn condition_that_cannot_be_read_is_told_as_neither_fine_nor_failed() {
    let limit = || vec![Step::Opaque("limit".to_owned())];
    let of = |rules, drops| evaluate(&firewall([("base", chain(Hook::Forward, drops, rules))]), &new_pod_packet());
    let because = |verdict| match verdict {
        Verdict::Unknown(doubts) => doubts.into_iter().map(|doubt| doubt.because).collect::<Vec<_>>(),
        known => panic!("{known:?}"),
    };
    let condition = || Unknown::Condition("limit".to_owned());
    assert_eq!(because(of(vec![rule([limit()], drop())], false)), [condition()]);
    assert_eq!(because(of(vec![rule([limit()], Decision::Accept)], true)), [condition()]);
    assert_eq!(because(of(vec![rule([limit()], Decision::Return), rule([], drop())], false)), [condition()]);
    assert!(matches!(of(vec![rule([limit()], drop()), rule([], drop())], false), Verdict::Dropped(_)));
    assert_eq!(of(vec![rule([limit()], Decision::Accept)], false), Verdict::Passes, "accepted either way");
    let never = [limit(), equals(Field::Protocol, &[132])];
    assert_eq!(of(vec![rule(never, drop())], false), Verdict::Passes, "it is no SCTP");
}

#[test]
fn rule_for_one_pod_is_told_as_depending_on_the_address_and_judged_for_that_pod() {
    let rules = vec![rule([to_net("10.244.60.2/32")], drop())];
    let firewall = firewall([("base", chain(Hook::Forward, false, rules))]);
    let obstacles = node().obstacles(&firewall, Vec::new);
    assert_eq!(obstacles.len(), 1, "{obstacles:?}");
    assert_eq!((obstacles[0].because.clone(), obstacles[0].flow), (Some(Unknown::Address), Flow::Pods));
    assert!(matches!(evaluate(&firewall, &new_pod_packet()), Verdict::Dropped(_)));
}

#[test]
fn port_that_is_open_for_some_peers_is_told_with_those_that_are_left_out() {
    let rules = vec![rule([from_net("192.0.2.12/32"), udp_to(8472)], Decision::Accept)];
    let firewall = firewall([("input", chain(Hook::Input, true, rules))]);
    let peers: Vec<IpAddr> = vec![v("192.0.2.12"), v("192.0.2.13"), v("192.0.2.14")];
    assert_eq!(
        said(&node().obstacles(&firewall, || peers.to_vec())),
        ["inet fw input policy drop drops IPv4 VXLAN packets that arrive at UDP port 8472, those of 192.0.2.13 and 1 \
          more peers"]
    );
    assert_eq!(node().obstacles(&firewall, || peers[..1].to_vec()), []);
}

#[test]
fn firewall_that_asks_for_new_connections_needs_them_tracked() {
    let opened = |states| {
        let rules = vec![
            rule([ct_state(state::ESTABLISHED | state::RELATED)], Decision::Accept),
            rule([udp_to(8472), ct_state(states)], Decision::Accept),
            rule([], Decision::Drop("reject")),
        ];
        firewall([("input", chain(Hook::Input, false, rules))])
    };
    let untracked = Node { untracked: true, ..node() };
    let strict = opened(state::NEW);
    assert_eq!(node().obstacles(&strict, Vec::new), [], "tracked, it is a new connection");
    assert_eq!(untracked.obstacles(&strict, Vec::new).len(), 1, "untracked, it is none");
    assert!(node().needs_tracking(&strict).is_some());
    assert_eq!(untracked.obstacles(&opened(state::NEW | state::UNTRACKED), Vec::new), []);
}

#[test]
fn kube_proxys_chains_are_no_reason_to_track() {
    // KUBE-PROXY-FIREWALL and its like: new connections go to a chain that is about other addresses.
    let called = Chain { base: None, rules: vec![rule([to_net("203.0.113.7/32")], drop())] };
    let invalid = Chain { base: None, rules: vec![rule([ct_state(state::INVALID)], drop())] };
    // No connection to the host's own loopback addresses from outside, but for those that were let in.
    let loopback = Chain { base: None, rules: vec![rule([to_net("127.0.0.0/8"), ct_state(state::NEW)], drop())] };
    let jump = |chain: &str, conditions: Vec<Step>| rule([conditions], Decision::Jump(chain.to_owned()));
    let firewall = firewall([
        (
            "INPUT",
            chain(
                Hook::Input,
                false,
                vec![jump("KUBE-PROXY-FIREWALL", ct_state(state::NEW)), jump("KUBE-FIREWALL", vec![])],
            ),
        ),
        ("OUTPUT", chain(Hook::Output, false, vec![jump("KUBE-FIREWALL", vec![])])),
        ("FORWARD", chain(Hook::Forward, false, vec![jump("KUBE-FORWARD", vec![])])),
        ("KUBE-PROXY-FIREWALL", called),
        ("KUBE-FORWARD", invalid),
        ("KUBE-FIREWALL", loopback),
    ]);
    assert_eq!(node().needs_tracking(&firewall), None);
    assert_eq!(node().obstacles(&firewall, Vec::new), []);
}

#[test]
fn sets_ranges_and_verdict_maps_are_looked_into() {
    let element = |low: &str, high: &str, value| {
        let bytes = |ip: &str| v::<std::net::Ipv4Addr>(ip).octets().to_vec();
        Element { low: bytes(low), high: bytes(high), value }
    };
    let decision = |decision| Some(Value::Decision(decision));
    let with = |set: Set, to, inverted, decision| {
        let look = Step::Lookup { register: 0, set: "set".to_owned(), inverted, to };
        let steps = vec![Step::Load { field: Field::Network { offset: 16 }, len: 4, to: 0 }, look];
        let mut firewall = firewall([("base", chain(Hook::Forward, false, vec![rule([steps], decision)]))]);
        firewall.tables[0].sets.insert("set".to_owned(), set);
        evaluate(&firewall, &new_pod_packet())
    };
    let ranges = || Set {
        elements: vec![
            element("10.0.0.0", "10.0.0.9", None),
            element("10.244.60.0", "10.244.60.255", None),
            element("10.255.0.0", "10.255.0.0", None),
        ],
        ..Set::default()
    };
    assert!(matches!(with(ranges(), Destination::Nowhere, false, drop()), Verdict::Dropped(_)));
    assert_eq!(with(ranges(), Destination::Nowhere, true, drop()), Verdict::Passes);
    let map = Set {
        elements: vec![element("10.244.60.2", "10.244.60.2", decision(drop()))],
        catch_all: Some(Element { value: decision(Decision::Accept), ..Element::default() }),
        ..Set::default()
    };
    let verdict = |set| with(set, Destination::Verdict, false, Decision::Continue);
    assert!(matches!(verdict(map.clone()), Verdict::Dropped(_)));
    assert_eq!(verdict(Set { elements: vec![], ..map }), Verdict::Passes);
    assert!(matches!(verdict(Set { dynamic: true, ..Set::default() }), Verdict::Unknown(_)));
}

#[test]
fn remedies_are_in_the_words_of_the_firewalls_owner() {
    let table = |kind, name: &str, base: &str, more: &[&str]| {
        let hook = if base.to_lowercase().contains("input") { Hook::Input } else { Hook::Forward };
        let mut chains = BTreeMap::from([(base.to_owned(), chain(hook, true, vec![]))]);
        chains.extend(more.iter().map(|chain| ((*chain).to_owned(), Chain::default())));
        Firewall {
            tables: vec![Table { kind, name: name.to_owned(), chains, sets: BTreeMap::new() }],
            ..Firewall::default()
        }
    };
    let remedy = |firewall: &Firewall| node().obstacles(firewall, Vec::new)[0].remedy.clone();
    assert_eq!(remedy(&table(TableKind::Ip, "filter", "INPUT", &["ufw-user-input"])), ["ufw allow 8472/udp"]);
    assert_eq!(
        remedy(&table(TableKind::Iptables, "filter", "FORWARD", &["ufw-user-forward"])),
        ["ufw route allow from 10.244.0.0/16", "ufw route allow to 10.244.0.0/16"]
    );
    assert_eq!(
        remedy(&table(TableKind::Ip, "filter", "INPUT", &[])),
        ["iptables-nft -I INPUT -p udp --dport 8472 -j ACCEPT"]
    );
    assert_eq!(
        remedy(&table(TableKind::Iptables, "mangle", "FORWARD", &[])),
        [
            "iptables-legacy -t mangle -I FORWARD -s 10.244.0.0/16 -j ACCEPT",
            "iptables-legacy -t mangle -I FORWARD -d 10.244.0.0/16 -j ACCEPT"
        ]
    );
    assert_eq!(
        remedy(&table(TableKind::Inet, "firewalld", "filter_INPUT", &[])),
        ["firewall-cmd --permanent --add-port=8472/udp", "firewall-cmd --reload"]
    );
    let mut docker = table(TableKind::Ip, "filter", "FORWARD", &["DOCKER-USER"]);
    let jump = rule([], Decision::Jump("DOCKER-USER".to_owned()));
    docker.tables[0].chains.get_mut("FORWARD").expect("made").rules.push(jump);
    assert_eq!(
        remedy(&docker),
        [
            "iptables-nft -I DOCKER-USER -s 10.244.0.0/16 -j ACCEPT",
            "iptables-nft -I DOCKER-USER -d 10.244.0.0/16 -j ACCEPT"
        ]
    );
}

#[test]
fn rules_are_shown_in_the_words_of_nft() {
    let shown = |rule: &Rule| rule.to_string();
    assert_eq!(shown(&rule([from_net("10.244.0.0/16")], drop())), "ip saddr 10.244.0.0/16 drop");
    assert_eq!(
        shown(&rule([ct_state(state::NEW | state::UNTRACKED), udp_to(8472)], Decision::Accept)),
        "ct state new,untracked meta l4proto udp th dport 8472 accept"
    );
    let name = equals(Field::InName, b"eth0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(shown(&rule([name], Decision::Jump("x".to_owned()))), "iifname \"eth0\" jump x");
    let test = |test| Step::Test { test, inverted: false };
    let matches = vec![
        test(Test::Address { end: End::Target, address: vec![10, 244, 0, 0], mask: vec![255, 255, 0, 0] }),
        test(Test::Protocol(17)),
        test(Test::Ports { end: End::Target, ranges: vec![(8472, 8472)] }),
        test(Test::State { states: state::NEW, translated: false }),
    ];
    assert_eq!(shown(&rule([matches], drop())), "-d 10.244.0.0/16 -p udp --dport 8472 --ctstate NEW drop");
}

fn bypassed(firewall: &Firewall) -> Vec<String> {
    node().bypassed(firewall, &[]).iter().map(ToString::to_string).collect()
}

#[test]
fn whatever_may_drop_some_packet_between_pods_is_told_though_most_pass() {
    let reaches_ssh = [equals(Field::Protocol, &[6]), equals(Field::Transport { offset: 2 }, &22_u16.to_be_bytes())];
    let one_pod = [to_net("10.244.30.7/32")];
    let invalid = [ct_state(state::INVALID)];
    for (rules, want) in [
        (rule(reaches_ssh, drop()), "tcp dport 22 drop"),
        (rule(one_pod, Decision::Drop("reject")), "ip daddr 10.244.30.7 reject"),
        (rule(invalid, drop()), "ct state invalid drop"),
    ] {
        let found = bypassed(&firewall([("forward", chain(Hook::Forward, false, vec![rules]))]));
        let [only] = found.as_slice() else { panic!("{want}: {found:?}") };
        assert!(only.starts_with("inet fw forward rule 1 (handle 7): ") && only.contains("may drop"), "{want}: {only}");
    }
    assert_eq!(node().obstacles(&firewall([("forward", chain(Hook::Forward, false, vec![]))]), Vec::new), []);
    let closed = bypassed(&firewall([("forward", chain(Hook::Forward, true, vec![]))]));
    assert_eq!(closed, ["inet fw forward policy drop may drop packets between pods"]);
}

#[test]
fn what_is_about_other_packets_is_not_told() {
    let not_pods = [
        rule([to_net("172.17.0.0/16")], drop()),
        rule([equals(Field::InName, b"docker0\0\0\0\0\0\0\0\0\0")], drop()),
        rule([equals(Field::Protocol, &[132])], drop()),
        rule([from_net("10.244.0.0/16")], Decision::Accept),
    ];
    assert_eq!(bypassed(&firewall([("forward", chain(Hook::Forward, true, not_pods.to_vec()))])), Vec::<String>::new());
    let input = chain(Hook::Input, true, vec![]);
    let found = firewall([("input", input)]);
    assert_eq!(bypassed(&found), Vec::<String>::new(), "pods' packets are not for the host");
    // But what carries them is.
    let obstacles = node().obstacles(&found, Vec::new);
    let of_tunnel = node().bypassed(&found, &obstacles);
    assert_eq!(of_tunnel.iter().map(|by| by.by.chain.as_str()).collect::<Vec<_>>(), ["input"]);
}

#[test]
fn packets_that_are_changed_are_told_and_those_that_are_counted_are_not() {
    let changes = |steps: Vec<Step>| {
        let rule = Rule { handle: Some(7), comment: None, steps };
        bypassed(&firewall([("mangle", chain(Hook::Forward, false, vec![rule]))]))
    };
    assert_eq!(changes(vec![]), Vec::<String>::new());
    let mark = changes(vec![Step::ChangeMark { clear: 0, xor: 1 }]);
    assert_eq!(mark, ["inet fw mangle rule 1 (handle 7): meta mark set may change packets between pods"]);
    let clamp =
        changes(vec![Step::Test { test: Test::Protocol(6), inverted: false }, Step::Change("TCPMSS".to_owned())]);
    assert_eq!(clamp.len(), 1, "{clamp:?}");
    assert_eq!(changes(vec![Step::Opaque("payload".to_owned())]).len(), 1, "it may be a write");
}

#[test]
fn kube_proxys_rules_are_no_judgement_and_kube_routers_are() {
    let forward = |name: &str, rules| {
        let jump = rule([], Decision::Jump(name.to_owned()));
        let mut found = firewall([("FORWARD", chain(Hook::Forward, false, vec![jump]))]);
        found.tables[0].chains.insert(name.to_owned(), Chain { base: None, rules });
        bypassed(&found)
    };
    assert_eq!(forward("KUBE-FORWARD", vec![rule([ct_state(state::INVALID)], drop())]), Vec::<String>::new());
    let policy = vec![rule([to_net("10.244.30.7/32")], Decision::Drop("reject"))];
    assert_eq!(forward("KUBE-POD-FW-ABC", policy).len(), 1);
}
