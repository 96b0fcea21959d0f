//! Invariant I6: what a daemon uses while its store is away, as the kernel and its log count it.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::bench::usage;
use crate::lab::Node;
use crate::lab::process::Process;

/// Of a core.
const CPU: f64 = 0.05;
/// Lines of the log: in any minute, and once for what begins and ends.
const LINES_A_MINUTE: f64 = 10.0;
const LINES_ONCE: f64 = 10.0;
/// What is flat within these is flat: MiB, and descriptors of a connection that is just tried.
const MEMORY: f64 = 4.0;
const DESCRIPTORS: usize = 4;

/// A daemon without its store.
pub(super) struct Outage {
    node: Arc<Node>,
    process: Process,
    began: Instant,
    before: Use,
}

struct Use {
    cpu: Duration,
    lines: usize,
    memory: f64,
    descriptors: usize,
}

impl Outage {
    /// It begins for the daemon that runs on this node now.
    pub(super) fn begins(node: &Arc<Node>) -> Result<Self> {
        let process = node.running_service("fabricd")?;
        let before = Use::of(node, &process)?;
        Ok(Self { node: Arc::clone(node), process, began: Instant::now(), before })
    }

    /// It ends: the daemon must have been frugal.
    pub(super) fn ends(self) -> Result<()> {
        let (time, before, after) =
            (self.began.elapsed().as_secs_f64(), self.before, Use::of(&self.node, &self.process)?);
        let cpu = (after.cpu - before.cpu).as_secs_f64() / time;
        ensure!(cpu <= CPU, "{} used {:.1} % of a core in {time:.0} s", self.node.name, cpu * 100.0);
        let lines = after.lines - before.lines;
        #[expect(clippy::cast_precision_loss, reason = "few lines")]
        let too_many = lines as f64 > LINES_ONCE + LINES_A_MINUTE * time / 60.0;
        ensure!(!too_many, "{} logged {lines} lines in {time:.0} s\n{}", self.node.name, self.node.log_tail("fabricd"));
        let memory = after.memory - before.memory;
        ensure!(memory <= MEMORY, "{} took {memory:.1} MiB more in {time:.0} s", self.node.name);
        let descriptors = (before.descriptors, after.descriptors);
        ensure!(descriptors.1 <= descriptors.0 + DESCRIPTORS, "{}: descriptors {descriptors:?}", self.node.name);
        Ok(())
    }
}

impl Use {
    fn of(node: &Node, process: &Process) -> Result<Self> {
        Ok(Self {
            cpu: usage::cpu(process)?,
            lines: node.log("fabricd").lines().count(),
            memory: usage::resident(process)?.0,
            descriptors: fs::read_dir(format!("/proc/{}/fd", process.pid))?.count(),
        })
    }
}
