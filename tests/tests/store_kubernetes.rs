//! The lease store in Kubernetes before a fake API server: what it writes, how little it writes, and what it does when
//! the server is away, has forgotten its history, or is an older copy of itself.

use std::time::Duration;

use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::leases::LeaseSet;
use fabric_tests::conformance::store::{claim, flannel_value, key, leases, now, shows};
use fabric_tests::fake_api::{Fault, NODES};
use fabric_tests::kubernetes::{Cluster, Nodes as _, PREFIX, TAINT, flannels_name};
use fabricd::store::kubernetes::Kubernetes;
use fabricd::store::{Connection, Grant, LeaseStore as _, StoreError};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a Node fulfils a condition, and gives it.
async fn node_shows(cluster: &Cluster, name: &str, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
    let found = timeout(PATIENCE, async {
        loop {
            match cluster.api.get(NODES, name).filter(&condition) {
                Some(node) => return node,
                None => sleep(Duration::from_millis(20)).await,
            }
        }
    });
    found.await.unwrap_or_else(|_| panic!("never came: {what}; {:?}", cluster.api.get(NODES, name)))
}

/// `node-1` with its lease, on one or two families.
async fn joined(cluster: &Cluster, subnets: &str) -> (Kubernetes, Grant) {
    let (store, key) = (cluster.store(1), key(subnets));
    cluster.give("node-1", &key);
    let mut assigned = store.assigned().expect("the cluster assigns");
    shows(&mut assigned, "the assignment", |assigned| assigned.subnets == *key.subnets()).await;
    let grant = store.claim(&claim(1, subnets, &*now(&store).await)).await.expect("assigned");
    (store, grant)
}

/// What comes after another change of this Node has been seen, and the API server was asked something: time enough for a
/// write that should not be.
async fn settled(cluster: &Cluster, store: &Kubernetes) {
    let next = fastrand::u8(..);
    let overwrite = json!({format!("{PREFIX}/public-ip-overwrite"): format!("203.0.113.{next}")});
    cluster.api.change(NODES, "node-1", &json!({"metadata": {"annotations": overwrite}}));
    let mut assigned = store.assigned().expect("the cluster assigns");
    let ip = format!("203.0.113.{next}").parse().ok();
    shows(&mut assigned, "the change", |assigned| assigned.public_ips.v4 == ip).await;
    store.probe().await.expect("it answers");
}

/// Changes what is no Node, so that the watch hears nothing of it but history moves on; sends a bookmark, and waits until
/// the next watch goes on from there. Gives the revision.
async fn bookmarked(cluster: &Cluster) -> i64 {
    for n in 0..5 {
        cluster.api.create("/api/v1/namespaces/default/secrets", json!({"metadata": {"name": n.to_string()}}));
    }
    let revision = cluster.api.revision();
    cluster.api.bookmark();
    timeout(PATIENCE, cluster.api.watched_from(NODES, revision))
        .await
        .expect("the watch goes on where the bookmark was");
    revision
}

fn is_available(node: &Value) -> bool {
    let conditions = node["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|c| c["type"] == "NetworkUnavailable" && c["status"] == "False")
}

#[tokio::test]
async fn one_patch_of_the_status_says_what_flannel_would() {
    let cluster = Cluster::start();
    joined(&cluster, "10.244.1.0-24&fd00:1::-64").await;
    let annotations = cluster.api.get(NODES, "node-1").expect("there")["metadata"]["annotations"].clone();
    let data = r#"{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"}"#;
    assert_eq!(
        annotations,
        json!({
            format!("{PREFIX}/kube-subnet-manager"): "true",
            format!("{PREFIX}/backend-type"): "vxlan",
            format!("{PREFIX}/backend-data"): data,
            format!("{PREFIX}/backend-v6-data"): data,
            format!("{PREFIX}/public-ip"): "192.0.2.1",
            format!("{PREFIX}/public-ipv6"): "2001:db8::1",
        })
    );
    let writes = cluster.api.writes();
    assert_eq!(writes.len(), 1, "{writes:?}");
    assert_eq!((writes[0].0.as_str(), writes[0].1.as_str()), ("PATCH", "/api/v1/nodes/node-1/status"));
}

#[tokio::test]
async fn only_what_was_erased_is_written_again() {
    let cluster = Cluster::start();
    let (store, grant) = joined(&cluster, "10.244.1.0-24").await;
    let address = format!("{PREFIX}/public-ip");
    cluster.api.change(NODES, "node-1", &json!({"metadata": {"annotations": {&address: null}}}));
    let revision = cluster.api.revision();
    leases(&store, "the erasure", |set| set.revision() >= revision).await;
    store.rewrite(&grant, &claim(1, "10.244.1.0-24", &LeaseSet::default()).record).await.expect("ours");
    let (_, _, patch) = cluster.api.writes().pop().expect("written");
    assert_eq!(patch["metadata"]["annotations"], json!({&address: "192.0.2.1"}));
}

#[tokio::test]
async fn condition_and_taint_tell_when_the_network_works_and_tell_it_again_when_undone() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    let taints = json!([{"key": "other", "effect": "NoSchedule"}, {"key": TAINT, "effect": "NoSchedule"}]);
    cluster.api.change(NODES, "node-1", &json!({"spec": {"taints": taints}}));
    store.announce(&not_ready("starting"));
    settled(&cluster, &store).await;
    assert_eq!(cluster.api.writes().len(), 1, "nothing is told of a node that is not ready");

    store.announce(&Readiness::Ready);
    let is_told = |node: &Value| is_available(node) && node["spec"]["taints"].as_array().is_some_and(|t| t.len() == 1);
    let node = node_shows(&cluster, "node-1", "condition and taint", is_told).await;
    assert_eq!(node["spec"]["taints"][0]["key"], "other", "what others set stays");
    assert_eq!(node["status"]["conditions"][0]["reason"], "FabricIsUp");
    assert_eq!(cluster.api.writes().len(), 3);

    let unavailable = json!([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]);
    let undone = json!({"spec": {"taints": taints}, "status": {"conditions": unavailable}});
    cluster.api.change(NODES, "node-1", &undone);
    node_shows(&cluster, "node-1", "both again", is_told).await;
    settled(&cluster, &store).await;
    assert_eq!(cluster.api.writes().len(), 5, "and then it is silent");
}

fn not_ready(reason: &str) -> Readiness {
    Readiness::NotReady { code: NotReady::Starting, reason: reason.to_owned() }
}

/// Lets the time pass in which nothing is said of a node that is on its way.
async fn some_time_passes() {
    tokio::time::pause();
    tokio::time::advance(Duration::from_secs(11)).await;
    tokio::time::resume();
}

/// `kubectl describe node` says why, and nobody is scheduled there, until it works; then nothing is taken back.
#[tokio::test]
async fn node_whose_network_does_not_come_says_why() {
    let cluster = Cluster::start();
    cluster.api.add_node("node-1", &[]);
    let store = cluster.store(1);
    shows(&mut store.connection(), "the connection", |state| *state == Connection::Up).await;
    let says = |why: &'static str| {
        move |node: &Value| {
            let conditions = node["status"]["conditions"].as_array();
            conditions.into_iter().flatten().any(|condition| {
                condition["type"] == "NetworkUnavailable"
                    && condition["status"] == "True"
                    && condition["message"] == why
            })
        }
    };
    store.announce(&not_ready("no IPv4 subnet is assigned to this node"));
    some_time_passes().await;
    let node = node_shows(&cluster, "node-1", "the reason", says("no IPv4 subnet is assigned to this node")).await;
    assert_eq!(node["status"]["conditions"][0]["reason"], "FabricIsNotReady");
    let since = node["status"]["conditions"][0]["lastTransitionTime"].clone();
    store.announce(&not_ready("its network is another"));
    let node = node_shows(&cluster, "node-1", "the other reason", says("its network is another")).await;
    assert_eq!(node["status"]["conditions"][0]["lastTransitionTime"], since, "it was so before");

    store.announce(&Readiness::Ready);
    node_shows(&cluster, "node-1", "that it works", is_available).await;
    let writes = cluster.api.writes().len();
    store.announce(&not_ready("broken"));
    some_time_passes().await;
    store.probe().await.expect("it answers");
    assert_eq!(cluster.api.writes().len(), writes, "its pods may well go on");
}

/// A cloud's controller manager says what it knows, and takes it back itself.
#[tokio::test]
async fn what_others_say_of_a_nodes_network_stays_while_it_is_not_ready() {
    let cluster = Cluster::start();
    cluster.api.add_node("node-1", &[]);
    let unavailable = json!([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]);
    cluster.api.change(NODES, "node-1", &json!({"status": {"conditions": unavailable}}));
    let store = cluster.store(1);
    shows(&mut store.connection(), "the connection", |state| *state == Connection::Up).await;
    store.announce(&not_ready("no IPv4 subnet is assigned to this node"));
    some_time_passes().await;
    store.probe().await.expect("it answers");
    assert!(cluster.api.writes().is_empty(), "{:?}", cluster.api.writes());
}

#[tokio::test]
async fn kubelets_reports_cause_no_write_and_wake_nobody() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    store.announce(&Readiness::Ready);
    node_shows(&cluster, "node-1", "the condition", is_available).await;
    let writes = cluster.api.writes().len();
    let mut seen = store.leases();
    leases(&store, "the lease", |set| set.len() == 1).await;
    seen.mark_unchanged();
    for n in 0..20 {
        let heartbeat = json!([{"type": "Ready", "status": "True", "lastHeartbeatTime": n.to_string()}]);
        cluster.api.change(NODES, "node-1", &json!({"status": {"conditions": heartbeat}}));
    }
    cluster.api.add_node("node-2", &["10.244.2.0/24"]);
    cluster.flannel_says(&key("10.244.2.0-24"), &flannel_value("192.0.2.2"));
    let set = leases(&store, "the other node", |set| set.len() == 2).await;
    assert_eq!(set.changes(&LeaseSet::default()).count(), 2);
    assert_eq!(cluster.api.writes().len(), writes);
}

#[tokio::test]
async fn node_that_is_deleted_and_made_anew_is_assigned_anew() {
    let cluster = Cluster::start();
    let (store, grant) = joined(&cluster, "10.244.1.0-24").await;
    let mut assigned = store.assigned().expect("the cluster assigns");
    cluster.api.delete(NODES, "node-1");
    shows(&mut assigned, "no assignment", |assigned| assigned.subnets.is_empty()).await;
    let set = leases(&store, "no lease", LeaseSet::is_empty).await;
    assert!(set.departed().is_empty(), "its routes go at once");
    let record = claim(1, "10.244.1.0-24", &set).record;
    assert!(matches!(store.rewrite(&grant, &record).await, Err(StoreError::Lost { .. })));

    cluster.give("node-1", &key("10.244.7.0-24"));
    shows(&mut assigned, "the new subnet", |assigned| !assigned.subnets.is_empty()).await;
    store.claim(&claim(1, "10.244.7.0-24", &set)).await.expect("assigned");
    leases(&store, "the new lease", |set| set.get(&key("10.244.7.0-24")).is_some()).await;
}

#[tokio::test]
async fn annotations_erased_by_somebody_leave_the_peers_routes_standing() {
    let cluster = Cluster::start();
    let (store, seven) = (cluster.store(1), key("10.244.7.0-24"));
    cluster.flannel_says(&seven, &flannel_value("192.0.2.7"));
    leases(&store, "the lease", |set| set.len() == 1).await;
    let mark = format!("{PREFIX}/kube-subnet-manager");
    let node = flannels_name(&seven);
    cluster.api.change(NODES, &node, &json!({"metadata": {"annotations": {mark: null}}}));
    let set = leases(&store, "no record", LeaseSet::is_empty).await;
    assert!(set.departed().contains_key(&seven));
    cluster.remove(&seven);
    leases(&store, "nobody who may come back", |set| set.departed().is_empty()).await;
}

#[tokio::test]
async fn server_that_is_away_changes_nothing_and_what_happened_meanwhile_is_found() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    cluster.flannel_says(&key("10.244.7.0-24"), &flannel_value("192.0.2.7"));
    leases(&store, "both", |set| set.len() == 2).await;
    let mut connection = store.connection();
    for forgotten in [false, true] {
        cluster.api.stop();
        shows(&mut connection, "an outage", |state| matches!(state, Connection::Down(_))).await;
        assert_eq!(now(&store).await.len(), 2);
        cluster.remove(&key("10.244.7.0-24"));
        cluster.flannel_says(&key("10.244.8.0-24"), &flannel_value("192.0.2.8"));
        if forgotten {
            cluster.api.compact();
        }
        cluster.api.start_again().expect("the same port");
        shows(&mut connection, "the connection", |state| *state == Connection::Up).await;
        let is_up_to_date = |set: &LeaseSet| {
            set.len() == 2 && set.get(&key("10.244.8.0-24")).is_some() && set.get(&key("10.244.7.0-24")).is_none()
        };
        leases(&store, "what has changed", is_up_to_date).await;
        cluster.remove(&key("10.244.8.0-24"));
        cluster.flannel_says(&key("10.244.7.0-24"), &flannel_value("192.0.2.7"));
        leases(&store, "as before", |set| set.get(&key("10.244.7.0-24")).is_some() && set.len() == 2).await;
    }
    assert_eq!(*store.replaced().borrow(), 0);
}

#[tokio::test]
async fn bookmarks_carry_a_watch_over_a_compaction() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    leases(&store, "the lease", |set| set.len() == 1).await;
    let listed = cluster.api.lists(NODES);
    bookmarked(&cluster).await;
    cluster.api.compact();
    cluster.flannel_says(&key("10.244.7.0-24"), &flannel_value("192.0.2.7"));
    leases(&store, "the other lease", |set| set.len() == 2).await;
    assert_eq!(cluster.api.lists(NODES), listed, "nothing was listed anew");
}

#[tokio::test]
async fn store_that_was_set_back_is_recognised() {
    let cluster = Cluster::start();
    cluster.api.set_revision(1000);
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    leases(&store, "the lease", |set| set.len() == 1).await;
    cluster.api.stop();
    cluster.api.set_revision(10);
    cluster.flannel_says(&key("10.244.7.0-24"), &flannel_value("192.0.2.7"));
    cluster.api.start_again().expect("the same port");
    leases(&store, "what the older copy has", |set| set.len() == 2).await;
    assert_eq!(*store.replaced().borrow(), 1);
}

/// The leases are older than the restored copy, but what was seen of the store is not.
#[tokio::test]
async fn store_that_was_set_back_behind_a_bookmark_is_recognised() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    leases(&store, "the lease", |set| set.len() == 1).await;
    let revision = bookmarked(&cluster).await;
    cluster.api.stop();
    cluster.api.set_revision(revision - 2);
    cluster.api.start_again().expect("the same port");
    shows(&mut store.replaced(), "another store", |times| *times == 1).await;
}

#[tokio::test]
async fn server_that_refuses_or_is_slow_is_asked_again() {
    let cluster = Cluster::start();
    cluster.api.set(Fault::Refuses(403));
    let store = cluster.store(1);
    let told = |state: &Connection| state.trouble().is_some_and(|reason| reason.contains("told to refuse"));
    shows(&mut store.connection(), "the refusal", told).await;
    cluster.api.set(Fault::Refuses(500));
    let cannot = |state: &Connection| matches!(state, Connection::Down(reason) if reason.contains("cannot reach"));
    shows(&mut store.connection(), "the failure", cannot).await;
    cluster.api.set(Fault::Slow(Duration::from_millis(200)));
    joined(&cluster, "10.244.1.0-24").await;
    leases(&store, "the lease", |set| set.len() == 1).await;
}

#[tokio::test]
async fn server_that_hangs_is_noticed_although_its_connections_stay() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    leases(&store, "the lease", |set| set.len() == 1).await;
    let mut connection = store.connection();
    cluster.api.set(Fault::Hangs);
    // The clock moves on whenever everybody waits.
    tokio::time::pause();
    let silent = |state: &Connection| matches!(state, Connection::Down(reason) if reason.contains("does not answer"));
    let noticed = timeout(Duration::from_secs(125), connection.wait_for(silent)).await;
    assert!(noticed.is_ok(), "its watch would have ended after 200 s at the soonest");
    drop(noticed);
    assert_eq!(now(&store).await.len(), 1, "nobody is let go of");

    tokio::time::resume();
    cluster.api.set(Fault::None);
    shows(&mut connection, "the connection", |state| *state == Connection::Up).await;
}

#[tokio::test]
async fn lists_come_by_pages() {
    let cluster = Cluster::start();
    for n in 0..1201_u16 {
        let (high, low) = (n / 256, n % 256);
        let subnet = format!("10.{high}.{low}.0-24");
        cluster.flannel_says_of(&format!("n{n}"), &key(&subnet), &flannel_value(&format!("192.0.{high}.{low}")));
    }
    assert_eq!(leases(&cluster.store(1), "all", |set| !set.is_empty()).await.len(), 1201);
}

#[tokio::test]
async fn published_address_follows_the_annotation_that_overwrites_it() {
    let cluster = Cluster::start();
    let (store, _) = joined(&cluster, "10.244.1.0-24").await;
    let overwrite = json!({"metadata": {"annotations": {format!("{PREFIX}/public-ip-overwrite"): "203.0.113.1"}}});
    cluster.api.change(NODES, "node-1", &overwrite);
    let mut assigned = store.assigned().expect("the cluster assigns");
    let shown = shows(&mut assigned, "the address", |assigned| assigned.public_ips.v4.is_some()).await;
    assert_eq!(shown.public_ips.v4.map(|ip| ip.to_string()).as_deref(), Some("203.0.113.1"));
}

#[test]
fn nobody_spins_while_there_is_no_node_to_announce() {
    let (done, waiting) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        // Its clock moves when there is nothing to do, and only then.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        runtime.expect("a runtime").block_on(async {
            let store = Cluster::start().store(1);
            for readiness in [Readiness::Ready, not_ready("broken"), Readiness::Ready] {
                store.announce(&readiness);
                sleep(Duration::from_secs(15)).await;
            }
        });
        done.send(())
    });
    waiting.recv_timeout(PATIENCE).expect("time passes");
}
