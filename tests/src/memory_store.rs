//! [`MemoryStore`]: a lease store without an etcd, for tests of what lies above it.
//!
//! A [`MemoryCluster`] is the store; each [`MemoryStore`] is one node's handle on it, with faults of its own. Keys are as
//! under etcd's prefix: `config`, `subnets/…`, `fabric/guard/…`. Leases end by tokio's clock, so a paused one works. It
//! keeps the same promises as the real one, and the same conformance suite checks that, except for what only an etcd
//! can do: be compacted, and lose most leases at once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use fabric_core::leases::{Entry, Event, LeaseSet};
use fabric_core::model::{Family, NodeName, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{LeaseKey, Record};
use fabricd::store::{Claim, ConfigPlace, Connection, Expect, Grant, LeaseStore, Network, Resting, StoreError};
use tokio::sync::watch::{Receiver, Sender};
use tokio::time::{Instant, sleep_until};

use crate::revisions::Owners;

const SUBNETS: &str = "subnets/";
const RESERVATIONS: &str = "fabric/reservations/";
const GUARDS: &str = "fabric/guard/";
const OUTDATED: &str = "fabric/guard/outdated";

/// The store that many handles share.
#[derive(Clone, Default)]
pub struct MemoryCluster {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// How many stores came before this one.
    generation: u64,
    revision: i64,
    pairs: BTreeMap<String, Pair>,
    leases: BTreeMap<i64, HeldLease>,
    nodes: Vec<Weak<Node>>,
    owners: Owners,
    /// The first time that two nodes owned one address.
    overlap: Option<String>,
}

/// What a store had in it at some time.
#[derive(Clone)]
pub struct Snapshot {
    revision: i64,
    pairs: BTreeMap<String, Pair>,
    /// Leases by their time to live.
    leases: BTreeMap<i64, Duration>,
}

#[derive(Clone)]
struct Pair {
    value: Vec<u8>,
    create_revision: i64,
    mod_revision: i64,
    lease: Option<i64>,
}

impl Pair {
    /// What it hangs on, if the claimer itself wrote it.
    fn lease_of(&self, claim: &Claim) -> Option<i64> {
        let record = Record::decode(&claim.key, &self.value).ok()?;
        self.lease.filter(|_| record.node() == Some(&claim.node))
    }
}

struct HeldLease {
    ttl: Duration,
    expires: Instant,
}

/// What one handle sees, and what is wrong with it.
struct Node {
    network: Sender<Network>,
    leases: Sender<Option<Arc<LeaseSet>>>,
    connection: Sender<Connection>,
    replaced: Sender<u64>,
    /// The store's generation when the node came.
    since: u64,
    faults: Mutex<Faults>,
}

#[derive(Default)]
struct Faults {
    unreachable: bool,
    refuses_writes: bool,
    refused: u32,
    claims_to_lose: u32,
    answers_to_lose: u32,
}

/// One node's handle.
pub struct MemoryStore {
    cluster: MemoryCluster,
    node: Arc<Node>,
}

impl MemoryCluster {
    /// One more node's handle. It sees the store as soon as the runtime gets to it.
    #[must_use]
    pub fn node(&self) -> MemoryStore {
        let mut state = self.lock();
        let node = Arc::new(Node {
            network: Sender::new(Network::Unknown),
            leases: Sender::new(None),
            connection: Sender::new(Connection::Unknown),
            replaced: Sender::new(0),
            since: state.generation,
            faults: Mutex::default(),
        });
        state.nodes.push(Arc::downgrade(&node));
        drop(state);
        let (cluster, connecting) = (self.clone(), Arc::downgrade(&node));
        tokio::spawn(async move {
            if let Some(node) = connecting.upgrade() {
                cluster.lock().list(&node);
            }
        });
        MemoryStore { cluster: self.clone(), node }
    }

    /// Writes a pair as flannel or a person would: whatever is there, and without a lease. Gives the revision.
    pub fn put(&self, key: &str, value: &[u8]) -> i64 {
        let mut state = self.lock();
        state.put(vec![(key.to_owned(), value.to_vec(), None)]);
        state.revision
    }

    /// Deletes a pair.
    pub fn delete(&self, key: &str) {
        self.lock().delete(&[key.to_owned()]);
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.lock().pairs.get(key).map(|pair| pair.value.clone())
    }

    /// The revision of the last write.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.lock().revision
    }

    /// Ends a lease of the store, with all that hangs on it.
    pub fn revoke(&self, lease_id: i64) {
        self.lock().revoke(lease_id);
    }

    /// Puts an empty store in its place.
    pub fn replace(&self) {
        let mut state = self.lock();
        let (generation, nodes) = (state.generation + 1, std::mem::take(&mut state.nodes));
        let overlap = state.overlap.take();
        *state = State { generation, nodes, overlap, ..State::default() };
        for node in state.nodes() {
            state.list(&node);
        }
    }

    /// All that is in it.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let leases = state.leases.iter().map(|(id, lease)| (*id, lease.ttl)).collect();
        Snapshot { revision: state.revision, pairs: state.pairs.clone(), leases }
    }

    /// Puts an older copy of itself in its place; its leases begin anew, as in a restored etcd.
    pub fn restore(&self, snapshot: &Snapshot) {
        let mut state = self.lock();
        state.generation += 1;
        state.revision = snapshot.revision;
        state.pairs.clone_from(&snapshot.pairs);
        let begin = |(id, ttl): (&i64, &Duration)| (*id, HeldLease { ttl: *ttl, expires: Instant::now() + *ttl });
        state.leases = snapshot.leases.iter().map(begin).collect();
        state.owners.store_was_replaced();
        for (key, pair) in &snapshot.pairs {
            state.witness(key, Some(pair));
        }
        for node in state.nodes() {
            state.list(&node);
        }
        drop(state);
        snapshot.leases.keys().for_each(|id| self.watch_expiry(*id));
    }

    /// Who owns a subnet, as the record under its key says.
    #[must_use]
    pub fn owner(&self, key: &LeaseKey) -> Option<NodeName> {
        self.lock().owners.owner(key).cloned()
    }

    /// The first time that two nodes owned one address, at any revision.
    #[must_use]
    pub fn overlap(&self) -> Option<String> {
        self.lock().overlap.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends a lease in time, however often it is kept alive until then.
    fn watch_expiry(&self, lease_id: i64) {
        let state = Arc::downgrade(&self.state);
        tokio::spawn(async move {
            while let Some(state) = state.upgrade() {
                let cluster = Self { state };
                let Some(expires) = cluster.lock().leases.get(&lease_id).map(|lease| lease.expires) else { return };
                if expires <= Instant::now() {
                    return cluster.revoke(lease_id);
                }
                drop(cluster);
                sleep_until(expires).await;
            }
        });
    }
}

impl State {
    fn nodes(&self) -> Vec<Arc<Node>> {
        self.nodes.iter().filter_map(Weak::upgrade).collect()
    }

    /// One write of several pairs: one revision, as a transaction of etcd's.
    fn put(&mut self, pairs: Vec<(String, Vec<u8>, Option<i64>)>) {
        self.revision += 1;
        let mod_revision = self.revision;
        for (key, value, lease) in pairs {
            let create_revision = self.pairs.get(&key).map_or(mod_revision, |pair| pair.create_revision);
            let pair = Pair { value, create_revision, mod_revision, lease };
            self.pairs.insert(key.clone(), pair.clone());
            self.witness(&key, Some(&pair));
            self.tell(&key, Some(&pair), false);
        }
    }

    /// The lease of this id, which begins anew if it is there.
    fn grant(&mut self, id: i64, ttl: Duration) -> Instant {
        let expires = Instant::now() + ttl;
        self.leases.insert(id, HeldLease { ttl, expires });
        expires
    }

    fn delete(&mut self, keys: &[String]) {
        let keys: Vec<&String> = keys.iter().filter(|key| self.pairs.contains_key(*key)).collect();
        self.revision += i64::from(!keys.is_empty());
        let given_back =
            keys.iter().any(|key| key.starts_with(GUARDS)) && keys.iter().any(|key| key.starts_with(SUBNETS));
        for key in keys {
            self.pairs.remove(key);
            self.witness(key, None);
            self.tell(key, None, given_back);
        }
    }

    fn revoke(&mut self, lease_id: i64) {
        self.leases.remove(&lease_id);
        let hangs = |pair: &Pair| pair.lease == Some(lease_id);
        let keys: Vec<String> = self.pairs.iter().filter(|(_, pair)| hangs(pair)).map(|(key, _)| key.clone()).collect();
        self.delete(&keys);
    }

    fn witness(&mut self, key: &str, pair: Option<&Pair>) {
        let Some(key) = key.strip_prefix(SUBNETS) else { return };
        if let Err(overlap) = self.owners.see(key, pair.map(|pair| &*pair.value), self.revision) {
            self.overlap.get_or_insert(overlap.to_string());
        }
    }

    fn tell(&self, key: &str, pair: Option<&Pair>, given_back: bool) {
        for node in self.nodes().iter().filter(|node| node.is_listening()) {
            if key == "config" {
                self.list(node);
            }
            if let Some(key) = key.strip_prefix(RESERVATIONS) {
                node.leases.send_modify(|set| {
                    let mut folded = set.as_deref().cloned().unwrap_or_default();
                    folded.reserve(key, pair.map(|pair| &*pair.value), self.revision);
                    *set = Some(Arc::new(folded));
                });
            }
            if let (Some(subnet), None) = (guarded(key), pair) {
                node.leases.send_modify(|set| {
                    let mut folded = set.as_deref().cloned().unwrap_or_default();
                    folded.forget_departed(|departed| departed != subnet);
                    *set = Some(Arc::new(folded));
                });
            }
            let Some(key) = key.strip_prefix(SUBNETS) else { continue };
            let event = match pair {
                Some(pair) => Event::Put(entry(key, pair)),
                None => Event::Delete { key: key.to_owned(), given_back },
            };
            node.leases.send_modify(|set| {
                let mut folded = set.as_deref().cloned().unwrap_or_default();
                folded.apply(event, self.revision);
                *set = Some(Arc::new(folded));
            });
        }
    }

    fn list(&self, node: &Node) {
        if node.faults().unreachable {
            return;
        }
        let generation = self.generation - node.since;
        node.replaced.send_if_modified(|known| std::mem::replace(known, generation) != generation);
        node.publish_network(self.pairs.get("config"));
        let entries =
            self.pairs.iter().filter_map(|(key, pair)| Some(entry(key.strip_prefix(SUBNETS)?, pair))).collect();
        node.leases.send_modify(|set| {
            let before = set.clone().unwrap_or_default();
            let mut listed = LeaseSet::snapshot(&before, entries, self.revision);
            for (key, pair) in &self.pairs {
                if let Some(key) = key.strip_prefix(RESERVATIONS) {
                    listed.reserve(key, Some(&pair.value), self.revision);
                }
            }
            listed.forget_departed(|subnet| self.pairs.keys().any(|key| guarded(key) == Some(subnet)));
            *set = Some(Arc::new(listed));
        });
        node.connection.send_replace(Connection::Up);
    }

    /// What a claim compares.
    fn check(&self, claim: &Claim) -> Result<(), StoreError> {
        let key = claim.key;
        let modified = |key: &str| self.pairs.get(key).map(|pair| pair.mod_revision);
        let as_expected = match claim.expect {
            Expect::Absent => {
                let mut decided_on = vec!["config", OUTDATED];
                if claim.outdated {
                    decided_on.extend(self.pairs.keys().filter(|key| key.starts_with(SUBNETS)).map(String::as_str));
                }
                self.is_free(&key) && decided_on.into_iter().all(|key| modified(key) <= Some(claim.seen_revision))
            }
            Expect::Revision(revision) => modified(&record_key(&key)) == Some(revision),
        };
        let ours = |guard: &String| {
            let is_ours = |pair: &Pair| pair.value == claim.node.as_str().as_bytes();
            self.pairs.get(guard).is_none_or(|pair| is_ours(pair) || claim.evict.contains(&pair.mod_revision))
        };
        // A revision that this store never reached is another store's.
        let current = claim.seen_revision <= self.revision;
        match (current && as_expected, guard_keys(&key).iter().all(ours)) {
            (true, true) => Ok(()),
            (true, false) if modified(&record_key(&key)).is_none() => Err(StoreError::Guarded { key }),
            _ => Err(StoreError::Lost { key }),
        }
    }

    /// Guards without a record, with their keys.
    fn resting(&self) -> Vec<(String, Resting)> {
        let records = self.pairs.keys().filter_map(|key| LeaseKey::decode(key.strip_prefix(SUBNETS)?).ok());
        let leased: Vec<Subnet> = records.flat_map(|key| key.subnets().values().copied().collect::<Vec<_>>()).collect();
        let resting = |(key, pair): (&String, &Pair)| {
            let subnet = guarded(key).filter(|subnet| !leased.contains(subnet))?;
            let node = std::str::from_utf8(&pair.value).ok().and_then(|name| name.parse().ok());
            Some((key.clone(), Resting { subnet, node, mod_revision: pair.mod_revision }))
        };
        self.pairs.iter().filter_map(resting).collect()
    }

    /// True when no record has the key, nor its IPv4 subnet in another pair.
    fn is_free(&self, key: &LeaseKey) -> bool {
        let pairs = match key.subnets().v4 {
            Some(subnet) => format!("{SUBNETS}{}-{}", subnet.base(), subnet.prefix_len()),
            None => record_key(key),
        };
        !self.pairs.keys().any(|key| key.starts_with(&pairs))
    }
}

fn entry(key: &str, pair: &Pair) -> Entry {
    let Pair { value, create_revision, mod_revision, .. } = pair.clone();
    Entry { key: key.to_owned(), value, create_revision, mod_revision }
}

fn record_key(key: &LeaseKey) -> String {
    format!("{SUBNETS}{key}")
}

fn guarded(key: &str) -> Option<Subnet> {
    let (base, length) = key.strip_prefix(GUARDS)?.split_once('/')?.1.rsplit_once('-')?;
    format!("{base}/{length}").parse().ok()
}

fn guard_keys(key: &LeaseKey) -> Vec<String> {
    let digit = |family| if family == Family::V4 { 4 } else { 6 };
    key.subnets()
        .iter()
        .map(|(family, subnet)| format!("fabric/guard/{}/{}-{}", digit(family), subnet.base(), subnet.prefix_len()))
        .collect()
}

impl Node {
    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_listening(&self) -> bool {
        !self.faults().unreachable && self.leases.borrow().is_some()
    }

    fn publish_network(&self, pair: Option<&Pair>) {
        let network = match pair.map(|pair| NetworkConfig::decode(&pair.value)) {
            None => Network::Missing,
            Some(Ok(config)) => Network::Valid(config),
            Some(Err(error)) => Network::Invalid(error),
        };
        self.network.send_if_modified(|published| {
            let changed = *published != network;
            *published = network;
            changed
        });
    }
}

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
        let (lease_id, expires, mod_revision) = {
            let mut state = self.cluster.lock();
            let (lease_id, expires) = (claim.lease_id, state.grant(claim.lease_id, claim.ttl));
            if let Err(lost) = state.check(claim) {
                let ours = state.pairs.get(&record_key(&claim.key)).filter(|pair| pair.lease == Some(lease_id));
                let mod_revision = ours.map(|pair| pair.mod_revision).ok_or(lost)?;
                return self.answer(Grant {
                    node: claim.node.clone(),
                    key: claim.key,
                    mod_revision,
                    lease_id,
                    expires,
                    ttl: claim.ttl,
                });
            }
            let outdated = (claim.outdated && claim.expect == Expect::Absent).then(|| OUTDATED.to_owned());
            let named = guard_keys(&claim.key).into_iter().chain(outdated);
            let named = named.map(|key| (key, claim.node.as_str().into(), None));
            let record = (record_key(&claim.key), claim.record.encode(), Some(lease_id));
            let before = state.pairs.get(&record.0).cloned();
            state.put(std::iter::once(record).chain(named).collect());
            if let Some(lease) = before.and_then(|before| before.lease_of(claim)).filter(|lease| *lease != lease_id) {
                state.leases.remove(&lease);
            }
            (lease_id, expires, state.revision)
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

    async fn resting(&self, grace: Duration) -> Result<Vec<Resting>, StoreError> {
        self.reach().await?;
        let (lease_id, resting) = {
            let mut state = self.cluster.lock();
            let lease_id = fastrand::i64(1..);
            state.grant(lease_id, grace);
            for (key, _) in state.resting() {
                if let Some(pair) = state.pairs.get(&key).filter(|pair| pair.lease.is_none()).cloned() {
                    state.put(vec![(key, pair.value, Some(lease_id))]);
                }
            }
            (lease_id, state.resting().into_iter().map(|(_, resting)| resting).collect())
        };
        self.cluster.watch_expiry(lease_id);
        Ok(resting)
    }

    async fn hold_place(&self, key: &LeaseKey, placeholder: &Record) -> Result<(), StoreError> {
        self.reach().await?;
        let mut state = self.cluster.lock();
        let reserved = state.pairs.get(&format!("{RESERVATIONS}{key}"));
        let node = placeholder.node().map(|node| node.as_str().as_bytes());
        if reserved.is_some_and(|pair| Some(&*pair.value) == node) && state.is_free(key) {
            state.put(vec![(record_key(key), placeholder.encode(), None)]);
        }
        Ok(())
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
