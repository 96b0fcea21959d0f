//! [`SectionTable`]: one table of the packet filter, read and written over a socket of its own, so that its section and the
//! others never wait for each other's batches.
//!
//! It may have 100,000 elements, so it is read at the start, when somebody else has written to it, and once an hour; what we
//! wrote ourselves is known.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fabric_core::diff::nft::{Op, Transaction};
use fabric_core::diff::{Gate, Op as AnyOp, Plan, diff};
use fabric_core::state::nft::{FoundRuleset, FoundTable, Ruleset, Section, Table, TableKey};
use fabric_core::state::{Found, State};
use fabric_netlink::{RECEIVE, Refusal, frames, grow_receive_buffer, is_overrun};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt as _, TokioSocket};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tracing::debug;

use super::KernelError;
use super::netlink::copy_of;
use super::nft::{Filter, concerned};

/// The largest writes take a second.
const LIMIT: Duration = Duration::from_secs(60);
/// How often the table is read anew though nobody has told of a change.
const REREAD: Duration = Duration::from_secs(3600);
/// Room for the events of a large transaction of others.
const RECEIVE_BUFFER: usize = 8 << 20;
/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;

/// A table, as far as it is known.
pub struct SectionTable {
    key: TableKey,
    worker: Arc<Mutex<Worker>>,
    changed: Arc<Notify>,
    listener: Option<JoinHandle<()>>,
}

/// The blocking half.
struct Worker {
    key: TableKey,
    filter: Filter,
    /// `None` when there is no such table.
    found: Option<FoundTable>,
    /// When it was read; `None` when it never was, or somebody else may have written to it since.
    read: Option<Instant>,
}

impl SectionTable {
    /// Opens the one of this thread's network namespace. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// When a netlink socket can't be opened.
    pub fn open(key: TableKey) -> Result<Self, KernelError> {
        let gone = |error: io::Error| KernelError::Disconnected(error.to_string());
        let filter = Filter::open().map_err(gone)?;
        let (changed, port) = (Arc::new(Notify::new()), filter.port());
        let worker = Arc::new(Mutex::new(Worker { key, filter, found: None, read: None }));
        let listener = port.map(|port| listen(key, port, &worker, &changed)).transpose().map_err(gone)?;
        Ok(Self { key, worker, changed, listener })
    }

    /// What is there; `None` when there is no such table.
    ///
    /// # Errors
    /// When it can't be read.
    pub async fn observe(&self) -> Result<Option<FoundTable>, KernelError> {
        self.work(Worker::observe).await?
    }

    /// Waits until somebody else has written to the table. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The steps from what is there to what is wanted, which may be no table.
    #[must_use]
    pub fn steps<'a>(&self, want: impl Into<Option<&'a Table>>, found: Option<&FoundTable>) -> Plan {
        let want: Ruleset = want.into().cloned().map(|table| (self.key, table)).into_iter().collect();
        let found: FoundRuleset = found.cloned().map(|table| (self.key, table)).into_iter().collect();
        let state = State { services: None, policy: None, ..State::default() };
        let state = match self.key.section() {
            Section::Filter => State { filter: &want, ..state },
            Section::Services => State { services: Some(&want), ..state },
            Section::Policy => State { policy: Some(&want), ..state },
        };
        diff(state, Found { filter: &found, ..Found::default() })
    }

    /// Takes the steps of a plan, stage by stage.
    ///
    /// # Errors
    /// How many steps failed, and why the first did. All that don't stand on a failed one are taken.
    pub async fn execute(&self, plan: &Plan) -> Result<(), String> {
        let (mut gate, mut first, mut failed) = (Gate::default(), None, 0);
        for stage in plan.stages() {
            let mut go = vec![];
            for op in stage {
                match gate.admits(op) {
                    Ok(()) => go.push(op.clone()),
                    Err(_) => failed += 1,
                }
            }
            let results = self.apply(&go).await;
            for (op, result) in go.iter().zip(results) {
                debug!(%op, ok = result.is_ok(), "kernel write");
                if let Err(error) = result {
                    gate.failed(op);
                    failed += 1;
                    first.get_or_insert_with(|| error.to_string());
                }
            }
        }
        match first {
            None => Ok(()),
            Some(first) => Err(format!("{failed} of {} steps failed, retrying: {first}", plan.ops().len())),
        }
    }

    /// Takes steps that don't depend on each other: one result for each.
    async fn apply(&self, ops: &[AnyOp]) -> Vec<Result<(), KernelError>> {
        let steps = ops.iter().filter_map(|op| match op {
            AnyOp::Filter(op) => Some(op.clone()),
            AnyOp::Routing(_) | AnyOp::FastPath(_) => None,
        });
        let (steps, count) = (steps.collect::<Vec<Op>>(), ops.len());
        let results = self.work(move |worker| worker.apply(&steps)).await;
        results.unwrap_or_else(|error| (0..count).map(|_| Err(KernelError::Disconnected(error.to_string()))).collect())
    }

    async fn work<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T, KernelError> {
        let worker = Arc::clone(&self.worker);
        let job = tokio::task::spawn_blocking(move || job(&mut lock(&worker)));
        match tokio::time::timeout(LIMIT, job).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(error)) => Err(KernelError::Disconnected(error.to_string())),
            Err(_) => Err(KernelError::Busy(LIMIT.as_secs())),
        }
    }
}

impl Drop for SectionTable {
    fn drop(&mut self) {
        self.listener.iter().for_each(JoinHandle::abort);
    }
}

fn lock(worker: &Mutex<Worker>) -> MutexGuard<'_, Worker> {
    worker.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Worker {
    fn observe(&mut self) -> Result<Option<FoundTable>, KernelError> {
        if self.read.is_none_or(|read| read.elapsed() >= REREAD) {
            let failed = |source| KernelError::Dump { table: "nftables", source };
            if let Some(mut read) = self.filter.read(self.key).map_err(failed)? {
                if let (Some(read), Some(known)) = (&mut read, &self.found) {
                    read.share(known);
                }
                self.found = read;
            }
            self.read = Some(Instant::now());
        }
        Ok(self.found.clone())
    }

    fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        let mut transactions: BTreeMap<Transaction, Vec<usize>> = BTreeMap::new();
        for (position, op) in ops.iter().enumerate() {
            transactions.entry(op.transaction()).or_default().push(position);
        }
        let mut results: Vec<_> = ops.iter().map(|_| Ok(())).collect();
        for positions in transactions.into_values() {
            let steps: Vec<&Op> = positions.iter().map(|position| &ops[*position]).collect();
            match self.filter.write(&steps) {
                Ok(()) => {
                    let mut found: FoundRuleset =
                        self.found.take().map(|table| (self.key, table)).into_iter().collect();
                    steps.iter().for_each(|op| op.apply_to(&mut found));
                    self.found = found.remove(&self.key);
                }
                Err(Refusal { error, words }) => {
                    self.read = None;
                    for position in positions {
                        let same = copy_of(&error);
                        results[position] =
                            Err(KernelError::of_filter(&ops[position], &steps, same, words.clone(), None));
                    }
                }
            }
        }
        results
    }
}

/// Hears what others write to the table.
fn listen(
    key: TableKey,
    own_port: u32,
    worker: &Arc<Mutex<Worker>>,
    changed: &Arc<Notify>,
) -> io::Result<JoinHandle<()>> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    grow_receive_buffer(socket.socket_ref(), RECEIVE_BUFFER)?;
    socket.socket_ref().add_membership(GROUP)?;
    let (worker, changed) = (Arc::clone(worker), Arc::clone(changed));
    Ok(tokio::spawn(async move {
        let mut buffer = Vec::with_capacity(RECEIVE);
        loop {
            buffer.clear();
            let is_touched = match socket.recv(&mut buffer).await {
                Ok(_) => frames(&buffer).any(|frame| frame.port != own_port && concerned(&frame) == Some(key)),
                Err(error) if is_overrun(&error) => true,
                Err(error) => {
                    tracing::error!(%error, table = %key, "nftables monitor ended: what others change in the table isn't seen");
                    return;
                }
            };
            if is_touched {
                // The worker may be busy writing: whoever waits for it needs no runtime thread.
                let worker = Arc::clone(&worker);
                let _ = tokio::task::spawn_blocking(move || lock(&worker).read = None).await;
                changed.notify_one();
            }
        }
    }))
}
