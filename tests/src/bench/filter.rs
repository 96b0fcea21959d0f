//! What the packet filter costs: pods over the fabric with it and without.
//!
//! fabricd is started anew with other flags, and the data plane stays meanwhile. Nothing is measured before it rests
//! again, and each of the two is the first as often as the second.

use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::datapath::{LOADS, OFFLOADS, Options, Way, fabric, switch_offloads, unit, wait_for_peers};
use super::report::{quantile, sorted};
use super::traffic::Carried;
use super::{Report, usage};
use crate::lab::{Lab, Node, crowd, wait_until};

const LIMIT: Duration = Duration::from_secs(60);
/// What the packet filter does by default, all off.
const NO_FILTER: &[&str] = &["--check-senders=false", "--check-pods=false", "--notrack=false"];
/// For so long it is watched whether fabricd rests.
const WATCHED: Duration = Duration::from_millis(500);

/// Measures.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let lab = Lab::builder().name("bench-filter").nodes(2).network(crowd::NETWORK).start()?;
    let nodes = [Arc::clone(lab.node("node-1")?), Arc::clone(lab.node("node-2")?)];
    let way = fabric("fabric", &nodes)?;
    let mut crowd = lab.crowd()?;
    crowd.join(1..options.crowd + 1)?;
    nodes.iter().try_for_each(|node| wait_for_peers(node, options.crowd))?;
    for offloads in OFFLOADS {
        switch_offloads(&lab, &nodes, &["a"], offloads)?;
        let section = format!("packet filter, {}, {} peers", offloads.name(), options.crowd);
        compare(report, &section, &nodes, &way, options)?;
    }
    lab.destroy()
}

fn compare(report: &mut Report, section: &str, nodes: &[Arc<Node>; 2], way: &Way, options: Options) -> Result<()> {
    let mut turns: Vec<Vec<[Carried; 2]>> = vec![vec![]; LOADS.len()];
    for round in 0..options.rounds {
        let mut carried = [vec![], vec![]];
        for which in [round % 2, 1 - round % 2] {
            nodes.iter().try_for_each(|node| switch_filter(node, [&[], NO_FILTER][which]))?;
            for (_, load) in LOADS {
                carried[which].push(load.carry(&way.from, &way.to, options.slice)?);
            }
        }
        let [on, off] = carried;
        for (turns, pair) in turns.iter_mut().zip(on.into_iter().zip(off)) {
            turns.push(pair.into());
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

/// Starts fabricd anew, with other arguments, and waits until it rests: the data plane stays meanwhile.
fn switch_filter(node: &Node, args: &[&str]) -> Result<()> {
    node.stop_fabricd()?;
    node.start_fabricd_with(args, &[])?;
    node.wait_ready()?;
    wait_until("the filter is as wanted", LIMIT, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(tables.contains("inet fabric") == args.is_empty(), "{tables}");
        let process = node.running_service("fabricd")?;
        let before = usage::cpu(&process)?;
        sleep(WATCHED);
        let used = usage::cpu(&process)? - before;
        ensure!(used < WATCHED / 20, "it still takes {used:?} in {WATCHED:?}");
        Ok(())
    })
}
