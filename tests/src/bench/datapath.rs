//! What pods get of the network: the fabric with the fast path and without, beside a VXLAN made by hand, pods that are routed
//! without any tunnel, and the bare underlay between the nodes.
//!
//! All of them are in the same lab at the same time, and take turns, a slice each. So what else the machine does falls on all
//! of them, and a ratio is the middle of those of all rounds. Each has nodes of its own, so nothing is switched between turns;
//! what is not the fabric is on nodes that never ran fabricd: nobody's packet filter is in its way.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;

use super::Report;
use super::fast_path::{self, Share};
use super::report::{quantile, sorted};
use super::traffic::{Carried, End, Load, Whole};
use crate::lab::spaces::Spaces;
use crate::lab::{Lab, Node, crowd, wait_until};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rounds in which everything has its turn.
    pub rounds: usize,
    /// How long a turn is.
    pub slice: Duration,
    /// Peers that are installed for the second half; without any there is none.
    pub crowd: u32,
}

pub(super) const LOADS: [(&str, Load); 4] = [
    ("TCP, one stream", Load::Streams(1)),
    ("TCP, four streams", Load::Streams(4)),
    ("round trips", Load::RoundTrips),
    ("small UDP packets", Load::SmallPackets),
];
pub(super) const OFFLOADS: [Offloads; 3] = [Offloads::All, Offloads::OfTheHost, Offloads::None];
pub(super) const LIMIT: Duration = Duration::from_secs(60);
/// As for the fabric's pods over an underlay of 1500.
const MTU: &str = "1450";

/// How large the pieces are in which traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offloads {
    /// A segment of 64 KiB is never cut, since no wire is in between.
    All,
    /// Packets of 1500 bytes are between the nodes alone: segments are cut on the way out, and put together again where
    /// they come in, as with most network cards.
    OfTheHost,
    /// Every packet of 1500 bytes goes the whole way by itself.
    None,
}

impl Offloads {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::All => "offloads on",
            Self::OfTheHost => "cut to 1500 bytes between the nodes",
            Self::None => "GSO and GRO off, MTU 1500",
        }
    }
}

/// Two ends, and the network between them.
pub(super) struct Way {
    name: &'static str,
    pub(super) from: End,
    pub(super) to: End,
}

/// Measures.
///
/// # Errors
/// The lab breaks, or packets don't take the fast path.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let mut lab = Lab::builder().name("bench-datapath").nodes(4).network(crowd::NETWORK).start()?;
    let node = |lab: &Lab, number: u8| anyhow::Ok(Arc::clone(lab.node(&format!("node-{number}"))?));
    let fast = [node(&lab, 1)?, node(&lab, 2)?];
    let slow = [node(&lab, 3)?, node(&lab, 4)?];
    let plain = [lab.boot_node()?, lab.boot_node()?];
    let ways = [
        fabric("fabric, fast path", &fast)?,
        fabric("fabric, kernel's path", &slow)?,
        by_hand(&plain)?,
        routed(&plain)?,
        underlay(&plain)?,
    ];
    fast_path::switch_on(&fast)?;
    let mut crowd = lab.crowd()?;
    for peers in BTreeSet::from([0, options.crowd]) {
        crowd.join(1..peers + 1)?;
        fast.iter().chain(&slow).try_for_each(|node| wait_for_peers(node, peers + 2))?;
        fast.iter().try_for_each(|node| fast_path::wait_for_peers(node, peers + 3))?;
        for offloads in OFFLOADS {
            switch_offloads(&lab, &fast, &["a"], offloads)?;
            switch_offloads(&lab, &slow, &["a"], offloads)?;
            switch_offloads(&lab, &plain, &["hand", "routed"], offloads)?;
            let section = match peers {
                0 => format!("pod to pod, {}", offloads.name()),
                _ => format!("pod to pod, {}, {peers} peers", offloads.name()),
            };
            let share = Share::since_now(&fast)?;
            compare(report, &section, &ways, options)?;
            compare_cost(report, &section, &ways, options)?;
            report.number(&section, "packets that took the fast path", "%", share.check()? * 100.0);
        }
    }
    lab.destroy()
}

/// Each load over each way, in turns.
fn compare(report: &mut Report, section: &str, ways: &[Way; 5], options: Options) -> Result<()> {
    for (name, load) in LOADS {
        let mut turns = vec![];
        for _ in 0..options.rounds {
            let turn = ways.iter().map(|way| load.carry(&way.from, &way.to, options.slice));
            turns.push(turn.collect::<Result<Vec<Carried>>>()?);
        }
        for (index, way) in ways.iter().enumerate() {
            let (unit, scale) = unit(load);
            let rates = turns.iter().map(|turn| turn[index].rate * scale).collect();
            report.figure(section, &format!("{name}: {}", way.name), unit, rates);
            let (unit, scale) = cpu_unit(load);
            let cpu = turns.iter().map(|turn| turn[index].cpu_ns * scale).collect();
            report.figure(section, &format!("{name}: {}, CPU", way.name), unit, cpu);
        }
        for (one, other) in PAIRS {
            let ratios = turns.iter().map(|turn| turn[one].rate / turn[other].rate).collect();
            report.figure(section, &format!("{name}: {} / {}", ways[one].name, ways[other].name), "×", ratios);
        }
    }
    Ok(())
}

/// The ratios that are told, by the places of the ways: with the fast path to all else, and the kernel's path to a VXLAN made by
/// hand and to the underlay.
const PAIRS: [(usize, usize); 6] = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 4)];

/// What one packet, round trip and block costs over each way. Forwards, and then backwards, so that a machine which becomes busier
/// or less so does it for all. Most of what else happens makes a batch dearer, so of all batches the tenth part counts.
fn compare_cost(report: &mut Report, section: &str, ways: &[Way; 5], options: Options) -> Result<()> {
    for (name, load) in LOADS.into_iter().filter(|(_, load)| *load != Load::Streams(4)) {
        let open = |way: &Way| Whole::open(load, &way.from, &way.to);
        let mut ends = ways.iter().map(open).collect::<Result<Vec<_>>>()?;
        ends.iter_mut().try_for_each(|end| end.batch().map(drop))?;
        let mut costs = vec![vec![]; ways.len()];
        for round in 0..10 * options.rounds {
            let forwards = 0..ways.len();
            let order: Vec<usize> = if round % 2 == 0 { forwards.collect() } else { forwards.rev().collect() };
            for index in order {
                costs[index].push(ends[index].batch()? / 1e3);
            }
        }
        let costs: Vec<Vec<f64>> = costs.into_iter().map(sorted).collect();
        for (way, costs) in ways.iter().zip(&costs) {
            report.figure(section, &format!("{name}, the whole way: {}, CPU", way.name), "µs each", costs.clone());
        }
        for (one, other) in PAIRS {
            let ratio = quantile(&costs[other], 0.1) / quantile(&costs[one], 0.1);
            let name = format!("{name}, the whole way: {} / {}", ways[one].name, ways[other].name);
            report.number(section, &name, "×", ratio);
        }
    }
    Ok(())
}

/// What a rate is shown in, and by what it is multiplied for that.
pub(super) fn unit(load: Load) -> (&'static str, f64) {
    match load {
        Load::Streams(_) => ("Gbit/s", 8e-9),
        Load::RoundTrips | Load::SmallPackets => ("thousand/s", 1e-3),
    }
}

fn cpu_unit(load: Load) -> (&'static str, f64) {
    match load {
        Load::Streams(_) => ("ns a byte", 1.0),
        Load::RoundTrips | Load::SmallPackets => ("µs each", 1e-3),
    }
}

/// Pods as users have them.
pub(super) fn fabric(name: &'static str, nodes: &[Arc<Node>; 2]) -> Result<Way> {
    let end = |node: &Arc<Node>| {
        let pod = node.add_pod("a")?;
        anyhow::Ok(End { network: pod.network()?, ip: pod.ip(Family::V4)? })
    };
    Ok(Way { name, from: end(&nodes[0])?, to: end(&nodes[1])? })
}

/// The same by `ip` and `bridge` alone: a VXLAN with another VNI, a bridge, and a namespace on it.
fn by_hand(nodes: &[Arc<Node>; 2]) -> Result<Way> {
    for (node, (here, there)) in nodes.iter().zip([(1, 2), (2, 1)]) {
        let (local, peer) = (nodes[here - 1].underlay_ip(Family::V4), nodes[there - 1].underlay_ip(Family::V4));
        let script = format!(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             ip link add hand type vxlan id 77 dstport 4790 local {local} nolearning
             ip link set hand address 02:00:00:00:77:0{here} mtu {MTU} up
             ip address add 10.77.{here}.0/32 dev hand
             bridge fdb add 02:00:00:00:77:0{there} dev hand dst {peer} self permanent
             ip neighbour add 10.77.{there}.0 lladdr 02:00:00:00:77:0{there} dev hand nud permanent
             ip route add 10.77.{there}.0/24 via 10.77.{there}.0 dev hand onlink
             ip link add hand-bridge mtu {MTU} up type bridge
             ip address add 10.77.{here}.1/24 dev hand-bridge
             ip netns add hand
             ip link add hand-port mtu {MTU} up master hand-bridge type veth peer name eth0 mtu {MTU} netns hand
             ip -n hand link set eth0 up
             ip -n hand address add 10.77.{here}.2/24 dev eth0
             ip -n hand route add default via 10.77.{here}.1"
        );
        node.run(&["sh", "-ec", &script])?;
    }
    let end = |node: &Node, number: u8| inside(node, "hand", [10, 77, number, 2]);
    Ok(Way { name: "hand-made VXLAN", from: end(&nodes[0], 1)?, to: end(&nodes[1], 2)? })
}

/// Namespaces on a veth, and routes to each other's network over the underlay: no bridge and no tunnel.
fn routed(nodes: &[Arc<Node>; 2]) -> Result<Way> {
    for (number, (node, peer)) in [1, 2].into_iter().zip([(&nodes[0], &nodes[1]), (&nodes[1], &nodes[0])]) {
        let (peer, there) = (peer.underlay_ip(Family::V4), 3 - number);
        let script = format!(
            "echo 1 >/proc/sys/net/ipv4/ip_forward
             ip netns add routed
             ip link add routed-port up type veth peer name eth0 netns routed
             ip address add 10.78.{number}.1/24 dev routed-port
             ip route add 10.78.{there}.0/24 via {peer}
             ip -n routed link set eth0 up
             ip -n routed address add 10.78.{number}.2/24 dev eth0
             ip -n routed route add default via 10.78.{number}.1"
        );
        node.run(&["sh", "-ec", &script])?;
    }
    let end = |node: &Node, number: u8| inside(node, "routed", [10, 78, number, 2]);
    Ok(Way { name: "routed veth", from: end(&nodes[0], 1)?, to: end(&nodes[1], 2)? })
}

/// The end in a namespace that was made by `ip netns`.
fn inside(node: &Node, namespace: &str, ip: [u8; 4]) -> Result<End> {
    let network = Spaces::of_network(&node.path(&format!("/run/netns/{namespace}"))?)?;
    Ok(End { network, ip: ip.into() })
}

/// From node to node, without pods, bridges and VXLAN.
fn underlay(nodes: &[Arc<Node>; 2]) -> Result<Way> {
    let end = |node: &Node| anyhow::Ok(End { network: node.network()?, ip: node.underlay_ip(Family::V4) });
    Ok(Way { name: "bare underlay", from: end(&nodes[0])?, to: end(&nodes[1])? })
}

/// On these nodes, in these pods of each, and on the underlay between them.
pub(super) fn switch_offloads(lab: &Lab, nodes: &[Arc<Node>; 2], pods: &[&str], offloads: Offloads) -> Result<()> {
    let (inside, between) = match offloads {
        Offloads::All => ("on", "on"),
        Offloads::OfTheHost => ("on", "off"),
        Offloads::None => ("off", "off"),
    };
    // Not every link is there on every node; what is must show it, below.
    let switch = "for link in $2; do ethtool -K $link tso $0 gso $0 gro $1 >/dev/null 2>&1; done; :";
    let on_node = ["sh", "-c", switch, inside, inside, "eth0 fabric.1 hand cni0 hand-bridge routed-port"];
    let underlay = &lab.underlay().machine;
    for node in nodes {
        node.run(&on_node)?;
        underlay.run(&["sh", "-c", switch, between, "off", &node.name])?;
        let mut shown = vec![
            (node.run(&["ethtool", "-k", "eth0"])?, inside, inside),
            (underlay.run(&["ethtool", "-k", &node.name])?, between, "off"),
        ];
        for pod in pods {
            let in_pod = ["ip", "netns", "exec", pod];
            node.run(&[&in_pod[..], &["sh", "-c", switch, inside, inside, "eth0"]].concat())?;
            shown.push((node.run(&[&in_pod[..], &["ethtool", "-k", "eth0"]].concat())?, inside, inside));
        }
        for (shown, segments, gro) in shown {
            for wanted in
                [format!("generic-segmentation-offload: {segments}"), format!("generic-receive-offload: {gro}")]
            {
                ensure!(shown.contains(&wanted), "{}: not {wanted} in\n{shown}", node.name);
            }
        }
    }
    Ok(())
}

pub(super) fn wait_for_peers(node: &Node, peers: u32) -> Result<()> {
    wait_until("all peers are installed", LIMIT, || {
        let routes = node.run(&["ip", "route", "show", "proto", "250"])?.lines().count();
        // The other node is one of them.
        ensure!(routes == peers as usize + 1, "{routes} routes");
        Ok(())
    })
}
