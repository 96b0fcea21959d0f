//! [`change`]: from the tables that are there to those that are wanted.
//!
//! The kernel doesn't give rules back in the form in which it got them. So of a chain only lines of text are compared:
//! its hook, and each rule's comment, which ends with a number that tells the rule from all others. Whatever somebody
//! else adds, changes or takes away makes other lines, and then all chains of that table are replaced. Elements of
//! sets the kernel does give back; they are compared one by one.
//!
//! A change is two transactions: first the sets, then the rules that look into them. In one alone packets would be
//! lost, since the kernel shows new rules to packets a moment before it fills the new sets that these rules look into
//! (`nf_tables_commit` moves the generation on first, and `nft_set_commit_update` is last). Sets are kept while they
//! serve, and chains are replaced around them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use super::door::{self, DoorChange};
use super::{Chain, Element, Hook, Ruleset, Set, TABLE, Table, TableFamily};

/// The tables of ours that are there.
pub type Found = BTreeMap<TableFamily, FoundTable>;

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
    pub elements: Arc<BTreeSet<Element>>,
}

/// What is to be written: tables and sets in one transaction, chains in a second.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Tables that go.
    pub removed: BTreeSet<TableFamily>,
    /// Sets that come, with their elements.
    pub sets: Vec<(TableFamily, &'static str, Set)>,
    /// Elements of sets that stay.
    pub elements: Vec<ElementChange>,
    /// Tables whose chains are made anew.
    pub rules: BTreeMap<TableFamily, RuleChange>,
    /// What is written to chains of others, each in a transaction of its own.
    pub doors: Vec<DoorChange>,
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
    pub then: Arc<BTreeSet<Element>>,
}

/// All chains of one table, in the place of those that are there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleChange {
    /// Chains that go, with all rules.
    pub old_chains: BTreeSet<String>,
    /// Sets that go with them: nobody wants them, or not as they are declared.
    pub old_sets: BTreeSet<String>,
    /// Sets that come in the place of such.
    pub sets: BTreeMap<&'static str, Set>,
    /// Chains that come.
    pub chains: BTreeMap<&'static str, Chain>,
}

impl Chain {
    /// Its lines, once it is there.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let hook = self.hook.as_ref().map_or_else(|| NO_HOOK.to_owned(), Hook::to_string);
        [hook].into_iter().chain(self.rules.iter().map(super::Rule::comment)).collect()
    }
}

/// In the place of a hook, for a chain that rules jump to.
pub const NO_HOOK: &str = "no hook";

impl Set {
    fn found(&self) -> FoundSet {
        FoundSet { declaration: self.declaration(), elements: self.elements.clone() }
    }
}

/// Lets tables that were read share the elements with those that were known before, where they are the same.
pub fn share(read: &mut Found, known: &Found) {
    for (family, table) in read {
        for (name, set) in &mut table.sets {
            let before = known.get(family).and_then(|table| table.sets.get(name));
            if let Some(before) = before.filter(|before| before.elements == set.elements) {
                set.elements = Arc::clone(&before.elements);
            }
        }
    }
}

impl Table {
    /// Shares the elements with the sets that are there, where they are the same.
    pub fn share(&mut self, found: &FoundTable) {
        for (name, set) in &mut self.sets {
            if let Some(there) = found.sets.get(*name).filter(|there| there.elements == set.elements) {
                set.elements = Arc::clone(&there.elements);
            }
        }
    }
}

fn found_chains(chains: &BTreeMap<&'static str, Chain>) -> BTreeMap<String, Vec<String>> {
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

/// The steps from `have` to `want`.
#[must_use]
pub fn change(want: &Ruleset, have: &Found) -> Change {
    let serves = |family: &TableFamily, found: &FoundTable| want.contains_key(family) && !found.disabled;
    let removed = have.iter().filter(|(family, found)| !serves(family, found)).map(|(family, _)| *family).collect();
    let mut change = Change { removed, ..Change::default() };
    let nothing = FoundTable::default();
    for (family, table) in want {
        let found = have.get(family).filter(|found| !found.disabled);
        change.bring(*family, table, found.unwrap_or(&nothing));
    }
    change
}

impl ElementChange {
    /// The steps from the elements that are there to those of `set`, if there are any.
    fn of(table: TableFamily, name: &'static str, set: &Set, there: &BTreeSet<Element>) -> Option<Self> {
        let added: Vec<Element> = set.elements.difference(there).copied().collect();
        let removed: Vec<Element> = there.difference(&set.elements).copied().collect();
        let shape = Set { elements: Arc::default(), ..*set };
        let change = Self { table, set: name, shape, removed, added, then: Arc::clone(&set.elements) };
        (!change.added.is_empty() || !change.removed.is_empty()).then_some(change)
    }
}

impl Change {
    /// Adds the steps from `found` to `table`.
    fn bring(&mut self, family: TableFamily, table: &Table, found: &FoundTable) {
        let mut rules = RuleChange { chains: table.chains.clone(), ..RuleChange::default() };
        for (name, set) in &table.sets {
            match found.sets.get(*name) {
                None => self.sets.push((family, name, set.clone())),
                Some(there) if there.declaration == set.declaration() => {
                    // The set that was written is the set that was wanted.
                    if !Arc::ptr_eq(&there.elements, &set.elements) {
                        self.elements.extend(ElementChange::of(family, name, set, &there.elements));
                    }
                }
                Some(_) => drop(rules.sets.insert(name, set.clone())),
            }
        }
        let is_old = |name: &String| !table.sets.contains_key(name.as_str()) || rules.sets.contains_key(name.as_str());
        rules.old_sets = found.sets.keys().filter(|name| is_old(name)).cloned().collect();
        if found.chains != found_chains(&table.chains) || !rules.old_sets.is_empty() {
            rules.old_chains = found.chains.keys().cloned().collect();
            self.rules.insert(family, rules);
        }
    }

    /// True when nothing is to be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let ours = self.removed.is_empty() && self.sets.is_empty() && self.elements.is_empty();
        ours && self.rules.is_empty() && self.doors.is_empty()
    }

    /// How many steps it has, as its lines show them.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.counts().into_iter().sum()
    }

    /// How many steps make something, change something and remove something.
    #[must_use]
    pub fn counts(&self) -> [u64; 3] {
        let sum = |counts: &mut dyn Iterator<Item = usize>| counts.map(|count| count as u64).sum::<u64>();
        let made = self.sets.len() as u64
            + sum(&mut self.elements.iter().map(|change| change.added.len()))
            + sum(&mut self.doors.iter().map(|change| change.added.len()));
        let removed = self.removed.len() as u64
            + sum(&mut self.elements.iter().map(|change| change.removed.len()))
            + sum(&mut self.doors.iter().map(|change| change.removed.len()));
        [made, self.rules.len() as u64, removed]
    }

    /// The families of our tables that it writes to.
    pub fn families(&self) -> impl Iterator<Item = TableFamily> {
        let sets = self.sets.iter().map(|(family, ..)| *family);
        let elements = self.elements.iter().map(|change| change.table);
        self.rules.keys().copied().chain(sets).chain(elements).chain(self.removed.iter().copied())
    }

    /// The first step, and how many more there are: what fits into a sentence.
    #[must_use]
    pub fn summary(&self) -> String {
        let all = self.to_string();
        let mut steps = all.lines().map(|step| step.trim_start_matches(['+', '~', '-', ' ']));
        let first = steps.next().unwrap_or_default();
        match steps.count() {
            0 => first.to_owned(),
            1 => format!("{first} (and 1 more step)"),
            more => format!("{first} (and {more} more steps)"),
        }
    }

    /// The same, but for elements that go: when what is wanted is only remembered, a peer may be newer than that.
    #[must_use]
    pub fn without_removals(mut self) -> Self {
        for change in self.elements.iter_mut().filter(|change| !change.removed.is_empty()) {
            Arc::make_mut(&mut change.then).extend(change.removed.drain(..));
        }
        self.elements.retain(|change| !change.added.is_empty());
        self
    }

    /// What is there after it.
    pub fn apply_to(&self, found: &mut Found) {
        found.retain(|family, _| !self.removed.contains(family));
        for (family, name, set) in &self.sets {
            found.entry(*family).or_default().sets.insert((*name).to_owned(), set.found());
        }
        for ElementChange { table, set, then, .. } in &self.elements {
            if let Some(set) = found.get_mut(table).and_then(|table| table.sets.get_mut(*set)) {
                set.elements = Arc::clone(then);
            }
        }
        for (family, rules) in &self.rules {
            let table = found.entry(*family).or_default();
            table.sets.retain(|name, _| !rules.old_sets.contains(name));
            table.sets.extend(rules.sets.iter().map(|(name, set)| ((*name).to_owned(), set.found())));
            table.chains = found_chains(&rules.chains);
        }
    }
}

impl fmt::Display for Change {
    /// A line of `nft` for each step, behind `+`, `~` or `-`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for family in &self.removed {
            writeln!(f, "- nft delete table {family} {TABLE}")?;
        }
        for (family, name, set) in &self.sets {
            writeln!(f, "+ nft add set {family} {TABLE} {name} {{ {} }}", set.declaration())?;
        }
        for ElementChange { table, set, removed, added, .. } in &self.elements {
            for element in removed {
                writeln!(f, "- nft delete element {table} {TABLE} {set} {{ {element} }}")?;
            }
            for element in added {
                writeln!(f, "+ nft add element {table} {TABLE} {set} {{ {element} }}")?;
            }
        }
        for family in self.rules.keys() {
            writeln!(f, "~ nft replace chains of table {family} {TABLE}")?;
        }
        for DoorChange { family, removed, added } in &self.doors {
            let chain = format!("{} {} {}", door::table_family(*family), door::TABLE, door::CHAIN);
            for handle in removed {
                writeln!(f, "- nft delete rule {chain} handle {handle}")?;
            }
            for rule in added {
                writeln!(f, "+ nft insert rule {chain} {rule}")?;
            }
        }
        Ok(())
    }
}
