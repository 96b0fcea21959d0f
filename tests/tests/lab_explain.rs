//! `fabricctl explain` in the Lab: what it reads on both nodes, and the packets that it sends.

use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_core::model::Family;
use fabric_tests::lab::{Lab, Node, wait_until};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(40);

fn bundle_has_no_secret(node: &Node) -> Result<()> {
    node.exec(&["fabricctl", "doctor", "--quiet", "--bundle", "/run/bundle.tar"])?;
    let names = node.run(&["tar", "tf", "/run/bundle.tar"])?;
    for name in
        ["checks.json", "status.json", "leases.json", "mesh.json", "kernel.json", "events.json", "files/process"]
    {
        assert!(names.contains(&format!("fabricd/{name}")), "{name} in {names}");
    }
    for command in ["ip-link", "ip-address", "ip-route-4", "ip-rule-4", "nft-ruleset", "iptables-save", "sysctl", "log"]
    {
        assert!(names.contains(&format!("fabricd/host/{command}.txt")), "{command} in {names}");
    }
    let all = node.run(&["tar", "xfO", "/run/bundle.tar"])?;
    node.run(&["rm", "/run/bundle.tar"])?;
    assert!(all.contains("/var/lib/fabric-api/node.crt"), "the check of certificates is in it");
    let secret = node.run(&["cat", "/var/lib/fabric-api/node.key"])?;
    let mut lines = secret.lines().filter(|line| !line.starts_with("---"));
    let leaked = lines.find(|line| all.contains(line));
    assert!(leaked.is_none() && !all.contains("PRIVATE KEY"), "{leaked:?} is in the bundle");
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
        (
            "node-1",
            &["bridge", "veth", "lease", "route", "nexthop", "neighbour", "fdb", "filter", "underlay", "packet"][..],
        ),
        ("node-2", &["filter", "device", "bridge", "veth", "route", "packet"]),
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
    assert!(hop["found"].as_str().is_some_and(|found| found.contains("by the route unreachable")), "{hop}");
    let fix = hop["expected"].as_str().and_then(|fix| fix.lines().last()).context("a fix")?;
    here.run(&["sh", "-c", fix])?;

    // On the other one: the pod's veth is taken off the bridge.
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
    let (_, path) = explained(here, &from, &to)?;
    assert!(path["missing"].as_str().unwrap_or_default().contains("node-2 was not asked"), "{path}");
    Ok(())
}

/// The last hop: the ping from the pod.
fn ping(path: &Value) -> &Value {
    path["hops"].as_array().and_then(|hops| hops.last()).unwrap_or(&Value::Null)
}

fn explained(node: &Node, from: &str, to: &str) -> Result<(Option<i32>, Value)> {
    let output = node.exec(&["fabricctl", "explain", from, to, "-o", "json"])?;
    let path = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
    Ok((output.status.code(), path))
}

#[test]
fn packet_that_is_lost_is_never_explained_as_fine() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (here, there) = (lab.node("node-1")?, lab.node("node-2")?);
    let (a, b) = (here.add_pod("a")?, there.add_pod("b")?);
    let (from, to) = (a.ip(Family::V4)?.to_string(), b.ip(Family::V4)?.to_string());
    let fine = || {
        wait_until("all is fine", SOON, || {
            let (code, path) = explained(here, &from, &to)?;
            anyhow::ensure!(code == Some(0) && ping(&path)["result"] == "ok", "{path:#}");
            Ok(())
        })
    };
    fine()?;
    // Chains of others whose policy is accept; the last one is shaped as firewalld's.
    for (node, rules, said) in [
        (here, "ip saddr 10.244.0.0/16 drop".to_owned(), "no answer"),
        (there, format!("ip daddr {to} drop"), "no answer"),
        (here, format!("ip saddr {from} ip daddr {to} counter drop"), "no answer"),
        (
            there,
            "ct state { established, related } accept; ct state invalid drop; reject with icmpx type admin-prohibited"
                .to_owned(),
            "administratively prohibited",
        ),
        (here, "meta l4proto icmp jump deeper".to_owned(), "no answer"),
    ] {
        let table = format!(
            "table inet foreign {{\nchain deeper {{\ndrop\n}}\nchain f {{\ntype filter hook forward priority 10; policy \
             accept;\n{}\n}}\n}}\n",
            rules.replace("; ", "\n")
        );
        node.command(&["nft", "-f", "-"])?.stdin(table).run()?;
        let (code, path) = explained(here, &from, &to)?;
        assert_eq!((code, &ping(&path)["result"]), (Some(4), &"failed".into()), "{rules}: {path:#}");
        assert!(ping(&path)["found"].as_str().is_some_and(|found| found.contains(said)), "{rules}: {path:#}");
        let text = here.exec(&["fabricctl", "explain", &from, &to])?;
        assert!(text.stdout.contains("Here packets are lost"), "{text:?}");
        node.run(&["nft", "delete", "table", "inet", "foreign"])?;
        fine()?;
    }

    // The pod's interface is down: named on its node, with the commands that bring it up again.
    there.run(&["ip", "-n", "b", "link", "set", "eth0", "down"])?;
    let (code, hop) = divergence(here, &from, &to)?;
    assert_eq!((code, &hop["node"], &hop["layer"]), (Some(4), &"node-2".into(), &"veth".into()), "{hop:#}");
    for line in hop["expected"].as_str().context("a fix")?.lines() {
        there.run(&["sh", "-c", line])?;
    }
    fine()?;

    // A policy rule overrides our route.
    here.run(&["ip", "route", "add", "prohibit", "default", "table", "100"])?;
    here.run(&["ip", "rule", "add", "from", "10.244.0.0/16", "lookup", "100"])?;
    let (_, path) = explained(here, &from, &to)?;
    let hops = path["hops"].as_array().context("hops")?;
    let route = hops.iter().find(|hop| hop["layer"] == "route" && hop["result"] == "failed").context("a route")?;
    assert!(route["found"].as_str().is_some_and(|found| found.contains("from 10.244.0.0/16 lookup 100")), "{route}");
    let fix = route["expected"].as_str().and_then(|fix| fix.lines().last()).context("a fix")?;
    here.run(&["sh", "-c", fix])?;
    fine()?;

    // Addresses that no pod has, in a node's subnet and in nobody's.
    let (subnet, _) = to.rsplit_once('.').context("an address")?;
    for (nobody, layer) in [(format!("{subnet}.200"), "veth"), ("10.244.255.200".to_owned(), "lease")] {
        let (code, hop) = divergence(here, &from, &nobody)?;
        assert_eq!((code, &hop["layer"]), (Some(4), &layer.into()), "{nobody}: {hop:#}");
    }
    Ok(())
}

#[test]
fn half_that_was_not_seen_is_said_and_is_not_fine() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (here, there) = (lab.node("node-1")?, lab.node("node-2")?);
    here.stop_fabricd()?;
    here.start_fabricd_with(&["--api-addr", "off"], &[])?;
    here.wait_ready()?;
    let (a, b) = (here.add_pod("a")?, there.add_pod("b")?);
    let (from, to) = (a.ip(Family::V4)?.to_string(), b.ip(Family::V4)?.to_string());
    wait_until("the packet is answered, and the other half is missed", SOON, || {
        let (code, path) = explained(here, &from, &to)?;
        anyhow::ensure!(code == Some(4) && ping(&path)["result"] == "ok", "{path:#}");
        anyhow::ensure!(path["missing"].as_str().is_some_and(|why| why.contains("node-2 was not asked")), "{path:#}");
        Ok(())
    })?;
    // Between pods of one node there is no other half.
    let c = here.add_pod("c")?;
    let (code, path) = explained(here, &from, &c.ip(Family::V4)?.to_string())?;
    assert_eq!((code, &path["missing"]), (Some(0), &"".into()), "{path:#}");
    Ok(())
}

#[test]
fn path_out_of_the_network_follows_the_default_route_and_masquerade() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    let pod = node.add_pod("a")?;
    let from = pod.ip(Family::V4)?.to_string();
    node.stop_fabricd()?;
    node.start_fabricd_with(&["--ip-masq=false"], &[])?;
    node.wait_ready()?;
    // etcd's machine is outside, and knows no pods.
    let (code, path) = explained(node, &from, "10.99.0.2")?;
    assert_eq!((code, &ping(&path)["result"]), (Some(4), &"failed".into()), "{path:#}");
    let text = node.exec(&["fabricctl", "explain", &from, "10.99.0.2"])?;
    assert!(text.stdout.contains("Here packets are lost: masquerade of node-1: off"), "{text:?}");
    assert_eq!(explained(node, &from, &node.underlay_ip(Family::V4).to_string())?.0, Some(0), "this node itself");

    node.stop_fabricd()?;
    node.start_fabricd_with(&["--ip-masq"], &[])?;
    node.wait_ready()?;
    wait_until("the outside answers", SOON, || {
        let (code, path) = explained(node, &from, "10.99.0.2")?;
        anyhow::ensure!(code == Some(0) && ping(&path)["result"] == "ok", "{path:#}");
        let masquerade = path["hops"].as_array().into_iter().flatten().find(|hop| hop["layer"] == "masquerade");
        let found = masquerade.and_then(|hop| hop["found"].as_str()).context("masquerade")?;
        anyhow::ensure!(found == "on: it leaves eth0 with 10.99.0.11 as source", "{found}");
        Ok(())
    })?;
    // Nothing leads there; and a Service's address is known for one.
    node.run(&["ip", "route", "del", "default"])?;
    let (code, hop) = divergence(node, &from, "192.0.2.1")?;
    assert_eq!((code, &hop["layer"]), (Some(4), &"route".into()), "{hop:#}");
    let service = "table ip nat {\nchain KUBE-SERVICES {\nip daddr 10.96.0.10 udp dport 53 counter return\n}\n}\n";
    node.command(&["nft", "-f", "-"])?.stdin(service).run()?;
    let (code, path) = explained(node, &from, "10.96.0.10")?;
    assert_eq!(code, Some(4), "a Service is not followed: {path:#}");
    let service = path["hops"].as_array().into_iter().flatten().any(|hop| hop["layer"] == "service");
    assert!(service && path["missing"].as_str().is_some_and(|why| why.contains("kube-proxy")), "{path:#}");
    Ok(())
}

#[test]
fn with_the_rights_of_the_package_alone_both_daemons_send() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (here, there) = (lab.node("node-1")?, lab.node("node-2")?);
    for node in [here, there] {
        let pid = node.running_service("fabricd")?.pid;
        let args = std::fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        node.stop_fabricd()?;
        let few = ["setpriv", "--bounding-set=-all,+net_admin,+dac_override", "--"];
        let args: Vec<&str> = few.into_iter().chain(args.split_terminator('\0')).collect();
        node.start_service("fabricd", &args, &[])?;
        node.wait_ready()?;
    }
    let (a, b) = (here.add_pod("a")?, there.add_pod("b")?);
    let (from, to) = (a.ip(Family::V4)?.to_string(), b.ip(Family::V4)?.to_string());
    let explain = || {
        let few = ["setpriv", "--bounding-set=-all,+net_admin,+dac_override", "--", "fabricctl", "explain"];
        let output = here.exec(&[&few[..], &[&from, &to, "-o", "json"]].concat())?;
        let path: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        anyhow::Ok((output.status.code(), path))
    };
    wait_until("the daemons' packets are answered, so no half is missing", SOON, || {
        let (code, path) = explain()?;
        let packets = path["hops"].as_array().into_iter().flatten().filter(|hop| hop["layer"] == "packet").count();
        anyhow::ensure!((code, packets) == (Some(0), 4), "{path:#}");
        Ok(())
    })?;
    for node in [here, there] {
        let table = "table inet foreign {\nchain f {\ntype filter hook forward priority 10; policy accept;\n\
                     ip saddr 10.244.0.0/16 drop\n}\n}\n";
        node.command(&["nft", "-f", "-"])?.stdin(table).run()?;
        let (code, path) = explain()?;
        assert_eq!(code, Some(4), "{}: {path:#}", node.name);
        node.run(&["nft", "delete", "table", "inet", "foreign"])?;
    }
    Ok(())
}
