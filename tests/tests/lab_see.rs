//! What a node shows of itself, in the Lab: fabricctl on a daemon that works.

use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_tests::lab::{Lab, Node, wait_until};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(10);

fn ctl(node: &Node, args: &[&str]) -> Result<Value> {
    let output = node.run(&[&["fabricctl"], args, &["-o", "json"]].concat())?;
    serde_json::from_str(&output).with_context(|| format!("no JSON: {output}"))
}

#[test]
fn fabricctl_shows_peers_leases_events_and_what_the_kernel_holds() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?;
    wait_until("node-1 has programmed node-2", SOON, || node.run(&["fabricctl", "peers"]).map(drop))?;

    let peers = ctl(node, &["peers"])?;
    assert_eq!((&peers["peers"][0]["node"], &peers["peers"][0]["state"]), (&"node-2".into(), &"programmed".into()));
    let leases = ctl(node, &["leases"])?;
    assert_eq!(leases["leases"].as_array().map(Vec::len), Some(2));
    assert!(node.run(&["fabricctl", "leases", "-o", "yaml"])?.contains("- node: node-2\n"));
    assert!(node.run(&["fabricctl", "events"])?.contains("came with"));

    // What it says the kernel holds is what iproute2 sees.
    let kernel = ctl(node, &["plan", "--entries"])?;
    assert_eq!(kernel["plan"], Value::Array(vec![]));
    let entries = |side: &str| kernel[side]["entries"].as_array().cloned().unwrap_or_default();
    let entries: Vec<String> = entries("had").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let routes = node.run(&["ip", "-4", "route", "show", "proto", "250"])?;
    for route in routes.lines().filter_map(|line| line.split(' ').next()) {
        assert!(entries.iter().any(|entry| entry.contains(&format!("route add {route} "))), "{route} in {entries:#?}");
    }
    assert_eq!(kernel["had"]["routes"], routes.lines().count());

    assert_eq!(node.run(&["fabricctl", "log-level", "debug"])?, "debug\n");
    node.run(&["ip", "nexthop", "flush", "proto", "250"])?;
    wait_until("the log tells each write", SOON, || {
        anyhow::ensure!(node.log("fabricd").contains("kernel write"));
        Ok(())
    })?;
    assert!(node.run(&["fabricctl", "plan"])?.contains("+ ip route add"), "the last plan is shown");
    assert!(node.run(&["fabricctl", "completion", "bash"])?.contains("complete -F"));

    // The exit code tells scripts: 3 when not ready, 1 without a daemon.
    node.stop_fabricd()?;
    assert_eq!(node.exec(&["fabricctl", "status"])?.status.code(), Some(1));
    lab.etcd().stop()?;
    node.start_fabricd()?;
    wait_until("a daemon without a store is not ready", SOON, || {
        anyhow::ensure!(node.exec(&["fabricctl", "status"])?.status.code() == Some(3));
        Ok(())
    })
}
