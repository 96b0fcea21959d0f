//! [`Cluster`]: the [`Nodes`] of an API server and a `net-conf.json`, as `--store kubernetes` has them before it; and an API
//! server on the underlay of a Lab, for whole daemons.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use fabric_core::record::LeaseKey;
use fabricd::kubernetes::addresses::Addresses;
use fabricd::store::kubernetes::{Kubernetes, Options};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::fake_api::FakeApi;
use crate::lab::{Lab, Node};

/// The prefix of flannel's annotations.
pub const PREFIX: &str = "flannel.alpha.coreos.com";

/// A `net-conf.json` of both families, with the network of a Lab.
pub const DUAL_STACK: &str = r#"{
    "EnableIPv6": true, "Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "Backend": { "Type": "vxlan" }
}"#;

/// Starts an API server on a Lab's underlay, at the address that etcd has otherwise.
///
/// # Errors
/// The port is taken.
pub fn api_on_underlay(lab: &Lab) -> Result<FakeApi> {
    lab.underlay().machine.network()?.run(|| FakeApi::start(([10, 99, 0, 2], 6443).into()))
}

/// The settings of a daemon whose lease is its Node before this API server, with this `net-conf.json`.
///
/// # Errors
/// The Lab's folder can't be written to.
pub fn lease_settings(lab: &Lab, api: &FakeApi, network: &str) -> Result<Vec<(&'static str, String)>> {
    let config = lab.dir().join("net-conf.json");
    fs::write(&config, network)?;
    Ok(vec![
        ("FABRICD_STORE", "kubernetes".to_owned()),
        ("FABRICD_KUBECONFIG", api.kubeconfig(lab.dir())?.display().to_string()),
        ("FABRICD_NET_CONFIG_PATH", config.display().to_string()),
    ])
}

/// Makes the Node of a Lab's node, with podCIDRs of both families.
pub fn add_dual_stack_node(api: &FakeApi, node: &Node) {
    let n = node.index;
    api.add_node(&node.name, &[&format!("10.244.{n}.0/24"), &format!("fd00:10:244:{n}::/64")]);
}

/// The taint that goes when a node's network works.
pub const TAINT: &str = "fabric.io/not-ready";

/// An API server, and a hand that changes its Nodes as somebody else would.
pub trait Nodes {
    /// Writes a kubeconfig for it into a folder.
    ///
    /// # Errors
    /// When the folder can't be written to.
    fn kubeconfig(&self, dir: &Path) -> Result<PathBuf>;

    /// All Nodes.
    fn nodes(&self) -> Vec<Value>;

    /// Makes a Node with these podCIDRs, none being fine too.
    fn add_node(&self, name: &str, subnets: &[&str]);

    /// Deletes a Node, if it is there.
    fn delete_node(&self, name: &str);

    /// Changes the metadata of a Node by a merge patch.
    fn change_node(&self, name: &str, patch: &Value);
}

/// A cluster of Kubernetes, as far as a lease store sees it.
pub struct Cluster<A = FakeApi> {
    /// The API server.
    pub api: A,
    dir: TempDir,
}

impl Cluster {
    /// One without Nodes and config, before a fake API server.
    ///
    /// # Panics
    /// When no port or no folder can be had.
    #[must_use]
    pub fn start() -> Self {
        Self::before(FakeApi::start(([127, 0, 0, 1], 0).into()).expect("a free port"))
    }
}

impl<A: Nodes> Cluster<A> {
    /// One without config before this API server.
    ///
    /// # Panics
    /// When no folder can be had.
    #[must_use]
    pub fn before(api: A) -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        api.kubeconfig(dir.path()).expect("written");
        Self { api, dir }
    }

    /// Leaves neither Nodes nor config.
    pub fn clear(&self) {
        let nodes = self.api.nodes();
        nodes.iter().filter_map(|node| node["metadata"]["name"].as_str()).for_each(|name| self.api.delete_node(name));
        // That there is none is fine.
        let _ = fs::remove_file(self.config());
    }

    /// The revision of the last change to a Node that is there. The whole store's would count what an API server does
    /// for itself.
    pub fn revision(&self) -> i64 {
        let of = |node: &Value| node["metadata"]["resourceVersion"].as_str()?.parse().ok();
        self.api.nodes().iter().filter_map(of).max().unwrap_or_default()
    }

    /// The store of `node-<number>`.
    #[must_use]
    pub fn store(&self, number: u8) -> Kubernetes {
        Kubernetes::start(Options {
            node: format!("node-{number}").parse().expect("a name"),
            kubeconfig: Some(self.dir.path().join("kubeconfig")),
            addresses: Addresses::default(),
            config: self.config(),
            startup_taint: Some(TAINT.to_owned()),
        })
    }

    /// Makes a Node with these podCIDRs; one that has others is deleted first, since podCIDRs can't be changed.
    pub fn give(&self, node: &str, subnets: &LeaseKey) {
        let subnets: Vec<String> = subnets.subnets().values().map(ToString::to_string).collect();
        let is_it = |other: &Value| other["metadata"]["name"] == node && other["spec"]["podCIDRs"] == json!(subnets);
        if !self.api.nodes().iter().any(is_it) {
            self.api.delete_node(node);
            self.api.add_node(node, &subnets.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }

    /// Annotates the Node with these podCIDRs, a new one if there is none, with what is a record in etcd; with what is
    /// none, so that nobody can read it.
    pub fn flannel_says(&self, subnets: &LeaseKey, record: &str) {
        let node = self.node_of(subnets).unwrap_or_else(|| flannels_name(subnets));
        self.flannel_says_of(&node, subnets, record);
    }

    /// The same for the Node of this name.
    pub fn flannel_says_of(&self, node: &str, subnets: &LeaseKey, record: &str) {
        self.give(node, subnets);
        let record: Value = serde_json::from_str(record).unwrap_or_else(|_| json!({"BackendData": record}));
        let text = |member: &Value| member.as_str().map_or_else(|| member.to_string(), str::to_owned);
        let annotation = |(name, member): (&str, &str)| {
            let value = record.get(member).filter(|value| !value.is_null())?;
            Some((format!("{PREFIX}/{name}"), json!(text(value))))
        };
        let names = [
            ("backend-type", "BackendType"),
            ("backend-data", "BackendData"),
            ("backend-v6-data", "BackendV6Data"),
            ("public-ip", "PublicIP"),
            ("public-ipv6", "PublicIPv6"),
        ];
        let mut annotations: serde_json::Map<String, Value> = names.into_iter().filter_map(annotation).collect();
        annotations.insert(format!("{PREFIX}/kube-subnet-manager"), json!("true"));
        self.api.change_node(node, &json!({"metadata": {"annotations": annotations}}));
    }

    /// Deletes the Node with these podCIDRs.
    pub fn remove(&self, subnets: &LeaseKey) {
        if let Some(node) = self.node_of(subnets) {
            self.api.delete_node(&node);
        }
    }

    /// Writes `net-conf.json`.
    ///
    /// # Panics
    /// When it can't be written.
    pub fn write_config(&self, json: &str) {
        let new = self.dir.path().join("new");
        fs::write(&new, json).and_then(|()| fs::rename(new, self.config())).expect("written");
    }

    /// Removes `net-conf.json`.
    ///
    /// # Panics
    /// When it can't be removed.
    pub fn remove_config(&self) {
        fs::remove_file(self.config()).expect("removed");
    }

    fn config(&self) -> PathBuf {
        self.dir.path().join("net-conf.json")
    }

    fn node_of(&self, subnets: &LeaseKey) -> Option<String> {
        let subnets: Vec<String> = subnets.subnets().values().map(ToString::to_string).collect();
        let has = |node: &Value| node["spec"]["podCIDRs"] == json!(subnets);
        let node = self.api.nodes().into_iter().find(has)?;
        node["metadata"]["name"].as_str().map(str::to_owned)
    }
}

/// The name of a Node that is made for flannel to annotate.
#[must_use]
pub fn flannels_name(subnets: &LeaseKey) -> String {
    format!("flannel-{}", subnets.to_string().replace(|c: char| !c.is_ascii_alphanumeric(), "-"))
}
