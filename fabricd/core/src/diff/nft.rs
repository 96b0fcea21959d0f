//! The steps to our tables of nftables.
//!
//! What differs is compared chain by chain and element by element: a chain that changes leaves all others as they are, with
//! their counters, and an element that changes leaves all rules. Whatever somebody else adds, changes or takes away in a
//! chain makes other lines of text, and then this chain is replaced.
//!
//! Data comes before what leads to it, and goes after it. So there are stages, each in transactions of its own:
//!
//! ```text
//! Sets      sets and maps; elements of Order::BeforeChains; those of Order::AroundChains that come
//! Chains    chains that are missing or differ, around the sets that serve; sets that are declared in another way
//! Verdicts  elements of verdict maps that come or change
//! Entries   elements of Order::AfterChains, which lead to all that was written before
//! ElementsGo   elements of Order::AroundChains and of verdict maps that go
//! ChainsGo     chains and sets that nobody wants
//! ```
//!
//! Sets and chains in one transaction would lose packets, since the kernel shows new rules to packets a moment before it
//! fills the new sets that these rules look into (`nf_tables_commit` moves the generation on first, and
//! `nft_set_commit_update` is last). An element whose data changes goes and comes in one transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::docker_user::DockerUserChange;
use super::{Key, Stage, Verb};
use crate::cow_map::CowSet;
use crate::model::Family;
use crate::state::nft::SENDERS;
use crate::state::nft::{
    Chain, Data, Element, FoundRuleset, FoundSet, FoundTable, Name, Order, Ruleset, Section, Set, SetKind, Table,
    TableKey,
};

/// How many elements or chains a line shows.
const SHOWN: usize = 8;

/// One write to the packet filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A table that has no effect goes, with all that is in it, so that it can be made anew.
    ResetTable(TableKey),
    /// A table goes, with all that is in it.
    DeleteTable(TableKey),
    /// A set or map comes, with the elements that don't wait for chains.
    Set(TableKey, Name, Set),
    /// Elements of a set or map come and go.
    Elements(ElementChange),
    /// Chains are made, each in the place of the one that is there.
    Chains(TableKey, ChainsChange),
    /// Chains and sets go that nobody wants.
    Remove(TableKey, Removal),
    /// Our rules in Docker's chain for rules of others.
    DockerUser(DockerUserChange),
}

/// What is to be written to one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementChange {
    /// Its table.
    pub table: TableKey,
    /// Its name.
    pub set: Name,
    /// Its declaration.
    pub kind: SetKind,
    /// When it is taken.
    pub stage: Stage,
    /// Elements that go, ordered; they go first. One whose data changes goes, and comes in the same transaction.
    pub removed: Vec<Element>,
    /// Elements that come, ordered.
    pub added: Vec<Element>,
    /// All that are there then.
    pub then: CowSet<Element>,
    /// What must be right before.
    pub after: Vec<Key>,
}

/// Chains of one table, in the place of those that are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainsChange {
    /// Chains that come.
    pub chains: BTreeMap<Name, Chain>,
    /// Those of them that are there with other rules: the rules go first.
    pub there: BTreeSet<Name>,
    /// Those of them that are there with another hook: they go first, and are made anew.
    pub moved: BTreeSet<Name>,
    /// Sets that go, as they are declared in another way, and come again as they should be, with all elements.
    pub sets: BTreeMap<Name, Set>,
    /// Chains that nobody wants, whose rules go already now, since they may look into such a set.
    pub emptied: BTreeSet<String>,
    /// Sets that stay, or were made before.
    pub looks_into: Vec<Name>,
    /// None of the table's chains was there.
    pub from_nothing: bool,
    /// The table has the chain that judges who may send: devices wait for it until all of this is right.
    pub judges_senders: bool,
}

/// Chains and sets of one table that go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Removal {
    /// Chains, with their rules.
    pub chains: BTreeSet<String>,
    /// Sets and maps, with their elements.
    pub sets: BTreeSet<String>,
    /// What must be right before.
    pub after: Vec<Key>,
}

/// What the kernel takes or refuses as a whole. Steps of different sections don't wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transaction {
    /// Tables, sets and elements.
    Sets(Section),
    /// Chains and their rules.
    Chains(Section),
    /// Rules in the chain of one family.
    DockerUser(Family),
}

impl Op {
    /// What this step writes.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::ResetTable(table) | Self::DeleteTable(table) => Key::Table(*table),
            Self::Set(table, name, _) => Key::Set(*table, *name),
            Self::Elements(change) => Key::Set(change.table, change.set),
            Self::Chains(table, _) => Key::Chains(*table),
            Self::Remove(table, _) => Key::Removal(*table),
            Self::DockerUser(change) => Key::DockerUser(change.family),
        }
    }

    /// What must be right before this step makes sense.
    #[must_use]
    pub fn needs(&self) -> Vec<Key> {
        match self {
            Self::Chains(table, change) => {
                let sets = change.looks_into.iter().map(|set| Key::Set(*table, *set));
                sets.chain([Key::Table(*table)]).collect()
            }
            Self::Elements(change) => change.after.clone(),
            Self::Remove(_, removal) => removal.after.clone(),
            _ => vec![],
        }
    }

    /// The chain that devices wait for.
    pub(super) fn makes(&self) -> Option<Key> {
        match self {
            Self::Chains(_, change) if change.judges_senders => Some(Key::SendersChain),
            _ => None,
        }
    }

    /// When it is taken.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self {
            Self::ResetTable(_) | Self::Set(..) => Stage::Sets,
            Self::Elements(change) => change.stage,
            Self::Chains(..) => Stage::Chains,
            Self::Remove(..) => Stage::ChainsGo,
            Self::DockerUser(change) if change.added.is_empty() => Stage::DockerUserGoes,
            Self::DockerUser(_) => Stage::DockerUser,
            Self::DeleteTable(_) => Stage::TableGoes,
        }
    }

    /// What it is taken or refused with, of the steps that go to the kernel together.
    #[must_use]
    pub fn transaction(&self) -> Transaction {
        match self {
            Self::ResetTable(table) | Self::DeleteTable(table) | Self::Set(table, ..) => {
                Transaction::Sets(table.section())
            }
            Self::Elements(change) => Transaction::Sets(change.table.section()),
            Self::Chains(table, _) | Self::Remove(table, _) => Transaction::Chains(table.section()),
            Self::DockerUser(change) => Transaction::DockerUser(change.family),
        }
    }

    /// What is done.
    #[must_use]
    pub fn verb(&self) -> Verb {
        let of = |added: bool, removed: bool| match (added, removed) {
            (true, true) => Verb::Replace,
            (true, false) => Verb::Create,
            (false, _) => Verb::Delete,
        };
        match self {
            Self::ResetTable(_) | Self::Chains(..) => Verb::Replace,
            Self::DeleteTable(_) | Self::Remove(..) => Verb::Delete,
            Self::Set(..) => Verb::Create,
            Self::Elements(change) => of(!change.added.is_empty(), !change.removed.is_empty()),
            Self::DockerUser(change) => of(!change.added.is_empty(), !change.removed.is_empty()),
        }
    }

    /// How many elements, rules, sets, tables, or chains of a table at once, come, change and go.
    #[must_use]
    pub fn counts(&self) -> [(Verb, usize); 3] {
        let counts = match self {
            Self::Elements(change) => [change.added.len(), 0, change.removed.len()],
            Self::DockerUser(change) => [change.added.len(), 0, change.removed.len()],
            Self::Set(..) => [1, 0, 0],
            Self::ResetTable(_) | Self::Chains(..) => [0, 1, 0],
            Self::DeleteTable(_) | Self::Remove(..) => [0, 0, 1],
        };
        let [made, changed, removed] = counts;
        [(Verb::Create, made), (Verb::Replace, changed), (Verb::Delete, removed)]
    }

    /// The table of ours that it writes to.
    #[must_use]
    pub fn table(&self) -> Option<TableKey> {
        match self {
            Self::ResetTable(table)
            | Self::DeleteTable(table)
            | Self::Set(table, ..)
            | Self::Chains(table, _)
            | Self::Remove(table, _) => Some(*table),
            Self::Elements(change) => Some(change.table),
            Self::DockerUser(_) => None,
        }
    }

    /// The same without elements that go and that leases decide on. Tables and rules depend on no lease.
    pub(super) fn without_deletes(self) -> Option<Self> {
        match self {
            Self::Elements(mut change) if change.table.section() == Section::Filter => {
                for element in change.removed.drain(..) {
                    change.then.insert(element, ());
                }
                (!change.added.is_empty()).then_some(Self::Elements(change))
            }
            op => Some(op),
        }
    }

    /// What is there after it.
    pub fn apply_to(&self, found: &mut FoundRuleset) {
        match self {
            Self::ResetTable(table) | Self::DeleteTable(table) => drop(found.remove(table)),
            Self::Set(table, name, set) => {
                found.entry(*table).or_default().sets.insert(name.to_string(), set.found());
            }
            Self::Elements(ElementChange { table, set, then, .. }) => {
                if let Some(set) = found.get_mut(table).and_then(|table| table.sets.get_mut(set.as_str())) {
                    set.elements = then.clone();
                }
            }
            Self::Chains(table, change) => {
                let table = found.entry(*table).or_default();
                table.sets.extend(change.sets.iter().map(|(name, set)| (name.to_string(), set.found())));
                let lines = |(name, chain): (&Name, &Chain)| (name.to_string(), chain.lines().clone());
                table.chains.extend(change.chains.iter().map(lines));
                for name in &change.emptied {
                    if let Some(lines) = table.chains.get_mut(name) {
                        *lines = lines.first().cloned().into_iter().collect::<Vec<_>>().into();
                    }
                }
            }
            Self::Remove(table, removal) => {
                if let Some(table) = found.get_mut(table) {
                    table.chains.retain(|name, _| !removal.chains.contains(name));
                    table.sets.retain(|name, _| !removal.sets.contains(name));
                }
            }
            Self::DockerUser(_) => {}
        }
    }
}

/// The steps from `have` to `want` for the tables of one section, in no order.
pub(super) fn diff(section: Section, want: &Ruleset, have: &FoundRuleset) -> Vec<Op> {
    let mut ops = vec![];
    for (key, found) in have.iter().filter(|(key, _)| key.section() == section) {
        match want.get(key) {
            None => ops.push(Op::DeleteTable(*key)),
            Some(_) if found.disabled => ops.push(Op::ResetTable(*key)),
            Some(_) => {}
        }
    }
    let nothing = FoundTable::default();
    for (key, table) in want.iter().filter(|(key, _)| key.section() == section) {
        let found = have.get(key).filter(|found| !found.disabled).unwrap_or(&nothing);
        let replaced = replaced_sets(table, found);
        for (name, set) in table.sets.iter().filter(|(name, _)| !replaced.contains_key(*name)) {
            ops.extend(Steps { table, key: *key, name: *name, set }.to_set(found.sets.get(name.as_str())));
        }
        ops.extend(to_chains(*key, table, found, replaced));
        ops.extend(removal(*key, table, found));
    }
    ops
}

/// Sets that are there, declared in another way.
fn replaced_sets(table: &Table, found: &FoundTable) -> BTreeMap<Name, Set> {
    let other =
        |name: &Name, set: &Set| found.sets.get(name.as_str()).is_some_and(|there| there.kind != Some(set.kind));
    table.sets.iter().filter(|(name, set)| other(name, set)).map(|(name, set)| (*name, set.clone())).collect()
}

/// One set of a table.
struct Steps<'a> {
    table: &'a Table,
    key: TableKey,
    name: Name,
    set: &'a Set,
}

impl Steps<'_> {
    /// The steps to the set, and to its elements.
    fn to_set(&self, found: Option<&FoundSet>) -> Vec<Op> {
        let Self { key, name, set, .. } = self;
        let made = || Set { elements: CowSet::default(), ..(*set).clone() };
        let nothing = CowSet::default();
        let (mut ops, there) = match found {
            Some(found) => (vec![], &found.elements),
            None if !waits_for_chains(set) => return vec![Op::Set(*key, *name, (*set).clone())],
            None => (vec![Op::Set(*key, *name, made())], &nothing),
        };
        // The set that was written is the set that was wanted.
        if there.is_same(&set.elements) || set.kind.dynamic.is_some() {
            return ops;
        }
        let (mut removed, mut added) = (vec![], vec![]);
        for (was, is) in set.elements.changes(there, |(), ()| true) {
            removed.extend(was.map(|(element, ())| element.clone()));
            added.extend(is.map(|(element, ())| element.clone()));
        }
        match (set.order, set.kind.data) {
            // What overlaps can't be there at once.
            (Order::AroundChains, _) if set.kind.ranges => {
                ops.extend(self.elements(Stage::Sets, removed, added, None));
            }
            (Order::AroundChains, _) | (_, Data::Verdict) => {
                let is_replaced = |element: &Element| {
                    let (key, _) = element.split(set.kind);
                    added.binary_search_by(|other| other.split(set.kind).0.cmp(key)).is_ok()
                };
                let (replaced, gone): (Vec<_>, Vec<_>) = removed.into_iter().partition(is_replaced);
                let mut between = there.clone();
                for element in &replaced {
                    between.remove(element);
                }
                for element in &added {
                    between.insert(element.clone(), ());
                }
                let comes = if set.kind.data == Data::Verdict { Stage::Verdicts } else { Stage::Sets };
                ops.extend(self.elements(comes, replaced, added, Some(between)));
                ops.extend(self.elements(Stage::ElementsGo, gone, vec![], None));
            }
            (Order::AfterChains, _) => ops.extend(self.elements(Stage::Entries, removed, added, None)),
            (Order::BeforeChains, _) => ops.extend(self.elements(Stage::Sets, removed, added, None)),
        }
        ops
    }

    fn elements(
        &self,
        stage: Stage,
        removed: Vec<Element>,
        added: Vec<Element>,
        then: Option<CowSet<Element>>,
    ) -> Option<Op> {
        let Self { table, key, name, set } = *self;
        let sets = |which: fn(&Set) -> bool| {
            let sets = table.sets.iter().filter(move |(_, set)| which(set));
            sets.map(move |(name, _)| Key::Set(key, *name))
        };
        let after = match stage {
            Stage::Verdicts => vec![Key::Set(key, name), Key::Chains(key)],
            Stage::Entries => {
                let data = sets(|set| set.order == Order::AroundChains || set.kind.data == Data::Verdict);
                data.chain([Key::Set(key, name), Key::Chains(key)]).collect()
            }
            Stage::ElementsGo => {
                let entries = sets(|set| set.order == Order::AfterChains && set.kind.data != Data::Verdict);
                entries.chain([Key::Chains(key)]).collect()
            }
            _ => vec![],
        };
        let then = then.unwrap_or_else(|| set.elements.clone());
        (!removed.is_empty() || !added.is_empty())
            .then(|| ElementChange { table: key, set: name, kind: set.kind, stage, removed, added, then, after })
            .map(Op::Elements)
    }
}

/// Whether the elements of a new set come after it.
fn waits_for_chains(set: &Set) -> bool {
    set.order == Order::AfterChains || set.kind.data == Data::Verdict
}

fn to_chains(key: TableKey, table: &Table, found: &FoundTable, replaced: BTreeMap<Name, Set>) -> Option<Op> {
    let looks_into_replaced = |chain: &Chain| {
        !replaced.is_empty() && chain.rules().iter().flat_map(|rule| rule.sets()).any(|set| replaced.contains_key(&set))
    };
    let mut change = ChainsChange::default();
    for (name, chain) in &table.chains {
        let there = found.chains.get(name.as_str());
        if there == Some(chain.lines()) && !looks_into_replaced(chain) {
            continue;
        }
        change.chains.insert(*name, chain.clone());
        if let Some(there) = there {
            change.there.insert(*name);
            if there.first() != chain.lines().first() {
                change.moved.insert(*name);
            }
        }
    }
    if change.chains.is_empty() && replaced.is_empty() {
        return None;
    }
    if !replaced.is_empty() {
        change.emptied = unwanted(&found.chains, &table.chains);
    }
    change.looks_into = table.sets.keys().filter(|name| !replaced.contains_key(*name)).copied().collect();
    change.sets = replaced;
    change.from_nothing = found.chains.is_empty();
    change.judges_senders = key == TableKey::Fabric && table.chains.contains_key(SENDERS);
    Some(Op::Chains(key, change))
}

fn removal(key: TableKey, table: &Table, found: &FoundTable) -> Option<Op> {
    let (chains, sets) = (unwanted(&found.chains, &table.chains), unwanted(&found.sets, &table.sets));
    let verdicts = table.sets.iter().filter(|(_, set)| set.kind.data == Data::Verdict);
    let after = verdicts.map(|(name, _)| Key::Set(key, *name)).chain([Key::Chains(key)]).collect();
    (!chains.is_empty() || !sets.is_empty()).then_some(Op::Remove(key, Removal { chains, sets, after }))
}

/// Names that are there and that nobody wants.
fn unwanted<A, B>(found: &BTreeMap<String, A>, wanted: &BTreeMap<Name, B>) -> BTreeSet<String> {
    found.keys().filter(|name| !wanted.contains_key(name.as_str())).cloned().collect()
}

impl fmt::Display for Op {
    /// A line of `nft` behind `+`, `~` or `-`; a line each for what goes and what comes in one step.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ResetTable(table) => write!(f, "~ nft delete table {table}"),
            Self::DeleteTable(table) => write!(f, "- nft delete table {table}"),
            Self::Set(table, name, set) => {
                write!(f, "+ nft add {} {table} {name} {{ {} }}", set.kind.word(), set.kind)
            }
            Self::Elements(ElementChange { table, set, kind, removed, added, .. }) => {
                if !removed.is_empty() {
                    write!(f, "- nft delete element {table} {set} {}", elements(removed, *kind))?;
                }
                f.write_str(if removed.is_empty() || added.is_empty() { "" } else { "\n" })?;
                if !added.is_empty() {
                    write!(f, "+ nft add element {table} {set} {}", elements(added, *kind))?;
                }
                Ok(())
            }
            Self::Chains(table, change) => {
                let names = change.chains.keys().map(Name::to_string);
                let sets = change.sets.keys().map(|set| format!("set {set}"));
                write!(f, "~ nft replace chains of table {table}: {}", first_few(names.chain(sets)))
            }
            Self::Remove(table, removal) => {
                let chains = removal.chains.iter().map(|chain| format!("chain {chain}"));
                let sets = removal.sets.iter().map(|set| format!("set {set}"));
                write!(f, "- nft delete of table {table}: {}", first_few(chains.chain(sets)))
            }
            Self::DockerUser(change) => change.fmt(f),
        }
    }
}

fn elements(elements: &[Element], kind: SetKind) -> String {
    let shown: Vec<String> = elements.iter().take(SHOWN).map(|element| element.shown(kind).to_string()).collect();
    match elements.len().saturating_sub(SHOWN) {
        0 => format!("{{ {} }}", shown.join(", ")),
        more => format!("{{ {} }} (and {more} more)", shown.join(", ")),
    }
}

/// The first few: a table may have thousands of chains.
fn first_few(mut names: impl Iterator<Item = String>) -> String {
    let shown: Vec<String> = names.by_ref().take(SHOWN).collect();
    match names.count() {
        0 => shown.join(", "),
        more => format!("{} (and {more} more)", shown.join(", ")),
    }
}
