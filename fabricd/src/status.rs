//! The gRPC API: `fabric.v1` with the health and reflection services, on a unix socket that only root can open.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use fabric_core::handoff::Readiness;
use fabric_core::leases::Lease;
use fabric_proto::v1;
use fabric_proto::v1::fabric_server::{Fabric, FabricServer};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

use crate::store::Connection;
use crate::view::{PeerTrouble, View};
use crate::{lease, reconcile};

/// Opens the socket, with mode 0600. One that a daemon before us left behind is replaced: that it is not in use is
/// what the lock on the run folder is for.
///
/// # Errors
/// When the folder can't be written.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Answers on `listener` until the process ends.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: UnixListener, view: watch::Receiver<Arc<View>>, controls: Controls) -> anyhow::Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(report_health(reporter, view.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()?;
    tonic::transport::Server::builder()
        .add_service(health)
        .add_service(reflection)
        .add_service(FabricServer::new(Service { view, controls }))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}

async fn report_health(reporter: tonic_health::server::HealthReporter, mut view: watch::Receiver<Arc<View>>) {
    loop {
        if view.borrow_and_update().readiness == Readiness::Ready {
            reporter.set_serving::<FabricServer<Service>>().await;
        } else {
            reporter.set_not_serving::<FabricServer<Service>>().await;
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// Where a person's commands go.
#[derive(Clone, Debug)]
pub struct Controls {
    /// To the lease keeper.
    pub lease: mpsc::Sender<lease::Command>,
    /// To the reconcile loop.
    pub network: mpsc::Sender<reconcile::Command>,
}

#[derive(Debug)]
struct Service {
    view: watch::Receiver<Arc<View>>,
    controls: Controls,
}

#[tonic::async_trait]
impl Fabric for Service {
    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Result<Response<v1::GetStatusResponse>, Status> {
        let view = self.view.borrow().clone();
        Ok(Response::new(status_of(&view, Instant::now())))
    }

    async fn renumber_lease(
        &self,
        request: Request<v1::RenumberLeaseRequest>,
    ) -> Result<Response<v1::RenumberLeaseResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        let force = request.into_inner().force;
        self.controls.lease.send(lease::Command::Renumber { force, reply }).await.map_err(|_| ending())?;
        let left = answer.await.map_err(|_| ending())?.map_err(Status::failed_precondition)?;
        let left = left.subnets().values().map(ToString::to_string).collect();
        Ok(Response::new(v1::RenumberLeaseResponse { left }))
    }

    async fn migrate_network(
        &self,
        _: Request<v1::MigrateNetworkRequest>,
    ) -> Result<Response<v1::MigrateNetworkResponse>, Status> {
        let (reply, answer) = oneshot::channel();
        self.controls.network.send(reconcile::Command::Migrate { reply }).await.map_err(|_| ending())?;
        let changes = answer.await.map_err(|_| ending())?;
        Ok(Response::new(v1::MigrateNetworkResponse { changes }))
    }
}

fn ending() -> Status {
    Status::unavailable("the daemon is ending; try again")
}

/// A view in the API's words. `now` is what the lease's end is counted from.
#[must_use]
pub fn status_of(view: &View, now: Instant) -> v1::GetStatusResponse {
    let (ready, reason) = match &view.readiness {
        Readiness::Ready => (true, String::new()),
        Readiness::NotReady { reason, .. } => (false, reason.clone()),
    };
    let peers: Vec<v1::Peer> = view.peers().map(|lease| peer(view, lease)).collect();
    let programmed = peers.iter().filter(|peer| peer.state() == v1::PeerState::Programmed).count();
    let unreadable = view.leases.iter().flat_map(|leases| leases.unreadable());
    let unreadable =
        unreadable.map(|(key, error)| format!("the lease {key} can't be read, its last good value counts: {error}"));
    v1::GetStatusResponse {
        node: view.node.to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
        ready,
        reason,
        store: Some(store(view)),
        network: view.network.map(|network| v1::Network {
            spaces: network.spaces.values().map(|space| space.network.to_string()).collect(),
            vni: network.vxlan.vni.get(),
            port: network.vxlan.port.into(),
        }),
        lease: view.holding.own.as_ref().zip(view.holding.expires).map(|(own, expires)| v1::Lease {
            subnets: own.key.subnets().values().map(ToString::to_string).collect(),
            expires_in_seconds: expires.saturating_duration_since(now).as_secs().try_into().unwrap_or(i64::MAX),
            epoch: own.epoch,
        }),
        vteps: view
            .vteps
            .iter()
            .map(|end| v1::Vtep {
                device: end.device.to_string(),
                mac: end.vtep.mac.to_string(),
                underlay_device: end.underlay.to_string(),
                underlay_address: end.vtep.local.to_string(),
                public_address: end.public_ip.to_string(),
                mtu: end.vtep.mtu,
            })
            .collect(),
        peers_programmed: programmed.try_into().unwrap_or(u32::MAX),
        peers,
        warnings: view.warnings.iter().cloned().chain(unreadable).collect(),
        pending: view.pending.clone(),
    }
}

fn store(view: &View) -> v1::Store {
    let (connected, reason) = match &view.connection {
        Connection::Up => (true, String::new()),
        Connection::Unknown => (false, "not tried yet".into()),
        Connection::Down(reason) => (false, reason.clone()),
    };
    v1::Store { connected, reason, revision: view.leases.as_ref().map_or(0, |leases| leases.revision()) }
}

fn peer(view: &View, lease: &Lease) -> v1::Peer {
    let (state, reason) = match view.troubles.get(&lease.key) {
        None => (v1::PeerState::Programmed, String::new()),
        Some(trouble @ PeerTrouble::Pending(_)) => (v1::PeerState::Pending, trouble.to_string()),
        Some(trouble @ PeerTrouble::Refused(_)) => (v1::PeerState::Refused, trouble.to_string()),
    };
    let endpoints = lease.record.endpoints();
    v1::Peer {
        node: lease.record.node().map(ToString::to_string).unwrap_or_default(),
        subnets: lease.key.subnets().values().map(ToString::to_string).collect(),
        public_addresses: endpoints.values().map(|endpoint| endpoint.public_ip.to_string()).collect(),
        vtep_macs: endpoints.values().map(|endpoint| endpoint.vtep_mac.to_string()).collect(),
        state: state.into(),
        reason,
    }
}
