//! The methods of `fabric.v1.Fabric`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use fabric_proto::v1;
use fabric_proto::v1::fabric_server::Fabric;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::changes::{self, Changes};
use super::convert;
use super::policies::{self, Drops};
use super::questions::{self, Answers};
use super::services;
use super::sources::{Controls, Sources};
use crate::status::view::View;
use crate::{lease, reconcile};

/// How long an answer may take that waits for probes.
const PROBED: Duration = Duration::from_secs(60);

/// The API, for one kind of asker.
#[derive(Debug)]
pub struct Service {
    sources: Sources,
    /// Whether anything may be changed.
    may_change: bool,
}

type Answer<T> = Result<Response<T>, Status>;

impl Service {
    /// For root on this node.
    #[must_use]
    pub fn for_root(sources: Sources) -> Self {
        Self { sources, may_change: true }
    }

    /// For other nodes: read-only.
    #[must_use]
    pub fn for_peers(sources: Sources) -> Self {
        Self { sources, may_change: false }
    }

    fn controls(&self) -> Result<&Controls, Status> {
        self.may_change
            .then_some(&self.sources.controls)
            .ok_or_else(|| Status::permission_denied("changes are made on the node itself, through its unix socket"))
    }

    fn view(&self) -> Arc<View> {
        self.sources.view.borrow().clone()
    }
}

#[tonic::async_trait]
impl Fabric for Service {
    async fn get_settings(&self, _: Request<v1::GetSettingsRequest>) -> Answer<v1::GetSettingsResponse> {
        // Nothing in it is secret, yet how etcd is reached is no business of other nodes.
        self.controls()?;
        Ok(Response::new(convert::settings(&self.sources.store)))
    }

    async fn get_status(&self, _: Request<v1::GetStatusRequest>) -> Answer<v1::GetStatusResponse> {
        Ok(Response::new(self.sources.status()))
    }

    async fn renumber_lease(&self, request: Request<v1::RenumberLeaseRequest>) -> Answer<v1::RenumberLeaseResponse> {
        let (reply, answer) = oneshot::channel();
        let force = request.into_inner().force;
        self.controls()?.lease.send(lease::Command::Renumber { force, reply }).await.map_err(|_| ending())?;
        let left = answer.await.map_err(|_| ending())?.map_err(Status::failed_precondition)?;
        let left = left.subnets().values().map(ToString::to_string).collect();
        Ok(Response::new(v1::RenumberLeaseResponse { left }))
    }

    async fn migrate_network(&self, _: Request<v1::MigrateNetworkRequest>) -> Answer<v1::MigrateNetworkResponse> {
        let (reply, answer) = oneshot::channel();
        self.controls()?.network.send(reconcile::Command::Migrate { reply }).await.map_err(|_| ending())?;
        let changes = answer.await.map_err(|_| ending())?;
        Ok(Response::new(v1::MigrateNetworkResponse { changes }))
    }

    async fn list_peers(&self, _: Request<v1::ListPeersRequest>) -> Answer<v1::ListPeersResponse> {
        let view = self.view();
        let peer = |lease: &_| v1::Peer { fast_path: convert::traffic(&view, lease), ..convert::peer(&view, lease) };
        let mut peers: Vec<_> = view.peers().map(|lease| peer(lease)).collect();
        convert::add_mesh(&mut peers, &self.sources.mesh, Instant::now());
        Ok(Response::new(v1::ListPeersResponse { peers }))
    }

    type WatchPeersStream = Changes<v1::PeerEvent>;

    async fn watch_peers(&self, _: Request<v1::WatchPeersRequest>) -> Answer<Self::WatchPeersStream> {
        Ok(Response::new(changes::peers(self.sources.view.clone())))
    }

    async fn list_leases(&self, _: Request<v1::ListLeasesRequest>) -> Answer<v1::ListLeasesResponse> {
        let view = self.view();
        let leases = view.leases.iter().flat_map(|leases| leases.iter());
        let leases = leases.map(|lease| convert::lease_record(&view, lease)).collect();
        let revision = view.leases.as_ref().map_or(0, |leases| leases.revision());
        Ok(Response::new(v1::ListLeasesResponse { leases, revision }))
    }

    type WatchLeasesStream = Changes<v1::LeaseEvent>;

    async fn watch_leases(&self, _: Request<v1::WatchLeasesRequest>) -> Answer<Self::WatchLeasesStream> {
        Ok(Response::new(changes::leases(self.sources.view.clone())))
    }

    async fn get_kernel_state(
        &self,
        request: Request<v1::GetKernelStateRequest>,
    ) -> Answer<v1::GetKernelStateResponse> {
        let (reply, answer) = oneshot::channel();
        let look = reconcile::Command::Snapshot { reply };
        self.sources.controls.network.send(look).await.map_err(|_| ending())?;
        let looked = answer.await.map_err(|_| ending())?;
        Ok(Response::new(convert::kernel_state(&looked, request.into_inner().entries)))
    }

    async fn list_services(&self, request: Request<v1::ListServicesRequest>) -> Answer<v1::ListServicesResponse> {
        let off =
            "fabricd does not translate Services on this node; it does with --services on, in the place of kube-proxy";
        let handle = self.sources.services.as_ref().ok_or_else(|| Status::failed_precondition(off))?;
        let name = request.into_inner().name;
        let described = handle.describe(&name).await.ok_or_else(ending)?;
        let status = handle.status.borrow().clone();
        Ok(Response::new(services::answer(&status, &described, !name.is_empty())))
    }

    type WatchEventsStream = Pin<Box<dyn Stream<Item = Result<v1::Event, Status>> + Send>>;

    async fn watch_events(&self, request: Request<v1::WatchEventsRequest>) -> Answer<Self::WatchEventsStream> {
        let (past, coming) = self.sources.events.read();
        let past = tokio_stream::iter(past.into_iter().map(|event| Ok(convert::event(&event))));
        if !request.into_inner().follow {
            return Ok(Response::new(Box::pin(past)));
        }
        // Those that a slow reader has missed show as a gap in the numbers.
        let coming = coming.filter_map(Result::ok).map(|event| Ok(convert::event(&event)));
        Ok(Response::new(Box::pin(past.chain(coming))))
    }

    async fn get_mesh(&self, _: Request<v1::GetMeshRequest>) -> Answer<v1::GetMeshResponse> {
        Ok(Response::new(convert::mesh(&self.sources.mesh, Instant::now())))
    }

    async fn probe_mesh(&self, request: Request<v1::ProbeMeshRequest>) -> Answer<v1::GetMeshResponse> {
        // It makes traffic: nothing for those who may only read.
        self.controls()?;
        let nodes = request.into_inner().nodes;
        let mut known = vec![];
        self.sources.mesh.each(|path| known.push(path.target.name()));
        if let Some(stranger) = nodes.iter().find(|node| !known.contains(node)) {
            return Err(Status::not_found(format!("there is no peer {stranger}; see them with: fabricctl peers")));
        }
        self.sources.mesh.probe(&nodes, PROBED).await;
        Ok(Response::new(convert::mesh(&self.sources.mesh, Instant::now())))
    }

    type DiagnoseStream = Answers<v1::Check>;

    async fn diagnose(&self, _: Request<v1::DiagnoseRequest>) -> Answer<Self::DiagnoseStream> {
        Ok(Response::new(questions::diagnose(self.sources.clone())))
    }

    async fn explain(&self, request: Request<v1::ExplainRequest>) -> Answer<v1::ExplainResponse> {
        let mut request = request.into_inner();
        // Who asks from afar asks the others too.
        request.local_only |= !self.may_change;
        Ok(Response::new(questions::explain_all(&self.sources, request).await?))
    }

    type AskNodesStream = Answers<v1::NodeAnswer>;

    async fn ask_nodes(&self, request: Request<v1::AskNodesRequest>) -> Answer<Self::AskNodesStream> {
        // Or questions would go round.
        self.controls()?;
        Ok(Response::new(questions::ask_nodes(self.sources.clone(), request.into_inner())?))
    }

    async fn get_policies(&self, _: Request<v1::GetPoliciesRequest>) -> Answer<v1::GetPoliciesResponse> {
        Ok(Response::new(policies::all(self.sources.policy.clone()).await?))
    }

    type WatchDropsStream = Drops;

    async fn watch_drops(&self, _: Request<v1::WatchDropsRequest>) -> Answer<Self::WatchDropsStream> {
        // Rules change as long as somebody listens.
        self.controls()?;
        Ok(Response::new(policies::drops(self.sources.policy.as_ref())?))
    }

    async fn set_log_level(&self, request: Request<v1::SetLogLevelRequest>) -> Answer<v1::SetLogLevelResponse> {
        let level = request.into_inner().level;
        if !level.is_empty() {
            self.controls()?;
            self.sources.log_level.set(&level).map_err(Status::invalid_argument)?;
        }
        Ok(Response::new(v1::SetLogLevelResponse { level: self.sources.log_level.get() }))
    }
}

fn ending() -> Status {
    Status::unavailable("the daemon is ending; try again")
}
