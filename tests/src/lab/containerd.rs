//! A container by a real runtime: a containerd on the node runs busybox and calls the CNI plugins itself.
//!
//! Everything is where containerd expects it (`/run/containerd`, `/var/lib/containerd`, `/etc/cni/net.d`,
//! `/opt/cni/bin`), only that the node is a namespace: `lab exec node-1 ctr task ls` works as it stands.
//! Containers are put in no cgroup, since the cgroups are those of the host.

use std::os::unix::fs::symlink;
use std::sync::Arc;
use std::time::Duration;
use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::node::Node;
use super::pod::Pod;
use super::wait_until;

/// The root file system that all containers of a node share, on the node.
pub(super) const ROOT: &str = "/var/lib/busybox";

/// How long containerd and its containers may take for anything.
const PATIENCE: Duration = Duration::from_secs(20);

/// The containerd of a node.
#[derive(Debug)]
pub struct Containerd {
    node: Arc<Node>,
}

impl Containerd {
    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// It isn't installed or doesn't start: the error shows its log.
    pub fn start(node: &Arc<Node>) -> Result<Self> {
        node.start_service("containerd", &["containerd"], &[])?;
        wait_until("containerd answers", PATIENCE, || node.run(&["ctr", "version"]))
            .map_err(|error| error.context(node.log_tail("containerd")))?;
        make_busybox_root(&node.path(ROOT)?)?;
        Ok(Self { node: Arc::clone(node) })
    }

    /// Runs a container with a network (`ctr run --cni`) that does nothing but live.
    ///
    /// # Errors
    /// It doesn't start: the error shows what `ctr` said.
    pub fn run(&self, name: &str) -> Result<Pod> {
        // Not detached: then it is ctr that calls CNI DEL when the container has ended.
        let argv = [
            "ctr",
            "run",
            "--rm",
            "--cni",
            "--null-io",
            "--cgroup",
            "",
            "--rootfs",
            ROOT,
            name,
            "/bin/sleep",
            "1000000",
        ];
        self.node.start_service(&service(name), &argv, &[])?;
        // ctr starts the process when the network is complete.
        wait_until("the container runs", PATIENCE, || {
            let tasks = self.node.run(&["ctr", "task", "ls"])?;
            let task = tasks
                .lines()
                .map(|line| line.split_whitespace().collect::<Vec<_>>())
                .find(|task| task.first() == Some(&name) && task.contains(&"RUNNING"));
            let pid = task.and_then(|task| task.get(1).map(ToString::to_string)).context("no such task that runs")?;
            let pod = self.node.adopt_pod(name, &format!("/proc/{pid}/ns/net"))?;
            pod.ips().first().context("no address yet")?;
            Ok(pod)
        })
        .map_err(|error| error.context(self.node.log_tail(&service(name))).context(self.node.log_tail("containerd")))
    }

    /// Kills a container and waits until its runtime has cleaned up, the network included.
    ///
    /// # Errors
    /// There is no such container, or it doesn't end.
    pub fn kill(&self, pod: Pod) -> Result<()> {
        let runs = self.node.service(&service(pod.name())).context("the container has ended before")?;
        self.node.run(&["ctr", "task", "kill", "--signal", "SIGKILL", pod.name()])?;
        runs.wait_gone(PATIENCE)?;
        pod.forget()
    }
}

fn service(container: &str) -> String {
    format!("ctr-{container}")
}

/// One static program under all its names.
pub(super) fn make_busybox_root(root: &Path) -> Result<()> {
    for folder in ["bin", "etc", "proc", "sys", "dev", "run", "tmp", "root"] {
        fs::create_dir_all(root.join(folder))?;
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).context("no busybox; `make deps` installs it")?;
    for name in ["sh", "sleep", "ping", "ip", "wget", "cat", "ls"] {
        let link = root.join("bin").join(name);
        fs::remove_file(&link).ok();
        symlink("busybox", link)?;
    }
    Ok(())
}
