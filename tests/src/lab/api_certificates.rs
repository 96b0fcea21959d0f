//! The certificates by which the daemons of a lab ask each other: an authority for the lab, by `fabricd pki ca`, and one
//! certificate for each node, by `fabricd pki node`. With them `fabricctl … --all` works on every node.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::binaries;

/// Where a node has its own, below `/var/lib`.
const FOLDER: &str = "fabric-api";

/// The environment of a daemon that uses them.
pub(super) fn environment() -> [(&'static str, String); 4] {
    let file = |name: &str| format!("/var/lib/{FOLDER}/{name}");
    [
        ("FABRICD_API_ADDR", "[::]:9473".to_owned()),
        ("FABRICD_API_CAFILE", file("ca.crt")),
        ("FABRICD_API_CERTFILE", file("node.crt")),
        ("FABRICD_API_KEYFILE", file("node.key")),
    ]
}

/// Makes what is missing for the node with this folder: the lab's authority is beside it.
pub(super) fn make(name: &str, node: &Path) -> Result<()> {
    let ca = node.parent().context("a node lies in its lab's folder")?.join("api-ca");
    let out = node.join("var-lib").join(FOLDER);
    let (ca, out) = (ca.as_os_str(), out.as_os_str());
    pki(&["ca".as_ref(), "--out".as_ref(), ca])?;
    pki(&["node".as_ref(), "--ca".as_ref(), ca, "--name".as_ref(), name.as_ref(), "--out".as_ref(), out])
}

/// Of this build, where that has a daemon, whichever version of it the nodes run; else of the nodes' programs, as in `make
/// bench`. What it says is of no interest unless it fails.
fn pki(args: &[&OsStr]) -> Result<()> {
    let of_this_build = binaries::lab()?.with_file_name("fabricd");
    let fabricd = if of_this_build.exists() { of_this_build } else { binaries::folder()?.join("fabricd") };
    let told = Command::new(fabricd).arg("pki").args(args).output().context("fabricd pki")?;
    ensure!(told.status.success(), "fabricd pki {args:?}: {}", String::from_utf8_lossy(&told.stderr));
    Ok(())
}
