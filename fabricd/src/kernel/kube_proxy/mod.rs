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
pub(super) mod names;

use std::io;

use super::nft::Filter;

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
