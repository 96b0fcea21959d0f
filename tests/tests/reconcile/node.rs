//! A node's daemon without netlink, etcd and API, and what it stands on.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::Readiness;
use fabric_core::model::{IfName, PerFamily, Subnet};
use fabric_core::plan::filter::FilterOptions;
use fabric_core::record::Instance;
use fabric_tests::fake_kernel::{FakeKernel, Tables};
use fabric_tests::keepers::{no_hosts, pods_in};
use fabric_tests::memory_store::{MemoryCluster, MemoryStore};
use fabricd::files::Files;
use fabricd::files::state_dir::State;
use fabricd::host::underlay::Selector;
use fabricd::lease::{Keeper, LeaseOptions};
use fabricd::reconcile::{Node, Reconciler};
use fabricd::status::fast_path::Mode;
use fabricd::status::view::View;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

pub const V4: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
pub const DUAL: &str =
    r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;
pub const V4_PEER: (&str, &str) = (
    "subnets/10.244.2.0-24",
    r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}}"#,
);
pub const DUAL_PEER: (&str, &str) = (
    "subnets/10.244.2.0-24&fd00:10:244:2::-64",
    r#"{"PublicIP":"192.0.2.2","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:42:c0:00:06:02"}}"#,
);

/// A node's daemon, all of it but netlink, etcd and the API.
pub struct Daemon {
    pub store: Arc<MemoryStore>,
    pub view: watch::Receiver<Arc<View>>,
    _tasks: JoinSet<()>,
}

/// What outlives a daemon: the store, the kernel, the files.
pub struct Host {
    pub cluster: MemoryCluster,
    pub kernel: FakeKernel,
    pub dir: tempfile::TempDir,
    pub iface: &'static str,
    pub filter: FilterOptions,
}

impl Host {
    pub fn new(config: &str, peers: &[(&str, &str)]) -> Self {
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

    pub fn files(&self) -> Files {
        Files::new(self.dir.path(), &self.dir.path().join("subnet.env"))
    }

    pub fn start(&self) -> Daemon {
        self.start_with(self.cluster.node(), State::default())
    }

    /// With what the daemon before it has left on disk.
    pub fn start_with(&self, store: MemoryStore, before: State) -> Daemon {
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
    pub async fn until(&mut self, what: &str, reached: impl FnMut(&Arc<View>) -> bool) -> Arc<View> {
        if let Ok(view) = timeout(Duration::from_secs(600), self.view.wait_for(reached)).await {
            return view.expect("the loop lives").clone();
        }
        panic!("not {what} after ten minutes: {:?}", self.view.borrow())
    }

    pub async fn ready(&mut self) -> Arc<View> {
        self.until("ready", |view| view.readiness == Readiness::Ready && view.troubles.is_empty()).await
    }

    pub async fn refusing(&mut self, words: &str) -> String {
        let says =
            |view: &Arc<View>| matches!(&view.readiness, Readiness::NotReady { reason, .. } if reason.contains(words));
        match &self.until(words, says).await.readiness {
            Readiness::NotReady { reason, .. } => reason.clone(),
            Readiness::Ready => unreachable!("just matched"),
        }
    }
}

/// Half a minute, audits included, in which nothing may be written.
pub async fn stays_silent(kernel: &FakeKernel) {
    drop(kernel.writes());
    sleep(Duration::from_secs(30)).await;
    let writes: Vec<String> = kernel.writes().iter().map(ToString::to_string).collect();
    assert_eq!(writes, Vec::<String>::new());
}

pub fn dev(name: &str) -> IfName {
    name.parse().expect(name)
}
