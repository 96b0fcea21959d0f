//! The lease store in etcd, in the layout of flannel's etcd v3 registry.
//!
//! ```text
//!                 ┌──────────── watch: list, then watch ───────────► network(), leases(), connection()
//! etcd ◄── connect┤
//!  one endpoint   └──────────── txn: claim, rewrite, keep alive, release ◄── the lease's keeper
//!  at a time            │
//!                       └── identity: is it still the same store? ──► replaced()
//! ```
//!
//! One task watches the store and publishes what it sees; calls go out on the task that makes them, over the same
//! connection. Nothing here fails because etcd is away: the task retries for ever, a call says `Unreachable`.

mod connect;
mod endpoint;
mod identity;
mod inquiries;
mod keys;
mod operator;
mod reservations;
mod txn;
mod watch;

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use fabric_core::inquiry::Inquiry;
use fabric_core::leases::LeaseSet;
use fabric_core::model::NodeName;
use fabric_core::record::{LeaseKey, Record};
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;

use self::connect::Connector;
pub use self::connect::{Options, Tls, User};
pub use self::endpoint::complete;
use self::keys::Keys;
pub use self::operator::Overview;
use super::{Claim, ConfigPlace, Connection, ExpiredLease, Grant, Inquired, LeaseStore, Network, StoreError};

/// The lease store in etcd. Dropping it ends its task.
pub struct Etcd {
    store: Arc<Store>,
    /// Holds the one task that watches the store.
    _watching: JoinSet<()>,
}

/// What the task and the calls share.
struct Store {
    keys: Keys,
    connector: Connector,
    network: Sender<Network>,
    leases: Sender<Option<Arc<LeaseSet>>>,
    /// The leases of before the start: what the first list is compared with.
    remembered: Option<Arc<LeaseSet>>,
    connection: Sender<Connection>,
    inquiries: Sender<Inquired>,
    /// The generation of the store, counted as in [`LeaseStore::replaced`], that the published leases came from.
    listed_of: AtomicU64,
}

/// The network config as it lies in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredConfig {
    /// The JSON.
    pub json: Vec<u8>,
    /// Store revision of its last change.
    pub mod_revision: i64,
}

/// What became of a network config that was to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Init {
    /// There was none; now there is.
    Created,
    /// It replaced this one.
    Replaced(StoredConfig),
    /// The very same was there already.
    Unchanged,
    /// Another one is there, and stays.
    Exists(StoredConfig),
}

impl Etcd {
    /// Starts to watch the store, and returns at once. Whether it can be reached is told by
    /// [`LeaseStore::connection`]. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(options: Options) -> Self {
        Self::start_remembering(options, None)
    }

    /// The same with the leases that a run before this one had seen. Those of them that have ended meanwhile, while
    /// their guards stand, have departed: their nodes may still be reached.
    #[must_use]
    pub fn start_remembering(options: Options, remembered: Option<Arc<LeaseSet>>) -> Self {
        let store = Arc::new(Store {
            keys: Keys::new(&options.prefix),
            connector: Connector::new(options),
            network: Sender::new(Network::Unknown),
            leases: Sender::new(None),
            remembered,
            connection: Sender::new(Connection::Unknown),
            inquiries: Sender::new(Inquired::default()),
            listed_of: AtomicU64::new(0),
        });
        let mut watching = JoinSet::new();
        watching.spawn(watch::watch_for_ever(store.clone()));
        Self { store, _watching: watching }
    }

    /// Reads the network config, linearizably.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    pub async fn read_config(&self) -> Result<Option<StoredConfig>, StoreError> {
        self.store.read_config().await
    }

    /// Writes the network config, if there is none or with `force`, by compare-and-swap. The JSON is taken as it is:
    /// the caller has validated it.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] or `Refused`.
    pub async fn network_init(&self, json: &[u8], force: bool) -> Result<Init, StoreError> {
        self.store.network_init(json, force).await
    }

    /// Replaces the network config that was read, if it is still the same. The caller has validated the JSON.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`], or `Refused`, also when somebody changed it meanwhile.
    pub async fn network_replace(&self, before: &StoredConfig, json: &[u8]) -> Result<(), StoreError> {
        self.store.network_replace(before, json).await
    }
}

impl LeaseStore for Etcd {
    fn network(&self) -> Receiver<Network> {
        self.store.network.subscribe()
    }

    fn leases(&self) -> Receiver<Option<Arc<LeaseSet>>> {
        self.store.leases.subscribe()
    }

    fn config_place(&self) -> ConfigPlace {
        ConfigPlace {
            name: self.store.keys.config(),
            make: "make one with: fabricctl network init --network 10.244.0.0/16",
            change: "choose another network, as in: fabricctl network set --network 10.245.0.0/16",
        }
    }

    fn connection(&self) -> Receiver<Connection> {
        self.store.connection.subscribe()
    }

    fn give_up_connections(&self) {
        self.store.connector.give_up();
    }

    fn replaced(&self) -> Receiver<u64> {
        self.store.connector.identity.replaced()
    }

    async fn claim(&self, claim: &Claim) -> Result<Grant, StoreError> {
        self.store.claim(claim).await
    }

    async fn rewrite(&self, grant: &Grant, record: &Record) -> Result<Grant, StoreError> {
        self.store.rewrite(grant, record).await
    }

    async fn keep_alive(&self, grant: &Grant) -> Result<Grant, StoreError> {
        self.store.keep_alive(grant).await
    }

    async fn release(&self, grant: &Grant) -> Result<(), StoreError> {
        self.store.release(grant).await
    }

    async fn expired_leases(&self, grace: Duration) -> Result<Vec<ExpiredLease>, StoreError> {
        self.store.expired_leases(grace).await
    }

    async fn hold_place(&self, key: &LeaseKey, placeholder: &Record) -> Result<(), StoreError> {
        self.store.hold_place(key, placeholder).await
    }

    fn inquiries(&self) -> Option<Receiver<Inquired>> {
        Some(self.store.inquiries.subscribe())
    }

    async fn inquire(&self, node: &NodeName, inquiry: &Inquiry) -> Result<(), StoreError> {
        self.store.inquire(node, inquiry).await
    }

    async fn time_left(&self, key: &LeaseKey) -> Result<Option<Duration>, StoreError> {
        self.store.time_left(key).await
    }

    async fn probe(&self) -> Result<(), StoreError> {
        self.read_config().await.map(drop)
    }
}
