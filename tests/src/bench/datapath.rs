//! What pods get of the network: the fabric beside a VXLAN made by hand, and beside the bare underlay between the nodes.
//!
//! All three are in the same lab at the same time, and take turns, a slice each. So what else the machine does falls on
//! all of them, and a ratio is the middle of those of all rounds. What is not the fabric is on nodes of its own, which
//! never ran fabricd: nobody's packet filter is in its way.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;

use super::Report;
use super::report::{quantile, sorted};
use super::traffic::{Carried, End, Load};
use crate::lab::spaces::Spaces;
use crate::lab::{Lab, Node, crowd, wait_until};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Rounds in which everything has its turn.
    pub rounds: usize,
    /// How long a turn is.
    pub slice: Duration,
    /// Peers that are installed for the second half.
    pub crowd: u32,
}

const LOADS: [(&str, Load); 4] = [
    ("TCP, one stream", Load::Streams(1)),
    ("TCP, four streams", Load::Streams(4)),
    ("round trips", Load::RoundTrips),
    ("small UDP packets", Load::SmallPackets),
];
const OFFLOADS: [(bool, &str); 2] = [(true, "offloads on"), (false, "GSO and GRO off, MTU 1500")];
const LIMIT: Duration = Duration::from_secs(60);
/// As for the fabric's pods over an underlay of 1500.
const MTU: &str = "1450";
/// What the packet filter does by default, all off.
const NO_FILTER: &[&str] = &["--check-senders=false", "--check-pods=false", "--notrack=false"];

/// Two ends, and the network between them.
struct Way {
    name: &'static str,
    from: End,
    to: End,
}

/// Measures.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let mut lab = Lab::builder().name("bench-datapath").nodes(2).network(crowd::NETWORK).start()?;
    let nodes = [Arc::clone(lab.node("node-1")?), Arc::clone(lab.node("node-2")?)];
    let plain = [lab.boot_node()?, lab.boot_node()?];
    let ways = [fabric(&nodes)?, by_hand(&plain)?, underlay(&plain)?];
    let mut crowd = lab.crowd()?;
    for peers in [0, options.crowd] {
        crowd.join(1..peers + 1)?;
        nodes.iter().try_for_each(|node| wait_for_peers(node, peers))?;
        for (offloads, section) in OFFLOADS {
            switch_offloads(&nodes, "a", offloads)?;
            switch_offloads(&plain, "hand", offloads)?;
            let section = match peers {
                0 => format!("pod to pod, {section}"),
                _ => format!("pod to pod, {section}, {peers} peers"),
            };
            compare(report, &section, &ways, options)?;
        }
    }
    for (offloads, section) in OFFLOADS {
        switch_offloads(&nodes, "a", offloads)?;
        let section = format!("packet filter, {section}, {} peers", options.crowd);
        compare_filter(report, &section, &nodes, &ways[0], options)?;
    }
    lab.destroy()
}

/// Each load over each way, in turns.
fn compare(report: &mut Report, section: &str, ways: &[Way; 3], options: Options) -> Result<()> {
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
        let [fabric, others @ ..] = [0, 1, 2];
        for other in others {
            let ratios = turns.iter().map(|turn| turn[fabric].rate / turn[other].rate).collect();
            report.figure(section, &format!("{name}: fabric / {}", ways[other].name), "×", ratios);
        }
    }
    Ok(())
}

/// The fabric with its packet filter and without, in turns.
fn compare_filter(
    report: &mut Report,
    section: &str,
    nodes: &[Arc<Node>; 2],
    way: &Way,
    options: Options,
) -> Result<()> {
    let mut turns: Vec<Vec<[Carried; 2]>> = vec![vec![]; LOADS.len()];
    for _ in 0..options.rounds {
        let mut on = vec![];
        for args in [&[], NO_FILTER] {
            nodes.iter().try_for_each(|node| switch_filter(node, args))?;
            for (index, (_, load)) in LOADS.iter().enumerate() {
                let carried = load.carry(&way.from, &way.to, options.slice)?;
                if args.is_empty() {
                    on.push(carried);
                } else {
                    turns[index].push([on[index], carried]);
                }
            }
        }
    }
    for ((name, load), turns) in LOADS.iter().zip(turns) {
        let (unit, scale) = unit(*load);
        report.figure(section, &format!("{name}: on"), unit, turns.iter().map(|[on, _]| on.rate * scale).collect());
        report.figure(section, &format!("{name}: off"), unit, turns.iter().map(|[_, off]| off.rate * scale).collect());
        let ratios: Vec<f64> = turns.iter().map(|[on, off]| on.rate / off.rate).collect();
        report.figure(section, &format!("{name}: on / off"), "×", ratios);
        let cpu = sorted(turns.iter().map(|[on, off]| on.cpu_ns / off.cpu_ns).collect());
        report.number(section, &format!("{name}: on / off, CPU"), "×", quantile(&cpu, 0.5));
    }
    Ok(())
}

/// What a rate is shown in, and by what it is multiplied for that.
fn unit(load: Load) -> (&'static str, f64) {
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
fn fabric(nodes: &[Arc<Node>; 2]) -> Result<Way> {
    let end = |node: &Arc<Node>| {
        let pod = node.add_pod("a")?;
        anyhow::Ok(End { network: pod.network()?, ip: pod.ip(Family::V4)? })
    };
    Ok(Way { name: "fabric", from: end(&nodes[0])?, to: end(&nodes[1])? })
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
    let end = |node: &Node, number: u8| {
        let network = Spaces::of_network(&node.path("/run/netns/hand")?)?;
        anyhow::Ok(End { network, ip: [10, 77, number, 2].into() })
    };
    Ok(Way { name: "hand-made VXLAN", from: end(&nodes[0], 1)?, to: end(&nodes[1], 2)? })
}

/// From node to node, without pods, bridges and VXLAN.
fn underlay(nodes: &[Arc<Node>; 2]) -> Result<Way> {
    let end = |node: &Node| anyhow::Ok(End { network: node.network()?, ip: node.underlay_ip(Family::V4) });
    Ok(Way { name: "bare underlay", from: end(&nodes[0])?, to: end(&nodes[1])? })
}

/// On these nodes and in this pod of each. With all off, every packet of 1500 bytes goes through the kernel by itself, as on
/// the wire of a real machine.
fn switch_offloads(nodes: &[Arc<Node>; 2], pod: &str, on: bool) -> Result<()> {
    let to = if on { "on" } else { "off" };
    // Not every link is there on every node; what is must show it, below.
    let switch = format!("for link; do ethtool -K $link tso {to} gso {to} gro {to} >/dev/null 2>&1; done; :");
    for node in nodes {
        node.run(&["sh", "-c", &switch, "sh", "eth0", "fabric.1", "hand", "cni0", "hand-bridge"])?;
        node.run(&["ip", "netns", "exec", pod, "sh", "-c", &switch, "sh", "eth0"])?;
        let shown = node.run(&["ip", "netns", "exec", pod, "ethtool", "-k", "eth0"])?;
        let wanted = format!("generic-segmentation-offload: {to}");
        ensure!(shown.contains(&wanted), "eth0 of pod {pod} on {}: not {wanted}", node.name);
    }
    Ok(())
}

/// Starts fabricd anew, with other arguments: the data plane stays meanwhile.
fn switch_filter(node: &Node, args: &[&str]) -> Result<()> {
    node.stop_fabricd()?;
    node.start_fabricd_with(args, &[])?;
    node.wait_ready()?;
    wait_until("the filter is as wanted", LIMIT, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(tables.contains("inet fabric") == args.is_empty(), "{tables}");
        Ok(())
    })
}

fn wait_for_peers(node: &Node, peers: u32) -> Result<()> {
    wait_until("all peers are installed", LIMIT, || {
        let routes = node.run(&["ip", "route", "show", "proto", "250"])?.lines().count();
        // The other node is one of them.
        ensure!(routes == peers as usize + 1, "{routes} routes");
        Ok(())
    })
}
