//! [`Pending`]: which peers are touched by writes that failed.

use std::collections::BTreeMap;
use std::net::IpAddr;

use fabric_core::diff::{Key, Op, routing};
use fabric_core::leases::Lease;
use fabric_core::model::{MacAddr, Subnet};
use fabric_core::plan::Conflict;

/// Failed writes by what they have in common with a peer's lease.
#[derive(Debug, Default)]
pub struct Pending {
    subnets: BTreeMap<Subnet, String>,
    overlay: BTreeMap<IpAddr, String>,
    macs: BTreeMap<MacAddr, String>,
    everything: Option<String>,
}

impl Pending {
    /// Sorts failed writes, each with the reason, and conflicts with what is not ours.
    #[must_use]
    pub fn new(failures: &[(Op, String)], conflicts: &[Conflict]) -> Self {
        let mut pending = Self::default();
        for (op, why) in failures.iter().filter(|(op, _)| !op.is_delete()) {
            match (op, op.key()) {
                (_, Key::Route(subnet)) => drop(pending.subnets.insert(subnet, why.clone())),
                (_, Key::Neighbour(_, ip)) => drop(pending.overlay.insert(ip, why.clone())),
                (Op::Routing(routing::Op::Nexthop(_, change)), _) => {
                    pending.overlay.extend(change.wanted().map(|nexthop| (nexthop.gateway, why.clone())));
                }
                (_, Key::Fdb(_, mac)) => drop(pending.macs.insert(mac, why.clone())),
                _ => {}
            }
        }
        for conflict in conflicts {
            match conflict {
                Conflict::Route { dst, .. } => drop(pending.subnets.insert(*dst, conflict.to_string())),
                // Without a device of ours nobody is reached.
                Conflict::Name { .. } | Conflict::Vni { .. } => pending.everything = Some(conflict.to_string()),
            }
        }
        pending
    }

    /// True when no peer is touched.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.subnets.is_empty() && self.overlay.is_empty() && self.macs.is_empty() && self.everything.is_none()
    }

    /// Why this peer is not fully programmed, the lowest cause first; `None` when it is.
    #[must_use]
    pub fn reason(&self, lease: &Lease) -> Option<&str> {
        let endpoints = lease.record.endpoints();
        let reason = lease.key.subnets().iter().find_map(|(family, subnet)| {
            let by_mac = endpoints.get(family).and_then(|endpoint| self.macs.get(&endpoint.vtep_mac));
            by_mac.or_else(|| self.overlay.get(&subnet.base())).or_else(|| self.subnets.get(subnet))
        });
        reason.or(self.everything.as_ref()).map(String::as_str)
    }
}
