//! Which policies are applied, for readers ([`Applied`]), and for `fabric-cni`, which waits for it: the folder
//! `policy-applied` beside `node.json`, with a file for each attachment whose policies are applied. The folder itself says
//! that policies are on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fabric_core::attachments::Owner;
use fabric_core::handoff::{POLICY_APPLIED, policy_file};
use fabric_core::model::IfName;
use fabric_core::policy::State;
use fabric_core::policy::chains::Origin;
use fabric_core::policy::plan::Isolation;
use fabric_core::state::nft::Name;

/// What the kernel holds of network policies, and from what it was made.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// All that decides.
    pub state: Arc<State>,
    /// Pods of this node by their addresses, those whose policies are applied, with the policies that select them.
    pub pods: BTreeMap<IpAddr, Isolation>,
    /// What the rules of their chains are made of.
    pub chains: BTreeMap<Name, Origin>,
}

/// The folder.
#[derive(Clone, Debug)]
pub struct AppliedPolicies(PathBuf);

impl AppliedPolicies {
    /// The one below this runtime directory.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self(run_dir.join(POLICY_APPLIED))
    }

    /// Says that policies are on.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn turn_on(&self) -> io::Result<()> {
        fs::create_dir_all(&self.0)
    }

    /// Says that they are off: nobody waits.
    ///
    /// # Errors
    /// When the folder can't be removed. That there is none is fine.
    pub fn turn_off(&self) -> io::Result<()> {
        match fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Says that the policies of these attachments are applied, and of no others.
    ///
    /// # Errors
    /// When a file can't be written or removed.
    pub fn are<'a>(&self, owners: impl IntoIterator<Item = &'a Owner>) -> io::Result<()> {
        self.turn_on()?;
        let file = |owner: &Owner| Some(policy_file(&owner.container, &owner.ifname.parse::<IfName>().ok()?));
        let wanted: BTreeSet<String> = owners.into_iter().filter_map(file).collect();
        let there =
            fs::read_dir(&self.0)?.map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()));
        let there: BTreeSet<String> = there.collect::<io::Result<_>>()?;
        for file in wanted.difference(&there) {
            fs::write(self.0.join(file), b"")?;
        }
        for file in there.difference(&wanted) {
            fs::remove_file(self.0.join(file))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folder_has_a_file_for_each_attachment_whose_policies_are_applied_and_no_other() {
        let dir = tempfile::tempdir().expect("a folder");
        let applied = AppliedPolicies::new(dir.path());
        let owner = |container: &str| Owner { network: "n".into(), container: container.into(), ifname: "eth0".into() };
        let files = || {
            let files = fs::read_dir(dir.path().join(POLICY_APPLIED)).expect("a folder");
            files.map(|file| file.expect("a file").file_name().into_string().expect("text")).collect::<BTreeSet<_>>()
        };
        applied.are(&[owner("c1"), owner("c2")]).expect("written");
        assert_eq!(files(), ["c1@eth0", "c2@eth0"].map(str::to_owned).into());
        applied.are(&[owner("c2")]).expect("written");
        assert_eq!(files(), ["c2@eth0".to_owned()].into());
        applied.turn_off().expect("removed");
        applied.turn_off().expect("there is none");
        assert!(!dir.path().join(POLICY_APPLIED).exists());
    }
}
