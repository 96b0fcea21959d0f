//! Who is probed when: those that are due first, one each [`GAP`]. A peer that is fine is due again after a whole
//! [`round`]; one that isn't, sooner; one whose verdict the next round may tell, at once. So the cost is bounded however
//! many peers there are, or are in trouble.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::leases::Lease;
use fabric_core::model::{Family, PerFamily};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, sleep_until};

use super::diagnose::{Context, Round, examine};
use super::path::Path;
use super::transitions::{Transition, Transitions};
use super::verdict::Cause;
use super::{GAP, Key, Mesh, Ours, ROUND, Target, probe, round};
use crate::status::events::Events;
use crate::status::view::{PeerTrouble, View, VtepView};

/// How long a change of the leases waits for others, since all paths are looked at then.
const LOOK: Duration = Duration::from_secs(1);
/// What one round has shown is confirmed by another after this time.
const SOON: Duration = Duration::from_secs(1);

/// Probes the peers until the reconcile loop ends.
pub async fn run(mesh: Arc<Mesh>, events: Arc<Events>, mut view: watch::Receiver<Arc<View>>) {
    let context = Arc::new(Context::default());
    let mut answering = Answering::default();
    let mut due: BinaryHeap<Reverse<(Instant, Key)>> = BinaryHeap::new();
    let mut under_way = JoinSet::new();
    let (mut next_start, mut next_look) = (Instant::now(), Some(Instant::now()));
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
                    context.heard.mind(targets.iter().map(|(_, target)| target.overlay));
                    due.extend(take_over(&mesh, targets));
                    seen = Some(now);
                }
            }
            () = sleep_until(start.unwrap_or(next_start)), if start.is_some() => {
                if let Some(Reverse((at, key))) = due.pop()
                    && let Some((target, number, failing)) = begin(&mesh, &key, at)
                {
                    next_start = Instant::now() + GAP;
                    let (context, mesh) = (Arc::clone(&context), Arc::clone(&mesh));
                    let firewall = Arc::clone(&view.borrow().firewall);
                    under_way.spawn(async move {
                        (key, examine(&target, number, failing, &context, &mesh, &firewall).await)
                    });
                }
            }
            Some(Ok((key, round))) = under_way.join_next() => {
                let (next, transition) = end(&mesh, key, round);
                due.extend(next);
                if let Some(transition) = transition {
                    transitions.add(transition, &events, Instant::now());
                }
            }
            () = mesh.asked.notified() => due.extend(asked(&mesh)),
            () = sleep_until(transitions.due().unwrap_or(next_start)), if transitions.due().is_some() => {
                transitions.flush(&events, Instant::now());
            }
        }
    }
}

/// What is to be probed now, unless it is probed already, or gone; the number of its first probe, and since when it fails.
fn begin(mesh: &Mesh, key: &Key, at: Instant) -> Option<(Target, u32, Option<Instant>)> {
    let mut paths = mesh.lock();
    let path = paths.get_mut(key).filter(|path| path.due == Some(at))?;
    path.due = None;
    Some((path.target.clone(), path.next, path.failing()))
}

/// Those that somebody wants to be probed now, and others that are due.
fn asked(mesh: &Mesh) -> Vec<Reverse<(Instant, Key)>> {
    let now = Instant::now();
    mesh.lock().iter().filter_map(|(key, path)| Some(Reverse((path.due.filter(|due| *due <= now)?, *key)))).collect()
}

/// Takes a round over; gives when the next is due, and whether there is something to tell.
fn end(mesh: &Mesh, key: Key, ended: Round) -> (Option<Reverse<(Instant, Key)>>, Option<Transition>) {
    let mut paths = mesh.lock();
    let all = round(paths.len());
    let Some(path) = paths.get_mut(&key) else { return (None, None) };
    // A round that was begun towards a former address says nothing of this one.
    if path.target.is_like(&ended.target) {
        if let (Some(histogram), Some(round_trip)) = (&mesh.round_trips, ended.small.rtt()) {
            histogram.observe(round_trip.as_secs_f64());
        }
        path.round(ended);
    }
    let now = Instant::now();
    let at = match std::mem::take(&mut path.again) {
        true => now,
        false if path.is_open() => now + SOON,
        false if path.cause().hurts() => now + ROUND,
        false => now + all,
    };
    path.due = Some(at);
    let transition = transition(path);
    drop(paths);
    mesh.rounds.send_modify(|rounds| *rounds += 1);
    (Some(Reverse((at, key))), transition)
}

fn transition(path: &mut Path) -> Option<Transition> {
    let (before, now) = (path.logged, path.cause());
    if !path.is_news() || before == now {
        return None;
    }
    path.logged = now;
    // That a path is there, and fine, is no news.
    let news = before != Cause::Unknown || now.hurts();
    news.then(|| Transition { peer: path.target.name(), before, now, evidence: path.verdict().evidence })
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
}

/// The paths to all peers that are programmed, in the order of their keys.
fn targets(view: &View) -> Vec<(Key, Target)> {
    let ours = ours(view);
    let refused = |lease: &Lease| matches!(view.troubles.get(&lease.key), Some(PeerTrouble::Refused(_)));
    let peers = view.peers().filter(|lease| !refused(lease));
    let paths = peers.flat_map(|lease| {
        ours.iter().filter_map(|(family, ours)| Some(((lease.key, family), Target::new(lease, family, ours)?)))
    });
    paths.collect()
}

fn ours(view: &View) -> PerFamily<Arc<Ours>> {
    let end = |end: &VtepView| {
        // The overlay is of the underlay's family.
        let family = Family::of(end.vtep.local);
        let overlay = view.holding.own.as_ref()?.key.subnets().get(family)?.base();
        let vxlan = &view.network?.vxlan;
        let ours = Ours {
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

/// Takes the paths over; gives when those that are new are due, spread over a round.
fn take_over(mesh: &Mesh, targets: Vec<(Key, Target)>) -> Vec<Reverse<(Instant, Key)>> {
    let (now, mut fresh) = (Instant::now(), vec![]);
    let mut paths = mesh.lock();
    let mut before = std::mem::take(&mut *paths);
    let now_known = targets.into_iter().map(|(key, target)| match before.remove(&key) {
        Some(mut path) => {
            path.lead_to(target, now);
            (key, path)
        }
        None => {
            let at = now + GAP.saturating_mul(u32::try_from(fresh.len()).unwrap_or(u32::MAX));
            fresh.push(Reverse((at, key)));
            (key, Path::new(target, at))
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
                        let ended = probe::answer(at, &context.heard).await;
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
    use super::*;
    use crate::mesh::probe::Answer;
    use crate::mesh::tests::target;
    use crate::mesh::verdict::Seen;
    use crate::metrics::Metrics;
    use crate::status::view::View;

    #[test]
    fn a_round_trip_is_counted_once_and_a_lost_probe_never() {
        let (metrics, target, now) = (Metrics::default(), target(), Instant::now());
        let mesh = Mesh::counted_by(metrics.round_trips());
        let key = (target.lease.key, Family::V4);
        mesh.lock().insert(key, Path::new(target.clone(), now));
        for small in [Answer::Daemon { rtt: Duration::from_millis(3), arrived: u64::MAX }, Answer::Nothing] {
            let samples = vec![(1, small)];
            end(
                &mesh,
                key,
                Round { target: target.clone(), begun: now, small, full: small, seen: Seen::Both, samples },
            );
        }
        let text = metrics.render(&View::new("node-1".parse().unwrap()), &mesh, &[], now);
        for line in ["fabricd_mesh_rtt_seconds_count 1", "fabricd_mesh_rtt_seconds_sum 0.003"] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
    }
}
