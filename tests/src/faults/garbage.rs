//! Somebody writes into etcd what doesn't belong there.

use std::sync::Arc;

use anyhow::{Result, ensure};
use fabric_core::model::Family;

use super::leased::Leased;
use super::{Fault, Trial};
use crate::lab::lease::{flannels_record, key};

pub(super) const ROWS: &[Fault] = &[Fault {
    number: 23,
    what: "hostile and garbage values in etcd",
    holds: "0 lost; each refused by itself; a write over ours is undone or alarmed",
    trial: garbage,
}];

fn garbage(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased(3)?;
    let had = fabric.subnets()?;
    fabric.until_routes(&fabric.nodes[0], 2)?;
    let good = flannels_record("10.99.7.7", 7);
    let huge = format!(r#"{{"Padding":"{}",{}"#, "x".repeat(1_000_000), good.trim_start_matches('{'));
    let own = had[0].trim_end_matches("/24");
    let mut values = [
        // Overlaps a node's own, twice, and all of the network.
        (format!("{own}/25"), good.clone()),
        (format!("{own}/23"), good.clone()),
        ("10.128.0.0/10".to_owned(), good.clone()),
        // Outside the network.
        ("192.0.2.0/24".to_owned(), good.clone()),
        ("10.129.0.0/24".to_owned(), huge.clone()),
        ("10.129.1.0/24".to_owned(), huge[..900_000].to_owned()),
        ("10.129.2.0/24".to_owned(), good.replace("02:42:c0:00:07:07", "01:00:5e:00:00:01")),
        ("10.129.3.0/24".to_owned(), good.replace("02:42:c0:00:07:07", "00:00:00:00:00:00")),
        ("10.129.4.0/24".to_owned(), "not JSON".to_owned()),
        ("10.129.5.0/24".to_owned(), "null".to_owned()),
        ("nonsense".to_owned(), good.clone()),
        ("../config".to_owned(), good.clone()),
        ("10.129.6.0/24".to_owned(), good.replace("10.99.7.7", "224.0.0.1")),
        ("10.129.7.0/24".to_owned(), good.replace("10.99.7.7", "$(reboot)")),
        ("10.129.8.0/24".to_owned(), good.replace("\"VNI\":1", "\"VNI\":99999999")),
    ];
    trial.random.shuffle(&mut values);
    for (subnet, value) in &values {
        fabric.put(subnet, value)?;
    }
    // Two good ones come after all of it: nothing before has stopped the watch.
    fabric.put("10.130.0.0/24", &good)?;
    fabric.put("10.130.1.0/24", &flannels_record("10.99.7.8", 8))?;
    for node in &fabric.nodes {
        fabric.until("the good ones are taken in", || {
            let routes = node.run(&["ip", "route", "show", "dev", "fabric.1", "proto", "250"])?;
            ensure!(routes.contains("10.130.0.0/24") && routes.contains("10.130.1.0/24"), "{routes}");
            ensure!(routes.lines().count() == 4, "{routes}");
            Ok(())
        })?;
    }
    fabric.until_all_hold(&had)?;
    for (subnet, _) in &values {
        fabric.etcdctl(&["del", &key(subnet)])?;
    }
    write_over(&fabric, &had)?;
    fabric.lost_nothing()
}

/// flannel, which knows nodes by their address alone, writes over a record: for the same node, and for another.
fn write_over(fabric: &Leased, had: &[String]) -> Result<()> {
    let (node, third) = (&fabric.nodes[0], Arc::clone(&fabric.nodes[2]));
    let ip = node.underlay_ip(Family::V4).to_string();
    let mac = fabric.lab.record(&had[0])?;
    let mac = mac.split("\"VtepMAC\":\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default();
    fabric.put(&had[0], &flannels_record(&ip, 1).replace("02:42:c0:00:07:01", mac))?;
    fabric.until_all_hold(had)?;

    // A node without pods would move.
    third.add_pod("a")?;
    fabric.put(&had[2], &flannels_record("10.99.7.9", 9))?;
    third.wait_trouble("is held by 10.99.7.9 now, and pods of this node still have addresses in it")?;
    ensure!(third.log("fabricd").contains("was taken over by 10.99.7.9"), "{}", third.log_tail("fabricd"));
    let refused = third.refuses_pod("late")?;
    ensure!(refused.contains("10.99.7.9"), "{refused}");
    fabric.etcdctl(&["del", &key(&had[2])])?;
    fabric.until_all_hold(had)
}
