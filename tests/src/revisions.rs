//! The witness of invariant I1: it is shown every revision of a store and says when two live records of fabricd nodes
//! share an address. It must be shown them as they come: compaction and restored snapshots erase history.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use etcd_client::{Client, EventType, WatchOptions};
use fabric_core::model::NodeName;
use fabric_core::record::{LeaseKey, Record};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// All records of fabricd nodes at one revision.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    records: BTreeMap<LeaseKey, NodeName>,
    /// How many changes were seen.
    pub changes: u64,
}

impl Owners {
    /// Another store, with nothing in it yet.
    pub fn store_was_replaced(&mut self) {
        self.records.clear();
    }

    /// Notes one change under `subnets/`; `key` is the last part of the key, `value` none for a deletion.
    ///
    /// # Errors
    /// Two nodes own an address now: names both.
    pub fn see(&mut self, key: &str, value: Option<&[u8]>, revision: i64) -> Result<()> {
        self.changes += 1;
        let Ok(key) = LeaseKey::decode(key) else { return Ok(()) };
        let record = value.and_then(|value| Record::decode(&key, value).ok()).filter(|r| !r.is_placeholder());
        // flannel's records, placeholders and garbage are nobody's here: they end a node's ownership as a deletion does.
        let Some(node) = record.as_ref().and_then(Record::node).cloned() else {
            self.records.remove(&key);
            return Ok(());
        };
        for (other, owner) in self.records.iter().filter(|(other, _)| **other != key) {
            let shared = key
                .subnets()
                .iter()
                .find(|(family, subnet)| other.subnets().get(*family).is_some_and(|other| other.overlaps(**subnet)));
            ensure!(shared.is_none(), "revision {revision}: {key} of {node} overlaps {other} of {owner}");
        }
        self.records.insert(key, node);
        Ok(())
    }

    /// Who owns a subnet.
    #[must_use]
    pub fn owner(&self, key: &LeaseKey) -> Option<&NodeName> {
        self.records.get(key)
    }
}

/// A task that follows a real etcd.
#[derive(Debug)]
pub struct Witness {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<Owners>>,
}

impl Witness {
    /// Follows all leases under `prefix` from the first revision on.
    ///
    /// # Errors
    /// etcd doesn't answer.
    pub async fn start(endpoint: &str, prefix: &str) -> Result<Self> {
        let client = Client::connect([endpoint], None).await?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(follow(client, format!("{prefix}/subnets/"), stopped));
        Ok(Self { stop, task })
    }

    /// Ends, and tells what was seen.
    ///
    /// # Errors
    /// Two nodes owned one address at some revision, or etcd could not be followed to the end.
    pub async fn stop(self) -> Result<Owners> {
        // It has ended by itself when it failed.
        let _ = self.stop.send(());
        self.task.await.context("the witness panicked")?
    }
}

async fn follow(client: Client, subnets: String, mut stopped: oneshot::Receiver<()>) -> Result<Owners> {
    let mut owners = Owners::default();
    let options = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut watch = client.watch_client();
    let mut stream = watch.watch(subnets.clone(), Some(options)).await?;
    loop {
        let response = tokio::select! {
            message = stream.message() => message?.context("etcd ended the watch")?,
            _ = &mut stopped => return Ok(owners),
        };
        ensure!(!response.canceled(), "etcd ended the watch: {}", response.cancel_reason());
        for event in response.events() {
            let kv = event.kv().context("an event without a key")?;
            let key = kv.key_str()?.trim_start_matches(&subnets);
            let value = (event.event_type() == EventType::Put).then(|| kv.value());
            owners.see(key, value, kv.mod_revision())?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(node: &str) -> Vec<u8> {
        format!(
            r#"{{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"}},"Fabric":{{"v":1,"node":"{node}","boot":"b","netns":1,"epoch":1}}}}"#
        )
        .into()
    }

    #[test]
    fn overlap_is_named_and_what_is_gone_overlaps_nothing() {
        let mut owners = Owners::default();
        owners.see("10.244.1.0-24", Some(&of("node-1")), 1).unwrap();
        owners.see("10.244.2.0-24", Some(&of("node-2")), 2).unwrap();
        let overlap = owners.clone().see("10.244.1.128-25", Some(&of("node-3")), 3).unwrap_err().to_string();
        assert!(overlap.contains("node-1") && overlap.contains("node-3"), "{overlap}");
        owners.see("10.244.1.0-24", None, 4).unwrap();
        owners.see("10.244.1.128-25", Some(&of("node-3")), 5).unwrap();
    }
}
