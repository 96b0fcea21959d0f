//! Questions about who holds the lease of a name, and answers: one key for a name, on a lease of etcd's that ends by itself.

use std::time::Duration;

use etcd_client::{KeyValue, PutOptions, TxnOp};
use fabric_core::inquiry::Inquiry;
use fabric_core::model::NodeName;
use fabric_core::record::LeaseKey;

use super::Store;
use crate::store::StoreError;

/// How long a question stands. It is asked again meanwhile, as long as it matters.
const STANDS: Duration = Duration::from_secs(60);

impl Store {
    pub(super) async fn inquire(&self, node: &NodeName, inquiry: &Inquiry) -> Result<(), StoreError> {
        let lease = self.grant(0, STANDS).await?;
        let on_lease = Some(PutOptions::new().with_lease(lease.id));
        let put = TxnOp::put(self.keys.inquiry(node), inquiry.encode(), on_lease);
        self.transact("ask who holds a lease", vec![], vec![put], &[]).await.map(drop)
    }

    /// Takes in a question as the store shows it, or that it is gone.
    pub(super) fn asked(&self, name: &str, value: Option<&[u8]>) {
        let Ok(node) = name.parse::<NodeName>() else { return };
        let inquiry = value.and_then(Inquiry::decode);
        self.inquiries.send_if_modified(|known| {
            if known.get(&node) == inquiry.as_ref() {
                return false;
            }
            match inquiry {
                Some(inquiry) => known.insert(node, inquiry),
                None => known.remove(&node),
            };
            true
        });
    }

    pub(super) async fn time_left(&self, key: &LeaseKey) -> Result<Option<Duration>, StoreError> {
        const ASK: &str = "ask how long a lease lasts";
        let record = self.keys.lease(key);
        let (mut found, _) = self
            .connector
            .ask(ASK, |client| {
                let record = record.clone();
                async move { client.kv_client().get(record, None).await }
            })
            .await?;
        let Some(lease) = found.take_kvs().first().map(KeyValue::lease).filter(|lease| *lease != 0) else {
            return Ok(None);
        };
        let left = self
            .connector
            .send(ASK, |client| async move { client.lease_client().time_to_live(lease, None).await })
            .await?;
        Ok(Some(Duration::from_secs(left.ttl().try_into().unwrap_or_default())))
    }
}
