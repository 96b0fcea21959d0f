//! The packet filter in the Lab: attacks fail, rules come back, others' rules stay, and pods reach the outside.

use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fabric_core::model::{Family, Subnet};
use fabric_tests::faults::rules::{Field, is_repaired, mac, nobodys, restart_with, rules_of};
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{
    Answer, By, Families, Forged, Lab, Node, Outside, Pod, Server, Stream, addresses, ask, wait_until,
};
use serde_json::json;

/// How long a rule may be missing.
const REPAIR: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(40);

#[test]
fn attacks_get_through_a_vxlan_made_by_hand() -> Result<()> {
    let outcomes = Field::by_hand(Lab::builder())?.attacks()?;
    let failed: Vec<_> = outcomes.iter().filter(|(_, got_through)| !got_through).collect();
    assert!(failed.is_empty(), "what proves nothing below, since it fails here: {failed:#?}");
    Ok(())
}

#[test]
fn attacks_fail_on_the_fabric_and_are_counted() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let through: Vec<String> = field.attacks()?.into_iter().filter(|(_, got)| *got).map(|(name, _)| name).collect();
    assert_eq!(through, ["the peer itself over IPv4", "the peer itself over IPv6"]);
    let rules = field.target.node.run(&["nft", "list", "ruleset"])?;
    for reason in ["from no peer", "source is not in the peer's subnet", "a pod does not speak VXLAN", "no router"] {
        let counted = rules.lines().any(|rule| rule.contains(reason) && !rule.contains("packets 0 "));
        assert!(counted, "nothing is counted as {reason:?} in\n{rules}");
    }
    Ok(())
}

/// What gets through from a port that fabricd has never heard of, which sends under an address that isn't this node's.
fn from_a_strange_port(field: &Field, devices: [&str; 2]) -> Result<Vec<String>> {
    let node = &field.target.node;
    let mut through = vec![];
    for (family, device) in Family::ALL.into_iter().zip(devices) {
        let peer_node = field.peer.node.underlay_ip(family);
        let forged = Forged { vtep: mac(node, device)?, vni: 1, source: field.peer.ip(family)?, size: 100 };
        // IPv6 takes a moment to be sure of its addresses.
        wait_until("a packet of the peer itself", SOON, || {
            let arrives = forged.reaches(&field.peer.node.network()?, node.underlay_ip(family), &field.target)?;
            ensure!(arrives, "it does not arrive");
            Ok(())
        })?;
        let stray = strange_port(node, peer_node)?;
        if forged.reaches(&stray, node.underlay_ip(family), &field.target)? {
            through.push(format!("VXLAN from {peer_node}"));
        }
        let stray = strange_port(node, nobodys(family))?;
        // A pod that may send there goes first: so every neighbour on the path is known to those who forward.
        let to = field.peer.ip(family)?.to_string();
        wait_until("the path to the peer's pod", SOON, || field.target.run(&["ping", "-c1", "-W1", &to]))?;
        let sink = field.peer.network()?.run(|| Ok(UdpSocket::bind((field.peer.ip(family)?, 0))?))?;
        sink.set_read_timeout(Some(Duration::from_millis(300)))?;
        let source = stray.run(|| Ok(UdpSocket::bind((nobodys(family), 0))?))?;
        let mut got = false;
        for _ in 0..3 {
            source.send_to(b"spoofed", sink.local_addr()?)?;
            got |= sink.recv_from(&mut [0; 16]).is_ok();
        }
        if got {
            through.push(format!("UDP from {}", nobodys(family)));
        }
    }
    Ok(through)
}

/// Plugs a namespace with this address alone into the bridge, past the CNI plugin.
fn strange_port(node: &Node, ip: IpAddr) -> Result<Spaces> {
    let gateway = if ip.is_ipv4() { "169.254.1.1" } else { "fe80::1" };
    node.run(&[
        "sh",
        "-ec",
        &format!(
            "ip link del stray-port 2>/dev/null && ip netns del stray || :
             ip netns add stray
             ip netns exec stray sysctl -qw net.ipv6.conf.default.accept_dad=0
             ip link add stray-port up master cni0 type veth peer name eth0 netns stray
             ip -n stray link set eth0 up
             ip -n stray address add {ip} dev eth0
             ip -n stray neighbour add {gateway} lladdr $(cat /sys/class/net/cni0/address) dev eth0 nud permanent
             ip -n stray route add default via {gateway} dev eth0 onlink"
        ),
    ])?;
    // The kernel puts a new port into use when it gets round to its carrier; until then the bridge takes nothing from it.
    wait_until("the stray port forwards", SOON, || {
        let state = node.run(&["cat", "/sys/class/net/stray-port/brport/state"])?;
        ensure!(state.trim() == "3", "it is in state {state}");
        // Nor has the namespace an IPv6 address to send from before its end has seen the carrier.
        let tentative = node.run(&["ip", "-n", "stray", "address", "show", "tentative"])?;
        ensure!(!tentative.contains("inet6"), "{tentative}");
        Ok(())
    })?;
    Spaces::of_network(&node.path("/run/netns/stray")?)
}

#[test]
fn strange_ports_do_not_get_past_the_bridges_name_though_the_daemon_is_dead() -> Result<()> {
    let by_hand = Field::by_hand(Lab::builder())?;
    let through = from_a_strange_port(&by_hand, ["hand4", "hand6"])?;
    assert_eq!(through.len(), 4, "what proves nothing below, since it fails here: {through:?}");
    by_hand.lab.destroy()?;

    for args in [&[][..], &["--ip-masq"]] {
        let field = Field::of_fabricd(Lab::builder(), args)?;
        field.target.node.kill_fabricd()?;
        assert_eq!(from_a_strange_port(&field, ["fabric.1", "fabric6.1"])?, [""; 0], "{args:?}");
        field.lab.destroy()?;
    }
    Ok(())
}

#[test]
fn each_part_can_be_switched_off() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &[])?;
    for (args, lacking) in [
        (&["--check-senders=false"][..], &["chain senders", "members4"][..]),
        (&["--check-pods=false"], &["table bridge", "cni0"]),
        (&["--notrack=false", "--ip-masq"], &["notrack"]),
        (&["--check-senders=false", "--check-pods=false", "--notrack=false"], &["table"]),
    ] {
        restart_with(&field.target.node, &["--ip-masq"])?;
        let whole = field.target.node.run(&["nft", "list", "ruleset"])?;
        assert!(lacking.iter().all(|word| whole.contains(word)), "{args:?}: {whole}");
        restart_with(&field.target.node, args)?;
        let rules = field.target.node.run(&["nft", "list", "ruleset"])?;
        assert!(lacking.iter().all(|word| !rules.contains(word)), "{args:?}: {rules}");
    }
    Ok(())
}

#[test]
fn masquerade_that_others_flush_is_back_within_two_seconds() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let node = &field.target.node;
    for deed in ["flush ruleset", "flush chain inet fabric postrouting", "delete table inet fabric"] {
        is_repaired(node, deed)?;
        let outside =
            Outside::at(field.lab.underlay().machine.network()?, addresses::gateway(Family::V4), &field.target)?;
        assert_eq!(outside.sees()?, node.underlay_ip(Family::V4), "after `nft {deed}`");
    }
    Ok(())
}

#[test]
fn member_that_somebody_deletes_is_back_within_two_seconds() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &[])?;
    let stream = Stream::start(&field.peer, &field.target)?;
    field.target.node.run(&["nft", "flush", "set", "inet", "fabric", "members4"])?;
    stream.wait_for(1_000, SOON)?;
    let report = stream.stop()?;
    assert!(report.longest_gap < REPAIR, "{report:?}");
    Ok(())
}

#[test]
fn restarts_and_crashes_leave_the_rules_alone() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let node = &field.target.node;
    // Handles change with everything that is made anew, and counters begin at zero.
    let shown = || node.run(&["nft", "-a", "-s", "list", "ruleset"]);
    let before = shown()?;
    let stream = Stream::start(&field.peer, &field.target)?;
    for _ in 0..3 {
        restart_with(node, &["--ip-masq"])?;
        node.kill_fabricd()?;
        node.start_fabricd_with(&["--ip-masq"], &[])?;
        node.wait_ready()?;
    }
    assert_eq!(shown()?, before);
    assert_eq!(stream.stop()?.lost, 0);
    node.stop_fabricd()?;
    node.run(&["fabricd", "--cleanup"])?;
    assert_eq!(node.run(&["nft", "list", "ruleset"])?, "");
    Ok(())
}

#[test]
fn pods_reach_the_outside_as_their_node_and_each_other_as_themselves() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let (node, pod) = (&field.target.node, &field.target);
    for family in Family::ALL {
        let outside = Outside::at(field.lab.underlay().machine.network()?, addresses::gateway(family), pod)?;
        assert_eq!(outside.sees()?, node.underlay_ip(family));
        let other_node = Outside::at(field.peer.node.network()?, field.peer.node.underlay_ip(family), pod)?;
        assert_eq!(other_node.sees()?, node.underlay_ip(family));
        let stream = Stream::start_with(pod, &field.peer, family, 100)?.stop()?;
        assert_eq!(stream.sources, [pod.ip(family)?].into(), "no translation within the network");
    }
    assert!(node.run(&["cat", "/run/flannel/subnet.env"])?.contains("FLANNEL_IPMASQ=true"));

    // The other node knows the way back by the fabric.
    restart_with(node, &["--ip-masq", "--no-masquerade-to", "nodes"])?;
    let other_node = Outside::at(field.peer.node.network()?, field.peer.node.underlay_ip(Family::V4), pod)?;
    assert_eq!(other_node.sees()?, pod.ip(Family::V4)?);
    Ok(())
}

/// As the manifests, the package and `lab up` have it, on a node that comes later too.
#[test]
fn a_lab_with_masquerade_has_it_on_every_node() -> Result<()> {
    let mut lab = Lab::builder().nodes(1).families(Families::Dual).masquerade(true).start()?;
    lab.add_node()?;
    for node in lab.nodes() {
        let pod = node.add_pod("a")?;
        for family in Family::ALL {
            let outside = Outside::at(lab.underlay().machine.network()?, addresses::gateway(family), &pod)?;
            assert_eq!(outside.sees()?, node.underlay_ip(family));
        }
    }
    Ok(())
}

#[test]
fn clients_and_exceptions_keep_their_addresses() -> Result<()> {
    let field =
        Field::of_fabricd(Lab::builder(), &["--ip-masq", "--no-masquerade-to", "198.51.100.0/24,2001:db8:9::/64"])?;
    let (node, pod, far) = (&field.target.node, &field.target, &field.peer);
    let outside = &field.lab.underlay().machine;
    for (family, excepted, version) in [(Family::V4, "198.51.100.9", "-4"), (Family::V6, "2001:db8:9::9", "-6")] {
        let via = node.underlay_ip(family).to_string();
        outside.run(&["ip", version, "route", "add", addresses::pod_network(family), "via", &via])?;
        let client = || Ok::<_, anyhow::Error>((outside.network()?, addresses::gateway(family)));
        let at = |pod: &Pod| Ok::<_, anyhow::Error>((pod.network()?, pod.ip(family)?));

        let to_us = Outside::between(at(pod)?, client()?)?;
        assert_eq!(to_us.sees()?, addresses::gateway(family), "a client's address stays towards a pod of this node");
        // Another node would answer a client directly, past the connection that was opened here.
        let to_others = Outside::between(at(far)?, client()?)?;
        let network: Subnet = addresses::pod_network(family).parse()?;
        assert!(network.contains(to_others.sees()?), "towards a pod of another node it is this node's own");

        let excepted: IpAddr = excepted.parse()?;
        let prefix = format!("{excepted}/{}", family.bits());
        outside.run(&["ip", "address", "add", &prefix, "dev", "lo"])?;
        let to_excepted =
            wait_until("the address can be used", SOON, || Outside::at(outside.network()?, excepted, pod))?;
        node.run(&["ip", version, "route", "replace", &prefix, "via", &addresses::gateway(family).to_string()])?;
        assert_eq!(to_excepted.sees()?, pod.ip(family)?, "excepted by --no-masquerade-to");

        // kube-proxy's mark: it translates such packets itself, later. Here nobody does.
        let to_gateway = Outside::at(outside.network()?, addresses::gateway(family), pod)?;
        let ours = node.underlay_ip(family);
        node.run(&[
            "nft",
            "add table inet marks { chain c { type filter hook prerouting priority mangle; meta mark set 0x4000; }; }",
        ])?;
        assert_eq!(to_gateway.sees()?, pod.ip(family)?, "marked 0x4000");
        node.run(&["nft", "delete table inet marks"])?;
        let unmarked = Outside::at(outside.network()?, addresses::gateway(family), pod)?;
        assert_eq!(unmarked.sees()?, ours);
    }
    Ok(())
}

#[test]
fn peers_with_direct_routes_pass_the_filter() -> Result<()> {
    let network = ["--network", "10.244.0.0/16", "--ipv6-network", "fd00:10:244::/48", "--direct-routing"];
    let field = Field::of_fabricd(Lab::builder().network(&network), &["--ip-masq"])?;
    let routes = field.target.node.run(&["ip", "route", "show", "proto", "250"])?;
    assert!(routes.contains("dev eth0"), "{routes}");
    for family in Family::ALL {
        let stream = Stream::start_with(&field.peer, &field.target, family, 1_000)?;
        stream.wait_for(1_000, SOON)?;
        let report = stream.stop()?;
        assert_eq!((report.lost, report.sources), (0, [field.peer.ip(family)?].into()));
    }
    Ok(())
}

#[test]
fn rules_of_others_stay_byte_identical_and_a_dropping_policy_is_named_with_the_way_out() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--ip-masq"])?;
    let node = &field.target.node;
    // What kube-proxy, Docker and firewalld leave behind, in both kinds of iptables and in nftables.
    for line in [
        "iptables-nft -t nat -N KUBE-SERVICES",
        "iptables-nft -t nat -A PREROUTING -j KUBE-SERVICES",
        "iptables-nft -t nat -N KUBE-POSTROUTING",
        "iptables-nft -t nat -A POSTROUTING -j KUBE-POSTROUTING",
        "iptables-nft -t nat -A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE",
        "iptables-legacy -t mangle -A FORWARD -s 192.0.2.0/24 -j MARK --set-mark 7",
        "nft add table inet firewalld",
        "nft add chain inet firewalld filter_INPUT { type filter hook input priority 10; }",
        "iptables-nft -P FORWARD DROP",
    ] {
        node.run(&line.split(' ').collect::<Vec<_>>())?;
    }
    let others = || -> Result<Vec<String>> {
        [
            &["nft", "-a", "-s", "list", "table", "ip", "nat"][..],
            &["nft", "-a", "-s", "list", "table", "ip", "filter"],
            &["nft", "-a", "-s", "list", "table", "inet", "firewalld"],
            &["iptables-legacy-save", "-t", "mangle"],
        ]
        .into_iter()
        // A comment with the time, and policies with counters, are no rules.
        .map(|list| Ok(node.run(list)?.lines().filter(|line| !line.starts_with(['#', ':'])).collect()))
        .collect()
    };
    let before = others()?;
    restart_with(node, &["--ip-masq"])?;
    let warning = wait_until("the warning", Duration::from_secs(15), || {
        let status = node.status()?;
        let warnings = status["warnings"].to_string();
        ensure!(warnings.contains("iptables-nft -I FORWARD"), "{status}");
        Ok(warnings)
    })?;
    node.run(&["nft", "delete", "table", "inet", "fabric"])?;
    wait_until("our rules are back", REPAIR, || rules_of(node))?;
    assert_eq!(others()?, before);

    let commands = warning.split("with: ").nth(1).context("no way out")?.trim_end_matches(['"', ']']).to_owned();
    ensure!(Stream::start(&field.peer, &field.target).is_err(), "the policy drops");
    for command in commands.split("; ") {
        node.run(&command.split(' ').collect::<Vec<_>>())?;
    }
    assert_eq!(Stream::start(&field.peer, &field.target)?.stop()?.lost, 0);
    Ok(())
}

#[test]
fn other_users_of_the_port_are_not_touched() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &[])?;
    let node = &field.target.node;
    node.run(&["ip", "link", "add", "theirs", "up", "type", "vxlan", "id", "77", "dstport", "8472", "dev", "eth0"])?;
    let vtep = mac(node, "theirs")?;
    let forged = Forged { vtep, vni: 77, source: nobodys(Family::V4), size: 100 };
    let stranger = field.lab.underlay().machine.network()?;
    assert!(forged.reaches(&stranger, node.underlay_ip(Family::V4), &field.target)?);
    let ours = Forged { vni: 1, vtep: mac(node, "fabric.1")?, ..forged };
    assert!(!ours.reaches(&stranger, node.underlay_ip(Family::V4), &field.target)?);
    Ok(())
}

#[test]
fn sender_that_is_allowed_by_option_gets_through() -> Result<()> {
    let field = Field::of_fabricd(Lab::builder(), &["--allow-sender", "10.99.0.0/29"])?;
    let node: &Arc<Node> = &field.target.node;
    let source = field.peer.ip(Family::V4)?;
    let forged = Forged { vtep: mac(node, "fabric.1")?, vni: 1, source, size: 100 };
    let stranger = field.lab.underlay().machine.network()?;
    let began = Instant::now();
    assert!(forged.reaches(&stranger, node.underlay_ip(Family::V4), &field.target)?, "{:?}", began.elapsed());
    Ok(())
}

/// hostPort, as the plugin portmap makes it. The pod that serves asks itself too, which comes back by the port that it left.
#[test]
fn host_ports_answer_everybody_and_see_the_client_of_another_node() -> Result<()> {
    let lab = Lab::builder().nodes(3).families(Families::Dual).masquerade(true).start()?;
    let [one, two, three] = ["node-1", "node-2", "node-3"].map(|name| lab.node(name));
    let (one, two, three) = (one?, two?, three?);
    for node in [one, two, three] {
        node.run(&["sh", "-ec", "for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 >$file; done"])?;
    }
    let (beside, far) = (one.add_pod("beside")?, two.add_pod("far")?);
    let ports = ["tcp", "udp"].map(|protocol| json!({"hostPort": 8080, "containerPort": 80, "protocol": protocol}));
    let portmap = json!({
        "type": "portmap", "capabilities": {"portMappings": true}, "runtimeConfig": {"portMappings": ports},
    });
    let conflist = json!({"cniVersion": "1.0.0", "name": "fabric", "plugins": [{"type": "fabric-cni"}, portmap]});
    fs::write(one.path("/etc/cni/net.d/00-ports.conflist")?, conflist.to_string())?;
    let serving = one.add_pod("serving")?;

    for family in Family::ALL {
        let at = SocketAddr::new(serving.ip(family)?, 80);
        let _server = Server::start(&serving.network()?, "serving", at, at)?;
        let target = SocketAddr::new(one.underlay_ip(family), 8080);
        let clients = [
            ("a pod of another node", far.network()?, Some(two.underlay_ip(family))),
            ("another node", two.network()?, Some(two.underlay_ip(family))),
            ("a third node", three.network()?, Some(three.underlay_ip(family))),
            ("a pod of this node", beside.network()?, None),
            ("this node", one.network()?, None),
            ("the pod itself", serving.network()?, None),
        ];
        for ((who, place, address), by) in clients.iter().flat_map(|client| [(client, By::Tcp), (client, By::Udp)]) {
            wait_until(&format!("{who} is answered by {by:?} over {family}"), SOON, || {
                let answer = ask(place, by, target)?;
                let Answer::From(name, seen) = &answer else { anyhow::bail!("{answer:?}") };
                ensure!(name == "serving" && address.is_none_or(|address| address == *seen), "{answer:?}");
                Ok(())
            })?;
        }
    }
    serving.del()?;
    let left = one.run(&["sh", "-c", "iptables-save -t nat; ip6tables-save -t nat"])?;
    ensure!(!left.contains("dport 8080") && !left.contains("--dports 8080"), "{left}");
    Ok(())
}
