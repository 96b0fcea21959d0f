//! Questions about what is wrong on this node: the checks of `fabricctl doctor`, and the path of a packet that `fabricctl
//! explain` shows. Both look at a [`Inspection`], and change nothing.
//!
//! | file | what it is |
//! |---|---|
//! | [`checks`] | the list of checks, and those that need no more than what the daemon knows |
//! | `overlay_checks` | the VTEP, and what stands beside it: other overlays, other routes |
//! | `policy_checks` | network policies, and who else enforces them |
//! | `pod_checks`, [`addresses`] | the bridge, the pods that are attached to it, and their addresses |
//! | [`host_checks`], `manager_checks`, [`cni_config`] | the host's files; programs that manage interfaces; CNI configurations |
//! | [`standalone`] | what can be checked without a daemon |
//! | [`finding`] | what a check found |
//! | [`node_events`] | what is wrong, told on this node's Node |
//! | [`explain`], [`packet`] | the path of a packet, read; real packets on it |

pub mod addresses;
pub mod certificates;
pub mod checks;
pub mod cni_config;
pub mod explain;
pub mod finding;
pub mod host_checks;
mod manager_checks;
pub mod node_events;
mod overlay_checks;
pub mod packet;
mod pod_checks;
mod policy_checks;
pub mod standalone;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use fabric_core::model::{IfName, Subnet};
use futures::future::BoxFuture;
use tokio::sync::{mpsc, oneshot};

pub use self::pod_checks::MASQUERADE_IN_KUBERNETES;
use crate::config::{Config, StoreKind};
use crate::host;
use crate::host::addresses::{Addresses, CniDirs};
use crate::kernel;
use crate::kernel::links::HostLinks;
use crate::kernel::routing::fib::Fib;
use crate::mesh::Mesh;
use crate::policy::status::PolicyView;
use crate::reconcile::{self, Snapshot};
pub use crate::status::section::Sections;
use crate::status::view::View;
use crate::store::StoreError;

/// How something was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should be.
    Fine,
    /// It may hurt, or hurts something that isn't in use.
    Warning,
    /// It hurts.
    Failed,
    /// It couldn't be looked at, or there is nothing to look at.
    Skipped,
}

/// Where the node keeps what is looked at.
#[derive(Clone, Debug)]
pub struct Places {
    /// host-local's folder: `/var/lib/cni/networks`.
    pub addresses: PathBuf,
    /// The attachments that `fabric-cni` has saved: `/var/lib/cni/fabric`.
    pub attachments: PathBuf,
    /// The host's files: `/`, but for tests.
    pub root: PathBuf,
    /// Certificates that this node shows or trusts.
    pub certificates: Vec<PathBuf>,
    /// The container runtime's network configurations: `/etc/cni/net.d`.
    pub cni_conf: PathBuf,
    /// Whether the daemon is a pod of Kubernetes: then fixes of its settings are kubectl's.
    pub kubernetes: bool,
    /// Where the leases are.
    pub store: StoreKind,
}

impl Places {
    /// By the daemon's settings.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let of_etcd = [&config.etcd.cafile, &config.etcd.certfile];
        let of_api = [&config.api_cafile, &config.api_certfile];
        Self {
            addresses: config.cni_data_dir.clone(),
            attachments: config.cni_state_dir.clone(),
            root: "/".into(),
            certificates: of_etcd.into_iter().chain(of_api).flatten().cloned().collect(),
            cni_conf: config.cni_conf_dir.clone(),
            kubernetes: std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
            store: config.store,
        }
    }

    /// Where it all is unless the settings say otherwise.
    #[must_use]
    pub fn usual() -> Self {
        Self {
            addresses: "/var/lib/cni/networks".into(),
            attachments: fabric_core::handoff::ATTACHMENTS_DIR.into(),
            root: "/".into(),
            certificates: vec![],
            cni_conf: "/etc/cni/net.d".into(),
            kubernetes: std::env::var_os("KUBERNETES_SERVICE_HOST").is_some(),
            store: StoreKind::Etcd,
        }
    }
}

/// Asks the store something that it must answer itself: [`LeaseStore::probe`](crate::store::LeaseStore::probe).
pub type Probe = Arc<dyn Fn() -> BoxFuture<'static, Result<(), StoreError>> + Send + Sync>;

/// What questions are put to.
#[derive(Clone)]
pub struct Inspector {
    /// The store, to see how fast it answers; none in tests.
    pub store: Option<Probe>,
    /// The mesh.
    pub mesh: Arc<Mesh>,
    /// Files of the node.
    pub places: Places,
    /// Services and network policies.
    pub sections: Sections,
    /// Network policies, if they are enforced here.
    pub policy: Option<PolicyView>,
}

/// All that is known at one moment.
#[derive(Clone, Debug)]
pub struct Inspection {
    /// What the reconcile loop knows.
    pub view: Arc<View>,
    /// What it saw in the kernel and wants there.
    pub snapshot: Snapshot,
    /// How the peers are reached.
    pub mesh: Arc<Mesh>,
    /// Files of the node.
    pub places: Places,
    /// Routes and policy rules of the host; empty when they can't be read.
    pub fib: Arc<Fib>,
    /// How it stands with Services and network policies.
    pub sections: Sections,
    /// Network policies, if they are enforced here.
    pub policy: Option<PolicyView>,
}

impl Inspection {
    /// Which addresses are taken, and by whom. Reads the CNI plugins' files.
    ///
    /// # Errors
    /// In words, when they can't be read.
    pub fn addresses(&self) -> Result<Addresses, String> {
        let observed = self.snapshot.observed.as_ref().ok_or("the kernel can't be read")?;
        let own = self.view.holding.own.as_ref().map(|own| own.key.subnets());
        let own: Vec<Subnet> = own.iter().flat_map(|subnets| subnets.values()).copied().collect();
        let dirs = CniDirs { addresses: self.places.addresses.clone(), attachments: self.places.attachments.clone() };
        let found = Addresses::read(&dirs, &HostLinks::from(&**observed), &own);
        found.map_err(|error| format!("the CNI plugins' files can't be read: {error}"))
    }

    /// The bridges that this node's pods are attached to: `cni0`, unless their attachments say otherwise.
    #[must_use]
    pub fn pod_bridges(&self) -> BTreeSet<IfName> {
        host::addresses::bridges_of(host::addresses::attachments(&self.places.attachments).unwrap_or_default().values())
    }
}

impl std::fmt::Debug for Inspector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inspector").field("places", &self.places).finish_non_exhaustive()
    }
}

impl Inspector {
    /// What an operator should know that isn't the reconcile loop's to see, each with the way out: of Services and network
    /// policies, and of CNI configurations that a runtime takes in the place of ours.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.sections.warnings();
        warnings.extend(cni_config::warnings(&self.places.cni_conf));
        warnings
    }

    /// Those of them that are about this node, and not about an object that has them told on itself.
    fn warnings_of_node(&self) -> Vec<String> {
        let not_ready = self.sections.not_ready();
        not_ready.into_iter().chain(cni_config::warnings(&self.places.cni_conf)).collect()
    }

    /// The inspection now. `None` when the daemon is ending.
    pub async fn look(&self, view: Arc<View>, network: &mpsc::Sender<reconcile::Command>) -> Option<Inspection> {
        let (reply, answer) = oneshot::channel();
        network.send(reconcile::Command::Snapshot { reply }).await.ok()?;
        let snapshot = answer.await.ok()?;
        let fib = tokio::task::spawn_blocking(kernel::fib).await.ok().and_then(Result::ok).unwrap_or_default();
        let (mesh, places, policy) = (Arc::clone(&self.mesh), self.places.clone(), self.policy.clone());
        let sections = self.sections.clone();
        Some(Inspection { view, snapshot, mesh, places, fib: Arc::new(fib), sections, policy })
    }
}
