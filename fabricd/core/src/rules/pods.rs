//! What pods may send: nothing under another's address, no routers' messages, no VXLAN.
//!
//! Twice, since a bridge hands frames between its ports past the host's own hooks. In the host's table the test is by
//! the bridge, and holds from a pod's first packet. In the bridge's table it is by port: a port is known a moment
//! after it is made.

use std::net::Ipv6Addr;

use super::{
    ChainKind, Element, Field, KeyField, Match, Part, Place, Rule, RuleInputs, Ruleset, TableFamily, Test, Verdict,
    ether_type, senders,
};
use crate::model::{Family, Subnet};

const ICMP: u32 = 1;
const ICMPV6: u32 = 58;
/// ICMP types of RFC 792 and RFC 1256, ICMPv6 types of RFC 4861.
const REDIRECT: u32 = 5;
const ADVERTISEMENT: u32 = 9;
const V6_ADVERTISEMENT: u32 = 134;
const V6_REDIRECT: u32 = 137;
/// `ETH_P_ARP`.
const ARP: u32 = 0x0806;

const ROUTERS: &str = "a pod is no router";
const SPOOFED: &str = "a pod's source is not in this node's subnet";

pub(super) fn add(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>) {
    on_the_host(ruleset, inputs);
    on_the_bridge(ruleset, inputs);
}

fn on_the_host(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>) {
    let from_pods = Match::new(Field::InInterface, Test::Named(*inputs.bridge));
    let table = ruleset.entry(TableFamily::Inet).or_default();
    table.at("prerouting", ChainKind::Filter, Place::Prerouting, senders::RAW).push(Rule::new(
        [from_pods.clone()],
        Verdict::Jump("pods"),
        "from a pod",
    ));
    let from = |family, prefix| [Match::family(family), Match::new(Field::Source(family), Test::Within(prefix))];
    let pods = table.called("pods");
    for kind in [V6_ADVERTISEMENT, V6_REDIRECT] {
        pods.push(Rule::drop(
            [Match::family(Family::V6), Match::is(Field::Protocol, ICMPV6), Match::is(Field::IcmpType, kind)],
            ROUTERS,
        ));
    }
    for subnet in inputs.pod_subnets {
        pods.push(Rule::new(from(subnet.family(), *subnet), Verdict::Return, "its own address"));
    }
    pods.push(Rule::new(from(Family::V6, senders::link_local()), Verdict::Return, "neighbour discovery"));
    // While an address is being checked there is none to send from (RFC 4862 section 5.4).
    let mut checking = from(Family::V6, Subnet::host(Ipv6Addr::UNSPECIFIED.into())).to_vec();
    checking.push(Match::is(Field::Protocol, ICMPV6));
    pods.push(Rule::new(checking, Verdict::Return, "neighbour discovery"));
    pods.push(Rule::drop([], SPOOFED));

    // Masqueraded, it would come from a node that the other nodes trust. After every translation of the destination.
    let mut vxlan = vec![from_pods];
    vxlan.extend(Match::udp_to(inputs.network.vxlan.port));
    for (name, place) in [("input", Place::Input), ("forward", Place::Forward)] {
        let rule = Rule::drop(vxlan.clone(), "a pod does not speak VXLAN");
        table.at(name, ChainKind::Filter, place, senders::FILTER).push(rule);
    }
}

fn on_the_bridge(ruleset: &mut Ruleset, inputs: &RuleInputs<'_>) {
    let table = ruleset.entry(TableFamily::Bridge).or_default();
    let ports = inputs.ports.iter().map(|port| Element(vec![Part::Interface(*port)]));
    table.set("ports", &[KeyField::Interface], ports);
    table.at("prerouting", ChainKind::Filter, Place::Prerouting, senders::RAW).push(Rule::new(
        [Match::all_in(&[Field::InInterface], "ports")],
        Verdict::Jump("pods"),
        "from a pod",
    ));
    let pods = table.called("pods");
    let of = |ether_type| Match::is(Field::EtherType, ether_type);
    for (family, protocol, kinds) in
        [(Family::V4, ICMP, [REDIRECT, ADVERTISEMENT]), (Family::V6, ICMPV6, [V6_ADVERTISEMENT, V6_REDIRECT])]
    {
        for kind in kinds {
            pods.push(Rule::drop(
                [of(ether_type(family)), Match::is(Field::Protocol, protocol), Match::is(Field::IcmpType, kind)],
                ROUTERS,
            ));
        }
    }
    for (ether_type, source, family) in [
        (ether_type(Family::V4), Field::Source(Family::V4), Family::V4),
        (ARP, Field::ArpSource, Family::V4),
        (ether_type(Family::V6), Field::Source(Family::V6), Family::V6),
    ] {
        let mut fine: Vec<Subnet> = inputs.pod_subnets.iter().copied().filter(|net| net.family() == family).collect();
        match source {
            // A probe asks for an address from nowhere (RFC 5227 section 1.1).
            Field::ArpSource => fine.push(Subnet::host(std::net::Ipv4Addr::UNSPECIFIED.into())),
            Field::Source(Family::V6) => {
                fine.extend([senders::link_local(), Subnet::host(Ipv6Addr::UNSPECIFIED.into())]);
            }
            _ => {}
        }
        // Outside of all of them.
        let mut matches = vec![of(ether_type)];
        matches.extend(fine.into_iter().map(|net| Match::new(source, Test::Outside(net))));
        pods.push(Rule::drop(matches, SPOOFED));
    }
}
