//! A real etcd for tests: one process on loopback, its data in a temporary directory, gone with the test however the
//! test ends.
//!
//! What a test writes by hand goes through `etcdctl`: a witness that shares no code with ours.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::certificates::Certificates;
use crate::process::{Process, free_port};

/// How long etcd may take to start, on a busy machine.
const START: Duration = Duration::from_secs(30);

/// A single-member etcd. Its address stays the same through restarts.
pub struct EtcdServer {
    dir: TempDir,
    client: String,
    peer: String,
    tls: Option<Certificates>,
    /// More arguments of its command line.
    args: Vec<String>,
    /// Part of the cluster's identity: another number makes another cluster id.
    cluster: u32,
    process: Option<Process>,
}

impl EtcdServer {
    /// Starts one on free ports of loopback and waits until it answers.
    ///
    /// # Errors
    /// When `etcd` is not on the PATH, or doesn't answer.
    pub async fn start() -> anyhow::Result<Self> {
        Self::start_with(None, vec![]).await
    }

    /// Starts one with more arguments on its command line.
    ///
    /// # Errors
    /// As [`EtcdServer::start`].
    pub async fn start_with_args(args: &[&str]) -> anyhow::Result<Self> {
        Self::start_with(None, args.iter().map(ToString::to_string).collect()).await
    }

    /// Starts one that speaks TLS, and only to clients with a certificate.
    ///
    /// # Errors
    /// As [`EtcdServer::start`].
    pub async fn start_with_tls(certificates: Certificates) -> anyhow::Result<Self> {
        let ca = certificates.ca();
        let asks = ["--client-cert-auth", "--trusted-ca-file", &ca.to_string_lossy()].map(str::to_owned);
        Self::start_with(Some(certificates), asks.to_vec()).await
    }

    /// Starts one that speaks TLS, to any client.
    ///
    /// # Errors
    /// As [`EtcdServer::start`].
    pub async fn start_with_server_tls(certificates: Certificates) -> anyhow::Result<Self> {
        Self::start_with(Some(certificates), vec![]).await
    }

    async fn start_with(tls: Option<Certificates>, args: Vec<String>) -> anyhow::Result<Self> {
        let scheme = if tls.is_some() { "https" } else { "http" };
        let mut server = Self {
            dir: tempfile::tempdir().context("cannot make a directory for etcd's data")?,
            client: format!("{scheme}://{}", free_port()?),
            peer: format!("http://{}", free_port()?),
            tls,
            args,
            cluster: 1,
            process: None,
        };
        server.restart().await?;
        Ok(server)
    }

    /// The certificates of one that speaks TLS.
    #[must_use]
    pub fn certificates(&self) -> Option<&Certificates> {
        self.tls.as_ref()
    }

    /// The URL that clients use.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.client
    }

    /// The number of its process, while it runs.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        self.process.as_ref().filter(|process| !process.has_ended()).map(|process| process.pid.as_raw())
    }

    /// Kills it at once, as a power cut would. The data stays.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again on the data that it had, killing it first if it runs, and waits until it answers.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        self.launch()?;
        let deadline = Instant::now() + START;
        while let Err(error) = self.try_ctl(&["endpoint", "health"]).await {
            if Instant::now() > deadline || self.process.as_ref().is_none_or(Process::has_ended) {
                let log = self.log();
                let tail = log.lines().rev().take(5).collect::<Vec<_>>().join("\n");
                bail!("etcd does not answer at {}: {error:#}\n{tail}\nis Debian's etcd-server installed?", self.client);
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Starts it again on the data that it had, killing it first if it runs, and doesn't wait.
    ///
    /// # Errors
    /// When there is no `etcd`.
    pub fn launch(&mut self) -> anyhow::Result<()> {
        self.kill();
        let log = std::fs::File::options().create(true).append(true).open(self.log_path())?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "etcd", "--name", "test", "--data-dir"])
            .arg(self.dir.path().join("data"))
            .args(["--listen-client-urls", &self.client, "--advertise-client-urls", &self.client])
            .args(["--listen-peer-urls", &self.peer, "--initial-advertise-peer-urls", &self.peer])
            .args(["--initial-cluster", &format!("test={}", self.peer)])
            .args(["--initial-cluster-token", &format!("test-{}", self.cluster)])
            // The shortest lease follows from these: one second.
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(self.tls.iter().flat_map(server_tls))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.process = Some(Process::spawn(command).context("cannot start etcd through setpriv")?);
        Ok(())
    }

    /// Puts an empty one in its place, on the same address. With `new_identity` it is another cluster by its id, else
    /// only its low revisions tell.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub async fn replace(&mut self, new_identity: bool) -> anyhow::Result<()> {
        self.kill();
        std::fs::remove_dir_all(self.dir.path().join("data")).context("cannot remove etcd's data")?;
        self.cluster += u32::from(new_identity);
        self.restart().await
    }

    /// Stops it in its tracks: connections stay open, nothing answers.
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        if let Some(process) = &self.process {
            process.signal(signal);
        }
    }

    /// Runs `etcdctl` on it and gives what it prints.
    ///
    /// # Panics
    /// When it fails.
    pub async fn ctl(&self, args: &[&str]) -> String {
        self.try_ctl(args).await.unwrap_or_else(|error| panic!("etcdctl {}: {error:#}", args.join(" ")))
    }

    async fn try_ctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let output = tokio::process::Command::new("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.client, "--command-timeout", "5s"])
            .args(self.tls.iter().flat_map(client_tls))
            .args(args)
            .kill_on_drop(true)
            .output()
            .await
            .context("cannot run etcdctl; is Debian's etcd-client installed?")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.dir.path().join("etcd.log")
    }
}

fn server_tls(certificates: &Certificates) -> Vec<OsString> {
    let (certificate, key) = certificates.server();
    options([("--cert-file", certificate), ("--key-file", key)]).collect()
}

fn client_tls(certificates: &Certificates) -> Vec<OsString> {
    let (certificate, key) = certificates.client();
    options([("--cert", certificate), ("--key", key), ("--cacert", certificates.ca())]).collect()
}

fn options<const N: usize>(files: [(&'static str, PathBuf); N]) -> impl Iterator<Item = OsString> {
    files.into_iter().flat_map(|(option, file)| [option.into(), file.into()])
}
