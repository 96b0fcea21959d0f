//! Firewalls of others beside ours: Docker's, kube-proxy's, firewalld's. Theirs stay as they are, ours too, and pods talk.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::faults::rules::{Field, restart_with};
use fabric_tests::lab::{Lab, Node, Pod, Stream, wait_until};
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
fn docker_that_drops_what_is_forwarded_lets_pods_through_by_rules_in_docker_user() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &[])?;
    let node = &field.target.node;
    for line in DOCKER {
        for iptables in ["iptables-nft", "ip6tables-nft"] {
            node.run(&[&[iptables], &line.split(' ').collect::<Vec<_>>()[..]].concat())?;
        }
    }
    let theirs = || -> Result<_> { Ok((rules(node, "ip filter FORWARD")?, rules(node, "ip filter DOCKER-FORWARD")?)) };
    let before = theirs()?;
    wait_until("the rules are there", SOON, || {
        for chain in ["ip filter DOCKER-USER", "ip6 filter DOCKER-USER"] {
            let found = rules(node, chain)?;
            ensure!(found.len() == 2, "{chain}: {found:?}");
        }
        Ok(())
    })?;
    wait_until("nothing is left to be said", SOON, || {
        let status = node.status()?;
        ensure!(!status["warnings"].to_string().contains("policy drop"), "{status}");
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

    restart_with(node, &["--docker-user-rules=false"])?;
    wait_until("the commands are said", SOON, || {
        let status = node.status()?;
        ensure!(status["warnings"].to_string().contains("iptables-nft -I DOCKER-USER -s 10.244.0.0/16"), "{status}");
        Ok(())
    })?;
    assert_eq!((theirs()?, rules(node, "ip filter DOCKER-USER")?), (before.clone(), vec![]));

    restart_with(node, &[])?;
    wait_until("the rules are there", SOON, || {
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

/// A check of the doctor.
fn check(node: &Node, id: &str) -> Result<Value> {
    let output = node.exec(&["fabricctl", "doctor", "-o", "json"])?;
    let checks = output.stdout.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    checks.into_iter().find(|check| check["id"] == id).with_context(|| format!("no check {id} in {output:?}"))
}

/// Waits until a check says this, and gives it.
fn wait_for_check(node: &Node, id: &str, result: &str) -> Result<Value> {
    wait_until(&format!("{id} is {result}"), SOON, || {
        let check = check(node, id)?;
        ensure!(check["result"] == result, "{check}");
        Ok(check)
    })
}

fn reached(from: &Pod, to: &Pod) -> Result<bool> {
    Ok(from.exec(&["ping", "-c", "1", "-W", "1", &to.ip(Family::V4)?.to_string()])?.status.success())
}

/// Runs each line as it was printed.
fn run_lines(node: &Node, lines: &str) -> Result<()> {
    for line in lines.lines() {
        node.run(&line.split(' ').collect::<Vec<_>>())?;
    }
    Ok(())
}

/// Rules of others that cut pods off, each with the program that loads them and the check that finds it.
const CLOSED: [(&str, &str, &str); 6] = [
    (
        "nft",
        "table inet other {\nchain filter_FORWARD {\ntype filter hook forward priority 10; policy accept;\n\
         ct state { established, related } accept\nct state invalid drop\nreject with icmpx type admin-prohibited\n}\n}\n",
        "foreign-forward",
    ),
    (
        "nft",
        "table inet other {\nchain sub {\nip saddr 10.244.0.0/16 drop\n}\n\
         chain through {\ntype filter hook forward priority 0; policy accept;\ncounter jump sub\n}\n}\n",
        "foreign-forward",
    ),
    ("iptables-nft-restore", "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n", "foreign-forward"),
    (
        "nft",
        "table inet other {\nchain in {\ntype filter hook input priority 0; policy accept;\nudp dport 8472 drop\n}\n}\n",
        "foreign-input",
    ),
    (
        "nft",
        "table inet other {\nchain in {\ntype filter hook input priority 0; policy drop;\nip protocol icmp accept\n\
         tcp dport 1-65535 accept\nct state established accept\niifname \"lo\" accept\n}\n}\n",
        "foreign-input",
    ),
    (
        "iptables-legacy-restore",
        "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p udp -m udp --dport 8472 -j REJECT\nCOMMIT\n",
        "foreign-input",
    ),
];

#[test]
fn chains_of_others_that_cut_pods_off_are_named_and_the_printed_commands_let_them_through() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let (node, peer, target) = (&field.target.node, &field.peer, &field.target);
    for (program, rules, id) in CLOSED {
        wait_until("pods reach each other", SOON, || {
            ensure!(reached(peer, target)?, "no answer");
            Ok(())
        })?;
        let arguments: &[&str] = if program == "nft" { &["nft", "-f", "-"] } else { &[program] };
        node.command(arguments)?.stdin(rules).run()?;
        let found = wait_for_check(node, id, "failed").with_context(|| rules.to_owned())?;
        ensure!(!reached(peer, target)?, "{rules} lets packets through");
        let evidence = found["evidence"].as_str().unwrap_or_default();
        let named = ["other", "filter FORWARD", "filter INPUT"].iter().any(|name| evidence.contains(name));
        ensure!(named && (evidence.contains(" rule ") || evidence.contains("policy drop")), "{evidence}");
        let status = node.status()?;
        ensure!(status["warnings"].to_string().contains("let them pass with"), "{status}");

        run_lines(node, found["fix"].as_str().context("a fix")?)?;
        wait_until("pods reach each other again", SOON, || {
            ensure!(reached(peer, target)?, "no answer after {}", found["fix"]);
            Ok(())
        })?;
        wait_for_check(node, id, "ok").with_context(|| format!("after {}", found["fix"]))?;
        node.run(&[
            "nft",
            "delete",
            "table",
            if program == "nft" { "inet" } else { "ip" },
            if program == "nft" { "other" } else { "filter" },
        ])
        .or_else(|_| node.run(&["iptables-legacy", "-F"]))?;
    }
    Ok(())
}

#[test]
fn explain_names_the_foreign_rule_that_drops_and_prints_commands_that_run() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &[])?;
    let (node, peer, target) = (&field.target.node, &field.peer, &field.target);
    let [from, to] = [peer, target].map(|pod| pod.ip(Family::V4).map(|ip| ip.to_string()));
    let (from, to) = (from?, to?);
    let rules = format!(
        "table inet other {{\nchain through {{\ntype filter hook forward priority 0; policy accept;\nip daddr {to} drop\n}}\n}}\n"
    );
    node.command(&["nft", "-f", "-"])?.stdin(rules).run()?;
    wait_for_check(node, "foreign-forward", "warning")?;
    let explained = || -> Result<Option<Value>> {
        let output = node.exec(&["fabricctl", "explain", &from, &to, "-o", "json"])?;
        let shown: Value = serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?;
        let mut hops = shown["hops"].as_array().into_iter().flatten().filter(|hop| hop["layer"] == "filter");
        Ok(hops.find(|hop| hop["result"] == "failed").cloned())
    };
    let hop = wait_until("the hop is told", SOON, || explained()?.context("no hop fails"))?;
    let found = hop["found"].as_str().unwrap_or_default();
    ensure!(found.contains("inet other through rule 1") && found.contains(&format!("ip daddr {to} drop")), "{hop}");
    let expected = hop["expected"].as_str().context("commands")?;
    run_lines(node, expected.split_once('\n').context("commands behind a headline")?.1)?;
    wait_until("it is healed", SOON, || {
        ensure!(explained()?.is_none() && reached(peer, target)?, "not yet");
        Ok(())
    })
}

/// Firewalls that open the VXLAN port for new connections, or judge states otherwise, each with the command that takes
/// them away.
const STATEFUL: [(&str, &str, &[&str]); 3] = [
    (
        "iptables-nft-restore",
        "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n\
         -A INPUT -p icmp -j ACCEPT\n-A INPUT -p udp -m state --state NEW -m udp --dport 8472 -j ACCEPT\n\
         -A INPUT -j REJECT --reject-with icmp-host-prohibited\nCOMMIT\n",
        &["iptables-nft", "-F", "INPUT"],
    ),
    (
        "nft",
        "table inet other {\nchain filter_INPUT {\ntype filter hook input priority 10; policy accept;\n\
         ct state { established, related } accept\niifname \"lo\" accept\nmeta l4proto { icmp, ipv6-icmp } accept\n\
         udp dport 8472 ct state { new, untracked } accept\nreject with icmpx type admin-prohibited\n}\n}\n",
        &["nft", "delete", "table", "inet", "other"],
    ),
    (
        "iptables-legacy-restore",
        "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n\
         -A INPUT -p icmp -j ACCEPT\n-A INPUT -p udp -m conntrack --ctstate NEW -m udp --dport 8472 -j ACCEPT\n\
         -A INPUT -j REJECT\nCOMMIT\n",
        &["iptables-legacy", "-F", "INPUT"],
    ),
];

#[test]
fn firewall_that_opens_the_port_for_new_connections_keeps_it_open() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let node = &field.target.node;
    let is_untracked =
        || Ok::<_, anyhow::Error>(node.run(&["nft", "list", "table", "inet", "fabric"])?.contains("notrack"));
    for (program, rules, undo) in STATEFUL {
        wait_until("encapsulated packets are untracked", SOON, || {
            ensure!(is_untracked()?, "they are tracked");
            ensure!(node.status()?["tracked_for_rule"].as_str().is_none_or(str::is_empty), "status names a rule still");
            Ok(())
        })?;
        let stream = Stream::start(&field.peer, &field.target)?;
        let arguments: &[&str] = if program == "nft" { &["nft", "-f", "-"] } else { &[program] };
        node.command(arguments)?.stdin(rules).run()?;
        wait_until("encapsulated packets are tracked", SOON, || {
            ensure!(!is_untracked()?, "{rules}");
            Ok(())
        })?;
        stream.wait_for(1_000, SOON)?;
        stream.stop()?;
        let stream = Stream::start(&field.peer, &field.target)?;
        stream.wait_for(3_000, SOON)?;
        assert_eq!(stream.stop()?.lost, 0, "under {rules}");
        let found = wait_for_check(node, "foreign-input", "ok")?;
        ensure!(found["evidence"].to_string().contains("they are tracked"), "{found}");
        let status = node.status()?;
        ensure!(!status["warnings"].to_string().contains("VXLAN packets that arrive"), "{status}");
        // No harm, so no warning; but whoever sees the table of connections grow finds the rule that it is for.
        let rule = status["tracked_for_rule"].as_str().unwrap_or_default();
        let evidence = found["evidence"].as_str().unwrap_or_default();
        ensure!(!rule.is_empty() && evidence.contains(rule), "{rule} isn't in {evidence}");
        let shown = node.exec(&["fabricctl", "status"])?.stdout;
        ensure!(shown.lines().any(|line| line.starts_with("Tracked ") && line.ends_with(rule)), "{shown}");

        // At the start too: nothing is lost while the daemon is made anew.
        restart_with(node, &["--ip-masq"])?;
        ensure!(!is_untracked()?, "after a restart under {rules}");
        node.run(undo)?;
    }
    Ok(())
}

#[test]
fn ufw_is_told_in_its_own_words_and_its_own_commands_let_packets_through() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let (node, peer, target) = (&field.target.node, &field.peer, &field.target);
    // Its settings are files of the host: the node has its own of them.
    let own_files = "cp -a /etc/ufw /run/ufw && mount --bind /run/ufw /etc/ufw";
    node.run(&["sh", "-c", own_files])?;
    node.run(&["ufw", "--force", "enable"])?;
    let mut done: Vec<String> = vec![];
    for id in ["foreign-input", "foreign-forward"] {
        let found = wait_for_check(node, id, "failed")?;
        done.extend(found["fix"].as_str().context("a fix")?.lines().map(str::to_owned));
    }
    assert_eq!(
        done,
        [
            "ufw allow 8472/udp",
            "ufw route allow from 10.244.0.0/16",
            "ufw route allow to 10.244.0.0/16",
            "ufw route allow from fd00:10:244::/48",
            "ufw route allow to fd00:10:244::/48",
        ]
    );
    ensure!(!reached(peer, target)?, "ufw lets packets through");
    for line in &done {
        run_lines(node, line)?;
    }
    for id in ["foreign-input", "foreign-forward"] {
        wait_for_check(node, id, "ok")?;
    }
    wait_until("pods reach each other again", SOON, || {
        ensure!(reached(peer, target)?, "no answer after {done:?}");
        Ok(())
    })
}
