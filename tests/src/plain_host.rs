//! A plain host with a systemd of its own: this machine's files under an overlay, in namespaces of its own.
//!
//! ```text
//!   test ─► setpriv ─► unshare ─► plain_host.sh ═► systemd (pid 1) ─ journald, etcd, fabricd, …
//! ```
//!
//! For what the Lab's nodes can't show: units, their sandboxes, a package's scripts. What it writes is in memory and goes
//! with its first process, which goes with the test.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::lab::wait_until;

const BOOT: Duration = Duration::from_secs(60);

/// A host that is up; it ends when this is dropped.
#[derive(Debug)]
pub struct PlainHost {
    dir: TempDir,
    unshare: Child,
    /// Of systemd, as this machine counts.
    pid: String,
}

impl PlainHost {
    /// Boots one.
    ///
    /// # Errors
    /// This isn't root, or has no systemd.
    pub fn boot() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "bash"]).arg(script()).arg(dir.path());
        command.process_group(0); // Ctrl-C at the terminal isn't meant for it
        let unshare = command.spawn().context("cannot run setpriv")?;
        let mut host = Self { dir, unshare, pid: String::new() };
        host.pid = wait_until("its first process", BOOT, || host.first_process())?;
        // Degraded is booted too: on a busy machine some unit of Debian's may have run out of time; ours are looked at by tests.
        let booted = "state=$(systemctl is-system-running); case $state in running | degraded) ;; *) echo $state; exit 1 ;; esac";
        wait_until("systemd to have booted", BOOT, || host.run(booted))?;
        Ok(host)
    }

    fn first_process(&self) -> Result<String> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.unshare.id()))?;
        let pid = children.split_whitespace().next().context("none yet")?;
        let program = fs::read_to_string(format!("/proc/{pid}/comm"))?;
        ensure!(program == "systemd\n", "still {program}");
        Ok(pid.to_owned())
    }

    /// Its files.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        format!("/proc/{}/root", self.pid).into()
    }

    /// Runs a line of shell on it, and gives what it printed.
    ///
    /// # Errors
    /// It fails: then what it printed is in the error.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.args([
            "--target",
            &self.pid,
            "--all",
            "--root",
            "--wd",
            "--",
            "sh",
            "-c",
            &format!("exec 2>&1; {line}"),
        ]);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin");
        let output = command.output().context("cannot run nsenter")?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(output.status.success(), "{line}: {told}{}", String::from_utf8_lossy(&output.stderr));
        Ok(told)
    }
}

impl Drop for PlainHost {
    fn drop(&mut self) {
        // Takes systemd along, and systemd all others.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let name = self.dir.path().file_name().unwrap_or_default();
        for hierarchy in ["/sys/fs/cgroup/systemd", "/sys/fs/cgroup"] {
            let group = Path::new(hierarchy).join(name);
            let empty = || if group.exists() { remove_groups(&group) } else { Ok(()) };
            let _ = wait_until("its processes to be gone", Duration::from_secs(10), empty);
        }
    }
}

/// A cgroup and all below it; the kernel refuses while a process is in one.
fn remove_groups(group: &Path) -> Result<()> {
    for entry in fs::read_dir(group)?.flatten().filter(|entry| entry.path().is_dir()) {
        remove_groups(&entry.path())?;
    }
    Ok(fs::remove_dir(group)?)
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src/plain_host.sh")
}
