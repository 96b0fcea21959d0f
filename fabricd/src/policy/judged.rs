//! The folder `judged` beside `node.json`: a file for each attachment whose policies are in force, for which `fabric-cni`
//! waits. The folder itself says that policies are on.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use fabric_core::attachments::Owner;
use fabric_core::handoff::{JUDGED, judged_file};
use fabric_core::model::IfName;

/// The folder.
#[derive(Clone, Debug)]
pub struct Judged(PathBuf);

impl Judged {
    /// The one below this runtime directory.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self(run_dir.join(JUDGED))
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

    /// Says that the policies of these attachments are in force, and of no others.
    ///
    /// # Errors
    /// When a file can't be written or removed.
    pub fn are<'a>(&self, owners: impl IntoIterator<Item = &'a Owner>) -> io::Result<()> {
        self.turn_on()?;
        let file = |owner: &Owner| Some(judged_file(&owner.container, &owner.ifname.parse::<IfName>().ok()?));
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
    fn folder_has_a_file_for_each_attachment_that_is_judged_and_no_other() {
        let dir = tempfile::tempdir().expect("a folder");
        let judged = Judged::new(dir.path());
        let owner = |container: &str| Owner { network: "n".into(), container: container.into(), ifname: "eth0".into() };
        let files = || {
            let files = fs::read_dir(dir.path().join(JUDGED)).expect("a folder");
            files.map(|file| file.expect("a file").file_name().into_string().expect("text")).collect::<BTreeSet<_>>()
        };
        judged.are(&[owner("c1"), owner("c2")]).expect("written");
        assert_eq!(files(), ["c1@eth0", "c2@eth0"].map(str::to_owned).into());
        judged.are(&[owner("c2")]).expect("written");
        assert_eq!(files(), ["c2@eth0".to_owned()].into());
        judged.turn_off().expect("removed");
        judged.turn_off().expect("there is none");
        assert!(!dir.path().join(JUDGED).exists());
    }
}
