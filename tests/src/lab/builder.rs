//! What a lab is to be, and its start.

use std::fs;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::addresses::{self, Families};
use super::machine::Lifetime;
use super::node::Node;
use super::{Lab, dir_of, preflight};

/// How the pods of a lab are connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wiring {
    /// By fabricd and fabric-cni.
    #[default]
    Fabric,
    /// By the bridge plugin and static routes, without fabricd.
    Plain,
}

/// What a lab is to be. A copy lies in its folder, as `lab.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Builder {
    name: Option<String>,
    nodes: u16,
    pub(super) families: Families,
    pub(super) etcd_members: u16,
    pub(super) wiring: Wiring,
    pub(super) masquerade: bool,
    pub(super) without_tcx: bool,
    network: Option<Vec<String>>,
    pub(super) lifetime: Lifetime,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            name: None,
            nodes: 1,
            families: Families::V4,
            etcd_members: 1,
            wiring: Wiring::Fabric,
            masquerade: false,
            without_tcx: false,
            network: None,
            lifetime: Lifetime::OfTheTest,
        }
    }
}

impl Builder {
    /// Its name: that of its folder. Otherwise the name of the running test.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// How many nodes it starts with, called `node-1` and so on.
    #[must_use]
    pub fn nodes(mut self, nodes: u16) -> Self {
        self.nodes = nodes;
        self
    }

    /// The address families, of the underlay and the pods alike; IPv4 otherwise.
    #[must_use]
    pub fn families(mut self, families: Families) -> Self {
        self.families = families;
        self
    }

    /// One or three etcd members; one otherwise.
    #[must_use]
    pub fn etcd_members(mut self, members: u16) -> Self {
        self.etcd_members = members;
        self
    }

    /// Pods by the plain bridge plugin and static routes, without fabricd.
    #[must_use]
    pub fn plain(mut self) -> Self {
        self.wiring = Wiring::Plain;
        self
    }

    /// Pods reach the outside by their node's address, as the manifests and the package have it; otherwise the daemon's own
    /// default holds, which is off.
    #[must_use]
    pub fn masquerade(mut self, on: bool) -> Self {
        self.masquerade = on;
        self
    }

    /// Daemons find no tcx in their kernel, as before 6.6: see [`tcx`](super::tcx).
    #[must_use]
    pub fn without_tcx(mut self, without: bool) -> Self {
        self.without_tcx = without;
        self
    }

    /// Another network than the usual one: arguments of `fabricctl network init`.
    #[must_use]
    pub fn network(mut self, args: &[&str]) -> Self {
        self.network = Some(args.iter().map(ToString::to_string).collect());
        self
    }

    /// The arguments of `fabricctl network init`.
    pub(super) fn network_args(&self) -> Vec<String> {
        self.network.clone().unwrap_or_else(|| {
            let usual = |family| [addresses::network_flag(family), addresses::pod_network(family)].map(str::to_owned);
            self.families.each().iter().flat_map(|&family| usual(family)).collect()
        })
    }

    /// It outlives this process.
    #[must_use]
    pub fn stays(mut self) -> Self {
        self.lifetime = Lifetime::Stays;
        self
    }

    /// Starts it: underlay, etcd, network configuration, all nodes with a fabricd that is ready.
    ///
    /// # Errors
    /// It exists, a tool is missing, you aren't root, or a part of it doesn't start: the error shows its log.
    pub fn start(self) -> Result<Lab> {
        let nodes = self.nodes;
        let mut lab = self.create()?;
        lab.etcd.start()?;
        if lab.plan.wiring == Wiring::Fabric {
            lab.init_network()?;
        }
        // All daemons start at once, as on a real cluster.
        let added: Vec<Arc<Node>> = (0..nodes).map(|_| lab.boot_node()).collect::<Result<_>>()?;
        if lab.plan.wiring == Wiring::Fabric {
            added.iter().try_for_each(|node| node.start_fabricd())?;
            added.iter().try_for_each(|node| node.wait_ready())?;
        }
        Ok(lab)
    }

    /// Only its folder and the underlay, without etcd and nodes.
    ///
    /// # Errors
    /// It exists, a tool is missing, or you aren't root.
    pub fn create(self) -> Result<Lab> {
        preflight::check()?;
        let name = match &self.name {
            Some(name) => name.clone(),
            None => name_of_this_test()?,
        };
        let dir = dir_of(&name)?;
        if dir.exists() {
            let is_up = Self::read(&name).is_ok() && Lab::open(&name)?.is_on();
            ensure!(!is_up, "lab {name} is up already; `lab down --name {name}` stops it");
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("lab.json"), serde_json::to_string_pretty(&self)?)?;
        let lab = Lab::of(&name, &self)?;
        if let Err(error) = lab.underlay.boot(self.etcd_members) {
            lab.stop()?;
            return Err(error);
        }
        Ok(lab)
    }

    /// What the lab of this name was to be.
    pub(super) fn read(name: &str) -> Result<Self> {
        let path = dir_of(name)?.join("lab.json");
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("malformed {}", path.display()))
    }
}

/// The test harness calls its threads by their tests. A second lab of the same test needs a name.
fn name_of_this_test() -> Result<String> {
    let program = std::env::current_exe()?;
    let program = program.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let suite = program.rsplit_once('-').map_or(program.as_str(), |(suite, _hash)| suite);
    let thread = thread::current();
    let test = thread.name().context("a lab started outside of a test's own thread needs a name")?;
    Ok(format!("{suite}.{}", test.replace("::", ".")))
}
