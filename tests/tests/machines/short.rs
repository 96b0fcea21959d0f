//! What CI runs: the oldest and the newest kernel, and a node in namespaces, in one fabric.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use fabric_tests::lab::{Lab, binaries};
use fabric_tests::machines::{Machines, Spec};

use crate::fabric::keeps_its_promises;

#[test]
fn the_oldest_and_the_newest_kernel_are_one_fabric_with_a_node_in_namespaces() -> Result<()> {
    keeps_its_promises(["5.10", "newest"])
}

#[test]
fn a_machine_that_does_not_boot_shows_its_consoles_end() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(0))?;
    // Enough to unpack the kernel, not enough to start it: it panics, and says where it lay.
    let booted = machines.add(&[Spec { memory: 72, ..Spec::kernel("6.1") }]).map(|_| ());
    let told = booted.map_err(|error| format!("{error:#}")).err().unwrap_or_default();
    nothing_is_left_of(machines)?;
    ensure!(told.contains("the end of the console of linux-6.1") && told.contains("Kernel Offset"), "{told}");
    Ok(())
}

/// Neither processes nor disks: taps and sockets are in the namespaces of the processes.
fn nothing_is_left_of(machines: Machines) -> Result<()> {
    let (folder, underlay) = (machines.lab.dir().to_owned(), machines.lab.underlay().machine.pid()?);
    drop(machines);
    ensure!(!Path::new(&format!("/proc/{underlay}")).exists(), "the machine of QEMU goes on");
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            ensure!(path.extension().is_none_or(|kind| kind != "img"), "a disk is left: {}", path.display());
            folders.extend(Some(path).filter(|path| path.is_dir() && !path.is_symlink()));
        }
    }
    Ok(())
}

/// Before anything starts, with what to install or change.
#[test]
fn what_machines_lack_is_told_before_anything_starts() -> Result<()> {
    let lab = "machines.short.lacking";
    let program = binaries::lab()?.with_file_name("machines");
    for (machine, path, expected) in [
        ("6.1", "/nonexistent", "qemu-system-x86_64 (Debian package qemu-system-x86)"),
        ("6.1", "/nonexistent", "`tests/deps machines` installs what machines need"),
        ("6.1,memory=99999999", "", "MiB of memory, of which"),
        ("6.1,memory=99999999", "", "give them less: memory=128"),
        ("4.19", "", "no kernel 4.19; there are: 5.10 6.1 "),
    ] {
        let mut up = Command::new(&program);
        up.args(["--name", lab, "up", machine]);
        if !path.is_empty() {
            up.env("PATH", path);
        }
        let output = up.output()?;
        let told = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && told.contains(expected), "{machine}: {told}");
        ensure!(!binaries::labs()?.join(lab).exists(), "a lab was made");
    }
    let checked = Command::new(&program).args(["check", "6.1"]).output()?;
    let told = String::from_utf8_lossy(&checked.stdout);
    ensure!(checked.status.success() && told.contains("KVM"), "whether KVM works is not told: {checked:?}");
    Ok(())
}
