//! What every lease store promises, as tests that run on [`MemoryStore`](crate::memory_store::MemoryStore) and on etcd.
//!
//! Nothing here waits for time to pass: [`shows`] waits for a condition, and fails when it takes too long.

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

    /// One more node's store.
    fn node(&self) -> Self::Store;

    /// Writes a key under the prefix as flannel or a person would: whatever is there, and without a lease.
    fn put(&self, key: &str, value: &str) -> impl Future<Output = ()> + Send;

    /// Writes a key outside the prefix.
    fn put_elsewhere(&self, key: &str, value: &str) -> impl Future<Output = ()> + Send;

    /// Deletes a key under the prefix.
    fn delete(&self, key: &str) -> impl Future<Output = ()> + Send;

    /// The value of a key under the prefix.
    fn get(&self, key: &str) -> impl Future<Output = Option<String>> + Send;

    /// The revision of the last write.
    fn revision(&self) -> impl Future<Output = i64> + Send;

    /// Ends a lease of the store's.
    fn revoke(&self, lease_id: i64) -> impl Future<Output = ()> + Send;
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
        unknown: serde_json::Map::new(),
    };
    let node = owner.node.clone();
    let record = Record { backend: Backend::Vxlan(endpoints), owner: Some(owner), unknown: serde_json::Map::new() };
    let seen_revision = seen.revision();
    Claim { node, key, record, expect: Expect::Absent, seen_revision, outdated: false, evict: vec![], ttl: TTL }
}

/// The same claim, to take over what was last changed at this revision.
fn over(claim: Claim, revision: i64) -> Claim {
    Claim { expect: Expect::Revision(revision), ..claim }
}

/// The same record with a higher epoch.
fn next_epoch(record: &Record) -> Record {
    let mut record = record.clone();
    if let Some(owner) = &mut record.owner {
        owner.epoch += 1;
    }
    record
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

async fn claimed(store: &impl LeaseStore, number: u8, subnets: &str) -> (Claim, Grant) {
    let claim = claim(number, subnets, &*now(store).await);
    let grant = store.claim(&claim).await.expect("nobody else claims it");
    settled(store, &grant).await;
    (claim, grant)
}

fn is_guarded<T: std::fmt::Debug>(answer: &Result<T, StoreError>) -> bool {
    matches!(answer, Err(StoreError::Guarded { .. }))
}

fn is_lost<T: std::fmt::Debug>(answer: &Result<T, StoreError>) -> bool {
    matches!(answer, Err(StoreError::Lost { .. }))
}

/// Nothing is known before the first snapshot; an empty store then shows an empty set, not none.
pub async fn leases_are_unknown_until_the_snapshot(h: &impl Harness) {
    let store = h.node();
    assert_eq!((store.leases().borrow().clone(), store.network().borrow().clone()), (None, Network::Unknown));
    assert!(now(&store).await.is_empty());
}

/// The network config is followed through every state that it can have.
pub async fn network_config_is_followed(h: &impl Harness) {
    let (store, config) = (h.node(), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
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
    let (store, config) = (h.node(), r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#);
    let mut network = store.network();
    h.put("config", config).await;
    shows(&mut network, "the config", |network| matches!(network, Network::Valid(_))).await;
    h.put("config", config).await;
    h.put("subnets/10.244.9.0-24", &flannel_value("192.0.2.9")).await;
    leases(&store, "a lease written after it", |set| set.len() == 1).await;
    assert!(!network.has_changed().expect("the store lives"));
}

/// Of many that claim one subnet at once, one gets it.
pub async fn one_of_many_claimers_wins(h: &impl Harness) {
    let stores: Vec<_> = (0..20).map(|_| h.node()).collect();
    let mut claims = Vec::new();
    for (number, store) in (1..).zip(&stores) {
        claims.push(claim(number, "10.244.1.0-24", &*now(store).await));
    }
    let answers = futures::future::join_all(stores.iter().zip(&claims).map(|(store, claim)| store.claim(claim))).await;
    let winners: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    assert_eq!((winners.len(), answers.iter().filter(|answer| is_lost(answer)).count()), (1, 19), "{answers:?}");
    assert_eq!(settled(&stores[0], winners[0]).await.len(), 1);
}

/// Different keys that share a subnet in either family exclude each other.
pub async fn overlapping_pairs_are_refused(h: &impl Harness) {
    let store = h.node();
    claimed(&store, 1, "10.244.1.0-24").await;
    claimed(&store, 2, "10.244.2.0-24&fd00:2::-64").await;
    claimed(&store, 3, "0.0.0.0-0&fd00:3::-64").await;
    let before = h.revision().await;
    for subnets in ["10.244.1.0-24&fd00:1::-64", "10.244.2.0-24", "0.0.0.0-0&fd00:2::-64", "10.244.9.0-24&fd00:3::-64"]
    {
        let answer = store.claim(&claim(9, subnets, &*now(&store).await)).await;
        assert!(is_lost(&answer) || is_guarded(&answer), "{subnets}: {answer:?}");
    }
    assert_eq!(h.revision().await, before, "a claim that is lost writes nothing");
}

/// What others lease meanwhile doesn't spoil a claim, unless it is the same subnet.
pub async fn claim_on_an_older_set_stands(h: &impl Harness) {
    let store = h.node();
    let older = now(&store).await;
    claimed(&store, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.3.0-24&fd00:3::-64", &flannel_value("192.0.2.3")).await;
    for taken in ["10.244.1.0-24", "10.244.3.0-24", "10.244.3.0-24&fd00:4::-64"] {
        assert!(is_lost(&store.claim(&claim(2, taken, &older)).await), "{taken}");
    }
    store.claim(&claim(2, "10.244.2.0-24", &older)).await.expect("free");
}

/// A choice made before the network config changed is void: the subnets may have another size now.
pub async fn claim_decided_under_another_config_is_lost(h: &impl Harness) {
    let store = h.node();
    let older = claim(1, "10.244.1.0-24", &*now(&store).await);
    h.put("config", r#"{"Network":"10.244.0.0/16","SubnetLen":25,"Backend":{"Type":"vxlan"}}"#).await;
    assert!(is_lost(&store.claim(&older).await));
    let changed = h.revision().await;
    let set = leases(&store, "a set younger than the config", |set| set.revision() >= changed).await;
    store.claim(&Claim { seen_revision: set.revision(), ..older }).await.expect("decided anew");
}

/// Under two configs subnets have two sizes, which no guard keeps apart: of two claims that have not seen each other, one
/// under the config of before, the second is lost.
pub async fn claims_under_two_configs_never_overlap(h: &impl Harness) {
    let store = h.node();
    let outdated = |claim: Claim| Claim { outdated: true, ..claim };
    let seen = now(&store).await;
    store.claim(&outdated(claim(1, "10.244.1.0-24", &seen))).await.expect("free");
    assert!(is_lost(&store.claim(&claim(2, "10.244.1.0-25", &seen)).await), "it has not seen the first");
    assert!(is_lost(&store.claim(&outdated(claim(3, "10.244.0.0-23", &seen))).await), "nor has this one");
    let seen = leases(&store, "the first", |set| set.len() == 1).await;
    store.claim(&claim(2, "10.244.2.0-25", &seen)).await.expect("decided anew");
    assert!(is_lost(&store.claim(&outdated(claim(3, "10.244.2.0-24", &seen))).await), "it has not seen the second");
    let seen = leases(&store, "the second", |set| set.len() == 2).await;
    store.claim(&outdated(claim(3, "10.244.3.0-24", &seen))).await.expect("decided anew");
}

/// The value is flannel's to the letter, with our member in it.
pub async fn record_is_stored_as_flannel_writes_it(h: &impl Harness) {
    let store = h.node();
    claimed(&store, 1, "10.244.1.0-24").await;
    claimed(&store, 2, "10.244.2.0-24&fd00:2::-64").await;
    let fabric = |node| format!(r#""Fabric":{{"boot":"3f2a","epoch":1,"netns":4026531840,"node":"{node}","v":1}}"#);
    assert_eq!(
        h.get("subnets/10.244.1.0-24").await.expect("stored"),
        format!(
            r#"{{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"}},{}}}"#,
            fabric("node-1")
        )
    );
    assert_eq!(
        h.get("subnets/10.244.2.0-24&fd00:2::-64").await.expect("stored"),
        format!(
            r#"{{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}},{}}}"#,
            fabric("node-2")
        )
    );
    assert_eq!(h.get("fabric/guard/4/10.244.2.0-24").await.as_deref(), Some("node-2"));
    assert_eq!(h.get("fabric/guard/6/fd00:2::-64").await.as_deref(), Some("node-2"));
}

/// A rewrite moves the record's revision, and only its latest grant may write again.
pub async fn rewrite_compares_the_revision(h: &impl Harness) {
    let store = h.node();
    let (claim, first) = claimed(&store, 1, "10.244.1.0-24").await;
    let record = next_epoch(&claim.record);
    let second = store.rewrite(&first, &record).await.expect("held");
    assert!(second.mod_revision > first.mod_revision);
    assert_eq!((second.lease_id, second.expires), (first.lease_id, first.expires));
    assert_eq!(settled(&store, &second).await.get(&claim.key).expect("there").record, record);
    assert!(is_lost(&store.rewrite(&first, &claim.record).await), "an old grant");
    store.keep_alive(&second).await.expect("still on its lease");
}

/// A node that comes back without its grant takes its record over, onto a fresh lease.
pub async fn own_record_is_taken_over_by_its_revision(h: &impl Harness) {
    let store = h.node();
    let (claim, old) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    let new = store.claim(&over(claim.clone(), old.mod_revision)).await.expect("ours");
    assert!(new.mod_revision > old.mod_revision && new.lease_id != old.lease_id);
    assert!(is_lost(&store.claim(&over(claim.clone(), old.mod_revision)).await), "the revision has moved on");
    assert!(is_lost(&store.rewrite(&old, &claim.record).await), "the old grant has ended");
    assert!(matches!(store.keep_alive(&old).await, Err(StoreError::Expired { .. })), "its lease is not left behind");
    claimed(&store, 2, "10.244.2.0-24").await;
    assert!(h.get("subnets/10.244.1.0-24&fd00:1::-64").await.is_some(), "it hangs on the new lease");
    assert!(h.get("fabric/guard/6/fd00:1::-64").await.is_some(), "its guards too");
}

/// After flannel wrote over our record, nothing that was decided before passes; taking it back does.
pub async fn foreign_write_over_a_record_is_noticed(h: &impl Harness) {
    let store = h.node();
    let (claim, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.1.0-24", &flannel_value("192.0.2.99")).await;
    assert!(is_lost(&store.rewrite(&grant, &claim.record).await));
    assert!(is_lost(&store.claim(&over(claim.clone(), grant.mod_revision)).await));
    let foreign = leases(&store, "flannel's record", |set| {
        set.get(&claim.key).is_some_and(|lease| lease.record.node().is_none())
    });
    let foreign = foreign.await.get(&claim.key).expect("there").clone();
    assert_eq!((foreign.mod_revision > grant.mod_revision, foreign.holder()), (true, "192.0.2.99".into()));
    store.claim(&over(claim, foreign.mod_revision)).await.expect("decided on what is there");
}

/// When a record is gone its guards stand: its owner may take the subnet back, and nobody else.
pub async fn guard_outlives_its_record_for_its_owner(h: &impl Harness) {
    let store = h.node();
    let (ours, _) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    h.delete("subnets/10.244.1.0-24&fd00:1::-64").await;
    let gone = leases(&store, "no record", |set| set.is_empty()).await;
    assert!(is_guarded(&store.claim(&claim(2, "10.244.1.0-24&fd00:1::-64", &gone)).await));
    assert!(is_guarded(&store.claim(&claim(2, "10.244.1.0-24", &gone)).await));
    let back = store.claim(&Claim { seen_revision: gone.revision(), ..ours }).await.expect("its own guard");
    settled(&store, &back).await;
}

/// A flannel node's subnet that is taken over by fabricd on the same node gets its guards.
pub async fn taking_over_a_flannel_record_creates_the_guards(h: &impl Harness) {
    let store = h.node();
    h.put("subnets/10.244.1.0-24", &flannel_value("192.0.2.1")).await;
    let set = leases(&store, "flannel's record", |set| set.len() == 1).await;
    let revision = set.get(&key("10.244.1.0-24")).expect("there").mod_revision;
    store.claim(&over(claim(1, "10.244.1.0-24", &set), revision)).await.expect("ours by its address");
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await.as_deref(), Some("node-1"));
}

/// Keeping alive moves the end and writes nothing: flannel's watchers see no event.
pub async fn keep_alive_extends_and_writes_nothing(h: &impl Harness) {
    let store = h.node();
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    let before = h.revision().await;
    let kept = store.keep_alive(&grant).await.expect("alive");
    assert!(kept.expires >= grant.expires);
    assert_eq!(Grant { expires: grant.expires, ..kept }, grant);
    assert_eq!(h.revision().await, before);
}

/// A lease that nobody keeps alive ends, and takes the record along. Its guard stays.
pub async fn unkept_lease_expires(h: &impl Harness) {
    let store = h.node();
    let short = Claim { ttl: Duration::from_secs(1), ..claim(1, "10.244.1.0-24", &*now(&store).await) };
    let grant = store.claim(&short).await.expect("free");
    settled(&store, &grant).await;
    let ended = leases(&store, "the end of the lease", LeaseSet::is_empty).await;
    assert!(ended.departed().contains_key(&grant.key), "its node may come back");
    let lease_id = grant.lease_id;
    assert_eq!(store.keep_alive(&grant).await, Err(StoreError::Expired { lease_id }));
    assert!(is_lost(&store.rewrite(&grant, &short.record).await));
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await.as_deref(), Some("node-1"));
}

/// A revoked lease is gone at once, and its node may have the subnet again.
pub async fn revoked_lease_is_gone(h: &impl Harness) {
    let store = h.node();
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.revoke(grant.lease_id).await;
    let gone = leases(&store, "no record", LeaseSet::is_empty).await;
    assert!(matches!(store.keep_alive(&grant).await, Err(StoreError::Expired { .. })));
    store.claim(&claim(1, "10.244.1.0-24", &gone)).await.expect("its own guard");
}

/// A subnet whose lease has ended rests for the grace, its node's until then; after it anybody may have it.
pub async fn freed_subnet_rests_for_a_grace(h: &impl Harness) {
    let store = h.node();
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    claimed(&store, 2, "10.244.2.0-24").await;
    h.revoke(grant.lease_id).await;
    let gone = leases(&store, "one record", |set| set.len() == 1).await;
    let other = claim(3, "10.244.1.0-24&fd00:1::-64", &gone);
    let resting = store.resting(Duration::from_secs(600)).await.expect("reachable");
    let mut subnets: Vec<String> = resting.iter().map(|rest| rest.subnet.to_string()).collect();
    subnets.sort();
    assert_eq!(subnets, ["10.244.1.0/24", "fd00:1::/64"], "those with a record don't rest");
    assert!(resting.iter().all(|rest| rest.node.as_ref().is_some_and(|node| node.as_str() == "node-1")));
    assert!(is_guarded(&store.claim(&other).await));
    let again = store.resting(Duration::from_secs(1)).await.expect("reachable");
    assert_eq!(again, resting, "a grace begins once");

    // When there is no other subnet, it may be had all the same.
    let evicting = Claim { evict: resting.iter().map(|rest| rest.mod_revision).collect(), ..other };
    let evicted = store.claim(&evicting).await.expect("told to");
    settled(&store, &evicted).await;
    h.revoke(evicted.lease_id).await;
    let gone = leases(&store, "one record", |set| set.len() == 1).await;
    assert!(is_guarded(&store.claim(&claim(1, "10.244.1.0-24&fd00:1::-64", &gone)).await), "it is the other's now");
    store.resting(Duration::from_secs(1)).await.expect("reachable");
    let over = async {
        while h.get("fabric/guard/4/10.244.1.0-24").await.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, over).await.expect("the grace ends");
    leases(&store, "nobody who may come back", |set| set.departed().is_empty()).await;
    store.claim(&claim(4, "10.244.1.0-24&fd00:1::-64", &gone)).await.expect("the grace is over");
}

/// A node that comes back while its subnet rests has it again, and no grace ends what it holds.
pub async fn claim_ends_the_rest(h: &impl Harness) {
    let store = h.node();
    let (ours, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.revoke(grant.lease_id).await;
    let gone = leases(&store, "no record", LeaseSet::is_empty).await;
    assert_eq!(store.resting(Duration::from_secs(600)).await.expect("reachable").len(), 1);
    let back = store.claim(&Claim { seen_revision: gone.revision(), ..ours }).await.expect("its own guard");
    settled(&store, &back).await;
    assert!(store.resting(Duration::from_secs(600)).await.expect("reachable").is_empty());
}

/// A reservation shows, and its placeholder is written only while it stands and nobody has the subnet.
pub async fn place_of_a_reserved_subnet_is_held(h: &impl Harness) {
    let store = h.node();
    let (place, node) = (key("10.244.1.0-24"), "node-1".parse().expect("a name"));
    let placeholder = Record::placeholder(&node, &place);
    store.hold_place(&place, &placeholder).await.expect("reachable");
    assert_eq!(h.get("subnets/10.244.1.0-24").await, None, "nobody reserved it");
    h.put("fabric/reservations/10.244.1.0-24", "node-1").await;
    leases(&store, "the reservation", |set| set.reservations().contains_key(&place)).await;
    store.hold_place(&place, &placeholder).await.expect("reachable");
    let held = leases(&store, "the placeholder", |set| set.len() == 1).await;
    assert_eq!(held.get(&place).expect("there").record, placeholder);
    assert_eq!(now(&h.node()).await.reservations().get(&place), Some(&node), "a list shows it too");
    // Its node takes its place, and that isn't touched any more.
    let revision = held.get(&place).expect("there").mod_revision;
    let grant = store.claim(&over(claim(1, "10.244.1.0-24", &held), revision)).await.expect("kept for it");
    settled(&store, &grant).await;
    let before = h.revision().await;
    store.hold_place(&place, &placeholder).await.expect("reachable");
    assert_eq!(h.revision().await, before);
    h.delete("fabric/reservations/10.244.1.0-24").await;
    leases(&store, "no reservation", |set| set.reservations().is_empty()).await;
}

/// A release takes the record and its guards away, twice is no error, and others' leases stay.
pub async fn release_removes_ours_alone(h: &impl Harness) {
    let store = h.node();
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    let (_, other) = claimed(&store, 2, "10.244.2.0-24").await;
    store.release(&grant).await.expect("held");
    let left = leases(&store, "one record", |set| set.len() == 1).await;
    assert!(left.get(&other.key).is_some() && left.departed().is_empty(), "it doesn't come back");
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await, None);
    assert_eq!(h.get("fabric/guard/6/fd00:1::-64").await, None);
    store.release(&grant).await.expect("gone is fine");
}

/// What somebody else wrote over our record survives our release.
pub async fn release_leaves_a_foreign_record(h: &impl Harness) {
    let store = h.node();
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.1.0-24", &flannel_value("192.0.2.99")).await;
    store.release(&grant).await.expect("held");
    assert_eq!(h.get("subnets/10.244.1.0-24").await, Some(flannel_value("192.0.2.99")));
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await, None);
}

/// A value that can't be read keeps the last good one, and is reported.
pub async fn unreadable_record_keeps_the_last_good_one(h: &impl Harness) {
    let store = h.node();
    let (claim, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.1.0-24", "garbage").await;
    h.put("subnets/nonsense", "{}").await;
    let set = leases(&store, "two unreadable entries", |set| set.unreadable().len() == 2).await;
    let kept = set.get(&claim.key).expect("the last good one");
    assert_eq!((set.len(), kept.mod_revision, &kept.record), (1, grant.mod_revision, &claim.record));
}

/// A lease that flannel wrote is one like any other.
pub async fn flannel_record_appears(h: &impl Harness) {
    let store = h.node();
    h.put("subnets/10.244.7.0-24", &flannel_value("192.0.2.7")).await;
    let set = leases(&store, "flannel's record", |set| set.len() == 1).await;
    let lease = set.get(&key("10.244.7.0-24")).expect("there");
    assert_eq!((lease.holder(), lease.record.node()), ("192.0.2.7".into(), None));
    h.delete("subnets/10.244.7.0-24").await;
    leases(&store, "no record", LeaseSet::is_empty).await;
}

/// Keys beside the leases, under the prefix or not, are no leases.
pub async fn other_keys_are_ignored(h: &impl Harness) {
    let store = h.node();
    h.put("fabric/reservations/10.244.5.0-24", "node-5").await;
    h.put("subnetsish/10.244.5.0-24", &flannel_value("192.0.2.5")).await;
    h.put_elsewhere("subnets/10.244.5.0-24", &flannel_value("192.0.2.5")).await;
    h.put("subnets/10.244.6.0-24", &flannel_value("192.0.2.6")).await;
    let set = leases(&store, "the one lease", |set| !set.is_empty()).await;
    assert_eq!((set.len(), set.unreadable().len()), (1, 0));
    let late = h.node();
    assert_eq!(now(&late).await.len(), 1);
}
