//! The fast path in the Lab: whole nodes, real pods, and the kernel's own programs. Whatever takes which path, packets arrive
//! as they were sent.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::faults::rules::Field;
use fabric_tests::lab::{Connection, Families, Lab, Node, Pod, Stream, wait_until};

const SOON: Duration = Duration::from_secs(60);
const ON: &str = "--fast-path=on";
const OFF: &str = "--fast-path=off";
const AUTO: &str = "--fast-path=auto";
/// An address that is nobody's, and translated to a pod's: as that of a Service of Kubernetes.
const SERVICE: &str = "198.51.100.10";
/// The same of IPv6.
const SERVICE6: &str = "2001:db8:5::10";

/// Two nodes with these flags, and a pod on each.
fn pods_of_two_nodes(flags: [&str; 2]) -> Result<(Lab, Pod, Pod)> {
    pods_with(Families::V4, flags)
}

fn pods_with(families: Families, flags: [&str; 2]) -> Result<(Lab, Pod, Pod)> {
    let lab = Lab::builder().nodes(2).families(families).start()?;
    let (a, b) = (lab.node("node-1")?.add_pod("a")?, lab.node("node-2")?.add_pod("b")?);
    for (pod, flag) in [(&a, flags[0]), (&b, flags[1])] {
        restart(&pod.node, flag)?;
    }
    for (pod, flag) in [(&a, flags[0]), (&b, flags[1])] {
        settled(&pod.node, flag)?;
    }
    Ok((lab, a, b))
}

fn restart(node: &Node, flag: &str) -> Result<()> {
    node.stop_fabricd()?;
    node.start_fabricd_with(&[flag], &[])
}

/// Waits until the fast path is as the flag says, with a peer and a pod at least.
fn settled(node: &Node, flag: &str) -> Result<()> {
    node.wait_ready()?;
    wait_until(&format!("{} with {flag}", node.name), SOON, || {
        let status = node.status()?;
        let fast_path = &status["fast_path"];
        let number = |key: &str| fast_path[key].as_u64().unwrap_or_default();
        let on = fast_path["on"].as_bool().unwrap_or_default() && number("peers") > 0 && number("pods") > 0;
        ensure!(on == (flag != OFF), "{fast_path}; {}", status["warnings"]);
        let left = node.exec(&["ls", "-R", "/sys/fs/bpf/fabric"])?;
        ensure!(flag != OFF || !left.success(), "it left pins: {left:?}");
        Ok(())
    })
}

/// Packets that took the fast path, and those that did not for this reason.
fn counts(node: &Node, reason: &str) -> Result<(u64, u64)> {
    let status = node.status()?;
    let of = |value: &serde_json::Value| value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default();
    let each = status["fast_path"]["counts"].as_array().cloned().unwrap_or_default();
    let slow = each.iter().filter(|count| count["reason"] == reason).map(|count| of(&count["packets"])).sum();
    Ok((of(&status["fast_path"]["fast_packets"]), slow))
}

/// Packets of a program that had this reason.
fn count(node: &Node, program: &str, reason: &str) -> Result<u64> {
    let status = node.status()?;
    let each = status["fast_path"]["counts"].as_array().cloned().unwrap_or_default();
    let count = each.iter().find(|count| count["program"] == program && count["reason"] == reason);
    Ok(count.map_or(0, |count| {
        let packets = &count["packets"];
        packets.as_u64().or_else(|| packets.as_str()?.parse().ok()).unwrap_or_default()
    }))
}

/// Sends eight megabytes by TCP, and fails unless they arrive as they were.
fn transfer(from: &Pod, to: &Pod) -> Result<()> {
    transfer_over(Family::V4, from, to)
}

fn transfer_over(family: Family, from: &Pod, to: &Pod) -> Result<()> {
    let listener = to.network()?.run(|| Ok(TcpListener::bind((to.ip(family)?, 0))?))?;
    let target = listener.local_addr()?;
    let sent: Vec<u8> = (0..8 << 20).map(|_| fastrand::u8(..)).collect();
    let expected = sent.clone();
    let receiver = thread::spawn(move || -> Result<bool> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(SOON))?;
        let mut got = Vec::with_capacity(expected.len());
        stream.read_to_end(&mut got)?;
        Ok(got == expected)
    });
    let mut stream = from.network()?.run(|| Ok(TcpStream::connect_timeout(&target, SOON)?))?;
    stream.set_write_timeout(Some(SOON))?;
    stream.write_all(&sent)?;
    drop(stream);
    let same = receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    ensure!(same, "other bytes arrived than were sent");
    Ok(())
}

#[test]
fn transfers_arrive_as_they_were_sent_and_take_the_fast_path() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let c = a.node.add_pod("c")?;
    wait_until("a second pod on the fast path", SOON, || {
        ensure!(a.node.status()?["fast_path"]["pods"].as_u64() == Some(2), "not yet");
        Ok(())
    })?;
    let before = counts(&a.node, "")?.0;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &c)] {
        transfer(from, to)?;
    }
    // The programs' counters are read with each audit.
    wait_until("thousands of packets on the fast path", SOON, || {
        for node in [&a.node, &b.node] {
            let fast = counts(node, "")?.0;
            ensure!(fast > before + 200, "{fast} on {}", node.name);
        }
        Ok(())
    })?;
    a.run(&["ping", "-c1", "-W5", &b.ip(Family::V4)?.to_string()])?;
    Ok(())
}

#[test]
fn ipv6_beside_ipv4_takes_the_fast_path_and_what_is_not_ordinary_the_kernels() -> Result<()> {
    let (_lab, a, b) = pods_with(Families::Dual, [ON, ON])?;
    let c = a.node.add_pod("c")?;
    let addresses = |node: &Node, count: u64| {
        wait_until("all addresses of pods on the fast path", SOON, || {
            ensure!(node.status()?["fast_path"]["pods"] == count, "{}", node.status()?["fast_path"]);
            Ok(())
        })
    };
    addresses(&a.node, 4)?;
    addresses(&b.node, 2)?;
    let stream = Stream::start_with(&a, &b, Family::V6, 200)?;
    for (from, to) in [(&a, &b), (&b, &a), (&a, &c)] {
        transfer_over(Family::V6, from, to)?;
        transfer(from, to)?;
    }
    wait_until("packets of both families on the fast path", SOON, || {
        for node in [&a.node, &b.node] {
            // By the device, which IPv6 alone needs; by the program; and what came by either. Segments travel together.
            for (program, reason) in [("pod_out", "device"), ("pod_out", "tunnel"), ("wire_in", "tunnel")] {
                let packets = count(node, program, reason)?;
                ensure!(packets > 50, "{packets} of {program} {reason} on {}", node.name);
            }
        }
        Ok(())
    })?;
    // Each peer's share is counted, and both ends agree.
    wait_until("the peer's traffic on both nodes", SOON, || {
        let carried = |node: &Node| -> Result<[u64; 4]> {
            let peers: serde_json::Value =
                serde_json::from_str(&node.run(&["fabricctl", "peers", "-o", "json"])?).context("JSON")?;
            let traffic = &peers["peers"][0]["fast_path"];
            Ok(["sent_packets", "sent_bytes", "received_packets", "received_bytes"].map(|key| {
                let number = &traffic[key];
                number.as_u64().or_else(|| number.as_str()?.parse().ok()).unwrap_or_default()
            }))
        };
        for node in [&a.node, &b.node] {
            // Four transfers of eight megabytes, two in each direction.
            let [sent, sent_bytes, received, received_bytes] = carried(node)?;
            ensure!(sent.min(received) > 100, "{sent} and {received} packets on {}", node.name);
            ensure!(sent_bytes.min(received_bytes) > 2 * (8 << 20), "{sent_bytes}, {received_bytes} on {}", node.name);
        }
        Ok(())
    })?;
    let wide = a.node.run(&["fabricctl", "peers", "-o", "wide"])?;
    ensure!(wide.contains("FAST SENT") && wide.contains(" packets, "), "{wide}");
    let metrics = a.node.http_get(9472, "/metrics")?.body;
    for name in ["packets", "bytes"] {
        let line = format!("fabricd_fast_path_peer_{name}_total{{peer=\"node-2\",direction=\"sent\"}} ");
        ensure!(metrics.contains(&line), "{line} is not in {metrics}");
    }
    // Neighbours are looked for anew; pings, fragments and what is too large are the kernel's.
    a.run(&["ip", "-6", "neighbour", "flush", "dev", "eth0"])?;
    a.node.run(&["ip", "-6", "neighbour", "flush", "dev", "cni0"])?;
    let there = b.ip(Family::V6)?.to_string();
    for ping in [["-c1", "-W5", "-s56"], ["-c1", "-W5", "-s4000"]] {
        a.run(&[&["ping"], &ping[..], &[&there]].concat())?;
    }
    transfer_over(Family::V6, &a, &b)?;
    restart(&b.node, OFF)?;
    settled(&b.node, OFF)?;
    [(&a, &b), (&b, &a)].into_iter().try_for_each(|(from, to)| transfer_over(Family::V6, from, to))?;
    a.node.kill_fabricd()?;
    stream.wait_for(200, SOON)?;
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");
    // Its addresses are given to nobody's port, though no daemon runs.
    c.del()?;
    let d = a.node.add_pod("d")?;
    transfer_over(Family::V6, &b, &d)?;
    transfer_over(Family::V6, &d, &a)
}

#[test]
fn a_node_without_it_understands_one_with_it() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, OFF])?;
    transfer(&a, &b)?;
    transfer(&b, &a)
}

#[test]
fn switching_it_amid_a_flow_and_killing_the_daemon_lose_nothing() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([OFF, OFF])?;
    let (connection, stream) = (Connection::start(&a, &b)?, Stream::start(&b, &a)?);
    for flags in [[ON, OFF], [ON, ON], [OFF, ON], [OFF, OFF], [ON, ON]] {
        for (pod, flag) in [(&a, flags[0]), (&b, flags[1])] {
            restart(&pod.node, flag)?;
            settled(&pod.node, flag)?;
        }
        stream.wait_for(200, SOON)?;
        transfer(&a, &b)?;
    }
    a.node.kill_fabricd()?;
    b.node.kill_fabricd()?;
    stream.wait_for(1_000, SOON)?;
    transfer(&b, &a)?;
    for pod in [&a, &b] {
        pod.node.start_fabricd_with(&[ON], &[])?;
        settled(&pod.node, ON)?;
    }
    stream.wait_for(200, SOON)?;
    let (report, connection) = (stream.stop()?, connection.stop()?);
    ensure!(report.lost == 0 && connection.broken.is_none(), "{report:?}, {connection:?}");
    Ok(())
}

/// What translates the service's address to the pod's on the client's node, by both programs that people use.
fn translate(node: &Node, by: &str, to: SocketAddr) -> Result<()> {
    let (nft, iptables, service) =
        if to.is_ipv4() { ("ip", "iptables", SERVICE) } else { ("ip6", "ip6tables", SERVICE6) };
    let rules = match by {
        "nft" => vec![
            format!("nft add table {nft} service"),
            format!("nft add chain {nft} service prerouting {{ type nat hook prerouting priority dstnat ; }}"),
            format!("nft add rule {nft} service prerouting {nft} daddr {service} tcp dport 80 dnat to {to}"),
            format!("nft add rule {nft} service prerouting {nft} daddr {service} udp dport 53 dnat to {to}"),
        ],
        _ => ["tcp --dport 80", "udp --dport 53"]
            .map(|what| format!("{iptables} -t nat -A PREROUTING -d {service} -p {what} -j DNAT --to-destination {to}"))
            .to_vec(),
    };
    rules.iter().try_for_each(|rule| node.run(&rule.split(' ').collect::<Vec<_>>()).map(drop))
}

/// A service of the pod that answers with what it is sent, by TCP and UDP.
fn serve(pod: &Pod, family: Family) -> Result<SocketAddr> {
    let ip = pod.ip(family)?;
    let listener = pod.network()?.run(|| Ok(TcpListener::bind((ip, 0))?))?;
    let address = listener.local_addr()?;
    let socket = pod.network()?.run(|| Ok(UdpSocket::bind(address)?))?;
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let (mut reader, mut writer) = (&stream, &stream);
                std::io::copy(&mut reader, &mut writer)
            });
        }
    });
    thread::spawn(move || {
        let mut packet = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            if socket.send_to(&packet[..length], from).is_err() {
                return;
            }
        }
    });
    Ok(address)
}

fn echoes(stream: &mut TcpStream, word: &str) -> Result<()> {
    stream.write_all(word.as_bytes())?;
    let mut answer = vec![0; word.len()];
    stream.read_exact(&mut answer).with_context(|| format!("no echo of {word}"))?;
    ensure!(answer == word.as_bytes(), "{answer:?} is no echo of {word}");
    Ok(())
}

/// One socket talks to the pod and to the service in turns: the answers come from whom they were asked of.
fn asks_both(socket: &UdpSocket, direct: SocketAddr) -> Result<()> {
    let service = if direct.is_ipv4() { SERVICE } else { SERVICE6 };
    for target in [direct, (service.parse::<IpAddr>()?, 53).into()] {
        socket.send_to(b"who", target)?;
        let mut packet = [0; 64];
        let (_, from) = socket.recv_from(&mut packet).with_context(|| format!("no answer from {target}"))?;
        ensure!(from == target, "asked {target}, {from} answered");
    }
    Ok(())
}

#[test]
fn translated_connections_have_the_same_answers_on_and_off_and_switched() -> Result<()> {
    for (by, families, family, service) in [
        ("nft", Families::V4, Family::V4, SERVICE),
        ("iptables", Families::V4, Family::V4, SERVICE),
        ("nft", Families::Dual, Family::V6, SERVICE6),
    ] {
        let (_lab, a, b) = pods_with(families, [OFF, ON])?;
        let direct = serve(&b, family)?;
        translate(&a.node, by, direct)?;
        let service: SocketAddr = (service.parse::<IpAddr>()?, 80).into();
        let open = |target: SocketAddr| -> Result<TcpStream> {
            let stream = a.network()?.run(|| Ok(TcpStream::connect_timeout(&target, SOON)?))?;
            stream.set_read_timeout(Some(SOON))?;
            Ok(stream)
        };
        let ip = a.ip(family)?;
        let socket = a.network()?.run(|| Ok(UdpSocket::bind((ip, 0))?))?;
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        let mut streams = vec![open(service)?, open(direct)?];
        let all_answer = |streams: &mut Vec<TcpStream>, when: &str| -> Result<()> {
            streams.iter_mut().try_for_each(|stream| echoes(stream, when)).with_context(|| format!("{by}, {when}"))?;
            (0..5).try_for_each(|_| asks_both(&socket, direct)).with_context(|| format!("{by}, {when}"))
        };
        all_answer(&mut streams, "off")?;
        for (flag, when) in [(ON, "switched on"), (OFF, "switched off"), (ON, "on again")] {
            restart(&a.node, flag)?;
            settled(&a.node, flag)?;
            all_answer(&mut streams, when)?;
            streams.extend([open(service)?, open(direct)?]);
            all_answer(&mut streams, when)?;
        }
        wait_until("packets that the NAT guard kept from the fast path", SOON, || {
            ensure!(counts(&a.node, "nat")?.1 > 0, "none");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn connection_that_is_idle_while_it_is_switched_on_is_whole_when_it_is_off_again() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([OFF, OFF])?;
    // As kube-proxy does.
    let invalid = "iptables -A FORWARD -m conntrack --ctstate INVALID -j DROP";
    for pod in [&a, &b] {
        pod.node.run(&invalid.split(' ').collect::<Vec<_>>())?;
    }
    let server = serve(&b, Family::V4)?;
    let mut stream = a.network()?.run(|| Ok(TcpStream::connect_timeout(&server, SOON)?))?;
    stream.set_read_timeout(Some(SOON))?;
    echoes(&mut stream, "off")?;
    for (flag, bytes) in [(ON, 16 << 20), (OFF, 1 << 20)] {
        for pod in [&a, &b] {
            restart(&pod.node, flag)?;
            settled(&pod.node, flag)?;
        }
        // Far more than the window that connection tracking knew.
        let word = "0123456789abcdef".repeat(4096);
        (0..bytes / word.len()).try_for_each(|_| echoes(&mut stream, &word)).with_context(|| flag)?;
    }
    Ok(())
}

#[test]
fn attacks_fail_on_the_fast_path_too() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq", ON])?;
    settled(&field.target.node, ON)?;
    let through: Vec<String> = field.attacks()?.into_iter().filter(|(_, got)| *got).map(|(name, _)| name).collect();
    assert_eq!(through, ["the peer itself over IPv4", "the peer itself over IPv6"]);
    Ok(())
}

#[test]
fn a_pod_that_goes_while_the_daemon_is_dead_is_taken_out_and_pods_can_be_added() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let node = Arc::clone(&b.node);
    let stream = Stream::start(&a, &b)?;
    stream.wait_for(200, SOON)?;
    stream.stop()?;
    node.kill_fabricd()?;
    let port = b.ip(Family::V4)?;
    b.del()?;
    let c = node.add_pod("c")?;
    transfer(&a, &c)?;
    transfer(&c, &a)?;
    node.start_fabricd_with(&[ON], &[])?;
    settled(&node, ON)?;
    transfer(&a, &c)?;
    ensure!(c.ip(Family::V4)? != port, "the address was given out again at once");
    Ok(())
}

#[test]
fn obstacles_are_told_with_the_way_out_and_cleanup_leaves_no_pin() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let node = &a.node;
    let fix = |words: &str| -> Result<String> {
        let mut fix = String::new();
        wait_until(words, SOON, || {
            let warnings = node.status()?["warnings"].to_string();
            let (_, rest) = warnings.split_once(words).with_context(|| format!("{words} is not in {warnings}"))?;
            fix = rest.split(['"', ';', ',']).next().unwrap_or_default().to_owned();
            Ok(())
        })?;
        ensure!(node.status()?["ready"].as_bool() == Some(true), "the node is not ready");
        Ok(fix)
    };
    // What is there and is something else.
    node.stop_fabricd()?;
    node.run(&["sh", "-ec", "cd /sys/fs/bpf/fabric/*/ && mv programs/pod_in_* maps/config"])?;
    node.start_fabricd_with(&[ON], &[])?;
    node.wait_ready()?;
    let way_out = fix("remove it with: ")?;
    ensure!(way_out.starts_with("rm /sys/fs/bpf/fabric/"), "{way_out}");
    let is_all_that_is_left = || {
        wait_until("the programs are taken away from what nobody can keep true", SOON, || {
            let left = node.run(&["find", "/sys/fs/bpf/fabric", "-type", "f"])?;
            ensure!(left.lines().count() == 1 && way_out.ends_with(left.trim()), "{left}");
            Ok(())
        })
    };
    is_all_that_is_left()?;
    transfer(&a, &b)?;
    node.run(&way_out.split(' ').collect::<Vec<_>>())?;
    settled(node, ON)?;
    transfer(&a, &b)?;
    // A map that is gone: programs go on with it, and nobody tells them what changes.
    node.run(&["sh", "-ec", "rm /sys/fs/bpf/fabric/*/maps/peers"])?;
    wait_until("maps and programs that belong together", SOON, || {
        node.run(&["sh", "-ec", "ls /sys/fs/bpf/fabric/*/maps/peers"]).map(drop)
    })?;
    settled(node, ON)?;
    let before = counts(node, "")?.0;
    transfer(&a, &b)?;
    // Programs with the old maps would leave the counters of the new ones as they are: zero.
    wait_until("packets that the new maps have counted", SOON, || {
        let now = counts(node, "")?.0;
        ensure!(now > 20 && now != before, "{now}");
        Ok(())
    })?;
    // No bpffs.
    node.stop_fabricd()?;
    node.run(&["umount", "/sys/fs/bpf"])?;
    node.start_fabricd_with(&[ON], &[])?;
    node.wait_ready()?;
    let way_out = fix("mount it with: ")?;
    transfer(&a, &b)?;
    node.run(&way_out.split(' ').collect::<Vec<_>>())?;
    settled(node, ON)?;
    transfer(&a, &b)?;

    node.stop_fabricd()?;
    node.run(&["fabricd", "--cleanup"])?;
    let left = node.exec(&["ls", "-R", "/sys/fs/bpf/fabric"])?;
    ensure!(!left.success(), "it left pins: {left:?}");
    Ok(())
}

/// What others load that judges, changes or encrypts packets between pods, how it goes again, and what is said of it. What
/// kube-proxy, Docker and a firewall of the host have beside it and is not about pods is there all the while.
const OTHERS: [(&str, &str, &str); 7] = [
    // Docker.
    ("iptables -P FORWARD DROP", "iptables -P FORWARD ACCEPT", "ip filter FORWARD policy drop"),
    // firewalld.
    (
        "nft add table inet firewalld
         nft add chain inet firewalld filter_FORWARD { type filter hook forward priority 10 \\; policy accept \\; }
         nft add rule inet firewalld filter_FORWARD ct state established,related accept
         nft add rule inet firewalld filter_FORWARD ct state invalid drop
         nft add rule inet firewalld filter_FORWARD ip saddr 10.244.0.0/16 accept",
        "nft delete table inet firewalld",
        "inet firewalld filter_FORWARD rule 2",
    ),
    // kube-router.
    (
        "iptables -N KUBE-ROUTER-FORWARD
         iptables -N KUBE-POD-FW-A
         iptables -A KUBE-POD-FW-A -p tcp --dport 4000 -j REJECT
         iptables -A KUBE-ROUTER-FORWARD -d 10.244.0.0/16 -j KUBE-POD-FW-A
         iptables -A FORWARD -j KUBE-ROUTER-FORWARD",
        "iptables -F KUBE-POD-FW-A",
        "ip filter KUBE-POD-FW-A rule 1",
    ),
    // Segments that are made shorter.
    (
        "iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --set-mss 1000",
        "iptables -t mangle -F FORWARD",
        "may change packets between pods",
    ),
    // Frames that are filtered.
    (
        "nft add table bridge others
         nft add chain bridge others forward { type filter hook forward priority 0 \\; }",
        "nft delete table bridge others",
        "the chain bridge others forward",
    ),
    (
        "ip xfrm policy add dir out src 198.51.100.1 dst 198.51.100.2 tmpl proto esp mode tunnel",
        "ip xfrm policy flush",
        "an IPsec policy is in force",
    ),
    (
        "tc qdisc add dev fabric.1 root tbf rate 1gbit burst 1mbit latency 10ms",
        "tc qdisc del dev fabric.1 root",
        "discipline tbf",
    ),
];

#[test]
fn auto_is_on_beside_kube_proxy_and_docker_and_off_while_something_judges_pods_packets() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([AUTO, ON])?;
    let node = &a.node;
    let script = |script: &str| node.run(&["sh", "-ec", script]);
    script(
        "iptables -N KUBE-FORWARD
         iptables -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
         iptables -A FORWARD -j KUBE-FORWARD
         iptables -A FORWARD -i docker0 ! -o docker0 -j DROP
         iptables -A INPUT -p tcp --dport 22 -j DROP
         iptables -t nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE",
    )?;
    settled(node, AUTO)?;
    transfer(&a, &b)?;
    let told = |what: &str| {
        wait_until(what, SOON, || {
            let status = node.status()?;
            let reason = status["fast_path"]["reason"].as_str().unwrap_or_default().to_owned();
            ensure!(status["fast_path"]["on"] != true && reason.contains(what), "{}", status["fast_path"]);
            ensure!(status["ready"] == true, "{status}");
            Ok(())
        })
    };
    // What is next comes before what was there goes, so that there is always something.
    let mut go: Option<&str> = None;
    for (come, then, what) in OTHERS {
        script(come)?;
        go.map(script).transpose()?;
        told(what)?;
        go = Some(then);
    }
    let doctor = node.run(&["fabricctl", "doctor"])?;
    ensure!(doctor.contains("left off: fabric.1 has the root queueing discipline tbf"), "{doctor}");
    let explained =
        node.run(&["fabricctl", "explain", &a.ip(Family::V4)?.to_string(), &b.ip(Family::V4)?.to_string()])?;
    ensure!(explained.contains("the kernel's: the fast path is off"), "{explained}");
    let metrics = node.http_get(9472, "/metrics")?.body;
    ensure!(metrics.contains("fabricd_fast_path{state=\"left_off\"} 1"), "{metrics}");
    let events = node.run(&["fabricctl", "events"])?;
    ensure!(events.contains("IPsec"), "{events}");
    go.map(script).transpose()?;
    settled(node, AUTO)?;
    transfer(&a, &b)?;
    let explained =
        node.run(&["fabricctl", "explain", &a.ip(Family::V4)?.to_string(), &b.ip(Family::V4)?.to_string()])?;
    ensure!(explained.contains("the fast path, for TCP and UDP"), "{explained}");
    Ok(())
}

#[test]
fn pod_of_the_bandwidth_plugin_keeps_its_limits_and_takes_the_kernels_path_alone() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([AUTO, ON])?;
    let node = &a.node;
    node.run(&["sh", "-ec", "test -e /opt/cni/bin/bandwidth || ln -s /usr/lib/cni/bandwidth /opt/cni/bin/bandwidth"])?;
    let folder = node.path("/etc/cni/net.d")?;
    let file =
        std::fs::read_dir(&folder)?.filter_map(Result::ok).map(|entry| entry.path()).next().context("a conflist")?;
    let mut conflist: serde_json::Value = serde_json::from_slice(&std::fs::read(&file)?)?;
    let megabits = 50_000_000;
    let limits = serde_json::json!({
        "type": "bandwidth", "ingressRate": megabits, "ingressBurst": megabits, "egressRate": megabits, "egressBurst": megabits,
    });
    conflist["plugins"].as_array_mut().context("plugins")?.push(limits);
    std::fs::write(&file, conflist.to_string())?;
    let c = node.add_pod("c")?;
    let pods = |count: u64| {
        wait_until("the pods on the fast path", SOON, || {
            let status = node.status()?;
            ensure!(status["fast_path"]["pods"] == count, "{}", status["fast_path"]);
            Ok(status["fast_path"]["reason"].as_str().unwrap_or_default().to_owned())
        })
    };
    let reason = pods(1)?;
    ensure!(reason.contains("1 pods take the kernel's path, since their ports have queueing disciplines"), "{reason}");
    let before = counts(node, "pod_off")?.1;
    for (from, to) in [(&c, &b), (&b, &c), (&a, &c), (&a, &b)] {
        transfer(from, to)?;
    }
    wait_until("packets that were left to the kernel", SOON, || {
        ensure!(counts(node, "pod_off")?.1 > before + 100, "{:?}", counts(node, "pod_off")?);
        Ok(())
    })?;
    let queues = node.run(&["tc", "-s", "qdisc", "show"])?;
    ensure!(queues.matches("qdisc tbf").count() == 2, "{queues}");
    Ok(())
}

#[test]
fn what_another_layout_has_pinned_gives_way_and_costs_no_packet() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let node = &a.node;
    let stream = Stream::start(&a, &b)?;
    stream.wait_for(200, SOON)?;
    let layouts = || Ok::<_, anyhow::Error>(node.run(&["ls", "/sys/fs/bpf/fabric"])?.trim().to_owned());
    let ours = layouts()?;
    let become_anothers = || {
        node.stop_fabricd()?;
        node.run(&["sh", "-ec", "cd /sys/fs/bpf/fabric && mv * 999"])
    };
    become_anothers()?;
    node.start_fabricd_with(&[ON], &[])?;
    settled(node, ON)?;
    ensure!(layouts()? == ours, "{}", layouts()?);
    transfer(&a, &b)?;
    // Those of a release to come, before a downgrade that switches it off.
    become_anothers()?;
    node.start_fabricd_with(&[OFF], &[])?;
    settled(node, OFF)?;
    transfer(&a, &b)?;
    stream.wait_for(200, SOON)?;
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");
    Ok(())
}

#[test]
fn without_capabilities_the_node_is_ready_and_says_which_it_lacks() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([OFF, ON])?;
    let node = &a.node;
    node.stop_fabricd()?;
    let script = "printf '#!/bin/sh\nexec setpriv --bounding-set=-bpf,-perfmon,-sys_admin fabricd --fast-path=on\n' \
                  >/run/without-bpf && chmod +x /run/without-bpf";
    node.run(&["sh", "-ec", script])?;
    node.start_this_fabricd("/run/without-bpf")?;
    node.wait_ready()?;
    wait_until("the capabilities are named", SOON, || {
        let warnings = node.status()?["warnings"].to_string();
        ensure!(warnings.contains("does fabricd have CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN?"), "{warnings}");
        Ok(())
    })?;
    let doctor = node.exec(&["fabricctl", "doctor"])?.stdout;
    ensure!(doctor.contains("off, packets take the kernel's path"), "{doctor}");
    transfer(&a, &b)?;
    restart(node, ON)?;
    settled(node, ON)
}

#[test]
fn pods_that_come_and_go_beside_a_stream_cost_it_no_packet() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let stream = Stream::start(&a, &b)?;
    for round in 0..10 {
        let added = (0..5).map(|n| b.node.add_pod(&format!("c{round}-{n}"))).collect::<Result<Vec<_>>>()?;
        transfer(&a, &added[0])?;
        added.into_iter().try_for_each(Pod::del)?;
    }
    stream.wait_for(200, SOON)?;
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");
    wait_until("the pod that stays, alone", SOON, || {
        let status = b.node.status()?;
        ensure!(status["fast_path"]["pods"] == 1, "{}", status["fast_path"]);
        Ok(())
    })
}
