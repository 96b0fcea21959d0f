//! [`Interner`]: one copy of what thousands of objects have in common: names, labels.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Values of which each is kept once, as long as anybody has it (string interning, for values of any kind).
#[derive(Debug)]
pub struct Interner<T: ?Sized> {
    known: BTreeSet<Arc<T>>,
    /// When there are so many, those that nobody has any more are forgotten.
    sweep_at: usize,
}

/// Fewer are not worth a sweep.
const FEW: usize = 64;

impl<T: ?Sized> Default for Interner<T> {
    fn default() -> Self {
        Self { known: BTreeSet::new(), sweep_at: FEW }
    }
}

impl<T: ?Sized> Clone for Interner<T> {
    fn clone(&self) -> Self {
        Self { known: self.known.clone(), sweep_at: self.sweep_at }
    }
}

impl<T: ?Sized + Ord> Interner<T> {
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
    fn equal_values_are_one_and_go_when_nobody_has_them() {
        let (mut names, mut pairs) = (Interner::<str>::default(), Interner::<(Arc<str>, u8)>::default());
        let mut pair = |name: &str| {
            let pair = (names.share(name), 1);
            pairs.share(pair)
        };
        let (one, same, other) = (pair("web"), pair("web"), pair("db"));
        assert!(Arc::ptr_eq(&one, &same) && one != other);
        for job in 0..1000 {
            drop(pair(&format!("job-{job}")));
        }
        assert!(Arc::ptr_eq(&one, &pair("web")));
        assert!(pairs.len() <= FEW + 1 && names.len() <= 2 * FEW, "{} and {}", pairs.len(), names.len());
        assert!(!names.is_empty());
    }
}
