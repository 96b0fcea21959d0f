//! [`Retention`]: peers that are not let go of because the store has forgotten them.
//!
//! A lease that ended by itself says that a node and the store lost touch, not that its pods are gone: its routes stay
//! until the subnet is leased anew. And a store that was emptied, or set back to an older copy of
//! itself, shows few leases until the nodes have claimed theirs again: the peers of before stay for as long as that may
//! take.

use std::sync::Arc;

use fabric_core::leases::LeaseSet;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::lease::SETTLING;

/// The leases of before, as long as they count.
#[derive(Debug)]
pub struct Retention {
    before: Option<Arc<LeaseSet>>,
    until: Option<Instant>,
    /// What was last given out.
    last: Option<Arc<LeaseSet>>,
    /// What was last made of which set, and whether `before` counted.
    merged: Option<(Arc<LeaseSet>, Arc<LeaseSet>, bool)>,
}

impl Retention {
    /// What was remembered counts until the store shows its leases.
    #[must_use]
    pub fn new(remembered: Option<Arc<LeaseSet>>) -> Self {
        Self { before: remembered, until: None, last: None, merged: None }
    }

    /// Keeps the peers that are known now for a while.
    pub fn store_was_replaced(&mut self) {
        if let Some(last) = &self.last {
            warn!(
                peers = last.len(),
                "the store was emptied or set back; the peers stay until they have claimed their subnets again"
            );
            (self.before, self.until) = (Some(last.clone()), Some(Instant::now() + SETTLING));
            self.merged = None;
        }
    }

    /// When what is kept is let go of.
    #[must_use]
    pub fn until(&self) -> Option<Instant> {
        self.until
    }

    /// The leases that count now that the store shows `set`; true when they are from disk alone.
    pub fn merge(&mut self, set: Option<Arc<LeaseSet>>) -> (Option<Arc<LeaseSet>>, bool) {
        let Some(set) = set else { return (self.before.clone(), self.before.is_some()) };
        if let (None, Some(before)) = (&self.last, &self.before) {
            // The first look at the store: is it the one that was remembered?
            if set.revision() < before.revision() || set.lacks_most_of(before) {
                warn!(
                    remembered = before.len(),
                    shown = set.len(),
                    "the store has lost leases since this daemon ended"
                );
                self.until = Some(Instant::now() + SETTLING);
            }
        }
        if self.until.is_none_or(|end| end <= Instant::now()) {
            if self.until.take().is_some() {
                info!(peers = set.len(), "peers that have not claimed their subnets again are removed");
            }
            self.before = None;
        }
        let merged = self.with_kept(&set);
        self.merged = Some((set, merged.clone(), self.before.is_some()));
        self.last = Some(merged.clone());
        (Some(merged), false)
    }

    /// The set, and what of before and of its own departed leases still counts: a node that was cut off from the store for
    /// longer than its lease lasts may well be reachable itself.
    fn with_kept(&self, set: &Arc<LeaseSet>) -> Arc<LeaseSet> {
        match (&self.before, &self.merged) {
            (before, Some((of, merged, with_before))) if Arc::ptr_eq(of, set) && *with_before == before.is_some() => {
                merged.clone()
            }
            (None, _) if set.departed().is_empty() => set.clone(),
            (None, Some((of, merged, false))) => Arc::new(set.keeping_departed(of, merged)),
            (before, _) => {
                let before = before.iter().flat_map(|before| before.iter());
                Arc::new(set.keeping(before.chain(set.departed().values())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_core::leases::Entry;
    use tokio::time::advance;

    fn set(numbers: std::ops::Range<u8>, revision: i64) -> Arc<LeaseSet> {
        let entry = |n| {
            let value = format!(
                r#"{{"PublicIP":"192.0.2.{n}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:07"}}}}"#
            );
            Entry { key: format!("10.244.{n}.0-24"), value: value.into(), create_revision: 1, mod_revision: 1 }
        };
        Arc::new(LeaseSet::snapshot(&LeaseSet::default(), numbers.map(entry).collect(), revision))
    }

    fn count(kept: &mut Retention, set: Arc<LeaseSet>) -> usize {
        kept.merge(Some(set)).0.unwrap().len()
    }

    #[tokio::test(start_paused = true)]
    async fn peers_outlive_a_replaced_store_for_two_minutes() {
        let mut kept = Retention::new(None);
        assert_eq!(kept.merge(None), (None, false));
        assert_eq!(count(&mut kept, set(1..9, 50)), 8);
        kept.store_was_replaced();
        assert_eq!(count(&mut kept, set(1..1, 1)), 8);
        assert_eq!(count(&mut kept, set(1..4, 7)), 8, "three are back, five are kept");
        advance(SETTLING).await;
        assert_eq!(count(&mut kept, set(1..7, 9)), 6);
        assert_eq!(kept.until(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn remembered_peers_count_until_the_store_answers_and_longer_if_it_lost_them() {
        let mut kept = Retention::new(Some(set(1..9, 50)));
        assert_eq!(kept.merge(None), (Some(set(1..9, 50)), true));
        assert_eq!(count(&mut kept, set(1..6, 60)), 5, "three have left meanwhile");
        for (shown, why) in [(set(1..3, 60), "most are missing"), (set(1..8, 40), "an older copy")] {
            let mut kept = Retention::new(Some(set(1..9, 50)));
            assert_eq!(count(&mut kept, shown), 8, "{why}");
            advance(SETTLING).await;
            assert!(count(&mut kept, set(1..3, 61)) == 2, "{why}");
        }
    }
}
