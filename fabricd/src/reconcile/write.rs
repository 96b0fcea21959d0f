//! The writing half of the loop: takes the steps of a plan, stage by stage.

use std::sync::Arc;
use std::time::SystemTime;

use fabric_core::diff::{Gate, Key, Op, Plan};
use tracing::{debug, warn};

use super::Reconciler;
use super::waiting::Doing;
use crate::kernel::{Kernel, KernelError};
use crate::reconcile::repairs::Causes;
use crate::store::LeaseStore;

/// How many steps the kernel is given at once: far more than what one costs, and little memory.
const AT_ONCE: usize = 1000;
/// How many lines of the last plan are remembered.
const REMEMBERED: usize = 500;

/// What was written last.
#[derive(Clone, Debug)]
pub struct Written {
    /// When.
    pub at: SystemTime,
    /// How many steps it had.
    pub steps: usize,
    /// How many failed or were left out.
    pub failed: usize,
    /// The first steps, as lines of iproute2 and `nft`.
    pub lines: Vec<String>,
}

impl<S: LeaseStore, K: Kernel> Reconciler<S, K> {
    /// Takes the steps of a plan. Gives those that failed or were left out, with the reason.
    pub(super) async fn execute(&mut self, plan: &Plan, causes: &Causes) -> Vec<(Op, String)> {
        let mut gate = Gate::default();
        let mut failures = Vec::new();
        let mut done = Vec::new();
        for stage in plan.stages().flat_map(|stage| stage.chunks(AT_ONCE)) {
            let mut go = vec![];
            for op in stage {
                match gate.admits(op) {
                    Ok(()) => go.push(op.clone()),
                    Err(lacks) => failures.push((op.clone(), left_out(op, lacks, &failures))),
                }
            }
            self.doing.send_replace(Doing::of(&go));
            let results = self.kernel.apply(&go).await;
            self.doing.send_replace(Doing::Reading);
            for (op, result) in go.iter().zip(results) {
                debug!(%op, ok = result.is_ok(), "kernel write");
                self.counters.wrote(op, &result);
                if let Err(error) = result {
                    gate.failed(op);
                    failures.push((op.clone(), error.to_string()));
                } else if self.repairs.looks_at(op, causes) {
                    done.push(op.clone());
                }
            }
        }
        let repaired = self.repairs.wrote(done.iter(), failures.iter().map(|(op, _)| op), causes);
        for (table, count) in repaired {
            self.counters.repaired(table, count);
        }
        if !plan.is_empty() {
            debug!(ops = plan.ops().len(), failed = failures.len(), "kernel written to");
            self.last = Some(Arc::new(Written {
                at: SystemTime::now(),
                steps: plan.ops().len(),
                failed: failures.len(),
                lines: lines(plan).take(REMEMBERED).collect(),
            }));
        }
        // The first of a series; how it goes on shows in the status.
        if let (Some((_, first)), 0) = (failures.first(), self.retry.attempts()) {
            warn!(error = first, failed = failures.len(), "kernel writes failed, retrying");
        }
        failures
    }
}

/// The steps of a plan as lines.
pub(crate) fn lines(plan: &Plan) -> impl Iterator<Item = String> {
    plan.ops().iter().flat_map(|op| op.to_string().lines().map(str::to_owned).collect::<Vec<_>>())
}

/// Why a step is left out. That a device waits for the packet filter a person has to understand, so the filter's own reason
/// is told with it.
fn left_out(op: &Op, lacks: Key, failures: &[(Op, String)]) -> String {
    let step = KernelError::step(op);
    let of_filter = || failures.iter().find(|(op, _)| matches!(op, Op::Filter(_)));
    match (lacks, of_filter()) {
        (Key::SendersChain, Some((_, why))) => format!(
            "{step}: left out while the packet filter can't be written, since anybody could send into the pods' network \
             (--check-senders=false does without): {why}"
        ),
        _ => format!("{step}: left out, what it needs has failed"),
    }
}
