//! Pods without fabricd: the standard `bridge` plugin on each node, static routes over the underlay.
//!
//! No overlay, so the plainest network that gives every pod an address: the Lab is proved on it, and
//! benchmarks have their baseline. Node N has 10.244.N.0/24 and fd00:10:244:N::/64.

use std::fs;

use anyhow::Result;
use fabric_core::model::Family;
use serde_json::{Value, json};

use super::addresses::Families;
use super::machine::Machine;
use super::node::Node;

/// The conflist of one node.
pub(super) fn conflist(index: u16, families: Families) -> Value {
    let ranges: Vec<Value> =
        families.each().iter().map(|&family| json!([{ "subnet": subnet(family, index) }])).collect();
    json!({ "cniVersion": "1.0.0", "name": "plain", "plugins": [{
        "type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
        "ipam": { "type": "host-local", "ranges": ranges },
    }]})
}

/// Makes a router of the node.
pub(super) fn prepare(node: &Machine, families: Families) -> Result<()> {
    for family in families.each() {
        let switch = match family {
            Family::V4 => "/proc/sys/net/ipv4/ip_forward",
            Family::V6 => "/proc/sys/net/ipv6/conf/all/forwarding",
        };
        let network = node.network()?;
        network.run(|| Ok(fs::write(switch, "1")?))?;
    }
    Ok(())
}

/// Tells a node the way to the pods of another.
pub(super) fn add_route(node: &Node, to: &Node, families: Families) -> Result<()> {
    for &family in families.each() {
        let (subnet, via) = (subnet(family, to.index), to.underlay_ip(family).to_string());
        node.run(&["ip", "route", "replace", &subnet, "via", &via])?;
    }
    Ok(())
}

fn subnet(family: Family, index: u16) -> String {
    match family {
        Family::V4 => format!("10.244.{index}.0/24"),
        Family::V6 => format!("fd00:10:244:{index:x}::/64"),
    }
}
