//! Who is probed when: those that are due first, up to [`BATCH`] at once, and then for as many times [`GAP`](super::GAP) nobody. A peer that
//! is fine is due again after a whole [`round`], on a full second, where it meets others; one that isn't, sooner; one whose
//! verdict the next round may tell, at once. So the cost is bounded however many peers there are, or are in trouble.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::leases::Lease;
use fabric_core::model::{Family, PerFamily};
use fabric_core::record::LeaseKey;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use super::diagnose::{Context, DuePeer, First, Round, ask_first, examine, is_well};
use super::messages;
use super::path::Path;
use super::transitions::{Transition, Transitions};
use super::verdict::Cause;
use super::{BATCH, Key, LocalVtep, Mesh, ROUND, Target, pause, probe, round};
use crate::status::events::Events;
use crate::status::view::{PeerTrouble, View, VtepView};

/// How long a change of the leases waits for others, since all paths are looked at then.
const LOOK: Duration = Duration::from_secs(1);
/// Peers that are fine are due on multiples of this since the start, …
const GRID: Duration = Duration::from_secs(1);
/// … or on the one before, if that is only so little past: timers are late.
const LATE: Duration = Duration::from_millis(50);
/// What one round has shown is confirmed by another after this time.
const SOON: Duration = Duration::from_secs(1);

/// A path's turn: the earliest comes first.
type Due = Reverse<(Instant, Key)>;

/// Probes the peers until the reconcile loop ends.
pub async fn run(mesh: Arc<Mesh>, events: Arc<Events>, mut view: watch::Receiver<Arc<View>>) {
    let context = Arc::new(Context::default());
    let mut answering = Answering::default();
    let mut due: BinaryHeap<Due> = BinaryHeap::new();
    let mut under_way: JoinSet<Ended> = JoinSet::new();
    let started = Instant::now();
    let (mut next_start, mut next_look) = (started, Some(started));
    let mut seen: Option<Arc<View>> = None;
    let mut transitions = Transitions::default();
    loop {
        let start = due.peek().map(|Reverse((at, _))| (*at).max(next_start));
        tokio::select! {
            changed = view.changed(), if next_look.is_none() => {
                if changed.is_err() {
                    return;
                }
                next_look = Some(Instant::now() + LOOK);
            }
            () = sleep_until(next_look.unwrap_or(next_start)), if next_look.is_some() => {
                next_look = None;
                let now = view.borrow_and_update().clone();
                if seen.as_ref().is_none_or(|before| concerns_us(before, &now)) {
                    let targets = targets(&now);
                    answering.at(targets.iter().map(|(_, target)| target.ours.overlay).collect(), &context);
                    context.received.set_peers(targets.iter().map(|(_, target)| target.overlay));
                    due.extend(take_over(&mesh, targets, &now.troubles));
                    seen = Some(now);
                }
            }
            () = sleep_until(start.unwrap_or(next_start)), if start.is_some() => {
                let now = Instant::now();
                let (failing, well): (Vec<_>, Vec<_>) =
                    begin(&mesh, &mut due, now).into_iter().partition(|(_, turn)| turn.failing.is_some());
                next_start = now + pause(failing.len() + well.len());
                for (key, turn) in failing {
                    under_way.spawn(look_into(key, turn, None, &context, &mesh, &view));
                }
                if !well.is_empty() {
                    under_way.spawn(async move {
                        let firsts = ask_first(&well).await;
                        Ended::Asked(well.into_iter().zip(firsts).collect())
                    });
                }
            }
            Some(Ok(ended)) = under_way.join_next() => {
                let mut rounds = vec![];
                match ended {
                    Ended::Examined(key, round) => rounds.push((key, *round)),
                    Ended::Asked(asked) => {
                        for ((key, turn), first) in asked {
                            match is_well(&turn, first) {
                                Some(round) => rounds.push((key, round)),
                                None => drop(under_way.spawn(look_into(key, turn, Some(first), &context, &mesh, &view))),
                            }
                        }
                    }
                }
                let now = Instant::now();
                for (next, transition) in end(&mesh, rounds, now, started) {
                    due.push(next);
                    if let Some(transition) = transition {
                        transitions.add(transition, &events, now);
                    }
                }
            }
            () = mesh.asked.notified() => due.extend(asked(&mesh)),
            () = sleep_until(transitions.due().unwrap_or(next_start)), if transitions.due().is_some() => {
                transitions.flush(&events, Instant::now());
            }
        }
    }
}

/// What a task has found out.
enum Ended {
    /// What the first probes of a batch brought back.
    Asked(Vec<((Key, DuePeer), First)>),
    /// A whole round.
    Examined(Key, Box<Round>),
}

/// A round of a peer that doesn't answer, or that has lost one of its first probes.
fn look_into(
    key: Key,
    turn: DuePeer,
    first: Option<First>,
    context: &Arc<Context>,
    mesh: &Arc<Mesh>,
    view: &watch::Receiver<Arc<View>>,
) -> impl Future<Output = Ended> + use<> {
    let (context, mesh, firewall) = (Arc::clone(context), Arc::clone(mesh), Arc::clone(&view.borrow().firewall));
    async move { Ended::Examined(key, Box::new(examine(&turn, first, &context, &mesh, &firewall).await)) }
}

/// Those that are due, but no more than a batch. One that is probed already, or gone, is none.
fn begin(mesh: &Mesh, due: &mut BinaryHeap<Due>, now: Instant) -> Vec<(Key, DuePeer)> {
    let mut paths = mesh.lock();
    let mut turns = Vec::with_capacity(BATCH);
    while turns.len() < BATCH
        && let Some(Reverse((at, key))) = due.peek().copied()
        && at <= now
    {
        due.pop();
        if let Some(path) = paths.get_mut(&key).filter(|path| path.due == Some(at)) {
            path.due = None;
            turns.push((key, DuePeer { target: path.target.clone(), first: path.next, failing: path.failing() }));
        }
    }
    turns
}

/// The next full second since the start, unless one has only just passed.
fn on_the_grid(started: Instant, at: Instant) -> Instant {
    let since = at.saturating_duration_since(started).saturating_sub(LATE);
    let past = Duration::from_nanos(since.subsec_nanos().into());
    if past.is_zero() { started + since } else { started + (since - past) + GRID }
}

/// Those that somebody wants to be probed now, and others that are due.
fn asked(mesh: &Mesh) -> Vec<Due> {
    let now = Instant::now();
    mesh.lock().iter().filter_map(|(key, path)| Some(Reverse((path.due.filter(|due| *due <= now)?, *key)))).collect()
}

/// Takes rounds over; gives for each when the next is due, and whether there is something to tell.
fn end(mesh: &Mesh, rounds: Vec<(Key, Round)>, now: Instant, started: Instant) -> Vec<(Due, Option<Transition>)> {
    let ended = u64::try_from(rounds.len()).unwrap_or(0);
    let mut paths = mesh.lock();
    let all = round(paths.len());
    let taken_over = rounds.into_iter().filter_map(|(key, ended)| {
        let path = paths.get_mut(&key)?;
        let begun = ended.begun;
        // A round that was begun towards a former address says nothing of this one.
        if path.target.is_like(&ended.target) {
            if let (Some(histogram), Some(round_trip)) = (&mesh.round_trips, ended.small.rtt()) {
                histogram.observe(round_trip.as_secs_f64());
            }
            path.round(ended);
        }
        let at = match std::mem::take(&mut path.again) {
            true => now,
            false if path.is_open() => now + SOON,
            false if path.cause().hurts() => now + ROUND,
            false => on_the_grid(started, (begun + all).max(now)),
        };
        path.due = Some(at);
        Some((Reverse((at, key)), transition(path)))
    });
    let next = taken_over.collect();
    drop(paths);
    mesh.rounds.send_modify(|rounds| *rounds += ended);
    next
}

fn transition(path: &mut Path) -> Option<Transition> {
    let (before, now) = (path.logged, path.cause());
    if !path.is_news() || before == now {
        return None;
    }
    path.logged = now;
    // That a path is there, and fine, is no news.
    let news = before != Cause::Unknown || now.hurts();
    news.then(|| Transition { peer: path.target.name(), before, now, evidence: messages::verdict(path).evidence })
}

/// Whether the peers, or our own end, may be others now.
fn concerns_us(before: &View, now: &View) -> bool {
    let same_leases = match (&before.leases, &now.leases) {
        (Some(was), Some(is)) => Arc::ptr_eq(was, is),
        (was, is) => was.is_none() && is.is_none(),
    };
    !same_leases
        || before.vteps != now.vteps
        || before.pod_bridges != now.pod_bridges
        || before.holding.own != now.holding.own
        || before.troubles != now.troubles
}

/// The paths to all peers that can be programmed, in the order of their keys.
fn targets(view: &View) -> Vec<(Key, Target)> {
    let ours = ours(view);
    let refused = |lease: &Lease| matches!(view.troubles.get(&lease.key), Some(PeerTrouble::Refused(_)));
    let peers = view.peers().filter(|lease| !refused(lease));
    let paths = peers.flat_map(|lease| {
        ours.iter().filter_map(|(family, ours)| Some(((lease.key, family), Target::new(lease, family, ours)?)))
    });
    paths.collect()
}

fn ours(view: &View) -> PerFamily<Arc<LocalVtep>> {
    let end = |end: &VtepView| {
        // The overlay is of the underlay's family.
        let family = Family::of(end.vtep.local);
        let overlay = view.holding.own.as_ref()?.key.subnets().get(family)?.base();
        let vxlan = &view.network?.vxlan;
        let ours = LocalVtep {
            node: view.node.clone(),
            device: end.device,
            underlay: end.underlay,
            pod_bridges: view.pod_bridges.clone(),
            overlay,
            mac: end.vtep.mac,
            local: end.vtep.local,
            mtu: end.vtep.mtu,
            vni: vxlan.vni,
            port: vxlan.port,
        };
        Some((family, Arc::new(ours)))
    };
    view.vteps.iter().filter_map(end).collect()
}

/// Takes the paths over; gives when those that are new are due, spread over a round. A peer that was never programmed is
/// none yet: no probe would reach it, and whatever the peer's side of that looked like, it would be no cause.
fn take_over(mesh: &Mesh, targets: Vec<(Key, Target)>, troubles: &BTreeMap<LeaseKey, PeerTrouble>) -> Vec<Due> {
    let (now, mut fresh) = (Instant::now(), vec![]);
    let mut paths = mesh.lock();
    let mut before = std::mem::take(&mut *paths);
    let now_known = targets.into_iter().filter_map(|(key, target)| match before.remove(&key) {
        Some(mut path) => {
            path.lead_to(target, now);
            Some((key, path))
        }
        None if troubles.contains_key(&key.0) => None,
        None => {
            let at = now + pause(fresh.len() - fresh.len() % BATCH);
            fresh.push(Reverse((at, key)));
            Some((key, Path::new(target, at)))
        }
    });
    *paths = now_known.collect();
    fresh
}

/// The tasks that answer the probes of others, one for each of our addresses.
#[derive(Default)]
struct Answering(BTreeMap<IpAddr, JoinHandle<()>>);

impl Answering {
    fn at(&mut self, addresses: BTreeSet<IpAddr>, context: &Arc<Context>) {
        self.0.retain(|at, task| {
            let stays = addresses.contains(at);
            if !stays {
                task.abort();
            }
            stays
        });
        for at in addresses {
            let context = Arc::clone(context);
            self.0.entry(at).or_insert_with(|| {
                tokio::spawn(async move {
                    loop {
                        // The address may not be on its device yet, or be gone for a while.
                        let ended = probe::answer(at, &context.received).await;
                        tracing::debug!(%at, ?ended, "probes are not answered");
                        sleep(ROUND).await;
                    }
                })
            });
        }
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.values().for_each(JoinHandle::abort);
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use prometheus_client::registry::Registry;

    use super::*;
    use crate::mesh::probe::Answer;
    use crate::mesh::tests::target;
    use crate::mesh::verdict::Seen;
    use crate::status::counters::Counters;

    #[test]
    fn a_round_trip_is_counted_once_and_a_lost_probe_never() {
        let (round_trips, target, now) = (Counters::default().round_trips(), target(), Instant::now());
        let mesh = Mesh::counted_by(round_trips.clone());
        let key = (target.lease.key, Family::V4);
        mesh.lock().insert(key, Path::new(target.clone(), now));
        for small in [Answer::Daemon { rtt: Duration::from_millis(3), arrived: u64::MAX }, Answer::Nothing] {
            let samples = vec![(1, small)];
            let round = Round { target: target.clone(), begun: now, small, full: small, seen: Seen::Both, samples };
            end(&mesh, vec![(key, round)], now, now);
        }
        let mut registry = Registry::default();
        registry.register("rtt", "Round trips", round_trips);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        for line in ["rtt_count 1", "rtt_sum 0.003"] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
    }

    /// A mesh of paths that are due then, in seconds after now, and their turns.
    fn mesh(due: &[u64], now: Instant) -> (Mesh, BinaryHeap<Due>) {
        let path = |(n, seconds): (usize, &u64)| {
            let mut target = target();
            let lease =
                Lease { key: LeaseKey::decode(&format!("10.244.{}.0-24", n + 2)).unwrap(), ..(*target.lease).clone() };
            target.lease = Arc::new(lease);
            let at = now + Duration::from_secs(*seconds);
            ((target.lease.key, Family::V4), Path::new(target, at))
        };
        let mesh: Mesh = due.iter().enumerate().map(path).collect();
        let turns = mesh.lock().iter().map(|(key, path)| Reverse((path.due.unwrap(), *key))).collect();
        (mesh, turns)
    }

    #[test]
    fn peer_is_probed_once_it_is_programmed_and_goes_on_being_probed() {
        let (mesh, target) = (Mesh::default(), target());
        let key = (target.lease.key, Family::V4);
        let pending = BTreeMap::from([(key.0, PeerTrouble::Pending("the kernel has not answered".into()))]);
        assert!(take_over(&mesh, vec![(key, target.clone())], &pending).is_empty());
        assert!(mesh.lock().is_empty());
        assert_eq!(take_over(&mesh, vec![(key, target.clone())], &BTreeMap::new()).len(), 1);
        assert!(take_over(&mesh, vec![(key, target)], &pending).is_empty());
        assert_eq!(mesh.lock().len(), 1, "what was programmed may still be there");

        let view = View::new("node-1".parse().expect("valid"));
        assert!(concerns_us(&View { troubles: pending, ..view.clone() }, &view), "the end of the trouble is seen");
    }

    #[test]
    fn five_of_those_that_are_due_are_probed_at_once_and_none_twice() {
        let now = Instant::now();
        let (mesh, mut due) = mesh(&[0, 0, 0, 0, 0, 0, 0, 3], now);
        due.push(due.peek().copied().unwrap());
        assert_eq!([begin(&mesh, &mut due, now).len(), begin(&mesh, &mut due, now).len()], [5, 2]);
        assert!(begin(&mesh, &mut due, now).is_empty());
        assert_eq!(due.len(), 1, "the last is not due yet");
    }

    #[test]
    fn peers_that_are_fine_meet_on_full_seconds() {
        let (started, ms) = (Instant::now(), Duration::from_millis);
        for (at, on) in [(0, 0), (5_000, 5_000), (5_003, 5_000), (5_051, 6_000), (5_900, 6_000), (6_049, 6_000)] {
            assert_eq!(on_the_grid(started, started + ms(at)).duration_since(started), ms(on), "{at} ms");
        }
    }
}
