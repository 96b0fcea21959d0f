//! [`State`]: all that decides which connections NetworkPolicies allow.

use std::sync::Arc;

use super::labels::Labels;
use super::model::{Local, ObjectName, Policy};
use super::pods::Pods;
use super::tiers::ClusterPolicy;
use crate::cow_map::CowMap;

/// All that decides.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The policies of namespaces.
    pub policies: CowMap<ObjectName, Arc<Policy>>,
    /// The policies of the whole cluster.
    pub cluster_policies: CowMap<ObjectName, Arc<ClusterPolicy>>,
    /// The namespaces' labels.
    pub namespaces: CowMap<Arc<str>, Arc<Labels>>,
    /// The pods.
    pub pods: Pods,
    /// This node.
    pub local: Local,
    /// The time, in seconds since 1970: a pod whose grace period is over has no address.
    pub now: i64,
}
