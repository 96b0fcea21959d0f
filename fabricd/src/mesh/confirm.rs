//! [`ConfirmedVerdict`]: what is told of a path, by the rounds so far. One round is never enough to blame anybody: a peer that
//! is just going, or just coming, looks like anything for a moment.
//!
//! - What is certain is told at once: an answer came, or this node's own kernel names the culprit.
//! - Any other cause is told when two rounds in a row have shown it; until then the cause is not known yet.
//! - The network is blamed only where the path has worked since its ends are what they are, or has had [`NEW`] to begin to.

use std::time::Duration;

use tokio::time::Instant;

use super::verdict::Cause;

/// How long a peer with a new lease or address, or this node with one, may take until all have let each other in.
pub const NEW: Duration = Duration::from_secs(60);

/// What is told of a path.
#[derive(Clone, Copy, Debug)]
pub struct ConfirmedVerdict {
    /// The verdict.
    pub cause: Cause,
    /// When it began; `None` until there was a round.
    pub since: Option<Instant>,
    /// What the last round showed.
    last: Cause,
    /// When both ends became what they are.
    new_since: Instant,
    /// Whether anything has been answered since.
    worked: bool,
    /// How many rounds in a row were bad.
    bad: u32,
}

impl ConfirmedVerdict {
    /// Nothing is known yet of a path that is there since `now`.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { cause: Cause::Unknown, since: None, last: Cause::Unknown, new_since: now, worked: false, bad: 0 }
    }

    /// One of the ends has another address now: what was seen of the former says nothing of this one.
    pub fn begin_anew(&mut self, now: Instant) {
        (self.new_since, self.worked, self.last) = (now, false, Cause::Unknown);
    }

    /// Takes over what a round showed that began at `begun` and has just ended.
    pub fn round(&mut self, found: Cause, begun: Instant, now: Instant) {
        let again = self.last == found;
        self.last = found;
        self.worked |= matches!(found, Cause::Fine | Cause::NoDaemon | Cause::Lossy | Cause::MtuBlackHole);
        let young = !self.worked && now.saturating_duration_since(self.new_since) < NEW;
        let cause = match found {
            found if found.is_certain() => found,
            // Of one that loses packets a few in a row are lost now and then.
            _ if !again && self.cause == Cause::Lossy => Cause::Lossy,
            _ if !again => Cause::UnknownYet,
            found if found.accuses() && young => Cause::UnknownYet,
            found => found,
        };
        self.bad = if cause.hurts() { self.bad + 1 } else { 0 };
        // What was not known at first has been like that since then.
        let same = cause == self.cause || (self.cause == Cause::UnknownYet && cause.hurts());
        if !same || self.since.is_none() {
            self.since = Some(begun);
        }
        self.cause = cause;
    }

    /// Whether it is time to say so: what hurts for one round alone is not news.
    #[must_use]
    pub fn is_news(&self) -> bool {
        self.cause != Cause::UnknownYet || self.bad > 2
    }

    /// Whether the next round may change it soon.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.cause == Cause::UnknownYet && self.bad < 3
    }
}

#[cfg(test)]
mod tests {
    use super::Cause::*;
    use super::*;

    /// What is told after each round, rounds being five seconds apart; `@` begins anew.
    fn told(history: &[Option<Cause>]) -> Vec<Cause> {
        let begin = Instant::now();
        let mut judgement = ConfirmedVerdict::new(begin);
        let mut told = vec![];
        for (place, found) in history.iter().enumerate() {
            let at = begin + Duration::from_secs(5) * u32::try_from(place).unwrap();
            match found {
                None => judgement.begin_anew(at),
                Some(found) => {
                    judgement.round(*found, at, at + Duration::from_secs(4));
                    told.push(judgement.cause);
                }
            }
        }
        told
    }

    #[test]
    fn recorded_histories_never_blame_what_one_round_alone_showed() {
        for (what, history, want) in [
            ("a peer is switched off", &[Fine, PeerDown, PeerDown][..], &[Fine, UnknownYet, PeerDown][..]),
            (
                "its last probe crossed ours",
                &[Fine, Asymmetric, PeerDown, PeerDown],
                &[Fine, UnknownYet, UnknownYet, PeerDown],
            ),
            (
                "it went between the small and the large packet",
                &[Fine, MtuBlackHole, PeerDown, PeerDown],
                &[Fine, UnknownYet, UnknownYet, PeerDown],
            ),
            (
                "it boots: its device comes while we look",
                &[Fine, PeerDown, PeerDown, PortClosed, ChecksumOffload, Fine],
                &[Fine, UnknownYet, PeerDown, UnknownYet, UnknownYet, Fine],
            ),
            (
                "it boots slowly",
                &[Fine, PeerDown, PeerDown, PortClosed, PortClosed, Asymmetric, Fine],
                &[Fine, UnknownYet, PeerDown, UnknownYet, PortClosed, UnknownYet, Fine],
            ),
            ("a port is closed for good", &[Fine, PortBlocked, PortBlocked], &[Fine, UnknownYet, PortBlocked]),
            ("somebody's route", &[Fine, RouteOverride, Fine], &[Fine, RouteOverride, Fine]),
            ("a few in a row are lost", &[Lossy, PortBlocked, Lossy], &[Lossy, Lossy, Lossy]),
            ("it loses packets, and then it is gone", &[Lossy, PeerDown, PeerDown], &[Lossy, Lossy, PeerDown]),
            ("no two rounds show the same", &[PortBlocked, Asymmetric, PortBlocked], &[UnknownYet; 3]),
        ] {
            let history: Vec<Option<Cause>> = history.iter().copied().map(Some).collect();
            assert_eq!(told(&history), want, "{what}");
        }
    }

    #[test]
    fn network_is_not_blamed_while_a_peer_is_new() {
        let mut history = vec![Some(PortBlocked); 14];
        let told_of = told(&history);
        assert_eq!(told_of[..12], [UnknownYet; 12], "a lease is there for some time before its device is");
        assert_eq!(told_of[12..], [PortBlocked; 2]);
        // One that has worked is another thing, until it is renumbered.
        history = vec![Some(Fine), Some(PortBlocked), Some(PortBlocked), None, Some(PortBlocked), Some(PortBlocked)];
        assert_eq!(told(&history), [Fine, UnknownYet, PortBlocked, UnknownYet, UnknownYet]);
        // That it is down says nothing of the network.
        assert_eq!(told(&[Some(PeerDown), Some(PeerDown)]), [UnknownYet, PeerDown]);
    }

    #[test]
    fn since_is_when_the_trouble_began_not_when_its_cause_was_known() {
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        let mut judgement = ConfirmedVerdict::new(begin);
        for (found, seconds, since) in
            [(Fine, 0, 0), (Fine, 5, 0), (PeerDown, 10, 10), (PeerDown, 15, 10), (PeerDown, 20, 10), (Fine, 25, 25)]
        {
            judgement.round(found, at(seconds), at(seconds + 4));
            assert_eq!(judgement.since, Some(at(since)), "after {seconds} s");
        }
    }

    #[test]
    fn what_is_over_after_one_round_is_no_news_and_what_stays_unknown_is() {
        let begin = Instant::now();
        let mut judgement = ConfirmedVerdict::new(begin);
        let mut news = |found| {
            judgement.round(found, begin, begin);
            judgement.is_news()
        };
        assert_eq!([news(Fine), news(PeerDown), news(Fine)], [true, false, true]);
        assert_eq!([news(PortBlocked), news(Asymmetric), news(PortBlocked)], [false, false, true]);
    }
}
