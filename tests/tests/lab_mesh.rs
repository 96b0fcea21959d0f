//! The mesh in the Lab: each way of breaking the path between two nodes, and whether its cause is named.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, Node, wait_until};
use serde_json::Value;

/// A round, the diagnosis, and some patience with a busy machine.
const SOON: Duration = Duration::from_secs(45);

/// What node-1 says of its only peer.
fn verdict(node: &Node) -> Result<Value> {
    let output = node.exec(&["fabricctl", "mesh", "-o", "json"])?;
    let mesh: Value = serde_json::from_str(&output.stdout).with_context(|| format!("no JSON: {output:?}"))?;
    Ok(mesh["peers"][0].clone())
}

fn wait_for(node: &Node, cause: &str) -> Result<Value> {
    wait_until(&format!("{} says {cause}", node.name), SOON, || {
        let verdict = verdict(node)?;
        ensure!(verdict["cause"] == cause, "{verdict}");
        ensure!(cause == "fine" || !verdict["fix"].as_str().unwrap_or_default().is_empty(), "no fix: {verdict}");
        Ok(verdict)
    })
}

fn two_nodes(families: Families) -> Result<Lab> {
    let lab = Lab::builder().nodes(2).families(families).start()?;
    wait_for(lab.node("node-1")?, "fine")?;
    Ok(lab)
}

/// Rules of somebody between the two nodes, on the given hooks.
fn interfere(node: &Node, family: &str, hooks: &[&str], rules: &str) -> Result<()> {
    let chain = |hook: &&str| format!("chain {hook} {{\ntype filter hook {hook} priority -400\n{rules}\n}}\n");
    let table = format!("table {family} breakage {{\n{}}}\n", hooks.iter().map(chain).collect::<String>());
    node.command(&["nft", "-f", "-"])?.stdin(table).run()?;
    Ok(())
}

fn stop_interfering(node: &Node) -> Result<()> {
    node.run(&["nft", "delete", "table", "ip", "breakage"]).map(drop)
}

/// Breaks with rules, waits for the cause, lets go, and waits until all is fine again.
fn named(lab: &Lab, broken: &str, hooks: &[&str], rules: &str, cause: &str) -> Result<Value> {
    let (node, broken) = (lab.node("node-1")?, lab.node(broken)?);
    interfere(broken, "ip", hooks, rules)?;
    let verdict = wait_for(node, cause)?;
    assert_eq!(node.exec(&["fabricctl", "mesh"])?.status.code(), Some(4), "scripts are told too");
    let doctor = node.exec(&["fabricctl", "doctor", "--quiet"])?;
    assert_eq!(doctor.status.code(), Some(4), "{doctor:?}");
    assert!(doctor.stdout.contains(cause), "doctor names another cause than {cause}: {doctor:?}");
    stop_interfering(broken)?;
    wait_for(node, "fine")?;
    Ok(verdict)
}

#[test]
fn what_firewalls_and_networks_do_is_named() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let fine = verdict(lab.node("node-1")?)?;
    assert_eq!(fine["path_mtu"], 1450);
    assert!(fine["rtt_ms"].as_f64().is_some_and(|rtt| rtt > 0.0), "{fine}");

    named(&lab, "node-2", &["input", "output"], "udp dport 8472 drop", "port_blocked")?;
    let hole = named(&lab, "node-1", &["output"], "udp dport 8472 meta length > 1300 drop", "mtu_black_hole")?;
    assert_eq!(hole["path_mtu"], 1250, "the largest packet that fits, less what VXLAN adds");
    // UDP inside the tunnel whose checksum is not zero: what a card does that breaks checksums.
    let breaks = "udp dport 8472 @th,312,8 17 @th,448,16 != 0 drop";
    named(&lab, "node-2", &["input"], breaks, "checksum_offload")?;
    let one_way = format!("ip daddr {} udp dport 8472 drop", lab.node("node-2")?.underlay_ip(Family::V4));
    named(&lab, "node-1", &["output"], &one_way, "asymmetric")?;
    // A network between them that translates addresses: what comes is from nobody that is known.
    let translated = "udp dport 8472 ip saddr set 10.99.0.222";
    named(&lab, "node-2", &["output"], translated, "own_filter")?;
    let doctor = lab.node("node-1")?.exec(&["fabricctl", "doctor", "--quiet"])?.stdout;
    assert!(doctor.contains("filter-drops"), "doctor says nothing of it:\n{doctor}");

    let told = lab.node("node-1")?.run(&["fabricctl", "events"])?;
    for cause in ["port_blocked", "mtu_black_hole", "checksum_offload", "asymmetric", "own_filter", "reached again"] {
        assert!(told.contains(cause), "no event of {cause} in\n{told}");
    }
    Ok(())
}

#[test]
fn stale_entries_and_a_peer_that_is_down_are_named() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    let overlay = verdict(node)?["address"].as_str().context("an address")?.to_owned();

    // What our kernel sends to the peer is lost before it is wrapped, as with an entry that leads elsewhere.
    named(&lab, "node-1", &["output"], &format!("ip daddr {overlay} drop"), "stale_fdb")?;

    // A daemon that hangs: the tunnel is fine, nobody answers.
    peer.freeze_fabricd()?;
    wait_for(node, "no_daemon")?;
    // Now somebody gives its device another address. The kernel forgets the neighbours with that.
    let neighbours = peer.run(&["ip", "neigh", "show", "nud", "permanent", "dev", "fabric.1"])?;
    peer.run(&["ip", "link", "set", "fabric.1", "address", "02:00:00:00:00:99"])?;
    for neighbour in neighbours.lines() {
        let words: Vec<&str> = neighbour.split_whitespace().collect();
        let [ip, "lladdr", mac, ..] = words[..] else { continue };
        peer.run(&["ip", "neigh", "replace", ip, "lladdr", mac, "dev", "fabric.1", "nud", "permanent"])?;
    }
    wait_for(node, "stale_mac")?;
    peer.thaw_fabricd()?;
    wait_for(node, "fine")?;

    peer.power_off()?;
    wait_for(node, "peer_down").map(drop)
}

#[test]
fn ipv6_is_probed_and_diagnosed_alike() -> Result<()> {
    let lab = two_nodes(Families::V6)?;
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    assert_eq!(verdict(node)?["path_mtu"], 1430);
    let overlay = verdict(node)?["address"].as_str().context("an address")?.to_owned();
    node.run(&["ip", "-6", "route", "add", "unreachable", &format!("{overlay}/128"), "metric", "1"])?;
    wait_for(node, "stale_fdb")?;
    node.run(&["ip", "-6", "route", "del", "unreachable", &format!("{overlay}/128"), "metric", "1"])?;
    wait_for(node, "fine")?;
    interfere(peer, "ip6", &["input", "output"], "udp dport 8472 drop")?;
    wait_for(node, "port_blocked").map(drop)
}

#[test]
fn of_a_flannel_node_no_answer_is_expected() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    // Its tunnel stands, and no fabricd is there: what a flannel node looks like from here.
    lab.node("node-2")?.kill_fabricd()?;
    let verdict = wait_for(lab.node("node-1")?, "no_daemon")?;
    assert!(verdict["evidence"].as_str().unwrap_or_default().contains("flannel"), "{verdict}");
    assert_eq!(verdict["path_mtu"], 1450, "its kernel answers packets of full size");
    assert_eq!(lab.node("node-1")?.exec(&["fabricctl", "mesh"])?.status.code(), Some(0));
    Ok(())
}
