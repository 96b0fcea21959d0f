//! What kube-proxy has in the kernel, in whichever mode it ran: found, and removed once another translates Services in its
//! place.
//!
//! | mode | what | where |
//! |---|---|---|
//! | nftables | the tables `kube-proxy` | `nft/kube_proxy.rs` |
//! | iptables, by nftables | chains `KUBE-…`, and what leads to them | the same |
//! | iptables-legacy | the same | [`legacy`] |
//! | IPVS | the interface `kube-ipvs0`, virtual servers, sets `KUBE-…`; and chains as above | [`ipvs`] |

mod ipvs;
mod legacy;

use std::io;

use super::nft::Filter;

/// What its chains of iptables and its sets of `ipset` begin with.
const ITS: &str = "KUBE-";
/// Those of kubelet, which stay (kubernetes/pkg/kubelet/kubelet_network_linux.go).
const OF_KUBELET: [&str; 4] = ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-MARK-DROP"];

/// Tables of iptables in which it has chains.
pub(super) const IPTABLES: [&str; 4] = ["mangle", "nat", "filter", "raw"];
/// The chain of the table `nat` that it has in each of its modes by iptables.
pub(super) const SERVICES: &str = "KUBE-SERVICES";

/// Whether a chain of iptables is kube-proxy's.
pub(super) fn is_its_chain(name: &str) -> bool {
    name.starts_with(ITS) && !OF_KUBELET.contains(&name)
}

/// What is there of kube-proxy, in words; nothing where it isn't and wasn't. Of a part that can't be read nothing is there,
/// and the others count.
#[must_use]
pub fn found() -> Vec<&'static str> {
    let places = [
        (Filter::open().is_ok_and(|mut filter| filter.has_kube_proxy()), "nftables or iptables-nft"),
        (legacy::is_here().unwrap_or_default(), "iptables-legacy"),
        (ipvs::is_here(), "IPVS"),
    ];
    places.into_iter().filter(|(is_there, _)| *is_there).map(|(_, place)| place).collect()
}

/// Removes all of it, and says in words what there was. What is another's stays.
///
/// # Errors
/// When it can't be read, or the kernel refuses; the rest is tried all the same.
pub fn remove() -> io::Result<Vec<String>> {
    // Chains look into sets, so these go last.
    let all = [Filter::open().and_then(|mut filter| filter.remove_kube_proxy()), legacy::remove(), ipvs::remove()];
    let mut removed = vec![];
    for part in all {
        removed.extend(part?);
    }
    Ok(removed)
}
