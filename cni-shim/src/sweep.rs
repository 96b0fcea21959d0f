//! What earlier pods have left on the node: their addresses, and the address of a bridge that served another subnet.
//!
//! A reboot, or a runtime that never says DEL, leaves addresses behind. Who may be swept is asked of the kernel:
//!
//! | what                                    | is of a pod that no longer exists when                                |
//! |-----------------------------------------|------------------------------------------------------------------------|
//! | a saved attachment                      | its network namespace is gone, and the host's end of its cable is too  |
//! | one whose ADD was cut off, or whose file was | its network namespace is gone, as far as it is known, and the node has no cable at all |
//! | an address that nothing saved accounts for | the node has no cable at all, so no pod on a bridge                 |
//!
//! An ADD saves its attachment before it takes an address, and the sweep holds host-local's lock while it looks at
//! both; so an address that is being taken always has its attachment. Nothing outside of our network's folder is read.

use std::collections::BTreeSet;
use std::path::Path;

use fabric_core::model::IfName;
use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::bridge::wiring::{self, Link};
use crate::bridge::{in_the_way, namespace, random_mac};
use crate::error::{CniError, Code};
use crate::host_local::{Book, DATA_DIR};
use crate::netlink::{Netlink, Refused};
use crate::request::{AttachmentId, Identifier};
use crate::state::{Attachments, Saved};

/// The links of the host, as far as they tell of pods.
pub struct Cables(Vec<Link>);

impl Cables {
    /// Those of this network namespace.
    ///
    /// # Errors
    /// Code 105 when the kernel doesn't tell.
    pub fn of_the_host() -> Result<Self, CniError> {
        let links = wiring::links(&mut open()?).map_err(|e| refused(&e))?;
        Ok(Self(links))
    }

    /// True when the pod no longer exists of which this is saved, or nothing that can be read.
    #[must_use]
    pub fn show_the_end_of(&self, saved: Option<&Saved>) -> bool {
        let gone = saved.and_then(|saved| saved.netns.as_deref()).is_none_or(|path| namespace(path).is_none());
        gone && match saved.and_then(|saved| saved.ports.as_ref()) {
            Some(ports) => !self.0.iter().any(|link| ports.contains(&link.name)),
            None => self.none(),
        }
    }

    /// True when no pod can be plugged in anywhere.
    fn none(&self) -> bool {
        !self.0.iter().any(|link| link.is_veth)
    }
}

/// Frees the addresses in the book of `network` that no attachment accounts for: those that aren't in `valid` if the
/// runtime has said who is, else all of them if the node has no pod.
///
/// # Errors
/// Code 5 when the book can't be read or written.
pub fn free_orphans(
    data_dir: Option<&Path>,
    network: &Identifier,
    attachments: &Attachments,
    valid: Option<&BTreeSet<AttachmentId>>,
) -> Result<usize, CniError> {
    let data_dir = data_dir.unwrap_or(Path::new(DATA_DIR));
    let failed = |e| {
        let msg = format!("cannot sweep the addresses in {}: {e}", data_dir.join(network.as_str()).display());
        CniError::new(Code::Io, msg)
    };
    let Some(book) = Book::existing(data_dir, network).map_err(failed)? else { return Ok(0) };
    let accounted: BTreeSet<AttachmentId> = attachments.all()?.into_iter().collect();
    if valid.is_none() && !Cables::of_the_host()?.none() {
        return Ok(0);
    }
    let orphan = |holder: Option<&AttachmentId>| {
        holder.is_none_or(|id| !accounted.contains(id) && valid.is_none_or(|valid| !valid.contains(id)))
    };
    book.release_all(orphan).map(|freed| freed.len()).map_err(failed)
}

/// What was found out about the delegate's bridge.
#[derive(Debug, PartialEq, Eq)]
pub enum Bridge {
    /// There is none: no pod is on this node.
    Missing,
    /// It has no address but the wanted ones, now if not before.
    Clean,
}

/// Makes way for the gateway addresses of this node on the bridge that `config` names: takes another subnet's address
/// off it when no pod is plugged in.
///
/// # Errors
/// Code 11 when pods are, with their names; 105 when the kernel refuses.
pub fn make_way(config: &Map<String, Value>, attachments: &Attachments) -> Result<Bridge, CniError> {
    let Some(name) = bridge_of(config) else { return Ok(Bridge::Clean) };
    let mut netlink = open()?;
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
            owners(&ports, attachments).join(", ")
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

/// Pods by the names of their cables; of a cable that nothing saved knows, its own name.
fn owners(ports: &[String], attachments: &Attachments) -> Vec<String> {
    let saved: Vec<Saved> =
        attachments.all().unwrap_or_default().iter().filter_map(|id| attachments.read(id)).collect();
    let owner = |port: &String| {
        let saved = saved.iter().find(|saved| saved.ports.as_ref().is_some_and(|ports| ports.contains(port)));
        saved.map_or_else(|| format!("whoever is behind {port}"), |saved| format!("{} ({port})", saved.id.container))
    };
    ports.iter().map(owner).collect()
}

fn open() -> Result<Netlink, CniError> {
    Netlink::open().map_err(|e| CniError::new(Code::Kernel, format!("cannot open a netlink socket: {e}")))
}

fn refused(e: &Refused) -> CniError {
    CniError::new(Code::Kernel, e.to_string())
}
