//! [`PolicySet`], [`ClusterPolicySet`], [`NamespaceSet`] and [`PodSet`]: all objects of a kind, read. What they hold depends on the objects alone,
//! but for a policy that can't be read: that keeps its last good value.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::decode::Undecodable;
use super::labels::Labels;
use super::model::{ObjectName, Pod, Policy, Problem};
use super::objects::{NamespaceObject, PodObject, PolicyObject, Shared};
use super::pods::Pods;
use super::tiers::ClusterPolicy;
use crate::cow_map::CowMap;
use crate::services::objects::Metadata;

/// Policies by name. Cheap to clone.
pub type Policies = CowMap<ObjectName, Arc<Policy>>;
/// Labels of namespaces by name. Cheap to clone.
pub type Namespaces = CowMap<Arc<str>, Arc<Labels>>;

/// Policies of the whole cluster by name. Cheap to clone.
pub type ClusterPolicies = CowMap<ObjectName, Arc<ClusterPolicy>>;

/// All NetworkPolicies.
pub type PolicySet = ReadPolicies<Policy>;
/// All ClusterNetworkPolicies.
pub type ClusterPolicySet = ReadPolicies<ClusterPolicy>;

/// A policy of some kind, as it is read.
pub trait Readable: Clone + PartialEq {
    /// What is told of one that never could be read.
    const UNREAD: &str;

    /// Reads the `spec` of one.
    ///
    /// # Errors
    /// When it isn't known whom it is about.
    fn decode(name: &ObjectName, spec: &Value) -> Result<Self, Undecodable>;

    /// One that changes nothing for anybody.
    fn nothing() -> Self;

    /// Whether it changes nothing for anybody.
    fn is_nothing(&self) -> bool;

    /// What of it can't be read.
    fn problems(&self) -> &[Problem];

    /// The same with these.
    #[must_use]
    fn with_problems(self, problems: Vec<Problem>) -> Self;
}

/// All policies of a kind.
#[derive(Clone, Debug)]
pub struct ReadPolicies<P> {
    policies: CowMap<ObjectName, Arc<P>>,
}

impl<P> Default for ReadPolicies<P> {
    fn default() -> Self {
        Self { policies: CowMap::default() }
    }
}

impl<P: Readable> ReadPolicies<P> {
    /// Those of a list, after what is known.
    #[must_use]
    pub fn listed<'a>(&self, objects: impl IntoIterator<Item = &'a PolicyObject>) -> Self {
        let policies = objects.into_iter().map(|object| self.read(object)).collect();
        Self { policies }
    }

    /// Takes in that a policy was created or changed; true when that matters.
    pub fn apply(&mut self, object: &PolicyObject) -> bool {
        let (name, policy) = self.read(object);
        put(&mut self.policies, name, policy)
    }

    /// Takes in that a policy was deleted; true when that matters.
    pub fn remove(&mut self, metadata: &Metadata) -> bool {
        self.policies.remove(&metadata.into()).is_some()
    }

    /// The policies.
    #[must_use]
    pub fn policies(&self) -> &CowMap<ObjectName, Arc<P>> {
        &self.policies
    }

    fn read(&self, object: &PolicyObject) -> (ObjectName, Arc<P>) {
        let name = ObjectName::from(&object.metadata);
        let policy = P::decode(&name, &object.spec).unwrap_or_else(|Undecodable(problem)| {
            let before =
                self.policies.get(&name).filter(|policy| !policy.is_nothing()).map(|policy| (**policy).clone());
            let what = match before {
                Some(_) => format!("{}; what it said before stays applied", problem.what),
                None => format!("{}; {}", problem.what, P::UNREAD),
            };
            before.unwrap_or_else(P::nothing).with_problems(vec![Problem { what, ..problem }])
        });
        (name, Arc::new(policy))
    }
}

impl Readable for Policy {
    const UNREAD: &str = "it isolates nobody";

    fn decode(name: &ObjectName, spec: &Value) -> Result<Self, Undecodable> {
        Self::decode(name.namespace(), spec)
    }

    fn nothing() -> Self {
        Self::nothing()
    }

    fn is_nothing(&self) -> bool {
        self.ingress.is_none() && self.egress.is_none()
    }

    fn problems(&self) -> &[Problem] {
        &self.problems
    }

    fn with_problems(self, problems: Vec<Problem>) -> Self {
        Self { problems, ..self }
    }
}

impl Readable for ClusterPolicy {
    const UNREAD: &str = "it decides nothing";

    fn decode(_: &ObjectName, spec: &Value) -> Result<Self, Undecodable> {
        Self::decode(spec)
    }

    fn nothing() -> Self {
        Self::nothing()
    }

    fn is_nothing(&self) -> bool {
        self.ingress.is_empty() && self.egress.is_empty()
    }

    fn problems(&self) -> &[Problem] {
        &self.problems
    }

    fn with_problems(self, problems: Vec<Problem>) -> Self {
        Self { problems, ..self }
    }
}

/// The labels of all namespaces.
#[derive(Clone, Debug, Default)]
pub struct NamespaceSet {
    namespaces: Namespaces,
    shared: Shared,
}

impl NamespaceSet {
    /// Those of a list.
    #[must_use]
    pub fn listed(objects: &[NamespaceObject]) -> Self {
        let mut shared = Shared::default();
        let namespaces =
            objects.iter().map(|NamespaceObject { metadata }| (metadata.name.as_str().into(), shared.labels(metadata)));
        Self { namespaces: namespaces.collect(), shared }
    }

    /// Takes in that a namespace was created or changed; true when that matters.
    pub fn apply(&mut self, NamespaceObject { metadata }: &NamespaceObject) -> bool {
        let labels = self.shared.labels(metadata);
        put(&mut self.namespaces, metadata.name.as_str().into(), labels)
    }

    /// Takes in that a namespace was deleted; true when that matters.
    pub fn remove(&mut self, metadata: &Metadata) -> bool {
        self.namespaces.remove(&metadata.name.as_str().into()).is_some()
    }

    /// Their labels.
    #[must_use]
    pub fn namespaces(&self) -> &Namespaces {
        &self.namespaces
    }
}

/// All pods.
#[derive(Clone, Debug, Default)]
pub struct PodSet {
    pods: Pods,
    shared: Shared,
}

impl PodSet {
    /// Those of a list.
    #[must_use]
    pub fn listed(objects: &[PodObject]) -> Self {
        let mut set = Self::default();
        objects.iter().for_each(|object| _ = set.apply(object));
        set.compact();
        set
    }

    /// In as little memory as it takes, after many were put in.
    pub fn compact(&mut self) {
        self.pods.compact();
    }

    /// Takes in that a pod was created or changed; true when that matters.
    pub fn apply(&mut self, object: &PodObject) -> bool {
        let pod = Arc::new(Pod::read(object, &mut self.shared));
        if self.pods.get(&pod.name).is_some_and(|before| *before == pod) {
            return false;
        }
        self.pods.insert(pod);
        true
    }

    /// Takes in that a pod was deleted; true when that matters.
    pub fn remove(&mut self, metadata: &Metadata) -> bool {
        self.pods.remove(&metadata.into()).is_some()
    }

    /// The pods.
    #[must_use]
    pub fn pods(&self) -> &Pods {
        &self.pods
    }
}

/// The policies of which something can't be read, with what.
#[must_use]
pub fn problems<P: Readable>(policies: &CowMap<ObjectName, Arc<P>>) -> BTreeMap<ObjectName, Vec<Problem>> {
    let troubled = policies.iter().filter(|(_, policy)| !policy.problems().is_empty());
    troubled.map(|(name, policy)| (name.clone(), policy.problems().to_vec())).collect()
}

/// Puts a value in; true when it differs from the one before.
fn put<K: Ord + Clone, V: PartialEq>(map: &mut CowMap<K, Arc<V>>, key: K, value: Arc<V>) -> bool {
    map.insert(key, Arc::clone(&value)).is_none_or(|before| before != value)
}
