//! Who may send: packets that come encapsulated, judged before they are decapsulated.
//!
//! A VXLAN device takes any packet with its VNI from anybody, and what is inside is as good as a pod's. So on the
//! input hook, which an encapsulated packet passes on its way to the device, each with our port *and our VNI* has to
//! show that the two addresses belong together: the node that it comes from, and the pod that it claims to come from.
//! Both are members of one set, with an element for each peer.
//!
//! Fragments are put together before that hook, for IPv4 always. IPv6 does so only where connections are tracked;
//! elsewhere the first fragment, the only one with a port, is dropped, and without it nothing is put together.

use super::{
    ChainKind, Element, Field, KeyField, Match, Member, Part, Place, Rule, RuleInputs, Ruleset, Test, Verdict,
    ether_type,
};
use crate::model::{Family, Subnet};

/// Before connections are tracked: `NF_IP_PRI_RAW`.
pub(super) const RAW: i32 = -300;
/// `NF_IP_PRI_FILTER`.
pub(super) const FILTER: i32 = 0;

/// The set of who may send what.
#[must_use]
pub fn members(family: Family) -> &'static str {
    sets(family).0
}

/// Its element for the node at `underlay`, which may send from `subnet`.
#[must_use]
pub fn element(underlay: std::net::IpAddr, subnet: Subnet) -> Element {
    Element(vec![Part::Net(Subnet::host(underlay)), Part::Net(subnet)])
}

/// Sets of one family: who may send what, and who may send at all.
const fn sets(family: Family) -> (&'static str, &'static str) {
    match family {
        Family::V4 => ("members4", "peers4"),
        Family::V6 => ("members6", "peers6"),
    }
}

const fn key(family: Family) -> &'static [KeyField] {
    match family {
        Family::V4 => &[KeyField::V4, KeyField::V4],
        Family::V6 => &[KeyField::V6, KeyField::V6],
    }
}

/// The set of the peers' underlay addresses, for whoever wants to know them.
pub(super) fn peers(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>, family: Family) -> &'static str {
    let name = sets(family).1;
    let peers = of_family(inputs, family).map(|member| Element(vec![Part::Net(Subnet::host(member.underlay))]));
    ruleset.entry(super::TableFamily::Inet).or_default().set(name, &key(family)[..1], peers);
    name
}

fn of_family<'a>(inputs: &RuleInputs<'a>, family: Family) -> impl Iterator<Item = &'a Member> {
    inputs
        .members
        .iter()
        .filter(move |member| Family::of(member.underlay) == family && member.subnet.family() == family)
}

/// Packets to our port with our VNI.
fn ours(inputs: &RuleInputs<'_>) -> Vec<Match> {
    let vxlan = &inputs.network.vxlan;
    let mut matches = Match::udp_to(vxlan.port).to_vec();
    matches.push(Match::is(Field::Vni, vxlan.vni.get()));
    matches
}

/// No connections are remembered for encapsulated packets, coming or going: each would cost a look-up, and a table
/// that is full would drop them. Those of other VNIs keep theirs, which their address translation may need.
pub(super) fn add_notrack(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>) {
    let table = ruleset.entry(super::TableFamily::Inet).or_default();
    let rule = Rule::new(ours(inputs), Verdict::Notrack, "vxlan has no connections");
    table.at("prerouting", ChainKind::Filter, Place::Prerouting, RAW).push(rule.clone());
    table.at("output", ChainKind::Filter, Place::Output, RAW).push(rule);
}

pub(super) fn add(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>) {
    let families: Vec<Family> = inputs.own.families().collect();
    for family in &families {
        peers(ruleset, inputs, *family);
    }
    let table = ruleset.entry(super::TableFamily::Inet).or_default();
    for family in &families {
        let members = of_family(inputs, *family).flat_map(|member| {
            let from = move |net| element(member.underlay, net);
            let link_local = (*family == Family::V6).then(link_local);
            // The node's own address too: so it answers a pod whose address was not translated on the way.
            [Some(member.subnet), Some(Subnet::host(member.underlay)), link_local].into_iter().flatten().map(from)
        });
        table.set(sets(*family).0, key(*family), members);
    }

    let port = inputs.network.vxlan.port;
    let input = table.at("input", ChainKind::Filter, Place::Input, FILTER);
    if families.contains(&Family::V6) {
        let mut fragment = vec![Match::family(Family::V6), Match::is(Field::Fragment, 1)];
        fragment.extend(Match::udp_to(port));
        input.push(Rule::drop(fragment, "fragment of an encapsulated packet"));
    }
    for family in &families {
        let mut matches = vec![Match::family(*family)];
        matches.extend(ours(inputs));
        input.push(Rule::new(matches, Verdict::Jump("senders"), "encapsulated"));
    }
    let senders = table.called("senders");
    for family in families {
        judge(senders, inputs, family);
    }
    senders.push(Rule::drop([], "from no peer"));
}

/// The common case first: one look-up for a packet of a peer.
fn judge(rules: &mut Vec<Rule>, inputs: &RuleInputs<'_>, family: Family) {
    let (members, peers) = sets(family);
    let (source, inside) = (Field::Source(family), Field::InnerSource(family));
    let outer = Match::family(family);
    let inner = Match::is(Field::InnerType, ether_type(family));
    rules.push(Rule::new(
        [outer.clone(), inner.clone(), Match::all_in(&[source, inside], members)],
        Verdict::Accept,
        "a peer, from its own subnet",
    ));
    let network = inputs.network.spaces.get(family).map(|space| space.network);
    for sender in inputs.options.senders.iter().filter(|sender| sender.family() == family) {
        let mut matches = vec![outer.clone(), inner.clone(), Match::new(source, Test::Within(*sender))];
        matches.extend(network.map(|network| Match::new(inside, Test::Within(network))));
        rules.push(Rule::new(matches, Verdict::Accept, "allowed by --allow-sender"));
    }
    let of_a_peer = Match::all_in(&[source], peers);
    rules.push(Rule::drop(
        [outer.clone(), inner, of_a_peer.clone()],
        "a peer, but its source is not in the peer's subnet",
    ));
    rules.push(Rule::drop([outer, of_a_peer], "a peer, but inside is something else"));
}

/// What a VTEP's own kernel says to its neighbours (RFC 4291 section 2.5.6). It is never forwarded to a pod.
pub(super) fn link_local() -> Subnet {
    Subnet::holding(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10).expect("10 is at most 128")
}
