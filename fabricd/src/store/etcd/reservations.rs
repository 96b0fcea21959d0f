//! Subnets without a node: those that rest, and those that are reserved.
//!
//! A guard without a record keeps a subnet for the node that had it. It hangs on no lease of etcd's until some node looks
//! for a subnet: that node hangs it on one that ends with the grace. Nobody writes anything before, and a node that comes
//! back puts its guard anew, which takes it off. So a grace may begin late, and never early.

use std::collections::BTreeSet;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse};
use fabric_core::model::Subnet;
use fabric_core::record::{LeaseKey, Record};

use super::Store;
use super::keys::KeyKind;
use crate::store::{ExpiredLease, StoreError};

/// How many operations a transaction of etcd's may have, unless it was told otherwise (`--max-txn-ops`).
const MAX_OPS: usize = 128;

impl Store {
    pub(super) async fn expired_leases(&self, grace: Duration) -> Result<Vec<ExpiredLease>, StoreError> {
        let mut guards = self.guards_without_record().await?;
        let without_end: Vec<&KeyValue> = guards.iter().map(|(_, kv)| kv).filter(|kv| kv.lease() == 0).collect();
        if !without_end.is_empty() {
            self.begin_grace(&without_end, grace).await?;
            guards = self.guards_without_record().await?;
        }
        Ok(guards.into_iter().map(expired).collect())
    }

    /// Guards and leases at one revision.
    pub(super) async fn guards_without_record(&self) -> Result<Vec<(Subnet, KeyValue)>, StoreError> {
        let ranges = Txn::new().and_then([
            TxnOp::get(self.keys.all_guards(), Some(GetOptions::new().with_prefix())),
            TxnOp::get(self.keys.subnets(), Some(GetOptions::new().with_prefix().with_keys_only())),
        ]);
        let (response, _) = self
            .connector
            .ask("look for expired subnets", |client| {
                let (mut kv, ranges) =
                    (client.kv_client().max_decoding_message_size(super::watch::MAX_RESPONSE), ranges.clone());
                async move { kv.txn(ranges).await }
            })
            .await?;
        let mut ranges = response.op_responses().into_iter().map(|range| match range {
            TxnOpResponse::Get(mut range) => range.take_kvs(),
            _ => Vec::new(),
        });
        let (guards, leases) = (ranges.next().unwrap_or_default(), ranges.next().unwrap_or_default());
        let leased: BTreeSet<Subnet> = leases
            .iter()
            .filter_map(|kv| match self.keys.kind(kv.key()) {
                KeyKind::Lease(key) => LeaseKey::decode(&key).ok(),
                _ => None,
            })
            .flat_map(|key| key.subnets().values().copied().collect::<Vec<_>>())
            .collect();
        let guards = guards.into_iter().filter_map(|kv| Some((self.keys.guarded(kv.key())?, kv)));
        Ok(guards.filter(|(subnet, _)| !leased.contains(subnet)).collect())
    }

    /// Hangs guards on a lease that ends with the grace, each as long as nobody has touched it.
    async fn begin_grace(&self, guards: &[&KeyValue], grace: Duration) -> Result<(), StoreError> {
        let lease = self.grant(0, grace).await?;
        for guards in guards.chunks(MAX_OPS) {
            let key = |kv: &KeyValue| kv.key().to_vec();
            let untouched = guards.iter().map(|kv| Compare::mod_revision(key(kv), CompareOp::Equal, kv.mod_revision()));
            let put = |kv: &&KeyValue| TxnOp::put(key(kv), kv.value(), Some(PutOptions::new().with_lease(lease.id)));
            // Lost when somebody else begins it too, or a node has come back: the next one that looks goes on.
            self.transact("begin the grace of subnets", untouched.collect(), guards.iter().map(put).collect(), &[])
                .await?;
        }
        Ok(())
    }

    pub(super) async fn hold_place(&self, key: &LeaseKey, placeholder: &Record) -> Result<(), StoreError> {
        let (record, reservation) = (self.keys.lease(key), self.keys.reservation(key));
        let node = placeholder.node().map(ToString::to_string).unwrap_or_default();
        let reserved_and_free = vec![Compare::value(reservation, CompareOp::Equal, node), self.is_free(key)];
        let put = vec![TxnOp::put(record, placeholder.encode(), None)];
        self.transact("keep a reserved subnet's place", reserved_and_free, put, &[]).await.map(drop)
    }
}

/// What a guard without a record says.
pub(super) fn expired((subnet, guard): (Subnet, KeyValue)) -> ExpiredLease {
    let node = guard.value_str().ok().and_then(|name| name.parse().ok());
    ExpiredLease { subnet, node, mod_revision: guard.mod_revision() }
}
