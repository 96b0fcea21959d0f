//! Stores in which nodes choose their subnets: of many that want one, one gets it, and keeps it while it lives and for a
//! grace beyond.

use std::future::Future;
use std::time::Duration;

use fabric_core::inquiry::{Inquiry, Party};
use fabric_core::leases::LeaseSet;
use fabric_core::model::NodeName;
use fabric_core::record::{Instance, Record};
use fabricd::store::{Claim, Expect, Grant, Inquired, LeaseStore, StoreError};
use tokio::time::timeout;

use super::{PATIENCE, claim, flannel_value, is_lost, join, key, leases, now, settled, shows};

/// A hand that reaches deeper: into keys, and the leases that they hang on.
pub trait Harness: super::Harness {
    /// Writes a key outside the prefix.
    fn put_elsewhere(&self, key: &str, value: &str) -> impl Future<Output = ()> + Send;

    /// The value of a key under the prefix.
    fn get(&self, key: &str) -> impl Future<Output = Option<String>> + Send;

    /// Ends a lease of the store's.
    fn revoke(&self, lease_id: i64) -> impl Future<Output = ()> + Send;
}

/// The same claim, to take over what was last changed at this revision.
fn over(claim: Claim, revision: i64) -> Claim {
    Claim { expect: Expect::Revision(revision), lease_id: fastrand::i64(1..), ..claim }
}

/// The same record with a higher epoch.
fn next_epoch(record: &Record) -> Record {
    let mut record = record.clone();
    if let Some(owner) = &mut record.owner {
        owner.epoch += 1;
    }
    record
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

/// Of many that claim one subnet at once, one gets it.
pub async fn one_of_many_claimers_wins(h: &impl Harness) {
    let stores: Vec<_> = (0..20).map(|_| h.node(1)).collect();
    let mut claims = Vec::new();
    for (number, store) in (1..).zip(&stores) {
        claims.push(claim(number, "10.244.1.0-24", &*now(store).await));
    }
    let answers = futures::future::join_all(stores.iter().zip(&claims).map(|(store, claim)| store.claim(claim))).await;
    let winners: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().ok()).collect();
    assert_eq!((winners.len(), answers.iter().filter(|answer| is_lost(answer)).count()), (1, 19), "{answers:?}");
    assert_eq!(settled(&stores[0], winners[0]).await.len(), 1);
}

/// A claim that was carried out is told when it is asked for again, as after a lost answer: on the same lease, which is
/// kept alive by that, and with nothing written.
pub async fn claim_asked_again_is_the_same(h: &impl Harness) {
    let (store, claim, grant) = join(h, 1, "10.244.1.0-24").await;
    let before = h.revision().await;
    let again = store.claim(&claim).await.expect("ours");
    assert_eq!((again.lease_id, again.mod_revision), (grant.lease_id, grant.mod_revision));
    assert!(again.expires >= grant.expires);
    assert_eq!(h.revision().await, before);
    store.keep_alive(&again).await.expect("its lease stands");
}

/// Different keys that share a subnet in either family exclude each other.
pub async fn overlapping_pairs_are_refused(h: &impl Harness) {
    let store = h.node(1);
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

/// A choice made before the network config changed is void: the subnets may have another size now.
pub async fn claim_decided_under_another_config_is_lost(h: &impl Harness) {
    let store = h.node(1);
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
    let store = h.node(1);
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
    let store = h.node(1);
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
    let store = h.node(1);
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
    let store = h.node(1);
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

/// Nobody assigns anything.
pub async fn nothing_is_assigned(h: &impl Harness) {
    assert!(h.node(1).assigned().is_none());
}

/// A release takes the guards along.
pub async fn release_removes_the_guards(h: &impl Harness) {
    let store = h.node(1);
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    store.release(&grant).await.expect("held");
    leases(&store, "no record", LeaseSet::is_empty).await;
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await, None);
    assert_eq!(h.get("fabric/guard/6/fd00:1::-64").await, None);
}

/// A key that is no subnet is reported.
pub async fn key_that_is_no_subnet_is_reported(h: &impl Harness) {
    let store = h.node(1);
    h.put("subnets/nonsense", "{}").await;
    leases(&store, "an unreadable entry", |set| set.unreadable().contains_key("nonsense")).await;
}

/// After flannel wrote over our record, nothing that was decided before passes; taking it back does.
pub async fn foreign_write_over_a_record_is_noticed(h: &impl Harness) {
    let store = h.node(1);
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
    let store = h.node(1);
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
    let store = h.node(1);
    h.put("subnets/10.244.1.0-24", &flannel_value("192.0.2.1")).await;
    let set = leases(&store, "flannel's record", |set| set.len() == 1).await;
    let revision = set.get(&key("10.244.1.0-24")).expect("there").mod_revision;
    store.claim(&over(claim(1, "10.244.1.0-24", &set), revision)).await.expect("ours by its address");
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await.as_deref(), Some("node-1"));
}

/// A lease that nobody keeps alive ends, and takes the record along. Its guard stays.
pub async fn unkept_lease_expires(h: &impl Harness) {
    let store = h.node(1);
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
    let store = h.node(1);
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.revoke(grant.lease_id).await;
    let gone = leases(&store, "no record", LeaseSet::is_empty).await;
    assert!(matches!(store.keep_alive(&grant).await, Err(StoreError::Expired { .. })));
    store.claim(&claim(1, "10.244.1.0-24", &gone)).await.expect("its own guard");
}

/// A subnet whose lease has ended rests for the grace, its node's until then; after it anybody may have it.
pub async fn freed_subnet_rests_for_a_grace(h: &impl Harness) {
    let store = h.node(1);
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    claimed(&store, 2, "10.244.2.0-24").await;
    h.revoke(grant.lease_id).await;
    let gone = leases(&store, "one record", |set| set.len() == 1).await;
    let other = claim(3, "10.244.1.0-24&fd00:1::-64", &gone);
    let expired = store.expired_leases(Duration::from_secs(600)).await.expect("reachable");
    let mut subnets: Vec<String> = expired.iter().map(|lease| lease.subnet.to_string()).collect();
    subnets.sort();
    assert_eq!(subnets, ["10.244.1.0/24", "fd00:1::/64"], "those with a record don't rest");
    assert!(expired.iter().all(|lease| lease.node.as_ref().is_some_and(|node| node.as_str() == "node-1")));
    assert!(is_guarded(&store.claim(&other).await));
    let again = store.expired_leases(Duration::from_secs(1)).await.expect("reachable");
    assert_eq!(again, expired, "a grace begins once");

    // When there is no other subnet, it may be had all the same.
    let evicting = Claim { evict: expired.iter().map(|lease| lease.mod_revision).collect(), ..other };
    let evicted = store.claim(&evicting).await.expect("told to");
    settled(&store, &evicted).await;
    h.revoke(evicted.lease_id).await;
    let gone = leases(&store, "one record", |set| set.len() == 1).await;
    assert!(is_guarded(&store.claim(&claim(1, "10.244.1.0-24&fd00:1::-64", &gone)).await), "it is the other's now");
    store.expired_leases(Duration::from_secs(1)).await.expect("reachable");
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
    let store = h.node(1);
    let (ours, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.revoke(grant.lease_id).await;
    let gone = leases(&store, "no record", LeaseSet::is_empty).await;
    assert_eq!(store.expired_leases(Duration::from_secs(600)).await.expect("reachable").len(), 1);
    let back = store.claim(&Claim { seen_revision: gone.revision(), ..ours }).await.expect("its own guard");
    settled(&store, &back).await;
    assert!(store.expired_leases(Duration::from_secs(600)).await.expect("reachable").is_empty());
}

/// A reservation shows, and its placeholder is written only while it stands and nobody has the subnet.
pub async fn place_of_a_reserved_subnet_is_held(h: &impl Harness) {
    let store = h.node(1);
    let (place, node) = (key("10.244.1.0-24"), "node-1".parse().expect("a name"));
    let placeholder = Record::placeholder(&node, &place);
    store.hold_place(&place, &placeholder).await.expect("reachable");
    assert_eq!(h.get("subnets/10.244.1.0-24").await, None, "nobody reserved it");
    h.put("fabric/reservations/10.244.1.0-24", "node-1").await;
    leases(&store, "the reservation", |set| set.reservations().contains_key(&place)).await;
    store.hold_place(&place, &placeholder).await.expect("reachable");
    let held = leases(&store, "the placeholder", |set| set.len() == 1).await;
    assert_eq!(held.get(&place).expect("there").record, placeholder);
    assert_eq!(now(&h.node(1)).await.reservations().get(&place), Some(&node), "a list shows it too");
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

/// What somebody else wrote over our record survives our release.
pub async fn release_leaves_a_foreign_record(h: &impl Harness) {
    let store = h.node(1);
    let (_, grant) = claimed(&store, 1, "10.244.1.0-24").await;
    h.put("subnets/10.244.1.0-24", &flannel_value("192.0.2.99")).await;
    store.release(&grant).await.expect("held");
    assert_eq!(h.get("subnets/10.244.1.0-24").await, Some(flannel_value("192.0.2.99")));
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await, None);
}

/// Keys beside the leases, under the prefix or not, are no leases.
pub async fn other_keys_are_ignored(h: &impl Harness) {
    let store = h.node(1);
    h.put("fabric/reservations/10.244.5.0-24", "node-5").await;
    h.put("subnetsish/10.244.5.0-24", &flannel_value("192.0.2.5")).await;
    h.put_elsewhere("subnets/10.244.5.0-24", &flannel_value("192.0.2.5")).await;
    h.put("subnets/10.244.6.0-24", &flannel_value("192.0.2.6")).await;
    let set = leases(&store, "the one lease", |set| !set.is_empty()).await;
    assert_eq!((set.len(), set.unreadable().len()), (1, 0));
    let late = h.node(1);
    assert_eq!(now(&late).await.len(), 1);
}

fn shown<'a>(node: &'a NodeName, inquiry: &'a Inquiry) -> impl Fn(&Inquired) -> bool + 'a {
    move |all| all.get(node) == Some(inquiry)
}

/// Who asks about a name is heard by whoever follows the store, and the answer by who asked; also by those that come later.
pub async fn question_about_a_name_is_heard_and_answered(h: &impl Harness) {
    let (holder, newcomer) = (h.node(1), h.node(1));
    let (_, grant) = claimed(&holder, 1, "10.244.1.0-24").await;
    settled(&newcomer, &grant).await;
    let party = |boot: &str| Party { instance: Instance { boot: boot.into(), netns: 7 }, addresses: vec![], since: 5 };
    let asked = Inquiry { number: 9, by: party("new"), answer: None };
    newcomer.inquire(&grant.node, &asked).await.expect("asked");
    let mut heard = holder.inquiries().expect("nodes choose here");
    shows(&mut heard, "the question", shown(&grant.node, &asked)).await;
    let answered = Inquiry { answer: Some(party("old")), ..asked };
    holder.inquire(&grant.node, &answered).await.expect("answered");
    let mut heard = newcomer.inquiries().expect("nodes choose here");
    shows(&mut heard, "the answer", shown(&grant.node, &answered)).await;
    let late = h.node(2);
    let mut heard = late.inquiries().expect("nodes choose here");
    shows(&mut heard, "what was said before", shown(&grant.node, &answered)).await;
    assert_eq!(now(&newcomer).await.len(), 1, "questions are no leases");
    let left = newcomer.time_left(&grant.key).await.expect("asked").expect("it ends");
    assert!(left <= grant.ttl && left + Duration::from_secs(20) > grant.ttl, "{left:?}");
    assert_eq!(newcomer.time_left(&key("10.244.2.0-24")).await, Ok(None));
}

/// A node that was renamed takes over what it has under its former name: the record, its guards, and what it hung on.
pub async fn renamed_node_takes_its_record_and_guards_over(h: &impl Harness) {
    let store = h.node(1);
    let (before, grant) = claimed(&store, 1, "10.244.1.0-24&fd00:1::-64").await;
    let set = settled(&store, &grant).await;
    let renamed = over(claim(2, "10.244.1.0-24&fd00:1::-64", &set), grant.mod_revision);
    assert!(is_lost(&store.claim(&renamed).await), "another node's");
    let renamed = Claim { formerly: Some(before.node.clone()), lease_id: fastrand::i64(1..), ..renamed };
    let taken = store.claim(&renamed).await.expect("its own");
    assert_eq!(h.get("fabric/guard/4/10.244.1.0-24").await.as_deref(), Some("node-2"));
    assert_eq!(h.get("fabric/guard/6/fd00:1::-64").await.as_deref(), Some("node-2"));
    settled(&store, &taken).await;
    let lease_id = grant.lease_id;
    assert_eq!(store.keep_alive(&grant).await, Err(StoreError::Expired { lease_id }), "nothing hangs on it");
    // With the record gone, too.
    h.delete("subnets/10.244.1.0-24&fd00:1::-64").await;
    let gone = leases(&store, "no record", LeaseSet::is_empty).await;
    let again =
        Claim { formerly: Some("node-2".parse().expect("a name")), ..claim(3, "10.244.1.0-24&fd00:1::-64", &gone) };
    store.claim(&again).await.expect("its own guards");
}
