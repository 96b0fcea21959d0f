//! The underlay address stays what it is while virtual addresses come, go and move between nodes, in the Lab.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, Node, Stream, addresses, wait_until};

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
    Ok(vteps.iter().filter_map(|vtep| Some(vtep["underlayAddress"].as_str()?.to_owned())).collect())
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
    Family::ALL.into_iter().flat_map(both).collect()
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
