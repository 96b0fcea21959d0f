//! The lease keeper: a task that gets this node's lease, keeps it alive, and says what it holds.
//!
//! What to do is decided by [`fabric_core::lease::next_step`]; here are the clock, the store and the retries.

use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::lease::{
    Assigned, ClaimRequest, ExpiredLease, Held, Loss, Obstacle, Previous, Situation, Step, next_step,
};
use fabric_core::leases::LeaseSet;
use fabric_core::model::{Subnet, stable_hash};
use fabric_core::record::{Instance, LeaseKey, Record};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, error, info, warn};

use super::inquiries::Inquiries;
use super::{Command, DesiredLease, Holding, LeaseOptions, Mark, Own, Remembered};
use crate::retry::Backoff;
use crate::store::{Claim, Connection, Grant, LeaseStore, Network, StoreError};

/// How long nothing is looked at when only a change can help; changes wake the keeper at once.
const IDLE: Duration = Duration::from_secs(3600);

/// The delay after the first attempt that failed; each next one is twice as long.
const FIRST: Duration = Duration::from_millis(100);

/// The longest delay between attempts while the store is away: when it is back, this is how long a node waits at most.
const AWAY: Duration = Duration::from_secs(5);

/// The same while it answers, and can't or won't: thousands of nodes that insist keep it from ever catching up.
const BUSY: Duration = Duration::from_secs(60);

/// How long the nodes that held subnets come first after the store was emptied or set back.
pub const SETTLING: Duration = Duration::from_secs(120);

/// How often it is looked for pods that are in the way; nobody says when they go.
const PODS: Duration = Duration::from_secs(10);

/// What a claim was decided on.
#[derive(Clone, Copy)]
struct Seen {
    /// The revision of the leases.
    revision: i64,
    /// True when the store shows another network config than the one in force.
    outdated: bool,
}

/// The lease keeper of one node.
#[derive(Debug)]
pub struct Keeper<S> {
    pub(super) store: Arc<S>,
    pub(super) options: LeaseOptions,
    /// The lease of before, or the one that is held.
    previous: Option<Previous>,
    mark: Option<Mark>,
    pub(super) grant: Option<Grant>,
    /// When a lease ends that is only remembered.
    unconfirmed: Option<Instant>,
    /// The store's revision that was remembered, until it is compared.
    remembered_revision: Option<i64>,
    replaced: Option<Instant>,
    /// The run that took the lease from this one, and is overruled.
    pub(super) overruled: Option<Instance>,
    /// The run that this one took the lease from.
    pub(super) taken_from: Option<Instance>,
    pub(super) inquiries: Inquiries,
    /// The question that was answered last.
    pub(super) answered: Option<u64>,
    /// Until when it is said that another machine has this node's name.
    pub(super) duplicate_name: Option<Instant>,
    leave: Option<LeaseKey>,
    /// What pods had that were cut off by that.
    left: Vec<Subnet>,
    /// The subnets of pods that keep this node from others.
    in_the_way: Option<LeaseKey>,
    expired: Vec<ExpiredLease>,
    pub(super) holding: watch::Sender<Holding>,
    commands: (mpsc::Sender<Command>, mpsc::Receiver<Command>),
    pub(super) retry: Backoff,
    /// A claim whose answer was lost.
    unanswered: Option<Claim>,
    /// Until then nothing is tried again, although the leases change: each change would have every node that waits try.
    pause: Option<Instant>,
}

impl<S: LeaseStore> Keeper<S> {
    /// A keeper that holds nothing yet. What is remembered is in use, but unconfirmed until the store has shown it.
    pub fn new(store: Arc<S>, options: LeaseOptions, remembered: Option<Remembered>) -> Self {
        let mut holding = Holding::default();
        // Of another boot under another name it isn't sure that it was this machine's.
        let in_use = remembered.as_ref().filter(|before| before.formerly.is_none() || before.this_boot);
        if let Some(Remembered { own, mark, expires, .. }) = in_use {
            let reason = "the lease is remembered from disk; waiting for the store to confirm it".to_owned();
            let trouble = Some((NotReady::Starting, reason));
            holding = Holding {
                own: Some(own.clone()),
                mark: *mark,
                trouble,
                expires: *expires,
                duplicate_name: None,
                left: vec![],
            };
        }
        Self {
            previous: remembered.as_ref().map(|before| Previous {
                formerly: before.formerly.clone(),
                this_boot: before.this_boot,
                ..previous(&before.own, before.mark)
            }),
            mark: holding.mark,
            grant: None,
            unconfirmed: holding.expires,
            remembered_revision: remembered.as_ref().map(|r| r.revision),
            replaced: None,
            overruled: None,
            taken_from: None,
            inquiries: Inquiries::default(),
            answered: None,
            duplicate_name: None,
            leave: None,
            left: remembered.as_ref().map(|before| before.left.clone()).unwrap_or_default(),
            in_the_way: None,
            expired: vec![],
            holding: watch::channel(holding).0,
            commands: mpsc::channel(8),
            retry: Backoff::new(FIRST, AWAY).seeded(stable_hash(options.node.as_str().as_bytes())),
            unanswered: None,
            pause: None,
            store,
            options,
        }
    }

    /// What is held, now and after every change.
    pub fn holding(&self) -> watch::Receiver<Holding> {
        self.holding.subscribe()
    }

    /// Where commands go.
    pub fn commands(&self) -> mpsc::Sender<Command> {
        self.commands.0.clone()
    }

    /// Runs until the other end of `wanted` is gone. The lease stays: a restart is no reason to lose it.
    pub async fn run(mut self, mut wanted: watch::Receiver<Option<DesiredLease>>) {
        let mut leases = self.store.leases();
        let mut replaced = self.store.replaced();
        let mut assigned = self.store.assigned();
        let mut inquired = self.store.inquiries();
        loop {
            // It rises before the first set of the new store comes.
            if replaced.has_changed().unwrap_or_default() {
                replaced.mark_unchanged();
                self.begin_anew();
            }
            self.pause = self.pause.filter(|end| *end > Instant::now());
            let want = wanted.borrow_and_update().clone();
            let set = leases.borrow_and_update().clone();
            let asked = inquired.as_mut().map(|all| self.concerning_us(&all.borrow_and_update())).unwrap_or_default();
            let wake = match (want, set) {
                (Some(want), Some(set)) => {
                    let assigned = assigned.as_mut().map(|assigned| assigned.borrow_and_update().clone());
                    self.attend(&want, &asked).await;
                    self.advance(&want, &set, assigned.as_ref()).await
                }
                _ => self.renew_if_due().await,
            };
            let wake = self.forget_duplicate_name().map_or(wake, |forget| wake.min(forget));
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                changed = leases.changed(), if self.pause.is_none() => if changed.is_err() { return },
                () = changes(&mut assigned) => {}
                () = changes(&mut inquired) => {}
                changed = replaced.changed() => match changed {
                    Ok(()) => self.begin_anew(),
                    Err(_) => return,
                },
                Some(command) = self.commands.1.recv() => self.obey(command),
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Does what is to be done now, and says when to look again should nothing change until then.
    async fn advance(&mut self, want: &DesiredLease, leases: &LeaseSet, assigned: Option<&Assigned>) -> Instant {
        if self.remembered_revision.take().is_some_and(|revision| leases.revision() < revision) {
            warn!("the store is older than what this node has seen of it before its start");
            self.replaced = Some(Instant::now());
        }
        self.find_unanswered(leases);
        self.inquiries.keep(leases);
        let findings = self.inquiries.findings();
        let pods = if self.grant.is_none() { self.pod_subnets() } else { vec![] };
        let now = Instant::now();
        let step = next_step(&Situation {
            node: &self.options.node,
            instance: &self.options.instance,
            network: &want.network,
            leases,
            public_ips: &want.public_ips,
            held: self.grant.as_ref().map(|grant| Held {
                key: grant.key,
                mod_revision: grant.mod_revision,
                run_out: grant.expires <= now,
            }),
            previous: self.previous.as_ref(),
            since: self.options.since,
            overruled: self.overruled.as_ref(),
            findings: &findings,
            pods: &pods,
            leave: self.leave,
            left: &self.left,
            settling: self.settles_until().is_some(),
            expired: &self.expired,
            assigned,
        });
        // The config in force comes from the reconcile loop: it may be one of before, for a moment or until a person says.
        let network = self.store.network().borrow().clone();
        let is_current = matches!(network, Network::Valid(current) if current.spaces == want.network.spaces);
        let seen = Seen { revision: leases.revision(), outdated: !is_current };
        let outcome = match step {
            Step::Keep => return self.renew_if_due().await,
            Step::Ask(question, obstacle) => return self.ask(want, &question, &obstacle).await,
            Step::Wait(obstacle) => {
                self.in_the_way = obstacle.pods_of();
                self.hinder(&obstacle.to_string());
                return self.look_again_at(&obstacle);
            }
            Step::Lost(loss) => {
                if let Loss::Twin { by, there, back, .. } = &loss {
                    self.was_taken_over(by, there, *back);
                }
                self.lose(&loss.to_string());
                return now;
            }
            Step::HoldPlace(key, placeholder) => {
                let due = self.renew_if_due().await;
                match self.store.hold_place(&key, &placeholder).await {
                    Ok(()) => info!(subnet = %key, "reserved subnet kept for its node, which is away"),
                    Err(error) => debug!(subnet = %key, %error, "reserved subnet not kept, trying again"),
                }
                return due.min(now + self.retry.delay());
            }
            Step::Adopt(held, record) => self.adopt(held, &record).await,
            Step::Claim(request) => self.claim(request, seen).await,
            Step::Rewrite(record) => self.rewrite(record).await,
            Step::Withdraw(request) => self.withdraw(request, seen).await,
            Step::GiveBack => self.give_back().await,
        };
        self.conclude(outcome).await
    }

    async fn conclude(&mut self, outcome: Result<(), StoreError>) -> Instant {
        let in_vain = match outcome {
            Ok(()) => {
                // Who holds a lease hears of every change.
                self.pause = None;
                self.retry.reset();
                return Instant::now();
            }
            Err(StoreError::Expired { .. }) => {
                self.lose("its time has run out in the store");
                return Instant::now();
            }
            // Who was faster shows in the watch, which wakes us; the delay is for the case that it has come already.
            Err(StoreError::Lost { key }) => {
                debug!(subnet = %key, "another node was faster, deciding again");
                false
            }
            Err(StoreError::Guarded { key }) => {
                debug!(subnet = %key, "somebody else's guard, looking at all of them");
                match self.store.expired_leases(self.options.grace).await {
                    Ok(expired) => self.expired = expired,
                    Err(error) => self.hinder(&error.to_string()),
                }
                false
            }
            Err(error @ (StoreError::Unreachable { .. } | StoreError::Refused { .. })) => {
                self.say_what_failed(&error);
                true
            }
        };
        if self.grant.is_some() {
            let again = Instant::now() + self.retry.delay();
            return again.min(self.renew_if_due().await);
        }
        let is_busy = in_vain && *self.store.connection().borrow() == Connection::Up;
        let again = Instant::now() + self.retry.delay_up_to(if is_busy { BUSY } else { AWAY });
        self.pause = in_vain.then_some(again);
        again
    }

    fn say_what_failed(&self, error: &StoreError) {
        // A node that has a subnet has said what became of its lease; nothing new is known.
        if matches!(error, StoreError::Unreachable { .. }) && self.has_troubled_subnet() {
            debug!(%error, "trying again");
        } else if self.grant.is_some() && self.retry.attempts() == 0 {
            // The lease itself stays, and is kept alive.
            warn!(%error, "lease not changed, trying again");
        } else {
            self.hinder(&error.to_string());
        }
    }

    fn has_troubled_subnet(&self) -> bool {
        let holding = self.holding.borrow();
        holding.own.is_some() && holding.trouble.is_some()
    }

    fn look_again_at(&self, obstacle: &Obstacle) -> Instant {
        let now = Instant::now();
        match obstacle {
            Obstacle::Settling => self.settles_until().unwrap_or(now),
            Obstacle::Occupied { .. } | Obstacle::Unfit(_) | Obstacle::Moved { .. } | Obstacle::PodsOutside { .. } => {
                now + PODS
            }
            _ => now + IDLE,
        }
    }

    /// Where attached pods have addresses. What can't be read counts as pods in the subnets of before: to take a subnet
    /// away from pods by mistake is worse than to wait for a person.
    fn pod_subnets(&self) -> Vec<Subnet> {
        let had: Vec<Subnet> = self.previous.iter().flat_map(|had| had.key.subnets().values().copied()).collect();
        match self.options.pods.read(&had) {
            Ok(addresses) => addresses.pod_ips().map(Subnet::host).chain(addresses.pod_subnets()).collect(),
            Err(error) => {
                warn!(%error, "cannot tell which addresses pods have");
                had
            }
        }
    }

    fn settles_until(&self) -> Option<Instant> {
        self.replaced.map(|replaced| replaced + SETTLING).filter(|end| *end > Instant::now())
    }

    /// Another store, or an older copy of it, has come.
    fn begin_anew(&mut self) {
        self.replaced = Some(Instant::now());
        self.remembered_revision = None;
        // Who took what from whom is told by records that are gone.
        self.overruled = None;
        self.expired.clear();
        if self.grant.is_some() {
            self.lose("the store was replaced by another one or an older copy of itself");
        }
    }

    fn obey(&mut self, Command::Renumber { force, reply }: Command) {
        let answer = match self.in_the_way.or(self.previous.as_ref().map(|previous| previous.key)) {
            None => Err("this node has no subnet to leave".to_owned()),
            Some(key) if self.is_assigned(&key) => Err(format!(
                "{key} is what the cluster assigns to this node; it takes another one when its Node is created again with \
                 other podCIDRs"
            )),
            Some(key) => match self.options.pods.in_subnets(&key) {
                (pods @ 1.., leaked) if !force => Err(format!(
                    "{pods} attached {} in {key} and would be cut off{}; \
                     move them away first, or insist with: fabricctl lease renumber --force",
                    if pods == 1 { "pod of this node has an address" } else { "pods of this node have addresses" },
                    if leaked == 0 { String::new() } else { format!(" ({leaked} more addresses there are leaked)") },
                )),
                _ => Ok(key),
            },
        };
        if let Ok(key) = answer {
            warn!(subnet = %key, force, "asked to take another subnet (fabricctl lease renumber)");
            self.leave = Some(key);
            if force {
                self.left.extend(self.pod_subnets());
            }
        }
        // Whoever asked may have gone.
        let _ = reply.send(answer);
    }

    /// True when the cluster wants this node to have these very subnets.
    fn is_assigned(&self, key: &LeaseKey) -> bool {
        let has = |assigned: &Assigned| key.subnets().iter().all(|(family, s)| assigned.subnets.get(family) == Some(s));
        self.store.assigned().is_some_and(|assigned| has(&assigned.borrow()))
    }

    async fn claim(&mut self, request: ClaimRequest, seen: Seen) -> Result<(), StoreError> {
        let claim = self.as_claim(request, seen);
        let outcome = self.store.claim(&claim).await;
        let is_decided = !matches!(outcome, Err(StoreError::Unreachable { .. } | StoreError::Refused { .. }));
        let record = claim.record.clone();
        self.unanswered = Some(claim).filter(|_| !is_decided);
        let grant = outcome?;
        info!(subnet = %grant.key, epoch = epoch(&record), ttl = ?grant.ttl, "lease held");
        self.hold(grant, &record);
        Ok(())
    }

    /// A record that is what was claimed, although nobody said so, is ours as if it had been written before a restart.
    /// A store with more to do than it can answers late and does it all the same: to claim again would be to do it twice.
    fn find_unanswered(&mut self, leases: &LeaseSet) {
        let Some(claim) = self.unanswered.as_ref().filter(|_| self.grant.is_none()) else { return };
        let written = leases.get(&claim.key).filter(|lease| lease.record == claim.record);
        if let Some(lease) = written {
            let own = Own { key: claim.key, endpoints: claim.record.endpoints(), epoch: epoch(&claim.record) };
            let mark = Mark { mod_revision: lease.mod_revision, lease_id: claim.lease_id, ttl: claim.ttl };
            self.previous = Some(previous(&own, Some(mark)));
            (self.mark, self.unanswered) = (Some(mark), None);
        }
    }

    /// Goes on with the record that this node wrote before it was started again. Nothing is written.
    async fn adopt(&mut self, held: Held, record: &Record) -> Result<(), StoreError> {
        let mark = self.mark.filter(|mark| mark.mod_revision == held.mod_revision);
        let kept = match mark {
            Some(Mark { mod_revision, lease_id, ttl }) => {
                let (node, expires) = (self.options.node.clone(), Instant::now());
                self.store.keep_alive(&Grant { node, key: held.key, mod_revision, lease_id, expires, ttl }).await
            }
            None => Err(StoreError::Expired { lease_id: 0 }),
        };
        match kept {
            Ok(grant) => {
                info!(subnet = %grant.key, epoch = epoch(record), ttl = ?grant.ttl, "lease held as before");
                self.hold(grant, record);
                Ok(())
            }
            Err(StoreError::Expired { .. }) => {
                // It is claimed by its revision then.
                self.mark = None;
                if let Some(previous) = &mut self.previous {
                    previous.written = None;
                }
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn hold(&mut self, grant: Grant, record: &Record) {
        let own = Own { key: grant.key, endpoints: record.endpoints(), epoch: epoch(record) };
        let mark = mark(&grant);
        self.previous = Some(previous(&own, Some(mark)));
        self.left.extend(self.leave.take().iter().flat_map(|key| key.subnets().values().copied()));
        self.left.retain(|left| !own.key.subnets().values().any(|subnet| subnet.covers(*left)));
        self.left.sort_unstable();
        self.left.dedup();
        self.in_the_way = None;
        (self.mark, self.unconfirmed, self.overruled) = (Some(mark), None, None);
        self.taken_from = record.owner.as_ref().and_then(|owner| owner.taken_from.clone());
        self.expired.clear();
        let (expires, left) = (Some(grant.expires), self.left.clone());
        self.holding.send_modify(|holding| {
            let duplicate_name = holding.duplicate_name.take();
            *holding = Holding { own: Some(own), mark: Some(mark), trouble: None, expires, duplicate_name, left };
        });
        self.grant = Some(grant);
    }

    async fn rewrite(&mut self, record: Record) -> Result<(), StoreError> {
        let Some(grant) = self.grant.clone() else { return Ok(()) };
        let written = timeout_at(grant.expires, self.store.rewrite(&grant, &record)).await;
        let grant = written.unwrap_or(Err(StoreError::Expired { lease_id: grant.lease_id }))?;
        info!(subnet = %grant.key, "lease rewritten, it did not say what it should");
        self.hold(grant, &record);
        Ok(())
    }

    async fn withdraw(&mut self, request: ClaimRequest, seen: Seen) -> Result<(), StoreError> {
        let grant = self.store.claim(&self.as_claim(request, seen)).await?;
        info!(subnet = %grant.key, "record of this node withdrawn: it is to have another subnet");
        self.store.release(&grant).await
    }

    async fn give_back(&mut self) -> Result<(), StoreError> {
        let Some(grant) = self.grant.clone() else { return Ok(()) };
        self.store.release(&grant).await?;
        // Only a person has a node give its lease back: by renumbering it, or by applying another config.
        self.leave.get_or_insert(grant.key);
        self.lose("it was given back for another one");
        Ok(())
    }

    fn as_claim(&self, ClaimRequest { key, record, expect, evict, formerly }: ClaimRequest, seen: Seen) -> Claim {
        let (node, ttl) = (self.options.node.clone(), self.options.ttl);
        let (seen_revision, outdated) = (seen.revision, seen.outdated);
        // The lease of an attempt that nobody answered may be there; for another subnet it would keep both.
        let before = self.unanswered.as_ref().filter(|claim| claim.key == key);
        let lease_id = before.map_or_else(|| fastrand::i64(1..), |claim| claim.lease_id);
        Claim { node, key, record, expect, seen_revision, outdated, evict, formerly, ttl, lease_id }
    }

    /// Keeps the lease alive when a third of its time has passed, and stops acting as its owner when all has.
    async fn renew_if_due(&mut self) -> Instant {
        let Some(grant) = &self.grant else { return self.doubt_if_due() };
        let due = grant.expires - grant.ttl * 2 / 3;
        if Instant::now() < due {
            return due;
        }
        let expires = grant.expires;
        let renewed = timeout_at(expires, self.store.keep_alive(grant)).await;
        match renewed {
            Ok(Ok(grant)) => {
                debug!(subnet = %grant.key, "lease kept alive");
                self.retry.reset();
                let (due, expires) = (grant.expires - grant.ttl * 2 / 3, grant.expires);
                self.holding.send_modify(|holding| holding.expires = Some(expires));
                self.grant = Some(grant);
                due
            }
            Ok(Err(StoreError::Expired { .. })) => {
                self.lose("its time has run out in the store");
                Instant::now()
            }
            Ok(Err(_)) if Instant::now() < expires => expires.min(Instant::now() + self.retry.delay()),
            Ok(Err(_)) | Err(_) => {
                self.lose("its time has run out, and the store can't be reached to keep it alive");
                Instant::now()
            }
        }
    }

    /// Ends a lease that is only remembered when its time is over.
    fn doubt_if_due(&mut self) -> Instant {
        match self.unconfirmed {
            Some(end) if end <= Instant::now() => {
                self.unconfirmed = None;
                self.lose("its time has run out, and the store can't be reached to keep it alive");
                Instant::now() + IDLE
            }
            Some(end) => end,
            None => Instant::now() + IDLE,
        }
    }

    /// The lease is not ours any more: no address may be handed out. What runs goes on.
    fn lose(&mut self, why: &str) {
        error!(reason = why, "lease lost, pod creation suspended until it is held again");
        self.grant = None;
        self.holding.send_modify(|holding| {
            holding.trouble = Some((NotReady::Quarantine, format!("this node's lease is lost: {why}")));
            holding.expires = None;
        });
    }

    /// Says why there is no lease, once for each reason. A node that has a subnet is in quarantine then.
    pub(super) fn hinder(&self, why: &str) {
        self.holding.send_if_modified(|holding| {
            let code = if holding.own.is_some() { NotReady::Quarantine } else { NotReady::Failed };
            if self.grant.is_some() || holding.trouble.as_ref().is_some_and(|(_, known)| known.ends_with(why)) {
                return false;
            }
            warn!(reason = why, "no lease yet");
            holding.trouble = Some((code, format!("this node has no lease: {why}")));
            true
        });
    }
}

/// Waits for a change of what a store may tell; for ever where it tells nothing.
async fn changes<T>(watched: &mut Option<watch::Receiver<T>>) {
    if let Some(watched) = watched
        && watched.changed().await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

fn epoch(record: &Record) -> u64 {
    record.owner.as_ref().map_or(0, |owner| owner.epoch)
}

fn mark(grant: &Grant) -> Mark {
    Mark { mod_revision: grant.mod_revision, lease_id: grant.lease_id, ttl: grant.ttl }
}

fn previous(own: &Own, mark: Option<Mark>) -> Previous {
    Previous {
        key: own.key,
        vtep_macs: own.endpoints.map(|_, endpoint| endpoint.vtep_mac),
        epoch: own.epoch,
        written: mark.map(|mark| mark.mod_revision),
        formerly: None,
        this_boot: true,
    }
}
