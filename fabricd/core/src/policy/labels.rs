//! Labels, and a pool that keeps one copy of what thousands of pods have in common.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::sync::Arc;

/// The labels of a pod or a namespace, in the order of their keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Box<[(Arc<str>, Arc<str>)]>);

impl Labels {
    /// The value of a label; `None` when there is no such label.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(other, _)| (**other).cmp(key)).ok()?;
        Some(&self.0[at].1)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }
}

impl FromIterator<(Arc<str>, Arc<str>)> for Labels {
    fn from_iter<I: IntoIterator<Item = (Arc<str>, Arc<str>)>>(labels: I) -> Self {
        let mut labels: Vec<_> = labels.into_iter().collect();
        // A key is there once in JSON too: of two the last one counts.
        labels.reverse();
        labels.sort_by(|(one, _), (other, _)| one.cmp(other));
        labels.dedup_by(|(one, _), (other, _)| one == other);
        Self(labels.into())
    }
}

/// Values of which each is kept once, as long as anybody has it.
#[derive(Debug)]
pub struct Pool<T: ?Sized> {
    known: BTreeSet<Arc<T>>,
    /// When there are so many, those that nobody has any more are forgotten.
    sweep_at: usize,
}

/// Fewer are not worth a sweep.
const FEW: usize = 64;

impl<T: ?Sized> Default for Pool<T> {
    fn default() -> Self {
        Self { known: BTreeSet::new(), sweep_at: FEW }
    }
}

impl<T: ?Sized> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self { known: self.known.clone(), sweep_at: self.sweep_at }
    }
}

impl<T: ?Sized + Ord> Pool<T> {
    /// The one copy of this value.
    pub fn share<V>(&mut self, value: V) -> Arc<T>
    where
        V: Borrow<T> + Into<Arc<T>>,
    {
        if let Some(known) = self.known.get(value.borrow()) {
            return Arc::clone(known);
        }
        if self.known.len() >= self.sweep_at {
            self.known.retain(|value| Arc::strong_count(value) > 1);
            self.sweep_at = FEW.max(self.known.len() * 2);
        }
        let shared: Arc<T> = value.into();
        self.known.insert(Arc::clone(&shared));
        shared
    }

    /// How many values it keeps.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// True when it keeps none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_label_sets_are_one_and_go_when_nobody_has_them() {
        let (mut names, mut sets) = (Pool::<str>::default(), Pool::<Labels>::default());
        let mut labels = |app: &str| {
            let labels: Labels = [(names.share("app"), names.share(app))].into_iter().collect();
            sets.share(labels)
        };
        let (one, same, other) = (labels("web"), labels("web"), labels("db"));
        assert!(Arc::ptr_eq(&one, &same) && one != other);
        assert_eq!((one.get("app"), one.get("ap")), (Some("web"), None));
        for job in 0..1000 {
            drop(labels(&format!("job-{job}")));
        }
        assert!(Arc::ptr_eq(&one, &labels("web")));
        assert!(sets.len() <= FEW + 1, "{}", sets.len());
    }
}
