//! `lab up`: brings a lab up step by step, saying what it does, and shows that it works.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use fabric_core::model::Family;
use serde_json::Value;

use super::addresses::{self, Families};
use super::machine::Machine;
use super::matrix::Matrix;
use super::node::Node;
use super::outside::Outside;
use super::packet::{Packet, VXLAN_PORT};
use super::{Builder, Lab, Wiring, preflight, wait_until};

/// How wide the screen is that all of it fits on.
const COLUMNS: usize = 100;

/// What lab to bring up.
#[derive(Args, Debug)]
pub struct Up {
    /// How many nodes
    #[arg(long, default_value_t = 3)]
    nodes: u16,
    /// How many pods on each
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(..=26))]
    pods: u8,
    /// Address families of underlay and pods
    #[arg(long, value_enum, default_value_t)]
    families: Families,
    /// How many etcd members
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=3))]
    etcd_members: u16,
    /// Leave what pods send outside of the network its own address: no masquerade (--ip-masq)
    #[arg(long)]
    no_masquerade: bool,
    /// Pods by the bridge plugin and static routes alone, without fabricd: the baseline
    #[arg(long)]
    plain: bool,
}

impl Up {
    /// Brings it up, shows it, leaves it up. If anything fails the processes end and the logs stay.
    ///
    /// # Errors
    /// A part doesn't start, or pods don't reach each other.
    pub fn run(&self, name: &str) -> Result<()> {
        preflight::check()?;
        let begin = Instant::now();
        let mut builder = Lab::builder().name(name).families(self.families).etcd_members(self.etcd_members);
        builder = builder.masquerade(!self.no_masquerade);
        if self.plain {
            builder = builder.plain();
        }
        println!("Lab {name}: {} nodes with {} pods each, {}", self.nodes, self.pods, self.families);
        let mut lab = self.create(builder)?;
        if let Err(error) = self.fill(&mut lab) {
            lab.stop()?;
            return Err(error.context(format!("the lab is down again; its logs are in {}", lab.dir().display())));
        }
        println!("\nUp after {:.1} s, and stays up.\n", begin.elapsed().as_secs_f64());
        self.look_around(name);
        Ok(())
    }

    fn create(&self, builder: Builder) -> Result<Lab> {
        step("underlay: a bridge in a namespace of its own", || builder.stays().create())
    }

    fn fill(&self, lab: &mut Lab) -> Result<()> {
        step(&format!("etcd: {} at {}", members(self.etcd_members), lab.etcd().endpoints()), || lab.etcd().start())?;
        if !self.plain {
            step("network configuration: fabricctl network init", || lab.init_network())?;
        }
        for _ in 0..self.nodes {
            add_node(lab, self.pods)?;
        }
        if !self.plain && self.nodes > 1 {
            step("mesh: node-1 probes its peers", || probed(lab, self.nodes - 1))?;
        }
        if !self.plain && self.nodes > 0 {
            println!("\nWhat node-1 knows of its peers (fabricctl status):\n");
            // Its exit code tells what the text says too.
            let columns = COLUMNS.to_string();
            let status = lab.node("node-1")?.command(&["fabricctl", "status"])?.env("COLUMNS", &columns).output()?;
            print!("{}{}", status.stdout, status.stderr);
        }
        println!("\nEvery pod pings every other:\n");
        let matrix = Matrix::of(&lab.pods()?)?;
        print!("{matrix}");
        ensure!(matrix.is_perfect(), "pods don't reach each other");
        if !self.plain && self.nodes > 0 {
            println!("\n{}", path_taken(&lab.node("node-1")?.status()?["fast_path"]));
        }
        if !self.plain && self.nodes > 1 && self.pods > 0 {
            for &family in lab.families().each() {
                prove_vxlan(lab, family)?;
            }
        }
        if !self.plain && !self.no_masquerade && self.nodes > 0 && self.pods > 0 {
            println!("\nWhat an address outside of the network sees of a pod (masquerade, --ip-masq):\n");
            for &family in lab.families().each() {
                prove_masquerade(lab, family)?;
            }
        }
        Ok(())
    }

    fn look_around(&self, name: &str) {
        let program = std::env::args().next().unwrap_or_else(|| "lab".into());
        let lab = if name == "fabric" { program } else { format!("{program} --name {name}") };
        println!("Look around:");
        look_around(&lab, self.plain).iter().for_each(|line| println!("{line}"));
    }
}

/// What to try, as lines that can be pasted: each with its comment behind it, or above where that would be too wide.
fn look_around(lab: &str, plain: bool) -> Vec<String> {
    let of_fabric = [
        ("exec node-1 fabricctl status", "the node and its peers"),
        ("exec node-1 fabricctl mesh", "how peers are reached, and why not"),
        ("exec node-1 fabricctl doctor", "checks, each with a fix"),
        ("exec node-1 fabricctl status --all", "what all daemons say"),
        ("exec node-1 fabricctl test", "traffic of a pod made for it"),
        ("exec node-1 fabricctl top", "all of it, live"),
        ("page node-1", "the same in a browser"),
        ("exec node-1 fabricctl lease list", "the leases in etcd"),
        ("exec node-1 ip route", "what the kernel has of it"),
        ("logs node-1", "the daemon's log"),
    ];
    let of_all = [
        ("status", "machines, processes, pods"),
        ("ping", "every pod pings every other"),
        ("exec node-1/pod-a ip address", "a pod from inside"),
        ("capture node-1", "the packets at its port"),
        ("shell node-1", "a shell there"),
        ("add-node", "one more"),
        ("kill node-2", "power off; and on again: boot node-2"),
        ("down", "stop it and remove its files"),
    ];
    let lines = of_fabric.into_iter().filter(|_| !plain).chain(of_all);
    let width = lines.clone().map(|(command, _)| command.len()).max().unwrap_or(0);
    let lines = lines.flat_map(|(command, what)| {
        let line = format!("  {lab} {command:<width$}  # {what}");
        match line.chars().count() <= COLUMNS {
            true => vec![line],
            false => vec![format!("  # {what}"), format!("  {lab} {command}")],
        }
    });
    lines.collect()
}

/// Adds a node with its fabricd and pods, saying so.
///
/// # Errors
/// A part of it doesn't start.
pub fn add_node(lab: &mut Lab, pods: u8) -> Result<()> {
    let number = lab.nodes().map(|node| node.index).max().unwrap_or(0) + 1;
    let node = step(&format!("node-{number}: namespaces, a veth to the underlay"), || lab.boot_node())?;
    furnish(&node, lab.plan.wiring, pods)
}

/// Switches a node on again, with its fabricd and pods, saying so.
///
/// # Errors
/// It is on, or a part of it doesn't start.
pub fn boot_node(lab: &Lab, name: &str, pods: u8) -> Result<()> {
    let node = lab.node(name)?;
    step(&format!("{name}: namespaces, a veth to the underlay"), || lab.boot_again(node))?;
    furnish(node, lab.plan.wiring, pods)
}

fn furnish(node: &Arc<Node>, wiring: Wiring, pods: u8) -> Result<()> {
    if wiring == Wiring::Fabric {
        step(&format!("{}: fabricd, until it is ready", node.name), || {
            node.start_fabricd()?;
            node.wait_ready()
        })?;
    }
    for letter in ('a'..='z').take(pods.into()) {
        let mut ips = vec![];
        step(&format!("{}/pod-{letter}: a CNI ADD", node.name), || {
            ips = node.add_pod(&format!("pod-{letter}"))?.ips().to_vec();
            Ok(())
        })?;
        let ips: Vec<String> = ips.iter().map(ToString::to_string).collect();
        println!("              {}", ips.join("  "));
    }
    Ok(())
}

/// Shows machines, processes and pods.
///
/// # Errors
/// The lab's folder can't be read.
pub fn print_status(lab: &Lab) -> Result<()> {
    println!("Lab {} ({}), files in {}", lab.name(), lab.families(), lab.dir().display());
    print_machine(&lab.underlay().machine)?;
    for node in lab.nodes() {
        print_machine(node)?;
        for pod in if node.is_on() { node.pods()? } else { vec![] } {
            let ips: Vec<String> = pod.ips().iter().map(ToString::to_string).collect();
            println!("  {:<12} {}", pod.name(), ips.join("  "));
        }
    }
    Ok(())
}

fn print_machine(machine: &Machine) -> Result<()> {
    match machine.pid() {
        Ok(pid) => println!("{:<14} pid {pid}", machine.name),
        Err(_) => println!("{:<14} off", machine.name),
    }
    for (name, process) in machine.services()? {
        match process {
            Some(process) => println!("  {name:<12} pid {}", process.pid),
            None => println!("  {name:<12} has ended; `lab logs {} {name}` may say why", machine.name),
        }
    }
    Ok(())
}

/// Waits until node-1 has probed all its peers, and each has answered.
fn probed(lab: &Lab, peers: u16) -> Result<()> {
    let node = lab.node("node-1")?;
    wait_until("every peer answers node-1's probes", Duration::from_secs(60), || {
        let told = node.exec(&["fabricctl", "status"])?.stdout;
        ensure!(told.contains(&format!("{peers} of {peers} reachable")), "{told}");
        Ok(())
    })
}

/// Which path these pings took, and which TCP and UDP take.
fn path_taken(fast_path: &Value) -> String {
    let others = match (fast_path["on"].as_bool(), fast_path["reason"].as_str().unwrap_or_default()) {
        (Some(true), _) => "the fast path (eBPF)".to_owned(),
        (Some(false), why) => format!("the same, as the fast path is off: {why}"),
        (None, _) => "the same (--fast-path=off; FABRIC_LAB_FAST_PATH=on gives a lab the fast path)".to_owned(),
    };
    format!("Pings took the kernel's path: bridge, routes and VXLAN device. TCP and UDP take {others}.")
}

/// Catches a ping between two nodes on the underlay and shows it.
fn prove_vxlan(lab: &Lab, family: Family) -> Result<()> {
    let (a, b) = (lab.node("node-1")?.pod("pod-a")?, lab.node("node-2")?.pod("pod-a")?);
    let (source, target) = (a.ip(family)?, b.ip(family)?);
    let capture = lab.underlay().capture("node-1")?;
    a.run(&["ping", "-n", "-c", "1", "-W", "2", &target.to_string()])?;
    let is_ours =
        |packet: &Packet| packet.inner().is_some_and(|inner| inner.source == source && inner.target == target);
    let packet = capture.wait_for("the ping as a VXLAN packet on the underlay", Duration::from_secs(2), is_ours)?;
    let vxlan = packet.vxlan.as_ref().context("it is VXLAN")?;
    println!("\nThat ping on the underlay, at the port of node-1 ({family}):\n");
    println!("  outer  {} → {}  UDP port {VXLAN_PORT}  (the nodes)", packet.source, packet.target);
    println!("  VXLAN  VNI {}", vxlan.vni);
    println!("  inner  {source} → {target}  (the pods)");
    Ok(())
}

/// Lets a pod ask somebody outside, and shows whose address that sees.
fn prove_masquerade(lab: &Lab, family: Family) -> Result<()> {
    let (node, outside) = (lab.node("node-1")?, addresses::gateway(family));
    let pod = node.pod("pod-a")?;
    let seen = Outside::at(lab.underlay().machine.network()?, outside, &pod)?.sees()?;
    ensure!(seen == node.underlay_ip(family), "{outside} sees {seen}, which is not the node's address");
    println!("  {} → {outside}, seen as {seen}, the address of {}", pod.ip(family)?, node.name);
    Ok(())
}

fn members(count: u16) -> String {
    if count == 1 { "one member".to_owned() } else { format!("{count} members") }
}

/// Says what is done while it is done, and how long it took.
fn step<T>(what: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    print!("  {what:<64}");
    io::stdout().flush()?;
    let begin = Instant::now();
    let result = action();
    match &result {
        Ok(_) => println!("{:>6.2} s", begin.elapsed().as_secs_f64()),
        Err(_) => println!("failed"),
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tour_fits_a_hundred_columns_and_names_the_page_and_the_test() {
        for lab in ["target/debug/lab", "target/debug/lab --name a-lab-with-a-long-name", "/a/long/folder/of/mine/lab"]
        {
            for plain in [false, true] {
                let lines = look_around(lab, plain);
                assert!(lines.iter().all(|line| line.chars().count() <= COLUMNS), "{lines:#?}");
                let has = |command: &str| lines.iter().any(|line| line.contains(&format!("{lab} {command}")));
                assert!(has("down") && has("page node-1") != plain && has("exec node-1 fabricctl test") != plain);
            }
        }
        assert_eq!(look_around("target/debug/lab", false).len(), 18, "a line each");
    }
}
