//! What a decision about a lease depends on, and what may be decided.

use std::net::IpAddr;
use std::time::Duration;

use super::reason::{Loss, Obstacle};
use crate::inquiry::Party;
use crate::leases::LeaseSet;
use crate::model::{MacAddr, NodeName, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::record::{Instance, LeaseKey, Record};

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
pub struct ExpiredLease {
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
    pub expired: &'a [ExpiredLease],
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
    Claim(ClaimRequest),
    /// The lease is ours and should say this instead.
    Rewrite(Record),
    /// A record of ours is in the way or no longer fits the config: claim it, give it back, then decide again.
    Withdraw(ClaimRequest),
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
pub struct ClaimRequest {
    /// The subnets.
    pub key: LeaseKey,
    /// What to say there.
    pub record: Record,
    /// What must be true of the key.
    pub expect: Expect,
    /// Guards of expired subnets that may be overwritten, because there is no other subnet: their revisions.
    pub evict: Vec<i64>,
    /// The name that this node had before: what is that name's is this node's.
    pub formerly: Option<NodeName>,
}

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

/// What the cluster says of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// The subnets that it shall have; none until the cluster has come to it.
    pub subnets: PerFamily<Subnet>,
    /// Addresses to publish instead of the node's own, for one behind NAT.
    pub public_ips: PerFamily<IpAddr>,
    /// The boot id of the machine that the cluster knows under this node's name, if it knows one.
    pub boot: Option<String>,
}
