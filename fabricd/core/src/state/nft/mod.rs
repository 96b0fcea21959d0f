//! The packet filter as values: what our tables of nftables hold ([`Ruleset`]), and what is found of them there
//! ([`FoundRuleset`]).
//!
//! A [`Table`] is rules in chains, and sets and maps whose elements change far more often than rules do. The kernel doesn't
//! give rules back in the form in which it got them. So of a chain that is there only lines of text are known: its hook, and
//! each rule's comment, which ends with a number that tells the rule from all others. Elements the kernel does give back.
//!
//! | module | what |
//! |---|---|
//! | [`rule`] | rules as steps that read fields |
//! | [`set`] | sets and maps, and their elements as the kernel packs them |
//! | [`name`] | names of chains and sets |
//! | `text` | all of it in the words of `nft` |

pub mod name;
pub mod rule;
pub mod set;
mod text;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

pub use self::name::Name;
pub(crate) use self::rule::UDP;
pub use self::rule::{
    CtField, Direction, Field, LOCAL, Match, Reject, Rule, Step, Test, Update, Verdict, ct_state, ct_status,
};
pub use self::set::{Data, Datatype, DynamicSet, Element, Fields, Order, Part, Set, SetKind};
use crate::cow_map::CowSet;

/// The chain of our table that looks who sends encapsulated packets; a new VXLAN device needs it.
pub const SENDERS: &str = "senders";

/// Tables as they should be.
pub type Ruleset = BTreeMap<TableKey, Table>;

/// A table of ours. There are no others of its name and family: whoever knows nothing else knows it by these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableKey {
    /// `inet fabric`: who may send encapsulated packets, what pods may send, masquerade.
    Fabric,
    /// `bridge fabric`: what pods may send to each other.
    Bridge,
    /// `inet fabric-services`.
    Services,
    /// `inet fabric-policy`.
    Policy,
    /// `bridge fabric-policy`: only where the table above doesn't see what passes between pods of this node.
    PolicyBridge,
}

/// Tables that are planned together. Those of one section are read, compared and written without the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Section {
    /// What leases, pods and options decide on.
    Filter,
    /// What Services decide on.
    Services,
    /// What network policies decide on.
    Policy,
}

impl Section {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Filter, Self::Services, Self::Policy];
}

/// Which packets a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableFamily {
    /// IPv4 and IPv6, as the host receives, forwards and sends them.
    Inet,
    /// Frames between the ports of a bridge.
    Bridge,
}

impl TableKey {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Fabric, Self::Bridge, Self::Services, Self::Policy, Self::PolicyBridge];

    /// The packets that it sees.
    #[must_use]
    pub const fn family(self) -> TableFamily {
        match self {
            Self::Fabric | Self::Services | Self::Policy => TableFamily::Inet,
            Self::Bridge | Self::PolicyBridge => TableFamily::Bridge,
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fabric | Self::Bridge => "fabric",
            Self::Services => "fabric-services",
            Self::Policy | Self::PolicyBridge => "fabric-policy",
        }
    }

    /// What it is planned with.
    #[must_use]
    pub const fn section(self) -> Section {
        match self {
            Self::Fabric | Self::Bridge => Section::Filter,
            Self::Services => Section::Services,
            Self::Policy | Self::PolicyBridge => Section::Policy,
        }
    }

    /// The table of this family and name, if it is ours.
    #[must_use]
    pub fn of(family: TableFamily, name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|table| table.family() == family && table.name() == name)
    }
}

/// A table: chains by name, sets and maps by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Chains.
    pub chains: BTreeMap<Name, Chain>,
    /// Sets and maps.
    pub sets: BTreeMap<Name, Set>,
}

/// A chain: rules, in order.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    hook: Option<Hook>,
    rules: Vec<Rule>,
    /// Found once, as thousands of chains are compared and few of them change.
    lines: OnceLock<Arc<Vec<String>>>,
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

/// The tables of ours that are there.
pub type FoundRuleset = BTreeMap<TableKey, FoundTable>;

/// A table of ours that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundTable {
    /// Chains by name: of each the hook, and then the rules' comments.
    pub chains: BTreeMap<String, Arc<Vec<String>>>,
    /// Sets and maps by name.
    pub sets: BTreeMap<String, FoundSet>,
    /// It has no effect (`flags dormant`), or another program holds it.
    pub disabled: bool,
}

/// A set or map that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundSet {
    /// How it is declared; `None` for one that we don't make, or with an element that we don't make.
    pub kind: Option<SetKind>,
    /// Its elements; none of a set that packets add to.
    pub elements: CowSet<Element>,
}

/// What a rule's comment says, without its number.
#[must_use]
pub fn reason(comment: &str) -> Option<&str> {
    comment.rsplit_once(" [").map(|(why, _)| why)
}

/// In the place of a hook, for a chain that rules jump to.
pub const NO_HOOK: &str = "no hook";

impl Chain {
    /// A chain that packets enter at a hook, or that rules jump to. The policy is always accept.
    #[must_use]
    pub fn new(hook: Option<Hook>, rules: impl IntoIterator<Item = Rule>) -> Self {
        Self { hook, rules: rules.into_iter().collect(), lines: OnceLock::new() }
    }

    /// Where packets enter it; none for one that rules jump to.
    #[must_use]
    pub fn hook(&self) -> Option<Hook> {
        self.hook
    }

    /// Its rules, in order.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Adds a rule at its end.
    pub fn push(&mut self, rule: Rule) {
        self.lines.take();
        self.rules.push(rule);
    }

    /// Its lines, once it is there.
    pub fn lines(&self) -> &Arc<Vec<String>> {
        self.lines.get_or_init(|| {
            let hook = self.hook.as_ref().map_or_else(|| NO_HOOK.to_owned(), Hook::to_string);
            Arc::new([hook].into_iter().chain(self.rules.iter().map(Rule::comment)).collect())
        })
    }
}

impl Extend<Rule> for Chain {
    fn extend<I: IntoIterator<Item = Rule>>(&mut self, rules: I) {
        rules.into_iter().for_each(|rule| self.push(rule));
    }
}

impl PartialEq for Chain {
    fn eq(&self, other: &Self) -> bool {
        (self.hook, &self.rules) == (other.hook, &other.rules)
    }
}

impl Eq for Chain {}

impl Set {
    pub(crate) fn found(&self) -> FoundSet {
        FoundSet { kind: Some(self.kind), elements: self.elements.clone() }
    }
}

impl FoundTable {
    /// Shares the elements with what was known before, where they are the same.
    pub fn share(&mut self, known: &Self) {
        for (name, set) in &mut self.sets {
            if let Some(before) = known.sets.get(name).filter(|before| before.elements == set.elements) {
                set.elements = before.elements.clone();
            }
        }
    }
}

impl Table {
    /// The chain of this name that packets enter at `place`.
    pub fn at(&mut self, name: impl Into<Name>, kind: ChainKind, place: Place, priority: i32) -> &mut Chain {
        let chain = self.chains.entry(name.into()).or_default();
        chain.lines.take();
        chain.hook = Some(Hook { kind, place, priority });
        chain
    }

    /// The chain of this name that rules jump to.
    pub fn called(&mut self, name: impl Into<Name>) -> &mut Chain {
        self.chains.entry(name.into()).or_default()
    }

    /// A set or map of this name, with these elements.
    pub fn set(
        &mut self,
        name: impl Into<Name>,
        kind: SetKind,
        order: Order,
        elements: impl IntoIterator<Item = Element>,
    ) {
        self.sets.insert(name.into(), Set { kind, order, elements: elements.into_iter().collect() });
    }

    /// Shares the elements with the sets that are there, where they are the same.
    pub fn share(&mut self, found: &FoundTable) {
        for (name, set) in &mut self.sets {
            if let Some(there) = found.sets.get(name.as_str()).filter(|there| there.elements == set.elements) {
                set.elements = there.elements.clone();
            }
        }
    }

    /// What will be found of it, once it is there.
    #[must_use]
    pub fn found(&self) -> FoundTable {
        let sets = self.sets.iter().map(|(name, set)| (name.to_string(), set.found())).collect();
        let chains = self.chains.iter().map(|(name, chain)| (name.to_string(), Arc::clone(chain.lines()))).collect();
        FoundTable { chains, sets, disabled: false }
    }
}
