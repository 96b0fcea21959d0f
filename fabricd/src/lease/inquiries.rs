//! What the keeper finds out about runs that wrote records in this node's name: whom it has asked, since when nobody
//! answers, and what it saw besides.

use std::collections::BTreeMap;
use std::time::Duration;

use fabric_core::inquiry::{Inquiry, Party};
use fabric_core::lease::{Findings, Question};
use fabric_core::leases::LeaseSet;
use fabric_core::model::NodeName;
use tokio::time::Instant;

/// The shortest time from one question to the next, and the longest.
const ASK_AGAIN: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(60));

/// How often it is looked whether the time has come to act on silence.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What is known about the writer of one record.
#[derive(Debug, Default)]
struct Pending {
    /// The name that was asked about.
    node: Option<NodeName>,
    /// Of the last question.
    number: u64,
    /// When the next one is due; at once if that is unset.
    due: Option<Instant>,
    /// When the first question was asked that nobody has answered.
    unanswered: Option<Instant>,
    answer: Option<Party>,
    /// When a machine last answered at the record's address: one packet that is lost is no sign that it is gone.
    host_seen: Option<Instant>,
    ends: Option<i64>,
}

/// All of them, by the revisions of the records.
#[derive(Debug, Default)]
pub(super) struct Inquiries(BTreeMap<i64, Pending>);

impl Inquiries {
    /// Forgets records that are not there any more.
    pub(super) fn keep(&mut self, leases: &LeaseSet) {
        if !self.0.is_empty() {
            self.0.retain(|revision, _| leases.iter().any(|lease| lease.mod_revision == *revision));
        }
    }

    /// True when it is time for a question about a record.
    pub(super) fn is_due(&self, question: &Question) -> bool {
        self.due(question).is_none_or(|due| due <= Instant::now())
    }

    /// When the next question about a record is due; `None` for the first one.
    fn due(&self, question: &Question) -> Option<Instant> {
        self.0.get(&question.revision)?.due
    }

    /// Notes that a question is about to be asked: its answer may come before that is done.
    pub(super) fn asks(&mut self, question: &Question, number: u64) {
        let pending = self.0.entry(question.revision).or_default();
        (pending.node, pending.number) = (Some(question.node.clone()), number);
    }

    /// Notes that it was asked, or could not be: then silence means nothing.
    pub(super) fn asked(&mut self, question: &Question, number: u64, succeeded: bool) {
        let pending = self.0.entry(question.revision).or_default();
        let now = Instant::now();
        if !succeeded {
            (pending.due, pending.unanswered) = (None, None);
            return;
        }
        // It may have been answered already.
        if pending.number == number {
            pending.unanswered.get_or_insert(now);
        }
        let silent = pending.unanswered.map_or(ASK_AGAIN.1, |since| now - since);
        pending.due = Some(now + silent.clamp(ASK_AGAIN.0, ASK_AGAIN.1));
    }

    /// Notes what was seen besides: whether a machine answers at the record's address, and when its lease ends.
    pub(super) fn saw(&mut self, question: &Question, host_answers: bool, ends: Option<i64>) {
        let pending = self.0.entry(question.revision).or_default();
        // A second more or less would be another reason to log.
        if pending.ends.zip(ends).is_none_or(|(known, ends)| (known - ends).abs() >= 60) {
            pending.ends = ends;
        }
        if host_answers {
            pending.host_seen = Some(Instant::now());
        }
    }

    /// Takes in what lies in the store; true when that is a question of ours.
    pub(super) fn hear(&mut self, inquiry: &Inquiry) -> bool {
        let Some(pending) = self.0.values_mut().find(|pending| pending.number == inquiry.number) else { return false };
        if let Some(answer) = &inquiry.answer {
            (pending.answer, pending.unanswered, pending.number) = (Some(answer.clone()), None, 0);
            pending.due = Some(Instant::now() + ASK_AGAIN.1);
        }
        true
    }

    /// The names that were asked about.
    pub(super) fn names(&self) -> impl Iterator<Item = &NodeName> {
        self.0.values().filter_map(|pending| pending.node.as_ref())
    }

    /// What is known of them. An answer counts until a later question has gone unanswered for a while.
    pub(super) fn findings(&self) -> Vec<Findings> {
        let now = Instant::now();
        let of = |(revision, pending): (&i64, &Pending)| {
            let silent = pending.unanswered.map_or(Duration::ZERO, |since| now - since);
            Findings {
                revision: *revision,
                answer: pending.answer.clone().filter(|_| silent < ASK_AGAIN.1),
                silent,
                host_answers: pending.host_seen.is_some_and(|seen| now - seen < ASK_AGAIN.1),
                ends: pending.ends,
            }
        };
        self.0.iter().map(of).collect()
    }

    /// When to look again while nobody has answered.
    pub(super) fn look_again(&self, question: &Question) -> Instant {
        let is_silent = self.0.get(&question.revision).is_some_and(|pending| pending.unanswered.is_some());
        let soon = Instant::now() + LOOK_AGAIN;
        let due = self.due(question).unwrap_or(soon);
        if is_silent { due.min(soon) } else { due }
    }
}
