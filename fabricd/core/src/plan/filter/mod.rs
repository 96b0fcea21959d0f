//! What the packet filter should hold.
//!
//! | module | whose packets it judges |
//! |---|---|
//! | [`senders`] | those that come encapsulated from other nodes |
//! | [`pods`] | those that come from this node's pods |
//! | [`masquerade`] | those that leave the network |
//! | [`docker_user`] | those that a chain of others would drop |

pub mod docker_user;
pub mod masquerade;
pub mod pods;
pub mod senders;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use crate::model::{Family, IfName, MacAddr, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::state::nft::{
    ChainKind, Element, Field, Hook, KeyField, Match, Part, Place, Rule, Ruleset, Set, Table, TableFamily, Test, UDP,
    Verdict,
};

/// What a node wants its filter to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterOptions {
    /// Give packets that leave the network the node's address.
    pub masquerade: bool,
    /// Destinations beyond the network that see the pods' own addresses all the same.
    pub no_masquerade_to: Vec<Subnet>,
    /// … and the other nodes are such destinations.
    pub no_masquerade_to_nodes: bool,
    /// Decapsulate only what comes from a peer, with a source in that peer's subnet.
    pub check_senders: bool,
    /// Underlay addresses besides the peers' that may send, with any source of the network.
    pub senders: Vec<Subnet>,
    /// Remember no connections for encapsulated packets, where connections are remembered at all.
    pub notrack: bool,
    /// Let pods use no addresses but their own, send no router advertisements, and not speak VXLAN.
    pub check_pods: bool,
    /// Let the pods' packets through by rules in Docker's chain for rules of others, DOCKER-USER.
    pub docker_user_rules: bool,
}

impl Default for FilterOptions {
    fn default() -> Self {
        Self {
            masquerade: false,
            no_masquerade_to: vec![],
            no_masquerade_to_nodes: false,
            check_senders: true,
            senders: vec![],
            notrack: true,
            check_pods: true,
            docker_user_rules: true,
        }
    }
}

/// A node that may send encapsulated packets, and the addresses that they may come from inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its subnet, which holds its VTEP's address too.
    pub subnet: Subnet,
}

impl Member {
    /// What is before all members of an underlay address, in their order.
    #[must_use]
    pub fn first_of(underlay: IpAddr) -> Self {
        Self { underlay, subnet: Subnet::holding(Ipv4Addr::UNSPECIFIED.into(), 0).expect("0 is at most 32") }
    }
}

/// A pod of this node: what it may send from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The MAC address of its interface.
    pub mac: MacAddr,
    /// Its addresses.
    pub ips: BTreeSet<IpAddr>,
}

/// All that decides what the filter should hold.
#[derive(Clone, Debug)]
pub struct FilterInputs<'a> {
    /// The cluster's config.
    pub network: &'a NetworkConfig,
    /// The subnets that this node holds.
    pub own: &'a PerFamily<Subnet>,
    /// Who may send to it.
    pub members: &'a BTreeSet<Member>,
    /// The bridges of the pods.
    pub bridges: &'a BTreeSet<IfName>,
    /// Their ports.
    pub ports: &'a BTreeSet<IfName>,
    /// The pods, as far as it is known which are behind these ports.
    pub pods: &'a BTreeMap<IfName, Pod>,
    /// Prefixes that the pods have their addresses from: this node's subnets, and earlier ones that pods still use.
    pub pod_subnets: &'a BTreeSet<Subnet>,
    /// Whether the kernel tracks connections here, on whosever behalf.
    pub tracked: bool,
    /// What is wanted.
    pub options: &'a FilterOptions,
}

/// What the filter should hold. Every packet between pods passes these chains, on both nodes, so what most packets are is
/// asked first, in one rule.
#[must_use]
pub fn ruleset(inputs: &FilterInputs<'_>) -> Ruleset {
    let mut ruleset = Ruleset::new();
    // First, or a pod that takes a peer's address would be let in as that peer.
    if inputs.options.check_pods {
        pods::add(&mut ruleset, inputs);
    }
    if inputs.options.check_senders {
        senders::add(&mut ruleset, inputs);
    }
    if inputs.options.notrack && (inputs.tracked || inputs.options.masquerade) {
        senders::add_notrack(&mut ruleset, inputs);
    }
    if inputs.options.masquerade {
        masquerade::add(&mut ruleset, inputs);
    }
    ruleset
}

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
const fn nfproto(family: Family) -> u32 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}
/// `ETH_P_IP`, `ETH_P_IPV6`.
const fn ether_type(family: Family) -> u32 {
    match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    }
}

impl Match {
    fn new(field: Field, test: Test) -> Self {
        Self { fields: vec![field], test }
    }

    fn is(field: Field, number: u32) -> Self {
        Self::new(field, Test::Is(number))
    }

    fn family(family: Family) -> Self {
        Self::is(Field::NetworkFamily, nfproto(family))
    }

    /// Together, in this set.
    fn all_in(fields: &[Field], set: &'static str) -> Self {
        Self { fields: fields.to_vec(), test: Test::In(set) }
    }

    /// UDP to this port.
    fn udp_to(port: u16) -> [Self; 2] {
        [Self::is(Field::Protocol, UDP), Self::is(Field::TargetPort, port.into())]
    }
}

impl Rule {
    fn new(matches: impl Into<Vec<Match>>, verdict: Verdict, why: &'static str) -> Self {
        Self { matches: matches.into(), counted: false, verdict, why }
    }

    /// A rule that drops, and counts what it drops.
    fn drop(matches: impl Into<Vec<Match>>, why: &'static str) -> Self {
        Self { counted: true, ..Self::new(matches, Verdict::Drop, why) }
    }
}

impl Table {
    /// The chain of this name that packets enter at `place`.
    fn at(&mut self, name: &'static str, kind: ChainKind, place: Place, priority: i32) -> &mut Vec<Rule> {
        let chain = self.chains.entry(name).or_default();
        chain.hook = Some(Hook { kind, place, priority });
        &mut chain.rules
    }

    /// The chain of this name that rules jump to.
    fn called(&mut self, name: &'static str) -> &mut Vec<Rule> {
        &mut self.chains.entry(name).or_default().rules
    }

    /// A set of this name, with these elements. Looking into it costs the same however many there are.
    fn set(&mut self, name: &'static str, key: &'static [KeyField], elements: impl IntoIterator<Item = Element>) {
        self.sets.insert(name, Set { key, ranges: false, elements: elements.into_iter().collect() });
    }

    /// The same for prefixes, of a few only: the kernel goes through all of them for each packet, and for each change.
    fn ranges(&mut self, name: &'static str, key: &'static [KeyField], elements: impl IntoIterator<Item = Element>) {
        self.sets.insert(name, Set { key, ranges: true, elements: elements.into_iter().collect() });
    }
}
