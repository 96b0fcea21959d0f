//! [`Transitions`]: what becomes of paths, as log lines and events. Each is told once; of many at a time there is one line
//! with their number.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{info, warn};

use super::verdict::Cause;
use crate::status::events::{Events, Kind};

/// After a line, what follows is gathered for so long.
const GATHER: Duration = Duration::from_secs(5);
/// So many at a time have a line each; more have one together.
const FEW: usize = 3;

/// A path has another verdict now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// The peer.
    pub peer: String,
    /// What was told of it before.
    pub before: Cause,
    /// What is now.
    pub now: Cause,
    /// What was seen.
    pub evidence: String,
}

/// Those that wait to be told.
#[derive(Debug, Default)]
pub struct Transitions {
    waiting: Vec<Transition>,
    /// Until when they wait; `None` when the next is told at once.
    until: Option<Instant>,
}

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    subject: String,
    cause: Cause,
    message: String,
    warning: bool,
}

impl Transitions {
    /// When it is to be flushed.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        self.until
    }

    /// Takes one over; tells it unless another has just been told.
    pub fn add(&mut self, transition: Transition, events: &Events, now: Instant) {
        self.waiting.push(transition);
        if self.until.is_none() {
            self.flush(events, now);
        }
    }

    /// Tells what waits.
    pub fn flush(&mut self, events: &Events, now: Instant) {
        self.until = (!self.waiting.is_empty()).then(|| now + GATHER);
        for line in lines(&std::mem::take(&mut self.waiting)) {
            let Line { subject, cause, message, warning } = line;
            let (peer, cause) = (if subject.is_empty() { "several" } else { &subject }, cause.word());
            match warning {
                true => warn!(peer, cause, evidence = %message, "path to peer is broken or lossy"),
                false => info!(peer, cause, "{message}"),
            }
            events.tell(Kind::Mesh, subject, message, warning);
        }
    }
}

fn lines(transitions: &[Transition]) -> Vec<Line> {
    let mut causes: Vec<Cause> = transitions.iter().map(|transition| transition.now).collect();
    causes.sort_unstable();
    causes.dedup();
    let mut lines = vec![];
    for cause in causes {
        let of_cause: Vec<&Transition> = transitions.iter().filter(|transition| transition.now == cause).collect();
        if of_cause.len() <= FEW {
            lines.extend(of_cause.iter().map(|transition| line(transition)));
        } else {
            let names: Vec<&str> = of_cause.iter().take(FEW).map(|transition| transition.peer.as_str()).collect();
            let (count, more) = (of_cause.len(), of_cause.len() - FEW);
            let message = format!("{count} paths: {} ({} and {more} more)", cause.word(), names.join(", "));
            lines.push(Line { subject: String::new(), cause, message, warning: cause.hurts() });
        }
    }
    lines
}

fn line(transition: &Transition) -> Line {
    let message = match transition.now {
        Cause::Fine if transition.before == Cause::NoDaemon => "answers fabricd's probes".into(),
        Cause::Fine => "reached again".into(),
        cause => format!("{}: {}", cause.word(), transition.evidence),
    };
    Line { subject: transition.peer.clone(), cause: transition.now, message, warning: transition.now.hurts() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(events: &Events) -> Vec<String> {
        let line =
            |event: crate::status::events::Event| format!("{} {}", event.subject, event.message).trim().to_owned();
        events.read().0.into_iter().map(line).collect()
    }

    #[test]
    fn first_is_told_at_once_and_many_that_follow_are_one_line() {
        let (events, mut transitions, now) = (Events::default(), Transitions::default(), Instant::now());
        let mut add = |n: usize, before, now_is| {
            let transition =
                Transition { peer: format!("node-{n}"), before, now: now_is, evidence: "nothing answers".into() };
            transitions.add(transition, &events, now);
        };
        (2..9).for_each(|n| add(n, Cause::Fine, Cause::PeerDown));
        add(9, Cause::PeerDown, Cause::Fine);
        assert_eq!(told(&events), ["node-2 peer_down: nothing answers"]);
        assert_eq!(transitions.due(), Some(now + GATHER));
        transitions.flush(&events, now + GATHER);
        assert_eq!(
            told(&events)[1..],
            ["node-9 reached again", "6 paths: peer_down (node-3, node-4, node-5 and 3 more)"]
        );
        // Nothing more has come: the next one is told at once again.
        transitions.flush(&events, now + 2 * GATHER);
        assert_eq!((transitions.due(), told(&events).len()), (None, 3));
    }
}
