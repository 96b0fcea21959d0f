//! A cluster of flannel nodes and nodes of ours, everything that must not notice when one of them changes hands, and the
//! change itself, in both directions.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;

use crate::lab::flannel::{Flannel, Options, extend_config};
use crate::lab::{Connection, Families, Lab, Node, Outside, Pod, Stream, addresses, crowd, wait_until};

/// How long a daemon may take; the machine may be busy.
pub const SOON: Duration = Duration::from_secs(60);

/// The daemon's settings on a node that was flannel's.
pub const MASQUERADE: &[(&str, &str)] = &[("FABRICD_IP_MASQ", "true")];

/// How the step begins in which a giveback waits for flanneld.
const AWAITS_FLANNELD: &str = "# flanneld takes";

/// A cluster of two flannel nodes and one of ours.
pub struct Cluster {
    /// The lab.
    pub lab: Lab,
    /// The nodes that are flannel's.
    pub flannels: [Flannel; 2],
    /// The node that is ours.
    pub ours: Arc<Node>,
}

impl Cluster {
    /// All of it, running.
    ///
    /// # Errors
    /// Something of it doesn't start.
    pub fn start(families: Families, options: Options) -> Result<Self> {
        Self::of(Lab::builder().families(families), options, 0)
    }

    /// The same, of IPv4, with so many peers more that exist in etcd alone.
    ///
    /// # Errors
    /// Something of it doesn't start.
    pub fn start_crowded(options: Options, peers: u32) -> Result<Self> {
        Self::of(Lab::builder().network(crowd::NETWORK), options, peers)
    }

    fn of(builder: crate::lab::Builder, options: Options, peers: u32) -> Result<Self> {
        let mut lab = builder.nodes(0).masquerade(true).start()?;
        extend_config(&lab, options)?;
        if peers > 0 {
            lab.crowd()?.join(0..peers)?;
        }
        let nodes = [lab.boot_node()?, lab.boot_node()?];
        let [a, b] = &nodes;
        let flannels = [Flannel::start_on(&lab, a, options)?, Flannel::start_on(&lab, b, options)?];
        flannels[0].follow()?;
        let ours = lab.add_node()?;
        flannels.iter().try_for_each(Flannel::follow)?;
        Ok(Self { lab, flannels, ours })
    }

    /// Two pods on a node, and one on each other that `traffic` is to reach.
    ///
    /// # Errors
    /// One of them isn't attached.
    pub fn pods(&self, on: &Arc<Node>) -> Result<([Pod; 2], Vec<Pod>)> {
        let others = self.flannels.iter().map(|flannel| &flannel.node).chain([&self.ours]);
        let far = others.filter(|node| node.name != on.name).map(|node| node.add_pod("far"));
        Ok(([on.add_pod("a")?, on.add_pod("a2")?], far.collect::<Result<_>>()?))
    }
}

/// Everything that must not notice: streams both ways to a node of each kind and to a pod of the same node, TCP, and a
/// conversation with the outside.
pub struct Traffic {
    streams: Vec<Stream>,
    connection: Connection,
    outside: Vec<(Outside, IpAddr)>,
}

impl Traffic {
    /// Starts all of it; it flows when this returns.
    ///
    /// # Errors
    /// Something doesn't flow.
    pub fn start(lab: &Lab, pods: &[Pod; 2], far: &[Pod]) -> Result<Self> {
        let [a, neighbour] = pods;
        let node = &a.node;
        let mut streams = vec![Stream::start(a, neighbour)?];
        let (b, c) = (far.first().context("a pod elsewhere")?, far.last().context("a pod elsewhere")?);
        for &family in lab.families().each() {
            // Neighbours are known from then on: a kernel that has to ask first drops what doesn't fit into its queue.
            for (from, to) in [(a, b), (b, a), (a, c), (c, a)] {
                let ip = to.ip(family)?.to_string();
                wait_until("a packet comes through", SOON, || from.run(&["ping", "-c", "1", "-W", "1", &ip]))?;
            }
            streams.push(Stream::start_with(a, b, family, 1_000)?);
            streams.push(Stream::start_with(b, a, family, 1_000)?);
        }
        streams.extend([Stream::start(a, c)?, Stream::start(c, a)?]);
        let connection = Connection::start(a, b)?;
        let outside = lab.families().each().iter().map(|&family| {
            let outside = Outside::at(lab.underlay().machine.network()?, addresses::gateway(family), a)?;
            Ok((outside, node.underlay_ip(family)))
        });
        Ok(Self { streams, connection, outside: outside.collect::<Result<_>>()? })
    }

    /// The same flow, as the outside sees it.
    ///
    /// # Errors
    /// It sees another address than the node's.
    pub fn is_masqueraded(&self) -> Result<()> {
        for (outside, node) in &self.outside {
            ensure!(outside.sees()? == *node, "the outside sees another address");
        }
        Ok(())
    }

    /// Ends it.
    ///
    /// # Errors
    /// A packet was lost, one came twice, or the connection broke.
    pub fn stop(self) -> Result<()> {
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
///
/// # Errors
/// They can't be listed.
pub fn foreign_rules(node: &Node) -> Result<Vec<String>> {
    let mut rules = vec![];
    for program in ["iptables-save", "ip6tables-save"] {
        let shown = node.run(&[program])?;
        let foreign = |line: &&str| !["FLANNEL-", "CNI-", "fabricd: "].iter().any(|known| line.contains(known));
        let lines = shown.lines().filter(|line| !line.starts_with('#')).filter(foreign);
        // A chain's counters may differ, its policy not.
        rules.extend(lines.map(|line| line.split(" [").next().unwrap_or_default().to_owned()));
    }
    rules.extend(node.run(&["nft", "list", "table", "inet", "others"])?.lines().map(str::to_owned));
    Ok(rules)
}

/// Somebody else's rules, and a policy that lets nothing through by itself.
///
/// # Errors
/// They can't be made.
pub fn add_foreign_rules(node: &Node, forward_drop: bool) -> Result<()> {
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
    let others = "table inet others { chain forward { type filter hook forward priority 10; udp dport 9 drop; }\n}";
    node.command(&["nft", "-f", "-"])?.stdin(others).run()?;
    Ok(())
}

/// What lets pods through where the policy of `FORWARD` is DROP and flannel's rules are nftables: a verdict there counts for
/// nothing in iptables, so flannel needs it too.
///
/// # Errors
/// They can't be made.
pub fn let_pods_through(node: &Node) -> Result<()> {
    for (program, family) in [("iptables", Family::V4), ("ip6tables", Family::V6)] {
        let network = addresses::pod_network(family);
        for from in ["-s", "-d"] {
            node.run(&[program, "-A", "FORWARD", from, network, "-j", "ACCEPT"])?;
        }
    }
    Ok(())
}

/// Key and value of a node's record.
///
/// # Errors
/// There is none.
pub fn record(node: &Node) -> Result<String> {
    let ip = node.underlay_ip(Family::V4).to_string();
    let shown = node.run(&["etcdctl", "get", "--prefix", "/coreos.com/network/subnets/"])?;
    let lines: Vec<&str> = shown.lines().collect();
    let own = lines.chunks(2).find(|pair| pair.get(1).is_some_and(|value| value.contains(&format!("\"{ip}\""))));
    Ok(own.context("a record of this node")?.join("\n"))
}

/// A device's MAC address.
///
/// # Errors
/// There is no such device.
pub fn mac(node: &Node, device: &str) -> Result<String> {
    let shown: serde_json::Value = serde_json::from_str(&node.run(&["ip", "-j", "link", "show", device])?)?;
    Ok(shown[0]["address"].as_str().context("a MAC address")?.to_owned())
}

/// A takeover until its end; each run of the command takes `steps` at most. The node is fabricd's when this returns.
///
/// # Errors
/// It refuses, or doesn't get there.
pub fn take_over(flannel: &Flannel, steps: Option<u32>) -> Result<()> {
    take_over_with(flannel, steps, &[])
}

/// The same with more arguments.
///
/// # Errors
/// It refuses, or doesn't get there.
pub fn take_over_with(flannel: &Flannel, steps: Option<u32>, args: &[&str]) -> Result<()> {
    let node = &flannel.node;
    hand_to_fabricd(flannel)?;
    let most = steps.map(|most| most.to_string());
    let mut args = [&["takeover", "--wait", "45"], args].concat();
    args.extend(most.iter().flat_map(|most| ["--steps", most]));
    while !flannel.fabricd(&args)?.run()?.contains("this node is fabricd's") {}
    node.wait_ready()
}

/// flanneld ends and fabricd starts, if they haven't yet.
///
/// # Errors
/// One of them doesn't.
pub fn hand_to_fabricd(flannel: &Flannel) -> Result<()> {
    if flannel.is_running() {
        flannel.stop()?;
    }
    if flannel.node.service("fabricd").is_none() {
        let settings: Vec<(&str, &str)> =
            flannel.settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        flannel.node.start_fabricd_with(&[], &settings)?;
    }
    Ok(())
}

/// A giveback until its end: flanneld is started when it is waited for. The node is flannel's when this returns.
///
/// # Errors
/// It refuses, or doesn't get there.
pub fn give_back(flannel: &Flannel) -> Result<()> {
    if flannel.node.service("fabricd").is_some() {
        flannel.node.stop_fabricd()?;
    }
    let started = RefCell::new(Ok(()));
    let start = |line: &str| {
        if line.starts_with(AWAITS_FLANNELD) && !flannel.is_running() {
            *started.borrow_mut() = flannel.start();
        }
        false
    };
    let told = flannel.fabricd(&["giveback", "--wait", "45"])?.kill_after_line(start, Duration::ZERO)?.ok();
    started.into_inner()?;
    let told = told?;
    ensure!(told.contains("this node is flannel's"), "{told}");
    Ok(())
}

/// fabricd ends; when a giveback waits for flanneld, that starts. If they haven't yet.
///
/// # Errors
/// One of them doesn't.
pub fn hand_to_flannel(flannel: &Flannel) -> Result<()> {
    let node = &flannel.node;
    if node.service("fabricd").is_some() {
        node.stop_fabricd()?;
    }
    if !flannel.is_running() {
        while !flannel.fabricd(&["giveback", "--dry-run"])?.run()?.starts_with(AWAITS_FLANNELD) {
            flannel.fabricd(&["giveback", "--steps", "1"])?.run()?;
        }
        flannel.start()?;
    }
    Ok(())
}

/// What is true of a node that is flannel's again, whatever has happened before.
///
/// # Errors
/// Something of ours is left.
pub fn nothing_of_ours_is_left(node: &Node) -> Result<()> {
    let tables = node.run(&["nft", "list", "tables"])?;
    ensure!(!tables.contains("fabric"), "{tables}");
    ensure!(!node.run(&["ip", "nexthop"])?.contains("proto 250"), "nexthop objects");
    for flag in ["-4", "-6"] {
        ensure!(!node.run(&["ip", flag, "route"])?.contains("proto 250"), "routes of ours");
    }
    let links = node.run(&["ip", "-o", "link", "show", "type", "vxlan"])?;
    ensure!(!links.contains("fabric"), "{links}");
    ensure!(!node.run(&["iptables-save"])?.contains("fabricd: "), "rules of ours");
    ensure!(!node.exec(&["ls", "/sys/fs/bpf/fabric"])?.success(), "pins of the fast path");
    // Those of them that are there.
    let folders = "/etc/cni/net.d /var/lib/cni /run/fabric /var/lib/fabric";
    let files = node.run(&["sh", "-c", &format!("find $(ls -d {folders} 2>/dev/null) -type f")])?;
    for file in files.lines() {
        let is_known = file == "/run/fabric/fabricd.lock" || !file.contains("fabric");
        ensure!(is_known, "{file} is left: {files}");
    }
    Ok(())
}

/// What is true of its lease in etcd then.
///
/// # Errors
/// It is ours still, or its subnet is kept for us.
pub fn the_record_is_flannels(node: &Node) -> Result<()> {
    let record = record(node)?;
    ensure!(!record.contains("Fabric"), "the record is not flannel's: {record}");
    let guards = node.run(&["etcdctl", "get", "--prefix", "/coreos.com/network/fabric/guard/"])?;
    let holders: Vec<&str> = guards.lines().skip(1).step_by(2).collect();
    ensure!(!holders.iter().any(|holder| holder.contains(&node.name)), "{guards}");
    Ok(())
}

/// No address was given out twice.
///
/// # Errors
/// One was.
pub fn all_addresses_differ<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> Result<()> {
    let all: Vec<IpAddr> = pods.into_iter().flat_map(|pod| pod.ips()).copied().collect();
    ensure!(all.iter().collect::<BTreeSet<_>>().len() == all.len(), "an address was given out twice: {all:?}");
    Ok(())
}
