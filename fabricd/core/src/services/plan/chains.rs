//! The rules of the table `fabric-services`. There are as many as there are sizes of pools, however many Services there are;
//! and one for each pool that is drawn from by turns, as the kernel counts turns by rule.
//!
//! ```text
//! prerouting (nat, -101) ─► from outside: outside4 ─► outpick4 ─► out-4-N ─┐
//!                        ─► translate4 ─► pick4 ─► draw-4-N, stick-4-N-T ──┴─► dnat to an endpoint of the pool
//!                                                  turn-4-POOL, hash-4
//! output     (nat, -101) ─► translate4
//! guard      (filter, prerouting and output, -110): who may not come; what only others can serve
//! refuse     (filter, input, forward, output, -10): what nobody can serve
//! postrouting (nat, 98): masquerade where the answer would not come back by this node
//! ```
//!
//! Each look-up of a chain begins anew, as a rule has no values but its own; so a packet may meet a change between two of
//! them. Then it finds nothing, comes back, and is asked for once more by a second rule that is like the first.

use super::Context;
use super::pools::elements;
use super::rows::{Class, Map, frontend_fields, socket_fields, target_fields};
use crate::model::Family;
use crate::services::balance::SLOTS;
use crate::state::nft::{
    ChainKind, CtField, Datatype, Direction, Element, Field, Fields, Match, Name, Part, Place, Reject, Rule, Step,
    Table, Test, Update, Verdict, ct_state, ct_status,
};

/// One before `NF_IP_PRI_NAT_DST`, where kube-proxy, Docker and iptables have their chains.
const BEFORE_DSTNAT: i32 = -101;
/// Before any translation.
const BEFORE_TRANSLATION: i32 = -110;
/// Before the filters of others.
const BEFORE_FILTERS: i32 = -10;
/// Before the masquerade of our table `fabric`, and that of others.
const BEFORE_SRCNAT: i32 = 98;

/// By which clients are hashed on every node: "fabr".
const SEED: u32 = 0x6661_6272;

/// Chains of a family that packets are sent to from both hooks.
const fn of_family(family: Family, v4: &'static str, v6: &'static str) -> Name {
    Name::new(match family {
        Family::V4 => v4,
        Family::V6 => v6,
    })
}

const fn translate(family: Family) -> Name {
    of_family(family, "translate4", "translate6")
}

const fn outside(family: Family) -> Name {
    of_family(family, "outside4", "outside6")
}

/// Adds all rules but those that draw from pools.
pub(super) fn add(table: &mut Table, context: &Context) {
    for family in Family::ALL {
        let from = Match::family(family);
        let jump =
            |matches: &[Match], chain: Name, why: &'static str| Rule::new(matches.to_vec(), Verdict::Jump(chain), why);
        let inbound = [vec![from.clone()], from_outside(context, family)].concat();
        let prerouting = table.at("prerouting", ChainKind::Nat, Place::Prerouting, BEFORE_DSTNAT);
        prerouting.push(jump(&inbound, outside(family), "from outside of the network"));
        prerouting.push(jump(std::slice::from_ref(&from), translate(family), "to a Service"));
        let output = table.at("output", ChainKind::Nat, Place::Output, BEFORE_DSTNAT);
        output.push(jump(&[from], translate(family), "to a Service"));
        let twice = |frontends: Map, picks: Map| {
            let rule = Rule {
                steps: vec![
                    Step::Lookup {
                        key: frontend_fields(family).into(),
                        map: frontends.name(family),
                        data: target_fields(),
                    },
                    Step::VerdictMap { key: vec![Field::Value(2)], map: picks.name(family) },
                ],
                why: "to an endpoint".into(),
            };
            [rule.clone(), rule]
        };
        table.called(outside(family)).extend(twice(Map::Outside, Map::OutsidePicks));
        table.called(translate(family)).extend(twice(Map::Services, Map::Picks));
    }
    guard(table, context);
    refuse(table, context);
    masquerade(table, context);
}

/// Conditions by which a packet comes from no pod of the network. What this host sends never passes prerouting.
fn from_outside(context: &Context, family: Family) -> Vec<Match> {
    let inside = context.network.get(family).into_iter().chain(context.own.get(family));
    inside.map(|prefix| Match::new(Field::Source(family), Test::Outside(*prefix))).collect()
}

/// Who may not come, and what others have to serve. What this host sends is from inside.
fn guard(table: &mut Table, context: &Context) {
    let is_new = || Match::new(Field::CtState, Test::AnyBit(ct_state::NEW));
    let from_ranges = Name::new("guard");
    for (name, place) in [("guard-prerouting", Place::Prerouting), ("guard-output", Place::Output)] {
        let chain = table.at(name, ChainKind::Filter, place, BEFORE_TRANSLATION);
        for family in Family::ALL.into_iter().filter(|_| place == Place::Prerouting) {
            let shut = Match::all_in(&frontend_fields(family), Map::Shut.name(family));
            let from_outside = from_outside(context, family).into_iter().chain([shut]);
            let matches = [is_new(), Match::family(family)].into_iter().chain(from_outside);
            chain
                .push(Rule::drop(matches, "no endpoint of a Service with externalTrafficPolicy Local is on this node"));
        }
        chain.push(Rule::new([is_new()], Verdict::Jump(from_ranges), "new connections"));
    }
    for family in Family::ALL {
        let key = frontend_fields(family).into();
        let guard = Step::Lookup { key, map: Map::Guarded.name(family), data: Fields::of(&[Datatype::Number]) };
        let fields = vec![Field::Value(0), Field::Source(family)];
        let foreign = Match { fields, test: Test::NotIn(Map::Ranges.name(family)) };
        table.called(from_ranges).push(Rule {
            steps: vec![Match::family(family).into(), guard, foreign.into(), Step::Count, Verdict::Drop.into()],
            why: "not from loadBalancerSourceRanges".into(),
        });
    }
}

/// What nobody can serve. A packet with a ClusterIP that comes as far as this is translated by nobody; one with an address
/// that no Service has would leave by the default route, and may come back by it.
fn refuse(table: &mut Table, context: &Context) {
    for (name, place) in [("input", Place::Input), ("forward", Place::Forward), ("refuse-output", Place::Output)] {
        let chain = table.at(name, ChainKind::Filter, place, BEFORE_FILTERS);
        let state = |bits| Match::new(Field::CtState, Test::AnyBit(bits));
        chain.push(Rule::new([state(ct_state::NEW)], Verdict::Jump(Name::new("refuse")), "new connections"));
        for family in Family::ALL {
            let vip = Match::all_in(&[Field::Target(family)], Map::ClusterIps.name(family));
            let invalid = [Match::family(family), state(ct_state::INVALID), vip];
            chain.push(Rule::drop(invalid, "of no connection to a Service"));
        }
    }
    let rules = table.called("refuse");
    for family in Family::ALL {
        let to = |map: Map| [Match::family(family), Match::all_in(&frontend_fields(family), map.name(family))];
        rules.push(Rule::drop(
            to(Map::Held),
            "no endpoint of a Service with internalTrafficPolicy Local is on this node",
        ));
        let reject = |matches: [Match; 2], why: &'static str| Rule {
            steps: matches
                .into_iter()
                .map(Step::Match)
                .chain([Step::Count, Step::Reject(Reject::PortUnreachable)])
                .collect(),
            why: why.into(),
        };
        rules.push(reject(to(Map::Rejected), "the Service has no endpoint"));
        let vip = Match::all_in(&[Field::Target(family)], Map::ClusterIps.name(family));
        rules.push(reject([Match::family(family), vip], "the Service has no such port, or no endpoint"));
        for cidr in context.service_cidrs.iter().filter(|cidr| cidr.family() == family) {
            let within = Match::new(Field::Target(family), Test::Within(*cidr));
            rules.push(Rule::drop([Match::family(family), within], "no Service has this address"));
        }
    }
}

/// Whose answers would not come back by this node: then a client would get them from an address that it never asked.
fn masquerade(table: &mut Table, context: &Context) {
    let chain = table.at("postrouting", ChainKind::Nat, Place::Postrouting, BEFORE_SRCNAT);
    let translated = || Match::new(Field::CtStatus, Test::Bits(ct_status::DESTINATION_NAT));
    for family in Family::ALL {
        let of = || Match::family(family);
        let both = [Field::Source(family), Field::Target(family)];
        let itself = [of(), translated(), Match::all_in(&both, Map::Hairpin.name(family))];
        chain.push(Rule::new(itself, Step::Masquerade, "a pod that reaches itself"));
        if let Some(own) = context.own.get(family) {
            let from_here = [of(), Match::new(Field::Source(family), Test::Within(*own))];
            chain.push(Rule::new(from_here, Verdict::Return, "from a pod of this node"));
        }
        let to_here = [of(), Match::all_in(&[Field::Target(family)], Map::Local.name(family))];
        chain.push(Rule::new(to_here, Verdict::Return, "to an endpoint on this node"));
        let original = |field| Field::Ct(Direction::Original, field);
        let frontend = vec![original(CtField::Target(family)), Field::Protocol, original(CtField::TargetPort)];
        chain.push(Rule {
            steps: vec![
                of().into(),
                translated().into(),
                Step::Lookup { key: frontend, map: Map::Services.name(family), data: target_fields() },
                Step::Masquerade,
            ],
            why: "to a Service's endpoint on another node".into(),
        });
    }
}

/// From which map a class is drawn, of which family, and its size.
pub(super) type Draw = (Family, Map, Class);

/// Adds chains that draw, and what leads to them.
pub(super) fn add_draws(table: &mut Table, draws: impl Iterator<Item = Draw>) {
    for draw in draws {
        table.called(name(draw)).extend(rules(draw));
        let (picks, element) = pick(draw);
        elements(table, picks, draw.0).insert(element, ());
    }
}

/// Takes them out.
pub(super) fn remove_draws(table: &mut Table, draws: impl Iterator<Item = Draw>) {
    for draw in draws {
        table.chains.remove(&name(draw));
        let (picks, element) = pick(draw);
        elements(table, picks, draw.0).remove(&element);
    }
}

/// What leads to a chain that draws.
fn pick(draw @ (_, frontends, class): Draw) -> (Map, Element) {
    let picks = if frontends == Map::Outside { Map::OutsidePicks } else { Map::Picks };
    (picks, Element::new([Part::Number(class.number())]).to_verdict(Verdict::Jump(name(draw))))
}

fn name((family, frontends, class): Draw) -> Name {
    let family = match family {
        Family::V4 => 4,
        Family::V6 => 6,
    };
    match (frontends, class) {
        (Map::Outside, Class::Random { endpoints }) => Name::numbered("out", &[family, endpoints]),
        (_, Class::Random { endpoints }) => Name::numbered("draw", &[family, endpoints]),
        (Map::Outside, Class::Sticky { endpoints, timeout }) => {
            Name::numbered("outstick", &[family, endpoints, timeout])
        }
        (_, Class::Sticky { endpoints, timeout }) => Name::numbered("stick", &[family, endpoints, timeout]),
        (Map::Outside, Class::Turns { pool, .. }) => Name::numbered("outturn", &[family, pool]),
        (_, Class::Turns { pool, .. }) => Name::numbered("turn", &[family, pool]),
        (Map::Outside, Class::Hashed) => Name::numbered("outhash", &[family]),
        (_, Class::Hashed) => Name::numbered("hash", &[family]),
    }
}

/// The rules that draw an endpoint. Values: 0 the service port, 1 the pool, 2 the class, 3 the address, 4 the port.
fn rules((family, frontends, class): Draw) -> Vec<Rule> {
    const ID: Field = Field::Value(0);
    const POOL: Field = Field::Value(1);
    const ADDRESS: Field = Field::Value(3);
    const PORT: Field = Field::Value(4);
    let begin = || {
        let key = frontend_fields(family).into();
        vec![
            Step::Lookup { key, map: frontends.name(family), data: target_fields() },
            Match::is(Field::Value(2), class.number()).into(),
        ]
    };
    let lookup = |key: [Field; 2], map: Map| Step::Lookup {
        key: key.into(),
        map: map.name(family),
        data: socket_fields(family),
    };
    let dnat = Step::Dnat { family, address: ADDRESS, port: Some(PORT) };
    let rule = |steps: Vec<Step>, why: &'static str| Rule { steps: [begin(), steps].concat(), why: why.into() };
    let from_pool = |slot| lookup([POOL, slot], Map::Pools);
    let (endpoints, timeout) = match class {
        Class::Random { endpoints } => {
            return vec![rule(vec![from_pool(Field::Random(endpoints)), dnat], "to a random endpoint")];
        }
        Class::Turns { endpoints, .. } => {
            return vec![rule(vec![from_pool(Field::Increment(endpoints)), dnat], "to each endpoint by turns")];
        }
        Class::Hashed => {
            let hash = Field::SourceHash { family, slots: SLOTS, seed: SEED };
            return vec![rule(vec![from_pool(hash), dnat], "to the endpoint of the client's hash")];
        }
        Class::Sticky { endpoints, timeout } => (endpoints, timeout),
    };
    let draw = from_pool(Field::Random(endpoints));
    let client = [Field::Source(family), ID];
    let stays = |how, timeout| Step::Update {
        how,
        set: Map::Clients.name(family),
        key: client.into(),
        data: vec![ADDRESS, PORT],
        timeout,
    };
    let is_live: Step = Match::all_in(&[POOL, ADDRESS, PORT], Map::Live.name(family)).into();
    let refresh = || stays(Update::Refresh, Some(timeout));
    vec![
        rule(vec![lookup(client, Map::Clients), is_live, refresh(), dnat.clone()], "to the client's endpoint"),
        rule(vec![lookup(client, Map::Clients), stays(Update::Delete, None)], "the client's endpoint is gone"),
        rule(vec![draw, refresh(), dnat], "to a random endpoint, and to this one from now on"),
    ]
}
