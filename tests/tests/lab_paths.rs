//! The ways to a peer while they change: direct routes and the VXLAN, one device and its successor.

use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_tests::lab::witness::Kind;
use fabric_tests::lab::{Lab, Node, Pod, Stream, Witness, wait_until};

/// How long the fabric may take to follow a change (it is allowed two seconds; the machine may be busy).
const SOON: Duration = Duration::from_secs(40);

#[test]
fn peers_on_the_link_get_plain_routes_and_changing_facts_lose_no_packet() -> Result<()> {
    let (lab, a, b) = pods_of_two_nodes(&["--network", "10.244.0.0/16", "--direct-routing"])?;
    let (node, other) = (lab.node("node-1")?, lab.node("node-2")?);
    for (node, way) in [(node, "via 10.99.0.12 dev eth0"), (other, "via 10.99.0.11 dev eth0")] {
        wait_until("a plain route", SOON, || ensure_route(node, way))?;
    }
    let streams = [Stream::start(&a, &b)?, Stream::start(&b, &a)?];

    // The underlay stays reachable, but the prefix says no more that node-2 is on the link.
    node.run(&["ip", "route", "add", "10.99.0.0/16", "dev", "eth0", "metric", "50"])?;
    for _ in 0..3 {
        node.run(&["ip", "address", "add", "10.99.0.11/30", "dev", "eth0"])?;
        node.run(&["ip", "address", "del", "10.99.0.11/16", "dev", "eth0"])?;
        wait_until("the route through the VXLAN", SOON, || ensure_route(node, "dev fabric.1"))?;
        ensure_route(other, "via 10.99.0.11 dev eth0")?;
        streams.iter().try_for_each(|stream| stream.wait_for(200, SOON))?;

        node.run(&["ip", "address", "add", "10.99.0.11/16", "dev", "eth0"])?;
        node.run(&["ip", "address", "del", "10.99.0.11/30", "dev", "eth0"])?;
        wait_until("the plain route again", SOON, || ensure_route(node, "via 10.99.0.12 dev eth0"))?;
        streams.iter().try_for_each(|stream| stream.wait_for(200, SOON))?;
    }
    for stream in streams {
        let report = stream.stop()?;
        ensure!((report.lost, report.refused) == (0, 0), "{report:?}");
    }
    Ok(())
}

#[test]
fn another_vni_or_port_is_built_beside_the_old_device_and_no_route_is_missing() -> Result<()> {
    let (lab, a, b) = pods_of_two_nodes(&["--network", "10.244.0.0/16"])?;
    let mut before = "fabric.1";
    for (flags, after) in [(["--vni", "1", "--port", "4789"], "fab.1"), (["--vni", "2", "--port", "4789"], "fabric.2")]
    {
        let node = lab.node("node-1")?;
        let witnesses = lab.nodes().map(|node| Witness::of(node)).collect::<Result<Vec<_>>>()?;
        let init = ["fabricctl", "network", "init", "--force", "--network", "10.244.0.0/16"];
        node.run(&[&init[..], &flags].concat())?;
        for node in lab.nodes() {
            wait_until("the new device alone", SOON, || {
                node.run(&["fabricctl", "network", "migrate"])?;
                ensure!(node.exec(&["ip", "link", "show", "dev", after])?.success(), "no {after}");
                ensure!(!node.exec(&["ip", "link", "show", "dev", before])?.success(), "{before} is still there");
                Ok(())
            })?;
        }
        for (node, witness) in lab.nodes().zip(&witnesses) {
            wait_until("a route over it", SOON, || ensure_route(node, &format!("dev {after}")))?;
            // Only with another VNI the peer's lease is none of ours for a while.
            let gone = witness.about_fabric(&[]).into_iter().filter(|event| event.kind == Kind::Route && event.gone);
            ensure!(flags[1] != "1" || gone.count() == 0, "a route of {} was missing for a moment", node.name);
        }
        let stream = Stream::start(&a, &b)?;
        for node in lab.nodes() {
            let tables = ["ip", "-d", "-o", "link", "show", "type", "vxlan"];
            let shown = node.run(&tables)?;
            ensure!(shown.contains(&format!("dstport {}", flags[3])), "{shown}");
            node.stop_fabricd()?;
            node.start_fabricd()?;
            node.wait_ready()?;
            ensure!(node.run(&tables)? == shown, "the restart has changed it");
        }
        stream.wait_for(300, SOON)?;
        ensure!(stream.stop()?.lost == 0, "the restarts lost packets");
        before = after;
    }
    Ok(())
}

fn pods_of_two_nodes(network: &[&str]) -> Result<(Lab, Pod, Pod)> {
    let lab = Lab::builder().nodes(2).network(network).start()?;
    let (a, b) = (lab.node("node-1")?.add_pod("a")?, lab.node("node-2")?.add_pod("b")?);
    Ok((lab, a, b))
}

/// Fails unless the only route that fabricd keeps goes that way.
fn ensure_route(node: &Node, way: &str) -> Result<()> {
    let routes = node.run(&["ip", "-4", "route", "show", "proto", "250"])?;
    ensure!(routes.lines().count() == 1 && routes.contains(way), "not {way}:\n{routes}");
    Ok(())
}
