//! The fast path in the Lab: whole nodes, real pods, and the kernel's own programs. Whatever takes which path, packets arrive
//! as they were sent.

mod captured;
mod filters;
mod obstacles;
mod replaced;
mod translated;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::faults::rules::Field;
use fabric_tests::lab::{Builder, Connection, Families, Lab, Node, Pod, Stream, wait_until};

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
    pods_of(Lab::builder().nodes(2).families(families), flags)
}

fn pods_of(lab: Builder, flags: [&str; 2]) -> Result<(Lab, Pod, Pod)> {
    let lab = lab.start()?;
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
