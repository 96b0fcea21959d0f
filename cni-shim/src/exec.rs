//! Running a delegate: a plugin as the spec starts it, with a deadline.
//!
//! Its stdin and stdout are files in memory, not pipes: nobody can block on them, and a helper that the
//! delegate leaves behind with its stdout open can't keep us waiting. So all there is to wait for is its end.
//!
//! It runs in a process group of its own. Unless it ends well, the whole group is killed before anything else
//! happens: a `host-local` whose `bridge` died would otherwise take an address after the DEL that cleans up.
//! (One that dies in the middle holds host-local's own lock to its end, so that DEL can't overtake it.)
//! Its stderr is the shim's: by the spec, text for the runtime's log.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use fabric_core::model::IfName;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group, pidfd_open, waitid,
};

use crate::bridge;
use crate::error::CniError;

/// How long a delegate may take. An ADD that runs into it is cleaned up by a DEL of the same length, and both
/// must end within the two minutes that a kubelet waits.
pub const DEADLINE: Duration = Duration::from_secs(45);

/// The longest answer that is read, in bytes.
const MAX_STDOUT: u64 = 1024 * 1024;

/// A delegate to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Invocation {
    /// Its binary.
    pub plugin: PathBuf,
    /// Variables that differ from the shim's own environment.
    pub env: Vec<(&'static str, OsString)>,
    /// What it reads.
    pub stdin: Vec<u8>,
}

/// How it ended.
#[derive(Clone, Debug)]
pub struct Exit {
    /// Its exit code, or the signal that ended it.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: Vec<u8>,
}

/// Why it has no end to report.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It never ran.
    #[error("cannot start {}: {source}", plugin.display())]
    Start {
        /// The binary.
        plugin: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// It did not end in time, and was killed.
    #[error("{} did not end within {deadline:?} and was killed", plugin.display())]
    TimedOut {
        /// The binary.
        plugin: PathBuf,
        /// How long it was given.
        deadline: Duration,
    },
    /// Its end or its output can't be known.
    #[error("cannot follow {}: {source}", plugin.display())]
    Follow {
        /// The binary.
        plugin: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Something that runs delegates: processes, or a test's fake.
pub trait Exec {
    /// Runs it to its end.
    ///
    /// # Errors
    /// [`ExecError`]; no process of its group is then left.
    fn exec(&self, invocation: &Invocation) -> Result<Exit, ExecError>;

    /// Makes the bridge that the standard plugin is about to use, without IPv6's duplicate address detection: the
    /// plugin leaves that on, and while it lasts, a second or two, the host can't ask for a pod's MAC address, so
    /// packets for the first pod of a node are lost. The gateway's address is this node's by its lease.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn make_bridge(&self, name: &IfName, mtu: u32) -> Result<(), CniError>;

    /// Has IPv6 packets that leave a pod by a gateway be no larger than `mtu`: the routes of the configuration can't say so
    /// before version 1.1.0 of the spec, whatever the delegate is.
    ///
    /// # Errors
    /// When the kernel refuses.
    fn limit_ipv6(&self, netns: &Path, ifname: &IfName, mtu: u32) -> Result<(), CniError>;
}

/// Runs delegates as processes.
#[derive(Clone, Copy, Debug)]
pub struct Processes {
    /// How long each may take.
    pub deadline: Duration,
}

impl Exec for Processes {
    fn make_bridge(&self, name: &IfName, mtu: u32) -> Result<(), CniError> {
        bridge::make(&mut bridge::open_netlink()?, name, mtu)
    }

    fn limit_ipv6(&self, netns: &Path, ifname: &IfName, mtu: u32) -> Result<(), CniError> {
        bridge::limit_ipv6(netns, ifname, mtu)
    }

    fn exec(&self, Invocation { plugin, env, stdin }: &Invocation) -> Result<Exit, ExecError> {
        let start = |source: io::Error| ExecError::Start { plugin: plugin.clone(), source };
        let follow = |source: io::Error| ExecError::Follow { plugin: plugin.clone(), source };

        let stdin = in_memory(stdin).map_err(start)?;
        let stdout = in_memory(&[]).map_err(start)?;
        let mut child = Command::new(plugin)
            .envs(env.iter().map(|(name, value)| (name, value)))
            .process_group(0)
            .stdin(stdin)
            .stdout(stdout.try_clone().map_err(start)?)
            .spawn()
            .map_err(start)?;

        let pid = Pid::from_child(&child);
        let end = watch(pid, self.deadline);
        // Until `wait` takes it the child is a zombie, so the group's number still means this group.
        if !matches!(end, Ok(End::Well)) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let status = child.wait().map_err(follow)?;
        match end.map_err(follow)? {
            End::TimedOut => Err(ExecError::TimedOut { plugin: plugin.clone(), deadline: self.deadline }),
            End::Well | End::Badly => Ok(Exit { status, stdout: read_back(stdout).map_err(follow)? }),
        }
    }
}

/// How a delegate came to its end.
enum End {
    Well,
    Badly,
    TimedOut,
}

/// Waits for the end of `pid`, which stays a zombie, but not past the deadline.
fn watch(pid: Pid, deadline: Duration) -> io::Result<End> {
    let ended = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(process) => ended_by_event(&process, deadline)?,
        // Before Linux 5.3, and under filters of system calls that are older than that.
        Err(Errno::NOSYS | Errno::PERM) => ended_by_asking(pid, deadline)?,
        Err(e) => return Err(e.into()),
    };
    if !ended {
        return Ok(End::TimedOut);
    }
    let status = end_of(pid)?;
    Ok(if status.is_some_and(|status| status.exit_status() == Some(0)) { End::Well } else { End::Badly })
}

/// Waits for a process. False when it goes on after the deadline.
fn ended_by_event(process: &OwnedFd, deadline: Duration) -> io::Result<bool> {
    let late = Instant::now() + deadline;
    loop {
        let left = late.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&left)) {
            Ok(events) => return Ok(events > 0),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// The same where the kernel tells of no end to wait for with a deadline.
fn ended_by_asking(pid: Pid, deadline: Duration) -> io::Result<bool> {
    let late = Instant::now() + deadline;
    while end_of(pid)?.is_none() {
        if Instant::now() >= late {
            return Ok(false);
        }
        #[expect(clippy::disallowed_methods, reason = "the plugin has no async runtime")]
        thread::sleep(Duration::from_millis(1));
    }
    Ok(true)
}

/// How a child ended, if it has; it stays a zombie.
fn end_of(pid: Pid) -> io::Result<Option<WaitIdStatus>> {
    Ok(waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG)?)
}

fn in_memory(content: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("cni", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

fn read_back(mut file: File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.rewind()?;
    file.take(MAX_STDOUT).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;
    use std::process::Stdio;

    use tempfile::TempDir;

    use super::*;

    fn script(dir: &TempDir, body: &str) -> Invocation {
        let plugin = dir.path().join("plugin");
        fs::write(&plugin, format!("#!/bin/sh\n{body}\n")).expect("a file");
        fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).expect("its mode");
        Invocation { plugin, env: vec![("CNI_COMMAND", "ADD".into())], stdin: b"the config".to_vec() }
    }

    fn within(seconds: u64) -> Processes {
        Processes { deadline: Duration::from_secs(seconds) }
    }

    #[test]
    fn delegate_gets_its_environment_and_stdin_and_is_heard() {
        let dir = TempDir::new().expect("a folder");
        let exit = within(20).exec(&script(&dir, "echo $CNI_COMMAND: $(cat); exit 3")).expect("it ran");
        assert_eq!((exit.status.code(), exit.stdout), (Some(3), b"ADD: the config\n".to_vec()));
    }

    #[test]
    fn large_config_and_large_answer_block_nobody() {
        let dir = TempDir::new().expect("a folder");
        let mut large = script(&dir, "cat; cat /dev/zero | head -c 300000; exit 0");
        large.stdin = vec![b'x'; 300_000];
        let exit = within(20).exec(&large).expect("it ran");
        assert_eq!((exit.status.success(), exit.stdout.len()), (true, 600_000));
    }

    #[test]
    fn hanging_delegate_is_killed_with_all_that_it_started() {
        let dir = TempDir::new().expect("a folder");
        let pid_file = dir.path().join("pid");
        let hanging = script(&dir, &format!("sleep 1000 & echo $! > {}; wait", pid_file.display()));
        let begin = Instant::now();
        let error = Processes { deadline: Duration::from_millis(500) }.exec(&hanging).expect_err("too long");
        assert!(matches!(error, ExecError::TimedOut { .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(20));
        assert_gone(&pid_file);
    }

    #[test]
    fn helper_of_a_delegate_that_died_is_killed_too() {
        let dir = TempDir::new().expect("a folder");
        let pid_file = dir.path().join("pid");
        let dying = script(&dir, &format!("sleep 1000 & echo $! > {}; kill -9 $$", pid_file.display()));
        let exit = within(20).exec(&dying).expect("it ran");
        assert!(!exit.status.success());
        assert_gone(&pid_file);
    }

    #[test]
    fn helper_left_behind_by_a_delegate_that_ended_well_keeps_nobody_waiting() {
        let dir = TempDir::new().expect("a folder");
        let begin = Instant::now();
        let exit = within(20).exec(&script(&dir, "sleep 3 & echo done")).expect("it ran");
        assert_eq!(exit.stdout, b"done\n");
        assert!(begin.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn end_is_seen_in_time_with_and_without_an_event_for_it() {
        type Watch = fn(Pid, Duration) -> io::Result<bool>;
        let by_event: Watch = |pid, deadline| ended_by_event(&pidfd_open(pid, PidfdFlags::empty())?, deadline);
        for watch in [by_event, ended_by_asking] {
            let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().expect("cat");
            let pid = Pid::from_child(&child);
            assert!(!watch(pid, Duration::from_millis(50)).expect("it can be watched"), "it waits for its input");
            drop(child.stdin.take());
            assert!(watch(pid, Duration::from_secs(20)).expect("it can be watched"), "its input has ended");
            assert_eq!(end_of(pid).expect("a child").expect("ended").exit_status(), Some(0));
            assert!(child.wait().expect("still a zombie").success());
        }
    }

    #[test]
    fn delegate_that_cannot_start_is_named() {
        let missing = Invocation { plugin: "/nowhere/bridge".into(), env: Vec::new(), stdin: Vec::new() };
        let error = within(20).exec(&missing).expect_err("not there");
        assert!(error.to_string().starts_with("cannot start /nowhere/bridge: No such file"), "{error}");
    }

    /// SIGKILL has been sent by now, but takes its moment; then a zombie may stay until init takes it.
    fn assert_gone(pid_file: &Path) {
        let pid = fs::read_to_string(pid_file).expect("the helper's pid");
        let deadline = Instant::now() + Duration::from_secs(10);
        while fs::read_to_string(format!("/proc/{}/stat", pid.trim())).is_ok_and(|stat| !stat.contains(") Z ")) {
            assert!(Instant::now() < deadline, "process {pid} lives on");
            #[expect(clippy::disallowed_methods, reason = "a zombie ends by itself")]
            thread::sleep(Duration::from_millis(5));
        }
    }
}
