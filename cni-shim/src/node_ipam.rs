//! One IPAM state for the node's subnet, whatever CNI networks there are.
//!
//! ```text
//! <dataDir>/fabric/   what host-local and fabric-bridge are told to use, for every network that fabric-cni serves
//! <dataDir>/cbr0/     of flannel, of a release before, or of another plugin: respected, and freed with its pod
//! ```
//!
//! host-local keeps the addresses of each network apart, by its name, while the subnet is the node's: two networks would
//! give two pods one address. So the delegate is told one name ([`IPAM_NETWORK`]) and, of other networks, a container ID
//! with the network's name in it ([`AttachmentId::told`]). What other folders hold of the node's subnet is left out of the
//! ranges that the delegate may choose from.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use fabric_core::attachments::IPAM_NETWORK;
use fabric_core::model::{Family, Subnet, from_bits, to_bits};
use serde_json::{Map, Value, json};

use crate::error::{CniError, Code};
use crate::host_local::{DATA_DIR, IpamState};
use crate::spec::{AttachmentId, Identifier};
use crate::state::{Attachments, list};

/// The folders of host-local's files, and those of the attachments.
#[derive(Debug)]
pub struct NodeIpam<'a> {
    data_dir: PathBuf,
    state_dir: &'a Path,
    /// The node's subnets, as far as they are known.
    subnets: Vec<Subnet>,
}

impl<'a> NodeIpam<'a> {
    /// That of a rendered configuration. Without a node its range is nobody's, so no other folder's address is in it.
    #[must_use]
    pub fn of(config: &Map<String, Value>, state_dir: &'a Path) -> Self {
        let data_dir = config.get("ipam").and_then(|ipam| ipam["dataDir"].as_str());
        let ranges = config.get("ipam").and_then(|ipam| ipam["ranges"].as_array()).into_iter().flatten();
        let subnets = ranges.filter_map(|set| set[0]["subnet"].as_str()?.parse().ok()).collect();
        Self { data_dir: data_dir.unwrap_or(DATA_DIR).into(), state_dir, subnets }
    }

    /// Refuses another folder than the daemon's: it would be a second IPAM state for one subnet.
    ///
    /// # Errors
    /// Code 7.
    pub fn refuse_another_than(&self, daemons: Option<&Path>) -> Result<(), CniError> {
        let same =
            |a: &Path, b: &Path| a == b || fs::canonicalize(a).is_ok_and(|a| fs::canonicalize(b).is_ok_and(|b| a == b));
        let Some(daemons) = daemons.filter(|daemons| !same(daemons, &self.data_dir)) else { return Ok(()) };
        let msg = format!(
            "dataDir is {}, but the addresses of this node's subnet are kept in {}, and two folders would give one \
             address twice; take dataDir out of the network configuration, or start fabricd with --cni-data-dir {}",
            self.data_dir.display(),
            daemons.display(),
            self.data_dir.display(),
        );
        Err(CniError::new(Code::InvalidConfig, msg))
    }

    /// The folders besides the shared one, by name.
    fn others(&self) -> Result<Vec<Identifier>, CniError> {
        let names = list(&self.data_dir)?.into_iter().filter(|name| name != IPAM_NETWORK);
        let folders = names.filter(|name| self.data_dir.join(name).is_dir());
        Ok(folders.filter_map(|name| name.try_into().ok()).collect())
    }

    /// The addresses of the node's subnets that are taken in other folders.
    fn taken_elsewhere(&self) -> Result<BTreeSet<IpAddr>, CniError> {
        let mut taken = BTreeSet::new();
        for folder in self.others()? {
            let names = list(&self.data_dir.join(folder.as_str()))?;
            taken.extend(names.iter().filter_map(|name| name.parse().ok()).filter(|ip| self.has(*ip)));
        }
        Ok(taken)
    }

    fn has(&self, ip: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| subnet.contains(ip))
    }

    /// `config` for ADD: its ranges without what other folders hold.
    ///
    /// # Errors
    /// Code 11 when nothing is left of a range; 5 when a folder can't be read.
    pub fn without_taken(&self, config: &Map<String, Value>) -> Result<Map<String, Value>, CniError> {
        let taken = self.taken_elsewhere()?;
        let mut config = config.clone();
        if taken.is_empty() {
            return Ok(config);
        }
        let ranges = self.subnets.iter().map(|subnet| {
            let free = free_ranges(*subnet, taken.iter().copied().filter(|ip| subnet.contains(*ip)));
            (!free.is_empty()).then_some(Value::Array(free)).ok_or_else(|| {
                let folders = self.others().unwrap_or_default();
                let folders = folders.iter().map(|name| self.data_dir.join(name.as_str()).display().to_string());
                let msg = format!(
                    "no address of {subnet} is free, {} are taken in {}; delete pods, or give the node a larger subnet",
                    taken.len(),
                    folders.collect::<Vec<_>>().join(", ")
                );
                CniError::new(Code::TryAgainLater, msg)
            })
        });
        let ranges = ranges.collect::<Result<Vec<Value>, _>>()?;
        if let Some(ipam) = config.get_mut("ipam").and_then(Value::as_object_mut) {
            ipam.insert("ranges".into(), ranges.into());
        }
        Ok(config)
    }

    /// Frees the addresses of `network` that are in none of its attachments and not in `valid`.
    ///
    /// # Errors
    /// Code 5 when a folder can't be read or written.
    pub fn free_all_but(&self, network: &Identifier, valid: &BTreeSet<AttachmentId>) -> Result<(), CniError> {
        let mut folders = vec![shared()];
        folders.extend((network.as_str() != IPAM_NETWORK).then(|| network.clone()));
        for folder in folders {
            let Some(ipam) = self.open(&folder)? else { continue };
            let saved = self.saved_of(network)?;
            let doomed = |_, holder: Option<&AttachmentId>| {
                let Some(holder) = holder else { return true };
                let (owner, id) = owner(&folder, holder);
                owner == *network && !saved.contains(&id) && !valid.contains(&id)
            };
            ipam.release_where(doomed).map_err(|e| self.failed(&folder, &e))?;
        }
        Ok(())
    }

    /// Frees the addresses that no attachment accounts for: those of `network` and, as far as they are of the node's
    /// subnets, those in other folders. Asks `no_pod_is_lost` with the folder locked: an ADD saves its attachment before
    /// it takes an address. Returns how many.
    ///
    /// # Errors
    /// Code 5 when a folder can't be read or written; those of `no_pod_is_lost`.
    pub fn free_orphans(
        &self,
        network: &Identifier,
        no_pod_is_lost: impl Fn() -> Result<bool, CniError>,
    ) -> Result<usize, CniError> {
        let mut freed = 0;
        for folder in [shared()].into_iter().chain(self.others()?) {
            let Some(ipam) = self.open(&folder)? else { continue };
            if !no_pod_is_lost()? {
                return Ok(freed);
            }
            let of_the_folder = self.saved_of(&folder)?;
            let of_the_network = self.saved_of(network)?;
            let doomed = |ip: IpAddr, holder: Option<&AttachmentId>| {
                let known = folder == *network || folder.as_str() == IPAM_NETWORK;
                let Some(holder) = holder else { return known || self.has(ip) };
                match owner(&folder, holder) {
                    (owner, id) if owner == *network => !of_the_network.contains(&id),
                    (_, id) => !known && self.has(ip) && !of_the_folder.contains(&id),
                }
            };
            freed += ipam.release_where(doomed).map_err(|e| self.failed(&folder, &e))?.len();
        }
        Ok(freed)
    }

    /// Frees what a pod of an earlier plugin holds in other folders, unless an attachment there accounts for it.
    ///
    /// # Errors
    /// Code 5 when a folder can't be read or written.
    pub fn free_elsewhere(&self, id: &AttachmentId) -> Result<(), CniError> {
        for folder in self.others()? {
            if Attachments::of(self.state_dir, &folder).exists(id) {
                continue;
            }
            let Some(ipam) = self.open(&folder)? else { continue };
            let its = |ip: IpAddr, holder: Option<&AttachmentId>| holder == Some(id) && self.has(ip);
            ipam.release_where(its).map_err(|e| self.failed(&folder, &e))?;
        }
        Ok(())
    }

    /// Whether there is a folder of `network`'s own, of before all networks shared one.
    #[must_use]
    pub fn has_folder_of(&self, network: &Identifier) -> bool {
        network.as_str() != IPAM_NETWORK && self.data_dir.join(network.as_str()).is_dir()
    }

    /// All owners in the shared folder but `network`'s, as the delegate knows them.
    ///
    /// # Errors
    /// Code 5 when it can't be read.
    pub fn told_of_others(&self, network: &Identifier) -> Result<BTreeSet<AttachmentId>, CniError> {
        let Some(ipam) = self.open(&shared())? else { return Ok(BTreeSet::new()) };
        let entries = ipam.entries().map_err(|e| self.failed(&shared(), &e))?;
        Ok(entries.into_iter().filter_map(|(_, holder)| holder).filter(|told| told.meant().0 != *network).collect())
    }

    fn saved_of(&self, network: &Identifier) -> Result<BTreeSet<AttachmentId>, CniError> {
        Ok(Attachments::of(self.state_dir, network).all()?.into_iter().collect())
    }

    fn open(&self, folder: &Identifier) -> Result<Option<IpamState>, CniError> {
        IpamState::existing(&self.data_dir, folder).map_err(|e| self.failed(folder, &e))
    }

    fn failed(&self, folder: &Identifier, e: &std::io::Error) -> CniError {
        let folder = self.data_dir.join(folder.as_str());
        CniError::new(Code::Io, format!("cannot sweep the addresses in {}: {e}", folder.display()))
    }
}

/// The folder of all networks.
fn shared() -> Identifier {
    IPAM_NETWORK.to_owned().try_into().expect("a network's name")
}

/// Whose an address in `folder` is.
fn owner(folder: &Identifier, holder: &AttachmentId) -> (Identifier, AttachmentId) {
    if folder.as_str() == IPAM_NETWORK { holder.meant() } else { (folder.clone(), holder.clone()) }
}

/// What is left of a subnet for pods without `taken`: a range for each gap. The second address is the gateway's.
fn free_ranges(subnet: Subnet, taken: impl Iterator<Item = IpAddr>) -> Vec<Value> {
    let family = subnet.family();
    let mut next = to_bits(subnet.base()) + 2;
    // IPv4's last address is the broadcast address.
    let end = to_bits(subnet.last()) + u128::from(family == Family::V6);
    let mut ranges = Vec::new();
    let mut taken: Vec<u128> = taken.map(to_bits).filter(|ip| (next..end).contains(ip)).collect();
    taken.sort_unstable();
    for until in taken.into_iter().chain([end]) {
        if next < until {
            let (first, last) = (from_bits(family, next), from_bits(family, until - 1));
            ranges.push(json!({ "subnet": subnet, "rangeStart": first, "rangeEnd": last }));
        }
        next = until + 1;
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_left_out_of_the_ranges_of_both_families() {
        let text = |subnet: &str, taken: &[&str]| -> Vec<String> {
            let taken = taken.iter().map(|ip| ip.parse().expect("valid"));
            let ranges = free_ranges(subnet.parse().expect("valid"), taken);
            let ends =
                |range: &Value| ["rangeStart", "rangeEnd"].map(|key| range[key].as_str().expect("text").to_owned());
            ranges.iter().map(|range| ends(range).join(" to ")).collect()
        };
        assert_eq!(text("192.0.2.0/29", &["192.0.2.4"]), ["192.0.2.2 to 192.0.2.3", "192.0.2.5 to 192.0.2.6"]);
        assert_eq!(text("192.0.2.0/29", &["192.0.2.6", "192.0.2.2"]), ["192.0.2.3 to 192.0.2.5"]);
        assert_eq!(text("192.0.2.0/29", &["192.0.2.1", "192.0.2.7"]), ["192.0.2.2 to 192.0.2.6"]);
        assert_eq!(text("192.0.2.0/30", &["192.0.2.2"]), [""; 0]);
        assert_eq!(
            text("2001:db8::/64", &["2001:db8::3"]),
            ["2001:db8::2 to 2001:db8::2", "2001:db8::4 to 2001:db8::ffff:ffff:ffff:ffff"]
        );
    }
}
