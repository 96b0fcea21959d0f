//! Where the binaries of this build are: `lab`, `fabricd`, `fabricctl` and `fabric-cni`.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The folder of the binaries under test, which every node finds first on its PATH: that of this build,
/// or what `FABRIC_BIN_DIR` names (another version, a release build).
///
/// # Errors
/// This build has no `lab`.
pub fn folder() -> Result<PathBuf> {
    env::var_os("FABRIC_BIN_DIR").map_or_else(of_this_build, |folder| Ok(folder.into()))
}

/// The Lab's own program.
///
/// # Errors
/// It isn't built.
pub fn lab() -> Result<PathBuf> {
    Ok(of_this_build()?.join("lab"))
}

/// The folder of all labs: `lab` in cargo's target folder, or what `FABRIC_LAB_DIR` names.
///
/// # Errors
/// The binaries aren't built.
pub fn labs() -> Result<PathBuf> {
    match env::var_os("FABRIC_LAB_DIR") {
        Some(folder) => Ok(folder.into()),
        None => Ok(of_this_build()?.parent().unwrap_or(Path::new("/")).join("lab")),
    }
}

/// The folder of this program, or the one above for a test (`target/debug/deps/…`).
fn of_this_build() -> Result<PathBuf> {
    let program = env::current_exe()?;
    let folder = program.parent().context("a program outside of any folder")?;
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    ensure!(folder.join("lab").is_file(), "no `lab` in {}; `cargo build --workspace` makes it", folder.display());
    Ok(folder.to_owned())
}
