//! What is written on this node's Node: the annotations of its lease, and what tells the cluster that its network works.
//! Each is one patch that names what differs and nothing else; where nothing differs, nothing is sent.

use std::collections::BTreeMap;
use std::time::Duration;

use fabric_core::handoff::Readiness;
use fabric_core::record::LeaseKey;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::Request;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{info, warn};

use super::Shared;
use super::node::{Condition, Node};
use crate::kubernetes::client::ApiError;
use crate::kubernetes::reflector::Object as _;
use crate::retry::Backoff;
use crate::store::StoreError;

/// How long one write may take.
const WRITE_TIME: Duration = Duration::from_secs(10);

/// In errors.
pub(super) const PATCH: &str = "patch";

/// The delay after the first attempt that failed, and the longest one.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// In the list of who changed what.
const MANAGER: &str = "fabricd";

/// Says that no pod of this Node can be reached. A cloud's controller manager sets it when the Node is made, and takes
/// care that nothing is scheduled there until it is `False`.
const CONDITION: &str = "NetworkUnavailable";

/// The reason of the condition while it is `True` and ours.
const NOT_READY: &str = "FabricIsNotReady";

/// How long a node may be on its way to being ready before its Node says why it isn't yet.
const ON_ITS_WAY: Duration = Duration::from_secs(10);

/// Writes that come soon after each other are spaced out: somebody undoes them.
#[derive(Debug)]
pub(super) struct Pace {
    last: Option<Instant>,
    in_a_row: u32,
    backoff: Backoff,
    /// From the last write to the next.
    rest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        let backoff = Backoff::new(Duration::from_millis(200), Self::LONGEST);
        Self { last: None, in_a_row: 0, backoff, rest: Duration::ZERO }
    }
}

impl Pace {
    /// A Node that is made anew needs a few.
    const AT_ONCE: u32 = 4;
    const SOON: Duration = Duration::from_secs(60);
    const LONGEST: Duration = Duration::from_secs(30);

    /// How long to wait before the next write.
    fn delay(&self) -> Duration {
        let is_soon = self.last.is_some_and(|last| last.elapsed() <= Self::SOON);
        if is_soon { self.rest } else { Duration::ZERO }
    }

    /// Notes that something was written.
    fn wrote(&mut self) {
        if self.last.is_some_and(|last| last.elapsed() < Self::SOON + Self::LONGEST) {
            self.in_a_row += 1;
        } else {
            *self = Self::default();
        }
        self.last = Some(Instant::now());
        if self.in_a_row > Self::AT_ONCE {
            self.rest = self.backoff.delay();
        }
        if self.in_a_row == 2 * Self::AT_ONCE {
            warn!("another program reverts what is written on this Node; it is written again, with growing delays");
        }
    }
}

/// One write.
pub(super) enum Change {
    /// Of annotations or conditions: part of the Node's status.
    Status(Value),
    /// Of the taints, a list that can only be written as a whole.
    Taints(Value),
}

/// The annotations that differ on a Node, if any do.
pub(super) fn annotations(node: &Node, wanted: BTreeMap<String, Option<String>>) -> Option<Change> {
    let differ: BTreeMap<_, _> =
        wanted.into_iter().filter(|(name, value)| node.annotation(name) != value.as_deref()).collect();
    // Its uid, so that another Node of the name isn't written on.
    (!differ.is_empty()).then(|| Change::Status(json!({"metadata": {"uid": node.metadata.uid, "annotations": differ}})))
}

/// What tells the cluster that this Node's network works, as far as it isn't said: first the condition, then the taint.
pub(super) fn readiness(node: &Node, startup_taint: Option<&str>) -> Option<Change> {
    if node.condition(CONDITION).is_none_or(|condition| condition.status != "False") {
        return Some(condition(node, "False", "FabricIsUp", "fabricd is running on this node"));
    }
    let is_ours = |taint: &&Value| startup_taint.is_some_and(|key| taint["key"] == key);
    let taints = node.spec.taints.as_deref().unwrap_or_default();
    let others: Vec<&Value> = taints.iter().filter(|taint| !is_ours(taint)).collect();
    // Whoever sets another taint meanwhile is not to be overwritten.
    let seen = json!({"uid": node.metadata.uid, "resourceVersion": node.metadata.resource_version});
    (others.len() < taints.len()).then(|| Change::Taints(json!({"metadata": seen, "spec": {"taints": others}})))
}

/// What tells the cluster why this Node's network doesn't work yet, unless it is said already. What was said of a network
/// that did work is not taken back, since its pods may well go on; nor is what somebody else said.
pub(super) fn trouble(node: &Node, why: &str) -> Option<Change> {
    let is_open = |known: &Condition| known.status == "True" && known.reason == NOT_READY && known.message != why;
    node.condition(CONDITION).is_none_or(is_open).then(|| condition(node, "True", NOT_READY, why))
}

/// The condition, as a patch.
fn condition(node: &Node, status: &str, reason: &str, message: &str) -> Change {
    let now = Time(Timestamp::now());
    let mut condition =
        json!({"type": CONDITION, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": now});
    if node.condition(CONDITION).is_none_or(|known| known.status != status) {
        condition["lastTransitionTime"] = json!(now);
    }
    Change::Status(json!({"metadata": {"uid": node.metadata.uid}, "status": {"conditions": [condition]}}))
}

/// Sends a change; gives the Node as it is then.
async fn send(shared: &Shared, change: Change) -> Result<Node, SendError> {
    let client = shared.api.client().await?;
    let (nodes, name) = (Request::new(Node::PATH), shared.node.as_str());
    let params = PatchParams { field_manager: Some(MANAGER.into()), ..PatchParams::default() };
    let request = match change {
        Change::Status(patch) => nodes.patch_subresource("status", name, &params, &Patch::Strategic(patch)),
        Change::Taints(patch) => nodes.patch(name, &params, &Patch::Merge(patch)),
    };
    let answer = async { client.request(request.map_err(kube::Error::BuildRequest)?).await };
    match timeout(WRITE_TIME, answer).await {
        Ok(Ok(node)) => Ok(node),
        // It was deleted, is another one, or has changed.
        Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409 | 422) => Err(SendError::Outdated),
        Ok(Err(error)) => Err(ApiError::new(PATCH, &error).into()),
        Err(_) => Err(shared.api.silent().into()),
    }
}

/// Why a change was not made.
enum SendError {
    /// It was decided on a Node that is another by now.
    Outdated,
    /// Else.
    Store(StoreError),
}

impl From<ApiError> for SendError {
    fn from(error: ApiError) -> Self {
        Self::Store(error.into())
    }
}

impl Shared {
    /// Makes the Node's annotations say this; gives the revision at which they do.
    pub(super) async fn say(&self, key: LeaseKey, wanted: BTreeMap<String, Option<String>>) -> Result<i64, StoreError> {
        let mut pace = self.pace.lock().await;
        let lost = StoreError::Lost { key };
        let Some(node) = self.own() else { return Err(lost) };
        let has = |(family, subnet)| node.subnets().get(family) == Some(subnet);
        if !key.subnets().iter().all(has) {
            return Err(lost);
        }
        let Some(change) = annotations(&node, wanted) else { return Ok(node.revision()) };
        sleep(pace.delay()).await;
        match send(self, change).await {
            Ok(node) => {
                pace.wrote();
                let revision = node.revision();
                self.observe(node);
                Ok(revision)
            }
            Err(SendError::Outdated) => Err(lost),
            Err(SendError::Store(error)) => Err(error),
        }
    }

    /// Says that this node's network works, while it does, and says it again when somebody takes it back; of one that has not
    /// worked yet, why.
    pub(super) async fn keep_announcing(&self) {
        let (mut now, mut own) = (self.readiness.subscribe(), self.own.subscribe());
        let (mut pace, mut retry, mut told) = (Pace::default(), Backoff::new(RETRY.0, RETRY.1), false);
        let mut not_ready_since = None;
        loop {
            // Both are looked at in any case: what is not would be news for ever.
            let is = now.borrow_and_update().clone();
            let node = own.borrow_and_update().clone();
            let since = match is {
                Readiness::Ready => None,
                Readiness::NotReady { .. } => not_ready_since.or_else(|| Some(Instant::now())),
            };
            not_ready_since = since;
            let patient = since.map(|since| since + ON_ITS_WAY).filter(|end| *end > Instant::now());
            let change = node.and_then(|node| match &is {
                Readiness::Ready => readiness(&node, self.startup_taint.as_deref()),
                Readiness::NotReady { reason, .. } if patient.is_none() => trouble(&node, reason),
                Readiness::NotReady { .. } => None,
            });
            if let Some(change) = change {
                sleep(pace.delay()).await;
                match send(self, change).await {
                    Ok(node) => {
                        info!(ready = is == Readiness::Ready, "condition NetworkUnavailable written");
                        pace.wrote();
                        retry.reset();
                        told = false;
                        self.observe(node);
                    }
                    // The watch brings what is there by now.
                    Err(SendError::Outdated) => {}
                    Err(SendError::Store(error)) => {
                        if !std::mem::replace(&mut told, true) {
                            warn!(%error, "cannot write the condition NetworkUnavailable, trying again");
                        }
                        sleep(retry.delay()).await;
                        continue;
                    }
                }
            }
            tokio::select! {
                changed = now.changed() => if changed.is_err() { return },
                () = sleep_until(patient.unwrap_or_else(Instant::now)), if patient.is_some() => {}
                changed = own.changed() => if changed.is_err() { return },
            }
        }
    }
}
