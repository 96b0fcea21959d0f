//! Network namespaces and their settings (network_namespaces(7)).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The namespace at `path`, unless there surely is none: nothing is there, or a plain file that a mount has left.
/// Namespaces are files of one kernel-internal file system.
#[must_use]
pub fn namespace(path: &Path) -> Option<File> {
    let file = File::open(path).ok()?;
    match (file.metadata(), fs::metadata("/proc/self/ns/net")) {
        (Ok(there), Ok(ours)) if there.dev() != ours.dev() => None,
        _ => Some(file),
    }
}

/// Does `task` in another network namespace, with this thread, and comes back. A socket that was opened there stays
/// there.
///
/// # Errors
/// A namespace can't be entered, or the error of `task`.
pub fn inside<T>(netns: &File, task: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let home = File::open("/proc/thread-self/ns/net")?;
    move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
    let done = task();
    move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network))?;
    done
}

/// Sets a switch of the kernel in the network namespace of this thread, below `/proc/sys/net`, unless it is set so.
///
/// # Errors
/// What the system says.
pub fn sysctl(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    if fs::read_to_string(&path)?.trim() == value { Ok(()) } else { fs::write(path, value) }
}
