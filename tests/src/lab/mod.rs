//! The Lab: a cluster on one machine, in which nothing is faked.
//!
//! Nodes are sets of namespaces on an underlay bridge, each with its own fabricd and its own files; etcd
//! is etcd; pods are network namespaces, attached by real CNI calls. What passes between them are packets.
//!
//! ```text
//!        node-1                     node-2                         underlay
//!   pod a   pod b              pod a   pod b
//!     │       │                  │       │                 etcd-1  (etcd-2  etcd-3)
//!     └─cni0──┘                  └─cni0──┘                    │
//!        │                          │                         │
//!    fabric.1  fabricd          fabric.1  fabricd             │
//!        └─eth0─┘                   └─eth0─┘                  │
//!            └──────────────────────────┴──────── br0 ────────┘
//! ```
//!
//! | module | what it is |
//! |---|---|
//! | [`machine`], [`init`], [`spaces`], [`process`], [`exec`] | namespaces with a first process, and commands in them |
//! | [`builder`] | what a lab is to be, and its start |
//! | [`underlay`], [`addresses`], [`etcd`] | what all nodes share |
//! | [`node`], [`pod`], [`cni`], [`containerd`], `plain` | nodes, and the kinds of pods on them |
//! | [`lease`] | what a node says about its lease, and etcd about its record |
//! | [`crowd`] | peers that exist in etcd only, by the thousand |
//! | [`flannel`] | a node that is flannel's |
//! | [`attack`] | what must not get through |
//! | [`stream`], [`connection`], [`matrix`], [`outside`], [`capture`], [`packet`] | traffic, counted and looked at |
//! | [`page`] | the status page of a node, for a browser of this machine |
//! | [`witness`] | what the kernel says about its tables |
//!
//! A test reads as a sentence:
//!
//! ```no_run
//! # use fabric_tests::lab::{Lab, Stream};
//! # fn main() -> anyhow::Result<()> {
//! let lab = Lab::builder().nodes(2).start()?;
//! let a = lab.node("node-1")?.add_pod("a")?;
//! let b = lab.node("node-2")?.add_pod("b")?;
//! let stream = Stream::start(&a, &b)?;
//! lab.node("node-1")?.kill_fabricd()?;
//! lab.node("node-1")?.start_fabricd()?;
//! lab.node("node-1")?.wait_ready()?;
//! assert_eq!(stream.stop()?.lost, 0);
//! # Ok(())
//! # }
//! ```
//!
//! All processes of a test's lab end with the test, however that ends. Logs stay in `target/lab/NAME`,
//! where NAME is the test's, until its next run.

pub mod addresses;
mod api_certificates;
pub mod ask;
pub mod attack;
pub mod binaries;
pub mod builder;
pub mod capture;
mod cgroup;
pub mod cni;
pub mod connection;
pub mod containerd;
pub mod cri;
pub mod crowd;
pub mod etcd;
pub mod exec;
pub mod flannel;
pub mod http;
pub mod init;
pub mod lease;
pub mod machine;
pub mod matrix;
pub mod node;
pub mod outside;
pub mod packet;
pub mod page;
mod plain;
pub mod pod;
pub mod podman;
pub mod preflight;
pub mod process;
pub mod spaces;
pub mod stream;
pub mod tcx;
pub mod tour;
pub mod underlay;
pub mod vteps;
mod wait;
pub mod witness;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

pub use addresses::Families;
pub use ask::{Answer, By, Server, ask};
pub use attack::Forged;
pub use builder::{Builder, Wiring};
pub use capture::Capture;
pub use connection::Connection;
pub use crowd::{Crowd, Peer};
pub use etcd::Etcd;
pub use flannel::Flannel;
pub use machine::{Lifetime, Machine};
pub use matrix::Matrix;
pub use node::Node;
pub use outside::Outside;
pub use pod::Pod;
pub use stream::Stream;
pub use underlay::Underlay;
pub use vteps::Vteps;
pub use wait::wait_until;
pub use witness::Witness;

/// Names the mode of the fast path that daemons of labs have unless a test says another.
const FAST_PATH: &str = "FABRIC_LAB_FAST_PATH";
/// Set to anything, daemons of labs find no tcx in their kernel, as before 6.6.
const WITHOUT_TCX: &str = "FABRIC_LAB_WITHOUT_TCX";

/// What every node of a lab has to know.
#[derive(Debug)]
pub struct Plan {
    families: Families,
    wiring: Wiring,
    /// Whether pods reach the outside by their node's address: `--ip-masq`.
    masquerade: bool,
    /// Whether daemons find no tcx in their kernel.
    without_tcx: bool,
    etcd_endpoints: String,
    /// Arguments of `fabricctl network init`.
    network: Vec<String>,
}

/// A cluster on this machine.
#[derive(Debug)]
pub struct Lab {
    name: String,
    dir: PathBuf,
    lifetime: Lifetime,
    plan: Arc<Plan>,
    underlay: Arc<Underlay>,
    etcd: Etcd,
    nodes: BTreeMap<u16, Arc<Node>>,
}

impl Lab {
    /// Describes a lab to be started: one node, IPv4, one etcd member unless told otherwise.
    #[must_use]
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// A lab that another process has started.
    ///
    /// # Errors
    /// There is none of this name.
    pub fn open(name: &str) -> Result<Self> {
        ensure!(dir_of(name)?.exists(), "there is no lab {name}; `lab up --name {name}` makes it");
        // Whatever it was meant to be, it doesn't end with this process.
        Self::of(name, &Builder::read(name)?.stays())
    }

    /// The names of all labs that are up to stay; those of running tests are the tests' own business.
    ///
    /// # Errors
    /// The folder of all labs can't be read.
    pub fn all() -> Result<Vec<String>> {
        let mut names = vec![];
        if binaries::labs()?.exists() {
            for entry in fs::read_dir(binaries::labs()?)? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                let stays = Builder::read(&name).is_ok_and(|wanted| wanted.lifetime == Lifetime::Stays);
                if stays && Self::open(&name)?.is_on() {
                    names.push(name);
                }
            }
        }
        names.sort();
        Ok(names)
    }

    fn of(name: &str, wanted: &Builder) -> Result<Self> {
        let (dir, lifetime) = (dir_of(name)?, wanted.lifetime);
        let machine = Machine::new("underlay", &dir.join("underlay"), lifetime, vec![]);
        let underlay = Arc::new(Underlay::new(machine, wanted.families));
        let etcd = Etcd::new(Arc::clone(&underlay), wanted.families, wanted.etcd_members);
        let (families, wiring, masquerade) = (wanted.families, wanted.wiring, wanted.masquerade);
        let network = wanted.network_args();
        let without_tcx = wanted.without_tcx || std::env::var_os(WITHOUT_TCX).is_some();
        let plan = Plan { families, wiring, masquerade, without_tcx, etcd_endpoints: etcd.endpoints(), network };
        let (name, plan, nodes) = (name.to_owned(), Arc::new(plan), BTreeMap::new());
        let mut lab = Self { name, dir, lifetime, plan, underlay, etcd, nodes };
        for entry in fs::read_dir(&lab.dir)? {
            if let Some(index) = entry?.file_name().to_str().and_then(|name| name.strip_prefix("node-")) {
                lab.know_node(index.parse()?);
            }
        }
        Ok(lab)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The folder with all its state and logs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its address families.
    #[must_use]
    pub fn families(&self) -> Families {
        self.plan.families
    }

    /// Whether its nodes hide pods behind their own address.
    pub(crate) fn masquerades(&self) -> bool {
        self.plan.masquerade
    }

    /// The bridge that connects all nodes, for those who outlive a reference.
    pub(crate) fn shared_underlay(&self) -> Arc<Underlay> {
        Arc::clone(&self.underlay)
    }

    /// The bridge that connects all nodes.
    #[must_use]
    pub fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    /// Its etcd.
    #[must_use]
    pub fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// True while it is on.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.underlay.machine.is_on() || self.nodes().any(|node| node.is_on())
    }

    /// All nodes, on or off, in the order of their numbers.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// The node of this name.
    ///
    /// # Errors
    /// There is none: the error lists those that exist.
    pub fn node(&self, name: &str) -> Result<&Arc<Node>> {
        let names: Vec<&str> = self.nodes().map(|node| node.name.as_str()).collect();
        self.nodes()
            .find(|node| node.name == name)
            .with_context(|| format!("no node {name}; there are: {}", names.join(" ")))
    }

    /// A machine by name: a node, or the underlay.
    ///
    /// # Errors
    /// There is none.
    pub fn machine(&self, name: &str) -> Result<&Machine> {
        if name == self.underlay.machine.name { Ok(&self.underlay.machine) } else { Ok(self.node(name)?) }
    }

    /// All pods of all nodes that are on.
    ///
    /// # Errors
    /// The lab's folder can't be read.
    pub fn pods(&self) -> Result<Vec<Pod>> {
        let pods = self.nodes().filter(|node| node.is_on()).map(Node::pods).collect::<Result<Vec<_>>>()?;
        Ok(pods.concat())
    }

    /// Writes the network configuration into etcd by `fabricctl network init`.
    ///
    /// # Errors
    /// fabricctl refused it.
    pub fn init_network(&self) -> Result<()> {
        let mut argv = vec!["fabricctl", "network", "init", "--etcd-endpoints", &self.plan.etcd_endpoints];
        argv.extend(self.plan.network.iter().map(String::as_str));
        self.underlay.machine.run(&argv)?;
        Ok(())
    }

    /// Adds a node with a fabricd that is ready.
    ///
    /// # Errors
    /// It doesn't boot, or doesn't get ready: the error shows the log.
    pub fn add_node(&mut self) -> Result<Arc<Node>> {
        let node = self.boot_node()?;
        if self.plan.wiring == Wiring::Fabric {
            node.start_fabricd()?;
            node.wait_ready()?;
        }
        Ok(node)
    }

    /// Adds a node without starting its fabricd.
    ///
    /// # Errors
    /// It doesn't boot.
    pub fn boot_node(&mut self) -> Result<Arc<Node>> {
        let index = self.nodes.keys().max().map_or(1, |last| last + 1);
        let node = self.know_node(index);
        self.boot_again(&node)?;
        Ok(node)
    }

    /// Switches a node on that was powered off, without starting its fabricd.
    ///
    /// # Errors
    /// It is on, or doesn't boot.
    pub fn boot_again(&self, node: &Node) -> Result<()> {
        node.boot()?;
        if self.plan.wiring == Wiring::Plain {
            for other in self.nodes().filter(|other| other.index != node.index && other.is_on()) {
                plain::add_route(other, node, self.plan.families)?;
                plain::add_route(node, other, self.plan.families)?;
            }
        }
        Ok(())
    }

    /// Powers a node off for good and forgets it, its files included.
    ///
    /// # Errors
    /// There is no such node, or it can't be killed.
    pub fn remove_node(&mut self, name: &str) -> Result<()> {
        let node = Arc::clone(self.node(name)?);
        node.power_off()?;
        self.nodes.remove(&node.index);
        Ok(fs::remove_dir_all(node.dir())?)
    }

    /// Ends every process of the lab. Its folder stays, with the logs but without the data.
    ///
    /// # Errors
    /// A machine can't be killed.
    pub fn stop(&self) -> Result<()> {
        // All plugs first, then the waiting: the kernel frees them side by side.
        let machines = || self.nodes().map(|node| &***node).chain([&self.underlay.machine]);
        thread::scope(|scope| {
            let ends: Vec<_> = machines().map(|machine| scope.spawn(|| machine.power_off())).collect();
            ends.into_iter().try_for_each(|end| end.join().unwrap_or_else(|_| bail!("powering off panicked")))
        })?;
        for machine in machines() {
            for data in ["var-lib", "etc-cni", "pods"].map(|data| machine.dir().join(data)) {
                if data.exists() {
                    fs::remove_dir_all(data)?;
                }
            }
        }
        Ok(())
    }

    /// Ends every process of the lab and removes its folder.
    ///
    /// # Errors
    /// A machine can't be killed, or a file can't be removed.
    pub fn destroy(self) -> Result<()> {
        self.stop()?;
        Ok(fs::remove_dir_all(&self.dir)?)
    }

    fn know_node(&mut self, index: u16) -> Arc<Node> {
        let name = format!("node-{index}");
        let endpoints = &*self.plan.etcd_endpoints;
        let env = [("FABRICD_ETCD_ENDPOINTS", endpoints), ("ETCDCTL_ENDPOINTS", endpoints), ("ETCDCTL_API", "3")];
        let masquerade = ("FABRICD_IP_MASQ", self.plan.masquerade.to_string());
        let env = env.map(|(name, value)| (name, value.to_owned())).into_iter().chain([masquerade]);
        let fast_path = std::env::var(FAST_PATH).ok().map(|mode| ("FABRICD_FAST_PATH", mode));
        let env = env.chain(api_certificates::environment()).chain(fast_path);
        let env = env.map(|(name, value)| (name.to_owned(), value)).collect();
        let machine = Machine::new(&name, &self.dir.join(&name), self.lifetime, env);
        let node = Arc::new(Node::new(machine, index, Arc::clone(&self.plan), Arc::clone(&self.underlay)));
        self.nodes.insert(index, Arc::clone(&node));
        node
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.lifetime == Lifetime::OfTheTest && self.is_on() {
            self.stop().ok();
            if thread::panicking() {
                eprintln!("the logs of this lab are in {}", self.dir.display());
            }
        }
    }
}

fn dir_of(name: &str) -> Result<PathBuf> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    ensure!(!name.is_empty() && !name.starts_with('.') && name.chars().all(fits), "{name:?} is no name for a lab");
    Ok(binaries::labs()?.join(name))
}
