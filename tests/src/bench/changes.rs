//! What changes cost beside thousands of peers: one lease, many at once, the device deleted, and a restart with nothing
//! changed.

use std::time::Instant;

use anyhow::Result;

use super::crowded::{Crowded, LIMIT};
use super::report::{ms, quantile, sorted};
use super::{Report, usage};
use crate::lab::crowd::Watch;
use crate::lab::{Node, Peer};

/// How it is measured.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Peers that are there all the time.
    pub peers: u32,
    /// Leases that are added one at a time.
    pub singles: u32,
    /// Leases that come and go at once.
    pub burst: u32,
    /// Rounds of everything but the single leases.
    pub rounds: usize,
}

/// Measures.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let Options { peers, singles, burst, rounds } = options;
    let Crowded { lab, mut crowd, vteps: _vteps, node, witness, process } = Crowded::start("bench-changes", peers)?;

    let section = format!("one lease added, {peers} peers");
    let cpu = usage::cpu(&process)?;
    let mut programmed = vec![];
    witness.forget();
    let new = (peers + 1..=peers + singles).map(Peer::new);
    let told = crowd.watched(Watch::Put, new, |peer| {
        programmed.push(witness.wait_for("its route", LIMIT, |event| event.subnet() == Some(peer.subnet()))?);
        witness.forget();
        Ok(())
    })?;
    let whole = sorted(programmed.iter().zip(&told).map(|(at, told)| ms(*at - told.sent)).collect());
    let bare = sorted(told.iter().map(|told| ms(told.told)).collect());
    let own = sorted(programmed.iter().zip(&told).map(|(at, told)| ms(*at - told.sent) - ms(told.told)).collect());
    for (name, samples) in
        [("put to programmed", &whole), ("put to a bare etcd watch", &bare), ("the difference: fabricd's part", &own)]
    {
        report.number(&section, &format!("{name}, p50"), "ms", quantile(samples, 0.5));
        report.number(&section, &format!("{name}, p99"), "ms", quantile(samples, 0.99));
    }
    let cpu = ms(usage::cpu(&process)? - cpu) / f64::from(singles);
    report.number(&section, "fabricd: CPU for one", "ms", cpu);
    crowd.leave(peers + 1..peers + 1 + singles)?;
    witness.wait_for_routes(singles as usize, true, LIMIT)?;

    let section = format!("{burst} leases at once, {peers} peers");
    let (mut added, mut deleted) = (vec![], vec![]);
    for _ in 0..rounds {
        witness.forget();
        let began = Instant::now();
        crowd.join(peers + 1..peers + 1 + burst)?;
        added.push(ms(witness.wait_for_routes(burst as usize, false, LIMIT)? - began));
        witness.forget();
        let began = Instant::now();
        crowd.leave(peers + 1..peers + 1 + burst)?;
        deleted.push(ms(witness.wait_for_routes(burst as usize, true, LIMIT)? - began));
    }
    report.figure(&section, "first put to all programmed", "ms", added);
    report.figure(&section, "first delete to all gone", "ms", deleted);

    let section = format!("VXLAN device deleted, {peers} peers");
    let mut back = vec![];
    for _ in 0..rounds {
        witness.forget();
        let began = Instant::now();
        node.run(&["ip", "link", "del", "fabric.1"])?;
        back.push(ms(witness.wait_for_routes(peers as usize, false, LIMIT)? - began));
    }
    report.figure(&section, "deleted to all programmed again", "ms", back);

    let devices = [index_of(&node, "fabric.1")?];
    let section = format!("after all that, {peers} peers");
    let (resident, peak) = usage::resident(&process)?;
    report.number(&section, "resident", "MiB", resident);
    report.number(&section, "resident, at its most since the start", "MiB", peak);

    let section = format!("restart with nothing changed, {peers} peers");
    let (mut ready, mut cpu, mut changes) = (vec![], vec![], 0);
    for _ in 0..rounds {
        node.stop_fabricd()?;
        witness.forget();
        let began = Instant::now();
        node.start_fabricd()?;
        node.wait_ready()?;
        ready.push(ms(began.elapsed()));
        cpu.push(ms(usage::cpu(&node.running_service("fabricd")?)?));
        changes += witness.about_fabric(&devices).len();
    }
    report.figure(&section, "process start to ready", "ms", ready);
    report.figure(&section, "CPU until then", "ms", cpu);
    report.number(&section, "changes to the kernel's tables, all restarts", "", changes as f64);
    lab.destroy()
}

/// The index of a link.
///
/// # Errors
/// There is none of this name.
pub fn index_of(node: &Node, link: &str) -> Result<u32> {
    let shown = node.run(&["ip", "-o", "link", "show", "dev", link])?;
    Ok(shown.split(':').next().unwrap_or_default().parse()?)
}
