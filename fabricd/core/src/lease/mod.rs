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
mod homes;
mod reason;
mod rival;
#[cfg(test)]
mod tests;

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use self::alloc::{Taken, choose};
pub use self::assigned::Assigned;
pub use self::reason::{Loss, Obstacle};
pub use self::rival::{Findings, Life, Place, QUICK, Question, REMEMBERED, Rivals};
use crate::leases::{Lease, LeaseSet};
use crate::model::{Family, MacAddr, NodeName, PerFamily, Subnet, stable_hash};
use crate::network::NetworkConfig;
use crate::record::{Backend, Endpoint, LeaseKey, Owner, Record};

/// How many nodes put a missing placeholder back: one may be down.
const KEEPERS_OF_A_PLACE: usize = 3;

/// What tells one run of a node from another that has its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
    /// Inode of the network namespace: nodes on one machine share its boot id.
    pub netns: u64,
}

/// A lease as its holder remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its subnets.
    pub key: LeaseKey,
    /// Revision of our last write: any later one is somebody else's.
    pub mod_revision: i64,
    /// True when by the local monotonic clock the lease has ended.
    pub run_out: bool,
}

/// The lease that a node had before: what is to be had back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Previous {
    /// Its subnets.
    pub key: LeaseKey,
    /// The addresses of the node's VXLAN devices: they stay for the life of the node.
    pub vtep_macs: PerFamily<MacAddr>,
    /// The number of the claim.
    pub epoch: u64,
    /// Revision of the node's last write, if it can be known: a record with it is this node's own.
    pub written: Option<i64>,
    /// The name that it was held under, where that was another.
    pub formerly: Option<NodeName>,
    /// True when it was held in this very boot of the machine.
    pub this_boot: bool,
}

/// A subnet whose lease has ended while its guard still stands: it is kept for the node that had it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resting {
    /// The subnet.
    pub subnet: Subnet,
    /// The node that had it; nothing is known of one whose name can't be read.
    pub node: Option<NodeName>,
    /// Revision of the guard.
    pub mod_revision: i64,
}

/// The state of a key that a claim is decided on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Nobody has it, nor its IPv4 subnet in another pair.
    Absent,
    /// It was last changed at this revision, and is ours to take over.
    Revision(i64),
}

/// All that a decision depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// This node.
    pub node: &'a NodeName,
    /// This run of it.
    pub instance: &'a Instance,
    /// The cluster's config.
    pub network: &'a NetworkConfig,
    /// Everybody's leases.
    pub leases: &'a LeaseSet,
    /// The addresses that peers send to, one for each family of the network.
    pub public_ips: &'a PerFamily<IpAddr>,
    /// The lease that is held.
    pub held: Option<Held>,
    /// The lease of before.
    pub previous: Option<&'a Previous>,
    /// When this node's daemon started, in seconds of Unix time.
    pub since: i64,
    /// The run that took the lease from this one although this one lived: it is overruled.
    pub overruled: Option<&'a Instance>,
    /// What is known of runs that wrote records in this node's name.
    pub findings: &'a [Findings],
    /// Where attached pods of this node have addresses: each one's, and the subnets of bridges that they are on.
    pub pods: &'a [Subnet],
    /// Subnets that a person told this node to leave.
    pub leave: Option<LeaseKey>,
    /// What pods had that a person has cut off by that: addresses and subnets.
    pub left: &'a [Subnet],
    /// True for a while after the store was emptied or set back.
    pub settling: bool,
    /// Subnets that rest, as far as that was asked for.
    pub resting: &'a [Resting],
    /// What the cluster assigns to this node, where nodes don't choose for themselves.
    pub assigned: Option<&'a Assigned>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: the lease is ours and says what it should.
    Keep,
    /// The record is the one that this node wrote before it was started again: keep it alive, and that is all.
    Adopt(Held, Record),
    /// Ask the store for this.
    Claim(Bid),
    /// The lease is ours and should say this instead.
    Rewrite(Record),
    /// A record of ours is in the way or no longer fits the config: claim it, give it back, then decide again.
    Withdraw(Bid),
    /// Give back the lease that is held, then decide again.
    GiveBack,
    /// The lease that we held is not ours any more. Stop handing out addresses, then decide again without it.
    Lost(Loss),
    /// A reserved subnet has no record while its node is away: put a placeholder there.
    HoldPlace(LeaseKey, Record),
    /// A record of ours may be a living machine's: ask it. Until that is known there is nothing to ask the store for.
    Ask(Question, Obstacle),
    /// There is nothing to ask for, until something changes.
    Wait(Obstacle),
}

/// What to ask the store for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bid {
    /// The subnets.
    pub key: LeaseKey,
    /// What to say there.
    pub record: Record,
    /// What must be true of the key.
    pub expect: Expect,
    /// Guards of resting subnets that may be overwritten, because there is no other subnet: their revisions.
    pub evict: Vec<i64>,
    /// The name that this node had before: what is that name's is this node's.
    pub formerly: Option<NodeName>,
}

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
    if let Some(contested) = ours.iter().find_map(|lease| rival::contest(now, lease)) {
        return contested;
    }
    if let Some(obstacle) = same_address(now, &ours) {
        return Step::Wait(obstacle);
    }
    let step = match wanted(now, &ours) {
        Some(key) if fits(now.network, &key) => regain(now, &ours, key),
        _ => settle(now, &ours),
    };
    let key = match &step {
        Step::Claim(bid) => bid.key,
        Step::Adopt(held, _) => held.key,
        _ => return step,
    };
    homes::cut_off(now, &key).map_or(step, Step::Wait)
}

/// The subnets to have, if any are to be preferred: those that the pods live in, else those of before.
fn wanted(now: &Situation<'_>, ours: &[&Lease]) -> Option<LeaseKey> {
    let (home, had) = (homes::home(now), now.previous.map(|previous| previous.key));
    let had = had.filter(|key| now.leave != Some(*key));
    let is_home = |key: &LeaseKey| home.iter().all(|(family, subnet)| key.subnets().get(family) == Some(subnet));
    let known = had.into_iter().chain(ours.iter().map(|lease| lease.key)).find(is_home);
    // A family without pods may have any subnet; a key of all families is needed to ask for it.
    let whole = LeaseKey::new(home).filter(|key| key.subnets().families().eq(now.network.spaces.families()));
    if home.is_empty() { had } else { known.or(whole) }
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
        None if homes::occupied(now, &key) => {
            Step::Claim(Bid { evict: resting_in(now, &key), ..bid(now, key, Expect::Absent, None) })
        }
        None => Step::Claim(bid(now, key, Expect::Absent, None)),
        Some(_) if now.settling => Step::Wait(Obstacle::Settling),
        Some(holder) if homes::occupied(now, &key) => Step::Wait(Obstacle::Occupied { key, holder }),
        Some(_) => settle(now, ours),
    }
}

/// Takes whatever subnets there are.
fn settle(now: &Situation<'_>, ours: &[&Lease]) -> Step {
    let unfit = |key: &LeaseKey| !fits(now.network, key) && now.leave != Some(*key) && homes::occupied(now, key);
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
    let within = |rest: &&Resting| key.subnets().values().any(|subnet| subnet.overlaps(rest.subnet));
    now.resting.iter().filter(within).map(|rest| rest.mod_revision).collect()
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
            wrote && !lease.record.is_placeholder() && rival::shares_address(now, lease)
        }
        None => {
            let endpoints = lease.record.endpoints();
            !endpoints.is_empty()
                && endpoints.iter().all(|(family, e)| now.public_ips.get(family) == Some(&e.public_ip))
        }
    }
}

/// True for a record that is as this node's disk remembers to have written it.
fn written_here(now: &Situation<'_>, lease: &Lease) -> bool {
    now.previous.is_some_and(|previous| previous.key == lease.key && previous.written == Some(lease.mod_revision))
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

fn same_address(now: &Situation<'_>, ours: &[&Lease]) -> Option<Obstacle> {
    let others = now.leases.iter().filter(|lease| ours.iter().all(|ours| ours.key != lease.key));
    let mut clashes = others.filter_map(|lease| {
        let endpoints = lease.record.endpoints();
        let (_, endpoint) = endpoints.iter().find(|(family, e)| now.public_ips.get(*family) == Some(&e.public_ip))?;
        Some(Obstacle::SameAddress { ip: endpoint.public_ip, node: now.node.clone(), other: lease.holder() })
    });
    clashes.next()
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
fn fresh(now: &Situation<'_>) -> Result<Bid, Obstacle> {
    let seed = stable_hash(now.node.as_str().as_bytes());
    let others = |family| {
        let reserved = now.leases.reservations().iter().filter(|(_, node)| *node != now.node).map(|(key, _)| key);
        now.leases.subnets(family).chain(reserved.filter_map(move |key| key.subnets().get(family).copied()))
    };
    let resting: Vec<&Resting> = now.resting.iter().filter(|rest| rest.node.as_ref() != Some(now.node)).collect();
    let home = homes::home(now);
    let had = LeaseKey::new(home).or_else(|| now.previous.map(|previous| previous.key));
    let reserved = now.leases.reservations().iter().find(|(_, node)| *node == now.node).map(|(key, _)| *key);
    let preferred = if home.is_empty() { reserved.or(had) } else { had };
    let subnets = now.network.spaces.try_map(|family, space| {
        let preferred = preferred.and_then(|key| key.subnets().get(family).copied());
        let at_rest = || resting.iter().map(|rest| rest.subnet).filter(|subnet| subnet.family() == family);
        let left = || now.leave.and_then(|key| key.subnets().get(family).copied());
        let free =
            |others: &mut dyn Iterator<Item = Subnet>| choose(space, &Taken::new(space, others), preferred, seed);
        free(&mut others(family).chain(left()).chain(at_rest()))
            .or_else(|| free(&mut others(family).chain(left())))
            .or_else(|| free(&mut others(family)))
            .ok_or(Obstacle::Exhausted { family, capacity: space.capacity(), network: space.network })
    })?;
    let in_the_way = resting.iter().filter(|rest| subnets.values().any(|subnet| subnet.overlaps(rest.subnet)));
    let evict = in_the_way.map(|rest| rest.mod_revision).collect();
    let key = LeaseKey::new(subnets).expect("a valid config has a family");
    Ok(Bid { evict, ..bid(now, key, Expect::Absent, None) })
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

/// How peers reach this node. A VTEP keeps the MAC address that it once had, or that was published for it.
fn endpoints(now: &Situation<'_>, published: Option<&Lease>) -> PerFamily<Endpoint> {
    let vni = now.network.vxlan.vni;
    let published = published.map(|lease| lease.record.endpoints()).unwrap_or_default();
    let remembered = now.previous.map(|previous| previous.vtep_macs).unwrap_or_default();
    now.public_ips.map(|family, public_ip| {
        let known = remembered.get(family).copied().or_else(|| Some(published.get(family)?.vtep_mac));
        let vtep_mac = known.unwrap_or_else(|| MacAddr::derived(now.node, vni, family));
        Endpoint { public_ip: *public_ip, vtep_mac, vni }
    })
}

/// A claim of a record that is this node's to take over.
fn take(now: &Situation<'_>, lease: &Lease) -> Bid {
    bid(now, lease.key, Expect::Revision(lease.mod_revision), Some(lease))
}

/// A claim of `key`. What the record there says today, `before`, stays where we have nothing to say.
fn bid(now: &Situation<'_>, key: LeaseKey, expect: Expect, before: Option<&Lease>) -> Bid {
    let endpoints = endpoints(now, before);
    let before = before.map(|lease| &lease.record);
    let owner = before.and_then(|record| record.owner.as_ref());
    let remembered = now.previous.map_or(0, |previous| previous.epoch);
    let writer = owner.filter(|_| before.is_some_and(|record| !record.is_placeholder())).map(Owner::instance);
    // Who takes back what was taken from it has taken it from nobody, and says so.
    let (taken_from, taken_back) = match writer {
        Some(writer) if writer == *now.instance => {
            owner.map_or((None, false), |owner| (owner.taken_from.clone(), owner.taken_back))
        }
        Some(writer) if now.overruled == Some(&writer) => (None, true),
        writer => (writer, false),
    };
    let formerly = owner.map(|owner| owner.node.clone()).or_else(|| now.previous?.formerly.clone());
    let owner = Owner {
        version: Owner::VERSION,
        node: now.node.clone(),
        boot: now.instance.boot.clone(),
        netns: now.instance.netns,
        epoch: owner.map_or(0, |owner| owner.epoch).max(remembered) + 1,
        taken_from,
        taken_back,
        unknown: owner.map(|owner| owner.unknown.clone()).unwrap_or_default(),
    };
    let unknown = before.map(|record| record.unknown.clone()).unwrap_or_default();
    let record = Record { backend: Backend::Vxlan(endpoints), owner: Some(owner), unknown };
    Bid { key, record, expect, evict: vec![], formerly: formerly.filter(|name| name != now.node) }
}
