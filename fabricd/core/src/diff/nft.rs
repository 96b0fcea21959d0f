//! The steps to our tables of nftables.
//!
//! A table whose chains are as wanted gets single elements. Whatever somebody else adds, changes or takes away in its
//! chains makes other lines of text, and then all chains of that table are replaced. Elements are compared one by one.
//!
//! Sets and chains are two stages, and so two transactions. In one alone packets would be lost, since the kernel shows new
//! rules to packets a moment before it fills the new sets that these rules look into (`nf_tables_commit` moves the
//! generation on first, and `nft_set_commit_update` is last). Sets are kept while they serve, and chains are replaced
//! around them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::docker_user::DockerUserChange;
use super::{Key, Stage, Verb};
use crate::cow_map::CowSet;
use crate::model::Family;
use crate::plan::filter::senders::SENDERS;
use crate::state::nft::{Chain, Element, FoundRuleset, FoundTable, Ruleset, Set, TABLE, TableFamily, found_chains};

/// How many elements a line shows.
const SHOWN: usize = 8;

/// One write to the packet filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// A table that has no effect goes, with all that is in it, so that it can be made anew.
    ResetTable(TableFamily),
    /// A table goes, with all that is in it.
    DeleteTable(TableFamily),
    /// A set comes, with its elements.
    Set(TableFamily, &'static str, Set),
    /// Elements of a set come and go.
    Elements(ElementChange),
    /// All chains of a table are made, in the place of those that are there.
    Chains(TableFamily, ChainsChange),
    /// Our rules in Docker's chain for rules of others.
    DockerUser(DockerUserChange),
}

/// What is to be written to one set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ElementChange {
    /// Its table.
    pub table: TableFamily,
    /// Its name.
    pub set: &'static str,
    /// Its declaration.
    pub shape: Set,
    /// Elements that go; they go first.
    pub removed: Vec<Element>,
    /// Elements that come.
    pub added: Vec<Element>,
    /// All that are there then.
    pub then: CowSet<Element>,
}

/// All chains of one table, in the place of those that are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChainsChange {
    /// Chains that go, with all rules.
    pub old_chains: BTreeSet<String>,
    /// Sets that go with them: nobody wants them, or not as they are declared.
    pub old_sets: BTreeSet<String>,
    /// Sets that come in the place of such.
    pub sets: BTreeMap<&'static str, Set>,
    /// Sets that stay, or were made before.
    pub looks_into: Vec<&'static str>,
    /// Chains that come.
    pub chains: BTreeMap<&'static str, Chain>,
    /// All chains that come are there already as they should be: only what nobody wants goes.
    pub in_force: bool,
}

/// What the kernel takes or refuses as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transaction {
    /// Tables, sets and elements.
    Sets,
    /// Chains and their rules.
    Chains,
    /// Rules in the chain of one family.
    DockerUser(Family),
}

impl Op {
    /// What this step writes.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::ResetTable(family) | Self::DeleteTable(family) => Key::Table(*family),
            Self::Set(family, name, _) => Key::Set(*family, name),
            Self::Elements(change) => Key::Set(change.table, change.set),
            Self::Chains(family, _) => Key::Chains(*family),
            Self::DockerUser(change) => Key::DockerUser(change.family),
        }
    }

    /// What must be right before this step makes sense.
    #[must_use]
    pub fn needs(&self) -> Vec<Key> {
        match self {
            Self::Chains(family, change) => {
                let sets = change.looks_into.iter().map(|set| Key::Set(*family, set));
                sets.chain([Key::Table(*family)]).collect()
            }
            _ => vec![],
        }
    }

    /// The chain that devices wait for, unless it is in force.
    pub(super) fn makes(&self) -> Option<Key> {
        match self {
            Self::Chains(_, change) if change.chains.contains_key(SENDERS) && !change.in_force => {
                Some(Key::SendersChain)
            }
            _ => None,
        }
    }

    /// When it is taken.
    #[must_use]
    pub fn stage(&self) -> Stage {
        match self {
            Self::ResetTable(_) | Self::Set(..) | Self::Elements(_) => Stage::Sets,
            Self::Chains(..) => Stage::Chains,
            Self::DockerUser(change) if change.added.is_empty() => Stage::DockerUserGoes,
            Self::DockerUser(_) => Stage::DockerUser,
            Self::DeleteTable(_) => Stage::TableGoes,
        }
    }

    /// What it is taken or refused with, of the steps that go to the kernel together.
    #[must_use]
    pub fn transaction(&self) -> Transaction {
        match self {
            Self::ResetTable(_) | Self::DeleteTable(_) | Self::Set(..) | Self::Elements(_) => Transaction::Sets,
            Self::Chains(..) => Transaction::Chains,
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
            Self::DeleteTable(_) => Verb::Delete,
            Self::Set(..) => Verb::Create,
            Self::Elements(change) => of(!change.added.is_empty(), !change.removed.is_empty()),
            Self::DockerUser(change) => of(!change.added.is_empty(), !change.removed.is_empty()),
        }
    }

    /// How many elements, rules, sets or tables come, change and go.
    #[must_use]
    pub fn counts(&self) -> [(Verb, usize); 3] {
        let counts = match self {
            Self::Elements(change) => [change.added.len(), 0, change.removed.len()],
            Self::DockerUser(change) => [change.added.len(), 0, change.removed.len()],
            Self::Set(..) => [1, 0, 0],
            Self::ResetTable(_) | Self::Chains(..) => [0, 1, 0],
            Self::DeleteTable(_) => [0, 0, 1],
        };
        let [made, changed, removed] = counts;
        [(Verb::Create, made), (Verb::Replace, changed), (Verb::Delete, removed)]
    }

    /// The table of ours that it writes to.
    #[must_use]
    pub fn family(&self) -> Option<TableFamily> {
        match self {
            Self::ResetTable(family) | Self::DeleteTable(family) | Self::Set(family, ..) | Self::Chains(family, _) => {
                Some(*family)
            }
            Self::Elements(change) => Some(change.table),
            Self::DockerUser(_) => None,
        }
    }

    /// The same without elements that go. Tables and rules depend on no lease.
    pub(super) fn without_deletes(self) -> Option<Self> {
        match self {
            Self::Elements(mut change) => {
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
            Self::ResetTable(family) | Self::DeleteTable(family) => drop(found.remove(family)),
            Self::Set(family, name, set) => {
                found.entry(*family).or_default().sets.insert((*name).to_owned(), set.found());
            }
            Self::Elements(ElementChange { table, set, then, .. }) => {
                if let Some(set) = found.get_mut(table).and_then(|table| table.sets.get_mut(*set)) {
                    set.elements = then.clone();
                }
            }
            Self::Chains(family, change) => {
                let table = found.entry(*family).or_default();
                table.sets.retain(|name, _| !change.old_sets.contains(name));
                table.sets.extend(change.sets.iter().map(|(name, set)| ((*name).to_owned(), set.found())));
                table.chains = found_chains(&change.chains);
            }
            Self::DockerUser(_) => {}
        }
    }
}

/// The steps from `have` to `want`, in no order.
pub(super) fn diff(want: &Ruleset, have: &FoundRuleset) -> Vec<Op> {
    let mut ops = vec![];
    for (family, found) in have {
        match want.get(family) {
            None => ops.push(Op::DeleteTable(*family)),
            Some(_) if found.disabled => ops.push(Op::ResetTable(*family)),
            Some(_) => {}
        }
    }
    let nothing = FoundTable::default();
    for (family, table) in want {
        let found = have.get(family).filter(|found| !found.disabled).unwrap_or(&nothing);
        let mut sets = BTreeMap::new();
        for (name, set) in &table.sets {
            match found.sets.get(*name) {
                None => ops.push(Op::Set(*family, name, set.clone())),
                Some(there) if there.declaration == set.declaration() => {
                    // The set that was written is the set that was wanted.
                    if !there.elements.is_same(&set.elements) {
                        ops.extend(ElementChange::of(*family, name, set, &there.elements).map(Op::Elements));
                    }
                }
                Some(_) => drop(sets.insert(*name, set.clone())),
            }
        }
        let is_old = |name: &&String| !table.sets.contains_key(name.as_str()) || sets.contains_key(name.as_str());
        let old_sets: BTreeSet<String> = found.sets.keys().filter(is_old).cloned().collect();
        let wanted = found_chains(&table.chains);
        if found.chains != wanted || !old_sets.is_empty() {
            let change = ChainsChange {
                old_chains: found.chains.keys().cloned().collect(),
                old_sets,
                looks_into: table.sets.keys().filter(|name| !sets.contains_key(*name)).copied().collect(),
                sets,
                chains: table.chains.clone(),
                in_force: wanted.iter().all(|(name, lines)| found.chains.get(name) == Some(lines)),
            };
            ops.push(Op::Chains(*family, change));
        }
    }
    ops
}

impl ElementChange {
    /// The steps from the elements that are there to those of `set`, if there are any.
    fn of(table: TableFamily, name: &'static str, set: &Set, there: &CowSet<Element>) -> Option<Self> {
        let (mut removed, mut added) = (vec![], vec![]);
        for (was, is) in set.elements.changes(there, |(), ()| true) {
            removed.extend(was.map(|(element, ())| *element));
            added.extend(is.map(|(element, ())| *element));
        }
        let shape = Set { elements: CowSet::default(), ..*set };
        let change = Self { table, set: name, shape, removed, added, then: set.elements.clone() };
        (!change.added.is_empty() || !change.removed.is_empty()).then_some(change)
    }
}

impl fmt::Display for Op {
    /// A line of `nft` behind `+`, `~` or `-`; a line each for what goes and what comes in one step.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ResetTable(family) => write!(f, "~ nft delete table {family} {TABLE}"),
            Self::DeleteTable(family) => write!(f, "- nft delete table {family} {TABLE}"),
            Self::Set(family, name, set) => {
                write!(f, "+ nft add set {family} {TABLE} {name} {{ {} }}", set.declaration())
            }
            Self::Elements(ElementChange { table, set, removed, added, .. }) => {
                if !removed.is_empty() {
                    write!(f, "- nft delete element {table} {TABLE} {set} {}", Elements(removed))?;
                }
                f.write_str(if removed.is_empty() || added.is_empty() { "" } else { "\n" })?;
                if !added.is_empty() {
                    write!(f, "+ nft add element {table} {TABLE} {set} {}", Elements(added))?;
                }
                Ok(())
            }
            Self::Chains(family, _) => write!(f, "~ nft replace chains of table {family} {TABLE}"),
            Self::DockerUser(change) => change.fmt(f),
        }
    }
}

/// The first few: a set has thousands.
struct Elements<'a>(&'a [Element]);

impl fmt::Display for Elements<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown: Vec<String> = self.0.iter().take(SHOWN).map(ToString::to_string).collect();
        write!(f, "{{ {} }}", shown.join(", "))?;
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " (and {more} more)"),
        }
    }
}
