//! What a node does about a lease whose subnets the cluster assigns, as Kubernetes does with a Node's podCIDRs.
//!
//! The assignment alone says whose a subnet is. So there is no race to win, nothing ends, and a record that somebody
//! changed or erased is no loss: it is written again.
//!
//! ```text
//!   nothing ──── assigned ────► held, in use ◄──── record changed or erased: written again
//!      ▲                           │
//!      │                           │ assigned another subnet, or none any more
//!      │                           ▼
//!      └─ no pod is in the old ─ quarantine
//! ```

use super::claim::{claim_of, endpoints, same_address};
use super::pod_subnets;
use super::reason::{Loss, Obstacle};
use super::situation::{Assigned, ClaimRequest, Expect, Held, Situation, Step};
use crate::leases::Lease;
use crate::record::LeaseKey;

pub(super) fn next_step(now: &Situation<'_>, assigned: &Assigned) -> Step {
    let public_ips = now.public_ips.map(|family, ip| assigned.public_ips.get(family).copied().unwrap_or(*ip));
    let now = &Situation { public_ips: &public_ips, ..*now };
    match (key(now, assigned), now.held) {
        (Ok(key), Some(held)) => keep(now, held, key),
        (Ok(key), None) => anothers(now, assigned).map_or_else(|| acquire(now, key), Step::Wait),
        (Err(_), Some(held)) => Step::Lost(Loss::Unassigned(held.key)),
        (Err(obstacle), None) => Step::Wait(obstacle),
    }
}

/// The subnets to hold: of the families that the network has, and within it. How large they are is the cluster's affair.
fn key(now: &Situation<'_>, assigned: &Assigned) -> Result<LeaseKey, Obstacle> {
    let subnets = now.network.spaces.try_map(|family, space| {
        let subnet = assigned.subnets.get(family).copied().ok_or(Obstacle::NotAssigned(family))?;
        let network = space.network;
        if network.covers(subnet) { Ok(subnet) } else { Err(Obstacle::Outside { subnet, network }) }
    })?;
    Ok(LeaseKey::new(subnets).expect("a valid config has a family"))
}

fn keep(now: &Situation<'_>, held: Held, key: LeaseKey) -> Step {
    match now.leases.get(&key) {
        _ if held.key != key => Step::Lost(Loss::Reassigned(held.key, key)),
        // Of a record that can't be read any more the last good one is shown.
        Some(lease) if is_readable(now, &key) && lease.record.endpoints() == endpoints(now, Some(lease)) => Step::Keep,
        // The set shows the time before our write.
        _ if now.leases.revision() < held.mod_revision => Step::Keep,
        lease => Step::Rewrite(publish(now, key, lease.map(AsRef::as_ref)).record),
    }
}

/// Another machine of the same name, which the cluster takes for this node.
fn anothers(now: &Situation<'_>, assigned: &Assigned) -> Option<Obstacle> {
    let there = assigned.boot.clone().filter(|boot| *boot != now.instance.boot)?;
    Some(Obstacle::OtherMachine { node: now.node.clone(), there, here: now.instance.boot.clone() })
}

fn is_readable(now: &Situation<'_>, key: &LeaseKey) -> bool {
    !now.leases.unreadable().contains_key(&key.encode())
}

fn acquire(now: &Situation<'_>, key: LeaseKey) -> Step {
    let ours: Vec<&Lease> = now.leases.of_node(now.node).map(AsRef::as_ref).into_iter().collect();
    if let Some(obstacle) = same_address(now, &ours) {
        return Step::Wait(obstacle);
    }
    if pod_subnets::pods_outside(now, &key).is_empty() {
        return Step::Claim(publish(now, key, now.leases.get(&key).map(AsRef::as_ref)));
    }
    match now.previous.map(|previous| previous.key).filter(|had| *had != key) {
        Some(had) if pod_subnets::occupied(now, &had) => Step::Wait(Obstacle::Moved { had, assigned: key }),
        _ => pod_subnets::cut_off(now, &key).map_or(Step::Keep, Step::Wait),
    }
}

fn publish(now: &Situation<'_>, key: LeaseKey, before: Option<&Lease>) -> ClaimRequest {
    let expect = before.map_or(Expect::Absent, |lease| Expect::Revision(lease.mod_revision));
    claim_of(now, key, expect, before)
}
