//! The reconcile loop and the lease keeper, on a kernel and a store in memory: whatever fails, they come to what the
//! leases say, and then fall silent.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::{Change, Key, Op, routing};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::{IfName, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::FilterOptions;
use fabric_core::record::Instance;
use fabric_core::state::{Nexthop, NexthopId, Sysctl, Via, VxlanLink};
use fabric_tests::fake_kernel::{BOOT, FakeKernel, STATIC, Tables, Write};
use fabric_tests::keepers::{no_hosts, pods_in};
use fabric_tests::memory_store::{MemoryCluster, MemoryStore};
use fabricd::files::Files;
use fabricd::files::state_dir::State;
use fabricd::host::underlay::Selector;
use fabricd::lease::{Keeper, LeaseOptions};
use fabricd::reconcile::fast_path::Mode;
use fabricd::reconcile::{Node, Reconciler};
use fabricd::status::view::View;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const V4: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const DUAL: &str =
    r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;
const V4_PEER: (&str, &str) = (
    "subnets/10.244.2.0-24",
    r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}}"#,
);
const DUAL_PEER: (&str, &str) = (
    "subnets/10.244.2.0-24&fd00:10:244:2::-64",
    r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:42:c0:00:06:02"}}"#,
);

/// What a kernel may answer.
const ERRNOS: [i32; 22] = [
    libc::EPERM,
    libc::ENOENT,
    libc::ESRCH,
    libc::EINTR,
    libc::EIO,
    libc::EAGAIN,
    libc::ENOMEM,
    libc::EACCES,
    libc::EBUSY,
    libc::EEXIST,
    libc::ENODEV,
    libc::EINVAL,
    libc::ENOSPC,
    libc::EROFS,
    libc::EMSGSIZE,
    libc::EOPNOTSUPP,
    libc::EADDRINUSE,
    libc::EADDRNOTAVAIL,
    libc::ENETDOWN,
    libc::ENETUNREACH,
    libc::ENOBUFS,
    libc::EHOSTUNREACH,
];

/// A node's daemon, all of it but netlink, etcd and the API.
struct Daemon {
    store: Arc<MemoryStore>,
    view: watch::Receiver<Arc<View>>,
    _tasks: JoinSet<()>,
}

/// What outlives a daemon: the store, the kernel, the files.
struct Host {
    cluster: MemoryCluster,
    kernel: FakeKernel,
    dir: tempfile::TempDir,
    iface: &'static str,
    filter: FilterOptions,
}

impl Host {
    fn new(config: &str, peers: &[(&str, &str)]) -> Self {
        let cluster = MemoryCluster::default();
        cluster.put("config", config.as_bytes());
        for (key, value) in peers {
            cluster.put(key, value.as_bytes());
        }
        let address = |text: &str, len| {
            let ip: IpAddr = text.parse().expect(text);
            (ip, Subnet::holding(ip, len).expect(text))
        };
        let kernel = FakeKernel::new(Tables::host(&[address("192.0.2.1", 24), address("2001:db8::1", 64)]));
        Self {
            cluster,
            kernel,
            dir: tempfile::tempdir().expect("temporary folder"),
            iface: "eth0",
            filter: FilterOptions::default(),
        }
    }

    fn files(&self) -> Files {
        Files::new(self.dir.path(), &self.dir.path().join("subnet.env"))
    }

    fn start(&self) -> Daemon {
        self.start_with(self.cluster.node(), State::default())
    }

    /// With what the daemon before it has left on disk.
    fn start_with(&self, store: MemoryStore, before: State) -> Daemon {
        let store = Arc::new(store);
        let name: fabric_core::model::NodeName = "node-1".parse().expect("valid");
        let instance = Instance { boot: "boot".into(), netns: 7 };
        let day = Duration::from_secs(86_400);
        let pods = pods_in(&self.dir.path().join("networks"));
        let options =
            LeaseOptions { node: name.clone(), instance, ttl: day, grace: day, pods, since: 0, hosts: no_hosts() };
        let keeper = Keeper::new(store.clone(), options, None);
        let selectors = vec![Selector::Iface(self.iface.into())];
        let node = Node {
            name,
            selectors,
            public_ips: PerFamily::default(),
            filter: self.filter.clone(),
            fast_path: Mode::Off,
        };
        let reconciler = Reconciler::new(node, store.clone(), self.kernel.clone(), self.files(), before);
        let (view, wanted, holding) = (reconciler.view(), reconciler.wanted(), keeper.holding());
        let mut tasks = JoinSet::new();
        tasks.spawn(keeper.run(wanted));
        tasks.spawn(reconciler.run(holding));
        Daemon { store, view, _tasks: tasks }
    }
}

impl Daemon {
    async fn until(&mut self, what: &str, reached: impl FnMut(&Arc<View>) -> bool) -> Arc<View> {
        if let Ok(view) = timeout(Duration::from_secs(600), self.view.wait_for(reached)).await {
            return view.expect("the loop lives").clone();
        }
        panic!("not {what} after ten minutes: {:?}", self.view.borrow())
    }

    async fn ready(&mut self) -> Arc<View> {
        self.until("ready", |view| view.readiness == Readiness::Ready && view.troubles.is_empty()).await
    }

    async fn refusing(&mut self, words: &str) -> String {
        let says =
            |view: &Arc<View>| matches!(&view.readiness, Readiness::NotReady { reason, .. } if reason.contains(words));
        match &self.until(words, says).await.readiness {
            Readiness::NotReady { reason, .. } => reason.clone(),
            Readiness::Ready => unreachable!("just matched"),
        }
    }
}

/// Half a minute, audits included, in which nothing may be written.
async fn stays_silent(kernel: &FakeKernel) {
    drop(kernel.writes());
    sleep(Duration::from_secs(30)).await;
    let writes: Vec<String> = kernel.writes().iter().map(ToString::to_string).collect();
    assert_eq!(writes, Vec::<String>::new());
}

fn dev(name: &str) -> IfName {
    name.parse().expect(name)
}

#[tokio::test(start_paused = true)]
async fn node_becomes_ready_and_says_so_in_its_files() {
    for (config, peer) in [(V4, V4_PEER), (DUAL, DUAL_PEER)] {
        let host = Host::new(config, &[peer]);
        let mut daemon = host.start();
        daemon.ready().await;
        let file = host.files().read().expect("node.json");
        assert_eq!(file.readiness, Readiness::Ready);
        assert_eq!(file.mtu, if config == DUAL { 1430 } else { 1450 });
        assert!(host.files().subnet.exists());
        stays_silent(&host.kernel).await;
    }
}

#[tokio::test(start_paused = true)]
async fn every_write_may_fail_with_every_errno_and_the_node_converges_then_falls_silent() {
    let host = Host::new(DUAL, &[DUAL_PEER]);
    host.start().ready().await;
    let steps: Vec<Op> = host.kernel.writes().into_iter().map(|write| write.op).collect();
    let done = host.kernel.tables();
    let of_filter = steps.iter().filter(|op| is_filter(op)).count();
    assert!(steps.len() - of_filter >= 13 && of_filter >= 8, "{steps:?}");
    // Sets, chains, and only then what takes packets.
    assert!(steps.is_sorted_by_key(Op::stage), "{steps:?}");

    for errno in ERRNOS {
        for victim in &steps {
            let host = Host::new(DUAL, &[DUAL_PEER]);
            let key = victim.key();
            host.kernel.fail(errno, move |op| op.key() == key);
            let mut daemon = host.start();
            daemon
                .until("troubled", |view| {
                    view.leases.is_some()
                        && (view.readiness != Readiness::Ready || !view.troubles.is_empty())
                        && view.holding.own.is_some()
                })
                .await;
            sleep(Duration::from_secs(20)).await;
            let writes = host.kernel.writes();
            assert!(writes.iter().any(|write| write.result == Err(errno)), "{victim} never failed");
            no_step_stands_on_a_failed_one(&writes, &victim.key());
            assert_eq!(bystanders(&host.kernel.tables(), victim), bystanders(&done, victim), "{victim}: {errno}");

            host.kernel.heal();
            daemon.ready().await;
            assert_eq!(host.kernel.tables().observed().ours, done.observed().ours, "after {victim}: {errno}");
            assert_eq!(host.kernel.tables().filter, done.filter, "after {victim}: {errno}");
            stays_silent(&host.kernel).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn every_filter_write_may_fail_with_every_errno_and_no_new_device_comes_up_before_it_is_written() {
    let reference = Host::new(DUAL, &[DUAL_PEER]);
    reference.start().ready().await;
    let done = reference.kernel.tables();
    let ours = |tables: &Tables| tables.links.keys().filter(|name| name.as_str().starts_with("fabric")).count();
    assert_eq!(ours(&done), 2);
    for errno in ERRNOS {
        let host = Host::new(DUAL, &[DUAL_PEER]);
        host.kernel.fail(errno, is_filter);
        let mut daemon = host.start();
        let reason = daemon.refusing("left out while the packet filter can't be written").await;
        assert!(reason.contains("--check-senders=false") && !reason.contains("os error"), "{reason}");
        assert!(reason.len() < 800, "{reason}");
        sleep(Duration::from_secs(20)).await;
        let refused = host.kernel.writes().iter().filter(|write| write.result == Err(errno)).count();
        assert!(refused > 1, "{errno} never came");
        let tables = host.kernel.tables();
        assert_eq!((ours(&tables), tables.routes.len(), tables.filter.len()), (0, 0, 0), "{errno}");
        let view = daemon.view.borrow().clone();
        assert_eq!(view.troubles.len(), 1, "the peer is not programmed");

        host.kernel.heal();
        daemon.ready().await;
        assert_eq!(host.kernel.tables().observed().ours, done.observed().ours, "after {errno}");
        assert_eq!(host.kernel.tables().filter, done.filter, "after {errno}");
        stays_silent(&host.kernel).await;

        // What stands goes on, whatever becomes of its filter.
        let standing = host.kernel.tables();
        host.kernel.fail(errno, is_filter);
        host.kernel.edit(|tables| tables.filter.clear());
        let reason = daemon.refusing("nft add set").await;
        assert!(!reason.contains("left out"), "{reason}");
        sleep(Duration::from_secs(20)).await;
        let now = host.kernel.tables();
        assert_eq!((now.links, now.routes, now.fdb), (standing.links, standing.routes, standing.fdb), "{errno}");
        // But one that is set down stays down, and one that is deleted doesn't come back.
        host.kernel.edit(|tables| tables.set_down(&dev("fabric6.1")));
        daemon.refusing("ip link set fabric6.1 up: left out while").await;
        host.kernel.edit(|tables| tables.delete_link(&dev("fabric.1")));
        daemon.refusing("ip link add fabric.1").await;
        sleep(Duration::from_secs(20)).await;
        assert!(!host.kernel.tables().links.contains_key(&dev("fabric.1")));
        host.kernel.heal();
        daemon.ready().await;
        assert_eq!(host.kernel.tables().observed().ours, done.observed().ours, "after {errno}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_filter_that_judges_senders_is_enough_for_a_new_device() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    // Another peer can't be let in, and the device is gone: it comes back for those that are members.
    host.kernel.fail(libc::ENOMEM, is_filter);
    let another = V4_PEER.1.replace("192.0.2.2", "192.0.2.3").replace("02:42:c0:00:02:02", "02:42:c0:00:02:03");
    host.cluster.put("subnets/10.244.3.0-24", another.as_bytes());
    daemon.refusing("nft add element").await;
    host.kernel.edit(|tables| tables.delete_link(&dev("fabric.1")));
    sleep(Duration::from_secs(20)).await;
    assert!(host.kernel.tables().links.contains_key(&dev("fabric.1")));
}

#[tokio::test(start_paused = true)]
async fn without_checking_senders_a_device_waits_for_no_filter() {
    let mut host = Host::new(V4, &[V4_PEER]);
    host.filter.check_senders = false;
    host.kernel.fail(libc::EOPNOTSUPP, is_filter);
    let mut daemon = host.start();
    let reason = daemon.refusing("modprobe -a nf_tables").await;
    assert!(!reason.contains("left out"), "{reason}");
    assert!(host.kernel.tables().links.contains_key(&dev("fabric.1")));
}

#[tokio::test(start_paused = true)]
async fn a_start_that_waits_for_the_kernel_tells_so_with_the_lease_that_it_holds() {
    let host = Host::new(V4, &[V4_PEER]);
    host.kernel.stall(true);
    let mut daemon = host.start();
    daemon.refusing("writing the packet filter for 9 s: the kernel has not answered yet").await;
    assert!(daemon.view.borrow().holding.own.is_some(), "{:?}", daemon.view.borrow().holding);
    host.kernel.stall(false);
    daemon.ready().await;

    // Once the data plane stands, a kernel that is busy is no reason to say that it doesn't.
    host.kernel.stall(true);
    host.cluster.put("subnets/10.244.3.0-24", V4_PEER.1.replace("192.0.2.2", "192.0.2.3").as_bytes());
    sleep(Duration::from_secs(60)).await;
    assert_eq!(daemon.view.borrow().readiness, Readiness::Ready);
}

#[tokio::test(start_paused = true)]
async fn what_another_program_changes_is_a_repair_and_what_a_lease_changes_is_none() {
    let host = Host::new(DUAL, &[DUAL_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let told = |view: &View| view.repairs.iter().map(|repair| repair.message.clone()).collect::<Vec<_>>();
    assert_eq!(told(&daemon.view.borrow()), [""; 0], "a start repairs nothing");
    host.cluster.put(DUAL_PEER.0, DUAL_PEER.1.replace("02:42:c0:00:02:02", "02:42:c0:00:02:99").as_bytes());
    sleep(Duration::from_secs(15)).await;
    assert_eq!(told(&daemon.view.borrow()), [""; 0], "nor does a peer's change");
    type Damage = fn(&mut Tables);
    let damages: [(Damage, &str); 8] = [
        (
            |t| {
                t.routes.pop_first();
            },
            "route 10.244.2.0/24 was deleted by another program, restored",
        ),
        (
            |t| {
                t.fdb.pop_first();
            },
            "FDB entry 02:42:c0:00:02:99 of fabric.1 was deleted",
        ),
        (
            |t| {
                t.neighbours.pop_first();
            },
            "neighbour 10.244.2.0 of fabric.1 was deleted",
        ),
        (
            |t| {
                t.sysctls.insert(Sysctl::Ipv4Forward, 0);
            },
            "setting net/ipv4/ip_forward was changed",
        ),
        (|t| t.addresses.retain(|(name, ip, _)| name.as_str() == "eth0" || ip.is_ipv6()), "address "),
        (|t| t.delete_nexthop(NexthopId(fabric_core::state::NEXTHOP_ID_BASE)), "; with it 1 route"),
        (
            |t| t.delete_link(&dev("fabric.1")),
            "link fabric.1 was deleted by another program, restored; with it 1 address",
        ),
        (|t| t.filter.clear(), "of the packet filter was deleted by another program, restored"),
    ];
    for (damage, words) in damages {
        // Events about one table keep their distance.
        sleep(Duration::from_secs(11)).await;
        let before = told(&daemon.view.borrow()).len();
        host.kernel.edit(damage);
        daemon.until(words, |view| view.repairs.len() == before + 1 || view.repairs.len() == before + 2).await;
        sleep(Duration::from_secs(1)).await;
        let told = told(&daemon.view.borrow());
        assert!(told.last().is_some_and(|last| last.contains(words)), "{words}: {told:?}");
        assert_eq!(told.len(), before + 1, "{told:?}");
    }
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn device_conflict_shows_every_peer_as_pending_with_the_conflict() {
    for (config, peer, name) in [(V4, V4_PEER, "fabric.1"), (DUAL, DUAL_PEER, "fabric6.1")] {
        let host = Host::new(config, &[peer]);
        let mut daemon = host.start();
        daemon.ready().await;
        host.kernel.edit(|tables| {
            tables.delete_link(&dev(name));
            tables.add_link(dev(name), "bridge", 1500);
        });
        let reason = daemon.refusing("exists and is not ours (bridge)").await;
        let view = daemon.view.borrow().clone();
        let troubles: Vec<String> = view.troubles.values().map(ToString::to_string).collect();
        assert_eq!(troubles, [reason], "{name}");
        // When it is gone the peer is programmed.
        host.kernel.edit(|tables| tables.delete_link(&dev(name)));
        daemon.ready().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_have_a_device_claims_nothing_and_writes_nothing_until_it_can() {
    // flannel's record of this node, and its device.
    let own = ("subnets/10.244.9.0-24", V4_PEER.1.replace("192.0.2.2", "192.0.2.1").replace("00:02:02", "00:02:01"));
    let host = Host::new(V4, &[V4_PEER, (own.0, &own.1)]);
    let vxlan = VxlanLink {
        vni: 1.try_into().expect("valid"),
        port: 8472,
        gbp: false,
        mac: "02:42:c0:00:02:01".parse().expect("valid"),
        local: "192.0.2.1".parse().expect("ip"),
        mtu: 1450,
        learning: false,
        up: true,
    };
    host.kernel.edit(|tables| tables.add_vxlan(dev("flannel.1"), vxlan).expect("added"));
    let before = host.kernel.tables();
    let mut daemon = host.start();
    let reason = daemon.refusing("the interface flannel.1 already uses VNI 1 on UDP port 8472").await;
    assert!(reason.contains("ip link del flannel.1"), "{reason}");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(host.cluster.get(own.0).as_deref(), Some(own.1.as_bytes()), "the record is as flannel wrote it");
    assert_eq!((host.kernel.tables(), host.kernel.writes()), (before, vec![]));

    host.kernel.edit(|tables| tables.delete_link(&dev("flannel.1")));
    let view = daemon.ready().await;
    let held = view.holding.own.clone().expect("held");
    assert_eq!(format!("subnets/{}", held.key.encode()), own.0);
}

#[tokio::test(start_paused = true)]
async fn flannels_direct_route_to_the_peer_itself_gives_way_and_no_other() {
    for (config, direct) in [(V4.to_owned(), false), (V4.replace("}}", r#","DirectRouting":true}}"#), true)] {
        for (gateway, protocol, yields) in
            [("192.0.2.2", BOOT, true), ("192.0.2.9", BOOT, false), ("192.0.2.2", STATIC, false)]
        {
            let host = Host::new(&config, &[V4_PEER]);
            let (dst, gateway) = ("10.244.2.0/24".parse::<Subnet>().expect("valid"), gateway.parse().expect("ip"));
            let theirs = (protocol, Via::Direct(Nexthop { gateway, dev: dev("eth0") }));
            host.kernel.edit(|tables| drop(tables.routes.insert(dst, theirs.clone())));
            let mut daemon = host.start();
            if yields {
                daemon.ready().await;
                let (protocol, via) = host.kernel.tables().routes[&dst].clone();
                assert_eq!((protocol, matches!(via, Via::Direct(_))), (250, direct));
            } else {
                let view = daemon.until("in conflict", |view| !view.troubles.is_empty()).await;
                let trouble = view.troubles.values().next().expect("one").to_string();
                assert!(trouble.contains("a route that is not ours leads to 10.244.2.0/24"), "{trouble}");
                assert_eq!(host.kernel.tables().routes[&dst], theirs);
            }
            stays_silent(&host.kernel).await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn connections_to_the_store_are_given_up_once_when_the_underlay_address_goes() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let address =
        |text: &str| (dev("eth0"), text.parse::<IpAddr>().expect("ip"), "192.0.2.0/24".parse().expect("valid"));
    host.kernel.edit(|tables| tables.addresses.extend([address("192.0.2.7")]));
    sleep(Duration::from_secs(60)).await;
    assert_eq!(daemon.store.given_up(), 0, "another address that comes changes nothing");
    host.kernel.edit(|tables| tables.addresses.retain(|one| *one != address("192.0.2.1")));
    daemon.until("moved", |view| view.vteps.iter().any(|vtep| vtep.public_ip.to_string() == "192.0.2.7")).await;
    daemon.ready().await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(daemon.store.given_up(), 1);
}

#[tokio::test(start_paused = true)]
async fn flannel_in_a_network_without_ipv4_is_warned_of() {
    let config =
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;
    let value = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:42:c0:00:06:02"}}"#;
    for (config, peer, warns) in
        [(config, ("subnets/0.0.0.0-0&fd00:10:244:2::-64", value), true), (DUAL, DUAL_PEER, false)]
    {
        let host = Host::new(config, &[peer]);
        let view = host.start().ready().await;
        let told = view.warnings.iter().any(|warning| warning.contains("leased by a flannel node"));
        assert_eq!(told, warns, "{:?}", view.warnings);
    }
}

/// Nothing was written that needs what failed.
fn no_step_stands_on_a_failed_one(writes: &[Write], failed: &Key) {
    for write in writes {
        assert!(!write.op.needs().contains(failed), "{} was tried although {failed:?} had failed", write.op);
    }
}

fn is_filter(op: &Op) -> bool {
    matches!(op, Op::Filter(_))
}

/// The entries of the family that the victim is not of: they must not suffer. Without its filter no device comes up.
fn bystanders(tables: &Tables, victim: &Op) -> Vec<(Subnet, Via)> {
    if is_filter(victim) {
        return vec![];
    }
    let v6 = victim.to_string().contains("fabric6.")
        || victim.to_string().contains("fd00:")
        || matches!(victim, Op::Routing(routing::Op::Sysctl(Sysctl::Ipv6Forward, _)));
    let routes = tables.routes.iter().map(|(dst, (_, via))| (*dst, via.clone()));
    routes.filter(|(dst, _)| dst.base().is_ipv6() != v6).collect()
}

#[tokio::test(start_paused = true)]
async fn whatever_is_taken_away_in_silence_comes_back() {
    type Damage = fn(&mut Tables);
    let damages: [(&str, Damage); 7] = [
        ("device deleted", |tables| tables.delete_link(&dev("fabric.1"))),
        ("device set down", |tables| tables.set_down(&dev("fabric6.1"))),
        ("nexthop deleted", |tables| tables.delete_nexthop(NexthopId(fabric_core::state::NEXTHOP_ID_BASE))),
        ("routes flushed", |tables| tables.routes.clear()),
        ("neighbours flushed", |tables| tables.neighbours.clear()),
        ("FDB flushed", |tables| tables.fdb.clear()),
        ("settings reset", |tables| {
            // IPv4's reverse path filter of the device for IPv6 is nobody's.
            let set = tables.sysctls.iter_mut().filter(|(sysctl, _)| **sysctl != Sysctl::RpFilter(dev("fabric6.1")));
            set.for_each(|(_, value)| *value = 9);
        }),
    ];
    let host = Host::new(DUAL, &[DUAL_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let done = host.kernel.tables().observed().ours;
    for (what, damage) in damages {
        for announced in [true, false] {
            if !announced {
                host.kernel.lose_notifications();
            }
            host.kernel.edit(damage);
            // By event at once; unannounced at the next audit.
            sleep(Duration::from_secs(if announced { 1 } else { 11 })).await;
            host.kernel.overrun();
            let now = host.kernel.tables().observed().ours;
            assert_eq!(now, done, "{what}, announced: {announced}");
        }
    }
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn restart_with_nothing_changed_writes_nothing() {
    let host = Host::new(DUAL, &[DUAL_PEER]);
    host.start().ready().await;
    drop(host.kernel.writes());
    host.start().ready().await;
    stays_silent(&host.kernel).await;
    assert!(host.kernel.writes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_restart_calls_for_no_attention_while_the_store_is_first_read() {
    let host = Host::new(V4, &[V4_PEER]);
    let network = NetworkConfig::decode(V4.as_bytes()).expect("valid");
    let before = State { network: Some(network), ..State::default() };
    let mut daemon = host.start_with(host.cluster.unanswered_node(), before);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(daemon.view.borrow().warnings, Vec::<String>::new());
    daemon.store.set_reachable(true);
    daemon.ready().await;
}

#[tokio::test(start_paused = true)]
async fn peers_that_left_while_the_daemon_was_down_are_swept() {
    let host = Host::new(V4, &[V4_PEER]);
    host.start().ready().await;
    host.cluster.delete(V4_PEER.0);
    host.start().ready().await;
    let tables = host.kernel.tables();
    assert!(
        tables.routes.is_empty() && tables.nexthops.is_empty() && tables.fdb.is_empty() && tables.neighbours.is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_while_the_store_cannot_be_reached() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let done = host.kernel.tables();
    daemon.store.set_reachable(false);
    host.cluster.delete(V4_PEER.0);
    stays_silent(&host.kernel).await;
    assert_eq!(host.kernel.tables(), done);
    // Nor by a daemon that starts during the outage: it knows of no lease at all.
    drop(daemon);
    let blind = host.start();
    blind.store.set_reachable(false);
    stays_silent(&host.kernel).await;
    assert_eq!(host.kernel.tables(), done);
    // The word of the daemon before it stands: pods go on being added.
    assert_eq!(host.files().read().expect("node.json").readiness, Readiness::Ready);
}

#[tokio::test(start_paused = true)]
async fn what_is_foreign_is_never_touched() {
    let host = Host::new(V4, &[V4_PEER]);
    let foreign_route = |dst: &str| {
        (
            dst.parse::<Subnet>().expect(dst),
            (STATIC, Via::Direct(Nexthop { gateway: "192.0.2.9".parse().expect("ip"), dev: dev("eth0") })),
        )
    };
    host.kernel.edit(|tables| {
        tables.routes.extend([foreign_route("10.244.2.0/24"), foreign_route("198.51.100.0/24")]);
        tables.nexthops.insert(
            NexthopId(fabric_core::state::NEXTHOP_ID_BASE),
            (STATIC, Nexthop { gateway: "192.0.2.9".parse().expect("ip"), dev: dev("eth0") }),
        );
    });
    let before = host.kernel.tables();
    let mut daemon = host.start();
    let view = daemon.until("in conflict", |view| !view.troubles.is_empty()).await;
    let trouble = view.troubles.values().next().expect("one").to_string();
    assert!(trouble.contains("a route that is not ours leads to 10.244.2.0/24"), "{trouble}");
    assert_eq!(host.kernel.tables().routes, before.routes);
    assert_eq!(host.kernel.tables().nexthops, before.nexthops);
    // When it is gone, ours takes its place, under an id of its own.
    host.kernel.edit(|tables| drop(tables.routes.remove(&"10.244.2.0/24".parse().expect("valid"))));
    daemon.ready().await;
    assert_eq!(host.kernel.tables().nexthops.len(), 2);
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn a_change_of_mind_of_the_store_reaches_the_kernel() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let reborn = V4_PEER.1.replace("02:42:c0:00:02:02", "02:42:c0:00:02:99");
    host.cluster.put(V4_PEER.0, reborn.as_bytes());
    sleep(Duration::from_secs(1)).await;
    let macs: Vec<String> = host.kernel.tables().fdb.keys().map(|(_, mac)| mac.to_string()).collect();
    assert_eq!(macs, ["02:42:c0:00:02:99"]);
    let changes = host.kernel.writes();
    let last = changes.last().expect("written");
    assert!(matches!(last.op, Op::Routing(routing::Op::Fdb(_, _, Change::Delete(_)))), "{last}");
}

#[tokio::test(start_paused = true)]
async fn every_obstacle_is_said_with_the_way_out() {
    let config = |json: &str| Host::new(json, &[]);
    let mut host = config("{}");
    host.cluster.delete("config");
    assert!(host.start().refusing("there is no network config").await.contains("make one"));

    let reason = config(r#"{"Network":"10.244.0.0/16"}"#).start().refusing("there is no Backend").await;
    assert!(reason.contains(r#"add "Backend": {"Type": "vxlan"}"#), "{reason}");

    let reason = config(&V4.replace("10.244.0.0", "192.0.0.0")).start().refusing("overlaps").await;
    assert!(reason.contains("192.0.0.0/16 overlaps 192.0.2.0/24"), "{reason}");

    host = config(V4);
    host.iface = "eth7";
    let reason = host.start().refusing("no interface fits").await;
    assert!(reason.contains("eth0 (192.0.2.1 2001:db8::1)"), "{reason}");

    host = config(V4);
    host.kernel.edit(|tables| tables.add_link(dev("fabric.1"), "bridge", 1500));
    let reason = host.start().refusing("exists and is not ours").await;
    assert!(reason.contains("(bridge)") && reason.contains("ip link del fabric.1"), "{reason}");

    host = config(V4);
    host.kernel.fail(libc::EPERM, |_| true);
    host.start().refusing("ip link add fabric.1").await;

    let tiny = r#"{"Network":"10.244.0.0/28","SubnetLen":30,"SubnetMax":"10.244.0.4","Backend":{"Type":"vxlan"}}"#;
    let full = V4_PEER.1.replace("192.0.2.2", "192.0.2.77");
    host = Host::new(tiny, &[("subnets/10.244.0.4-30", &full)]);
    host.start().refusing("all 1 IPv4 subnets of 10.244.0.0/28 are leased or reserved").await;

    let twin = V4_PEER
        .1
        .replace("192.0.2.2", "192.0.2.1")
        .replace("}}", r#"},"Fabric":{"v":1,"node":"node-9","boot":"b","netns":1,"epoch":1}}"#);
    host = Host::new(V4, &[(V4_PEER.0, &twin)]);
    let reason = host.start().refusing("the public address 192.0.2.1").await;
    assert!(reason.contains("node-1") && reason.contains("node-9") && reason.contains("--iface"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_a_quarantine_until_the_same_subnet_is_held_again() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    let own = daemon.ready().await.holding.own.clone().expect("held");
    let (key, before) = (format!("subnets/{}", own.key.encode()), host.kernel.tables());

    // Somebody else writes over it: running pods go on, no address is handed out.
    host.cluster.put(&key, V4_PEER.1.replace("192.0.2.2", "192.0.2.8").as_bytes());
    daemon.refusing("was taken over by 192.0.2.8").await;
    let file = host.files().read().expect("node.json");
    assert!(matches!(file.readiness, Readiness::NotReady { code: NotReady::Quarantine, .. }));
    assert_eq!(host.kernel.tables(), before);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_lease_is_taken_again_at_once() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    let own = daemon.ready().await.holding.own.clone().expect("held");
    host.cluster.delete(&format!("subnets/{}", own.key.encode()));
    daemon
        .until("in quarantine or past it", |view| {
            view.holding.own.as_ref().is_some_and(|now| now.epoch != own.epoch || now != &own)
                || host.cluster.get(&format!("subnets/{}", own.key.encode())).is_some()
        })
        .await;
    let again = daemon.ready().await.holding.own.clone().expect("held");
    assert_eq!((again.key, again.endpoints), (own.key, own.endpoints));
}
