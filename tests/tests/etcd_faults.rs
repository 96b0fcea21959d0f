//! What can happen to an etcd and to the way to it, and what the store makes of it.

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::ensure;
use etcd_client::{DeleteOptions, Txn, TxnOp};
use fabric_core::leases::LeaseSet;
use fabric_tests::certificates::Certificates;
use fabric_tests::conformance::store::{claim, flannel_value, key, leases, now, shows};
use fabric_tests::etcd::EtcdServer;
use fabric_tests::lab::wait_until;
use fabric_tests::tcp_proxy::{Link, TcpProxy};
use fabricd::store::etcd::{Etcd, Init, Options, Tls, User};
use fabricd::store::{Connection, Expect, LeaseStore, Network, StoreError};
use futures::StreamExt as _;
use tokio::time::Instant;

/// Nobody listens there.
const DEAD: &str = "http://127.9.9.9:9";

async fn etcd() -> EtcdServer {
    EtcdServer::start().await.expect("a real etcd")
}

fn store(endpoints: &[&str]) -> Etcd {
    Etcd::start(Options::new(endpoints.iter().map(ToString::to_string).collect()))
}

/// An etcd behind a proxy, and a store that goes through it.
async fn proxied() -> (EtcdServer, TcpProxy, Etcd) {
    let etcd = etcd().await;
    let proxy = TcpProxy::start(etcd.endpoint().trim_start_matches("http://")).await.expect("a proxy");
    let store = store(&[&format!("http://{}", proxy.address())]);
    (etcd, proxy, store)
}

fn at(key: &str) -> String {
    format!("{}/{key}", Options::DEFAULT_PREFIX)
}

async fn put_flannel_leases(etcd: &EtcdServer, numbers: std::ops::RangeInclusive<u8>) {
    for n in numbers {
        etcd.ctl(&["put", &at(&format!("subnets/10.244.{n}.0-24")), &flannel_value(&format!("192.0.2.{n}"))]).await;
    }
}

async fn is_up(store: &Etcd) {
    shows(&mut store.connection(), "a connection", |connection| *connection == Connection::Up).await;
}

async fn is_down(store: &Etcd) -> String {
    let down = |connection: &Connection| connection.trouble().is_some();
    let lost = shows(&mut store.connection(), "a lost connection", down).await;
    lost.trouble().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn unreachable_store_names_its_endpoints_and_is_found_when_it_comes() {
    let mut etcd = etcd().await;
    etcd.kill();
    let store = store(&[DEAD, etcd.endpoint()]);
    let reason = is_down(&store).await;
    assert!(reason.contains(DEAD) && reason.contains(etcd.endpoint()) && reason.contains("refused"), "{reason}");
    assert!(store.leases().borrow().is_none());
    let claim = claim(1, "10.244.1.0-24", &LeaseSet::default());
    assert!(matches!(store.claim(&claim).await, Err(StoreError::Unreachable { .. })));
    etcd.restart().await.expect("starts");
    is_up(&store).await;
    assert!(now(&store).await.is_empty());
}

#[tokio::test]
async fn dead_endpoints_fail_no_request() {
    let etcd = etcd().await;
    // Several, since each begins at an endpoint of its own.
    for number in 1..=6 {
        let store = store(&[DEAD, "http://127.9.9.9:10", etcd.endpoint()]);
        let subnets = format!("10.244.{number}.0-24");
        let grant = store.claim(&claim(number, &subnets, &*now(&store).await)).await.expect("one is alive");
        store.keep_alive(&grant).await.expect("one is alive");
    }
}

#[tokio::test]
async fn restart_of_etcd_loses_nothing() {
    let mut etcd = etcd().await;
    let store = store(&[etcd.endpoint()]);
    let grant = store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("free");
    leases(&store, "the lease", |set| set.len() == 1).await;
    etcd.kill();
    is_down(&store).await;
    assert_eq!(now(&store).await.len(), 1, "an unreachable store deletes nothing");
    assert!(matches!(store.keep_alive(&grant).await, Err(StoreError::Unreachable { .. })));
    etcd.restart().await.expect("starts");
    is_up(&store).await;
    store.keep_alive(&grant).await.expect("etcd remembers it");
    put_flannel_leases(&etcd, 2..=2).await;
    leases(&store, "a lease after the restart", |set| set.len() == 2).await;
    assert_eq!(*store.replaced().borrow(), 0);
}

#[tokio::test]
async fn changes_during_a_disconnection_are_found_though_history_is_compacted() {
    let (etcd, proxy, store) = proxied().await;
    put_flannel_leases(&etcd, 1..=3).await;
    leases(&store, "three leases", |set| set.len() == 3).await;
    proxy.set(Link::Cut);
    is_down(&store).await;
    etcd.ctl(&["del", &at("subnets/10.244.1.0-24")]).await;
    put_flannel_leases(&etcd, 4..=5).await;
    let printed = etcd.ctl(&["get", "-w", "json", "nothing"]).await;
    let answer: serde_json::Value = serde_json::from_str(&printed).expect("JSON");
    etcd.ctl(&["compact", "--physical", &answer["header"]["revision"].to_string()]).await;
    assert_eq!(now(&store).await.len(), 3, "an unreachable store deletes nothing");
    proxy.set(Link::Up);
    let set = leases(&store, "four other leases", |set| set.len() == 4).await;
    assert!(set.get(&key("10.244.1.0-24")).is_none());
}

thread_local! {
    /// What this thread has logged: a test and its store are one thread.
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct ThreadLog;

impl Write for ThreadLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LOG.with_borrow_mut(|log| log.write(line))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Every thread logs into its [`LOG`]. The subscriber is global: with one for a thread alone, a line that another thread
/// comes to first is off for all of them (tracing's cache of interests asks that thread's subscriber).
fn log_to_thread() {
    let logging = tracing_subscriber::fmt().with_writer(|| ThreadLog).with_ansi(false).finish();
    tracing::subscriber::set_global_default(logging).expect("the only one");
}

/// A watcher that falls behind what is compacted is turned away by etcd: that is one list and one line of the log.
#[tokio::test]
async fn watch_overtaken_by_compaction_is_one_list_and_one_log_line() {
    log_to_thread();
    let (etcd, proxy, store) = proxied().await;
    // The second comes by the watch: without one there would be a list, and nothing to be overtaken.
    for n in 1..=2 {
        put_flannel_leases(&etcd, n..=n).await;
        leases(&store, "what is put now", |set| set.len() == usize::from(n)).await;
    }
    proxy.set(Link::Frozen);
    // More than the connection's buffers hold, and soon: a connection that is frozen for 18 s is given up.
    let client = etcd_client::Client::connect([etcd.endpoint()], None).await.expect("an endpoint");
    let value = flannel_value("192.0.2.1").replacen('{', &format!(r#"{{"Padding":"{}","#, "x".repeat(8_000)), 1);
    let put = |n: u32| {
        let (mut kv, key) = (client.kv_client(), at(&format!("subnets/10.{}.{}.0-24", n / 200, n % 200)));
        let value = value.clone();
        async move { kv.put(key, value, None).await.expect("written").header().expect("a header").revision() }
    };
    let revisions: Vec<i64> = futures::stream::iter((0..6_000).map(put)).buffer_unordered(64).collect().await;
    let last = revisions.into_iter().max().expect("many");
    etcd.ctl(&["compact", "--physical", &last.to_string()]).await;
    proxy.set(Link::Up);
    leases(&store, "all leases", |set| set.len() == 6_002).await;
    is_up(&store).await;
    let told = LOG.with_borrow(|log| String::from_utf8_lossy(log).into_owned());
    let lines: Vec<&str> = told.lines().filter(|line| !line.contains("DEBUG")).collect();
    assert_eq!(lines.len(), 1, "{told}");
    assert!(lines[0].contains("was compacted"), "{told}");
}

/// To leave an etcd that has too much to do is to give it more: another list of everything.
#[tokio::test]
async fn etcd_that_is_late_with_its_answers_is_not_left() {
    let (etcd, proxy, store) = proxied().await;
    is_up(&store).await;
    let mut connection = store.connection();
    connection.mark_unchanged();
    proxy.set(Link::Frozen);
    // How long is what matters: the probe after 6 s, and some of the time that its answer has.
    tokio::time::sleep(Duration::from_secs(11)).await;
    proxy.set(Link::Up);
    put_flannel_leases(&etcd, 1..=1).await;
    leases(&store, "what was written after that", |set| set.len() == 1).await;
    assert!(!connection.has_changed().expect("the store lives"), "{:?}", *connection.borrow());
}

#[tokio::test]
async fn half_open_connection_is_found_and_left() {
    let (etcd, proxy, store) = proxied().await;
    is_up(&store).await;
    proxy.set(Link::Frozen);
    let began = Instant::now();
    is_down(&store).await;
    assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
    put_flannel_leases(&etcd, 1..=1).await;
    proxy.set(Link::Up);
    leases(&store, "what was written meanwhile", |set| set.len() == 1).await;
}

#[tokio::test]
async fn frozen_endpoint_is_left_for_another() {
    let etcd = etcd().await;
    let target = etcd.endpoint().trim_start_matches("http://");
    let proxies = [TcpProxy::start(target).await.expect("a proxy"), TcpProxy::start(target).await.expect("a proxy")];
    let store = store(&[&format!("http://{}", proxies[0].address()), &format!("http://{}", proxies[1].address())]);
    is_up(&store).await;
    // Whichever it uses, one of these rounds freezes it.
    for (n, frozen) in (1..).zip(&proxies) {
        frozen.set(Link::Frozen);
        put_flannel_leases(&etcd, n..=n).await;
        leases(&store, "a lease through the other endpoint", |set| set.len() == usize::from(n)).await;
        frozen.set(Link::Up);
    }
}

#[tokio::test]
async fn paused_etcd_is_down_until_it_goes_on() {
    let etcd = etcd().await;
    let store = store(&[etcd.endpoint()]);
    is_up(&store).await;
    etcd.pause();
    let reason = is_down(&store).await;
    assert!(reason.contains(etcd.endpoint()), "{reason}");
    etcd.resume();
    is_up(&store).await;
}

#[tokio::test]
async fn store_replaced_by_an_empty_one_is_recognised() {
    for new_identity in [true, false] {
        let mut etcd = etcd().await;
        let store = store(&[etcd.endpoint()]);
        let first = claim(1, "10.244.1.0-24", &*now(&store).await);
        let grant = store.claim(&first).await.expect("free");
        let old = leases(&store, "the lease", |set| set.len() == 1).await;

        etcd.replace(new_identity).await.expect("starts");
        shows(&mut store.replaced(), "the replacement", |count| *count == 1).await;
        let empty = leases(&store, "the empty store", |set| set.is_empty()).await;
        assert!(empty.revision() < old.revision());
        assert!(matches!(store.keep_alive(&grant).await, Err(StoreError::Expired { .. })));
        assert!(matches!(store.rewrite(&grant, &first.record).await, Err(StoreError::Lost { .. })));
        let on_the_old_set = claim(2, "10.244.2.0-24", &old);
        assert!(matches!(store.claim(&on_the_old_set).await, Err(StoreError::Lost { .. })), "revisions are void");
        store.claim(&claim(1, "10.244.1.0-24", &empty)).await.expect("decided on the new store");
        leases(&store, "the lease in the new store", |set| set.len() == 1).await;
        assert_eq!(*store.replaced().borrow(), 1);
    }
}

#[tokio::test]
async fn most_leases_vanish_only_after_a_second_look() {
    let etcd = etcd().await;
    put_flannel_leases(&etcd, 1..=6).await;
    let store = store(&[etcd.endpoint()]);
    is_up(&store).await;
    let began = Instant::now();
    etcd.ctl(&["del", "--prefix", &at("subnets/")]).await;
    leases(&store, "no leases", |set| set.is_empty()).await;
    assert!(began.elapsed() >= Duration::from_millis(1500), "{:?}", began.elapsed());
}

#[tokio::test]
async fn leases_that_come_back_before_the_second_look_were_never_away() {
    let etcd = etcd().await;
    put_flannel_leases(&etcd, 1..=6).await;
    let store = store(&[etcd.endpoint()]);
    is_up(&store).await;
    let fewest = Arc::new(AtomicUsize::new(usize::MAX));
    let (seen, mut receiver) = (fewest.clone(), store.leases());
    let counting = tokio::spawn(async move {
        while receiver.changed().await.is_ok() {
            let count = receiver.borrow_and_update().as_ref().map_or(0, |set| set.len());
            seen.fetch_min(count, Ordering::Relaxed);
        }
    });
    let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await.expect("an endpoint");
    let gone = TxnOp::delete(at("subnets/"), Some(DeleteOptions::new().with_prefix()));
    client.txn(Txn::new().and_then([gone])).await.expect("deleted");
    let back = (1..=7).map(|n| TxnOp::put(at(&format!("subnets/10.244.{n}.0-24")), flannel_value("192.0.2.7"), None));
    client.txn(Txn::new().and_then(back.collect::<Vec<_>>())).await.expect("restored");
    leases(&store, "all leases and one more", |set| set.len() == 7).await;
    drop(store);
    counting.await.expect("ends with the store");
    assert!(fewest.load(Ordering::Relaxed) >= 4, "{fewest:?}");
}

#[tokio::test]
async fn answer_that_was_lost_is_read_back() {
    let (etcd, proxy, store) = proxied().await;
    let first = claim(1, "10.244.1.0-24", &*now(&store).await);
    let grant = store.claim(&first).await.expect("free");
    let mut record = first.record.clone();
    record.owner.as_mut().expect("ours").epoch = 2;
    proxy.set(Link::Mute);
    let (rewriting, cutting) = (store.rewrite(&grant, &record), async {
        while !etcd.ctl(&["get", &at("subnets/10.244.1.0-24")]).await.contains(r#""epoch":2"#) {}
        proxy.set(Link::Cut);
        proxy.set(Link::Up);
    });
    let (rewritten, ()) = tokio::join!(rewriting, cutting);
    let rewritten = rewritten.expect("it was carried out");
    let written = leases(&store, "the record", |set| {
        set.get(&grant.key).is_some_and(|lease| lease.mod_revision == rewritten.mod_revision)
    });
    assert_eq!(written.await.get(&grant.key).expect("there").record, record);
}

#[tokio::test]
async fn list_larger_than_grpcs_usual_limit_is_read() {
    let etcd = etcd().await;
    let padding = "x".repeat(15_000);
    let value = flannel_value("192.0.2.1").replacen('{', &format!(r#"{{"Padding":"{padding}","#), 1);
    let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await.expect("an endpoint");
    for n in 0..300 {
        let subnet = at(&format!("subnets/10.{}.{}.0-24", n / 200, n % 200));
        client.put(subnet, value.clone(), None).await.expect("written");
    }
    let store = store(&[etcd.endpoint()]);
    assert_eq!(now(&store).await.len(), 300);
}

#[tokio::test]
async fn network_config_is_written_once_and_replaced_by_force() {
    let etcd = etcd().await;
    let store = store(&[etcd.endpoint()]);
    let [one, two] = [16, 12].map(|len| format!(r#"{{"Network":"10.240.0.0/{len}","Backend":{{"Type":"vxlan"}}}}"#));
    let init = async |json: &str, force| store.network_init(json.as_bytes(), force).await.expect("reachable");
    assert_eq!(store.read_config().await.expect("reachable"), None);
    assert_eq!(init(&one, false).await, Init::Created);
    assert_eq!(init(&one, false).await, Init::Unchanged);
    let stored = store.read_config().await.expect("reachable").expect("written");
    assert_eq!(stored.json, one.as_bytes());
    assert_eq!(init(&two, false).await, Init::Exists(stored.clone()));
    assert_eq!(init(&two, true).await, Init::Replaced(stored));
    assert_eq!(etcd.ctl(&["get", "--print-value-only", &at("config")]).await.trim_end(), two);
    // What was decided on a config that isn't there any more is not written.
    let seen = store.read_config().await.expect("reachable").expect("written");
    assert_eq!(store.network_replace(&seen, one.as_bytes()).await, Ok(()));
    let refused = store.network_replace(&seen, two.as_bytes()).await;
    assert!(matches!(refused, Err(StoreError::Refused { .. })), "{refused:?}");
    assert_eq!(etcd.ctl(&["get", "--print-value-only", &at("config")]).await.trim_end(), one);
    let network = shows(&mut store.network(), "the config", |network| matches!(network, Network::Valid(_))).await;
    assert!(matches!(network, Network::Valid(config) if config.spaces.v4.is_some()));
}

#[tokio::test]
async fn user_and_password_are_used_and_a_wrong_one_is_named() {
    let etcd = etcd().await;
    for args in [&["user", "add", "root:secret"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        etcd.ctl(args).await;
    }
    let as_user = |password: &str| {
        let user = User { name: "root".into(), password: password.into() };
        Etcd::start(Options { user: Some(user), ..Options::new(vec![etcd.endpoint().into()]) })
    };
    let right = as_user("secret");
    let grant = right.claim(&claim(1, "10.244.1.0-24", &*now(&right).await)).await.expect("allowed");
    right.keep_alive(&grant).await.expect("allowed");
    leases(&right, "the lease", |set| set.len() == 1).await;

    for (wrong, told) in
        [(as_user("guess"), "authentication failed"), (store(&[etcd.endpoint()]), "user name is empty")]
    {
        let reason = is_down(&wrong).await;
        assert!(reason.contains(told), "{reason}");
    }
}

/// etcd forgets log-ins that are not used for a while, and all of them when it restarts.
#[tokio::test]
async fn log_in_that_etcd_has_forgotten_is_made_anew() {
    // Its log says which log-ins it has forgotten.
    let args = ["--auth-token-ttl", "1", "--logger", "zap", "--log-level", "debug"];
    let mut etcd = EtcdServer::start_with_args(&args).await.expect("a real etcd");
    for args in [&["user", "add", "root:secret"][..], &["user", "grant-role", "root", "root"], &["auth", "enable"]] {
        etcd.ctl(args).await;
    }
    let user = User { name: "root".into(), password: "secret".into() };
    let store = Etcd::start(Options { user: Some(user), ..Options::new(vec![etcd.endpoint().into()]) });
    let mut grant = store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("allowed");
    for _ in 0..2 {
        // The store's are all there are: one for each kind of request that was made since.
        wait_until("etcd has forgotten every log-in", Duration::from_secs(60), || {
            let told = etcd.log();
            let (made, forgotten) = (told.matches("authenticated a user"), told.matches("deleted a simple token"));
            let (made, forgotten) = (made.count(), forgotten.count());
            ensure!(made > 0 && made == forgotten, "{forgotten} of {made}");
            Ok(())
        })
        .expect("it does after a second");
        grant = store.keep_alive(&grant).await.expect("logs in again");
    }
    // `etcdctl` without a user is turned away by now, which would pass for an etcd that does not start.
    etcd.launch().expect("starts");
    while let Err(error) = store.keep_alive(&grant).await {
        assert!(matches!(error, StoreError::Unreachable { .. }), "logs in again, but: {error}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn watch_that_is_not_permitted_is_named() {
    let etcd = etcd().await;
    let [config, subnets, reservations, asked] =
        ["config", "subnets/", "fabric/reservations/", "fabric/guard/asked/"].map(at);
    for args in [
        &["role", "add", "lister"][..],
        &["role", "grant-permission", "lister", "read", &config],
        &["role", "grant-permission", "--prefix", "lister", "read", &subnets],
        &["role", "grant-permission", "--prefix", "lister", "read", &reservations],
        &["role", "grant-permission", "--prefix", "lister", "read", &asked],
        &["user", "add", "root:secret"],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "node:secret"],
        &["user", "grant-role", "node", "lister"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args).await;
    }
    let user = User { name: "node".into(), password: "secret".into() };
    let store = Etcd::start(Options { user: Some(user), ..Options::new(vec![etcd.endpoint().into()]) });
    let reason = is_down(&store).await;
    assert!(reason.contains("refused to watch the leases") && reason.contains("permission denied"), "{reason}");
}

/// The role that docs/reference.md gives a node.
#[tokio::test]
async fn role_of_a_node_is_enough_for_all_that_a_node_does_and_no_more() {
    let etcd = etcd().await;
    let [all, subnets, guards] = ["", "subnets/", "fabric/guard/"].map(at);
    for args in [
        &["role", "add", "fabric-node"][..],
        &["role", "grant-permission", "--prefix", "fabric-node", "read", &all],
        &["role", "grant-permission", "--prefix", "fabric-node", "readwrite", &subnets],
        &["role", "grant-permission", "--prefix", "fabric-node", "readwrite", &guards],
        &["user", "add", "root:secret"],
        &["user", "grant-role", "root", "root"],
        &["user", "add", "node:secret"],
        &["user", "grant-role", "node", "fabric-node"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args).await;
    }
    let user = User { name: "node".into(), password: "secret".into() };
    let store = Etcd::start(Options { user: Some(user), ..Options::new(vec![etcd.endpoint().into()]) });
    let first = claim(1, "10.244.1.0-24", &*now(&store).await);
    let grant = store.claim(&first).await.expect("allowed");
    let grant = store.rewrite(&grant, &first.record).await.expect("allowed");
    let grant = store.keep_alive(&grant).await.expect("allowed");
    store.expired_leases(Duration::from_secs(60)).await.expect("allowed");
    let place = key("10.244.2.0-24");
    let node = "node-2".parse().expect("a name");
    let placeholder = fabric_core::record::Record::placeholder(&node, &place);
    store.hold_place(&place, &placeholder).await.expect("allowed");
    store.release(&grant).await.expect("allowed");

    let config = store.network_init(br#"{"Network":"10.0.0.0/8","Backend":{"Type":"vxlan"}}"#, false).await;
    assert!(config.is_err_and(|error| error.to_string().contains("permission denied")));
    let reserved = store.reserve(&node, &place).await;
    assert!(reserved.is_err_and(|error| error.to_string().contains("permission denied")));
}

/// A person's commands, as `fabricctl lease` gives them.
#[tokio::test]
async fn subnets_are_reserved_and_released_by_a_person() {
    let etcd = etcd().await;
    let store = store(&[etcd.endpoint()]);
    let held = store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("free");
    leases(&store, "the lease", |set| set.len() == 1).await;
    let [one, two] = [1, 2].map(|n| format!("node-{n}").parse().expect("a name"));
    let place = key("10.244.2.0-24");
    let refused = store.reserve(&two, &held.key).await.expect_err("it is node-1's").to_string();
    assert!(refused.contains("node-1 holds 10.244.1.0/24"), "{refused}");
    store.reserve(&two, &place).await.expect("free");
    leases(&store, "the placeholder", |set| set.get(&place).is_some_and(|lease| lease.record.is_placeholder())).await;
    let refused = store.reserve(&one, &place).await.expect_err("it is node-2's").to_string();
    assert!(refused.ends_with("fabricctl lease unreserve node-2"), "{refused}");
    assert_eq!(store.unreserve(&two).await.expect("reachable"), [place]);
    leases(&store, "no placeholder", |set| set.get(&place).is_none() && set.reservations().is_empty()).await;

    let lease = now(&store).await.get(&held.key).expect("there").clone();
    let left = store.time_left(&lease).await.expect("reachable").expect("it ends");
    assert!(left > Duration::from_secs(500), "{left:?}");
    assert_eq!(store.release_node(&one).await.expect("reachable"), [held.key]);
    let gone = leases(&store, "no lease", LeaseSet::is_empty).await;
    assert!(gone.departed().is_empty(), "a person said that it is gone");
    store.claim(&claim(3, "10.244.1.0-24", &gone)).await.expect("nothing rests");
}

#[tokio::test]
async fn record_taken_over_by_its_own_node_leaves_no_lease_behind() {
    let etcd = etcd().await;
    let store = store(&[etcd.endpoint()]);
    let first = claim(1, "10.244.1.0-24", &*now(&store).await);
    let mut grant = store.claim(&first).await.expect("free");
    // As a node does that starts again and remembers nothing.
    for _ in 0..3 {
        let again = fabricd::store::Claim { expect: Expect::Revision(grant.mod_revision), ..first.clone() };
        grant = store.claim(&again).await.expect("its own");
    }
    assert!(etcd.ctl(&["lease", "list"]).await.starts_with("found 1 leases"));
    assert!(etcd.ctl(&["get", &at("subnets/10.244.1.0-24")]).await.contains("node-1"), "the record went along");
}

#[tokio::test]
async fn certificates_are_used_and_a_wrong_or_missing_one_is_named() {
    let [certificates, others] = [(); 2].map(|()| Certificates::create().expect("certificates"));
    let (ca, client) = (certificates.ca(), certificates.client());
    let etcd = EtcdServer::start_with_tls(certificates).await.expect("a real etcd");
    let with = |ca: Option<PathBuf>, client: Option<(PathBuf, PathBuf)>| {
        Etcd::start(Options { tls: Tls { ca, client }, ..Options::new(vec![etcd.endpoint().into()]) })
    };
    let right = with(Some(ca.clone()), Some(client.clone()));
    right.claim(&claim(1, "10.244.1.0-24", &*now(&right).await)).await.expect("let in");

    let absent = others.ca().with_file_name("absent.pem");
    for (wrong, told) in [
        (with(None, None), "needs the CA certificate"),
        (with(Some(absent), None), "absent.pem: No such file"),
        (with(Some(others.ca()), Some(client)), "invalid peer certificate"),
        (with(Some(ca.clone()), None), "does etcd ask for a client certificate?"),
        (with(Some(ca), Some(others.client())), "is the client certificate one that etcd trusts?"),
    ] {
        let reason = is_down(&wrong).await;
        assert!(reason.contains(told), "{reason}\n  should tell: {told}");
    }
}

#[tokio::test]
async fn ca_alone_is_enough_for_an_etcd_that_asks_for_no_certificate() {
    let certificates = Certificates::create().expect("certificates");
    let tls = Tls { ca: Some(certificates.ca()), client: None };
    let etcd = EtcdServer::start_with_server_tls(certificates).await.expect("a real etcd");
    let store = Etcd::start(Options { tls, ..Options::new(vec![etcd.endpoint().into()]) });
    store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("let in");
}

#[tokio::test]
async fn rotated_certificates_are_taken_up_with_the_next_connection() {
    let certificates = Certificates::create().expect("certificates");
    let tls = Tls { ca: Some(certificates.ca()), client: Some(certificates.client()) };
    let mut etcd = EtcdServer::start_with_tls(certificates).await.expect("a real etcd");
    let store = Etcd::start(Options { tls, ..Options::new(vec![etcd.endpoint().into()]) });
    let grant = store.claim(&claim(1, "10.244.1.0-24", &*now(&store).await)).await.expect("let in");
    etcd.certificates().expect("it has some").renew().expect("renewed");
    store.keep_alive(&grant).await.expect("the connection stands");
    etcd.restart().await.expect("starts with the new ones");
    is_up(&store).await;
    store.keep_alive(&grant).await.expect("let in with the new ones");
}

#[tokio::test]
async fn claim_by_a_revision_that_never_was_is_lost() {
    let etcd = etcd().await;
    let store = store(&[etcd.endpoint()]);
    let claim = claim(1, "10.244.1.0-24", &*now(&store).await);
    let answer = store.claim(&fabricd::store::Claim { expect: Expect::Revision(7), ..claim }).await;
    assert!(matches!(answer, Err(StoreError::Lost { .. })), "{answer:?}");
    assert_eq!(etcd.ctl(&["lease", "list"]).await.trim(), "found 0 leases", "the unused lease was revoked");
}
