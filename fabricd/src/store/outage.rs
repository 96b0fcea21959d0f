//! An outage of the store, as the log and the retries see it.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::StoreError;

const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Spaces the retries and says little: the first failure, then a line a minute, then the end.
#[derive(Default)]
pub(super) struct Outage {
    /// Attempts in a row that did not last.
    attempts: u32,
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
        if self.attempts == 0 {
            info!(reason, "listing all leases anew");
        } else {
            debug!(reason, attempts = self.attempts, "listing all leases anew");
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
        if time > LONGEST_DELAY {
            self.attempts = 0;
        }
    }

    /// How long to wait before the next attempt: twice as long each time, at most 5 s, and up to half of it less so
    /// that nodes that failed together don't come back together.
    pub(super) fn delay(&mut self) -> Duration {
        let longest = FIRST_DELAY.saturating_mul(1 << self.attempts.min(16)).min(LONGEST_DELAY);
        self.attempts = self.attempts.saturating_add(1);
        longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_five_seconds_and_start_anew_after_an_attempt_that_lasted() {
        let mut outage = Outage::default();
        for longest in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
            let longest = Duration::from_millis(longest);
            assert!((longest / 2..=longest).contains(&outage.delay()), "{longest:?}");
        }
        outage.lasted(Duration::from_secs(1));
        assert!(outage.delay() > FIRST_DELAY);
        outage.lasted(Duration::from_secs(6));
        assert!(outage.delay() <= FIRST_DELAY);
    }
}
