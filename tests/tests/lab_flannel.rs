//! One cluster with flannel: nodes of both kinds beside each other, and nodes that change hands in both directions while
//! their pods talk. flannel is what it leaves on a host ([`fabric_tests::lab::flannel`]); with `FLANNELD=/path` and
//! `FLANNEL_CNI=/path` it is flannel itself.

use std::env;
use std::fs;
use std::net::IpAddr;
use std::sync::Arc;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::handover::{
    Cluster, MASQUERADE, SOON, Traffic, add_foreign_rules, all_addresses_differ, foreign_rules, give_back,
    let_pods_through, mac, nothing_of_ours_is_left, record, take_over, take_over_with, the_record_is_flannels,
};
use fabric_tests::lab::flannel::{Flannel, Options};
use fabric_tests::lab::{Families, Pod, wait_until};
use serde_json::Value;

/// How often there and back, unless `FLANNEL_ROUNDS` says otherwise.
fn rounds(usually: u32) -> Result<u32> {
    Ok(env::var("FLANNEL_ROUNDS").map_or(Ok(usually), |rounds| rounds.parse())?)
}

/// What is true of every kind of flannel node: there and back, some times, and nobody notices.
fn a_node_changes_hands(cluster: &Cluster, forward_drop: bool, rounds: u32) -> Result<()> {
    a_node_changes_hands_with(&[], cluster, forward_drop, rounds)
}

/// The same, by a takeover with more arguments.
fn a_node_changes_hands_with(args: &[&str], cluster: &Cluster, forward_drop: bool, rounds: u32) -> Result<()> {
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    add_foreign_rules(node, forward_drop)?;
    if forward_drop && flannel.options.nftables {
        let_pods_through(node)?;
    }
    let foreign = foreign_rules(node)?;
    let (pods, far) = cluster.pods(node)?;
    let traffic = Traffic::start(&cluster.lab, &pods, &far)?;
    traffic.is_masqueraded()?;
    let was = mac(node, "flannel.1")?;
    let subnet = |record: &str| record.lines().next().unwrap_or_default().to_owned();
    let key = subnet(&record(node)?);

    for round in 1..=rounds {
        take_over_with(flannel, (round == 1).then_some(1), args)?;
        traffic.is_masqueraded()?;
        ensure!(mac(node, "fabric.1")? == was && subnet(&record(node)?) == key, "MAC address and subnet stay");
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        let boot = node.run(&["ip", "-4", "route", "show", "proto", "boot"])?;
        ensure!(boot.lines().all(|route| !route.starts_with("10.244.") && !route.starts_with("10.1")), "{boot}");
        // A pod of before ends, new ones come, and the node has all of their addresses.
        let (of_ours, gone) = (node.add_pod(&format!("n{round}"))?, node.add_pod(&format!("g{round}"))?);
        all_addresses_differ([&pods[0], &pods[1], &of_ours, &gone])?;
        of_ours.run(&["ping", "-c", "1", "-W", "5", &far[0].ips()[0].to_string()])?;
        gone.del()?;
        pods[0].check()?;

        give_back(flannel)?;
        traffic.is_masqueraded()?;
        ensure!(mac(node, "flannel.1")? == was && subnet(&record(node)?) == key, "MAC address and subnet stay");
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        nothing_of_ours_is_left(node)?;
        the_record_is_flannels(node)?;
        // The pod that fabric-cni made is flannel's plugin's to detach.
        let new = node.add_pod(&format!("f{round}"))?;
        all_addresses_differ([&pods[0], &pods[1], &of_ours, &new])?;
        let ip = of_ours.ips()[0];
        of_ours.del()?;
        let taken = node.path(&format!("/var/lib/cni/networks/cbr0/{ip}"))?;
        ensure!(!taken.exists(), "its address is free");
        new.del()?;
    }
    traffic.stop()?;

    // At last the pods of the first day end, on the node that is taken over once more.
    take_over_with(flannel, None, args)?;
    for pod in pods {
        pod.del()?;
    }
    let left = fs::read_dir(node.path("/var/lib/cni/networks/cbr0")?)?.flatten();
    let left: Vec<_> = left.filter_map(|entry| entry.file_name().to_str()?.parse::<IpAddr>().ok()).collect();
    ensure!(left.is_empty(), "addresses left: {left:?}");
    ensure!(fs::read_dir(node.path("/var/lib/cni/flannel")?)?.count() == 0, "files of flannel's plugin left");
    ensure!(!node.run(&["iptables-save", "-t", "nat"])?.contains("CNI-"), "chains of pods left");
    Ok(())
}

#[test]
fn a_node_changes_hands_over_tunnels_with_forward_policy_drop() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    a_node_changes_hands(&cluster, true, rounds(2)?)
}

#[test]
fn a_dual_stack_node_changes_hands() -> Result<()> {
    let cluster = Cluster::start(Families::Dual, Options { masquerade: true, ..Options::default() })?;
    a_node_changes_hands(&cluster, true, rounds(1)?)
}

#[test]
fn a_node_with_direct_routes_and_nftables_changes_hands() -> Result<()> {
    let cluster = Cluster::start(Families::Dual, Options { masquerade: true, direct: true, nftables: true })?;
    a_node_changes_hands(&cluster, false, rounds(1)?)
}

#[test]
fn a_node_whose_cni_plugin_masquerades_each_pod_changes_hands() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options::default())?;
    a_node_changes_hands(&cluster, false, rounds(1)?)
}

/// As before Linux 6.2: `fabric.1` is an alternative name of the device then.
#[test]
fn a_node_whose_device_keeps_its_name_changes_hands() -> Result<()> {
    let cluster = Cluster::start(Families::Dual, Options { masquerade: true, ..Options::default() })?;
    a_node_changes_hands_with(&["--keep-name"], &cluster, true, rounds(2)?)?;
    let node = &cluster.flannels[0].node;
    let shown: Value = serde_json::from_str(&node.run(&["ip", "-j", "link", "show", "fabric.1"])?)?;
    ensure!(shown[0]["ifname"] == "flannel.1" && shown[0]["altnames"][0] == "fabric.1", "{shown}");
    // A daemon that starts anew finds it so, and writes nothing.
    node.stop_fabricd()?;
    node.start_fabricd_with(&[], MASQUERADE)?;
    node.wait_ready()?;
    let plan = node.run(&["fabricctl", "plan"])?;
    ensure!(plan.contains("In sync: ") && !plan.contains("ip link"), "{plan}");
    let after: Value = serde_json::from_str(&node.run(&["ip", "-j", "link", "show", "fabric.1"])?)?;
    ensure!(after == shown, "{after}");
    Ok(())
}

#[test]
fn a_node_with_a_thousand_peers_changes_hands() -> Result<()> {
    let cluster = Cluster::start_crowded(Options { masquerade: true, ..Options::default() }, 1_000)?;
    a_node_changes_hands(&cluster, false, 1)
}

/// A kind that no other test has; `FLANNEL_KIND` names another by some of these words: dual, direct, nftables, masquerade,
/// drop. `make flannel` goes through all of them.
#[test]
fn a_node_of_the_kind_that_is_asked_for_changes_hands() -> Result<()> {
    let kind = env::var("FLANNEL_KIND").unwrap_or_else(|_| "direct drop".into());
    let has = |word: &str| kind.split(' ').any(|has| has == word);
    let options = Options { nftables: has("nftables"), direct: has("direct"), masquerade: has("masquerade") };
    let cluster = Cluster::start(if has("dual") { Families::Dual } else { Families::V4 }, options)?;
    a_node_changes_hands(&cluster, has("drop"), rounds(1)?)
}

/// IPv4's tunnel takes 1450 bytes and IPv6's 1430. What `ping` is told is the packet without the headers of IP and ICMP.
#[test]
fn pods_of_both_kinds_of_nodes_exchange_full_size_packets() -> Result<()> {
    let cluster = Cluster::start(Families::Dual, Options { masquerade: true, ..Options::default() })?;
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    let before = node.add_pod("before")?;
    let (theirs, ours) = (cluster.flannels[1].node.add_pod("theirs")?, cluster.ours.add_pod("ours")?);
    take_over(flannel, None)?;
    let after = node.add_pod("after")?;
    let full_size = |from: &Pod, to: &Pod, family: Family, size: u32| {
        let (ip, payload) = (to.ip(family)?.to_string(), size - if family == Family::V4 { 28 } else { 48 });
        let ping = ["ping", "-c", "2", "-W", "2", "-M", "do", "-s", &payload.to_string(), &ip];
        wait_until(&format!("{size} bytes from {} to {}", from.full_name(), to.full_name()), SOON, || from.run(&ping))
    };
    for (from, to) in [(&theirs, &ours), (&ours, &theirs), (&before, &ours), (&after, &theirs), (&theirs, &after)] {
        full_size(from, to, Family::V4, 1450)?;
        full_size(from, to, Family::V6, 1430)?;
    }
    // A pod of ours sends nothing of IPv6 that its tunnel doesn't take, and needs no ICMP for it.
    let routes = after.run(&["ip", "-6", "route"])?;
    let by_gateway: Vec<&str> = routes.lines().filter(|route| route.contains(" via ")).collect();
    ensure!(by_gateway.len() == 2 && by_gateway.iter().all(|route| route.contains("mtu 1430")), "{routes}");
    let too_large =
        after.exec(&["ping", "-c", "1", "-W", "2", "-M", "do", "-s", "1402", &theirs.ip(Family::V6)?.to_string()])?;
    ensure!(!too_large.success() && (too_large.stdout + &too_large.stderr).contains("mtu"), "1450 bytes of IPv6");
    // On the node it may be as large as the interface.
    full_size(&after, &before, Family::V6, 1450)?;
    wait_until("doctor finds the MTU of pods of before in order", SOON, || {
        let checks = node.exec(&["fabricctl", "doctor", "-o", "json"])?.stdout;
        let mtu = checks.lines().find(|check| check.contains("\"bridge-mtu\"")).unwrap_or_default();
        ensure!(serde_json::from_str::<Value>(mtu)?["result"] == "ok", "{mtu}");
        Ok(())
    })
}

/// fabricd had it from the start, with the fast path: it becomes flannel's as if it had never been another's, and ours again.
#[test]
fn a_node_that_was_born_with_us_is_given_to_flannel_and_taken_again() -> Result<()> {
    let options = Options { masquerade: true, ..Options::default() };
    let cluster = Cluster::start(Families::Dual, options)?;
    let node = Arc::clone(&cluster.ours);
    node.stop_fabricd()?;
    node.start_fabricd_with(&["--fast-path=on"], MASQUERADE)?;
    node.wait_ready()?;
    let (pods, far) = cluster.pods(&node)?;
    wait_until("programs of the fast path are there", SOON, || {
        node.run(&["sh", "-c", "ls /sys/fs/bpf/fabric/*/links/*"])
    })?;
    let traffic = Traffic::start(&cluster.lab, &pods, &far)?;
    traffic.is_masqueraded()?;
    let (was, key) = (mac(&node, "fabric.1")?, record(&node)?);
    let key = key.lines().next().unwrap_or_default();
    let told = node.run(&["fabricd", "takeover", "--dry-run", "--no-masquerade"])?;
    ensure!(told == "this node is fabricd's: nothing is to be changed\n", "{told}");

    node.stop_fabricd()?;
    let refused = node.exec(&["fabricd", "giveback"])?;
    ensure!(!refused.success() && refused.stderr.contains("put flannel's conflist there"), "{refused:?}");
    let flannel = Flannel::install_on(&cluster.lab, &node, options)?;
    let told = node.run(&["fabricd", "giveback", "--dry-run"])?;
    ensure!(told.starts_with("- fast path: link at ingress of interface "), "{told}");
    give_back(&flannel)?;
    traffic.is_masqueraded()?;
    ensure!(mac(&node, "flannel.1")? == was && record(&node)?.starts_with(key), "MAC address and subnet stay");
    nothing_of_ours_is_left(&node)?;
    the_record_is_flannels(&node)?;
    let told = node.run(&["fabricd", "giveback", "--dry-run"])?;
    ensure!(told.starts_with("this node is flannel's: ") && told.lines().count() == 1, "{told}");
    let new = node.add_pod("new")?;
    all_addresses_differ([&pods[0], &pods[1], &new])?;

    take_over(&flannel, None)?;
    traffic.is_masqueraded()?;
    let newer = node.add_pod("newer")?;
    all_addresses_differ([&pods[0], &pods[1], &new, &newer])?;
    traffic.stop()?;
    for pod in pods.into_iter().chain([new, newer]) {
        pod.check()?;
        pod.del()?;
    }
    let held = node.run(&["find", "/var/lib/cni/networks", "/var/lib/cni/flannel", "-type", "f"])?;
    let is_kept = |file: &str| file.ends_with("/lock") || file.contains("/last_reserved_ip");
    ensure!(held.lines().all(is_kept), "{held}");
    Ok(())
}
