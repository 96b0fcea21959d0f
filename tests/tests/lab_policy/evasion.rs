//! Packets that would get round the rules: tags, fragments, the address of another, a Service's, a host without br_netfilter.

use std::net::{IpAddr, UdpSocket};

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_core::policy::Conn;
use fabric_tests::lab::attack::frame_reaches;
use fabric_tests::lab::{Node, Pod, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, policies_of, policy};
use serde_json::json;

use crate::{Cluster, PATIENCE, PORTS, SOON, Server, connects, open_and_closed, start_fabricd};

#[test]
fn frame_with_vlan_tags_reaches_no_pod() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let (web, target) = (cluster.add_pod(node, "open", "web")?, cluster.add_pod(node, "open", "target")?);
    let closed = cluster.add_pod(node, "closed", "closed")?;
    let (priority, service) = (0x8100, 0x88a8);
    for family in [Family::V4, Family::V6] {
        let source = web.ip(family)?;
        let reaches = |to: &Pod, tags: &[u16]| frame_reaches(&web, source, to, tags);
        wait_until("a frame without tags gets where policies let it", SOON, || {
            ensure!(reaches(&target, &[])?, "it doesn't");
            Ok(())
        })?;
        for tags in [&[][..], &[priority], &[service], &[priority, priority], &[service, priority]] {
            assert!(!reaches(&closed, tags)?, "{family} {tags:x?}: nothing may reach it");
            assert_eq!(reaches(&target, tags)?, tags.is_empty(), "{family} {tags:x?}: not even where all may");
        }
    }
    let dropped = node.http_get(9472, "/metrics")?.body;
    let counted = |line: &&str| line.contains("pods send each other no VLAN tags") && !line.ends_with(" 0");
    assert!(dropped.lines().any(|line| counted(&line)), "{dropped}");
    Ok(())
}

#[test]
fn pod_reaches_nothing_by_the_address_of_another_or_by_fragments() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let (web, target) = (cluster.add_pod(node, "open", "web")?, cluster.add_pod(node, "open", "target")?);
    let closed = cluster.add_pod(node, "closed", "closed")?;
    for family in [Family::V4, Family::V6] {
        wait_until("the pod itself gets there", SOON, || {
            ensure!(frame_reaches(&web, web.ip(family)?, &target, &[])?, "it doesn't");
            Ok(())
        })?;
        assert!(!frame_reaches(&closed, web.ip(family)?, &target, &[])?, "{family}: another's address");
        let sink = target.network()?.run(|| Ok(UdpSocket::bind((target.ip(family)?, 0))?))?;
        sink.set_read_timeout(Some(PATIENCE / 8))?;
        let to = sink.local_addr()?;
        // Larger than any packet here: the pod's kernel makes three of it.
        for (from, is_allowed) in [(&web, true), (&closed, false)] {
            let socket = from.network()?.run(|| Ok(UdpSocket::bind((from.ip(family)?, 0))?))?;
            let arrives = || -> Result<bool> {
                socket.send_to(&[7; 4000], to)?;
                Ok(sink.recv(&mut [0; 4096]).is_ok())
            };
            let tries = (0..5).map(|_| arrives()).collect::<Result<Vec<_>>>()?;
            assert_eq!(tries.contains(&true), is_allowed, "{family}: fragments");
        }
    }
    Ok(())
}

/// A Service as kube-proxy translates it: connections to port 80 of an address reach port 8080 of a pod.
fn translate(node: &Node, service: IpAddr, pod: IpAddr) -> Result<()> {
    let (family, target) = if pod.is_ipv4() { ("ip", pod.to_string()) } else { ("ip6", format!("[{pod}]")) };
    // A pod that reaches itself gets the node's address, or it would answer itself past the node.
    let rules = format!(
        "table {family} service {{\nchain pre {{\ntype nat hook prerouting priority -100;\n\
         {family} daddr {service} tcp dport 80 dnat to {target}:8080\n}}\n\
         chain post {{\ntype nat hook postrouting priority 100;\n\
         {family} saddr {pod} {family} daddr {pod} masquerade\n}}\n}}\n"
    );
    node.command(&["nft", "-f", "-"])?.stdin(rules).run().map(drop)
}

#[test]
fn policies_see_the_endpoint_of_a_service_that_others_translate_and_never_its_address() -> Result<()> {
    let cluster = Cluster::start(2)?;
    cluster.api.create(NAMESPACES, namespace("x", &json!({})));
    let only = |name: &str| json!({"matchLabels": {"pod": name}});
    let services: [IpAddr; 2] = ["203.0.113.10".parse()?, "2001:db8::10".parse()?];
    let blocks =
        services.map(|ip| json!({"ipBlock": {"cidr": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })}}));
    let welcome = ["web", "far", "vip"].map(|name| json!({"podSelector": only(name)}));
    for (name, subject, spec) in [
        ("db", "db", json!({"ingress": [{"from": welcome}]})),
        ("far", "far", json!({"policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": only("db")}]}]})),
        ("web", "web", json!({"policyTypes": ["Egress"], "egress": [{"ports": [{"port": 8080}]}]})),
        ("vip", "vip", json!({"policyTypes": ["Egress"], "egress": [{"to": blocks}]})),
    ] {
        let mut spec = spec;
        spec["podSelector"] = only(subject);
        cluster.api.create(&policies_of("x"), policy("x", name, &spec));
    }
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let add = |node: usize, name: &str| cluster.add_pod(&cluster.nodes[node], "x", name);
    let (db, web, near) = (add(0, "db")?, add(0, "web")?, add(0, "near")?);
    let (far, other, vip) = (add(1, "far")?, add(1, "other")?, add(1, "vip")?);
    let _server = Server::start(&db)?;
    for (at, service) in services.into_iter().enumerate() {
        cluster.nodes.iter().try_for_each(|node| translate(node, service, db.ips()[at]))?;
        let conn = |from: &Pod| Conn { src: from.ips()[at], dst: service, protocol: 6, port: 80 };
        for (from, is_allowed) in
            [(&web, true), (&far, true), (&db, true), (&near, false), (&other, false), (&vip, false)]
        {
            wait_until("it is as policies say", SOON, || {
                let seen = connects(from, &conn(from))?;
                ensure!(seen == is_allowed, "{} to {service}: {seen}", from.name());
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn without_br_netfilter_pods_that_a_policy_isolates_are_cut_off_from_those_of_their_node() -> Result<()> {
    let cluster = open_and_closed()?;
    let (node, elsewhere) = (&cluster.nodes[0], "/run/net");
    node.kill_fabricd()?;
    let settings = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];
    for setting in settings {
        node.run(&["sysctl", "-w", &format!("net.bridge.{setting}=0")])?;
    }
    // As where the module is missing: no such folder.
    node.run(&["mkdir", elsewhere])?;
    for folder in ["core", "ipv4", "ipv6", "netfilter"] {
        node.run(&["ln", "-s", &format!("/proc/sys/net/{folder}"), elsewhere])?;
    }
    let without: Vec<(&str, String)> = [&cluster.env[..], &[("FABRICD_SYSCTL_ROOT", elsewhere.to_owned())]].concat();
    start_fabricd(node, &[], &without)?;
    let (web, target) = (cluster.add_pod(node, "open", "web")?, cluster.add_pod(node, "open", "target")?);
    let closed = cluster.add_pod(node, "closed", "closed")?;
    let _servers = [Server::start(&target)?, Server::start(&closed)?];
    let conn =
        |from: &Pod, to: &Pod, at: usize| Conn { src: from.ips()[at], dst: to.ips()[at], protocol: 6, port: PORTS[0] };
    wait_until("the node says that it has no br_netfilter", SOON, || {
        let reply = node.http_get(9472, "/readyz")?;
        ensure!(
            reply.body.contains("cut off from the others here") && reply.body.contains("br_netfilter"),
            "{}",
            reply.body
        );
        Ok(())
    })?;
    for at in [0, 1] {
        wait_until("what no policy isolates connects", SOON, || {
            ensure!(connects(&web, &conn(&web, &target, at))?, "it doesn't");
            Ok(())
        })?;
        assert!(!connects(&web, &conn(&web, &closed, at))?, "nothing gets to an isolated pod");
        assert!(!connects(&closed, &conn(&closed, &target, at))?, "nor from there");
    }
    // With the module all is as ever.
    node.kill_fabricd()?;
    cluster.start_fabricd(node)?;
    wait_until("nothing filters frames any more", SOON, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("bridge fabric-policy"), "{tables}");
        Ok(())
    })?;
    assert!(!connects(&web, &conn(&web, &closed, 0))?);
    Ok(())
}
