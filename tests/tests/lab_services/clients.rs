//! Clients that stay: affinity, and UDP from one port.

use anyhow::Result;
use fabric_core::model::Family;
use fabric_tests::lab::{By, ask, wait_until};
use serde_json::json;

use crate::{Cluster, EACH, SOON, UdpClient, answered_by_one_of, at, vip};

#[test]
fn client_with_affinity_stays_with_its_endpoint_over_changes_and_a_restart() -> Result<()> {
    let cluster = Cluster::start()?;
    cluster.serve("sticky", 10, &["a", "b", "c", "d"], &json!({"sessionAffinity": "ClientIP"}));
    let node = &cluster.nodes[0];
    let client = cluster.pod("b").network()?;
    let name = |by, family| -> Result<String> {
        wait_until("an answer", SOON, || {
            let answer = ask(&client, by, at(vip(family, 10), by))?;
            answer.name().map(str::to_owned).ok_or_else(|| anyhow::anyhow!("{answer:?}"))
        })
    };
    for (by, family) in EACH {
        let first = name(by, family)?;
        for _ in 0..8 {
            assert_eq!(name(by, family)?, first);
        }
    }
    // Other endpoints come and go: it stays. Its own one goes: it gets another, and stays with that.
    let (by, family) = (By::Tcp, Family::V4);
    let first = name(by, family)?;
    let others: Vec<&str> = ["a", "b", "c", "d"].into_iter().filter(|other| *other != first).collect();
    cluster.change("sticky", &[&first, others[0]]);
    node.kill_fabricd()?;
    cluster.start_fabricd(node)?;
    node.wait_ready()?;
    for _ in 0..8 {
        assert_eq!(name(by, family)?, first);
    }
    cluster.change("sticky", &others[1..]);
    answered_by_one_of(&client, by, at(vip(family, 10), by), &others[1..])?;
    let then = name(by, family)?;
    for _ in 0..8 {
        assert_eq!(name(by, family)?, then);
    }
    Ok(())
}

/// The endpoints that are taken away go on serving, so whoever is sent there is answered.
#[test]
fn udp_client_that_keeps_its_port_is_led_to_who_serves_now() -> Result<()> {
    let cluster = Cluster::start()?;
    cluster.serve("dns", 20, &["a"], &json!({}));
    cluster.serve("other", 21, &["a"], &json!({}));
    let (client, node) = (cluster.pod("b").network()?, &cluster.nodes[0]);
    for family in Family::ALL {
        let target = |number| at(vip(family, number), By::Udp);
        let (dns, other) = (UdpClient::new(&client, target(20))?, UdpClient::new(&client, target(21))?);
        dns.is_answered_by("a")?;
        other.is_answered_by("a")?;
        cluster.change("dns", &["c"]);
        dns.is_answered_by("c")?;
        node.kill_fabricd()?;
        cluster.change("dns", &["a"]);
        cluster.start_fabricd(node)?;
        dns.is_answered_by("a")?;
        other.is_answered_by("a")?;
    }
    Ok(())
}
