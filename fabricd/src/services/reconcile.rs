//! [`Reconciler`]: makes the table `fabric-services` hold what the API server says of Services.
//!
//! A loop of its own, beside that of peers: Services wait for the API server and for no lease, and peers wait for no batch of
//! Services. It works alike: an event only wakes it; one pass looks at what is there, plans, and writes the difference.
//! Nothing is written before Services, slices and the own Node were listed whole; until then the kernel goes on with what it
//! has. See decision 0062.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::model::{Family, NodeName, PerFamily, Subnet};
use fabric_core::services::ObjectName;
use fabric_core::services::model::NodeFacts;
use fabric_core::services::plan::{Context, ServicePlan, UdpFrontends};
use fabric_core::services::sets::Services;
use fabric_core::state::nft::FoundTable;
use jiff::Timestamp;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};
use tracing::info;

use super::connections;
use super::handle::{Handle, Question};
use super::health::{HealthServer, Progress};
use super::status::ServicesCounters;
use super::watch::Sources;
use crate::config::services_args::NodePortAddresses;
use crate::files::Files;
use crate::host::attachments::AttachedPods;
use crate::kernel::links::HostLinks;
use crate::kernel::section::SectionTable;
use crate::kernel::{bridged, kube_proxy, services};
use crate::kubernetes::client::ApiServer;
use crate::kubernetes::event_recorder::{EventRecorder, Kind, ObjectEvent, Reason};
use crate::retry::Backoff;
use crate::status::section::SectionStatus;
use crate::status::view::View;

/// How often it is looked at what nobody announces.
const AUDIT: Duration = Duration::from_secs(10);
/// The longest delay after the first pass that failed.
const RETRY: Duration = Duration::from_millis(500);
/// As many questions may wait.
const QUESTIONS: usize = 4;
/// Where kube-proxy answers health checks.
const KUBE_PROXY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10_256);

/// What the loop has to know.
pub struct Inputs {
    /// This node's name in Kubernetes.
    pub node: NodeName,
    /// The API server, for Events.
    pub api: Arc<ApiServer>,
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
    /// Where load balancers ask whether this node takes connections; `None` nowhere.
    pub health_addr: Option<SocketAddr>,
    /// Whether a kube-proxy that is there is replaced; else Services stay off beside it.
    pub replaces_kube_proxy: bool,
    /// Which addresses take NodePorts.
    pub node_ports_at: NodePortAddresses,
    /// The prefixes that ClusterIPs are from, beside those that the API server says.
    pub service_cidrs: Vec<Subnet>,
}

/// The loop.
pub struct Reconciler {
    inputs: Inputs,
    table: SectionTable,
    plan: Option<ServicePlan>,
    /// What UDP was last held against.
    udp: Option<UdpFrontends>,
    status: watch::Sender<Arc<SectionStatus>>,
    counters: ServicesCounters,
    retry: Backoff,
    health: HealthServer,
    progress: Progress,
    events: EventRecorder,
    questions: (mpsc::Sender<Question>, mpsc::Receiver<Question>),
}

/// What is there of kube-proxy.
#[derive(Clone, Debug)]
struct KubeProxy {
    /// Of which mode its rules are.
    rules: Vec<&'static str>,
    /// Somebody answers where it answers health checks.
    is_alive: bool,
}

impl KubeProxy {
    fn is_here(&self) -> bool {
        self.is_alive || !self.rules.is_empty()
    }

    /// Why Services stay off beside it.
    fn in_the_way(&self) -> String {
        let what = match (self.is_alive, self.rules.as_slice()) {
            (_, []) => "kube-proxy runs on this node".to_owned(),
            (true, rules) => format!("kube-proxy runs on this node (by {})", rules.join(", ")),
            (false, rules) => format!("kube-proxy runs on this node, or has left its rules ({})", rules.join(", ")),
        };
        format!(
            "{what}, and two must not translate the same Services; remove it from the cluster (kubectl -n kube-system delete \
             daemonset kube-proxy), then its rules with kube-proxy --cleanup or a reboot, or let fabricd do that \
             (--replace-kube-proxy), or turn --services off"
        )
    }
}

/// Why a pass wrote nothing, or not all.
type Blocked = String;

impl Reconciler {
    /// A loop that has not looked at anything yet. Must be called within a tokio runtime.
    #[must_use]
    pub fn new(inputs: Inputs, table: SectionTable) -> Self {
        let status = watch::Sender::new(Arc::default());
        let (counters, retry) = (ServicesCounters::default(), Backoff::new(RETRY, AUDIT));
        let progress = Progress::default();
        let health = HealthServer::new(progress.clone());
        let events = EventRecorder::start(inputs.api.clone(), inputs.node.clone());
        let questions = mpsc::channel(QUESTIONS);
        Self { inputs, table, plan: None, udp: None, status, counters, retry, health, progress, events, questions }
    }

    /// How others watch it, and ask what it knows.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle { status: self.status.subscribe(), questions: self.questions.0.clone() }
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
            self.progress.passed(ready.is_ok());
            let next = match &ready {
                Ok(()) => {
                    self.retry.reset();
                    Instant::now() + AUDIT
                }
                Err(_) => Instant::now() + self.retry.delay(),
            };
            SectionStatus { ready, warnings }.publish("Services", &self.status);
            let Inputs { sources, view, pods, .. } = &mut self.inputs;
            let mut asked = None;
            tokio::select! {
                question = self.questions.1.recv() => asked = question,
                Ok(()) = sources.services.changed() => {}
                Ok(()) = sources.slices.changed() => {}
                Ok(()) = sources.node.changed() => {}
                Ok(()) = sources.cidrs.changed() => {}
                Ok(()) = view.changed() => {}
                Ok(()) = pods.changed() => {}
                () = self.table.changed() => {}
                () = sleep_until(next) => {}
            }
            if let Some(question) = asked {
                self.answer(question).await;
            }
            woken = Instant::now();
        }
    }

    /// Tells what this node makes of some Services, beside what the kernel holds of them.
    async fn answer(&self, Question { what, reply }: Question) {
        let found = self.table.observe().await.ok().flatten().unwrap_or_default();
        let services = self.plan.iter().flat_map(|plan| plan.find(&what).into_iter().map(move |of| (plan, of)));
        // Whoever asked may be gone.
        let _ = reply.send(services.map(|(plan, service)| plan.describe(&service, &found)).collect());
    }

    async fn pass(&mut self, warnings: &mut Vec<String>, woken: Instant) -> Result<(), Blocked> {
        let kube_proxy = self.kube_proxy().await;
        if kube_proxy.is_here() && !self.inputs.replaces_kube_proxy {
            self.health.close();
            return Err(kube_proxy.in_the_way());
        }
        if kube_proxy.is_alive {
            warnings.push(
                "kube-proxy runs on this node still; Services are translated before it. Remove it from the cluster \
                 (kubectl -n kube-system delete daemonset kube-proxy): then its rules are removed here"
                    .to_owned(),
            );
        } else if let Some(address) = self.inputs.health_addr
            && let Err(error) = self.health.open_node_port(address).await
        {
            warnings.push(format!(
                "load balancers that ask on {address} get no answer: {error}; end what listens there, or choose another \
                 address with --services-health-addr"
            ));
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
        self.progress.node_is_going(facts.going);
        self.prepare_host(warnings);
        let context = self.context(&facts, &services, warnings);
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
        let Some(plan) = &mut self.plan else { return Ok(()) };
        self.counters.planned(plan.counts());
        let (checks, late) = plan.health_checks();
        let steps = self.table.steps(plan.table(), found.as_ref());
        if !steps.is_empty() {
            self.table.execute(&steps).await?;
            self.counters.written(woken.elapsed());
        }
        if !kube_proxy.rules.is_empty() && !kube_proxy.is_alive {
            // All that it did is done by now, before its rules are asked.
            warnings.extend(remove_kube_proxy().await.err());
        }
        self.counters.programmed(&plan.take_triggers(), Timestamp::now());
        let mut events = troubles(plan);
        events.extend(late.into_iter().map(|service| {
            health_check_refused(service, "another Service, which is older, has this healthCheckNodePort")
        }));
        let unanswered = self.health.answer(checks).await;
        events.extend(unanswered.into_iter().map(|(address, check, error)| {
            health_check_refused(check.service, &format!("cannot listen on {address} of this node: {error}"))
        }));
        warnings.extend(events.iter().map(|event| format!("Service {}: {}", event.object, event.message)));
        self.events.update(&events);
        // A kernel without ctnetlink translates all the same.
        warnings.extend(self.forget_udp(found.as_ref()).await.err());
        Ok(())
    }

    /// Once the maps say who serves, forgets the UDP connections that lead to others. What fails is tried again by the next
    /// pass.
    async fn forget_udp(&mut self, found: Option<&FoundTable>) -> Result<(), Blocked> {
        let Some(plan) = &self.plan else { return Ok(()) };
        let frontends = plan.udp_frontends().clone();
        let before = match &self.udp {
            Some(last) if *last == frontends => return Ok(()),
            Some(last) => last.clone(),
            None => found.map(UdpFrontends::found).unwrap_or_default(),
        };
        let now = frontends.clone();
        let forgotten = tokio::task::spawn_blocking(move || connections::forget(&now, &before)).await;
        let forgotten = forgotten
            .map_err(|error| error.to_string())?
            .map_err(|error| format!("UDP connections to endpoints that are gone can't be deleted: {error}"))?;
        if forgotten > 0 {
            info!(connections = forgotten, "UDP connections to endpoints that don't serve were deleted");
        }
        self.udp = Some(frontends);
        Ok(())
    }

    /// Looks for kube-proxy, by its rules and by its health check.
    async fn kube_proxy(&self) -> KubeProxy {
        let rules = tokio::task::spawn_blocking(kube_proxy::found).await;
        // Once the port is ours nobody else answers there.
        let is_alive = !self.health.has_node_port()
            && matches!(timeout(Duration::from_secs(1), TcpStream::connect(KUBE_PROXY)).await, Ok(Ok(_)));
        KubeProxy { rules: rules.unwrap_or_default(), is_alive }
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
    fn context(&mut self, facts: &NodeFacts, services: &Services, warnings: &mut Vec<String>) -> Context {
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
                let all = links.addresses.values().flatten().map(|(ip, _)| *ip).collect();
                node_port_ips(&self.inputs.node_ports_at, &all, &facts.internal_ips, services)
            }
            Err(error) => {
                warnings.push(format!("cannot read this host's addresses, so no NodePort is added: {error}"));
                self.plan.as_ref().map(|plan| plan.context().node_ips.clone()).unwrap_or_default()
            }
        };
        let of_api = self.inputs.sources.cidrs.borrow_and_update().clone();
        let mut service_cidrs: Vec<Subnet> = of_api.into_iter().chain(self.inputs.service_cidrs.clone()).collect();
        service_cidrs.sort_unstable();
        service_cidrs.dedup();
        let in_use = |cidr: &Subnet| {
            let pods = own.get(cidr.family()).into_iter().chain(network.get(cidr.family()));
            pods.copied().any(|pods| pods.overlaps(*cidr)) || node_ips.iter().any(|ip| cidr.contains(*ip))
        };
        for cidr in service_cidrs.extract_if(.., |cidr| in_use(cidr)) {
            warnings.push(format!(
                "the ServiceCIDR {cidr} has addresses of pods or of this node in it, so what is sent to addresses of it that \
                 no Service has is not dropped; give Services a prefix of their own"
            ));
        }
        Context {
            node: self.inputs.node.as_str().into(),
            zone: facts.zone.clone(),
            own,
            network,
            node_ips,
            service_cidrs,
        }
    }
}

/// Removes the rules of a kube-proxy that has ended.
async fn remove_kube_proxy() -> Result<(), String> {
    let removed = tokio::task::spawn_blocking(kube_proxy::remove).await.map_err(|error| error.to_string())?;
    let removed = removed.map_err(|error| {
        format!("kube-proxy's rules can't be removed, and may refuse what Services take: {error}; it is tried again")
    })?;
    if !removed.is_empty() {
        info!(removed = removed.join(", "), "kube-proxy's rules were removed");
    }
    Ok(())
}

/// The addresses of this host that take NodePorts. One that a Service has too, since somebody has put a load balancer's
/// address on an interface, is none of them.
fn node_port_ips(
    at: &NodePortAddresses,
    here: &BTreeSet<IpAddr>,
    internal: &[IpAddr],
    services: &Services,
) -> Vec<IpAddr> {
    let is_a_services =
        |ip: &IpAddr| services.values().any(|service| service.addresses(Family::of(*ip)).any(|of| of == *ip));
    match at {
        NodePortAddresses::Primary => internal.iter().filter(|ip| here.contains(ip)).copied().collect(),
        NodePortAddresses::All => here.iter().filter(|ip| !is_a_services(ip)).copied().collect(),
        NodePortAddresses::Within(prefixes) => {
            let is_within = |ip: &&IpAddr| prefixes.iter().any(|prefix| prefix.contains(**ip));
            here.iter().filter(is_within).filter(|ip| !is_a_services(ip)).copied().collect()
        }
    }
}

/// What is wrong with Services, whichever node looks at them.
fn troubles(plan: &ServicePlan) -> Vec<ObjectEvent> {
    let mut conflicts: BTreeMap<(&ObjectName, &ObjectName), Vec<String>> = BTreeMap::new();
    for conflict in plan.conflicts() {
        conflicts.entry((conflict.other, conflict.owner)).or_default().push(conflict.frontend.to_string());
    }
    let conflicts = conflicts.into_iter().map(|((service, owner), frontends)| ObjectEvent {
        kind: Kind::Service,
        object: service.clone(),
        reason: Reason::Conflict,
        message: format!(
            "the Service {owner} has {} too, and keeps it, as it is older or has it as ClusterIP; change this one",
            frontends.join(", ")
        ),
    });
    let refused = plan.refused().flat_map(|service| {
        let event = |message: &String| ObjectEvent {
            kind: Kind::Service,
            object: service.name.clone(),
            reason: Reason::Refused,
            message: message.clone(),
        };
        service.refused.iter().map(event)
    });
    conflicts.chain(refused).collect()
}

fn health_check_refused(service: ObjectName, why: &str) -> ObjectEvent {
    let message = format!("its load balancer gets no answer from this node's health check: {why}; it is tried again");
    ObjectEvent { kind: Kind::Service, object: service, reason: Reason::HealthCheck, message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fabric_core::services::ServiceSet;
    use fabric_core::services::objects::ServiceObject;
    use serde_json::json;

    #[test]
    fn node_ports_are_taken_at_addresses_of_this_host_that_no_service_has() {
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        let here = BTreeSet::from([ip("192.0.2.11"), ip("198.51.100.7"), ip("2001:db8::11")]);
        let object: ServiceObject = serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.10", "type": "LoadBalancer"},
            "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.7"}]}},
        }))
        .expect("a Service");
        let services = ServiceSet::listed([&object]);
        let at = |at: &str| {
            let at: NodePortAddresses = at.parse().expect("a value");
            let ips = node_port_ips(&at, &here, &[ip("192.0.2.11"), ip("203.0.113.9")], services.services());
            ips.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(at("primary"), "192.0.2.11", "the Node may say an address that isn't here (yet)");
        assert_eq!(at("all"), "192.0.2.11 2001:db8::11");
        assert_eq!(at("198.51.100.0/24,2001:db8::/32"), "2001:db8::11");
        assert_eq!(at("203.0.113.0/24"), "");
    }
}
