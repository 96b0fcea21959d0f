//! Where the binaries of this build are: `lab`, `fabricd`, `fabricctl` and `fabric-cni`.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The folder of the binaries: that of this program, or above it for a test (`target/debug/deps/…`).
/// `FABRIC_BIN_DIR` names another one.
///
/// # Errors
/// There is no `lab` in it.
pub fn folder() -> Result<PathBuf> {
    let folder = match env::var_os("FABRIC_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let program = env::current_exe()?;
            let folder = program.parent().context("a program outside of any folder")?;
            if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder }.to_owned()
        }
    };
    ensure!(folder.join("lab").is_file(), "no `lab` in {}; `cargo build --workspace` makes it", folder.display());
    Ok(folder)
}

/// The Lab's own program.
///
/// # Errors
/// It isn't built.
pub fn lab() -> Result<PathBuf> {
    Ok(folder()?.join("lab"))
}

/// The folder of all labs: `lab` in cargo's target folder, or what `FABRIC_LAB_DIR` names.
///
/// # Errors
/// The binaries aren't built.
pub fn labs() -> Result<PathBuf> {
    match env::var_os("FABRIC_LAB_DIR") {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => Ok(folder()?.parent().unwrap_or(Path::new("/")).join("lab")),
    }
}
