//! [`Reconciler`]: makes the table `fabric-policy` hold what NetworkPolicies say of this node's pods.
//!
//! A loop of its own, beside that of peers: policies wait for the API server and for no lease. It works alike: an event only
//! wakes it; one pass looks at what is there, plans, and writes the difference. Nothing is written before policies,
//! namespaces and pods were listed whole, and until then the kernel goes on with what it has, with one exception: where
//! there is no table yet, as after a boot, one is made that knows the pods that are attached already and no others. So a
//! pod that comes before the first list is closed until that is there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fabric_core::attachments::{Owner, SavedPod};
use fabric_core::model::{IfName, NodeName};
use fabric_core::policy::model::{Local, LocalPod, PodIdentity};
use fabric_core::policy::objects::uid;
use fabric_core::policy::plan::{Planner, PolicyPlan, plan};
use fabric_core::policy::separation::separate;
use fabric_core::policy::{Cluster, State};
use fabric_core::services::ObjectName;
use fabric_core::state::nft::{FoundTable, Table};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::applied::{Applied, AppliedPolicies};
use super::closed::Closed;
use super::connections::{self, Evaluated};
use super::drops::DropLog;
use super::status::{Counts, PolicyCounters, PolicyView};
use super::trouble::{cluster_trouble, refused};
use super::watch::Sources;
use crate::files::Files;
use crate::host::addresses::{Entry, NodePods};
use crate::host::attachments::{AttachedPod, AttachedPods};
use crate::kernel::bridged;
use crate::kernel::links::HostLinks;
use crate::kernel::section::SectionTable;
use crate::kubernetes::client::ApiServer;
use crate::kubernetes::event_recorder::EventRecorder;
use crate::retry::Backoff;
use crate::status::section::SectionStatus;

/// How often it is looked at what nobody announces.
const AUDIT: Duration = Duration::from_secs(10);
/// How long it takes at least from one evaluation of open connections to the next.
const REEVALUATE: Duration = Duration::from_secs(1);
/// The longest delay after the first pass that failed.
const RETRY: Duration = Duration::from_millis(500);
/// How long ClusterNetworkPolicies that can't be listed hold up all else, once. Those that the kernel has must not go for a
/// moment when the daemon starts.
const CLUSTER_POLICIES: Duration = Duration::from_secs(10);

/// What the loop has to know.
pub struct Inputs {
    /// Policies, namespaces, pods.
    pub sources: Sources,
    /// Where it is told what is wrong with a policy.
    pub api: Arc<ApiServer>,
    /// This node.
    pub node: NodeName,
    /// This node's pods, by what `fabric-cni` has saved.
    pub attached: watch::Receiver<Arc<AttachedPods>>,
    /// Pods that are there beside these, as after another plugin.
    pub pods: NodePods,
    /// What this node has said of itself: its subnets.
    pub files: Files,
    /// Whom to tell which pods' policies are applied.
    pub applied: AppliedPolicies,
    /// Pods may always connect to their own node.
    pub own_node_allowed: bool,
    /// Connections that are open when policies change are evaluated again.
    pub reevaluates_open: bool,
    /// Where the settings are: `/proc/sys/net`.
    pub sysctl_root: PathBuf,
}

/// Attachments that are there.
type Attachments = BTreeMap<Owner, AttachedPod>;

/// The loop.
pub struct Reconciler {
    inputs: Inputs,
    table: SectionTable,
    /// What holds between pods of this node where the table doesn't see them.
    frames: SectionTable,
    status: watch::Sender<Arc<SectionStatus>>,
    applied: watch::Sender<Option<Arc<Applied>>>,
    drops: DropLog,
    counters: PolicyCounters,
    retry: Backoff,
    /// Addresses of pods that were known after the last pass.
    known: BTreeSet<IpAddr>,
    /// ClusterNetworkPolicies are waited for until then; `None` before all else was listed.
    cluster_policies_until: Option<Instant>,
    open: Open,
    planner: Planner,
    events: EventRecorder,
    closed: Closed,
}

/// Connections that are open, and have to be evaluated again.
struct Open {
    /// Something has changed since they were evaluated.
    is_due: bool,
    /// They are not evaluated before: at most once a second.
    not_before: Instant,
    /// Addresses that are nobody's any more.
    gone: BTreeSet<IpAddr>,
}

impl Reconciler {
    /// A loop that has not looked at anything yet.
    #[must_use]
    pub fn new(inputs: Inputs, [table, frames]: [SectionTable; 2]) -> Self {
        let (status, retry) = (watch::Sender::new(Arc::default()), Backoff::new(RETRY, AUDIT));
        // What has changed while no daemon was here is not known.
        let open = Open { is_due: inputs.reevaluates_open, not_before: Instant::now(), gone: BTreeSet::new() };
        let (counters, known) = (PolicyCounters::default(), BTreeSet::new());
        let (applied, drops) = (watch::Sender::new(None), DropLog::default());
        let events = EventRecorder::start(inputs.api.clone(), inputs.node.clone());
        let (planner, closed) = (Planner::default(), Closed::default());
        Self {
            inputs,
            table,
            frames,
            status,
            applied,
            drops,
            counters,
            retry,
            known,
            cluster_policies_until: None,
            open,
            planner,
            events,
            closed,
        }
    }

    /// What it knows.
    #[must_use]
    pub fn view(&self) -> PolicyView {
        let (status, applied) = (self.status.subscribe(), self.applied.subscribe());
        PolicyView { status, applied, drops: self.drops.clone() }
    }

    /// What it counts.
    #[must_use]
    pub fn counters(&self) -> PolicyCounters {
        self.counters.clone()
    }

    /// Runs until the task is dropped.
    pub async fn run(mut self) {
        if let Err(error) = self.inputs.applied.turn_on() {
            warn!(%error, "fabric-cni can't be told which pods have their policies applied, and doesn't wait for it");
        }
        loop {
            let (mut warnings, shows_drops) = (vec![], self.drops.is_wanted());
            let ready = self.pass(shows_drops, &mut warnings).await;
            let next = match &ready {
                Ok(()) => {
                    self.retry.reset();
                    Instant::now() + AUDIT
                }
                Err(_) => Instant::now() + self.retry.delay(),
            };
            let next = if self.open.is_due && ready.is_ok() { next.min(self.open.not_before) } else { next };
            SectionStatus { ready, warnings }.publish("network policies", &self.status);
            let Inputs { sources, attached, .. } = &mut self.inputs;
            tokio::select! {
                Ok(()) = sources.policies.changed() => {}
                Ok(()) = sources.cluster_policies.changed() => {}
                Ok(()) = sources.namespaces.changed() => {}
                Ok(()) = sources.pods.changed() => {}
                Ok(()) = attached.changed() => {}
                () = self.table.changed() => {}
                () = self.frames.changed() => {}
                () = self.drops.changed(shows_drops) => {}
                () = sleep_until(next) => {}
            }
        }
    }

    async fn pass(&mut self, shows_drops: bool, warnings: &mut Vec<String>) -> Result<(), String> {
        let found = self.table.observe().await.map_err(|error| error.to_string())?;
        let (attachments, bridges, local) = self.local(warnings).await?;
        // Without it the rest holds all the same.
        let bridged = self.see_bridged(&bridges).await;
        let sources = &mut self.inputs.sources;
        let missing = match sources.missing() {
            None => {
                let until = self.cluster_policies_until.get_or_insert_with(|| Instant::now() + CLUSTER_POLICIES);
                let awaited = sources.awaits_cluster_policies() && Instant::now() < *until;
                awaited.then_some("ClusterNetworkPolicies")
            }
            missing => missing,
        };
        if let Some(missing) = missing {
            let trouble = {
                let connection = sources.connection.borrow();
                connection.trouble().or(connection.cluster_trouble()).map(|trouble| format!(": {trouble}"))
            };
            if found.is_none() {
                self.close(local, &bridges).await?;
            }
            return Err(format!("waiting for {missing}{}", trouble.unwrap_or_default()));
        }
        if let Some(trouble) = sources.connection.borrow().trouble() {
            warnings.push(format!("network policies are as they were known last: {trouble}"));
        }
        warnings.extend(cluster_trouble(sources));
        let state = State {
            cluster_policies: sources.cluster_policies.borrow_and_update().clone().unwrap_or_default(),
            policies: sources.policies.borrow_and_update().clone().unwrap_or_default(),
            namespaces: sources.namespaces.borrow_and_update().clone().unwrap_or_default(),
            pods: sources.pods.borrow_and_update().clone().unwrap_or_default(),
            local,
            now: now(),
        };
        let (unreadable, events) = refused(&state);
        warnings.extend(events.iter().map(|it| format!("{} {}: {}", it.kind.name(), it.object, it.message)));
        self.events.update(&events);
        let (policies, cluster_policies) = (state.policies.len(), state.cluster_policies.len());
        // Some milliseconds with thousands of pods.
        let state = Arc::new(state);
        let of = Arc::clone(&state);
        let mut planner = std::mem::take(&mut self.planner);
        let planned_by = spawn_blocking(move || {
            let planned = planner.plan(&Cluster::new(&of), &bridges);
            (planner, planned)
        });
        let mut planned;
        (self.planner, planned) = planned_by.await.map_err(|error| error.to_string())?;
        planned.show_drops(shows_drops);
        let written = self.write(&planned, found.as_ref()).await;
        if let (Err(reason), true) = (&written, shows_drops) {
            // It may be that which the kernel refuses: all else comes first.
            self.drops.refuse(reason.clone());
        }
        let is_changed = written?;
        let apart = bridged.is_err().then(|| separate(&planned.pods, &state.local));
        let bridged = match (bridged, self.separate(apart.as_ref()).await) {
            (Err(reason), Err(error)) => Err(format!("{reason}; nor can these pods be kept apart: {error}")),
            (bridged, separated) => bridged.and(separated),
        };
        let known: BTreeSet<IpAddr> = planned.pods.keys().copied().collect();
        if self.inputs.reevaluates_open {
            self.open.gone.extend(self.known.difference(&known));
            self.open.gone.retain(|ip| !known.contains(ip));
            self.open.is_due |= is_changed || !self.open.gone.is_empty();
        }
        self.known = known;
        let counts = self.tell_applied(&attachments, &planned, warnings);
        self.counters.counted(Counts { policies, cluster_policies, unreadable, ..counts });
        let PolicyPlan { pods, chains, .. } = planned;
        self.applied.send_replace(Some(Arc::new(Applied { state: Arc::clone(&state), pods, chains })));
        if self.open.is_due && Instant::now() >= self.open.not_before {
            self.reevaluate_open(state, warnings).await;
        }
        bridged
    }

    /// Keeps pods of this node apart, or doesn't any more.
    async fn separate(&self, want: Option<&Table>) -> Result<(), String> {
        let found = self.frames.observe().await.map_err(|error| error.to_string())?;
        let steps = self.frames.steps(want, found.as_ref());
        if steps.is_empty() { Ok(()) } else { self.frames.execute(&steps).await }
    }

    /// Writes what differs. False when nothing does.
    async fn write(&self, planned: &PolicyPlan, found: Option<&FoundTable>) -> Result<bool, String> {
        let steps = self.table.steps(&planned.table, found);
        if steps.is_empty() {
            return Ok(false);
        }
        self.table.execute(&steps).await?;
        self.counters.written();
        Ok(true)
    }

    /// Judges the connections again that are open.
    async fn reevaluate_open(&mut self, state: Arc<State>, warnings: &mut Vec<String>) {
        let gone = std::mem::take(&mut self.open.gone);
        (self.open.is_due, self.open.not_before) = (false, Instant::now() + REEVALUATE);
        let evaluated = spawn_blocking(move || connections::reevaluate(&state, &gone)).await;
        let evaluated =
            evaluated.map_err(|error| error.to_string()).and_then(|it| it.map_err(|error| error.to_string()));
        evaluated.iter().for_each(|open| self.counters.reevaluated(open));
        match evaluated {
            Ok(Evaluated { failed, why: Some(why), .. }) => warnings.push(format!(
                "{failed} open connections are not allowed any more and go on, as they can't be labelled: {why}"
            )),
            Ok(Evaluated { denied, allowed, forgotten, .. }) if denied + allowed + forgotten > 0 => {
                info!(denied, allowed, forgotten, "open connections were evaluated again");
            }
            Ok(_) => {}
            Err(error) => {
                self.open.is_due = true;
                warnings.push(format!("open connections go on as policies were when they began: {error}"));
            }
        }
    }

    /// Makes a table in which only the pods of this moment are known. They ran without policies before.
    async fn close(&self, local: Local, bridges: &BTreeSet<IfName>) -> Result<(), String> {
        let as_they_are = |(ip, _)| (ip, LocalPod { identity: None });
        let local = Local { pods: local.pods.into_iter().map(as_they_are).collect(), ..local };
        let state = State { local, ..State::default() };
        let planned = plan(&Cluster::new(&state), bridges);
        self.write(&planned, None).await.map(drop)
    }

    /// Tells `fabric-cni` which pods' policies are applied, and a person which are not.
    fn tell_applied(&mut self, attachments: &Attachments, planned: &PolicyPlan, warnings: &mut Vec<String>) -> Counts {
        let is_known = |ips: &BTreeSet<IpAddr>| ips.iter().all(|ip| planned.pods.contains_key(ip));
        let (known, waiting): (Vec<_>, Vec<_>) = attachments.iter().partition(|(_, pod)| is_known(&pod.ips));
        let late = self.closed.are(Instant::now(), waiting.iter().map(|(owner, _)| *owner));
        for (owner, pod) in waiting.iter().filter(|(owner, _)| late.contains(*owner)) {
            let name = pod.pod.as_ref().map(|pod| format!("pod {}/{}", pod.namespace, pod.name));
            warnings.push(format!(
                "{} is closed: the API server has not told of it yet (container {})",
                name.unwrap_or_else(|| "a pod".to_owned()),
                owner.container
            ));
        }
        if let Err(error) = self.inputs.applied.are(known.into_iter().map(|(owner, _)| owner)) {
            warnings.push(format!(
                "fabric-cni can't be told which pods have their policies applied, so each waits its whole time: {error}"
            ));
        }
        let isolated = planned.pods.values().filter(|pod| !pod.is_open());
        let isolated: BTreeSet<_> = isolated.map(|isolation| &isolation.pod).collect();
        Counts { isolated: isolated.len(), pending: waiting.len(), ..Counts::default() }
    }

    /// Lets the packet filter see what passes between pods of this node.
    async fn see_bridged(&self, bridges: &BTreeSet<IfName>) -> Result<(), String> {
        let (bridges, sysctl_root) = (bridges.clone(), self.inputs.sysctl_root.clone());
        let set = spawn_blocking(move || bridged::filter_bridged(&bridges, &sysctl_root));
        let set = set.await.map_err(|error| error.to_string())?;
        set.map_err(|reason| {
            format!("pods of this node that a policy isolates are cut off from the others here, whatever it allows: {reason}")
        })
    }

    /// This node's pods and its own addresses.
    async fn local(&mut self, warnings: &mut Vec<String>) -> Result<(Attachments, BTreeSet<IfName>, Local), String> {
        let attached = self.inputs.attached.borrow_and_update().clone();
        let subnets = self.inputs.files.read().map(|file| file.subnets()).unwrap_or_default();
        let ours: Vec<_> = subnets.values().map(|subnets| subnets.subnet).collect();
        if ours.is_empty() {
            // No pod can be added yet. Those that are there are another plugin's, as flannel's, and must not be closed.
            return Err("this node has no subnet yet".to_owned());
        }
        let (node_pods, of_ours) = (self.inputs.pods.clone(), ours.clone());
        let looked = spawn_blocking(move || {
            let addresses = node_pods.read(&of_ours).map_err(|error| error.to_string())?;
            let links = HostLinks::ask().map_err(|error| error.to_string())?;
            let host: BTreeSet<IpAddr> = links.addresses.values().flatten().map(|(ip, _)| *ip).collect();
            Ok::<_, String>((addresses, host))
        });
        let (addresses, mut host) = looked.await.map_err(|error| error.to_string())??;
        let living: BTreeSet<&Owner> = addresses.pods.iter().map(|pod| &pod.owner).collect();
        // What is saved of an attachment comes first, so these are another plugin's. A file that tells no owner is being
        // written.
        let is_others = |entry: &&Entry| entry.owner.as_ref().is_some_and(|owner| !living.contains(owner));
        let others = addresses.attached.iter().filter(is_others).map(|entry| entry.ip);
        let attachments: Attachments = attached
            .attachments
            .iter()
            .filter(|(owner, _)| living.contains(owner))
            .map(|(o, a)| (o.clone(), a.clone()))
            .collect();
        // The VTEP's, on a link of our own.
        host.extend(ours.iter().map(|subnet| subnet.base()));
        let mut pods: BTreeMap<IpAddr, LocalPod> = others.map(|ip| (ip, LocalPod { identity: None })).collect();
        for pod in attachments.values() {
            let local = LocalPod { identity: pod.pod.as_ref().map(identity) };
            for ip in &pod.ips {
                if let Some(twice) = pods.insert(*ip, local.clone()).filter(|other| other.identity.is_some()) {
                    warnings.push(format!("two attachments have the address {ip}, of which one is {twice:?}"));
                }
            }
        }
        let bridges = attached.bridges.clone();
        Ok((attachments, bridges, Local { pods, host, own_node_allowed: self.inputs.own_node_allowed }))
    }
}

fn identity(pod: &SavedPod) -> PodIdentity {
    PodIdentity { name: ObjectName::new(&pod.namespace, &pod.name), uid: pod.uid.as_deref().map(uid) }
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
