//! [`Nodes`]: all Nodes of the cluster, folded into the [`LeaseSet`] that they amount to.
//!
//! A Node changes every few minutes, when its kubelet reports, and its resource version with it. Its lease changes only
//! when its annotations or podCIDRs do; the lease's revision is that of the change.

use std::collections::{BTreeMap, BTreeSet};

use fabric_core::leases::{Entry, Event, LeaseSet};
use fabric_core::model::{PerFamily, Subnet};
use fabric_core::record::LeaseKey;
use tracing::warn;

use super::annotations::{self, Published};
use super::node::Node;
use crate::kubernetes::reflector::Object as _;

/// What is known of one Node.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NodeLease {
    published: Option<Published>,
    /// Those that may still be had back by the Node's name.
    subnets: PerFamily<Subnet>,
    created: i64,
    /// Revision of the last change of its lease.
    changed: i64,
}

/// All Nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct Nodes {
    known: BTreeMap<String, NodeLease>,
    /// Those that publish a key: when they were created, and their names. More than one is a mistake in the cluster's
    /// podCIDRs; the oldest counts.
    claimants: BTreeMap<LeaseKey, BTreeSet<(i64, String)>>,
    set: LeaseSet,
}

impl Nodes {
    /// All of a list that was taken at `revision`, after what was known before.
    pub(super) fn listed(before: &Self, nodes: &[Node], revision: i64) -> Self {
        let mut listed = Self::default();
        for node in nodes {
            listed.note(node, before.known.get(node.name()));
        }
        let entries = listed.claimants.keys().filter_map(|key| listed.entry(key)).collect();
        listed.set = LeaseSet::snapshot(&before.set, entries, revision);
        listed.remove_departed();
        listed
    }

    /// The leases.
    pub(super) fn set(&self) -> &LeaseSet {
        &self.set
    }

    /// Takes in that a Node was created or changed; true when that matters to somebody's lease.
    pub(super) fn apply(&mut self, node: &Node) -> bool {
        let before = self.forget(node.name());
        self.note(node, before.as_ref());
        let known = &self.known[node.name()];
        if before.as_ref() == Some(known) {
            return false;
        }
        let is_key = known.published.as_ref().map(|published| published.key);
        let was_key = before.and_then(|before| before.published).map(|published| published.key);
        for key in BTreeSet::from_iter(was_key.into_iter().chain(is_key)) {
            self.settle(&key, node.revision());
        }
        true
    }

    /// Takes in that a Node was deleted. Its subnets may be another's at once, so its lease doesn't linger.
    pub(super) fn remove(&mut self, node: &Node) -> bool {
        let Some(before) = self.forget(node.name()) else { return false };
        match before.published {
            Some(published) => self.settle(&published.key, node.revision()),
            None => self.remove_departed(),
        }
        true
    }

    fn note(&mut self, node: &Node, before: Option<&NodeLease>) {
        let published = annotations::read(node);
        let subnets = if annotations::is_given_back(node) { PerFamily::default() } else { node.subnets() };
        let unchanged = before.filter(|before| before.published == published && before.subnets == subnets);
        let changed = unchanged.map_or(node.revision(), |before| before.changed);
        if let Some(published) = &published {
            let claimants = self.claimants.entry(published.key).or_default();
            claimants.insert((node.created(), node.name().to_owned()));
            if claimants.len() > 1 && unchanged.is_none() {
                warn!(subnet = %published.key, nodes = ?claimants, "several Nodes have one podCIDR; the oldest has it");
            }
        }
        self.known.insert(node.name().to_owned(), NodeLease { published, subnets, created: node.created(), changed });
    }

    fn forget(&mut self, name: &str) -> Option<NodeLease> {
        let before = self.known.remove(name)?;
        if let Some(published) = &before.published
            && let Some(claimants) = self.claimants.get_mut(&published.key)
        {
            claimants.remove(&(before.created, name.to_owned()));
            if claimants.is_empty() {
                self.claimants.remove(&published.key);
            }
        }
        Some(before)
    }

    /// What counts for a key.
    fn entry(&self, key: &LeaseKey) -> Option<Entry> {
        let (created, name) = self.claimants.get(key)?.first()?;
        let known = &self.known[name];
        let value = known.published.as_ref()?.value.clone();
        Some(Entry { key: key.encode(), value, create_revision: *created, mod_revision: known.changed })
    }

    /// Brings what is shown for a key up to date.
    fn settle(&mut self, key: &LeaseKey, revision: i64) {
        let event = match self.entry(key) {
            Some(entry) => Event::Put(entry),
            None => Event::Delete { key: key.encode(), given_back: false },
        };
        self.set.apply(event, revision);
        self.remove_departed();
    }

    /// A lease without annotations may come back, unless its subnets are nobody's or another's by now.
    fn remove_departed(&mut self) {
        if self.set.departed().is_empty() {
            return;
        }
        let assigned: BTreeMap<Subnet, &str> = self
            .known
            .iter()
            .flat_map(|(name, known)| known.subnets.values().map(move |subnet| (*subnet, name.as_str())))
            .collect();
        let owners: BTreeMap<Subnet, String> = self
            .set
            .departed()
            .values()
            .flat_map(|lease| lease.key.subnets().values().map(|subnet| (*subnet, lease.holder())))
            .collect();
        self.set.forget_departed(|subnet| {
            owners.get(&subnet).is_some_and(|owner| assigned.get(&subnet).is_some_and(|node| node == owner))
        });
    }
}

#[cfg(test)]
#[path = "nodes_tests.rs"]
mod tests;
