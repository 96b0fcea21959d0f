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
use fabricd::store::{Claim, Connection, Expect, ExpiredLease, Inquired, Network, StoreError};
use tokio::sync::watch::{Receiver, Sender};
use tokio::time::{Instant, sleep_until};

use crate::revisions::Owners;

mod handle;

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
    inquiries: Inquired,
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
        self.lease.filter(|_| record.node().is_some_and(|node| claim.is_by(node)))
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
    inquiries: Sender<Inquired>,
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
    given_up: u32,
    claims_to_lose: u32,
    answers_to_lose: u32,
}

/// One node's handle; what it does is in [`handle`].
pub struct MemoryStore {
    cluster: MemoryCluster,
    node: Arc<Node>,
}

impl MemoryCluster {
    /// One more node's handle. It sees the store as soon as the runtime gets to it.
    #[must_use]
    pub fn node(&self) -> MemoryStore {
        let store = self.unanswered_node();
        let (cluster, connecting) = (self.clone(), Arc::downgrade(&store.node));
        tokio::spawn(async move {
            if let Some(node) = connecting.upgrade() {
                cluster.lock().list(&node);
            }
        });
        store
    }

    /// One that the store hasn't answered yet, until [`MemoryStore::set_reachable`].
    #[must_use]
    pub fn unanswered_node(&self) -> MemoryStore {
        let mut state = self.lock();
        let node = Arc::new(Node {
            network: Sender::new(Network::Unknown),
            leases: Sender::new(None),
            connection: Sender::new(Connection::Unknown),
            inquiries: Sender::new(Inquired::default()),
            replaced: Sender::new(0),
            since: state.generation,
            faults: Mutex::default(),
        });
        state.nodes.push(Arc::downgrade(&node));
        drop(state);
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
        node.inquiries.send_replace(self.inquiries.clone());
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
            let names = |pair: &Pair, node: &NodeName| pair.value == node.as_str().as_bytes();
            let is_ours =
                |pair: &Pair| names(pair, &claim.node) || claim.formerly.as_ref().is_some_and(|node| names(pair, node));
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
    fn expired(&self) -> Vec<(String, ExpiredLease)> {
        let records = self.pairs.keys().filter_map(|key| LeaseKey::decode(key.strip_prefix(SUBNETS)?).ok());
        let leased: Vec<Subnet> = records.flat_map(|key| key.subnets().values().copied().collect::<Vec<_>>()).collect();
        let expired = |(key, pair): (&String, &Pair)| {
            let subnet = guarded(key).filter(|subnet| !leased.contains(subnet))?;
            let node = std::str::from_utf8(&pair.value).ok().and_then(|name| name.parse().ok());
            Some((key.clone(), ExpiredLease { subnet, node, mod_revision: pair.mod_revision }))
        };
        self.pairs.iter().filter_map(expired).collect()
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
    format!("{SUBNETS}{}", key.encode())
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
