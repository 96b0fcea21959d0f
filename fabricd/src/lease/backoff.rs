//! The delays between attempts.

use std::time::Duration;

/// Delays that double from 0.1 s up to a limit, each with a jitter of its own so that nodes don't march in step.
#[derive(Debug)]
pub(super) struct Backoff {
    failures: u32,
    seed: u64,
}

impl Backoff {
    pub(super) fn new(seed: &str) -> Self {
        Self { failures: 0, seed: fabric_core::model::stable_hash(seed.as_bytes()) }
    }

    /// True while nothing has failed since it was reset.
    pub(super) fn is_fresh(&self) -> bool {
        self.failures == 0
    }

    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    pub(super) fn next(&mut self, limit: Duration) -> Duration {
        let base = Duration::from_millis(100 << self.failures.min(16)).min(limit);
        self.failures += 1;
        self.seed = fabric_core::model::stable_hash(&self.seed.to_le_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are as random as the others")]
        base.mul_f64(0.5 + f64::from(self.seed as u16) / f64::from(u16::MAX))
    }
}
