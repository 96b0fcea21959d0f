//! What is told of Services: by fabricctl, health checks, events and the status.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::fake_api::NODES;
use fabric_tests::lab::{By, Node, http, wait_until};
use fabric_tests::services::{V1, slices_of};
use serde_json::{Value, json};

use crate::{Cluster, SOON, answered_by, at, vip};

/// What `fabricctl service` says of Services, with its exit code.
pub(super) fn told(node: &Node, name: &str) -> Result<(Option<i32>, Value)> {
    let shown = node.exec(&["fabricctl", "service", name, "-o", "json"])?;
    let told = serde_json::from_str(&shown.stdout).with_context(|| format!("{shown:?}"))?;
    Ok((shown.status.code(), told))
}

#[test]
fn fabricctl_shows_who_takes_connections_why_others_do_not_and_what_the_kernel_holds() -> Result<()> {
    let cluster = Cluster::start()?;
    let node = &cluster.nodes[0];
    cluster.serve("web", 10, &["a", "c"], &json!({"internalTrafficPolicy": "Local"}));
    cluster.serve("late", 11, &["b"], &json!({}));
    let mut endpoints = cluster.endpoints(Family::V4, &["a", "b", "c"]);
    endpoints[1]["conditions"] = json!({"ready": false});
    cluster.api.change(&slices_of(V1), "web-v4", &json!({"endpoints": endpoints}));
    let web = at(vip(Family::V4, 10), By::Tcp);
    let service = wait_until("three endpoints are known, and written", SOON, || {
        let (code, told) = told(node, "web")?;
        let service = told["services"][0].clone();
        ensure!(service["endpoint_list"].as_array().is_some_and(|all| all.len() == 10), "{service}");
        ensure!(code == Some(0) && told["ready"] == true, "{code:?} {told}");
        Ok(service)
    })?;
    let of = |list: &str, address: String| {
        let all = service[list].as_array().expect("a list");
        all.iter().find(|one| one["address"] == address).cloned().unwrap_or_default()
    };
    let ip = |name: &str| cluster.pod(name).ip(Family::V4).map(|ip| SocketAddr::new(ip, 8080).to_string());
    let (frontend, local) = (of("frontends", web.to_string()), ip("a")?);
    assert_eq!(frontend["kind"], "cluster_ip");
    assert_eq!((&frontend["programmed"], &frontend["inside"]), (&json!(true), &json!(format!("to {local}"))));
    for (name, takes, why) in [("a", true, ""), ("b", false, "not ready"), ("c", false, "on another node")] {
        let endpoint = of("endpoint_list", ip(name)?);
        assert_eq!(endpoint["takes_inside"], takes, "{endpoint}");
        assert!(endpoint["reason"].as_str().is_some_and(|reason| reason.starts_with(why)), "{endpoint}");
    }
    let by_address = told(node, "10.96.0.11")?.1;
    assert_eq!(by_address["services"][0]["name"], "default/late");
    let all = node.run(&["fabricctl", "service"])?;
    assert!(all.contains("default/late") && all.contains("default/web"), "{all}");
    assert_eq!(node.exec(&["fabricctl", "service", "nobody"])?.status.code(), Some(1));

    // The path of a packet, and the checks.
    let from = cluster.pod("b").ip(Family::V4)?.to_string();
    let explained = node.exec(&["fabricctl", "explain", &from, "10.96.0.10"])?.stdout;
    assert!(explained.contains(&format!("10.96.0.10:80/tcp is default/web's: to {local}")), "{explained}");
    let checks = node.exec(&["fabricctl", "doctor", "-o", "json"])?.stdout;
    let checks = checks.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let check = checks.iter().find(|check| check["id"] == "services").context("no such check")?;
    assert_eq!(check["result"], "ok", "{check}");

    // Nobody serves.
    cluster.change("late", &[]);
    wait_until("the end of the endpoints is told", SOON, || {
        let explained = node.exec(&["fabricctl", "explain", &from, "10.96.0.11"])?.stdout;
        ensure!(explained.contains("rejected, as nobody serves"), "{explained}");
        Ok(())
    })
}

#[test]
fn load_balancers_ask_each_node_whether_it_has_endpoints() -> Result<()> {
    let cluster = Cluster::start()?;
    let outside = cluster.outside()?;
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
    });
    cluster.serve("web", 10, &["a"], &spec);
    let says = |node: usize, family, status: u16, body: &str| {
        wait_until(&format!("node-{} says {status} {body}", node + 1), SOON, || {
            let reply = http::get(&outside, (cluster.nodes[node].underlay_ip(family), 32000).into(), "/any/path")?;
            ensure!(reply.status == status && reply.body.contains(body), "{reply:?}");
            Ok(())
        })
    };
    for family in Family::ALL {
        says(0, family, 200, "\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n")?;
        says(1, family, 503, "\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 0")?;
    }
    // The last endpoint leaves a node: the balancer is told, and by the other one that it may come.
    cluster.change("web", &["c"]);
    for family in Family::ALL {
        says(0, family, 503, "\"localEndpoints\": 0")?;
        says(1, family, 200, "\"localEndpoints\": 1")?;
    }

    // A node that is about to go is eligible no more, and lives all the same.
    let node = &cluster.nodes[0];
    let of_node = |path: &str, status: u16, body: &str| {
        wait_until(&format!("{path} says {status} {body}"), SOON, || {
            let reply = node.http_get(10256, path)?;
            ensure!(reply.status == status && reply.body.contains(body), "{reply:?}");
            Ok(())
        })
    };
    of_node("/healthz", 200, "\"nodeEligible\":true")?;
    let taints = json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}});
    cluster.api.change(NODES, &node.name, &taints);
    of_node("/healthz", 503, "\"nodeEligible\":false")?;
    of_node("/livez", 200, "lastUpdated")?;
    Ok(())
}

#[test]
fn what_is_wrong_with_a_service_is_told_on_it_and_the_rest_of_it_works() -> Result<()> {
    let cluster = Cluster::start()?;
    let node = &cluster.nodes[0];
    let taken = node.network()?.run(|| Ok(TcpListener::bind((node.underlay_ip(Family::V4), 32001))?))?;
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32001,
        "externalIPs": ["10.96.0.11"], "loadBalancerSourceRanges": ["everybody"],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
    });
    cluster.serve("web", 10, &["a"], &spec);
    cluster.serve("other", 11, &["c"], &json!({}));
    let events = "/api/v1/namespaces/default/events";
    let is_told = |reason: &str, words: &str, count: usize| {
        wait_until(&format!("{count} events {reason}"), SOON, || {
            let all = cluster.api.all(events);
            let is_so = |event: &&Value| {
                event["reason"] == reason
                    && event["involvedObject"]["name"] == "web"
                    && event["message"].as_str().is_some_and(|message| message.contains(words))
            };
            ensure!(all.iter().filter(is_so).count() == count, "{all:?}");
            Ok(())
        })
    };
    // Two nodes see the same, and say it once; of one node's port that node tells.
    is_told("FieldRefused", "\"everybody\" in loadBalancerSourceRanges", 1)?;
    is_told("FrontendConflict", "default/other has 10.96.0.11:80/tcp too", 1)?;
    is_told("FailedToStartServiceHealthcheck", "32001 of this node: Address already in use", 1)?;
    // An event can be there before the pass that it is of has ended.
    wait_until("the status warns of it", SOON, || {
        let warnings = node.status()?["warnings"].to_string();
        ensure!(warnings.contains("Service default/web: ") && warnings.contains("everybody"), "{warnings}");
        Ok(())
    })?;
    let (code, told) = told(node, "web")?;
    assert!(code == Some(4) && told["services"][0]["problems"].to_string().contains("everybody"), "{told}");
    // What is well of both works, and the port is listened on once it is free.
    let client = cluster.pod("b").network()?;
    answered_by(&client, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["a"])?;
    answered_by(&client, By::Tcp, at(vip(Family::V4, 11), By::Tcp), &["c"])?;
    drop(taken);
    let health = SocketAddr::new(node.underlay_ip(Family::V4), 32001);
    wait_until("the health check is answered", SOON, || {
        let reply = http::get(&node.network()?, health, "/")?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
}
