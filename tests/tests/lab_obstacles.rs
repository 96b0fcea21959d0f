//! What stands in a node's way is said with the way out, and when it goes away the node gets ready by itself.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, Node, Stream, wait_until};
use nix::sys::signal::Signal;

const SOON: Duration = Duration::from_secs(40);

/// Waits until the status gives this reason for not being ready; gives the whole reason.
fn reason(node: &Node, words: &str) -> Result<String> {
    wait_until(&format!("{}: {words}", node.name), SOON, || {
        let status = node.exec(&["fabricctl", "status", "-o", "json"])?;
        let status: serde_json::Value = serde_json::from_str(&status.stdout)?;
        let reason = status["reason"].as_str().unwrap_or_default().to_owned();
        ensure!(reason.contains(words), "the reason is {reason:?}\n{}", node.log_tail("fabricd"));
        Ok(reason)
    })
}

fn lab() -> Result<(Lab, Arc<Node>)> {
    let lab = Lab::builder().nodes(1).start()?;
    let node = lab.node("node-1")?.clone();
    node.stop_fabricd()?;
    node.run(&["fabricd", "--cleanup"])?;
    Ok((lab, node))
}

#[test]
fn without_etcd_a_node_names_the_endpoints_and_waits() -> Result<()> {
    let (lab, node) = lab()?;
    lab.etcd().stop()?;
    node.start_fabricd()?;
    let reason = reason(&node, "cannot reach the store at")?;
    ensure!(reason.contains(&lab.etcd().endpoints()), "{reason}");
    ensure!(node.http_get(9472, "/readyz")?.status == 503);
    ensure!(node.http_get(9472, "/healthz")?.status == 200);
    lab.etcd().start()?;
    node.wait_ready()
}

#[test]
fn without_a_network_config_a_node_says_how_to_make_one_and_refuses_one_that_cannot_work() -> Result<()> {
    let (lab, node) = lab()?;
    let key = "/coreos.com/network/config";
    lab.etcd().ctl(&["del", key])?;
    node.start_fabricd()?;
    let told = reason(&node, "there is no network config at /coreos.com/network/config")?;
    ensure!(told.contains("fabricctl network init --network 10.244.0.0/16"), "{told}");

    lab.etcd().ctl(&["put", key, r#"{"Network":"10.244.0.0/16"}"#])?;
    let told = reason(&node, "there is no Backend")?;
    ensure!(told.contains(r#"add "Backend": {"Type": "vxlan"}"#), "{told}");

    lab.etcd().ctl(&["put", key, "{"])?;
    reason(&node, "is not valid JSON")?;

    for (args, told) in [
        (&["--network", "10.99.0.0/16"][..], "overlaps 10.99.0.0/16"),
        (&["--network", "10.244.0.0/16", "--subnet-min", "10.245.0.0"], "use 10.244.1.0 to 10.244.255.0"),
        (&["--network", "10.244.0.0/16", "--backend", "host-gw"], r#"use "Backend": {"Type": "vxlan"}"#),
        (&["--network", "10.244.0.0/16"], "is there already, and says {; replace it with --force"),
    ] {
        let refused = node.exec(&[&["fabricctl", "network", "init"], args].concat())?;
        ensure!(!refused.success() && refused.stderr.contains(told), "{args:?}: {refused:?}");
    }
    node.run(&["fabricctl", "network", "init", "--network", "10.244.0.0/16", "--force"])?;
    node.wait_ready()
}

#[test]
fn a_network_config_that_flannel_runs_on_is_taken_and_what_was_masked_is_told() -> Result<()> {
    let (lab, node) = lab()?;
    let json = r#"{"Network": "10.10.10.0/16", "subnetMin": "10.10.10.0", "SubnetMax": "10.10.99.0",
        "Backend": {"Type": "VXLAN", "vni": 1}}"#;
    lab.etcd().ctl(&["put", "/coreos.com/network/config", json])?;
    node.start_fabricd()?;
    node.wait_ready()?;
    ensure!(node.subnet()?.starts_with("10.10."), "{}", node.subnet()?);
    let told = r#"the network is 10.10.0.0/16; write "Network": "10.10.0.0/16" there"#;
    let status = node.exec(&["fabricctl", "status"])?;
    ensure!(status.stdout.contains(told) && status.status.code() == Some(4), "{status:?}");
    ensure!(node.log("fabricd").contains("the network is 10.10.0.0/16"), "{}", node.log_tail("fabricd"));
    let shown = node.exec(&["fabricctl", "network", "show", "-o", "json"])?;
    let applied: serde_json::Value = serde_json::from_str(&shown.stdout)?;
    ensure!(applied["Network"] == "10.10.0.0/16" && applied["SubnetLen"] == 24, "{shown:?}");
    ensure!(shown.stderr.contains(told), "{shown:?}");
    // Written as it is told, it is the same network, and no word is left to say.
    lab.etcd().ctl(&["put", "/coreos.com/network/config", &shown.stdout])?;
    wait_until("the warning is gone", SOON, || {
        let status = node.status()?;
        ensure!(
            status["warnings"].as_array().is_none_or(Vec::is_empty)
                && status["pending"].as_array().is_none_or(Vec::is_empty),
            "{status}"
        );
        Ok(())
    })?;
    node.wait_ready()
}

#[test]
fn unknown_interface_is_answered_with_those_that_there_are() -> Result<()> {
    let (_lab, node) = lab()?;
    node.start_fabricd_with(&["--iface", "eth7"], &[])?;
    let told = reason(&node, "no interface fits --iface eth7")?;
    ensure!(told.contains("eth0 (10.99.0.11"), "{told}");
    // It waits for the interface: a bond or VLAN may come up late.
    node.run(&["ip", "link", "set", "eth0", "down"])?;
    node.run(&["ip", "link", "set", "eth0", "name", "eth7"])?;
    node.run(&["ip", "link", "set", "eth7", "up"])?;
    node.run(&["ip", "route", "add", "default", "via", "10.99.0.1"])?;
    node.wait_ready()
}

#[test]
fn missing_capability_is_named() -> Result<()> {
    let (_lab, node) = lab()?;
    let bare = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "fabricd"];
    node.start_service("fabricd", &bare, &[])?;
    wait_until("it says what it lacks", SOON, || {
        let log = node.log("fabricd");
        ensure!(log.contains("does fabricd have CAP_NET_ADMIN?"), "{log}");
        Ok(())
    })
}

#[test]
fn device_name_and_vni_taken_by_others_are_named_and_left_alone() -> Result<()> {
    let (_lab, node) = lab()?;
    node.run(&["ip", "link", "add", "other", "type", "vxlan", "id", "1", "dstport", "8472", "local", "10.99.0.11"])?;
    node.start_fabricd()?;
    let told = reason(&node, "the interface other already uses VNI 1 on UDP port 8472")?;
    ensure!(told.contains("ip link del other"), "{told}");
    let plan = node.exec(&["fabricctl", "plan"])?;
    ensure!(!plan.success() && plan.stdout.contains(&told) && !plan.stdout.contains("In sync"), "{plan:?}");
    node.run(&["ip", "link", "del", "other"])?;
    node.wait_ready()?;

    node.stop_fabricd()?;
    node.run(&["ip", "link", "del", "fabric.1"])?;
    node.run(&["ip", "link", "add", "fabric.1", "type", "vxlan", "id", "7", "dstport", "4789"])?;
    let before = node.run(&["ip", "-d", "link", "show", "fabric.1"])?;
    node.start_fabricd()?;
    reason(&node, "the interface fabric.1 exists and is not ours (vxlan with VNI 7, UDP port 4789)")?;
    ensure!(node.run(&["ip", "-d", "link", "show", "fabric.1"])? == before);
    Ok(())
}

#[test]
fn whoever_has_the_udp_port_is_named_with_what_clears_it() -> Result<()> {
    let (_lab, node) = lab()?;
    node.run(&["ip", "link", "add", "cilium_vxlan", "type", "vxlan", "external", "dstport", "8472"])?;
    node.run(&["ip", "link", "set", "cilium_vxlan", "up"])?;
    node.start_fabricd()?;
    let told = reason(&node, "UDP port 8472 is taken by the interface cilium_vxlan (vxlan, external)")?;
    let (_, remedy) = told.split_once("remove it with: ").context("no remedy")?;
    let (remedy, _) = remedy.split_once(", or choose").context("no other way")?;
    node.run(&["sh", "-ec", remedy])?;
    node.wait_ready()?;

    node.stop_fabricd()?;
    node.run(&["ip", "link", "del", "fabric.1"])?;
    // The kernel closes a device's socket a moment after the device.
    let hog = "use Socket; socket(S, AF_INET, SOCK_DGRAM, 0) or die $!;
        until (bind(S, sockaddr_in(8472, INADDR_ANY))) { select(undef, undef, undef, 0.05) } sleep 600";
    node.start_service("hog", &["perl", "-e", hog], &[])?;
    // The command of the reason shows the program.
    wait_until("the port is taken", SOON, || {
        ensure!(node.run(&["sh", "-ec", "ss -ulpn 'sport = :8472'"])?.contains("perl"), "{}", node.log_tail("hog"));
        Ok(())
    })?;
    node.start_fabricd()?;
    let told = reason(&node, "UDP port 8472 is taken by another program: see ss -ulpn 'sport = :8472'")?;
    ensure!(!told.contains("os error"), "{told}");
    node.end("hog", Signal::SIGKILL)?;
    node.wait_ready()
}

#[test]
fn no_device_comes_up_while_another_program_owns_the_table_of_its_filter() -> Result<()> {
    let (_lab, node) = lab()?;
    // It has both ends of the pipe, so it waits for more.
    let owner =
        "mkfifo /run/owner; exec 3<>/run/owner; echo 'add table inet fabric { flags owner; }' >&3; exec nft -i <&3";
    node.start_service("owner", &["sh", "-c", owner], &[])?;
    wait_until("the table is owned", SOON, || {
        ensure!(node.run(&["nft", "list", "tables"])?.contains("inet fabric"), "{}", node.log_tail("owner"));
        Ok(())
    })?;
    node.start_fabricd()?;
    let told = reason(&node, "the table inet fabric is owned by another program, with the netlink port ")?;
    ensure!(told.contains("left out while the packet filter can't be written") && told.len() < 800, "{told}");
    let (_, look) = told.split_once("(mostly its process id: ").context("no way to look")?;
    let (look, _) = look.split_once(')').context("no end")?;
    ensure!(node.run(&["sh", "-ec", look])?.contains("nft"), "{told}");
    ensure!(!node.exec(&["ip", "link", "show", "fabric.1"])?.success(), "the device is up");
    let plan = node.exec(&["fabricctl", "plan"])?;
    ensure!(!plan.success() && plan.stdout.contains("nft"), "{plan:?}");
    let reply = node.http_get(9472, "/readyz")?;
    ensure!(reply.status == 503 && reply.body.contains("is owned by another program"), "{}", reply.body);
    node.end("owner", Signal::SIGKILL)?;
    node.wait_ready()
}

/// A daemon with an etcd prefix, a network and folders of its own.
const OF_ITS_OWN: [&str; 10] = [
    "--etcd-prefix",
    "/other",
    "--node-name",
    "other",
    "--run-dir",
    "/run/other",
    "--state-dir",
    "/var/lib/other",
    "--health-addr",
    "off",
];

#[test]
fn a_second_daemon_in_a_network_namespace_is_refused_and_told_of_the_first() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?.clone();
    let (here, there) = (node.add_pod("a")?, lab.node("node-2")?.add_pod("b")?);
    let stream = Stream::start(&here, &there)?;
    let before = node.run(&["nft", "list", "ruleset"])?;
    let pid = node.run(&["pidof", "fabricd"])?;
    for args in [&[][..], &["--cleanup"], &OF_ITS_OWN, &[&OF_ITS_OWN[..], &["--cleanup"]].concat()] {
        let second = node.exec(&[&["fabricd"], args].concat())?;
        let told = format!(
            "another fabricd runs in this network namespace: pid {}, node node-1, run folder /run/fabric",
            pid.trim()
        );
        ensure!(!second.success() && second.stderr.contains(&told), "{args:?}: {second:?}");
    }
    ensure!(stream.stop()?.lost == 0);
    ensure!(
        node.run(&["nft", "list", "ruleset"])?.contains("table inet fabric") && before.contains("table inet fabric")
    );
    node.wait_ready()?;

    // What the refusal says to run shows the other one, and ends it.
    let told = node.exec(&["fabricd"])?.stderr;
    let (_, look) = told.trim().split_once("See it with: ").context("no way to look")?;
    let (look, end) = look.split_once("; end it with: ").context("no way to end it")?;
    ensure!(node.run(&["sh", "-ec", look])?.contains("node-1"));
    node.run(&["sh", "-ec", end])?;
    wait_until("it has ended", SOON, || {
        ensure!(node.service("fabricd").is_none());
        Ok(())
    })?;
    node.start_fabricd()?;
    node.wait_ready()?;

    // One that is stopped is named all the same.
    node.freeze_fabricd()?;
    let refused = node.exec(&["fabricd"])?.stderr;
    node.thaw_fabricd()?;
    ensure!(refused.contains("which holds the socket @fabricd and doesn't answer"), "{refused}");
    Ok(())
}

#[test]
fn a_second_daemon_in_a_network_namespace_of_its_own_is_fine_but_not_with_the_same_folder() -> Result<()> {
    let lab = Lab::builder().nodes(1).start()?;
    let node = lab.node("node-1")?.clone();
    node.run(&["ip", "netns", "add", "apart"])?;
    let apart = ["ip", "netns", "exec", "apart", "fabricd"];
    let same_folder = node.exec(&apart)?;
    ensure!(!same_folder.success() && same_folder.stderr.contains("give each its own --run-dir"), "{same_folder:?}");
    let socket = ["--socket", "/run/other/fabricd.sock"];
    node.start_service("apart", &[&apart[..], &OF_ITS_OWN, &socket].concat(), &[])?;
    wait_until("it answers", SOON, || {
        let status = node.exec(&["fabricctl", "status", "-o", "json", "--socket", "/run/other/fabricd.sock"])?;
        ensure!(status.stdout.contains("\"node\": \"other\""), "{status:?}\n{}", node.log_tail("apart"));
        Ok(())
    })?;
    node.wait_ready()
}

#[test]
fn no_user_keeps_the_daemon_from_starting_by_taking_the_name_of_its_lock() -> Result<()> {
    let (_lab, node) = lab()?;
    let hog = r#"use Socket; socket(S, AF_UNIX, SOCK_STREAM, 0) or die; bind(S, pack_sockaddr_un("\0fabricd")) or die $!;
        listen(S, 1) or die; sleep 600"#;
    node.start_service("hog", &["setpriv", "--reuid=65534", "--clear-groups", "perl", "-e", hog], &[])?;
    wait_until("the name is taken", SOON, || {
        ensure!(node.run(&["ss", "-xl"])?.contains("@fabricd"), "{}", node.log_tail("hog"));
        Ok(())
    })?;
    node.start_fabricd()?;
    node.wait_ready()?;
    ensure!(node.log("fabricd").contains("of user 65534"), "{}", node.log_tail("fabricd"));
    Ok(())
}

#[test]
fn forward_policy_of_drop_is_told_with_commands_that_help() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let (here, there) = (lab.node("node-1")?, lab.node("node-2")?);
    let (near, far) = (here.add_pod("a")?, there.add_pod("b")?);
    for (iptables, family) in [("iptables", Family::V4), ("ip6tables", Family::V6)] {
        let target = far.ip(family)?.to_string();
        let ping = || near.exec(&["ping", "-c", "1", "-W", "2", &target]);
        here.run(&[iptables, "-P", "FORWARD", "DROP"])?;
        ensure!(!ping()?.success(), "the policy drops nothing");
        let remedy = wait_until("the warning", Duration::from_secs(20), || {
            let status = here.status()?;
            let warnings = status["warnings"].as_array().context("a list")?;
            let warnings = warnings.iter().filter_map(|warning| warning.as_str());
            let mut remedies = warnings.filter_map(|w| w.split_once("with: ")).map(|(_, remedy)| remedy.to_owned());
            let told = remedies.find(|remedy| remedy.starts_with(iptables));
            told.context("no warning yet")
        })?;
        here.run(&["sh", "-ec", &remedy])?;
        wait_until("the ping", SOON, || {
            ensure!(ping()?.success(), "still dropped after: {remedy}");
            Ok(())
        })?;
    }
    Ok(())
}
