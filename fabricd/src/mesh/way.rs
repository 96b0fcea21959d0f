//! [`Way`]: what is remembered of the way to one peer.

use std::time::Duration;

use tokio::time::Instant;

use super::Target;
use super::probe::Answer;
use super::verdict::{Seen, Verdict, verdict};

/// How many round trips the median is of.
const ROUND_TRIPS: usize = 8;

/// The way to one peer in one family.
#[derive(Clone, Debug)]
pub struct Way {
    /// Where it leads.
    pub target: Target,
    /// What is wrong with it.
    pub verdict: Verdict,
    /// The last small probes.
    pub small: Window,
    /// The last probes of full size.
    pub full: Window,
    /// The largest packet that was answered in the last round, in bytes; 0 until one was.
    pub path_mtu: u32,
    /// When anything was answered last.
    pub answered: Option<Instant>,
    /// How many probes were sent.
    pub probes: u64,
    /// When it is to be probed; `None` while it is.
    pub(super) due: Option<Instant>,
    round_trips: Vec<Duration>,
}

impl Way {
    /// One that is to be probed then for the first time.
    #[must_use]
    pub fn new(target: Target, due: Instant) -> Self {
        Self {
            target,
            verdict: Verdict::default(),
            small: Window::default(),
            full: Window::default(),
            path_mtu: 0,
            answered: None,
            probes: 0,
            due: Some(due),
            round_trips: vec![],
        }
    }

    /// The time there and back of a small packet: the median of the last.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        let mut sorted = self.round_trips.clone();
        sorted.sort();
        sorted.get(sorted.len() / 2).copied()
    }

    /// Takes a round of probes over: the first small one, the first large one, and what they amount to.
    pub fn probed(&mut self, small: Answer, full: Answer, seen: &Seen) {
        self.probes += 2;
        self.small.note(small.rtt().is_some());
        self.full.note(full.rtt().is_some());
        if let Some(round_trip) = small.rtt() {
            if self.round_trips.len() == ROUND_TRIPS {
                self.round_trips.remove(0);
            }
            self.round_trips.push(round_trip);
        }
        match seen {
            Seen::Both | Seen::KernelBoth => self.path_mtu = self.target.ours.mtu,
            Seen::SmallOnly { largest, .. } => self.path_mtu = *largest,
            Seen::Nothing(_) => {}
        }
        if !matches!(seen, Seen::Nothing(_)) {
            self.answered = Some(Instant::now());
        }
        let (overlay, public_ip) = (self.target.overlay.to_string(), self.target.public_ip.to_string());
        self.verdict = verdict(seen, &overlay, &public_ip, self.target.ours.port);
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
