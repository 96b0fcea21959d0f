//! What one lease costs that comes or goes beside thousands: the daemon's own part of the time, and its CPU, beside another
//! build of it in the same run.

use std::path::Path;

use anyhow::Result;

use super::crowded::LIMIT;
use super::report::{ms, quantile, sorted};
use super::{Report, usage};
use crate::lab::crowd::{Crowd, Watch};
use crate::lab::{Lab, Node, Peer, Witness, crowd};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options<'a> {
    /// Peers that are there all the time.
    pub peers: u32,
    /// Leases that come one at a time, and then go, in each round.
    pub changes: u32,
    /// Rounds; the programs take turns.
    pub rounds: usize,
    /// Another build of the daemon.
    pub before: Option<&'a Path>,
}

/// What a program needed.
#[derive(Default)]
struct Cost {
    put: Vec<f64>,
    delete: Vec<f64>,
    /// For one change, in each round.
    cpu_put: Vec<f64>,
    cpu_delete: Vec<f64>,
    resident: Vec<f64>,
}

/// Measures.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, options: Options<'_>) -> Result<()> {
    let mut lab = Lab::builder().name("bench-change").nodes(0).network(crowd::NETWORK).start()?;
    let mut crowd = lab.crowd()?;
    crowd.join(1..options.peers + 1)?;
    let _vteps = lab.crowd_answers()?;
    let node = lab.boot_node()?;
    let before = options.before.map(|path| path.display().to_string());
    let programs: Vec<String> = [Some("fabricd".to_owned()), before].into_iter().flatten().collect();
    let mut costs: Vec<Cost> = programs.iter().map(|_| Cost::default()).collect();
    for _ in 0..options.rounds {
        for (program, cost) in programs.iter().zip(&mut costs) {
            node.start_this_fabricd(program)?;
            node.wait_ready()?;
            measure(&node, &mut crowd, options, cost)?;
            node.stop_fabricd()?;
        }
    }
    let section = format!("one change, {} peers", options.peers);
    let told: Vec<[f64; 4]> = ["this build", "the one before"]
        .into_iter()
        .zip(costs)
        .map(|(name, cost)| cost.tell(report, &section, name))
        .collect();
    if let [this, before] = told[..] {
        for (name, (of, to)) in
            ["put, p50", "put, CPU", "delete, p50", "delete, CPU"].iter().zip(this.iter().zip(before))
        {
            report.ratio(&section, &format!("{name}: this build / the one before"), *of, to);
        }
    }
    lab.destroy()
}

fn measure(node: &Node, crowd: &mut Crowd, options: Options<'_>, cost: &mut Cost) -> Result<()> {
    let witness = Witness::of(node)?;
    let process = node.running_service("fabricd")?;
    for (what, gone) in [(Watch::Put, false), (Watch::Delete, true)] {
        let peers = (options.peers + 1..=options.peers + options.changes).map(Peer::new);
        let (cpu, mut programmed) = (usage::cpu(&process)?, vec![]);
        witness.forget();
        let told = crowd.watched(what, peers, |peer| {
            let is_its_route =
                |event: &crate::lab::witness::Event| event.subnet() == Some(peer.subnet()) && event.gone == gone;
            programmed.push(witness.wait_for("its route", LIMIT, is_its_route)?);
            witness.forget();
            Ok(())
        })?;
        let cpu = ms(usage::cpu(&process)? - cpu) / f64::from(options.changes);
        // etcd tells both watches at once: the daemon may be done before the other hears of it.
        let own = programmed.iter().zip(&told).map(|(at, told)| ms(*at - told.sent) - ms(told.told));
        let (times, cpus) = match what {
            Watch::Put => (&mut cost.put, &mut cost.cpu_put),
            Watch::Delete => (&mut cost.delete, &mut cost.cpu_delete),
        };
        times.extend(own);
        cpus.push(cpu);
    }
    cost.resident.push(usage::resident(&process)?.0);
    Ok(())
}

impl Cost {
    /// Gives the medians: time and CPU of a put, of a delete.
    fn tell(self, report: &mut Report, section: &str, program: &str) -> [f64; 4] {
        let mut all = vec![];
        for (what, times, cpu) in [("put", self.put, self.cpu_put), ("delete", self.delete, self.cpu_delete)] {
            let times = sorted(times);
            let mut share = |share, name| {
                report.number(
                    section,
                    &format!("{program}: lease {what} to programmed, own part, {name}"),
                    "ms",
                    quantile(&times, share),
                )
            };
            all.push(share(0.5, "p50"));
            share(0.99, "p99");
            all.push(report.figure(section, &format!("{program}: lease {what}, CPU for one"), "ms", cpu));
        }
        report.figure(section, &format!("{program}: resident"), "MiB", self.resident);
        all.try_into().expect("two figures for each of two")
    }
}
