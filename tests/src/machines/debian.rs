//! A Debian with systemd on a machine, as Vagrant's users have it: `debian.sh` makes it once, a disk of the machine's own
//! keeps what changes, and a disk of supplies has what Vagrant brings along.
//!
//! ```text
//!   /      its disk: changes over ~/.cache/fabricd/machines/debian/root.img
//!   /media supplies: packages/, upgrade/, provision, busybox.tar
//!   eth0   10.0.2.15 and the default route by DHCP, the same on every machine: QEMU's NAT
//!   eth1   on the underlay, for an address of its own
//! ```
//!
//! What differs from Vagrant's `debian/bookworm64`: it is smaller, networkd manages eth0 instead of ifupdown, apt has the
//! packages from a repository in the image, and nobody comes in by ssh.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::kernels::{cache, script, tells};
use crate::deb;

/// The name of the image in `busybox.tar`: the one that the Vagrantfile names.
pub const IMAGE: &str = "docker.io/library/busybox:latest";
/// The version of the package in `upgrade/`: higher than any release.
pub const UPGRADE: &str = "999";

/// The file system below the disks of all such machines.
///
/// # Errors
/// There is no home folder.
pub fn image() -> Result<PathBuf> {
    Ok(cache()?.join("debian/root.img"))
}

/// Makes it, if the cache lacks it: some 150 MB are fetched, which takes two minutes. Tells on stdout that it does.
///
/// # Errors
/// The archive isn't reached, or isn't signed by a known key.
pub(super) fn make() -> Result<()> {
    let folder = cache()?.join("debian");
    fs::create_dir_all(cache()?)?;
    let lock = File::create(folder.with_extension("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    tells(Command::new(script("debian.sh")).arg(folder).env("PATH", path())).context("cannot make a Debian")
}

/// Packs what Vagrant's users have beside the Vagrantfile, and an image for containers, since there is no registry.
pub(super) fn pack_supplies(to: &Path) -> Result<()> {
    let folder = tempfile::tempdir()?;
    for (name, version) in [("packages", None), ("upgrade", Some(UPGRADE))] {
        fs::create_dir(folder.path().join(name))?;
        deb::build(&folder.path().join(name).join("fabricd_amd64.deb"), version)?;
    }
    fs::copy(script("../../../deploy/vagrant/provision"), folder.path().join("provision"))?;
    run(Command::new(script("../lab/image.sh")).arg(IMAGE).arg(folder.path().join("busybox.tar")))?;
    if to.exists() {
        fs::remove_file(to)?;
    }
    let mut pack = Command::new("mke2fs");
    pack.args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"]).arg(folder.path()).arg(to).arg("512M");
    run(&mut pack)
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.env("PATH", path()).output().with_context(|| program.clone())?;
    ensure!(output.status.success(), "{program} fails: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}

/// Where Debian has mke2fs, too.
fn path() -> String {
    format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default())
}
