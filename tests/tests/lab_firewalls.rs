//! Firewalls of others beside ours: Docker's, kube-proxy's, firewalld's. Theirs stay as they are, ours too, and pods talk.

use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_tests::faults::rules::{Field, restart_with};
use fabric_tests::lab::{Lab, Node, Stream, wait_until};
use serde_json::Value;

/// An audit, and what a busy machine takes.
const SOON: Duration = Duration::from_secs(30);

/// What Docker leaves in the filter table, its chain for rules of others included.
const DOCKER: [&str; 5] = [
    "-N DOCKER-USER",
    "-N DOCKER-FORWARD",
    "-A FORWARD -j DOCKER-USER",
    "-A FORWARD -j DOCKER-FORWARD",
    "-P FORWARD DROP",
];

/// The rules of a chain, as `nft -j` shows them.
fn rules(node: &Node, chain: &str) -> Result<Vec<Value>> {
    let command = format!("nft -s -j -a list chain {chain}");
    let shown: Value = serde_json::from_str(&node.run(&command.split(' ').collect::<Vec<_>>())?)?;
    Ok(shown["nftables"].as_array().into_iter().flatten().filter_map(|entry| entry.get("rule")).cloned().collect())
}

#[test]
fn docker_that_drops_what_is_forwarded_lets_pods_through_by_its_own_door() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &[])?;
    let node = &field.target.node;
    for line in DOCKER {
        for iptables in ["iptables-nft", "ip6tables-nft"] {
            node.run(&[&[iptables], &line.split(' ').collect::<Vec<_>>()[..]].concat())?;
        }
    }
    let theirs = || -> Result<_> { Ok((rules(node, "ip filter FORWARD")?, rules(node, "ip filter DOCKER-FORWARD")?)) };
    let before = theirs()?;
    wait_until("the door is open", SOON, || {
        for chain in ["ip filter DOCKER-USER", "ip6 filter DOCKER-USER"] {
            let found = rules(node, chain)?;
            ensure!(found.len() == 2, "{chain}: {found:?}");
        }
        Ok(())
    })?;
    wait_until("nothing is left to be said", SOON, || {
        let status = node.status()?;
        ensure!(!status["warnings"].to_string().contains("drops forwarded"), "{status}");
        Ok(())
    })?;
    assert_eq!(Stream::start(&field.peer, &field.target)?.stop()?.lost, 0);
    // iptables understands what is there.
    let listed = node.run(&["iptables-nft", "-S", "DOCKER-USER"])?;
    assert!(
        listed.contains("-A DOCKER-USER -s 10.244.0.0/16 -m comment --comment \"fabricd: from the network"),
        "{listed}"
    );
    let handles = rules(node, "ip filter DOCKER-USER")?;
    restart_with(node, &[])?;
    assert_eq!(
        (theirs()?, rules(node, "ip filter DOCKER-USER")?),
        (before.clone(), handles),
        "a restart writes nothing"
    );

    restart_with(node, &["--open-doors=false"])?;
    wait_until("the way out is said", SOON, || {
        let status = node.status()?;
        ensure!(status["warnings"].to_string().contains("iptables -I FORWARD"), "{status}");
        Ok(())
    })?;
    assert_eq!((theirs()?, rules(node, "ip filter DOCKER-USER")?), (before.clone(), vec![]));

    restart_with(node, &[])?;
    wait_until("the door is open", SOON, || {
        ensure!(rules(node, "ip filter DOCKER-USER")?.len() == 2);
        Ok(())
    })?;
    node.stop_fabricd()?;
    node.run(&["fabricd", "--cleanup"])?;
    assert_eq!((theirs()?, rules(node, "ip filter DOCKER-USER")?), (before, vec![]));
    Ok(())
}

#[test]
fn firewalls_that_reload_cost_no_packet_and_no_rule() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let node = &field.target.node;
    let tables = || -> Result<_> {
        Ok(["inet", "bridge"]
            .map(|family| node.run(&["nft", "-a", "-s", "list", "table", family, "fabric"]))
            .map(Result::ok))
    };
    let before = tables()?;
    // As firewalld: all of its table anew. As kube-proxy: thousands of chains, again and again.
    let firewalld = "table inet firewalld\ndelete table inet firewalld\ntable inet firewalld {\n\
                     chain filter_INPUT { type filter hook input priority 10; policy accept; ct state established accept; }\n\
                     chain filter_FORWARD { type filter hook forward priority 10; policy accept; }\n}\n";
    let chains: String = (0..200).map(|n| format!(":KUBE-SVC-{n} - [0:0]\n")).collect();
    let services: String = (0..200)
        .map(|n| format!("-A KUBE-SERVICES -d 10.96.0.{n}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-{n}\n"))
        .collect();
    let kube_proxy = format!("*nat\n:KUBE-SERVICES - [0:0]\n{chains}{services}COMMIT\n");
    let legacy = "*mangle\n:FORWARD ACCEPT [0:0]\n-A FORWARD -s 192.0.2.0/24 -j MARK --set-mark 7\nCOMMIT\n";
    let stream = Stream::start(&field.peer, &field.target)?;
    for _ in 0..10 {
        for (command, input) in [
            (&["nft", "-f", "-"][..], firewalld),
            (&["iptables-nft-restore", "--noflush"], &kube_proxy),
            (&["iptables-legacy-restore"], legacy),
        ] {
            node.command(command)?.stdin(input).run()?;
        }
    }
    let theirs = node.run(&["iptables-nft-save", "-t", "nat"])?;
    assert_eq!(theirs.matches("-A KUBE-SERVICES").count(), 200, "{theirs}");
    assert!(node.run(&["nft", "list", "table", "inet", "firewalld"])?.contains("ct state established accept"));
    assert!(node.run(&["iptables-legacy-save", "-t", "mangle"])?.contains("192.0.2.0/24"));
    assert_eq!(stream.stop()?.lost, 0);
    assert_eq!(tables()?, before, "ours are not even written anew");
    Ok(())
}
