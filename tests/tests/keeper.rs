//! The lease keeper on a store in memory, with a paused clock: what it does when the store refuses, forgets or is shared
//! with a node of the same name.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::holding::Instance;
use fabric_core::model::PerFamily;
use fabric_core::network::NetworkConfig;
use fabric_tests::conformance::store::flannel_value;
use fabric_tests::keepers::pods_in;
use fabric_tests::memory_store::{MemoryCluster, MemoryStore};
use fabricd::lease::{Holding, Keeper, Own, Remembered, Tenant, Wanted};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const TTL: Duration = Duration::from_secs(60);

struct Node {
    store: Arc<MemoryStore>,
    holding: watch::Receiver<Holding>,
    wanted: watch::Sender<Option<Wanted>>,
    _task: JoinSet<()>,
}

fn cluster() -> MemoryCluster {
    let cluster = MemoryCluster::default();
    cluster.put("config", CONFIG.as_bytes());
    cluster
}

fn wanted(public_ip: &str) -> Wanted {
    let v4: IpAddr = public_ip.parse().expect("an address");
    let network = NetworkConfig::decode(CONFIG.as_bytes()).expect("valid");
    Wanted { network, public_ips: PerFamily { v4: Some(v4), v6: None } }
}

impl Node {
    /// `node-1` in the network namespace with this number.
    fn start(cluster: &MemoryCluster, netns: u64, public_ip: &str, remembered: Option<Remembered>) -> Self {
        let store = Arc::new(cluster.node());
        let tenant = Tenant {
            node: "node-1".parse().expect("a name"),
            instance: Instance { boot: "boot".into(), netns },
            ttl: TTL,
            grace: TTL,
            pods: pods_in(Path::new("/nonexistent")),
        };
        let keeper = Keeper::new(store.clone(), tenant, remembered);
        let (holding, (wanted, wants)) = (keeper.holding(), watch::channel(Some(wanted(public_ip))));
        let mut task = JoinSet::new();
        task.spawn(keeper.run(wants));
        Self { store, holding, wanted, _task: task }
    }

    fn own(&self) -> Own {
        let holding = self.holding.borrow();
        assert_eq!(holding.trouble, None);
        holding.own.clone().expect("a lease")
    }

    fn trouble(&self) -> (NotReady, String) {
        self.holding.borrow().trouble.clone().expect("some trouble")
    }

    /// What a daemon leaves on disk.
    fn remembered(&self) -> Remembered {
        let Holding { own, mark, expires, .. } = self.holding.borrow().clone();
        Remembered { own: own.expect("a lease"), mark, expires, revision: mark.map_or(0, |mark| mark.mod_revision) }
    }
}

/// Long enough for what was seen to be acted on, and nothing to a lease.
async fn a_moment() {
    sleep(Duration::from_secs(2)).await;
}

#[tokio::test(start_paused = true)]
async fn store_that_takes_no_writes_costs_a_changed_address_no_lease() {
    let cluster = cluster();
    let node = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    let key = node.own().key;
    node.store.refuse_writes(true);
    node.wanted.send_replace(Some(wanted("192.0.2.77")));
    sleep(5 * TTL).await;
    assert_eq!(node.own().key, key);
    assert!(cluster.owner(&key).is_some(), "it was not kept alive");
    node.store.refuse_writes(false);
    sleep(Duration::from_secs(10)).await;
    let record = cluster.get(&format!("subnets/{}", key.encode())).expect("a record");
    assert!(String::from_utf8_lossy(&record).contains("192.0.2.77"));
}

#[tokio::test(start_paused = true)]
async fn nodes_that_wait_for_a_busy_store_do_not_all_try_at_each_change() {
    let cluster = cluster();
    let node = Node::start(&cluster, 1, "192.0.2.1", None);
    // Before its first step.
    node.store.refuse_writes(true);
    for n in 0..6000_u32 {
        let (high, low) = (n / 200 % 200, n % 200);
        cluster.put(&format!("subnets/10.244.{low}.0-24"), flannel_value(&format!("192.0.{high}.{low}")).as_bytes());
        sleep(Duration::from_millis(100)).await;
    }
    // Delays that double from 0.1 s to 60 s, in ten minutes of changes.
    assert!((5..30).contains(&node.store.refused()), "{} attempts", node.store.refused());
    node.store.refuse_writes(false);
    sleep(Duration::from_secs(90)).await;
    node.own();
}

#[tokio::test(start_paused = true)]
async fn claim_whose_answer_is_lost_is_not_made_again() {
    let cluster = cluster();
    let node = Node::start(&cluster, 1, "192.0.2.1", None);
    node.store.lose_answers(1);
    a_moment().await;
    let (own, written) = (node.own(), cluster.revision());
    assert_eq!(own.epoch, 1);
    sleep(5 * TTL).await;
    assert_eq!((node.own(), cluster.revision()), (own, written), "kept alive, and nothing written");
}

#[tokio::test(start_paused = true)]
async fn epoch_rises_through_restarts_and_with_a_store_that_was_emptied() {
    let cluster = cluster();
    let mut node = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    assert_eq!(node.own().epoch, 1);
    for epoch in 2..5 {
        let (key, remembered) = (node.own().key, node.remembered());
        drop(node);
        if epoch % 2 == 0 {
            cluster.delete(&format!("subnets/{}", key.encode()));
        } else {
            cluster.replace();
            cluster.put("config", CONFIG.as_bytes());
        }
        node = Node::start(&cluster, 1, "192.0.2.1", Some(remembered));
        a_moment().await;
        assert_eq!((node.own().key, node.own().epoch), (key, epoch));
    }
}

#[tokio::test(start_paused = true)]
async fn two_nodes_with_one_name_do_not_fight() {
    let cluster = cluster();
    let first = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    let revision = cluster.revision();
    let second = Node::start(&cluster, 2, "192.0.2.2", None);
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(cluster.revision(), revision, "somebody has written");
    let key = first.own().key;
    let (code, told) = second.trouble();
    assert_eq!(code, NotReady::Failed);
    for word in ["another node is called node-1 too", &key.to_string(), "192.0.2.1", "192.0.2.2", "--node-name"] {
        assert!(told.contains(word), "{word} is not in: {told}");
    }
}

/// A node that was powered off and came up in another network namespace is itself, unless the other one lives: then the
/// one that was robbed leaves it at that.
#[tokio::test(start_paused = true)]
async fn robbed_node_does_not_rob_back() {
    let cluster = cluster();
    let first = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    let remembered = first.remembered();
    // A copied disk: it knows the revision, so it can't be told from the first one.
    let second = Node::start(&cluster, 2, "192.0.2.2", Some(remembered));
    a_moment().await;
    let revision = cluster.revision();
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(cluster.revision(), revision, "they fight");
    second.own();
    assert_eq!(first.trouble().0, NotReady::Quarantine);
    assert!(first.trouble().1.contains("another node is called node-1 too"), "{:?}", first.trouble());
}

#[tokio::test(start_paused = true)]
async fn quarantine_keeps_its_reason_while_the_store_is_away() {
    let cluster = cluster();
    let node = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    node.store.set_reachable(false);
    sleep(10 * TTL).await;
    let (code, told) = node.trouble();
    assert_eq!(code, NotReady::Quarantine);
    assert!(told.contains("has run out, and the store can't be reached"), "{told}");
    node.store.set_reachable(true);
    sleep(Duration::from_secs(10)).await;
    assert_eq!(node.own().epoch, 2);
}
