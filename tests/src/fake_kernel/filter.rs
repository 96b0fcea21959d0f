//! The packet filter of [`FakeKernel`](crate::fake_kernel::FakeKernel): transactions on tables that are found as the real
//! kernel's are, and what it refuses. Of a rule it knows its comment alone, so it can't tell that a chain which goes is
//! jumped to.

use std::collections::BTreeSet;

use fabric_core::diff::nft::{ChainsChange, ElementChange, Op};
use fabric_core::state::nft::{Data, FoundRuleset, FoundTable, Name, Order};

/// Takes all steps of a transaction, or none.
///
/// # Errors
/// The errno of the first that can't be taken.
pub fn write(filter: &mut FoundRuleset, ops: &[&Op]) -> Result<(), i32> {
    let mut after = filter.clone();
    for op in ops {
        check(&after, op)?;
        op.apply_to(&mut after);
    }
    *filter = after;
    Ok(())
}

fn there(good: bool) -> Result<(), i32> {
    good.then_some(()).ok_or(libc::ENOENT)
}

fn check(filter: &FoundRuleset, op: &Op) -> Result<(), i32> {
    match op {
        Op::ResetTable(_) | Op::DeleteTable(_) => Ok(()),
        // What leads to others is filled once these are there.
        Op::Set(_, _, set) => there(set.elements.is_empty() || !waits_for_chains(set.order, set.kind.data)),
        Op::Elements(change) => check_elements(filter, change),
        Op::Chains(table, change) => check_chains(filter.get(table), change),
        Op::Remove(table, removal) => {
            let table = filter.get(table).ok_or(libc::ENOENT)?;
            there(removal.chains.iter().all(|chain| table.chains.contains_key(chain)))?;
            there(removal.sets.iter().all(|set| table.sets.contains_key(set)))?;
            let named = named_by_elements(table);
            let is_free = removal.chains.iter().all(|chain| !named.contains(chain.as_str()));
            is_free.then_some(()).ok_or(libc::EBUSY)
        }
        Op::DockerUser(_) => Err(libc::ENOENT),
    }
}

fn waits_for_chains(order: Order, data: Data) -> bool {
    order == Order::AfterChains || data == Data::Verdict
}

fn check_elements(filter: &FoundRuleset, change: &ElementChange) -> Result<(), i32> {
    let table = filter.get(&change.table).ok_or(libc::ENOENT)?;
    let set = table.sets.get(change.set.as_str()).ok_or(libc::ENOENT)?;
    there(change.removed.iter().all(|element| set.elements.contains(element)))?;
    let mut chains = change.added.iter().filter_map(|element| element.verdict(change.kind)?.chain());
    there(change.kind.data != Data::Verdict || chains.all(|chain| table.chains.contains_key(chain.as_str())))?;
    // One key leads to one thing.
    let gone: BTreeSet<&[u8]> = change.removed.iter().map(|element| element.split(change.kind).0).collect();
    let keys: BTreeSet<&[u8]> = set.elements.keys().map(|element| element.split(change.kind).0).collect();
    let taken = |key: &[u8]| keys.contains(key) && !gone.contains(key);
    match change.kind.data {
        Data::None => Ok(()),
        _ if change.added.iter().any(|element| taken(element.split(change.kind).0)) => Err(libc::EEXIST),
        _ => Ok(()),
    }
}

fn check_chains(table: Option<&FoundTable>, change: &ChainsChange) -> Result<(), i32> {
    let table = table.cloned().unwrap_or_default();
    there(change.there.iter().all(|chain| table.chains.contains_key(chain.as_str())))?;
    there(change.emptied.iter().all(|chain| table.chains.contains_key(chain)))?;
    there(change.sets.keys().chain(&change.looks_into).all(|set| table.sets.contains_key(set.as_str())))?;
    let jumps = change.chains.values().flat_map(|chain| chain.rules()).flat_map(|rule| rule.jumps());
    let known = |name: Name| change.chains.contains_key(&name) || table.chains.contains_key(name.as_str());
    there(jumps.into_iter().all(known))
}

/// The chains that elements of verdict maps name.
fn named_by_elements(table: &FoundTable) -> BTreeSet<Name> {
    let sets = table.sets.values().filter_map(|set| Some((set.kind?, &set.elements)));
    let maps = sets.filter(|(kind, _)| kind.data == Data::Verdict);
    maps.flat_map(|(kind, elements)| elements.keys().filter_map(move |element| element.verdict(kind)?.chain()))
        .collect()
}
