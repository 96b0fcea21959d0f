//! Which path the packets of TCP and UDP take.

use std::net::IpAddr;

use fabric_core::state::fast_path::{FastPath, Pod};

use super::Hop;
use crate::diagnosis::Inspection;

/// The hop that says it; `None` where the fast path isn't asked for: then there is but one. `here` are those of the two
/// addresses that are pods' of this node, `there` is the address of another node's.
pub(super) fn hop(inspection: &Inspection, here: &[IpAddr], there: Option<IpAddr>) -> Option<Hop> {
    let view = &inspection.view.fast_path;
    if !view.asked {
        return None;
    }
    let observed = inspection.snapshot.observed.as_ref()?;
    let why = match view.on {
        true => slow(&observed.fast_path.state, here, there),
        false if view.reason.is_empty() => Some("the fast path is not on yet".to_owned()),
        false => Some(format!("the fast path is off: {}", view.reason)),
    };
    Some(match why {
        Some(why) => Hop::fine("path", format!("the kernel's: {why}")),
        None => Hop::fine(
            "path",
            "the fast path, for TCP and UDP; the kernel's for ICMP, fragments, and ports of these pods that lately talked to \
             a Service or the outside (docs/datapath.md; counts by reason: fabricctl status -o json)",
        ),
    })
}

/// Why all packets between these addresses take the kernel's path, by what the programs have to go by.
fn slow(there: &FastPath, here: &[IpAddr], other: Option<IpAddr>) -> Option<String> {
    let of = |ip: &IpAddr| there.addresses.get(ip).and_then(|slot| there.pods.get(slot));
    let slow_pod = |ip: &IpAddr| match of(ip) {
        Some(Pod { fast: true, .. }) => None,
        Some(_) => Some(format!("the port of {ip} has a queueing discipline, or is being made ready")),
        None => Some(format!("the programs know no pod with {ip}")),
    };
    let known = |ip: &IpAddr| there.index.keys().any(|subnet| subnet.contains(*ip));
    let peer = other.filter(|ip| !known(ip)).map(|ip| format!("the programs know no way to the node of {ip}"));
    here.iter().find_map(slow_pod).or(peer)
}

#[cfg(test)]
mod tests {
    use fabric_core::state::fast_path::{PeerSlot, PodSlot};

    use super::*;

    fn v<T: std::str::FromStr>(text: &str) -> T {
        text.parse().unwrap_or_else(|_| panic!("{text} in a test is wrong"))
    }

    #[test]
    fn what_programs_do_not_know_takes_the_kernels_path_and_why_is_said() {
        let pod = |fast| Pod {
            ifindex: 7,
            mac: v("02:42:0a:40:01:05"),
            gateway_mac: v("02:42:0a:40:01:01"),
            mtu: 1450,
            fast,
        };
        let state = FastPath {
            pods: [(PodSlot(1), pod(true)), (PodSlot(2), pod(false))].into(),
            addresses: [(v("10.64.1.5"), PodSlot(1)), (v("10.64.1.6"), PodSlot(2))].into(),
            index: [(v("10.64.2.0/24"), PeerSlot(1))].into(),
            ..FastPath::new()
        };
        let why = |here: &[&str], there: &str| {
            let here: Vec<IpAddr> = here.iter().map(|ip| v(ip)).collect();
            slow(&state, &here, (!there.is_empty()).then(|| v(there))).unwrap_or_default()
        };
        assert_eq!(why(&["10.64.1.5"], "10.64.2.9"), "");
        assert_eq!(
            why(&["10.64.1.6"], "10.64.2.9"),
            "the port of 10.64.1.6 has a queueing discipline, or is being made ready"
        );
        assert_eq!(why(&["10.64.1.5", "10.64.1.7"], ""), "the programs know no pod with 10.64.1.7");
        assert_eq!(why(&["10.64.1.5"], "10.64.3.9"), "the programs know no way to the node of 10.64.3.9");
    }
}
