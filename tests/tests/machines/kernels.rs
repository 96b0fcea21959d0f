//! Each kernel: the promises between those that CI doesn't run, and the conformance suites on all.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_tests::lab::{Families, Lab};
use fabric_tests::machines::{Kernel, Machines, Spec};

use crate::fabric::keeps_its_promises;

#[test]
fn the_kernels_between_are_one_fabric_with_a_node_in_namespaces() -> Result<()> {
    keeps_its_promises(["6.1", "6.12"])
}

/// What netlink does, by the suites that the fake kernel is held to as well: `MACHINE_TESTS` names their programs.
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
        // Programs can't encapsulate there (before 5.13): the fast path stays off.
        let skip = if kernel.name == "5.10" { "--skip fast_path" } else { "" };
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
        machines.lab.destroy()?;
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(())
}
