//! An outage of the store, as the log and the retries see it.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::StoreError;
use crate::backoff::Backoff;

const LOG_EVERY: Duration = Duration::from_secs(60);

/// Spaces the retries and says little: the first failure, then a line a minute, then the end.
pub(super) struct Outage {
    /// Of attempts in a row that did not last.
    retry: Backoff,
    /// Of those, the ones since the store can't be reached.
    failures: u32,
    since: Option<Instant>,
    logged: Option<Instant>,
}

impl Outage {
    /// Notes that the store could not be asked.
    pub(super) fn failed(&mut self, error: &StoreError) {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        self.failures += 1;
        if self.logged.is_none_or(|logged| now - logged >= LOG_EVERY) {
            self.logged = Some(now);
            let seconds = (now - since).as_secs();
            warn!(%error, failures = self.failures, seconds, "cannot follow the store; the leases stay as they are");
        }
    }

    /// Notes that the store answers, but has to be listed anew.
    pub(super) fn relisting(&self, reason: &str) {
        if self.retry.attempts() == 0 {
            info!(reason, "listing all leases anew");
        } else {
            debug!(reason, attempts = self.retry.attempts(), "listing all leases anew");
        }
    }

    /// Notes that the store answers.
    pub(super) fn over(&mut self) {
        if let Some(since) = self.since.take() {
            info!(failures = self.failures, seconds = since.elapsed().as_secs(), "following the store again");
        }
        self.failures = 0;
        self.logged = None;
    }

    /// Notes how long the last attempt went well. One that lasted ends the series.
    pub(super) fn lasted(&mut self, time: Duration) {
        self.retry.lasted(time);
    }

    /// How long to wait before the next attempt: twice as long each time, at most 5 s.
    pub(super) fn delay(&mut self) -> Duration {
        self.retry.delay()
    }
}

impl Default for Outage {
    fn default() -> Self {
        let retry = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        Self { retry, failures: 0, since: None, logged: None }
    }
}
