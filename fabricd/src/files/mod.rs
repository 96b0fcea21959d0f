//! The files that this node hands to others: `node.json` for `fabric-cni`, `subnet.env` for whoever expects flannel's.

pub mod state_dir;

use std::fs;
use std::path::{Path, PathBuf};

use fabric_core::handoff::{NODE_FILE, NODE_FILE_VERSION, NodeFile, NotReady, Readiness};
use fabric_core::model::NodeName;

use crate::atomic_file::{FileError, remove_if_there, replace};

/// Where the files lie.
#[derive(Clone, Debug)]
pub struct Files {
    /// `node.json`.
    pub node: PathBuf,
    /// `subnet.env`.
    pub subnet: PathBuf,
    masquerade: bool,
    cni_data_dir: Option<PathBuf>,
}

impl Files {
    /// The files in `run_dir` and at `subnet`.
    #[must_use]
    pub fn new(run_dir: &Path, subnet: &Path) -> Self {
        Self { node: run_dir.join(NODE_FILE), subnet: subnet.into(), masquerade: false, cni_data_dir: None }
    }

    /// The same files, `subnet.env` saying whether this node masquerades.
    #[must_use]
    pub fn masquerading(self, masquerade: bool) -> Self {
        Self { masquerade, ..self }
    }

    /// The same files, `node.json` saying in which folder host-local's files are.
    #[must_use]
    pub fn with_addresses_in(self, cni_data_dir: &Path) -> Self {
        Self { cni_data_dir: Some(cni_data_dir.into()), ..self }
    }

    /// What `node.json` says now; `None` when there is none that can be read, as after a reboot.
    #[must_use]
    pub fn read(&self) -> Option<NodeFile> {
        NodeFile::decode(&fs::read(&self.node).ok()?).ok()
    }

    /// Brings both files up to date. What they say already is not written again.
    ///
    /// A daemon that is merely starting doesn't take back the word of the one before it: pods go on being added.
    ///
    /// # Errors
    /// [`FileError`], with the file; the other one may have been written.
    pub fn publish(&self, content: &NodeFile) -> Result<(), FileError> {
        let starting = matches!(content.readiness, Readiness::NotReady { code: NotReady::Starting, .. });
        if starting && self.read().is_some_and(|before| before.readiness == Readiness::Ready) {
            return Ok(());
        }
        // subnet.env first: when node.json says ready, both are there.
        if content.readiness == Readiness::Ready {
            replace(&self.subnet, content.subnet_env(self.masquerade).as_bytes(), 0o644)?;
        }
        let node = NodeFile { cni_data_dir: self.cni_data_dir.clone(), ..content.clone() };
        replace(&self.node, &node.encode(), 0o644)
    }

    /// Removes both files; that one is missing is no error.
    ///
    /// # Errors
    /// [`FileError`], with the file.
    pub fn remove(&self) -> Result<(), FileError> {
        [&self.node, &self.subnet].into_iter().try_for_each(|file| remove_if_there(file))
    }
}

/// The content of a `node.json` of a node that nothing is known of yet.
#[must_use]
pub fn unknown(node: NodeName) -> NodeFile {
    let readiness = Readiness::NotReady { code: NotReady::Starting, reason: "starting".into() };
    NodeFile {
        version: NODE_FILE_VERSION,
        node,
        readiness,
        ipv4: None,
        ipv6: None,
        mtu: 0,
        epoch: 0,
        ipv6_mtu: None,
        cni_data_dir: None,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use fabric_core::handoff::NodeSubnet;

    fn ready() -> NodeFile {
        let ipv4 = NodeSubnet { network: "10.244.0.0/16".parse().unwrap(), subnet: "10.244.3.0/24".parse().unwrap() };
        let node = "node-1".parse().unwrap();
        NodeFile {
            version: NODE_FILE_VERSION,
            node,
            readiness: Readiness::Ready,
            ipv4: Some(ipv4),
            ipv6: None,
            mtu: 1450,
            ipv6_mtu: None,
            epoch: 1,
            cni_data_dir: None,
        }
    }

    fn files(dir: &tempfile::TempDir) -> Files {
        Files::new(&dir.path().join("run"), &dir.path().join("flannel/subnet.env"))
    }

    #[test]
    fn ready_node_has_both_files_and_no_leftovers() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(&dir);
        files.publish(&ready()).unwrap();
        assert_eq!(files.read(), Some(ready()));
        assert!(fs::read_to_string(&files.subnet).unwrap().contains("FLANNEL_SUBNET=10.244.3.1/24"));
        assert_eq!(fs::read_dir(dir.path().join("run")).unwrap().count(), 1);
        assert_eq!(fs::metadata(&files.node).unwrap().permissions().mode() & 0o777, 0o644);
        files.remove().unwrap();
        files.remove().unwrap();
        assert!(!files.node.exists() && !files.subnet.exists());
    }

    #[test]
    fn starting_daemon_keeps_the_word_of_the_one_before_it_but_a_quarantine_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(&dir);
        let state = |code| NodeFile {
            readiness: Readiness::NotReady { code, reason: "why".into() },
            ..unknown("node-1".parse().unwrap())
        };
        files.publish(&state(NotReady::Starting)).unwrap();
        assert_eq!(files.read(), Some(state(NotReady::Starting)), "after a reboot it says why");
        files.publish(&ready()).unwrap();
        files.publish(&state(NotReady::Starting)).unwrap();
        assert_eq!(files.read(), Some(ready()));
        files.publish(&state(NotReady::Quarantine)).unwrap();
        assert_eq!(files.read(), Some(state(NotReady::Quarantine)));
    }

    #[test]
    fn same_content_is_not_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let files = files(&dir);
        files.publish(&ready()).unwrap();
        let inode = |file: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(file).unwrap());
        let before = (inode(&files.node), inode(&files.subnet));
        files.publish(&ready()).unwrap();
        assert_eq!((inode(&files.node), inode(&files.subnet)), before);
    }

    #[test]
    fn folder_that_cannot_be_written_is_named() {
        let files = Files::new(Path::new("/proc/nowhere"), Path::new("/proc/nowhere/subnet.env"));
        assert!(files.publish(&ready()).unwrap_err().to_string().starts_with("cannot write /proc/nowhere/subnet.env"));
    }
}
