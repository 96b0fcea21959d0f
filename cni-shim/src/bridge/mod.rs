//! `fabric-bridge`: what `bridge` and `host-local` do, done by one process in four batches of netlink messages.
//!
//! ```text
//!  the IPAM state      one address of each family                                    host_local
//!  host: cni0                 if missing; the gateway's addresses, if missing               wiring
//!  host: veth                both ends at once, attached to cni0 and into the pod, hairpin
//!  pod:  eth0                 up, addresses, routes
//!  pod:  eth0                 once the bridge forwards: gratuitous ARP, neighbour advertisement
//! ```
//!
//! Why it is fast: nothing is started, and nothing is asked again and again. That the bridge forwards is an event
//! of the kernel's, which is waited for if it hasn't come. The name of the host's end follows from the attachment, so
//! DEL finds it without the pod's namespace, even if all else is lost.
//!
//! | file | what it is |
//! |---|---|
//! | `mod` | the plugin's face, and what others do to a bridge as well |
//! | `conf` | its configuration |
//! | `verbs` | ADD, DEL, CHECK, GC and STATUS |
//! | `wiring` | messages about links, addresses and routes, and what the kernel shows of them |
//! | `netns` | network namespaces and their settings |
//! | `errors` | what the runtime is told when something fails |
//! | `loopback` | the plugin of that name, for nodes that have none |
//!
//! The plugin is also built into `fabric-cni`, which calls it as a function: see [`crate::delegate`].

mod conf;
mod errors;
pub mod loopback;
mod netns;
mod verbs;
pub(crate) mod wiring;

use std::fs::File;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::IpAddr;
use std::path::Path;

use fabric_core::model::{IfName, MacAddr, stable_hash};
use ipnetwork::IpNetwork;
use rustix::io::Errno;
use serde_json::Value;

pub use self::conf::BridgeConf;
use self::errors::refused;
pub use self::netns::namespace;
use self::netns::sysctl;
use crate::error::{CniError, Code};
use crate::netlink::Netlink;
use crate::request::Request;
use crate::spec::{AttachmentId, Identifier};
use crate::version::SpecVersion;

/// Does what is asked, and returns what to print, if anything.
///
/// # Errors
/// What the runtime is to be told.
pub fn answer(request: &Request<BridgeConf>) -> Result<Option<Value>, CniError> {
    match request {
        Request::Version(version) => Ok(Some(SpecVersion::spoken(*version))),
        Request::Call(call) => call.answer(),
    }
}

/// The host's end of an attachment's veth: `veth` and 44 bits of a hash.
#[must_use]
pub fn port_name(network: &Identifier, id: &AttachmentId) -> IfName {
    let hash = stable_hash(format!("{network}/{}/{}", id.container, id.ifname).as_bytes());
    format!("veth{:011x}", hash >> 20).parse().expect("fifteen letters")
}

/// An address of a bridge that can't be there beside the wanted one: any other of IPv4, as pods would be sent to it,
/// and one of the same IPv6 subnet.
#[must_use]
pub fn in_the_way(other: IpNetwork, wanted: IpNetwork) -> bool {
    match (other, wanted) {
        (IpNetwork::V4(other), IpNetwork::V4(wanted)) => other != wanted,
        (IpNetwork::V6(other), IpNetwork::V6(wanted)) => other != wanted && other.overlaps(wanted),
        _ => false,
    }
}

/// Makes a bridge for pods, if there is none. Its addresses are usable at once, and its settings are in place before
/// its first port gives it a carrier.
///
/// # Errors
/// When the kernel refuses.
pub fn make(host: &mut Netlink, name: &IfName, mtu: u32) -> Result<(), CniError> {
    match host.write(&[wiring::add_bridge(name, random_mac(), mtu)]) {
        // Another ADD was faster.
        Err(e) if e.errno() != Some(Errno::EXIST) => return Err(refused(&e)),
        _ => {}
    }
    // Router advertisements of pods are not for the host; a kernel without IPv6 has neither setting.
    for setting in ["accept_ra", "accept_dad"] {
        let _ = sysctl(&format!("ipv6/conf/{name}/{setting}"), "0");
    }
    Ok(())
}

/// Has IPv6 packets that leave a pod by a gateway be no larger than `mtu`. Those of IPv4, and those to pods of the same
/// node, are as large as the interface allows.
///
/// # Errors
/// When the namespace can't be entered, or the kernel refuses.
pub fn limit_ipv6(netns: &Path, ifname: &IfName, mtu: u32) -> Result<(), CniError> {
    let unreached = |e: io::Error| {
        CniError::new(Code::Kernel, format!("cannot set the MTU of IPv6 routes in {}: {e}", netns.display()))
    };
    let mut inside = File::open(netns).and_then(|netns| netns::inside(&netns, Netlink::open)).map_err(unreached)?;
    let Some(link) = wiring::link(&mut inside, ifname).map_err(|e| refused(&e))? else { return Ok(()) };
    let routes = wiring::routes(&mut inside, link.index).map_err(|e| refused(&e))?;
    let limited = routes.iter().filter_map(|route| {
        let gateway = route.gw.filter(IpAddr::is_ipv6)?;
        Some(wiring::limit_route(link.index, ifname.as_str(), route.dst, gateway, mtu))
    });
    inside.write(&limited.collect::<Vec<_>>()).map_err(|e| refused(&e))
}

/// A locally administered address that nobody else has, but for a chance of one in 2^46.
pub(crate) fn random_mac() -> MacAddr {
    let random = RandomState::new().hash_one(std::process::id()).to_be_bytes();
    let [_, _, a, b, c, d, e, f] = random;
    MacAddr::try_from([(a | 0x02) & 0xfe, b, c, d, e, f]).expect("a unicast address with a bit set")
}

/// A netlink socket of this thread's network namespace.
///
/// # Errors
/// When there can be none.
pub fn open_netlink() -> Result<Netlink, CniError> {
    Netlink::open().map_err(|e| CniError::new(Code::Kernel, format!("cannot open a netlink socket: {e}")))
}
