//! Who is meant by the rules of this node's pods, by number: equal expressions are one group, whoever wrote them.
//!
//! A rule in the kernel asks for a group's number and an address in one look-up, so there is one set of all memberships,
//! however many groups there are. A number begins as a hash of what the group is, so that a daemon that starts again
//! gives the same ones, and no number changes its meaning. Two groups never share one: of two with one hash the second
//! takes the next that is free.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::sync::Arc;

use super::model::{IpBlock, Peers, PodPeer, Protocol};
use crate::model::stable_hash;

/// Pods that a rule names by labels: any of these expressions.
pub type PodGroup = BTreeSet<PodPeer>;

/// Addresses that a rule names.
pub type BlockGroup = BTreeSet<IpBlock>;

/// Ports by protocol, first and last; none overlaps another.
pub type PortGroup = BTreeSet<(Protocol, u16, u16)>;

/// Ports that a rule names at the other end: each peer may have them elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NamedGroup {
    /// Of whom; `None` is every pod.
    pub peers: Option<Peers>,
    /// Which ports.
    pub ports: BTreeSet<(Protocol, Arc<str>)>,
}

/// Numbers of some things.
#[derive(Clone, Debug)]
pub struct Numbers<K>(BTreeMap<K, u32>);

impl<K: Ord + Debug> Numbers<K> {
    /// Numbers all of these.
    pub fn of(keys: impl IntoIterator<Item = K>) -> Self {
        let (keys, mut taken): (BTreeSet<K>, _) = (keys.into_iter().collect(), BTreeSet::new());
        let mut number = |key: &K| {
            let mut number = first_choice(key);
            while !taken.insert(number) {
                number = number.wrapping_add(1);
            }
            number
        };
        Self(keys.into_iter().map(|key| (number(&key), key)).map(|(number, key)| (key, number)).collect())
    }

    /// The number of one.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<u32> {
        self.0.get(key).copied()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&K, u32)> {
        self.0.iter().map(|(key, number)| (key, *number))
    }
}

/// The upper half of its hash.
fn first_choice(key: &impl Debug) -> u32 {
    (stable_hash(format!("{key:?}").as_bytes()) >> 32) as u32
}

/// Ports as ranges that don't overlap.
#[must_use]
pub fn merged(ranges: impl IntoIterator<Item = (Protocol, u16, u16)>) -> PortGroup {
    let sorted: BTreeSet<(Protocol, u16, u16)> = ranges.into_iter().collect();
    let mut merged: Vec<(Protocol, u16, u16)> = vec![];
    for (protocol, first, last) in sorted {
        match merged.last_mut() {
            Some(before) if before.0 == protocol && u32::from(first) <= u32::from(before.2) + 1 => {
                before.2 = before.2.max(last);
            }
            _ => merged.push((protocol, first, last)),
        }
    }
    merged.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_things_have_one_number_and_no_two_share_one() {
        let numbers = Numbers::of(["a", "b", "a"]);
        assert_eq!(numbers.iter().count(), 2);
        assert_eq!(numbers.get(&"a"), Numbers::of(["a", "c"]).get(&"a"), "whatever else there is");
        // All hash alike.
        #[derive(PartialEq, Eq, PartialOrd, Ord)]
        struct Alike(u8);
        impl Debug for Alike {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("alike")
            }
        }
        let numbers = Numbers::of([Alike(1), Alike(2), Alike(3)]);
        let distinct: BTreeSet<u32> = numbers.iter().map(|(_, number)| number).collect();
        assert_eq!(distinct.len(), 3);
    }

    #[test]
    fn ports_that_overlap_or_touch_are_one_range() {
        use Protocol::{Tcp, Udp};
        let ranges = [(Tcp, 80, 80), (Tcp, 81, 90), (Tcp, 85, 100), (Tcp, 102, 102), (Udp, 80, 80), (Udp, 1, u16::MAX)];
        assert_eq!(merged(ranges), [(Tcp, 80, 100), (Tcp, 102, 102), (Udp, 1, u16::MAX)].into());
    }
}
