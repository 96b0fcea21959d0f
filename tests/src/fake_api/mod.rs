//! [`FakeApi`]: as much of an API server of Kubernetes as those who list, watch and patch need, over real HTTP, with faults.
//!
//! It lists by pages, watches from a revision with bookmarks and 410, in one namespace or all, by labels and fields;
//! creates, deletes, and patches objects and their status, with conflicts of uid and resource version. It answers as a kube-apiserver 1.20 was seen to answer. It knows
//! no users and no schema: what is refused for those reasons is only seen with a real one.

mod http;
mod objects;
mod selector;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use self::objects::Objects;
use self::selector::Selector;
use crate::kubernetes::Nodes;

/// The path of the Nodes.
pub const NODES: &str = "/api/v1/nodes";

/// What is wrong with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// It answers every request with this code.
    Refuses(u16),
    /// It answers so much later.
    Slow(Duration),
    /// It takes requests and says nothing.
    Hangs,
    /// It ends each watch with an error of this code, right after the next event.
    BreaksWatches(u16),
}

/// An API server. What it holds outlives [`FakeApi::stop`].
pub struct FakeApi {
    state: Arc<State>,
    address: SocketAddr,
    running: Mutex<Option<Running>>,
}

/// Ends when it is dropped.
struct Running {
    thread: Option<std::thread::JoinHandle<()>>,
    end: Option<oneshot::Sender<()>>,
}

struct State {
    objects: Mutex<Objects>,
    /// Counts what those who watch should look at.
    news: watch::Sender<u64>,
    bookmarks: watch::Sender<u64>,
    fault: watch::Sender<Fault>,
    /// All requests that would change something: verb, path and body.
    writes: Mutex<Vec<(String, String, Value)>>,
    /// How many pages of each collection's lists were asked for, those of one object not counted: by such the revision is
    /// asked for.
    lists: Mutex<BTreeMap<String, u64>>,
    /// Versions of groups that it doesn't know.
    lacking: Mutex<BTreeSet<String>>,
    /// Collections that may neither be listed nor watched.
    forbidden: Mutex<BTreeSet<String>>,
    /// The collections that were watched, and the revisions that each watch began at.
    watches: watch::Sender<Vec<(String, i64)>>,
}

impl FakeApi {
    /// Starts one at an address (port 0: any), in the network namespace of this thread.
    ///
    /// # Errors
    /// When the port is taken.
    pub fn start(address: SocketAddr) -> Result<Self> {
        let state = Arc::new(State {
            objects: Mutex::default(),
            news: watch::Sender::new(0),
            bookmarks: watch::Sender::new(0),
            fault: watch::Sender::new(Fault::None),
            writes: Mutex::default(),
            lists: Mutex::default(),
            lacking: Mutex::default(),
            forbidden: Mutex::default(),
            watches: watch::Sender::default(),
        });
        let (running, address) = Running::start(&state, address)?;
        Ok(Self { state, address, running: Mutex::new(Some(running)) })
    }

    /// Ends it and all its connections.
    pub fn stop(&self) {
        drop(self.lock_running().take());
    }

    /// Starts it again, with what it held, where it was.
    ///
    /// # Errors
    /// When the port is taken by now.
    pub fn start_again(&self) -> Result<()> {
        let (running, _) = Running::start(&self.state, self.address)?;
        *self.lock_running() = Some(running);
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes an object.
    pub fn create(&self, collection: &str, object: Value) {
        let created = self.state.objects().create(collection, object);
        created.unwrap_or_else(|refusal| panic!("{refusal:?}"));
        self.state.tell();
    }

    /// Deletes an object, if it is there.
    pub fn delete(&self, collection: &str, name: &str) {
        // That it isn't is fine.
        let _ = self.state.objects().delete(collection, name);
        self.state.tell();
    }

    /// Changes an object as somebody else would, by a merge patch of its metadata, spec and status.
    pub fn change(&self, collection: &str, name: &str, patch: &Value) {
        for is_status in [false, true] {
            let changed = self.state.objects().patch(collection, name, patch, is_status);
            changed.unwrap_or_else(|refusal| panic!("{refusal:?}"));
        }
        self.state.tell();
    }

    /// An object.
    #[must_use]
    pub fn get(&self, collection: &str, name: &str) -> Option<Value> {
        self.state.objects().get(collection, name).ok()
    }

    /// All objects of a collection.
    #[must_use]
    pub fn all(&self, collection: &str) -> Vec<Value> {
        self.state.objects().page(collection, &Selector::default(), "", usize::MAX).0
    }

    /// The revision of the last change.
    #[must_use]
    pub fn revision(&self) -> i64 {
        self.state.objects().revision()
    }

    /// Forgets all changes until now, and ends all watches: those who were away have to list again.
    pub fn compact(&self) {
        self.state.objects().compact();
        self.state.tell();
    }

    /// Sets the revision, as an etcd that was restored from an older copy does.
    pub fn set_revision(&self, revision: i64) {
        self.state.objects().set_revision(revision);
        self.state.tell();
    }

    /// Sends all who watch a bookmark, and ends their watches in good order.
    pub fn bookmark(&self) {
        self.state.bookmarks.send_modify(|times| *times += 1);
    }

    /// Waits until a watch of a collection has begun at this revision.
    pub async fn watched_from(&self, collection: &str, revision: i64) {
        let is_it = |(watched, from): &(String, i64)| watched == collection && *from == revision;
        // The sender lives as long as this does.
        let _ = self.state.watches.subscribe().wait_for(|begun| begun.iter().any(is_it)).await;
    }

    /// How many pages of a collection's lists it has been asked for, those of one object not counted.
    #[must_use]
    pub fn lists(&self, collection: &str) -> u64 {
        self.state.lists().get(collection).copied().unwrap_or_default()
    }

    /// Sets what is wrong with it from now on.
    pub fn set(&self, fault: Fault) {
        self.state.fault.send_replace(fault);
    }

    /// Makes it know no such version of a group, as `/apis/discovery.k8s.io/v1`.
    pub fn lacks(&self, version: &str) {
        self.state.lacking().insert(version.to_owned());
    }

    /// Makes it know such a version again.
    pub fn has(&self, version: &str) {
        self.state.lacking().remove(version);
    }

    /// Takes the right away to list and watch a collection, as RBAC does: a watch that runs goes on.
    pub fn forbid(&self, collection: &str) {
        self.state.forbidden().insert(collection.to_owned());
    }

    /// Gives it back.
    pub fn allow(&self, collection: &str) {
        self.state.forbidden().remove(collection);
    }

    /// All requests so far that would change something: verb, path and body.
    #[must_use]
    pub fn writes(&self) -> Vec<(String, String, Value)> {
        self.state.writes().clone()
    }

    fn lock_running(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes for FakeApi {
    fn kubeconfig(&self, dir: &Path) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": {"server": format!("http://{}", self.address)}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "fake"}}],
            "users": [{"name": "fake", "user": {}}],
        });
        let file = dir.join("kubeconfig");
        std::fs::write(&file, config.to_string()).with_context(|| format!("cannot write {}", file.display()))?;
        Ok(file)
    }

    fn nodes(&self) -> Vec<Value> {
        self.all(NODES)
    }

    fn add_node(&self, name: &str, subnets: &[&str]) {
        let first = subnets.first();
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": first, "podCIDRs": subnets}, "status": {},
        });
        self.create(NODES, node);
    }

    fn delete_node(&self, name: &str) {
        self.delete(NODES, name);
    }

    fn change_node(&self, name: &str, patch: &Value) {
        self.change(NODES, name, patch);
    }
}

impl State {
    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writes(&self) -> MutexGuard<'_, Vec<(String, String, Value)>> {
        self.writes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self) -> MutexGuard<'_, BTreeMap<String, u64>> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lacking(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.lacking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forbidden(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.forbidden.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a path is of a version that it doesn't know.
    fn lacks(&self, path: &str) -> bool {
        self.lacking()
            .iter()
            .any(|version| path.strip_prefix(version.as_str()).is_some_and(|r| r.is_empty() || r.starts_with('/')))
    }

    fn tell(&self) {
        self.news.send_modify(|times| *times += 1);
    }
}

impl Running {
    /// On a thread of its own, so that it lives in one network namespace, whatever runtime a test has.
    fn start(state: &Arc<State>, address: SocketAddr) -> Result<(Self, SocketAddr)> {
        let listener = std::net::TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let (state, (end, ended)) = (state.clone(), oneshot::channel());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    _ = ended => {}
                    ended = axum::serve(listener, http::router(state)) => ended.expect("it serves for ever"),
                }
            });
            // With the runtime go all connections.
        });
        Ok((Self { thread: Some(thread), end: Some(end) }, address))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}
