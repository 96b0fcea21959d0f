//! [`Path`]: what is remembered of the path to one peer.

use std::time::Duration;

use tokio::time::Instant;

use super::Target;
use super::probe::Answer;
use super::verdict::{Cause, Seen, Verdict, verdict};

/// The path to one peer in one family. There are thousands: what can be worked out is not kept.
#[derive(Clone, Debug)]
pub struct Path {
    /// Where it leads.
    pub target: Target,
    /// What the last round showed; `None` until there was one.
    pub seen: Option<Seen>,
    /// The last small probes.
    pub small: Window,
    /// The last probes of full size.
    pub full: Window,
    /// The largest packet that was answered in the last round, in bytes; 0 until one was.
    pub path_mtu: u32,
    /// When its verdict began to be what it is; `None` until there is one.
    pub since: Option<Instant>,
    /// When anything was answered last.
    pub answered: Option<Instant>,
    /// How many probes were sent.
    pub probes: u64,
    /// When it is to be probed; `None` while it is.
    pub(super) due: Option<Instant>,
    round_trips: RoundTrips,
}

impl Path {
    /// One that is to be probed then for the first time.
    #[must_use]
    pub fn new(target: Target, due: Instant) -> Self {
        Self {
            target,
            seen: None,
            small: Window::default(),
            full: Window::default(),
            path_mtu: 0,
            since: None,
            answered: None,
            probes: 0,
            due: Some(due),
            round_trips: RoundTrips::default(),
        }
    }

    /// The time there and back of a small packet: the median of the last.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trips.median()
    }

    /// What is wrong with it.
    #[must_use]
    pub fn cause(&self) -> Cause {
        self.seen.map_or(Cause::Unknown, |seen| seen.cause())
    }

    /// What is wrong with it, in words.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let Target { overlay, public_ip, ours, .. } = &self.target;
        self.seen.map_or_else(Verdict::default, |seen| verdict(&seen, *overlay, *public_ip, ours.port))
    }

    /// Takes a round of probes over: the first small one, the first large one, and what they amount to.
    pub fn probed(&mut self, small: Answer, full: Answer, seen: Seen) {
        self.probes += 2;
        self.small.note(small.rtt().is_some());
        self.full.note(full.rtt().is_some());
        if let Some(round_trip) = small.rtt() {
            self.round_trips.note(round_trip);
        }
        match seen {
            Seen::Both | Seen::KernelBoth => self.path_mtu = self.target.ours.mtu,
            Seen::SmallOnly { largest, .. } => self.path_mtu = largest,
            Seen::Nothing(_) => {}
        }
        if !matches!(seen, Seen::Nothing(_)) {
            self.answered = Some(Instant::now());
        }
        let before = self.cause();
        self.seen = Some(seen);
        if self.cause() != before {
            self.since = Some(Instant::now());
        }
    }
}

/// The last eight round trips, in microseconds.
#[derive(Clone, Copy, Debug, Default)]
struct RoundTrips {
    micros: [u32; 8],
    /// How many there were ever; the next takes the place of the oldest.
    count: usize,
}

impl RoundTrips {
    fn note(&mut self, round_trip: Duration) {
        self.micros[self.count % self.micros.len()] = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX);
        self.count += 1;
    }

    fn median(&self) -> Option<Duration> {
        let mut sorted = self.micros;
        let sorted = &mut sorted[..self.count.min(self.micros.len())];
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).map(|micros| Duration::from_micros((*micros).into()))
    }
}

/// Whether the last sixteen probes were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    lost: u16,
    count: u8,
}

impl Window {
    fn note(&mut self, answered: bool) {
        self.lost = self.lost << 1 | u16::from(!answered);
        self.count = (self.count + 1).min(16);
    }

    /// The share of them that was lost, from 0 to 1.
    #[must_use]
    pub fn loss(self) -> f64 {
        if self.count == 0 { 0.0 } else { f64::from(self.lost.count_ones()) / f64::from(self.count) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_is_the_median_of_the_last_eight() {
        let mut trips = RoundTrips::default();
        assert_eq!(trips.median(), None);
        trips.note(Duration::from_micros(100));
        assert_eq!(trips.median(), Some(Duration::from_micros(100)));
        (0..7).for_each(|n| trips.note(Duration::from_millis(10 + n)));
        assert_eq!(trips.median(), Some(Duration::from_millis(13)));
        (0..8).for_each(|_| trips.note(Duration::from_secs(9000)));
        assert_eq!(trips.median(), Some(Duration::from_micros(u32::MAX.into())), "longer than any answer may take");
    }

    #[test]
    fn loss_is_of_the_last_sixteen_probes() {
        let mut window = Window::default();
        assert!(window.loss().abs() < 1e-9);
        window.note(false);
        assert!((window.loss() - 1.0).abs() < 1e-9);
        (0..3).for_each(|_| window.note(true));
        assert!((window.loss() - 0.25).abs() < 1e-9);
        (0..16).for_each(|_| window.note(true));
        assert!(window.loss().abs() < 1e-9);
    }
}
