//! Files that a reader sees whole, the old one or the new one, after a power failure too.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::errors::errno;

/// How the name of a file begins that is being written.
const DRAFT: &str = ".fabric-";

/// A file could not be written or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {}: {}", .file.display(), errno::named(error), errno::unwritable(file, error))]
pub struct FileError {
    /// The file.
    pub file: PathBuf,
    /// Why. The text above says it, so it is no `source` that would be told behind it again.
    pub error: io::Error,
}

/// Removes a file that may be missing.
///
/// # Errors
/// When it is there and stays.
pub fn remove_if_there(file: &Path) -> Result<(), FileError> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError { file: file.into(), error }),
        _ => Ok(()),
    }
}

/// Puts `content` in the place of `file`, so that a reader sees the old one or the new one, whole, and so does the next
/// boot. A file that has this content already is left alone.
///
/// # Errors
/// [`FileError`]; the old file is then still there.
pub(crate) fn replace(file: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let write = || {
        if fs::read(file).is_ok_and(|now| now == content) {
            return Ok(());
        }
        let dir = file.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(dir)?;
        let mut fresh =
            tempfile::Builder::new().prefix(DRAFT).permissions(fs::Permissions::from_mode(mode)).tempfile_in(dir)?;
        fresh.write_all(content)?;
        fresh.as_file().sync_all()?;
        fresh.persist(file).map_err(|e| e.error)?;
        fs::File::open(dir)?.sync_all()
    };
    write().map_err(|error| FileError { file: file.into(), error })
}

/// Removes what [`replace`] leaves in a folder when it is killed; files that are younger may be somebody's at work.
///
/// # Errors
/// [`FileError`], with the file. That there is no such folder is fine.
pub(crate) fn sweep_drafts(dir: &Path, age: Duration) -> Result<(), FileError> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok().map(|since| since >= age);
        if entry.file_name().to_string_lossy().starts_with(DRAFT) && is_old() == Some(true) {
            remove_if_there(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_of_one_that_was_killed_go_and_those_of_one_that_writes_stay() {
        let dir = tempfile::tempdir().unwrap();
        for file in [".fabric-a1", "10-fabric.conflist"] {
            fs::write(dir.path().join(file), "half").unwrap();
        }
        let left = || fs::read_dir(dir.path()).unwrap().count();
        sweep_drafts(dir.path(), Duration::from_secs(3600)).unwrap();
        assert_eq!(left(), 2);
        sweep_drafts(dir.path(), Duration::ZERO).unwrap();
        sweep_drafts(&dir.path().join("none"), Duration::ZERO).unwrap();
        assert!(left() == 1 && dir.path().join("10-fabric.conflist").exists());
    }
}
