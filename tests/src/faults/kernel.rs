//! Peers change, fast and all at once; the kernel says more than can be heard.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::pair::{BY_EVENT, PATIENCE, Pair};
use super::{Fault, Trial};
use crate::lab::witness::Kind;
use crate::lab::{Peer, wait_until};

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 20,
        what: "peers come back with a new MAC, address or both",
        holds: "swapped from the bottom up; no route is ever missing",
        trial: peers_re_created,
    },
    Fault {
        number: 21,
        what: "churn: 100 changes a second beside 5,000 peers",
        holds: "0 packets lost; p99 of the lag below 1 s; in sync 2 s after",
        trial: churn,
    },
    Fault {
        number: 22,
        what: "more notifications than can be heard",
        holds: "0 packets lost; read again, right within 2 s",
        trial: notifications_lost,
    },
];

fn peers_re_created(trial: &mut Trial) -> Result<()> {
    let mut pair = trial.pair(200)?;
    let peers: Vec<Peer> = (1..=200)
        .filter_map(|number| {
            let (generation, moves) = (trial.random.u8(0..2), trial.random.u8(0..2));
            (generation + moves > 0).then_some(Peer { number, generation, moves })
        })
        .collect();
    let traffic = pair.traffic()?;
    let device = crate::bench::changes::index_of(&pair.node, "fabric.1")?;
    let witness = crate::lab::Witness::of(&pair.node)?;
    pair.crowd.put(peers.iter().copied())?;
    wait_until("all are swapped, and nothing old is left", PATIENCE, || {
        let (fdb, neighbours) = (
            pair.node.run(&["bridge", "fdb", "show", "dev", "fabric.1"])?,
            pair.node.run(&["ip", "neighbour", "show", "dev", "fabric.1", "nud", "permanent"])?,
        );
        for peer in &peers {
            let entry = format!("{} dst {} self permanent", peer.mac(), peer.underlay_ip());
            ensure!(fdb.contains(&entry), "no {entry}");
            ensure!(neighbours.contains(&format!("{} lladdr {} ", peer.subnet(), peer.mac())), "{}", peer.subnet());
        }
        let entries = fdb.lines().filter(|line| line.contains(" dst ")).count();
        ensure!(entries == 201, "{entries} FDB entries");
        Ok(())
    })?;
    let gone = |kind| witness.about_fabric(&[device]).iter().any(|event| event.kind == kind && event.gone);
    ensure!(!gone(Kind::Route) && !gone(Kind::Nexthop), "a route was missing for a moment");
    traffic.lost_nothing()
}

fn churn(trial: &mut Trial) -> Result<()> {
    const PEERS: u32 = 5000;
    const STANDSTILLS: f64 = 3.0;
    let mut pair = trial.pair(PEERS)?;
    let traffic = pair.traffic()?;
    let bound = 1.024 * f64::from(trial.slack.next_power_of_two());
    let (within_before, all_before) = lags(&pair, bound)?;
    let mut there: Vec<bool> = vec![true; PEERS as usize + 1];
    let began = Instant::now();
    for tenth in 1..=100 {
        for _ in 0..10 {
            let number = trial.random.u32(1..=PEERS);
            let known = &mut there[number as usize];
            if *known && trial.random.bool() {
                pair.crowd.leave(number..number + 1)?;
                *known = false;
            } else {
                pair.crowd.put([Peer { number, generation: trial.random.u8(..), moves: 0 }])?;
                *known = true;
            }
        }
        // A rate is a matter of time.
        std::thread::sleep(Duration::from_millis(100 * tenth).saturating_sub(began.elapsed()));
    }
    let left = u32::try_from(there.iter().skip(1).filter(|there| **there).count())?;
    pair.within(BY_EVENT, "the node is in sync", || pair.has_routes(left + 1))?;
    let (within, all) = lags(&pair, bound)?;
    let (within, all) = (within - within_before, all - all_before);
    // Now and then a busy machine stands still, and whatever changes meanwhile is one pass that is late.
    let late = all - within;
    ensure!(late <= (0.01 * all).max(STANDSTILLS), "{late} of {all} passes took more than {bound} s");
    traffic.lost_nothing()
}

/// How often the node came in sync within so many seconds, a bound of the histogram's, and how often at all.
fn lags(pair: &Pair, bound: f64) -> Result<(f64, f64)> {
    let within = pair.metric(&format!("fabricd_reconcile_lag_seconds_bucket{{le=\"{bound}\"}}"))?;
    Ok((within, pair.metric("fabricd_reconcile_lag_seconds_count")?))
}

fn notifications_lost(trial: &mut Trial) -> Result<()> {
    let pair = trial.pair(200)?;
    let before = pair.shown()?;
    let traffic = pair.traffic()?;
    let peer = Peer::new(trial.random.u32(1..200));
    pair.node.freeze_fabricd()?;
    // More than the monitor's buffer holds, and one that concerns us in the middle of it.
    let flood = "for i in 1 2; do
            seq 0 29999 | awk '{printf \"route replace 172.16.%d.%d/32 dev lo\\n\", $1/250, $1%250}' | ip -batch -
            seq 0 29999 | awk '{printf \"route del 172.16.%d.%d/32 dev lo\\n\", $1/250, $1%250}' | ip -batch -
        done";
    pair.node.run(&["sh", "-ec", flood])?;
    pair.node.run(&["ip", "neighbour", "del", &peer.subnet().to_string(), "dev", "fabric.1"])?;
    pair.node.thaw_fabricd()?;
    pair.shows_again(&before, BY_EVENT)?;
    pair.within(BY_EVENT, "the loss was noticed", || {
        ensure!(pair.metric("fabricd_kernel_resyncs_total")? >= 1.0, "not yet");
        Ok(())
    })?;
    traffic.lost_nothing()
}
