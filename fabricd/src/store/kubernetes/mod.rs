//! The lease store in the API server of Kubernetes, in the form of flannel's kube subnet manager.
//!
//! ```text
//!                            ┌── reflector: list, watch ───► leases(), assigned(), connection(), own Node
//! Nodes ◄── API server ◄─────┤
//!                            └── write: annotations ◄── claim, rewrite, release
//!                                       condition, taint ◄── announce()
//! net-conf.json ◄── config_file ──► network()
//! ```
//!
//! A lease is a Node: its podCIDRs are the subnets, its annotations the record. The cluster assigns, so a claim only
//! publishes, nothing expires, and what an etcd does with guards and reservations the API server does by itself: nobody
//! else has a Node's podCIDRs.

mod annotations;
mod config_file;
mod fold;
mod node;
mod nodes;
mod write;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::leases::LeaseSet;
use fabric_core::model::NodeName;
use fabric_core::record::{LeaseKey, Record};
use tokio::sync::watch::{Receiver, Sender};
use tokio::task::JoinSet;
use tokio::time::Instant;

use self::fold::LeaseFold;
use self::node::Node;
use self::write::{PATCH, Pace};
use super::{Assigned, Claim, ConfigPlace, Connection, ExpiredLease, Grant, LeaseStore, Network, StoreError, publish};
use crate::kubernetes::addresses::Addresses;
use crate::kubernetes::client::{ApiError, ApiServer};
use crate::kubernetes::reflector::{Object as _, Reflector};

/// What an assignment lasts, which nobody has to keep alive.
const FOR_EVER: Duration = Duration::from_secs(365 * 86_400);

/// How the API server is reached, and what it is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name of this node's Node.
    pub node: NodeName,
    /// Who we are; without it the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// Where else the API server may be reached.
    pub addresses: Addresses,
    /// flannel's `net-conf.json`.
    pub config: PathBuf,
    /// A taint of the Node that goes when the network works.
    pub startup_taint: Option<String>,
}

/// The lease store in Kubernetes. Dropping it ends its tasks.
pub struct Kubernetes {
    shared: Arc<Shared>,
    config: PathBuf,
    _tasks: JoinSet<()>,
}

/// What the tasks and the calls share.
struct Shared {
    node: NodeName,
    startup_taint: Option<String>,
    api: Arc<ApiServer>,
    network: Sender<Network>,
    leases: Sender<Option<Arc<LeaseSet>>>,
    connection: Sender<Connection>,
    replaced: Sender<u64>,
    assigned: Sender<Assigned>,
    /// This node's Node as it was seen last.
    own: Sender<Option<Arc<Node>>>,
    readiness: Sender<Readiness>,
    /// Of the annotations; held while they are written.
    pace: tokio::sync::Mutex<Pace>,
}

impl Kubernetes {
    /// Starts to watch the API server, and returns at once. Whether it can be reached is told by
    /// [`LeaseStore::connection`]. Must be called within a tokio runtime.
    #[must_use]
    pub fn start(options: Options) -> Self {
        let Options { node, kubeconfig, addresses, config, startup_taint } = options;
        let shared = Arc::new(Shared {
            node,
            startup_taint,
            api: Arc::new(ApiServer::new(kubeconfig).at(addresses)),
            network: Sender::new(Network::Unknown),
            leases: Sender::new(None),
            connection: Sender::new(Connection::Unknown),
            replaced: Sender::new(0),
            assigned: Sender::new(Assigned::default()),
            own: Sender::new(None),
            readiness: Sender::new(Readiness::NotReady { code: NotReady::Starting, reason: String::new() }),
            pace: tokio::sync::Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(config_file::watch_for_ever(shared.clone(), config.clone()));
        tasks.spawn(Reflector::new(shared.api.clone(), LeaseFold::new(shared.clone())).run());
        let announcer = shared.clone();
        tasks.spawn(async move { announcer.keep_announcing().await });
        Self { shared, config, _tasks: tasks }
    }

    async fn publish(&self, node: &NodeName, key: LeaseKey, record: &Record) -> Result<Grant, StoreError> {
        let mod_revision = self.shared.say(key, annotations::write(record)).await?;
        let expires = Instant::now() + FOR_EVER;
        Ok(Grant { node: node.clone(), key, mod_revision, lease_id: 0, expires, ttl: FOR_EVER })
    }
}

impl LeaseStore for Kubernetes {
    fn network(&self) -> Receiver<Network> {
        self.shared.network.subscribe()
    }

    fn leases(&self) -> Receiver<Option<Arc<LeaseSet>>> {
        self.shared.leases.subscribe()
    }

    fn config_place(&self) -> ConfigPlace {
        ConfigPlace {
            name: self.config.display().to_string(),
            make: "mount a ConfigMap with flannel's net-conf.json there, or say with --net-config-path where it is",
            change: "choose another network in the ConfigMap, and as --cluster-cidr of the controller manager",
        }
    }

    fn assigned(&self) -> Option<Receiver<Assigned>> {
        Some(self.shared.assigned.subscribe())
    }

    fn announce(&self, readiness: &Readiness) {
        publish(&self.shared.readiness, readiness.clone());
    }

    fn connection(&self) -> Receiver<Connection> {
        self.shared.connection.subscribe()
    }

    fn replaced(&self) -> Receiver<u64> {
        self.shared.replaced.subscribe()
    }

    async fn claim(&self, claim: &Claim) -> Result<Grant, StoreError> {
        self.publish(&claim.node, claim.key, &claim.record).await
    }

    async fn rewrite(&self, grant: &Grant, record: &Record) -> Result<Grant, StoreError> {
        self.publish(&grant.node, grant.key, record).await
    }

    async fn keep_alive(&self, grant: &Grant) -> Result<Grant, StoreError> {
        Ok(Grant { expires: Instant::now() + FOR_EVER, ..grant.clone() })
    }

    async fn release(&self, grant: &Grant) -> Result<(), StoreError> {
        for annotations in annotations::given_back() {
            match self.shared.say(grant.key, annotations).await {
                Ok(_) => {}
                Err(StoreError::Lost { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn expired_leases(&self, _grace: Duration) -> Result<Vec<ExpiredLease>, StoreError> {
        Err(assigned_here("tell which subnets are in their grace period"))
    }

    async fn hold_place(&self, _key: &LeaseKey, _placeholder: &Record) -> Result<(), StoreError> {
        Err(assigned_here("keep a subnet for a node"))
    }

    async fn probe(&self) -> Result<(), StoreError> {
        let version = self.shared.api.client().await?.apiserver_version().await;
        version.map(drop).map_err(|error| unreachable(&error.to_string()))
    }
}

impl Shared {
    /// True for this node's Node.
    fn is_own(&self, node: &Node) -> bool {
        node.name() == self.node.as_str()
    }

    /// This node's Node, as it was seen last.
    fn own(&self) -> Option<Arc<Node>> {
        self.own.borrow().clone()
    }

    /// Takes in a Node as the watch or the answer to a write shows it. They overtake each other.
    fn observe(&self, node: Node) {
        if !self.is_own(&node) {
            return;
        }
        let is_older =
            |known: &Arc<Node>| known.metadata.uid == node.metadata.uid && node.revision() < known.revision();
        if !self.own().is_some_and(|known| is_older(&known)) {
            self.own_is(Some(node));
        }
    }

    fn own_is(&self, node: Option<Node>) {
        publish(&self.assigned, node.as_ref().map(annotations::assigned).unwrap_or_default());
        publish(&self.own, node.map(Arc::new));
    }
}

fn assigned_here(operation: &'static str) -> StoreError {
    StoreError::Refused { operation, reason: "in Kubernetes the cluster assigns the subnets".to_owned() }
}

fn unreachable(reason: &str) -> StoreError {
    StoreError::Unreachable { endpoints: "the API server of Kubernetes".to_owned(), reason: reason.to_owned() }
}

impl From<ApiError> for StoreError {
    fn from(error: ApiError) -> Self {
        match error {
            ApiError::Unreachable(reason) => unreachable(&reason),
            ApiError::Refused { verb, reason } => Self::Refused { operation: operation(verb), reason },
        }
    }
}

/// What a verb is about here: nothing but Nodes.
fn operation(verb: &str) -> &'static str {
    match verb {
        PATCH => "write on this node's Node",
        "watch" => "watch the Nodes",
        _ => "list the Nodes",
    }
}
