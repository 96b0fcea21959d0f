//! The underlay address stays what it is while virtual addresses come, go and move between nodes, in the Lab.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Capture, Families, Lab, Node, Stream, addresses, wait_until};
use serde_json::Value;

/// How long a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(40);

const VIRTUAL: [(Family, &str); 2] = [(Family::V4, "10.99.0.200/32"), (Family::V6, "fd00:99::200/128")];

/// `ip address add|del` on eth0.
fn address(node: &Node, verb: &str, address: &str) -> Result<()> {
    let nodad: &[&str] = if verb == "add" && address.contains(':') { &["nodad"] } else { &[] };
    node.run(&[&["ip", "address", verb, address, "dev", "eth0"], nodad].concat()).map(drop)
}

fn own(node: &Node, family: Family) -> String {
    addresses::with_prefix(node.underlay_ip(family))
}

/// The underlay addresses that its status shows.
fn used(node: &Node) -> Result<Vec<String>> {
    let status = node.status_or_not()?;
    let vteps = status["vteps"].as_array().context("no VTEPs")?;
    let address = |vtep: &Value| Some(vtep["underlay_address"].as_str()?.to_owned());
    vteps.iter().map(|vtep| address(vtep).with_context(|| format!("no address in {vtep}"))).collect()
}

/// Waits until the daemon has looked at everything anew: what it didn't do by then it doesn't do.
fn after_a_look(node: &Node) -> Result<()> {
    let audits = || -> Result<u64> {
        let text = node.http_get(9472, "/metrics")?.body;
        let line =
            text.lines().find_map(|line| line.strip_prefix("fabricd_audits_total ")).context("no such counter")?;
        Ok(line.trim().parse()?)
    };
    let before = audits()?;
    wait_until("an audit", SOON, || {
        ensure!(audits()? > before);
        Ok(())
    })
}

fn streams(here: &Arc<Node>, there: &Arc<Node>, name: &str) -> Result<Vec<Stream>> {
    let (a, b) = (here.add_pod(name)?, there.add_pod(name)?);
    let both = |family| [Stream::start_with(&a, &b, family, 200), Stream::start_with(&b, &a, family, 200)];
    Family::ALL.into_iter().filter(|family| a.ip(*family).is_ok()).flat_map(both).collect()
}

fn lost_nothing(streams: Vec<Stream>) -> Result<()> {
    for stream in streams {
        let report = stream.stop()?;
        ensure!(report.lost == 0, "{report:?}");
    }
    Ok(())
}

#[test]
fn virtual_addresses_come_fail_over_and_go_without_a_move_or_a_lost_packet() -> Result<()> {
    let lab = Lab::builder().nodes(3).families(Families::Dual).start()?;
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| lab.node(name));
    let (one, two, three) = (one?, two?, three?);
    let streams = streams(one, three, "a")?;
    let (before, written) = (used(one)?, lab.revision()?);
    for (_, vip) in VIRTUAL {
        address(one, "add", vip)?;
    }
    after_a_look(one)?;
    // IPv6 puts the newest first: it is what the kernel would send from.
    ensure!(one.run(&["ip", "-6", "route", "get", "fd00:99::1"])?.contains("src fd00:99::200"), "not a case in point");
    ensure!(used(one)? == before, "{:?}", used(one)?);

    // To another node, as keepalived does it.
    for (_, vip) in VIRTUAL {
        address(one, "del", vip)?;
        address(two, "add", vip)?;
    }
    three.run(&["ip", "neigh", "flush", "dev", "eth0"])?;
    after_a_look(two)?;
    after_a_look(one)?;
    ensure!(used(one)? == before, "{:?}", used(one)?);
    ensure!(lab.revision()? == written, "somebody wrote to etcd");
    lost_nothing(streams)
}

#[test]
fn own_address_that_goes_and_comes_back_behind_a_virtual_one_stays_the_nodes() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let (one, two) = (lab.node("node-1")?, lab.node("node-2")?);
    let (before, written) = (used(one)?, lab.revision()?);
    for (family, vip) in VIRTUAL {
        address(one, "add", vip)?;
        // As networkd does it when the carrier is lost; and the virtual one stands first when it is back.
        address(one, "del", &own(one, family))?;
        let reason = one.wait_trouble("looks like a virtual address that moves between hosts")?;
        ensure!(
            reason.contains(&format!("start fabricd with --iface {}", vip.split_once('/').context("prefix")?.0)),
            "{reason}"
        );
        after_a_look(one)?;
        address(one, "add", &own(one, family))?;
        one.run(&["ip", "route", "replace", "default", "via", &addresses::gateway(family).to_string()])?;
        one.wait_ready()?;
        ensure!(used(one)? == before, "{:?}", used(one)?);
    }
    ensure!(lab.revision()? == written, "somebody wrote to etcd");
    lost_nothing(streams(one, two, "a")?)?;

    // A restart finds the virtual ones first, and goes by its device, its disk or by what etcd has.
    for forget in
        ["true", "rm -rf /var/lib/fabric", "rm -rf /var/lib/fabric; ip link del fabric.1; ip link del fabric6.1"]
    {
        one.stop_fabricd()?;
        one.run(&["sh", "-c", forget])?;
        one.start_fabricd()?;
        one.wait_ready()?;
        ensure!(used(one)? == before, "after {forget}: {:?}", used(one)?);
    }
    lost_nothing(streams(one, two, "b")?)
}

/// Lays a second cable from one node to the other: `eth1` on both, with these addresses.
fn second_cable(ends: [(&Node, &str); 2]) -> Result<()> {
    let link = format!("link add eth1 type veth peer name eth1 netns {}", ends[1].0.pid()?);
    let made = ends[0].0.network()?.run(|| Ok(Command::new("ip").args(link.split(' ')).output()?))?;
    ensure!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    for (node, address) in ends {
        node.run(&["ip", "address", "add", address, "dev", "eth1"])?;
        node.run(&["ip", "link", "set", "eth1", "up"])?;
    }
    Ok(())
}

/// With `rp_filter` 1 the kernel drops what comes in by another interface than an answer would leave by (RFC 3704).
#[test]
fn underlay_beside_the_default_route_carries_pods_past_strict_reverse_path_filters() -> Result<()> {
    const OWN: [&str; 2] = ["198.51.100.11", "198.51.100.12"];
    let lab = Lab::builder().nodes(2).start()?;
    let nodes = [lab.node("node-1")?, lab.node("node-2")?];
    nodes.iter().try_for_each(|node| node.stop_fabricd())?;
    let [one, two] = OWN.map(|ip| format!("{ip}/24"));
    second_cable([(nodes[0], &one), (nodes[1], &two)])?;
    for node in nodes {
        // `default` is what devices get that are made from now on: cni0 and the veths.
        node.run(&["sh", "-ec", "for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 >$file; done"])?;
        node.start_fabricd_with(&["--iface", "eth1"], &[])?;
    }
    nodes.iter().try_for_each(|node| node.wait_ready())?;
    ensure!(used(nodes[0])? == [OWN[0]] && used(nodes[1])? == [OWN[1]], "{:?} {:?}", used(nodes[0])?, used(nodes[1])?);

    let captured = ["eth0", "eth1"].map(|dev| Capture::start(&nodes[1].network()?, dev));
    let [by_default, by_underlay] = captured;
    let (by_default, by_underlay) = (by_default?, by_underlay?);
    let (a, b) = (nodes[0].add_pod("a")?, nodes[1].add_pod("b")?);
    let streams = vec![Stream::start(&a, &b)?, Stream::start(&b, &a)?];
    let packet = by_underlay.wait_for("a packet of a pod", SOON, |packet| {
        packet.inner().is_some_and(|inner| Some(inner.source) == a.ip(Family::V4).ok())
    })?;
    ensure!((packet.source.to_string(), packet.target.to_string()) == (OWN[0].into(), OWN[1].into()), "{packet}");
    ensure!(
        by_default.stop().iter().all(|packet| packet.vxlan.is_none()),
        "some went by the default route's interface"
    );
    lost_nothing(streams)
}

#[test]
fn default_route_of_a_vpn_moves_nothing_while_the_nodes_own_stands() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (one, two) = (lab.node("node-1")?, lab.node("node-2")?);
    let streams = streams(one, two, "a")?;
    let (before, written) = (used(one)?, lab.revision()?);
    // Metrics as NetworkManager has them.
    let gateway = addresses::gateway(Family::V4);
    let script = format!(
        "ip link add vpn0 type veth peer name vpn0-peer; ip link set vpn0-peer up; ip link set vpn0 up
         ip address add 192.0.2.9/32 dev vpn0
         ip route add default via {gateway} dev eth0 metric 100; ip route del default via {gateway} dev eth0 metric 0
         ip route add default dev vpn0 metric 50"
    );
    one.run(&["sh", "-ec", &script])?;
    let way = one.run(&["ip", "route", "get", "203.0.113.1"])?;
    ensure!(way.contains("dev vpn0 src 192.0.2.9"), "not a case in point: {way}");
    after_a_look(one)?;
    ensure!(used(one)? == before && lab.revision()? == written, "{:?}", used(one)?);

    // A restart finds both.
    one.stop_fabricd()?;
    one.start_fabricd()?;
    one.wait_ready()?;
    after_a_look(one)?;
    ensure!(used(one)? == before && lab.revision()? == written, "{:?}", used(one)?);
    lost_nothing(streams)?;

    // The operator moves the node.
    one.run(&["ip", "route", "del", "default", "dev", "eth0"])?;
    wait_until("it has moved", SOON, || {
        ensure!(used(one)? == ["192.0.2.9"], "{:?}", used(one)?);
        Ok(())
    })
}

/// As at cloud providers: the uplink's address has host length, and all else is behind a router that is named as on the
/// link. Nobody but the router hears this node, and the others' packets to it go by the router too.
fn behind_a_router(lab: &Lab, node: &Node) -> Result<()> {
    let router = &lab.underlay().machine;
    router.run(&["bridge", "link", "set", "dev", &node.name, "isolated", "on"])?;
    for family in Family::ALL {
        let (prefix, length) = (own(node, family), if family == Family::V4 { 32 } else { 128 });
        let (ip, gateway) = (node.underlay_ip(family), addresses::gateway(family));
        address(node, "del", &prefix)?;
        address(node, "add", &format!("{ip}/{length}"))?;
        node.run(&["ip", "route", "replace", "default", "via", &gateway.to_string(), "dev", "eth0", "onlink"])?;
        if family == Family::V6 {
            router.run(&["ip", "neigh", "add", "proxy", &ip.to_string(), "dev", "br0"])?;
        }
    }
    Ok(())
}

#[test]
fn address_of_host_length_behind_an_onlink_gateway_carries_pods_to_both_kinds_of_nodes() -> Result<()> {
    let lab = Lab::builder().nodes(3).families(Families::Dual).start()?;
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| lab.node(name));
    let (one, two, three) = (one?, two?, three?);
    // The router answers for the nodes behind it on the very link that it is asked on, and sends nobody elsewhere.
    let settings =
        ["ipv4/ip_forward", "ipv4/conf/br0/proxy_arp_pvlan", "ipv6/conf/all/forwarding", "ipv6/conf/br0/proxy_ndp"];
    let settings = settings.map(|setting| format!("echo 1 >/proc/sys/net/{setting}")).join("; ");
    let redirects = "for file in /proc/sys/net/ipv4/conf/*/send_redirects; do echo 0 >$file; done";
    lab.underlay().machine.run(&["sh", "-ec", &format!("{settings}; {redirects}")])?;
    let (before, written) = (used(one)?, lab.revision()?);
    for node in [one, two] {
        behind_a_router(&lab, node)?;
        after_a_look(node)?;
    }
    [one, two, three].iter().try_for_each(|node| node.run(&["ip", "neigh", "flush", "dev", "eth0"]).map(drop))?;
    let way = one.run(&["ip", "route", "get", &two.underlay_ip(Family::V4).to_string()])?;
    ensure!(way.contains(&format!("via {} dev eth0", addresses::gateway(Family::V4))), "not a case in point: {way}");
    ensure!(used(one)? == before && lab.revision()? == written, "{:?}", used(one)?);

    lost_nothing(streams(one, two, "a")?)?;
    lost_nothing(streams(one, three, "b")?)?;
    // A start that knows nothing finds these addresses alone.
    one.stop_fabricd()?;
    one.run(&["sh", "-c", "rm -rf /var/lib/fabric; ip link del fabric.1; ip link del fabric6.1"])?;
    one.start_fabricd()?;
    one.wait_ready()?;
    ensure!(used(one)? == before, "{:?}", used(one)?);
    lost_nothing(streams(two, one, "c")?)?;
    lost_nothing(streams(three, one, "d")?)
}

#[test]
fn interface_that_is_not_there_is_told_before_etcd_answers() -> Result<()> {
    let lab = Lab::builder().nodes(1).start()?;
    let node = lab.node("node-1")?;
    node.stop_fabricd()?;
    node.run(&["rm", "-rf", "/var/lib/fabric"])?;
    lab.etcd().stop()?;
    node.start_fabricd_with(&["--iface", "eth7"], &[])?;
    let reason = node.wait_trouble("no interface fits --iface eth7")?;
    ensure!(reason.contains("eth0 (10.99.0.11"), "{reason}");
    Ok(())
}

#[test]
fn interface_named_by_iface_that_is_deleted_is_told_and_taken_again_when_it_is_back() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (one, two) = (lab.node("node-1")?, lab.node("node-2")?);
    let (ip, gateway) = (own(one, Family::V4), addresses::gateway(Family::V4));
    let make = format!(
        "ip link add uplink up type bridge; ip link set eth0 master uplink
         ip address del {ip} dev eth0 2>/dev/null || true; ip address add {ip} dev uplink
         ip route replace default via {gateway} dev uplink"
    );
    one.stop_fabricd()?;
    one.run(&["sh", "-ec", &make])?;
    one.start_fabricd_with(&["--iface", "uplink"], &[])?;
    one.wait_ready()?;
    let before = used(one)?;
    let pods = (one.add_pod("a")?, two.add_pod("b")?);
    for _ in 0..2 {
        one.run(&["ip", "link", "del", "uplink"])?;
        let reason = one.wait_trouble("no interface fits --iface uplink")?;
        ensure!(reason.contains("this host has"), "{reason}");
        one.run(&["sh", "-ec", &make])?;
        one.wait_ready()?;
        ensure!(used(one)? == before, "{:?}", used(one)?);
        lost_nothing(vec![Stream::start(&pods.0, &pods.1)?, Stream::start(&pods.1, &pods.0)?])?;
    }
    Ok(())
}
