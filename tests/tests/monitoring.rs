//! `/metrics` as Prometheus reads it; dashboard and alerts in deploy/monitoring ask for nothing that it doesn't have.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use fabric_core::diff::{Change, Op, routing};
use fabric_core::state::nft::TableKey;
use fabric_tests::served;
use fabricd::kernel::{Drops, KernelError};
use fabricd::mesh::Mesh;
use fabricd::metrics::{Format, Metrics};
use fabricd::status::counters::Counters;
use regex::Regex;
use tokio::time::Instant;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring")
}

/// `/metrics` when each metric with labels has a value.
fn shown() -> Result<String> {
    let mut view = served::view(&[2])?;
    // Every machine has this device, so its counters can be read.
    view.vteps[0].device = "lo".parse()?;
    let (table, chain, why) = (TableKey::Fabric, "senders".to_owned(), "from no peer".to_owned());
    let drops = [Drops { table, chain, why, packets: 1 }];
    let counters = Counters::default();
    let op: Op = routing::Op::Address("fabric.1".parse()?, Change::Create("10.244.1.0/32".parse()?)).into();
    let source = io::Error::from_raw_os_error(libc::EPERM);
    counters.wrote(&op, &Err(KernelError::of_op(&op, source, None)));
    Ok(Metrics::new(&counters).render(&view, &Mesh::default(), &drops, Instant::now()))
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_there_are() -> Result<()> {
    let shown = shown()?;
    let there = |name: &str| {
        let stem = ["_total", "_bucket", "_info"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        shown.lines().any(|line| line.split(' ').nth(2) == Some(stem))
    };
    let name = Regex::new("fabricd_[a-z_]+")?;
    for (file, least) in [("alerts.yaml", 10), ("dashboard.json", 12)] {
        let text = std::fs::read_to_string(folder().join(file)).context(file)?;
        let asked: BTreeSet<&str> = name.find_iter(&text).map(|found| found.as_str()).collect();
        assert!(asked.len() >= least, "{file} asks for {asked:?} only");
        for name in asked {
            assert!(there(name), "{file} asks for {name}, which is not in\n{shown}");
        }
    }
    let dashboard = std::fs::read_to_string(folder().join("dashboard.json"))?;
    let dashboard: serde_json::Value = serde_json::from_str(&dashboard).context("dashboard.json")?;
    assert!(dashboard["panels"].as_array().is_some_and(|panels| panels.len() > 8));
    Ok(())
}

/// Prometheus' own judgement.
fn promtool(args: &[&str], input: &str) -> Result<()> {
    let mut promtool = Command::new("promtool");
    promtool.arg("check").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut promtool = promtool.spawn().context("cannot run promtool; make test installs it (Debian: prometheus)")?;
    promtool.stdin.take().context("a pipe")?.write_all(input.as_bytes())?;
    let output = promtool.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "promtool check {args:?}: {said}");
    Ok(())
}

#[test]
fn promtool_takes_the_alerts() -> Result<()> {
    promtool(&["rules", &folder().join("alerts.yaml").display().to_string()], "")
}

/// promtool reads the older of Prometheus' two formats, and wants a help text and no odd name.
#[test]
fn promtool_takes_the_metrics_as_text() -> Result<()> {
    let text = Format::Text.write(shown()?);
    promtool(&["metrics"], &text)?;
    for name in [
        "fabricd_build_info{version=\"",
        "process_cpu_seconds_total ",
        "process_resident_memory_bytes ",
        "process_virtual_memory_bytes ",
        "process_open_fds ",
        "process_max_fds ",
        "process_start_time_seconds ",
        "fabricd_device_receive_bytes_total{device=\"lo\"} ",
        "fabricd_device_transmit_packets_total{device=\"lo\"} ",
        "fabricd_device_receive_dropped_packets_total{device=\"lo\"} ",
        "fabricd_device_transmit_errors_total{device=\"lo\"} ",
    ] {
        ensure!(text.lines().any(|line| line.starts_with(name)), "{name} is not in\n{text}");
    }
    Ok(())
}

/// A number without a unit says nothing: its help names the unit that its name ends in.
#[test]
fn help_texts_name_the_unit() -> Result<()> {
    let shown = shown()?;
    for line in shown.lines().filter_map(|line| line.strip_prefix("# UNIT ")) {
        let (name, unit) = line.split_once(' ').context("a name and a unit")?;
        let help = shown.lines().find_map(|line| line.strip_prefix(&format!("# HELP {name} "))).context("help")?;
        let told = match unit {
            "ratio" => "Share",
            "bytes" => "ytes",
            unit => unit,
        };
        ensure!(help.contains(told), "{name} is in {unit}, its help says: {help}");
    }
    Ok(())
}
