//! What a node shows of itself, in the Lab: fabricctl on a daemon that works.

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, Node, wait_until};
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
    // Whether node-2 was there already when the leases were first listed is chance.
    let events = node.run(&["fabricctl", "events"])?;
    assert!(events.contains("node-2 added: ") || events.contains("1 peer is known"), "{events}");

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
    node.start_fabricd_with(&["--log-format", "json"], &[])?;
    wait_until("a daemon without a store is not ready", SOON, || {
        anyhow::ensure!(node.exec(&["fabricctl", "status"])?.status.code() == Some(3));
        Ok(())
    })?;
    let log = node.log("fabricd");
    let last: Value = serde_json::from_str(log.lines().last().context("a line")?).context(log.clone())?;
    assert!(last["level"].is_string() && last["fields"]["message"].is_string(), "{last}");
    Ok(())
}

/// A check of the doctor, by its name.
fn check(node: &Node, id: &str) -> Result<Value> {
    let output = node.exec(&["fabricctl", "doctor", "-o", "json"])?;
    let checks = output.stdout.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    checks.into_iter().find(|check| check["id"] == id).with_context(|| format!("no check {id} in {output:?}"))
}

fn wait_for_check(node: &Node, id: &str, result: &str) -> Result<()> {
    wait_until(&format!("{id} is {result}"), SOON, || {
        let check = check(node, id)?;
        anyhow::ensure!(check["result"] == result, "{check}");
        let fix = check["fix"].as_str().unwrap_or_default();
        anyhow::ensure!(fix.is_empty() == ["ok", "skipped"].contains(&result), "{check}");
        Ok(())
    })
}

#[test]
fn doctor_finds_what_was_broken_and_nothing_before() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?;
    let pod = node.add_pod("a")?;
    for id in
        ["ready", "store", "lease", "kernel-state", "udp-port", "underlay-mtu", "mac", "duplicates", "peers", "mesh"]
            .into_iter()
            .chain([
                "forward-drop",
                "filter-drops",
                "forwarding",
                "bridge",
                "bridge-mtu",
                "addresses",
                "overlap",
                "disk",
            ])
    {
        wait_for_check(node, id, "ok")?;
    }

    node.command(&["nft", "-f", "-"])?
        .stdin("table ip filter {\nchain FORWARD {\ntype filter hook forward priority 0; policy drop;\n}\n}\n")
        .run()?;
    wait_for_check(node, "forward-drop", "failed")?;
    node.run(&["nft", "delete", "table", "ip", "filter"])?;

    node.run(&["ip", "link", "add", "vxlan99", "type", "vxlan", "id", "99", "dstport", "4789", "local", "127.0.0.1"])?;
    wait_for_check(node, "foreign-vxlan", "warning")?;
    node.run(&["ip", "link", "set", "cni0", "mtu", "1400"])?;
    let mut port = pod.result()["interfaces"].as_array().into_iter().flatten().filter_map(|i| i["name"].as_str());
    let port = port.find(|name| name.starts_with("veth")).context("a veth")?.to_owned();
    node.run(&["ip", "link", "set", &port, "mtu", "1500"])?;
    wait_for_check(node, "bridge-mtu", "failed")?;
    node.run(&["ip", "link", "del", &port])?;
    wait_for_check(node, "addresses", "warning")?;

    let address = node.run(&["ip", "-4", "-brief", "address", "show", "cni0"])?;
    let address = address.split_whitespace().nth(2).context("an address")?.to_owned();
    node.run(&["ip", "address", "replace", "10.244.250.1/24", "dev", "cni0"])?;
    node.run(&["ip", "address", "del", &address, "dev", "cni0"])?;
    wait_for_check(node, "bridge", "failed")?;

    node.run(&["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/var/lib/cni/networks"])?;
    wait_for_check(node, "disk", "failed")?;

    // While the device is down somebody takes its port.
    node.freeze_fabricd()?;
    node.run(&["ip", "link", "del", "fabric.1"])?;
    let socket = node.spaces()?.run(|| Ok(UdpSocket::bind("0.0.0.0:8472")?))?;
    node.thaw_fabricd()?;
    wait_for_check(node, "udp-port", "failed")?;
    drop(socket);
    wait_for_check(node, "udp-port", "ok")?;

    lab.etcd().stop()?;
    wait_for_check(node, "store", "failed")?;

    Ok(())
}

fn bundle_has_no_secret(node: &Node) -> Result<()> {
    node.exec(&["fabricctl", "doctor", "--quiet", "--bundle", "/tmp/bundle.tar"])?;
    let names = node.run(&["tar", "tf", "/tmp/bundle.tar"])?;
    for name in ["checks", "status", "leases", "mesh", "kernel", "events"] {
        assert!(names.contains(&format!("fabricd/{name}.json")), "{names}");
    }
    let all = node.run(&["tar", "xfO", "/tmp/bundle.tar"])?;
    node.run(&["rm", "/tmp/bundle.tar"])?;
    assert!(all.contains("/var/lib/fabric-api/node.crt"), "the check of certificates is in it");
    let secret = node.run(&["cat", "/var/lib/fabric-api/node.key"])?;
    let mut lines = secret.lines().filter(|line| !line.starts_with("---"));
    let leaked = lines.find(|line| all.contains(line));
    assert!(leaked.is_none() && !all.to_lowercase().contains("password"), "{leaked:?} is in the bundle");
    Ok(())
}

/// Nobody has set anything up for it: neither an address nor certificates.
#[test]
fn all_nodes_can_be_asked_out_of_the_box_in_every_family() -> Result<()> {
    for families in Families::ALL {
        let lab = Lab::builder().name(&format!("lab_see.all-{families:?}")).nodes(2).families(families).start()?;
        for command in ["status", "mesh", "doctor"] {
            wait_until("both nodes answer", SOON, || {
                let all = lab.node("node-1")?.exec(&["fabricctl", command, "--all", "--node-timeout", "10000"])?.stdout;
                anyhow::ensure!(all.contains("2 of 2 answered"), "{families}: {command}: {all}");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// The first hop that is wrong, and the exit code.
fn divergence(node: &Node, from: &str, to: &str) -> Result<(Option<i32>, Value)> {
    let output = node.exec(&["fabricctl", "explain", from, to, "-o", "json"])?;
    let way: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    let first = way["hops"].as_array().into_iter().flatten().find(|hop| hop["result"] == "failed").cloned();
    Ok((output.status.code(), first.unwrap_or(way)))
}

#[test]
fn explain_follows_a_packet_on_both_nodes_and_marks_where_it_is_lost() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (here, there) = (lab.node("node-1")?, lab.node("node-2")?);
    let (a, b) = (here.add_pod("a")?, there.add_pod("b")?);
    let (from, to) = (a.ip(Family::V4)?.to_string(), b.ip(Family::V4)?.to_string());

    let fine = wait_until("nothing is wrong, on either node", SOON, || {
        let (code, way) = divergence(here, &from, &to)?;
        anyhow::ensure!(code == Some(0), "{way:#}");
        Ok(way)
    })?;
    assert_eq!(fine["missing"], "", "the other node was asked");
    let hops: Vec<_> = fine["hops"].as_array().into_iter().flatten().collect();
    let layers =
        |node: &str| hops.iter().filter(|h| h["node"] == node).filter_map(|h| h["layer"].as_str()).collect::<Vec<_>>();
    for (node, wants) in [
        ("node-1", &["bridge", "veth", "lease", "route", "nexthop", "neighbour", "fdb", "filter", "underlay"][..]),
        ("node-2", &["filter", "device", "bridge", "veth", "route"]),
    ] {
        for layer in wants {
            assert!(layers(node).contains(layer), "{layer} of {node} in {fine:#}");
        }
    }

    // What is packed for others has the certificate's end in it, and nothing of the key.
    bundle_has_no_secret(here)?;

    // On this node: somebody leads the packets elsewhere.
    here.run(&["ip", "route", "add", "unreachable", &format!("{to}/32")])?;
    let (code, hop) = divergence(here, &from, &to)?;
    assert_eq!((code, &hop["node"], &hop["layer"]), (Some(4), &"node-1".into(), &"route".into()), "{hop}");
    here.run(&["ip", "route", "del", "unreachable", &format!("{to}/32")])?;

    // On the other one: the pod's cable is pulled.
    let mut port = b.result()["interfaces"].as_array().into_iter().flatten().filter_map(|i| i["name"].as_str());
    let port = port.find(|name| name.starts_with("veth")).context("a veth")?.to_owned();
    there.run(&["ip", "link", "set", &port, "nomaster"])?;
    wait_until("the other node says so", SOON, || {
        let (_, hop) = divergence(here, &from, &to)?;
        anyhow::ensure!((&hop["node"], &hop["layer"]) == (&"node-2".into(), &"veth".into()), "{hop}");
        Ok(())
    })?;

    // All nodes answer, and one that doesn't is told of.
    let all = here.exec(&["fabricctl", "status", "--all"])?.stdout;
    assert!(all.contains("node-1") && all.contains("node-2"), "{all}");
    there.kill_fabricd()?;
    let part = here.exec(&["fabricctl", "status", "--all"])?;
    assert_eq!(part.status.code(), Some(4), "{part:?}");
    assert!(part.stdout.contains("no answer") && part.stdout.contains("1 of 2 answered"), "{part:?}");
    let (_, way) = divergence(here, &from, &to)?;
    assert!(way["missing"].as_str().unwrap_or_default().contains("node-2 was not asked"), "{way}");
    Ok(())
}
