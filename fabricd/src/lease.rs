//! The lease keeper: a task that gets this node's lease, keeps it alive, and says what it holds.
//!
//! What to do is decided by [`fabric_core::holding::next_step`]; here are the clock, the store and the retries.

use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::holding::{Bid, Held, Instance, Situation, Step, next_step};
use fabric_core::leases::LeaseSet;
use fabric_core::model::{NodeName, PerFamily};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{Endpoint, LeaseKey, Record};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};
use tracing::{debug, error, info, warn};

use crate::store::{Claim, Grant, LeaseStore, StoreError};

/// How long nothing is looked at when only a change can help; changes wake the keeper at once.
const REST: Duration = Duration::from_secs(3600);

/// What the reconcile loop wants the lease to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The config in force.
    pub network: NetworkConfig,
    /// The addresses that peers send to, one for each family of the network.
    pub public_ips: PerFamily<std::net::IpAddr>,
}

/// The subnets that this node acts as the owner of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// The subnets.
    pub key: LeaseKey,
    /// How peers reach them.
    pub endpoints: PerFamily<Endpoint>,
    /// Rises with every claim.
    pub epoch: u64,
}

/// What this node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// The subnets; they stay after the lease is lost, for the pods that run.
    pub own: Option<Own>,
    /// Why no address may be handed out of them.
    pub trouble: Option<(NotReady, String)>,
    /// When the lease ends unless it is kept alive.
    pub expires: Option<Instant>,
}

/// The lease keeper of one node.
#[derive(Debug)]
pub struct Keeper<S> {
    store: Arc<S>,
    node: NodeName,
    instance: Instance,
    ttl: Duration,
    previous: Option<LeaseKey>,
    grant: Option<Grant>,
    holding: watch::Sender<Holding>,
    retry: Backoff,
}

impl<S: LeaseStore> Keeper<S> {
    /// A keeper that holds nothing yet; `previous` are subnets that the node had before, if it remembers.
    pub fn new(store: Arc<S>, node: NodeName, instance: Instance, ttl: Duration, previous: Option<LeaseKey>) -> Self {
        let (holding, _) = watch::channel(Holding::default());
        let retry = Backoff::new(node.as_str());
        Self { store, node, instance, ttl, previous, grant: None, holding, retry }
    }

    /// What is held, now and after every change.
    pub fn holding(&self) -> watch::Receiver<Holding> {
        self.holding.subscribe()
    }

    /// Runs until the other end of `wanted` is gone. The lease stays: a restart is no reason to lose it.
    pub async fn run(mut self, mut wanted: watch::Receiver<Option<Wanted>>) {
        let mut leases = self.store.leases();
        let mut replaced = self.store.replaced();
        loop {
            let want = wanted.borrow_and_update().clone();
            let set = leases.borrow_and_update().clone();
            let wake = match (want, set) {
                (Some(want), Some(set)) => self.advance(&want, &set).await,
                _ => self.renew_if_due().await,
            };
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() { return },
                changed = leases.changed() => if changed.is_err() { return },
                changed = replaced.changed() => match changed {
                    Ok(()) => self.lose("the store was replaced by another one or an older copy of itself"),
                    Err(_) => return,
                },
                () = sleep_until(wake) => {}
            }
        }
    }

    /// Does what is to be done now, and says when to look again should nothing change until then.
    async fn advance(&mut self, want: &Wanted, leases: &LeaseSet) -> Instant {
        let step = next_step(&Situation {
            node: &self.node,
            instance: &self.instance,
            network: &want.network,
            leases,
            public_ips: &want.public_ips,
            held: self.grant.as_ref().map(|g| Held { key: g.key, mod_revision: g.mod_revision }),
            previous: self.previous,
        });
        let outcome = match step {
            Step::Keep => return self.renew_if_due().await,
            Step::Wait(obstacle) => {
                self.hinder(obstacle.to_string());
                return Instant::now() + REST;
            }
            Step::Lost(loss) => {
                self.lose(&loss.to_string());
                return Instant::now();
            }
            Step::Claim(bid) => self.claim(bid, leases.revision()).await,
            Step::Rewrite(record) => self.rewrite(record).await,
            Step::Withdraw(bid) => self.withdraw(bid, leases.revision()).await,
        };
        match outcome {
            Ok(()) => {
                self.retry.reset();
                Instant::now()
            }
            // Who was faster shows in the watch, which wakes us; the delay is for the case that it has come already.
            Err(StoreError::Lost { key }) => {
                debug!(subnet = %key, "somebody else was faster, deciding anew");
                Instant::now() + self.retry.next()
            }
            Err(StoreError::Expired { .. }) => {
                self.lose("its time has run out in the store");
                Instant::now()
            }
            Err(error) => {
                self.hinder(error.to_string());
                Instant::now() + self.retry.next()
            }
        }
    }

    async fn claim(&mut self, bid: Bid, seen_revision: i64) -> Result<(), StoreError> {
        let endpoints = bid.record.endpoints();
        let epoch = bid.record.owner.as_ref().map_or(0, |owner| owner.epoch);
        let grant = self.store.claim(&self.as_claim(bid, seen_revision)).await?;
        info!(subnet = %grant.key, epoch, ttl = ?grant.ttl, "lease held");
        self.previous = Some(grant.key);
        let own = Own { key: grant.key, endpoints, epoch };
        self.holding.send_replace(Holding { own: Some(own), trouble: None, expires: Some(grant.expires) });
        self.grant = Some(grant);
        Ok(())
    }

    async fn rewrite(&mut self, record: Record) -> Result<(), StoreError> {
        let Some(grant) = &self.grant else { return Ok(()) };
        let grant = self.store.rewrite(grant, &record).await?;
        info!(subnet = %grant.key, "lease rewritten, this node's addresses have changed");
        self.grant = Some(grant);
        self.holding.send_modify(|holding| {
            if let Some(own) = &mut holding.own {
                own.endpoints = record.endpoints();
            }
        });
        Ok(())
    }

    async fn withdraw(&mut self, bid: Bid, seen_revision: i64) -> Result<(), StoreError> {
        let grant = self.store.claim(&self.as_claim(bid, seen_revision)).await?;
        info!(subnet = %grant.key, "lease given back, it no longer fits the network config");
        self.store.release(&grant).await
    }

    fn as_claim(&self, bid: Bid, seen_revision: i64) -> Claim {
        let Bid { key, record, expect } = bid;
        Claim { node: self.node.clone(), key, record, expect, seen_revision, ttl: self.ttl }
    }

    /// Keeps the lease alive when a third of its time has passed, and stops acting as its owner when all has.
    async fn renew_if_due(&mut self) -> Instant {
        let Some(grant) = &self.grant else { return Instant::now() + REST };
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
            Ok(Err(_)) if Instant::now() < expires => expires.min(Instant::now() + self.retry.next()),
            Ok(Err(_)) | Err(_) => {
                self.lose("its time has run out, and the store can't be reached to keep it alive");
                Instant::now()
            }
        }
    }

    /// The lease is not ours any more: no address may be handed out. What runs goes on.
    fn lose(&mut self, why: &str) {
        error!(reason = why, "lease lost, in quarantine until it is held again");
        self.grant = None;
        self.holding.send_modify(|holding| {
            holding.trouble = Some((NotReady::Quarantine, format!("this node's lease is lost: {why}")));
            holding.expires = None;
        });
    }

    /// Says why there is no lease, once for each reason. A quarantine stays one.
    fn hinder(&self, why: String) {
        self.holding.send_if_modified(|holding| {
            let code = match &holding.trouble {
                Some((NotReady::Quarantine, _)) => NotReady::Quarantine,
                _ => NotReady::Failed,
            };
            if self.grant.is_some() || holding.trouble.as_ref().is_some_and(|(_, known)| known.ends_with(&why)) {
                return false;
            }
            warn!(reason = why, "no lease yet");
            holding.trouble = Some((code, format!("this node has no lease: {why}")));
            true
        });
    }
}

/// Delays that double from 0.1 s to 5 s, each with a jitter of its own so that nodes don't march in step.
#[derive(Debug)]
struct Backoff {
    failures: u32,
    seed: u64,
}

impl Backoff {
    fn new(seed: &str) -> Self {
        Self { failures: 0, seed: fabric_core::model::stable_hash(seed.as_bytes()) }
    }

    fn reset(&mut self) {
        self.failures = 0;
    }

    fn next(&mut self) -> Duration {
        let base = Duration::from_millis(100 << self.failures.min(6)).min(Duration::from_secs(5));
        self.failures += 1;
        self.seed = fabric_core::model::stable_hash(&self.seed.to_le_bytes());
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are as random as the others")]
        base.mul_f64(0.5 + f64::from(self.seed as u16) / f64::from(u16::MAX))
    }
}
