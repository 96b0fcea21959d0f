//! What the methods answer from, and where they send what a person wants.

use std::sync::Arc;

use fabric_proto::v1;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::convert;
use super::remote::Remote;
use crate::config::StoreSettings;
use crate::config::log_level::LogLevel;
use crate::diagnosis::Inspector;
use crate::mesh::Mesh;
use crate::policy::status::PolicyView;
use crate::status::events::Events;
use crate::status::view::View;
use crate::{lease, reconcile, services};

/// Where a person's commands go.
#[derive(Clone, Debug)]
pub struct Controls {
    /// To the lease keeper.
    pub lease: mpsc::Sender<lease::Command>,
    /// To the reconcile loop.
    pub network: mpsc::Sender<reconcile::Command>,
}

/// What the answers are made of.
#[derive(Clone, Debug)]
pub struct Sources {
    /// What the reconcile loop knows.
    pub view: watch::Receiver<Arc<View>>,
    /// The loop of Services, if they are translated here.
    pub services: Option<services::handle::Handle>,
    /// What there is to see of network policies, if they are enforced here.
    pub policy: Option<PolicyView>,
    /// What happened.
    pub events: Arc<Events>,
    /// How the peers are reached.
    pub mesh: Arc<Mesh>,
    /// Who looks for what is wrong.
    pub inspector: Arc<Inspector>,
    /// The daemons of other nodes.
    pub remote: Remote,
    /// What is logged.
    pub log_level: LogLevel,
    /// Whom to tell what a person wants.
    pub controls: Controls,
    /// How the datastore is reached.
    pub store: Arc<StoreSettings>,
}

impl Sources {
    /// The state of this node now, with all that is known of it.
    #[must_use]
    pub fn status(&self) -> v1::GetStatusResponse {
        let view = self.view.borrow().clone();
        let mut status = convert::whole_status(&view, &self.mesh, &self.inspector.places.addresses, Instant::now());
        status.warnings.extend(self.inspector.warnings());
        status
    }
}
