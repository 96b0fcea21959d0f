//! The fabric in the Lab: what holds between pods while nodes come, go, crash and start again.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::containerd::Containerd;
use fabric_tests::lab::{Connection, Families, Lab, Matrix, Node, Pod, Stream, wait_until};

/// How long the fabric may take to follow a change (it is allowed two seconds; the machine may be busy).
const SOON: Duration = Duration::from_secs(40);

#[test]
fn pods_of_three_nodes_reach_each_other_over_ipv4() -> Result<()> {
    pods_of_three_nodes_reach_each_other(Families::V4, 30)
}

#[test]
fn pods_of_three_nodes_reach_each_other_over_ipv6() -> Result<()> {
    pods_of_three_nodes_reach_each_other(Families::V6, 30)
}

#[test]
fn pods_of_three_nodes_reach_each_other_over_both_families() -> Result<()> {
    pods_of_three_nodes_reach_each_other(Families::Dual, 60)
}

fn pods_of_three_nodes_reach_each_other(families: Families, pairs: usize) -> Result<()> {
    let lab = Lab::builder().nodes(3).families(families).start()?;
    for node in lab.nodes() {
        node.add_pod("a")?.check()?;
        node.add_pod("b")?.check()?;
    }
    let matrix = Matrix::of(&lab.pods()?)?;
    assert!(matrix.is_perfect(), "{matrix}");
    assert_eq!(matrix.cells().len(), pairs);
    Ok(())
}

#[test]
fn packets_between_nodes_are_vxlan_and_fill_the_underlay_mtu() -> Result<()> {
    for families in [Families::V4, Families::V6] {
        let (lab, a, b) = two_nodes_with_a_pod_each(families)?;
        let family = families.first();
        let at_the_port = lab.underlay().capture("node-1")?;

        // The largest packet that leaves a pod whole: its interface's MTU less the headers of IP and ICMP.
        let mtu = pod_mtu(&a)?;
        assert_eq!(mtu, 1500 - family.vxlan_overhead());
        let headers = if family == Family::V4 { 28 } else { 48 };
        let size = (mtu - headers).to_string();
        a.run(&["ping", "-c", "3", "-i", "0.2", "-W", "3", "-M", "do", "-s", &size, &b.ip(family)?.to_string()])?;

        let (source, target) = (a.ip(family)?, b.ip(family)?);
        let ping = at_the_port.wait_for("the ping in VXLAN", SOON, |packet| {
            packet.inner().is_some_and(|inner| inner.source == source && inner.target == target)
        })?;
        assert_eq!((ping.source, ping.target), (a.node.underlay_ip(family), b.node.underlay_ip(family)));
        assert_eq!(ping.ports.context("UDP has ports")?.1, 8472);
        assert_eq!(ping.vxlan.context("it is VXLAN")?.vni, 1);
    }
    Ok(())
}

#[test]
fn a_node_that_joins_is_reachable_and_one_that_leaves_is_forgotten() -> Result<()> {
    let (mut lab, a, _) = two_nodes_with_a_pod_each(Families::Dual)?;
    let third = lab.add_node()?;
    let c = third.add_pod("c")?;
    wait_until_peers_are(&a.node, 2)?;
    assert!(Matrix::of(&[a.clone(), c])?.is_perfect());

    third.stop_fabricd()?;
    third.run(&["fabricd", "--cleanup"])?;

    wait_until_peers_are(&a.node, 1)?;
    assert_eq!(third.run(&["ip", "-o", "link", "show", "type", "vxlan"])?, "");
    Ok(())
}

#[test]
fn restarts_and_crashes_of_fabricd_lose_no_packet() -> Result<()> {
    let (_lab, a, b) = two_nodes_with_a_pod_each(Families::Dual)?;
    let streams = [Family::V4, Family::V6].map(|family| Stream::start_with(&a, &b, family, 1_000));
    let connection = Connection::start(&a, &b)?;

    for pod in [&a, &b] {
        pod.node.stop_fabricd()?;
        pod.node.start_fabricd()?;
        pod.node.wait_ready()?;
        pod.node.kill_fabricd()?;
        pod.node.start_fabricd()?;
        pod.node.wait_ready()?;
    }

    for stream in streams {
        let report = stream?.stop()?;
        assert_eq!((report.lost, report.duplicated, report.refused), (0, 0, 0), "{report:?}");
    }
    assert_eq!(connection.stop()?.broken, None);
    Ok(())
}

#[test]
fn a_restart_with_nothing_changed_touches_nothing_in_the_kernel() -> Result<()> {
    let (_lab, a, _) = two_nodes_with_a_pod_each(Families::Dual)?;
    let before = kernel_state(&a.node)?;
    a.node.kill_fabricd()?;
    a.node.start_fabricd()?;
    a.node.wait_ready()?;
    assert_eq!(kernel_state(&a.node)?, before);
    Ok(())
}

#[test]
fn a_peer_that_left_while_fabricd_was_down_is_swept_at_its_start() -> Result<()> {
    let (_lab, a, b) = two_nodes_with_a_pod_each(Families::Dual)?;
    a.node.kill_fabricd()?;
    b.node.stop_fabricd()?;
    b.node.run(&["fabricd", "--cleanup"])?;
    ensure_peers(&a.node, 1).context("nobody was there to remove it")?;

    a.node.start_fabricd()?;
    a.node.wait_ready()?;
    wait_until_peers_are(&a.node, 0)
}

#[test]
fn pods_come_and_go_while_the_daemon_is_dead_as_long_as_it_was_ready_last() -> Result<()> {
    let (_lab, a, b) = two_nodes_with_a_pod_each(Families::Dual)?;
    a.node.kill_fabricd()?;
    let late = a.node.add_pod("late")?;
    for peer in [&a, &b] {
        for family in [Family::V4, Family::V6] {
            let address = peer.ip(family)?.to_string();
            late.run(&["ping", "-c3", "-i0.2", "-W1", &address]).context("a pod that was added without a daemon")?;
        }
    }
    late.del()?;
    let again = a.node.add_pod("again")?;
    a.node.start_fabricd()?;
    a.node.wait_ready()?;
    // What the daemon then knows of the pod lets it talk on.
    let address = b.ip(Family::V4)?.to_string();
    again.run(&["ping", "-c3", "-i0.2", "-W1", &address])?;
    Ok(())
}

#[test]
fn what_is_foreign_survives_start_and_cleanup() -> Result<()> {
    let (_lab, a, _) = two_nodes_with_a_pod_each(Families::V4)?;
    let node = &a.node;
    node.run(&["ip", "route", "add", "198.51.100.0/24", "dev", "fabric.1"])?;
    node.run(&["ip", "link", "add", "foreign", "type", "vxlan", "id", "77", "dstport", "4789", "dev", "eth0"])?;
    node.run(&["bridge", "fdb", "append", "02:00:5e:00:53:01", "dev", "foreign", "dst", "10.99.0.12"])?;
    node.run(&["ip", "nexthop", "add", "id", "7", "dev", "eth0"])?;
    let foreign = || -> Result<Vec<String>> {
        let route = node.exec(&["ip", "route", "show", "198.51.100.0/24"])?.stdout;
        Ok(vec![
            route,
            node.run(&["bridge", "fdb", "show", "dev", "foreign"])?,
            node.run(&["ip", "nexthop", "show", "id", "7"])?,
        ])
    };
    let before = foreign()?;

    node.kill_fabricd()?;
    node.start_fabricd()?;
    node.wait_ready()?;
    assert_eq!(foreign()?, before);

    node.stop_fabricd()?;
    node.run(&["fabricd", "--cleanup"])?;
    // The route on our own device can't outlive that device; everything else does.
    assert_eq!(foreign()?[1..], before[1..]);
    Ok(())
}

#[test]
fn an_etcd_outage_loses_no_packet_and_no_peer() -> Result<()> {
    let (lab, a, b) = two_nodes_with_a_pod_each(Families::V4)?;
    let stream = Stream::start(&a, &b)?;
    lab.etcd().kill()?;
    stream.wait_for(3_000, Duration::from_secs(20))?;
    ensure_peers(&a.node, 1)?;
    lab.etcd().start()?;
    stream.wait_for(1_000, Duration::from_secs(20))?;
    assert_eq!(stream.stop()?.lost, 0);
    Ok(())
}

#[test]
fn a_container_of_containerd_is_reachable_from_a_pod_of_another_node() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let containerd = Containerd::start(lab.node("node-1")?)?;
    let container = containerd.run("busybox")?;
    let pod = lab.node("node-2")?.add_pod("a")?;
    let matrix = Matrix::of(&[pod, container.clone()])?;
    assert!(matrix.is_perfect(), "{matrix}");
    assert_eq!(matrix.cells().len(), 4);
    containerd.kill(container)
}

fn two_nodes_with_a_pod_each(families: Families) -> Result<(Lab, Pod, Pod)> {
    let lab = Lab::builder().nodes(2).families(families).start()?;
    let (a, b) = (lab.node("node-1")?.add_pod("a")?, lab.node("node-2")?.add_pod("b")?);
    lab.nodes().try_for_each(|node| wait_until_peers_are(node, 1))?;
    Ok((lab, a, b))
}

/// Fails unless every kernel table has entries for so many peers, as iproute2 sees them.
fn ensure_peers(node: &Node, count: usize) -> Result<()> {
    for (device, version) in [("fabric.1", "-4"), ("fabric6.1", "-6")] {
        if !node.exec(&["ip", "link", "show", device])?.success() {
            continue; // this family isn't in use
        }
        let tables = [
            ("FDB", node.run(&["bridge", "fdb", "show", "dev", device])?),
            ("neighbours", node.run(&["ip", version, "neigh", "show", "dev", device, "nud", "permanent"])?),
            ("routes", node.run(&["ip", version, "route", "show", "dev", device, "proto", "250"])?),
        ];
        let nexthops = ("nexthops", node.run(&["ip", "nexthop", "show", "dev", device])?);
        // IPv6 needs no nexthop objects.
        for (table, entries) in tables.into_iter().chain((version == "-4").then_some(nexthops)) {
            ensure!(entries.lines().count() == count, "{count} peers, but {table} of {device} are\n{entries}");
        }
    }
    Ok(())
}

fn wait_until_peers_are(node: &Node, count: usize) -> Result<()> {
    wait_until(&format!("{} has {count} peers", node.name), SOON, || ensure_peers(node, count))
}

/// All that iproute2 shows of the tables that the fabric writes to.
fn kernel_state(node: &Node) -> Result<String> {
    let shown = [
        node.run(&["ip", "-d", "link", "show", "type", "vxlan"])?,
        node.run(&["ip", "address"])?,
        node.run(&["bridge", "fdb"])?,
        node.run(&["ip", "neigh", "show", "nud", "permanent"])?,
        node.run(&["ip", "nexthop"])?,
        node.run(&["ip", "-4", "route"])?,
        node.run(&["ip", "-6", "route"])?,
    ];
    // The kernel checks its own link-local addresses for a while, and joins multicast groups when it is done; that is not
    // of our doing.
    let shown = shown.concat().replace("tentative ", "");
    Ok(shown.lines().filter(|line| !line.starts_with("33:33:")).collect::<Vec<_>>().join("\n"))
}

fn pod_mtu(pod: &Pod) -> Result<u32> {
    let shown: serde_json::Value = serde_json::from_str(&pod.run(&["ip", "-j", "link", "show", "eth0"])?)?;
    Ok(shown[0]["mtu"].as_u64().context("a link without mtu")?.try_into()?)
}
