//! A small container runtime, as far as networks go: it calls CNI plugins the way containerd does.
//!
//! The network's configuration is the first `*.conflist` of `/etc/cni/net.d`. Its plugins are run in order
//! for ADD and CHECK, backwards for DEL; each is given the result of the one before as `prevResult`, and
//! the last result is kept for CHECK and DEL (CNI specification 1.0.0, sections 3 and 4). Plugins run on
//! the node, from its `/opt/cni/bin`, with the environment of the specification and nothing else.

use std::fmt;
use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Value, json};

use super::exec::Output;
use super::machine::Machine;

/// Where nodes have their plugins.
pub const PLUGINS: &str = "/opt/cni/bin";

/// Where nodes have the configuration of their networks.
pub const NETWORKS: &str = "/etc/cni/net.d";

/// The interface of every container.
pub const INTERFACE: &str = "eth0";

/// What the specification calls an attachment: one container's interface on the node's network.
#[derive(Clone, Debug)]
pub struct Attachment<'a> {
    /// CNI_CONTAINERID.
    pub container: &'a str,
    /// CNI_NETNS, a path on the node; empty when it is gone.
    pub netns: &'a str,
    /// CNI_ARGS, by which a runtime of Kubernetes names the pod; empty for none.
    pub args: &'a str,
}

/// An error that a plugin reported as the specification wants it (section 5).
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct CniError {
    /// 11 is "try again later", 50 "not available"; 100 and above are the plugin's own.
    pub code: u32,
    /// One sentence.
    pub msg: String,
    /// More.
    #[serde(default)]
    pub details: String,
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CNI error {}: {} {}", self.code, self.msg, self.details)
    }
}

impl std::error::Error for CniError {}

/// Attaches a container and returns the last plugin's result. An error holds a [`CniError`].
///
/// # Errors
/// There is no network configuration, or a plugin refused.
pub fn add(node: &Machine, to: &Attachment) -> Result<Value> {
    let conflist = conflist(node)?;
    let mut result = Value::Null;
    for plugin in plugins(&conflist)? {
        let config = plugin_config(&conflist, plugin, &result);
        let output = call(node, "ADD", to, &plugin_type(plugin)?, &config)?;
        result = serde_json::from_str(&succeeded("ADD", plugin, output)?).context("malformed result of ADD")?;
    }
    Ok(result)
}

/// Asks every plugin whether all that it made for the container is still there.
///
/// # Errors
/// Something isn't. The error holds a [`CniError`].
pub fn check(node: &Machine, to: &Attachment, result: &Value) -> Result<()> {
    let conflist = conflist(node)?;
    for plugin in plugins(&conflist)? {
        let config = plugin_config(&conflist, plugin, result);
        let output = call(node, "CHECK", to, &plugin_type(plugin)?, &config)?;
        succeeded("CHECK", plugin, output)?;
    }
    Ok(())
}

/// Detaches a container; `result` is what [`add`] returned, or null when that is lost.
///
/// # Errors
/// A plugin refused. The error holds a [`CniError`].
pub fn del(node: &Machine, to: &Attachment, result: &Value) -> Result<()> {
    let conflist = conflist(node)?;
    for plugin in plugins(&conflist)?.iter().rev() {
        let config = plugin_config(&conflist, plugin, result);
        let output = call(node, "DEL", to, &plugin_type(plugin)?, &config)?;
        succeeded("DEL", plugin, output)?;
    }
    Ok(())
}

/// One call of one plugin, whatever it is given and however it ends: for tests of bad input.
///
/// # Errors
/// There is no such plugin.
pub fn call(node: &Machine, command: &str, to: &Attachment, plugin: &str, config: &str) -> Result<Output> {
    node.command(&[&format!("{PLUGINS}/{plugin}")])?
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", to.container)
        .env("CNI_NETNS", to.netns)
        .env("CNI_IFNAME", INTERFACE)
        .env("CNI_ARGS", to.args)
        .env("CNI_PATH", PLUGINS)
        .stdin(config)
        .output()
}

/// The addresses in a result, those of the container.
///
/// # Errors
/// The result isn't one.
pub fn addresses(result: &Value) -> Result<Vec<IpAddr>> {
    let ips = result["ips"].as_array().with_context(|| format!("a result without ips: {result}"))?;
    let address = |ip: &Value| Ok(ip["address"].as_str().context("an ip without address")?.parse::<IpNetwork>()?.ip());
    ips.iter().map(address).collect()
}

fn conflist(node: &Machine) -> Result<Value> {
    let mut found: Vec<_> = fs::read_dir(node.path(NETWORKS)?)?.collect::<Result<Vec<_>, _>>()?;
    found.retain(|entry| entry.path().extension().is_some_and(|extension| extension == "conflist"));
    let first = found.iter().map(fs::DirEntry::path).min().with_context(|| format!("no conflist in {NETWORKS}"))?;
    serde_json::from_slice(&fs::read(&first)?).with_context(|| format!("malformed {}", first.display()))
}

fn plugins(conflist: &Value) -> Result<&Vec<Value>> {
    conflist["plugins"].as_array().context("a conflist without plugins")
}

fn plugin_type(plugin: &Value) -> Result<String> {
    Ok(plugin["type"].as_str().context("a plugin without type")?.to_owned())
}

fn plugin_config(conflist: &Value, plugin: &Value, previous: &Value) -> String {
    let mut config = plugin.clone();
    config["cniVersion"] = conflist["cniVersion"].clone();
    config["name"] = conflist["name"].clone();
    if !previous.is_null() {
        config["prevResult"] = previous.clone();
    }
    config.to_string()
}

fn succeeded(command: &str, plugin: &Value, output: Output) -> Result<String> {
    if output.success() {
        return Ok(output.stdout);
    }
    match serde_json::from_str::<CniError>(&output.stdout) {
        Ok(error) => {
            Err(error).with_context(|| format!("CNI {command} of {}: {}", plugin["type"], output.stderr.trim()))
        }
        Err(_) => output.ok(),
    }
}

/// The conflist of a cluster that runs fabricd.
#[must_use]
pub fn fabric_conflist() -> Value {
    json!({ "cniVersion": "1.0.0", "name": "fabric", "plugins": [{ "type": "fabric-cni" }] })
}
