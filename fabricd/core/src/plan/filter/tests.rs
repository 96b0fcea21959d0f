//! What the filter holds, as text, and what is written when something changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::senders::{follow, has_notrack, may_send};
use super::{FilterInputs, FilterOptions, Member, Pod, ruleset};
use crate::diff::{Op, Plan, Verb, diff};
use crate::model::{IfName, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::state::nft::{FoundRuleset, FoundSet, FoundTable, Ruleset, TableKey};

struct Node {
    bridges: BTreeSet<IfName>,
    network: NetworkConfig,
    own: PerFamily<Subnet>,
    members: BTreeSet<Member>,
    ports: BTreeSet<IfName>,
    pods: BTreeMap<IfName, Pod>,
    tracked: bool,
    options: FilterOptions,
}

fn v<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
}

impl Node {
    fn v4() -> Self {
        let config = r#"{"Network":"10.64.0.0/12","Backend":{"Type":"vxlan","VNI":7}}"#;
        Self::new(config, PerFamily { v4: Some(v("10.64.1.0/24")), v6: None })
    }

    fn dual() -> Self {
        let config = r#"{"EnableIPv6":true,"Network":"10.64.0.0/12","IPv6Network":"2001:db8::/48",
                         "Backend":{"Type":"vxlan","VNI":7}}"#;
        Self::new(config, PerFamily { v4: Some(v("10.64.1.0/24")), v6: Some(v("2001:db8:0:1::/64")) })
    }

    fn new(config: &str, own: PerFamily<Subnet>) -> Self {
        Self {
            network: NetworkConfig::decode(config.as_bytes()).expect("valid"),
            own,
            bridges: [v("cni0")].into(),
            members: BTreeSet::new(),
            ports: BTreeSet::new(),
            pods: BTreeMap::new(),
            tracked: false,
            options: FilterOptions {
                check_senders: false,
                notrack: false,
                check_pods: false,
                ..FilterOptions::default()
            },
        }
    }

    fn with_peer(mut self, underlay: &str, subnet: &str) -> Self {
        self.members.insert(Member { underlay: v(underlay), subnet: v(subnet) });
        self
    }

    fn rules(&self) -> Ruleset {
        ruleset(&FilterInputs {
            network: &self.network,
            own: &self.own,
            members: &self.members,
            bridges: &self.bridges,
            ports: &self.ports,
            pods: &self.pods,
            pod_subnets: &self.own.values().copied().collect(),
            tracked: self.tracked,
            options: &self.options,
        })
    }

    fn inet(&self) -> String {
        self.rules()[&TableKey::Fabric].to_string()
    }
}

#[test]
fn senders_are_judged_by_underlay_address_and_inner_source_together() {
    let mut node = Node::v4().with_peer("192.0.2.2", "10.64.2.0/24");
    node.options.check_senders = true;
    node.options.senders = vec![v("198.51.100.7/32")];
    assert_eq!(
        node.inet(),
        r#"set members4 { type ipv4_addr . ipv4_addr; elements = { 192.0.2.2 . 10.64.2.0, 192.0.2.2 . 192.0.2.2 } }
set prefixes4 { type ipv4_addr . ipv4_addr; flags interval; }
chain input {
  type filter hook input priority 0; policy accept;
  meta nfproto ipv4 meta l4proto udp th dport 8472 @th,96,24 7 @th,224,16 0x0800 ip saddr . @th,336,32/24 @members4 accept comment "a peer, from its own subnet"
  meta nfproto ipv4 meta l4proto udp th dport 8472 @th,96,24 7 jump senders comment "encapsulated"
}
chain senders {
  meta nfproto ipv4 @th,224,16 0x0800 ip saddr . @th,336,32 @members4 accept comment "a peer's node"
  meta nfproto ipv4 @th,224,16 0x0800 ip saddr . @th,336,32 @prefixes4 accept comment "a peer, from a subnet of another length"
  meta nfproto ipv4 @th,224,16 0x0800 ip saddr 198.51.100.7/32 @th,336,32 10.64.0.0/12 accept comment "allowed by --allow-sender"
  meta nfproto ipv4 @th,224,16 0x0800 ip saddr . ip saddr @members4 counter drop comment "a peer, but its source is not in the peer's subnet"
  meta nfproto ipv4 @th,224,16 0x0800 ip saddr . ip saddr @prefixes4 counter drop comment "a peer, but its source is not in the peer's subnet"
  meta nfproto ipv4 ip saddr . ip saddr @members4 counter drop comment "a peer, but inside is something else"
  meta nfproto ipv4 ip saddr . ip saddr @prefixes4 counter drop comment "a peer, but inside is something else"
  counter drop comment "from no peer"
}
"#
    );
}

#[test]
fn what_can_not_be_cut_to_our_length_is_kept_as_ranges() {
    let mut node = Node::v4().with_peer("192.0.2.0", "10.64.2.0/24").with_peer("192.0.2.3", "10.64.8.0/22");
    node.options.check_senders = true;
    let text = node.inet();
    for line in [
        "members4 { type ipv4_addr . ipv4_addr; elements = { 192.0.2.0 . 10.64.2.0, 192.0.2.3 . 192.0.2.3 } }",
        "prefixes4 { type ipv4_addr . ipv4_addr; flags interval; elements = { 192.0.2.0 . 192.0.2.0, 192.0.2.3 . 10.64.8.0/22 } }",
    ] {
        assert!(text.contains(line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn ipv6_senders_may_be_link_local_but_not_in_fragments() {
    let mut node = Node::dual().with_peer("2001:db8:ff::2", "2001:db8:0:2::/64");
    node.options.check_senders = true;
    let text = node.inet();
    for line in [
        "elements = { 2001:db8:ff::2 . 2001:db8:0:2::, 2001:db8:ff::2 . 2001:db8:ff::2 } }",
        "@th,224,16 0x86dd ip6 saddr . ip6 saddr @members6 @th,304,128 fe80::/10 accept",
        "  meta nfproto ipv6 exthdr frag exists meta l4proto udp th dport 8472 counter drop comment \
         \"fragment of an encapsulated packet\"\n  meta nfproto ipv6 meta l4proto udp th dport 8472 @th,96,24 7 \
         @th,224,16 0x86dd ip6 saddr . @th,304,128/64 @members6 accept",
        "@th,224,16 0x86dd ip6 saddr . @th,304,128 @members6 accept",
    ] {
        assert!(text.contains(line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn what_leaves_the_network_is_masqueraded_and_nothing_else() {
    let mut node = Node::v4().with_peer("192.0.2.2", "10.64.2.0/24");
    node.options.masquerade = true;
    node.options.no_masquerade_to = vec![v("203.0.113.0/24")];
    node.options.no_masquerade_to_nodes = true;
    assert_eq!(
        node.inet(),
        r#"set members4 { type ipv4_addr . ipv4_addr; elements = { 192.0.2.2 . 10.64.2.0, 192.0.2.2 . 192.0.2.2 } }
set prefixes4 { type ipv4_addr . ipv4_addr; flags interval; }
chain postrouting {
  type nat hook postrouting priority 99; policy accept;
  meta mark & 0x4000 == 0x4000 return comment "others translate it"
  meta nfproto ipv4 ip daddr 10.64.1.0/24 return comment "to a pod of this node"
  meta nfproto ipv4 ip saddr 10.64.0.0/12 ip daddr 10.64.0.0/12 return comment "within the network"
  meta nfproto ipv4 ip saddr 10.64.0.0/12 ip daddr 224.0.0.0/4 return comment "multicast"
  meta nfproto ipv4 ip saddr 10.64.0.0/12 ip daddr 203.0.113.0/24 return comment "excepted by --no-masquerade-to"
  meta nfproto ipv4 ip saddr 10.64.0.0/12 ip daddr . ip daddr @members4 return comment "to a node, excepted by --no-masquerade-to"
  meta nfproto ipv4 ip saddr 10.64.0.0/12 ip daddr . ip daddr @prefixes4 return comment "to a node, excepted by --no-masquerade-to"
  meta nfproto ipv4 ip saddr 10.64.0.0/12 masquerade fully-random comment "out of the network"
  meta nfproto ipv4 ip daddr 10.64.0.0/12 masquerade fully-random comment "into the network"
}
"#
    );
    let table = |node: &Node| found(&node.rules()).remove(&TableKey::Fabric).expect("there");
    let (peer, stranger) = (v("192.0.2.2"), v("192.0.2.3"));
    assert_eq!(may_send(&table(&node), stranger, v("10.64.2.0/24")), None, "the sets are there, and nobody is judged");
    node.options.check_senders = true;
    let may = [peer, stranger].map(|node_ip| may_send(&table(&node), node_ip, v("10.64.2.0/24")));
    assert_eq!(may, [Some(true), Some(false)]);
}

#[test]
fn pods_of_every_bridge_are_judged() {
    let mut node = Node::v4();
    node.options.check_pods = true;
    node.bridges = [v("br-pods"), v("cni0")].into();
    let text = node.inet();
    for bridge in ["br-pods", "cni0"] {
        let rule = format!("iifname \"{bridge}\" jump pods");
        assert_eq!(text.matches(&rule).count(), 2, "on input and on forward:\n{text}");
    }
}

#[test]
fn pods_send_from_their_subnet_and_are_neither_routers_nor_nodes() {
    let mut node = Node::dual();
    node.options.check_pods = true;
    node.ports = [v("veth1"), v("veth2")].into();
    let ips = [v("10.64.1.7"), v("2001:db8:0:1::7")].into();
    let pod = Pod { mac: v("02:00:00:00:00:07"), ips };
    node.pods = [(v("veth1"), pod.clone()), (v("gone"), pod)].into();
    let text = node.rules().iter().map(|(key, table)| format!("table {key}\n{table}")).collect::<String>();
    assert_eq!(
        text,
        r#"table inet fabric
chain forward {
  type filter hook forward priority 0; policy accept;
  iifname "cni0" jump pods comment "from a pod"
}
chain input {
  type filter hook input priority 0; policy accept;
  iifname "cni0" jump pods comment "from a pod"
}
chain pods {
  meta l4proto udp th dport 8472 counter drop comment "a pod does not speak VXLAN"
  meta nfproto ipv4 ip saddr 10.64.1.0/24 accept comment "its own address"
  meta nfproto ipv6 meta l4proto 58 @th,0,8 134 counter drop comment "a pod is no router"
  meta nfproto ipv6 meta l4proto 58 @th,0,8 137 counter drop comment "a pod is no router"
  meta nfproto ipv6 ip6 saddr 2001:db8:0:1::/64 accept comment "its own address"
  meta nfproto ipv6 ip6 saddr fe80::/10 accept comment "neighbour discovery"
  meta nfproto ipv6 ip6 saddr ::/128 meta l4proto 58 accept comment "neighbour discovery"
  counter drop comment "a pod's source is not in this node's subnet"
}
table bridge fabric
set known { type ifname; elements = { "veth1" } }
set pods4 { type ifname . ether_addr . ipv4_addr; elements = { "veth1" . 02:00:00:00:00:07 . 10.64.1.7 } }
set pods6 { type ifname . ether_addr . ipv6_addr; elements = { "veth1" . 02:00:00:00:00:07 . 2001:db8:0:1::7 } }
set ports { type ifname; elements = { "veth1", "veth2" } }
chain advertised {
  iifname . ether saddr . @th,64,128 @pods6 return comment "its own address"
  @th,64,128 fe80::/10 return comment "no pod's address"
  iifname @known counter drop comment "a pod claims an address that is not its own"
  @th,64,128 != 2001:db8:0:1::/64 counter drop comment "a pod's source is not in this node's subnet"
}
chain forward {
  type filter hook forward priority 0; policy accept;
  ether type 0x8100 iifname @ports counter drop comment "pods send each other no VLAN tags"
  ether type 0x8100 oifname @ports counter drop comment "pods send each other no VLAN tags"
  ether type 0x88a8 iifname @ports counter drop comment "pods send each other no VLAN tags"
  ether type 0x88a8 oifname @ports counter drop comment "pods send each other no VLAN tags"
}
chain pods {
  meta protocol 0x0800 meta l4proto 1 @th,0,8 5 counter drop comment "a pod is no router"
  meta protocol 0x0800 meta l4proto 1 @th,0,8 9 counter drop comment "a pod is no router"
  meta protocol 0x86dd meta l4proto 58 @th,0,8 134 counter drop comment "a pod is no router"
  meta protocol 0x86dd meta l4proto 58 @th,0,8 137 counter drop comment "a pod is no router"
  meta protocol 0x86dd meta l4proto 58 @th,0,8 136 jump advertised comment "it says where an address is"
  meta protocol 0x0800 iifname . ether saddr . ip saddr @pods4 return comment "its own address"
  meta protocol 0x0800 iifname @known counter drop comment "a pod claims an address that is not its own"
  meta protocol 0x0800 ip saddr != 10.64.1.0/24 counter drop comment "a pod's source is not in this node's subnet"
  meta protocol 0x0806 iifname . ether saddr . arp saddr ip @pods4 return comment "its own address"
  meta protocol 0x0806 arp saddr ip 0.0.0.0/32 return comment "no pod's address"
  meta protocol 0x0806 iifname @known counter drop comment "a pod claims an address that is not its own"
  meta protocol 0x0806 arp saddr ip != 10.64.1.0/24 counter drop comment "a pod's source is not in this node's subnet"
  meta protocol 0x86dd iifname . ether saddr . ip6 saddr @pods6 return comment "its own address"
  meta protocol 0x86dd ip6 saddr fe80::/10 return comment "no pod's address"
  meta protocol 0x86dd ip6 saddr ::/128 return comment "no pod's address"
  meta protocol 0x86dd iifname @known counter drop comment "a pod claims an address that is not its own"
  meta protocol 0x86dd ip6 saddr != 2001:db8:0:1::/64 counter drop comment "a pod's source is not in this node's subnet"
}
chain prerouting {
  type filter hook prerouting priority -300; policy accept;
  meta protocol 0x0800 meta l4proto != 1 iifname . ether saddr . ip saddr @pods4 accept comment "its own address"
  meta protocol 0x86dd meta l4proto != 58 iifname . ether saddr . ip6 saddr @pods6 accept comment "its own address"
  iifname @ports jump pods comment "from a pod"
}
"#
    );
}

#[test]
fn encapsulated_packets_are_untracked_where_connections_are_tracked_and_stay_so() {
    let rule = "meta l4proto udp th dport 8472 @th,96,24 7 notrack";
    for (tracked, masquerade) in [(false, false), (true, false), (false, true)] {
        let mut node = Node::v4();
        (node.tracked, node.options.notrack, node.options.masquerade) = (tracked, true, masquerade);
        let rules = node.rules();
        let text = rules.get(&TableKey::Fabric).map(ToString::to_string).unwrap_or_default();
        assert_eq!(text.matches(rule).count(), if tracked || masquerade { 2 } else { 0 }, "{text}");
        let there = found(&rules).get(&TableKey::Fabric).is_some_and(has_notrack);
        assert_eq!(there, tracked || masquerade);
    }
}

#[test]
fn nothing_wanted_is_no_table() {
    assert_eq!(Node::v4().rules(), Ruleset::new());
}

fn everything() -> Node {
    let mut node = Node::dual().with_peer("192.0.2.2", "10.64.2.0/24");
    node.options = FilterOptions { masquerade: true, no_masquerade_to_nodes: true, ..FilterOptions::default() };
    node
}

fn found(rules: &Ruleset) -> FoundRuleset {
    let mut found = FoundRuleset::new();
    write(&diff(rules, &FoundRuleset::new()), &mut found);
    found
}

fn write(plan: &Plan, found: &mut FoundRuleset) {
    for op in plan.ops() {
        let Op::Filter(op) = op else { panic!("{op} is none of the filter's") };
        op.apply_to(found);
    }
}

#[test]
fn what_is_as_wanted_is_left_alone() {
    let rules = everything().rules();
    assert!(diff(&rules, &found(&rules)).is_empty());
}

#[test]
fn peer_that_comes_or_goes_costs_its_own_elements_alone() {
    let (before, after) = (everything().rules(), everything().with_peer("192.0.2.3", "10.64.3.0/24").rules());
    let mut kernel = found(&before);
    let join = diff(&after, &kernel);
    assert_eq!(
        join.to_string(),
        "+ nft add element inet fabric members4 { 192.0.2.3 . 10.64.3.0, 192.0.2.3 . 192.0.2.3 }\n"
    );
    write(&join, &mut kernel);
    assert_eq!(kernel, found(&after));
    assert_eq!(diff(&before, &kernel).to_string(), join.to_string().replace("+ nft add", "- nft delete"));
}

#[test]
fn many_elements_are_one_step_that_counts_them_and_shows_the_first() {
    let mut after = everything();
    for n in 3..23 {
        after = after.with_peer(&format!("192.0.2.{n}"), &format!("10.64.{n}.0/24"));
    }
    let join = diff(&after.rules(), &found(&everything().rules()));
    let [step] = join.ops() else { panic!("{join}") };
    assert_eq!(step.counts(), [(Verb::Create, 40), (Verb::Replace, 0), (Verb::Delete, 0)]);
    let line = step.to_string();
    assert!(line.ends_with(". 10.64.6.0, 192.0.2.6 . 192.0.2.6 } (and 32 more)"), "{line}");
}

#[test]
fn while_leases_are_only_remembered_no_element_goes() {
    let (one, other) =
        (everything().with_peer("192.0.2.3", "10.64.3.0/24"), everything().with_peer("192.0.2.4", "10.64.4.0/24"));
    let mut kernel = found(&one.rules());
    let plan = diff(&other.rules(), &kernel).without_deletes();
    assert_eq!(
        plan.to_string(),
        "+ nft add element inet fabric members4 { 192.0.2.4 . 10.64.4.0, 192.0.2.4 . 192.0.2.4 }\n"
    );
    write(&plan, &mut kernel);
    assert_eq!(kernel, found(&one.with_peer("192.0.2.4", "10.64.4.0/24").rules()));
    assert!(diff(&everything().rules(), &kernel).without_deletes().is_empty());
}

#[test]
fn members_that_go_and_come_leave_what_all_together_would_make() {
    // Two nodes with two subnets each, one with a subnet of another length, one whose address could be a subnet's base.
    let all: Vec<Member> = [
        ("192.0.2.2", "10.64.2.0/24"),
        ("192.0.2.2", "10.64.3.0/24"),
        ("192.0.2.3", "10.64.4.0/24"),
        ("192.0.2.3", "10.64.8.0/22"),
        ("192.0.2.0", "10.64.5.0/24"),
        ("2001:db8:ff::2", "2001:db8:0:2::/64"),
    ]
    .map(|(underlay, subnet)| Member { underlay: v(underlay), subnet: v(subnet) })
    .into();
    let some = |bits: usize| all.iter().enumerate().filter(move |(n, _)| bits >> n & 1 == 1).map(|(_, member)| *member);
    let rules = |bits| Node { members: some(bits).collect(), ..everything() }.rules();
    let whole: Vec<Ruleset> = (0..1 << all.len()).map(rules).collect();
    for (before, after) in (0..whole.len()).flat_map(|before| (0..whole.len()).map(move |after| (before, after))) {
        let mut followed = whole[before].clone();
        let (gone, come): (Vec<_>, Vec<_>) = (some(before & !after).collect(), some(after & !before).collect());
        let remains = |underlay| some(after).any(|member| member.underlay == underlay);
        follow(&mut followed, &everything().own, &gone, &come, remains);
        assert!(followed == whole[after], "from {before:b} to {after:b}");
    }
}

#[test]
fn whatever_others_do_to_a_table_is_put_right_around_the_sets_that_serve() {
    let rules = everything().rules();
    type Spoil = fn(&mut FoundTable);
    const INPUT: &str = "~ nft replace chains of table inet fabric: input\n";
    fn input(table: &mut FoundTable) -> &mut Vec<String> {
        Arc::make_mut(table.chains.get_mut("input").expect("there"))
    }
    let spoiled: [(&str, Spoil, &str); 7] = [
        ("a rule less", |table| drop(input(table).pop()), INPUT),
        ("a rule more", |table| input(table).insert(1, "theirs".into()), INPUT),
        ("another rule", |table| input(table)[1].push('0'), INPUT),
        (
            "a chain more",
            |table| drop(table.chains.insert("theirs".into(), Arc::default())),
            "- nft delete of table inet fabric: chain theirs\n",
        ),
        (
            "a set more",
            |table| drop(table.sets.insert("theirs".into(), FoundSet::default())),
            "- nft delete of table inet fabric: set theirs\n",
        ),
        (
            "another set",
            |table| table.sets.get_mut("members4").expect("there").kind = None,
            "~ nft replace chains of table inet fabric: input, postrouting, senders, set members4\n",
        ),
        (
            "a disabled table",
            |table| table.disabled = true,
            "~ nft delete table inet fabric\n\
             + nft add set inet fabric members4 { type ipv4_addr . ipv4_addr; }\n\
             + nft add set inet fabric members6 { type ipv6_addr . ipv6_addr; }\n\
             + nft add set inet fabric prefixes4 { type ipv4_addr . ipv4_addr; flags interval; }\n\
             + nft add set inet fabric prefixes6 { type ipv6_addr . ipv6_addr; flags interval; }\n\
             ~ nft replace chains of table inet fabric: forward, input, output, pods, postrouting, prerouting, senders\n",
        ),
    ];
    for (what, spoil, repaired_by) in spoiled {
        let mut kernel = found(&rules);
        spoil(kernel.get_mut(&TableKey::Fabric).expect("there"));
        let repair = diff(&rules, &kernel);
        assert_eq!(repair.to_string(), repaired_by, "{what}");
        write(&repair, &mut kernel);
        assert_eq!(kernel, found(&rules), "{what}");
    }
}

#[test]
fn table_that_is_not_wanted_any_more_goes() {
    let mut kernel = found(&everything().rules());
    let cleanup = diff(&Ruleset::new(), &kernel);
    assert_eq!(cleanup.to_string(), "- nft delete table inet fabric\n- nft delete table bridge fabric\n");
    write(&cleanup, &mut kernel);
    assert_eq!(kernel, FoundRuleset::new());
}

#[test]
fn comments_fit_into_what_nft_allows() {
    for table in everything().rules().values() {
        for rule in table.chains.values().flat_map(|chain| chain.rules()) {
            assert!(rule.comment().len() < 128, "{}", rule.comment());
        }
    }
}
