//! [`Record`]: which of the last probes were answered, and on which half of the path the others were lost.
//!
//! Every probe has a number, one more than the one before. An answer says which of the 64 numbers up to its own have
//! arrived there ([`Answer::Daemon`](super::probe::Answer)): so a probe that arrived and was not answered was lost on the
//! way back.

/// A path is lossy from so many lost probes on: fewer are a coincidence …
const LEAST_LOST: u32 = 3;
/// … among at least so many …
const LEAST_SENT: u32 = 20;
/// … which are at least this share of them.
const LOSSY: f64 = 0.05;
/// It is lossy no more below this share.
const FINE: f64 = 0.03;

/// What became of the last 64 probes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// The number of the newest.
    newest: u32,
    /// Bit n is about the probe that is n older than the newest: it was sent …
    sent: u64,
    /// … it was answered …
    answered: u64,
    /// … it arrived.
    arrived: u64,
    /// Whether the peer says what arrives: flannel nodes and older daemons don't.
    told: bool,
}

/// How much is lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Loss {
    /// The share of probes without an answer, from 0 to 1.
    pub share: f64,
    /// Of how many probes.
    pub probes: u32,
    /// The share that was lost on the way to the peer, and of the answers the share lost on the way back, where known.
    pub halves: Option<(f64, f64)>,
}

impl Record {
    /// Notes what became of a probe. `arrived` is what its answer says of the 64 numbers up to its own; 0 when nothing.
    pub fn note(&mut self, number: u32, answered: bool, arrived: u64) {
        let ahead = number.wrapping_sub(self.newest);
        if self.sent == 0 {
            self.newest = number;
        } else if ahead < 1 << 31 {
            for bits in [&mut self.sent, &mut self.answered, &mut self.arrived] {
                *bits = bits.checked_shl(ahead).unwrap_or(0);
            }
            self.newest = number;
        }
        let Some(bit) = 1_u64.checked_shl(self.newest.wrapping_sub(number)) else { return };
        self.sent |= bit;
        if answered {
            self.answered |= bit;
            self.arrived |= bit;
        }
        if arrived != 0 {
            self.told = true;
            self.arrived |= arrived.wrapping_shl(self.newest.wrapping_sub(number)) & self.sent;
        }
    }

    /// What is lost; `None` until enough probes were sent to say so.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        let probes = self.sent.count_ones();
        let share = |part: u64, of: u64| f64::from(part.count_ones()) / f64::from(of.count_ones().max(1));
        let there = share(self.sent & !self.arrived, self.sent);
        let back = share(self.arrived & !self.answered, self.arrived);
        let halves = self.told.then_some((there, back));
        (probes >= LEAST_SENT).then(|| Loss { share: share(self.sent & !self.answered, self.sent), probes, halves })
    }

    /// Whether so much is lost that it has to be said; `already` when it is being said.
    #[must_use]
    pub fn is_lossy(&self, already: bool) -> bool {
        let lost = (self.sent & !self.answered).count_ones();
        self.loss().is_some_and(|loss| match already {
            true => loss.share >= FINE,
            false => lost >= LEAST_LOST && loss.share >= LOSSY,
        })
    }
}

/// Whether the last sixteen probes of one size were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    lost: u16,
    count: u8,
}

impl Window {
    /// Notes one more.
    pub fn note(&mut self, answered: bool) {
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

    /// `.` was answered, `>` was lost on the way there, `<` on the way back. The peer says what arrived if `tells`.
    fn record(probes: &str, tells: bool) -> Record {
        let (mut record, mut arrived) = (Record::default(), 0_u64);
        for (number, outcome) in (u32::MAX - 5..=u32::MAX).chain(0..).zip(probes.chars()) {
            arrived = arrived << 1 | u64::from(outcome != '>');
            record.note(number, outcome == '.', if tells && outcome == '.' { arrived } else { 0 });
        }
        record
    }

    #[test]
    fn loss_is_told_from_enough_probes_on_with_the_half_of_the_path() {
        let halves = |there, back| Some((there, back));
        for (probes, tells, share, want) in [
            ("....>..........", true, None, None),
            (&".".repeat(20), true, Some(0.0), halves(0.0, 0.0)),
            (&"..>.".repeat(5), true, Some(0.25), halves(0.25, 0.0)),
            (&".<..".repeat(5), true, Some(0.25), halves(0.0, 0.25)),
            (&".><...>...".repeat(2), true, Some(0.3), halves(0.2, 0.125)),
            (&"..>.".repeat(5), false, Some(0.25), None),
            // Of a hundred the last 64 count.
            (&format!("{}{}", ">".repeat(36), ".".repeat(64)), true, Some(0.0), halves(0.0, 0.0)),
        ] {
            let loss = record(probes, tells).loss();
            assert_eq!(loss.map(|loss| loss.share), share, "{probes}");
            assert_eq!(loss.and_then(|loss| loss.halves), want, "{probes}");
        }
    }

    #[test]
    fn path_is_lossy_from_a_twentieth_on_until_less_than_three_in_a_hundred_are_lost() {
        for (probes, before, after) in [
            (&"....>".repeat(3), false, false),
            (&"....>".repeat(4), true, true),
            (&format!(">>{}", ".".repeat(18)), false, true),
            (&format!(">>>{}", ".".repeat(57)), true, true),
            (&format!(">>>{}", ".".repeat(58)), false, true),
            (&format!(">>{}", ".".repeat(62)), false, true),
            (&format!(">{}", ".".repeat(63)), false, false),
        ] {
            let record = record(probes, true);
            assert_eq!([record.is_lossy(false), record.is_lossy(true)], [before, after], "{probes}");
        }
    }

    #[test]
    fn numbers_that_come_late_or_after_a_gap_are_put_in_their_place() {
        let mut record = Record::default();
        for number in [7, 9, 8, 9 + 63, 500, 3] {
            record.note(number, true, 0);
        }
        assert_eq!((record.sent, record.newest), (1, 500));
    }

    #[test]
    fn window_is_of_the_last_sixteen_probes() {
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
