//! [`Derived`]: which objects of the user are accepted, and so which rows there are, kept up to date change by change.
//!
//! An object (a lease, a Service, a policy) makes rows of kernel tables, by a [`Planner`] that looks at this object and its
//! context alone. What objects can take from each other is said by *keys*: a subnet, a MAC address, a port. Of two objects
//! that claim clashing keys the older one is accepted; the other is refused as a whole, with a reason that names the older,
//! and is accepted by itself when that goes. So what is accepted depends on the objects alone, never on the order in
//! which they came, and a change costs what it changes:
//!
//! ```text
//! came, went ──► Derived: who has which key ──► Turned {went, came} ──► their rows ──► dirty keys ──► diff of these
//! ```
//!
//! The rows themselves lie in the tables that are compared with the kernel's, and nowhere else: what an object that goes
//! had made is planned once more, to be removed. So the index costs a key and a pointer for each key of an object.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

/// The entries that may differ from what they were.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dirty<K> {
    /// Any.
    Everything,
    /// No others than these.
    Keys(BTreeSet<K>),
}

impl<K: Ord> Dirty<K> {
    /// True when nothing is dirty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self, Self::Keys(keys) if keys.is_empty())
    }

    /// One more.
    pub fn add(&mut self, key: K) {
        if let Self::Keys(keys) = self {
            keys.insert(key);
        }
    }

    /// These too.
    pub fn extend(&mut self, more: Self) {
        match (&mut *self, more) {
            (Self::Keys(keys), Self::Keys(more)) => keys.extend(more),
            _ => *self = Self::Everything,
        }
    }

    /// Whether this entry may differ.
    pub fn covers(&self, key: &K) -> bool {
        match self {
            Self::Everything => true,
            Self::Keys(keys) => keys.contains(key),
        }
    }
}

impl<K> Default for Dirty<K> {
    /// Nothing.
    fn default() -> Self {
        Self::Keys(BTreeSet::new())
    }
}

/// What of an object's keys two objects can't have.
pub trait Key: Ord {
    /// Whether only one object can have the two. Of keys that no two objects have, those that clash with one are its
    /// nearest neighbour before it, and those that follow it without a gap: as equal values do, and nested prefixes.
    fn clashes(&self, other: &Self) -> bool {
        self == other
    }
}

/// Tells what objects claim. Pure; holds the context, and another context is another planner.
pub trait Planner {
    /// What rows are made of.
    type Object;
    /// Age, and identity: no two objects have the same. The least is the oldest.
    type Rank: Ord + Copy;
    /// What only one object can have.
    type Key: Key;
    /// Why an object is not accepted.
    type Refusal;

    /// The rank of an object.
    fn rank(&self, object: &Self::Object) -> Self::Rank;

    /// What an object claims.
    ///
    /// # Errors
    /// It can't be accepted, whatever other objects there are.
    fn claims(&self, object: &Self::Object) -> Result<Vec<Self::Key>, Self::Refusal>;

    /// Why an object that claims `key` is not accepted beside `holder`, an older one.
    fn refusal(&self, key: &Self::Key, holder: &Self::Object) -> Self::Refusal;
}

/// Objects that have been accepted, and that no longer are. One that has changed is in both.
#[derive(Debug)]
pub struct Turned<O> {
    /// As they were.
    pub went: Vec<Arc<O>>,
    /// As they are.
    pub came: Vec<Arc<O>>,
}

impl<O> Turned<O> {
    /// True when nothing has changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.went.is_empty() && self.came.is_empty()
    }
}

impl<O> Default for Turned<O> {
    fn default() -> Self {
        Self { went: vec![], came: vec![] }
    }
}

type Refused<P> = BTreeMap<<P as Planner>::Rank, (Arc<<P as Planner>::Object>, <P as Planner>::Refusal)>;

/// The objects accepted, by their keys, and those that are not.
pub struct Derived<P: Planner> {
    planner: P,
    /// Who has which key. No two of these keys clash.
    holders: BTreeMap<P::Key, Arc<P::Object>>,
    accepted: usize,
    /// Those for which an older one has a key.
    waiting: Refused<P>,
    /// Those that can't be used at all.
    unusable: Refused<P>,
}

impl<P: Planner> Derived<P> {
    /// Of these objects. No two have the same rank.
    pub fn new(planner: P, objects: impl IntoIterator<Item = Arc<P::Object>>) -> (Self, Turned<P::Object>) {
        let (holders, waiting, unusable) = (BTreeMap::new(), Refused::<P>::new(), Refused::<P>::new());
        let mut derived = Self { planner, holders, accepted: 0, waiting, unusable };
        let turned = derived.update([], objects);
        derived.holders = derived.holders.into_iter().collect();
        (derived, turned)
    }

    /// What it was derived by.
    #[must_use]
    pub fn planner(&self) -> &P {
        &self.planner
    }

    /// How many objects are accepted.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.accepted
    }

    /// Those that are not, with the reason.
    pub fn refused(&self) -> impl Iterator<Item = (&Arc<P::Object>, &P::Refusal)> {
        self.waiting.values().chain(self.unusable.values()).map(|(object, refusal)| (object, refusal))
    }

    /// Takes over that objects went and came; one that has changed did both. `went` are as they came.
    pub fn update(
        &mut self,
        went: impl IntoIterator<Item = Arc<P::Object>>,
        came: impl IntoIterator<Item = Arc<P::Object>>,
    ) -> Turned<P::Object> {
        let mut turned = Turned::default();
        // In the order of their age: what is decided about one depends on older ones alone.
        let mut due: BTreeMap<P::Rank, Arc<P::Object>> = BTreeMap::new();
        let mut oldest: Option<P::Rank> = None;
        for object in went {
            let rank = self.planner.rank(&object);
            if self.unusable.remove(&rank).is_none() && self.waiting.remove(&rank).is_none() {
                self.release(&object);
                oldest = Some(oldest.map_or(rank, |oldest| oldest.min(rank)));
                turned.went.push(object);
            }
        }
        if let Some(oldest) = oldest {
            self.ask_again(oldest, &mut due);
        }
        for object in came {
            due.insert(self.planner.rank(&object), object);
        }
        while let Some((rank, object)) = due.pop_first() {
            let keys = match self.planner.claims(&object) {
                Ok(keys) => keys,
                Err(refusal) => {
                    self.unusable.insert(rank, (object, refusal));
                    continue;
                }
            };
            if let Some(refusal) = self.refusal(rank, &keys) {
                self.waiting.insert(rank, (object, refusal));
                continue;
            }
            // An older one has come: younger ones give way.
            while let Some(holder) = keys.iter().find_map(|key| self.clashing(key).next().cloned()) {
                self.release(&holder);
                due.insert(self.planner.rank(&holder), Arc::clone(&holder));
                turned.went.push(holder);
            }
            self.holders.extend(keys.into_iter().map(|key| (key, Arc::clone(&object))));
            self.accepted += 1;
            self.ask_again(rank, &mut due);
            turned.came.push(object);
        }
        turned
    }

    /// Why an object of this rank can't have these keys: the first that an older one has.
    fn refusal(&self, rank: P::Rank, keys: &[P::Key]) -> Option<P::Refusal> {
        let older = |holder: &&Arc<P::Object>| self.planner.rank(holder) < rank;
        keys.iter().find_map(|key| Some(self.planner.refusal(key, self.clashing(key).find(older)?)))
    }

    /// Who has a key that clashes with this one, in the order of the keys.
    fn clashing<'a>(&'a self, key: &'a P::Key) -> impl Iterator<Item = &'a Arc<P::Object>> {
        let before = self.holders.range(..key).next_back().filter(|(held, _)| held.clashes(key));
        let following = self.holders.range(key..).take_while(|(held, _)| held.clashes(key));
        before.into_iter().chain(following).map(|(_, holder)| holder)
    }

    /// Takes its keys from an accepted object.
    fn release(&mut self, object: &P::Object) {
        for key in self.planner.claims(object).ok().into_iter().flatten() {
            self.holders.remove(&key);
        }
        self.accepted -= 1;
    }

    /// One of this rank has been accepted or has gone: those that wait and are younger may be accepted now, or refused
    /// because of another.
    fn ask_again(&mut self, rank: P::Rank, due: &mut BTreeMap<P::Rank, Arc<P::Object>>) {
        due.extend(self.waiting.split_off(&rank).into_iter().map(|(rank, (object, _))| (rank, object)));
    }
}

impl<P: Planner> fmt::Debug for Derived<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let refused = self.waiting.len() + self.unusable.len();
        f.debug_struct("Derived").field("accepted", &self.accepted).field("refused", &refused).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::Subnet;

    /// An object of a test: its age and name, and the prefixes that it claims.
    type Object = (u8, Vec<Subnet>);

    impl Key for Subnet {
        fn clashes(&self, other: &Self) -> bool {
            self.overlaps(*other)
        }
    }

    struct Prefixes;

    impl Planner for Prefixes {
        type Object = Object;
        type Rank = u8;
        type Key = Subnet;
        type Refusal = String;

        fn rank(&self, object: &Object) -> u8 {
            object.0
        }

        fn claims(&self, object: &Object) -> Result<Vec<Subnet>, String> {
            if object.1.is_empty() { Err("it claims nothing".into()) } else { Ok(object.1.clone()) }
        }

        fn refusal(&self, key: &Subnet, holder: &Object) -> String {
            format!("{key} is of {}", holder.0)
        }
    }

    /// Who is accepted and who is not, decided one after the other from the oldest on: what [`Derived`] must come to.
    fn all_at_once(objects: &BTreeMap<u8, Object>) -> (BTreeSet<u8>, BTreeMap<u8, String>) {
        let (mut accepted, mut refused): (BTreeMap<u8, &Object>, BTreeMap<u8, String>) = Default::default();
        for (rank, object) in objects {
            let held = |key: &Subnet| {
                let held = accepted.values().flat_map(|holder| holder.1.iter().map(move |held| (*held, holder.0)));
                held.filter(|(held, _)| held.overlaps(*key)).min().map(|(_, holder)| format!("{key} is of {holder}"))
            };
            match object.1.iter().find_map(held) {
                _ if object.1.is_empty() => drop(refused.insert(*rank, "it claims nothing".into())),
                Some(why) => drop(refused.insert(*rank, why)),
                None => drop(accepted.insert(*rank, object)),
            }
        }
        (accepted.into_keys().collect(), refused)
    }

    /// Both families; a /22 spans four /24, a /62 four /64.
    fn prefix() -> impl Strategy<Value = Subnet> {
        let v4 = (0..12_u8, 22..25_u8)
            .prop_map(|(n, len)| Subnet::holding(std::net::IpAddr::from([10, 244, n, 0]), len).unwrap());
        let v6 = (0..12_u16, 62..65_u8)
            .prop_map(|(n, len)| Subnet::holding(std::net::IpAddr::from([0xfd00, 0, 0, n, 0, 0, 0, 0]), len).unwrap());
        prop_oneof![v4, v6]
    }

    /// Its own prefixes don't clash.
    fn claims() -> impl Strategy<Value = Vec<Subnet>> {
        prop::collection::vec(prefix(), 0..3).prop_map(|all| {
            all.into_iter().fold(vec![], |mut kept: Vec<Subnet>, key| {
                if !kept.iter().any(|other| other.overlaps(key)) {
                    kept.push(key);
                }
                kept
            })
        })
    }

    type Batch = BTreeMap<u8, Option<Vec<Subnet>>>;

    proptest! {
        /// Whatever order objects come, change and go in, in batches of up to 64, all that is accepted and refused is as if
        /// they had come at once; and what has turned is exactly the difference.
        #[test]
        fn any_order_of_puts_and_removes_is_all_at_once(
            batches in prop::collection::vec(prop::collection::btree_map(0..80_u8, prop::option::weighted(0.7, claims()), 1..65), 1..12),
        ) {
            let batches: Vec<Batch> = batches;
            let (mut derived, _) = Derived::new(Prefixes, []);
            let mut objects: BTreeMap<u8, Arc<Object>> = BTreeMap::new();
            let mut accepted: BTreeMap<u8, Arc<Object>> = BTreeMap::new();
            for batch in batches {
                let (mut went, mut came) = (vec![], vec![]);
                for (rank, claims) in batch {
                    went.extend(objects.remove(&rank));
                    if let Some(claims) = claims {
                        let object = Arc::new((rank, claims));
                        came.push(Arc::clone(&object));
                        objects.insert(rank, object);
                    }
                }
                let turned = derived.update(went, came);
                for object in &turned.went {
                    prop_assert!(accepted.remove(&object.0).is_some_and(|was| Arc::ptr_eq(&was, object)));
                }
                for object in turned.came {
                    prop_assert!(accepted.insert(object.0, object).is_none());
                }
                let plain = objects.iter().map(|(rank, object)| (*rank, (**object).clone())).collect();
                let (expected, refused) = all_at_once(&plain);
                prop_assert_eq!(accepted.keys().copied().collect::<BTreeSet<_>>(), expected);
                prop_assert_eq!(derived.accepted(), accepted.len());
                let said: BTreeMap<u8, String> = derived.refused().map(|(object, why)| (object.0, why.clone())).collect();
                prop_assert_eq!(&said, &refused);
                let (at_once, _) = Derived::new(Prefixes, objects.values().cloned());
                let said: BTreeMap<u8, String> = at_once.refused().map(|(object, why)| (object.0, why.clone())).collect();
                prop_assert_eq!(said, refused);
            }
        }
    }

    #[test]
    fn refused_object_comes_into_force_when_the_older_one_goes() {
        let object = |rank, prefix: &str| Arc::new((rank, vec![prefix.parse().unwrap()]));
        let (old, young, youngest) =
            (object(1, "10.244.0.0/22"), object(2, "10.244.1.0/24"), object(3, "10.244.1.0/25"));
        let ranks = |objects: &[Arc<Object>]| objects.iter().map(|object| object.0).collect::<Vec<_>>();
        let (mut derived, turned) = Derived::new(Prefixes, [youngest, Arc::clone(&old), young]);
        assert_eq!(ranks(&turned.came), [1]);
        let turned = derived.update([Arc::clone(&old)], []);
        assert_eq!((ranks(&turned.went), ranks(&turned.came)), (vec![1], vec![2]));
        let turned = derived.update([], [old]);
        assert_eq!((ranks(&turned.went), ranks(&turned.came)), (vec![2], vec![1]), "and gives way when it is back");
        assert_eq!(
            derived.refused().map(|(_, why)| why.as_str()).collect::<Vec<_>>(),
            ["10.244.1.0/24 is of 1", "10.244.1.0/25 is of 1"]
        );
    }
}
