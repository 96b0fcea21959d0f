//! Faults of the store and of leases, in the Lab with a real etcd: each while packets flow between two pods, and none may
//! be lost. `SEEDS=20` makes the rounds that are random or repeated that many.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_tests::lab::{Connection, Lab, Node, Pod, Stream, wait_until};
use nix::sys::signal::Signal;

/// How long a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// The shortest lease that fabricd takes.
const TTL: Duration = Duration::from_secs(5);

const SUBNETS: &str = "/coreos.com/network/subnets/";

/// Nodes whose leases end soon, a pod on each, and a stream between the first two.
struct Fabric {
    lab: Lab,
    nodes: Vec<Arc<Node>>,
    pods: Vec<Pod>,
    stream: Stream,
}

impl Fabric {
    fn start(nodes: usize) -> Result<Self> {
        Self::with(Lab::builder().nodes(0).start()?, nodes)
    }

    fn with(mut lab: Lab, count: usize) -> Result<Self> {
        let nodes = (0..count).map(|_| lab.boot_node()).collect::<Result<Vec<_>>>()?;
        nodes.iter().try_for_each(start)?;
        nodes.iter().try_for_each(|node| node.wait_ready())?;
        let pods = nodes.iter().take(2).map(|node| node.add_pod("a")).collect::<Result<Vec<_>>>()?;
        let stream = Stream::start(&pods[0], &pods[1])?;
        Ok(Self { lab, nodes, pods, stream })
    }

    fn etcdctl(&self, args: &[&str]) -> Result<String> {
        self.lab.etcd().ctl(args)
    }

    /// Ends the stream; nothing of it may be missing.
    fn lost_nothing(self) -> Result<Lab> {
        let report = self.stream.stop()?;
        ensure!((report.lost, report.duplicated, report.refused) == (0, 0, 0), "{report:?}");
        Ok(self.lab)
    }
}

fn start(node: &Arc<Node>) -> Result<()> {
    node.start_fabricd_with(&["--lease-ttl", "5s", "--lease-grace", "5s"], &[])
}

fn rounds(usual: u32) -> u32 {
    std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(usual)
}

/// The node's subnet, as in 10.244.3.0/24.
fn subnet(node: &Node) -> Result<String> {
    let status = node.status_or_not()?;
    Ok(status["lease"]["subnets"][0].as_str().context("no lease")?.to_owned())
}

fn reason(node: &Node) -> Result<String> {
    Ok(node.status_or_not()?["reason"].as_str().unwrap_or_default().to_owned())
}

fn waits_until_it_says(node: &Node, words: &str) -> Result<()> {
    wait_until(&format!("{} says {words:?}", node.name), SOON, || {
        let reason = reason(node)?;
        ensure!(reason.contains(words), "it says {reason:?}");
        Ok(())
    })
}

/// The key of a subnet, as in 10.244.3.0-24.
fn key(subnet: &str) -> String {
    format!("{SUBNETS}{}", subnet.replace('/', "-"))
}

fn routes(node: &Node) -> Result<usize> {
    Ok(node.run(&["ip", "route", "show", "dev", "fabric.1", "proto", "250"])?.lines().count())
}

fn revision(fabric: &Fabric) -> Result<i64> {
    let answer: serde_json::Value = serde_json::from_str(&fabric.etcdctl(&["get", "-w", "json", "nothing"])?)?;
    answer["header"]["revision"].as_i64().context("no revision")
}

trait Status {
    /// What `fabricctl status` says, also of a node that is not ready.
    fn status_or_not(&self) -> Result<serde_json::Value>;
}

impl Status for Node {
    fn status_or_not(&self) -> Result<serde_json::Value> {
        let shown = self.exec(&["fabricctl", "status", "-o", "json"])?;
        serde_json::from_str(&shown.stdout).with_context(|| shown.stderr.clone())
    }
}

#[test]
fn restarts_and_crash_loops_lose_nothing_and_write_nothing_to_etcd() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let connection = Connection::start(&fabric.pods[0], &fabric.pods[1])?;
    let before = revision(&fabric)?;
    for round in 0..rounds(3) {
        for node in &fabric.nodes {
            if round % 2 == 0 {
                node.kill_fabricd()?;
            } else {
                node.stop_fabricd()?;
            }
            start(node)?;
            node.wait_ready()?;
        }
    }
    ensure!(revision(&fabric)? == before, "a restart has written to etcd");
    ensure!(connection.stop()?.broken.is_none());
    fabric.lost_nothing().map(drop)
}

#[test]
fn cold_start_without_etcd_brings_the_data_plane_up_from_disk_and_says_so() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let node = &fabric.nodes[0];
    let had = subnet(node)?;
    fabric.lab.etcd().kill()?;
    node.kill_fabricd()?;
    start(node)?;
    waits_until_it_says(node, "as remembered from disk")?;
    ensure!(routes(node)? == 1);
    // Longer than the lease: no address is handed out any more, and packets flow.
    waits_until_it_says(node, "its time has run out")?;
    let refused = node.add_pod("late").map(drop).map_err(|error| format!("{error:#}"));
    ensure!(refused.as_ref().is_err_and(|told| told.contains("its time has run out")), "{refused:?}");
    fabric.stream.wait_for(1_000, SOON)?;
    let node = Arc::clone(node);
    let lab = fabric.lost_nothing()?;

    // And all of it anew, where a reboot has left nothing.
    node.kill_fabricd()?;
    node.run(&["ip", "link", "del", "fabric.1"])?;
    start(&node)?;
    wait_until("the peer is back", SOON, || {
        ensure!(routes(&node)? == 1);
        Ok(())
    })?;
    lab.etcd().start()?;
    node.wait_ready()?;
    ensure!(subnet(&node)? == had);
    Ok(())
}

#[test]
fn history_compacted_while_disconnected_leads_to_a_new_list() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let node = &fabric.nodes[0];
    let peer = |n: u8| {
        format!(
            r#"{{"PublicIP":"10.99.7.{n}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:07:{n:02x}"}}}}"#
        )
    };
    let place = |n: u8| format!("{SUBNETS}10.244.{}.0-24", 250 + n);
    for n in 1..=2 {
        fabric.etcdctl(&["put", &place(n), &peer(n)])?;
    }
    wait_until("three peers", SOON, || {
        ensure!(routes(node)? == 3);
        Ok(())
    })?;
    node.cut_off(fabric.lab.etcd().address(1))?;
    fabric.etcdctl(&["del", &place(1)])?;
    fabric.etcdctl(&["put", &place(3), &peer(3)])?;
    fabric.etcdctl(&["put", &place(4), &peer(4)])?;
    fabric.etcdctl(&["compact", "--physical", &revision(&fabric)?.to_string()])?;
    fabric.etcdctl(&["defrag"])?;
    ensure!(routes(node)? == 3, "nothing is deleted while the store is away");
    node.heal()?;
    wait_until("four peers", Duration::from_secs(40), || {
        ensure!(routes(node)? == 4);
        Ok(())
    })?;
    fabric.lost_nothing().map(drop)
}

#[test]
fn half_open_connection_is_found_and_made_anew() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let node = &fabric.nodes[0];
    let connected = |wanted: bool| {
        wait_until(&format!("connected: {wanted}"), Duration::from_secs(30), || {
            ensure!(node.status_or_not()?["store"]["connected"] == wanted);
            Ok(())
        })
    };
    connected(true)?;
    node.cut_off(fabric.lab.etcd().address(1))?;
    connected(false)?;
    node.heal()?;
    connected(true)?;
    fabric.lost_nothing().map(drop)
}

#[test]
fn revoked_lease_is_taken_again_with_the_same_subnet() -> Result<()> {
    let fabric = Fabric::start(2)?;
    for round in 0..rounds(2) {
        let node = &fabric.nodes[round as usize % 2];
        let had = subnet(node)?;
        let record: serde_json::Value = serde_json::from_str(&fabric.etcdctl(&["get", "-w", "json", &key(&had)])?)?;
        let lease = record["kvs"][0]["lease"].as_i64().context("it hangs on a lease")?;
        fabric.etcdctl(&["lease", "revoke", &format!("{lease:x}")])?;
        wait_until("the record is back", SOON, || {
            let now = fabric.etcdctl(&["get", "-w", "json", &key(&had)])?;
            ensure!(now.contains("\"lease\"") && !now.contains(&lease.to_string()), "{now}");
            Ok(())
        })?;
        node.wait_ready()?;
        ensure!(subnet(node)? == had);
    }
    fabric.lost_nothing().map(drop)
}

#[test]
fn lease_that_another_node_got_meanwhile_is_left_alone_until_a_person_says_otherwise() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let node = Arc::clone(&fabric.nodes[0]);
    let had = subnet(&node)?;
    let endpoints = fabric.lab.etcd().endpoints();
    let lease = |args: &[&str]| {
        fabric.nodes[1].run(&[&["fabricctl", "lease"], args, &["--etcd-endpoints", &endpoints]].concat())
    };
    node.freeze_fabricd()?;
    wait_until("the lease has ended", SOON, || {
        ensure!(fabric.etcdctl(&["get", &key(&had)])?.is_empty());
        Ok(())
    })?;
    ensure!(routes(&fabric.nodes[1])? == 1, "the others keep its routes: its pods are fine");
    // A person gives its subnet to another node, which comes.
    lease(&["release", "node-1"])?;
    lease(&["reserve", "node-3", &had])?;
    ensure!(lease(&["list"])?.contains("reserved, node away"));
    // From here on the subnet is the other's, and so are the packets for it: the stream ends here.
    let mut lab = fabric.lab;
    drop(fabric.stream);
    let third = lab.boot_node()?;
    start(&third)?;
    third.wait_ready()?;
    ensure!(subnet(&third)? == had);

    node.thaw_fabricd()?;
    waits_until_it_says(&node, "pods of this node still have addresses in it")?;
    let record = lab.etcd().ctl(&["get", &key(&had)])?;
    ensure!(record.contains("node-3"), "the stale node has written: {record}");
    let refused = node.add_pod("late").map(drop).map_err(|error| format!("{error:#}"));
    ensure!(refused.as_ref().is_err_and(|told| told.contains("node-3")), "{refused:?}");
    let told = node.exec(&["fabricctl", "lease", "renumber"])?;
    ensure!(!told.success() && told.stderr.contains("renumber --force"), "{}", told.stderr);
    node.run(&["fabricctl", "lease", "renumber", "--force"])?;
    node.wait_ready()?;
    ensure!(subnet(&node)? != had);
    // The pods that were given up go, and the bridge's address with the next one that comes.
    node.pod("a")?.del()?;
    node.add_pod("new")?;
    Ok(())
}

#[test]
fn node_cut_off_from_etcd_for_longer_than_its_lease_stays_reachable() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let node = &fabric.nodes[1];
    let had = subnet(node)?;
    node.cut_off(fabric.lab.etcd().address(1))?;
    waits_until_it_says(node, "its time has run out")?;
    wait_until("the lease has ended in etcd", SOON, || {
        ensure!(fabric.etcdctl(&["get", &key(&had)])?.is_empty());
        Ok(())
    })?;
    fabric.stream.wait_for(2_000, SOON)?;
    ensure!(routes(&fabric.nodes[0])? == 1, "its routes stay until the subnet is leased anew");
    node.heal()?;
    wait_until("it is ready again", Duration::from_secs(40), || {
        ensure!(reason(node)?.is_empty(), "{}", reason(node)?);
        Ok(())
    })?;
    ensure!(subnet(node)? == had);
    fabric.lost_nothing().map(drop)
}

#[test]
fn second_node_with_the_same_address_is_refused_with_both_names() -> Result<()> {
    let mut fabric = Fabric::start(2)?;
    let twin = fabric.lab.boot_node()?;
    let address = fabric.nodes[0].underlay_ip(fabric_core::model::Family::V4).to_string();
    twin.start_fabricd_with(&["--public-ip", &address], &[])?;
    waits_until_it_says(&twin, &format!("the public address {address} of this node, node-3, is also that of node-1"))?;
    fabric.lost_nothing().map(drop)
}

#[test]
fn etcd_that_is_wiped_or_set_back_is_rebuilt_from_what_the_nodes_hold() -> Result<()> {
    let fabric = Fabric::start(3)?;
    let etcd = fabric.lab.etcd();
    let had = fabric.nodes.iter().map(|node| subnet(node)).collect::<Result<Vec<_>>>()?;
    let all_back = || {
        wait_until("every node has its subnet again", Duration::from_secs(40), || {
            for (node, had) in fabric.nodes.iter().zip(&had) {
                let record = fabric.etcdctl(&["get", &key(had)])?;
                ensure!(record.contains(&format!("\"node\":\"{}\"", node.name)), "{had}: {record}");
                ensure!(reason(node)?.is_empty(), "{}: {}", node.name, reason(node)?);
            }
            Ok(())
        })
    };
    etcd.back_up("/run/etcd-backup")?;
    etcd.ctl(&["put", "/later", "than the snapshot"])?;
    etcd.ctl(&["put", "/later", "still"])?;

    etcd.kill()?;
    etcd.restore(1, "/run/etcd-backup")?;
    etcd.start()?;
    all_back()?;
    etcd.kill()?;
    etcd.wipe(1)?;
    etcd.start()?;
    fabric.lab.init_network()?;
    all_back()?;
    fabric.lost_nothing().map(drop)
}

#[test]
fn full_etcd_and_a_lost_leader_lose_nothing() -> Result<()> {
    let fabric = Fabric::with(Lab::builder().nodes(0).etcd_members(3).start()?, 2)?;
    let etcd = fabric.lab.etcd();
    // A thousand packets a second.
    let two_leases = 2_000 * TTL.as_secs();
    for member in etcd.members() {
        etcd.end_member(member, Signal::SIGKILL)?;
        // Two leases' time: somebody has to keep them alive through the two that are left.
        fabric.stream.wait_for(two_leases, 2 * SOON)?;
        for node in &fabric.nodes {
            ensure!(reason(node)?.is_empty(), "{}: {}", node.name, reason(node)?);
        }
        etcd.start_member(member, &[])?;
        etcd.wait_healthy(member)?;
    }
    let had = subnet(&fabric.nodes[0])?;
    // Out of space, etcd takes no writes; keeping alive is none.
    etcd.kill()?;
    for member in etcd.members() {
        etcd.start_member(member, &["--quota-backend-bytes", "1"])?;
    }
    wait_until("etcd is full", SOON, || {
        etcd.ctl(&["put", "/one", "too many"]).ok();
        let alarms = etcd.ctl(&["alarm", "list"])?;
        ensure!(alarms.contains("NOSPACE"), "{alarms}");
        Ok(())
    })?;
    fabric.stream.wait_for(two_leases, 2 * SOON)?;
    etcd.kill()?;
    for member in etcd.members() {
        etcd.start_member(member, &[])?;
    }
    wait_until("etcd has space again", SOON, || etcd.ctl(&["alarm", "disarm"]))?;
    wait_until("all is well again", Duration::from_secs(40), || {
        ensure!(reason(&fabric.nodes[0])?.is_empty());
        Ok(())
    })?;
    ensure!(subnet(&fabric.nodes[0])? == had);
    fabric.lost_nothing().map(drop)
}

#[test]
fn garbage_in_etcd_is_refused_by_itself() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let own = subnet(&fabric.nodes[0])?;
    let vxlan = |mac: &str| {
        format!(r#"{{"PublicIP":"10.99.7.7","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#)
    };
    let good = vxlan("02:42:c0:00:07:07");
    let huge = format!(r#"{{"PublicIP":"10.99.7.7","Padding":"{}"}}"#, "x".repeat(100_000));
    let overlapping = key(&own).replace("-24", "-25");
    for (key, value) in [
        (overlapping.as_str(), good.as_str()),
        (&format!("{SUBNETS}10.244.0.0-16"), &good),
        (&format!("{SUBNETS}10.244.240.0-24"), &huge),
        (&format!("{SUBNETS}10.244.241.0-24"), &vxlan("01:00:5e:00:00:01")),
        (&format!("{SUBNETS}10.244.242.0-24"), "not JSON"),
        (&format!("{SUBNETS}nonsense"), &good),
        (&format!("{SUBNETS}10.244.243.0-24"), &good.replace("10.99.7.7", "224.0.0.1")),
    ] {
        fabric.etcdctl(&["put", key, value])?;
    }
    fabric.etcdctl(&["put", &format!("{SUBNETS}10.244.249.0-24"), &vxlan("02:42:c0:00:07:09")])?;
    wait_until("the good one is taken in", SOON, || {
        ensure!(routes(&fabric.nodes[0])? == 2);
        Ok(())
    })?;
    ensure!(reason(&fabric.nodes[0])?.is_empty());
    fabric.lost_nothing().map(drop)
}

#[test]
fn damaged_state_files_are_set_aside() -> Result<()> {
    let fabric = Fabric::start(2)?;
    let node = &fabric.nodes[0];
    let had = subnet(node)?;
    for damage in [&b""[..], b"fabricd-state 1 00", b"\xff\xff"] {
        node.kill_fabricd()?;
        let file = node.path("/var/lib/fabric/lease.state")?;
        wait_until("it has been written", SOON, || {
            ensure!(file.exists());
            Ok(())
        })?;
        fs::write(&file, damage)?;
        start(node)?;
        node.wait_ready()?;
        ensure!(node.log("fabricd").contains("state on disk can't be used"));
        ensure!(subnet(node)? == had);
        wait_until("it is written anew", SOON, || {
            ensure!(file.exists());
            Ok(())
        })?;
    }
    fabric.lost_nothing().map(drop)
}
