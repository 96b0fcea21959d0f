//! [`Reflector`]: all objects of one kind, folded into what is made of them: a list, then every change after it.
//!
//! ```text
//! list all objects at R ──► publish ──► is it still the same store? ──► watch from R ──► fold in, publish ─┐
//!   ▲                                       ▲     │                          │                             │
//!   │                                       └─────┼─ the watch has ended ────┴─────────────────────────────┘
//!   └── history compacted (410), store set back, most gone at once
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
//!
//! What the objects amount to is the [`Fold`]'s affair; when it is believed, and told, is decided here. Nothing is ever
//! published but a whole list, or one with events folded in; while the API server is away the last one stays. Reflectors
//! of several kinds run side by side, each on a task of its own, over one [`ApiServer`].

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt as _, Stream, TryStreamExt as _};
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::{ObjectList, Request};
use serde::de::{DeserializeOwned, IgnoredAny};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{debug, info};

use super::client::{ApiError, ApiServer};
use crate::retry::{self, Look, Outage};

/// Objects in one answer: a Node or a Pod has some 10 kB, most of it of no interest.
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

/// How long it takes at most until a kind that the API server doesn't know is looked for again; half of it at least. Each
/// node asks.
const ABSENT: Duration = Duration::from_secs(60);

/// How long a kind that was known must not be before what is known of it is forgotten. An API server that starts may not
/// know kinds that are defined in the cluster for a moment.
const GONE: Duration = Duration::from_secs(10);

const LIST: &str = "list";
const WATCH: &str = "watch";

type Interrupted = retry::Interrupted<ApiError>;

/// An object of Kubernetes as a type of our own, with the members that matter: the rest is passed over while it is
/// parsed. A member of another type than this one has stops the whole kind, so whatever may be wrong in an object is
/// text here, and the fold's to judge.
pub trait Object: DeserializeOwned + Clone + Send + 'static {
    /// The path of all objects of the kind, in all namespaces, such as `/api/v1/nodes`.
    const PATH: &'static str;

    /// Its `metadata.resourceVersion`; see [`revision()`].
    fn revision(&self) -> i64;
}

/// A resource version as a number. Kubernetes calls it opaque, but it has always been etcd's revision, and is promised to
/// be a number that grows from 1.35 on (KEP-5504). What is none is 0.
#[must_use]
pub fn revision(version: Option<&str>) -> i64 {
    version.and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// What all objects of a kind amount to.
pub trait Fold: Sized + Send + Sync + 'static {
    /// The kind of objects.
    type Object: Object;

    /// What all objects of a list that was taken at `revision` amount to, after what is known. Tells nobody.
    fn listed(&self, objects: Vec<Self::Object>, revision: i64) -> Self;

    /// An empty one, into which the objects of a list are folded one by one, page by page: of kinds of which all objects at
    /// once take much memory. `None` where a list depends on what is known: [`Fold::listed`] gets it as a whole.
    fn begin_list(&self) -> Option<Self> {
        None
    }

    /// The list that it began with is whole.
    fn end_list(&mut self) {}

    /// Takes in that an object was created or changed; true when there is something to publish.
    fn applied(&mut self, object: Self::Object) -> bool;

    /// Takes in that an object was deleted, or is not among the selected ones any more; true when there is something to
    /// publish.
    fn deleted(&mut self, object: Self::Object) -> bool;

    /// True when most of what was published last would be gone: then a list has to confirm it, and of a list a second one.
    fn would_lose_most(&self) -> bool;

    /// Tells whoever wants to know.
    fn publish(&mut self);

    /// The store behind the API server turned out to be an older copy of itself; what that shows is published next.
    fn was_set_back(&mut self) {}

    /// The watch is running, or why it isn't. It is being retried then.
    fn connection_is(&mut self, _state: Result<(), &ApiError>) {}
}

/// Keeps a fold up to date with the API server.
pub struct Reflector<F> {
    api: Arc<ApiServer>,
    labels: Option<String>,
    fields: Option<String>,
    may_be_absent: bool,
    fold: F,
    /// The latest revision that was seen.
    seen: i64,
    /// True while the fold has all there was at that revision, so that a watch may go on from there.
    is_complete: bool,
}

impl<F: Fold> Reflector<F> {
    /// One of all objects of the kind.
    pub fn new(api: Arc<ApiServer>, fold: F) -> Self {
        Self { api, labels: None, fields: None, may_be_absent: false, fold, seen: 0, is_complete: false }
    }

    /// Of those with such labels alone, as `app=web,!headless`.
    #[must_use]
    pub fn labels(self, selector: &str) -> Self {
        Self { labels: Some(selector.to_owned()), ..self }
    }

    /// Of those with such fields alone, as `spec.nodeName=node-1`. The API server knows only some fields of each kind.
    #[must_use]
    pub fn fields(self, selector: &str) -> Self {
        Self { fields: Some(selector.to_owned()), ..self }
    }

    /// Of a kind that the API server may not know, as one that is defined in some clusters. There are none of it then, and it
    /// is looked for again.
    #[must_use]
    pub fn may_be_absent(self) -> Self {
        Self { may_be_absent: true, ..self }
    }

    /// Lists and watches until the task is dropped.
    pub async fn run(mut self) {
        let mut outage = Outage::new(kind::<F::Object>());
        loop {
            let began = Instant::now();
            let Err(interrupted) = self.list_and_watch(&mut outage).await;
            if self.is_absent(&interrupted).await {
                outage.over();
                self.are_none();
                sleep(ABSENT / 2 + fastrand::u32(..1000) * (ABSENT / 2000)).await;
                continue;
            }
            match &interrupted {
                Interrupted::Failed(error) => {
                    self.api.reconnect();
                    self.fold.connection_is(Err(error));
                }
                Interrupted::Relist(_) => self.is_complete = false,
            }
            outage.wait(began, &interrupted).await;
        }
    }

    /// Whether the watch failed as there is no such kind.
    async fn is_absent(&self, interrupted: &Interrupted) -> bool {
        if !self.may_be_absent || !matches!(interrupted, Interrupted::Failed(ApiError::Refused { .. })) {
            return false;
        }
        if !self.is_not_found().await {
            return false;
        }
        if self.seen > 0 {
            sleep(GONE).await;
        }
        self.seen == 0 || self.is_not_found().await
    }

    async fn is_not_found(&self) -> bool {
        let Ok(client) = self.api.client().await else { return false };
        let Ok(request) = Request::new(F::Object::PATH).list(&ListParams { limit: Some(1), ..self.selected() }) else {
            return false;
        };
        let answer = timeout(PAGE_TIME, client.request::<IgnoredAny>(request)).await;
        matches!(answer, Ok(Err(kube::Error::Api(status))) if status.code == 404)
    }

    /// Publishes that there are none.
    fn are_none(&mut self) {
        let kind = kind::<F::Object>();
        if self.seen > 0 {
            info!(kind, "the API server does not know this kind any more");
        } else {
            debug!(kind, "the API server does not know this kind");
        }
        self.fold = self.fold.listed(vec![], 0);
        (self.seen, self.is_complete) = (0, false);
        self.fold.connection_is(Ok(()));
        self.fold.publish();
    }

    async fn list_and_watch(&mut self, outage: &mut Outage) -> Result<Infallible, Interrupted> {
        let client = self.api.client().await.map_err(Interrupted::Failed)?;
        loop {
            if !self.is_complete {
                self.list(&client).await?;
            }
            let (from, now) = (self.seen, self.revision_now(&client).await?);
            if now < from {
                return Err(Interrupted::Relist(format!("the store was set back from revision {from} to {now}")));
            }
            // Spread over half of its time.
            let seconds = WATCH_SECONDS + fastrand::u32(..WATCH_SECONDS / 2);
            let events = self.watch(&client, seconds).await?;
            let end = Instant::now() + Duration::from_secs(seconds.into()) + OVERDUE;
            outage.over();
            self.fold.connection_is(Ok(()));
            self.take_in_all(&client, events, end).await?;
        }
    }

    /// Lists all objects and publishes them; most being gone only when a second look shows the same.
    async fn list(&mut self, client: &Client) -> Result<(), Interrupted> {
        let first = self.look(client).await?;
        let (listed, at) = if first.loses_most {
            first.hold_back().await;
            self.look(client).await?.believe()
        } else {
            first.found
        };
        self.fold = listed;
        if at < self.seen {
            self.fold.was_set_back();
        }
        (self.seen, self.is_complete) = (at, true);
        self.fold.publish();
        Ok(())
    }

    /// All objects, folded, and the revision that they are of.
    async fn look(&self, client: &Client) -> Result<Look<(F, i64)>, Interrupted> {
        let (mut by_page, mut all, mut left) = (self.fold.begin_list(), vec![], 0);
        let mut params = ListParams { limit: Some(PAGE), ..self.selected() };
        let at = loop {
            let page: ObjectList<F::Object> = self.page(client, &params).await?;
            left += page.items.len();
            match &mut by_page {
                Some(fold) => page.items.into_iter().for_each(|object| _ = fold.applied(object)),
                None => all.extend(page.items),
            }
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => params.continue_token = Some(token),
                None => break revision(page.metadata.resource_version.as_deref()),
            }
        };
        let mut listed = by_page.unwrap_or_else(|| self.fold.listed(all, at));
        listed.end_list();
        let loses_most = listed.would_lose_most();
        Ok(Look { kind: kind::<F::Object>(), found: (listed, at), left, loses_most })
    }

    /// The store's revision now, linearizably.
    async fn revision_now(&self, client: &Client) -> Result<i64, Interrupted> {
        let one = ListParams { limit: Some(1), ..self.selected() };
        let one: ObjectList<IgnoredAny> = self.page(client, &one).await?;
        Ok(revision(one.metadata.resource_version.as_deref()))
    }

    async fn page<T>(&self, client: &Client, params: &ListParams) -> Result<ObjectList<T>, Interrupted>
    where
        T: DeserializeOwned + Clone,
    {
        let request = Request::new(F::Object::PATH).list(params).map_err(kube::Error::BuildRequest);
        let answer = async { client.request(request?).await };
        timeout(PAGE_TIME, answer).await.map_err(|_| self.silent())?.map_err(|error| interrupted(LIST, &error))
    }

    fn selected(&self) -> ListParams {
        ListParams { label_selector: self.labels.clone(), field_selector: self.fields.clone(), ..ListParams::default() }
    }

    /// Begins a watch from what was seen last.
    async fn watch(
        &self,
        client: &Client,
        seconds: u32,
    ) -> Result<impl Stream<Item = kube::Result<WatchEvent<F::Object>>> + use<F>, Interrupted> {
        let params = WatchParams {
            label_selector: self.labels.clone(),
            field_selector: self.fields.clone(),
            timeout: Some(seconds),
            bookmarks: true,
            ..WatchParams::default()
        };
        let request = Request::new(F::Object::PATH).watch(&params, &self.seen.to_string());
        let request = request.map_err(kube::Error::BuildRequest);
        let answer = async { client.request_events(request?).await };
        timeout(PAGE_TIME, answer).await.map_err(|_| self.silent())?.map_err(|error| interrupted(WATCH, &error))
    }

    /// Folds events in until the watch ends in good order.
    async fn take_in_all(
        &mut self,
        client: &Client,
        events: impl Stream<Item = kube::Result<WatchEvent<F::Object>>>,
        end: Instant,
    ) -> Result<(), Interrupted> {
        let mut events = pin!(events);
        loop {
            let first = self.next_event(client, &mut events, end).await?;
            let mut changed = false;
            let goes_on = self.take_in_batch(first, &mut events, &mut changed);
            // However the batch ended: what is folded in comes with no other watch.
            self.publish(changed)?;
            if !goes_on? {
                return Ok(());
            }
        }
    }

    /// The next event of a watch; `None` at its end.
    async fn next_event(
        &self,
        client: &Client,
        events: &mut (impl Stream<Item = kube::Result<WatchEvent<F::Object>>> + Unpin),
        end: Instant,
    ) -> Result<Option<WatchEvent<F::Object>>, Interrupted> {
        loop {
            let patience = end.min(Instant::now() + SILENCE);
            match timeout_at(patience, events.try_next()).await {
                Ok(event) => return event.map_err(|error| interrupted(WATCH, &error)),
                Err(_) if patience == end => return Err(self.silent()),
                // A server that hangs keeps its connections, and doesn't answer.
                Err(_) => drop(self.revision_now(client).await?),
            }
        }
    }

    /// Folds in an event and what else has come in meanwhile, before anybody is told; false at the end of the watch.
    fn take_in_batch(
        &mut self,
        first: Option<WatchEvent<F::Object>>,
        events: &mut (impl Stream<Item = kube::Result<WatchEvent<F::Object>>> + Unpin),
        changed: &mut bool,
    ) -> Result<bool, Interrupted> {
        let mut next = first;
        loop {
            let Some(event) = next else { return Ok(false) };
            *changed |= self.take_in(event)?;
            match events.try_next().now_or_never() {
                Some(more) => next = more.map_err(|error| interrupted(WATCH, &error))?,
                None => return Ok(true),
            }
        }
    }

    /// Folds one event in; true when there is something to publish.
    fn take_in(&mut self, event: WatchEvent<F::Object>) -> Result<bool, Interrupted> {
        let (changed, at) = match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                let at = object.revision();
                (self.fold.applied(object), at)
            }
            WatchEvent::Deleted(object) => {
                let at = object.revision();
                (self.fold.deleted(object), at)
            }
            WatchEvent::Bookmark(mark) => (false, revision(Some(&mark.metadata.resource_version))),
            WatchEvent::Error(status) => return Err(interrupted(WATCH, &kube::Error::Api(status))),
        };
        self.seen = at;
        Ok(changed)
    }

    fn silent(&self) -> Interrupted {
        Interrupted::Failed(self.api.silent())
    }

    /// Publishes what events were folded into, unless they removed most of it: then a list has to confirm it.
    fn publish(&mut self, changed: bool) -> Result<(), Interrupted> {
        if changed && self.fold.would_lose_most() {
            return Err(Interrupted::Relist("most were removed at once".into()));
        }
        if changed {
            self.fold.publish();
        }
        Ok(())
    }
}

/// The word for a kind in the log and in rights: `nodes` for `/api/v1/nodes`.
fn kind<O: Object>() -> &'static str {
    O::PATH.rsplit('/').next().unwrap_or(O::PATH)
}

/// Gone is the history that a watch or the next page of a list would need.
fn interrupted(verb: &'static str, error: &kube::Error) -> Interrupted {
    match error {
        kube::Error::Api(status) if status.code == 410 => Interrupted::Relist(status.message.clone()),
        error => Interrupted::Failed(ApiError::new(verb, error)),
    }
}
