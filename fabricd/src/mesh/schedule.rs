//! Who is probed when: those that are due first, one each [`GAP`]. A peer that is fine is due again after a whole
//! [`round`]; one that isn't, sooner. So the cost is bounded however many peers there are, or are in trouble.

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

use super::diagnose::{Context, examine};
use super::path::Path;
use super::probe::Answer;
use super::verdict::{Cause, Seen};
use super::{GAP, Key, Mesh, Ours, ROUND, Target, probe, round};
use crate::events::{Events, Kind};
use crate::view::{PeerTrouble, View, VtepView};

/// How long a change of the leases waits for others, since all paths are looked at then.
const LOOK: Duration = Duration::from_secs(1);

/// Probes the peers until the reconcile loop ends.
pub async fn run(mesh: Arc<Mesh>, events: Arc<Events>, mut view: watch::Receiver<Arc<View>>) {
    let context = Arc::new(Context::default());
    let mut answering = Answering::default();
    let mut due: BinaryHeap<Reverse<(Instant, Key)>> = BinaryHeap::new();
    let mut under_way = JoinSet::new();
    let (mut next_start, mut next_look) = (Instant::now(), Some(Instant::now()));
    let mut seen: Option<Arc<View>> = None;
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
                    && let Some(target) = begin(&mesh, &key, at)
                {
                    next_start = Instant::now() + GAP;
                    let (context, mesh) = (Arc::clone(&context), Arc::clone(&mesh));
                    under_way.spawn(async move { (key, examine(&target, &context, &mesh).await) });
                }
            }
            Some(Ok((key, outcome))) = under_way.join_next() => {
                due.extend(end(&mesh, &events, key, outcome));
            }
        }
    }
}

/// What is to be probed now, unless it is probed already, or gone.
fn begin(mesh: &Mesh, key: &Key, at: Instant) -> Option<Target> {
    let mut paths = mesh.lock();
    let path = paths.get_mut(key).filter(|path| path.due == Some(at))?;
    path.due = None;
    Some(path.target.clone())
}

/// Takes a round over; gives when the next is due.
fn end(
    mesh: &Mesh,
    events: &Events,
    key: Key,
    (small, full, seen): (Answer, Answer, Seen),
) -> Option<Reverse<(Instant, Key)>> {
    let mut paths = mesh.lock();
    let round = round(paths.len());
    let path = paths.get_mut(&key)?;
    let before = path.cause();
    path.probed(small, full, seen);
    tell(events, path, before);
    let at = Instant::now() + if path.cause().hurts() { ROUND } else { round };
    path.due = Some(at);
    Some(Reverse((at, key)))
}

fn tell(events: &Events, path: &Path, before: Cause) {
    let now = path.cause();
    if before == now || (before == Cause::Unknown && !now.hurts()) {
        return;
    }
    let said = match now {
        Cause::Fine if before == Cause::NoDaemon => "its fabricd answers".into(),
        Cause::Fine => "reached again".into(),
        cause => format!("{}: {}", cause.word(), path.verdict().evidence),
    };
    events.tell(Kind::Mesh, path.target.name(), said, now.hurts());
}

/// Whether the peers, or our own end, may be others now.
fn concerns_us(before: &View, now: &View) -> bool {
    let same_leases = match (&before.leases, &now.leases) {
        (Some(was), Some(is)) => Arc::ptr_eq(was, is),
        (was, is) => was.is_none() && is.is_none(),
    };
    !same_leases || before.vteps != now.vteps || before.holding.own != now.holding.own
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
        let (mac, local, mtu) = (end.vtep.mac, end.vtep.local, end.vtep.mtu);
        Some((family, Arc::new(Ours { overlay, mac, local, mtu, vni: vxlan.vni, port: vxlan.port })))
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
            path.target = target;
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
