//! Doing something inside the namespaces of another process: a node, or a pod on it.
//!
//! A thread is born for the task, enters the namespaces, does it and ends; the rest of the test never
//! leaves its own. Entering a pid namespace concerns only the children of the thread, and a child that
//! is started there is a direct child of the test: no `nsenter` stands between, its number is the true
//! one, and waiting for it works as ever.

use std::fs::File;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns, unshare};

/// A set of namespaces, held open.
#[derive(Debug)]
pub struct Spaces(Vec<(File, CloneFlags)>);

impl Spaces {
    /// Those of the caller.
    #[must_use]
    pub fn own() -> Self {
        Self(vec![])
    }

    /// All namespaces of a machine, by the number of its first process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn of_process(pid: i32) -> Result<Self> {
        // The mount namespace comes last, since all others are found by a path in ours.
        let kinds = [
            ("ipc", CloneFlags::CLONE_NEWIPC),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("net", CloneFlags::CLONE_NEWNET),
            ("pid", CloneFlags::CLONE_NEWPID),
            ("mnt", CloneFlags::CLONE_NEWNS),
        ];
        let open = |(name, flag)| Ok((open(Path::new(&format!("/proc/{pid}/ns/{name}")))?, flag));
        kinds.into_iter().map(open).collect::<Result<_>>().map(Self)
    }

    /// Only a network namespace: files, processes and the host name stay those of the test.
    ///
    /// # Errors
    /// There is no such file.
    pub fn of_network(path: &Path) -> Result<Self> {
        Ok(Self(vec![(open(path)?, CloneFlags::CLONE_NEWNET)]))
    }

    /// The same with another network namespace: a pod's, on its node.
    ///
    /// # Errors
    /// There is no such file.
    pub fn with_network(mut self, path: &Path) -> Result<Self> {
        self.0.retain(|(_, kind)| *kind != CloneFlags::CLONE_NEWNET);
        self.0.insert(0, (open(path)?, CloneFlags::CLONE_NEWNET));
        Ok(self)
    }

    /// Runs `task` inside. It must not start threads: a thread can't have a pid namespace of its own.
    ///
    /// # Errors
    /// The namespaces can't be entered (are you root?), or the error of the task.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let inside = || {
            // A thread that shares root and working directory with others may not change its mounts.
            unshare(CloneFlags::CLONE_FS).context("cannot unshare the working directory")?;
            for (file, kind) in &self.0 {
                setns(file, *kind).with_context(|| format!("cannot enter a namespace ({kind:?}); are you root?"))?;
            }
            task()
        };
        thread::scope(|scope| scope.spawn(inside).join()).map_err(|_| anyhow!("a task inside a namespace panicked"))?
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open the namespace {}", path.display()))
}
