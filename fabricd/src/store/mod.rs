//! The lease store: where the network config lies and the nodes' leases live.
//!
//! [`LeaseStore`] is what the daemon sees. [`etcd::Etcd`] and [`kubernetes::Kubernetes`] are the real ones; the test crate
//! has one in memory, and one conformance suite runs on all.

pub mod etcd;
pub mod kubernetes;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::Readiness;
use fabric_core::inquiry::Inquiry;
pub use fabric_core::lease::{Assigned, Expect, ExpiredLease};
use fabric_core::leases::LeaseSet;
use fabric_core::model::NodeName;
use fabric_core::network::{ConfigError, NetworkConfig};
use fabric_core::record::{LeaseKey, Record};
use tokio::sync::watch;
use tokio::time::Instant;

/// What is known of the network config.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// The store has not answered yet.
    #[default]
    Unknown,
    /// The store has no config.
    Missing,
    /// The store's config can't be used.
    Invalid(ConfigError),
    /// The config.
    Valid(NetworkConfig),
}

/// Where the network config lies, for messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigPlace {
    /// The place.
    pub name: String,
    /// How a first config comes there.
    pub make: &'static str,
    /// How another one comes there.
    pub change: &'static str,
}

/// How the connection to the store is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Connection {
    /// Not tried yet.
    Unknown,
    /// The watch is running.
    Up,
    /// It can't be reached; being retried.
    Down(String),
    /// It answers, and refuses; being retried.
    Refused(String),
}

impl Connection {
    /// Why there is none.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        match self {
            Self::Unknown | Self::Up => None,
            Self::Down(reason) | Self::Refused(reason) => Some(reason),
        }
    }
}

impl From<&StoreError> for Connection {
    fn from(error: &StoreError) -> Self {
        match error {
            StoreError::Refused { .. } => Self::Refused(error.to_string()),
            _ => Self::Down(error.to_string()),
        }
    }
}

/// What a node asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The node.
    pub node: NodeName,
    /// The subnets.
    pub key: LeaseKey,
    /// What to say there.
    pub record: Record,
    /// What must be true of the key, else the claim is lost.
    pub expect: Expect,
    /// The revision of the [`LeaseSet`] that the choice was made on. A claim of a free subnet is lost when the network
    /// config has changed since.
    pub seen_revision: i64,
    /// True when the choice was made under another network config than the store shows: subnets may have another size
    /// by now. Such a claim of a free subnet is lost when anything was leased since `seen_revision`, and makes all
    /// claims lost that were decided before it. Read the leases first and the config that they are compared with after
    /// them, so that it is not the older one.
    pub outdated: bool,
    /// Guards of expired subnets that may be overwritten: their revisions.
    pub evict: Vec<i64>,
    /// The name that the node had before: its guards, and what its record hangs on, are the claimer's.
    pub formerly: Option<NodeName>,
    /// Time to live of the lease, in whole seconds.
    pub ttl: Duration,
    /// Id of the store's lease, above 0, where it has such: chosen by who claims, so that asking again after an answer was
    /// lost makes no second one.
    pub lease_id: i64,
}

impl Claim {
    /// True for the claimer's name, and the one that it had before.
    #[must_use]
    pub fn is_by(&self, node: &NodeName) -> bool {
        *node == self.node || self.formerly.as_ref() == Some(node)
    }
}

/// Questions about who holds the lease of a name, by the names; see [`fabric_core::inquiry`].
pub type Inquired = BTreeMap<NodeName, Inquiry>;

/// A lease that is held.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// The node that holds it.
    pub node: NodeName,
    /// Its subnets.
    pub key: LeaseKey,
    /// Revision of our last write; a later one in the watch is somebody else's.
    pub mod_revision: i64,
    /// The store's lease that the key hangs on.
    pub lease_id: i64,
    /// When it ends unless it is kept alive, by the local monotonic clock, counted from before the request was sent.
    pub expires: Instant,
    /// The time to live that the store granted.
    pub ttl: Duration,
}

/// Why the store did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Somebody else was faster, or the key is not as expected. Decide anew on the next [`LeaseSet`].
    #[error("{key} was changed by somebody else meanwhile")]
    Lost {
        /// What was asked for.
        key: LeaseKey,
    },
    /// No record stands in the way, but the guard of another node does: the subnet is in its grace period, or half of that node's
    /// pair. [`LeaseStore::expired_leases`] tells which ones rest.
    #[error("{key} is in its grace period: another node had it")]
    Guarded {
        /// What was asked for.
        key: LeaseKey,
    },
    /// The store's lease is gone: expired or revoked.
    #[error("the lease {lease_id:x} has expired or was revoked")]
    Expired {
        /// Its id in the store.
        lease_id: i64,
    },
    /// No endpoint answers. Whether a write happened is not known.
    #[error("cannot reach the store at {endpoints}: {reason}")]
    Unreachable {
        /// All that were tried.
        endpoints: String,
        /// What the last one said.
        reason: String,
    },
    /// The store answers, and refuses.
    #[error("the store refused to {operation}: {reason}")]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// What it said.
        reason: String,
    },
}

/// A place that holds leases.
pub trait LeaseStore: Send + Sync + 'static {
    /// The network config, and every change of it.
    fn network(&self) -> watch::Receiver<Network>;

    /// All leases, always the whole latest set; `None` until a full snapshot has come. While the store can't be
    /// reached it keeps the last set.
    fn leases(&self) -> watch::Receiver<Option<Arc<LeaseSet>>>;

    /// Where the network config lies.
    fn config_place(&self) -> ConfigPlace;

    /// What the cluster assigns to this node, and every change of it; `None` from a store in which nodes choose their
    /// subnets. It is never older than the leases.
    fn assigned(&self) -> Option<watch::Receiver<Assigned>> {
        None
    }

    /// Tells the cluster whether the data plane of this node is ready, or why it isn't. Where nobody asks for that, nothing
    /// happens.
    fn announce(&self, _readiness: &Readiness) {}

    /// An address that connections to the store may be from has gone: those are given up at once, and what is under way is
    /// sent again. A store that finds out by itself, soon, does nothing.
    fn give_up_connections(&self) {}

    /// How the connection is.
    fn connection(&self) -> watch::Receiver<Connection>;

    /// How often the store turned out to be another one, or an older copy of itself, since the start. All revisions
    /// and grants from before are void then. It rises before the first set of the new store is published.
    fn replaced(&self) -> watch::Receiver<u64>;

    /// Takes a lease in one transaction. It hangs on a fresh lease of the store's, whatever it hung on before.
    ///
    /// # Errors
    /// [`StoreError::Lost`], `Guarded`, `Expired`, `Unreachable` or `Refused`. After `Unreachable` the record may be there all the
    /// same: the watch tells, and the node then claims it by its revision.
    fn claim(&self, claim: &Claim) -> impl Future<Output = Result<Grant, StoreError>> + Send;

    /// Writes another record on a lease that is held. Its end stays where it is; only [`LeaseStore::keep_alive`] moves
    /// it.
    ///
    /// # Errors
    /// [`StoreError::Lost`] when the record is not the one that the grant wrote, `Expired`, `Unreachable` or `Refused`.
    fn rewrite(&self, grant: &Grant, record: &Record) -> impl Future<Output = Result<Grant, StoreError>> + Send;

    /// Keeps a lease alive: gives the grant with its new expiry. Writes nothing under the prefix.
    ///
    /// # Errors
    /// [`StoreError::Expired`], `Unreachable` or `Refused`.
    fn keep_alive(&self, grant: &Grant) -> impl Future<Output = Result<Grant, StoreError>> + Send;

    /// Gives a lease back: the record and its guards go, as far as they are still this node's, and nothing rests. A
    /// lease that is gone is no error, and a record that somebody else wrote meanwhile is not touched.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    fn release(&self, grant: &Grant) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The subnets that rest: those with a guard and without a record. Their grace begins when it is first asked for
    /// them; after it the guard is gone, and anybody may have the subnet.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    fn expired_leases(&self, grace: Duration) -> impl Future<Output = Result<Vec<ExpiredLease>, StoreError>> + Send;

    /// Writes a placeholder where there is no record, as long as the subnet is reserved. That somebody was faster is no
    /// error.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    fn hold_place(&self, key: &LeaseKey, placeholder: &Record) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Questions of other machines of one name, and their answers; `None` from a store in which names are the cluster's.
    fn inquiries(&self) -> Option<watch::Receiver<Inquired>> {
        None
    }

    /// Asks whoever holds the lease of `node`, or answers, for a minute: whatever was asked about that name before is
    /// replaced.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    fn inquire(&self, _node: &NodeName, _inquiry: &Inquiry) -> impl Future<Output = Result<(), StoreError>> + Send {
        async { Ok(()) }
    }

    /// How long the lease of `key` lasts unless it is kept alive; `None` for a record that stays for ever, or is gone.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    fn time_left(&self, _key: &LeaseKey) -> impl Future<Output = Result<Option<Duration>, StoreError>> + Send {
        async { Ok(None) }
    }

    /// Reads something that the store itself must answer, to see how fast it does.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    fn probe(&self) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// Tells the receivers of a value, if it is another one.
fn publish<T: PartialEq>(channel: &watch::Sender<T>, value: T) {
    channel.send_if_modified(|published| {
        let changed = *published != value;
        *published = value;
        changed
    });
}
