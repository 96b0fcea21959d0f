//! What earlier pods have left on the node: the address of a bridge that served another subnet, and whose pods are gone.
//!
//! A reboot, or a runtime that never says DEL, leaves addresses behind. Who may be swept is asked of the kernel:
//!
//! | what                                    | is of a pod that no longer exists when                                |
//! |-----------------------------------------|------------------------------------------------------------------------|
//! | a saved attachment                      | its network namespace is gone, and the host's end of its veth is too  |
//! | one whose ADD was cut off, or whose file was | its network namespace is gone, as far as it is known, and each pod's veth is another's by its attachment |
//! | an address that nothing saved accounts for | each pod's veth is one that an attachment names                     |
//!
//! An ADD saves its attachment before it takes an address, and the sweep holds host-local's lock while it looks at
//! both; so an address that is being taken always has its attachment. Of other folders than the node's
//! ([`crate::node_ipam`]) only addresses of the node's subnet are looked at.

use std::path::Path;

use fabric_core::model::IfName;
use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::bridge::{in_the_way, open_netlink, random_mac, wiring};
use crate::error::{CniError, Code};
use crate::netlink::Refused;
use crate::state::{Attachments, Saved};

/// What was found out about the delegate's bridge.
#[derive(Debug, PartialEq, Eq)]
pub enum Bridge {
    /// There is none: no pod is on this node.
    Missing,
    /// It has no address but the wanted ones, now if not before.
    Clean,
}

/// Makes way for the gateway addresses of this node on the bridge that `config` names: takes another subnet's address
/// off it when no pod is attached.
///
/// # Errors
/// Code 11 when pods are, with their names; 105 when the kernel refuses.
pub fn make_way(config: &Map<String, Value>, state_dir: &Path) -> Result<Bridge, CniError> {
    let Some(name) = bridge_of(config) else { return Ok(Bridge::Clean) };
    let mut netlink = open_netlink()?;
    let Some(bridge) = wiring::link(&mut netlink, &name).map_err(|e| refused(&e))? else { return Ok(Bridge::Missing) };
    if bridge.mac.is_none() {
        // A first ADD that failed has left it so, and `bridge` would fail on it for ever.
        netlink.write(&[wiring::set_mac(bridge.index, &bridge.name, random_mac())]).map_err(|e| refused(&e))?;
    }
    let is_set = |key| config.get(key).is_some_and(|value| *value == true);
    if !is_set("isGateway") && !is_set("isDefaultGateway") {
        return Ok(Bridge::Clean);
    }
    let has = wiring::addresses(&mut netlink, bridge.index, &bridge.name).map_err(|e| refused(&e))?;
    let (wanted, network) = (gateways(config), networks(config));
    let stale: Vec<IpNetwork> = has
        .into_iter()
        .filter(|has| !wanted.contains(has))
        .filter(|has| {
            // An IPv6 address of the operator's own stays; one of the network was an earlier lease's.
            wanted.iter().any(|wanted| in_the_way(*has, *wanted)) || network.iter().any(|net| net.contains(has.ip()))
        })
        .collect();
    if stale.is_empty() {
        return Ok(Bridge::Clean);
    }
    let text = |all: &[IpNetwork]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let ports = wiring::links(&mut netlink).map_err(|e| refused(&e))?;
    let ports: Vec<String> =
        ports.into_iter().filter(|link| link.controller == Some(bridge.index)).map(|link| link.name).collect();
    if !ports.is_empty() {
        let msg = format!(
            "{name} has the address {} of another subnet than this node's ({}), and pods still use it: {}; \
             delete them, and pods can be added again",
            text(&stale),
            text(&wanted),
            owners(&ports, state_dir).join(", ")
        );
        return Err(CniError::new(Code::TryAgainLater, msg));
    }
    let deletions: Vec<_> =
        stale.iter().map(|address| wiring::delete_address(bridge.index, &bridge.name, *address)).collect();
    match netlink.write(&deletions) {
        // Another ADD was faster.
        Err(e) if e.errno() != Some(rustix::io::Errno::ADDRNOTAVAIL) => Err(refused(&e)),
        _ => Ok(Bridge::Clean),
    }
}

/// The bridge that a rendered configuration names.
pub fn bridge_of(config: &Map<String, Value>) -> Option<IfName> {
    config.get("bridge")?.as_str()?.parse().ok()
}

/// The gateways' addresses with their lengths, by the ranges of a rendered configuration: what the bridge is to have.
pub fn gateways(config: &Map<String, Value>) -> Vec<IpNetwork> {
    let ranges = config.get("ipam").and_then(|ipam| ipam["ranges"].as_array()).into_iter().flatten();
    let subnets = ranges.filter_map(|set| set[0]["subnet"].as_str()?.parse::<fabric_core::model::Subnet>().ok());
    subnets.filter_map(|subnet| IpNetwork::new(subnet.gateway(), subnet.prefix_len()).ok()).collect()
}

fn networks(config: &Map<String, Value>) -> Vec<IpNetwork> {
    let routes = config.get("ipam").and_then(|ipam| ipam["routes"].as_array()).into_iter().flatten();
    let networks = routes.filter_map(|route| route["dst"].as_str()?.parse::<IpNetwork>().ok());
    networks.filter(|network| network.prefix() > 0).collect()
}

/// Pods by the names of their veths; of a veth that nothing saved knows, its own name.
fn owners(ports: &[String], state_dir: &Path) -> Vec<String> {
    let networks = Attachments::of_all_networks(state_dir).unwrap_or_default();
    let saved: Vec<Saved> =
        networks.iter().flat_map(|one| one.read_all().unwrap_or_default()).filter_map(|(_, saved)| saved).collect();
    let owner = |port: &String| {
        let saved =
            saved.iter().find(|saved| saved.attached.as_ref().is_some_and(|attached| attached.ports.contains(port)));
        saved.map_or_else(|| format!("whoever is behind {port}"), |saved| format!("{} ({port})", saved.id.container))
    };
    ports.iter().map(owner).collect()
}

pub(crate) fn refused(e: &Refused) -> CniError {
    CniError::new(Code::Kernel, e.to_string())
}
