//! [`EventRecorder`]: what is wrong with an object, told as an Event of Kubernetes on it, where its owner looks
//! (`kubectl describe service`, `kubectl describe networkpolicy`, `kubectl describe node`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::http;
use fabric_core::model::{NodeName, stable_hash};
use fabric_core::services::ObjectName;
use jiff::Timestamp;
use kube::api::{ListParams, PostParams};
use kube::core::Request;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, warn};

use super::client::{ApiError, ApiServer};
use crate::retry::Backoff;

/// As many wait to be told; more are told once some are.
const WAITING: usize = 64;
/// What lasts is told again: API servers forget an Event after an hour (`--event-ttl`).
const TOLD_AGAIN: Duration = Duration::from_secs(3600 + 60);
/// How long one request may take.
const LIMIT: Duration = Duration::from_secs(10);
/// The first delay after the API server didn't answer, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// Something that is wrong with an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectEvent {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub object: ObjectName,
    /// What is wrong, for programs.
    pub reason: Reason,
    /// What is wrong, and what to do.
    pub message: String,
}

/// Kinds of objects that we read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A Service.
    Service,
    /// A NetworkPolicy.
    NetworkPolicy,
    /// A ClusterNetworkPolicy, which has no namespace.
    ClusterNetworkPolicy,
    /// A Node, which has no namespace: that of its [`ObjectName`] is [`OF_NODES`].
    Node,
}

/// Where Events of objects without a namespace are: kubelet's words on a Node are there too.
pub const OF_NODES: &str = "default";

impl Kind {
    /// What the API server calls it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::Node => "Node",
        }
    }

    const fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Node => "v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
        }
    }

    /// Where the uid that its Events name is found. A Node's name it by its name, as kubelet does: kubectl looks for those.
    fn path(self, namespace: &str) -> Option<String> {
        match self {
            Self::Service => Some(format!("/api/v1/namespaces/{namespace}/services")),
            Self::NetworkPolicy => Some(format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies")),
            Self::ClusterNetworkPolicy => {
                Some("/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies".to_owned())
            }
            Self::Node => None,
        }
    }
}

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// A member that can't be used.
    Refused,
    /// Another Service has the address and port.
    Conflict,
    /// The port of its health check is taken on this node.
    HealthCheck,
    /// This node can't have new pods.
    NotReady,
    /// The API server refuses what this node must know.
    StoreRefuses,
    /// An operator should know it of this node.
    NodeWarning,
}

impl Reason {
    const fn word(self) -> &'static str {
        match self {
            Self::Refused => "FieldRefused",
            Self::Conflict => "FrontendConflict",
            Self::HealthCheck => "FailedToStartServiceHealthcheck",
            Self::NotReady => "FabricIsNotReady",
            Self::StoreRefuses => "FabricStoreRefuses",
            Self::NodeWarning => "FabricWarning",
        }
    }

    /// Whether other nodes may not have it: then each tells of itself. All else is told once, by whichever node is first.
    const fn is_of_one_node(self) -> bool {
        !matches!(self, Self::Refused | Self::Conflict)
    }
}

/// Who tells.
pub struct EventRecorder {
    queue: mpsc::Sender<ObjectEvent>,
    /// What there was to tell last, and when it was told.
    known: BTreeMap<ObjectEvent, Instant>,
    task: AbortHandle,
}

impl Drop for EventRecorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl EventRecorder {
    /// Begins to tell, as this node. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(api: Arc<ApiServer>, node: NodeName) -> Self {
        let (queue, waiting) = mpsc::channel(WAITING);
        let task = tokio::spawn(tell_all(api, node, waiting)).abort_handle();
        Self { queue, known: BTreeMap::new(), task }
    }

    /// Says what is wrong by now. Each is told once, and again when it was over meanwhile or lasts for more than an hour.
    pub fn update(&mut self, events: &[ObjectEvent]) {
        self.known.retain(|known, told| events.contains(known) && told.elapsed() < TOLD_AGAIN);
        for event in events {
            if !self.known.contains_key(event) && self.queue.try_send(event.clone()).is_ok() {
                self.known.insert(event.clone(), Instant::now());
            }
        }
    }
}

async fn tell_all(api: Arc<ApiServer>, node: NodeName, mut waiting: mpsc::Receiver<ObjectEvent>) {
    let mut retry = Backoff::new(RETRY.0, RETRY.1);
    let mut has_warned = false;
    while let Some(event) = waiting.recv().await {
        loop {
            match tell(&api, &node, &event).await {
                Ok(()) => break,
                // Another node was first, or the object is gone.
                Err(ApiError::Refused { reason, .. }) if has_warned || !reason.contains("forbidden") => {
                    debug!(object = %event.object, reason, "event was not taken");
                    break;
                }
                Err(ApiError::Refused { reason, .. }) => {
                    has_warned = true;
                    let rights = "isn't told as an Event; grant create of events";
                    warn!(reason, "what is wrong with a {} {rights}", event.kind.name());
                    break;
                }
                Err(error @ ApiError::Unreachable(_)) => {
                    debug!(object = %event.object, %error, "event waits for the API server");
                    sleep(retry.delay()).await;
                }
            }
        }
        retry.reset();
    }
}

async fn tell(api: &ApiServer, node: &NodeName, event: &ObjectEvent) -> Result<(), ApiError> {
    let ObjectEvent { kind, object, .. } = event;
    let (namespace, name) = (object.namespace(), object.name());
    let uid = match kind.path(namespace) {
        Some(path) => {
            // By a list of one: that takes no right but those that are needed anyway.
            let one = ListParams::default().fields(&format!("metadata.name={name}"));
            let List { items } = ask(api, "list", Request::new(path).list(&one)).await?;
            let Some(Named { metadata }) = items.into_iter().next() else { return Ok(()) };
            metadata.uid
        }
        None => name.to_owned(),
    };
    let document = document(event, &uid, node, Timestamp::now());
    let bytes = serde_json::to_vec(&document).map_err(|error| ApiError::Unreachable(error.to_string()))?;
    let namespace = document["metadata"]["namespace"].as_str().unwrap_or(OF_NODES);
    let post = Request::new(format!("/api/v1/namespaces/{namespace}/events")).create(&PostParams::default(), bytes);
    ask::<IgnoredAny>(api, "create", post).await.map(drop)
}

#[derive(Deserialize)]
struct List {
    items: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    metadata: Uid,
}

#[derive(Deserialize)]
struct Uid {
    #[serde(default)]
    uid: String,
}

async fn ask<T: DeserializeOwned>(
    api: &ApiServer,
    verb: &'static str,
    request: Result<http::Request<Vec<u8>>, kube::core::request::Error>,
) -> Result<T, ApiError> {
    let request = request.map_err(|error| ApiError::new(verb, &kube::Error::BuildRequest(error)))?;
    let client = api.client().await?;
    match timeout(LIMIT, client.request(request)).await {
        Ok(answer) => answer.map_err(|error| ApiError::new(verb, &error)),
        Err(_) => Err(api.silent()),
    }
}

/// The Event. Its name says what it is, so that of many nodes that would tell the same one does.
fn document(event: &ObjectEvent, uid: &str, node: &NodeName, now: Timestamp) -> Value {
    let ObjectEvent { kind, object, reason, message } = event;
    let (namespace, name) = (object.namespace(), object.name());
    let of_node = if reason.is_of_one_node() { node.as_str() } else { "" };
    let number = stable_hash(format!("{uid} {of_node} {reason:?} {message}").as_bytes());
    let version = kind.api_version();
    let mut object = json!({"apiVersion": version, "kind": kind.name(), "name": name, "uid": uid});
    if *kind != Kind::Node && !namespace.is_empty() {
        object["namespace"] = json!(namespace);
    }
    let namespace = if namespace.is_empty() { OF_NODES } else { namespace };
    json!({
        "apiVersion": "v1", "kind": "Event",
        "metadata": {"name": format!("{name}.{number:016x}"), "namespace": namespace},
        "involvedObject": object, "type": "Warning", "reason": reason.word(), "message": message,
        "source": {"component": "fabricd", "host": node.as_str()},
        "reportingComponent": "fabricd", "reportingInstance": node.as_str(),
        "firstTimestamp": seconds(now), "lastTimestamp": seconds(now), "count": 1,
    })
}

/// As the API has times: in whole seconds.
fn seconds(time: Timestamp) -> String {
    Timestamp::from_second(time.as_second()).unwrap_or(time).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_nodes_see_has_one_name_and_what_one_sees_has_its_own() {
        let name = |reason, node: &str| {
            let object = ObjectName::new("default", "web");
            let event = ObjectEvent { kind: Kind::Service, object, reason, message: "words".to_owned() };
            let event = document(&event, "uid-1", &node.parse().expect("a name"), Timestamp::UNIX_EPOCH);
            event["metadata"]["name"].as_str().expect("text").to_owned()
        };
        assert_eq!(name(Reason::Refused, "node-1"), name(Reason::Refused, "node-2"));
        assert_ne!(name(Reason::HealthCheck, "node-1"), name(Reason::HealthCheck, "node-2"));
        assert_ne!(name(Reason::Refused, "node-1"), name(Reason::Conflict, "node-1"));
        assert!(name(Reason::Refused, "node-1").starts_with("web."));
    }

    #[test]
    fn times_are_in_whole_seconds() {
        assert_eq!(seconds(Timestamp::new(0, 5_000_000).expect("a time")), "1970-01-01T00:00:00Z");
    }
}
