//! The certificates by which the daemons of a lab ask each other: an authority for the lab, by `fabricd pki ca`, and one
//! certificate for each node, by `fabricd pki node`. With them `fabricctl … --all` works on every node.

use std::ffi::OsString;
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, anyhow};
use fabricd::pki::Pki;

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
    pki(["ca".into(), "--out".into(), ca.clone().into()])?;
    pki(["node".into(), "--ca".into(), ca.into(), "--name".into(), name.into(), "--out".into(), out.into()])
}

fn pki<const N: usize>(args: [OsString; N]) -> Result<()> {
    let line = ["fabricd", "pki"].map(OsString::from).into_iter().chain(args);
    let pki = Pki::asked(line).context("the words for it")?;
    // It brings a runtime of its own, which a test may have already.
    thread::spawn(|| pki.run()).join().map_err(|_| anyhow!("fabricd pki has panicked"))?
}
