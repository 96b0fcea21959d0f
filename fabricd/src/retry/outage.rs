//! An outage of a source that is watched, as the log and the retries see it.

use std::fmt::Display;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::Backoff;

const LOG_EVERY: Duration = Duration::from_secs(60);

/// Why a watch can't just go on.
#[derive(Debug)]
pub enum Interrupted<E> {
    /// The source could not be asked.
    Failed(E),
    /// What is known is no base to go on from: everything has to be listed anew. With the reason.
    Relist(String),
}

/// Spaces the retries and says little: the first failure, then a line a minute, then the end.
#[derive(Debug)]
pub struct Outage {
    /// What is watched, for the log.
    kind: &'static str,
    /// Of attempts in a row that did not last.
    retry: Backoff,
    /// Of those, the ones since the source can't be reached.
    failures: u32,
    since: Option<Instant>,
    logged: Option<Instant>,
}

impl Outage {
    /// Of the source of objects of this kind; for the log.
    #[must_use]
    pub fn new(kind: &'static str) -> Self {
        let retry = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        Self { kind, retry, failures: 0, since: None, logged: None }
    }

    /// Takes in why the watch that was tried at `began` has ended, and waits until it is time for the next attempt: twice
    /// as long each time, at most 5 s. A watch that went well for longer ends the series.
    pub async fn wait<E: Display>(&mut self, began: Instant, interrupted: &Interrupted<E>) {
        self.retry.lasted(began.elapsed());
        match interrupted {
            Interrupted::Failed(error) => self.failed(error),
            Interrupted::Relist(reason) => self.relisting(reason),
        }
        sleep(self.retry.delay()).await;
    }

    /// Notes that the source answers.
    pub fn over(&mut self) {
        if let Some(since) = self.since.take() {
            let seconds = since.elapsed().as_secs();
            info!(kind = self.kind, failures = self.failures, seconds, "watching again");
        }
        self.failures = 0;
        self.logged = None;
    }

    fn failed(&mut self, error: &impl Display) {
        let (kind, now) = (self.kind, Instant::now());
        let since = *self.since.get_or_insert(now);
        self.failures += 1;
        if self.logged.is_none_or(|logged| now - logged >= LOG_EVERY) {
            self.logged = Some(now);
            let seconds = (now - since).as_secs();
            warn!(kind, %error, failures = self.failures, seconds, "cannot watch; what is known stays applied");
        }
    }

    /// The source answers, but has to be listed anew.
    fn relisting(&self, reason: &str) {
        let (kind, attempts) = (self.kind, self.retry.attempts());
        if attempts == 0 {
            info!(kind, reason, "listing everything again");
        } else {
            debug!(kind, reason, attempts, "listing everything again");
        }
    }
}
