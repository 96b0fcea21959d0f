//! The members of policies, Namespaces and Pods that matter here. Everything else is passed over while it is parsed:
//! most of a Pod's 10 kB.
//!
//! What may be wrong in an object is text here, or JSON as it came, so that one object never stops its whole kind.

use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;
use serde::Deserialize;
use serde_json::Value;

use super::labels::Labels;
use super::model::{NamedPort, Pod, Protocol, Template};
use crate::interner::Interner;
use crate::model::stable_hash;
use crate::services::objects::Metadata;

/// A NetworkPolicy (`networking.k8s.io/v1`), or a ClusterNetworkPolicy (`policy.networking.k8s.io/v1alpha2`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PolicyObject {
    /// What all objects have.
    pub metadata: Metadata,
    /// What it says; [`Readable::decode`](super::sets::Readable::decode) reads it.
    pub spec: Value,
}

/// A Namespace (`v1`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NamespaceObject {
    /// What all objects have.
    pub metadata: Metadata,
}

/// A Pod (`v1`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodObject {
    /// What all objects have.
    pub metadata: Metadata,
    /// What it is to be.
    pub spec: PodSpec,
    /// What has become of it.
    pub status: PodStatus,
}

/// What a Pod is to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// It is in the network of its node.
    pub host_network: Option<bool>,
    /// Its containers.
    pub containers: Option<Vec<ContainerSpec>>,
    /// Those that run before, or beside them where they are restarted always.
    pub init_containers: Option<Vec<ContainerSpec>>,
}

/// A container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerSpec {
    /// Its ports, those that somebody has written down.
    pub ports: Option<Vec<ContainerPort>>,
    /// `Always` makes a sidecar of an init container (KEP-753).
    pub restart_policy: Option<String>,
}

/// A port of a container.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// What it is called.
    pub name: Option<String>,
    /// Its number.
    pub container_port: Option<i64>,
    /// TCP if nothing is said.
    pub protocol: Option<String>,
}

/// What has become of a Pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed`.
    pub phase: Option<String>,
    /// Its addresses, one for each family.
    #[serde(rename = "podIPs")]
    pub pod_ips: Option<Vec<PodIp>>,
}

/// An address of a Pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    pub ip: String,
}

/// What pods have in common.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    names: Interner<str>,
    labels: Interner<Labels>,
    templates: Interner<Template>,
}

impl Shared {
    /// The labels of an object.
    pub fn labels(&mut self, metadata: &Metadata) -> Arc<Labels> {
        let labels = self.read_labels(metadata);
        self.labels.share(labels)
    }

    fn read_labels(&mut self, metadata: &Metadata) -> Labels {
        let labels = metadata.labels.iter().flatten();
        labels.map(|(key, value)| (self.names.share(key.as_str()), self.names.share(value.as_str()))).collect()
    }
}

/// What tells a pod from others of its name. Of a static pod the kubelet tells the runtime the hash of its file, and the API
/// server's copy of it has that in an annotation (`kubernetes.io/config.hash`).
#[must_use]
pub fn uid(uid: &str) -> u64 {
    stable_hash(uid.as_bytes())
}

impl Pod {
    /// What a Pod says.
    #[must_use]
    pub fn read(object: &PodObject, shared: &mut Shared) -> Self {
        let PodObject { metadata, spec, status } = object;
        let hash = metadata.annotations.as_ref().and_then(|all| all.get("kubernetes.io/config.hash"));
        let seconds = |text: &str| text.parse::<Timestamp>().ok().map(Timestamp::as_second);
        // Those that have been since 1970, and will be till 2106.
        let time = |text: &str| seconds(text).and_then(|time| time.try_into().ok());
        let ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|it| it.ip.parse().ok()).collect();
        let sidecars = spec.init_containers.iter().flatten();
        let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
        let containers = spec.containers.iter().flatten().chain(sidecars);
        let mut ports: Vec<NamedPort> = containers
            .flat_map(|container| container.ports.iter().flatten())
            .filter_map(|port| {
                Some(NamedPort {
                    name: shared.names.share(port.name.as_deref().filter(|name| !name.is_empty())?),
                    protocol: Protocol::read(port.protocol.as_deref())?,
                    port: port.container_port?.try_into().ok()?,
                })
            })
            .collect();
        ports.sort();
        ports.dedup();
        let template = Template { labels: shared.read_labels(metadata), ports: ports.into() };
        Self {
            name: metadata.into(),
            uid: uid(hash.unwrap_or(&metadata.uid)),
            template: shared.templates.share(template),
            v4: ips.iter().find_map(|ip| if let IpAddr::V4(ip) = ip { Some(*ip) } else { None }),
            v6: ips.iter().find_map(|ip| if let IpAddr::V6(ip) = ip { Some(*ip) } else { None }),
            created: time(&metadata.creation_timestamp).unwrap_or_default(),
            ends: metadata.deletion_timestamp.as_deref().and_then(time),
            completed: matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")),
            host_network: spec.host_network.unwrap_or_default(),
        }
    }
}
