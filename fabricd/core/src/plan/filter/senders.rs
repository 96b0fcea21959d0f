//! Who may send: packets that come encapsulated, judged before they are decapsulated.
//!
//! A VXLAN device takes any packet with its VNI from anybody, and what is inside is as good as a pod's. So on the
//! input hook, which an encapsulated packet passes on its way to the device, each with our port *and our VNI* has to
//! show that the two addresses belong together: the node that it comes from, and the pod that it claims to come from.
//!
//! Of a claimed address the subnet is what counts, and nearly all subnets have one length. So it is cut to that length
//! and looked up in a hash table together with the sender's. A set of ranges would take subnets as they are, and was
//! tried: with 10,000 elements the kernel (`nft_pipapo_remove`) takes 15 ms to let one go.
//!
//! Fragments are put together before that hook, for IPv4 always. IPv6 does so only where connections are tracked;
//! elsewhere the first fragment, the only one with a port, is dropped, and without it nothing is put together.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{FilterInputs, Member, ether_type};
use crate::model::{Family, PerFamily, Subnet};
use crate::state::nft::{
    Chain, ChainKind, Datatype, Element, Field, FoundTable, Match, Order, Part, Place, Rule, Ruleset, SENDERS, SetKind,
    Step, Table, TableKey, Test, Verdict,
};

/// Before connections are tracked: `NF_IP_PRI_RAW`.
pub(super) const RAW: i32 = -300;
/// `NF_IP_PRI_FILTER`.
pub(super) const FILTER: i32 = 0;

/// The chain of what this host sends: it is there for [`add_notrack`] alone.
const OUTPUT: &str = "output";

/// The sets of one family.
struct Sets {
    /// Who may send what.
    members: &'static str,
    /// The same, where it doesn't fit there.
    prefixes: &'static str,
    kind: SetKind,
}

const fn sets(family: Family) -> Sets {
    match family {
        Family::V4 => {
            Sets { members: "members4", prefixes: "prefixes4", kind: SetKind::of(&[Datatype::V4, Datatype::V4]) }
        }
        Family::V6 => {
            Sets { members: "members6", prefixes: "prefixes6", kind: SetKind::of(&[Datatype::V6, Datatype::V6]) }
        }
    }
}

/// Whether the table lets the node at `underlay` send from `subnet`; `None` when it doesn't look who sends.
#[must_use]
pub fn may_send(table: &FoundTable, underlay: IpAddr, subnet: Subnet) -> Option<bool> {
    table.chains.contains_key(SENDERS).then_some(())?;
    let sets = sets(Family::of(underlay));
    let has = |set: &str, element: &Element| table.sets.get(set).map(|found| found.elements.contains(element));
    let usual = has(sets.members, &Element::from([Part::Ip(underlay), Part::Ip(subnet.base())]))?;
    let range = Element::range(&[Part::Ip(underlay), Part::Net(subnet)]);
    Some(usual || has(sets.prefixes, &range).unwrap_or_default())
}

/// Whether the table has the rules against tracking. Once there they stay, so that a restart finds nothing to write.
#[must_use]
pub fn has_notrack(table: &FoundTable) -> bool {
    table.chains.contains_key(OUTPUT)
}

/// Holds for packets whose `underlay`, an address, is that of a peer, if one of the two does: each peer is a member with
/// its own address inside. [`add_members`] makes the sets.
pub(super) fn of_a_peer(underlay: Field, family: Family) -> [Match; 2] {
    let Sets { members, prefixes, .. } = sets(family);
    [members, prefixes].map(|set| Match::all_in(&[underlay, underlay], set))
}

/// The sets of who may send.
pub(super) fn add_members(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>, family: Family) {
    let (length, sets) = (usual_length(inputs.own, family), sets(family));
    // The node's own address too: so it answers a pod whose address was not translated on the way.
    let places = of_family(inputs.members, family).flat_map(|member| {
        [member.subnet, Subnet::host(member.underlay)].map(|inside| place(member.underlay, inside, length))
    });
    let (usual, prefixes): (Vec<_>, Vec<_>) = places.partition(|(name, _)| *name == sets.members);
    let table = ruleset.entry(TableKey::Fabric).or_default();
    let order = Order::BeforeChains;
    table.set(sets.members, sets.kind, order, usual.into_iter().map(|(_, element)| element));
    table.set(sets.prefixes, sets.kind.of_ranges(), order, prefixes.into_iter().map(|(_, element)| element));
}

fn of_family(members: &BTreeSet<Member>, family: Family) -> impl Iterator<Item = &Member> {
    members.iter().filter(move |member| Family::of(member.underlay) == family && member.subnet.family() == family)
}

/// Where one pair of addresses goes: an underlay address, and what may come from it inside.
fn place(underlay: IpAddr, inside: Subnet, length: u8) -> (&'static str, Element) {
    let Sets { members, prefixes, .. } = sets(inside.family());
    // An address that could be a subnet's would stand for all of that subnet.
    let is_usual = match inside == Subnet::host(underlay) {
        true => !is_base(underlay, length),
        false => inside.prefix_len() == length,
    };
    match is_usual {
        true => (members, Element::from([Part::Ip(underlay), Part::Ip(inside.base())])),
        false => (prefixes, Element::range(&[Part::Ip(underlay), Part::Net(inside)])),
    }
}

/// Lets members go and come in sets that are made; `remains` tells whether an underlay address still is a member's. This
/// is what [`super::ruleset`] would make of all members, but for the price of a few.
pub fn follow(
    ruleset: &mut Ruleset,
    own: &PerFamily<Subnet>,
    gone: &[Member],
    come: &[Member],
    remains: impl Fn(IpAddr) -> bool,
) {
    let Some(table) = ruleset.get_mut(&TableKey::Fabric) else { return };
    for (members, comes) in [(gone, false), (come, true)] {
        for Member { underlay, subnet } in members.iter().filter(|m| Family::of(m.underlay) == m.subnet.family()) {
            let length = usual_length(own, subnet.family());
            let mut places = vec![place(*underlay, *subnet, length)];
            if comes || !remains(*underlay) {
                places.push(place(*underlay, Subnet::host(*underlay), length));
            }
            for (name, element) in places {
                let Some(set) = table.sets.get_mut(name) else { continue };
                match comes {
                    true => set.elements.insert(element, ()),
                    false => set.elements.remove(&element),
                };
            }
        }
    }
}

/// Packets to our port with our VNI.
fn ours(inputs: &FilterInputs<'_>) -> Vec<Match> {
    let vxlan = &inputs.network.vxlan;
    let mut matches = Match::udp_to(vxlan.port).to_vec();
    matches.push(Match::is(Field::Vni, vxlan.vni.get()));
    matches
}

/// No connections are remembered for encapsulated packets, coming or going: each would cost a look-up, and a table
/// that is full would drop them. Those of other VNIs keep theirs, which their address translation may need. Where the
/// kernel tracks nothing the rule would only cost.
pub(super) fn add_notrack(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>) {
    let table = ruleset.entry(TableKey::Fabric).or_default();
    let rule = Rule::new(ours(inputs), Step::Notrack, "vxlan has no connections");
    table.at("prerouting", ChainKind::Filter, Place::Prerouting, RAW).push(rule.clone());
    table.at(OUTPUT, ChainKind::Filter, Place::Output, RAW).push(rule);
}

/// The sets, and the rules that look into them.
pub(super) fn add(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>) {
    for family in inputs.own.families() {
        add_members(ruleset, inputs, family);
    }
    let table = ruleset.entry(TableKey::Fabric).or_default();
    for family in inputs.own.families() {
        admit(table, inputs, family);
    }
    for family in inputs.own.families() {
        let to_judge = Rule::new(encapsulated(inputs, family), Verdict::Jump(SENDERS.into()), "encapsulated");
        table.at("input", ChainKind::Filter, Place::Input, FILTER).push(to_judge);
        judge(table.called(SENDERS), inputs, family);
    }
    table.called(SENDERS).push(Rule::drop([], "from no peer"));
}

/// The common case: one rule, and in it one look-up, for a packet of a peer's pod.
fn admit(table: &mut Table, inputs: &FilterInputs<'_>, family: Family) {
    let input = table.at("input", ChainKind::Filter, Place::Input, FILTER);
    if family == Family::V6 {
        let mut fragment = vec![Match::family(family), Match::is(Field::Fragment, 1)];
        fragment.extend(Match::udp_to(inputs.network.vxlan.port));
        input.push(Rule::drop(fragment, "fragment of an encapsulated packet"));
    }
    let subnet = Field::InnerSubnet(family, usual_length(inputs.own, family));
    let mut matches = encapsulated(inputs, family);
    matches.push(Match::is(Field::InnerType, ether_type(family)));
    matches.push(Match::all_in(&[Field::Source(family), subnet], sets(family).members));
    input.push(Rule::new(matches, Verdict::Accept, "a peer, from its own subnet"));
}

fn encapsulated(inputs: &FilterInputs<'_>, family: Family) -> Vec<Match> {
    [vec![Match::family(family)], ours(inputs)].concat()
}

/// The length of the peers' subnets: that of our own, as all nodes choose theirs by one config.
fn usual_length(own: &PerFamily<Subnet>, family: Family) -> u8 {
    own.get(family).map_or(family.bits(), |own| own.prefix_len())
}

fn is_base(ip: IpAddr, length: u8) -> bool {
    Subnet::holding(ip, length).is_ok_and(|subnet| subnet.base() == ip)
}

/// What is not from a peer's pod.
fn judge(rules: &mut Chain, inputs: &FilterInputs<'_>, family: Family) {
    let Sets { members, prefixes, .. } = sets(family);
    let (source, inside) = (Field::Source(family), Field::InnerSource(family));
    let outer = Match::family(family);
    let inner = Match::is(Field::InnerType, ether_type(family));
    for (set, why) in [(members, "a peer's node"), (prefixes, "a peer, from a subnet of another length")] {
        let matches = [outer.clone(), inner.clone(), Match::all_in(&[source, inside], set)];
        rules.push(Rule::new(matches, Verdict::Accept, why));
    }
    if family == Family::V6 {
        rules.extend(of_a_peer(source, family).map(|peer| {
            let link_local = Match::new(inside, Test::Within(link_local()));
            Rule::new([outer.clone(), inner.clone(), peer, link_local], Verdict::Accept, "a peer's kernel")
        }));
    }
    let network = inputs.network.spaces.get(family).map(|space| space.network);
    for sender in inputs.options.senders.iter().filter(|sender| sender.family() == family) {
        let mut matches = vec![outer.clone(), inner.clone(), Match::new(source, Test::Within(*sender))];
        matches.extend(network.map(|network| Match::new(inside, Test::Within(network))));
        rules.push(Rule::new(matches, Verdict::Accept, "allowed by --allow-sender"));
    }
    for peer in of_a_peer(source, family) {
        let matches = [outer.clone(), inner.clone(), peer];
        rules.push(Rule::drop(matches, "a peer, but its source is not in the peer's subnet"));
    }
    for peer in of_a_peer(source, family) {
        rules.push(Rule::drop([outer.clone(), peer], "a peer, but inside is something else"));
    }
}

/// What a VTEP's own kernel says to its neighbours (RFC 4291 section 2.5.6). It is never forwarded to a pod.
pub(super) fn link_local() -> Subnet {
    Subnet::holding(std::net::Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0).into(), 10).expect("10 is at most 128")
}
