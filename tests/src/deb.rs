//! The Debian package of this build, by the script that makes that of a release.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::lab::binaries;

/// Builds it into a file, of the programs of this build, with their version or another one.
///
/// # Errors
/// The programs aren't built, or dpkg-deb fails.
pub fn build(to: &Path, version: Option<&str>) -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/deb/build");
    let mut build = Command::new(&script);
    build.env("PROGRAMS", binaries::folder()?).env("OUT", to).env("DPKG_DEB_COMPRESSOR_TYPE", "none");
    build.envs(version.map(|version| ("VERSION", version)));
    let output = build.output().with_context(|| script.display().to_string())?;
    ensure!(output.status.success(), "no package: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
