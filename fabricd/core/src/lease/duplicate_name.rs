//! A record in this node's name that another run wrote: whether it may be taken over.
//!
//! Another run is this node before a reboot or a reinstallation, or it is another machine that lives and has the same
//! name: cloned, or never named. The record alone can't tell. So the one that holds it is asked ([`crate::inquiry`]), and
//! what its silence means depends on what else is known:
//!
//! | known | nobody answers for | why |
//! |---|---|---|
//! | the record's address is this node's now, or this very boot wrote it | [`QUICK`] | two machines don't have one address |
//! | this disk remembers that it wrote the record; nothing answers at the record's address | [`REMEMBERED`] | a reboot with another address; the original of a copied disk would answer |
//! | neither | until its lease ends | it may be cut off from the store, with pods that run |
//!
//! Who answers keeps its lease. A run that took it all the same, as older versions do, is overruled by the one that held
//! it: once and for all, since a record says whom it was taken from.

use std::net::IpAddr;
use std::time::Duration;

use super::claim::written_here;
use super::reason::{DuplicateName, Liveness, Obstacle, Place};
use super::situation::{Question, Situation, Step};
use crate::leases::Lease;

/// How long nobody may answer before a record is taken over whose address is this node's own now.
pub const QUICK: Duration = Duration::from_secs(3);

/// The same for one that this disk remembers to have written, at another address.
pub const REMEMBERED: Duration = Duration::from_secs(30);

/// Asks, or waits, while a record may be a living machine's; `None` when it may be taken over.
pub(super) fn ask_holder(now: &Situation<'_>, lease: &Lease) -> Option<Step> {
    let owner = lease.record.owner.as_ref().filter(|_| !lease.record.is_placeholder())?;
    let writer = owner.instance();
    let (same_run, at_our_address) = (writer == *now.instance, shares_address(now, lease));
    if (same_run && at_our_address) || now.overruled == Some(&writer) {
        return None;
    }
    let patience = match (same_run || at_our_address, written_here(now, lease)) {
        (true, _) => Some(QUICK),
        (false, true) => Some(REMEMBERED),
        (false, false) => None,
    };
    // An address that another node has by now says nothing about this one.
    let of_others = |ip: &IpAddr| {
        let mut others = now.leases.iter().filter(|other| other.key != lease.key);
        others.any(|other| other.record.endpoints().values().any(|e| e.public_ip == *ip))
    };
    let published: Vec<IpAddr> = lease.record.endpoints().values().map(|e| e.public_ip).collect();
    let ask_host = !same_run && !at_our_address;
    let probe: Vec<IpAddr> = published.iter().copied().filter(|ip| ask_host && !of_others(ip)).collect();
    let found = now.findings.iter().find(|found| found.revision == lease.mod_revision);
    let host_answers = found.is_some_and(|found| found.host_answers) && !probe.is_empty();
    let silent = found.map_or(Duration::ZERO, |found| found.silent);
    let answer = found.and_then(|found| found.answer.as_ref());
    if answer.is_none() && !host_answers && patience.is_some_and(|patience| silent >= patience) {
        return None;
    }
    let ends = found.and_then(|found| found.ends);
    let there = Place { addresses: published, boot: writer.boot.clone(), since: None };
    let (liveness, there) = match answer {
        Some(party) => (Liveness::Lives, Place::from(party)),
        None if host_answers && silent >= QUICK => (Liveness::HostAnswers { ends }, there),
        None if patience.is_none() && silent >= QUICK => (Liveness::Silent { ends }, there),
        None => (Liveness::Asked, there),
    };
    let here = Place {
        addresses: now.public_ips.values().copied().collect(),
        boot: now.instance.boot.clone(),
        since: Some(now.since),
    };
    let question = Question { node: owner.node.clone(), key: lease.key, revision: lease.mod_revision, probe };
    let duplicate = DuplicateName { node: owner.node.clone(), key: lease.key, there, here, liveness };
    Some(Step::Ask(question, Obstacle::SameName(Box::new(duplicate))))
}

/// True when a record has an address that this node publishes.
pub(super) fn shares_address(now: &Situation<'_>, lease: &Lease) -> bool {
    lease.record.endpoints().iter().any(|(family, e)| now.public_ips.get(family) == Some(&e.public_ip))
}
