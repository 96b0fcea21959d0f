//! The underlay changes under a running fabric.

use anyhow::{Context as _, Result, ensure};
use fabric_core::handoff::NodeFile;
use fabric_core::model::Family;

use super::pair::{BY_EVENT, PATIENCE, Pair};
use super::{Fault, Trial};
use crate::lab::wait_until;

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 14,
        what: "the underlay interface goes down and up, 100 times",
        holds: "all entries within 2 s; traffic flows",
        trial: flapping,
    },
    Fault {
        number: 15,
        what: "the underlay address changes, moves, has another link name",
        holds: "republished; subnet, MAC and device stay; traffic flows",
        trial: address_changes,
    },
    Fault {
        number: 16,
        what: "the underlay MTU changes",
        holds: "0 packets lost; device and files follow within 2 s",
        trial: mtu_changes,
    },
];

fn flapping(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(100)?;
    let before = pair.shown()?;
    let traffic = pair.traffic()?;
    let gateway = crate::lab::addresses::gateway(Family::V4).to_string();
    let flaps = trial.random.u32(80..120);
    let script = format!(
        "for i in $(seq {flaps}); do ip link set eth0 down; ip link set eth0 up; done
         ip route replace default via {gateway}"
    );
    pair.node.run(&["sh", "-ec", &script])?;
    pair.node.wait_ready()?;
    pair.shows_again(&before, BY_EVENT)?;
    traffic.flows()
}

fn address_changes(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(20)?;
    let index = crate::bench::changes::index_of(&pair.node, "fabric.1")?;
    let file = node_file(&pair)?;
    let traffic = pair.traffic()?;
    let fresh = format!("10.99.1.{}", trial.random.u8(1..=250));
    let gateway = crate::lab::addresses::gateway(Family::V4).to_string();
    let old = pair.node.underlay_ip(Family::V4).to_string();

    // As an operator does it: the new one, then the old one goes, and the default route follows.
    pair.node.run(&["ip", "address", "add", &format!("{fresh}/16"), "dev", "eth0"])?;
    pair.node.run(&["ip", "address", "del", &format!("{old}/16"), "dev", "eth0"])?;
    pair.node.run(&["ip", "address", "replace", &format!("{fresh}/16"), "dev", "eth0"])?;
    pair.node.run(&["ip", "route", "replace", "default", "via", &gateway])?;
    wait_until("the other node sends to the new address", PATIENCE, || {
        let fdb = pair.other.run(&["bridge", "fdb", "show", "dev", "fabric.1"])?;
        ensure!(fdb.contains(&fresh) && !fdb.contains(&format!("dst {old} ")), "{fdb}");
        Ok(())
    })?;
    traffic.goes_on(300)?;

    pair.node.run(&["ip", "link", "set", "eth0", "down"])?;
    pair.node.run(&["ip", "link", "set", "eth0", "name", "wan0"])?;
    pair.node.run(&["ip", "link", "set", "wan0", "up"])?;
    pair.node.run(&["ip", "route", "replace", "default", "via", &gateway])?;
    pair.node.wait_ready()?;
    traffic.goes_on(300)?;

    // To a bridge, as operators put their interface into one. Then that goes, and comes back.
    pair.node.run(&["sh", "-ec", &format!("ip address del {fresh}/16 dev wan0")])?;
    for _ in 0..2 {
        let script = format!(
            "ip link add br0 up type bridge
             ip link set wan0 master br0
             ip address add {fresh}/16 dev br0
             ip route replace default via {gateway}"
        );
        pair.node.run(&["sh", "-ec", &script])?;
        pair.within(BY_EVENT, "the bridge is the underlay", || {
            let shown = pair.node.exec(&["fabricctl", "status"])?.stdout;
            ensure!(shown.contains("br0"), "{shown}");
            Ok(())
        })?;
        pair.node.wait_ready()?;
        traffic.goes_on(300)?;
        pair.node.run(&["ip", "link", "del", "br0"])?;
    }
    pair.node.run(&["ip", "address", "add", &format!("{fresh}/16"), "dev", "wan0"])?;
    pair.node.run(&["ip", "route", "replace", "default", "via", &gateway])?;
    pair.node.wait_ready()?;
    traffic.flows()?;
    ensure!(node_file(&pair)?.ipv4 == file.ipv4, "the subnet has changed");
    ensure!(crate::bench::changes::index_of(&pair.node, "fabric.1")? == index, "the device was made anew");
    let link = pair.node.run(&["ip", "-d", "link", "show", "fabric.1"])?;
    ensure!(link.contains(&format!("local {fresh}")), "{link}");
    Ok(())
}

fn mtu_changes(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(20)?;
    let traffic = pair.traffic()?;
    for _ in 0..3 {
        let mtu = trial.random.u32(1300..1500);
        pair.node.run(&["ip", "link", "set", "eth0", "mtu", &mtu.to_string()])?;
        pair.within(BY_EVENT, "device and files follow", || {
            let link = pair.node.run(&["ip", "link", "show", "fabric.1"])?;
            ensure!(link.contains(&format!("mtu {} ", mtu - 50)), "{link}");
            ensure!(node_file(&pair)?.mtu == mtu - 50, "node.json says another");
            let env = std::fs::read_to_string(pair.node.path("/run/flannel/subnet.env")?)?;
            ensure!(env.contains(&format!("FLANNEL_MTU={}", mtu - 50)), "{env}");
            Ok(())
        })?;
    }
    traffic.lost_nothing()
}

fn node_file(pair: &Pair) -> Result<NodeFile> {
    let bytes = std::fs::read(pair.node.path("/run/fabric/node.json")?)?;
    NodeFile::decode(&bytes).ok().context("malformed node.json")
}
