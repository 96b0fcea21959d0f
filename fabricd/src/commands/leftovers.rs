//! What the CNI plugins leave on a node when the last pod is gone: bridges, host-local's files and saved attachments. They
//! can't know that no other pod will come; `--cleanup` does.
//!
//! It may be run any number of times and in any state, so nothing is concluded from a file that is missing: `node.json`
//! goes first. As long as any pod is attached, by its port or by its namespace, everything stays.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use fabric_core::attachments::IPAM_NETWORK;
use fabric_core::handoff::{NODE_FILE, NodeFile};
use fabric_core::model::{IfName, Subnet};

use crate::config::Config;
use crate::host::addresses::{self, Addresses, CniDirs};
use crate::kernel::links::HostLinks;
use crate::kernel::routing::bridge::remove_unused;

/// What may be left on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftovers {
    dirs: CniDirs,
    /// The node's subnets, as far as `node.json` is still there.
    subnets: Vec<Subnet>,
}

impl Leftovers {
    /// Those of this node. To be asked before `node.json` is removed.
    #[must_use]
    pub fn of_node(config: &Config) -> Self {
        let node = fs::read(config.run_dir.join(NODE_FILE)).ok().and_then(|json| NodeFile::decode(&json).ok());
        let subnets = node.map(|node| node.subnets()).unwrap_or_default();
        Self { dirs: config.cni_dirs(), subnets: subnets.values().map(|ours| ours.subnet).collect() }
    }

    /// Removes them, unless a pod is attached, and says what became of them.
    ///
    /// # Errors
    /// When the kernel can't be asked or refuses, or a file can't be read or removed.
    pub async fn remove(&self) -> anyhow::Result<String> {
        let links = HostLinks::ask().context("cannot look for pods")?;
        let told = || format!("cannot read {} and {}", self.dirs.addresses.display(), self.dirs.attachments.display());
        let found = Addresses::read(&self.dirs, &links, &self.subnets).with_context(told)?;
        let bridges = self.bridges(&links).with_context(told)?;
        let ports = bridges.union(&found.bridges).filter_map(|bridge| links.ports.get(bridge)).map(BTreeSet::len).sum();
        if let Some(pods) = Some(found.pods.len().max(ports)).filter(|pods| *pods > 0) {
            let bridges = bridges.union(&found.bridges).map(ToString::to_string).collect::<Vec<_>>().join(" ");
            return Ok(format!(
                "{bridges} and the CNI plugins' files stay: {pods} pods are attached; when they are gone: fabricd --cleanup\n"
            ));
        }
        let removed = remove_unused(&bridges).await.context("cannot remove the pods' bridge")?;
        self.remove_files().context("cannot remove the CNI plugins' files")?;
        Ok(removed.iter().map(|name| format!("ip link delete {name}\n")).collect())
    }

    /// The bridges that are surely the pods': an attachment names them, or they have the gateway's address of a subnet of
    /// this node's, be it one that host-local has last given an address of.
    fn bridges(&self, links: &HostLinks) -> io::Result<BTreeSet<IfName>> {
        let saved = addresses::attachments(&self.dirs.attachments)?;
        let last = self.last_given();
        let is_gateway = |(ip, prefix): &(IpAddr, Subnet)| {
            let served = self.subnets.contains(prefix) || last.iter().any(|last| prefix.contains(*last));
            *ip == prefix.gateway() && served
        };
        let with_gateway = links.addresses.iter().filter(|(_, has)| has.iter().any(is_gateway)).map(|(name, _)| *name);
        Ok(saved.values().filter_map(|saved| saved.bridge).chain(with_gateway).collect())
    }

    /// Where host-local's search goes on, by its files for this node.
    fn last_given(&self) -> Vec<IpAddr> {
        let files = fs::read_dir(self.dirs.addresses.join(IPAM_NETWORK)).into_iter().flatten().flatten();
        let cursors = files.filter(|file| file.file_name().to_str().is_some_and(|name| name.starts_with(CURSOR)));
        cursors.filter_map(|file| fs::read_to_string(file.path()).ok()?.trim().parse().ok()).collect()
    }

    /// Removes what the plugins wrote, and the folders that are then empty: each may have been set to one of other files.
    fn remove_files(&self) -> io::Result<()> {
        let is_attachment = |name: &str| name.contains('@') && (name.starts_with('.') || name.ends_with(".json"));
        let mut networks = vec![];
        for folder in subfolders(&self.dirs.attachments)? {
            remove_in(&folder, |name| is_attachment(name) || folder.ends_with(VERSIONS))?;
            networks.extend(folder.file_name().map(|name| self.dirs.addresses.join(name)));
        }
        remove_empty(&self.dirs.attachments)?;
        networks.push(self.dirs.addresses.join(IPAM_NETWORK));
        let is_host_locals = |name: &str| {
            name.parse::<IpAddr>().is_ok() || name.starts_with(CURSOR) || ["lock", ".draft"].contains(&name)
        };
        networks.iter().try_for_each(|folder| remove_in(folder, is_host_locals))
    }
}

/// How the names of the files begin in which host-local says where its search goes on.
const CURSOR: &str = "last_reserved_ip.";

/// The folder in which `fabric-cni` remembers which versions other plugins speak.
const VERSIONS: &str = ".versions";

/// Removes the files whose names are picked, and the folder if that was all.
fn remove_in(folder: &Path, picked: impl Fn(&str) -> bool) -> io::Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() && entry.file_name().to_str().is_some_and(&picked) {
            fs::remove_file(entry.path())?;
        }
    }
    remove_empty(folder)
}

fn remove_empty(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty].contains(&error.kind()) => Ok(()),
        // Mounted, as in a container.
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        outcome => outcome,
    }
}

fn subfolders(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
        entries => entries?,
    };
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_dir()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_plugins_wrote_goes_and_what_others_keep_in_the_same_folders_stays() {
        let dir = tempfile::tempdir().expect("a folder");
        let ours = [
            "state/fabric/c1@eth0.json",
            "state/fabric/.c1@eth0.17",
            "state/net2/c2@eth0.json",
            "state/.versions/bridge.json",
            "networks/fabric/10.244.3.7",
            "networks/fabric/fd00::7",
            "networks/fabric/last_reserved_ip.0",
            "networks/fabric/lock",
            "networks/net2/10.244.3.8",
        ];
        let others = ["state/README", "state/results/cbr0-c1-eth0", "networks/other/192.0.2.7", "networks/net2/notes"];
        for file in ours.iter().chain(&others) {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, "").expect("written");
        }
        let path = |name: &str| dir.path().join(name);
        let leftovers =
            Leftovers { dirs: CniDirs { addresses: path("networks"), attachments: path("state") }, subnets: vec![] };
        for _ in 0..2 {
            leftovers.remove_files().expect("removed");
            assert_eq!(ours.iter().filter(|file| path(file).exists()).count(), 0);
            assert_eq!(others.iter().filter(|file| path(file).exists()).count(), others.len());
        }
        assert!(!path("networks/fabric").exists() && !path("state/fabric").exists() && path("state").exists());
    }
}
