//! The part of a Node of Kubernetes that matters here. The rest, such as the list of its images or who changed what, is
//! large, changes often, and is passed over.

use std::collections::BTreeMap;

use fabric_core::model::{Family, PerFamily, Subnet};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;
use serde_json::Value;

use crate::kubernetes::reflector::{Object, revision};

/// A Node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Node {
    /// What all objects have.
    pub metadata: Metadata,
    /// What it is to be.
    #[serde(default)]
    pub spec: Spec,
    /// What it is.
    #[serde(default)]
    pub status: Status,
}

/// What all objects have.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// Its name.
    pub name: Option<String>,
    /// Another one for each object that has had the name.
    pub uid: Option<String>,
    /// The revision of its last change, of whatever part.
    pub resource_version: Option<String>,
    /// When it was created.
    pub creation_timestamp: Option<Time>,
    /// What programs say about it.
    pub annotations: Option<BTreeMap<String, String>>,
}

/// What a Node is to be.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Spec {
    /// Its subnet, from before there could be two.
    #[serde(rename = "podCIDR", default)]
    pub pod_cidr: Option<String>,
    /// Its subnets, one for each family.
    #[serde(rename = "podCIDRs", default)]
    pub pod_cidrs: Option<Vec<String>>,
    /// What keeps pods away.
    #[serde(default)]
    pub taints: Option<Vec<Value>>,
}

/// What a Node is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Status {
    /// One for each type.
    #[serde(default)]
    pub conditions: Option<Vec<Condition>>,
    /// What its kubelet says of its machine.
    #[serde(rename = "nodeInfo", default)]
    pub node_info: Option<NodeInfo>,
}

/// The machine that a Node's kubelet runs on.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct NodeInfo {
    /// `/proc/sys/kernel/random/boot_id`.
    #[serde(rename = "bootID", default)]
    pub boot_id: String,
}

/// One thing that is so of a Node, or is not.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Condition {
    /// What.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// Why, in one word.
    #[serde(default)]
    pub reason: String,
    /// Why, for people.
    #[serde(default)]
    pub message: String,
}

impl Node {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.metadata.name.as_deref().unwrap_or_default()
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

    /// A condition.
    #[must_use]
    pub fn condition(&self, kind: &str) -> Option<&Condition> {
        self.status.conditions.iter().flatten().find(|condition| condition.kind == kind)
    }
}

impl Object for Node {
    const PATH: &'static str = "/api/v1/nodes";

    fn revision(&self) -> i64 {
        revision(self.metadata.resource_version.as_deref())
    }
}
