//! The mesh in the Lab: each way of breaking the path between two nodes, and whether its cause is named, and no other.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, Node, wait_until};
use serde_json::Value;

/// Two rounds with their diagnoses, and some patience with a busy machine.
const SOON: Duration = Duration::from_secs(90);
/// What may be said of a peer that goes and comes: it is there, it isn't, it has no VXLAN device or no daemon yet.
const HARMLESS: [&str; 7] = ["unknown", "fine", "unknown_yet", "peer_down", "port_closed", "no_daemon", "lossy"];

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

/// Asks for all verdicts of a node, again and again while `job` runs; whatever was said must be harmless.
fn watched<T>(node: &Node, job: impl FnOnce() -> Result<T>) -> Result<T> {
    let (done, seen) = (AtomicBool::new(false), std::sync::Mutex::new(BTreeSet::new()));
    let outcome = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let Ok(output) = node.exec(&["fabricctl", "mesh", "-o", "json"]) else { continue };
                let mesh: Value = serde_json::from_str(&output.stdout).unwrap_or_default();
                for peer in mesh["peers"].as_array().into_iter().flatten() {
                    let told = (peer["cause"].as_str().unwrap_or("none").to_owned(), peer["evidence"].to_string());
                    seen.lock().expect("nobody panics").insert(told);
                }
            }
        });
        let outcome = job();
        done.store(true, Ordering::Relaxed);
        outcome
    });
    let seen = seen.into_inner()?;
    ensure!(!seen.is_empty(), "nothing was ever said");
    let wrong: Vec<_> = seen.iter().filter(|(cause, _)| !HARMLESS.contains(&cause.as_str())).collect();
    ensure!(wrong.is_empty(), "{} names a wrong cause: {wrong:#?}", node.name);
    outcome
}

/// Runs the fix that a verdict comes with.
fn follow(node: &Node, verdict: &Value) -> Result<()> {
    let fix = verdict["fix"].as_str().context("no fix")?;
    node.run(&["sh", "-ec", fix]).map(drop)
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
    wait_until("both are events", SOON, || {
        let told = node.run(&["fabricctl", "events"])?;
        ensure!(told.contains(cause) && told.contains("reached again"), "no event of {cause} in\n{told}");
        Ok(())
    })?;
    Ok(verdict)
}

#[test]
fn what_networks_lose_is_named() -> Result<()> {
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
    Ok(())
}

#[test]
fn what_firewalls_of_the_peer_refuse_is_named() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let one_way = format!("ip saddr {} udp dport 8472 drop", lab.node("node-1")?.underlay_ip(Family::V4));
    let told = named(&lab, "node-2", &["input"], &one_way, "asymmetric")?;
    assert!(told["evidence"].as_str().unwrap_or_default().contains("receiving from node-2, not reaching it"), "{told}");
    let rejected = format!("{} reject with icmp type admin-prohibited", one_way.trim_end_matches(" drop"));
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    interfere(peer, "ip", &["input"], &rejected)?;
    let words = "10.99.0.12 rejects UDP port 8472: communication administratively prohibited";
    // A host refuses once a second, whatever it is sent.
    wait_until("node-1 says who rejects", 2 * SOON, || {
        let told = verdict(node)?;
        let evidence = told["evidence"].as_str().unwrap_or_default();
        ensure!(told["cause"] == "asymmetric" && evidence.contains(words), "{told}");
        Ok(())
    })?;
    stop_interfering(peer)?;
    wait_for(node, "fine").map(drop)
}

#[test]
fn what_this_nodes_own_firewall_drops_is_no_fault_of_the_network_between() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let node = lab.node("node-1")?;
    let own = format!("ip daddr {} udp dport 8472 drop", lab.node("node-2")?.underlay_ip(Family::V4));
    let told = named(&lab, "node-1", &["output"], &own, "local_firewall")?;
    assert!(told["evidence"].as_str().unwrap_or_default().contains("ip breakage output"), "{told}");
    // Nor is what it doesn't take in; and what mends it is told.
    interfere(node, "ip", &["input"], "udp dport 8472 drop")?;
    let told = wait_for(node, "local_firewall")?;
    assert!(told["evidence"].as_str().unwrap_or_default().contains("ip breakage input"), "{told}");
    follow(node, &told)?;
    wait_for(node, "fine")?;
    stop_interfering(node)?;
    // A network between them that translates addresses: what comes is from nobody that is known.
    let translated = "udp dport 8472 ip saddr set 10.99.0.222";
    named(&lab, "node-2", &["output"], translated, "own_filter")?;
    let doctor = lab.node("node-1")?.exec(&["fabricctl", "doctor", "--quiet"])?.stdout;
    assert!(doctor.contains("filter-drops"), "doctor says nothing of it:\n{doctor}");
    Ok(())
}

#[test]
fn stale_entries_and_a_peer_that_is_down_are_named() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    let overlay = verdict(node)?["address"].as_str().context("an address")?.to_owned();

    // What our kernel sends to the peer is lost before it is encapsulated, as with an entry that leads elsewhere.
    stale_fdb(node, &overlay)?;

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

/// Loses what the kernel sends into the tunnel, until that is told.
fn stale_fdb(node: &Node, overlay: &str) -> Result<()> {
    let family = if overlay.contains(':') { "ip6" } else { "ip" };
    let chain = "chain egress {\ntype filter hook egress device \"fabric.1\" priority 0\n";
    let table = format!("table netdev breakage {{\n{chain}{family} daddr {overlay} drop\n}}\n}}\n");
    node.command(&["nft", "-f", "-"])?.stdin(table).run()?;
    wait_for(node, "stale_fdb")?;
    node.run(&["nft", "delete", "table", "netdev", "breakage"])?;
    wait_for(node, "fine").map(drop)
}

#[test]
fn peer_that_goes_and_comes_is_never_told_as_anything_else() -> Result<()> {
    let mut lab = two_nodes(Families::V4)?;
    let (node, peer) = (lab.node("node-1")?.clone(), lab.node("node-2")?.clone());
    watched(&node, || {
        peer.power_off()?;
        wait_for(&node, "peer_down")?;
        lab.boot_again(&peer)?;
        peer.start_fabricd()?;
        wait_for(&node, "fine")
    })?;
    watched(&node, || {
        peer.kill_fabricd()?;
        peer.start_fabricd()?;
        peer.wait_ready()?;
        peer.run(&["fabricctl", "lease", "renumber", "--force"])?;
        peer.wait_ready()?;
        wait_for(&node, "fine")
    })?;
    watched(&node, || lab.add_node())?;
    let log = node.log("fabricd");
    let told: Vec<&str> = log.lines().filter(|line| line.contains("path to peer is broken or lossy")).collect();
    assert!(told.iter().any(|line| line.contains("peer_down")), "the log doesn't say so:\n{log}");
    assert!(told.len() < 6, "it is said more than once: {told:#?}");
    Ok(())
}

#[test]
fn routes_and_rules_that_override_ours_are_named_and_their_fix_clears_it() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    let overlay = verdict(node)?["address"].as_str().context("an address")?.to_owned();
    let remote = peer.underlay_ip(Family::V4).to_string();
    let gateway = "10.99.0.1";
    for (commands, named) in [
        // What Calico leaves behind.
        (vec![format!("ip route add blackhole {overlay}/26 proto bird")], format!("blackhole {overlay}/26 proto bird")),
        (
            vec![format!("ip route add {overlay}/26 via {gateway} dev eth0 proto bird")],
            format!("{overlay}/26 via {gateway} dev eth0 proto bird"),
        ),
        // A VPN's policy rule.
        (
            vec![
                "ip route add default via 10.99.0.1 dev eth0 table 100".into(),
                format!("ip rule add to {overlay}/24 lookup 100 priority 100"),
            ],
            format!("100: from all to {overlay}/24 lookup 100"),
        ),
        (vec![format!("ip route add unreachable {remote}")], format!("unreachable {remote}/32")),
    ] {
        for command in &commands {
            node.run(&["sh", "-ec", command])?;
        }
        let told = wait_for(node, "route_override")?;
        assert!(told["evidence"].as_str().unwrap_or_default().contains(&named), "{named} isn't named: {told}");
        follow(node, &told)?;
        wait_for(node, "fine")?;
    }
    Ok(())
}

#[test]
fn loss_in_the_underlay_is_told_with_its_share_and_direction() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let (node, underlay) = (lab.node("node-1")?, &lab.underlay().machine);
    let back = format!("ip saddr {} udp dport 8472", lab.node("node-2")?.underlay_ip(Family::V4));
    let chain = format!("type filter hook forward priority 0\n{back} numgen random mod 100 < 40 drop");
    let table = format!("table bridge loss {{\nchain forward {{\n{chain}\n}}\n}}\n");
    underlay.command(&["nft", "-f", "-"])?.stdin(table).run()?;
    let told = wait_for(node, "lossy")?;
    let share = |name: &str| told[name].as_f64().unwrap_or(-2.0);
    assert!(share("loss_back") > 0.1 && share("loss_back") > share("loss_there"), "{told}");
    let evidence = told["evidence"].as_str().unwrap_or_default();
    assert!(evidence.contains("from node-2 to node-1") && evidence.contains("round trip"), "{told}");
    assert_eq!(node.exec(&["fabricctl", "mesh"])?.status.code(), Some(4), "scripts are told too");
    underlay.run(&["nft", "delete", "table", "bridge", "loss"])?;
    wait_until("node-1 says fine", 4 * SOON, || {
        let verdict = verdict(node)?;
        ensure!(verdict["cause"] == "fine", "{verdict}");
        Ok(())
    })
}

#[test]
fn without_the_right_to_ping_all_but_a_stale_mac_is_told_and_a_probe_on_demand_tells_it_now() -> Result<()> {
    let lab = two_nodes(Families::V4)?;
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    node.stop_fabricd()?;
    // As packaged.
    node.start_service("fabricd", &["setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", "fabricd"], &[])?;
    wait_for(node, "fine")?;
    let overlay = verdict(node)?["address"].as_str().context("an address")?.to_owned();
    stale_fdb(node, &overlay)?;
    peer.freeze_fabricd()?;
    wait_for(node, "no_daemon")?;
    peer.thaw_fabricd()?;
    wait_for(node, "fine")?;

    interfere(peer, "ip", &["input", "output"], "udp dport 8472 drop")?;
    let probed = node.exec(&["fabricctl", "mesh", "--probe", "node-2", "-o", "json"])?;
    let mesh: Value = serde_json::from_str(&probed.stdout)?;
    assert_eq!((&mesh["peers"][0]["cause"], probed.status.code()), (&Value::from("port_blocked"), Some(4)), "{mesh:#}");
    let evidence = mesh["peers"][0]["evidence"].as_str().unwrap_or_default();
    assert!(evidence.contains("or its VTEP has another MAC address"), "the doubt isn't told: {evidence}");
    assert!(mesh["limits"].as_str().unwrap_or_default().contains("ping_group_range"), "{mesh:#}");
    stop_interfering(peer)?;
    assert_eq!(node.exec(&["fabricctl", "mesh", "--probe"])?.status.code(), Some(0));
    let stranger = node.exec(&["fabricctl", "mesh", "--probe", "node-9"])?;
    assert_eq!(stranger.status.code(), Some(1));
    assert!(stranger.stderr.contains("there is no peer node-9"), "{stranger:?}");
    Ok(())
}

#[test]
fn ipv6_is_probed_and_diagnosed_alike() -> Result<()> {
    let lab = two_nodes(Families::V6)?;
    let (node, peer) = (lab.node("node-1")?, lab.node("node-2")?);
    assert_eq!(verdict(node)?["path_mtu"], 1430);
    let overlay = verdict(node)?["address"].as_str().context("an address")?.to_owned();
    node.run(&["ip", "-6", "route", "add", "unreachable", &format!("{overlay}/128"), "metric", "1"])?;
    let told = wait_for(node, "route_override")?;
    follow(node, &told)?;
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
