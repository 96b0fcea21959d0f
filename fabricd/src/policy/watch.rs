//! [`Sources`]: policies of both kinds, Namespaces and Pods, each kept up to date by a [`Reflector`] of its own.
//!
//! Each is unknown until it was listed whole, and keeps its last value while the API server is away. ClusterNetworkPolicies
//! are a kind that many clusters don't have: there are none then.

use std::sync::Arc;

use fabric_core::policy::objects::{NamespaceObject, PodObject, PolicyObject};
use fabric_core::policy::pods::Pods;
use fabric_core::policy::sets::{
    ClusterPolicies, ClusterPolicySet, NamespaceSet, Namespaces, PodSet, Policies, PolicySet,
};
use serde::Deserialize;
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;

use crate::kubernetes::client::{ApiError, ApiServer};
use crate::kubernetes::reflector::{Object, Reflector, revision};
use crate::kubernetes::sets::{Published, Set, SetFold, State, WatchStatus};

/// Pods that have ended have no address. The API server keeps such by the thousand.
const RUNNING: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// What is known of policies, and of whom they are about. Dropping it ends the watches.
pub struct Sources {
    /// The policies.
    pub policies: Receiver<Option<Policies>>,
    /// The policies of the whole cluster.
    pub cluster_policies: Receiver<Option<ClusterPolicies>>,
    /// The labels of namespaces.
    pub namespaces: Receiver<Option<Namespaces>>,
    /// The pods of the whole cluster.
    pub pods: Receiver<Option<Pods>>,
    /// How it stands with each watch.
    pub connection: Receiver<Connections>,
    _tasks: JoinSet<()>,
}

/// How it stands with each watch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    policies: State,
    cluster_policies: State,
    namespaces: State,
    pods: State,
}

impl Connections {
    /// Why one of them doesn't run, but for that of ClusterNetworkPolicies.
    #[must_use]
    pub fn trouble(&self) -> Option<&ApiError> {
        [&self.policies, &self.namespaces, &self.pods].into_iter().flatten().find_map(|state| state.as_ref().err())
    }

    /// Why that of ClusterNetworkPolicies doesn't run.
    #[must_use]
    pub fn cluster_trouble(&self) -> Option<&ApiError> {
        self.cluster_policies.as_ref()?.as_ref().err()
    }
}

impl Sources {
    /// Starts to watch, and returns at once. Must be called within a tokio runtime.
    #[must_use]
    pub fn watch(api: &Arc<ApiServer>) -> Self {
        let (policies, namespaces, pods) = (Sender::new(None), Sender::new(None), Sender::new(None));
        let of_cluster = Sender::new(None);
        let cluster_policies = of_cluster.subscribe();
        let connections = Sender::new(Connections::default());
        let mut tasks = JoinSet::new();
        let receivers = (policies.subscribe(), namespaces.subscribe(), pods.subscribe(), connections.subscribe());
        let told = WatchStatus::new(&connections, |all: &mut Connections| &mut all.policies);
        tasks.spawn(Reflector::new(api.clone(), SetFold::new(PolicySet::default(), policies, told)).run());
        let told = WatchStatus::new(&connections, |all: &mut Connections| &mut all.cluster_policies);
        let fold = SetFold::new(ClusterPolicySet::default(), of_cluster, told);
        tasks.spawn(Reflector::new(api.clone(), fold).may_be_absent().run());
        let told = WatchStatus::new(&connections, |all: &mut Connections| &mut all.namespaces);
        tasks.spawn(Reflector::new(api.clone(), SetFold::new(NamespaceSet::default(), namespaces, told)).run());
        let told = WatchStatus::new(&connections, |all: &mut Connections| &mut all.pods);
        let fold = SetFold::new(PodSet::default(), pods, told);
        tasks.spawn(Reflector::new(api.clone(), fold).fields(RUNNING).run());
        let (policies, namespaces, pods, connection) = receivers;
        Self { policies, cluster_policies, namespaces, pods, connection, _tasks: tasks }
    }

    /// Whether ClusterNetworkPolicies may still be listed soon: they are not known, and the API server has not refused them.
    #[must_use]
    pub fn awaits_cluster_policies(&self) -> bool {
        let is_refused = matches!(self.connection.borrow().cluster_trouble(), Some(ApiError::Refused { .. }));
        self.cluster_policies.borrow().is_none() && !is_refused
    }

    /// What has not been listed yet, if anything; ClusterNetworkPolicies aside.
    #[must_use]
    pub fn missing(&self) -> Option<&'static str> {
        if self.policies.borrow().is_none() {
            Some("NetworkPolicies")
        } else if self.namespaces.borrow().is_none() {
            Some("Namespaces")
        } else {
            self.pods.borrow().is_none().then_some("Pods")
        }
    }
}

impl Object for PolicyObject {
    const PATH: &'static str = "/apis/networking.k8s.io/v1/networkpolicies";

    fn revision(&self) -> i64 {
        revision(Some(&self.metadata.resource_version))
    }
}

/// A ClusterNetworkPolicy.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(transparent)]
pub struct ClusterPolicyObject(PolicyObject);

impl Object for ClusterPolicyObject {
    const PATH: &'static str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";

    fn revision(&self) -> i64 {
        self.0.revision()
    }
}

impl Object for NamespaceObject {
    const PATH: &'static str = "/api/v1/namespaces";

    fn revision(&self) -> i64 {
        revision(Some(&self.metadata.resource_version))
    }
}

impl Object for PodObject {
    const PATH: &'static str = "/api/v1/pods";

    fn revision(&self) -> i64 {
        revision(Some(&self.metadata.resource_version))
    }
}

impl Published for Pods {
    fn lacks_most_of(&self, before: &Self) -> bool {
        self.lacks_most_of(before)
    }
}

impl Set for PolicySet {
    type Object = PolicyObject;
    type All = Policies;

    fn listed(&self, objects: &[PolicyObject]) -> Self {
        self.listed(objects)
    }

    fn apply(&mut self, object: &PolicyObject) -> bool {
        self.apply(object)
    }

    fn remove(&mut self, object: &PolicyObject) -> bool {
        self.remove(&object.metadata)
    }

    fn all(&self) -> &Policies {
        self.policies()
    }
}

impl Set for ClusterPolicySet {
    type Object = ClusterPolicyObject;
    type All = ClusterPolicies;

    fn listed(&self, objects: &[ClusterPolicyObject]) -> Self {
        self.listed(objects.iter().map(|object| &object.0))
    }

    fn apply(&mut self, object: &ClusterPolicyObject) -> bool {
        self.apply(&object.0)
    }

    fn remove(&mut self, object: &ClusterPolicyObject) -> bool {
        self.remove(&object.0.metadata)
    }

    fn all(&self) -> &ClusterPolicies {
        self.policies()
    }
}

impl Set for NamespaceSet {
    type Object = NamespaceObject;
    type All = Namespaces;

    fn listed(&self, objects: &[NamespaceObject]) -> Self {
        Self::listed(objects)
    }

    fn apply(&mut self, object: &NamespaceObject) -> bool {
        self.apply(object)
    }

    fn remove(&mut self, object: &NamespaceObject) -> bool {
        self.remove(&object.metadata)
    }

    fn all(&self) -> &Namespaces {
        self.namespaces()
    }
}

impl Set for PodSet {
    type Object = PodObject;
    type All = Pods;

    fn listed(&self, objects: &[PodObject]) -> Self {
        Self::listed(objects)
    }

    fn begin_list(&self) -> Option<Self> {
        Some(Self::default())
    }

    fn end_list(&mut self) {
        self.compact();
    }

    fn apply(&mut self, object: &PodObject) -> bool {
        self.apply(object)
    }

    fn remove(&mut self, object: &PodObject) -> bool {
        self.remove(&object.metadata)
    }

    fn all(&self) -> &Pods {
        self.pods()
    }
}
