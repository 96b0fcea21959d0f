//! Kernels without tcx (before 6.6): programs are filters of tc, beside those of others, and all else is the same.

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Lab, Node, Pod, Stream, wait_until};

use crate::{AUTO, OFF, ON, SOON, counts, pods_of, restart, settled, transfer};

/// Filters of somebody else in front of ours and behind it: one passes everything on, the other drops VXLAN.
const IN_FRONT: &str = "tc filter add dev eth0 ingress pref 10 protocol all bpf da bytecode '1,6 0 0 4294967295,'";
const BEHIND: &str = "tc filter add dev eth0 ingress pref 65000 protocol all bpf da \
                      bytecode '4,40 0 0 36,21 0 1 8472,6 0 0 2,6 0 0 4294967295,'";

/// The host's end of the pod's veth pair.
fn port(pod: &Pod) -> Result<String> {
    let end = pod.run(&["ip", "-o", "link", "show", "eth0"])?;
    let (_, index) = end.split_once("@if").context("eth0 is no veth")?;
    let (index, _) = index.split_once(':').context("no index")?;
    let links = pod.node.run(&["ip", "-o", "link", "show"])?;
    let line = links.lines().find(|line| line.starts_with(&format!("{index}: "))).context("no such port")?;
    Ok(line.split([' ', '@']).nth(1).context("a name")?.to_owned())
}

fn filters(node: &Node, dev: &str, side: &str) -> Result<String> {
    node.run(&["tc", "filter", "show", "dev", dev, side])
}

fn clsacts(node: &Node) -> Result<Vec<String>> {
    let shown = node.run(&["tc", "qdisc", "show"])?;
    let of = |line: &str| line.starts_with("qdisc clsact").then(|| line.split(' ').nth(4).map(str::to_owned)).flatten();
    Ok(shown.lines().filter_map(of).collect())
}

#[test]
fn without_tcx_programs_are_filters_behind_those_of_others_and_go_without_a_trace() -> Result<()> {
    let (_lab, a, b) = pods_of(Lab::builder().nodes(2).without_tcx(true), [OFF, AUTO])?;
    let node = &a.node;
    let script = |script: &str| node.run(&["sh", "-ec", script]);
    script(&format!("tc qdisc add dev eth0 clsact; {IN_FRONT}"))?;
    restart(node, ON)?;
    settled(node, ON)?;
    let pins = script("ls /sys/fs/bpf/fabric/*/links")?;
    ensure!(pins.trim().is_empty(), "there are links: {pins}");
    let at_uplink = filters(node, "eth0", "ingress")?;
    let (theirs, ours) = (at_uplink.find("pref 10 "), at_uplink.find("fabric_wire_in"));
    ensure!(theirs.is_some() && theirs < ours, "{at_uplink}");
    let veth = port(&a)?;
    for (side, program) in [("ingress", "fabric_pod_out"), ("egress", "fabric_pod_in")] {
        let there = filters(node, &veth, side)?;
        ensure!(there.contains(program) && there.contains("direct-action"), "{there}");
    }

    let stream = Stream::start(&a, &b)?;
    let before = counts(node, "")?.0;
    [(&a, &b), (&b, &a)].into_iter().try_for_each(|(from, to)| transfer(from, to))?;
    wait_until("packets on the fast path", SOON, || {
        ensure!(counts(node, "")?.0 > before + 200, "{:?}", counts(node, "")?);
        Ok(())
    })?;
    // What ours takes never comes to the filter behind it, what it passes on does.
    let there = b.ip(Family::V4)?.to_string();
    script(BEHIND)?;
    transfer(&b, &a)?;
    ensure!(!a.exec(&["ping", "-c1", "-W2", &there])?.success(), "a ping takes the kernel's path");
    script("tc filter del dev eth0 ingress pref 65000")?;
    a.run(&["ping", "-c1", "-W5", &there])?;

    // Taken away, it comes back; switched, killed and started, nothing is lost.
    script(&format!("tc qdisc del dev {veth} clsact"))?;
    wait_until("filters at the pod's port again", SOON, || {
        ensure!(filters(node, &veth, "ingress")?.contains("fabric_pod_out"), "none");
        Ok(())
    })?;
    node.kill_fabricd()?;
    stream.wait_for(200, SOON)?;
    node.start_fabricd_with(&[ON], &[])?;
    settled(node, ON)?;
    transfer(&a, &b)?;
    restart(node, OFF)?;
    settled(node, OFF)?;
    transfer(&a, &b)?;
    ensure!(clsacts(node)? == ["eth0"], "others made one alone: {:?}", clsacts(node)?);
    let left = filters(node, "eth0", "ingress")?;
    ensure!(left.contains("pref 10 ") && !left.contains("fabric_"), "{left}");
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");

    ensure!(clsacts(&b.node)?.contains(&"eth0".to_owned()), "{:?}", clsacts(&b.node)?);
    b.node.stop_fabricd()?;
    b.node.run(&["fabricd", "--cleanup"])?;
    ensure!(clsacts(&b.node)?.is_empty(), "it left {:?}", clsacts(&b.node)?);
    Ok(())
}
