//! The cgroup of a node's containers. Nodes have the cgroups of the host, where runtimes leave empty folders.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::node::Node;

/// A cgroup of the host's that no other node uses, removed at the end.
#[derive(Debug)]
pub(super) struct Cgroup(String);

impl Cgroup {
    /// A name for one; runtimes make it.
    pub(super) fn of(node: &Node) -> Result<Self> {
        Ok(Self(format!("/fabric-lab-{}", node.pid()?)))
    }

    /// Its path below each controller.
    pub(super) fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let root = Path::new("/sys/fs/cgroup");
        let controllers = fs::read_dir(root).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        for folder in controllers.chain([root.to_owned()]) {
            // Not every controller has one; one with a process in it stays.
            let _ = fs::remove_dir(folder.join(&self.0[1..]));
        }
    }
}
