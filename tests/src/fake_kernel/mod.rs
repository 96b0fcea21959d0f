//! [`FakeKernel`]: a kernel in memory that behaves as Linux does where fabricd can tell the difference.
//!
//! [`Tables`] is what it holds, whoever made it, with the kernel's rules: what an entry needs to exist, and what goes
//! in silence when a link goes down, a link or a nexthop object is deleted. A test plays the other programs of the host
//! by [`FakeKernel::edit`], breaks writes by [`FakeKernel::fail`], and reads what was written from
//! [`FakeKernel::writes`]. The conformance suite keeps it honest: the same cases run on it and on the real kernel.

mod fast_path;
mod filter;
mod observed;
mod routing;
mod tables;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use fabric_core::derived::Dirty;
use fabric_core::diff::nft::Transaction;
use fabric_core::diff::{Key, Op, diff, nft};
use fabric_core::state::Routing;
use fabricd::kernel::{Kernel, KernelError, Observed, Touched};
use tokio::sync::Notify;

pub use self::tables::{BOOT, Link, STATIC, Tables};

/// One write that was asked for, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The step.
    pub op: Op,
    /// The errno when it was refused.
    pub result: Result<(), i32>,
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Ok(()) => self.op.fmt(f),
            Err(errno) => write!(f, "{}: {}", self.op, io::Error::from_raw_os_error(errno)),
        }
    }
}

type Matches = Box<dyn FnMut(&Op) -> bool + Send>;

#[derive(Default)]
struct State {
    tables: Tables,
    writes: Vec<Write>,
    faults: Vec<(Matches, i32)>,
    unreadable: Option<i32>,
    observed: Arc<Observed>,
    touched: Dirty<Key>,
    stale: bool,
    overrun: bool,
    muted: bool,
    stalled: bool,
}

/// A kernel in memory. Clones are handles of the same one: the daemon gets one, the test keeps another.
#[derive(Clone)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
    woken: Arc<Notify>,
    resumed: Arc<Notify>,
}

impl FakeKernel {
    /// A kernel that holds this.
    #[must_use]
    pub fn new(tables: Tables) -> Self {
        let state = State { tables, stale: true, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), woken: Arc::new(Notify::new()), resumed: Arc::default() }
    }

    /// What it holds now.
    #[must_use]
    pub fn tables(&self) -> Tables {
        self.state().tables.clone()
    }

    /// Another program of the host changes something.
    pub fn edit(&self, change: impl FnOnce(&mut Tables)) {
        let mut state = self.state();
        change(&mut state.tables);
        self.announce(&mut state);
    }

    /// Every write asked for since the last call, in order.
    #[must_use]
    pub fn writes(&self) -> Vec<Write> {
        std::mem::take(&mut self.state().writes)
    }

    /// From now on writes for which `matches` says so fail with `errno`, those of the packet filter with all of their
    /// transaction. It is asked once for each write, so that it can count: `move |_| { n += 1; n == 3 }`.
    pub fn fail(&self, errno: i32, matches: impl FnMut(&Op) -> bool + Send + 'static) {
        self.state().faults.push((Box::new(matches), errno));
    }

    /// From now on nothing can be read (`Some`), or all can be again (`None`).
    pub fn fail_reads(&self, errno: Option<i32>) {
        self.state().unreadable = errno;
    }

    /// From now on no write is answered (`true`), or all are again (`false`), those that wait included.
    pub fn stall(&self, stalled: bool) {
        self.state().stalled = stalled;
        self.resumed.notify_one();
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.unreadable = None;
    }

    /// Changes go unannounced from now on: neither does `changed` wake nor `observe` show them.
    pub fn lose_notifications(&self) {
        self.state().muted = true;
    }

    /// The monitor learns that notifications were lost, and hears again from now on.
    pub fn overrun(&self) {
        let mut state = self.state();
        state.muted = false;
        state.overrun = true;
        self.announce(&mut state);
    }

    fn announce(&self, state: &mut State) {
        if !state.muted {
            state.stale = true;
            self.woken.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kernel for FakeKernel {
    async fn observe(&mut self) -> Result<Arc<Observed>, KernelError> {
        let mut state = self.state();
        if let Some(errno) = state.unreadable {
            return Err(KernelError::Dump { table: "tables", source: io::Error::from_raw_os_error(errno) });
        }
        state.overrun = false;
        if std::mem::take(&mut state.stale) {
            let now = state.tables.observed();
            let touched = touched(&state.observed.ours, &now.ours);
            state.touched.extend(touched);
            state.observed = Arc::new(now);
        }
        Ok(Arc::clone(&state.observed))
    }

    fn touched(&mut self) -> Dirty<Key> {
        std::mem::take(&mut self.state().touched)
    }

    async fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        while self.state().stalled {
            self.resumed.notified().await;
        }
        let mut state = self.state();
        // Each fault is asked, so that each counts every write.
        let mut refused_by_fault = |op: &Op| {
            let faults = state.faults.iter_mut().filter_map(|(hits, errno)| hits(op).then_some(*errno));
            faults.collect::<Vec<i32>>().first().map_or(Ok(()), |errno| Err(*errno))
        };
        let mut results: Vec<Result<(), i32>> = ops.iter().map(&mut refused_by_fault).collect();
        let mut transactions: BTreeMap<Transaction, Vec<(usize, &nft::Op)>> = BTreeMap::new();
        for (at, op) in ops.iter().enumerate() {
            match op {
                Op::Routing(op) => {
                    results[at] = results[at].and_then(|()| state.tables.write(op));
                    if results[at].is_ok() {
                        self.announce(&mut state);
                    }
                }
                Op::Filter(op) => transactions.entry(op.transaction()).or_default().push((at, op)),
                Op::FastPath(op) => {
                    results[at] = results[at].and_then(|()| state.tables.write_fast_path(op));
                    if results[at].is_ok() {
                        self.announce(&mut state);
                    }
                }
            }
        }
        for steps in transactions.values() {
            let fault = steps.iter().find_map(|(at, _)| results[*at].err());
            let steps_alone: Vec<&nft::Op> = steps.iter().map(|(_, op)| *op).collect();
            let result = fault.map_or_else(|| filter::write(&mut state.tables.filter, &steps_alone), Err);
            steps.iter().for_each(|(at, _)| results[*at] = result);
        }
        // As with the real one, our own writes of the packet filter wake nobody.
        if !transactions.is_empty() {
            let filter = state.tables.filter.clone();
            Arc::make_mut(&mut state.observed).filter = filter;
        }
        state.writes.extend(ops.iter().zip(&results).map(|(op, result)| Write { op: op.clone(), result: *result }));
        let refusal = |(op, errno)| KernelError::of_op(op, io::Error::from_raw_os_error(errno), None);
        ops.iter().zip(results).map(|(op, result)| result.map_err(|errno| refusal((op, errno)))).collect()
    }

    async fn changed(&mut self) -> Touched {
        loop {
            {
                let state = self.state();
                if state.overrun {
                    return Touched::Everything;
                } else if state.stale {
                    return Touched::State;
                }
            }
            self.woken.notified().await;
        }
    }

    fn audit(&mut self) {
        let mut state = self.state();
        state.stale = true;
        self.woken.notify_one();
    }
}

/// The entries that differ, as the real one hears of them.
fn touched(was: &Routing, now: &Routing) -> Dirty<Key> {
    let own = |state: &Routing| (state.links.clone(), state.addresses.clone(), state.sysctls.clone());
    match own(was) == own(now) {
        true => Dirty::Keys(diff(now, was).ops().iter().map(Op::key).collect()),
        false => Dirty::Everything,
    }
}

#[cfg(test)]
mod tests {
    use fabric_core::diff::routing;
    use fabric_core::state::Sysctl;

    use super::*;

    fn forward(value: u32) -> Op {
        routing::Op::Sysctl(Sysctl::Ipv4Forward, value).into()
    }

    #[tokio::test]
    async fn nth_write_fails_and_all_are_recorded() {
        let mut kernel = FakeKernel::new(Tables::host(&[]));
        let mut writes = 0;
        kernel.fail(libc::ENOBUFS, move |_| {
            writes += 1;
            writes == 2
        });
        let results = kernel.apply(&[forward(1), forward(2), forward(3)]).await;
        assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!(kernel.tables().sysctls[&Sysctl::Ipv4Forward], 3);
        let written: Vec<_> = kernel.writes().into_iter().map(|write| write.result).collect();
        assert_eq!(written, [Ok(()), Err(libc::ENOBUFS), Ok(())]);
    }

    #[tokio::test]
    async fn change_whose_notification_is_lost_shows_after_the_overrun() {
        let mut kernel = FakeKernel::new(Tables::host(&[]));
        let before = kernel.observe().await.expect("readable");
        kernel.lose_notifications();
        kernel.edit(|tables| tables.links.clear());
        assert_eq!(kernel.observe().await.expect("readable"), before);
        kernel.overrun();
        assert_eq!(kernel.changed().await, Touched::Everything);
        assert!(kernel.observe().await.expect("readable").host.links.is_empty());
    }
}
