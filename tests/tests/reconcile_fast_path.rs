//! The reconcile loop and the fast path, on a kernel in memory: it is built once the kernel's path is there, whatever fails
//! costs speed alone, and it falls silent.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::{Op, fast_path};
use fabric_core::firewall::{Base, Chain, Firewall, Hook, Table, TableKind};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::{PerFamily, Subnet};
use fabric_core::plan::bypass::{Qdisc, Shaping, Side};
use fabric_core::plan::fast_path::Port;
use fabric_core::plan::filter::{FilterOptions, Pod};
use fabric_core::record::Instance;
use fabric_core::state::fast_path::FastPath;
use fabric_tests::fake_kernel::{FakeKernel, Tables};
use fabric_tests::keepers::{no_hosts, pods_in};
use fabric_tests::memory_store::MemoryCluster;
use fabricd::files::Files;
use fabricd::files::state_dir::State;
use fabricd::host::attachments::AttachedPods;
use fabricd::host::underlay::Selector;
use fabricd::lease::{Keeper, LeaseOptions};
use fabricd::reconcile::{Node, Reconciler};
use fabricd::status::fast_path::Mode;
use fabricd::status::view::View;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn v<T: std::str::FromStr>(text: &str) -> T {
    text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
}

fn lease(n: u8, underlay: &str) -> (String, String) {
    let value = format!(
        r#"{{"PublicIP":"{underlay}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:{n:02x}"}}}}"#
    );
    (format!("subnets/10.244.{n}.0-24"), value)
}

const DUAL: &str =
    r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"2001:db8:1::/48","Backend":{"Type":"vxlan"}}"#;

/// The same of a peer with both families.
fn dual_lease(n: u8) -> (String, String) {
    let value = format!(
        r#"{{"PublicIP":"192.0.2.{n}","PublicIPv6":"2001:db8:ff::{n}","BackendType":"vxlan",
            "BackendData":{{"VNI":1,"VtepMAC":"02:42:c0:00:02:{n:02x}"}},
            "BackendV6Data":{{"VNI":1,"VtepMAC":"02:42:c0:00:06:{n:02x}"}}}}"#
    );
    (format!("subnets/10.244.{n}.0-24&2001:db8:1:{n}::-64"), value)
}

/// A host with two peers, whose own subnet is 10.244.1.0/24.
struct Host {
    cluster: MemoryCluster,
    kernel: FakeKernel,
    dir: tempfile::TempDir,
    pods: watch::Sender<Arc<AttachedPods>>,
    refused: Option<&'static str>,
}

struct Daemon {
    view: watch::Receiver<Arc<View>>,
    _tasks: JoinSet<()>,
}

impl Host {
    fn new() -> Self {
        Self::of(CONFIG, [2, 3].map(|n| lease(n, &format!("192.0.2.{n}"))))
    }

    /// One whose network has both families.
    fn dual() -> Self {
        Self::of(DUAL, [2, 3].map(dual_lease))
    }

    fn of(config: &str, leases: [(String, String); 2]) -> Self {
        let cluster = MemoryCluster::default();
        cluster.put("config", config.as_bytes());
        for (key, value) in leases {
            cluster.put(&key, value.as_bytes());
        }
        let addresses = [(v("192.0.2.1"), v("192.0.2.0/24")), (v("2001:db8:ff::1"), v("2001:db8:ff::/64"))];
        let kernel = FakeKernel::new(Tables::host(&addresses));
        Self {
            cluster,
            kernel,
            dir: tempfile::tempdir().expect("a folder"),
            pods: watch::channel(Arc::default()).0,
            refused: None,
        }
    }

    /// One where a daemon before has made a pod fast, and nothing may be so any more.
    async fn fast_before_policies() -> Self {
        let mut host = Self::new();
        let mut daemon = host.start(Mode::On);
        let own = daemon.own().await;
        host.add_pod("veth1", own, 5);
        daemon.fast(2, 1).await;
        host.refused = Some("NetworkPolicies are enforced here");
        host
    }

    fn start(&self, fast_path: Mode) -> Daemon {
        let store = Arc::new(self.cluster.node());
        let name: fabric_core::model::NodeName = v("node-1");
        let day = Duration::from_secs(86_400);
        let options = LeaseOptions {
            node: name.clone(),
            instance: Instance { boot: "boot".into(), netns: 7 },
            ttl: day,
            grace: day,
            pods: pods_in(&self.dir.path().join("networks")),
            since: 0,
            hosts: no_hosts(),
        };
        let keeper = Keeper::new(store.clone(), options, None);
        let selectors = vec![Selector::Iface("eth0".into())];
        let filter = FilterOptions::default();
        let node = Node { name, selectors, public_ips: PerFamily::default(), filter, fast_path };
        let files = Files::new(self.dir.path(), &self.dir.path().join("subnet.env"));
        let mut reconciler = Reconciler::new(node, store, self.kernel.clone(), files, State::default());
        reconciler.take_pods(self.pods.subscribe());
        if let Some(why) = self.refused {
            reconciler.refuse_fast_path(why);
        }
        let (view, wanted, holding) = (reconciler.view(), reconciler.wanted(), keeper.holding());
        let mut tasks = JoinSet::new();
        tasks.spawn(keeper.run(wanted));
        tasks.spawn(reconciler.run(holding));
        Daemon { view, _tasks: tasks }
    }

    /// The CNI plugin has attached a pod, with an address of this node's subnet.
    fn add_pod(&self, port: &str, own: Subnet, host: u8) {
        let mac = v(&format!("02:42:0a:f4:00:{host:02x}"));
        self.kernel.edit(|tables| {
            tables.add_link(v(port), "veth", 1450);
            let ifindex = tables.links[&v(port)].index;
            tables.ports.insert(v(port), Port { ifindex, mtu: 1450, bridge_mac: v("02:42:0a:f4:00:01") });
        });
        let IpAddr::V4(base) = own.base() else { panic!("IPv4") };
        let ip = IpAddr::from((base.to_bits() + u32::from(host)).to_be_bytes());
        self.pods.send_modify(|pods| {
            Arc::make_mut(pods).ports.insert(v(port), Pod { mac, ips: [ip].into() });
        });
    }

    /// It has this address too.
    fn add_address(&self, port: &str, ip: IpAddr) {
        self.pods.send_modify(|pods| {
            Arc::make_mut(pods).ports.get_mut(&v(port)).expect("there").ips.insert(ip);
        });
    }

    fn remove_pod(&self, port: &str) {
        self.pods.send_modify(|pods| drop(Arc::make_mut(pods).ports.remove(&v(port))));
    }

    fn fast_path(&self) -> FastPath {
        self.kernel.tables().fast_path
    }
}

impl Daemon {
    async fn until(&mut self, what: &str, reached: impl FnMut(&Arc<View>) -> bool) -> Arc<View> {
        if let Ok(view) = timeout(Duration::from_secs(600), self.view.wait_for(reached)).await {
            return view.expect("the loop lives").clone();
        }
        panic!("not {what} after ten minutes: {:?}", self.view.borrow())
    }

    /// Ready, with that many peers and pods on the fast path.
    async fn fast(&mut self, peers: usize, pods: usize) -> Arc<View> {
        let all = |view: &Arc<View>| {
            let fast = &view.fast_path;
            view.readiness == Readiness::Ready && (fast.on, fast.peers, fast.pods) == (true, peers, pods)
        };
        self.until(&format!("fast with {peers} peers and {pods} pods"), all).await
    }

    async fn own(&mut self) -> Subnet {
        let view = self.until("ready", |view| view.readiness == Readiness::Ready).await;
        *view.holding.own.as_ref().expect("held").key.subnets().v4.as_ref().expect("IPv4")
    }
}

async fn stays_silent(kernel: &FakeKernel) {
    sleep(Duration::from_secs(5)).await;
    drop(kernel.writes());
    sleep(Duration::from_secs(30)).await;
    let writes: Vec<String> = kernel.writes().iter().map(ToString::to_string).collect();
    assert_eq!(writes, Vec::<String>::new());
}

fn is_fast_path(op: &Op) -> bool {
    matches!(op, Op::FastPath(_))
}

#[tokio::test(start_paused = true)]
async fn pods_and_peers_become_fast_once_the_kernels_path_is_there_and_go_again() {
    let host = Host::new();
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    host.add_pod("veth2", own, 6);
    let view = daemon.fast(2, 2).await;
    assert_eq!(view.fast_path.reason, "");
    let there = host.fast_path();
    assert!(
        there.pods.values().all(|pod| pod.fast)
            && there.node.and_then(|node| node.ends.v4).is_some_and(|end| end.subnet == own)
    );
    let steps = host.kernel.writes();
    let first_fast = steps.iter().position(|write| is_fast_path(&write.op)).expect("there are some");
    let routes = steps.iter().position(|write| write.op.to_string().contains("ip route")).expect("there are some");
    assert!(routes < first_fast, "the kernel's path comes first");
    stays_silent(&host.kernel).await;

    host.remove_pod("veth1");
    daemon.fast(2, 1).await;
    let gone: Vec<String> = host.kernel.writes().iter().map(|write| write.op.to_string()).collect();
    assert!(gone[0].starts_with("- fast path: link") && gone.iter().all(|step| step.starts_with('-')), "{gone:?}");
    host.cluster.delete(&lease(3, "").0);
    daemon.fast(1, 1).await;
    assert_eq!(host.fast_path().peers.len(), 1);
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn pods_and_peers_of_two_families_are_fast_in_both() {
    let host = Host::dual();
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    let view = daemon.until("ready", |view| view.readiness == Readiness::Ready).await;
    let own6 = view.holding.own.as_ref().expect("held").key.subnets().v6.expect("IPv6");
    host.add_address("veth1", own6.gateway());
    let view = daemon.fast(2, 2).await;
    assert_eq!(view.fast_path.reason, "");
    let there = host.fast_path();
    let ends = there.node.expect("its own end").ends;
    assert_eq!(ends.map(|_, end| end.subnet), PerFamily { v4: Some(own), v6: Some(own6) });
    let devices = host.kernel.tables().links;
    let peer = |subnet: &str| there.peers[&there.index[&v(subnet)]];
    let (peer4, peer6) = (peer("10.244.2.0/24"), peer("2001:db8:1:2::/64"));
    assert_eq!(peer6.path.ifindex, devices[&v("fabric6.1")].index, "the device makes the checksum");
    assert_eq!(peer4.path.ifindex, devices[&v("eth0")].index);
    stays_silent(&host.kernel).await;

    // Another device has another index.
    host.kernel.edit(|tables| tables.delete_link(&v("fabric6.1")));
    sleep(Duration::from_secs(30)).await;
    let index = host.kernel.tables().links[&v("fabric6.1")].index;
    assert_ne!(index, peer6.path.ifindex);
    let there = host.fast_path();
    assert_eq!(there.peers[&there.index[&v("2001:db8:1:2::/64")]].path.ifindex, index);
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn switched_off_takes_away_what_the_daemon_before_has_left() {
    let host = Host::new();
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    let routes = host.kernel.tables().routes;
    drop(daemon);
    drop(host.kernel.writes());

    let mut daemon = host.start(Mode::Off);
    let view = daemon.until("off", |view| view.fast_path.reason.contains("--fast-path=off")).await;
    assert!(!view.fast_path.on && view.readiness == Readiness::Ready);
    assert_eq!((host.fast_path(), host.kernel.tables().routes), (FastPath::new(), routes));
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn what_programs_do_not_judge_keeps_all_packets_from_it_and_is_told() {
    let host = Host::fast_before_policies().await;
    let mut daemon = host.start(Mode::On);
    let view = daemon.until("refused", |view| view.fast_path.reason.contains("NetworkPolicies")).await;
    assert!(!view.fast_path.on && view.readiness == Readiness::Ready);
    assert!(view.warnings.iter().any(|warning| warning.contains("NetworkPolicies")), "{:?}", view.warnings);
    assert_eq!(host.fast_path(), FastPath::new());
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn node_is_not_ready_while_programs_that_judge_nothing_can_not_be_detached() {
    let mut host = Host::fast_before_policies().await;
    for mode in [Mode::On, Mode::Off] {
        host.kernel.fail(libc::EPERM, |op| matches!(op, Op::FastPath(fast_path::Op::Link(..))));
        let mut daemon = host.start(mode);
        let stays = |view: &Arc<View>| match &view.readiness {
            Readiness::NotReady { code: NotReady::Failed, reason } => reason.contains("still take the fast path"),
            _ => false,
        };
        let view = daemon.until("not ready, since links stay", stays).await;
        assert!(!view.warnings.iter().any(|warning| warning.contains("kernel's path")), "{:?}", view.warnings);
        assert!(!host.fast_path().links.is_empty());
        host.kernel.heal();
        daemon.until("ready", |view| view.readiness == Readiness::Ready).await;
        assert_eq!(host.fast_path(), FastPath::new());
        drop(daemon);
        let refused = host.refused.take();
        host.start(Mode::On).fast(2, 1).await;
        host.refused = refused;
    }
}

/// A chain of somebody else that drops whatever is forwarded.
fn closed() -> Firewall {
    let base = Some(Base { hook: Hook::Forward, priority: 0, drops: true });
    let chains = [("forward".to_owned(), Chain { base, rules: vec![] })].into();
    let table = Table { kind: TableKind::Inet, name: "other".to_owned(), chains, sets: BTreeMap::new() };
    Firewall { tables: vec![table], ..Firewall::default() }
}

#[tokio::test(start_paused = true)]
async fn auto_leaves_it_off_while_others_would_be_passed_by_and_is_on_again() {
    type Damage = fn(&mut Tables);
    let qdisc = |dev: &str| Shaping {
        qdiscs: [Qdisc { dev: v(dev), side: Side::Ingress, kind: "clsact".to_owned() }].into(),
        ..Shaping::default()
    };
    let damages: [(Damage, &str); 4] = [
        (|tables| tables.firewall = Arc::new(closed()), "inet other forward policy drop may drop packets between pods"),
        (
            |tables| Arc::make_mut(&mut tables.firewall).unread = ["bridge other forward".to_owned()].into(),
            "the chain bridge other forward",
        ),
        (|tables| tables.shaping.ipsec_policies = 2, "2 IPsec policies"),
        (|tables| tables.shaping.unread = Some("no answer".to_owned()), "no answer"),
    ];
    let host = Host::new();
    let mut daemon = host.start(Mode::Auto);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    for (damage, reason) in damages {
        host.kernel.edit(damage);
        let view = daemon.until(reason, |view| view.fast_path.reason.contains(reason)).await;
        assert!(!view.fast_path.on && view.fast_path.left_off && view.readiness == Readiness::Ready, "{view:?}");
        assert!(view.fast_path.reason.contains("--fast-path=on would"), "{}", view.fast_path.reason);
        assert!(!view.warnings.iter().any(|warning| warning.contains("fast")), "{:?}", view.warnings);
        assert_eq!((host.fast_path(), host.kernel.tables().routes.len()), (FastPath::new(), 2), "{reason}");
        host.kernel.edit(|tables| (tables.firewall, tables.shaping) = Default::default());
        sleep(Duration::from_secs(5)).await;
        assert_eq!(host.fast_path(), FastPath::new(), "it may come back at once");
        daemon.fast(2, 1).await;
    }
    // What is at interfaces that packets of pods are not led past is nobody's business.
    host.kernel.edit(|tables| tables.shaping = qdisc("eth1"));
    stays_silent(&host.kernel).await;
    host.kernel.edit(|tables| tables.shaping = qdisc("eth0"));
    daemon.until("off", |view| view.fast_path.reason.contains("eth0 has the ingress queueing discipline")).await;
}

#[tokio::test(start_paused = true)]
async fn on_passes_by_what_auto_would_not() {
    let host = Host::new();
    host.kernel.edit(|tables| tables.firewall = Arc::new(closed()));
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    drop(daemon);
    let view = host.start(Mode::Auto).until("left off", |view| view.fast_path.left_off).await;
    assert!(!view.fast_path.on, "{:?}", view.fast_path);
}

#[tokio::test(start_paused = true)]
async fn pod_whose_port_is_shaped_takes_the_kernels_path_alone() {
    for mode in [Mode::On, Mode::Auto] {
        let host = Host::new();
        let mut daemon = host.start(mode);
        let own = daemon.own().await;
        host.add_pod("veth1", own, 5);
        host.add_pod("veth2", own, 6);
        daemon.fast(2, 2).await;
        let tbf = Qdisc { dev: v("veth1"), side: Side::Egress, kind: "tbf".to_owned() };
        host.kernel.edit(|tables| tables.shaping.qdiscs = [tbf].into());
        let view = daemon.fast(2, 1).await;
        assert!(view.fast_path.reason.contains("1 pods take the kernel's path"), "{}", view.fast_path.reason);
        assert_eq!(host.fast_path().pods.values().filter(|pod| pod.fast).count(), 1);
        stays_silent(&host.kernel).await;
        host.kernel.edit(|tables| tables.shaping = Shaping::default());
        daemon.fast(2, 2).await;
    }
}

#[tokio::test(start_paused = true)]
async fn filters_of_tc_come_to_a_port_once_plugins_are_done_with_it() {
    let host = Host::new();
    host.kernel.edit(|tables| tables.without_tcx = true);
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    sleep(Duration::from_secs(5)).await;
    let is_at_the_pod = |host: &Host| {
        let ifindex = host.kernel.tables().links[&v("veth1")].index;
        host.fast_path().links.keys().any(|place| place.ifindex == ifindex)
    };
    assert!(!is_at_the_pod(&host), "bandwidth may be about to put its qdisc there");
    daemon.fast(2, 1).await;
    assert!(is_at_the_pod(&host));
    drop(host.kernel.writes());
    drop(daemon);
    // A daemon that knows no port yet leaves alone what is attached.
    host.start(Mode::On).fast(2, 1).await;
    let written: Vec<String> = host.kernel.writes().iter().map(ToString::to_string).collect();
    assert_eq!(written, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn restart_with_nothing_changed_writes_nothing() {
    let host = Host::new();
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    stays_silent(&host.kernel).await;
    drop(daemon);
    host.start(Mode::On).fast(2, 1).await;
    let written: Vec<String> = host.kernel.writes().iter().map(ToString::to_string).collect();
    assert_eq!(written, Vec::<String>::new());
}

#[tokio::test(start_paused = true)]
async fn every_step_may_fail_with_every_errno_and_costs_nothing_but_speed() {
    let errnos = [libc::EPERM, libc::EINVAL, libc::ENODEV, libc::EEXIST, libc::ENOMEM];
    let reference = Host::new();
    let mut daemon = reference.start(Mode::On);
    let own = daemon.own().await;
    reference.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    let done = reference.fast_path();
    let steps: BTreeMap<String, Op> = (reference.kernel.writes().into_iter())
        .filter(|write| is_fast_path(&write.op))
        .map(|write| (format!("{:?}", write.op.key()), write.op))
        .collect();
    assert!(steps.len() > 8, "{steps:?}");
    for (victim, errno) in steps.values().flat_map(|step| errnos.map(|errno| (step.key(), errno))) {
        let host = Host::new();
        host.kernel.fail(errno, move |op| op.key() == victim);
        let mut daemon = host.start(Mode::On);
        let own = daemon.own().await;
        host.add_pod("veth1", own, 5);
        let view = daemon.until("failing", |view| !view.fast_path.reason.is_empty()).await;
        assert_eq!((view.readiness.clone(), view.troubles.len()), (Readiness::Ready, 0), "{victim:?} with {errno}");
        assert!(!view.fast_path.on && !view.fast_path.reason.contains("os error"), "{:?}", view.fast_path);
        for write in host.kernel.writes() {
            assert!(!write.op.needs().contains(&victim), "{} was tried although {victim:?} had failed", write.op);
        }
        assert_eq!(host.kernel.tables().routes.len(), 2, "the kernel's path is whole");
        host.kernel.heal();
        daemon.fast(2, 1).await;
        assert_eq!(host.fast_path(), done, "after {victim:?} with {errno}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_somebody_takes_away_comes_back() {
    type Damage = fn(&mut FastPath);
    let damages: [(&str, Damage); 6] = [
        ("links", |there| there.links.clear()),
        ("peers", |there| there.peers.clear()),
        ("index", |there| there.index.clear()),
        ("pods", |there| there.pods.clear()),
        ("programs", |there| there.programs.clear()),
        ("all", |there| *there = FastPath::new()),
    ];
    let host = Host::new();
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    let done = host.fast_path();
    for (what, damage) in damages {
        host.kernel.edit(|tables| damage(&mut tables.fast_path));
        sleep(Duration::from_secs(11)).await;
        assert_eq!(host.fast_path(), done, "{what}");
    }
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn node_without_bpffs_is_ready_and_says_how_to_have_it() {
    let host = Host::new();
    host.kernel.edit(|tables| tables.fast_path_trouble = Some("there is no bpffs at /sys/fs/bpf; mount it".into()));
    let mut daemon = host.start(Mode::On);
    let view = daemon.until("ready", |view| view.readiness == Readiness::Ready).await;
    assert!(!view.fast_path.on && view.fast_path.reason.contains("no bpffs"), "{:?}", view.fast_path);
    stays_silent(&host.kernel).await;
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    host.kernel.edit(|tables| tables.fast_path_trouble = None);
    daemon.fast(2, 1).await;
}

#[tokio::test(start_paused = true)]
async fn peer_in_another_place_is_led_there_with_the_kernels_path() {
    let host = Host::new();
    let mut daemon = host.start(Mode::On);
    let own = daemon.own().await;
    host.add_pod("veth1", own, 5);
    daemon.fast(2, 1).await;
    let (key, value) = lease(3, "192.0.2.33");
    host.cluster.put(&key, value.as_bytes());
    sleep(Duration::from_secs(1)).await;
    let there = host.fast_path();
    let peer = there.peers[&there.index[&v("10.244.3.0/24")]];
    assert_eq!((peer.underlay, there.peers.len()), (v("192.0.2.33"), 2));
    // One that no interface leads to is the kernel's alone.
    let (key, value) = lease(3, "198.51.100.3");
    host.cluster.put(&key, value.as_bytes());
    let view = daemon.fast(1, 1).await;
    assert!(view.fast_path.reason.contains("1 peers take the kernel's path"), "{:?}", view.fast_path);
    // Its former address may send for a while.
    sleep(Duration::from_secs(60)).await;
    stays_silent(&host.kernel).await;
}
