//! What is told of drops.

use anyhow::{Context as _, Result, ensure};
use fabric_core::policy::Conn;
use fabric_tests::lab::{Node, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, policies_of, policy};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{Cluster, PORTS, SOON, Server, connects};

/// What `fabricctl` says with these arguments, and its exit code.
pub fn told(node: &Node, args: &[&str]) -> Result<(Option<i32>, Value)> {
    let output = node.exec(&[&["fabricctl"][..], args, &["-o", "json"]].concat())?;
    Ok((output.status.code(), serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?))
}

#[test]
fn what_is_dropped_is_told_with_pods_and_policies_and_a_rule_that_would_allow_it() -> Result<()> {
    let cluster = Cluster::start(2)?;
    for space in ["shop", "lab"] {
        cluster.api.create(NAMESPACES, namespace(space, &json!({"kubernetes.io/metadata.name": space})));
    }
    let only = |name: &str| json!({"matchLabels": {"pod": name}});
    let spec = json!({"podSelector": only("db"), "ingress": [
        {"from": [{"podSelector": only("web")}], "ports": [{"port": "http"}]},
        {"from": [{"serviceSelector": {}}]},
    ]});
    cluster.api.create(&policies_of("shop"), policy("shop", "db", &spec));
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let (here, there) = (&cluster.nodes[0], &cluster.nodes[1]);
    let (web, other) = (cluster.add_pod(here, "shop", "web")?, cluster.add_pod(here, "lab", "other")?);
    let db = cluster.add_pod(there, "shop", "db")?;
    let _server = Server::start(&db)?;
    let [web_ip, other_ip, db_ip] = [&web, &other, &db].map(|pod| pod.ips()[0].to_string());
    let policies = |path: &Value| -> Vec<Value> {
        path["hops"].as_array().into_iter().flatten().filter(|hop| hop["layer"] == "policy").cloned().collect()
    };

    // Both nodes say what their own pods' policies say; the pod connects.
    let fine = wait_until("the connection is explained as allowed", SOON * 2, || {
        let (code, path) = told(here, &["explain", &web_ip, &db_ip, "--port", "8080"])?;
        ensure!(code == Some(0), "{path:#}");
        Ok(path)
    })?;
    let words: Vec<_> = policies(&fine).iter().map(|hop| format!("{} {}", hop["node"], hop["found"])).collect();
    assert!(words[0].contains("node-1") && words[0].contains("no policy selects the pod"), "{words:?}");
    assert!(
        words[1].contains("node-2") && words[1].contains("allowed by rule 0 of NetworkPolicy shop/db"),
        "{words:?}"
    );
    let tcp = fine["hops"].as_array().and_then(|hops| hops.last()).context("a packet")?;
    assert!(tcp["found"].as_str().is_some_and(|found| found.starts_with("tcp from the pod, ")), "{tcp}");

    // Another pod, another port, a ping: each is dropped there.
    for (from, port) in [(&other_ip, Some("8080")), (&web_ip, Some("9090")), (&web_ip, None)] {
        let mut args = vec!["explain", from.as_str(), db_ip.as_str()];
        args.extend(port.iter().flat_map(|port| ["--port", *port]));
        let (code, path) = told(here, &args)?;
        let hop = policies(&path).into_iter().find(|hop| hop["result"] == "failed").context("a hop that failed")?;
        assert!(code == Some(4) && hop["node"] == "node-2", "{path:#}");
        let found = hop["found"].as_str().unwrap_or_default();
        assert!(found.contains("no rule allows it of NetworkPolicy shop/db"), "{found}");
        let expected = hop["expected"].as_str().unwrap_or_default();
        assert!(
            expected.contains("rule 0 of NetworkPolicy shop/db allows tcp port \"http\" from pods pod=web"),
            "{expected}"
        );
    }
    let page = here.exec(&["fabricctl", "explain", &other_ip, &db_ip, "--port", "8080"])?.stdout;
    assert!(page.contains("Here packets are lost: policy of node-2"), "{page}");

    // Who is isolated, by what, and how often each rule was asked. A rule that isn't understood is named.
    let (code, seen) = told(there, &["policy"])?;
    assert_eq!(code, Some(4), "a warning: {seen:#}");
    assert!(seen["warnings"].to_string().contains("NetworkPolicy shop/db: spec.ingress[1]"), "{seen:#}");
    wait_until("an Event on the policy, once for both nodes", SOON, || {
        let events = cluster.api.all("/api/v1/namespaces/shop/events");
        let [event] = events.as_slice() else { anyhow::bail!("{} events", events.len()) };
        let object = &event["involvedObject"];
        let message = event["message"].as_str().unwrap_or_default();
        ensure!(object["kind"] == "NetworkPolicy" && object["name"] == "db", "{event}");
        ensure!(message.starts_with("spec.ingress[1]"), "{event}");
        Ok(())
    })?;
    let pod = seen["pods"].as_array().and_then(|pods| pods.iter().find(|pod| pod["pod"] == "shop/db")).context("db")?;
    assert_eq!((&pod["ingress"], &pod["egress"], &pod["applied"]), (&json!(["shop/db"]), &json!([]), &json!(true)));
    let packets = |drops: bool| {
        let rules = seen["rules"].as_array().into_iter().flatten();
        let mut rules = rules.filter(move |rule| rule["drops"] == drops && rule["rule"] == 0);
        rules.next().and_then(|rule| rule["packets"].as_u64())
    };
    assert!(packets(false) > Some(0) && packets(true) > Some(0), "{seen:#}");

    // While somebody listens what is dropped is shown; then no rule shows anything.
    let shows = |wanted: bool| {
        wait_until("rules show what they drop while somebody listens", SOON, || {
            let table = there.run(&["nft", "list", "table", "inet", "fabric-policy"])?;
            ensure!(table.contains("log prefix") == wanted, "{table}");
            Ok(())
        })
    };
    shows(false)?;
    there.start_service("drops", &["fabricctl", "drops", "-f"], &[])?;
    shows(true)?;
    let line = wait_until("a packet is told with its pods and policies", SOON, || {
        let conn = Conn { src: other.ips()[0], dst: db.ips()[0], protocol: 17, port: PORTS[0] };
        assert!(!connects(&other, &conn)?);
        let log = there.log("drops");
        let line = log.lines().find(|line| line.contains(" udp lab/other (")).map(str::to_owned);
        line.with_context(|| format!("no such packet: {log}"))
    })?;
    let rest = format!("→ shop/db ({db_ip}:8080): ingress dropped: no rule allows it of NetworkPolicy shop/db");
    assert!(line.ends_with(&rest), "{line}");
    let counted = told(there, &["policy"])?.1;
    there.end("drops", Signal::SIGTERM)?;
    shows(false)?;
    let after = told(there, &["policy"])?.1;
    let sum = |seen: &Value| -> u64 {
        seen["rules"].as_array().into_iter().flatten().filter_map(|rule| rule["packets"].as_u64()).sum()
    };
    assert!(sum(&after) >= sum(&counted), "the counters go on: {counted:#} {after:#}");
    Ok(())
}
