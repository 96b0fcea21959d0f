//! Which addresses of this node are taken, and by whom: host-local's files, held against the attachments that `fabric-cni`
//! has saved and against the links of the host.
//!
//! ```text
//!   <cni-data-dir>/<network>/<address>  ─┐
//!   <cni-state-dir>/<network>/*.json    ─┼─▶  Addresses: attached │ leaked │ foreign,  and the pods that are attached
//!   links, ports of bridges (netlink)   ─┘
//! ```
//!
//! | an address is | when                                                                                            |
//! |---------------|-------------------------------------------------------------------------------------------------|
//! | attached      | an attachment is saved for it whose port is there or whose network namespace lives (its path counts in the boot that it is of); or none is, and there are ports on the pods' bridges that no attachment names: one of those may be its pod |
//! | leaked        | nothing accounts for it: its pod is gone                                                         |
//! | foreign       | another plugin's: of a network that isn't ours, outside of our subnets, or on a bridge of its own |
//!
//! Nothing is remembered: each [`Addresses::read`] is a look of its own, some files a pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fabric_core::attachments::{DEFAULT_BRIDGE, IPAM_NETWORK, Owner, SavedAttachment};
use fabric_core::handoff::BOOT_ID;
use fabric_core::model::{Family, IfName, Subnet};
use fabric_core::record::LeaseKey;
use tracing::warn;

use crate::kernel::KernelError;
use crate::kernel::links::HostLinks;

/// The largest attachment that is read, in bytes: the plugin's own limit.
const MAX_FILE: u64 = 2 << 20;

/// Where the CNI plugins keep what they know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CniDirs {
    /// host-local's folder (`--cni-data-dir`): `/var/lib/cni/networks`.
    pub addresses: PathBuf,
    /// The attachments that `fabric-cni` has saved (`--cni-state-dir`): `/var/lib/cni/fabric`.
    pub attachments: PathBuf,
}

/// An address that is taken, by host-local's file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The address.
    pub ip: IpAddr,
    /// The file: removed, the address is free.
    pub file: PathBuf,
    /// Whose it is; `None` when the file is empty or cut.
    pub owner: Option<Owner>,
}

impl Entry {
    /// The CNI network: the owner's, else the folder.
    #[must_use]
    pub fn network(&self) -> &str {
        self.owner.as_ref().map_or_else(|| folder_of(&self.file), |owner| &owner.network)
    }
}

/// A pod that is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Network, container and interface.
    pub owner: Owner,
    /// What is saved of it.
    pub saved: SavedAttachment,
}

/// All addresses of this node's pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Taken by pods that are attached, as far as can be told.
    pub attached: Vec<Entry>,
    /// Taken, and nothing accounts for them.
    pub leaked: Vec<Entry>,
    /// Another plugin's.
    pub foreign: Vec<Entry>,
    /// The pods whose attachment is saved and that are there.
    pub pods: Vec<Pod>,
    /// The bridges that pods are attached to.
    pub bridges: BTreeSet<IfName>,
    /// Ports of these that no attachment names.
    pub unknown_ports: BTreeSet<IfName>,
    /// The prefixes of these bridges' addresses, as long as they have ports.
    bridge_subnets: BTreeSet<Subnet>,
    /// The boot ID of this machine, if it can be read.
    boot: Option<String>,
}

impl Addresses {
    /// Reads all of it. `ours` are the subnets that this node has, as far as they are known: an address in the folder of
    /// a network that `fabric-cni` knows nothing of is another plugin's unless it is in one of them, or in a bridge's.
    ///
    /// # Errors
    /// When a folder can't be read. One that is missing is empty.
    pub fn read(dirs: &CniDirs, links: &HostLinks, ours: &[Subnet]) -> io::Result<Self> {
        let saved = attachments(&dirs.attachments)?;
        let bridges = bridges_of(saved.values());
        let named: BTreeSet<&str> = saved
            .values()
            .filter_map(|one| one.attached.as_ref())
            .flat_map(|a| a.ports.iter().map(String::as_str))
            .collect();
        let ports = || bridges.iter().filter_map(|bridge| links.ports.get(bridge)).flatten().copied();
        let unknown_ports: BTreeSet<IfName> = ports().filter(|port| !named.contains(port.as_str())).collect();
        let with_ports = bridges.iter().filter(|bridge| links.ports.get(bridge).is_some_and(|ports| !ports.is_empty()));
        let bridge_subnets: BTreeSet<Subnet> = with_ports.flat_map(|bridge| subnets_of(links, bridge)).collect();

        let boot = fs::read_to_string(BOOT_ID).ok().map(|boot| boot.trim().to_owned());
        let mut found = Self { bridges, unknown_ports, bridge_subnets, boot, ..Self::default() };
        let networks: BTreeSet<&str> = saved.keys().map(|owner| owner.network.as_str()).collect();
        let known: Vec<Subnet> = found.bridge_subnets.iter().copied().chain(ours.iter().copied()).collect();
        let elsewhere = links.addresses.iter().filter(|(name, _)| !found.bridges.contains(name));
        let elsewhere: Vec<IpAddr> = elsewhere.flat_map(|(_, all)| all).map(|(ip, _)| *ip).collect();
        // A subnet's first address is the VTEP's, ours or flannel's.
        let is_elsewhere = |s: &Subnet| elsewhere.iter().any(|ip| s.contains(*ip) && *ip != s.base());
        for entry in entries(&dirs.addresses)? {
            let folder = folder_of(&entry.file);
            let of_ours = folder == IPAM_NETWORK || networks.contains(folder);
            let mut within = known.iter().filter(|subnet| subnet.contains(entry.ip)).peekable();
            let inside = within.peek().is_some();
            let kind = match entry.owner.as_ref().and_then(|owner| saved.get(owner)) {
                Some(saved) if found.lives(saved, links) => &mut found.attached,
                Some(_) => &mut found.leaked,
                None if !of_ours && !inside => &mut found.foreign,
                None if !found.unknown_ports.is_empty() => &mut found.attached,
                None if !of_ours && within.any(is_elsewhere) => &mut found.foreign,
                None => &mut found.leaked,
            };
            kind.push(entry);
        }
        let living = saved.into_iter().filter(|(_, saved)| found.lives(saved, links));
        found.pods = living.map(|(owner, saved)| Pod { owner, saved }).collect();
        Ok(found)
    }

    /// True unless the pod of which this is saved is surely gone.
    fn lives(&self, saved: &SavedAttachment, links: &HostLinks) -> bool {
        let outlived = saved.attached.as_ref().is_some_and(|one| one.outlived_namespace(self.boot.as_deref()));
        let namespace = saved.netns.as_deref().filter(|_| !outlived).map_or(Some(false), namespace_lives);
        match (&saved.attached, namespace) {
            (_, Some(true)) => true,
            (Some(attached), _) if attached.ports.iter().any(|port| links.has(port)) => true,
            // macvlan and its like have no end on the host.
            (Some(attached), None) => attached.ports.is_empty(),
            (Some(_), Some(false)) => false,
            // An ADD that is at work, or was cut off.
            (None, _) => !self.unknown_ports.is_empty(),
        }
    }

    /// The addresses that pods have: those taken by attached pods, and those that attached pods were given.
    pub fn pod_ips(&self) -> impl Iterator<Item = IpAddr> {
        let given = self.pods.iter().flat_map(|pod| pod.saved.ips().iter().copied());
        given.chain(self.attached.iter().map(|entry| entry.ip))
    }

    /// The subnets that attached pods use: by what their attachments say, and by the addresses of bridges with ports.
    #[must_use]
    pub fn pod_subnets(&self) -> BTreeSet<Subnet> {
        let told = self.pods.iter().filter(|pod| !pod.saved.ips().is_empty()).flat_map(|pod| {
            let has = |subnet: &&Subnet| pod.saved.ips().iter().any(|ip| subnet.contains(*ip));
            pod.saved.subnets.iter().filter(has).copied()
        });
        told.chain(self.bridge_subnets.iter().copied()).collect()
    }

    /// How many attached pods have an address in these subnets.
    #[must_use]
    pub fn attached_in(&self, key: &LeaseKey) -> usize {
        let within = |ip: &IpAddr| key.subnets().values().any(|subnet| subnet.contains(*ip));
        let saved = self.pods.iter().filter(|pod| pod.saved.ips().iter().any(within)).map(|pod| &pod.owner);
        let taken = self.attached.iter().filter(|entry| within(&entry.ip));
        let owners: BTreeSet<&Owner> = saved.chain(taken.clone().filter_map(|entry| entry.owner.as_ref())).collect();
        owners.len() + taken.filter(|entry| entry.owner.is_none()).count()
    }

    /// How many leaked addresses are in these subnets.
    #[must_use]
    pub fn leaked_in(&self, key: &LeaseKey) -> usize {
        let within = |ip: &IpAddr| key.subnets().values().any(|subnet| subnet.contains(*ip));
        self.leaked.iter().filter(|entry| within(&entry.ip)).count()
    }

    /// The pod that has an address, by its saved attachment.
    #[must_use]
    pub fn pod_with(&self, ip: IpAddr) -> Option<&Pod> {
        self.pods.iter().find(|pod| pod.saved.ips().contains(&ip))
    }

    /// Addresses that more than one attached pod was given, with the pods.
    #[must_use]
    pub fn duplicates(&self) -> BTreeMap<IpAddr, Vec<&Owner>> {
        let mut owners: BTreeMap<IpAddr, Vec<&Owner>> = BTreeMap::new();
        for pod in &self.pods {
            pod.saved.ips().iter().for_each(|ip| owners.entry(*ip).or_default().push(&pod.owner));
        }
        owners.retain(|_, owners| owners.len() > 1);
        owners
    }

    /// Addresses that attached pods were given by host-local and that are free by its files: the next pod may get one.
    pub fn unreserved(&self) -> impl Iterator<Item = (IpAddr, &Owner)> {
        let taken: BTreeSet<IpAddr> = self.attached.iter().chain(&self.foreign).map(|entry| entry.ip).collect();
        let from_host_local = |pod: &Pod, ip: IpAddr| pod.saved.subnets.iter().any(|subnet| subnet.contains(ip));
        let given = self.pods.iter().flat_map(|pod| pod.saved.ips().iter().map(move |ip| (pod, *ip)));
        given
            .filter(move |(pod, ip)| from_host_local(pod, *ip) && !taken.contains(ip))
            .map(|(pod, ip)| (ip, &pod.owner))
    }
}

/// Where this node's pods are looked for: the plugins' folders, and the host's links.
#[derive(Clone, Debug)]
pub struct NodePods {
    dirs: CniDirs,
    links: fn() -> Result<HostLinks, KernelError>,
}

impl NodePods {
    /// Those of this host.
    #[must_use]
    pub fn new(dirs: CniDirs) -> Self {
        Self { dirs, links: HostLinks::ask }
    }

    /// Those of a host with these links, for tests.
    #[must_use]
    pub fn with_links(dirs: CniDirs, links: fn() -> Result<HostLinks, KernelError>) -> Self {
        Self { dirs, links }
    }

    /// All addresses; see [`Addresses::read`]. Reads files and asks the kernel, for some milliseconds.
    ///
    /// # Errors
    /// When a folder can't be read, or the kernel can't be asked.
    pub fn read(&self, ours: &[Subnet]) -> io::Result<Addresses> {
        Addresses::read(&self.dirs, &(self.links)().map_err(io::Error::other)?, ours)
    }

    /// How many attached pods have an address in these subnets, and how many addresses there are leaked. What can't be
    /// read counts as one pod: to take a subnet away from pods by mistake is worse than to wait for a person.
    #[must_use]
    pub fn in_subnets(&self, key: &LeaseKey) -> (usize, usize) {
        let subnets: Vec<Subnet> = key.subnets().values().copied().collect();
        match self.read(&subnets) {
            Ok(addresses) => (addresses.attached_in(key), addresses.leaked_in(key)),
            Err(error) => {
                warn!(dir = %self.dirs.addresses.display(), %error, "cannot tell which addresses pods have");
                (1, 0)
            }
        }
    }
}

/// Everything that `fabric-cni` has saved below `dir`, a folder for each network. A file that is just coming or going, or
/// is spoiled, tells what can be read of it.
///
/// # Errors
/// When a folder can't be read. One that is missing is empty.
pub fn attachments(dir: &Path) -> io::Result<BTreeMap<Owner, SavedAttachment>> {
    let mut all = BTreeMap::new();
    for network in files(dir)?.into_iter().filter(|path| path.is_dir()) {
        for file in files(&network)? {
            let Some(owner) = Owner::of_attachment(&file) else { continue };
            let small = fs::metadata(&file).is_ok_and(|meta| meta.is_file() && meta.len() <= MAX_FILE);
            let Ok(content) = (if small { fs::read(&file) } else { Ok(vec![]) }) else { continue };
            all.insert(owner, SavedAttachment::decode(&content));
        }
    }
    Ok(all)
}

/// The bridges that pods are attached to, by what is saved of them: `cni0` when nothing is.
pub fn bridges_of<'a>(saved: impl Iterator<Item = &'a SavedAttachment>) -> BTreeSet<IfName> {
    let mut bridges: BTreeSet<IfName> = saved.filter_map(|saved| saved.bridge).collect();
    if bridges.is_empty() {
        bridges.insert(DEFAULT_BRIDGE.parse().expect("a valid name"));
    }
    bridges
}

/// All addresses that are taken, in every network's folder.
pub(crate) fn entries(dir: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = vec![];
    for network in files(dir)?.into_iter().filter(|path| path.is_dir()) {
        for file in files(&network)? {
            let Some(ip) = file.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
            match fs::read_to_string(&file) {
                Ok(content) => entries.push(Entry { ip, owner: Owner::read(folder_of(&file), &content), file }),
                // Freed in this moment.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    entries.sort_by(|a, b| (a.ip, &a.file).cmp(&(b.ip, &b.file)));
    Ok(entries)
}

/// How full a subnet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// The subnet.
    pub subnet: Subnet,
    /// Addresses that are taken in it, whoever has them.
    pub used: u64,
    /// Addresses that are left for pods: VTEP, gateway and IPv4's broadcast address are nobody's. Saturates.
    pub free: u64,
}

/// How full each subnet of this node is, by host-local's folder alone.
///
/// # Errors
/// When it can't be read. One that is missing is empty.
pub fn uses(addresses: &Path, key: &LeaseKey) -> io::Result<Vec<Use>> {
    let taken: BTreeSet<IpAddr> = entries(addresses)?.iter().map(|entry| entry.ip).collect();
    let uses = key.subnets().values().map(|subnet| {
        let used = taken.iter().filter(|ip| subnet.contains(**ip)).count().try_into().unwrap_or(u64::MAX);
        let (bits, reserved) = match subnet.family() {
            Family::V4 => (32, 3),
            Family::V6 => (128, 2),
        };
        let all = 1_u64.checked_shl(bits - u32::from(subnet.prefix_len())).unwrap_or(u64::MAX);
        Use { subnet: *subnet, used, free: all.saturating_sub(reserved).saturating_sub(used) }
    });
    Ok(uses.collect())
}

fn folder_of(file: &Path) -> &str {
    file.parent().and_then(|folder| folder.file_name()?.to_str()).unwrap_or_default()
}

fn subnets_of<'a>(links: &'a HostLinks, link: &IfName) -> impl Iterator<Item = Subnet> + use<'a> {
    links.addresses.get(link).into_iter().flatten().map(|(_, prefix)| *prefix)
}

/// Whether there is a network namespace of another than this host at `path`; `None` where that can't be seen from here,
/// as in a container that doesn't mount the folder.
fn namespace_lives(path: &Path) -> Option<bool> {
    let ours = fs::metadata("/proc/self/ns/net").ok()?;
    match fs::metadata(path) {
        // Namespaces are files of one kernel-internal file system; a plain file is what a mount has left.
        Ok(there) => Some(there.dev() == ours.dev() && there.ino() != ours.ino()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => path.parent()?.is_dir().then_some(false),
        Err(_) => None,
    }
}

/// What is in a folder; nothing is in one that is missing.
fn files(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[path = "addresses_tests.rs"]
mod tests;
