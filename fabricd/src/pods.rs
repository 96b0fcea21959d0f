//! Which addresses the pods of this node have: one file for each, called like it, in a folder for each network. That is
//! how the `host-local` plugin remembers what it gave away.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use fabric_core::record::LeaseKey;
use tracing::warn;

/// The folder of `host-local`.
#[derive(Clone, Debug)]
pub struct PodAddresses {
    dir: PathBuf,
}

impl PodAddresses {
    /// Those below `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// How many pods have addresses in these subnets. What can't be read counts as one: to take a subnet away from
    /// pods by mistake is worse than to wait for a person.
    #[must_use]
    pub fn in_subnets(&self, key: &LeaseKey) -> usize {
        match self.read() {
            Ok(addresses) => {
                addresses.iter().filter(|ip| key.subnets().values().any(|subnet| subnet.contains(**ip))).count()
            }
            Err(error) => {
                warn!(dir = %self.dir.display(), %error, "cannot tell which addresses pods have");
                1
            }
        }
    }

    fn read(&self) -> io::Result<Vec<IpAddr>> {
        let mut addresses = vec![];
        for network in entries(&self.dir)?.into_iter().filter(|path| path.is_dir()) {
            let names = entries(&network)?.into_iter();
            addresses.extend(names.filter_map(|file| file.file_name()?.to_str()?.parse::<IpAddr>().ok()));
        }
        Ok(addresses)
    }
}

/// What is in a folder; nothing is in one that is missing.
fn entries(dir: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![]),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_counted_by_subnet_and_other_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("fabric"), dir.path().join("other"));
        for file in
            [one.join("10.244.3.7"), one.join("fd00:3::7"), one.join("last_reserved_ip.0"), two.join("10.244.4.1")]
        {
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, "container\n").unwrap();
        }
        fs::write(dir.path().join("10.244.3.9"), "").unwrap();
        let pods = PodAddresses::new(dir.path());
        let count = |key: &str| pods.in_subnets(&LeaseKey::decode(key).unwrap());
        assert_eq!(count("10.244.3.0-24"), 1);
        assert_eq!(count("10.244.3.0-24&fd00:3::-64"), 2);
        assert_eq!(count("10.244.5.0-24"), 0);
        assert_eq!(PodAddresses::new(Path::new("/nowhere")).in_subnets(&LeaseKey::decode("10.244.3.0-24").unwrap()), 0);
    }
}
