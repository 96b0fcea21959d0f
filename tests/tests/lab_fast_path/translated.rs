//! Connections that somebody translates: the same answers on, off and switched.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Node, Pod, wait_until};

use crate::{OFF, ON, SERVICE, SERVICE6, SOON, counts, pods_of_two_nodes, pods_with, restart, settled};

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
            // A port of which nothing is known yet. The first packet to the pod may be fast; once the service was asked, the
            // next one leaves from another port, where connection tracking is.
            let fresh = a.network()?.run(|| Ok(UdpSocket::bind((ip, 0))?))?;
            fresh.set_read_timeout(Some(Duration::from_secs(20)))?;
            (0..3).try_for_each(|_| asks_both(&fresh, direct)).with_context(|| format!("{by}, a new port, {when}"))?;
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
