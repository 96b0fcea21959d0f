//! Follows the Nodes: a list, then every change after it.
//!
//! ```text
//! list all Nodes at R ──► publish ──► is it still the same store? ──► watch from R ──► fold in, publish ─┐
//!   ▲                                     ▲     │                          │                             │
//!   │                                     └─────┼─ the watch has ended ────┴─────────────────────────────┘
//!   └── history compacted (410), store set back ┘
//! ```
//!
//! The API server ends every watch after some minutes, and all of them when it restarts. So a watch goes on where the
//! last one ended: a thousand nodes that list everything at once would bring it down again. Bookmarks carry the revision
//! forward while nothing happens. What a list would tell, that the store was replaced by an older copy of itself, a look
//! at the revision tells too, which is asked for before each watch: one from a revision that is yet to come would be
//! silent until then.
//!
//! Lists are linearizable, never from an API server's cache: a cache that is cut off from etcd shows the past, and
//! whatever a list lacks is removed from the kernel.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, Stream, TryStreamExt as _};
use kube::api::{Api, ListParams, WatchEvent, WatchParams};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::warn;

use super::node::{Node, revision};
use super::nodes::Nodes;
use super::{Shared, store_error, unreachable};
use crate::store::outage::Outage;
use crate::store::{Connection, StoreError};

/// Nodes in one answer: each has some 10 kB, most of it of no interest.
const PAGE: u32 = 500;

/// How long one page may take.
const PAGE_TIME: Duration = Duration::from_secs(30);

/// How long a watch lasts at least, in seconds; up to half as long again, so that not all end at once.
const WATCH_SECONDS: u32 = 200;

/// How long after its time a watch may end. A connection that is broken is noticed long before.
const OVERDUE: Duration = Duration::from_secs(15);

/// How long a watch may be silent before the API server is asked whether it still works. It sends a bookmark each minute
/// (`bookmarkFrequency` in k8s.io/apiserver), so one that works is hardly ever asked.
const SILENCE: Duration = Duration::from_secs(90);

/// How long the disappearance of most leases waits for a second look.
const SECOND_LOOK: Duration = Duration::from_millis(1500);

const LIST: &str = "list the Nodes";
const WATCH: &str = "watch the Nodes";

/// Why following can't just go on.
enum Interrupted {
    /// The API server could not be asked. The watch goes on later.
    Failed(StoreError),
    /// What is known is no base to go on from.
    Relist(String),
}

/// Follows the Nodes until the task is dropped.
pub(super) async fn follow_for_ever(shared: Arc<Shared>) {
    let mut outage = Outage::default();
    let mut nodes = Nodes::default();
    // The revision to go on from.
    let mut known: Option<i64> = None;
    loop {
        let began = Instant::now();
        let Err(interrupted) = follow(&shared, &mut nodes, &mut known, &mut outage).await;
        outage.lasted(began.elapsed());
        match interrupted {
            Interrupted::Failed(error) => {
                outage.failed(&error);
                shared.reconnect();
                shared.connection_is(Connection::Down(error.to_string()));
            }
            Interrupted::Relist(reason) => {
                outage.relisting(&reason);
                known = None;
            }
        }
        sleep(outage.delay()).await;
    }
}

async fn follow(
    shared: &Shared,
    nodes: &mut Nodes,
    known: &mut Option<i64>,
    outage: &mut Outage,
) -> Result<Infallible, Interrupted> {
    let api: Api<Node> = Api::all(shared.client().await.map_err(Interrupted::Failed)?);
    loop {
        let from = match *known {
            Some(from) => from,
            None => *known.insert(list(shared, &api, nodes).await?),
        };
        let now = look(&api).await?;
        if now < from {
            return Err(Interrupted::Relist(format!("the store was set back from revision {from} to {now}")));
        }
        // Spread over half of its time.
        let seconds = WATCH_SECONDS + fastrand::u32(..WATCH_SECONDS / 2);
        let params = WatchParams { timeout: Some(seconds), bookmarks: true, ..WatchParams::default() };
        let events = timeout(PAGE_TIME, api.watch(&params, &from.to_string())).await;
        let events = events.map_err(|_| silent())?.map_err(|e| interrupted(WATCH, &e))?;
        let end = Instant::now() + Duration::from_secs(seconds.into()) + OVERDUE;
        outage.over();
        shared.connection_is(Connection::Up);
        watch(shared, &api, nodes, known, events, end).await?;
    }
}

/// Folds events in until the watch ends in good order.
async fn watch(
    shared: &Shared,
    api: &Api<Node>,
    nodes: &mut Nodes,
    known: &mut Option<i64>,
    events: impl Stream<Item = kube::Result<WatchEvent<Node>>>,
    end: Instant,
) -> Result<(), Interrupted> {
    let mut events = pin!(events);
    loop {
        let mut next = heard(api, &mut events, end).await?;
        let mut changed = false;
        // What has come in meanwhile is folded in before anybody is told.
        loop {
            let Some(event) = next else { return publish(shared, nodes, changed) };
            changed |= take_in(shared, nodes, known, event)?;
            match events.try_next().now_or_never() {
                Some(more) => next = more.map_err(|e| interrupted(WATCH, &e))?,
                None => break,
            }
        }
        publish(shared, nodes, changed)?;
    }
}

/// The next event of a watch; `None` at its end.
async fn heard(
    api: &Api<Node>,
    events: &mut (impl Stream<Item = kube::Result<WatchEvent<Node>>> + Unpin),
    end: Instant,
) -> Result<Option<WatchEvent<Node>>, Interrupted> {
    loop {
        let patience = end.min(Instant::now() + SILENCE);
        match timeout_at(patience, events.try_next()).await {
            Ok(event) => return event.map_err(|e| interrupted(WATCH, &e)),
            Err(_) if patience == end => return Err(silent()),
            // A server that hangs keeps its connections, and doesn't answer.
            Err(_) => drop(look(api).await?),
        }
    }
}

/// Folds one event in; true when a lease has changed.
fn take_in(
    shared: &Shared,
    nodes: &mut Nodes,
    known: &mut Option<i64>,
    event: WatchEvent<Node>,
) -> Result<bool, Interrupted> {
    let (changed, at) = match event {
        WatchEvent::Added(node) | WatchEvent::Modified(node) => {
            let (changed, at) = (nodes.apply(&node), node.revision());
            shared.observe(node);
            (changed, at)
        }
        WatchEvent::Deleted(node) => {
            shared.gone(&node);
            (nodes.remove(&node), node.revision())
        }
        WatchEvent::Bookmark(mark) => (false, revision(Some(&mark.metadata.resource_version))),
        WatchEvent::Error(status) => return Err(interrupted(WATCH, &kube::Error::Api(status))),
    };
    *known = Some(at);
    Ok(changed)
}

/// Lists all Nodes, publishes them, and gives the revision of the list. One in which most of the known leases are missing
/// is published only when a second look shows the same: an operator's slip, and an etcd that is being restored, look
/// like that for a moment.
async fn list(shared: &Shared, api: &Api<Node>, nodes: &mut Nodes) -> Result<i64, Interrupted> {
    let (mut all, mut at) = pages(api).await?;
    let mut listed = Nodes::listed(nodes, &all, at);
    if shared.would_lose_most(listed.set()) {
        warn!(left = listed.set().len(), "most leases are gone; held back until a second look");
        sleep(SECOND_LOOK).await;
        (all, at) = pages(api).await?;
        listed = Nodes::listed(nodes, &all, at);
        warn!(left = listed.set().len(), "second look at the leases taken; published");
    }
    if at < nodes.set().revision() {
        shared.was_replaced();
    }
    shared.observe_all(all);
    *nodes = listed;
    shared.leases_are(nodes.set());
    Ok(at)
}

async fn pages(api: &Api<Node>) -> Result<(Vec<Node>, i64), Interrupted> {
    let (mut all, mut params) = (Vec::new(), ListParams::default().limit(PAGE));
    loop {
        let page = timeout(PAGE_TIME, api.list(&params)).await.map_err(|_| silent())?;
        let page = page.map_err(|e| interrupted(LIST, &e))?;
        all.extend(page.items);
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params.continue_token = Some(token),
            None => return Ok((all, revision(page.metadata.resource_version.as_deref()))),
        }
    }
}

/// The store's revision now, linearizably.
async fn look(api: &Api<Node>) -> Result<i64, Interrupted> {
    let one = timeout(PAGE_TIME, api.list_metadata(&ListParams::default().limit(1))).await.map_err(|_| silent())?;
    let one = one.map_err(|e| interrupted(LIST, &e))?;
    Ok(revision(one.metadata.resource_version.as_deref()))
}

/// Publishes a set with events folded in, unless they removed most of it: then a list has to confirm it.
fn publish(shared: &Shared, nodes: &Nodes, changed: bool) -> Result<(), Interrupted> {
    if !changed {
        return Ok(());
    }
    if shared.would_lose_most(nodes.set()) {
        return Err(Interrupted::Relist("most leases were removed at once".into()));
    }
    shared.leases_are(nodes.set());
    Ok(())
}

fn silent() -> Interrupted {
    Interrupted::Failed(unreachable("it does not answer"))
}

/// Gone is the history that a watch or the next page of a list would need.
fn interrupted(operation: &'static str, error: &kube::Error) -> Interrupted {
    match error {
        kube::Error::Api(status) if status.code == 410 => Interrupted::Relist(status.message.clone()),
        error => Interrupted::Failed(store_error(operation, error)),
    }
}
