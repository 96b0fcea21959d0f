//! What is evaluated again when policies or pods change: connections that are open, addresses that are used again.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use fabric_core::policy::Conn;
use fabric_tests::lab::{Connection, Pod, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, pods_of, policies_of, policy};
use serde_json::{Value, json};

use crate::{Cluster, Open, PORTS, SOON, Server, connects, open_and_closed};

#[test]
fn pod_with_the_address_of_one_that_is_gone_is_closed_until_its_policies_are_applied() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let target = cluster.add_pod(node, "open", "target")?;
    let server = Server::start(&target)?;
    let to = SocketAddr::new(target.ips()[0], PORTS[0]);
    let first = cluster.add_pod(node, "open", "first")?;
    let ips = first.ips().to_vec();
    let conn = Conn { src: ips[0], dst: to.ip(), protocol: 17, port: to.port() };
    assert!(connects(&first, &conn)?);
    let heard = server.heard();
    node.kill_fabricd()?;
    first.del()?;
    cluster.api.delete(&pods_of("open"), "first");
    // host-local gives out the next address.
    let book = node.path("/var/lib/cni/networks/fabric")?;
    for (range, ip) in ips.iter().enumerate() {
        let before = match ip {
            IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() - 1).into()),
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() - 1).into()),
        };
        std::fs::write(book.join(format!("last_reserved_ip.{range}")), before.to_string())?;
    }
    let second = cluster.add_pod(node, "closed", "second")?;
    assert_eq!(second.ips(), ips, "the same addresses");
    assert!(!connects(&second, &conn)?, "no daemon has applied its policies");
    cluster.start_fabricd(node)?;
    assert!(!connects(&second, &conn)?, "it may send nothing");
    assert_eq!(server.heard(), heard);
    Ok(())
}

#[test]
fn open_connection_that_a_policy_forbids_is_cut_and_others_go_on() -> Result<()> {
    let cluster = Cluster::start(2)?;
    cluster.api.create(NAMESPACES, namespace("x", &json!({})));
    let from = |name: &str| json!({"podSelector": {"matchLabels": {"pod": name}}});
    let spec = |peers: &[&str]| {
        let peers: Vec<Value> = peers.iter().map(|name| from(name)).collect();
        json!({"podSelector": {"matchLabels": {"pod": "db"}}, "ingress": [{"from": peers}]})
    };
    cluster.api.create(&policies_of("x"), policy("x", "db", &spec(&["web", "other"])));
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let db = cluster.add_pod(&cluster.nodes[0], "x", "db")?;
    let web = cluster.add_pod(&cluster.nodes[1], "x", "web")?;
    let other = cluster.add_pod(&cluster.nodes[0], "x", "other")?;
    let _server = Server::start(&db)?;
    let conn = |from: &Pod| Conn { src: from.ips()[0], dst: db.ips()[0], protocol: 6, port: PORTS[0] };
    for pod in [&web, &other] {
        wait_until("it may connect", SOON, || {
            ensure!(connects(pod, &conn(pod))?, "it may not");
            Ok(())
        })?;
    }
    let mut open = Open::between(&web, &db, 0)?;
    assert!(open.arrives()?);
    let kept = Connection::start(&other, &db)?;

    cluster.api.change(&policies_of("x"), "db", &json!({"spec": spec(&["other"])}));
    wait_until("the connection is cut", SOON, || {
        ensure!(!open.arrives()?, "it goes on");
        Ok(())
    })?;
    assert!(!connects(&web, &conn(&web))?);
    cluster.api.change(&policies_of("x"), "db", &json!({"spec": spec(&["web", "other"])}));
    wait_until("the connection goes on", SOON, || {
        ensure!(open.arrives()?, "it is cut");
        Ok(())
    })?;
    let report = kept.stop()?;
    assert!(report.broken.is_none() && report.echoed > 0, "{report:?}");
    Ok(())
}
