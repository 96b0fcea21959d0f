//! The packet filter in the Lab: attacks fail, rules come back, others' rules stay, and pods reach the outside.

use std::net::{IpAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fabric_core::model::{Family, MacAddr};
use fabric_tests::lab::attack::advertise_router;
use fabric_tests::lab::{Families, Forged, Lab, Node, Pod, Stream, addresses, wait_until};

/// How long a rule may be missing.
const REPAIR: Duration = Duration::from_secs(2);
const SOON: Duration = Duration::from_secs(5);

/// A source in the network that belongs to no node.
fn nobodys(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 244, 255, 9]),
        Family::V6 => "fd00:10:244:ffff::9".parse().expect("an address"),
    }
}

/// Two nodes with a VXLAN device each, a pod on each, and another on the first.
struct Field {
    lab: Lab,
    target: Pod,
    neighbour: Pod,
    peer: Pod,
    devices: [&'static str; 2],
}

impl Field {
    /// VXLAN as anybody makes it by hand.
    fn by_hand() -> Result<Self> {
        let lab = Lab::builder().nodes(2).families(Families::Dual).plain().start()?;
        for node in lab.nodes() {
            for (name, family) in [("hand4", Family::V4), ("hand6", Family::V6)] {
                let local = node.underlay_ip(family).to_string();
                let vxlan = ["type", "vxlan", "id", "1", "dstport", "8472", "local", &local, "nolearning"];
                node.run(&[&["ip", "link", "add", name, "up"], &vxlan[..]].concat())?;
            }
        }
        Self::with(lab, ["hand4", "hand6"])
    }

    /// The fabric.
    fn of_fabricd(args: &[&str]) -> Result<Self> {
        let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
        for node in lab.nodes() {
            restart_with(node, args)?;
        }
        let field = Self::with(lab, ["fabric.1", "fabric6.1"])?;
        for node in field.lab.nodes() {
            // The bridge's ports are known a moment after the pods are there, the peer's address after it has joined.
            wait_until("the filter knows peer and pods", SOON, || {
                let rules = node.run(&["nft", "list", "ruleset"])?;
                ensure!(rules.contains("veth") && rules.contains("10.99.0.") && rules.contains("fe80::/10"), "{rules}");
                Ok(())
            })?;
        }
        Ok(field)
    }

    fn with(lab: Lab, devices: [&'static str; 2]) -> Result<Self> {
        let (first, second) = (lab.node("node-1")?.clone(), lab.node("node-2")?.clone());
        let (target, neighbour) = (first.add_pod("target")?, first.add_pod("neighbour")?);
        Ok(Self { target, neighbour, peer: second.add_pod("peer")?, lab, devices })
    }

    /// Attacks 1 to 4, each with whether it got through. The first is none: a peer sends what it may.
    fn attacks(&self) -> Result<Vec<(String, bool)>> {
        let mut outcomes = vec![];
        let target = &*self.target.node;
        let stranger = self.lab.underlay().machine.network()?;
        for (family, device) in Family::ALL.into_iter().zip(self.devices) {
            let vtep = mac(target, device)?;
            let node = target.underlay_ip(family);
            let whole = Forged { vtep, vni: 1, source: self.peer.ip(family)?, size: 100 };
            let large = Forged { size: 1300, ..whole.clone() };
            let spoofed = Forged { source: nobodys(family), ..whole.clone() };
            let of_target = Forged { source: self.neighbour.ip(family)?, ..whole.clone() };
            let peer_node = self.peer.node.network()?;
            for sender in [&self.peer, &self.neighbour] {
                let ways =
                    wait_until("a way to the node", SOON, || sender.run(&["ping", "-c1", "-W1", &node.to_string()]));
                ways.with_context(|| format!("{} can't attack", sender.full_name()))?;
            }
            let mut attack = |name: &str, got: bool| outcomes.push((format!("{name} over {family}"), got));

            // IPv6 takes a moment to be sure of its addresses.
            let peer_itself = wait_until("a packet of the peer itself", SOON, || {
                ensure!(whole.reaches(&peer_node, node, &self.target)?, "it does not arrive");
                Ok(true)
            })?;
            attack("the peer itself", peer_itself);
            attack("1: a stranger", whole.reaches(&stranger, node, &self.target)?);
            attack("2: a pod of another node", whole.reaches(&self.peer.network()?, node, &self.target)?);
            attack("2: a pod of the same node", whole.reaches(&self.neighbour.network()?, node, &self.target)?);
            attack("3: a peer as nobody", spoofed.reaches(&peer_node, node, &self.target)?);
            attack("3: a peer as a pod of the target", of_target.reaches(&peer_node, node, &self.target)?);
            // Fragments of 1,280 bytes are possible everywhere.
            let cut = |machine: &fabric_tests::lab::Machine, link: &str, how: &str| -> Result<()> {
                let version = if family == Family::V4 { "-4" } else { "-6" };
                let to = node.to_string();
                match how {
                    "1280" => {
                        machine.run(&["ip", version, "route", "replace", &to, "dev", link, "mtu", "lock", how])?
                    }
                    _ => machine.run(&["ip", version, "route", "del", &to, "dev", link])?,
                };
                Ok(())
            };
            for (machine, link, name) in [
                (&self.lab.underlay().machine, "br0", "1: a stranger, in fragments"),
                (&**self.peer.node, "eth0", "3: a peer as nobody, in fragments"),
            ] {
                cut(machine, link, "1280")?;
                let sent = if link == "br0" { &large } else { &Forged { size: 1300, ..spoofed.clone() } };
                attack(name, sent.reaches(&machine.network()?, node, &self.target)?);
                cut(machine, link, "whole")?;
            }
            attack("4: a spoofing pod", self.spoofs(family, &self.peer)?);
            attack("4: a spoofing pod of the same bridge", self.spoofs(family, &self.neighbour)?);
        }
        outcomes.push(("4: a router advertisement to a pod".into(), self.advertises()?));
        Ok(outcomes)
    }

    /// Whether a pod reaches the target under an address that isn't its own.
    fn spoofs(&self, family: Family, pod: &Pod) -> Result<bool> {
        let false_ip = nobodys(family);
        let prefix = format!("{false_ip}/{}", family.bits());
        pod.run(&["ip", "address", "add", &prefix, "dev", "lo"])?;
        let sink = self.target.network()?.run(|| Ok(UdpSocket::bind((self.target.ip(family)?, 0))?))?;
        sink.set_read_timeout(Some(Duration::from_millis(300)))?;
        let source = pod.network()?.run(|| {
            // A new IPv6 address can't be used at once.
            wait_until("the false address", SOON, || Ok(UdpSocket::bind((false_ip, 0))?))
        })?;
        let mut got = false;
        for _ in 0..3 {
            source.send_to(b"spoofed", sink.local_addr()?)?;
            got |= sink.recv_from(&mut [0; 16]).is_ok();
        }
        pod.run(&["ip", "address", "del", &prefix, "dev", "lo"])?;
        Ok(got)
    }

    /// Whether a pod becomes its neighbour's router by saying so.
    fn advertises(&self) -> Result<bool> {
        for _ in 0..3 {
            advertise_router(&self.neighbour)?;
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(!self.target.run(&["ip", "-6", "route", "show", "default", "proto", "ra"])?.is_empty())
    }
}

fn mac(node: &Node, device: &str) -> Result<MacAddr> {
    let link: serde_json::Value = serde_json::from_str(&node.run(&["ip", "-j", "link", "show", device])?)?;
    Ok(link[0]["address"].as_str().context("a link without address")?.parse()?)
}

fn restart_with(node: &Node, args: &[&str]) -> Result<()> {
    node.stop_fabricd()?;
    node.start_fabricd_with(args, &[])?;
    node.wait_ready()
}

#[test]
fn attacks_get_through_a_vxlan_made_by_hand() -> Result<()> {
    let outcomes = Field::by_hand()?.attacks()?;
    let failed: Vec<_> = outcomes.iter().filter(|(_, got_through)| !got_through).collect();
    assert!(failed.is_empty(), "what proves nothing below, since it fails here: {failed:#?}");
    Ok(())
}

#[test]
fn attacks_fail_on_the_fabric_and_are_counted() -> Result<()> {
    let field = Field::of_fabricd(&["--ip-masq"])?;
    let through: Vec<String> = field.attacks()?.into_iter().filter(|(_, got)| *got).map(|(name, _)| name).collect();
    assert_eq!(through, ["the peer itself over IPv4", "the peer itself over IPv6"]);
    let rules = field.target.node.run(&["nft", "list", "ruleset"])?;
    for reason in ["from no peer", "source is not in the peer's subnet", "a pod does not speak VXLAN", "no router"] {
        let counted = rules.lines().any(|rule| rule.contains(reason) && !rule.contains("packets 0 "));
        assert!(counted, "nothing is counted as {reason:?} in\n{rules}");
    }
    Ok(())
}

#[test]
fn each_part_can_be_switched_off() -> Result<()> {
    let field = Field::of_fabricd(&[])?;
    for (args, lacking) in [
        (&["--check-senders=false"][..], &["chain senders", "members4"][..]),
        (&["--check-pods=false"], &["table bridge", "cni0"]),
        (&["--notrack=false"], &["notrack"]),
        (&["--check-senders=false", "--check-pods=false", "--notrack=false"], &["table"]),
    ] {
        restart_with(&field.target.node, args)?;
        let rules = field.target.node.run(&["nft", "list", "ruleset"])?;
        assert!(lacking.iter().all(|word| !rules.contains(word)), "{args:?}: {rules}");
    }
    Ok(())
}

/// Does what others do, and waits until the rules are as before.
fn is_repaired(node: &Node, deed: &str, whole: &str) -> Result<()> {
    node.run(&["nft", deed])?;
    wait_until(deed, REPAIR, || {
        let now = rules_of(node)?;
        ensure!(now == whole, "after `nft {deed}`:\n{now}");
        Ok(())
    })
}

#[test]
fn rules_that_others_flush_are_back_within_two_seconds_and_no_packet_is_lost() -> Result<()> {
    let field = Field::of_fabricd(&[])?;
    let node = &field.target.node;
    let whole = rules_of(node)?;
    for deed in [
        "flush ruleset",
        "delete table inet fabric",
        "flush table inet fabric",
        "delete table bridge fabric",
        "insert rule inet fabric input accept",
    ] {
        let streams = [Family::V4, Family::V6].map(|ip| Stream::start_with(&field.peer, &field.target, ip, 1_000));
        is_repaired(node, deed, &whole)?;
        for stream in streams {
            let report = stream?.stop()?;
            assert_eq!((report.lost, report.duplicated), (0, 0), "`nft {deed}`: {report:?}");
        }
    }
    Ok(())
}

#[test]
fn masquerade_that_others_flush_is_back_within_two_seconds() -> Result<()> {
    let field = Field::of_fabricd(&["--ip-masq"])?;
    let node = &field.target.node;
    let whole = rules_of(node)?;
    for deed in ["flush ruleset", "flush chain inet fabric postrouting", "delete table inet fabric"] {
        is_repaired(node, deed, &whole)?;
        let outside =
            Outside::at(field.lab.underlay().machine.network()?, addresses::gateway(Family::V4), &field.target)?;
        assert_eq!(outside.sees()?, node.underlay_ip(Family::V4), "after `nft {deed}`");
    }
    Ok(())
}

#[test]
fn member_that_somebody_deletes_is_back_within_two_seconds() -> Result<()> {
    let field = Field::of_fabricd(&[])?;
    let stream = Stream::start(&field.peer, &field.target)?;
    field.target.node.run(&["nft", "flush", "set", "inet", "fabric", "members4"])?;
    stream.wait_for(1_000, SOON)?;
    let report = stream.stop()?;
    assert!(report.longest_gap < REPAIR, "{report:?}");
    Ok(())
}

#[test]
fn restarts_and_crashes_leave_the_rules_alone() -> Result<()> {
    let field = Field::of_fabricd(&["--ip-masq"])?;
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

/// All rules, without what changes by itself.
fn rules_of(node: &Node) -> Result<String> {
    let table = |family| node.run(&["nft", "-s", "list", "table", family, "fabric"]);
    Ok(table("inet")? + &table("bridge")?)
}

/// A host beyond the network that answers UDP, and a pod that talks to it.
struct Outside {
    server: UdpSocket,
    client: UdpSocket,
}

impl Outside {
    fn at(place: fabric_tests::lab::spaces::Spaces, ip: IpAddr, pod: &Pod) -> Result<Self> {
        let server = place.run(|| Ok(UdpSocket::bind((ip, 0))?))?;
        let client = pod.network()?.run(|| Ok(UdpSocket::bind((pod.ip(Family::of(ip))?, 0))?))?;
        client.connect(server.local_addr()?)?;
        server.set_read_timeout(Some(SOON))?;
        client.set_read_timeout(Some(SOON))?;
        Ok(Self { server, client })
    }

    /// The address that the outside sees; it also answers.
    fn sees(&self) -> Result<IpAddr> {
        self.client.send(b"hello")?;
        let (_, from) = self.server.recv_from(&mut [0; 16]).context("nothing arrives outside")?;
        self.server.send_to(b"hello", from)?;
        self.client.recv(&mut [0; 16]).context("no answer from outside")?;
        Ok(from.ip())
    }
}

#[test]
fn pods_reach_the_outside_as_their_node_and_each_other_as_themselves() -> Result<()> {
    let field = Field::of_fabricd(&["--ip-masq"])?;
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

#[test]
fn rules_of_others_stay_byte_identical_and_a_dropping_policy_is_named_with_the_way_out() -> Result<()> {
    let field = Field::of_fabricd(&["--ip-masq"])?;
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
        ensure!(warnings.contains("iptables -I FORWARD"), "{status}");
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
    let field = Field::of_fabricd(&[])?;
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
    let field = Field::of_fabricd(&["--allow-sender", "10.99.0.0/29"])?;
    let node: &Arc<Node> = &field.target.node;
    let source = field.peer.ip(Family::V4)?;
    let forged = Forged { vtep: mac(node, "fabric.1")?, vni: 1, source, size: 100 };
    let stranger = field.lab.underlay().machine.network()?;
    let began = Instant::now();
    assert!(forged.reaches(&stranger, node.underlay_ip(Family::V4), &field.target)?, "{:?}", began.elapsed());
    Ok(())
}
