//! The part of a Node of Kubernetes that matters here. The rest, such as the list of its images, is large, changes often,
//! and is not kept.

use std::borrow::Cow;

use fabric_core::model::{Family, PerFamily, Subnet};
use kube::Resource;
use kube::api::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Name, annotations, uid, resource version.
    pub metadata: ObjectMeta,
    /// What it is to be.
    #[serde(default)]
    pub spec: Spec,
    /// What it is.
    #[serde(default)]
    pub status: Status,
}

/// What a Node is to be.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// Its subnet, from before there could be two.
    #[serde(rename = "podCIDR", default, skip_serializing_if = "Option::is_none")]
    pub pod_cidr: Option<String>,
    /// Its subnets, one for each family.
    #[serde(rename = "podCIDRs", default, skip_serializing_if = "Option::is_none")]
    pub pod_cidrs: Option<Vec<String>>,
    /// What keeps pods away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taints: Option<Vec<Value>>,
}

/// What a Node is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// One for each type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conditions: Option<Vec<Condition>>,
    /// What its kubelet says of its machine.
    #[serde(rename = "nodeInfo", default, skip_serializing_if = "Option::is_none")]
    pub node_info: Option<NodeInfo>,
}

/// The machine that a Node's kubelet runs on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeInfo {
    /// `/proc/sys/kernel/random/boot_id`.
    #[serde(rename = "bootID", default)]
    pub boot_id: String,
}

/// One thing that is so of a Node, or is not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Condition {
    /// What.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

impl Node {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
    }

    /// The revision of its last change, of whatever part. Kubernetes calls it opaque, but it has always been etcd's
    /// revision, and is promised to be a number that grows from 1.35 on (KEP-5504).
    #[must_use]
    pub fn revision(&self) -> i64 {
        revision(self.metadata.resource_version.as_deref())
    }

    /// When it was created, in seconds since 1970.
    #[must_use]
    pub fn created(&self) -> i64 {
        self.metadata.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second())
    }

    /// One of its annotations.
    #[must_use]
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.metadata.annotations.as_ref()?.get(key).map(String::as_str)
    }

    /// Its subnets, the first of each family. What is none is passed over: the API server has checked them.
    #[must_use]
    pub fn subnets(&self) -> PerFamily<Subnet> {
        let all = self.spec.pod_cidrs.as_deref().filter(|all| !all.is_empty());
        let all = all.unwrap_or(self.spec.pod_cidr.as_slice());
        let subnets: Vec<Subnet> = all.iter().filter_map(|text| text.parse().ok()).collect();
        let first = |family| subnets.iter().find(|subnet| subnet.family() == family).copied();
        PerFamily { v4: first(Family::V4), v6: first(Family::V6) }
    }

    /// The status of a condition.
    #[must_use]
    pub fn condition(&self, kind: &str) -> Option<&str> {
        let mut conditions = self.status.conditions.iter().flatten();
        conditions.find(|condition| condition.kind == kind).map(|condition| condition.status.as_str())
    }
}

/// A resource version as a number.
pub(super) fn revision(version: Option<&str>) -> i64 {
    version.and_then(|version| version.parse().ok()).unwrap_or_default()
}

impl Resource for Node {
    type DynamicType = ();
    type Scope = kube::core::ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}
