//! One cluster with flannel: nodes of both kinds beside each other, and nodes that change hands in both directions while
//! their pods talk. flannel is what it leaves on a host ([`fabric_tests::lab::flannel`]); with `FLANNELD=/path` and
//! `FLANNEL_CNI=/path` it is flannel itself.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::flannel::{CONFLIST, Flannel, Options, extend_config};
use fabric_tests::lab::{Connection, Families, Lab, Node, Outside, Pod, Stream, addresses, wait_until};

/// How long a daemon may take; the machine may be busy.
const SOON: Duration = Duration::from_secs(60);

const MASQUERADE: &[(&str, &str)] = &[("FABRICD_IP_MASQ", "true")];

/// A cluster of two flannel nodes and one of ours, each with pods.
struct Cluster {
    lab: Lab,
    flannels: [Flannel; 2],
    ours: Arc<Node>,
}

impl Cluster {
    fn start(families: Families, options: Options) -> Result<Self> {
        let mut lab = Lab::builder().nodes(0).families(families).masquerade(true).start()?;
        extend_config(&lab, options)?;
        let nodes = [lab.boot_node()?, lab.boot_node()?];
        let [a, b] = &nodes;
        let flannels = [Flannel::start_on(&lab, a, options)?, Flannel::start_on(&lab, b, options)?];
        flannels[0].follow()?;
        let ours = lab.add_node()?;
        flannels.iter().try_for_each(Flannel::follow)?;
        Ok(Self { lab, flannels, ours })
    }
}

/// Everything that must not notice: streams both ways to a node of each kind and to a pod of the same node, TCP, and a
/// conversation with the outside.
struct Traffic {
    streams: Vec<Stream>,
    connection: Connection,
    outside: Vec<(Outside, IpAddr)>,
}

impl Traffic {
    fn start(cluster: &Cluster, pods: &[Pod; 2], far: &[Pod]) -> Result<Self> {
        let [a, neighbour] = pods;
        let node = &a.node;
        let mut streams = vec![Stream::start(a, neighbour)?];
        let (b, c) = (far.first().context("a flannel node's pod")?, far.last().context("a pod of ours")?);
        for &family in cluster.lab.families().each() {
            // Neighbours are known from then on: a kernel that has to ask first drops what doesn't fit into its queue.
            for (from, to) in [(a, b), (b, a)] {
                let ip = to.ips().iter().find(|ip| Family::of(**ip) == family).context("an address")?.to_string();
                wait_until("a packet comes through", SOON, || from.run(&["ping", "-c", "1", "-W", "1", &ip]))?;
            }
            streams.push(Stream::start_with(a, b, family, 1_000)?);
            streams.push(Stream::start_with(b, a, family, 1_000)?);
        }
        streams.extend([Stream::start(a, c)?, Stream::start(c, a)?]);
        let connection = Connection::start(a, b)?;
        let outside = cluster.lab.families().each().iter().map(|&family| {
            let outside = Outside::at(cluster.lab.underlay().machine.network()?, addresses::gateway(family), a)?;
            Ok((outside, node.underlay_ip(family)))
        });
        Ok(Self { streams, connection, outside: outside.collect::<Result<_>>()? })
    }

    /// The same flow, as the outside sees it.
    fn is_masqueraded(&self) -> Result<()> {
        for (outside, node) in &self.outside {
            ensure!(outside.sees()? == *node, "the outside sees another address");
        }
        Ok(())
    }

    fn stop(self) -> Result<()> {
        for stream in self.streams {
            let report = stream.stop()?;
            ensure!(report.lost == 0 && report.duplicated == 0, "{report:?}");
        }
        let report = self.connection.stop()?;
        ensure!(report.broken.is_none(), "{report:?}");
        Ok(())
    }
}

/// Rules that are neither flannel's nor ours, byte for byte.
fn foreign_rules(node: &Node) -> Result<Vec<String>> {
    let mut rules = vec![];
    for program in ["iptables-save", "ip6tables-save"] {
        let shown = node.run(&[program])?;
        let foreign = |line: &&str| !["FLANNEL-", "CNI-", "fabricd: ", "#", ":"].iter().any(|ours| line.contains(ours));
        rules.extend(shown.lines().filter(foreign).map(str::to_owned));
    }
    Ok(rules)
}

/// Somebody else's rules, and a policy that lets nothing through by itself.
fn add_foreign_rules(node: &Node, forward_drop: bool) -> Result<()> {
    for program in ["iptables", "ip6tables"] {
        let script = format!(
            "{program} -I FORWARD -p udp --dport 9 -m comment --comment 'of others' -j DROP &&
             {program} -t nat -A POSTROUTING -p udp --dport 9 -j RETURN"
        );
        node.run(&["sh", "-c", &script])?;
        if forward_drop {
            node.run(&[program, "-P", "FORWARD", "DROP"])?;
        }
    }
    Ok(())
}

fn record(node: &Node) -> Result<String> {
    let ip = node.underlay_ip(Family::V4).to_string();
    let shown = node.run(&["etcdctl", "get", "--prefix", "/coreos.com/network/subnets/"])?;
    let lines: Vec<&str> = shown.lines().collect();
    let own = lines.chunks(2).find(|pair| pair.get(1).is_some_and(|value| value.contains(&format!("\"{ip}\""))));
    Ok(own.context("a record of this node")?.join("\n"))
}

fn mac(node: &Node, device: &str) -> Result<String> {
    let shown: serde_json::Value = serde_json::from_str(&node.run(&["ip", "-j", "link", "show", device])?)?;
    Ok(shown[0]["address"].as_str().context("a MAC address")?.to_owned())
}

/// The node is fabricd's when this returns: `steps` at most in each run of the command.
fn take_over(flannel: &Flannel, steps: Option<u32>) -> Result<()> {
    let node = &flannel.node;
    flannel.stop()?;
    node.start_fabricd_with(&[], MASQUERADE)?;
    let most = steps.map(|most| most.to_string());
    let mut argv = vec!["fabricd", "takeover", "--wait", "45"];
    argv.extend(most.iter().flat_map(|most| ["--steps", most]));
    while !node.run(&argv)?.contains("this node is fabricd's") {}
    node.wait_ready()
}

/// The node is flannel's when this returns.
fn give_back(flannel: &Flannel) -> Result<()> {
    let node = &flannel.node;
    node.stop_fabricd()?;
    let refused = node.run(&["fabricd", "giveback", "--steps", "1"])?;
    ensure!(refused.contains("name flannel.1"), "{refused}");
    while node.run(&["fabricd", "giveback", "--dry-run"])?.contains("ip link set") {
        node.run(&["fabricd", "giveback", "--steps", "1"])?;
    }
    flannel.start()?;
    let told = node.run(&["fabricd", "giveback", "--wait", "45"])?;
    ensure!(told.contains("this node is flannel's"), "{told}");
    Ok(())
}

fn all_addresses_differ(pods: &[&Pod]) -> Result<()> {
    let all: Vec<IpAddr> = pods.iter().flat_map(|pod| pod.ips()).copied().collect();
    ensure!(all.iter().collect::<BTreeSet<_>>().len() == all.len(), "an address was given out twice: {all:?}");
    Ok(())
}

/// What is true of every kind of flannel node: there and back, twice, and nobody notices.
fn a_node_changes_hands(families: Families, options: Options, forward_drop: bool) -> Result<()> {
    let cluster = Cluster::start(families, options)?;
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    add_foreign_rules(node, forward_drop)?;
    let foreign = foreign_rules(node)?;
    let pods = [node.add_pod("a")?, node.add_pod("a2")?];
    let far = [cluster.flannels[1].node.add_pod("b")?, cluster.ours.add_pod("c")?];
    let traffic = Traffic::start(&cluster, &pods, &far)?;
    let is_masqueraded = || traffic.is_masqueraded();
    is_masqueraded()?;
    let was = mac(node, "flannel.1")?;
    let subnet = |record: &str| record.lines().next().unwrap_or_default().to_owned();
    let key = subnet(&record(node)?);

    for round in 1..=2 {
        take_over(flannel, (round == 1).then_some(1))?;
        is_masqueraded()?;
        ensure!(mac(node, "fabric.1")? == was && subnet(&record(node)?) == key, "MAC address and subnet stay");
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        ensure!(
            node.run(&["ip", "-4", "route", "show", "proto", "boot"])?.lines().all(|route| !route.contains("10.244."))
        );
        // A pod of before ends, new ones come, and the node has all of their addresses.
        let (of_ours, gone) = (node.add_pod(&format!("n{round}"))?, node.add_pod(&format!("g{round}"))?);
        all_addresses_differ(&[&pods[0], &pods[1], &of_ours, &gone])?;
        of_ours.run(&["ping", "-c", "1", "-W", "5", &far[0].ips()[0].to_string()])?;
        gone.del()?;
        pods[0].check()?;

        give_back(flannel)?;
        is_masqueraded()?;
        ensure!(mac(node, "flannel.1")? == was && subnet(&record(node)?) == key, "MAC address and subnet stay");
        ensure!(!record(node)?.contains("Fabric"), "the record is flannel's");
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        ensure!(!node.run(&["nft", "list", "tables"])?.contains("fabric"));
        ensure!(!node.run(&["ip", "nexthop"])?.contains("proto 250"));
        let guards = node.run(&["etcdctl", "get", "--prefix", "--keys-only", "/coreos.com/network/fabric/guard/4/"])?;
        let own = key.rsplit('/').next().unwrap_or_default().split('&').next().unwrap_or_default().to_owned();
        ensure!(!guards.contains(&own), "{guards}");
        // The pod that fabric-cni made is flannel's plugin's to detach.
        let new = node.add_pod(&format!("f{round}"))?;
        all_addresses_differ(&[&pods[0], &pods[1], &of_ours, &new])?;
        let ip = of_ours.ips()[0];
        of_ours.del()?;
        let taken = node.path(&format!("/var/lib/cni/networks/cbr0/{ip}"))?;
        ensure!(!taken.exists(), "its address is free");
        new.del()?;
    }
    traffic.stop()?;

    // At last the pods of the first day end, on the node that is taken over once more.
    take_over(flannel, None)?;
    for pod in pods {
        pod.del()?;
    }
    let left = fs::read_dir(node.path("/var/lib/cni/networks/cbr0")?)?.flatten();
    let left: Vec<_> = left.filter_map(|entry| entry.file_name().to_str()?.parse::<IpAddr>().ok()).collect();
    ensure!(left.is_empty(), "addresses left: {left:?}");
    ensure!(fs::read_dir(node.path("/var/lib/cni/flannel")?)?.count() == 0, "files of flannel's plugin left");
    ensure!(!node.run(&["iptables-save", "-t", "nat"])?.contains("CNI-"), "chains of pods left");
    Ok(())
}

#[test]
fn a_node_changes_hands_over_tunnels_with_forward_policy_drop() -> Result<()> {
    a_node_changes_hands(Families::V4, Options { masquerade: true, ..Options::default() }, true)
}

#[test]
fn a_dual_stack_node_changes_hands() -> Result<()> {
    a_node_changes_hands(Families::Dual, Options { masquerade: true, ..Options::default() }, true)
}

#[test]
fn a_node_with_direct_routes_and_nftables_changes_hands() -> Result<()> {
    a_node_changes_hands(Families::Dual, Options { masquerade: true, direct: true, nftables: true }, false)
}

#[test]
fn a_node_whose_cni_plugin_masquerades_each_pod_changes_hands() -> Result<()> {
    a_node_changes_hands(Families::V4, Options::default(), false)
}

/// Asked too early, in the middle, or of the wrong node, it says why and changes nothing.
#[test]
fn what_refuses_a_takeover_is_told_and_nothing_is_changed() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    let state = || {
        let shown = ["ip -d link show type vxlan", "ip route", "iptables-save -t nat", "ls /etc/cni/net.d"];
        shown.iter().map(|line| node.run(&line.split(' ').collect::<Vec<_>>())).collect::<Result<Vec<_>>>()
    };
    let strip = |all: Vec<String>| -> Vec<String> {
        all.iter()
            .flat_map(|text| text.lines())
            .filter(|line| !line.starts_with(['#', ':']))
            .map(str::to_owned)
            .collect()
    };
    let before = strip(state()?);
    let written = record(node)?;
    let refused = |args: &[&str], words: &str| {
        let output = node.exec(&[&["fabricd", "takeover"], args].concat())?;
        ensure!(!output.success() && output.stderr.contains(words), "{words}: {output:?}");
        ensure!(strip(state()?) == before && record(node)? == written, "something was changed");
        Ok(())
    };
    refused(&[], "flanneld runs; end it so that it can't come back: kill ")?;
    refused(&["--dry-run"], "flanneld runs")?;
    // A fabricd beside it writes nothing, and waits.
    node.start_fabricd_with(&[], MASQUERADE)?;
    wait_until("fabricd tells what is in its way", SOON, || {
        let told = node.run(&["cat", "/run/fabric/node.json"])?;
        ensure!(told.contains("flannel.1 already uses VNI 1"), "{told}");
        Ok(())
    })?;
    refused(&[], "flanneld runs")?;
    flannel.stop()?;
    refused(&["--bin-dir", "/nowhere"], "fabricd install-cni --only plugins")?;
    cluster.lab.etcd().freeze()?;
    let output = node.exec(&["fabricd", "takeover"])?;
    ensure!(!output.success() && output.stderr.contains("the store does not answer"), "{output:?}");
    cluster.lab.etcd().thaw()?;

    // flanneld that comes back in the middle ends what has begun, and either way leads on.
    node.run(&["fabricd", "takeover", "--steps", "1"])?;
    node.wait_ready()?;
    node.run(&["fabricd", "takeover"])?;
    ensure!(node.exec(&["ls", &format!("/etc/cni/net.d/{CONFLIST}")]).is_ok_and(|output| !output.success()));
    Ok(())
}
