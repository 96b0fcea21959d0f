//! Errors of the operating system in words: a number alone would leave the operator to guess.

use std::io;
use std::path::Path;

use nix::errno::Errno;

/// An error as `Operation not permitted (EPERM)`; one without a number in its own words.
#[must_use]
pub fn named(error: &io::Error) -> String {
    let (text, Some(number)) = (error.to_string(), error.raw_os_error()) else { return error.to_string() };
    let text = text.strip_suffix(&format!(" (os error {number})")).unwrap_or(&text);
    match Errno::from_raw(number) {
        Errno::UnknownErrno => text.to_owned(),
        errno => format!("{text} ({errno:?})"),
    }
}

/// What to do about a file that can't be written.
#[must_use]
pub fn unwritable(file: &Path, error: &io::Error) -> String {
    let folder = file.parent().unwrap_or(file).display();
    match error.raw_os_error().unwrap_or_default() {
        libc::ENOSPC | libc::EDQUOT => format!("the file system is full; see: df -h {folder}; df -i {folder}"),
        libc::EROFS => "it is mounted read-only; mount it writable, or choose another folder".to_owned(),
        libc::EACCES | libc::EPERM => format!("may fabricd write there? See: ls -ld {folder}"),
        libc::ENOENT | libc::ENOTDIR => format!("is its folder there? See: ls -ld {folder}"),
        libc::EIO => "the disk fails; see: dmesg | tail".to_owned(),
        _ => "see: dmesg | tail".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_names() {
        assert_eq!(named(&io::Error::from_raw_os_error(libc::EROFS)), "Read-only file system (EROFS)");
        assert_eq!(named(&io::Error::from_raw_os_error(41)), "Unknown error 41");
        assert_eq!(named(&io::Error::other("torn")), "torn");
        let advice = |number| unwritable(Path::new("/run/fabric/node.json"), &io::Error::from_raw_os_error(number));
        assert!(advice(libc::ENOSPC).contains("df -h /run/fabric"));
        assert!(advice(libc::ENOENT).ends_with("ls -ld /run/fabric"));
    }
}
