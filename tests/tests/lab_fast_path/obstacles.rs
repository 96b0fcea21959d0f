//! What is in its way: others' rules and programs, missing rights, another layout.

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Stream, wait_until};

use crate::{AUTO, OFF, ON, SOON, counts, pods_of_two_nodes, restart, settled, transfer};

#[test]
fn obstacles_are_told_with_the_way_out_and_cleanup_leaves_no_pin() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let node = &a.node;
    let fix = |words: &str| -> Result<String> {
        let mut fix = String::new();
        wait_until(words, SOON, || {
            let warnings = node.status()?["warnings"].to_string();
            let (_, rest) = warnings.split_once(words).with_context(|| format!("{words} is not in {warnings}"))?;
            fix = rest.split(['"', ';', ',']).next().unwrap_or_default().to_owned();
            Ok(())
        })?;
        ensure!(node.status()?["ready"].as_bool() == Some(true), "the node is not ready");
        Ok(fix)
    };
    // What is there and is something else.
    node.stop_fabricd()?;
    node.run(&["sh", "-ec", "cd /sys/fs/bpf/fabric/*/ && mv programs/pod_in_* maps/config"])?;
    node.start_fabricd_with(&[ON], &[])?;
    node.wait_ready()?;
    let way_out = fix("remove it with: ")?;
    ensure!(way_out.starts_with("rm /sys/fs/bpf/fabric/"), "{way_out}");
    let is_all_that_is_left = || {
        wait_until("the programs are taken away from what nobody can keep true", SOON, || {
            let left = node.run(&["find", "/sys/fs/bpf/fabric", "-type", "f"])?;
            ensure!(left.lines().count() == 1 && way_out.ends_with(left.trim()), "{left}");
            Ok(())
        })
    };
    is_all_that_is_left()?;
    transfer(&a, &b)?;
    node.run(&way_out.split(' ').collect::<Vec<_>>())?;
    settled(node, ON)?;
    transfer(&a, &b)?;
    // A map that is gone: programs go on with it, and nobody tells them what changes.
    node.run(&["sh", "-ec", "rm /sys/fs/bpf/fabric/*/maps/peers"])?;
    wait_until("maps and programs that belong together", SOON, || {
        node.run(&["sh", "-ec", "ls /sys/fs/bpf/fabric/*/maps/peers"]).map(drop)
    })?;
    settled(node, ON)?;
    let before = counts(node, "")?.0;
    transfer(&a, &b)?;
    // Programs with the old maps would leave the counters of the new ones as they are: zero.
    wait_until("packets that the new maps have counted", SOON, || {
        let now = counts(node, "")?.0;
        ensure!(now > 20 && now != before, "{now}");
        Ok(())
    })?;
    // No bpffs.
    node.stop_fabricd()?;
    node.run(&["umount", "/sys/fs/bpf"])?;
    node.start_fabricd_with(&[ON], &[])?;
    node.wait_ready()?;
    let way_out = fix("mount it with: ")?;
    transfer(&a, &b)?;
    node.run(&way_out.split(' ').collect::<Vec<_>>())?;
    settled(node, ON)?;
    transfer(&a, &b)?;

    node.stop_fabricd()?;
    node.run(&["fabricd", "--cleanup"])?;
    let left = node.exec(&["ls", "-R", "/sys/fs/bpf/fabric"])?;
    ensure!(!left.success(), "it left pins: {left:?}");
    Ok(())
}

/// What others load that judges, changes or encrypts packets between pods, how it goes again, and what is said of it. What
/// kube-proxy, Docker and a firewall of the host have beside it and is not about pods is there all the while.
const OTHERS: [(&str, &str, &str); 7] = [
    // Docker.
    ("iptables -P FORWARD DROP", "iptables -P FORWARD ACCEPT", "ip filter FORWARD policy drop"),
    // firewalld.
    (
        "nft add table inet firewalld
         nft add chain inet firewalld filter_FORWARD { type filter hook forward priority 10 \\; policy accept \\; }
         nft add rule inet firewalld filter_FORWARD ct state established,related accept
         nft add rule inet firewalld filter_FORWARD ct state invalid drop
         nft add rule inet firewalld filter_FORWARD ip saddr 10.244.0.0/16 accept",
        "nft delete table inet firewalld",
        "inet firewalld filter_FORWARD rule 2",
    ),
    // kube-router.
    (
        "iptables -N KUBE-ROUTER-FORWARD
         iptables -N KUBE-POD-FW-A
         iptables -A KUBE-POD-FW-A -p tcp --dport 4000 -j REJECT
         iptables -A KUBE-ROUTER-FORWARD -d 10.244.0.0/16 -j KUBE-POD-FW-A
         iptables -A FORWARD -j KUBE-ROUTER-FORWARD",
        "iptables -F KUBE-POD-FW-A",
        "ip filter KUBE-POD-FW-A rule 1",
    ),
    // Segments that are made shorter.
    (
        "iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1000",
        "iptables -t mangle -F FORWARD",
        "may change packets between pods",
    ),
    // Frames that are filtered.
    (
        "nft add table bridge others
         nft add chain bridge others forward { type filter hook forward priority 0 \\; }",
        "nft delete table bridge others",
        "the chain bridge others forward",
    ),
    (
        "ip xfrm policy add dir out src 198.51.100.1 dst 198.51.100.2 tmpl proto esp mode tunnel",
        "ip xfrm policy flush",
        "an IPsec policy is installed",
    ),
    (
        "tc qdisc add dev fabric.1 root tbf rate 1gbit burst 1mbit latency 10ms",
        "tc qdisc del dev fabric.1 root",
        "discipline tbf",
    ),
];

#[test]
fn auto_is_on_beside_kube_proxy_and_docker_and_off_while_something_judges_pods_packets() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([AUTO, ON])?;
    let node = &a.node;
    let script = |script: &str| node.run(&["sh", "-ec", script]);
    script(
        "iptables -N KUBE-FORWARD
         iptables -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
         iptables -A FORWARD -j KUBE-FORWARD
         iptables -A FORWARD -i docker0 ! -o docker0 -j DROP
         iptables -A INPUT -p tcp --dport 22 -j DROP
         iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    )?;
    settled(node, AUTO)?;
    transfer(&a, &b)?;
    let told = |what: &str| {
        wait_until(what, SOON, || {
            let status = node.status()?;
            let reason = status["fast_path"]["reason"].as_str().unwrap_or_default().to_owned();
            ensure!(status["fast_path"]["on"] != true && reason.contains(what), "{}", status["fast_path"]);
            ensure!(status["ready"] == true, "{status}");
            Ok(())
        })
    };
    // What is next comes before what was there goes, so that there is always something.
    let mut go: Option<&str> = None;
    for (come, then, what) in OTHERS {
        script(come)?;
        go.map(script).transpose()?;
        told(what)?;
        go = Some(then);
    }
    let doctor = node.run(&["fabricctl", "doctor"])?;
    ensure!(doctor.contains("left off: fabric.1 has the root queueing discipline tbf"), "{doctor}");
    let explained =
        node.run(&["fabricctl", "explain", &a.ip(Family::V4)?.to_string(), &b.ip(Family::V4)?.to_string()])?;
    ensure!(explained.contains("the kernel's: the fast path is off"), "{explained}");
    let metrics = node.http_get(9472, "/metrics")?.body;
    ensure!(metrics.contains("fabricd_fast_path{state=\"left_off\"} 1"), "{metrics}");
    let events = node.run(&["fabricctl", "events"])?;
    ensure!(events.contains("IPsec"), "{events}");
    go.map(script).transpose()?;
    settled(node, AUTO)?;
    transfer(&a, &b)?;
    let explained =
        node.run(&["fabricctl", "explain", &a.ip(Family::V4)?.to_string(), &b.ip(Family::V4)?.to_string()])?;
    ensure!(explained.contains("the fast path, for TCP and UDP"), "{explained}");
    Ok(())
}

#[test]
fn pod_of_the_bandwidth_plugin_keeps_its_limits_and_takes_the_kernels_path_alone() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([AUTO, ON])?;
    let node = &a.node;
    node.run(&["sh", "-ec", "test -e /opt/cni/bin/bandwidth || ln -s /usr/lib/cni/bandwidth /opt/cni/bin/bandwidth"])?;
    let folder = node.path("/etc/cni/net.d")?;
    let file =
        std::fs::read_dir(&folder)?.filter_map(Result::ok).map(|entry| entry.path()).next().context("a conflist")?;
    let mut conflist: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let megabits = 50_000_000;
    let limits = serde_json::json!({
        "type": "bandwidth", "ingressRate": megabits, "ingressBurst": megabits, "egressRate": megabits, "egressBurst": megabits,
    });
    conflist["plugins"].as_array_mut().context("plugins")?.push(limits);
    std::fs::write(&file, conflist.to_string())?;
    let c = node.add_pod("c")?;
    // Before the daemon has seen c there is one pod on the fast path as well.
    wait_until("c left to the kernel's path, with the reason", SOON, || {
        let path = &node.status()?["fast_path"];
        let reason = path["reason"].as_str().unwrap_or_default();
        let said = reason.contains("1 pods take the kernel's path, since their ports have queueing disciplines");
        ensure!(said && path["pods"] == 1, "{path}");
        Ok(())
    })?;
    let before = counts(node, "pod_off")?.1;
    for (from, to) in [(&c, &b), (&b, &c), (&a, &c), (&a, &b)] {
        transfer(from, to)?;
    }
    wait_until("packets that were left to the kernel", SOON, || {
        ensure!(counts(node, "pod_off")?.1 > before + 100, "{:?}", counts(node, "pod_off")?);
        Ok(())
    })?;
    let queues = node.run(&["tc", "-s", "qdisc", "show"])?;
    ensure!(queues.matches("qdisc tbf").count() == 2, "{queues}");
    Ok(())
}

#[test]
fn another_layout_is_built_beside_and_switched_and_costs_no_packet() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let node = &a.node;
    let stream = Stream::start(&a, &b)?;
    stream.wait_for(200, SOON)?;
    let layouts = || Ok::<_, anyhow::Error>(node.run(&["ls", "/sys/fs/bpf/fabric"])?.trim().to_owned());
    let ours = layouts()?;
    let become_anothers = || {
        node.stop_fabricd()?;
        node.run(&["sh", "-ec", "cd /sys/fs/bpf/fabric && mv * 999"])
    };
    // A pin that is moved keeps its number, one that is made anew has another.
    let links = || node.run(&["sh", "-ec", "cd /sys/fs/bpf/fabric/*/links && ls -i"]);
    let before = links()?;
    become_anothers()?;
    node.start_fabricd_with(&[ON], &[])?;
    settled(node, ON)?;
    wait_until("our layout alone", SOON, || {
        ensure!(layouts()? == ours, "{}", layouts()?);
        Ok(())
    })?;
    ensure!(links()? == before, "links were taken away: {before}{}", links()?);
    transfer(&a, &b)?;
    // Those of a release to come, before a downgrade that switches it off.
    become_anothers()?;
    node.start_fabricd_with(&[OFF], &[])?;
    settled(node, OFF)?;
    transfer(&a, &b)?;
    stream.wait_for(200, SOON)?;
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");
    Ok(())
}

#[test]
fn without_capabilities_the_node_is_ready_and_says_which_it_lacks() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([OFF, ON])?;
    let node = &a.node;
    node.stop_fabricd()?;
    let script = "printf '#!/bin/sh\nexec setpriv --bounding-set=-bpf,-perfmon,-sys_admin fabricd --fast-path=on\n' \
                  >/run/without-bpf && chmod +x /run/without-bpf";
    node.run(&["sh", "-ec", script])?;
    node.start_this_fabricd("/run/without-bpf")?;
    node.wait_ready()?;
    wait_until("the capabilities are named", SOON, || {
        let warnings = node.status()?["warnings"].to_string();
        ensure!(warnings.contains("does fabricd have CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN"), "{warnings}");
        Ok(())
    })?;
    let doctor = node.exec(&["fabricctl", "doctor"])?.stdout;
    ensure!(doctor.contains("off, packets take the kernel's path"), "{doctor}");
    transfer(&a, &b)?;
    restart(node, ON)?;
    settled(node, ON)
}
