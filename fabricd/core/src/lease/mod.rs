//! [`next_step`]: what a node does about its lease, given everything that it can see.
//!
//! The decision is a pure function, so that every situation can be put before it in a test. Who calls it has
//! the clock and the store.
//!
//! ```text
//!             claim, adopt                     lost: gone, taken over, run out
//!   nothing ───────────────► held, in use ───────────────────────────────────► quarantine
//!      ▲                        ▲                                               │      │
//!      │                        └──── the same subnet, as soon as it is free ◄──┘      │
//!      └──── another subnet: it is another's, and no pod is in it or a person said so ◄┘
//! ```
//!
//! In quarantine no address is handed out and what runs goes on: the subnet that a node had is had back if that can be
//! at all. A subnet whose lease has ended stays in its grace period before another node may have it, unless there is no other.

pub mod alloc;
mod assigned;
mod claim;
mod duplicate_name;
mod pod_subnets;
mod reason;
mod situation;
#[cfg(test)]
mod tests;

use self::alloc::choose;
use self::claim::{claim_of, endpoints, same_address, written_here};
pub use self::duplicate_name::{QUICK, REMEMBERED};
pub use self::reason::{DuplicateName, Liveness, Loss, Obstacle, Place};
pub use self::situation::{
    Assigned, ClaimRequest, Expect, ExpiredLease, Findings, Held, Previous, Question, Situation, Step,
};
use crate::leased_ranges::LeasedRanges;
use crate::leases::Lease;
use crate::model::{Family, NodeName, Subnet, stable_hash};
use crate::network::NetworkConfig;
use crate::record::{Backend, Instance, LeaseKey, Record};

/// How many nodes put a missing placeholder back: one may be down.
const KEEPERS_OF_A_PLACE: usize = 3;

/// What to do about the lease.
#[must_use]
pub fn next_step(now: &Situation<'_>) -> Step {
    match (now.assigned, now.held) {
        (Some(assigned), _) => assigned::next_step(now, assigned),
        (None, Some(held)) => keep(now, held),
        (None, None) => acquire(now),
    }
}

fn keep(now: &Situation<'_>, held: Held) -> Step {
    match now.leases.get(&held.key) {
        _ if held.run_out => Step::Lost(Loss::RunOut(held.key)),
        Some(lease) if lease.mod_revision == held.mod_revision && lease.record.node() == Some(now.node) => {
            let endpoints = endpoints(now, Some(lease));
            if now.leave == Some(held.key) || !fits(now.network, &held.key) {
                Step::GiveBack
            } else if lease.record.endpoints() != endpoints {
                Step::Rewrite(Record { backend: Backend::Vxlan(endpoints), ..lease.record.clone() })
            } else {
                place_to_hold(now).unwrap_or(Step::Keep)
            }
        }
        // The set shows the time before our write.
        _ if now.leases.revision() < held.mod_revision => Step::Keep,
        Some(lease) => match writer(now, lease).filter(|writer| writer != now.instance) {
            Some(by) => {
                let back = lease.record.owner.as_ref().is_some_and(|owner| owner.taken_back);
                Step::Lost(Loss::Twin { key: held.key, node: now.node.clone(), there: addresses(lease), by, back })
            }
            None => Step::Lost(Loss::Taken(held.key, lease.holder())),
        },
        None => Step::Lost(Loss::Gone(held.key)),
    }
}

fn acquire(now: &Situation<'_>) -> Step {
    // What a disk remembers under another name counts if it was this boot's, or the store shows the same; else the disk
    // was copied.
    let is_copy = |previous: &&Previous| {
        previous.formerly.is_some() && !previous.this_boot && !now.leases.iter().any(|lease| is_ours(now, lease))
    };
    let now = &Situation { previous: now.previous.filter(|previous| !is_copy(previous)), ..*now };
    let mut ours: Vec<&Lease> = now.leases.iter().map(AsRef::as_ref).filter(|lease| is_ours(now, lease)).collect();
    // The one that was had before first, then the newest.
    let had = now.previous.map(|previous| previous.key);
    ours.sort_by_key(|lease| (Some(lease.key) != had, -lease.create_revision));
    if let Some(asked) = ours.iter().find_map(|lease| duplicate_name::ask_holder(now, lease)) {
        return asked;
    }
    if let Some(obstacle) = same_address(now, &ours) {
        return Step::Wait(obstacle);
    }
    let step = match wanted(now, &ours) {
        Some(key) if fits(now.network, &key) => regain(now, &ours, key),
        _ => settle(now, &ours),
    };
    let key = match &step {
        Step::Claim(claim) => claim.key,
        Step::Adopt(held, _) => held.key,
        _ => return step,
    };
    pod_subnets::cut_off(now, &key).map_or(step, Step::Wait)
}

/// The subnets to have, if any are to be preferred: those that the pods live in, else those of before.
fn wanted(now: &Situation<'_>, ours: &[&Lease]) -> Option<LeaseKey> {
    let (pod_subnet, had) = (pod_subnets::pod_subnet(now), now.previous.map(|previous| previous.key));
    let had = had.filter(|key| now.leave != Some(*key));
    let is_pod_subnet =
        |key: &LeaseKey| pod_subnet.iter().all(|(family, subnet)| key.subnets().get(family) == Some(subnet));
    let known = had.into_iter().chain(ours.iter().map(|lease| lease.key)).find(is_pod_subnet);
    // A family without pods may have any subnet; a key of all families is needed to ask for it.
    let whole = LeaseKey::new(pod_subnet).filter(|key| key.subnets().families().eq(now.network.spaces.families()));
    if pod_subnet.is_empty() { had } else { known.or(whole) }
}

/// Tries to have these subnets.
fn regain(now: &Situation<'_>, ours: &[&Lease], key: LeaseKey) -> Step {
    // A store that was set back may show what this node held long ago: in the way of whoever has that now.
    if let Some(stale) = ours.iter().find(|lease| lease.key != key) {
        return Step::Withdraw(take(now, stale));
    }
    if let Some(lease) = ours.first() {
        return adopt(now, lease).unwrap_or_else(|| Step::Claim(take(now, lease)));
    }
    match holder(now, &key) {
        // Guards of others that rest there are no reason: the pods are here.
        None if pod_subnets::occupied(now, &key) => {
            Step::Claim(ClaimRequest { evict: resting_in(now, &key), ..claim_of(now, key, Expect::Absent, None) })
        }
        None => Step::Claim(claim_of(now, key, Expect::Absent, None)),
        Some(_) if now.settling => Step::Wait(Obstacle::Settling),
        Some(holder) if pod_subnets::occupied(now, &key) => Step::Wait(Obstacle::Occupied { key, holder }),
        Some(_) => settle(now, ours),
    }
}

/// Takes whatever subnets there are.
fn settle(now: &Situation<'_>, ours: &[&Lease]) -> Step {
    let unfit = |key: &LeaseKey| !fits(now.network, key) && now.leave != Some(*key) && pod_subnets::occupied(now, key);
    match ours.first() {
        Some(lease) if now.leave == Some(lease.key) => Step::Withdraw(take(now, lease)),
        Some(lease) if fits(now.network, &lease.key) => {
            adopt(now, lease).unwrap_or_else(|| Step::Claim(take(now, lease)))
        }
        Some(lease) if unfit(&lease.key) => Step::Wait(Obstacle::Unfit(lease.key)),
        Some(lease) => Step::Withdraw(take(now, lease)),
        None => match now.previous.map(|previous| previous.key).filter(unfit) {
            Some(key) => Step::Wait(Obstacle::Unfit(key)),
            None if now.settling && now.leave.is_none() => Step::Wait(Obstacle::Settling),
            None => fresh(now).map_or_else(Step::Wait, Step::Claim),
        },
    }
}

/// Revisions of guards in these subnets that rest.
fn resting_in(now: &Situation<'_>, key: &LeaseKey) -> Vec<i64> {
    let within = |rest: &&ExpiredLease| key.subnets().values().any(|subnet| subnet.overlaps(rest.subnet));
    now.expired.iter().filter(within).map(|lease| lease.mod_revision).collect()
}

/// True for a record in this node's name, a placeholder for it, and what flannel wrote for it: flannel knows a node by
/// its public address alone. Under another name a record is ours if this very run wrote it, or this disk remembers that
/// it did, at an address that is still ours: then the node was renamed.
fn is_ours(now: &Situation<'_>, lease: &Lease) -> bool {
    match &lease.record.owner {
        Some(owner) if owner.node == *now.node => true,
        Some(owner) => {
            let formerly = now.previous.and_then(|previous| previous.formerly.as_ref());
            let remembered = formerly == Some(&owner.node) && written_here(now, lease);
            let wrote = remembered || owner.instance() == *now.instance;
            wrote && !lease.record.is_placeholder() && duplicate_name::shares_address(now, lease)
        }
        None => {
            let endpoints = lease.record.endpoints();
            !endpoints.is_empty()
                && endpoints.iter().all(|(family, e)| now.public_ips.get(family) == Some(&e.public_ip))
        }
    }
}

/// The run of this node that wrote a record.
fn writer(now: &Situation<'_>, lease: &Lease) -> Option<Instance> {
    let owner =
        lease.record.owner.as_ref().filter(|owner| owner.node == *now.node && !lease.record.is_placeholder())?;
    Some(owner.instance())
}

fn addresses(lease: &Lease) -> String {
    let addresses: Vec<String> = lease.record.endpoints().values().map(|e| e.public_ip.to_string()).collect();
    addresses.join(" and ")
}

/// True when the config still has room for this lease, in all of its families and no other. Its first and last subnet
/// are for new leases alone: a node keeps what it has.
fn fits(network: &NetworkConfig, key: &LeaseKey) -> bool {
    Family::ALL.into_iter().all(|family| match (network.spaces.get(family), key.subnets().get(family)) {
        (Some(space), Some(subnet)) => space.network.covers(*subnet) && subnet.prefix_len() == space.subnet_len,
        (None, None) => true,
        _ => false,
    })
}

/// Who else has any of `key`, by lease or reservation.
fn holder(now: &Situation<'_>, key: &LeaseKey) -> Option<String> {
    let overlaps = |other: &LeaseKey| {
        key.subnets().iter().any(|(family, subnet)| other.subnets().get(family).is_some_and(|s| s.overlaps(*subnet)))
    };
    let leased = now.leases.iter().find(|lease| overlaps(&lease.key)).map(|lease| lease.holder());
    leased.or_else(|| {
        let mut reserved = now.leases.reservations().iter().filter(|(_, node)| *node != now.node);
        reserved.find(|(key, _)| overlaps(key)).map(|(_, node)| node.to_string())
    })
}

/// The record of before a restart, as long as it says what it should: then nothing is written at all.
fn adopt(now: &Situation<'_>, lease: &Lease) -> Option<Step> {
    let owner = lease.record.owner.as_ref()?;
    let (same_run, as_written) = (owner.instance() == *now.instance, written_here(now, lease));
    let held = Held { key: lease.key, mod_revision: lease.mod_revision, run_out: false };
    (same_run && as_written && owner.node == *now.node && lease.record.endpoints() == endpoints(now, Some(lease)))
        .then(|| Step::Adopt(held, lease.record.clone()))
}

/// A subnet for a node that has none: one that is reserved for it, else one that doesn't rest, else any; the one that it
/// was told to leave only when there is no other at all.
fn fresh(now: &Situation<'_>) -> Result<ClaimRequest, Obstacle> {
    let seed = stable_hash(now.node.as_str().as_bytes());
    let others = |family| {
        let reserved = now.leases.reservations().iter().filter(|(_, node)| *node != now.node).map(|(key, _)| key);
        now.leases.subnets(family).chain(reserved.filter_map(move |key| key.subnets().get(family).copied()))
    };
    let expired: Vec<&ExpiredLease> =
        now.expired.iter().filter(|lease| lease.node.as_ref() != Some(now.node)).collect();
    let pod_subnet = pod_subnets::pod_subnet(now);
    let had = LeaseKey::new(pod_subnet).or_else(|| now.previous.map(|previous| previous.key));
    let reserved = now.leases.reservations().iter().find(|(_, node)| *node == now.node).map(|(key, _)| *key);
    let preferred = if pod_subnet.is_empty() { reserved.or(had) } else { had };
    let subnets = now.network.spaces.try_map(|family, space| {
        let preferred = preferred.and_then(|key| key.subnets().get(family).copied());
        let at_rest = || expired.iter().map(|lease| lease.subnet).filter(|subnet| subnet.family() == family);
        let left = || now.leave.and_then(|key| key.subnets().get(family).copied());
        let free = |others: &mut dyn Iterator<Item = Subnet>| {
            choose(space, &LeasedRanges::new(space, others), preferred, seed)
        };
        free(&mut others(family).chain(left()).chain(at_rest()))
            .or_else(|| free(&mut others(family).chain(left())))
            .or_else(|| free(&mut others(family)))
            .ok_or(Obstacle::Exhausted { family, capacity: space.capacity(), network: space.network })
    })?;
    let in_the_way = expired.iter().filter(|rest| subnets.values().any(|subnet| subnet.overlaps(rest.subnet)));
    let evict = in_the_way.map(|lease| lease.mod_revision).collect();
    let key = LeaseKey::new(subnets).expect("a valid config has a family");
    Ok(ClaimRequest { evict, ..claim_of(now, key, Expect::Absent, None) })
}

/// A reserved subnet without any record, if this node is among those that see to it.
fn place_to_hold(now: &Situation<'_>) -> Option<Step> {
    let is_free = |key: &LeaseKey| {
        let subnets = key.subnets();
        let mut leased = subnets.families().flat_map(|family| now.leases.subnets(family));
        !leased.any(|leased| subnets.values().any(|subnet| subnet.overlaps(leased)))
    };
    let rank = |key: &LeaseKey, node: &NodeName| stable_hash(format!("{} {node}", key.encode()).as_bytes());
    let among_the_first = |key: &LeaseKey| {
        let nodes = now.leases.iter().filter(|lease| !lease.record.is_placeholder()).filter_map(|l| l.record.node());
        nodes.filter(|node| rank(key, node) < rank(key, now.node)).count() < KEEPERS_OF_A_PLACE
    };
    let (key, node) = now.leases.reservations().iter().find(|(key, _)| is_free(key) && among_the_first(key))?;
    Some(Step::HoldPlace(*key, Record::placeholder(node, key)))
}

/// A claim of a record that is this node's to take over.
fn take(now: &Situation<'_>, lease: &Lease) -> ClaimRequest {
    claim_of(now, lease.key, Expect::Revision(lease.mod_revision), Some(lease))
}
