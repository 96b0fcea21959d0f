//! From the start of a process to N peers programmed: fabricd, the same entries by `ip -batch` and `bridge -batch` with
//! plain routes, and flanneld if there is one. Each on a node that was booted for it, one after the other in every round.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use fabric_core::model::Family;

use super::report::ms;
use super::{Report, usage};
use crate::lab::witness::Kind;
use crate::lab::{Lab, Node, Peer, Witness, crowd};

const LIMIT: Duration = Duration::from_secs(60);

/// Measures for each number of peers, so many rounds.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, peers: &[u32], rounds: usize, flanneld: Option<&Path>) -> Result<()> {
    for &peers in peers {
        let lab = Lab::builder().name("bench-cold-start").nodes(0).network(crowd::NETWORK).start()?;
        lab.crowd()?.join(1..peers + 1)?;
        let mut lab = lab;
        let node = lab.boot_node()?;
        let mut runs = Runs::default();
        for _ in 0..rounds {
            runs.fabricd.push(daemon(&lab, &node, peers, "fabricd", |node| node.start_fabricd())?);
            if let Some(flanneld) = flanneld {
                runs.flanneld
                    .push(daemon(&lab, &node, peers, "flanneld", |node| start_flanneld(&lab, node, flanneld))?);
            }
            runs.iproute2.push(iproute2(&lab, &node, peers)?);
        }
        runs.tell(report, &format!("cold start, {peers} peers"));
        lab.destroy()?;
    }
    Ok(())
}

#[derive(Default)]
struct Runs {
    fabricd: Vec<Start>,
    flanneld: Vec<Start>,
    iproute2: Vec<Start>,
}

/// One start.
#[derive(Clone, Copy, Debug, Default)]
struct Start {
    /// From the start of the process to the last route.
    whole: Duration,
    /// From the first entry of a peer to the last route.
    programming: Duration,
    cpu: Duration,
    resident: f64,
    peak: f64,
}

impl Runs {
    fn tell(&self, report: &mut Report, section: &str) {
        let mut take = |name: &str, unit, runs: &[Start], of: fn(&Start) -> f64| {
            (!runs.is_empty()).then(|| report.figure(section, name, unit, runs.iter().map(of).collect()))
        };
        let whole = take("fabricd: process start to all programmed", "ms", &self.fabricd, |s| ms(s.whole));
        let writing = take("fabricd: first entry to all programmed", "ms", &self.fabricd, |s| ms(s.programming));
        take("fabricd: CPU until then", "ms", &self.fabricd, |s| ms(s.cpu));
        take("fabricd: resident, at its most", "MiB", &self.fabricd, |s| s.peak);
        take("fabricd: resident, when ready", "MiB", &self.fabricd, |s| s.resident);
        let batch = take("iproute2: process start to all programmed", "ms", &self.iproute2, |s| ms(s.whole));
        let lines = take("iproute2: first entry to all programmed", "ms", &self.iproute2, |s| ms(s.programming));
        let flannel = take("flanneld: process start to all programmed", "ms", &self.flanneld, |s| ms(s.whole));
        take("flanneld: CPU until then", "ms", &self.flanneld, |s| ms(s.cpu));
        take("flanneld: resident, when ready", "MiB", &self.flanneld, |s| s.resident);
        for (name, of, to) in [
            ("fabricd / iproute2, programming", writing, lines),
            ("fabricd / iproute2, from process start", whole, batch),
            ("fabricd / flanneld, from process start", whole, flannel),
        ] {
            if let (Some(of), Some(to)) = (of, to) {
                report.ratio(section, name, of, to);
            }
        }
    }
}

fn fresh(lab: &Lab, node: &Node) -> Result<Witness> {
    node.power_off()?;
    lab.boot_again(node)?;
    Witness::of(node)
}

fn daemon(lab: &Lab, node: &Node, peers: u32, name: &str, start: impl Fn(&Node) -> Result<()>) -> Result<Start> {
    let witness = fresh(lab, node)?;
    let began = Instant::now();
    start(node)?;
    let last = witness.wait_for_routes(peers as usize, false, LIMIT)?;
    let process = node.running_service(name)?;
    let cpu = usage::cpu(&process)?;
    if name == "fabricd" {
        node.wait_ready()?;
    }
    let (resident, peak) = usage::resident(&process)?;
    let first = first_entry(&witness)?;
    node.end(name, nix::sys::signal::Signal::SIGTERM)?;
    Ok(Start { whole: last - began, programming: last - first, cpu, resident, peak })
}

fn first_entry(witness: &Witness) -> Result<Instant> {
    let peer = [198, 18];
    witness.wait_for("the first entry of a peer", LIMIT, |event| {
        event.kind == Kind::Neighbour && event.body().windows(2).any(|bytes| bytes == peer)
            || event.subnet().is_some_and(|subnet| subnet.octets()[0] == 10)
    })
}

fn start_flanneld(lab: &Lab, node: &Node, flanneld: &Path) -> Result<()> {
    let (program, endpoints) = (flanneld.display().to_string(), lab.etcd().endpoints());
    let argv = [program.as_str(), "-etcd-endpoints", &endpoints, "-iface", "eth0"];
    node.start_service("flanneld", &argv, &[])?;
    Ok(())
}

/// The same peers from files, in the order in which they build on each other.
fn iproute2(lab: &Lab, node: &Node, peers: u32) -> Result<Start> {
    let witness = fresh(lab, node)?;
    let local = node.underlay_ip(Family::V4).to_string();
    node.run(&[
        "ip",
        "link",
        "add",
        "hand.1",
        "type",
        "vxlan",
        "id",
        "1",
        "dstport",
        "8472",
        "local",
        &local,
        "nolearning",
    ])?;
    node.run(&["ip", "link", "set", "hand.1", "up"])?;
    let (mut fdb, mut rest) = (String::new(), String::new());
    for peer in (1..=peers).map(Peer::new) {
        let (subnet, mac, underlay) = (peer.subnet(), peer.mac(), peer.underlay_ip());
        writeln!(fdb, "fdb replace {mac} dev hand.1 dst {underlay} self permanent")?;
        writeln!(rest, "neighbour replace {subnet} lladdr {mac} dev hand.1 nud permanent")?;
        writeln!(rest, "route replace {subnet}/24 via {subnet} dev hand.1 onlink")?;
    }
    std::fs::write(node.path("/run/fdb")?, fdb)?;
    std::fs::write(node.path("/run/rest")?, rest)?;
    witness.forget();
    let began = Instant::now();
    node.run(&["sh", "-c", "bridge -batch /run/fdb && ip -batch /run/rest"])?;
    let last = witness.wait_for_routes(peers as usize, false, LIMIT)?;
    Ok(Start { whole: last - began, programming: last - first_entry(&witness)?, ..Start::default() })
}
