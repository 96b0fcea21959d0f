//! [`CowMap`]: an ordered map whose copies share what they have in common, as leases and set elements need it.
//!
//! Thousands of leases are held by the store's task, the loop and everybody who reads its view, each at a revision of its
//! own. Entries lie in chunks, in the order of their keys. To copy a map is to take one reference; to change a copy copies
//! one chunk; to compare two passes over the chunks that both share. So a change costs itself, whoever holds the map of
//! before.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// A chunk with more entries becomes two.
const MOST: usize = 64;
/// A chunk with fewer joins its neighbour, if both fit into one.
const FEW: usize = 16;

/// A key and its value.
pub type Entry<'a, K, V> = (&'a K, &'a V);

/// An entry as it was, as it is, or both.
pub type Change<'a, K, V> = (Option<Entry<'a, K, V>>, Option<Entry<'a, K, V>>);

/// Entries in the order of their keys.
type Chunk<K, V> = Arc<Vec<(K, V)>>;

/// An ordered map. Cheap to clone.
pub struct CowMap<K, V> {
    /// None is empty.
    chunks: Arc<Vec<Chunk<K, V>>>,
    len: usize,
}

/// An ordered set. Cheap to clone.
pub type CowSet<T> = CowMap<T, ()>;

impl<K, V> Clone for CowMap<K, V> {
    fn clone(&self) -> Self {
        Self { chunks: Arc::clone(&self.chunks), len: self.len }
    }
}

impl<K, V> Default for CowMap<K, V> {
    fn default() -> Self {
        Self { chunks: Arc::default(), len: 0 }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for CowMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|(key, value)| (key, value)))
            .finish()
    }
}

impl<K: Ord, V: PartialEq> PartialEq for CowMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.changes(other, V::eq).next().is_none()
    }
}

impl<K: Ord, V: Eq> Eq for CowMap<K, V> {}

impl<K, V> CowMap<K, V> {
    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.iter().flat_map(|chunk| chunk.iter()).map(|(key, value)| (key, value))
    }

    /// All keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values, in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// True when both are copies of one map, and neither was changed since.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.chunks, &other.chunks)
    }
}

impl<K: Ord, V> CowMap<K, V> {
    /// The chunk that has `key`, or would have it, and where in it.
    fn place(&self, key: &K) -> (usize, Result<usize, usize>) {
        self.place_where(|other| other.cmp(key))
    }

    /// The same of a key that is told by how others compare with it.
    fn place_where(&self, order: impl Fn(&K) -> Ordering) -> (usize, Result<usize, usize>) {
        let after = self.chunks.partition_point(|chunk| order(&chunk[0].0).is_le());
        let chunk = after.saturating_sub(1);
        let within = self.chunks.get(chunk).map_or(Err(0), |chunk| chunk.binary_search_by(|(other, _)| order(other)));
        (chunk, within)
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &K) -> Option<&V> {
        let (chunk, within) = self.place(key);
        let within = within.ok()?;
        Some(&self.chunks[chunk][within].1)
    }

    /// Whether there is such a key.
    #[must_use]
    pub fn contains(&self, key: &K) -> bool {
        self.place(key).1.is_ok()
    }

    /// The entry whose key `order` calls equal: it says how a key compares with the one that is looked for.
    pub fn find(&self, order: impl Fn(&K) -> Ordering) -> Option<Entry<'_, K, V>> {
        let (chunk, within) = self.place_where(order);
        let within = within.ok()?;
        let (key, value) = &self.chunks[chunk][within];
        Some((key, value))
    }

    /// The entries from `key` on, in the order of their keys.
    pub fn starting_at<'a>(&'a self, key: &K) -> impl Iterator<Item = (&'a K, &'a V)> + use<'a, K, V> {
        self.entries_at(self.place(key))
    }

    /// The entries from a key on, in order: `order` says how a key compares with that.
    pub fn starting_where<F: Fn(&K) -> Ordering>(
        &self,
        order: F,
    ) -> impl Iterator<Item = Entry<'_, K, V>> + use<'_, K, V, F> {
        self.entries_at(self.place_where(order))
    }

    fn entries_at(
        &self,
        (chunk, within): (usize, Result<usize, usize>),
    ) -> impl Iterator<Item = Entry<'_, K, V>> + use<'_, K, V> {
        let (Ok(skipped) | Err(skipped)) = within;
        let entries = self.chunks[chunk..].iter().flat_map(|chunk| chunk.iter()).skip(skipped);
        entries.map(|(key, value)| (key, value))
    }

    /// What differs from `before`, in the order of the keys: each entry as it was, as it is, or both. `same` says that a
    /// value is as it was. What both share is not looked into.
    pub fn changes<'a>(
        &'a self,
        before: &'a Self,
        same: impl Fn(&V, &V) -> bool,
    ) -> impl Iterator<Item = Change<'a, K, V>> {
        self.changes_where(before, move |(_, was), (_, is)| same(was, is))
    }

    /// The same where keys that compare as equal may differ.
    pub fn changes_where<'a>(
        &'a self,
        before: &'a Self,
        same: impl Fn(Entry<'_, K, V>, Entry<'_, K, V>) -> bool,
    ) -> impl Iterator<Item = Change<'a, K, V>> {
        let (mut was, mut is) = (Cursor::new(before), Cursor::new(self));
        std::iter::from_fn(move || {
            loop {
                Cursor::pass_shared(&mut was, &mut is);
                let order = match (was.entry(), is.entry()) {
                    (Some((was, _)), Some((is, _))) => was.cmp(is),
                    (Some(_), None) => Ordering::Less,
                    (None, Some(_)) => Ordering::Greater,
                    (None, None) => return None,
                };
                match order {
                    Ordering::Less => return Some((was.next(), None)),
                    Ordering::Greater => return Some((None, is.next())),
                    Ordering::Equal => {
                        let (was, is) = (was.next()?, is.next()?);
                        if !same(was, is) {
                            return Some((Some(was), Some(is)));
                        }
                    }
                }
            }
        })
    }
}

impl<K: Ord + Clone, V: Clone> CowMap<K, V> {
    /// Sets the value of a key; gives the one before.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let (at, within) = self.place(&key);
        let chunks = Arc::make_mut(&mut self.chunks);
        if chunks.is_empty() {
            chunks.push(Arc::default());
        }
        let chunk = Arc::make_mut(&mut chunks[at]);
        match within {
            Ok(within) => Some(std::mem::replace(&mut chunk[within], (key, value)).1),
            Err(within) if chunk.len() < MOST => {
                chunk.insert(within, (key, value));
                self.len += 1;
                None
            }
            Err(within) => {
                // Keys that come in their order leave whole chunks behind.
                let kept = if within == MOST { MOST } else { MOST / 2 };
                let mut rest = chunk.split_off(kept);
                chunk.shrink_to_fit();
                if within < kept {
                    chunk.insert(within, (key, value));
                } else {
                    rest.insert(within - kept, (key, value));
                }
                chunks.insert(at + 1, Arc::new(rest));
                self.len += 1;
                None
            }
        }
    }

    /// Takes as little memory as it can, after many changes: full chunks with no room for more.
    pub fn compact(&mut self) {
        let mut chunks: Vec<Chunk<K, V>> = Vec::with_capacity(self.len.div_ceil(MOST));
        let mut entries = self.chunks.iter().flat_map(|chunk| chunk.iter()).cloned();
        for first in (0..self.len).step_by(MOST) {
            let mut chunk = Vec::with_capacity(MOST.min(self.len - first));
            chunk.extend(entries.by_ref().take(MOST));
            chunks.push(Arc::new(chunk));
        }
        self.chunks = Arc::new(chunks);
    }

    /// Removes a key; gives its value.
    pub fn remove(&mut self, key: &K) -> Option<V> {
        let (at, within) = self.place(key);
        let within = within.ok()?;
        let chunks = Arc::make_mut(&mut self.chunks);
        let (_, value) = Arc::make_mut(&mut chunks[at]).remove(within);
        self.len -= 1;
        if chunks[at].is_empty() {
            chunks.remove(at);
        } else if chunks[at].len() < FEW && at > 0 && chunks[at - 1].len() + chunks[at].len() <= MOST {
            let rest = chunks.remove(at);
            Arc::make_mut(&mut chunks[at - 1]).extend(rest.iter().cloned());
        }
        Some(value)
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for CowMap<K, V> {
    /// In as little memory as it takes.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut entries: Vec<(K, V)> = entries.into_iter().collect();
        // Of two with one key the last one counts, as in any map.
        entries.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut unique: Vec<(K, V)> = Vec::with_capacity(entries.len());
        for entry in entries {
            match unique.last_mut().filter(|last| last.0 == entry.0) {
                Some(last) => *last = entry,
                None => unique.push(entry),
            }
        }
        let chunks = unique.chunks(MOST).map(|chunk| Arc::new(chunk.to_vec())).collect();
        Self { len: unique.len(), chunks: Arc::new(chunks) }
    }
}

impl<T: Ord + Clone> FromIterator<T> for CowSet<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        elements.into_iter().map(|element| (element, ())).collect()
    }
}

/// A place in a map.
struct Cursor<'a, K, V> {
    chunks: &'a [Chunk<K, V>],
    at: usize,
}

impl<'a, K, V> Cursor<'a, K, V> {
    fn new(map: &'a CowMap<K, V>) -> Self {
        Self { chunks: &map.chunks, at: 0 }
    }

    fn entry(&self) -> Option<(&'a K, &'a V)> {
        self.chunks.first().map(|chunk| &chunk[self.at]).map(|(key, value)| (key, value))
    }

    fn next(&mut self) -> Option<(&'a K, &'a V)> {
        let entry = self.entry()?;
        self.at += 1;
        if self.at == self.chunks[0].len() {
            (self.chunks, self.at) = (&self.chunks[1..], 0);
        }
        Some(entry)
    }

    /// Moves both over the chunks that they are before and that are one.
    fn pass_shared(one: &mut Self, other: &mut Self) {
        while one.at == 0
            && other.at == 0
            && let (Some(a), Some(b)) = (one.chunks.first(), other.chunks.first())
            && Arc::ptr_eq(a, b)
        {
            (one.chunks, other.chunks) = (&one.chunks[1..], &other.chunks[1..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn steps() -> impl Strategy<Value = Vec<(u16, Option<u8>)>> {
        prop::collection::vec((0..400_u16, prop::option::weighted(0.6, 0..4_u8)), 0..600)
    }

    fn take(map: &mut CowMap<u16, u8>, model: &mut BTreeMap<u16, u8>, steps: &[(u16, Option<u8>)]) {
        for (key, value) in steps {
            match value {
                Some(value) => assert_eq!(map.insert(*key, *value), model.insert(*key, *value)),
                None => assert_eq!(map.remove(key), model.remove(key)),
            }
        }
    }

    proptest! {
        #[test]
        fn behaves_as_a_btree_map_and_tells_what_differs_from_a_copy(
            first in prop::collection::vec((0..400_u16, 0..4_u8), 0..400), before in steps(), after in steps(),
            compacts in any::<bool>(),
        ) {
            let (mut map, mut model): (CowMap<u16, u8>, BTreeMap<u16, u8>) =
                (first.iter().copied().collect(), first.into_iter().collect());
            take(&mut map, &mut model, &before);
            let (copy, model_of_copy) = (map.clone(), model.clone());
            take(&mut map, &mut model, &after);
            if compacts {
                map.compact();
            }
            for (map, model) in [(&map, &model), (&copy, &model_of_copy)] {
                prop_assert!(map.iter().eq(model.iter()) && map.len() == model.len());
                prop_assert!(map.chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= MOST));
                prop_assert!((0..400).step_by(7).all(|key| map.starting_at(&key).eq(model.range(key..))));
                prop_assert!((0..400).all(|key| map.get(&key) == model.get(&key) && map.contains(&key) == model.contains_key(&key)));
            }
            let told: Vec<_> = map.changes(&copy, u8::eq).map(|(was, is)| (was.map(|w| (*w.0, *w.1)), is.map(|i| (*i.0, *i.1)))).collect();
            let keys = (0..400_u16).filter(|key| model.get(key) != model_of_copy.get(key));
            let differ: Vec<_> = keys
                .map(|key| (model_of_copy.get(&key).map(|v| (key, *v)), model.get(&key).map(|v| (key, *v))))
                .collect();
            prop_assert_eq!(told, differ);
            prop_assert_eq!(map == copy, model == model_of_copy);
        }
    }

    #[test]
    fn comparison_with_a_copy_passes_over_what_both_share() {
        let before: CowMap<u16, u16> = (0..5000).map(|key| (key, 0)).collect();
        let mut after = before.clone();
        after.insert(700, 1);
        after.remove(&4000);
        let looked = std::cell::Cell::new(0);
        let same = |was: &u16, is: &u16| {
            looked.set(looked.get() + 1);
            was == is
        };
        assert_eq!(after.changes(&before, same).count(), 2);
        assert!(looked.get() <= 2 * MOST, "{} values were compared", looked.get());
    }
}
