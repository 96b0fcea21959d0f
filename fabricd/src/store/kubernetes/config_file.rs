//! The network config in Kubernetes: flannel's `net-conf.json`, mounted from a ConfigMap, and looked at again and again. A
//! kubelet brings a changed ConfigMap by swapping a symbolic link, which a look at the content sees as well as any.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::network::{ConfigError, NetworkConfig};
use tokio::time::sleep;

use super::Shared;
use crate::store::{Network, publish};

/// How often.
const PERIOD: Duration = Duration::from_secs(2);

/// Watches the file until the task is dropped.
pub(super) async fn watch_for_ever(shared: Arc<Shared>, file: PathBuf) {
    let mut before = None;
    loop {
        let content = tokio::fs::read(&file).await.map_err(|error| (error.kind(), error.to_string()));
        if before.as_ref() != Some(&content) {
            let network = match &content {
                Ok(json) => NetworkConfig::decode(json).map_or_else(Network::Invalid, Network::Valid),
                Err((io::ErrorKind::NotFound, _)) => Network::Missing,
                Err((_, error)) => Network::Invalid(ConfigError::Json(error.clone())),
            };
            publish(&shared.network, network);
            before = Some(content);
        }
        sleep(PERIOD).await;
    }
}
