//! What a person does to leases: look, reserve, and take away. Each is one transaction that compares what was seen.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, TxnOp};
use fabric_core::lease::ExpiredLease;
use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::NodeName;
use fabric_core::record::{LeaseKey, Record};

use super::txn::Outcome;
use super::{Etcd, Store};
use crate::store::{LeaseStore as _, StoreError};

/// All that is known of subnets that are not simply free.
#[derive(Clone, Debug)]
pub struct Overview {
    /// Leases and reservations.
    pub leases: Arc<LeaseSet>,
    /// Subnets whose lease has ended, in their grace period.
    pub expired: Vec<ExpiredLease>,
}

impl Etcd {
    /// Leases, reservations and expired subnets. No grace begins because somebody looks.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    pub async fn overview(&self) -> Result<Overview, StoreError> {
        let leases = self.listed().await?;
        let guards = self.store.guards_without_record().await?;
        Ok(Overview { leases, expired: guards.into_iter().map(super::reservations::expired).collect() })
    }

    /// How long a lease lasts unless it is kept alive; `None` for a record that hangs on none, and stays for ever.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    pub async fn time_left(&self, lease: &Lease) -> Result<Option<Duration>, StoreError> {
        self.store.time_left(&lease.key).await
    }

    /// Keeps a subnet for a node: also while it is away, and from flannel too.
    ///
    /// # Errors
    /// [`StoreError::Refused`] when it is another node's, `Unreachable`.
    pub async fn reserve(&self, node: &NodeName, key: &LeaseKey) -> Result<(), StoreError> {
        let leases = self.listed().await?;
        let refused = |reason: String| StoreError::Refused { operation: RESERVE, reason };
        let subnets = || key.subnets().values().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
        // Before the record: that of a reservation whose node is away is a placeholder, which no node can renumber.
        if let Some(other) = leases.reservations().get(key).filter(|other| *other != node) {
            let told =
                format!("{} is reserved for {other}; end that with: fabricctl lease unreserve {other}", subnets());
            return Err(refused(told));
        }
        let held = leases.iter().find(|lease| lease.key == *key);
        if let Some(other) = held.filter(|lease| lease.record.node() != Some(node)) {
            return Err(refused(match other.record.node() {
                Some(other) => format!("{other} holds {}; run on {other}: fabricctl lease renumber", subnets()),
                None => format!("a flannel node holds {}; end its flanneld and delete its record", subnets()),
            }));
        }
        let (record, reservation) = (self.store.keys.lease(key), self.store.keys.reservation(key));
        let as_seen = match held {
            Some(lease) => Compare::mod_revision(record.clone(), CompareOp::Equal, lease.mod_revision),
            None => self.store.is_free(key),
        };
        let put_record = held.is_none().then(|| TxnOp::put(record, Record::placeholder(node, key).encode(), None));
        let puts = std::iter::once(TxnOp::put(reservation, node.as_str(), None)).chain(put_record).collect();
        self.store.once(RESERVE, vec![as_seen], puts).await
    }

    /// Ends the reservations of a node; a node that holds such a subnet keeps it. Gives them.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    pub async fn unreserve(&self, node: &NodeName) -> Result<Vec<LeaseKey>, StoreError> {
        let leases = self.listed().await?;
        let of_node = leases.reservations().iter().filter(|(_, reserved)| *reserved == node);
        let keys: Vec<LeaseKey> = of_node.map(|(key, _)| *key).collect();
        for key in &keys {
            let (record, reservation) = (self.store.keys.lease(key), self.store.keys.reservation(key));
            let placeholder = leases.get(key).filter(|lease| lease.record.is_placeholder());
            let as_seen = placeholder.map(|p| Compare::mod_revision(record.clone(), CompareOp::Equal, p.mod_revision));
            let mut deletes = vec![TxnOp::delete(reservation, None)];
            deletes.extend(placeholder.map(|_| TxnOp::delete(record, None)));
            self.store.once("end a reservation", as_seen.into_iter().collect(), deletes).await?;
        }
        Ok(keys)
    }

    /// Takes a node's lease away, guards included: for a node that is gone. One that lives takes it back at once. Gives
    /// the subnets, if it had any.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    pub async fn release_node(&self, node: &NodeName) -> Result<Vec<LeaseKey>, StoreError> {
        let Overview { leases, expired } = self.overview().await?;
        let of_node = leases.iter().filter(|l| l.record.node() == Some(node) && !l.record.is_placeholder());
        let mut released = vec![];
        for lease in of_node {
            let record = self.store.keys.lease(&lease.key);
            let as_seen = vec![Compare::mod_revision(record.clone(), CompareOp::Equal, lease.mod_revision)];
            let keys = std::iter::once(record).chain(self.store.keys.guards(&lease.key));
            self.store.once(RELEASE, as_seen, keys.map(|key| TxnOp::delete(key, None)).collect()).await?;
            released.push(lease.key);
        }
        for rest in expired.into_iter().filter(|lease| lease.node.as_ref() == Some(node)) {
            let key = LeaseKey::new([(rest.subnet.family(), rest.subnet)].into_iter().collect());
            for guard in key.iter().flat_map(|key| self.store.keys.guards(key)) {
                let as_seen = vec![Compare::mod_revision(guard.clone(), CompareOp::Equal, rest.mod_revision)];
                self.store.once(RELEASE, as_seen, vec![TxnOp::delete(guard, None)]).await?;
            }
            released.extend(key);
        }
        Ok(released)
    }

    /// All leases. Whether etcd answers at all is asked before: the task that lists them never gives up.
    async fn listed(&self) -> Result<Arc<LeaseSet>, StoreError> {
        self.store.read_config().await?;
        let mut leases = self.leases();
        let listed = leases.wait_for(Option::is_some).await.ok().and_then(|set| set.clone());
        Ok(listed.unwrap_or_default())
    }
}

const RESERVE: &str = "reserve the subnet";
const RELEASE: &str = "release the lease";

impl Store {
    /// A transaction that is not tried again: a person decided on what was there.
    pub(super) async fn once(
        &self,
        operation: &'static str,
        seen: Vec<Compare>,
        then: Vec<TxnOp>,
    ) -> Result<(), StoreError> {
        match self.transact(operation, seen, then, &[]).await? {
            Outcome::Done(..) => Ok(()),
            _ => Err(StoreError::Refused { operation, reason: "somebody changed it meanwhile; try again".into() }),
        }
    }
}
