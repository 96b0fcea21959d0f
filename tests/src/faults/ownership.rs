//! Who has which subnet is called into question.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;

use super::leased::{Leased, TTL, start};
use super::stampede;
use super::{Fault, Trial};
use crate::lab::lease::flannels_record;
use crate::lab::{Node, Pod};

pub(super) const ROWS: &[Fault] = &[
    Fault { number: 6, what: "lease revoked", holds: "0 lost; same subnet taken again", trial: revoked },
    Fault {
        number: 7,
        what: "frozen for longer than the lease, subnet leased by another",
        holds: "it never writes, says so, hands out nothing; moves if it can",
        trial: lost_to_another,
    },
    Fault {
        number: 9,
        what: "50 daemons at once for 40 subnets",
        holds: "0 lost; 40 subnets (I1), 10 clear errors; one freed is taken",
        trial: stampede::trial,
    },
    Fault {
        number: 10,
        what: "two nodes with one address; two with one name",
        holds: "0 lost; the second is refused with both names",
        trial: duplicates,
    },
    Fault {
        number: 13,
        what: "the wall clock jumps an hour, forth and back",
        holds: "0 lost; no lease ends, nothing is written",
        trial: clock_jumps,
    },
];

fn revoked(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased(2)?;
    let had = fabric.subnets()?;
    for _ in 0..3 {
        let n = trial.random.usize(0..2);
        let lease = fabric.lab.etcd_lease(&had[n])?;
        fabric.etcdctl(&["lease", "revoke", &format!("{lease:x}")])?;
        fabric.until("it hangs on another lease", || {
            ensure!(fabric.lab.etcd_lease(&had[n])? != lease);
            Ok(())
        })?;
        fabric.until_all_hold(&had)?;
    }
    fabric.lost_nothing()
}

/// Two nodes beside those with the traffic: one with a pod, whose subnet a fabricd node gets, and one without, whose
/// subnet a flannel node takes.
fn lost_to_another(trial: &mut Trial) -> Result<()> {
    let mut fabric = trial.leased(4)?;
    let had = fabric.subnets()?;
    let [in_use, unused] = [2, 3].map(|n| Arc::clone(&fabric.nodes[n]));
    let pod = in_use.add_pod("a")?;
    for node in [&in_use, &unused] {
        node.freeze_fabricd()?;
    }
    fabric.until_gone(&had[2])?;
    fabric.until_gone(&had[3])?;
    // A person gives the one away; the other is free for flannel, which knows of no grace.
    let endpoints = fabric.lab.etcd().endpoints();
    let lease = |args: &[&str]| {
        fabric.nodes[0].run(&[&["fabricctl", "lease"], args, &["--etcd-endpoints", &endpoints]].concat())
    };
    lease(&["release", &in_use.name])?;
    lease(&["reserve", "node-5", &had[2]])?;
    ensure!(lease(&["list"])?.contains("reserved, node away"));
    fabric.put(&had[3], &flannels_record("10.99.7.7", 7))?;
    let heir = fabric.lab.boot_node()?;
    start(&heir)?;
    heir.wait_holding(&had[2])?;

    in_use.thaw_fabricd()?;
    unused.thaw_fabricd()?;
    stays_away_until_told(&fabric, &in_use, &had[2], pod)?;
    fabric.until("the node without pods has moved by itself", || {
        let has = unused.subnet()?;
        ensure!(unused.trouble()?.is_empty() && has != had[3], "it has {has}");
        Ok(())
    })?;
    ensure!(fabric.lab.record(&had[3])?.contains("10.99.7.7"), "it has written over flannel's record");
    fabric.lost_nothing()
}

fn stays_away_until_told(fabric: &Leased, node: &Arc<Node>, had: &str, pod: Pod) -> Result<()> {
    node.wait_trouble("pods of this node still have addresses in it")?;
    let record = fabric.lab.record(had)?;
    ensure!(record.contains("node-5"), "the stale node has written: {record}");
    let refused = node.refuses_pod("late")?;
    ensure!(refused.contains("node-5"), "{refused}");
    let told = node.exec(&["fabricctl", "lease", "renumber"])?;
    ensure!(!told.success() && told.stderr.contains("renumber --force"), "{}", told.stderr);
    node.run(&["fabricctl", "lease", "renumber", "--force"])?;
    node.wait_ready()?;
    ensure!(node.subnet()? != had);
    // The pod that was given up goes, and the bridge's address with the next one that comes.
    pod.del()?;
    node.add_pod("new").map(drop)
}

fn duplicates(trial: &mut Trial) -> Result<()> {
    let mut fabric = trial.leased(2)?;
    let had = fabric.subnets()?;
    let first = Arc::clone(&fabric.nodes[trial.random.usize(0..2)]);
    let address = first.underlay_ip(Family::V4).to_string();
    let same_address = fabric.lab.boot_node()?;
    same_address.start_fabricd_with(&["--public-ip", &address], &[])?;
    let name = &same_address.name;
    same_address
        .wait_trouble(&format!("the public address {address} of this node, {name}, is also that of {}", first.name))?;

    let same_name = fabric.lab.boot_node()?;
    let before = had.iter().map(|subnet| fabric.lab.record(subnet)).collect::<Result<Vec<_>>>()?;
    same_name.start_fabricd_with(&["--node-name", &first.name], &[])?;
    let told = same_name.wait_trouble(&format!("another machine that lives is called {} too", first.name))?;
    let other = same_name.underlay_ip(Family::V4).to_string();
    ensure!(told.contains(&address) && told.contains(&other) && told.contains("--node-name"), "{told}");
    let after = had.iter().map(|subnet| fabric.lab.record(subnet)).collect::<Result<Vec<_>>>()?;
    ensure!(after == before, "a node that was refused has written a record");
    fabric.until_all_hold(&had)?;
    fabric.lost_nothing()
}

/// The wall clock of one node is libfaketime's, and follows a file.
fn clock_jumps(trial: &mut Trial) -> Result<()> {
    const CLOCK: &str = "/run/clock";
    let fabric = trial.leased(2)?;
    let had = fabric.subnets()?;
    let node = &fabric.nodes[0];
    let clock = node.path(CLOCK)?;
    let env = [
        ("LD_PRELOAD", "/usr/$LIB/faketime/libfaketime.so.1"),
        ("FAKETIME_TIMESTAMP_FILE", CLOCK),
        ("FAKETIME_NO_CACHE", "1"),
        ("DONT_FAKE_MONOTONIC", "1"),
    ];
    let restart = || {
        node.stop_fabricd()?;
        node.start_fabricd_with(&["--lease-ttl", "5s", "--lease-grace", "5s"], &env)?;
        node.wait_ready()
    };
    // It keeps semaphores there, by process numbers that are this node's own.
    node.run(&["mount", "-t", "tmpfs", "shm", "/dev/shm"])?;
    fs::write(&clock, "+0")?;
    restart()?;
    let before = (fabric.lab.revision()?, node.log("fabricd").lines().count());
    for jump in ["+3600", "-3600", "+0"] {
        fs::write(&clock, jump)?;
        fabric.traffic_goes_on(TTL / 2 + Duration::from_millis(trial.random.u64(0..500)))?;
        restart()?;
    }
    ensure!(fabric.lab.revision()? == before.0, "something was written");
    ensure!(fabric.subnets()? == had);
    let log = node.log("fabricd");
    let times: Vec<&str> = log.lines().skip(before.1).filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(times.windows(2).any(|two| two[1] < two[0]), "the clock did not jump; is libfaketime installed?\n{log}");
    ensure!(!log.contains("lease lost"), "{log}");
    fabric.lost_nothing().context("with a clock that jumps")
}
