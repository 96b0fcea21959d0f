//! What CI runs: the oldest and the newest kernel, and a node in namespaces, in one fabric.

use anyhow::{Result, ensure};
use fabric_tests::lab::Lab;
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
    ensure!(told.contains("the end of the console of linux-6.1") && told.contains("Kernel Offset"), "{told}");
    Ok(())
}
