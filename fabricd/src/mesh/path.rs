//! [`Path`]: what is remembered of the path to one peer.

use std::time::Duration;

use tokio::time::Instant;

use super::Target;
use super::confirm::ConfirmedVerdict;
use super::diagnose::Round;
use super::loss::{Loss, Record, Window};
use super::probe::Answer;
use super::verdict::{Cause, Seen};

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
    /// When anything was answered last.
    pub answered: Option<Instant>,
    /// How many probes were sent.
    pub probes: u64,
    /// When the last round ended.
    pub probed: Option<Instant>,
    /// When it is to be probed; `None` while it is.
    pub(super) due: Option<Instant>,
    /// Probed once more as soon as the round that is under way has ended.
    pub(super) again: bool,
    /// The cause that was logged last.
    pub(super) logged: Cause,
    /// The number of its next probe.
    pub(super) next: u32,
    judgement: ConfirmedVerdict,
    record: Record,
    /// When the first round began that nothing came back in; `None` while something does.
    failing: Option<Instant>,
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
            answered: None,
            probes: 0,
            probed: None,
            due: Some(due),
            again: false,
            logged: Cause::Unknown,
            // Any: so one of a daemon that has begun anew isn't taken for one of before.
            next: fastrand::u32(..),
            judgement: ConfirmedVerdict::new(due),
            record: Record::default(),
            failing: None,
            round_trips: RoundTrips::default(),
        }
    }

    /// The same path as it is now: an end that has another address is another one.
    pub(super) fn lead_to(&mut self, target: Target, now: Instant) {
        if !self.target.is_like(&target) {
            self.judgement.begin_anew(now);
            (self.failing, self.record) = (None, Record::default());
        }
        self.target = target;
    }

    /// The time there and back of a small packet: the median of the last.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trips.median()
    }

    /// How much is lost since it is reached, once enough probes were sent to say so.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.record.loss()
    }

    /// What is wrong with it.
    #[must_use]
    pub fn cause(&self) -> Cause {
        self.judgement.cause
    }

    /// When that began; `None` until there was a round.
    #[must_use]
    pub fn since(&self) -> Option<Instant> {
        self.judgement.since
    }

    /// Since when it doesn't answer.
    pub(super) fn failing(&self) -> Option<Instant> {
        self.failing
    }

    /// Whether its cause is worth saying: [`ConfirmedVerdict::is_news`].
    pub(super) fn is_news(&self) -> bool {
        self.judgement.is_news()
    }

    /// Whether the next round may tell the cause: [`ConfirmedVerdict::is_open`].
    pub(super) fn is_open(&self) -> bool {
        self.judgement.is_open()
    }

    /// Takes a round of probes over.
    pub fn round(&mut self, round: Round) {
        let now = Instant::now();
        self.probed = Some(now);
        self.probes += u64::try_from(round.samples.len()).unwrap_or(0);
        if let Some((last, _)) = round.samples.last() {
            self.next = last.wrapping_add(1);
        }
        self.small.note(round.small.rtt().is_some());
        self.full.note(round.full.rtt().is_some());
        if let Some(round_trip) = round.small.rtt() {
            self.round_trips.note(round_trip);
        }
        match round.seen {
            Seen::Both | Seen::KernelBoth => self.path_mtu = self.target.ours.mtu,
            Seen::SmallOnly { largest, .. } => self.path_mtu = largest,
            Seen::Nothing(_) => {}
        }
        if matches!(round.seen, Seen::Nothing(_)) {
            self.failing.get_or_insert(round.begun);
        } else {
            (self.answered, self.failing) = (Some(now), None);
        }
        let mut found = round.seen.cause();
        if matches!(round.seen, Seen::Both | Seen::KernelBoth) {
            for (number, answer) in &round.samples {
                self.record.note(*number, answer.rtt().is_some(), answer.arrived());
            }
            if self.record.is_lossy(self.cause() == Cause::Lossy) {
                found = Cause::Lossy;
            }
        }
        self.judgement.round(found, round.begun, now);
        if !matches!(self.cause(), Cause::Fine | Cause::NoDaemon | Cause::Lossy) {
            // What was lost while it was not reached says nothing of how it is afterwards.
            self.record = Record::default();
        }
        self.seen = Some(round.seen);
    }

    /// A round in which these came back first, and that amounted to `seen`: for tests of who shows it.
    #[must_use]
    pub fn after(mut self, small: Answer, full: Answer, seen: Seen) -> Self {
        for _ in 0..2 {
            let samples = vec![(self.next, small), (self.next.wrapping_add(1), full)];
            let target = self.target.clone();
            self.round(Round { target, begun: Instant::now(), small, full, seen: seen.clone(), samples });
        }
        self
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::tests::target;

    /// A round whose probes met these fates: `.` answered, `x` not.
    fn round(path: &Path, fates: &str, seen: Seen) -> Round {
        let answer = |outcome| match outcome {
            '.' => Answer::Daemon { rtt: Duration::from_millis(80), arrived: u64::MAX },
            _ => Answer::Nothing,
        };
        let answers: Vec<Answer> = fates.chars().map(answer).collect();
        let samples = (0..).map(|n| path.next.wrapping_add(n)).zip(answers.iter().copied()).collect();
        let (target, begun) = (path.target.clone(), Instant::now());
        Round { target, begun, small: answers[0], full: answers[1], seen, samples }
    }

    #[test]
    fn path_that_loses_packets_is_lossy_with_the_share_and_fine_again_when_it_loses_none() {
        let mut path = Path::new(target(), Instant::now());
        let mut after = |fates: &str| {
            path.round(round(&path, fates, Seen::Both));
            (path.cause(), path.loss())
        };
        assert_eq!(after("..").0, Cause::Fine);
        assert_eq!(after("x...x.....").0, Cause::Fine, "too few to say so");
        let (cause, loss) = after(".xx...x...");
        assert_eq!(cause, Cause::Lossy);
        assert_eq!(loss, Some(Loss { share: 5.0 / 22.0, probes: 22, halves: Some((0.0, 5.0 / 22.0)) }));
        let rounds = (0..50).position(|_| after("..").0 == Cause::Fine).expect("it ends some time");
        assert!((10..40).contains(&rounds), "{rounds} rounds");
    }

    #[test]
    fn loss_of_the_time_when_a_peer_was_down_is_forgotten() {
        let mut path = Path::new(target(), Instant::now());
        let nothing = || Seen::Nothing(Box::default());
        let mut after = |fates: &str, seen| {
            path.round(round(&path, fates, seen));
            path.cause()
        };
        assert_eq!([after("..", Seen::Both), after("xxxxxx", nothing())], [Cause::Fine, Cause::UnknownYet]);
        assert_eq!([after("xxxxxx", nothing()), after("xxxxxx", nothing())], [Cause::PeerDown; 2]);
        assert_eq!([after("..........", Seen::Both), after("..........", Seen::Both)], [Cause::Fine; 2]);
    }

    #[test]
    fn peer_with_another_address_is_another_path() {
        let (now, blocked) = (Instant::now(), || {
            let evidence = super::super::verdict::Evidence { received: true, ..Default::default() };
            Seen::Nothing(Box::new(evidence))
        });
        let mut path = Path::new(target(), now);
        for (seen, cause) in [(Seen::Both, Cause::Fine), (blocked(), Cause::UnknownYet), (blocked(), Cause::Asymmetric)]
        {
            path.round(round(&path, if cause == Cause::Fine { ".." } else { "xxx" }, seen));
            assert_eq!(path.cause(), cause);
        }
        path.lead_to(target(), now);
        path.round(round(&path, "xxx", blocked()));
        assert_eq!(path.cause(), Cause::Asymmetric, "nothing has changed");
        path.lead_to(Target { public_ip: "192.0.2.9".parse().unwrap(), ..target() }, now);
        for _ in 0..2 {
            path.round(round(&path, "xxx", blocked()));
            assert_eq!(path.cause(), Cause::UnknownYet, "the new one may not let us in yet");
        }
    }

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
}
