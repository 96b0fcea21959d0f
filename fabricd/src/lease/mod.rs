//! This node's lease: what it should say, what is held, and the task that sees to both.

mod keeper;

use std::net::IpAddr;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::holding::Instance;
use fabric_core::model::{NodeName, PerFamily};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{Endpoint, LeaseKey};
use tokio::sync::oneshot;
use tokio::time::Instant;

pub use self::keeper::{Keeper, SETTLING};
use crate::ipam::NodePods;

/// What the reconcile loop wants the lease to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The config in force.
    pub network: NetworkConfig,
    /// The addresses that peers send to, one for each family of the network.
    pub public_ips: PerFamily<IpAddr>,
}

/// The subnets that this node acts as the owner of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Own {
    /// The subnets.
    pub key: LeaseKey,
    /// How peers reach them.
    pub endpoints: PerFamily<Endpoint>,
    /// Rises with every claim.
    pub epoch: u64,
}

/// By what a record is known again as this node's own, after a restart too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Store revision of the node's last write.
    pub mod_revision: i64,
    /// The store's lease that the record hangs on.
    pub lease_id: i64,
    /// Its time to live.
    pub ttl: Duration,
}

/// What this node holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// The subnets; they stay after the lease is lost, for the pods that run.
    pub own: Option<Own>,
    /// The record of it in the store.
    pub mark: Option<Mark>,
    /// Why no address may be handed out of them.
    pub trouble: Option<(NotReady, String)>,
    /// When the lease ends unless it is kept alive.
    pub expires: Option<Instant>,
}

/// What a daemon before this one left on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remembered {
    /// The subnets.
    pub own: Own,
    /// The record of it in the store.
    pub mark: Option<Mark>,
    /// When the lease ended or will end, by the clock of this boot; unknown after a reboot.
    pub expires: Option<Instant>,
    /// The store's revision that was last seen.
    pub revision: i64,
}

/// Who the keeper works for.
#[derive(Clone, Debug)]
pub struct Tenant {
    /// The node.
    pub node: NodeName,
    /// This run of it.
    pub instance: Instance,
    /// Time to live of the lease.
    pub ttl: Duration,
    /// How long a subnet rests before another node gets it.
    pub grace: Duration,
    /// The pods of this node, and their addresses.
    pub pods: NodePods,
}

/// What a person tells the keeper.
#[derive(Debug)]
pub enum Command {
    /// Take another subnet.
    Renumber {
        /// Although pods have addresses in this one, which cuts them off.
        force: bool,
        /// The subnets that are left, or why not.
        reply: oneshot::Sender<Result<LeaseKey, String>>,
    },
}
