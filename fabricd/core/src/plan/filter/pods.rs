//! What pods may send: nothing under another's address, no routers' messages, no VXLAN.
//!
//! Twice, since a bridge hands frames between its ports past the host's own hooks. In the host's table the test is by
//! the bridge, and holds from a pod's first packet: on input and forward, since a chain on prerouting would be entered
//! by every encapsulated packet too, twice. In the bridge's table it is by port: a port is known a moment after it is
//! made, and whose it is a moment later, when the CNI plugin has saved it. From then on only the pod's own MAC address
//! and addresses pass there; until then, all of this node. Frames with VLAN tags don't pass between ports at all.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::{FilterInputs, Pod, ether_type, senders};
use crate::model::{Family, IfName, Subnet};
use crate::state::nft::{
    Chain, ChainKind, Datatype, Element, Field, Match, Order, Part, Place, Rule, Ruleset, SetKind, TableKey, Test,
    Verdict,
};

const ICMP: u32 = 1;
const ICMPV6: u32 = 58;
/// ICMP types of RFC 792 and RFC 1256, ICMPv6 types of RFC 4861.
const REDIRECT: u32 = 5;
const ADVERTISEMENT: u32 = 9;
const V6_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const V6_REDIRECT: u32 = 137;
/// `ETH_P_ARP`.
const ARP: u32 = 0x0806;

/// Sets of ports.
const PORTS: SetKind = SetKind::of(&[Datatype::Interface]);

/// `ETH_P_8021Q`, `ETH_P_8021AD`.
const TAGS: [u32; 2] = [0x8100, 0x88a8];

const ROUTERS: &str = "a pod is no router";
const SPOOFED: &str = "a pod's source is not in this node's subnet";
const FORGED: &str = "a pod claims an address that is not its own";
const TAGGED: &str = "pods send each other no VLAN tags";

pub(super) fn add(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>) {
    on_the_host(ruleset, inputs);
    on_the_bridge(ruleset, inputs);
}

fn on_the_host(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>) {
    let table = ruleset.entry(TableKey::Fabric).or_default();
    let pods = table.called("pods");
    // Masqueraded, it would come from a node that the other nodes trust. After every translation of the destination.
    pods.push(Rule::drop(Match::udp_to(inputs.network.vxlan.port), "a pod does not speak VXLAN"));
    let from = |family, prefix| [Match::family(family), Match::new(Field::Source(family), Test::Within(prefix))];
    let own = |family| {
        let of_family = inputs.pod_subnets.iter().filter(move |subnet| subnet.family() == family);
        of_family.map(move |subnet| Rule::new(from(family, *subnet), Verdict::Accept, "its own address"))
    };
    pods.extend(own(Family::V4));
    for kind in [V6_ADVERTISEMENT, V6_REDIRECT] {
        pods.push(Rule::drop(
            [Match::family(Family::V6), Match::is(Field::Protocol, ICMPV6), Match::is(Field::IcmpType, kind)],
            ROUTERS,
        ));
    }
    pods.extend(own(Family::V6));
    pods.push(Rule::new(from(Family::V6, senders::link_local()), Verdict::Accept, "neighbour discovery"));
    // While an address is being checked there is none to send from (RFC 4862 section 5.4).
    let mut checking = from(Family::V6, Subnet::host(Ipv6Addr::UNSPECIFIED.into())).to_vec();
    checking.push(Match::is(Field::Protocol, ICMPV6));
    pods.push(Rule::new(checking, Verdict::Accept, "neighbour discovery"));
    pods.push(Rule::drop([], SPOOFED));

    for (name, place) in [("input", Place::Input), ("forward", Place::Forward)] {
        let from = |bridge: &IfName| Match::new(Field::InInterface, Test::Named(*bridge));
        let rules =
            inputs.bridges.iter().map(|bridge| Rule::new([from(bridge)], Verdict::Jump("pods".into()), "from a pod"));
        table.at(name, ChainKind::Filter, place, senders::FILTER).extend(rules);
    }
}

fn on_the_bridge(ruleset: &mut Ruleset, inputs: &FilterInputs<'_>) {
    let table = ruleset.entry(TableKey::Bridge).or_default();
    let port = |port: &IfName| Element::from([Part::Interface(*port)]);
    table.set("ports", PORTS, Order::BeforeChains, inputs.ports.iter().map(port));
    let known: Vec<(&IfName, &Pod)> = inputs.pods.iter().filter(|(port, _)| inputs.ports.contains(port)).collect();
    table.set("known", PORTS, Order::BeforeChains, known.iter().map(|(name, _)| port(name)));
    for family in Family::ALL {
        let (set, kind) = own_addresses(family);
        let of_pod = |(port, pod): &(&IfName, &Pod)| {
            let of_family = pod.ips.iter().filter(move |ip| Family::of(**ip) == family);
            let (port, mac) = (Part::Interface(**port), Part::Mac(pod.mac));
            of_family.map(|ip| Element::from([port, mac, Part::Ip(*ip)])).collect::<Vec<_>>()
        };
        table.set(set, kind, Order::BeforeChains, known.iter().flat_map(of_pod));
    }
    let prerouting = table.at("prerouting", ChainKind::Filter, Place::Prerouting, senders::RAW);
    for (family, protocol) in [(Family::V4, ICMP), (Family::V6, ICMPV6)] {
        let mut matches = vec![of(ether_type(family)), Match::new(Field::Protocol, Test::IsNot(protocol))];
        matches.push(its_own(Field::Source(family), family));
        prerouting.push(Rule::new(matches, Verdict::Accept, "its own address"));
    }
    prerouting.push(Rule::new(
        [Match::all_in(&[Field::InInterface], "ports")],
        Verdict::Jump("pods".into()),
        "from a pod",
    ));
    // What has a tag goes past the host's hooks (`bridge-nf-filter-vlan-tagged`, and two tags whatever that says), and who
    // gets a tag of VLAN 0 takes the packet behind it.
    let forward = table.at("forward", ChainKind::Filter, Place::Forward, senders::FILTER);
    for tag in TAGS {
        for port in [Field::InInterface, Field::OutInterface] {
            forward.push(Rule::drop([Match::is(Field::FrameType, tag), Match::all_in(&[port], "ports")], TAGGED));
        }
    }
    let pods = table.called("pods");
    for (family, protocol, kinds) in
        [(Family::V4, ICMP, [REDIRECT, ADVERTISEMENT]), (Family::V6, ICMPV6, [V6_ADVERTISEMENT, V6_REDIRECT])]
    {
        for kind in kinds {
            pods.push(Rule::drop(message(family, protocol, kind), ROUTERS));
        }
    }
    let advertisement = message(Family::V6, ICMPV6, NEIGHBOUR_ADVERTISEMENT);
    pods.push(Rule::new(advertisement, Verdict::Jump("advertised".into()), "it says where an address is"));
    judge(pods, inputs, &[of(ether_type(Family::V4))], Field::Source(Family::V4), Family::V4);
    judge(pods, inputs, &[of(ARP)], Field::ArpSource, Family::V4);
    judge(pods, inputs, &[of(ether_type(Family::V6))], Field::Source(Family::V6), Family::V6);
    judge(table.called("advertised"), inputs, &[], Field::AdvertisedAddress, Family::V6);
}

/// Of such a frame a known pod may claim its own addresses in `source`, any other every address of this node.
fn judge(rules: &mut Chain, inputs: &FilterInputs<'_>, frame: &[Match], source: Field, family: Family) {
    let and = |matches: &[Match]| [frame, matches].concat();
    rules.push(Rule::new(and(&[its_own(source, family)]), Verdict::Return, "its own address"));
    for net in of_nobody(source) {
        rules.push(Rule::new(and(&[Match::new(source, Test::Within(net))]), Verdict::Return, "no pod's address"));
    }
    rules.push(Rule::drop(and(&[Match::all_in(&[Field::InInterface], "known")]), FORGED));
    // Outside of all of them.
    let nets = inputs.pod_subnets.iter().filter(|net| net.family() == family);
    let outside: Vec<Match> = nets.map(|net| Match::new(source, Test::Outside(*net))).collect();
    rules.push(Rule::drop(and(&outside), SPOOFED));
}

/// What is in `source` is an address of the known pod that has this port and this MAC address.
fn its_own(source: Field, family: Family) -> Match {
    Match::all_in(&[Field::InInterface, Field::SourceMac, source], own_addresses(family).0)
}

/// Addresses that are no pod's in particular.
fn of_nobody(source: Field) -> Vec<Subnet> {
    match source {
        // A probe asks for an address from nowhere (RFC 5227 section 1.1).
        Field::ArpSource => vec![Subnet::host(Ipv4Addr::UNSPECIFIED.into())],
        Field::AdvertisedAddress => vec![senders::link_local()],
        Field::Source(Family::V6) => vec![senders::link_local(), Subnet::host(Ipv6Addr::UNSPECIFIED.into())],
        _ => vec![],
    }
}

/// The set of the pods' own addresses, and its declaration.
const fn own_addresses(family: Family) -> (&'static str, SetKind) {
    match family {
        Family::V4 => ("pods4", SetKind::of(&[Datatype::Interface, Datatype::Mac, Datatype::V4])),
        Family::V6 => ("pods6", SetKind::of(&[Datatype::Interface, Datatype::Mac, Datatype::V6])),
    }
}

fn of(ether_type: u32) -> Match {
    Match::is(Field::EtherType, ether_type)
}

/// A message of ICMP in a frame.
fn message(family: Family, protocol: u32, kind: u32) -> [Match; 3] {
    [of(ether_type(family)), Match::is(Field::Protocol, protocol), Match::is(Field::IcmpType, kind)]
}
