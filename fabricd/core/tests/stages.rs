//! One plan over all sections: what comes before what, and what waits for what.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fabric_core::diff::{Change, Gate, Key, Op, Plan, Stage, diff, nft, routing};
use fabric_core::model::{Family, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::docker_user::rules;
use fabric_core::plan::filter::{FilterInputs, FilterOptions, Member, ruleset};
use fabric_core::state::docker_user::{DockerUser, DockerUserRules};
use fabric_core::state::nft::{
    Chain, Datatype, Element, FoundRuleset, Name, Order, Part, Ruleset, SetKind, Table, TableKey, Verdict,
};
use fabric_core::state::{Found, Routing, State, VxlanLink};

fn v<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
}

fn link(port: u16) -> VxlanLink {
    VxlanLink {
        vni: 7_u32.try_into().expect("a VNI"),
        port,
        gbp: false,
        mac: v("02:42:c0:00:02:01"),
        local: v("192.0.2.1"),
        mtu: 1450,
        learning: false,
        up: true,
    }
}

/// A device, and a peer with its FDB entry.
fn routing(link: VxlanLink) -> Routing {
    let mut routing = Routing::new();
    routing.links.insert(v("fabric.7"), link);
    routing.fdb.insert((v("fabric.7"), v("02:42:c0:00:02:02")), v("192.0.2.2"));
    routing
}

fn filter(check_senders: bool) -> Ruleset {
    let config = br#"{"Network":"10.64.0.0/12","Backend":{"Type":"vxlan","VNI":7}}"#;
    let own: PerFamily<Subnet> = PerFamily { v4: Some(v("10.64.1.0/24")), v6: None };
    ruleset(&FilterInputs {
        network: &NetworkConfig::decode(config).expect("valid"),
        own: &own,
        members: &[Member { underlay: v("192.0.2.2"), subnet: v("10.64.2.0/24") }].into(),
        bridges: &[v("cni0")].into(),
        ports: &BTreeSet::new(),
        pods: &BTreeMap::new(),
        pod_subnets: &own.values().copied().collect(),
        tracked: false,
        options: &FilterOptions { check_senders, ..FilterOptions::default() },
    })
}

/// What is found of these tables once they are there.
fn made(filter: &Ruleset) -> FoundRuleset {
    filter.iter().map(|(family, table)| (*family, table.found())).collect()
}

/// Takes the plan; gives the lines of what was turned away when everything for which `fails` says so has failed.
fn turned_away(plan: &Plan, fails: impl Fn(&Op) -> bool) -> Vec<(String, Key)> {
    let mut gate = Gate::default();
    let mut away = vec![];
    for op in plan.stages().flatten() {
        match gate.admits(op) {
            Ok(()) if fails(op) => gate.failed(op),
            Ok(()) => {}
            Err(lacks) => away.push((op.to_string(), lacks)),
        }
    }
    away
}

fn of_sets(op: &Op) -> bool {
    op.stage() == Stage::Sets
}

fn of_chains(op: &Op) -> bool {
    op.stage() == Stage::Chains
}

#[test]
fn sets_and_chains_come_before_devices_and_tables_go_after_them() {
    let (routing, filter) = (routing(link(8472)), filter(true));
    let docker_user: DockerUserRules = [(Family::V4, rules(Family::V4, v("10.64.0.0/12")).into())].into();
    let chain = |rules| [DockerUser { family: Family::V4, rules }];
    let want = State { routing: &routing, filter: &filter, docker_user: &docker_user, ..State::default() };
    let empty = Found { docker_user: &chain(vec![]), ..Found::default() };
    assert_eq!(
        diff(want, empty).to_string(),
        "+ nft add set inet fabric members4 { type ipv4_addr . ipv4_addr; }
+ nft add set inet fabric prefixes4 { type ipv4_addr . ipv4_addr; flags interval; }
+ nft add set bridge fabric known { type ifname; }
+ nft add set bridge fabric pods4 { type ifname . ether_addr . ipv4_addr; }
+ nft add set bridge fabric pods6 { type ifname . ether_addr . ipv6_addr; }
+ nft add set bridge fabric ports { type ifname; }
~ nft replace chains of table inet fabric: forward, input, pods, senders
~ nft replace chains of table bridge fabric: advertised, forward, pods, prerouting
+ nft insert rule ip filter DOCKER-USER ip saddr 10.64.0.0/12 accept
+ nft insert rule ip filter DOCKER-USER ip daddr 10.64.0.0/12 accept
+ ip link add fabric.7 address 02:42:c0:00:02:01 mtu 1450 up type vxlan id 7 dstport 8472 local 192.0.2.1 nolearning
+ bridge fdb replace 02:42:c0:00:02:02 dev fabric.7 dst 192.0.2.2 self permanent
"
    );

    let there = docker_user[&Family::V4].iter().zip(7..).map(|(rule, handle)| (handle, rule.comment())).collect();
    let (filter, docker_user) = (made(&filter), chain(there));
    let have =
        || Found { routing: Cow::Borrowed(&routing), filter: &filter, docker_user: &docker_user, ..Found::default() };
    assert_eq!(diff(want, have()).to_string(), "");
    assert_eq!(
        diff(State::default(), have()).to_string(),
        "- bridge fdb del 02:42:c0:00:02:02 dev fabric.7 self
- ip link del fabric.7
- nft delete rule ip filter DOCKER-USER handle 7
- nft delete rule ip filter DOCKER-USER handle 8
- nft delete table inet fabric
- nft delete table bridge fabric
"
    );
}

#[test]
fn new_device_waits_for_the_chain_that_judges_senders_and_that_for_its_sets() {
    let (routing, filter) = (routing(link(8472)), filter(true));
    let want = State { routing: &routing, filter: &filter, ..State::default() };
    let plan = diff(want, Found::default());
    let away = turned_away(&plan, of_sets);
    let lacks: Vec<Key> = away.iter().map(|(_, lacks)| *lacks).collect();
    let sets = [Key::Set(TableKey::Fabric, "members4".into()), Key::Set(TableKey::Bridge, "known".into())];
    assert_eq!(lacks, [&sets[..], &[Key::SendersChain, Key::Link(v("fabric.7"))]].concat(), "{away:?}");
    let away = turned_away(&plan, of_chains);
    assert_eq!(away.iter().map(|(_, lacks)| *lacks).collect::<Vec<_>>(), lacks[2..], "{away:?}");
}

#[test]
fn nothing_waits_for_the_filter_when_nobody_judges_senders() {
    let (routing, filter) = (routing(link(8472)), filter(false));
    let want = State { routing: &routing, filter: &filter, ..State::default() };
    let away = turned_away(&diff(want, Found::default()), |op| matches!(op, Op::Filter(_)));
    assert!(away.iter().all(|(step, _)| step.contains(" nft ")), "{away:?}");
}

#[test]
fn device_that_stands_waits_for_no_filter_and_one_that_is_set_up_does() {
    let (want, filter) = (routing(link(8472)), filter(true));
    let state = State { routing: &want, filter: &filter, ..State::default() };
    let other_mtu = routing(VxlanLink { mtu: 1400, ..link(8472) });
    assert_eq!(turned_away(&diff(state, &other_mtu), of_chains), []);
    let down = routing(VxlanLink { up: false, ..link(8472) });
    let away = turned_away(&diff(state, &down), of_chains);
    assert_eq!(away, [("~ ip link set fabric.7 up".to_owned(), Key::SendersChain)]);
}

#[test]
fn device_stays_while_the_one_that_is_to_take_its_place_must_wait() {
    let (want, filter) = (routing(link(8472)), filter(true));
    let state = State { routing: &want, filter: &filter, ..State::default() };
    let mut have = routing(link(8472));
    have.links.get_mut(&v("fabric.7")).expect("just made").gbp = true;
    let plan = diff(state, &have);
    let away = turned_away(&plan, of_chains);
    assert_eq!(away[0], ("- ip link del fabric.7".to_owned(), Key::SendersChain));
    assert_eq!(away.len(), 3, "what hangs on it is not written either: {away:?}");
    let op: Op = routing::Op::Outgrown(v("fabric.7"), have.links[&v("fabric.7")]).into();
    assert!(plan.ops().contains(&op));
}

#[test]
fn chains_that_are_in_force_are_enough_for_a_device() {
    let (want, filter) = (routing(link(8472)), filter(true));
    let state = State { routing: &want, filter: &filter, ..State::default() };
    // Somebody has put a chain beside ours: it is to go, but what judges senders is there.
    let mut there = made(&filter);
    let inet = there.get_mut(&TableKey::Fabric).expect("made");
    inet.chains.insert("theirs".into(), Arc::default());
    let plan = diff(state, &there);
    assert_eq!(turned_away(&plan, of_chains), []);
    // Or has taken away the rule that leads to it.
    let mut there = made(&filter);
    let input = there.get_mut(&TableKey::Fabric).expect("made").chains.get_mut("input").expect("made");
    Arc::make_mut(input).pop();
    let away = turned_away(&diff(state, &there), of_chains);
    assert_eq!(away.first().map(|(_, lacks)| *lacks), Some(Key::SendersChain), "{away:?}");
    // Members that can't be let in keep out no device.
    let mut there = made(&filter);
    let members = there.get_mut(&TableKey::Fabric).expect("made").sets.get_mut("members4").expect("made");
    members.elements = Default::default();
    let plan = diff(state, &there);
    assert!(matches!(plan.ops()[0], Op::Filter(nft::Op::Elements(_))));
    assert_eq!(turned_away(&plan, of_sets), []);
}

#[test]
fn while_leases_are_only_remembered_nothing_goes_that_they_decide_on() {
    let (mut want, mut have) = (routing(link(8472)), routing(link(8472)));
    let (newer, older) = ((v("fabric.7"), v("02:42:c0:00:02:03")), (v("fabric.7"), v("02:42:c0:00:02:04")));
    want.fdb.insert(older, v("192.0.2.4"));
    have.fdb.insert(newer, v("192.0.2.3"));
    let plan = diff(&want, &have).without_deletes();
    assert_eq!(plan.ops(), [routing::Op::Fdb(older.0, older.1, Change::Create(v("192.0.2.4"))).into()]);
    let there = made(&filter(true));
    let plan = diff(State::default(), &there).without_deletes();
    assert_eq!(
        plan.to_string(),
        "- nft delete table inet fabric\n- nft delete table bridge fabric\n",
        "no lease decides"
    );
}

/// A Service whose frontend leads to a pool of this number.
fn service(pool: u32) -> Ruleset {
    let mut table = Table::default();
    let numbers = SetKind::of(&[Datatype::Number]).to(&[Datatype::Number]);
    let element = |from, to| Element::from([Part::Number(from)]).to([Part::Number(to)]);
    table.set("pool", numbers, Order::AroundChains, [element(pool, 80)]);
    table.set("svc", numbers, Order::AfterChains, [element(443, pool)]);
    table.set(
        "pick",
        SetKind::of(&[Datatype::Number]).to_verdicts(),
        Order::AfterChains,
        [Element::from([Part::Number(pool)]).to_verdict(Verdict::Jump(Name::numbered("pick", &[pool])))],
    );
    table.chains.insert(Name::numbered("pick", &[pool]), Chain::default());
    [(TableKey::Services, table)].into()
}

#[test]
fn nothing_leads_to_what_could_not_be_written_and_nothing_goes_that_is_still_led_to() {
    let plan = diff(&service(2), &made(&service(1)));
    let of = "inet fabric-services";
    let steps = [
        format!("+ nft add element {of} pool {{ 2 : 80 }}\n"),
        format!("~ nft replace chains of table {of}: pick-2\n"),
        format!("+ nft add element {of} pick {{ 2 : jump pick-2 }}\n"),
        format!("- nft delete element {of} svc {{ 443 : 1 }}\n+ nft add element {of} svc {{ 443 : 2 }}\n"),
        format!("- nft delete element {of} pick {{ 1 : jump pick-1 }}\n"),
        format!("- nft delete element {of} pool {{ 1 : 80 }}\n"),
        format!("- nft delete of table {of}: chain pick-1\n"),
    ];
    assert_eq!(plan.to_string(), steps.concat());
    let waits = |begins: &str| {
        let away = turned_away(&plan, |op| op.to_string().starts_with(begins));
        let lines = away.iter().map(|(step, _)| format!("{step}\n"));
        lines.map(|line| steps.iter().position(|step| *step == line).expect("a step")).collect::<Vec<_>>()
    };
    assert_eq!(waits("+ nft add element inet fabric-services pool"), [1, 2, 3, 4, 5, 6]);
    assert_eq!(waits("~ nft replace chains"), [2, 3, 4, 5, 6]);
    assert_eq!(waits("+ nft add element inet fabric-services pick"), [3, 4, 5, 6]);
    assert_eq!(waits("- nft delete element inet fabric-services svc"), [4, 5, 6]);
    assert_eq!(waits("- nft delete element inet fabric-services pick"), [6]);
}

#[test]
fn leases_that_are_only_remembered_withhold_nothing_of_services() {
    let plan = diff(&service(2), &made(&service(1)));
    assert_eq!(plan.clone().without_deletes(), plan);
}
