//! [`Backoff`]: the delays between attempts, for whatever is tried again.

use std::time::Duration;

/// Delays that double from the first up to the longest one, each less up to half of it, so that nodes which failed
/// together don't come back together. The longest is never exceeded: it is how long somebody waits at most.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    attempts: u32,
    random: fastrand::Rng,
}

impl Backoff {
    /// Delays from `first` to `longest`.
    #[must_use]
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, attempts: 0, random: fastrand::Rng::new() }
    }

    /// The same delays in each run that has the same seed.
    #[must_use]
    pub fn seeded(self, seed: u64) -> Self {
        Self { random: fastrand::Rng::with_seed(seed), ..self }
    }

    /// How long to wait before the next attempt.
    pub fn delay(&mut self) -> Duration {
        self.delay_up_to(self.longest)
    }

    /// The same with another limit, for who waits longer for some reasons than for others.
    pub fn delay_up_to(&mut self, longest: Duration) -> Duration {
        let delay = self.first.saturating_mul(1 << self.attempts.min(20)).min(longest);
        self.attempts = self.attempts.saturating_add(1);
        delay.mul_f64(0.5 + self.random.f64() / 2.0)
    }

    /// How many attempts there were since it began or was reset.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// Begins anew, after an attempt that went well.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Begins anew if the last attempt went well for longer than the longest delay.
    pub fn lasted(&mut self, time: Duration) {
        if time > self.longest {
            self.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_never_exceed_it() {
        for seed in 0..200 {
            let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5)).seeded(seed);
            for longest in [100, 200, 400, 800, 1600, 3200, 5000, 5000] {
                let longest = Duration::from_millis(longest);
                let delay = backoff.delay();
                assert!((longest / 2..=longest).contains(&delay), "{delay:?} of {longest:?}");
            }
            let minute = Duration::from_secs(60);
            assert!((0..20).all(|_| backoff.delay_up_to(minute) <= minute));
        }
    }

    #[test]
    fn attempt_that_went_well_for_long_enough_begins_them_anew() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(5));
        for _ in 0..8 {
            backoff.delay();
        }
        backoff.lasted(Duration::from_secs(5));
        assert!(backoff.delay() > Duration::from_secs(1));
        backoff.lasted(Duration::from_secs(6));
        assert_eq!(backoff.attempts(), 0);
        assert!(backoff.delay() <= Duration::from_millis(100));
    }
}
