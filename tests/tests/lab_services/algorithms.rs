//! How an endpoint is picked: by turns, or by the client's address.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::underlay::BRIDGE;
use fabric_tests::lab::{By, ask, wait_until};
use fabric_tests::services::SERVICES;
use serde_json::{Value, json};

use crate::told::told;
use crate::{Cluster, EACH, SOON, answered_by, at, vip};

/// A client beyond the cluster, by its number.
fn client(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 99, 0, 100 + number]),
        Family::V6 => IpAddr::from([0xfd00, 0x99, 0, 0, 0, 0, 1, number.into()]),
    }
}

const CLIENTS: u8 = 12;

/// Who answers a client, by a connection of its own.
fn name_for(place: &Spaces, client: IpAddr, target: SocketAddr) -> Result<String> {
    wait_until(&format!("{client} is answered at {target}"), SOON, || {
        let socket = place.run(|| Ok(UdpSocket::bind((client, 0))?))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut buffer = [0; 64];
        socket.connect(target)?;
        socket.send(b"who?")?;
        let length = socket.recv(&mut buffer)?;
        let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
        Ok(answer.split(' ').next().unwrap_or_default().to_owned())
    })
}

/// Says in the annotation how endpoints are picked, and waits until both nodes do so.
fn pick_by(cluster: &Cluster, name: &str, algorithm: &str) -> Result<()> {
    let annotation = json!({"metadata": {"annotations": {"fabric.io/lb-algorithm": algorithm}}});
    cluster.api.change(SERVICES, name, &annotation);
    cluster.nodes.iter().try_for_each(|node| {
        wait_until(&format!("{} picks by {algorithm}", node.name), SOON, || {
            let (code, told) = told(node, name)?;
            let service = &told["services"][0];
            ensure!(service["algorithm"] == algorithm && code == Some(0), "{code:?} {service}");
            Ok(())
        })
    })
}

fn by_node_port(policy: &str, first: u16) -> Value {
    json!({
        "type": "NodePort", "externalTrafficPolicy": policy,
        "ports": [
            {"name": "http", "port": 80, "protocol": "TCP", "nodePort": first},
            {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": first + 1},
        ],
    })
}

#[test]
fn client_is_hashed_to_one_endpoint_by_every_node_and_moves_only_with_it() -> Result<()> {
    let cluster = Cluster::start()?;
    let outside = cluster.outside()?;
    for (family, number) in Family::ALL.into_iter().flat_map(|family| (0..CLIENTS).map(move |number| (family, number)))
    {
        let address = format!("{}/{}", client(family, number), if family == Family::V4 { 24 } else { 64 });
        let nodad: &[&str] = if family == Family::V6 { &["nodad"] } else { &[] };
        let add = [&["ip", "address", "add", &address, "dev", BRIDGE], nodad].concat();
        cluster.lab.underlay().machine.run(&add)?;
    }
    cluster.serve("web", 10, &["a", "b", "c", "d"], &by_node_port("Cluster", 30080));
    cluster.serve("local", 11, &["a", "b", "c"], &by_node_port("Local", 30090));
    pick_by(&cluster, "web", "source-hash")?;
    pick_by(&cluster, "local", "source-hash")?;
    // Rules that nft has no words for must not be the end of it.
    cluster.nodes[0].run(&["nft", "list", "ruleset"])?;
    let node_port = |node: usize, family, port| SocketAddr::new(cluster.nodes[node].underlay_ip(family), port);
    let mut names: BTreeMap<IpAddr, String> = BTreeMap::new();
    for family in Family::ALL {
        for client in (0..CLIENTS).map(|number| client(family, number)) {
            let name = name_for(&outside, client, node_port(0, family, 30081))?;
            for _ in 0..3 {
                assert_eq!(name_for(&outside, client, node_port(0, family, 30081))?, name, "{client}");
            }
            assert_eq!(name_for(&outside, client, node_port(1, family, 30081))?, name, "{client} by another node");
            assert_eq!(name_for(&outside, client, at(vip(family, 10), By::Udp))?, name, "{client} by another address");
            let local = name_for(&outside, client, node_port(0, family, 30091))?;
            assert!(["a", "b"].contains(&local.as_str()), "{local} is not on this node");
            assert_eq!(name_for(&outside, client, node_port(0, family, 30091))?, local, "{client}");
            names.insert(client, name);
        }
    }
    let [first, second] = ["a", "b"].map(|name| names.values().filter(|of| *of == name).count());
    assert!(first > 0 && first + second < names.len(), "all are hashed alike: {names:?}");
    // Its own endpoint goes, or that of others.
    cluster.change("web", &["b", "c", "d"]);
    for (client, name) in &names {
        let target = node_port(0, Family::of(*client), 30081);
        let now = wait_until(&format!("{client} is not led to a"), SOON, || {
            let now = name_for(&outside, *client, target)?;
            ensure!(now != "a", "{now}");
            Ok(now)
        })?;
        assert!(name == "a" || now == *name, "{client} was moved from {name} to {now}");
    }
    Ok(())
}

#[test]
fn endpoints_take_turns_and_a_word_that_is_none_is_told_on_the_service() -> Result<()> {
    let cluster = Cluster::start()?;
    let (outside, pod, host) = (cluster.outside()?, cluster.pod("b").network()?, cluster.nodes[0].network()?);
    let names = ["a", "c", "d"];
    cluster.serve("web", 10, &names, &by_node_port("Cluster", 30080));
    cluster.serve("other", 11, &names, &by_node_port("Cluster", 30090));
    pick_by(&cluster, "web", "round-robin")?;
    pick_by(&cluster, "other", "round-robin")?;
    for (by, family) in EACH {
        let node_port =
            |first: u16| SocketAddr::new(cluster.nodes[0].underlay_ip(family), first + u16::from(by == By::Udp));
        for (place, web, other) in [
            (&pod, at(vip(family, 10), by), at(vip(family, 11), by)),
            (&host, at(vip(family, 10), by), at(vip(family, 11), by)),
            (&outside, node_port(30080), node_port(30090)),
        ] {
            let mut taken: BTreeMap<String, u32> = BTreeMap::new();
            for _ in 0..9 {
                let answer = ask(place, by, web)?;
                *taken.entry(answer.name().unwrap_or("nobody").to_owned()).or_default() += 1;
                // Who asks another Service takes none of this one's turns.
                ask(place, by, other)?;
            }
            assert_eq!(taken, names.map(|name| (name.to_owned(), 3)).into(), "{web} by {by:?}");
        }
    }

    let fastest = json!({"metadata": {"annotations": {"fabric.io/lb-algorithm": "fastest"}}});
    cluster.api.change(SERVICES, "web", &fastest);
    wait_until("the Service's events say it", SOON, || {
        let all = cluster.api.all("/api/v1/namespaces/default/events");
        let is_so = |event: &&Value| {
            let message = event["message"].as_str().unwrap_or_default();
            event["reason"] == "FieldRefused"
                && event["involvedObject"]["name"] == "web"
                && message.contains("\"fastest\" in the annotation fabric.io/lb-algorithm")
        };
        ensure!(all.iter().filter(is_so).count() == 1, "{all:?}");
        Ok(())
    })?;
    assert_eq!(told(&cluster.nodes[0], "web")?.1["services"][0]["algorithm"], "random");
    answered_by(&pod, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &names)
}
