//! The policies of this node's pods as a table of the packet filter.
//!
//! ```text
//! forward, input: denied by a change? drop · established? accept · ─► evaluate ─► evaluate4, evaluate6:
//!     no connection, and a pod at either end that policies select .......... drop
//!     from or to a port of the bridge, by an address that is not known ..... drop
//!     who began it: eg4 ─► chain of this pod: returns where a rule allows it
//!     who answers it: in4 ─► likewise
//! a chain of tier Admin: Accept? return · Deny? drop · Pass? goto the next ... goto the next
//! of NetworkPolicies: from a pod to itself? return · a rule allows it? return  drop
//! of tier Baseline: Accept? return · Deny? drop · Pass? return ............... return
//! drop: goto the chain of the cause, which may show it first
//! ```
//!
//! Rules ask the connection, not the packet: its original source, and who answers and at which port. So one rule holds in
//! both directions, and after any translation of the destination. A packet without a connection can't be asked, and would
//! slip past: so it is dropped where an isolated pod sends it or gets it.
//!
//! A pod is known once its policies are applied; until then it reaches nobody but itself, and is reached by nobody but its
//! own node, whose packets meet none of these chains.
//!
//! Chains come and go with effective policies, and elements with pods. Sets are few, whatever there is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use super::chains::{EffectivePolicies, Origin, Planned};
use super::cover::cover;
use super::drops::DropCause;
use super::effective::{Condition, EffectivePolicy, PeerTest, PortTest};
use super::evaluate::{Cluster, Who};
use super::groups::{BlockGroup, NamedGroup, Numbers, PodGroup, PortGroup};
use super::members::Members;
use super::model::{Direction, ObjectName};
use super::tiers::PolicyName;
use crate::cow_map::CowSet;
use crate::model::{Family, IfName, Subnet};
use crate::state::nft::{
    ChainKind, CtField, Datatype, Direction as Tuple, Element, Field, LOCAL, Match, Name, Order, Part, Place, Rule,
    Set, SetKind, Step, Table, Test, Verdict, ct_state,
};

/// The label of connections that were allowed once and are not any more (`ct label`). Our own bit: others count from 0.
pub const DENIED_LABEL: u8 = 31;

/// Where others filter too (`NF_IP_PRI_FILTER`): after every translation of a destination, before that of a source.
const FILTER: i32 = 0;

/// What should be applied for this node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyPlan {
    /// The table.
    pub table: Table,
    /// Pods of this node by their addresses: those that are known, with the policies that select them.
    pub pods: BTreeMap<IpAddr, Isolation>,
    /// What the rules of the pods' chains are made of.
    pub chains: BTreeMap<Name, Origin>,
}

impl PolicyPlan {
    /// Shows what is dropped, or doesn't. Nothing but these chains is another then, so all counters go on.
    pub fn show_drops(&mut self, is_shown: bool) {
        for cause in DropCause::ALL {
            self.table.chains.insert(Name::new(cause.name()), cause.chain(is_shown));
        }
    }
}

/// The policies that say something about a pod. Without any it is open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Isolation {
    /// The pod; `None` when it is none of Kubernetes'.
    pub pod: Option<ObjectName>,
    /// Those about what comes to it, in the order in which they are asked.
    pub ingress: Vec<PolicyName>,
    /// Those about what it sends.
    pub egress: Vec<PolicyName>,
}

impl Isolation {
    /// Whether no policy says anything about it.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.ingress.is_empty() && self.egress.is_empty()
    }
}

/// Plans tables, one after the other: what differs from one cluster to the next costs itself.
#[derive(Debug, Default)]
pub struct Planner {
    members: Members,
}

/// Plans a table, once. `bridges` are those of this node's pods.
#[must_use]
pub fn plan(cluster: &Cluster<'_>, bridges: &BTreeSet<IfName>) -> PolicyPlan {
    Planner::default().plan(cluster, bridges)
}

impl Planner {
    /// The table for a cluster: the same whatever there was before.
    #[must_use]
    pub fn plan(&mut self, cluster: &Cluster<'_>, bridges: &BTreeSet<IfName>) -> PolicyPlan {
        plan_with(&mut self.members, cluster, bridges)
    }
}

fn plan_with(members: &mut Members, cluster: &Cluster<'_>, bridges: &BTreeSet<IfName>) -> PolicyPlan {
    let mut pods = BTreeMap::new();
    let mut effective = EffectivePolicies::default();
    for (ip, member) in cluster.locals() {
        let mut isolation = Isolation::default();
        match member.who {
            Who::Unknown(_) => continue,
            Who::Other => {}
            Who::Pod(pod) => {
                isolation.pod = Some(pod.name.clone());
                for direction in Direction::ALL {
                    let Some(policy) = EffectivePolicy::of(cluster, direction, pod) else { continue };
                    match direction {
                        Direction::Ingress => isolation.ingress = policy.all_policies(),
                        Direction::Egress => isolation.egress = policy.all_policies(),
                    }
                    effective.add(policy, ip);
                }
            }
        }
        pods.insert(ip, isolation);
    }
    let effective: Vec<Planned> = effective.numbered(cluster);
    let numbers = Groups::of(&effective);
    let (mut table, mut chains) = (Table::default(), BTreeMap::new());
    for (name, place) in [("forward", Place::Forward), ("input", Place::Input)] {
        table.at(name, ChainKind::Filter, place, FILTER).extend(entrance());
    }
    evaluate(&mut table);
    // Nothing jumps here: connections have room for labels only while a rule sets one (nf_connlabels_get).
    let steps = vec![Step::SetCtLabel(DENIED_LABEL)];
    table.called("labels").push(Rule { steps, why: "so that connections have room for labels".into() });
    let bridge = |name: &IfName| Element::from([Part::Interface(*name)]);
    table.set("bridges", SetKind::of(&[Datatype::Interface]), Order::BeforeChains, bridges.iter().map(bridge));
    table.set("ports", PORTS, Order::AroundChains, numbers.port_elements());
    members.update(cluster, &numbers.pods, &numbers.named);
    for family in Family::ALL {
        let sets = Sets::of(family);
        evaluate_family(&mut table, &sets, cluster.state().local.own_node_allowed);
        let known = || pods.iter().filter(|(ip, _)| Family::of(**ip) == family);
        let address = |(ip, _): (&IpAddr, &Isolation)| Element::from([Part::Ip(*ip)]);
        // Last of all, and gone first: a pod that is known has its chains.
        table.set(sets.known, SetKind::of(&[sets.ip]), Order::AfterChains, known().map(address));
        let isolated = || known().filter(|(_, isolation)| !isolation.is_open());
        table.set(sets.isolated, SetKind::of(&[sets.ip]), Order::BeforeChains, isolated().map(address));
        let twice = |(ip, _): (&IpAddr, &Isolation)| Element::from([Part::Ip(*ip), Part::Ip(*ip)]);
        table.set(sets.itself, SetKind::of(&[sets.ip, sets.ip]), Order::BeforeChains, isolated().map(twice));
        for (map, direction) in [(sets.ingress, Direction::Ingress), (sets.egress, Direction::Egress)] {
            let of_direction = effective.iter().filter(|planned| planned.effective.direction == direction);
            let elements = of_direction.flat_map(|planned| {
                let jump = Verdict::Jump(planned.chain(family));
                planned.begins_with(family).map(move |ip| Element::from([Part::Ip(ip)]).to_verdict(jump))
            });
            table.set(map, SetKind::of(&[sets.ip]).to_verdicts(), Order::default(), elements);
        }
        for planned in effective.iter().filter(|planned| planned.is_used(family)) {
            let (rules, counts) = planned.rules(&sets, &numbers).into_iter().unzip();
            table.called(planned.chain(family)).extend::<Vec<Rule>>(rules);
            chains.insert(planned.chain(family), Origin { direction: planned.effective.direction, rules: counts });
        }
        numbers.fill(&mut table, &sets, members);
    }
    let mut plan = PolicyPlan { table, pods, chains };
    plan.show_drops(false);
    plan
}

/// Every packet that is forwarded or comes in meets these.
fn entrance() -> Vec<Rule> {
    let denied = Match::new(Field::CtLabels, Test::AnyBit(1 << DENIED_LABEL));
    let established = Match::new(Field::CtState, Test::AnyBit(ct_state::ESTABLISHED | ct_state::RELATED));
    vec![
        DropCause::NotAnyMore.rule([denied], "NetworkPolicy: a connection that is not allowed any more"),
        Rule::new([established], Verdict::Accept, "evaluated when it began"),
        Rule::new([], Verdict::Jump("evaluate".into()), "a new connection, or none"),
    ]
}

/// ICMPv6 that keeps a link working: neighbour discovery (RFC 4861: solicitations and advertisements of routers and
/// neighbours), whose hop limit shows that no router has passed it on (section 3.1), and multicast listeners (RFC 2710, RFC
/// 3810), which talk to groups.
const NEIGHBOURS: [u32; 4] = [133, 134, 135, 136];
const LISTENERS: [u32; 4] = [130, 131, 132, 143];
const NOT_ROUTED: u32 = 255;
/// `IPPROTO_ICMPV6`.
const ICMPV6: u32 = 58;

fn evaluate(table: &mut Table) {
    let icmpv6 = [Match::family(Family::V6), Match::is(Field::Protocol, ICMPV6)];
    let mut rules = vec![Rule::new(icmpv6, Verdict::Jump("icmpv6".into()), "neighbour discovery?")];
    rules.extend(Family::ALL.map(|family| {
        Rule::new([Match::family(family)], Verdict::Goto(Sets::of(family).evaluate), "by its addresses")
    }));
    table.called("evaluate").extend(rules);
    let accept = |kind: u32, on_the_link: Match, why: &'static str| {
        Rule::new([Match::is(Field::IcmpType, kind), on_the_link], Verdict::Accept, why)
    };
    let neighbour = |kind| accept(kind, Match::is(Field::HopLimit, NOT_ROUTED), "neighbour discovery");
    let groups = Subnet::holding(Ipv6Addr::from_bits(0xff << 120).into(), 8).expect("8 is at most 128");
    let target = || Match::new(Field::Target(Family::V6), Test::Within(groups));
    let listener = |kind| accept(kind, target(), "multicast listeners");
    table.called("icmpv6").extend(NEIGHBOURS.map(neighbour).into_iter().chain(LISTENERS.map(listener)));
}

fn evaluate_family(table: &mut Table, sets: &Sets, own_node_allowed: bool) {
    let lost = Match::new(Field::CtState, Test::AnyBit(ct_state::INVALID | ct_state::UNTRACKED));
    let (source, target) = (Field::Source(sets.family), Field::Target(sets.family));
    let not_known = |address| Match { fields: vec![address], test: Test::NotIn(sets.known) };
    let bridge = |interface| Match::all_in(&[interface], "bridges");
    let mut rules = vec![];
    for address in [source, target] {
        let matches = [lost.clone(), Match::all_in(&[address], sets.isolated)];
        rules.push(
            DropCause::NoConnection.rule(matches, "NetworkPolicy: of no known connection, and a pod is isolated"),
        );
    }
    for (interface, address) in [(Field::InInterface, source), (Field::OutInterface, target)] {
        let matches = [bridge(interface), not_known(address)];
        rules.push(DropCause::NotApplied.rule(matches, "NetworkPolicy: a pod whose policies are not applied yet"));
    }
    if own_node_allowed {
        let own_node = Match::is(Field::TargetType, LOCAL);
        rules.push(Rule::new([own_node], Verdict::Accept, "to the pod's own node"));
    }
    let look_up = |address, map: Name| {
        let steps = vec![Step::VerdictMap { key: vec![address], map }];
        Rule { steps, why: "the policies of its pod".into() }
    };
    rules.push(look_up(sets.began(), sets.egress));
    rules.push(look_up(sets.answers(), sets.ingress));
    table.called(sets.evaluate).extend(rules);
}

/// Sets and chains of one family.
pub(super) struct Sets {
    pub(super) family: Family,
    ip: Datatype,
    evaluate: Name,
    known: Name,
    isolated: Name,
    /// Each isolated pod with itself.
    pub(super) itself: Name,
    ingress: Name,
    egress: Name,
    pub(super) peer: Name,
    pub(super) peer_port: Name,
    pub(super) block: Name,
}

/// Ports by group and protocol.
const PORTS: SetKind = SetKind::of(&[Datatype::Number, Datatype::Protocol, Datatype::Port]).of_ranges();

impl Sets {
    const fn of(family: Family) -> Self {
        macro_rules! names {
            ($ip:expr, $n:literal) => {
                Self {
                    family,
                    ip: $ip,
                    evaluate: Name::new(concat!("evaluate", $n)),
                    known: Name::new(concat!("known", $n)),
                    isolated: Name::new(concat!("isolated", $n)),
                    itself: Name::new(concat!("itself", $n)),
                    ingress: Name::new(concat!("in", $n)),
                    egress: Name::new(concat!("eg", $n)),
                    peer: Name::new(concat!("peer", $n)),
                    peer_port: Name::new(concat!("peerport", $n)),
                    block: Name::new(concat!("block", $n)),
                }
            };
        }
        match family {
            Family::V4 => names!(Datatype::V4, "4"),
            Family::V6 => names!(Datatype::V6, "6"),
        }
    }

    /// Who began the connection.
    pub(super) const fn began(&self) -> Field {
        Field::Ct(Tuple::Original, CtField::Source(self.family))
    }

    /// Who answers it: after every translation of its destination.
    pub(super) const fn answers(&self) -> Field {
        Field::Ct(Tuple::Reply, CtField::Source(self.family))
    }
}

/// Where it is answered.
pub(super) const PORT: Field = Field::Ct(Tuple::Reply, CtField::SourcePort);

/// The numbers of all that rules ask for.
pub(super) struct Groups {
    pub(super) pods: Numbers<PodGroup>,
    pub(super) blocks: Numbers<BlockGroup>,
    pub(super) ports: Numbers<PortGroup>,
    pub(super) named: Numbers<NamedGroup>,
}

impl Groups {
    fn of(effective: &[Planned]) -> Self {
        let (mut pods, mut blocks, mut numbers, mut named) = (vec![], vec![], vec![], vec![]);
        for Condition { peers, ports, .. } in effective.iter().flat_map(|planned| &planned.conditions) {
            match peers {
                PeerTest::Anybody => {}
                PeerTest::Pods(group) => pods.push(group.clone()),
                PeerTest::Blocks(group) => blocks.push(group.clone()),
            }
            match ports {
                PortTest::Any => {}
                PortTest::Ports(group) => numbers.push(group.clone()),
                PortTest::Named(group) => named.push(group.clone()),
            }
        }
        Self {
            pods: Numbers::of(pods),
            blocks: Numbers::of(blocks),
            ports: Numbers::of(numbers),
            named: Numbers::of(named),
        }
    }

    fn port_elements(&self) -> Vec<Element> {
        let ports = self.ports.iter().flat_map(|(group, number)| {
            group.iter().map(move |(protocol, first, last)| {
                Element::range(&[Part::Number(number), Part::Protocol(protocol.number()), Part::Ports(*first, *last)])
            })
        });
        ports.collect()
    }

    /// Who is in each group.
    fn fill(&self, table: &mut Table, sets: &Sets, members: &Members) {
        let (ip, order, family) = (sets.ip, Order::AroundChains, sets.family);
        let set = |kind, elements: &CowSet<Element>| Set { kind, order, elements: elements.clone() };
        table.sets.insert(sets.peer, set(SetKind::of(&[Datatype::Number, ip]), members.peers(family)));
        let kind = SetKind::of(&[Datatype::Number, ip, Datatype::Protocol, Datatype::Port]);
        table.sets.insert(sets.peer_port, set(kind, members.ports(family)));
        let blocks = self.blocks.iter().flat_map(|(group, number)| {
            let prefixes = cover(group).into_iter().filter(|prefix| prefix.family() == sets.family);
            prefixes.map(move |prefix| Element::range(&[Part::Number(number), Part::Net(prefix)]))
        });
        let kind = SetKind::of(&[Datatype::Number, sets.ip]).of_ranges();
        table.set(sets.block, kind, Order::AroundChains, blocks);
    }
}
