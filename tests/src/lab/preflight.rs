//! What a lab needs of this machine: root, and a few tools. Told before anything is made.

use std::env;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::unistd::Uid;

/// Every tool with the Debian package that has it.
const TOOLS: [(&str, &str); 10] = [
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("ping", "iputils-ping"),
    ("unshare", "util-linux"),
    ("timeout", "coreutils"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("/usr/lib/cni/host-local", "containernetworking-plugins"),
    ("busybox", "busybox-static"),
];

/// Checks all.
///
/// # Errors
/// Names everything that is missing and how to get it.
pub fn check() -> Result<()> {
    ensure!(Uid::effective().is_root(), "a lab makes network namespaces: run this as root");
    let missing = missing(&TOOLS);
    ensure!(missing.is_empty(), "missing: {}; `make deps` installs what a lab needs", missing.join(", "));
    Ok(())
}

/// Those of these tools that are missing, with the Debian packages that have them.
pub(crate) fn missing(tools: &[(&str, &str)]) -> Vec<String> {
    let missing = tools.iter().filter(|(tool, _)| !exists(tool));
    missing.map(|(tool, package)| format!("{tool} (Debian package {package})")).collect()
}

fn exists(tool: &str) -> bool {
    let path = env::var("PATH").unwrap_or_default();
    // Joining an absolute path replaces the folder.
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|folder| Path::new(folder).join(tool).is_file())
}
