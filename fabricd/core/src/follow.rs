//! [`Desired::follow`]: what a few changed leases change in what is desired.
//!
//! [`desired`](crate::plan::desired) goes through all leases, since any two of them may clash. As long as none does, a
//! lease decides its own entries and nothing else, and the rest of what is desired can stay. So this is a short cut,
//! never another answer: where it can't be taken it says so.

use crate::leases::Lease;
use crate::plan::{Desired, Inputs, NexthopIds, peer_entries, usable};
use crate::record::Backend;
use crate::state::{Routing, Via};
use crate::subnet::Subnet;

/// More changes than these are planned anew.
const FEW: usize = 64;

impl Desired {
    /// Takes over that leases went and came, a changed one being both; `inputs` has them already, and is otherwise that
    /// which `self` was made of. False when all has to be planned anew: `self` is worth nothing then.
    #[must_use]
    pub fn follow(&mut self, inputs: &Inputs<'_>, went: &[&Lease], came: &[&Lease]) -> bool {
        let clash = !self.refused.is_empty() || !self.conflicts.is_empty();
        if clash || went.len() + came.len() > FEW || went.iter().chain(came).any(|lease| lease.key == *inputs.own) {
            return false;
        }
        let devices = self.devices;
        let (went, came) = (peers(went), peers(came));
        for lease in went {
            let Backend::Vxlan(endpoints) = &lease.record.backend else { return false };
            for (family, dev) in devices.iter() {
                if let (Some(subnet), Some(endpoint)) = (lease.key.subnets().get(family), endpoints.get(family)) {
                    self.state.fdb.remove(&(*dev, endpoint.vtep_mac));
                    self.state.neighbours.remove(&(*dev, subnet.base()));
                    if let Some(Via::Nexthop(id)) = self.state.routes.remove(subnet) {
                        self.state.nexthops.remove(&id);
                    }
                }
            }
            self.peers -= 1;
        }
        let planned = self.state.nexthops.clone();
        let mut nexthop_ids = NexthopIds::beside(inputs, &planned);
        for lease in came {
            let Ok(endpoints) = usable(inputs, lease) else { return false };
            for (family, dev) in devices.iter() {
                if let (Some(subnet), Some(endpoint)) = (lease.key.subnets().get(family), endpoints.get(family)) {
                    if overlaps(&self.state, *subnet) || self.state.fdb.contains_key(&(*dev, endpoint.vtep_mac)) {
                        return false;
                    }
                    peer_entries(self, inputs, &mut nexthop_ids, *subnet, endpoint, *dev);
                }
            }
            self.peers += 1;
        }
        self.conflicts.is_empty()
    }
}

/// A placeholder is nobody.
fn peers<'a>(leases: &'a [&'a Lease]) -> impl Iterator<Item = &'a Lease> {
    leases.iter().copied().filter(|lease| !lease.record.is_placeholder())
}

/// Whether a route leads to a part of `subnet` already. Subnets nest or lie apart, so only the nearest ones can.
fn overlaps(state: &Routing, subnet: Subnet) -> bool {
    let before = state.routes.range(..=subnet).next_back();
    let after = state.routes.range(subnet..).next();
    [before, after].into_iter().flatten().any(|(other, _)| other.overlaps(subnet))
}
