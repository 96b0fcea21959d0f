//! The lease keeper on a store in memory, with a paused clock: what it does when the store refuses, forgets or is shared
//! with a node of the same name.

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::model::PerFamily;
use fabric_core::network::NetworkConfig;
use fabric_core::record::Instance;
use fabric_tests::conformance::store::flannel_value;
use fabric_tests::keepers::pods_in;
use fabric_tests::memory_store::{MemoryCluster, MemoryStore};
use fabricd::lease::{DesiredLease, Holding, Hosts, Keeper, LeaseOptions, Own, Remembered};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::sleep;

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const TTL: Duration = Duration::from_secs(60);

struct Node {
    store: Arc<MemoryStore>,
    holding: watch::Receiver<Holding>,
    wanted: watch::Sender<Option<DesiredLease>>,
    _task: JoinSet<()>,
}

fn cluster() -> MemoryCluster {
    let cluster = MemoryCluster::default();
    cluster.put("config", CONFIG.as_bytes());
    cluster
}

fn wanted(public_ip: &str) -> DesiredLease {
    let v4: IpAddr = public_ip.parse().expect("an address");
    let network = NetworkConfig::decode(CONFIG.as_bytes()).expect("valid");
    DesiredLease { network, public_ips: PerFamily { v4: Some(v4), v6: None } }
}

impl Node {
    /// `node-1` in this boot of a machine.
    fn start(cluster: &MemoryCluster, boot: u64, public_ip: &str, remembered: Option<Remembered>) -> Self {
        Self::start_as(cluster, "node-1", boot, public_ip, remembered)
    }

    /// The same under another name.
    fn start_as(cluster: &MemoryCluster, name: &str, boot: u64, ip: &str, remembered: Option<Remembered>) -> Self {
        let store = Arc::new(cluster.node());
        let hosts = cluster.clone();
        let options = LeaseOptions {
            node: name.parse().expect("a name"),
            instance: Instance { boot: format!("boot-{boot}"), netns: 7 },
            ttl: TTL,
            grace: TTL,
            pods: pods_in(Path::new("/nonexistent")),
            since: 1_790_000_000,
            hosts: Hosts::new(move |ip| {
                let answers = hosts.get(&format!("host/{ip}")).is_some();
                Box::pin(async move { answers })
            }),
        };
        let keeper = Keeper::new(store.clone(), options, remembered);
        let (holding, (wanted, wants)) = (keeper.holding(), watch::channel(Some(wanted(ip))));
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
        let revision = mark.map_or(0, |mark| mark.mod_revision);
        Remembered {
            own: own.expect("a lease"),
            mark,
            expires,
            revision,
            left: vec![],
            formerly: None,
            this_boot: true,
        }
    }

    fn duplicate_name(&self) -> String {
        self.holding.borrow().duplicate_name.clone().unwrap_or_default()
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

/// Without a disk, with a copied one, and with the memory of the running machine copied too.
#[tokio::test(start_paused = true)]
async fn newcomer_with_the_name_of_a_node_that_lives_waits_and_both_say_who_is_who() {
    for (boot, copied) in [(2, false), (2, true), (1, true), (1, false)] {
        let cluster = cluster();
        let first = Node::start(&cluster, 1, "192.0.2.1", None);
        a_moment().await;
        let (own, revision) = (first.own(), cluster.revision());
        let remembered = copied.then(|| first.remembered());
        let second = Node::start(&cluster, boot, "192.0.2.2", remembered);
        sleep(Duration::from_secs(3600)).await;
        assert_eq!((first.own(), cluster.revision()), (own.clone(), revision), "boot {boot}, copied {copied}");
        let (_, told) = second.trouble();
        let key = own.key.to_string();
        for word in ["another machine that lives is called node-1 too", &key, "192.0.2.1", "192.0.2.2", "--node-name"] {
            assert!(told.contains(word), "{word} is not in: {told}");
        }
        assert!(first.duplicate_name().contains("192.0.2.2"), "{}", first.duplicate_name());
        drop(second);
        sleep(Duration::from_secs(300)).await;
        assert_eq!(first.duplicate_name(), "", "it has gone");
    }
}

#[tokio::test(start_paused = true)]
async fn rebooted_reinstalled_and_renamed_machines_have_their_subnet_back_in_seconds() {
    for (name, boot, with_disk) in
        [("node-1", 2, true), ("node-1", 2, false), ("other", 1, true), ("other", 1, false), ("other", 2, true)]
    {
        let cluster = cluster();
        let first = Node::start(&cluster, 1, "192.0.2.1", None);
        a_moment().await;
        let (own, mut remembered) = (first.own(), first.remembered());
        (remembered.formerly, remembered.this_boot) = (Some("node-1".parse().expect("a name")), boot == 1);
        remembered.formerly = remembered.formerly.filter(|former| former.as_str() != name);
        drop(first);
        let node = Node::start_as(&cluster, name, boot, "192.0.2.1", Some(remembered).filter(|_| with_disk));
        sleep(Duration::from_secs(5)).await;
        assert_eq!((node.own().key, node.own().epoch), (own.key, 2), "{name}, boot {boot}, disk {with_disk}");
        assert_eq!(cluster.owner(&own.key).expect("held").as_str(), name);
    }
}

#[tokio::test(start_paused = true)]
async fn machine_that_comes_back_with_another_address_waits_while_anything_answers_at_the_former_one() {
    let cluster = cluster();
    let first = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    let (key, remembered) = (first.own().key, first.remembered());
    // Cut off from the store, its daemon can't answer there.
    first.store.set_reachable(false);
    cluster.put("host/192.0.2.1", b"it lives");
    let second = Node::start(&cluster, 2, "192.0.2.2", Some(remembered));
    sleep(TTL / 2).await;
    let (_, told) = second.trouble();
    assert!(told.contains("where a machine answers though its fabricd doesn't"), "{told}");
    assert!(told.contains("fabricctl lease release node-1") && told.contains("when that lease ends, "), "{told}");
    cluster.delete("host/192.0.2.1");
    sleep(TTL / 4).await;
    assert_eq!(second.trouble().0, NotReady::Quarantine, "its lease has not ended, and it was there a moment ago");
    sleep(2 * TTL).await;
    assert_eq!(second.own().key, key);
}

#[tokio::test(start_paused = true)]
async fn newcomer_without_a_memory_waits_until_the_lease_of_the_silent_one_ends() {
    let cluster = cluster();
    let first = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    first.store.set_reachable(false);
    let second = Node::start(&cluster, 2, "192.0.2.2", None);
    sleep(TTL - Duration::from_secs(5)).await;
    let (_, told) = second.trouble();
    assert!(told.contains("doesn't answer") && told.contains("fabricctl lease release node-1"), "{told}");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(first.trouble().0, NotReady::Quarantine);
    second.own();
}

/// As newcomers of older versions did.
#[tokio::test(start_paused = true)]
async fn lease_that_a_newcomer_took_without_asking_is_taken_back() {
    let cluster = cluster();
    let first = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    let own = first.own();
    for epoch in [3, 5] {
        let record = format!(
            r#"{{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}},"Fabric":{{"v":1,"node":"node-1","boot":"boot-2","netns":7,"epoch":{}}}}}"#,
            epoch - 1
        );
        cluster.put(&format!("subnets/{}", own.key.encode()), record.as_bytes());
        a_moment().await;
        assert_eq!((first.own().key, first.own().epoch), (own.key, epoch));
        for word in ["192.0.2.2", "boot-2", "had to give it back", "--node-name"] {
            assert!(first.duplicate_name().contains(word), "{word} is not in: {}", first.duplicate_name());
        }
    }
}

/// Its disk was copied while it was off: the copy has taken the lease, and lives.
#[tokio::test(start_paused = true)]
async fn original_of_a_copy_that_took_its_lease_while_it_was_off_waits() {
    let cluster = cluster();
    let first = Node::start(&cluster, 1, "192.0.2.1", None);
    a_moment().await;
    let remembered = first.remembered();
    drop(first);
    let copy = Node::start(&cluster, 2, "192.0.2.2", Some(remembered.clone()));
    sleep(Duration::from_secs(45)).await;
    let own = copy.own();
    let original = Node::start(&cluster, 3, "192.0.2.1", Some(remembered));
    sleep(Duration::from_secs(3600)).await;
    assert_eq!(copy.own(), own);
    assert!(
        original.trouble().1.contains("another machine that lives is called node-1 too"),
        "{:?}",
        original.trouble()
    );
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
