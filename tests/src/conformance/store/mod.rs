//! What lease stores promise, as tests that run on [`MemoryStore`](crate::memory_store::MemoryStore), on etcd and on
//! Kubernetes.
//!
//! Here is what all promise. In some stores nodes choose their subnets and defend them ([`choosing`]), in others the
//! cluster assigns them ([`assigned`]); which one it is a store says by [`LeaseStore::assigned`].
//!
//! Nothing here waits for time to pass: [`shows`] waits for a condition, and fails when it takes too long.

pub mod assigned;
pub mod choosing;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::leases::LeaseSet;
use fabric_core::model::{MacAddr, PerFamily, Vni};
use fabric_core::record::{Backend, Endpoint, LeaseKey, Owner, Record};
use fabricd::store::{Claim, Expect, Grant, LeaseStore, Network, StoreError};
use tokio::sync::watch::Receiver;
use tokio::time::timeout;

/// How long a condition may take to come true, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// The lifetime of leases that are not meant to end.
const TTL: Duration = Duration::from_secs(600);

/// A store, its nodes, and a hand that reaches into it from outside.
pub trait Harness: Sync {
    /// The store under test.
    type Store: LeaseStore;

    /// The store as `node-<number>` sees it.
    fn node(&self, number: u8) -> Self::Store;

    /// Assigns subnets to `node-<number>`, where that is the cluster's affair.
    fn assign(&self, number: u8, subnets: &LeaseKey) -> impl Future<Output = ()> + Send;

    /// Writes a key under the prefix as flannel or a person would: whatever is there, and without a lease.
    fn put(&self, key: &str, value: &str) -> impl Future<Output = ()> + Send;

    /// Deletes a key under the prefix.
    fn delete(&self, key: &str) -> impl Future<Output = ()> + Send;

    /// The revision of the last write.
    fn revision(&self) -> impl Future<Output = i64> + Send;
}

/// Waits until what a receiver shows fulfils a condition, and gives it.
///
/// # Panics
/// When that takes too long; `what` says what was waited for.
pub async fn shows<T: Clone + std::fmt::Debug>(
    receiver: &mut Receiver<T>,
    what: &str,
    condition: impl FnMut(&T) -> bool,
) -> T {
    let found =
        timeout(PATIENCE, receiver.wait_for(condition)).await.map(|found| found.expect("the store lives").clone());
    found.unwrap_or_else(|_| panic!("never came: {what}; now {:?}", *receiver.borrow()))
}

/// Waits until a store's leases fulfil a condition, and gives them.
pub async fn leases(
    store: &impl LeaseStore,
    what: &str,
    mut condition: impl FnMut(&LeaseSet) -> bool,
) -> Arc<LeaseSet> {
    let shown = shows(&mut store.leases(), what, |set| set.as_deref().is_some_and(&mut condition)).await;
    shown.expect("just seen")
}

/// A lease key such as `10.244.1.0-24`.
#[must_use]
pub fn key(text: &str) -> LeaseKey {
    LeaseKey::decode(text).expect("a key")
}

/// The value that flannel writes for a node with this underlay address.
#[must_use]
pub fn flannel_value(underlay_ip: &str) -> String {
    format!(
        r#"{{"PublicIP":"{underlay_ip}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}}}"#
    )
}

/// The claim of `node-<number>` for a key that it takes to be free.
#[must_use]
pub fn claim(number: u8, subnets: &str, seen: &LeaseSet) -> Claim {
    let key = key(subnets);
    let mac = MacAddr::try_from([2, 0x42, 0xc0, 0, 2, number]).expect("unicast");
    let endpoint = |public_ip: String| Endpoint {
        public_ip: public_ip.parse().expect("an address"),
        vtep_mac: mac,
        vni: Vni::DEFAULT,
    };
    let endpoints = PerFamily {
        v4: key.subnets().v4.map(|_| endpoint(format!("192.0.2.{number}"))),
        v6: key.subnets().v6.map(|_| endpoint(format!("2001:db8::{number:x}"))),
    };
    let node = format!("node-{number}").parse().expect("a name");
    let owner = Owner {
        version: Owner::VERSION,
        node,
        boot: "3f2a".into(),
        netns: 4_026_531_840,
        epoch: 1,
        taken_from: None,
        taken_back: false,
        unknown: serde_json::Map::new(),
    };
    let node = owner.node.clone();
    let record = Record { backend: Backend::Vxlan(endpoints), owner: Some(owner), unknown: serde_json::Map::new() };
    let seen_revision = seen.revision();
    let (expect, lease_id) = (Expect::Absent, fastrand::i64(1..));
    Claim {
        node,
        key,
        record,
        expect,
        seen_revision,
        outdated: false,
        evict: vec![],
        formerly: None,
        ttl: TTL,
        lease_id,
    }
}

/// The leases as the store shows them now, as soon as it shows any.
pub async fn now(store: &impl LeaseStore) -> Arc<LeaseSet> {
    leases(store, "a snapshot", |_| true).await
}

/// Waits until the store shows what this grant wrote.
async fn settled(store: &impl LeaseStore, grant: &Grant) -> Arc<LeaseSet> {
    let written = |set: &LeaseSet| set.get(&grant.key).is_some_and(|lease| lease.mod_revision == grant.mod_revision);
    leases(store, "the record that was written", written).await
}

/// Has `node-<number>` lease these subnets, assigned where that is so; gives its store too.
async fn join<H: Harness>(h: &H, number: u8, subnets: &str) -> (H::Store, Claim, Grant) {
    let (store, key) = (h.node(number), key(subnets));
    h.assign(number, &key).await;
    if let Some(mut assigned) = store.assigned() {
        shows(&mut assigned, "the assignment", |assigned| assigned.subnets == *key.subnets()).await;
    }
    let claim = claim(number, subnets, &*now(&store).await);
    let grant = store.claim(&claim).await.expect("nobody else claims it");
    settled(&store, &grant).await;
    (store, claim, grant)
}

fn is_lost<T: std::fmt::Debug>(answer: &Result<T, StoreError>) -> bool {
    matches!(answer, Err(StoreError::Lost { .. }))
}

/// Nothing is known before the first snapshot; an empty store then shows an empty set, not none.
pub async fn leases_are_unknown_until_the_snapshot(h: &impl Harness) {
    let store = h.node(1);
    assert_eq!((store.leases().borrow().clone(), store.network().borrow().clone()), (None, Network::Unknown));
    assert!(now(&store).await.is_empty());
}

/// The network config is followed through every state that it can have.
pub async fn network_config_is_followed(h: &impl Harness) {
    let (store, config) = (h.node(1), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut network = store.network();
    shows(&mut network, "a missing config", |network| *network == Network::Missing).await;
    for _ in 0..2 {
        h.put("config", config).await;
        let valid = shows(&mut network, "the config", |network| matches!(network, Network::Valid(_))).await;
        let Network::Valid(valid) = valid else { unreachable!("just matched") };
        assert_eq!(valid.spaces.v4.expect("IPv4").network.to_string(), "10.244.0.0/16");
        h.put("config", "{").await;
        shows(&mut network, "a broken config", |network| matches!(network, Network::Invalid(_))).await;
    }
    h.delete("config").await;
    shows(&mut network, "a missing config", |network| *network == Network::Missing).await;
}

/// A config that is written again as it was wakes nobody.
pub async fn unchanged_network_config_is_not_announced(h: &impl Harness) {
    let (store, config) = (h.node(1), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut network = store.network();
    h.put("config", config).await;
    shows(&mut network, "the config", |network| matches!(network, Network::Valid(_))).await;
    h.put("config", config).await;
    h.put("subnets/10.244.9.0-24", &flannel_value("192.0.2.9")).await;
    leases(&store, "a lease written after it", |set| set.len() == 1).await;
    assert!(!network.has_changed().expect("the store lives"));
}

/// What others lease meanwhile doesn't spoil a claim, unless it is the same subnet.
pub async fn claim_on_an_older_set_stands(h: &impl Harness) {
    let store = h.node(2);
    h.assign(2, &key("10.244.2.0-24")).await;
    let older = now(&store).await;
    join(h, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.3.0-24&fd00:3::-64", &flannel_value("192.0.2.3")).await;
    leases(&store, "both", |set| set.len() + set.unreadable().len() == 2).await;
    for taken in ["10.244.1.0-24", "10.244.3.0-24", "10.244.3.0-24&fd00:4::-64"] {
        assert!(is_lost(&store.claim(&claim(2, taken, &older)).await), "{taken}");
    }
    store.claim(&claim(2, "10.244.2.0-24", &older)).await.expect("free");
}

/// Keeping alive moves the end and writes nothing: flannel's watchers see no event.
pub async fn keep_alive_extends_and_writes_nothing(h: &impl Harness) {
    let (store, _, grant) = join(h, 1, "10.244.1.0-24").await;
    let before = h.revision().await;
    let kept = store.keep_alive(&grant).await.expect("alive");
    assert!(kept.expires >= grant.expires);
    assert_eq!(Grant { expires: grant.expires, ..kept }, grant);
    assert_eq!(h.revision().await, before);
}

/// A release takes the record and its guards away, twice is no error, and others' leases stay.
pub async fn release_removes_ours_alone(h: &impl Harness) {
    let (store, _, grant) = join(h, 1, "10.244.1.0-24&fd00:1::-64").await;
    let (_, _, other) = join(h, 2, "10.244.2.0-24").await;
    store.release(&grant).await.expect("held");
    let left = leases(&store, "one record", |set| set.len() == 1).await;
    assert!(left.get(&other.key).is_some() && left.departed().is_empty(), "it doesn't come back");
    store.release(&grant).await.expect("gone is fine");
    join(h, 1, "10.244.1.0-24&fd00:1::-64").await;
}

/// A value that can't be read keeps the last good one, and is reported.
pub async fn unreadable_record_keeps_the_last_good_one(h: &impl Harness) {
    let (store, claim, grant) = join(h, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.1.0-24", "garbage").await;
    let set = leases(&store, "an unreadable entry", |set| set.unreadable().len() == 1).await;
    let kept = set.get(&claim.key).expect("the last good one");
    assert_eq!((set.len(), kept.mod_revision), (1, grant.mod_revision));
    assert_eq!(kept.record.endpoints(), claim.record.endpoints());
}

/// A lease that flannel wrote is one like any other.
pub async fn flannel_record_appears(h: &impl Harness) {
    let store = h.node(1);
    h.put("subnets/10.244.7.0-24", &flannel_value("192.0.2.7")).await;
    let set = leases(&store, "flannel's record", |set| set.len() == 1).await;
    let lease = set.get(&key("10.244.7.0-24")).expect("there");
    let address = lease.record.endpoints().v4.expect("IPv4").public_ip;
    assert_eq!(address.to_string(), "192.0.2.7");
    h.delete("subnets/10.244.7.0-24").await;
    leases(&store, "no record", LeaseSet::is_empty).await;
}
