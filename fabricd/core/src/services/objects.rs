//! The members of Services, EndpointSlices and Nodes that matter here. Everything else is passed over while it is parsed:
//! an EndpointSlice as a whole takes some 500 bytes an endpoint.
//!
//! What may be wrong in an object is text here, or a number of any size, so that one object never stops its whole kind;
//! [`model`](super::model) judges it.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// `null` is nothing said, as it is for Go.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

/// What all objects have.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// Its name, of which there is one in a namespace.
    pub name: String,
    /// Its namespace; empty for what is in none.
    pub namespace: String,
    /// Another one for each object that has had the name.
    pub uid: String,
    /// The revision of its last change.
    pub resource_version: String,
    /// When it was created: `2026-11-28T10:00:00Z` (RFC 3339).
    pub creation_timestamp: String,
    /// When it is to be gone, once somebody has asked for that.
    pub deletion_timestamp: Option<String>,
    /// What it is chosen by.
    pub labels: Option<BTreeMap<String, String>>,
    /// What programs say about it.
    pub annotations: Option<BTreeMap<String, String>>,
}

impl Metadata {
    /// One of its labels.
    #[must_use]
    pub fn label(&self, key: &str) -> Option<&str> {
        self.labels.as_ref()?.get(key).map(String::as_str)
    }
}

/// A Service (`v1`).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct ServiceObject {
    /// What all objects have.
    pub metadata: Metadata,
    /// What it is to be.
    #[serde(deserialize_with = "or_default")]
    pub spec: ServiceSpec,
    /// What has become of it.
    #[serde(deserialize_with = "or_default")]
    pub status: ServiceStatus,
}

/// What a Service is to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `ClusterIP`, `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Its address in the cluster; `None` for a headless one. From before there could be two.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// Its addresses in the cluster, one for each family.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Option<Vec<String>>,
    /// Addresses that lead to the nodes by somebody else's doing.
    #[serde(rename = "externalIPs")]
    pub external_ips: Option<Vec<String>>,
    /// Its ports.
    pub ports: Option<Vec<ServicePortSpec>>,
    /// `Cluster` or `Local`, for what comes to a ClusterIP.
    pub internal_traffic_policy: Option<String>,
    /// `Cluster` or `Local`, for what comes from outside.
    pub external_traffic_policy: Option<String>,
    /// `None` or `ClientIP`.
    pub session_affinity: Option<String>,
    /// Its settings.
    pub session_affinity_config: Option<AffinityConfig>,
    /// Where load balancers ask whether this node has an endpoint.
    pub health_check_node_port: Option<i64>,
    /// Who may come by the load balancer's addresses.
    pub load_balancer_source_ranges: Option<Vec<String>>,
}

/// A port of a Service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePortSpec {
    /// Its name; none for an only port.
    pub name: Option<String>,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Option<String>,
    /// Its number.
    pub port: i64,
    /// Its number on every node.
    pub node_port: Option<i64>,
}

/// Settings of session affinity.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct AffinityConfig {
    /// Those of `ClientIP`.
    #[serde(rename = "clientIP")]
    pub client_ip: Option<ClientIpConfig>,
}

/// Settings of affinity by the client's address.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ClientIpConfig {
    /// How long it lasts, in seconds.
    pub timeout_seconds: Option<i64>,
}

/// What has become of a Service.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceStatus {
    /// What the load balancer has been made to be.
    #[serde(deserialize_with = "or_default")]
    pub load_balancer: LoadBalancerStatus,
}

/// Where a load balancer takes connections.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct LoadBalancerStatus {
    /// Its addresses.
    pub ingress: Option<Vec<LoadBalancerIngress>>,
}

/// An address of a load balancer.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LoadBalancerIngress {
    /// The address; one that has a name alone is none of a node's business.
    pub ip: Option<String>,
    /// `VIP` (packets arrive with this destination) or `Proxy` (they don't).
    pub ip_mode: Option<String>,
}

/// An EndpointSlice (`discovery.k8s.io/v1`, and `v1beta1` before Kubernetes 1.21).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceObject {
    /// What all objects have.
    pub metadata: Metadata,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: String,
    /// Its endpoints.
    pub endpoints: Option<Vec<EndpointObject>>,
    /// The ports that each of its endpoints has.
    pub ports: Option<Vec<EndpointPort>>,
}

/// An endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointObject {
    /// Its addresses, which mean the same; the API promises no more than one since 1.33, and clients use the first.
    #[serde(deserialize_with = "or_default")]
    pub addresses: Vec<Box<str>>,
    /// What it is able to do.
    pub conditions: Option<Conditions>,
    /// The node that it is on.
    pub node_name: Option<Box<str>>,
    /// The pod.
    pub target_ref: Option<TargetRef>,
    /// Who had best use it.
    pub hints: Option<Box<HintsObject>>,
    /// In `v1beta1` alone: the node's name, zone and more, by label.
    pub topology: Option<BTreeMap<String, Box<str>>>,
}

/// What an endpoint is able to do; what is missing is said by [`Endpoint`](super::model::Endpoint).
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Conditions {
    /// It takes connections, and isn't going.
    pub ready: Option<bool>,
    /// It takes connections.
    pub serving: Option<bool>,
    /// It is going.
    pub terminating: Option<bool>,
}

/// What an endpoint is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// The pod's uid.
    pub uid: Option<Box<str>>,
}

/// Who had best use an endpoint.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HintsObject {
    /// Nodes of these zones.
    pub for_zones: Option<Vec<Named>>,
    /// These nodes.
    pub for_nodes: Option<Vec<Named>>,
}

/// Something by its name.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Named {
    /// The name.
    pub name: Box<str>,
}

/// A port of every endpoint of a slice.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct EndpointPort {
    /// The name of the Service's port.
    pub name: Option<String>,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: Option<String>,
    /// Its number on the endpoint.
    pub port: Option<i64>,
}

/// A Node, of which its zone, its addresses and its going matter.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeObject {
    /// What all objects have.
    pub metadata: Metadata,
    /// What it is to be.
    #[serde(deserialize_with = "or_default")]
    pub spec: NodeSpec,
    /// What it is.
    #[serde(deserialize_with = "or_default")]
    pub status: NodeStatus,
}

/// What a Node is.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses and names.
    pub addresses: Option<Vec<NodeAddress>>,
}

/// An address of a Node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP`, `Hostname` and others.
    #[serde(rename = "type")]
    pub kind: String,
    /// The address.
    pub address: String,
}

/// What a Node is to be.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct NodeSpec {
    /// What keeps pods away.
    pub taints: Option<Vec<Taint>>,
}

/// Something that keeps pods away from a Node.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Taint {
    /// What it is about.
    pub key: String,
}
