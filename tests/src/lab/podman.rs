//! A container by podman with its CNI backend, as it stands in Debian: no daemon, and podman itself calls the plugins.
//!
//! Its files are where podman expects them, in the node's own `/etc` and `/var/lib`.

use std::fs;
use std::sync::Arc;

use anyhow::{Context, Result};

use super::cgroup::Cgroup;
use super::containerd::{ROOT, make_busybox_root};
use super::node::Node;
use super::pod::Pod;

const CONTAINERS_CONF: &str = r#"
[network]
network_backend = "cni"
cni_plugin_dirs = ["/opt/cni/bin"]
network_config_dir = "/etc/cni/net.d"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
"#;

const STORAGE_CONF: &str = r#"
[storage]
driver = "vfs"
graphroot = "/var/lib/containers/storage"
runroot = "/run/containers/storage"
"#;

/// The podman of a node.
#[derive(Debug)]
pub struct Podman {
    node: Arc<Node>,
    cgroup: Cgroup,
}

impl Podman {
    /// Makes its settings and a root file system for containers.
    ///
    /// # Errors
    /// It isn't installed, or doesn't see the node's network.
    pub fn set_up(node: &Arc<Node>) -> Result<Self> {
        let folder = node.path("/etc/containers")?;
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("containers.conf"), CONTAINERS_CONF)?;
        fs::write(folder.join("storage.conf"), STORAGE_CONF)?;
        fs::write(folder.join("policy.json"), r#"{"default": [{"type": "insecureAcceptAnything"}]}"#)?;
        make_busybox_root(&node.path(ROOT)?)?;
        let networks = node.run(&["podman", "network", "ls", "--noheading", "--format", "{{.Name}}"])?;
        networks.lines().find(|name| *name == "fabric").context("podman sees no network fabric")?;
        Ok(Self { node: Arc::clone(node), cgroup: Cgroup::of(node)? })
    }

    /// Runs a container on the network that does nothing but live.
    ///
    /// # Errors
    /// podman refuses.
    pub fn run(&self, name: &str) -> Result<Pod> {
        let mut argv = vec!["podman", "run", "--detach", "--name", name, "--network", "fabric"];
        argv.extend(["--cgroups", "no-conmon", "--cgroup-parent", self.cgroup.name()]);
        argv.extend(["--security-opt", "seccomp=unconfined", "--rootfs", ROOT, "/bin/sleep", "1000000"]);
        self.node.run(&argv)?;
        let pid = self.node.run(&["podman", "inspect", "--format", "{{.State.Pid}}", name])?;
        self.node.adopt_pod(name, &format!("/proc/{}/ns/net", pid.trim()))
    }

    /// Kills and removes a container; podman cleans up, the network included.
    ///
    /// # Errors
    /// There is no such container, or podman fails.
    pub fn kill(&self, pod: Pod) -> Result<()> {
        self.node.run(&["podman", "rm", "--force", "--time", "0", pod.name()])?;
        pod.forget()
    }
}
