//! Stores in which the cluster assigns the subnets. What the others do by choice, guard and reservation such a store
//! doesn't offer, and says so instead of seeming to do it.

use std::time::Duration;

use fabric_core::record::Record;
use fabricd::store::{LeaseStore as _, StoreError};

use super::{Harness, claim, is_lost, join, key, now, shows};

/// What is assigned shows, and only that can be claimed.
pub async fn only_what_is_assigned_can_be_claimed(h: &impl Harness) {
    let store = h.node(1);
    let mut assigned = store.assigned().expect("the cluster assigns");
    assert!(is_lost(&store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await), "nothing is assigned yet");
    h.assign(1, &key("10.244.1.0-24&fd00:1::-64")).await;
    let shown = shows(&mut assigned, "the assignment", |assigned| !assigned.subnets.is_empty()).await;
    assert_eq!(shown.subnets, *key("10.244.1.0-24&fd00:1::-64").subnets());
    for other in ["10.244.2.0-24", "10.244.1.0-25", "10.244.1.0-24&fd00:2::-64"] {
        assert!(is_lost(&store.claim(&claim(1, other, &*now(&store).await)).await), "{other}");
    }
    // One family of two is what a network of one family takes.
    store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("assigned");
}

/// A claim of what is said already writes nothing.
pub async fn second_claim_writes_nothing(h: &impl Harness) {
    let (store, claim, grant) = join(h, 1, "10.244.1.0-24").await;
    let before = h.revision().await;
    let again = store.claim(&claim).await.expect("ours");
    assert!(store.rewrite(&again, &claim.record).await.is_ok());
    assert_eq!((again.key, h.revision().await), (grant.key, before));
}

/// Nothing rests and nothing can be kept for anybody: that is the cluster's to do.
pub async fn nothing_rests_and_nothing_is_kept_for_anybody(h: &impl Harness) {
    let store = h.node(1);
    let place = key("10.244.1.0-24");
    let placeholder = Record::placeholder(&"node-9".parse().expect("a name"), &place);
    let refusals = [
        store.expired_leases(Duration::from_secs(1)).await.expect_err("nothing rests"),
        store.hold_place(&place, &placeholder).await.expect_err("nothing is kept"),
    ];
    for refusal in refusals {
        let StoreError::Refused { reason, .. } = &refusal else { panic!("{refusal:?}") };
        assert!(reason.contains("the cluster assigns the subnets"), "{refusal}");
    }
}
