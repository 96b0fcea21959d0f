//! The keeper's part about machines that have this node's name: asking them, answering them, and saying so.

use std::collections::BTreeSet;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::inquiry::{Inquiry, Party};
use fabric_core::lease::{Obstacle, Place, Question};
use fabric_core::model::NodeName;
use fabric_core::record::Instance;
use tokio::time::{Instant, timeout};
use tracing::{debug, error, info, warn};

use super::keeper::Keeper;
use super::{DesiredLease, Holding};
use crate::store::{Inquired, LeaseStore, StoreError};

/// How long it is said that another machine has this node's name, after the last sign of it.
const SAY: Duration = Duration::from_secs(180);

/// How long an answer may take: the lease has to be kept alive meanwhile.
const ANSWER: Duration = Duration::from_secs(2);

impl<S: LeaseStore> Keeper<S> {
    /// Asks about a record that may be a living machine's, if that is due, and says when to go on.
    pub(super) async fn ask(&mut self, want: &DesiredLease, question: &Question, obstacle: &Obstacle) -> Instant {
        if self.inquiries.is_due(question)
            && let Err(error) = self.ask_now(want, question).await
        {
            debug!(%error, "cannot ask who holds the lease of this name, trying again");
            self.hinder(&error.to_string());
            return Instant::now() + self.retry.delay();
        }
        if obstacle.is_being_asked() {
            self.is_asking(&obstacle.to_string());
        } else {
            self.hinder(&obstacle.to_string());
        }
        self.inquiries.look_again(question)
    }

    async fn ask_now(&mut self, want: &DesiredLease, question: &Question) -> Result<(), StoreError> {
        // 0 is no number of a question.
        let number = fastrand::u64(1..);
        self.inquiries.asks(question, number);
        let inquiry = Inquiry { number, by: self.party(want), answer: None };
        let asked = self.store.inquire(&question.node, &inquiry).await;
        self.inquiries.asked(question, number, asked.is_ok());
        asked?;
        let mut host_answers = false;
        for ip in &question.probe {
            host_answers |= self.options.hosts.answers(*ip).await;
        }
        let left = self.store.time_left(&question.key).await.ok().flatten();
        let ends = left.map(|left| unix_now() + i64::try_from(left.as_secs()).unwrap_or(i64::MAX / 2));
        self.inquiries.saw(question, host_answers, ends);
        Ok(())
    }

    /// Of all questions those about this node's name, and its own. After a power failure there are thousands.
    pub(super) fn concerning_us(&self, all: &Inquired) -> Vec<(NodeName, Inquiry)> {
        let names: BTreeSet<&NodeName> = self.inquiries.names().chain([&self.options.node]).collect();
        names.into_iter().filter_map(|name| Some((name.clone(), all.get(name)?.clone()))).collect()
    }

    /// Takes in what others of this name ask and answer: a daemon that holds its lease answers that it lives.
    pub(super) async fn attend(&mut self, want: &DesiredLease, inquired: &[(NodeName, Inquiry)]) {
        for (name, inquiry) in inquired {
            if self.inquiries.hear(inquiry) || *name != self.options.node || inquiry.answer.is_some() {
                continue;
            }
            let ours = self.party(want);
            if self.grant.is_none() || self.answered == Some(inquiry.number) || inquiry.by == ours {
                continue;
            }
            let answer = Inquiry { answer: Some(ours.clone()), ..inquiry.clone() };
            let Ok(Ok(())) = timeout(ANSWER, self.store.inquire(name, &answer)).await else {
                debug!(number = inquiry.number, "another machine of this name not answered; it asks again");
                continue;
            };
            self.answered = Some(inquiry.number);
            // Before its last restart or reboot this very machine may have asked.
            if !inquiry.by.addresses.iter().any(|ip| ours.addresses.contains(ip)) {
                self.warn_of_duplicate_name(&format!(
                    "another machine is called {name} too, and waits for this node's lease: it is at {}; name it \
                     differently there with --node-name",
                    Place::from(&inquiry.by)
                ));
            }
        }
    }

    /// Notes that another machine of this name took the lease, or took it `back`. The one that held it takes it back,
    /// unless it had itself taken it from that one: by its own record, or as that one says. Or they would go on for ever.
    pub(super) fn was_taken_over(&mut self, by: &Instance, there: &str, back: bool) {
        let held_before_us = back || self.taken_from.as_ref() == Some(by);
        self.overruled = Some(by.clone()).filter(|_| !held_before_us);
        if self.overruled.is_some() {
            let told = format!(
                "another machine is called {} too: it is at {there} (boot id {}), took this node's lease, and had to give \
                 it back; name it differently there with --node-name",
                self.options.node, by.boot
            );
            error!("{told}");
            self.warn_of_duplicate_name(&told);
        }
    }

    /// Says that it is being found out whether the lease is this node's: every reboot comes by here, for some seconds.
    fn is_asking(&self, why: &str) {
        self.holding.send_if_modified(|holding| {
            if holding.trouble.as_ref().is_some_and(|(_, known)| known == why) {
                return false;
            }
            info!(reason = why, "no lease yet");
            holding.trouble = Some((NotReady::Starting, why.to_owned()));
            true
        });
    }

    fn warn_of_duplicate_name(&mut self, told: &str) {
        self.duplicate_name = Some(Instant::now() + SAY);
        self.holding.send_if_modified(|holding| {
            if holding.duplicate_name.as_deref() == Some(told) {
                return false;
            }
            warn!("{told}");
            holding.duplicate_name = Some(told.to_owned());
            true
        });
    }

    /// Forgets a machine of this name that has given no sign for a while; gives when the next one is forgotten.
    pub(super) fn forget_duplicate_name(&mut self) -> Option<Instant> {
        let until = self.duplicate_name?;
        if Instant::now() < until {
            return Some(until);
        }
        self.duplicate_name = None;
        self.holding.send_modify(|holding: &mut Holding| holding.duplicate_name = None);
        None
    }

    fn party(&self, want: &DesiredLease) -> Party {
        Party {
            instance: self.options.instance.clone(),
            addresses: want.public_ips.values().copied().collect(),
            since: self.options.since,
        }
    }
}

fn unix_now() -> i64 {
    fabric_core::inquiry::unix_millis(std::time::SystemTime::now()) / 1000
}
