//! fabricd ends, however that happens.

use std::collections::BTreeSet;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::pair::PATIENCE;
use super::{Fault, Trial};

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 1,
        what: "killed at some moment of programming 5,000 peers",
        holds: "0 packets lost; the next start adopts and completes",
        trial: killed_while_programming,
    },
    Fault {
        number: 2,
        what: "restarted and killed, 20 times",
        holds: "0 packets lost; nothing written to the kernel, nor to etcd",
        trial: crash_loop,
    },
    Fault {
        number: 34,
        what: "replaced by another version and back",
        holds: "0 lost; one reads what the other wrote; the second start writes nothing",
        trial: downgrade,
    },
];

fn killed_while_programming(trial: &mut Trial) -> Result<()> {
    let mut pair = trial.pair(0)?;
    let traffic = pair.traffic()?;
    pair.crowd.join(1..5001)?;
    // A moment is what is tried here.
    sleep(Duration::from_millis(trial.random.u64(0..800)));
    pair.node.kill_fabricd()?;
    pair.node.start_fabricd()?;
    pair.node.wait_ready()?;
    pair.knows(5001)?;
    traffic.lost_nothing()
}

fn crash_loop(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(100)?;
    let before = pair.shown()?;
    let in_etcd = || {
        let leases = pair.lab.etcd().ctl(&["lease", "list"])?;
        anyhow::Ok((pair.lab.revision()?, leases.lines().map(str::to_owned).collect::<BTreeSet<_>>()))
    };
    let etcd_before = in_etcd()?;
    let traffic = pair.traffic()?;
    let said = pair.witnessed(|| {
        for _ in 0..20 {
            let end = if trial.random.bool() { pair.node.kill_fabricd() } else { pair.node.stop_fabricd() };
            end?;
            pair.node.start_fabricd()?;
            sleep(Duration::from_millis(trial.random.u64(0..300)));
        }
        pair.node.wait_ready()
    })?;
    ensure!(said.is_empty(), "{} changes, the first: {}", said.len(), said[0]);
    pair.shows_again(&before, PATIENCE)?;
    let etcd_after = in_etcd()?;
    ensure!(etcd_after == etcd_before, "etcd's revision and leases: {etcd_before:?}, then {etcd_after:?}");
    traffic.lost_nothing()
}

/// The other version is in the folder that `PREVIOUS` names; before there is one, it is this build itself.
fn downgrade(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(100)?;
    let before = pair.shown()?;
    let traffic = pair.traffic()?;
    let previous = std::env::var("PREVIOUS").map_or_else(|_| "fabricd".into(), |folder| format!("{folder}/fabricd"));
    for program in [previous.as_str(), "fabricd"] {
        pair.node.stop_fabricd()?;
        pair.node.start_this_fabricd(program)?;
        pair.node.wait_ready()?;
        pair.shows_again(&before, PATIENCE)?;
    }
    // Whatever the other left as it has it, one start has put right.
    let said = pair.witnessed(|| {
        pair.node.stop_fabricd()?;
        pair.node.start_fabricd()?;
        pair.node.wait_ready()
    })?;
    ensure!(said.is_empty(), "{} changes by the second start, the first: {}", said.len(), said[0]);
    traffic.lost_nothing()
}
