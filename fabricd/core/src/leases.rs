//! [`LeaseSet`]: all leases of the cluster, the fold of a snapshot and the events after it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::cow_map::CowMap;
use crate::leased_ranges::LeasedRanges;
use crate::model::{Family, NodeName, Subnet};
use crate::record::{LeaseKey, Record, RecordError};

/// Of fewer leases than these, any number may go at once.
const FEW: usize = 4;

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

impl Lease {
    /// Whether a departed lease doesn't count beside this one: it has the subnet, the node or the address.
    fn takes_place_of(&self, departed: &Self) -> bool {
        let addresses = |lease: &Self| lease.record.endpoints().map(|_, endpoint| endpoint.public_ip);
        let (ours, its) = (addresses(self), addresses(departed));
        let mut subnets = departed.key.subnets().values();
        subnets.any(|subnet| self.key.subnets().values().any(|own| own.overlaps(*subnet)))
            || departed.record.node().is_some_and(|node| self.record.node() == Some(node))
            || its.values().any(|ip| ours.values().any(|own| own == ip))
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
        /// True when the node gave it back, which takes the guards along; else it may come back.
        given_back: bool,
    },
}

/// Every lease at one revision of the store. Cheap to clone: the leases are shared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseSet {
    leases: CowMap<LeaseKey, Arc<Lease>>,
    unreadable: BTreeMap<String, RecordError>,
    reservations: BTreeMap<LeaseKey, NodeName>,
    departed: BTreeMap<LeaseKey, Arc<Lease>>,
    revision: i64,
}

impl LeaseSet {
    /// The set after a full list at `revision`. Entries that can't be read keep the value they had in `before`.
    #[must_use]
    pub fn snapshot(before: &Self, entries: Vec<Entry>, revision: i64) -> Self {
        let mut set = Self { revision, departed: before.departed.clone(), ..Self::default() };
        for entry in entries {
            set.put(entry, before);
        }
        // A map that grew key by key is half empty inside; one that is made at once is not.
        set.leases = set.leases.iter().map(|(key, lease)| (*key, Arc::clone(lease))).collect();
        let missing: Vec<_> = before.iter().filter(|lease| set.get(&lease.key).is_none()).cloned().collect();
        missing.into_iter().for_each(|lease| set.depart(lease));
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
            Event::Delete { key, given_back } => {
                self.unreadable.remove(&key);
                let lease = LeaseKey::decode(&key).ok().and_then(|key| self.leases.remove(&key));
                lease.into_iter().filter(|_| !given_back).for_each(|lease| self.depart(lease));
            }
        }
    }

    /// Notes that a lease has ended and its node may come back. flannel's leases have no guards, so nobody can tell.
    fn depart(&mut self, lease: Arc<Lease>) {
        if lease.record.node().is_some() && !lease.record.is_placeholder() {
            self.departed.insert(lease.key, lease);
        }
    }

    /// Leases that have ended while their guards stand: the nodes were cut off from the store, or are dead. Until the
    /// subnets are leased anew, packets for them may still arrive.
    #[must_use]
    pub fn departed(&self) -> &BTreeMap<LeaseKey, Arc<Lease>> {
        &self.departed
    }

    /// Forgets departed leases, unless guards still stand for all of their subnets.
    pub fn forget_departed(&mut self, is_guarded: impl Fn(Subnet) -> bool) {
        self.departed.retain(|key, _| key.subnets().values().all(|subnet| is_guarded(*subnet)));
    }

    /// Notes a reservation, or that it is gone. `key` is the last part of its key in the store, `node` its value; one
    /// that can't be read reserves nothing.
    pub fn reserve(&mut self, key: &str, node: Option<&[u8]>, revision: i64) {
        self.revision = self.revision.max(revision);
        let Ok(key) = LeaseKey::decode(key) else { return };
        let node = node.and_then(|node| std::str::from_utf8(node).ok()?.parse().ok());
        match node {
            Some(node) => self.reservations.insert(key, node),
            None => self.reservations.remove(&key),
        };
    }

    /// This set, and of the one before it the leases of nodes that have not come back: those whose subnets are still
    /// free, and whose node or address is in no other lease. For a store that was emptied or set back, until its nodes
    /// have claimed their subnets again.
    #[must_use]
    pub fn keeping<'a>(&self, before: impl IntoIterator<Item = &'a Arc<Lease>>) -> Self {
        let subnets = self.leases.keys().flat_map(|key| key.subnets().values().copied());
        let taken = LeasedRanges::all(subnets);
        let nodes: BTreeSet<&NodeName> = self.iter().filter_map(|lease| lease.record.node()).collect();
        let addresses = |lease: &Lease| lease.record.endpoints().values().map(|e| e.public_ip).collect::<Vec<_>>();
        let used: BTreeSet<IpAddr> = self.iter().flat_map(|lease| addresses(lease)).collect();
        let is_missing = |lease: &&Arc<Lease>| {
            lease.key.subnets().values().all(|subnet| taken.leaves(*subnet))
                && lease.record.node().is_none_or(|node| !nodes.contains(node))
                && !lease.record.is_placeholder()
                && addresses(lease).iter().all(|ip| !used.contains(ip))
        };
        let mut set = self.clone();
        for lease in before.into_iter().filter(is_missing) {
            set.leases.insert(lease.key, Arc::clone(lease));
        }
        set
    }

    /// [`LeaseSet::keeping`] of its own departed leases, made of what that was for the set of before, `merged`: for the price
    /// of what has changed since.
    #[must_use]
    pub fn keeping_departed(&self, before: &Self, merged: &Self) -> Self {
        let changes: Vec<_> = self.changes(before).collect();
        let came: Vec<&Arc<Lease>> = changes.iter().filter_map(|(_, is)| *is).collect();
        let kept: Vec<&Arc<Lease>> = merged.changes(before).filter_map(|(_, is)| is).collect();
        let mut leases = merged.leases.clone();
        let stays = |kept: &&Arc<Lease>| {
            let is_departed = self.departed.get(&kept.key).is_some_and(|departed| Arc::ptr_eq(departed, kept));
            is_departed && !came.iter().any(|lease| lease.takes_place_of(kept))
        };
        let (stay, go): (Vec<_>, Vec<_>) = kept.into_iter().partition(stays);
        for lease in go {
            leases.remove(&lease.key);
        }
        for (was, is) in &changes {
            match (was, is) {
                (_, Some(lease)) => drop(leases.insert(lease.key, Arc::clone(lease))),
                (Some(lease), None) => drop(leases.remove(&lease.key)),
                (None, None) => {}
            }
        }
        // What has gone leaves room for those that had none; others depart just now.
        let has_gone = changes.iter().any(|(was, _)| was.is_some());
        let is_new =
            |lease: &Arc<Lease>| !before.departed.get(&lease.key).is_some_and(|known| Arc::ptr_eq(known, lease));
        let others = self.departed.values().filter(|lease| has_gone || is_new(lease));
        let others = others.filter(|lease| !stay.iter().any(|kept| kept.key == lease.key));
        for lease in others.filter(|lease| !self.iter().any(|other| other.takes_place_of(lease))) {
            leases.insert(lease.key, Arc::clone(lease));
        }
        Self { leases, ..self.clone() }
    }

    /// True when more than half of the leases that were known are not there any more; of a few, any number may go.
    #[must_use]
    pub fn lacks_most_of(&self, before: &Self) -> bool {
        let gone = self.changes(before).filter(|(_, is)| is.is_none()).count();
        before.len() >= FEW && gone * 2 > before.len()
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
                self.departed.retain(|departed, lease| *departed != key && lease.record.node() != record.node());
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

    /// What has changed since `before`: each lease as it was, as it is, or both. What both sets share is not looked into.
    pub fn changes<'a>(
        &'a self,
        before: &'a Self,
    ) -> impl Iterator<Item = (Option<&'a Arc<Lease>>, Option<&'a Arc<Lease>>)> {
        let lease = |entry: Option<(&'a LeaseKey, &'a Arc<Lease>)>| entry.map(|(_, lease)| lease);
        self.leases.changes(&before.leases, Arc::ptr_eq).map(move |(was, is)| (lease(was), lease(is)))
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

    /// The subnets that are reserved, each with its node.
    #[must_use]
    pub fn reservations(&self) -> &BTreeMap<LeaseKey, NodeName> {
        &self.reservations
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
    use proptest::collection::vec;
    use proptest::prelude::*;

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
        folded.apply(Event::Delete { key: "10.244.1.0-24".into(), given_back: false }, 5);
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
    fn nodes_that_have_not_come_back_are_kept_unless_somebody_has_their_place() {
        let list = |entries: &[(&str, &str)]| {
            let entries = entries.iter().map(|(key, ip)| entry(key, &vxlan(ip), 3)).collect();
            LeaseSet::snapshot(&LeaseSet::default(), entries, 3)
        };
        let before = list(&[
            ("10.244.1.0-24", "192.0.2.1"),
            ("10.244.2.0-24", "192.0.2.2"),
            ("10.244.3.0-24", "192.0.2.3"),
            ("10.244.4.0-24", "192.0.2.4"),
        ]);
        // The second one's subnet is partly another's, the third one has another subnet, the fourth is back.
        let after =
            list(&[("10.244.2.128-25", "192.0.2.9"), ("10.244.7.0-24", "192.0.2.3"), ("10.244.4.0-24", "192.0.2.4")]);
        assert!(after.lacks_most_of(&before));
        let kept: Vec<String> = after.keeping(before.iter()).iter().map(|lease| lease.key.encode()).collect();
        assert_eq!(kept, ["10.244.1.0-24", "10.244.2.128-25", "10.244.4.0-24", "10.244.7.0-24"]);
    }

    proptest! {
        /// Leases that come, change, end by themselves and are given back, of nodes that move and of such as have no name.
        #[test]
        fn departed_leases_that_are_kept_change_by_change_are_those_kept_at_once(
            steps in vec(vec((0..8_u8, 0..6_u8, 1..6_u8, 0..4_u8), 1..6), 1..20),
        ) {
            let (mut set, mut revision) = (LeaseSet::default(), 0);
            let (mut before, mut merged) = (set.clone(), set.clone());
            for batch in steps {
                for (subnet, node, ip, what) in batch {
                    revision += 1;
                    let key = if subnet < 6 { format!("10.244.{subnet}.0-24") } else { format!("10.244.{}.0-23", (subnet - 6) * 2) };
                    let name = format!(r#"}},"Fabric":{{"v":1,"node":"node-{node}","boot":"b","netns":1,"epoch":1}}}}"#);
                    let value = vxlan(&format!("192.0.2.{ip}"));
                    let value = if node == 0 { value } else { value.replace("}}", &name) };
                    match what {
                        0 | 1 => set.apply(Event::Put(entry(&key, &value, revision)), revision),
                        _ => set.apply(Event::Delete { key, given_back: what == 2 }, revision),
                    }
                }
                merged = set.keeping_departed(&before, &merged);
                before = set.clone();
                prop_assert_eq!(&merged, &set.keeping(set.departed().values()));
            }
        }
    }

    #[test]
    fn more_than_half_of_four_leases_are_most() {
        let set = |keys: std::ops::Range<u8>| {
            let entries = keys.map(|n| entry(&format!("10.244.{n}.0-24"), &vxlan("192.0.2.1"), 1)).collect();
            LeaseSet::snapshot(&LeaseSet::default(), entries, 1)
        };
        for (known, left, most) in [(4, 1, true), (4, 2, false), (3, 0, false), (100, 49, true), (100, 50, false)] {
            assert_eq!(set(1..left + 1).lacks_most_of(&set(1..known + 1)), most, "{known} → {left}");
        }
        assert!(set(10..20).lacks_most_of(&set(1..5)), "others in their place are no comfort");
    }

    #[test]
    fn ended_lease_of_a_fabricd_node_departs_until_it_is_back_or_its_guard_is_gone() {
        let value = |n: u8| {
            vxlan(&format!("192.0.2.{n}"))
                .replace("}}", &format!(r#"}},"Fabric":{{"v":1,"node":"node-{n}","boot":"b","netns":1,"epoch":1}}}}"#))
        };
        let lease = |n: u8| entry(&format!("10.244.{n}.0-24"), &value(n), 3);
        let flannels = entry("10.244.9.0-24", &vxlan("192.0.2.9"), 3);
        let all = vec![lease(1), lease(2), lease(3), lease(4), flannels];
        let mut set = LeaseSet::snapshot(&LeaseSet::default(), all, 3);
        for (n, given_back) in [(1, false), (2, true), (3, false), (9, false)] {
            set.apply(Event::Delete { key: format!("10.244.{n}.0-24"), given_back }, 4);
        }
        let departed = |set: &LeaseSet| set.departed().keys().map(LeaseKey::encode).collect::<Vec<_>>();
        assert_eq!(departed(&set), ["10.244.1.0-24", "10.244.3.0-24"]);
        let listed = LeaseSet::snapshot(&set, vec![], 5);
        assert_eq!(departed(&listed), ["10.244.1.0-24", "10.244.3.0-24", "10.244.4.0-24"], "a list tells no more");
        set.apply(Event::Put(entry("10.244.7.0-24", &value(1), 6)), 6);
        assert_eq!(departed(&set), ["10.244.3.0-24"], "the first is back, elsewhere");
        set.forget_departed(|_| false);
        assert!(set.departed().is_empty());
    }

    #[test]
    fn reservations_come_and_go() {
        let mut set = LeaseSet::default();
        set.reserve("10.244.1.0-24", Some(b"node-1"), 4);
        set.reserve("nonsense", Some(b"node-1"), 5);
        set.reserve("10.244.2.0-24", Some(b"\xff"), 6);
        assert_eq!((set.reservations().len(), set.revision()), (1, 6));
        set.reserve("10.244.1.0-24", None, 7);
        assert!(set.reservations().is_empty());
    }

    #[test]
    fn unreadable_key_is_reported_and_forgotten_with_its_delete() {
        let mut set = LeaseSet::default();
        set.apply(Event::Put(entry("../config", "{}", 1)), 1);
        assert!(set.is_empty() && set.unreadable().len() == 1);
        set.apply(Event::Delete { key: "../config".into(), given_back: false }, 2);
        assert!(set.unreadable().is_empty());
    }
}
