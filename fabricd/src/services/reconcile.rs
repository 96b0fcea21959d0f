//! [`Reconciler`]: makes the table `fabric-services` hold what the API server says of Services.
//!
//! A loop of its own, beside that of peers: Services wait for the API server and for no lease, and peers wait for no batch of
//! Services. It works alike: an event only wakes it; one pass looks at what is there, plans, and writes the difference.
//! Nothing is written before Services, slices and the own Node were listed whole; until then the kernel goes on with what it
//! has. See decision 0062.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::model::{NodeName, PerFamily, Subnet};
use fabric_core::services::model::NodeFacts;
use fabric_core::services::plan::{Context, ServicePlan, UdpFrontends};
use fabric_core::services::sets::{Services, Slices};
use fabric_core::state::nft::FoundTable;
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

use super::connections;
use super::status::ServicesCounters;
use super::watch::Sources;
use crate::files::Files;
use crate::host::attachments::AttachedPods;
use crate::kernel::links::HostLinks;
use crate::kernel::section::SectionTable;
use crate::kernel::{bridged, services};
use crate::retry::Backoff;
use crate::status::section::SectionStatus;
use crate::status::view::View;

/// How often it is looked at what nobody announces.
const AUDIT: Duration = Duration::from_secs(10);
/// The longest delay after the first pass that failed.
const RETRY: Duration = Duration::from_millis(500);
/// Where kube-proxy answers health checks.
const KUBE_PROXY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 10_256);

/// What the loop has to know.
pub struct Inputs {
    /// This node's name in Kubernetes.
    pub node: NodeName,
    /// Services, slices, the own Node.
    pub sources: Sources,
    /// What the loop of peers knows: this node's subnets.
    pub view: watch::Receiver<Arc<View>>,
    /// What the daemon before this one left: the same.
    pub files: Files,
    /// The bridges of this node's pods.
    pub pods: watch::Receiver<Arc<AttachedPods>>,
    /// Where the settings are: `/proc/sys/net`.
    pub sysctl_root: PathBuf,
}

/// The loop.
pub struct Reconciler {
    inputs: Inputs,
    table: SectionTable,
    plan: Option<ServicePlan>,
    /// What UDP was last held against.
    udp: Option<Udp>,
    status: watch::Sender<Arc<SectionStatus>>,
    counters: ServicesCounters,
    retry: Backoff,
}

/// UDP as it was after a pass.
struct Udp {
    services: Services,
    slices: Slices,
    context: Context,
    frontends: UdpFrontends,
}

/// Why a pass wrote nothing, or not all.
type Blocked = String;

impl Udp {
    fn is_of(&self, services: &Services, slices: &Slices, context: &Context) -> bool {
        let same = services.changes(&self.services, |was, is| was == is).next().is_none();
        same && slices.changes(&self.slices, |was, is| was == is).next().is_none() && self.context == *context
    }
}

impl Reconciler {
    /// A loop that has not looked at anything yet.
    #[must_use]
    pub fn new(inputs: Inputs, table: SectionTable) -> Self {
        let status = watch::Sender::new(Arc::default());
        let (counters, retry) = (ServicesCounters::default(), Backoff::new(RETRY, AUDIT));
        Self { inputs, table, plan: None, udp: None, status, counters, retry }
    }

    /// What it knows.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<SectionStatus>> {
        self.status.subscribe()
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> ServicesCounters {
        self.counters.clone()
    }

    /// Runs until the task is dropped.
    pub async fn run(mut self) {
        let mut woken = Instant::now();
        loop {
            let mut warnings = vec![];
            let ready = self.pass(&mut warnings, woken).await;
            let next = match &ready {
                Ok(()) => {
                    self.retry.reset();
                    Instant::now() + AUDIT
                }
                Err(_) => Instant::now() + self.retry.delay(),
            };
            SectionStatus { ready, warnings }.publish("Services", &self.status);
            let Inputs { sources, view, pods, .. } = &mut self.inputs;
            tokio::select! {
                Ok(()) = sources.services.changed() => {}
                Ok(()) = sources.slices.changed() => {}
                Ok(()) = sources.node.changed() => {}
                Ok(()) = view.changed() => {}
                Ok(()) = pods.changed() => {}
                () = self.table.changed() => {}
                () = sleep_until(next) => {}
            }
            woken = Instant::now();
        }
    }

    async fn pass(&mut self, warnings: &mut Vec<String>, woken: Instant) -> Result<(), Blocked> {
        if self.has_kube_proxy().await {
            return Err(
                "kube-proxy runs on this node, and two must not translate the same Services; remove it from the \
                        cluster (kubectl -n kube-system delete daemonset kube-proxy), then its rules with kube-proxy \
                        --cleanup or a reboot, or turn --services off"
                    .to_owned(),
            );
        }
        let sources = &mut self.inputs.sources;
        if let Some(missing) = sources.missing() {
            let reason =
                sources.connection.borrow().trouble().map(|trouble| format!(": {trouble}")).unwrap_or_default();
            return Err(format!("waiting for {missing}{reason}"));
        }
        if let Some(trouble) = sources.connection.borrow().trouble() {
            warnings.push(format!("Services are as they were known last: {trouble}"));
        }
        let services = sources.services.borrow_and_update().clone().unwrap_or_default();
        let slices = sources.slices.borrow_and_update().clone().unwrap_or_default();
        let facts = sources.node.borrow_and_update().clone().unwrap_or_default();
        self.prepare_host(warnings);
        let context = self.context(&facts, warnings);
        let found = self.table.observe().await.map_err(|error| error.to_string())?;
        match &mut self.plan {
            Some(plan) if *plan.context() == context => plan.update(&services, &slices),
            plan => {
                let nothing = FoundTable::default();
                let before = found.as_ref().unwrap_or(&nothing);
                let mut new = ServicePlan::new(context, &services, &slices, before);
                new.share(before);
                *plan = Some(new);
            }
        }
        let Some(plan) = &self.plan else { return Ok(()) };
        self.counters.planned(plan.counts());
        for conflict in plan.conflicts() {
            warnings.push(format!(
                "the Services {} and {} both have {}; it is {}'s, which is older or has it as ClusterIP; change the other one",
                conflict.owner, conflict.other, conflict.frontend, conflict.owner
            ));
        }
        for service in services.values() {
            warnings.extend(service.refused.iter().map(|refused| format!("Service {}: {refused}", service.name)));
        }
        let steps = self.table.steps(plan.table(), found.as_ref());
        if !steps.is_empty() {
            self.table.execute(&steps).await?;
            self.counters.written(woken.elapsed());
        }
        // A kernel without ctnetlink translates all the same.
        warnings.extend(self.forget_udp(&services, &slices, found.as_ref()).await.err());
        Ok(())
    }

    /// Once the maps say who serves, forgets the UDP connections that lead to others. What fails is tried again by the next
    /// pass.
    async fn forget_udp(
        &mut self,
        services: &Services,
        slices: &Slices,
        found: Option<&FoundTable>,
    ) -> Result<(), Blocked> {
        let Some(plan) = &self.plan else { return Ok(()) };
        if self.udp.as_ref().is_some_and(|last| last.is_of(services, slices, plan.context())) {
            return Ok(());
        }
        let frontends = plan.udp_frontends();
        let before = match &self.udp {
            Some(last) => last.frontends.clone(),
            None => found.map(UdpFrontends::found).unwrap_or_default(),
        };
        let udp = Udp {
            services: services.clone(),
            slices: slices.clone(),
            context: plan.context().clone(),
            frontends: frontends.clone(),
        };
        let forgotten = tokio::task::spawn_blocking(move || connections::forget(&frontends, &before)).await;
        let forgotten = forgotten
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("UDP connections to endpoints that are gone can't be deleted: {error}"))?;
        if forgotten > 0 {
            info!(connections = forgotten, "UDP connections to endpoints that don't serve were deleted");
        }
        self.udp = Some(udp);
        Ok(())
    }

    /// A living kube-proxy: by its rules, or by its health check.
    async fn has_kube_proxy(&self) -> bool {
        let has_rules = tokio::task::spawn_blocking(services::has_kube_proxy).await;
        if matches!(has_rules, Ok(Ok(true))) {
            return true;
        }
        matches!(timeout(Duration::from_secs(1), TcpStream::connect(KUBE_PROXY)).await, Ok(Ok(_)))
    }

    /// What of the host must be so that Services work.
    fn prepare_host(&mut self, warnings: &mut Vec<String>) {
        let bridges: BTreeSet<_> = self.inputs.pods.borrow_and_update().bridges.clone();
        if let Err(reason) = bridged::filter_bridged(&bridges, &self.inputs.sysctl_root) {
            warnings.push(format!("pods of this node reach each other by no Service address: {reason}"));
        }
        warnings.extend(services::be_liberal(&self.inputs.sysctl_root).err());
    }

    /// What is known of this node. Its subnets are known by the lease, or by what the daemon before this one left.
    fn context(&mut self, facts: &NodeFacts, warnings: &mut Vec<String>) -> Context {
        let view = self.inputs.view.borrow_and_update().clone();
        let (mut own, mut network) = (PerFamily::<Subnet>::default(), PerFamily::<Subnet>::default());
        if let Some(file) = self.inputs.files.read() {
            for (family, subnets) in file.subnets().iter() {
                (*own.slot(family), *network.slot(family)) = (Some(subnets.subnet), Some(subnets.network));
            }
        }
        if let Some(held) = &view.holding.own {
            own = held.key.subnets().map(|_, subnet| *subnet);
        }
        if let Some(config) = &view.network {
            network = config.spaces.map(|_, space| space.network);
        }
        let node_ips = match HostLinks::ask() {
            Ok(links) => {
                let is_here = |ip: &&std::net::IpAddr| links.addresses.values().flatten().any(|(of, _)| of == *ip);
                facts.internal_ips.iter().filter(is_here).copied().collect()
            }
            Err(error) => {
                warnings.push(format!("cannot read this host's addresses, so no NodePort is added: {error}"));
                self.plan.as_ref().map(|plan| plan.context().node_ips.clone()).unwrap_or_default()
            }
        };
        Context { node: self.inputs.node.as_str().into(), zone: facts.zone.clone(), own, network, node_ips }
    }
}
