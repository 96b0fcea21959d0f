//! [`Sources`]: Services, EndpointSlices and this node's Node, each kept up to date by a [`Reflector`] of its own.
//!
//! Each is unknown until it was listed whole, and keeps its last value while the API server is away.

use std::marker::PhantomData;
use std::sync::Arc;

use fabric_core::model::{NodeName, Subnet};
use fabric_core::services::model::NodeFacts;
use fabric_core::services::objects::{NodeObject, ServiceObject, SliceObject};
use fabric_core::services::sets::{Services, Slices};
use fabric_core::services::{ServiceSet, SliceSet};
use kube::core::Request;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::Notify;
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::cidrs;
use crate::kubernetes::client::{ApiError, ApiServer};
use crate::kubernetes::reflector::{Fold, Object, Reflector, revision};
use crate::kubernetes::sets::{Set, SetFold, State, WatchStatus};
use crate::retry::{Interrupted, Outage};

/// Services that another proxy handles are never asked for (KEP-2447).
const OF_SERVICES: &str = "!service.kubernetes.io/service-proxy-name";
/// Nor are slices of Services without an address.
const OF_SLICES: &str = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name";

/// What is known of Services. Dropping it ends the watches.
pub struct Sources {
    /// The Services.
    pub services: Receiver<Option<Services>>,
    /// Their endpoints.
    pub slices: Receiver<Option<Slices>>,
    /// This node's Node; without one nothing is known of it.
    pub node: Receiver<Option<NodeFacts>>,
    /// The prefixes that ClusterIPs are from; none where that isn't known.
    pub cidrs: Receiver<Vec<Subnet>>,
    /// How it stands with each watch.
    pub connection: Receiver<Connections>,
    _tasks: JoinSet<()>,
}

/// How it stands with each watch: `None` before the first answer, then whether it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Connections {
    services: State,
    slices: State,
    node: State,
}

impl Connections {
    /// Why one of them doesn't run.
    #[must_use]
    pub fn trouble(&self) -> Option<&ApiError> {
        [&self.services, &self.slices, &self.node].into_iter().flatten().find_map(|state| state.as_ref().err())
    }
}

impl Sources {
    /// Starts to watch, and returns at once. Must be called within a tokio runtime.
    #[must_use]
    pub fn watch(api: Arc<ApiServer>, node: &NodeName) -> Self {
        let (services, slices, facts) = (Sender::new(None), Sender::new(None), Sender::new(None));
        let connection = Sender::new(Connections::default());
        let mut tasks = JoinSet::new();
        let receivers = (services.subscribe(), slices.subscribe(), facts.subscribe(), connection.subscribe());
        let told = WatchStatus::new(&connection, |all: &mut Connections| &mut all.services);
        let fold = SetFold::new(ServiceSet::default(), services, told);
        tasks.spawn(Reflector::new(api.clone(), fold).labels(OF_SERVICES).run());
        let told = WatchStatus::new(&connection, |all: &mut Connections| &mut all.node);
        let fold = NodeFold { facts: NodeFacts::default(), published: facts, told };
        tasks.spawn(Reflector::new(api.clone(), fold).fields(&format!("metadata.name={node}")).run());
        tasks.spawn(api.addresses().clone().remember(receivers.1.clone()));
        tasks.spawn(watch_slices(api.clone(), slices, connection));
        let known = Sender::default();
        let cidrs = known.subscribe();
        tasks.spawn(cidrs::poll(api, known));
        let (services, slices, node, connection) = receivers;
        Self { services, slices, node, cidrs, connection, _tasks: tasks }
    }

    /// What has not been listed yet, if anything.
    #[must_use]
    pub fn missing(&self) -> Option<&'static str> {
        if self.services.borrow().is_none() {
            Some("Services")
        } else if self.slices.borrow().is_none() {
            Some("EndpointSlices")
        } else {
            self.node.borrow().is_none().then_some("this node's Node")
        }
    }
}

/// Watches the slices in the version that the API server has. One that is upgraded meanwhile may have another.
async fn watch_slices(api: Arc<ApiServer>, published: Sender<Option<Slices>>, connection: Sender<Connections>) {
    let refused = Arc::new(Notify::new());
    let mut outage = Outage::new("endpointslices");
    loop {
        let began = Instant::now();
        let told = WatchStatus::new(&connection, |all: &mut Connections| &mut all.slices).refused(&refused);
        let (from, seen) = (api.clone(), published.clone());
        let failed = match has_version_1(&api).await {
            Ok(true) => watch_version::<V1>(from, seen, told, &refused).await,
            Ok(false) => watch_version::<V1Beta1>(from, seen, told, &refused).await,
            Err(error) => {
                api.reconnect();
                told.say(Err(&error));
                error
            }
        };
        outage.wait(began, &Interrupted::Failed(failed)).await;
    }
}

/// Watches until the API server refuses: then it may have lost the version.
async fn watch_version<V: Version>(
    api: Arc<ApiServer>,
    published: Sender<Option<Slices>>,
    told: WatchStatus<Connections>,
    refused: &Notify,
) -> ApiError {
    let connection = told.subscribe();
    let fold = SetFold::new(SlicesOf::<V>(SliceSet::default(), PhantomData), published, told);
    tokio::select! {
        () = Reflector::new(Arc::clone(&api), fold).labels(OF_SLICES).run() => {}
        () = refused.notified() => {}
    }
    let state = connection.borrow().slices.clone();
    state.and_then(Result::err).unwrap_or_else(|| api.silent())
}

/// Whether the API server knows `discovery.k8s.io/v1`, which came with Kubernetes 1.21.
async fn has_version_1(api: &ApiServer) -> Result<bool, ApiError> {
    let client = api.client().await?;
    let request = Request::new("").get("apis/discovery.k8s.io/v1", &kube::api::GetParams::default());
    let request = request.map_err(|error| ApiError::new("get", &kube::Error::BuildRequest(error)))?;
    match client.request::<IgnoredAny>(request).await {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(ApiError::new("get", &error)),
    }
}

/// This node's Node.
struct NodeFold {
    facts: NodeFacts,
    published: Sender<Option<NodeFacts>>,
    told: WatchStatus<Connections>,
}

impl Fold for NodeFold {
    type Object = NodeObject;

    fn listed(&self, objects: Vec<NodeObject>, _revision: i64) -> Self {
        let facts = objects.first().map(NodeFacts::read).unwrap_or_default();
        Self { facts, published: self.published.clone(), told: self.told.clone() }
    }

    fn applied(&mut self, object: NodeObject) -> bool {
        let facts = NodeFacts::read(&object);
        std::mem::replace(&mut self.facts, facts.clone()) != facts
    }

    /// A Node that is gone may come back; its zone is where it was.
    fn deleted(&mut self, _object: NodeObject) -> bool {
        !std::mem::replace(&mut self.facts.going, true)
    }

    fn would_lose_most(&self) -> bool {
        false
    }

    fn publish(&mut self) {
        self.published.send_replace(Some(self.facts.clone()));
    }

    fn connection_is(&mut self, state: Result<(), &ApiError>) {
        self.told.say(state);
    }
}

impl Object for ServiceObject {
    const PATH: &'static str = "/api/v1/services";

    fn revision(&self) -> i64 {
        revision(Some(&self.metadata.resource_version))
    }
}

impl Object for NodeObject {
    const PATH: &'static str = "/api/v1/nodes";

    fn revision(&self) -> i64 {
        revision(Some(&self.metadata.resource_version))
    }
}

impl Set for ServiceSet {
    type Object = ServiceObject;
    type All = Services;

    fn listed(&self, objects: &[ServiceObject]) -> Self {
        Self::listed(objects)
    }

    fn begin_list(&self) -> Option<Self> {
        Some(Self::default())
    }

    fn end_list(&mut self) {
        self.compact();
    }

    fn apply(&mut self, object: &ServiceObject) -> bool {
        self.apply(object)
    }

    fn remove(&mut self, object: &ServiceObject) -> bool {
        self.remove(&object.metadata)
    }

    fn all(&self) -> &Services {
        self.services()
    }
}

/// A version of the group `discovery.k8s.io`. What matters of a slice is the same in both.
trait Version: Clone + Send + Sync + 'static {
    const PATH: &'static str;
}

/// Since Kubernetes 1.21.
#[derive(Clone)]
struct V1;

/// Before.
#[derive(Clone)]
struct V1Beta1;

impl Version for V1 {
    const PATH: &'static str = "/apis/discovery.k8s.io/v1/endpointslices";
}

impl Version for V1Beta1 {
    const PATH: &'static str = "/apis/discovery.k8s.io/v1beta1/endpointslices";
}

/// A slice as a version has it.
#[derive(Clone, Deserialize)]
#[serde(transparent, bound = "")]
struct SliceOf<V> {
    slice: SliceObject,
    #[serde(skip)]
    version: PhantomData<V>,
}

impl<V: Version> Object for SliceOf<V> {
    const PATH: &'static str = V::PATH;

    fn revision(&self) -> i64 {
        revision(Some(&self.slice.metadata.resource_version))
    }
}

/// All slices as a version has them.
struct SlicesOf<V>(SliceSet, PhantomData<V>);

impl<V: Version> Set for SlicesOf<V> {
    type Object = SliceOf<V>;
    type All = Slices;

    fn listed(&self, objects: &[SliceOf<V>]) -> Self {
        Self(SliceSet::listed(objects.iter().map(|object| &object.slice)), PhantomData)
    }

    fn begin_list(&self) -> Option<Self> {
        Some(Self(SliceSet::default(), PhantomData))
    }

    fn end_list(&mut self) {
        self.0.compact();
    }

    fn apply(&mut self, object: &SliceOf<V>) -> bool {
        self.0.apply(&object.slice)
    }

    fn remove(&mut self, object: &SliceOf<V>) -> bool {
        self.0.remove(&object.slice.metadata)
    }

    fn all(&self) -> &Slices {
        self.0.slices()
    }
}
