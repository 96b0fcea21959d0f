//! The packet filter as values: what our tables of nftables hold ([`Ruleset`]), and what is found of them there
//! ([`FoundRuleset`]).
//!
//! A [`Table`] is rules, which hardly ever change, and sets, which change with every peer. The kernel doesn't give rules
//! back in the form in which it got them. So of a chain that is there only lines of text are known: its hook, and each
//! rule's comment, which ends with a number that tells the rule from all others. Elements of sets the kernel does give back.

use std::collections::BTreeMap;

use crate::cow_map::CowSet;
use crate::model::{Family, IfName, MacAddr, Subnet, stable_hash};

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
    pub elements: CowSet<Element>,
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

/// The tables of ours that are there.
pub type FoundRuleset = BTreeMap<TableFamily, FoundTable>;

/// A table of ours that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundTable {
    /// Chains by name: of each the hook, and then the rules' comments.
    pub chains: BTreeMap<String, Vec<String>>,
    /// Sets by name.
    pub sets: BTreeMap<String, FoundSet>,
    /// It has no effect (`flags dormant`), or another program holds it.
    pub disabled: bool,
}

/// A set that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundSet {
    /// Its declaration as `nft` writes it; other words for one that we don't make.
    pub declaration: String,
    /// Its elements.
    pub elements: CowSet<Element>,
}

impl Rule {
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

impl Chain {
    /// Its lines, once it is there.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let hook = self.hook.as_ref().map_or_else(|| NO_HOOK.to_owned(), Hook::to_string);
        [hook].into_iter().chain(self.rules.iter().map(Rule::comment)).collect()
    }
}

/// In the place of a hook, for a chain that rules jump to.
pub const NO_HOOK: &str = "no hook";

impl Set {
    pub(crate) fn found(&self) -> FoundSet {
        FoundSet { declaration: self.declaration(), elements: self.elements.clone() }
    }
}

/// Lets tables that were read share the elements with those that were known before, where they are the same.
pub fn share(read: &mut FoundRuleset, known: &FoundRuleset) {
    for (family, table) in read {
        for (name, set) in &mut table.sets {
            let before = known.get(family).and_then(|table| table.sets.get(name));
            if let Some(before) = before.filter(|before| before.elements == set.elements) {
                set.elements = before.elements.clone();
            }
        }
    }
}

impl Table {
    /// Shares the elements with the sets that are there, where they are the same.
    pub fn share(&mut self, found: &FoundTable) {
        for (name, set) in &mut self.sets {
            if let Some(there) = found.sets.get(*name).filter(|there| there.elements == set.elements) {
                set.elements = there.elements.clone();
            }
        }
    }
}

pub(crate) fn found_chains(chains: &BTreeMap<&'static str, Chain>) -> BTreeMap<String, Vec<String>> {
    chains.iter().map(|(name, chain)| ((*name).to_owned(), chain.lines())).collect()
}

impl Table {
    /// What will be found of it, once it is there.
    #[must_use]
    pub fn found(&self) -> FoundTable {
        let sets = self.sets.iter().map(|(name, set)| ((*name).to_owned(), set.found())).collect();
        FoundTable { chains: found_chains(&self.chains), sets, disabled: false }
    }
}

/// `IPPROTO_UDP`.
pub(crate) const UDP: u32 = 17;

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
