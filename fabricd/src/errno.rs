//! Errors of the operating system in words: a number alone would leave the operator to guess.

use std::io;

use nix::errno::Errno;

/// An error as `Operation not permitted (EPERM)`; one without a number in its own words.
#[must_use]
pub fn named(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw) {
        None => error.to_string(),
        Some(Errno::UnknownErrno) => format!("error {}", error.raw_os_error().unwrap_or_default()),
        Some(errno) => format!("{} ({errno:?})", errno.desc()),
    }
}

/// What to do about a file or folder that can't be written.
#[must_use]
pub fn unwritable(error: &io::Error) -> &'static str {
    match error.raw_os_error().unwrap_or_default() {
        libc::ENOSPC | libc::EDQUOT => "the file system is full; see: df -h; df -i",
        libc::EROFS => "it is mounted read-only; mount it writable, or choose another folder",
        libc::EACCES | libc::EPERM => "may fabricd write there? See: ls -ld",
        libc::ENOENT | libc::ENOTDIR => "is its folder there? See: ls -ld",
        libc::EIO => "the disk fails; see: dmesg | tail",
        _ => "see: dmesg | tail",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_names() {
        assert_eq!(named(&io::Error::from_raw_os_error(libc::EROFS)), "Read-only file system (EROFS)");
        assert_eq!(named(&io::Error::from_raw_os_error(41)), "error 41");
        assert_eq!(named(&io::Error::other("torn")), "torn");
        assert!(unwritable(&io::Error::from_raw_os_error(libc::ENOSPC)).contains("df -h"));
    }
}
