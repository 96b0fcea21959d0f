//! The packet filter: what our tables of nftables hold, as values.
//!
//! ```text
//! RuleInputs ──> ruleset() ──> Ruleset ──> change() ──> Change ──> kernel, in one transaction
//!                              Found (what is there) ──────┘
//! ```
//!
//! A [`Table`] is rules, which hardly ever change, and sets, which change with every peer. So a table whose rules
//! are as wanted gets single elements, and any other is replaced as a whole. [`change`](change::change) tells which.
//!
//! | module | whose packets it judges |
//! |---|---|
//! | [`senders`] | those that come encapsulated from other nodes |
//! | [`pods`] | those that come from this node's pods |
//! | [`masquerade`] | those that leave the network |
//! | [`door`] | those that a chain of others would drop |

pub mod change;
pub mod door;
pub mod masquerade;
pub mod pods;
pub mod senders;
#[cfg(test)]
mod tests;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::model::{Family, IfName, MacAddr, PerFamily, Subnet, stable_hash};
use crate::network::NetworkConfig;

/// What every table of ours is called, and none of anybody else's.
pub const TABLE: &str = "fabric";

/// All tables.
pub type Ruleset = BTreeMap<TableFamily, Table>;

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4 and IPv6, as the host receives, forwards and sends them.
    Inet,
    /// Frames between the ports of a bridge.
    Bridge,
}

/// A table: chains by name, sets by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Chains.
    pub chains: BTreeMap<&'static str, Chain>,
    /// Sets.
    pub sets: BTreeMap<&'static str, Set>,
}

/// A chain: rules, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Where packets enter it; none for one that rules jump to. The policy is always accept.
    pub hook: Option<Hook>,
    /// The rules.
    pub rules: Vec<Rule>,
}

/// Where packets enter a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// Filter or NAT.
    pub kind: ChainKind,
    /// The place on a packet's way.
    pub place: Place,
    /// The order among the chains of that place; what is lower comes first.
    pub priority: i32,
}

/// What a chain may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainKind {
    /// Look and judge.
    Filter,
    /// Translate addresses: sees the first packet of a connection alone.
    Nat,
}

/// A hook of netfilter. The numbers are the kernel's (`NF_INET_*`, `NF_BR_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Whatever comes in.
    Prerouting = 0,
    /// What is for this host.
    Input = 1,
    /// What passes through.
    Forward = 2,
    /// What this host sends.
    Output = 3,
    /// Whatever goes out.
    Postrouting = 4,
}

/// A rule: what it is about, and what then happens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// All must hold.
    pub matches: Vec<Match>,
    /// Whether packets that get here are counted.
    pub counted: bool,
    /// What happens to them.
    pub verdict: Verdict,
    /// Why, in a few words: the rule's comment.
    pub why: &'static str,
}

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may pass this chain.
    Accept,
    /// It is thrown away.
    Drop,
    /// It goes back to where the chain was entered.
    Return,
    /// It goes to this chain.
    Jump(&'static str),
    /// It gets the host's address, and a random port.
    Masquerade,
    /// No connection is remembered for it.
    Notrack,
}

/// A condition on one field of a packet, or on several together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// What is looked at.
    pub fields: Vec<Field>,
    /// What it must be.
    pub test: Test,
}

/// Something that can be read off a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// The interface that it came in by.
    InInterface,
    /// Its mark.
    Mark,
    /// Its address family, in a table that sees both.
    NetworkFamily,
    /// Its Ethernet type, in a table that sees frames.
    EtherType,
    /// The Ethernet address that it claims to come from.
    SourceMac,
    /// The address that an ARP message claims.
    ArpSource,
    /// The address that a neighbour advertisement claims (RFC 4861 section 4.4).
    AdvertisedAddress,
    /// TCP, UDP, …: for IPv6 the protocol behind all extension headers.
    Protocol,
    /// Whether it is a fragment of an IPv6 packet.
    Fragment,
    /// Source address.
    Source(Family),
    /// Destination address.
    Target(Family),
    /// Destination port.
    TargetPort,
    /// Type of an ICMP message.
    IcmpType,
    /// VNI of a VXLAN packet (RFC 7348 section 5: the UDP header, then four bytes of flags).
    Vni,
    /// Ethernet type of the packet inside.
    InnerType,
    /// Source address of the packet inside.
    InnerSource(Family),
    /// The first so many bits of it, and zeros.
    InnerSubnet(Family, u8),
}

/// What a field must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Test {
    /// This number.
    Is(u32),
    /// This name.
    Named(IfName),
    /// Any other number.
    IsNot(u32),
    /// A number with all these bits.
    Bits(u32),
    /// An address of this prefix.
    Within(Subnet),
    /// An address beyond this prefix.
    Outside(Subnet),
    /// In this set, all fields together.
    In(&'static str),
}

/// A set that rules look into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set {
    /// What an element is made of.
    pub key: &'static [KeyField],
    /// Whether elements are ranges; only of two fields and more.
    pub ranges: bool,
    /// The elements. What is there shares them with what is wanted once it is written, so that thousands are neither kept
    /// nor compared twice.
    pub elements: Arc<BTreeSet<Element>>,
}

/// One field of a set's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyField {
    /// IPv4 address.
    V4,
    /// IPv6 address.
    V6,
    /// Name of an interface.
    Interface,
    /// Ethernet address.
    Mac,
}

/// An element of a set: a part for each field of the key, three at most. It is of one piece, as there are thousands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Element([Option<Part>; 3]);

/// One part of an element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// Addresses; one alone is a prefix of full length.
    Net(Subnet),
    /// An interface.
    Interface(IfName),
    /// An Ethernet address.
    Mac(MacAddr),
}

/// What a node wants its filter to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleOptions {
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

impl Default for RuleOptions {
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
pub struct RuleInputs<'a> {
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
    pub options: &'a RuleOptions,
}

/// What the filter should hold. Every packet between pods passes these chains, on both nodes, so what most packets are is
/// asked first, in one rule.
#[must_use]
pub fn ruleset(inputs: &RuleInputs<'_>) -> Ruleset {
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

/// `IPPROTO_UDP`.
const UDP: u32 = 17;
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

    /// Its comment in the kernel. The number changes with the rule, and so tells whether the one that is there is this.
    #[must_use]
    pub fn comment(&self) -> String {
        format!("{} [{:08x}]", self.why, stable_hash(self.to_string().as_bytes()) >> 32)
    }
}

/// What a rule's comment says, without its number.
#[must_use]
pub fn reason(comment: &str) -> Option<&str> {
    comment.rsplit_once(" [").map(|(why, _)| why)
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
        self.sets.insert(name, Set { key, ranges: false, elements: Arc::new(elements.into_iter().collect()) });
    }

    /// The same for prefixes, of a few only: the kernel goes through all of them for each packet, and for each change.
    fn ranges(&mut self, name: &'static str, key: &'static [KeyField], elements: impl IntoIterator<Item = Element>) {
        self.sets.insert(name, Set { key, ranges: true, elements: Arc::new(elements.into_iter().collect()) });
    }
}

impl Element {
    /// Its parts.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        self.0.into_iter().flatten()
    }
}

impl FromIterator<Part> for Element {
    fn from_iter<I: IntoIterator<Item = Part>>(parts: I) -> Self {
        let mut parts = parts.into_iter();
        Self(std::array::from_fn(|_| parts.next()))
    }
}

impl<const N: usize> From<[Part; N]> for Element {
    fn from(parts: [Part; N]) -> Self {
        const { assert!(N <= 3, "a key has three fields at most") }
        parts.into_iter().collect()
    }
}
