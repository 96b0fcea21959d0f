//! A node whose container runtime does as it pleases: it calls `fabric-cni` directly, and looks for what is left.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::Trial;
use super::pair::PATIENCE;
use crate::lab::cni::{INTERFACE, PLUGINS};
use crate::lab::{Builder, Lab, Node, Pod, wait_until};

/// host-local's books of the network.
const BOOKS: &str = "/var/lib/cni/networks/fabric";

/// A node with a pod that lives through everything.
pub(super) struct Runtime {
    _lab: Lab,
    pub node: Arc<Node>,
    pub bystander: Pod,
    slack: u32,
    /// What is on the node while only the bystander is.
    alone: Left,
}

/// A request to the plugin.
#[derive(Clone)]
pub(super) struct Call {
    pub verb: &'static str,
    pub pod: String,
    /// Empty when it is gone.
    pub netns: String,
    pub config: Value,
    /// How the plugin is started: `timeout`, `prlimit` and the like, in front of it.
    pub wrapper: Vec<String>,
    /// `CNI_PATH`.
    pub path: String,
}

/// What pods hold: addresses, state files, cables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Left {
    addresses: BTreeSet<String>,
    states: BTreeSet<String>,
    cables: usize,
}

impl Trial {
    /// One node and a bystander on it.
    pub(super) fn runtime(&self, lab: impl FnOnce(Builder) -> Builder) -> Result<Runtime> {
        let lab = lab(Lab::builder().name(&self.name).nodes(1)).start()?;
        Runtime::on(lab, self.slack)
    }
}

impl Runtime {
    pub fn on(lab: Lab, slack: u32) -> Result<Self> {
        let node = Arc::clone(lab.node("node-1")?);
        let bystander = node.add_pod("bystander")?;
        let alone = left(&node)?;
        Ok(Self { _lab: lab, node, bystander, slack, alone })
    }

    /// A request about this pod, as a runtime makes it.
    pub fn call(&self, verb: &'static str, pod: &str) -> Call {
        Call {
            verb,
            pod: pod.to_owned(),
            netns: format!("/run/netns/{pod}"),
            config: json!({ "cniVersion": "1.0.0", "name": "fabric", "type": "fabric-cni" }),
            wrapper: vec![],
            path: PLUGINS.to_owned(),
        }
    }

    /// Makes a pod's namespace.
    pub fn make(&self, pod: &str) -> Result<()> {
        self.node.run(&["ip", "netns", "add", pod]).map(drop)
    }

    /// Removes it.
    pub fn unmake(&self, pod: &str) -> Result<()> {
        self.node.run(&["ip", "netns", "del", pod]).map(drop)
    }

    /// Asks; an error is the plugin's own object, or null where it was killed.
    pub fn ask(&self, call: &Call) -> Result<std::result::Result<Value, Value>> {
        self.ask_with(call, call.config.to_string())
    }

    /// The same with any bytes for a configuration.
    pub fn ask_with(&self, call: &Call, stdin: impl Into<Vec<u8>>) -> Result<std::result::Result<Value, Value>> {
        let plugin = format!("{PLUGINS}/fabric-cni");
        let argv: Vec<&str> = call.wrapper.iter().map(String::as_str).chain([plugin.as_str()]).collect();
        let command = self.node.command(&argv)?.stdin(stdin).within(Duration::from_secs(150));
        let output = command
            .env("CNI_COMMAND", call.verb)
            .env("CNI_CONTAINERID", &call.pod)
            .env("CNI_NETNS", &call.netns)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", &call.path)
            .output()?;
        let said = output.stdout.trim();
        match output.status.code() {
            Some(0) if said.is_empty() => Ok(Ok(Value::Null)),
            Some(0) => Ok(Ok(serde_json::from_str(said).with_context(|| format!("no JSON: {said}"))?)),
            // A panic ends with 101.
            Some(1) => Ok(Err(serde_json::from_str(said).with_context(|| format!("no error object: {said}"))?)),
            Some(code) if call.wrapper.is_empty() => anyhow::bail!("ended with {code}: {}", output.stderr),
            _ => Ok(Err(Value::Null)),
        }
    }

    /// Asks for what has to succeed.
    pub fn granted(&self, call: &Call) -> Result<Value> {
        let (verb, pod) = (call.verb, &call.pod);
        self.ask(call)?.map_err(|error| anyhow::anyhow!("{verb} of {pod} fails: {error}"))
    }

    /// Asks for what has to be refused, with one of these codes.
    pub fn refused(&self, call: &Call, codes: &[u64]) -> Result<Value> {
        let answer = self.ask(call)?;
        let Err(error) = answer else { anyhow::bail!("{} of {} succeeds: {answer:?}", call.verb, call.pod) };
        let code = error["code"].as_u64().with_context(|| format!("an error without code: {error}"))?;
        ensure!(codes.contains(&code), "{} of {} is refused with {error}, not {codes:?}", call.verb, call.pod);
        Ok(error)
    }

    /// Adds a pod, namespace and all.
    pub fn add(&self, pod: &str) -> Result<Value> {
        self.make(pod)?;
        self.granted(&self.call("ADD", pod))
    }

    /// Nothing is left of any pod but the bystander, which still talks.
    pub fn is_clean(&self) -> Result<()> {
        // Cables go a moment after their namespaces.
        self.within("nothing is left", || {
            let now = left(&self.node)?;
            ensure!(now == self.alone, "left: {now:?}\nthe bystander's: {:?}", self.alone);
            Ok(())
        })?;
        self.within("the bystander talks", || {
            let gateway = self.bystander.run(&["ip", "-4", "route", "show", "default"])?;
            let gateway = gateway.split(' ').nth(2).context("it has no default route")?.to_owned();
            self.bystander.run(&["ping", "-c1", "-W1", &gateway])
        })?;
        Ok(())
    }

    fn within<T>(&self, what: &str, condition: impl FnMut() -> Result<T>) -> Result<T> {
        wait_until(what, PATIENCE * self.slack, condition)
    }
}

impl Call {
    /// With another setting of the plugin.
    pub fn with(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Started by way of a command.
    pub fn through(mut self, command: &[&str]) -> Self {
        self.wrapper = command.iter().map(ToString::to_string).collect();
        self
    }
}

/// The addresses of a result.
pub(super) fn addresses(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().into_iter().flatten();
    ips.filter_map(|ip| ip["address"].as_str()).map(str::to_owned).collect()
}

fn left(node: &Node) -> Result<Left> {
    let list = |dir: &str| node.run(&["sh", "-c", &format!("ls -A {dir} 2>/dev/null || true")]);
    let names = |text: String| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let mut addresses = names(list(BOOKS)?);
    addresses.retain(|name| name.parse::<std::net::IpAddr>().is_ok());
    let cables = node.run(&["ip", "-o", "link", "show", "type", "veth"])?.lines().count();
    Ok(Left { addresses, states: names(list("/var/lib/cni/fabric/fabric")?), cables })
}
