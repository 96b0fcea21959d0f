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

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use super::{Obstacle, Situation, Step, written_here};
use crate::inquiry::{Party, utc};
use crate::leases::Lease;
use crate::model::NodeName;
use crate::record::LeaseKey;

/// How long nobody may answer before a record is taken over whose address is this node's own now.
pub const QUICK: Duration = Duration::from_secs(3);

/// The same for one that this disk remembers to have written, at another address.
pub const REMEMBERED: Duration = Duration::from_secs(30);

/// What is known so far of the run that wrote a record.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Revision of the record.
    pub revision: i64,
    /// Its answer.
    pub answer: Option<Party>,
    /// For how long questions have gone unanswered.
    pub silent: Duration,
    /// True when some machine answers at the record's address.
    pub host_answers: bool,
    /// When its lease ends unless it is kept alive, in seconds of Unix time; `None` when that isn't known.
    pub ends: Option<i64>,
}

/// Whom to ask about a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The name in the record: this node's, or the one that it had before.
    pub node: NodeName,
    /// Its subnets.
    pub key: LeaseKey,
    /// Its revision.
    pub revision: i64,
    /// Addresses at which it is to be seen whether any machine answers.
    pub probe: Vec<IpAddr>,
}

/// Two runs that have one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rivals {
    /// The name.
    pub node: NodeName,
    /// What the other one holds.
    pub key: LeaseKey,
    /// The other one, by its record or its own words.
    pub there: Place,
    /// This one.
    pub here: Place,
    /// What is known of the other.
    pub life: Life,
}

/// A machine, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its underlay addresses.
    pub addresses: Vec<IpAddr>,
    /// Its boot id.
    pub boot: String,
    /// When its daemon started, in seconds of Unix time.
    pub since: Option<i64>,
}

/// Whether the other machine lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Life {
    /// It has been asked a moment ago.
    Asked,
    /// It said so.
    Lives,
    /// Its daemon says nothing, and a machine answers at its address.
    HostAnswers {
        /// When its lease ends.
        ends: Option<i64>,
    },
    /// Nothing answers.
    Silent {
        /// When its lease ends.
        ends: Option<i64>,
    },
}

/// Asks, or waits, while a record may be a living machine's; `None` when it may be taken over.
pub(super) fn contest(now: &Situation<'_>, lease: &Lease) -> Option<Step> {
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
    let (life, there) = match answer {
        Some(party) => (Life::Lives, Place::from(party)),
        None if host_answers && silent >= QUICK => (Life::HostAnswers { ends }, there),
        None if patience.is_none() && silent >= QUICK => (Life::Silent { ends }, there),
        None => (Life::Asked, there),
    };
    let here = Place {
        addresses: now.public_ips.values().copied().collect(),
        boot: now.instance.boot.clone(),
        since: Some(now.since),
    };
    let question = Question { node: owner.node.clone(), key: lease.key, revision: lease.mod_revision, probe };
    let rivals = Rivals { node: owner.node.clone(), key: lease.key, there, here, life };
    Some(Step::Ask(question, Obstacle::SameName(Box::new(rivals))))
}

/// True when a record has an address that this node publishes.
pub(super) fn shares_address(now: &Situation<'_>, lease: &Lease) -> bool {
    lease.record.endpoints().iter().any(|(family, e)| now.public_ips.get(family) == Some(&e.public_ip))
}

impl From<&Party> for Place {
    fn from(party: &Party) -> Self {
        Self { addresses: party.addresses.clone(), boot: party.instance.boot.clone(), since: Some(party.since) }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        write!(f, "{} (boot id {}", addresses.join(" and "), self.boot)?;
        match self.since {
            Some(since) => write!(f, ", fabricd started {})", utc(since)),
            None => f.write_str(")"),
        }
    }
}

impl fmt::Display for Rivals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, key, there, here, life } = self;
        let until = |ends: &Option<i64>| {
            ends.map_or_else(
                || "when that lease ends".to_owned(),
                |ends| format!("when that lease ends, {}", utc(ends)),
            )
        };
        match life {
            Life::Asked => write!(
                f,
                "{key} is leased to {node} at {there}, and this machine is {node} at {here}; asking whether the other \
                 one lives"
            ),
            Life::Lives => write!(
                f,
                "another machine that lives is called {node} too: it holds {key} at {there}, this machine is at {here}; \
                 name one of them differently with --node-name"
            ),
            Life::HostAnswers { ends } => write!(
                f,
                "another machine is called {node} too: it holds {key} at {there}, where a machine answers though its \
                 fabricd doesn't; this machine is at {here}. If both live, name one of them differently with \
                 --node-name; if that one is not {node} any more: fabricctl lease release {node}; else the subnet is \
                 taken {}",
                until(ends)
            ),
            Life::Silent { ends } => write!(
                f,
                "another machine is called {node} too: it holds {key} at {there} and doesn't answer; this machine is at \
                 {here}. If that one is gone, or was this machine before: fabricctl lease release {node}; if both live, \
                 name one of them differently with --node-name; else the subnet is taken {}",
                until(ends)
            ),
        }
    }
}
