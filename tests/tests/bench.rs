//! Every benchmark once, as short as it gets: that it measures at all. How fast is nobody's business here.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_tests::bench::{
    Report, change, changes, cni, cold_start, datapath, filter, firewalls, policy, rest, services,
};
use fabric_tests::lab::binaries;

#[test]
fn cold_starts_are_measured() -> Result<()> {
    let mut report = Report::default();
    cold_start::run(&mut report, &[20], 1, None)?;
    value(&report, "fabricd / iproute2, programming").map(drop)
}

#[test]
fn one_change_is_measured_beside_another_build() -> Result<()> {
    let mut report = Report::default();
    let fabricd = binaries::folder()?.join("fabricd");
    change::run(&mut report, change::Options { peers: 20, changes: 3, rounds: 1, before: Some(&fabricd) })?;
    for name in ["put, CPU: this build / the one before", "this build: lease delete to programmed, own part, p99"] {
        value(&report, name)?;
    }
    Ok(())
}

#[test]
fn changes_are_measured_and_restarts_write_nothing() -> Result<()> {
    let mut report = Report::default();
    changes::run(&mut report, changes::Options { peers: 20, singles: 3, burst: 10, rounds: 2 })?;
    let written = value(&report, "changes to the kernel's tables, all restarts")?;
    ensure!(written == 0.0, "{written} changes");
    value(&report, "deleted to all programmed again").map(drop)
}

#[test]
fn rest_is_measured_and_writes_nothing_while_peers_answer() -> Result<()> {
    let mut report = Report::default();
    rest::run(&mut report, 20, Duration::from_secs(8))?;
    let written = value(&report, "changes to the kernel's tables")?;
    ensure!(written == 0.0, "{written} changes");
    ensure!(value(&report, "probes of the mesh that were answered, a second")? > 0.0);
    Ok(())
}

#[test]
fn the_datapath_and_its_filter_are_measured() -> Result<()> {
    let mut report = Report::default();
    let options = datapath::Options { rounds: 1, slice: Duration::from_millis(100), crowd: 20 };
    datapath::run(&mut report, datapath::Options { crowd: 0, ..options })?;
    filter::run(&mut report, options)?;
    for name in [
        "TCP, four streams: fabric, kernel's path / hand-made VXLAN",
        "round trips, the whole way: fabric, fast path / routed veth",
        "round trips: on / off",
    ] {
        ensure!(value(&report, name)? > 0.0, "{name}: {}", value(&report, name)?);
    }
    Ok(())
}

#[test]
fn policies_of_a_cluster_are_measured() -> Result<()> {
    let mut report = Report::default();
    policy::run(&mut report, policy::Options { pods: 600, policies: 20, local: 10, changes: 2 })?;
    ensure!(value(&report, "elements of all sets")? > 0.0);
    ensure!(value(&report, "one label changes")? > 0.0);
    Ok(())
}

#[test]
fn the_firewalls_of_others_are_measured() -> Result<()> {
    let mut report = Report::default();
    firewalls::run(&mut report, firewalls::Options { chains: 20, seconds: 2 })?;
    for name in ["nobody writes: CPU, of one core", "a rule a second: CPU for one"] {
        ensure!(value(&report, name)? >= 0.0, "{name}: {}", value(&report, name)?);
    }
    ensure!(report.figures.iter().filter(|figure| figure.name == "resident" && figure.median > 1.0).count() == 2);
    Ok(())
}

#[test]
fn services_are_measured_and_a_restart_writes_nothing() -> Result<()> {
    let mut report = Report::default();
    services::run(&mut report, services::Options { services: 20, endpoints: 2, changes: 3 })?;
    assert!(value(&report, "restart: changes that were written")?.abs() < f64::EPSILON);
    assert!(value(&report, "kube-proxy's layout, by nft -f: one more Service, median")? > 0.0);
    Ok(())
}

#[test]
fn pods_that_come_and_go_are_measured() -> Result<()> {
    let mut report = Report::default();
    cni::run(&mut report, &binaries::folder()?, 2)?;
    for way in ["fabric-cni over bridge + host-local", "fabric-bridge", "fabric-cni with fabric-bridge"] {
        let name = format!("{way}, p99, of the standard plugins'");
        ensure!(value(&report, &name)? > 0.0, "{name}: {}", value(&report, &name)?);
    }
    Ok(())
}

fn value(report: &Report, name: &str) -> Result<f64> {
    let figure = report.figures.iter().find(|figure| figure.name == name);
    Ok(figure.with_context(|| format!("no figure {name:?}"))?.median)
}
