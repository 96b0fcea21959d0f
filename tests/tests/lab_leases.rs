//! Leases through a machine's life, in the Lab with a real etcd: reboots, disks that are damaged or too old, reservations,
//! and changes of the network config. What must cost nothing is a fault of `fabric_tests::faults`.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::lease::key;
use fabric_tests::lab::{Lab, Node, Stream, wait_until};

/// How long a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(40);

const STATE: &str = "/var/lib/fabric/lease.state";

/// A lab of so many nodes whose leases end soon.
fn lab(nodes: u16) -> Result<(Lab, Vec<Arc<Node>>)> {
    let mut lab = Lab::builder().nodes(0).start()?;
    let nodes = (0..nodes).map(|_| lab.boot_node()).collect::<Result<Vec<_>>>()?;
    nodes.iter().try_for_each(|node| start(node))?;
    nodes.iter().try_for_each(|node| node.wait_ready())?;
    Ok((lab, nodes))
}

fn start(node: &Node) -> Result<()> {
    node.start_fabricd_with(&["--lease-ttl", "5s", "--lease-grace", "5s"], &[])
}

fn until(what: &str, condition: impl Fn() -> Result<bool>) -> Result<()> {
    wait_until(what, SOON, || {
        ensure!(condition()?);
        Ok(())
    })
}

fn until_gone(lab: &Lab, subnet: &str) -> Result<()> {
    until(&format!("the lease of {subnet} has ended"), || Ok(lab.record(subnet)?.is_empty()))
}

/// Switches a node off for longer than its lease, and on again: namespaces, devices and /run are new, /var/lib stays.
fn reboot(lab: &Lab, node: &Node, had: &str) -> Result<()> {
    node.power_off()?;
    until_gone(lab, had)?;
    lab.boot_again(node)
}

#[test]
fn a_reboot_keeps_subnet_and_mac_with_or_without_etcd() -> Result<()> {
    let (lab, nodes) = lab(2)?;
    let (node, had) = (&nodes[0], nodes[0].subnet()?);
    let mac = |node: &Node| node.run(&["cat", "/sys/class/net/fabric.1/address"]);
    let vtep = mac(node)?;
    reboot(&lab, node, &had)?;
    start(node)?;
    node.wait_holding(&had)?;
    ensure!(mac(node)? == vtep);

    // Once more, and etcd is away: the data plane comes from the disk, and no pod is taken in before etcd has confirmed it.
    reboot(&lab, node, &had)?;
    lab.etcd().kill()?;
    start(node)?;
    node.wait_trouble("from disk")?;
    until("the peer is back", || Ok(node.routes()? == 1))?;
    ensure!(mac(node)? == vtep);
    ensure!(node.refuses_pod("early")?.contains("from disk"));
    lab.etcd().start()?;
    node.wait_holding(&had)?;
    let (here, there) = (node.add_pod("a")?, nodes[1].add_pod("a")?);
    ensure!(Stream::start(&here, &there)?.stop()?.lost == 0);
    Ok(())
}

#[test]
fn an_older_state_on_disk_gives_way_to_what_etcd_says() -> Result<()> {
    let (_lab, nodes) = lab(2)?;
    let (node, had) = (&nodes[0], nodes[0].subnet()?);
    let file = node.path(STATE)?;
    until("the lease is on disk", || Ok(file.exists()))?;
    let old = fs::read(&file)?;
    node.run(&["fabricctl", "lease", "renumber"])?;
    until("it has another subnet", || Ok(node.trouble()?.is_empty() && node.subnet()? != had))?;
    let has = node.subnet()?;
    // As a disk restored from a backup: it names a subnet that is not this node's any more.
    node.stop_fabricd()?;
    fs::write(&file, old)?;
    start(node)?;
    node.wait_ready()?;
    let now = node.subnet()?;
    ensure!(now == had || now == has, "a third subnet, {now}");
    until("one record is this node's", || {
        let records =
            node.run(&["etcdctl", "get", "--prefix", "--print-value-only", "/coreos.com/network/subnets/"])?;
        Ok(records.matches("\"node\":\"node-1\"").count() == 1)
    })
}

#[test]
fn a_reservation_survives_its_nodes_absence_and_flannels_allocation() -> Result<()> {
    let (lab, nodes) = lab(2)?;
    let (away, other, had) = (&nodes[0], &nodes[1], nodes[0].subnet()?);
    let endpoints = lab.etcd().endpoints();
    let lease = |args: &[&str]| other.run(&[&["fabricctl", "lease"], args, &["--etcd-endpoints", &endpoints]].concat());
    lease(&["reserve", "node-1", &had])?;
    away.power_off()?;
    until("a placeholder stands there", || Ok(lab.record(&had)?.contains("fabric-reserved")))?;
    ensure!(lease(&["list"])?.contains("reserved, node away"));
    // flannel takes a subnet that it sees as free, by a transaction that wants the key absent.
    let compare = format!("version(\"{}\") = \"0\"\n\nput \"{}\" \"mine\"\n\n\n", key(&had), key(&had));
    let allocate = ["etcdctl", "--endpoints", &endpoints, "txn"];
    let answer = lab.underlay().machine.command(&allocate)?.env("ETCDCTL_API", "3").stdin(compare).run()?;
    ensure!(answer.contains("FAILURE"), "flannel got it: {answer}");
    // And its placeholder is no peer: no address of it is sent to.
    ensure!(other.routes()? == 0, "{} routes", other.routes()?);
    // Lost with a person's slip, it is put back by those that are there.
    lab.etcd().ctl(&["del", &key(&had)])?;
    until("it is put back", || Ok(!lab.record(&had)?.is_empty()))?;

    lab.boot_again(away)?;
    fs::remove_dir_all(away.path("/var/lib/fabric")?)?;
    start(away)?;
    away.wait_holding(&had)
}

#[test]
fn what_may_change_in_the_config_changes_at_once_and_the_rest_by_migration() -> Result<()> {
    let (lab, nodes) = lab(2)?;
    let (node, other) = (&nodes[0], &nodes[1]);
    let had = node.subnet()?;
    let put = |json: &str| lab.etcd().ctl(&["put", "/coreos.com/network/config", json]);
    let mtu_is = |mtu: u32| {
        until(&format!("the MTU is {mtu}"), || {
            Ok(node.run(&["ip", "link", "show", "fabric.1"])?.contains(&format!("mtu {mtu} ")))
        })
    };
    put(
        r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.200.0","SubnetMax":"10.244.201.0","Backend":{"Type":"vxlan","MTU":1400,"DirectRouting":true}}"#,
    )?;
    mtu_is(1350)?;
    let gateway = format!("via {}", other.underlay_ip(Family::V4));
    until("the peer is routed directly", || Ok(node.run(&["ip", "route"])?.contains(&gateway)))?;
    ensure!(node.subnet()? == had && node.trouble()?.is_empty(), "{}: {}", node.subnet()?, node.trouble()?);
    // First and last subnet are for the next one that it takes.
    node.run(&["fabricctl", "lease", "renumber"])?;
    until("it took one of two", || {
        Ok(node.trouble()?.is_empty() && ["10.244.200.0/24", "10.244.201.0/24"].contains(&&*node.subnet()?))
    })?;

    for (broken, told) in [("{", "can't be used"), ("", "there is no network config")] {
        if broken.is_empty() {
            lab.etcd().ctl(&["del", "/coreos.com/network/config"])?
        } else {
            put(broken)?
        };
        until(told, || Ok(node.status_or_not()?.to_string().contains(told)))?;
        ensure!(node.trouble()?.is_empty(), "{}", node.trouble()?);
        mtu_is(1350)?;
    }

    // What running pods depend on waits for a person.
    put(r#"{"Network":"10.96.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan","VNI":7}}"#)?;
    let pending = |node: &Node| anyhow::Ok(node.status_or_not()?["pending"].as_array().map_or(0, Vec::len));
    until("it is pending on both", || Ok(pending(node)? > 0 && pending(other)? > 0))?;
    ensure!(node.subnet()?.starts_with("10.244."));
    node.run(&["fabricctl", "network", "migrate"])?;
    until("the node has migrated", || {
        Ok(node.trouble()?.is_empty() && node.subnet()?.starts_with("10.96.") && node.subnet()?.ends_with("/25"))
    })?;
    ensure!(node.run(&["ip", "-d", "link", "show", "fabric.7"])?.contains("vxlan id 7"));
    ensure!(pending(node)? == 0 && pending(other)? > 0, "the other one waits for its own migration");
    other.run(&["fabricctl", "network", "migrate"])?;
    until("both have", || {
        Ok(other.trouble()?.is_empty()
            && node.run(&["ip", "route", "show", "dev", "fabric.7", "proto", "250"])?.lines().count() == 1)
    })?;
    let (here, there) = (node.add_pod("a")?, other.add_pod("a")?);
    ensure!(Stream::start(&here, &there)?.stop()?.lost == 0);
    Ok(())
}

#[test]
fn damaged_state_files_are_set_aside() -> Result<()> {
    let (_lab, nodes) = lab(1)?;
    let (node, had) = (&nodes[0], nodes[0].subnet()?);
    for damage in [&b""[..], b"fabricd-state 1 00", b"\xff\xff"] {
        let file = node.path(STATE)?;
        until("it has been written", || Ok(file.exists()))?;
        node.kill_fabricd()?;
        fs::write(&file, damage)?;
        start(node)?;
        node.wait_ready()?;
        ensure!(node.log("fabricd").contains("state on disk can't be used"));
        ensure!(node.subnet()? == had);
        until("it is written anew", || Ok(file.exists()))?;
    }
    Ok(())
}

/// Two machines with one name: one that nobody has named, and one whose disk was copied.
#[test]
fn a_second_machine_of_one_name_waits_and_the_first_ones_pods_are_reached() -> Result<()> {
    let (mut lab, nodes) = lab(2)?;
    let (first, had) = (&nodes[0], nodes[0].subnet()?);
    let (pod, other) = (first.add_pod("a")?, nodes[1].add_pod("a")?);
    let stream = Stream::start(&other, &pod)?;
    let record = lab.record(&had)?;
    let second = lab.boot_node()?;
    for copied in [false, true] {
        if copied {
            let state = first.path("/var/lib/fabric")?;
            second.run(&["mkdir", "-p", "/var/lib/fabric"])?;
            for file in fs::read_dir(state)? {
                let file = file?;
                fs::copy(file.path(), second.path("/var/lib/fabric")?.join(file.file_name()))?;
            }
        }
        second.start_fabricd_with(&["--node-name", "node-1"], &[])?;
        let told = second.wait_trouble("another machine that lives is called node-1 too")?;
        let here = first.run(&["cat", "/proc/sys/kernel/random/boot_id"])?;
        for word in [had.as_str(), here.trim(), "10.99.0.11", "10.99.0.13", "--node-name"] {
            ensure!(told.contains(word), "{word} is not in {told}");
        }
        until("the first one says so too", || {
            Ok(first.status_or_not()?["warnings"].to_string().contains("10.99.0.13"))
        })?;
        second.refuses_pod(if copied { "copied" } else { "early" })?;
        second.stop_fabricd()?;
        // Nor does its end take away what is not its own.
        let removed = second.run(&["fabricd", "--cleanup", "--node-name", "node-1"])?;
        ensure!(removed.contains("leased to node-1 at 10.99.0.11"), "{removed}");
    }
    ensure!(first.trouble()?.is_empty() && lab.record(&had)? == record, "the record was written");
    ensure!(stream.stop()?.lost == 0);
    // The way out that was told.
    second.start_fabricd()?;
    second.wait_ready()
}

#[test]
fn a_reinstalled_machine_has_its_subnet_back_though_its_lease_has_not_ended() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (node, had) = (lab.node("node-1")?, lab.node("node-1")?.subnet()?);
    let record = lab.record(&had)?;
    node.power_off()?;
    lab.boot_again(node)?;
    fs::remove_dir_all(node.path("/var/lib/fabric")?)?;
    node.start_fabricd()?;
    node.wait_holding(&had)?;
    ensure!(lab.record(&had)? != record, "it did not claim anew");
    Ok(())
}

#[test]
fn a_renamed_machine_keeps_its_subnet_and_its_pods() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (node, had) = (lab.node("node-2")?, lab.node("node-2")?.subnet()?);
    let (pod, other) = (node.add_pod("a")?, lab.node("node-1")?.add_pod("a")?);
    let stream = Stream::start(&other, &pod)?;
    let rename = |name: &str| {
        node.stop_fabricd()?;
        node.start_fabricd_with(&["--node-name", name], &[])?;
        node.wait_holding(&had)
    };
    rename("node-2.example.internal")?;
    // Without a memory, too.
    fs::remove_dir_all(node.path("/var/lib/fabric")?)?;
    rename("short")?;
    ensure!(stream.stop()?.lost == 0);
    // With nothing in etcd either, where a person has released the former name's lease: the pods tell.
    node.stop_fabricd()?;
    lab.node("node-1")?.run(&["fabricctl", "lease", "release", "short"])?;
    fs::remove_dir_all(node.path("/var/lib/fabric")?)?;
    node.start_fabricd_with(&["--node-name", "long.example.internal"], &[])?;
    node.wait_holding(&had)?;
    for pod in [pod, node.add_pod("b")?] {
        ensure!(Stream::start(&other, &pod)?.stop()?.lost == 0);
    }
    Ok(())
}

/// The pods' subnet can't be had: the node says so, and is ready when it can, or when a person gives the pods up.
#[test]
fn a_node_is_not_ready_with_another_subnet_than_its_pods_have() -> Result<()> {
    let lab = Lab::builder().nodes(2).start()?;
    let (node, had) = (lab.node("node-2")?, lab.node("node-2")?.subnet()?);
    node.add_pod("a")?;
    let lease = |args: &[&str]| lab.node("node-1")?.run(&[&["fabricctl", "lease"], args].concat());
    let forget = || {
        node.stop_fabricd()?;
        Ok::<_, anyhow::Error>(fs::remove_dir_all(node.path("/var/lib/fabric")?)?)
    };
    forget()?;
    lease(&["release", "node-2"])?;
    lease(&["reserve", "node-9", &had])?;
    node.start_fabricd()?;
    let told = node.wait_trouble(&format!("{had} is held by node-9"))?;
    ensure!(told.contains("fabricctl lease renumber --force"), "{told}");
    lease(&["unreserve", "node-9"])?;
    node.wait_holding(&had)?;

    // Another node's by now, and a person gives the pod up: also over a restart.
    forget()?;
    lease(&["release", "node-2"])?;
    lease(&["reserve", "node-9", &had])?;
    node.start_fabricd()?;
    node.wait_trouble(&format!("{had} is held by node-9"))?;
    node.run(&["fabricctl", "lease", "renumber", "--force"])?;
    until("it has another subnet", || Ok(node.trouble()?.is_empty() && node.subnet()? != had))?;
    let has = node.subnet()?;
    node.stop_fabricd()?;
    node.start_fabricd()?;
    node.wait_holding(&has)
}
