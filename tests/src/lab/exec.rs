//! Commands inside a machine or a pod, run to their end.

use std::fmt;
use std::io::{BufRead as _, BufReader, Read as _, Seek, SeekFrom, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::spaces::Spaces;

/// Where every machine finds the binaries of this build.
pub const BIN: &str = "/run/lab/bin";

/// The exit code of `timeout`(1) when the time was up.
const TIMED_OUT: i32 = 124;

/// A command on its way into a machine. Its environment is empty but for what a shell needs and the
/// machine's own settings: nothing of the caller's (a proxy, a log level) leaks in.
#[derive(Debug)]
pub struct Exec {
    place: String,
    spaces: Spaces,
    argv: Vec<String>,
    env: Vec<(String, String)>,
    stdin: Vec<u8>,
    limit: Duration,
}

impl Exec {
    /// A command for the machine or pod called `place`.
    pub(super) fn new(place: &str, spaces: Spaces, argv: &[&str], env: &[(String, String)]) -> Self {
        let argv = argv.iter().map(ToString::to_string).collect();
        Self { place: place.to_owned(), spaces, argv, env: env.to_vec(), stdin: vec![], limit: Duration::from_secs(60) }
    }

    /// With one more variable in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With this on its standard input; it is empty otherwise.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Killed after this time; after a minute otherwise.
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs it and returns how it went, well or badly.
    ///
    /// # Errors
    /// It could not be started.
    pub fn output(self) -> Result<Output> {
        // A file, not a pipe: a program that never reads its input must not block us.
        let mut stdin = tempfile::tempfile()?;
        stdin.write_all(&self.stdin)?;
        stdin.seek(SeekFrom::Start(0))?;
        let mut command = Command::new("timeout");
        command.arg("--kill-after=1").arg(self.limit.as_secs_f64().to_string()).args(&self.argv);
        self.dress(&mut command).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.spaces.run(|| command.spawn().with_context(|| format!("cannot run {self}")))?;
        let output = child.wait_with_output()?;
        Ok(Output {
            what: match output.status.code() {
                Some(TIMED_OUT) => format!("{self} did not end within {:?}", self.limit),
                _ => format!("{self}: {}", output.status),
            },
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Runs it, expects success and returns what it printed.
    ///
    /// # Errors
    /// It could not be started or failed: the error shows all that it said.
    pub fn run(self) -> Result<String> {
        self.output()?.ok()
    }

    /// Runs it until it prints a line that is the one, and kills it (SIGKILL) so much later. Returns how it went: it may have
    /// ended by itself before.
    ///
    /// # Errors
    /// It could not be started.
    pub fn kill_after_line(self, is_it: impl Fn(&str) -> bool, delay: Duration) -> Result<Output> {
        let (program, args) = self.argv.split_first().context("no command given")?;
        let mut command = Command::new(program);
        let stderr = tempfile::tempfile()?;
        self.dress(&mut command).args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(stderr.try_clone()?);
        let mut child = self.spaces.run(|| command.spawn().with_context(|| format!("cannot run {self}")))?;
        let mut lines = BufReader::new(child.stdout.take().context("a pipe")?);
        let mut stdout = String::new();
        loop {
            let begun = stdout.len();
            if lines.read_line(&mut stdout)? == 0 {
                break;
            }
            if is_it(stdout[begun..].trim_end()) {
                // Into the middle of what it does.
                std::thread::sleep(delay);
                child.kill()?;
                break;
            }
        }
        let status = child.wait()?;
        lines.read_to_string(&mut stdout)?;
        let mut said = String::new();
        (&stderr).seek(SeekFrom::Start(0))?;
        (&stderr).read_to_string(&mut said)?;
        Ok(Output { what: format!("{self}: {status}"), status, stdout, stderr: said })
    }

    /// Runs it on the terminal of the caller, for `lab exec` and `lab shell`.
    ///
    /// # Errors
    /// It could not be started.
    pub fn interactive(self) -> Result<ExitStatus> {
        let (program, args) = self.argv.split_first().context("no command given")?;
        let mut command = Command::new(program);
        self.dress(&mut command).args(args);
        let mut child = self.spaces.run(|| command.spawn().with_context(|| format!("cannot run {self}")))?;
        Ok(child.wait()?)
    }

    fn dress<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let term = std::env::var("TERM").unwrap_or_else(|_| "dumb".into());
        command.env_clear().envs([("HOME", "/root"), ("LANG", "C.UTF-8"), ("TERM", &term)]);
        command.env("PATH", format!("{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
        command.envs(self.env.iter().map(|(name, value)| (name, value)))
    }
}

impl fmt::Display for Exec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` in {}", self.argv.join(" "), self.place)
    }
}

/// How a command went.
#[derive(Clone, Debug)]
pub struct Output {
    what: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
}

impl Output {
    /// True if it exited with 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.status.success()
    }

    /// What it printed, if it succeeded.
    ///
    /// # Errors
    /// It failed: the error shows all that it said.
    pub fn ok(self) -> Result<String> {
        if !self.success() {
            bail!("{}\n{}{}", self.what, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}
