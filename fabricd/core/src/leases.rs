//! [`LeaseSet`]: all leases of the cluster, the fold of a snapshot and the events after it.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{Family, NodeName, Subnet};
use crate::record::{LeaseKey, Record, RecordError};

/// One lease as the store has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Its subnets.
    pub key: LeaseKey,
    /// Its last value that could be read.
    pub record: Record,
    /// Store revision of its creation: of two that clash, the older one counts.
    pub create_revision: i64,
    /// Store revision of its last change; a compare-and-swap names it.
    pub mod_revision: i64,
}

impl Lease {
    /// A name for people: the node's, or the underlay address of one that doesn't say.
    #[must_use]
    pub fn holder(&self) -> String {
        match self.record.node() {
            Some(node) => node.to_string(),
            None => {
                self.record.endpoints().values().next().map_or_else(|| "unknown".into(), |e| e.public_ip.to_string())
            }
        }
    }
}

/// A key-value pair under `<prefix>/subnets/`, as the store sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key's last part, such as `10.244.3.0-24`.
    pub key: String,
    /// The JSON.
    pub value: Vec<u8>,
    /// Store revision of its creation.
    pub create_revision: i64,
    /// Store revision of its last change.
    pub mod_revision: i64,
}

/// A change under `<prefix>/subnets/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A key was created or changed.
    Put(Entry),
    /// A key was deleted or its lease expired.
    Delete {
        /// The key's last part.
        key: String,
    },
}

/// Every lease at one revision of the store. Cheap to clone: the leases are shared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseSet {
    leases: BTreeMap<LeaseKey, Arc<Lease>>,
    unreadable: BTreeMap<String, RecordError>,
    revision: i64,
}

impl LeaseSet {
    /// The set after a full list at `revision`. Entries that can't be read keep the value they had in `before`.
    #[must_use]
    pub fn snapshot(before: &Self, entries: Vec<Entry>, revision: i64) -> Self {
        let mut set = Self { revision, ..Self::default() };
        for entry in entries {
            set.put(entry, before);
        }
        set
    }

    /// Folds one event in. `revision` is that of the response that carried it.
    pub fn apply(&mut self, event: Event, revision: i64) {
        self.revision = self.revision.max(revision);
        match event {
            Event::Put(entry) => {
                // The last good value, should the new one be unreadable. One lease is shared, not copied.
                let before = LeaseKey::decode(&entry.key).ok().and_then(|key| self.leases.get(&key).cloned());
                let before =
                    Self { leases: before.map(|lease| (lease.key, lease)).into_iter().collect(), ..Self::default() };
                self.put(entry, &before);
            }
            Event::Delete { key } => {
                self.unreadable.remove(&key);
                if let Ok(key) = LeaseKey::decode(&key) {
                    self.leases.remove(&key);
                }
            }
        }
    }

    fn put(&mut self, entry: Entry, before: &Self) {
        self.unreadable.remove(&entry.key);
        let read = LeaseKey::decode(&entry.key).and_then(|key| match Record::decode(&key, &entry.value) {
            Ok(record) => Ok((key, record)),
            Err(error) => {
                if let Some(good) = before.leases.get(&key) {
                    self.leases.insert(key, good.clone());
                }
                Err(error)
            }
        });
        match read {
            Ok((key, record)) => {
                let (create_revision, mod_revision) = (entry.create_revision, entry.mod_revision);
                self.leases.insert(key, Arc::new(Lease { key, record, create_revision, mod_revision }));
            }
            Err(error) => {
                self.unreadable.insert(entry.key, error);
            }
        }
    }

    /// All leases, in the order of their subnets.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Lease>> {
        self.leases.values()
    }

    /// What has changed since `before`: each lease as it was, as it is, or both. One walk along both sets; what they
    /// share is not looked into.
    pub fn changes<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (Option<&'a Arc<Lease>>, Option<&'a Arc<Lease>>)> {
        let (mut was, mut is) = (before.iter().peekable(), self.iter().peekable());
        std::iter::from_fn(move || {
            loop {
                let order = match (was.peek(), is.peek()) {
                    (Some(was), Some(is)) => was.key.cmp(&is.key),
                    (Some(_), None) => Ordering::Less,
                    (None, Some(_)) => Ordering::Greater,
                    (None, None) => return None,
                };
                match order {
                    Ordering::Less => return Some((was.next(), None)),
                    Ordering::Greater => return Some((None, is.next())),
                    Ordering::Equal => {
                        let (was, is) = (was.next()?, is.next()?);
                        if !Arc::ptr_eq(was, is) {
                            return Some((Some(was), Some(is)));
                        }
                    }
                }
            }
        })
    }

    /// One lease.
    #[must_use]
    pub fn get(&self, key: &LeaseKey) -> Option<&Arc<Lease>> {
        self.leases.get(key)
    }

    /// The lease of a node, the newest should there be several.
    #[must_use]
    pub fn of_node(&self, node: &NodeName) -> Option<&Arc<Lease>> {
        self.iter().filter(|lease| lease.record.node() == Some(node)).max_by_key(|lease| lease.create_revision)
    }

    /// Entries whose current value can't be read, and why.
    #[must_use]
    pub fn unreadable(&self) -> &BTreeMap<String, RecordError> {
        &self.unreadable
    }

    /// The store's revision that this set shows.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.revision
    }

    /// How many leases there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// True when there is no lease.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// All leased subnets of a family.
    pub fn subnets(&self, family: Family) -> impl Iterator<Item = Subnet> {
        self.leases.keys().filter_map(move |key| key.subnets().get(family).copied())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, value: &str, revision: i64) -> Entry {
        Entry { key: key.into(), value: value.into(), create_revision: revision, mod_revision: revision }
    }

    fn vxlan(ip: &str) -> String {
        format!(
            r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:07"}}}}"#
        )
    }

    #[test]
    fn snapshot_and_events_give_the_same_set() {
        let mut folded =
            LeaseSet::snapshot(&LeaseSet::default(), vec![entry("10.244.1.0-24", &vxlan("192.0.2.1"), 3)], 3);
        folded.apply(Event::Put(entry("10.244.2.0-24", &vxlan("192.0.2.2"), 4)), 4);
        folded.apply(Event::Delete { key: "10.244.1.0-24".into() }, 5);
        let listed = LeaseSet::snapshot(&LeaseSet::default(), vec![entry("10.244.2.0-24", &vxlan("192.0.2.2"), 4)], 5);
        assert_eq!(folded, listed);
    }

    #[test]
    fn unreadable_value_keeps_the_last_good_one_and_is_reported() {
        let good = LeaseSet::snapshot(&LeaseSet::default(), vec![entry("10.244.1.0-24", &vxlan("192.0.2.1"), 3)], 3);
        let garbage = entry("10.244.1.0-24", "garbage", 4);
        let mut folded = good.clone();
        folded.apply(Event::Put(garbage.clone()), 4);
        for set in [&folded, &LeaseSet::snapshot(&good, vec![garbage], 4)] {
            assert_eq!(set.len(), 1);
            assert_eq!(set.iter().next().expect("kept").mod_revision, 3);
            assert!(set.unreadable().contains_key("10.244.1.0-24"));
        }
        folded.apply(Event::Put(entry("10.244.1.0-24", &vxlan("192.0.2.9"), 5)), 5);
        assert!(folded.unreadable().is_empty());
        assert_eq!(folded.iter().next().expect("kept").mod_revision, 5);
    }

    #[test]
    fn unreadable_key_is_reported_and_forgotten_with_its_delete() {
        let mut set = LeaseSet::default();
        set.apply(Event::Put(entry("../config", "{}", 1)), 1);
        assert!(set.is_empty() && set.unreadable().len() == 1);
        set.apply(Event::Delete { key: "../config".into() }, 2);
        assert!(set.unreadable().is_empty());
    }
}
