//! What one node's handle does: it asks, is cut off, refused, and loses answers.

use fabric_core::inquiry::Inquiry;
use fabric_core::record::Record;
use fabricd::store::{ConfigPlace, Grant, LeaseStore};

use super::*;

impl MemoryStore {
    /// Cuts this node off from the store, or lets it back. What it knew stays.
    pub fn set_reachable(&self, reachable: bool) {
        let state = self.cluster.lock();
        self.node.faults().unreachable = !reachable;
        if reachable {
            state.list(&self.node);
        } else {
            self.node.connection.send_replace(Connection::Down("cut off by the test".into()));
        }
    }

    /// Lets the store take no writes, as one without space: to keep a lease alive is none.
    pub fn refuse_writes(&self, refuse: bool) {
        self.node.faults().refuses_writes = refuse;
    }

    /// How many writes were refused by that so far.
    #[must_use]
    pub fn refused(&self) -> u32 {
        self.node.faults().refused
    }

    /// How often this node gave its connections up.
    #[must_use]
    pub fn given_up(&self) -> u32 {
        self.node.faults().given_up
    }

    /// Lets the next `count` claims lose their race.
    pub fn lose_claims(&self, count: u32) {
        self.node.faults().claims_to_lose = count;
    }

    /// Carries out the next `count` writes but answers that the store can't be reached, as a time-out does.
    pub fn lose_answers(&self, count: u32) {
        self.node.faults().answers_to_lose = count;
    }

    /// Every call gives others a chance to come first.
    async fn reach(&self) -> Result<(), StoreError> {
        tokio::task::yield_now().await;
        if self.node.faults().unreachable { Err(unreachable()) } else { Ok(()) }
    }

    async fn reach_to_write(&self, operation: &'static str) -> Result<(), StoreError> {
        self.reach().await?;
        let mut faults = self.node.faults();
        if !faults.refuses_writes {
            return Ok(());
        }
        faults.refused += 1;
        Err(StoreError::Refused { operation, reason: "database space exceeded".to_owned() })
    }

    fn answer(&self, grant: Grant) -> Result<Grant, StoreError> {
        match &mut self.node.faults().answers_to_lose {
            0 => Ok(grant),
            left => {
                *left -= 1;
                Err(unreachable())
            }
        }
    }
}

fn unreachable() -> StoreError {
    StoreError::Unreachable { endpoints: "memory".into(), reason: "cut off by the test".into() }
}

impl LeaseStore for MemoryStore {
    fn network(&self) -> Receiver<Network> {
        self.node.network.subscribe()
    }

    fn leases(&self) -> Receiver<Option<Arc<LeaseSet>>> {
        self.node.leases.subscribe()
    }

    fn give_up_connections(&self) {
        self.node.faults().given_up += 1;
    }

    fn config_place(&self) -> ConfigPlace {
        ConfigPlace { name: "config".into(), make: "make one", change: "choose another network" }
    }

    fn connection(&self) -> Receiver<Connection> {
        self.node.connection.subscribe()
    }

    fn replaced(&self) -> Receiver<u64> {
        self.node.replaced.subscribe()
    }

    async fn claim(&self, claim: &Claim) -> Result<Grant, StoreError> {
        self.reach_to_write("claim a lease").await?;
        let lost = StoreError::Lost { key: claim.key };
        if let left @ 1.. = &mut self.node.faults().claims_to_lose {
            *left -= 1;
            return Err(lost);
        }
        let lease_id = claim.lease_id;
        let (expires, mod_revision) = {
            let mut state = self.cluster.lock();
            let before = state.pairs.get(&record_key(&claim.key)).cloned();
            match (state.check(claim), before.as_ref().filter(|before| before.lease == Some(lease_id))) {
                (Ok(()), _) => {}
                // Carried out already, by an attempt whose answer was lost.
                (Err(_), Some(written)) => {
                    let expires = state.grant(lease_id, claim.ttl);
                    let (node, key, mod_revision) = (claim.node.clone(), claim.key, written.mod_revision);
                    return self.answer(Grant { node, key, mod_revision, lease_id, expires, ttl: claim.ttl });
                }
                (Err(lost), None) => return Err(lost),
            }
            let expires = state.grant(lease_id, claim.ttl);
            let outdated = (claim.outdated && claim.expect == Expect::Absent).then(|| OUTDATED.to_owned());
            let named = guard_keys(&claim.key).into_iter().chain(outdated);
            let named = named.map(|key| (key, claim.node.as_str().into(), None));
            let record = (record_key(&claim.key), claim.record.encode(), Some(lease_id));
            state.put(std::iter::once(record).chain(named).collect());
            if let Some(lease) = before.and_then(|before| before.lease_of(claim)).filter(|lease| *lease != lease_id) {
                state.leases.remove(&lease);
            }
            (expires, state.revision)
        };
        self.cluster.watch_expiry(lease_id);
        self.answer(Grant { node: claim.node.clone(), key: claim.key, mod_revision, lease_id, expires, ttl: claim.ttl })
    }

    async fn rewrite(&self, grant: &Grant, record: &Record) -> Result<Grant, StoreError> {
        self.reach_to_write("rewrite the lease").await?;
        let (key, lease_id) = (record_key(&grant.key), grant.lease_id);
        let mod_revision = {
            let mut state = self.cluster.lock();
            if state.pairs.get(&key).is_none_or(|pair| pair.mod_revision != grant.mod_revision) {
                return Err(StoreError::Lost { key: grant.key });
            }
            state.put(vec![(key, record.encode(), Some(lease_id))]);
            state.revision
        };
        self.answer(Grant { mod_revision, ..grant.clone() })
    }

    async fn keep_alive(&self, grant: &Grant) -> Result<Grant, StoreError> {
        self.reach().await?;
        let mut state = self.cluster.lock();
        let lease_id = grant.lease_id;
        let lease = state.leases.get_mut(&lease_id).ok_or(StoreError::Expired { lease_id })?;
        lease.expires = Instant::now() + lease.ttl;
        Ok(Grant { expires: lease.expires, ..grant.clone() })
    }

    async fn release(&self, grant: &Grant) -> Result<(), StoreError> {
        self.reach().await?;
        let mut state = self.cluster.lock();
        let record = record_key(&grant.key);
        let ours = state.pairs.get(&record).is_some_and(|pair| pair.lease == Some(grant.lease_id));
        let names_us = |guard: &String| {
            ours || state.pairs.get(guard).is_some_and(|pair| pair.value == grant.node.as_str().as_bytes())
        };
        let guards: Vec<String> = guard_keys(&grant.key).into_iter().filter(names_us).collect();
        state.delete(&if ours { [vec![record], guards].concat() } else { guards });
        state.revoke(grant.lease_id);
        Ok(())
    }

    async fn expired_leases(&self, grace: Duration) -> Result<Vec<ExpiredLease>, StoreError> {
        self.reach().await?;
        let (lease_id, expired) = {
            let mut state = self.cluster.lock();
            let lease_id = fastrand::i64(1..);
            state.grant(lease_id, grace);
            for (key, _) in state.expired() {
                if let Some(pair) = state.pairs.get(&key).filter(|pair| pair.lease.is_none()).cloned() {
                    state.put(vec![(key, pair.value, Some(lease_id))]);
                }
            }
            (lease_id, state.expired().into_iter().map(|(_, expired)| expired).collect())
        };
        self.cluster.watch_expiry(lease_id);
        Ok(expired)
    }

    async fn hold_place(&self, key: &LeaseKey, placeholder: &Record) -> Result<(), StoreError> {
        self.reach().await?;
        let mut state = self.cluster.lock();
        let reserved = state.pairs.get(&format!("{RESERVATIONS}{}", key.encode()));
        let node = placeholder.node().map(|node| node.as_str().as_bytes());
        if reserved.is_some_and(|pair| Some(&*pair.value) == node) && state.is_free(key) {
            state.put(vec![(record_key(key), placeholder.encode(), None)]);
        }
        Ok(())
    }

    fn inquiries(&self) -> Option<Receiver<Inquired>> {
        Some(self.node.inquiries.subscribe())
    }

    async fn inquire(&self, node: &NodeName, inquiry: &Inquiry) -> Result<(), StoreError> {
        self.reach_to_write("ask who holds a lease").await?;
        let mut state = self.cluster.lock();
        state.inquiries.insert(node.clone(), inquiry.clone());
        for node in state.nodes().iter().filter(|node| node.is_listening()) {
            node.inquiries.send_replace(state.inquiries.clone());
        }
        Ok(())
    }

    async fn time_left(&self, key: &LeaseKey) -> Result<Option<Duration>, StoreError> {
        self.reach().await?;
        let state = self.cluster.lock();
        let lease = state.pairs.get(&record_key(key)).and_then(|pair| state.leases.get(&pair.lease?));
        Ok(lease.map(|lease| lease.expires.saturating_duration_since(Instant::now())))
    }

    async fn probe(&self) -> Result<(), StoreError> {
        self.reach().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::store::{claim, flannel_value, key, leases, now, shows};

    #[tokio::test(start_paused = true)]
    async fn node_that_is_cut_off_keeps_what_it_knew_and_catches_up() {
        let cluster = MemoryCluster::default();
        let store = cluster.node();
        cluster.put("subnets/10.244.1.0-24", flannel_value("192.0.2.1").as_bytes());
        leases(&store, "a lease", |set| set.len() == 1).await;
        store.set_reachable(false);
        cluster.delete("subnets/10.244.1.0-24");
        assert_eq!(now(&store).await.len(), 1);
        let answer = store.claim(&claim(2, "10.244.2.0-24", &*now(&store).await)).await;
        assert!(matches!(answer, Err(StoreError::Unreachable { .. })));
        store.set_reachable(true);
        leases(&store, "no lease", LeaseSet::is_empty).await;
        shows(&mut store.connection(), "a connection", |connection| *connection == Connection::Up).await;
    }

    #[tokio::test(start_paused = true)]
    async fn races_and_answers_are_lost_as_often_as_asked() {
        let cluster = MemoryCluster::default();
        let store = cluster.node();
        let claim = claim(1, "10.244.1.0-24", &*now(&store).await);
        store.lose_claims(1);
        assert!(matches!(store.claim(&claim).await, Err(StoreError::Lost { .. })));
        assert!(cluster.get("subnets/10.244.1.0-24").is_none());
        store.lose_answers(1);
        assert!(matches!(store.claim(&claim).await, Err(StoreError::Unreachable { .. })));
        let set = leases(&store, "the record all the same", |set| set.len() == 1).await;
        let expect = Expect::Revision(set.get(&key("10.244.1.0-24")).expect("there").mod_revision);
        store.claim(&Claim { expect, ..claim }).await.expect("its own record");
    }

    #[tokio::test(start_paused = true)]
    async fn replaced_store_is_empty_and_refuses_old_revisions() {
        let cluster = MemoryCluster::default();
        let store = cluster.node();
        cluster.put("subnets/10.244.1.0-24", flannel_value("192.0.2.1").as_bytes());
        let old = leases(&store, "a lease", |set| set.len() == 1).await;
        cluster.replace();
        let empty = leases(&store, "no lease", LeaseSet::is_empty).await;
        assert_eq!(*store.replaced().borrow(), 1);
        assert!(matches!(store.claim(&claim(2, "10.244.2.0-24", &old)).await, Err(StoreError::Lost { .. })));
        store.claim(&claim(2, "10.244.2.0-24", &empty)).await.expect("decided on the new store");
    }
}
