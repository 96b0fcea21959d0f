//! The network config in the datastore, read and written by every command that needs it.

use std::time::Duration;

use anyhow::{Context as _, bail};
use fabric_core::model::{Family, Subnet};
use fabric_core::network::NetworkConfig;
use fabricd::host::underlay;
use fabricd::kernel::netlink::Netlink;
use fabricd::kernel::{Kernel as _, Options};
use fabricd::store::StoreError;
use fabricd::store::etcd::StoredConfig;
use serde::Serialize;
use serde_json::Value;

use crate::settings::Datastore;

/// How long etcd may take.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// What to do where the network config is a ConfigMap.
pub const IN_KUBERNETES: &str = "edit net-conf.json in its ConfigMap instead, as in: kubectl --namespace fabric-system edit \
                             configmap fabric-network";

/// A network config that was written, or was as it is to be.
#[derive(Debug, Serialize)]
pub struct Written {
    /// Its key in etcd.
    pub key: String,
    /// What it says now.
    pub config: Value,
    /// What it said before; nothing when there was none, or it said the same.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// What nodes that run keep until `network migrate` or a restart.
    pub pending: Vec<String>,
}

impl Written {
    /// What becomes of it on the nodes.
    pub fn new(key: String, config: &[u8], before: Option<&[u8]>) -> Self {
        let value = |json: &[u8]| {
            serde_json::from_slice(json).unwrap_or_else(|_| Value::String(String::from_utf8_lossy(json).into()))
        };
        let pending = match (before.map(NetworkConfig::decode), NetworkConfig::decode(config)) {
            (Some(Ok(before)), Ok(now)) => before.lasting_differences(&now),
            _ => vec![],
        };
        Self { key, config: value(config), before: before.map(value), pending }
    }

    /// In words.
    pub fn describe(&self) -> String {
        let Self { key, config, before, pending } = self;
        let Some(before) = before else { return format!("{key} written: {config}\n") };
        let mut text = format!("{key} written: {config}\nbefore: {before}\n");
        text += &match pending.is_empty() {
            true => "Running nodes apply it at once.\n".to_owned(),
            false => format!(
                "Pending on running nodes, until on each of them fabricctl network migrate is run, or fabricd restarted: \
                 {}\n",
                pending.join(", ")
            ),
        };
        text
    }
}

/// An answer of etcd, in time.
pub async fn in_time<T>(store: &Datastore, work: impl Future<Output = Result<T, StoreError>>) -> anyhow::Result<T> {
    let answer = tokio::time::timeout(PATIENCE, work).await.with_context(|| store.unreached())?;
    answer.map_err(|error| match error {
        StoreError::Unreachable { reason, .. } => anyhow::anyhow!("{}: {reason}", store.unreached()),
        other => other.into(),
    })
}

/// The network config in etcd.
///
/// # Errors
/// There is none, or etcd doesn't answer.
pub async fn stored(store: &Datastore) -> anyhow::Result<StoredConfig> {
    let etcd = store.etcd(IN_KUBERNETES)?;
    let none = || {
        format!(
            "there is nothing at {}; write it with: fabricctl network init --network 10.244.0.0/16",
            store.config_key()
        )
    };
    in_time(store, etcd.read_config()).await?.with_context(none)
}

/// The network must not overlap what this host's underlay reaches: the nodes are alike in that.
pub async fn check_overlap(config: &NetworkConfig) -> anyhow::Result<()> {
    let Ok(mut kernel) = Netlink::new(Options::default()) else { return Ok(()) };
    let observed = kernel.observe().await.context("cannot look at this host's links")?;
    for family in Family::ALL {
        let Ok(chosen) = underlay::choose(&[], &observed.host, family, &[]) else { continue };
        let link = observed.host.links.iter().find(|link| link.name == chosen.underlay.dev);
        let prefixes: Vec<Subnet> = link.iter().flat_map(|link| link.addresses.iter().map(|(_, p)| *p)).collect();
        if let Some((network, prefix)) = config.overlap(&prefixes) {
            bail!(
                "the network {network} overlaps {prefix}, which this host's {} reaches directly; choose another",
                chosen.underlay.dev
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_running_nodes_make_of_a_change_is_said() {
        let before: &[u8] = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let told = |now: &str| Written::new("/n/config".into(), now.as_bytes(), Some(before)).describe();
        let live = told(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","MTU":1400}}"#);
        assert!(live.ends_with("Running nodes apply it at once.\n"), "{live}");
        let lasting = told(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":2}}"#);
        assert!(lasting.contains("fabricctl network migrate") && lasting.ends_with("VNI: 1 → 2\n"), "{lasting}");
        let repaired = Written::new("/n/config".into(), before, Some(b"{")).describe();
        assert!(repaired.contains("before: \"{\""), "{repaired}");
    }
}
