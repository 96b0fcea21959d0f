//! What is told while a pass waits for the kernel: one that loads modules for the packet filter, or is overloaded, may take
//! its time, and the view is published at a pass's end.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::Op;
use fabric_core::handoff::{NotReady, Readiness};
use tokio::sync::watch;
use tokio::time::{Instant, interval_at};
use tracing::info;

use crate::lease::Holding;
use crate::status::view::View;

/// After how long a pass is told of, and how often from then on.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a pass waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// The kernel's tables, or something beside the kernel.
    Reading,
    /// Links, addresses, routes and their like.
    WritingRoutes,
    /// The packet filter, alone or among others.
    WritingFilter,
    /// Maps and programs of the fast path.
    WritingFastPath,
}

impl Doing {
    /// What these steps are.
    pub(super) fn of(ops: &[Op]) -> Self {
        match ops.first() {
            Some(Op::FastPath(_)) => Self::WritingFastPath,
            _ if ops.iter().any(|op| matches!(op, Op::Filter(_))) => Self::WritingFilter,
            _ => Self::WritingRoutes,
        }
    }
}

impl fmt::Display for Doing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reading => "reading the kernel's tables",
            Self::WritingRoutes => "writing devices and routes",
            Self::WritingFilter => "writing the packet filter",
            Self::WritingFastPath => "writing the fast path",
        })
    }
}

/// Waits for a pass. While it takes long on a node that is starting, the view says for what, with the lease that it is
/// about. A node that is ready stays so, and one that has failed keeps its reason.
pub(super) async fn telling<T>(
    view: &watch::Sender<Arc<View>>,
    doing: &watch::Sender<Doing>,
    holding: Holding,
    pass: impl Future<Output = T>,
) -> T {
    let mut pass = pin!(pass);
    let began = Instant::now();
    let mut again = interval_at(began + PATIENCE, PATIENCE);
    let mut logged = false;
    loop {
        tokio::select! {
            biased;
            done = &mut pass => return done,
            _ = again.tick() => {
                let (doing, seconds) = (*doing.borrow(), began.elapsed().as_secs());
                let reason = format!("{doing} for {seconds} s: the kernel has not answered yet; it may be loading modules");
                let told = view.send_if_modified(|current| {
                    if !matches!(current.readiness, Readiness::NotReady { code: NotReady::Starting, .. }) {
                        return false;
                    }
                    let current = Arc::make_mut(current);
                    current.holding = holding.clone();
                    current.readiness = Readiness::NotReady { code: NotReady::Starting, reason: reason.clone() };
                    true
                });
                if told && !std::mem::replace(&mut logged, true) {
                    info!(reason, "waiting for the kernel");
                }
            }
        }
    }
}
