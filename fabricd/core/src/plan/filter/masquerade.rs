//! Masquerade: what leaves the network gets the node's address, so that answers find back.
//!
//! Inside the network nothing is translated, ever: a pod sees another pod's own address. And a client from beyond
//! the network keeps its address towards a pod of this node, where the answer comes by again; only towards a pod of
//! another node it is given ours, since that node would answer it directly. These are flannel's rules.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{FilterInputs, senders};
use crate::model::{Family, Subnet};
use crate::state::nft::{ChainKind, Field, Match, Place, Rule, Ruleset, Step, TableKey, Test, Verdict};

/// One before `NF_IP_PRI_NAT_SRC`, where kube-proxy, Docker and iptables have their chains.
const BEFORE_SRCNAT: i32 = 99;

/// The mark of a packet that kube-proxy is going to masquerade itself.
const KUBE_MARK: u32 = 0x4000;

pub(super) fn add(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>) {
    let mut rules =
        vec![Rule::new([Match::new(Field::Mark, Test::Bits(KUBE_MARK))], Verdict::Return, "others translate it")];
    for (family, own) in inputs.own.iter() {
        let Some(space) = inputs.network.spaces.get(family) else { continue };
        let from = |prefix| Match::new(Field::Source(family), Test::Within(prefix));
        let to = |prefix| Match::new(Field::Target(family), Test::Within(prefix));
        let mut rule = |matches: &[Match], then: Step, why: &'static str| {
            rules.push(Rule::new([&[Match::family(family)], matches].concat(), then, why));
        };
        let network = space.network;
        rule(&[to(*own)], Verdict::Return.into(), "to a pod of this node");
        rule(&[from(network), to(network)], Verdict::Return.into(), "within the network");
        rule(&[from(network), to(multicast(family))], Verdict::Return.into(), "multicast");
        for prefix in inputs.options.no_masquerade_to.iter().filter(|prefix| prefix.family() == family) {
            rule(&[from(network), to(*prefix)], Verdict::Return.into(), "excepted by --no-masquerade-to");
        }
        if inputs.options.no_masquerade_to_nodes {
            senders::add_members(ruleset, inputs, family);
            for node in senders::of_a_peer(Field::Target(family), family) {
                rule(&[from(network), node], Verdict::Return.into(), "to a node, excepted by --no-masquerade-to");
            }
        }
        rule(&[from(network)], Step::Masquerade, "out of the network");
        rule(&[to(network)], Step::Masquerade, "into the network");
    }
    let table = ruleset.entry(TableKey::Fabric).or_default();
    table.at("postrouting", ChainKind::Nat, Place::Postrouting, BEFORE_SRCNAT).extend(rules);
}

fn multicast(family: Family) -> Subnet {
    match family {
        Family::V4 => Subnet::holding(Ipv4Addr::new(224, 0, 0, 0).into(), 4),
        Family::V6 => Subnet::holding(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(), 8),
    }
    .expect("within the family's bits")
}
