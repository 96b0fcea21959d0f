//! This node's lease: what it should say, what is held, and the task that sees to both.

mod duplicate_name;
mod give_back;
mod inquiries;
mod keeper;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::NotReady;
use fabric_core::model::{NodeName, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::record::{Endpoint, Instance, LeaseKey};
use futures::future::BoxFuture;
use tokio::sync::oneshot;
use tokio::time::Instant;

pub use self::give_back::{DepartingNode, GivenBack};
pub use self::keeper::{Keeper, SETTLING};
use crate::host::addresses::NodePods;

/// What the reconcile loop wants the lease to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesiredLease {
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
    /// What is to be said of another machine that has this node's name.
    pub duplicate_name: Option<String>,
    /// What pods had that a person has cut off: addresses and subnets.
    pub left: Vec<Subnet>,
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
    /// What pods had that a person has cut off: addresses and subnets.
    pub left: Vec<Subnet>,
    /// The name that the node had then, where that was another.
    pub formerly: Option<NodeName>,
    /// True when it was written in this boot of the machine.
    pub this_boot: bool,
}

/// Who the keeper works for.
#[derive(Clone, Debug)]
pub struct LeaseOptions {
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
    /// When the daemon started, in seconds of Unix time.
    pub since: i64,
    /// Tells whether any machine answers at an address of the underlay.
    pub hosts: Hosts,
}

/// A way to ask whether any machine answers at an address of the underlay.
#[derive(Clone)]
pub struct Hosts(Arc<dyn Fn(IpAddr) -> BoxFuture<'static, bool> + Send + Sync>);

impl Hosts {
    /// Asks by `probe`.
    pub fn new(probe: impl Fn(IpAddr) -> BoxFuture<'static, bool> + Send + Sync + 'static) -> Self {
        Self(Arc::new(probe))
    }

    /// True if something answers at `ip`.
    pub async fn answers(&self, ip: IpAddr) -> bool {
        (self.0)(ip).await
    }
}

impl std::fmt::Debug for Hosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hosts")
    }
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
