//! Labels: what thousands of pods have in common, so that each set of them is kept once.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_is_found_by_its_whole_key_and_the_last_of_two_counts() {
        let label = |key: &str, value: &str| (Arc::from(key), Arc::from(value));
        let labels: Labels = [label("app", "old"), label("tier", "front"), label("app", "web")].into_iter().collect();
        assert_eq!((labels.get("app"), labels.get("ap"), labels.iter().count()), (Some("web"), None, 2));
    }
}
