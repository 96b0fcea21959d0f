//! The writing half of the loop: the packet filter first, then the steps of the plan, stage by stage.

use std::time::SystemTime;

use fabric_core::diff::{Change, Gate, Op, Plan};
use fabric_core::rules::change::Change as RuleChange;
use tracing::{debug, warn};

use super::Reconciler;
use crate::kernel::{Kernel, Observed};
use crate::reconcile::planned::Cause;
use crate::store::LeaseStore;

/// How many steps the kernel is given at once: far more than what one costs, and little memory.
const AT_ONCE: usize = 1000;
/// How many steps of the last plan are remembered.
const REMEMBERED: usize = 500;

/// What was written last.
#[derive(Clone, Debug)]
pub struct Written {
    /// When.
    pub at: SystemTime,
    /// How many steps it had, those of the packet filter among them.
    pub steps: usize,
    /// How many failed or were left out.
    pub failed: usize,
    /// The first of the packet filter's, as lines of `nft`.
    pub filter: Vec<String>,
    /// The first of the others.
    pub first: Vec<Op>,
}

/// What of a plan is not done now.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held<'a> {
    /// Nothing is deleted: what is desired is only remembered.
    pub(super) deletes: bool,
    /// No device comes up: why nobody judges yet who may send to it.
    pub(super) devices: Option<&'a str>,
}

impl Held<'_> {
    /// Why this step is not taken, for as long as the packet filter can't be written.
    fn unguarded(&self, plan: &Plan, op: &Op) -> Option<String> {
        let why = self.devices.filter(|_| comes_up(plan, op))?;
        Some(format!(
            "{}: left out while the packet filter can't be written, since anybody could send into the pods' network \
             (--check-senders=false does without): {why}",
            op.to_string().trim_start_matches(['+', '~', '-', ' '])
        ))
    }
}

/// Whether a device begins to take packets by this step, or goes for another that would.
fn comes_up(plan: &Plan, op: &Op) -> bool {
    let comes = |name| plan.ops().iter().any(|op| matches!(op, Op::Link(other, Change::Create(_)) if *other == name));
    match op {
        Op::Link(_, Change::Create(link)) => link.up,
        Op::Link(_, Change::Replace { was, now }) => !was.up && now.up,
        Op::Link(name, Change::Delete(_)) => comes(*name),
        _ => false,
    }
}

impl<S: LeaseStore, K: Kernel> Reconciler<S, K> {
    /// Writes what the packet filter lacks.
    pub(super) async fn enforce(&mut self, change: &RuleChange, observed: &Observed) -> Result<(), String> {
        if change.is_empty() {
            return Ok(());
        }
        let result = self.kernel.enforce(change).await;
        self.metrics.wrote_filter(change, &result);
        for step in change.to_string().lines() {
            debug!(step, ok = result.is_ok(), "filter write");
        }
        if change.doors.is_empty() {
            let repaired = self.repairs.filtered(change, &observed.rules, result.is_ok(), self.rules.unchanged());
            self.metrics.repaired(crate::reconcile::repairs::FILTER, repaired);
        }
        result.map_err(|error| {
            if self.retry.attempts() == 0 {
                warn!(%error, "packet filter not written, retrying");
            }
            error.to_string()
        })
    }

    /// Takes the steps of a plan, stage by stage. Gives those that failed or were left out, with the reason.
    pub(super) async fn execute(&mut self, plan: &Plan, held: Held<'_>, cause: &Cause) -> Vec<(Op, String)> {
        let mut gate = Gate::default();
        let mut failures = Vec::new();
        let (mut done, to_tell) = (Vec::new(), self.repairs.looks_at(cause));
        for stage in plan.stages().flat_map(|stage| stage.chunks(AT_ONCE)) {
            let mut go = vec![];
            for op in stage.iter().filter(|op| !(held.deletes && op.is_delete())) {
                if let Some(why) = held.unguarded(plan, op) {
                    gate.failed(op);
                    failures.push((op.clone(), why));
                } else if gate.admits(op) {
                    go.push(op.clone());
                } else {
                    failures.push((op.clone(), format!("{op}: left out, what it needs has failed")));
                }
            }
            for (op, result) in go.iter().zip(self.kernel.apply(&go).await) {
                debug!(%op, ok = result.is_ok(), "kernel write");
                self.metrics.wrote(op, &result);
                if let Err(error) = result {
                    gate.failed(op);
                    failures.push((op.clone(), error.to_string()));
                } else if to_tell {
                    done.push(op.clone());
                }
            }
        }
        let repaired = self.repairs.wrote(done.iter(), failures.iter().map(|(op, _)| op), cause);
        for (table, count) in repaired {
            self.metrics.repaired(table, count);
        }
        if !plan.is_empty() {
            debug!(ops = plan.ops().len(), failed = failures.len(), "kernel written to");
        }
        // The first of a series; how it goes on shows in the status.
        if let (Some((_, first)), 0) = (failures.first(), self.retry.attempts()) {
            warn!(error = first, failed = failures.len(), "kernel writes failed, retrying");
        }
        failures
    }

    /// Remembers what a pass has written, for those who ask.
    pub(super) fn remember(&mut self, filter: &RuleChange, filtered: bool, plan: &Plan, failed: usize) {
        if filter.is_empty() && plan.is_empty() {
            return;
        }
        let steps = usize::try_from(filter.steps()).unwrap_or(usize::MAX);
        self.last = Some(std::sync::Arc::new(Written {
            at: SystemTime::now(),
            steps: plan.ops().len() + steps,
            failed: failed + if filtered { 0 } else { steps },
            filter: filter.to_string().lines().take(REMEMBERED).map(str::to_owned).collect(),
            first: plan.ops().iter().take(REMEMBERED).cloned().collect(),
        }));
    }
}
