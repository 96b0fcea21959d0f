//! The first process of a machine: makes its own files, then reaps what others leave behind.
//!
//! It is started by [`Machine::boot`](super::Machine::boot) in new network, mount, pid, uts and ipc
//! namespaces and turns the mounts that it was born with into those of a machine of its own:
//!
//! | path | what it is there |
//! |---|---|
//! | `/run` | memory, so a reboot empties it, as on any machine |
//! | `/run/lab/bin` | the binaries of this build, first on every PATH |
//! | `/etc`, `/opt` | the host's, with changes kept in memory |
//! | `/etc/cni`, `/var/lib`, `/var/log` | folders of the machine, which outlive it |
//! | `/proc`, `/sys` | those of its own namespaces, with a boot id of its own for each boot |
//!
//! No mount propagates back to the host. When this process ends the kernel kills every process of the
//! machine and frees mounts and network: nothing has to be cleaned up, and nothing can be forgotten.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::Args;
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{sethostname, setsid};

/// What the first process is told on its standard input to outlive the process that started it.
pub const STAY: &str = "stay";

/// The file in the machine's folder that tells how each of its orphans ended, a line each: its number inside the machine,
/// then `exit status 1` or `killed by SIGBUS`.
pub(super) const ENDED: &str = "ended";

/// What the first process has to know.
#[derive(Args, Debug)]
pub struct Init {
    /// Host name of the machine
    #[arg(long)]
    name: String,
    /// Folder of the machine's state
    #[arg(long)]
    dir: PathBuf,
    /// Folder of the binaries under test
    #[arg(long)]
    bin: PathBuf,
}

impl Init {
    /// Becomes the machine. Prints its process number as the host sees it once the machine is ready.
    ///
    /// # Errors
    /// A mount was refused.
    pub fn run(&self) -> Result<()> {
        let pid = fs::read_link("/proc/self")?; // the host's /proc still, so the host's number
        ensure!(std::process::id() == 1, "`lab init` is for the Lab itself");
        setsid().ok();
        let mut ended = File::create(self.dir.join(ENDED))?;
        self.mount_files()?;
        sethostname(&self.name)?;
        fs::write("/etc/hostname", format!("{}\n", self.name))?;
        let lo = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
        ensure!(lo.success(), "cannot set lo up");
        // Blocked before any thread starts, so that every thread leaves it to the loop below.
        let mut child_ended = SigSet::empty();
        child_ended.add(Signal::SIGCHLD);
        child_ended.thread_block()?;
        // The other end of this pipe is held by the test. When that ends, however it ends, so do we:
        // unless it has said before that we are to stay.
        thread::spawn(|| {
            let mut word = String::new();
            io::stdin().read_to_string(&mut word).ok();
            if word != STAY {
                #[expect(clippy::disallowed_methods, reason = "the whole namespace goes with its first process")]
                std::process::exit(0);
            }
        });
        println!("{}", pid.display());
        loop {
            while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                let line = match status {
                    WaitStatus::Exited(pid, code) => format!("{pid} exit status {code}\n"),
                    WaitStatus::Signaled(pid, signal, _) => format!("{pid} killed by {signal}\n"),
                    WaitStatus::StillAlive => break,
                    _ => continue,
                };
                // A full disk, say, is no reason to end the machine.
                ended.write_all(line.as_bytes()).ok();
            }
            child_ended.wait()?;
        }
    }

    fn mount_files(&self) -> Result<()> {
        // Opened first: a path of the host may lie below one that is about to be covered.
        let bin = File::open(&self.bin).with_context(|| self.bin.display().to_string())?;
        let state = ["etc-cni", "var-lib", "var-log"].map(|name| {
            fs::create_dir_all(self.dir.join(name))?;
            File::open(self.dir.join(name))
        });
        let [etc_cni, var_lib, var_log] = state;

        mount_new("tmpfs", "/run", "mode=755")?;
        for path in ["/run/lab/bin", "/run/netns", "/run/lock"] {
            fs::create_dir_all(path)?;
        }
        bind(&bin, "/run/lab/bin")?;
        overlay("/etc")?;
        overlay("/opt")?;
        fs::create_dir_all("/etc/cni")?;
        bind(&etc_cni?, "/etc/cni")?;
        bind(&var_lib?, "/var/lib")?;
        bind(&var_log?, "/var/log")?;
        fs::create_dir_all("/etc/cni/net.d")?;
        plugins()?;

        // A sysfs shows the network namespace of its mounter: /sys/class/net. The cgroups stay the host's.
        let cgroups = File::open("/sys/fs/cgroup");
        mount_new("sysfs", "/sys", "")?;
        if let Ok(cgroups) = cgroups {
            bind(&cgroups, "/sys/fs/cgroup")?;
        }
        // A boot forgets what was pinned.
        mount_new("bpf", "/sys/fs/bpf", "")?;
        mount_new("proc", "/proc", "")?;
        boot_id()
    }
}

/// Another boot id for each boot: the kernel below has one for all machines.
fn boot_id() -> Result<()> {
    let id = fs::read("/proc/sys/kernel/random/uuid")?;
    fs::write("/run/lab/boot_id", id)?;
    bind(&File::open("/run/lab/boot_id")?, "/proc/sys/kernel/random/boot_id")
}

/// The usual folder of CNI plugins: the standard ones beside ours, as on a real node.
fn plugins() -> Result<()> {
    let folder = Path::new("/opt/cni/bin");
    fs::create_dir_all(folder)?;
    let standard = fs::read_dir("/usr/lib/cni").context("no CNI plugins in /usr/lib/cni; `make deps` installs them")?;
    let mut plugins: Vec<PathBuf> = standard.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    plugins.extend(["fabric-cni", "fabric-bridge"].map(|ours| Path::new("/run/lab/bin").join(ours)));
    for plugin in plugins {
        let link = folder.join(plugin.file_name().context("a plugin without a name")?);
        fs::remove_file(&link).ok();
        std::os::unix::fs::symlink(&plugin, &link)?;
    }
    Ok(())
}

/// `mount -t KIND -o OPTIONS KIND ON`
fn mount_new(kind: &str, on: &str, options: &str) -> Result<()> {
    mount(Some(kind), on, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("cannot mount {kind} on {on}"))
}

/// `mount --rbind SOURCE ON`, by descriptor, which also works where a mount covers the path by now.
fn bind(source: &File, on: &str) -> Result<()> {
    let source = format!("/proc/self/fd/{}", source.as_raw_fd());
    mount(Some(source.as_str()), on, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("cannot bind something to {on}"))
}

/// Shows the host's folder, but keeps every change to it in the machine's memory.
fn overlay(folder: &str) -> Result<()> {
    let memory = format!("/run/lab/changes{folder}");
    fs::create_dir_all(format!("{memory}/upper"))?;
    fs::create_dir_all(format!("{memory}/work"))?;
    mount_new("overlay", folder, &format!("lowerdir={folder},upperdir={memory}/upper,workdir={memory}/work"))
}
