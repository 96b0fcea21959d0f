//! [`RealApi`]: a real kube-apiserver for tests, on a real etcd, both gone with the test.
//!
//! What a test does by hand goes through curl: a witness that shares no code with ours.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use crate::etcd::EtcdServer;
use crate::fake_api::NODES;
use crate::kubernetes::Nodes;
use crate::process::{Process, free_port};

/// How long it may take to start, on a busy machine.
const START: Duration = Duration::from_secs(120);

/// Who shows this may do everything.
const TOKEN: &str = "test";

/// A kube-apiserver with IPv4 and IPv6, and nothing else of Kubernetes.
pub struct RealApi {
    url: String,
    // Ends before its etcd and its folder do.
    process: Process,
    _etcd: EtcdServer,
    dir: TempDir,
}

impl RealApi {
    /// Starts the program on free ports of loopback and waits until it answers.
    ///
    /// # Errors
    /// When etcd or the program can't be started, or don't answer.
    pub async fn start(program: &Path) -> Result<Self> {
        let (etcd, dir, port) = (EtcdServer::start().await?, tempfile::tempdir()?, free_port()?.port());
        let file = |name: &str| dir.path().join(name);
        fs::write(file("tokens"), format!("{TOKEN},test,test,system:masters\n"))?;
        let key = Command::new("openssl").args(["genrsa", "-out"]).arg(file("key")).arg("2048").output()?;
        ensure!(key.status.success(), "openssl genrsa: {}", String::from_utf8_lossy(&key.stderr));
        let log = fs::File::create(file("log"))?;
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["--etcd-servers", etcd.endpoint(), "--bind-address", "127.0.0.1"])
            .args(["--secure-port", &port.to_string(), "--authorization-mode", "RBAC", "--cert-dir"])
            .arg(file("certificates"))
            .arg("--token-auth-file")
            .arg(file("tokens"))
            .args(["--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file"])
            .arg(file("key"))
            .arg("--service-account-signing-key-file")
            .arg(file("key"))
            .args(["--service-cluster-ip-range", "10.96.0.0/16,fd00:96::/112"])
            .args(dual_stack(minor_version(program)?))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let process = Process::spawn(command).with_context(|| format!("cannot start {}", program.display()))?;
        let api = Self { url: format!("https://127.0.0.1:{port}"), process, _etcd: etcd, dir };
        let deadline = Instant::now() + START;
        while let Err(error) = api.ask("GET", "/readyz", None) {
            if Instant::now() > deadline || api.process.has_ended() {
                let log = fs::read_to_string(api.dir.path().join("log")).unwrap_or_default();
                let tail = log.lines().rev().take(5).collect::<Vec<_>>().join("\n");
                bail!("{} does not answer: {error:#}\n{tail}", program.display());
            }
            sleep(Duration::from_millis(200)).await;
        }
        Ok(api)
    }

    /// One request, by curl, with a body and its kind.
    ///
    /// # Errors
    /// The code that refuses it, and why.
    pub fn ask(&self, verb: &str, path: &str, body: Option<(&str, &Value)>) -> Result<Value> {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--insecure", "--max-time", "10", "--write-out", "\n%{http_code}"])
            .args(["--header", &format!("Authorization: Bearer {TOKEN}"), "--request", verb])
            // For curl it would print nicely, and 1.20 built by a newer Go dies of that.
            .args(["--user-agent", "test"]);
        if let Some((kind, body)) = body {
            curl.args(["--header", &format!("Content-Type: application/{kind}"), "--data", &body.to_string()]);
        }
        let output = curl.arg(format!("{}{path}", self.url)).output().context("cannot run curl")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        let said = String::from_utf8(output.stdout)?;
        let (answer, code) = said.rsplit_once('\n').context("an answer without a code")?;
        ensure!(code.starts_with('2'), "{verb} {path}: {code} {answer}");
        Ok(serde_json::from_str(answer).unwrap_or_default())
    }
}

/// What a kube-apiserver 1.`minor` has to be told for two families: a feature gate, which later ones don't know any more.
fn dual_stack(minor: u32) -> &'static [&'static str] {
    if minor < 23 { &["--feature-gates", "IPv6DualStack=true"] } else { &[] }
}

/// The 20 of `Kubernetes v1.20.2`, which the program says of itself.
fn minor_version(program: &Path) -> Result<u32> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let minor = said.trim().strip_prefix("Kubernetes v1.").and_then(|rest| rest.split('.').next()?.parse().ok());
    minor.with_context(|| format!("{} --version says {:?}", program.display(), said.trim()))
}

impl Nodes for RealApi {
    fn kubeconfig(&self, dir: &Path) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": self.url, "insecure-skip-tls-verify": true}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "users": [{"name": "test", "user": {"token": TOKEN}}],
        });
        let file = dir.join("kubeconfig");
        fs::write(&file, config.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    fn nodes(&self) -> Vec<Value> {
        let list = self.ask("GET", NODES, None).expect("a list of Nodes");
        list["items"].as_array().cloned().unwrap_or_default()
    }

    fn add_node(&self, name: &str, subnets: &[&str]) {
        // The first of several is told twice.
        let spec = subnets.first().map_or_else(|| json!({}), |first| json!({"podCIDR": first, "podCIDRs": subnets}));
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec});
        self.ask("POST", NODES, Some(("json", &node))).expect("a Node that is new");
    }

    fn delete_node(&self, name: &str) {
        // That it isn't there is fine.
        let _ = self.ask("DELETE", &format!("{NODES}/{name}"), None);
    }

    fn change_node(&self, name: &str, patch: &Value) {
        let path = format!("{NODES}/{name}");
        self.ask("PATCH", &path, Some(("merge-patch+json", patch))).expect("a Node that can be changed");
    }
}
