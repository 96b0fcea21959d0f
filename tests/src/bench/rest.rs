//! What rest costs beside thousands of peers that answer the mesh's probes.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::changes::index_of;
use super::crowded::Crowded;
use super::report::ms;
use super::{Report, usage};

/// What a start leaves to be done is over then: notes of events, the state on disk, the first audit.
const SETTLED: Duration = Duration::from_secs(15);

/// Watches a node of so many peers for so long.
///
/// # Errors
/// The lab breaks.
pub fn run(report: &mut Report, peers: u32, rest: Duration) -> Result<()> {
    let Crowded { lab, crowd: _crowd, vteps, node, witness, process } = Crowded::start("bench-rest", peers)?;
    let devices = [index_of(&node, "fabric.1")?];
    // Nothing to wait for: rest is a length of time, and so is what comes before it.
    std::thread::sleep(SETTLED);

    let section = format!("rest, {peers} peers");
    witness.forget();
    let (cpu, answered, began) = (usage::cpu(&process)?, vteps.answered(), Instant::now());
    std::thread::sleep(rest);
    let (cpu, answered) = (usage::cpu(&process)? - cpu, vteps.answered() - answered);
    let seconds = began.elapsed().as_secs_f64();
    report.number(&section, "CPU, of one core", "%", ms(cpu) / seconds / 10.0);
    report.number(
        &section,
        "probes of the mesh that were answered, a second",
        "",
        f64::from(u32::try_from(answered)?) / seconds,
    );
    let changes = witness.about_fabric(&devices);
    report.number(&section, "changes to the kernel's tables", "", changes.len() as f64);
    let (resident, peak) = usage::resident(&process)?;
    report.number(&section, "resident", "MiB", resident);
    report.number(&section, "resident, at its most since the start", "MiB", peak);
    drop(vteps);
    lab.destroy()
}
