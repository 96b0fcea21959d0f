//! [`change`]: from the tables that are there to those that are wanted, in one transaction.
//!
//! The kernel doesn't give rules back in the form in which it got them. So what is compared is a table's [`Layout`]:
//! its chains, how its sets are declared, and of each rule the number in its comment, all as lines of text. Whatever
//! somebody else adds, changes or takes away makes another layout, and such a table is replaced as a whole. Elements
//! of sets the kernel does give back; they are compared one by one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::{Element, Hook, Ruleset, Set, TABLE, Table, TableFamily};

/// What is known of a table that is there.
pub type Layout = BTreeSet<String>;

/// The tables of ours that are there.
pub type Found = BTreeMap<TableFamily, FoundTable>;

/// A table of ours that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundTable {
    /// Chains, declarations of sets, and the rules' numbers.
    pub layout: Layout,
    /// Elements by set.
    pub elements: BTreeMap<String, BTreeSet<Element>>,
}

/// What is to be written, in one transaction.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Tables that go.
    pub removed: BTreeSet<TableFamily>,
    /// Tables that are made, in the place of whatever has their name.
    pub replaced: BTreeMap<TableFamily, Table>,
    /// Elements of tables that stay.
    pub elements: Vec<ElementChange>,
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
}

/// A chain's line.
#[must_use]
pub fn chain_line(name: &str, hook: Option<&str>) -> String {
    format!("chain {name} {{ {} }}", hook.unwrap_or("no hook"))
}

/// A rule's line: its comment ends with the number that tells it from all others.
#[must_use]
pub fn rule_line(chain: &str, position: usize, comment: Option<&str>) -> String {
    format!("rule {chain} {position} {}", comment.unwrap_or("of somebody else"))
}

/// A set's line.
#[must_use]
pub fn set_line(name: &str, declaration: &str) -> String {
    format!("set {name} {{ {declaration} }}")
}

impl Table {
    /// Its layout, once it is there.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let chains = self.chains.iter().flat_map(|(name, chain)| {
            let hook = chain.hook.as_ref().map(Hook::to_string);
            let rules = chain.rules.iter().enumerate();
            let rules = rules.map(move |(position, rule)| rule_line(name, position, Some(&rule.comment())));
            [chain_line(name, hook.as_deref())].into_iter().chain(rules)
        });
        chains.chain(self.sets.iter().map(|(name, set)| set_line(name, &set.declaration()))).collect()
    }

    /// What will be found of it, once it is there.
    #[must_use]
    pub fn found(&self) -> FoundTable {
        let elements = self.sets.iter().map(|(name, set)| ((*name).to_owned(), set.elements.clone())).collect();
        FoundTable { layout: self.layout(), elements }
    }
}

/// The steps from `have` to `want`.
#[must_use]
pub fn change(want: &Ruleset, have: &Found) -> Change {
    let mut change = Change {
        removed: have.keys().filter(|table| !want.contains_key(table)).copied().collect(),
        ..Change::default()
    };
    for (family, table) in want {
        match have.get(family) {
            Some(found) if found.layout == table.layout() => {
                for (name, set) in &table.sets {
                    let there = found.elements.get(*name);
                    let is_there = |element: &&Element| there.is_some_and(|there| there.contains(*element));
                    let added: Vec<Element> = set.elements.iter().filter(|e| !is_there(e)).cloned().collect();
                    let removed = there.into_iter().flatten().filter(|e| !set.elements.contains(*e));
                    let removed: Vec<Element> = removed.cloned().collect();
                    if !added.is_empty() || !removed.is_empty() {
                        let shape = Set { elements: BTreeSet::new(), ..*set };
                        change.elements.push(ElementChange { table: *family, set: name, shape, removed, added });
                    }
                }
            }
            _ => drop(change.replaced.insert(*family, table.clone())),
        }
    }
    change
}

impl Change {
    /// True when nothing is to be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.replaced.is_empty() && self.elements.is_empty()
    }

    /// The same, but for elements that go: when what is wanted is only remembered, a peer may be newer than that.
    #[must_use]
    pub fn without_removals(mut self) -> Self {
        self.elements.iter_mut().for_each(|change| change.removed.clear());
        self.elements.retain(|change| !change.added.is_empty());
        self
    }

    /// What is there after it.
    pub fn apply_to(&self, found: &mut Found) {
        found.retain(|family, _| !self.removed.contains(family));
        found.extend(self.replaced.iter().map(|(family, table)| (*family, table.found())));
        for ElementChange { table, set, removed, added, .. } in &self.elements {
            let elements = found.get_mut(table).and_then(|table| table.elements.get_mut(*set));
            if let Some(elements) = elements {
                for element in removed {
                    elements.remove(element);
                }
                elements.extend(added.iter().cloned());
            }
        }
    }
}

impl fmt::Display for Change {
    /// A line of `nft` for each step, behind `+`, `~` or `-`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for family in &self.removed {
            writeln!(f, "- nft delete table {family} {TABLE}")?;
        }
        for family in self.replaced.keys() {
            writeln!(f, "~ nft replace table {family} {TABLE}")?;
        }
        for ElementChange { table, set, removed, added, .. } in &self.elements {
            for element in removed {
                writeln!(f, "- nft delete element {table} {TABLE} {set} {{ {element} }}")?;
            }
            for element in added {
                writeln!(f, "+ nft add element {table} {TABLE} {set} {{ {element} }}")?;
            }
        }
        Ok(())
    }
}
