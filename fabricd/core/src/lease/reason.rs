//! Why a node has no lease, in words for people.

use std::fmt;
use std::net::IpAddr;

use crate::inquiry::{Party, utc};
use crate::model::{Family, NodeName, Subnet};
use crate::record::{Instance, LeaseKey};

/// How a lease was lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// Expired, revoked or deleted.
    #[error("the lease of {0} is gone from the store")]
    Gone(LeaseKey),
    /// Another node's record stands there.
    #[error("the lease of {0} was taken over by {1}")]
    Taken(LeaseKey, String),
    /// Another machine of the same name has claimed it.
    #[error(
        "the lease of {key} was taken over by another machine that is called {node} too, at {there} (boot id {}); name \
         one of them differently with --node-name",
        .by.boot
    )]
    Twin {
        /// The subnets.
        key: LeaseKey,
        /// The name.
        node: NodeName,
        /// The other one's underlay addresses.
        there: String,
        /// Which run it is.
        by: Instance,
        /// Whether it says that it has taken back what this run had taken.
        back: bool,
    },
    /// Nobody has said so yet, but by the local clock it is over.
    #[error("the lease of {0} has run out, and the store can't be reached to keep it alive")]
    RunOut(LeaseKey),
    /// The cluster has assigned other subnets.
    #[error("the cluster has assigned {1} to this node instead of {0}")]
    Reassigned(LeaseKey, LeaseKey),
    /// The cluster assigns nothing to this node, or nothing that could be used: as when its Node was deleted.
    #[error("the cluster does not assign {0} to this node any more")]
    Unassigned(LeaseKey),
}

/// Why there is nothing to ask for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// Every subnet is leased.
    #[error(
        "all {capacity} {family} subnets of {network} are leased or reserved; remove leases of nodes that are gone \
         with: fabricctl lease release NODE, or widen the network"
    )]
    Exhausted {
        /// The family.
        family: Family,
        /// How many there are.
        capacity: u128,
        /// The address space.
        network: Subnet,
    },
    /// Two nodes announce one underlay address.
    #[error(
        "the public address {ip} of this node, {node}, is also that of {other}; \
         choose the underlay interface with --iface, or publish another address with --public-ip; if {other} is a \
         former name of this machine, keep it with --node-name {other}, or end its lease: fabricctl lease release {other}"
    )]
    SameAddress {
        /// The address.
        ip: IpAddr,
        /// This node.
        node: NodeName,
        /// The other one.
        other: String,
    },
    /// The cluster knows another machine under this node's name.
    #[error(
        "the kubelet that reports the Node {node} runs on another machine, or before a reboot of this one (boot id \
         {there}); this machine's boot id is {here}. If that lasts, two machines have one name: give one of them another \
         by kubelet's --hostname-override and fabricd's --node-name"
    )]
    OtherMachine {
        /// The name.
        node: NodeName,
        /// The other one's boot id.
        there: String,
        /// This one's.
        here: String,
    },
    /// Two machines have one name, or may have.
    #[error("{0}")]
    SameName(Box<DuplicateName>),
    /// The subnet is another's, and pods of this node still have addresses in it.
    #[error(
        "{key} is held by {holder} now, and pods of this node still have addresses in it; it is taken again when it \
         is free; to take another one, which cuts those pods off: fabricctl lease renumber --force"
    )]
    Occupied {
        /// The subnets.
        key: LeaseKey,
        /// Who has them.
        holder: String,
    },
    /// Attached pods have addresses in other subnets than the one that this node would have.
    #[error(
        "pods attached on this node have addresses in {}, outside of {key}, which is this node's to have: they would be \
         cut off; remove them, and ip link delete their bridge; or cut them off with: fabricctl lease renumber --force",
        list(pods)
    )]
    PodsOutside {
        /// The subnets to have.
        key: LeaseKey,
        /// The pods' addresses, and the subnets of their bridges.
        pods: Vec<Subnet>,
    },
    /// The subnet is outside the network by now, and pods of this node still have addresses in it.
    #[error(
        "{0} is no subnet of the network config any more, and pods of this node still have addresses in it; \
         to take another one, which cuts those pods off: fabricctl lease renumber --force"
    )]
    Unfit(LeaseKey),
    /// The store has lost leases, and nodes that hold subnets come first.
    #[error("the store was emptied or set back; nodes that held subnets claim them first, for two minutes")]
    Settling,
    /// The cluster has not assigned a subnet.
    #[error(
        "no {0} subnet is assigned to this node; does the controller manager run with --allocate-node-cidrs and a \
         --cluster-cidr of that family, and has the Node a podCIDR?"
    )]
    NotAssigned(Family),
    /// The subnet that is assigned is none of the network.
    #[error(
        "the subnet {subnet} that is assigned to this node lies outside the network {network}; \
         the network config and the controller manager's --cluster-cidr must agree"
    )]
    Outside {
        /// The subnet.
        subnet: Subnet,
        /// The network.
        network: Subnet,
    },
    /// Another subnet is assigned than pods of this node have addresses in.
    #[error(
        "{assigned} is assigned to this node now, and its pods still have addresses in {had}; remove those pods, or \
         cut them off with: fabricctl lease renumber --force"
    )]
    Moved {
        /// The subnets of before.
        had: LeaseKey,
        /// What is assigned.
        assigned: LeaseKey,
    },
}

impl Obstacle {
    /// True while the holder of a record in this node's name has been asked a moment ago.
    #[must_use]
    pub fn is_being_asked(&self) -> bool {
        matches!(self, Self::SameName(duplicate) if duplicate.liveness == Liveness::Asked)
    }

    /// The subnets of pods that are in the way.
    #[must_use]
    pub fn pods_of(&self) -> Option<LeaseKey> {
        match self {
            Self::Occupied { key, .. } | Self::Unfit(key) => Some(*key),
            Self::Moved { had, .. } => Some(*had),
            Self::PodsOutside { pods, .. } => LeaseKey::new(pods.iter().map(|pod| (pod.family(), *pod)).collect()),
            _ => None,
        }
    }
}

/// The first few of them.
fn list(subnets: &[Subnet]) -> String {
    const SHOWN: usize = 4;
    let one = |subnet: &Subnet| {
        let is_host = subnet.prefix_len() == subnet.family().bits();
        if is_host { subnet.base().to_string() } else { subnet.to_string() }
    };
    let shown: Vec<String> = subnets.iter().take(SHOWN).map(one).collect();
    let more = subnets.len().saturating_sub(SHOWN);
    if more == 0 { shown.join(", ") } else { format!("{} and {more} more", shown.join(", ")) }
}

/// Two runs that have one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DuplicateName {
    /// The name.
    pub node: NodeName,
    /// What the other one holds.
    pub key: LeaseKey,
    /// The other one, by its record or its own words.
    pub there: Place,
    /// This one.
    pub here: Place,
    /// What is known of the other.
    pub liveness: Liveness,
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
pub enum Liveness {
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

impl fmt::Display for DuplicateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, key, there, here, liveness } = self;
        let until = |ends: &Option<i64>| {
            ends.map_or_else(
                || "when that lease ends".to_owned(),
                |ends| format!("when that lease ends, {}", utc(ends)),
            )
        };
        match liveness {
            Liveness::Asked => write!(
                f,
                "{key} is leased to {node} at {there}, and this machine is {node} at {here}; asking whether the other \
                 one lives"
            ),
            Liveness::Lives => write!(
                f,
                "another machine that lives is called {node} too: it holds {key} at {there}, this machine is at {here}; \
                 name one of them differently with --node-name"
            ),
            Liveness::HostAnswers { ends } => write!(
                f,
                "another machine is called {node} too: it holds {key} at {there}, where a machine answers though its \
                 fabricd doesn't; this machine is at {here}. If both live, name one of them differently with \
                 --node-name; if that one is not {node} any more: fabricctl lease release {node}; else the subnet is \
                 taken {}",
                until(ends)
            ),
            Liveness::Silent { ends } => write!(
                f,
                "another machine is called {node} too: it holds {key} at {there} and doesn't answer; this machine is at \
                 {here}. If that one is gone, or was this machine before: fabricctl lease release {node}; if both live, \
                 name one of them differently with --node-name; else the subnet is taken {}",
                until(ends)
            ),
        }
    }
}
