//! Who a machine is: host names, clocks, and disks that lose their power at any moment.

use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, wait_until};
use fabric_tests::machines::{Machines, Plugin, Spec};

/// How often the power goes in the test of that, each time at another moment.
const POWER_CUTS: u32 = 6;

#[test]
fn a_second_machine_of_one_hostname_takes_nothing_from_the_first() -> Result<()> {
    twins(false)
}

/// As of a template that was part of a fabric before it was cloned.
#[test]
fn a_second_machine_with_a_copy_of_the_firsts_disk_takes_nothing_from_it() -> Result<()> {
    twins(true)
}

fn twins(disk_is_copied: bool) -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(1).families(Families::Dual))?;
    let twin = |kernel| Spec { hostname: Some("twin".into()), ..Spec::kernel(kernel) };
    let vms = machines.add(&[twin("6.12"), twin("6.1")])?;
    let (first, second) = (&vms[0], &vms[1]);
    first.start_fabricd("")?;
    first.wait_ready()?;
    let subnets = first.status()?["lease"]["subnets"].clone();
    let (pod, outside) = (first.add_pod("a", Plugin::Bridge)?, machines.lab.node("node-1")?.add_pod("outside")?);
    pod.reaches(outside.ip(Family::V4)?)?;

    if disk_is_copied {
        let disk = first.run("tar -C /var/lib -cz fabric cni | base64 -w 0")?;
        second.run(&format!(
            "echo {} | base64 -d | tar -C /var/lib -xz; ls -A /var/lib/fabric | grep -q .",
            disk.trim()
        ))?;
    }
    second.start_fabricd("")?;
    let told = wait_until("the second machine says why it gets no lease", Duration::from_secs(180), || {
        let status = second.status()?;
        let reason = status["reason"].as_str().unwrap_or_default().to_owned();
        ensure!(status["ready"] == false && reason.contains("twin"), "{reason}");
        Ok(reason)
    })?;
    ensure!(told.contains(&first.underlay_ip(Family::V4).to_string()), "who has the lease is not told: {told}");
    ensure!(first.status()?["ready"] == true, "the first is not ready: {}", first.status()?["reason"]);
    ensure!(first.status()?["lease"]["subnets"] == subnets, "the first had {subnets}: {}", first.status()?["lease"]);
    pod.reaches(outside.ip(Family::V4)?)?;
    pod.reaches(outside.ip(Family::V6)?)?;
    machines.have_passed()
}

#[test]
fn clocks_an_hour_ahead_and_behind_are_no_matter_to_leases() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(1).families(Families::Dual))?;
    let clock = |seconds| Spec { clock: seconds, ..Spec::kernel("6.12") };
    let vms = machines.add(&[clock(3600), clock(-3600)])?;
    vms.iter().try_for_each(|vm| vm.start_fabricd(""))?;
    let mut pods = vec![];
    for vm in &vms {
        vm.wait_ready()?;
        let (there, here) =
            (vm.run("date +%s")?.trim().parse::<i64>()?, std::time::UNIX_EPOCH.elapsed()?.as_secs() as i64);
        ensure!(((there - here) - vm.spec.clock).abs() < 600, "{}'s clock is {} s ahead", vm.name, there - here);
        let left = vm.status()?["lease"]["expires_in_seconds"].as_u64();
        ensure!(left.is_some_and(|left| left > 85_000 && left <= 86_400), "{}'s lease has {left:?} s left", vm.name);
        pods.push(vm.add_pod("a", Plugin::FabricBridge)?);
    }
    pods[0].reaches(pods[1].ip(Family::V4)?)?;
    pods[1].reaches(pods[0].ip(Family::V6)?)?;
    machines.have_passed()
}

/// What was said to be written has to be there: namespaces can't show that, since their page cache survives.
#[test]
fn a_power_off_at_any_moment_costs_neither_the_subnet_nor_the_start() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(0).families(Families::Dual))?;
    let vm = machines.add(&[Spec::kernel("6.12")])?.remove(0);
    let mut random = fastrand::Rng::with_seed(17);
    let mut held = None;
    for cut in 0..POWER_CUTS {
        vm.start_fabricd("")?;
        // From before the lease until some time after it is written.
        let lasts = Duration::from_millis(random.u64(0..10_000));
        std::thread::sleep(lasts);
        vm.power_off()?;
        vm.boot()?;
        vm.start_fabricd("")?;
        vm.wait_ready()?;
        let subnets = vm.status()?["lease"]["subnets"].clone();
        ensure!(
            held.as_ref().is_none_or(|held| *held == subnets),
            "cut {cut}, {lasts:?} after the start: {held:?}, now {subnets}"
        );
        let whole = vm.run("cd /var/lib/fabric && for file in *; do [ -s $file ] || echo $file; done")?;
        ensure!(whole.is_empty(), "cut {cut}, {lasts:?} after the start left empty files: {whole}");
        held = Some(subnets);
        vm.end_fabricd("KILL")?;
    }
    machines.have_passed()
}
