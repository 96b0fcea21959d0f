//! What a node writes: its lease, and through `fabricctl` the network config. Every write is one transaction that
//! compares what it was decided on, so whatever happened meanwhile, it does all of it or nothing.
//!
//! A claim compares a few things and puts two:
//!
//! ```text
//! if   no record has the IPv4 subnet,    or, to take over: the record is still at the revision that was seen
//!      and the config is as it was seen,
//!      and so is the key `outdated`
//!      each guard is absent, or already this node's
//! then put the record, on a lease of etcd's, and the guards, on none
//! else read them all
//! ```
//!
//! Why that is enough: leases that the node had seen, it has kept clear of. Those that it had not seen are younger than
//! the set that it decided on, so they were made under the same config, which has not changed since; then all subnets
//! have one size, and two that overlap are equal and share a guard. Comparing that no record at all has changed since
//! would do too, but then of many nodes that join at once each spoils the others' attempts: 400 took
//! 41,000 attempts.
//!
//! A node may go on under the config of before while others have the next one: then sizes differ, and guards don't meet.
//! Its claim of a free subnet is the rare one that compares that no record has changed, and it writes the key `outdated`,
//! which spoils the claims that have not seen it.
//!
//! A guard stays when its record is gone: expired, deleted by hand, or written over by a flannel node that went away. The
//! node that it names may take the subnet again; others only after the grace (see `reservations.rs`).
//!
//! A transaction that timed out may have been carried out. It is sent again as it is; then its comparison fails, and
//! what it reads back tells: a record on our etcd lease can only be ours.

use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, GetOptions, KeyValue, LeaseGrantOptions, PutOptions, ResponseHeader, Txn, TxnOp, TxnOpResponse,
};
use fabric_core::model::NodeName;
use fabric_core::record::{LeaseKey, Record};
use tokio::time::Instant;
use tracing::debug;

use super::connect::{lease_is_gone, lease_is_there};
use super::{Init, Store, StoredConfig};
use crate::store::{Claim, Expect, Grant, StoreError};

/// A lease in etcd's sense: what keys hang on, and go with.
pub(super) struct EtcdLease {
    pub(super) id: i64,
    ttl: Duration,
    expires: Instant,
}

/// What a transaction found instead of doing its work.
pub(super) enum Outcome {
    /// It did its work, at this revision, and what it wrote over, if that was asked for.
    Done(i64, Option<KeyValue>),
    /// Comparisons failed; the values of the keys that it was about.
    Failed(Vec<Option<KeyValue>>),
    /// The etcd lease to hang the keys on is gone.
    LeaseGone,
}

/// Whom a guard belongs to, as far as it may be written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guard {
    Nobodys,
    Ours,
    /// Of the name that this node had before.
    Formerly,
    /// Another node's, which may be overwritten while it has this revision.
    Expired(i64),
}

impl Guard {
    fn found(kv: Option<&KeyValue>, claim: &Claim) -> Option<Self> {
        let names = |kv: &KeyValue, node: &NodeName| kv.value() == node.as_str().as_bytes();
        match kv {
            None => Some(Self::Nobodys),
            Some(kv) if names(kv, &claim.node) => Some(Self::Ours),
            Some(kv) if claim.formerly.as_ref().is_some_and(|node| names(kv, node)) => Some(Self::Formerly),
            Some(kv) if claim.evict.contains(&kv.mod_revision()) => Some(Self::Expired(kv.mod_revision())),
            Some(_) => None,
        }
    }

    fn compare(self, key: &str, claim: &Claim) -> Compare {
        let names = |node: &NodeName| Compare::value(key, CompareOp::Equal, node.as_str());
        match self {
            Self::Nobodys => Compare::version(key, CompareOp::Equal, 0),
            Self::Ours => names(&claim.node),
            Self::Formerly => names(claim.formerly.as_ref().unwrap_or(&claim.node)),
            Self::Expired(revision) => Compare::mod_revision(key, CompareOp::Equal, revision),
        }
    }
}

const WRITE_CONFIG: &str = "write the network config";

impl Store {
    pub(super) async fn claim(&self, claim: &Claim) -> Result<Grant, StoreError> {
        let lease = self.grant(claim.lease_id, claim.ttl).await?;
        if !self.is_current(claim.seen_revision) {
            self.discard(lease.id).await;
            return Err(StoreError::Lost { key: claim.key });
        }
        match self.write(claim, lease.id).await {
            Ok(mod_revision) => {
                let EtcdLease { id: lease_id, ttl, expires } = lease;
                Ok(Grant { node: claim.node.clone(), key: claim.key, mod_revision, lease_id, expires, ttl })
            }
            Err(error) => {
                // It may have been written after all, or be written by the next attempt, on the same lease.
                if !matches!(error, StoreError::Unreachable { .. } | StoreError::Refused { .. }) {
                    self.discard(lease.id).await;
                }
                Err(error)
            }
        }
    }

    /// True when `seen_revision` is a revision of the store that answers now. One of a store that was replaced since
    /// would make the comparison with it meaningless.
    fn is_current(&self, seen_revision: i64) -> bool {
        let published = self.leases.borrow().as_ref().map_or(0, |set| set.revision());
        let generation = *self.connector.identity.replaced().borrow();
        seen_revision <= published && self.listed_of.load(Ordering::Acquire) == generation
    }

    /// Writes the record on the etcd lease `lease_id`, and its guards; gives the revision of the write.
    async fn write(&self, claim: &Claim, lease_id: i64) -> Result<i64, StoreError> {
        let (record, guards) = (self.keys.lease(&claim.key), self.keys.guards(&claim.key));
        let keys: Vec<String> = [vec![record.clone()], guards.clone()].concat();
        let value = claim.record.encode();
        let lost = StoreError::Lost { key: claim.key };

        let (decided_on, usual) = match claim.expect {
            Expect::Absent => {
                let as_seen = |key| Compare::mod_revision(key, CompareOp::Less, claim.seen_revision + 1);
                let mut decided_on =
                    vec![as_seen(self.keys.config()), as_seen(self.keys.outdated()), self.is_free(&claim.key)];
                if claim.outdated {
                    decided_on.push(as_seen(self.keys.subnets()).with_prefix());
                }
                (decided_on, Guard::Nobodys)
            }
            Expect::Revision(revision) => {
                (vec![Compare::mod_revision(record.clone(), CompareOp::Equal, revision)], Guard::Ours)
            }
        };
        let on_lease = Some(PutOptions::new().with_lease(lease_id).with_prev_key());
        let outdated = (claim.outdated && claim.expect == Expect::Absent).then(|| self.keys.outdated());
        let named = guards.iter().cloned().chain(outdated).map(|key| TxnOp::put(key, claim.node.as_str(), None));
        let puts: Vec<TxnOp> = std::iter::once(TxnOp::put(record, value, on_lease)).chain(named).collect();

        // The first attempt takes the guards to be as usual; the next ones know.
        let mut expected = vec![usual; guards.len()];
        for _ in 0..3 {
            let compare_guards = guards.iter().zip(&expected).map(|(key, guard)| guard.compare(key, claim));
            let compares = decided_on.iter().cloned().chain(compare_guards).collect::<Vec<_>>();
            let found = match self.transact("claim a lease", compares, puts.clone(), &keys).await? {
                Outcome::Done(revision, before) => {
                    self.discard_that_of(claim, before).await;
                    return Ok(revision);
                }
                Outcome::LeaseGone => return Err(StoreError::Expired { lease_id }),
                Outcome::Failed(found) => found,
            };
            let (record, guards) =
                found.split_first().map_or((None, &[][..]), |(record, rest)| (record.as_ref(), rest));
            if let Some(ours) = record.filter(|record| record.lease() == lease_id) {
                return Ok(ours.mod_revision());
            }
            let as_they_are: Option<Vec<Guard>> =
                guards.iter().map(|guard| Guard::found(guard.as_ref(), claim)).collect();
            match as_they_are {
                Some(guards) if guards != expected => expected = guards,
                None if record.is_none() => return Err(StoreError::Guarded { key: claim.key }),
                _ => return Err(lost),
            }
        }
        Err(lost)
    }

    /// Revokes what this node's record hung on before it was claimed anew: else each restart without a memory would
    /// leave a lease behind.
    async fn discard_that_of(&self, claim: &Claim, before: Option<KeyValue>) {
        let Some(before) = before.filter(|kv| ![0, claim.lease_id].contains(&kv.lease())) else { return };
        let record = Record::decode(&claim.key, before.value());
        if record.is_ok_and(|record| record.node().is_some_and(|node| claim.is_by(node))) {
            self.discard(before.lease()).await;
        }
    }

    /// Compares that no record has the key, nor its IPv4 subnet in another pair.
    pub(super) fn is_free(&self, key: &LeaseKey) -> Compare {
        let absent = |key| Compare::version(key, CompareOp::Equal, 0);
        match self.keys.pairs(key) {
            Some(pairs) => absent(pairs).with_prefix(),
            None => absent(self.keys.lease(key)),
        }
    }

    pub(super) async fn rewrite(&self, grant: &Grant, record: &Record) -> Result<Grant, StoreError> {
        let (key, value, lease_id) = (self.keys.lease(&grant.key), record.encode(), grant.lease_id);
        let outcome = self
            .transact(
                "rewrite the lease",
                vec![
                    Compare::mod_revision(key.clone(), CompareOp::Equal, grant.mod_revision),
                    Compare::lease(key.clone(), CompareOp::Equal, lease_id),
                ],
                vec![TxnOp::put(key.clone(), value.clone(), Some(PutOptions::new().with_lease(lease_id)))],
                &[key],
            )
            .await?;
        let mod_revision = match outcome {
            Outcome::Done(revision, _) => revision,
            Outcome::LeaseGone => return Err(StoreError::Expired { lease_id }),
            Outcome::Failed(found) => match found.into_iter().flatten().next() {
                Some(kv) if kv.lease() == lease_id && kv.value() == value => kv.mod_revision(),
                _ => return Err(StoreError::Lost { key: grant.key }),
            },
        };
        Ok(Grant { mod_revision, ..grant.clone() })
    }

    pub(super) async fn keep_alive(&self, grant: &Grant) -> Result<Grant, StoreError> {
        Ok(Grant { expires: self.renew(grant.lease_id).await? + grant.ttl, ..grant.clone() })
    }

    /// Lets a lease begin anew, and says when.
    async fn renew(&self, lease_id: i64) -> Result<Instant, StoreError> {
        let asked = Instant::now();
        let alive = self
            .connector
            .send("keep the lease alive", |client| async move {
                // The first response, which the crate keeps to itself, is the renewal.
                match client.lease_client().keep_alive(lease_id).await {
                    Ok(_) => Ok(true),
                    Err(error) if lease_is_gone(&error) => Ok(false),
                    Err(error) => Err(error),
                }
            })
            .await?;
        if alive { Ok(asked) } else { Err(StoreError::Expired { lease_id }) }
    }

    /// Removes record and guards in one transaction while the record hangs on our etcd lease, and revokes that. Of a
    /// record that somebody else wrote over, or that is gone, the guards that name this node go.
    pub(super) async fn release(&self, grant: &Grant) -> Result<(), StoreError> {
        let (record, guards) = (self.keys.lease(&grant.key), self.keys.guards(&grant.key));
        let delete = |key: &String| TxnOp::delete(key.clone(), None);
        let ours = vec![Compare::lease(record.clone(), CompareOp::Equal, grant.lease_id)];
        let all = std::iter::once(&record).chain(&guards).map(delete).collect();
        if !matches!(self.transact("release the lease", ours, all, &[]).await?, Outcome::Done(..)) {
            for guard in &guards {
                let ours = vec![Compare::value(guard.clone(), CompareOp::Equal, grant.node.as_str())];
                self.transact("release a guard", ours, vec![delete(guard)], &[]).await?;
            }
        }
        self.revoke(grant.lease_id).await
    }

    /// The lease of this id, from an attempt of before if there was one. 0 lets etcd choose.
    pub(super) async fn grant(&self, id: i64, ttl: Duration) -> Result<EtcdLease, StoreError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let asked = Instant::now();
        let (response, _) = self
            .connector
            .ask("grant a lease", |client| async move {
                let options = LeaseGrantOptions::new().with_id(id);
                match client.lease_client().grant(seconds, Some(options)).await {
                    Err(error) if lease_is_there(&error) => Ok(None),
                    other => other.map(Some),
                }
            })
            .await?;
        let Some(response) = response else {
            return Ok(EtcdLease { id, ttl, expires: self.renew(id).await? + ttl });
        };
        // etcd may lengthen a very short one.
        let ttl = Duration::from_secs(response.ttl().try_into().unwrap_or_default());
        Ok(EtcdLease { id: response.id(), ttl, expires: asked + ttl })
    }

    async fn revoke(&self, lease_id: i64) -> Result<(), StoreError> {
        self.connector
            .send("revoke the lease", |client| async move {
                match client.lease_client().revoke(lease_id).await {
                    Ok(_) => Ok(()),
                    Err(error) if lease_is_gone(&error) => Ok(()),
                    Err(error) => Err(error),
                }
            })
            .await
    }

    /// Revokes a lease that nothing came to hang on. One that is left over harms nobody and ends by itself.
    pub(super) async fn discard(&self, lease_id: i64) {
        if let Err(error) = self.revoke(lease_id).await {
            debug!(lease = format_args!("{lease_id:x}"), %error, "unused lease left to expire");
        }
    }

    /// One transaction; when a comparison fails it reads `keys` instead.
    pub(super) async fn transact(
        &self,
        operation: &'static str,
        compares: Vec<Compare>,
        puts: Vec<TxnOp>,
        keys: &[String],
    ) -> Result<Outcome, StoreError> {
        let gets: Vec<TxnOp> = keys.iter().map(|key| TxnOp::get(key.clone(), Some(GetOptions::new()))).collect();
        let txn = Txn::new().when(compares).and_then(puts).or_else(gets);
        let (response, _) = self
            .connector
            .ask(operation, |client| {
                let txn = txn.clone();
                async move {
                    match client.kv_client().txn(txn).await {
                        Err(error) if lease_is_gone(&error) => Ok(None),
                        other => other.map(Some),
                    }
                }
            })
            .await?;
        let Some(response) = response else { return Ok(Outcome::LeaseGone) };
        if response.succeeded() {
            let revision = response.header().map_or(0, ResponseHeader::revision);
            let before = response.op_responses().into_iter().find_map(|response| match response {
                TxnOpResponse::Put(mut put) => put.take_prev_key(),
                _ => None,
            });
            return Ok(Outcome::Done(revision, before));
        }
        let found = response.op_responses().into_iter().map(|response| match response {
            TxnOpResponse::Get(mut range) => range.take_kvs().into_iter().next(),
            _ => None,
        });
        Ok(Outcome::Failed(found.collect()))
    }

    pub(super) async fn read_config(&self) -> Result<Option<StoredConfig>, StoreError> {
        let key = self.keys.config();
        let (mut response, _) = self
            .connector
            .ask("read the network config", |client| {
                let key = key.clone();
                async move { client.kv_client().get(key, None).await }
            })
            .await?;
        Ok(response.take_kvs().into_iter().next().map(StoredConfig::from))
    }

    pub(super) async fn network_init(&self, json: &[u8], force: bool) -> Result<Init, StoreError> {
        let key = self.keys.config();
        let mut before = None;
        for _ in 0..3 {
            let revision = before.as_ref().map_or(0, |config: &StoredConfig| config.mod_revision);
            let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, revision);
            let put = TxnOp::put(key.clone(), json, None);
            let keys = std::slice::from_ref(&key);
            let found = match self.transact(WRITE_CONFIG, vec![unchanged], vec![put], keys).await? {
                Outcome::Done(..) => return Ok(before.map_or(Init::Created, Init::Replaced)),
                Outcome::LeaseGone => None,
                Outcome::Failed(found) => found.into_iter().flatten().next().map(StoredConfig::from),
            };
            match found {
                Some(config) if config.json == json => return Ok(Init::Unchanged),
                Some(config) if !force => return Ok(Init::Exists(config)),
                found => before = found,
            }
        }
        let reason = "somebody else keeps changing it; try again".to_owned();
        Err(StoreError::Refused { operation: WRITE_CONFIG, reason })
    }
}

impl Store {
    pub(super) async fn network_replace(&self, before: &StoredConfig, json: &[u8]) -> Result<(), StoreError> {
        let key = self.keys.config();
        let unchanged = Compare::mod_revision(key.clone(), CompareOp::Equal, before.mod_revision);
        self.once(WRITE_CONFIG, vec![unchanged], vec![TxnOp::put(key, json, None)]).await
    }
}

impl From<KeyValue> for StoredConfig {
    fn from(kv: KeyValue) -> Self {
        Self { mod_revision: kv.mod_revision(), json: kv.into_key_value().1 }
    }
}
