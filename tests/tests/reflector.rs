//! The reflector before a fake API server, with kinds of objects and a fold of this test's own: what is published, when, and
//! how little is listed.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use fabric_tests::conformance::store::shows;
use fabric_tests::fake_api::{FakeApi, Fault};
use fabric_tests::kubernetes::Nodes as _;
use fabricd::kubernetes::client::{ApiError, ApiServer};
use fabricd::kubernetes::reflector::{Fold, Object, Reflector, revision};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;
use tokio::time::sleep;

const SERVICES: &str = "/api/v1/namespaces/default/services";
const PODS: &str = "/api/v1/namespaces/default/pods";

/// All that a Service and a Pod are parsed into.
#[derive(Clone, Debug, Deserialize)]
struct Slim<K> {
    metadata: Metadata,
    #[serde(skip)]
    kind: PhantomData<K>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    name: String,
    namespace: String,
    resource_version: String,
}

#[derive(Clone, Debug)]
struct Service;

#[derive(Clone, Debug)]
struct Pod;

#[derive(Clone, Debug)]
struct EndpointSlice;

impl<K: Path> Object for Slim<K> {
    const PATH: &'static str = K::PATH;

    fn revision(&self) -> i64 {
        revision(Some(&self.metadata.resource_version))
    }
}

trait Path: Clone + Send + Sync + 'static {
    const PATH: &'static str;
}

impl Path for Service {
    const PATH: &'static str = "/api/v1/services";
}

impl Path for Pod {
    const PATH: &'static str = "/api/v1/pods";
}

impl Path for EndpointSlice {
    const PATH: &'static str = "/apis/discovery.k8s.io/v1/endpointslices";
}

/// What was told.
#[derive(Clone, Debug, Default)]
struct Told {
    /// Names with their revisions.
    objects: Option<BTreeMap<String, i64>>,
    /// How many objects there were in each set that was published.
    published: Vec<usize>,
    connection: Option<Result<(), ApiError>>,
}

/// Names with their revisions.
struct Names<K> {
    objects: BTreeMap<String, i64>,
    told: Sender<Told>,
    kind: PhantomData<K>,
}

fn name<K: Path>(object: &Slim<K>) -> (String, i64) {
    (format!("{}/{}", object.metadata.namespace, object.metadata.name), object.revision())
}

impl<K: Path> Fold for Names<K> {
    type Object = Slim<K>;

    fn listed(&self, objects: Vec<Slim<K>>, _revision: i64) -> Self {
        Self { objects: objects.iter().map(name).collect(), told: self.told.clone(), kind: PhantomData }
    }

    fn applied(&mut self, object: Slim<K>) -> bool {
        let (name, revision) = name(&object);
        self.objects.insert(name, revision) != Some(revision)
    }

    fn deleted(&mut self, object: Slim<K>) -> bool {
        self.objects.remove(&name(&object).0).is_some()
    }

    fn would_lose_most(&self) -> bool {
        let told = self.told.borrow();
        let before = told.objects.iter().flat_map(BTreeMap::keys);
        before.filter(|name| !self.objects.contains_key(*name)).count() * 2
            > told.objects.as_ref().map_or(0, BTreeMap::len)
    }

    fn publish(&mut self) {
        self.told.send_modify(|told| {
            told.published.push(self.objects.len());
            told.objects = Some(self.objects.clone());
        });
    }

    fn connection_is(&mut self, state: Result<(), &ApiError>) {
        self.told.send_modify(|told| told.connection = Some(state.map_err(Clone::clone)));
    }
}

/// A fake API server, and reflectors before it.
struct Cluster {
    api: FakeApi,
    server: Arc<ApiServer>,
    tasks: JoinSet<()>,
    _dir: TempDir,
}

impl Cluster {
    fn start() -> Self {
        let api = FakeApi::start(([127, 0, 0, 1], 0).into()).expect("a free port");
        let dir = tempfile::tempdir().expect("a folder");
        let server = Arc::new(ApiServer::new(Some(api.kubeconfig(dir.path()).expect("written"))));
        Self { api, server, tasks: JoinSet::new(), _dir: dir }
    }

    fn reflect<K: Path>(&mut self, select: impl FnOnce(Reflector<Names<K>>) -> Reflector<Names<K>>) -> Receiver<Told> {
        let told = Sender::new(Told::default());
        let receiver = told.subscribe();
        let fold = Names { objects: BTreeMap::new(), told, kind: PhantomData };
        self.tasks.spawn(select(Reflector::new(self.server.clone(), fold)).run());
        receiver
    }

    fn add(&self, collection: &str, name: &str, more: &Value) {
        let namespace = collection.split('/').rev().nth(1).expect("a namespace");
        let mut object = json!({
            "metadata": {"name": name, "namespace": namespace, "managedFields": [{"manager": "m"}]},
            "spec": more["spec"], "status": {"conditions": []},
        });
        object["metadata"]["labels"] = more["labels"].clone();
        self.api.create(collection, object);
    }
}

/// Waits until these are what was published last.
async fn names(told: &mut Receiver<Told>, expected: &[&str]) {
    let are = |told: &Told| told.objects.as_ref().is_some_and(|all| all.keys().eq(expected));
    shows(told, &format!("{expected:?}"), are).await;
}

#[tokio::test]
async fn objects_of_all_namespaces_come_change_and_go() {
    let mut cluster = Cluster::start();
    cluster.add(SERVICES, "dns", &json!({}));
    let mut services = cluster.reflect::<Service>(|all| all);
    names(&mut services, &["default/dns"]).await;
    cluster.add("/api/v1/namespaces/shop/services", "web", &json!({}));
    names(&mut services, &["default/dns", "shop/web"]).await;
    cluster.api.change(SERVICES, "dns", &json!({"spec": {"clusterIP": "203.0.113.10"}}));
    let revision = cluster.api.revision();
    let is_changed = |told: &Told| told.objects.as_ref().is_some_and(|all| all["default/dns"] == revision);
    shows(&mut services, "the change", is_changed).await;
    cluster.api.delete(SERVICES, "dns");
    names(&mut services, &["shop/web"]).await;
    assert_eq!(cluster.api.lists(Service::PATH), 1);
}

#[tokio::test]
async fn kinds_beside_each_other_outlive_outages_and_lost_history_each_by_itself() {
    let mut cluster = Cluster::start();
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    let mut all = [
        (SERVICES, cluster.reflect::<Service>(|all| all)),
        (PODS, cluster.reflect::<Pod>(|all| all)),
        (slices, cluster.reflect::<EndpointSlice>(|all| all)),
    ];
    for (collection, told) in &mut all {
        cluster.add(collection, "one", &json!({}));
        names(told, &["default/one"]).await;
    }
    let lists = |api: &FakeApi| [Service::PATH, Pod::PATH, EndpointSlice::PATH].map(|path| api.lists(path));
    assert_eq!(lists(&cluster.api), [1, 1, 1]);

    cluster.api.stop();
    for (_, told) in &mut all {
        shows(told, "the outage", |told| matches!(told.connection, Some(Err(ApiError::Unreachable(_))))).await;
        names(told, &["default/one"]).await;
    }
    cluster.add(PODS, "two", &json!({}));
    cluster.api.start_again().expect("the same port");
    for (collection, told) in &mut all {
        shows(told, "the connection", |told| told.connection == Some(Ok(()))).await;
        let expected = if *collection == PODS { &["default/one", "default/two"][..] } else { &["default/one"] };
        names(told, expected).await;
    }
    assert_eq!(lists(&cluster.api), [1, 1, 1], "each goes on where it was");

    cluster.api.stop();
    cluster.api.delete(SERVICES, "one");
    cluster.api.compact();
    cluster.api.start_again().expect("the same port");
    names(&mut all[0].1, &[]).await;
    names(&mut all[1].1, &["default/one", "default/two"]).await;
    assert_eq!(cluster.api.lists(Service::PATH), 3, "a look, and a second one since all are gone");
}

#[tokio::test]
async fn selected_objects_alone_are_told_and_come_and_go_with_their_labels_and_fields() {
    let mut cluster = Cluster::start();
    let on = |node: &str| json!({"spec": {"nodeName": node}, "labels": {"app": "web"}});
    cluster.add(PODS, "here", &on("node-1"));
    cluster.add(PODS, "there", &on("node-2"));
    cluster.add(SERVICES, "plain", &json!({"labels": {"app": "web"}}));
    cluster.add(SERVICES, "headless", &json!({"labels": {"app": "web", "headless": ""}}));
    let mut pods = cluster.reflect::<Pod>(|all| all.fields("spec.nodeName=node-1"));
    let mut services = cluster.reflect::<Service>(|all| all.labels("app=web,!headless"));
    names(&mut pods, &["default/here"]).await;
    names(&mut services, &["default/plain"]).await;
    cluster.add(PODS, "elsewhere", &on("node-3"));
    cluster.add(PODS, "new", &on("node-1"));
    names(&mut pods, &["default/here", "default/new"]).await;
    cluster.api.change(SERVICES, "headless", &json!({"metadata": {"labels": {"headless": null}}}));
    names(&mut services, &["default/headless", "default/plain"]).await;
    cluster.api.change(SERVICES, "plain", &json!({"metadata": {"labels": {"app": "other"}}}));
    names(&mut services, &["default/headless"]).await;
    assert_eq!((cluster.api.lists(Pod::PATH), cluster.api.lists(Service::PATH)), (1, 1));
}

/// Five Services that are known, four of which are then gone, and what was listed by then.
async fn four_of_five_go(cluster: &mut Cluster) -> (Receiver<Told>, u64) {
    for name in ["a", "b", "c", "d", "e"] {
        cluster.add(SERVICES, name, &json!({}));
    }
    let mut services = cluster.reflect::<Service>(|all| all);
    shows(&mut services, "all", |told| told.published == [5]).await;
    // What a watch hears one by one is not gone at once.
    cluster.api.stop();
    shows(&mut services, "the outage", |told| matches!(told.connection, Some(Err(_)))).await;
    for name in ["a", "b", "c", "d"] {
        cluster.api.delete(SERVICES, name);
    }
    let listed = cluster.api.lists(Service::PATH);
    cluster.api.start_again().expect("the same port");
    (services, listed)
}

#[tokio::test]
async fn most_objects_are_gone_only_after_a_second_look() {
    let mut cluster = Cluster::start();
    let (mut services, listed) = four_of_five_go(&mut cluster).await;
    names(&mut services, &["default/e"]).await;
    assert_eq!(services.borrow().published, [5, 1]);
    assert_eq!(cluster.api.lists(Service::PATH), listed + 2);
}

#[tokio::test]
async fn objects_that_are_back_at_the_second_look_were_never_gone() {
    let mut cluster = Cluster::start();
    let (mut services, listed) = four_of_five_go(&mut cluster).await;
    while cluster.api.lists(Service::PATH) == listed {
        sleep(Duration::from_millis(10)).await;
    }
    for name in ["a", "b", "c", "d"] {
        cluster.add(SERVICES, name, &json!({}));
    }
    shows(&mut services, "the second look", |told| told.published.len() == 2).await;
    assert_eq!(services.borrow().published, [5, 5]);
}

#[tokio::test]
async fn event_right_before_a_watch_breaks_is_published() {
    let mut cluster = Cluster::start();
    let mut services = cluster.reflect::<Service>(|all| all);
    shows(&mut services, "the watch", |told| told.connection == Some(Ok(()))).await;
    cluster.api.set(Fault::BreaksWatches(500));
    cluster.add(SERVICES, "dns", &json!({}));
    names(&mut services, &["default/dns"]).await;
    assert_eq!(cluster.api.lists(Service::PATH), 1, "and not by a list");
}
