//! What a node says of itself in its record, and the claim of one.

use super::reason::Obstacle;
use super::situation::{ClaimRequest, Expect, Situation};
use crate::leases::Lease;
use crate::model::{MacAddr, PerFamily};
use crate::record::{Backend, Endpoint, LeaseKey, Owner, Record};

/// How peers reach this node. A VTEP keeps the MAC address that it once had, or that was published for it.
pub(super) fn endpoints(now: &Situation<'_>, published: Option<&Lease>) -> PerFamily<Endpoint> {
    let vni = now.network.vxlan.vni;
    let published = published.map(|lease| lease.record.endpoints()).unwrap_or_default();
    let remembered = now.previous.map(|previous| previous.vtep_macs).unwrap_or_default();
    now.public_ips.map(|family, public_ip| {
        let known = remembered.get(family).copied().or_else(|| Some(published.get(family)?.vtep_mac));
        let vtep_mac = known.unwrap_or_else(|| MacAddr::derived(now.node, vni, family));
        Endpoint { public_ip: *public_ip, vtep_mac, vni }
    })
}

/// A claim of `key`. What the record there says today, `before`, stays where we have nothing to say.
pub(super) fn claim_of(now: &Situation<'_>, key: LeaseKey, expect: Expect, before: Option<&Lease>) -> ClaimRequest {
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
    ClaimRequest { key, record, expect, evict: vec![], formerly: formerly.filter(|name| name != now.node) }
}

/// True for a record that is as this node's disk remembers to have written it.
pub(super) fn written_here(now: &Situation<'_>, lease: &Lease) -> bool {
    now.previous.is_some_and(|previous| previous.key == lease.key && previous.written == Some(lease.mod_revision))
}

/// Another node that publishes an address of this one.
pub(super) fn same_address(now: &Situation<'_>, ours: &[&Lease]) -> Option<Obstacle> {
    let others = now.leases.iter().filter(|lease| ours.iter().all(|ours| ours.key != lease.key));
    let mut clashes = others.filter_map(|lease| {
        let endpoints = lease.record.endpoints();
        let (_, endpoint) = endpoints.iter().find(|(family, e)| now.public_ips.get(*family) == Some(&e.public_ip))?;
        Some(Obstacle::SameAddress { ip: endpoint.public_ip, node: now.node.clone(), other: lease.holder() })
    });
    clashes.next()
}
