//! The witness of invariant I1: it is shown every revision of a store and says when two live records of fabricd nodes
//! share an address. It must be shown them as they come: compaction and restored snapshots erase history.

use std::collections::BTreeMap;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use etcd_client::{Client, EventType, GetOptions, KeyValue, WatchOptions};
use fabric_core::model::NodeName;
use fabric_core::record::{LeaseKey, Record};
use tokio::runtime::Builder;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use crate::lab::spaces::Spaces;

/// How soon a connection that broke is made again.
const AGAIN: Duration = Duration::from_millis(50);

/// How long the last revisions may take to be seen, on a busy machine.
const AT_THE_END: Duration = Duration::from_secs(20);

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

/// A thread that follows a real etcd, through its restarts too.
#[derive(Debug)]
pub struct Witness {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<Owners>>,
}

impl Witness {
    /// Follows all leases under `prefix`, from the first revision on, of an etcd that is reached from inside `spaces`.
    #[must_use]
    pub fn start(spaces: Spaces, endpoints: &str, prefix: &str) -> Self {
        let endpoints = endpoints.split(',').map(str::to_owned).collect();
        let followed =
            Followed { endpoints, subnets: format!("{prefix}/subnets/"), owners: Owners::default(), last: 0 };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            spaces.run(|| Builder::new_current_thread().enable_all().build()?.block_on(followed.until(stopped)))
        });
        Self { stop, thread }
    }

    /// Ends when all that is in the store has been seen, and tells what that was.
    ///
    /// # Errors
    /// Two nodes owned one address at some revision, or some could not be seen.
    pub fn stop(self) -> Result<Owners> {
        // It has ended by itself when it failed.
        let _ = self.stop.send(());
        self.thread.join().map_err(|_| anyhow!("the witness panicked"))?
    }
}

struct Followed {
    endpoints: Vec<String>,
    subnets: String,
    owners: Owners,
    /// The last revision that was seen.
    last: i64,
}

impl Followed {
    async fn until(mut self, mut stopped: oneshot::Receiver<()>) -> Result<Owners> {
        loop {
            let asked = tokio::select! {
                broken = self.watch(None) => { broken?; false }
                _ = &mut stopped => true,
            };
            if asked {
                break;
            }
            sleep(AGAIN).await;
        }
        // One that is away at the end has nothing new to show.
        if let Ok(Ok(end)) = timeout(AT_THE_END, self.last_change()).await {
            while self.last < end {
                timeout(AT_THE_END, self.watch(Some(end))).await.context("not all revisions were seen")??;
            }
        }
        Ok(self.owners)
    }

    /// The revision of the last change of a lease that is still there.
    async fn last_change(&self) -> Result<i64> {
        let mut client = Client::connect(&self.endpoints, None).await?;
        let options = GetOptions::new().with_prefix().with_keys_only();
        let leases = client.get(self.subnets.as_str(), Some(options)).await?;
        Ok(leases.kvs().iter().map(KeyValue::mod_revision).max().unwrap_or_default())
    }

    /// Sees every change after the last one, until that of `end` or until the connection breaks, which is no error.
    async fn watch(&mut self, end: Option<i64>) -> Result<()> {
        let options = WatchOptions::new().with_prefix().with_start_revision(self.last + 1);
        let Ok(mut client) = Client::connect(&self.endpoints, None).await else { return Ok(()) };
        let Ok(mut stream) = client.watch(self.subnets.as_str(), Some(options)).await else { return Ok(()) };
        while end.is_none_or(|end| self.last < end) {
            let Ok(Some(response)) = stream.message().await else { return Ok(()) };
            ensure!(response.compact_revision() == 0, "revisions were compacted before they were seen");
            if response.canceled() {
                return Ok(());
            }
            for event in response.events() {
                let kv = event.kv().context("an event without a key")?;
                let key = kv.key_str()?.trim_start_matches(&self.subnets);
                let value = (event.event_type() == EventType::Put).then(|| kv.value());
                self.owners.see(key, value, kv.mod_revision())?;
                self.last = kv.mod_revision();
            }
        }
        Ok(())
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
