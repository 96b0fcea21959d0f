//! Kernel settings: files below `/proc/sys/net`, which shows those of the network namespace of the thread that looks.

use std::path::{Path, PathBuf};
use std::{fs, io};

use fabric_core::state::Sysctl;

/// `sysctl net.…`: the value, `None` when the kernel has no such setting (IPv6 turned off, the device gone).
pub(super) fn read(root: &Path, sysctl: &Sysctl) -> io::Result<Option<u32>> {
    match fs::read_to_string(file(root, sysctl)) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// `sysctl -w net.…=value`. An error comes with the way out of it.
pub(super) fn write(root: &Path, sysctl: &Sysctl, value: u32) -> Result<(), (io::Error, String)> {
    let file = file(root, sysctl);
    fs::write(&file, value.to_string()).map_err(|error| {
        let advice = match error.raw_os_error() {
            Some(libc::EACCES | libc::EROFS | libc::EPERM) => {
                format!("; mount {} writable, or set it on the host", root.display())
            }
            Some(libc::ENOENT) => "; is IPv6 turned off on this host, or the device gone?".to_owned(),
            _ => String::new(),
        };
        (error, format!("{}{advice}", file.display()))
    })
}

/// Whether the kernel tracks connections in this namespace: as soon as it does, those to the store and to the API are among
/// them, so the count is not zero.
pub(super) fn tracks_connections(root: &Path) -> bool {
    let count = fs::read_to_string(root.join("netfilter/nf_conntrack_count"));
    count.is_ok_and(|count| count.trim().parse().is_ok_and(|count: u64| count > 0))
}

fn file(root: &Path, sysctl: &Sysctl) -> PathBuf {
    root.join(sysctl.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setting_is_written_and_read_back_and_a_missing_one_is_no_error() {
        let root = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(read(root.path(), &Sysctl::Ipv4Forward).expect("readable"), None);
        let (_, words) = write(root.path(), &Sysctl::Ipv6Forward, 1).expect_err("no such directory");
        assert!(
            words.ends_with("ipv6/conf/all/forwarding; is IPv6 turned off on this host, or the device gone?"),
            "{words}"
        );
        fs::create_dir(root.path().join("ipv4")).expect("created");
        write(root.path(), &Sysctl::Ipv4Forward, 1).expect("written");
        assert_eq!(read(root.path(), &Sysctl::Ipv4Forward).expect("readable"), Some(1));
    }

    #[test]
    fn connections_are_tracked_where_there_are_some() {
        let root = tempfile::tempdir().expect("a temporary directory");
        assert!(!tracks_connections(root.path()), "the kernel knows no such thing");
        fs::create_dir(root.path().join("netfilter")).expect("created");
        for (count, tracked) in [("0\n", false), ("3\n", true)] {
            fs::write(root.path().join("netfilter/nf_conntrack_count"), count).expect("written");
            assert_eq!(tracks_connections(root.path()), tracked);
        }
    }
}
