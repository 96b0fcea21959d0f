//! One process of this machine, told apart from a later one that was given the same number.
//!
//! The Lab remembers processes in files and signals them from other processes, later. A number alone
//! would one day name a stranger; with the time of its start and the boot it belongs to it can't.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::wait::{DISK, wait_until};

/// A process, by number, start and boot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// The number in the namespace in which the Lab itself runs: `/proc/<pid>` is this process.
    pub pid: i32,
    start_time: String,
    boot_id: String,
}

impl Process {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none.
    pub fn with_pid(pid: i32) -> Result<Self> {
        let (_, start_time) = state_and_start(pid).with_context(|| format!("no process {pid}"))?;
        Ok(Self { pid, start_time, boot_id: boot_id()? })
    }

    /// False once it has ended; a zombie has ended, but for one that waits for other threads of its own: those may still
    /// hold files and locks.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        let same_start = matches!(state_and_start(self.pid), Ok((state, start))
        if start == self.start_time && match state.as_str() {
            "Z" => fs::read_dir(format!("/proc/{}/task", self.pid)).is_ok_and(|threads| threads.count() > 1),
            "X" => false,
            _ => true,
        });
        same_start && boot_id().is_ok_and(|boot| boot == self.boot_id)
    }

    /// Sends a signal, if this is still the same process. After SIGSTOP all of its threads stand still when this returns.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        ensure!(self.is_alive(), "process {} has ended", self.pid);
        kill(Pid::from_raw(self.pid), signal)
            .with_context(|| format!("cannot send {signal} to process {}", self.pid))?;
        if signal == Signal::SIGSTOP { self.wait_stopped() } else { Ok(()) }
    }

    /// Each thread stops when it comes by: until then it may still answer somebody.
    fn wait_stopped(&self) -> Result<()> {
        wait_until(&format!("process {} stops", self.pid), DISK, || {
            for thread in fs::read_dir(format!("/proc/{}/task", self.pid))?.flatten() {
                let (state, _) = state_of(&thread.path().join("stat"))?;
                ensure!(matches!(state.as_str(), "T" | "t"), "thread {} is in state {state}", thread.path().display());
            }
            Ok(())
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It lives on after `limit`.
    pub fn wait_gone(&self, limit: Duration) -> Result<()> {
        wait_until(&format!("process {} ends", self.pid), limit, || {
            ensure!(!self.is_alive(), "still running: {}", self.threads());
            Ok(())
        })
    }

    /// What its threads do: name, state, and where in the kernel each waits (proc(5), `wchan`).
    fn threads(&self) -> String {
        let threads = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let told = threads.map(|thread| {
            let path = thread.path();
            let read = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default().trim().to_owned();
            let state = state_of(&path.join("stat")).map_or_else(|_| "?".into(), |(state, _)| state);
            format!("{} {state} {}", read("comm"), read("wchan"))
        });
        told.collect::<Vec<_>>().join(", ")
    }
}

/// Fields 3 and 22 of `/proc/<pid>/stat` (proc(5)); the name in field 2 may itself hold spaces.
fn state_and_start(pid: i32) -> Result<(String, String)> {
    state_of(Path::new(&format!("/proc/{pid}/stat")))
}

fn state_of(stat: &Path) -> Result<(String, String)> {
    let stat = fs::read_to_string(stat)?;
    let (_, after_name) = stat.rsplit_once(')').context("malformed stat")?;
    let mut fields = after_name.split_whitespace();
    let state = fields.next().context("malformed stat")?;
    let start = fields.nth(18).context("malformed stat")?;
    Ok((state.to_owned(), start.to_owned()))
}

fn boot_id() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}
