//! What every [`Kernel`] must do with the packet filter, as cases that run on both kernels, like those of
//! [`kernel`](super::kernel).

use std::collections::BTreeMap;

use fabric_core::cow_map::CowSet;
use fabric_core::diff::nft::{self, ElementChange};
use fabric_core::diff::{Op, Stage, diff, routing};
use fabric_core::model::{Family, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::{FilterInputs, FilterOptions, Member, ruleset};
use fabric_core::state::Sysctl;
use fabric_core::state::nft::{Datatype, Element, FoundRuleset, Part, Ruleset, SetKind, Table, TableKey};
use fabricd::kernel::Kernel;

use super::kernel::{Act, World, look, refusals, settle, subnet, underlay, v, woken};

/// The filter of a node with `peers` peers.
fn wanted(family: Family, peers: u32) -> Ruleset {
    let config = match family {
        Family::V4 => r#"{"Network":"10.64.0.0/12","Backend":{"Type":"vxlan"}}"#,
        Family::V6 => {
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"2001:db8::/48","Backend":{"Type":"vxlan"}}"#
        }
    };
    let own: PerFamily<Subnet> = [(family, subnet(family, 0))].into_iter().collect();
    let member = |n| Member { underlay: underlay(family, n), subnet: subnet(family, n) };
    ruleset(&FilterInputs {
        network: &NetworkConfig::decode(config.as_bytes()).expect("valid"),
        own: &own,
        members: &(1..=peers).map(member).collect(),
        bridges: &[v("cni0")].into(),
        ports: &[v("veth1")].into(),
        pods: &BTreeMap::new(),
        pod_subnets: &own.values().copied().collect(),
        tracked: false,
        options: &FilterOptions { masquerade: true, ..FilterOptions::default() },
    })
}

/// What is found of these tables once they are there.
fn made(want: &Ruleset) -> FoundRuleset {
    want.iter().map(|(family, table)| (*family, Table::found(table))).collect()
}

async fn settles(kernel: &mut impl Kernel, want: &Ruleset) -> String {
    let steps = settle(kernel, want).await;
    assert_eq!(look(kernel).await.filter, made(want));
    assert_eq!(settle(kernel, want).await, "", "a second pass writes nothing");
    steps
}

/// An element in a set that isn't there.
fn element_of_no_set() -> Op {
    let element = Element::from([Part::Ip(v("192.0.2.7"))]);
    let then = CowSet::from_iter([element.clone()]);
    nft::Op::Elements(ElementChange {
        table: TableKey::Fabric,
        set: "nowhere".into(),
        kind: SetKind::of(&[Datatype::V4]),
        stage: Stage::Sets,
        removed: vec![],
        added: vec![element],
        then,
        after: vec![],
    })
    .into()
}

/// Sets first and then chains, seen again as they were wanted, not written twice, and all of it goes.
pub async fn tables_are_made_seen_and_go_again(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let steps = settles(kernel, &wanted(family, 3)).await;
    let (sets, chains): (Vec<_>, Vec<_>) = steps.lines().partition(|step| step.starts_with("+ nft add set"));
    assert_eq!((sets.len(), chains.len()), (6, 2), "{steps}");
    assert!(steps.ends_with(&format!("{}\n", chains.join("\n"))), "{steps}");
    let steps = settles(kernel, &Ruleset::new()).await;
    assert_eq!(steps, "- nft delete table inet fabric\n- nft delete table bridge fabric\n");
}

/// The price of a peer is a step, whatever stands.
pub async fn peer_that_comes_or_goes_changes_elements_alone(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 3)).await;
    for (peers, begins) in
        [(4, "+ nft add element inet fabric members"), (3, "- nft delete element inet fabric members")]
    {
        let steps = settles(kernel, &wanted(family, peers)).await;
        assert!(steps.starts_with(begins) && steps.lines().count() == 1, "{steps}");
    }
}

/// One step that can't be taken keeps the others of its transaction from being taken.
pub async fn transaction_is_refused_as_a_whole_and_for_one_reason(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    settles(kernel, &wanted(family, 3)).await;
    let more = diff(&wanted(family, 4), &look(kernel).await.filter);
    let ops = [more.ops(), &[element_of_no_set()]].concat();
    assert_eq!(refusals(&kernel.apply(&ops).await), [(0, libc::ENOENT), (1, libc::ENOENT)]);
    assert_eq!(look(kernel).await.filter, made(&wanted(family, 3)));
    settles(kernel, &wanted(family, 4)).await;
}

/// Rules that look into sets which aren't there are not made, nor is anything else with them.
pub async fn chains_are_refused_without_their_sets(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let plan = diff(&wanted(family, 2), &FoundRuleset::new());
    let chains: Vec<Op> = plan.ops().iter().filter(|op| op.stage() == Stage::Chains).cloned().collect();
    assert_eq!(refusals(&kernel.apply(&chains).await), [(0, libc::ENOENT), (1, libc::ENOENT)]);
    assert_eq!(look(kernel).await.filter, FoundRuleset::new());
    settles(kernel, &wanted(family, 2)).await;
}

/// Each section has a writer of its own, and each step its own answer.
pub async fn steps_of_both_sections_are_answered_in_their_order(world: &mut impl World, family: Family) {
    let kernel = world.kernel();
    let plan = diff(&wanted(family, 2), &FoundRuleset::new());
    let sets: Vec<Op> = plan.ops().iter().filter(|op| op.stage() == Stage::Sets).cloned().collect();
    assert_eq!(refusals(&kernel.apply(&sets).await), []);
    let forward = if family == Family::V4 { Sysctl::Ipv4Forward } else { Sysctl::Ipv6Forward };
    let forward: Op = routing::Op::Sysctl(forward, 1).into();
    let nowhere: Op = routing::Op::Sysctl(Sysctl::RpFilter(v("fabric.9")), 2).into();
    let ops = [forward.clone(), element_of_no_set(), nowhere, forward];
    assert_eq!(refusals(&kernel.apply(&ops).await), [(1, libc::ENOENT), (2, libc::ENOENT)]);
}

/// Another program throws all rules away.
pub async fn flushed_ruleset_is_noticed_and_made_anew(world: &mut impl World, family: Family) {
    let want = wanted(family, 2);
    settles(world.kernel(), &want).await;
    world.act(&Act::FlushRuleset);
    woken(world.kernel()).await;
    assert_eq!(look(world.kernel()).await.filter, FoundRuleset::new());
    settles(world.kernel(), &want).await;
}
