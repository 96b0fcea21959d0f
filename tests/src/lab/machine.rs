//! A machine: network, mount, pid, uts and ipc namespaces that live as long as their first process.
//!
//! ```text
//!   test ──stdin──► unshare ──► lab init (pid 1, see init.rs) ◄─ reaps ─ fabricd, etcd, containerd, …
//!                                   ▲
//!   enters its namespaces (spaces.rs) to run a command
//! ```
//!
//! All that is known about it lies in its folder, so that a later process (`lab exec`, `lab down`) finds
//! the same machine: `machine.json` the first process, `NAME.service` the long-running ones, `ended` how they ended,
//! `var-log` the logs. [`Machine::power_off`] is pulling the plug: one SIGKILL, and the kernel frees the rest.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::binaries;
use super::exec::{Exec, Output};
use super::init::{ENDED, STAY};
use super::process::Process;
use super::spaces::Spaces;
use super::wait::{DISK, wait_until};

/// How long a machine may take to end; killing hundreds of processes takes the kernel a moment.
const POWER_OFF: Duration = Duration::from_secs(20);

/// How long a process lives that nobody stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lifetime {
    /// Until the process that started it ends, however that happens.
    OfTheTest,
    /// Until it is stopped: what `lab up` starts.
    Stays,
}

/// A long-running process, as its file has it.
#[derive(Debug, Serialize, Deserialize)]
struct Service {
    process: Process,
    /// Its number inside the machine.
    inner_pid: i32,
}

/// A machine, on or off.
#[derive(Debug)]
pub struct Machine {
    /// Its host name.
    pub name: String,
    dir: PathBuf,
    lifetime: Lifetime,
    env: Vec<(String, String)>,
    running: Mutex<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    init: Process,
    /// Its parent, which ends after it; none when another process booted the machine.
    parent: Option<Child>,
}

impl Machine {
    /// A machine with its state in `dir`; on if another process has booted it. `env` is added to the
    /// environment of every command.
    pub(super) fn new(name: &str, dir: &Path, lifetime: Lifetime, env: Vec<(String, String)>) -> Self {
        let known: Option<Process> =
            fs::read(dir.join("machine.json")).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let running = known.filter(Process::is_alive).map(|init| Running { init, parent: None });
        Self { name: name.to_owned(), dir: dir.to_owned(), lifetime, env, running: Mutex::new(running) }
    }

    /// Switches it on.
    ///
    /// # Errors
    /// It is on already, or its namespaces or mounts can't be made.
    pub fn boot(&self) -> Result<()> {
        let mut running = self.running();
        ensure!(running.is_none(), "{} is on already", self.name);
        fs::create_dir_all(self.dir.join("var-log"))?;
        let log = self.log_path("init");
        let mut command = Command::new("unshare");
        command.args([
            "--net",
            "--mount",
            "--uts",
            "--ipc",
            "--pid",
            "--fork",
            "--kill-child",
            "--propagation",
            "private",
            "--",
        ]);
        command.arg(binaries::lab()?).args(["init", "--name", &self.name]);
        command.arg("--dir").arg(&self.dir).arg("--bin").arg(binaries::folder()?);
        command.process_group(0); // Ctrl-C at the terminal isn't meant for it
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(append(&log)?);
        let mut parent = command.spawn().context("cannot run unshare")?;
        let mut pid = String::new();
        BufReader::new(parent.stdout.take().context("no pipe")?).read_line(&mut pid)?;
        let Ok(pid) = pid.trim().parse() else {
            parent.wait()?;
            bail!("{} does not boot: {}", self.name, fs::read_to_string(log)?);
        };
        let init = Process::with_pid(pid)?;
        fs::write(self.dir.join("machine.json"), serde_json::to_string_pretty(&init)?)?;
        if self.lifetime == Lifetime::Stays {
            // Not before it is on record, or an interrupted `lab up` could leave a machine that nobody knows.
            let mut pipe = parent.stdin.take().context("no pipe")?;
            pipe.write_all(STAY.as_bytes())?;
        }
        *running = Some(Running { init, parent: Some(parent) });
        Ok(())
    }

    /// Pulls the plug: every process, mount and network device of it is gone when this returns.
    ///
    /// # Errors
    /// It can't be killed.
    pub fn power_off(&self) -> Result<()> {
        let Some(mut running) = self.running().take() else { return Ok(()) };
        running.init.signal(Signal::SIGKILL).ok();
        running.init.wait_gone(POWER_OFF)?;
        if let Some(parent) = &mut running.parent {
            parent.wait()?;
        }
        fs::remove_file(self.dir.join("machine.json")).ok();
        for name in self.services()?.keys() {
            fs::remove_file(self.service_path(name)).ok();
        }
        Ok(())
    }

    /// True while it is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.running().as_ref().is_some_and(|running| running.init.is_alive())
    }

    /// The number of its first process, as the host sees it.
    ///
    /// # Errors
    /// It is off.
    pub fn pid(&self) -> Result<i32> {
        match &*self.running() {
            Some(running) if running.init.is_alive() => Ok(running.init.pid),
            _ => bail!("{} is off", self.name),
        }
    }

    /// A command to be run in it.
    ///
    /// # Errors
    /// It is off.
    pub fn command(&self, argv: &[&str]) -> Result<Exec> {
        Ok(Exec::new(&self.name, self.spaces()?, argv, &self.env))
    }

    /// Runs a command in it and returns how it went, well or badly.
    ///
    /// # Errors
    /// It is off, or there is no such command.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.command(argv)?.output()
    }

    /// Runs a command in it that has to succeed and returns what it printed.
    ///
    /// # Errors
    /// The machine is off or the command failed.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.command(argv)?.run()
    }

    /// A file in it, as a path that this process can open.
    ///
    /// # Errors
    /// It is off.
    pub fn path(&self, path: &str) -> Result<PathBuf> {
        Ok(PathBuf::from(format!("/proc/{}/root{path}", self.pid()?)))
    }

    /// All its namespaces.
    ///
    /// # Errors
    /// It is off.
    pub fn spaces(&self) -> Result<Spaces> {
        Spaces::of_process(self.pid()?)
    }

    /// Its network namespace alone.
    ///
    /// # Errors
    /// It is off.
    pub fn network(&self) -> Result<Spaces> {
        Spaces::of_network(Path::new(&format!("/proc/{}/ns/net", self.pid()?)))
    }

    /// Starts a long-running process, which the machine's first process adopts. It logs to
    /// `/var/log/NAME.log`.
    ///
    /// # Errors
    /// It runs already, or has ended already: the error shows how, and its log.
    pub fn start_service(&self, name: &str, argv: &[&str], env: &[(&str, &str)]) -> Result<Process> {
        ensure!(self.service(name).is_none(), "{name} runs on {} already", self.name);
        let script = format!("setsid \"$@\" >>/var/log/{name}.log 2>&1 </dev/null & echo $!");
        // By env(1), not for the shell too: a library of LD_PRELOAD is the service's alone. What libfaketime shares with
        // the processes that it finds itself in goes with the shell, and whoever has just opened it dies of SIGBUS.
        let env: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let env = std::iter::once("env").filter(|_| !env.is_empty()).chain(env.iter().map(String::as_str));
        let argv: Vec<&str> = ["sh", "-c", &script, "sh"].into_iter().chain(env).chain(argv.iter().copied()).collect();
        let inner_pid: i32 = self.run(&argv)?.trim().parse()?;
        let process = self.adopted(inner_pid).with_context(|| {
            format!("{name} ended at once on {} ({}):\n{}", self.name, self.how_ended(inner_pid), self.log_tail(name))
        })?;
        let service = Service { process, inner_pid };
        fs::write(self.service_path(name), serde_json::to_string(&service)?)?;
        Ok(service.process)
    }

    /// The child of the first process that has this number inside the machine.
    fn adopted(&self, inner_pid: i32) -> Result<Process> {
        let init = self.pid()?;
        let inner_pid = inner_pid.to_string();
        let is_it = |pid: &&str| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:")).unwrap_or_default();
            numbers.split_whitespace().last() == Some(inner_pid.as_str())
        };
        let pid = loop {
            // Asked for first: the list leaves out children while others end (proc(5)).
            let lives = Path::new(&format!("/proc/{init}/root/proc/{inner_pid}")).exists();
            let children = fs::read_to_string(format!("/proc/{init}/task/{init}/children"))?;
            if let Some(pid) = children.split_whitespace().find(is_it) {
                break pid.to_owned();
            }
            ensure!(lives, "no such process");
            std::thread::yield_now();
        };
        Process::with_pid(pid.parse()?)
    }

    /// A process started by [`Machine::start_service`], while it lives.
    #[must_use]
    pub fn service(&self, name: &str) -> Option<Process> {
        self.started(name).map(|service| service.process).filter(Process::is_alive)
    }

    /// The same, or an error that says how it ended.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn running_service(&self, name: &str) -> Result<Process> {
        let Some(Service { process, inner_pid }) = self.started(name) else {
            bail!("{name} does not run on {}", self.name);
        };
        ensure!(
            process.is_alive(),
            "{name} has ended on {} ({}):\n{}",
            self.name,
            self.how_ended(inner_pid),
            self.log_tail(name)
        );
        Ok(process)
    }

    fn started(&self, name: &str) -> Option<Service> {
        serde_json::from_slice(&fs::read(self.service_path(name)).ok()?).ok()
    }

    /// The exit status or the signal of a process that has ended, by its number inside the machine.
    fn how_ended(&self, inner_pid: i32) -> String {
        let number = inner_pid.to_string();
        // The first process writes it down when it has reaped it.
        let noted = wait_until("it is reaped", Duration::from_secs(5), || {
            let ended = fs::read_to_string(self.dir.join(ENDED))?;
            let of_it =
                |line: &str| line.split_once(' ').filter(|(pid, _)| *pid == number).map(|(_, how)| how.to_owned());
            ended.lines().filter_map(of_it).next_back().context("not yet")
        });
        noted.unwrap_or_else(|_| "nobody saw how".into())
    }

    /// All long-running processes by name, those that have ended as `None`.
    ///
    /// # Errors
    /// The machine's folder can't be read.
    pub fn services(&self) -> Result<BTreeMap<String, Option<Process>>> {
        let mut services = BTreeMap::new();
        for entry in fs::read_dir(&self.dir)? {
            let file = entry?.file_name();
            if let Some(name) = file.to_str().and_then(|file| file.strip_suffix(".service")) {
                services.insert(name.to_owned(), self.service(name));
            }
        }
        Ok(services)
    }

    /// Sends a signal to a long-running process: SIGSTOP freezes it, SIGCONT lets it go on.
    ///
    /// # Errors
    /// It doesn't run.
    pub fn signal(&self, name: &str, signal: Signal) -> Result<()> {
        self.running_service(name)?.signal(signal)
    }

    /// Sends a signal that ends a long-running process and waits for that end.
    ///
    /// # Errors
    /// It doesn't run, or doesn't end: the error shows its log.
    pub fn end(&self, name: &str, signal: Signal) -> Result<()> {
        let process = self.running_service(name)?;
        process.signal(signal)?;
        process
            .wait_gone(DISK)
            .with_context(|| format!("{name} does not end on {}:\n{}", self.name, self.log_tail(name)))?;
        Ok(fs::remove_file(self.service_path(name))?)
    }

    /// Where a long-running process logs to.
    #[must_use]
    pub fn log_path(&self, name: &str) -> PathBuf {
        self.dir.join("var-log").join(format!("{name}.log"))
    }

    /// The whole log of a long-running process.
    #[must_use]
    pub fn log(&self, name: &str) -> String {
        fs::read_to_string(self.log_path(name)).unwrap_or_default()
    }

    /// The last lines of a log and where the rest is, for an error message.
    #[must_use]
    pub fn log_tail(&self, name: &str) -> String {
        let log = self.log(name);
        let lines: Vec<&str> = log.lines().collect();
        let tail = &lines[lines.len().saturating_sub(20)..];
        format!("--- the end of {}\n{}", self.log_path(name).display(), tail.join("\n"))
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn service_path(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.service"))
    }

    fn running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.lifetime == Lifetime::OfTheTest {
            self.power_off().ok();
        }
    }
}

fn append(path: &Path) -> Result<File> {
    Ok(OpenOptions::new().create(true).append(true).open(path)?)
}
