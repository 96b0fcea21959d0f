//! Is it still the same store? An etcd that was wiped, or restored from an older snapshot, answers on the same address
//! as if nothing had happened; a watch from a revision that it has not reached yet is silent, and revisions remembered
//! from before mean something else. Two things give it away: another cluster id, and a revision below one that was seen.

use std::sync::{Mutex, PoisonError};

use etcd_client::ResponseHeader;
use tokio::sync::watch;
use tracing::warn;

/// What is known of the store that answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// How many stores came before it.
    pub(super) generation: u64,
    cluster: Option<u64>,
    revision: i64,
}

/// The response came from another store than the one that was known.
#[derive(Debug)]
pub(super) struct Replaced;

/// The store that answers, and how often it was replaced.
pub(super) struct Identity {
    seen: Mutex<Seen>,
    replaced: watch::Sender<u64>,
}

impl Identity {
    pub(super) fn new() -> Self {
        Self { seen: Mutex::default(), replaced: watch::Sender::new(0) }
    }

    /// What is known now. Ask for it before a request is sent, and give it to [`Identity::check`] with the response:
    /// a linearizable response shows at least the revision that was known by then, but may well be behind one that
    /// came in meanwhile on another connection.
    pub(super) fn seen(&self) -> Seen {
        *self.lock()
    }

    /// Checks the header of a linearizable response to a request that was sent when `before` was known; gives what is
    /// known with it.
    pub(super) fn check(&self, before: Seen, header: &ResponseHeader) -> Seen {
        self.learn(before, header.cluster_id(), header.revision())
    }

    /// Checks the header of a watch response. Its revision may be behind: the member that sends it may be.
    pub(super) fn check_cluster(&self, before: Seen, header: &ResponseHeader) -> Result<(), Replaced> {
        let now = self.learn(before, header.cluster_id(), before.revision);
        if now.generation == before.generation { Ok(()) } else { Err(Replaced) }
    }

    /// Counts the replacements.
    pub(super) fn replaced(&self) -> watch::Receiver<u64> {
        self.replaced.subscribe()
    }

    fn learn(&self, before: Seen, cluster: u64, revision: i64) -> Seen {
        let mut seen = self.lock();
        if seen.generation != before.generation {
            return *seen; // Noticed by somebody else while the request was under way.
        }
        let another = before.cluster.is_some_and(|known| known != cluster);
        if another || revision < before.revision {
            warn!(
                cluster = format_args!("{cluster:x}"),
                revision,
                seen_cluster = format_args!("{:x}", before.cluster.unwrap_or_default()),
                seen_revision = before.revision,
                "store was replaced; reading it again"
            );
            *seen = Seen { generation: before.generation + 1, cluster: Some(cluster), revision };
            self.replaced.send_replace(seen.generation);
        } else {
            seen.cluster = Some(cluster);
            seen.revision = seen.revision.max(revision);
        }
        *seen
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(identity: &Identity, cluster: u64, revision: i64) -> u64 {
        identity.learn(identity.seen(), cluster, revision);
        *identity.replaced().borrow()
    }

    #[test]
    fn another_cluster_or_an_older_revision_is_another_store() {
        let identity = Identity::new();
        assert_eq!(answers(&identity, 7, 100), 0);
        assert_eq!(answers(&identity, 7, 100), 0);
        assert_eq!(answers(&identity, 7, 99), 1, "an older copy");
        assert_eq!(answers(&identity, 7, 101), 1);
        assert_eq!(answers(&identity, 8, 500), 2, "another cluster");
    }

    #[test]
    fn responses_that_overtake_each_other_are_no_replacement() {
        let identity = Identity::new();
        answers(&identity, 7, 100);
        let (first, second) = (identity.seen(), identity.seen());
        identity.learn(second, 7, 102);
        identity.learn(first, 7, 101);
        assert_eq!(*identity.replaced().borrow(), 0);
    }

    #[test]
    fn one_replacement_noticed_by_two_requests_counts_once() {
        let identity = Identity::new();
        answers(&identity, 7, 100);
        let (first, second) = (identity.seen(), identity.seen());
        identity.learn(first, 8, 3);
        identity.learn(second, 8, 2);
        assert_eq!(*identity.replaced().borrow(), 1);
    }
}
