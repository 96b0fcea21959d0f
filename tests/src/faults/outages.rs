//! The store goes away, comes back, or comes back as another one.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use super::leased::{Leased, TTL, start};
use super::outage::Outage;
use super::{Fault, Trial};
use crate::lab::{Lab, Node, crowd};

pub(super) const ROWS: &[Fault] = &[
    Fault {
        number: 3,
        what: "etcd away for long, a daemon restarted meanwhile",
        holds: "0 lost, nothing deleted, starts from disk, frugal; same subnets",
        trial: store_away,
    },
    Fault {
        number: 4,
        what: "history compacted while the daemon is frozen",
        holds: "0 lost; every change found; a few log lines",
        trial: compacted,
    },
    Fault {
        number: 5,
        what: "connection to etcd half-open",
        holds: "0 lost; found within 30 s, made anew; frugal",
        trial: half_open,
    },
    Fault {
        number: 8,
        what: "cut off from etcd for longer than the lease",
        holds: "0 lost; peers keep the routes; same subnet again",
        trial: cut_off,
    },
    Fault {
        number: 11,
        what: "etcd restored from an old snapshot, then wiped",
        holds: "0 lost; recognised; rebuilt from what the nodes hold (I1, I2)",
        trial: another_store,
    },
    Fault {
        number: 12,
        what: "etcd without space; its leader killed, another chosen",
        holds: "0 lost; every lease kept",
        trial: store_in_need,
    },
];

/// How long etcd is away: what `OUTAGE` says, in seconds.
fn outage() -> Duration {
    let seconds = std::env::var("OUTAGE").ok().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

fn store_away(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased(3)?;
    let (etcd, cold, warm) = (fabric.lab.etcd(), &fabric.nodes[0], &fabric.nodes[1]);
    let had = fabric.subnets()?;
    fabric.until_routes(cold, 2)?;
    fabric.until_routes(warm, 2)?;
    let frozen = trial.random.bool();
    if frozen {
        etcd.freeze()?;
    } else {
        etcd.kill()?;
    }
    sleep(Duration::from_millis(trial.random.u64(0..2_000)));
    if trial.random.bool() {
        cold.kill_fabricd()?;
    } else {
        cold.stop_fabricd()?;
    }
    start(cold)?;
    cold.wait_trouble("as remembered from disk")?;
    for node in [cold, warm] {
        node.wait_trouble("has run out")?;
        let told = node.refuses_pod("late")?;
        ensure!(told.contains("has run out"), "{told}");
    }
    let outages = [cold, warm].map(Outage::begins);
    let end = Instant::now() + outage();
    while Instant::now() < end {
        fabric.traffic_goes_on(Duration::from_secs(2))?;
    }
    outages.into_iter().try_for_each(|outage| outage?.ends())?;
    ensure!((cold.routes()?, warm.routes()?) == (2, 2), "routes have gone");

    if frozen {
        etcd.thaw()?;
    } else {
        etcd.start()?;
    }
    fabric.until_all_hold(&had)?;
    fabric.lost_nothing()
}

/// Once on the old connection, and once on a new one, since etcd has been restarted.
fn compacted(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased(2)?;
    let (etcd, node) = (fabric.lab.etcd(), &fabric.nodes[0]);
    let mut peers = 1..trial.random.u32(20..200);
    fabric.lab.crowd()?.join(peers.clone())?;
    fabric.until_routes(node, peers.len() + 1)?;
    for restarted in [false, true] {
        let lines = node.log("fabricd").lines().count();
        node.freeze_fabricd()?;
        let (gone, come) = (trial.random.u32(1..10), trial.random.u32(1..50));
        // A connection of its own: the restart ends it.
        let mut crowd = fabric.lab.crowd()?;
        crowd.leave(peers.start..peers.start + gone)?;
        crowd.join(peers.end..peers.end + come)?;
        peers = peers.start + gone..peers.end + come;
        etcd.ctl(&["compact", "--physical", &fabric.lab.revision()?.to_string()])?;
        etcd.ctl(&["defrag"])?;
        if restarted {
            etcd.kill()?;
            etcd.start()?;
        }
        node.thaw_fabricd()?;
        fabric.until_routes(node, peers.len() + 1)?;
        let lines = node.log("fabricd").lines().count() - lines;
        ensure!(lines <= 10, "{lines} lines\n{}", node.log_tail("fabricd"));
    }
    fabric.lost_nothing()
}

fn half_open(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased(2)?;
    let had = fabric.subnets()?;
    let node = &fabric.nodes[0];
    sleep(Duration::from_millis(trial.random.u64(0..3_000)));
    let (began, outage) = (Instant::now(), Outage::begins(node)?);
    node.cut_off(fabric.lab.etcd().address(1))?;
    until_logged(&fabric, node, "listing everything again")?;
    ensure!(began.elapsed() < Duration::from_secs(30), "found after {:?}", began.elapsed());
    outage.ends()?;
    node.heal()?;
    fabric.until_all_hold(&had)?;
    fabric.lost_nothing()
}

fn cut_off(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased(2)?;
    let had = fabric.subnets()?;
    let cut = trial.random.usize(0..2);
    let (node, other) = (&fabric.nodes[cut], &fabric.nodes[1 - cut]);
    let outage = Outage::begins(node)?;
    node.cut_off(fabric.lab.etcd().address(1))?;
    until_logged(&fabric, node, "lease lost")?;
    fabric.until_gone(&had[cut])?;
    fabric.traffic_goes_on(Duration::from_millis(trial.random.u64(1_000..4_000)))?;
    ensure!(other.routes()? == 1, "its routes stay until the subnet is leased anew");
    outage.ends()?;
    node.wait_trouble("has run out")?;
    node.heal()?;
    fabric.until_all_hold(&had)?;
    fabric.lost_nothing()
}

/// To ask the daemon would cost it CPU, which is measured.
fn until_logged(fabric: &Leased, node: &Node, words: &str) -> Result<()> {
    fabric.until(&format!("{} logs {words:?}", node.name), || {
        ensure!(node.log("fabricd").contains(words), "{}", node.log_tail("fabricd"));
        Ok(())
    })
}

fn another_store(trial: &mut Trial) -> Result<()> {
    const BACKUP: &str = "/run/etcd-backup";
    let mut fabric = trial.leased(3)?;
    let had = fabric.subnets()?;
    fabric.lab.etcd().back_up(BACKUP)?;
    // What the snapshot doesn't know: a record that was written anew, or revisions alone.
    if trial.random.bool() {
        let lease = fabric.lab.etcd_lease(&had[0])?;
        fabric.etcdctl(&["lease", "revoke", &format!("{lease:x}")])?;
        fabric.until_all_hold(&had)?;
    }
    for _ in 0..trial.random.u8(2..20) {
        fabric.etcdctl(&["put", "/later", "than the snapshot"])?;
    }

    replace(&mut fabric, |lab| lab.etcd().restore(1, BACKUP))?;
    fabric.until_all_hold(&had)?;
    replace(&mut fabric, |lab| lab.etcd().wipe(1))?;
    fabric.lab.init_network()?;
    fabric.until_all_hold(&had)?;
    for node in &fabric.nodes {
        fabric.until_routes(node, 2)?;
        let told = node.log("fabricd").contains("store was replaced");
        ensure!(told, "{} has not said that the store is another\n{}", node.name, node.log_tail("fabricd"));
    }
    fabric.lost_nothing()
}

/// Puts another store in the place of the one that is.
fn replace(fabric: &mut Leased, replace: impl FnOnce(&Lab) -> Result<()>) -> Result<()> {
    fabric.store_ends()?;
    fabric.lab.etcd().kill()?;
    replace(&fabric.lab)?;
    fabric.lab.etcd().start()?;
    fabric.store_begins()
}

fn store_in_need(trial: &mut Trial) -> Result<()> {
    let fabric = trial.leased_in(Lab::builder().network(crowd::NETWORK).etcd_members(3), 2)?;
    let etcd = fabric.lab.etcd();
    let had = fabric.subnets()?;
    let endures = || {
        // Longer than a lease: it has to be kept alive meanwhile.
        fabric.traffic_goes_on(TTL + Duration::from_secs(1))?;
        fabric.nodes.iter().try_for_each(|node| {
            let (trouble, log) = (node.trouble()?, node.log("fabricd"));
            ensure!(trouble.is_empty() && !log.contains("lease lost"), "{}: {trouble}\n{log}", node.name);
            Ok(())
        })
    };
    let leader = leader(&fabric)?;
    etcd.end_member(leader, Signal::SIGKILL)?;
    endures()?;

    // Out of space, etcd takes no writes; to keep a lease alive is none.
    etcd.start_member(leader, &["--quota-backend-bytes", "1"])?;
    fabric.until("etcd is full", || {
        etcd.ctl(&["put", "/one", "too many"]).ok();
        let alarms = etcd.ctl(&["alarm", "list"])?;
        ensure!(alarms.contains("NOSPACE"), "{alarms}");
        Ok(())
    })?;
    endures()?;
    etcd.end_member(leader, if trial.random.bool() { Signal::SIGKILL } else { Signal::SIGTERM })?;
    etcd.start_member(leader, &[])?;
    fabric.until("etcd has space again", || etcd.ctl(&["alarm", "disarm"]).map(drop))?;
    etcd.wait_healthy(leader)?;
    fabric.until_all_hold(&had)?;
    fabric.lost_nothing()
}

/// The number of the member that leads.
fn leader(fabric: &Leased) -> Result<u16> {
    let shown: Value = serde_json::from_str(&fabric.etcdctl(&["endpoint", "status", "-w", "json"])?)?;
    let leads = |member: &Value| member["Status"]["leader"] == member["Status"]["header"]["member_id"];
    let endpoint = shown.as_array().into_iter().flatten().find(|member| leads(member)).context("nobody leads")?;
    let url = endpoint["Endpoint"].as_str().unwrap_or_default();
    let is_it = |member: &u16| url.contains(&fabric.lab.etcd().address(*member).to_string());
    fabric.lab.etcd().members().find(is_it).with_context(|| format!("no member has {url}"))
}
