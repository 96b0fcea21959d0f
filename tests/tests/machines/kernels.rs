//! Each kernel: the promises between those that CI doesn't run, and the conformance suites on all.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_tests::lab::{Families, Lab};
use fabric_tests::machines::{Kernel, Machines, Spec};

use crate::fabric::keeps_its_promises;
use crate::fast_path::hook_of;

#[test]
fn the_kernels_between_are_one_fabric_with_a_node_in_namespaces() -> Result<()> {
    keeps_its_promises(["6.1", "6.12"])
}

/// What netlink does, by the suites that the fake kernel is held to as well: `MACHINE_TESTS` names their programs. Those of the
/// fast path are for kernels that have a hook for it.
#[test]
fn every_kernel_passes_the_conformance_suites() -> Result<()> {
    let programs = std::env::var("MACHINE_TESTS").unwrap_or_default();
    let programs: Vec<&str> =
        programs.split_whitespace().filter_map(|path| Path::new(path).file_name()?.to_str()).collect();
    ensure!(!programs.is_empty(), "MACHINE_TESTS names no programs; `make test-machines` does");
    let mut failed = vec![];
    for kernel in Kernel::all() {
        let name = format!("kernels.conformance-{}", kernel.name);
        let mut machines = Machines::start(Lab::builder().nodes(0).name(&name).families(Families::Dual))?;
        let vm = machines.add(&[Spec { memory: 768, ..Spec::kernel(&kernel.name) }])?.remove(0);
        let (skip, before) = (if hook_of(&vm)?.is_some() { "" } else { "--skip fast_path" }, failed.len());
        for program in &programs {
            let script = format!("cd /tests && ./{program} --test-threads 1 --skip fake {skip} 2>&1");
            let answer = vm.exec_within(&script, Duration::from_secs(600))?;
            let summary = answer.stdout.lines().find(|line| line.starts_with("test result:"));
            println!("{} {program}: {}", kernel.release()?, summary.context(answer.stdout.clone())?);
            if answer.code != 0 {
                let lines: Vec<&str> = answer.stdout.lines().filter(|line| !line.ends_with("... ok")).collect();
                failed.push(format!("{} on {}:\n{}", program, kernel.name, lines.join("\n")));
            }
        }
        if failed.len() == before {
            vm.has_shown("every_kernel_passes_the_conformance_suites")?;
        }
        machines.lab.destroy()?;
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}

#[test]
fn a_kernel_that_debian_has_no_more_is_told_with_the_list_to_change() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/machines/kernel.sh");
    let fetch =
        Command::new(script).arg(folder.path()).args(["bookworm", "linux-image-0.0.0-0-cloud-amd64"]).output()?;
    let told = String::from_utf8_lossy(&fetch.stderr);
    ensure!(!fetch.status.success(), "it has been fetched");
    ensure!(told.contains("linux-image-0.0.0-0-cloud-amd64 is not in the archive any more"), "{told}");
    ensure!(told.contains("tests/src/machines/kernels.txt"), "{told}");
    ensure!(fs::read_dir(folder.path())?.next().is_none(), "it leaves something");
    Ok(())
}
