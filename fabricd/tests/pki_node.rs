//! `fabricd pki node --stay`, as the container beside the daemon runs it.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use self::common::{Stays, wait_until};

fn authority(dir: &Path) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fabricd"));
    assert!(command.args(["pki", "ca", "--out"]).arg(dir).status().expect("run").success());
}

#[test]
fn certificate_waits_for_the_authority_and_follows_it() {
    let dir = TempDir::new().expect("a folder");
    let (ca, out) = (dir.path().join("ca"), dir.path().join("out"));
    let stays =
        Stays::start(&["pki", "node", "--name", "node-1", "--stay"], &[("--ca", ca.clone()), ("--out", out.clone())]);
    authority(&ca);
    let certificate = out.join("node.crt");
    wait_until("a certificate of the authority that came later", || certificate.exists());
    let first = fs::read(&certificate).expect("there");

    fs::remove_dir_all(&ca).expect("removed");
    authority(&ca);
    let same = |a: &Path, b: &Path| fs::read(a).ok() == fs::read(b).ok();
    wait_until("a certificate of the next authority", || {
        fs::read(&certificate).is_ok_and(|now| now != first) && same(&ca.join("ca.crt"), &out.join("ca.crt"))
    });
    stays.terminate();
    assert!(certificate.exists());
}
