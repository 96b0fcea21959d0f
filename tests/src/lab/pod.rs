//! A pod: a network namespace on a node, attached through the real CNI call.

use std::fs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::cni::{self, Attachment};
use super::exec::{Exec, Output};
use super::node::Node;
use super::spaces::Spaces;

/// A pod on a node.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The node.
    pub node: Arc<Node>,
    record: Record,
}

/// What is remembered of a pod in the node's folder.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    name: String,
    /// CNI_CONTAINERID: never used twice, or what an earlier pod of this name leaked would stand in the way.
    container: String,
    netns: String,
    /// CNI_ARGS.
    #[serde(default)]
    args: String,
    ips: Vec<IpAddr>,
    /// The result of ADD, null for a pod that a real container runtime attached.
    result: Value,
}

impl Node {
    /// Makes a pod: a network namespace, attached by a CNI ADD.
    ///
    /// # Errors
    /// There is one of this name, or a plugin refused: the error holds a [`cni::CniError`].
    pub fn add_pod(self: &Arc<Self>, name: &str) -> Result<Pod> {
        self.add_pod_with(name, "")
    }

    /// The same for a pod of Kubernetes, as its runtime names it. In the lab it is called `<namespace>-<name>`.
    ///
    /// # Errors
    /// As [`Node::add_pod`].
    pub fn add_pod_of(self: &Arc<Self>, namespace: &str, name: &str, uid: &str) -> Result<Pod> {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID={uid}");
        self.add_pod_with(&format!("{namespace}-{name}"), &args)
    }

    fn add_pod_with(self: &Arc<Self>, name: &str, args: &str) -> Result<Pod> {
        self.run(&["ip", "netns", "add", name])?;
        let netns = format!("/run/netns/{name}");
        let container = format!("{name}-{:08x}", UNIX_EPOCH.elapsed()?.as_nanos());
        let attachment = Attachment { container: &container, netns: &netns, args };
        let added = cni::add(self, &attachment);
        if added.is_err() {
            // As a runtime does: whatever a failed ADD left is a DEL's to remove.
            cni::del(self, &attachment, &Value::Null).ok();
            self.run(&["ip", "netns", "del", name])?;
        }
        let result = added.with_context(|| format!("cannot attach pod {name} on {}", self.name))?;
        self.run(&["ip", "-n", name, "link", "set", "lo", "up"])?;
        let ips = cni::addresses(&result)?;
        self.register(Record { name: name.to_owned(), container, netns, args: args.to_owned(), ips, result })
    }

    /// A container of a real runtime, as a pod: its network namespace is at `netns` on the node.
    ///
    /// # Errors
    /// It has no addresses.
    pub(super) fn adopt_pod(self: &Arc<Self>, name: &str, netns: &str) -> Result<Pod> {
        let record = Record {
            name: name.to_owned(),
            container: name.to_owned(),
            netns: netns.to_owned(),
            args: String::new(),
            ips: vec![],
            result: Value::Null,
        };
        let mut pod = Pod { node: Arc::clone(self), record };
        pod.record.ips = pod.addresses_on_its_interface()?;
        self.register(pod.record)
    }

    /// All pods of the node, by name.
    ///
    /// # Errors
    /// The node's folder can't be read.
    pub fn pods(self: &Arc<Self>) -> Result<Vec<Pod>> {
        if !self.pods_dir().exists() {
            return Ok(vec![]);
        }
        let records =
            fs::read_dir(self.pods_dir())?.map(|entry| Ok(serde_json::from_slice(&fs::read(entry?.path())?)?));
        let mut records: Vec<Record> = records.collect::<Result<_>>()?;
        records.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(records.into_iter().map(|record| Pod { node: Arc::clone(self), record }).collect())
    }

    /// The pod of this name.
    ///
    /// # Errors
    /// There is none: the error lists those that exist.
    pub fn pod(self: &Arc<Self>, name: &str) -> Result<Pod> {
        let pods = self.pods()?;
        let names: Vec<String> = pods.iter().map(|pod| pod.name().to_owned()).collect();
        pods.into_iter()
            .find(|pod| pod.name() == name)
            .with_context(|| format!("no pod {name} on {}; there are: {}", self.name, names.join(" ")))
    }

    /// Forgets all pods: a machine that boots has none.
    pub(super) fn forget_pods(&self) -> Result<()> {
        let dir = self.pods_dir();
        if dir.exists() { Ok(fs::remove_dir_all(dir)?) } else { Ok(()) }
    }

    fn register(self: &Arc<Self>, record: Record) -> Result<Pod> {
        fs::create_dir_all(self.pods_dir())?;
        fs::write(self.pods_dir().join(format!("{}.json", record.name)), serde_json::to_string_pretty(&record)?)?;
        Ok(Pod { node: Arc::clone(self), record })
    }

    fn pods_dir(&self) -> PathBuf {
        self.dir().join("pods")
    }
}

impl Pod {
    /// Its name, unique on its node.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// `node-1/a`, unique in the lab.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.node.name, self.record.name)
    }

    /// Its addresses, in the order of the CNI result.
    #[must_use]
    pub fn ips(&self) -> &[IpAddr] {
        &self.record.ips
    }

    /// Its address of one family.
    ///
    /// # Errors
    /// It has none.
    pub fn ip(&self, family: Family) -> Result<IpAddr> {
        let ip = self.ips().iter().find(|ip| Family::of(**ip) == family);
        ip.copied().with_context(|| format!("{} has no {family} address", self.full_name()))
    }

    /// What ADD returned; null for a container of a real runtime.
    #[must_use]
    pub fn result(&self) -> &Value {
        &self.record.result
    }

    /// A command to be run in the pod: the node's files and processes, the pod's network.
    ///
    /// # Errors
    /// The pod or its node is gone.
    pub fn command(&self, argv: &[&str]) -> Result<Exec> {
        let spaces = self.node.spaces()?.with_network(&self.netns_path()?)?;
        Ok(Exec::new(&self.full_name(), spaces, argv, &[]))
    }

    /// Runs a command in the pod and returns how it went, well or badly.
    ///
    /// # Errors
    /// The pod is gone, or there is no such command.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.command(argv)?.output()
    }

    /// Runs a command in the pod that has to succeed and returns what it printed.
    ///
    /// # Errors
    /// The pod is gone or the command failed.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        self.command(argv)?.run()
    }

    /// Its network namespace, to open sockets in.
    ///
    /// # Errors
    /// The pod or its node is gone.
    pub fn network(&self) -> Result<Spaces> {
        Spaces::of_network(&self.netns_path()?)
    }

    /// A CNI CHECK.
    ///
    /// # Errors
    /// A plugin found something amiss.
    pub fn check(&self) -> Result<()> {
        cni::check(&self.node, &self.attachment(), &self.record.result)
    }

    /// Detaches the pod by a CNI DEL and removes its namespace.
    ///
    /// # Errors
    /// A plugin refused.
    pub fn del(self) -> Result<()> {
        ensure!(!self.record.result.is_null(), "{} belongs to a container runtime", self.full_name());
        cni::del(&self.node, &self.attachment(), &self.record.result)?;
        self.node.run(&["ip", "netns", "del", self.name()])?;
        self.forget()
    }

    /// Forgets a pod that is gone.
    pub(super) fn forget(self) -> Result<()> {
        Ok(fs::remove_file(self.node.pods_dir().join(format!("{}.json", self.name())))?)
    }

    fn attachment(&self) -> Attachment<'_> {
        Attachment { container: &self.record.container, netns: &self.record.netns, args: &self.record.args }
    }

    fn netns_path(&self) -> Result<PathBuf> {
        self.node.path(&self.record.netns)
    }

    fn addresses_on_its_interface(&self) -> Result<Vec<IpAddr>> {
        let shown = self.run(&["ip", "-j", "address", "show", cni::INTERFACE, "scope", "global"])?;
        let shown: Value = serde_json::from_str(&shown)?;
        let ips = shown[0]["addr_info"].as_array().context("ip shows no addresses")?;
        // An address of another scope is listed too, as an empty object.
        ips.iter().filter_map(|ip| ip["local"].as_str()).map(|ip| Ok(ip.parse()?)).collect()
    }
}
