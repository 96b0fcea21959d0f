//! Servers that tests start: each lives as long as its test, however that ends.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::thread::JoinHandle;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// `127.0.0.1:PORT` with a port that nobody uses now.
pub(crate) fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// A child process that is killed when this is dropped, or when the test process dies.
///
/// The kernel ties a parent-death signal to the thread that started the child, and a test's thread may end long before
/// the process: so each child has a thread that does nothing but wait for it.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its number.
    pub pid: Pid,
    waiter: Option<JoinHandle<()>>,
}

impl Process {
    /// Starts it.
    pub fn spawn(mut command: Command) -> anyhow::Result<Self> {
        let (started, pid) = std::sync::mpsc::channel();
        let waiter = std::thread::spawn(move || match command.spawn() {
            Ok(mut child) => {
                let _ = started.send(Ok(child.id()));
                let _ = child.wait();
            }
            Err(error) => drop(started.send(Err(error))),
        });
        let pid = pid.recv().context("the thread that starts it is gone")??;
        Ok(Self { pid: Pid::from_raw(pid.try_into()?), waiter: Some(waiter) })
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.waiter.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Sends it a signal, if it still runs.
    pub fn signal(&self, signal: Signal) {
        // The waiter reaps it at once when it ends; only then could the number mean somebody else.
        if !self.has_ended() {
            let _ = kill(self.pid, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        if let Some(waiter) = self.waiter.take() {
            let _ = waiter.join();
        }
    }
}
