//! Pods of one node where the host's packet filter doesn't see what passes between ports of a bridge: those that a policy
//! isolates, or whose policies are not applied yet, exchange nothing with the others there.
//!
//! There is no connection tracking for frames, so who began a connection isn't known, and nothing of it can be let through.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::model::Local;
use super::plan::Isolation;
use crate::model::Family;
use crate::plan::filter::ether_type;
use crate::state::nft::{
    ChainKind, Datatype, Element, Field, Match, Name, Order, Part, Place, Rule, SetKind, Table, Verdict,
};

/// `NF_BR_PRI_FILTER_BRIDGED`
const FILTER: i32 = -200;
/// `IPPROTO_ICMPV6`; neighbour discovery (RFC 4861), without which no pod finds even its node.
const ICMPV6: u32 = 58;
const NEIGHBOURS: [u32; 4] = [133, 134, 135, 136];

/// The table of frames: `pods` are those whose policies are applied, of all that are `local`.
#[must_use]
pub fn separate(pods: &BTreeMap<IpAddr, Isolation>, local: &Local) -> Table {
    let is_open = |ip: &IpAddr| pods.get(ip).is_some_and(Isolation::is_open);
    let mut table = Table::default();
    let mut rules: Vec<Rule> = NEIGHBOURS
        .into_iter()
        .map(|kind| {
            let is = [of(Family::V6), Match::is(Field::Protocol, ICMPV6), Match::is(Field::IcmpType, kind)];
            Rule::new(is, Verdict::Accept, "neighbour discovery")
        })
        .collect();
    for family in Family::ALL {
        let (set, kind) = match family {
            Family::V4 => (Name::new("apart4"), Datatype::V4),
            Family::V6 => (Name::new("apart6"), Datatype::V6),
        };
        let apart = local.pods.keys().filter(|ip| Family::of(**ip) == family && !is_open(ip));
        let element = |ip: &IpAddr| Element::from([Part::Ip(*ip)]);
        table.set(set, SetKind::of(&[kind]), Order::BeforeChains, apart.map(element));
        rules.extend([Field::Source(family), Field::Target(family)].map(|end| {
            let why = "NetworkPolicy: a pod is isolated, and connections between pods of this node are not seen";
            Rule::drop([of(family), Match::all_in(&[end], set)], why)
        }));
    }
    table.at("forward", ChainKind::Filter, Place::Forward, FILTER).extend(rules);
    table
}

fn of(family: Family) -> Match {
    Match::is(Field::EtherType, ether_type(family))
}
