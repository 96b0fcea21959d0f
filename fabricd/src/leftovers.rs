//! What the CNI plugins leave on a node when the last pod is gone: a bridge, and folders with books about addresses. They
//! can't know that no other pod will come; `--cleanup` does.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fabric_core::handoff::{NODE_FILE, NodeFile};

use crate::kernel::bridge::{Bridge, remove_unless_used};

/// The network's name in the conflist, hence of its folders.
const NETWORK: &str = "fabric";

/// Where `fabric-cni` remembers attachments, unless its conflist says otherwise.
const ATTACHMENTS: &str = "/var/lib/cni/fabric";

/// What may be left on this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    gateways: Vec<IpAddr>,
    folders: Vec<PathBuf>,
}

impl Leftovers {
    /// Those of the node that `node.json` describes. Without that file no bridge is known for ours.
    #[must_use]
    pub fn of_node(run_dir: &Path, cni_data_dir: &Path) -> Self {
        let node = fs::read(run_dir.join(NODE_FILE)).ok().and_then(|json| NodeFile::decode(&json).ok());
        let subnets = node.map(|node| node.subnets()).unwrap_or_default();
        let gateways = subnets.values().map(|subnet| subnet.subnet.gateway()).collect();
        Self { gateways, folders: vec![cni_data_dir.join(NETWORK), ATTACHMENTS.into()] }
    }

    /// Removes them, unless a pod still has a cable, and says what became of them.
    ///
    /// # Errors
    /// When the kernel refuses, or a folder can't be removed.
    pub async fn remove(&self) -> anyhow::Result<String> {
        let bridge = remove_unless_used(&self.gateways).await.context("cannot remove the pods' bridge")?;
        let told = match bridge {
            Bridge::InUse { name, ports } => {
                return Ok(format!(
                    "{name} stays: {ports} pods are plugged in; when they are gone: ip link delete {name}\n"
                ));
            }
            Bridge::Removed { name } => format!("ip link delete {name}\n"),
            Bridge::Absent => String::new(),
        };
        for folder in &self.folders {
            match fs::remove_dir_all(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", folder.display()));
                }
                _ => {}
            }
        }
        Ok(told)
    }
}
