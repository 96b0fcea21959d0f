//! What a node shows of itself, in the Lab: fabricctl on a daemon that works.

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, Node, Pod, addresses, wait_until};
use nix::sys::signal::Signal;
use serde_json::Value;

const SOON: Duration = Duration::from_secs(40);

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
    let entries: Vec<String> = entries("actual").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let routes = node.run(&["ip", "-4", "route", "show", "proto", "250"])?;
    for route in routes.lines().filter_map(|line| line.split(' ').next()) {
        assert!(entries.iter().any(|entry| entry.contains(&format!("route add {route} "))), "{route} in {entries:#?}");
    }
    assert_eq!(kernel["actual"]["routes"], routes.lines().count());

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
    node.start_fabricd_with(&["--log-format", "json"], &[("FABRICD_API_CAFILE", "/run/no-ca.crt")])?;
    wait_until("the file is named that the API lacks", SOON, || {
        anyhow::ensure!(node.log("fabricd").contains("cannot read /run/no-ca.crt"));
        Ok(())
    })?;
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
                "foreign-input",
                "foreign-forward",
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

    // Who may not ask the daemon is told so, and not that it hangs.
    let nobody = node.exec(&["setpriv", "--reuid=65534", "--clear-groups", "fabricctl", "doctor"])?;
    assert!(nobody.status.code() == Some(1) && nobody.stdout.is_empty(), "{nobody:?}");
    assert!(nobody.stderr.contains("cannot ask the daemon") && nobody.stderr.contains("use sudo"), "{nobody:?}");

    node.command(&["nft", "-f", "-"])?
        .stdin("table ip filter {\nchain FORWARD {\ntype filter hook forward priority 0; policy drop;\n}\n}\n")
        .run()?;
    wait_for_check(node, "foreign-forward", "failed")?;
    node.run(&["nft", "delete", "table", "ip", "filter"])?;

    node.run(&["ip", "link", "add", "vxlan99", "type", "vxlan", "id", "99", "dstport", "4789", "local", "127.0.0.1"])?;
    wait_for_check(node, "foreign-vxlan", "warning")?;
    node.run(&["ip", "link", "set", "cni0", "mtu", "1400"])?;
    let port = veth(&pod)?;
    node.run(&["ip", "link", "set", &port, "mtu", "1500"])?;
    wait_for_check(node, "bridge-mtu", "failed")?;
    node.run(&["ip", "link", "del", &port])?;
    wait_for_check(node, "pod-ports", "failed")?;
    node.run(&["ip", "netns", "del", "a"])?;
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

#[test]
fn state_of_dual_stack_peers_and_leases_is_seen_on_a_terminal_of_80_columns() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let node = lab.node("node-1")?;
    wait_until("node-1 has programmed node-2", SOON, || node.run(&["fabricctl", "peers"]).map(drop))?;
    for (command, state) in [
        (&["status"][..], "programmed"),
        (&["peers"], "programmed"),
        (&["leases"], "held"),
        (&["lease", "list"], "held"),
        (&["mesh"], "fine"),
    ] {
        wait_until("it is seen", SOON, || {
            let shown = node.command(&[&["fabricctl"], command].concat())?.env("COLUMNS", "80").output()?.stdout;
            let mut table = shown.lines().skip_while(|line| !line.contains("SUBNET") && !line.contains("VERDICT"));
            let table: Vec<&str> = table.by_ref().take_while(|line| !line.is_empty()).collect();
            anyhow::ensure!(table.iter().all(|line| line.chars().count() <= 80), "{command:?}:\n{shown}");
            let of_peer = table.iter().find(|line| line.starts_with("node-2 ")).copied().unwrap_or_default();
            anyhow::ensure!(of_peer.split_whitespace().any(|word| word == state), "{command:?}: {state}:\n{shown}");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn support_bundle_shows_routes_rules_firewalls_settings_log_and_versions() -> Result<()> {
    let lab = Lab::builder().nodes(1).start()?;
    let node = lab.node("node-1")?;
    let by_hand = "ip route add 198.51.100.0/24 dev lo table 77; ip rule add priority 777 lookup 77
        nft add table inet by_hand; iptables -A OUTPUT -s 198.51.100.7; mkdir -p /etc/fabric
        echo 'etcd_endpoints = [\"http://root:hunter2@192.0.2.1:2379\"]' >/etc/fabric/fabricd.toml";
    node.run(&["sh", "-ec", by_hand])?;
    node.exec(&["fabricctl", "doctor", "--quiet", "--bundle", "/run/bundle.tar"])?;
    for (file, holds) in [
        ("host/ip-link.txt", "fabric.1"),
        ("host/ip-route-4.txt", "198.51.100.0/24 dev lo table 77"),
        ("host/ip-rule-4.txt", "777:\tfrom all lookup 77"),
        ("host/nft-ruleset.txt", "table inet by_hand"),
        ("host/iptables-save.txt", "-A OUTPUT -s 198.51.100.7/32"),
        ("host/sysctl.txt", "net.ipv4.ip_forward = 1"),
        ("host/log.txt", "fabricd starts"),
        ("host/kernel.txt", "Linux"),
        ("files/settings.toml", "etcd_endpoints = [\"http://(left out)@192.0.2.1:2379\"]"),
        ("files/process", "FABRICD_ETCD_ENDPOINTS="),
        ("files/os-release", "NAME="),
        ("version", concat!("fabricctl ", env!("CARGO_PKG_VERSION"))),
    ] {
        let shown = node.run(&["tar", "xfO", "/run/bundle.tar", &format!("fabricd/{file}")])?;
        assert!(shown.contains(holds), "{holds:?} in {file}:\n{shown}");
    }
    node.run(&["rm", "/run/bundle.tar"])?;
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
        lab.node("node-2")?.kill_fabricd()?;
        let all = lab.node("node-1")?.exec(&["fabricctl", "status", "--all"])?;
        anyhow::ensure!(all.status.code() == Some(4), "{families}: {all:?}");
        anyhow::ensure!(all.stdout.contains("port 9473: Connection refused (ECONNREFUSED)"), "{families}: {all:?}");
    }
    Ok(())
}

/// The checks that a command makes, by their names, and its exit code.
fn checks(node: &Node, args: &[&str]) -> Result<(Option<i32>, BTreeMap<String, Value>)> {
    let output = node.exec(&[&["fabricctl", "doctor", "-o", "json"], args].concat())?;
    let checks = output.stdout.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let by_name = checks.into_iter().map(|check| (check["id"].as_str().unwrap_or_default().to_owned(), check));
    Ok((output.status.code(), by_name.collect()))
}

fn is(checks: &BTreeMap<String, Value>, id: &str, result: &str, evidence: &str) -> Result<()> {
    let check = checks.get(id).with_context(|| format!("no check {id} in {checks:#?}"))?;
    let found = check["evidence"].as_str().unwrap_or_default();
    anyhow::ensure!(check["result"] == result && found.contains(evidence), "{check:#}");
    Ok(())
}

/// Runs the commands of a fix: those of its lines that begin with a program.
fn run_fix(node: &Node, id: &str) -> Result<()> {
    let check = check(node, id)?;
    let fix = check["fix"].as_str().unwrap_or_default();
    let command =
        |line: &&str| ["ip ", "nsenter ", "mkdir ", "printf ", "mv ", "sysctl "].iter().any(|p| line.starts_with(p));
    let commands: Vec<&str> = fix.lines().filter(command).collect();
    anyhow::ensure!(!commands.is_empty(), "nothing to run in {check:#}");
    for line in commands {
        node.run(&["sh", "-c", line])?;
    }
    Ok(())
}

#[test]
fn each_fix_of_doctor_clears_what_it_was_printed_for() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?;
    let (pod, other) = (node.add_pod("a")?, lab.node("node-2")?.add_pod("b")?);
    let port = veth(&pod)?;
    let subnet = node.status()?["lease"]["subnets"][0].as_str().context("a subnet")?.to_owned();
    let gateway = subnet.replace("0/24", "1/24");
    let peer = other.ip(Family::V4)?.to_string();
    let hidden = peer.rsplit_once('.').context("an address")?.0.to_owned() + ".0/26";
    node.run(&["mount", "-t", "tmpfs", "tmpfs", "/etc/cni/net.d"])?;
    node.run(&["sh", "-c", "echo '{\"type\":\"fabric-cni\"}' > /etc/cni/net.d/10-fabric.conflist"])?;
    for (id, result, damage) in [
        ("pod-ports", "failed", format!("ip link set {port} nomaster")),
        ("pod-ports", "failed", format!("ip link set {port} down")),
        ("pod-ports", "failed", "ip -n a link set eth0 down".to_owned()),
        ("bridge", "failed", "ip link set cni0 down".to_owned()),
        ("bridge", "failed", format!("ip address del {gateway} dev cni0")),
        ("overlap", "failed", format!("ip route add blackhole {hidden} proto bird")),
        ("foreign-vxlan", "warning", "ip link add vxlan99 type vxlan id 99 dstport 4789 local 127.0.0.1".to_owned()),
        ("cni-config", "failed", "echo '{}' > /etc/cni/net.d/05-cilium.conflist".to_owned()),
        (
            "udev",
            "failed",
            "printf '[Match]\\nDriver=vxlan\\n\\n[Link]\\nMACAddressPolicy=random\\n' > /etc/systemd/network/10-vxlan.link"
                .to_owned(),
        ),
    ] {
        wait_for_check(node, id, "ok")?;
        node.run(&["sh", "-c", &damage])?;
        wait_for_check(node, id, result).with_context(|| damage.clone())?;
        run_fix(node, id).with_context(|| damage.clone())?;
        wait_for_check(node, id, "ok").with_context(|| damage.clone())?;
    }
    wait_until("the pods reach each other again", SOON, || pod.run(&["ping", "-c1", "-W1", &peer]).map(drop))
}

#[test]
fn a_bridge_whose_packets_pass_iptables_by_is_cleared_by_its_fix() -> Result<()> {
    let lab = Lab::builder().nodes(1).start()?;
    let node = lab.node("node-1")?;
    wait_for_check(node, "br-netfilter", "ok")?;
    node.run(&["sh", "-c", "echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables"])?;
    wait_for_check(node, "br-netfilter", "warning")?;
    run_fix(node, "br-netfilter")?;
    wait_for_check(node, "br-netfilter", "ok")
}

/// sysctl takes a dot in a name for a slash, unless the first separator is one.
#[test]
fn strict_filter_beside_direct_routes_is_cleared_by_its_fix_on_a_device_with_a_dot_in_its_name() -> Result<()> {
    let lab = Lab::builder().nodes(2).network(&["--network", "10.244.0.0/16", "--direct-routing"]).start()?;
    let node = lab.node("node-1")?;
    node.stop_fabricd()?;
    let gateway = addresses::gateway(Family::V4);
    let rename = format!(
        "ip link set eth0 down; ip link set eth0 name eth0.9; ip link set eth0.9 up
         ip route replace default via {gateway} dev eth0.9"
    );
    node.run(&["sh", "-ec", &rename])?;
    node.start_fabricd()?;
    node.wait_ready()?;
    wait_for_check(node, "rp-filter", "ok")?;
    node.run(&["sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0.9/rp_filter"])?;
    wait_for_check(node, "rp-filter", "warning")?;
    run_fix(node, "rp-filter")?;
    wait_for_check(node, "rp-filter", "ok")
}

/// The host's end of a pod's veth.
fn veth(pod: &Pod) -> Result<String> {
    let mut names = pod.result()["interfaces"].as_array().into_iter().flatten().filter_map(|i| i["name"].as_str());
    names.find(|name| name.starts_with("veth")).context("a veth").map(str::to_owned)
}

#[test]
fn device_of_another_overlay_is_the_first_finding_and_its_fix_makes_the_node_ready() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    node.stop_fabricd()?;
    node.run(&["ip", "link", "del", "fabric.1"])?;
    node.run(&["ip", "link", "add", "cilium_vxlan", "type", "vxlan", "external", "dstport", "8472"])?;
    node.run(&["ip", "link", "set", "cilium_vxlan", "up"])?;
    node.start_fabricd()?;
    // Until the daemon answers doctor checks by itself, and begins with that.
    wait_until("the device is the first finding", SOON, || {
        let first = node.exec(&["fabricctl", "doctor", "--quiet"])?.stdout;
        let words: Vec<&str> = first.split_whitespace().take(2).collect();
        anyhow::ensure!(words == ["FAILED", "foreign-vxlan"], "{first}");
        let finding = "other overlays: cilium_vxlan (Cilium) has our UDP port";
        anyhow::ensure!(first.lines().next().is_some_and(|line| line.contains(finding)), "{first}");
        Ok(())
    })?;
    run_fix(node, "foreign-vxlan")?;
    node.wait_ready()
}

#[test]
fn without_a_daemon_doctor_says_what_stands_and_what_to_do() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?;
    let pod = node.add_pod("a")?;
    wait_until("node-1 has programmed node-2", SOON, || node.run(&["fabricctl", "peers"]).map(drop))?;
    node.kill_fabricd()?;
    let (code, found) = checks(node, &[])?;
    assert_eq!(code, Some(4), "{found:#?}");
    is(&found, "daemon", "failed", "it doesn't run")?;
    is(&found, "node-file", "ok", "ready")?;
    is(&found, "kernel-state", "ok", "fabric.1, 1 routes")?;
    is(&found, "pod-ports", "ok", "1 attached pods")?;
    is(&found, "store", "ok", "etcd answers")?;

    // What is broken meanwhile is found without it, too.
    node.run(&["ip", "link", "set", &veth(&pod)?, "nomaster"])?;
    node.run(&["ip", "link", "set", "fabric.1", "down"])?;
    lab.etcd().stop()?;
    let (_, found) = checks(node, &["--bundle", "/run/bundle.tar"])?;
    is(&found, "pod-ports", "failed", "is not on cni0")?;
    is(&found, "kernel-state", "failed", "fabric.1 is down")?;
    is(&found, "store", "failed", "etcd")?;
    let names = node.run(&["tar", "tf", "/run/bundle.tar"])?;
    node.run(&["rm", "/run/bundle.tar"])?;
    for name in
        ["checks.json", "host/nft-ruleset.txt", "host/ip-route-4.txt", "host/log.txt", "files/node.json", "version"]
    {
        assert!(names.contains(&format!("fabricd/{name}")), "{name} in {names}");
    }

    // One that hangs holds the lock.
    node.start_fabricd()?;
    wait_until("it answers", SOON, || {
        anyhow::ensure!(!node.exec(&["fabricctl", "status"])?.stdout.is_empty());
        Ok(())
    })?;
    node.freeze_fabricd()?;
    let (code, found) = checks(node, &[])?;
    node.thaw_fabricd()?;
    assert_eq!(code, Some(4), "{found:#?}");
    is(&found, "daemon", "failed", "it runs (pid ")
}

#[test]
fn preflight_tells_whether_fabricd_can_run_before_it_does() -> Result<()> {
    let mut lab = Lab::builder().nodes(0).start()?;
    let node = lab.boot_node()?;
    let (code, found) = checks(&node, &["--preflight"])?;
    assert_eq!(code, Some(0), "{found:#?}");
    is(&found, "udp-port", "ok", "8472")?;
    is(&found, "underlay", "ok", "eth0, 10.99.0.11")?;
    is(&found, "store", "ok", "etcd answers")?;

    node.run(&[
        "ip",
        "link",
        "add",
        "flannel.1",
        "type",
        "vxlan",
        "id",
        "1",
        "dstport",
        "8472",
        "local",
        "10.99.0.11",
    ])?;
    node.run(&["ip", "link", "del", "eth0"])?;
    let (code, found) = checks(&node, &["--preflight"])?;
    assert_eq!(code, Some(4), "{found:#?}");
    is(&found, "udp-port", "failed", "the VXLAN device flannel.1 has UDP port 8472")?;
    is(&found, "underlay", "failed", "default route")?;
    is(&found, "store", "failed", "etcd")?;
    let refused = node.command(&["fabricctl", "doctor", "--preflight", "-o", "json"])?.env("FABRICD_LEASE_TTL", "soon");
    let refused = refused.output()?;
    assert!(refused.stdout.contains("from 5s to 8760h"), "{refused:?}");
    Ok(())
}

#[test]
fn networkd_that_takes_the_pods_veths_off_the_bridge_is_named_with_its_file() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    let (a, b) = (node.add_pod("a")?, node.add_pod("b")?);
    let to = b.ip(Family::V4)?.to_string();
    wait_for_check(node, "networkd", "skipped")?;
    let eth0 = "[Match]\nName=eth0\n\n[Network]\nAddress=10.99.0.11/16\nGateway=10.99.0.1\nKeepConfiguration=yes\n";
    let all = "[Match]\nName=*\n\n[Network]\nDHCP=yes\n";
    node.run(&["mount", "-o", "remount,ro,bind", "/sys"])?;
    // The machine's own files are not this node's.
    node.run(&["mount", "-t", "tmpfs", "tmpfs", "/etc/systemd/network"])?;
    node.run(&[
        "sh",
        "-c",
        "mkdir -p /run/systemd/network /run/systemd/netif/links /run/systemd/netif/leases \
        /run/systemd/netif/lldp && chown -R systemd-network /run/systemd/netif",
    ])?;
    for (file, text) in [("10-eth0", eth0), ("zz-default", all)] {
        node.command(&["tee", &format!("/run/systemd/network/{file}.network")])?.stdin(text).run()?;
    }
    node.start_service("networkd", &["/lib/systemd/systemd-networkd"], &[])?;
    wait_until("it has taken the veths over", SOON * 3, || {
        let (_, found) = checks(node, &[])?;
        is(&found, "pod-ports", "failed", "is not on cni0")?;
        is(&found, "networkd", "failed", "/run/systemd/network/zz-default.network")?;
        // Of one of them networkd may not have written its state yet, and configures it all the same (seen with 252).
        let told = |pod| is(&found, "networkd", "failed", &veth(pod)?);
        told(&a).or_else(|_| told(&b))
    })?;
    assert!(!a.exec(&["ping", "-c1", "-W1", &to])?.success(), "the pods are cut off");

    // Without D-Bus `networkctl reload` isn't there: the program is started anew.
    run_fix(node, "networkd")?;
    node.end("networkd", Signal::SIGTERM)?;
    node.start_service("networkd", &["/lib/systemd/systemd-networkd"], &[])?;
    wait_until("it has read its files", SOON * 3, || {
        let (_, found) = checks(node, &[])?;
        anyhow::ensure!(found["networkd"]["result"] != "failed", "{:#}", found["networkd"]);
        Ok(())
    })?;
    if check(node, "pod-ports")?["result"] == "failed" {
        run_fix(node, "pod-ports")?;
    }
    wait_until("it leaves them alone", SOON * 3, || {
        let (_, found) = checks(node, &[])?;
        is(&found, "pod-ports", "ok", "")?;
        anyhow::ensure!(found["networkd"]["result"] != "failed", "{:#}", found["networkd"]);
        a.run(&["ping", "-c1", "-W1", &to]).map(drop)
    })
}

/// A pattern of NetworkManager: `*` and `?` stand for others, nothing else does.
fn network_managers_glob(pattern: &str, name: &str) -> bool {
    match (pattern.chars().next(), name.chars().next()) {
        (None, None) => true,
        (Some('*'), None) => network_managers_glob(&pattern[1..], name),
        (Some('*'), Some(_)) => {
            network_managers_glob(&pattern[1..], name) || network_managers_glob(pattern, &name[1..])
        }
        (Some(wanted), Some(c)) => (wanted == '?' || wanted == c) && network_managers_glob(&pattern[1..], &name[1..]),
        _ => false,
    }
}

/// What NetworkManager makes of its files when it is reloaded, by NetworkManager.conf(5): in a later file `=` replaces what
/// an earlier one says, `+=` adds to it. Gives the interfaces that it manages. (The program is nothing to install for a
/// test: its package starts it, and it takes over the interfaces of the machine.)
fn reload_network_manager(node: &Node) -> Result<Vec<String>> {
    let files = "cat /etc/NetworkManager/NetworkManager.conf $(ls /etc/NetworkManager/conf.d/*.conf 2>/dev/null)";
    let mut unmanaged: Vec<String> = vec![];
    for line in node.run(&["sh", "-c", files])?.lines() {
        let specs = |list: &str| list.split(';').map(str::to_owned).collect::<Vec<_>>();
        if let Some(list) = line.strip_prefix("unmanaged-devices=") {
            unmanaged = specs(list);
        } else if let Some(list) = line.strip_prefix("unmanaged-devices+=") {
            unmanaged.extend(specs(list));
        }
    }
    let links: Value = serde_json::from_str(&node.run(&["ip", "-j", "link"])?)?;
    let mut managed = vec![];
    for link in links.as_array().into_iter().flatten() {
        let name = link["ifname"].as_str().context("a name")?;
        let fits = |spec: &String| {
            let pattern = spec.strip_prefix("interface-name:");
            pattern.is_some_and(|pattern| network_managers_glob(pattern, name))
        };
        let keeps_off = unmanaged.iter().any(fits);
        let state = if keeps_off { "[device]\nnm-owned=false\n" } else { "[device]\nmanaged=true\nnm-owned=false\n" };
        node.command(&["tee", &format!("/run/NetworkManager/devices/{}", link["ifindex"])])?.stdin(state).run()?;
        if !keeps_off {
            managed.push(name.to_owned());
        }
    }
    Ok(managed)
}

#[test]
fn network_manager_lets_go_of_our_devices_and_takes_no_other_by_the_printed_fix() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    let pod = node.add_pod("a")?;
    wait_for_check(node, "networkmanager", "skipped")?;
    node.run(&["mkdir", "-p", "/run/NetworkManager/devices", "/etc/NetworkManager"])?;
    // As of a person who configures the underlay interface by other means, and has a veth and a bridge beside.
    let own = "[keyfile]\nunmanaged-devices=interface-name:eth0\n";
    node.command(&["tee", "/etc/NetworkManager/NetworkManager.conf"])?.stdin(own).run()?;
    node.run(&["ip", "link", "add", "veth0", "type", "veth", "peer", "name", "veth-web"])?;
    node.run(&["ip", "link", "add", "br0", "type", "bridge"])?;
    let others = ["lo", "veth-web", "veth0", "br0"];

    let ours = ["fabric.1", "cni0", &veth(&pod)?];
    let managed = reload_network_manager(node)?;
    assert!(ours.iter().all(|name| managed.iter().any(|known| known == name)), "{managed:?}");
    let found = check(node, "networkmanager")?;
    for name in ours {
        anyhow::ensure!(found["result"] == "failed" && found["evidence"].as_str().unwrap_or_default().contains(name));
    }
    assert!(found["fix"].as_str().unwrap_or_default().ends_with("\nsystemctl reload NetworkManager"), "{found:#}");

    run_fix(node, "networkmanager")?;
    assert_eq!(reload_network_manager(node)?, others, "and eth0 is left to whoever keeps NetworkManager off it");
    wait_for_check(node, "networkmanager", "ok")?;
    let coming = node.add_pod("b")?;
    assert!(!reload_network_manager(node)?.contains(&veth(&coming)?), "the next pods' are none of its either");
    Ok(())
}
