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

use std::net::IpAddr;

use super::change::FoundTable;
use super::{
    ChainKind, Element, Field, KeyField, Match, Member, Part, Place, Rule, RuleInputs, Ruleset, Test, Verdict,
    ether_type,
};
use crate::model::{Family, Subnet};

/// Before connections are tracked: `NF_IP_PRI_RAW`.
pub(super) const RAW: i32 = -300;
/// `NF_IP_PRI_FILTER`.
pub(super) const FILTER: i32 = 0;

/// The sets of one family.
struct Sets {
    /// Who may send what.
    members: &'static str,
    /// The same, where it doesn't fit there.
    odd: &'static str,
    /// Who may send at all.
    peers: &'static str,
    key: &'static [KeyField],
}

const fn sets(family: Family) -> Sets {
    match family {
        Family::V4 => Sets { members: "members4", odd: "odd4", peers: "peers4", key: &[KeyField::V4, KeyField::V4] },
        Family::V6 => Sets { members: "members6", odd: "odd6", peers: "peers6", key: &[KeyField::V6, KeyField::V6] },
    }
}

/// Whether the table lets the node at `underlay` send from `subnet`; `None` when it doesn't look who sends.
#[must_use]
pub fn may_send(table: &FoundTable, underlay: IpAddr, subnet: Subnet) -> Option<bool> {
    let sets = sets(Family::of(underlay));
    let has = |set: &str, inside: Subnet| {
        let element = Element(vec![Part::Net(Subnet::host(underlay)), Part::Net(inside)]);
        table.sets.get(set).map(|found| found.elements.contains(&element))
    };
    let usual = has(sets.members, Subnet::host(subnet.base()))?;
    Some(usual || has(sets.odd, subnet).unwrap_or_default())
}

/// The set of the peers' underlay addresses, for whoever wants to know them.
pub(super) fn peers(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>, family: Family) -> &'static str {
    let Sets { peers: name, key, .. } = sets(family);
    let peers = of_family(inputs, family).map(|member| Element(vec![Part::Net(Subnet::host(member.underlay))]));
    ruleset.entry(super::TableFamily::Inet).or_default().set(name, &key[..1], peers);
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
        let (length, sets) = (usual_length(inputs, *family), sets(*family));
        // The node's own address too: so it answers a pod whose address was not translated on the way.
        let pairs = of_family(inputs, *family)
            .flat_map(|member| [member.subnet, Subnet::host(member.underlay)].map(|inside| (member.underlay, inside)));
        let (usual, odd): (Vec<_>, Vec<_>) = pairs.partition(|(underlay, inside)| {
            // An address that could be a subnet's would stand for all of that subnet.
            if *inside == Subnet::host(*underlay) { !is_base(*underlay, length) } else { inside.prefix_len() == length }
        });
        let element =
            |(from, inside): (IpAddr, Subnet)| Element(vec![Part::Net(Subnet::host(from)), Part::Net(inside)]);
        let base = |(from, inside): (IpAddr, Subnet)| element((from, Subnet::host(inside.base())));
        table.set(sets.members, sets.key, usual.into_iter().map(base));
        table.ranges(sets.odd, sets.key, odd.into_iter().map(element));
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

/// The length of the peers' subnets: that of our own, as all nodes choose theirs by one config.
fn usual_length(inputs: &RuleInputs<'_>, family: Family) -> u8 {
    inputs.own.get(family).map_or(family.bits(), |own| own.prefix_len())
}

fn is_base(ip: IpAddr, length: u8) -> bool {
    Subnet::holding(ip, length).is_ok_and(|subnet| subnet.base() == ip)
}

/// The common case first: one look-up for a packet of a peer's pod.
fn judge(rules: &mut Vec<Rule>, inputs: &RuleInputs<'_>, family: Family) {
    let Sets { members, odd, peers, .. } = sets(family);
    let (source, inside) = (Field::Source(family), Field::InnerSource(family));
    let subnet = Field::InnerSubnet(family, usual_length(inputs, family));
    let outer = Match::family(family);
    let inner = Match::is(Field::InnerType, ether_type(family));
    let of_a_peer = Match::all_in(&[source], peers);
    for (fields, set, why) in [
        ([source, subnet], members, "a peer, from its own subnet"),
        ([source, inside], members, "a peer's node"),
        ([source, inside], odd, "a peer, from a subnet of another length"),
    ] {
        let matches = [outer.clone(), inner.clone(), Match::all_in(&fields, set)];
        rules.push(Rule::new(matches, Verdict::Accept, why));
    }
    if family == Family::V6 {
        let link_local = Match::new(inside, Test::Within(link_local()));
        let matches = [outer.clone(), inner.clone(), of_a_peer.clone(), link_local];
        rules.push(Rule::new(matches, Verdict::Accept, "a peer's kernel"));
    }
    let network = inputs.network.spaces.get(family).map(|space| space.network);
    for sender in inputs.options.senders.iter().filter(|sender| sender.family() == family) {
        let mut matches = vec![outer.clone(), inner.clone(), Match::new(source, Test::Within(*sender))];
        matches.extend(network.map(|network| Match::new(inside, Test::Within(network))));
        rules.push(Rule::new(matches, Verdict::Accept, "allowed by --allow-sender"));
    }
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
