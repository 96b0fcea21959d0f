//! The reconcile loop: makes the kernel hold what the leases say, and says how far it has come.
//!
//! One pass looks at the kernel, plans from everything that is known now, writes the difference, and publishes a
//! [`View`]. It never acts on an event as such: an event, of the kernel or of the store, only wakes it. So what was
//! missed, lost or done by hand is put right by the next pass, and a pass that finds nothing to do writes nothing.

pub mod filter;
pub mod pending;
pub mod repairs;
pub mod retention;
mod write;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::derived::Dirty;
use fabric_core::device;
use fabric_core::diff::{Key, Op, Plan, TableName, diff, diff_of, nft};
use fabric_core::handoff::{NODE_FILE_VERSION, NodeFile, NodeSubnet, NotReady, Readiness};
use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::{Family, NodeName, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::FilterOptions;
use fabric_core::plan::{Conflict, Desired, Facts, Inputs, PeerPlan, Vtep};
use fabric_core::state::{State as KernelState, Sysctl};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

pub use self::write::Written;
pub(crate) use self::write::lines;
use crate::files::state_dir::State;
use crate::files::{Files, unknown};
use crate::host::attachments::AttachedPods;
use crate::host::firewall::Judge;
use crate::host::underlay::{self, Selector, Steady, Underlay, UnderlayError};
use crate::kernel::{Kernel, Observed, Touched};
use crate::lease::{Holding, Own, Wanted};
use crate::metrics::Metrics;
use crate::reconcile::filter::Rules;
use crate::reconcile::pending::Pending;
use crate::reconcile::repairs::{Causes, Repairs};
use crate::reconcile::retention::Kept;
use crate::retry::Backoff;
use crate::status::view::{PeerTrouble, View, VtepView};
use crate::store::{Connection, LeaseStore, Network};

/// How often the kernel is looked at although nothing has happened: [`Kernel::audit`].
const AUDIT: Duration = Duration::from_secs(10);
/// The longest delay after the first pass that failed; each next one is twice as long, up to an audit.
const RETRY: Duration = Duration::from_millis(500);

/// The settings of this node that the loop needs.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: NodeName,
    /// How its underlay interface is chosen.
    pub selectors: Vec<Selector>,
    /// Addresses to publish instead of the interface's.
    pub public_ips: PerFamily<IpAddr>,
    /// What the packet filter is to do.
    pub rules: FilterOptions,
}

/// The loop of one node.
#[derive(Debug)]
pub struct Reconciler<S, K> {
    node: Node,
    store: Arc<S>,
    kernel: K,
    files: Files,
    wanted: watch::Sender<Option<Wanted>>,
    view: watch::Sender<Arc<View>>,
    rules: Rules,
    underlays: Steady,
    firewall: Judge,
    applied: Option<NetworkConfig>,
    /// The config that was in force before the start, until the store has shown one.
    remembered: Option<NetworkConfig>,
    kept: Kept,
    commands: (mpsc::Sender<Command>, mpsc::Receiver<Command>),
    waiting: Vec<oneshot::Sender<Snapshot>>,
    last: Option<Arc<Written>>,
    /// What is desired, and what it was made of.
    plan: Option<PeerPlan>,
    /// The entries that may differ between what is desired and what the kernel has: only these are compared.
    dirty: Dirty<Key>,
    metrics: Arc<Metrics>,
    repairs: Repairs,
    retry: Backoff,
}

/// What a person tells the loop.
#[derive(Debug)]
pub enum Command {
    /// Apply what is pending of the network config. Answers with what that was.
    Migrate {
        /// Where the answer goes.
        reply: oneshot::Sender<Vec<String>>,
    },
    /// Tell what the next pass sees.
    Snapshot {
        /// Where the answer goes.
        reply: oneshot::Sender<Snapshot>,
    },
}

/// What a pass saw, for somebody who asked. Nothing of it is copied.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What the kernel should hold; `None` as long as that isn't known.
    pub wanted: Option<Arc<Desired>>,
    /// What it holds; `None` when it can't be read.
    pub observed: Option<Arc<Observed>>,
    /// The steps that are left; `None` as long as it isn't known what the kernel should hold, or what it holds.
    pub left: Option<Arc<Plan>>,
    /// What was written last.
    pub last: Option<Arc<Written>>,
    /// Why the node isn't ready. Empty when it is.
    pub blocked: String,
}

/// Why a pass ended before there was anything to write.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocked {
    code: NotReady,
    reason: String,
}

fn starting(reason: impl Into<String>) -> Blocked {
    Blocked { code: NotReady::Starting, reason: reason.into() }
}

fn failed(reason: impl ToString) -> Blocked {
    Blocked { code: NotReady::Failed, reason: reason.to_string() }
}

impl<S: LeaseStore, K: Kernel> Reconciler<S, K> {
    /// A loop that has not looked at anything yet.
    /// `before` is what the daemon before this one left on disk.
    pub fn new(node: Node, store: Arc<S>, kernel: K, files: Files, before: State) -> Self {
        let view = View::new(node.name.clone());
        Self {
            rules: Rules::new(node.rules.clone()),
            underlays: Steady::default(),
            firewall: Judge::default(),
            node,
            store,
            kernel,
            files,
            wanted: watch::channel(None).0,
            view: watch::channel(Arc::new(view)).0,
            applied: None,
            remembered: before.network,
            kept: Kept::new(before.leases),
            commands: mpsc::channel(8),
            waiting: vec![],
            last: None,
            plan: None,
            dirty: Dirty::Everything,
            metrics: Arc::default(),
            repairs: Repairs::default(),
            retry: Backoff::new(RETRY, AUDIT),
        }
    }

    /// Lets the pods of these ports use no addresses but their own.
    pub fn guard_ports(&mut self, pods: watch::Receiver<Arc<AttachedPods>>) {
        self.rules.guard_ports(pods);
    }

    /// What the lease should say, for the keeper.
    pub fn wanted(&self) -> watch::Receiver<Option<Wanted>> {
        self.wanted.subscribe()
    }

    /// What is known, after every pass.
    pub fn view(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Where commands go.
    pub fn commands(&self) -> mpsc::Sender<Command> {
        self.commands.0.clone()
    }

    /// What it does, counted.
    pub fn metrics(&self) -> Arc<Metrics> {
        Arc::clone(&self.metrics)
    }

    /// Runs until the lease keeper or the store is gone. The kernel keeps what it has.
    pub async fn run(mut self, mut holding: watch::Receiver<Holding>) {
        let mut leases = self.store.leases();
        let mut network = self.store.network();
        let mut connection = self.store.connection();
        let mut replaced = self.store.replaced();
        let mut audit = Instant::now() + AUDIT;
        let mut out_of_sync = Some(Instant::now());
        loop {
            let mut view =
                View { connection: connection.borrow_and_update().clone(), ..View::new(self.node.name.clone()) };
            let set = leases.borrow_and_update().clone();
            // It rises before the first set of the new store comes.
            if replaced.has_changed().unwrap_or_default() {
                replaced.mark_unchanged();
                self.kept.store_was_replaced();
            }
            (view.leases, view.from_disk) = self.kept.merge(set);
            let now = (network.borrow_and_update().clone(), holding.borrow_and_update().clone());
            let again = self.pass(&mut view, now).await;
            self.metrics.passed();
            if view.readiness == Readiness::Ready
                && again.is_none()
                && let Some(since) = out_of_sync.take()
            {
                self.metrics.in_sync(since.elapsed());
            }
            view.repairs = self.repairs.last();
            self.answer_snapshots(&view).await;
            self.publish(view);

            let retry = again.map(|delay| Instant::now() + delay).into_iter().chain(self.kept.until()).min();
            tokio::select! {
                touched = self.kernel.changed() => if touched == Touched::Everything { self.metrics.resynced() },
                changed = leases.changed() => if changed.is_err() { return },
                changed = network.changed() => if changed.is_err() { return },
                changed = connection.changed() => if changed.is_err() { return },
                changed = holding.changed() => if changed.is_err() { return },
                () = self.rules.changed() => {}
                Some(command) = self.commands.1.recv() => match command {
                    Command::Migrate { reply } => self.migrate(reply),
                    Command::Snapshot { reply } => self.waiting.push(reply),
                },
                () = sleep_until(retry.unwrap_or(audit)), if retry.is_some() => {}
                () = sleep_until(audit) => {
                    self.kernel.audit();
                    self.dirty = Dirty::Everything;
                    self.metrics.audited();
                    audit = Instant::now() + AUDIT;
                }
            }
            out_of_sync.get_or_insert_with(Instant::now);
        }
    }

    /// One pass. Gives the delay after which to try again, if something failed.
    async fn pass(&mut self, view: &mut View, now: (Network, Holding)) -> Option<Duration> {
        let (network, holding) = now;
        let leases = view.leases.clone();
        view.holding = holding.clone();
        let outcome = match self.prepare(view, &network, &holding).await {
            Ok((observed, network, own, underlays)) => match &leases {
                Some(leases) => self.converge(view, &observed, &network, &own, &underlays, leases).await,
                None => Err(starting("waiting for the leases of the other nodes from the store")),
            },
            Err(blocked) => Err(blocked),
        };
        let troubled = match outcome {
            Ok(clean) => {
                view.readiness = match &holding.trouble {
                    Some((NotReady::Starting, _)) | None if view.from_disk => Readiness::NotReady {
                        code: NotReady::Starting,
                        reason: "the store has not answered since the start; the data plane is as remembered from \
                                 disk, and nothing is removed from it"
                            .into(),
                    },
                    Some((code, reason)) => Readiness::NotReady { code: *code, reason: reason.clone() },
                    None => Readiness::Ready,
                };
                !clean
            }
            Err(Blocked { code, reason }) => {
                let retry = code == NotReady::Failed;
                view.readiness = Readiness::NotReady { code, reason };
                retry
            }
        };
        let troubled = self.hand_off(view).is_err() || troubled;
        if !troubled {
            self.retry.reset();
            return None;
        }
        Some(self.retry.delay())
    }

    /// Everything that must be known before anything can be planned; what is missing is said with the way out.
    async fn prepare(
        &mut self,
        view: &mut View,
        network: &Network,
        holding: &Holding,
    ) -> Result<(Arc<Observed>, NetworkConfig, Own, PerFamily<Underlay>), Blocked> {
        // Always looked at, since only what changes after a look wakes the loop.
        let observed = self.kernel.observe().await.map_err(failed)?;
        self.dirty.extend(self.kernel.touched());
        // Not only once the store has answered: a mistake in the settings shows at once.
        underlay::judge(&self.node.selectors, &observed.host).map_err(failed)?;
        let network = self.network_in_force(view, network)?;
        view.network = Some(network);
        view.warnings.extend(network.warnings());
        if let Some(end) = self.kept.until() {
            view.warnings.push(format!(
                "the store was emptied or set back: peers that it has lost stay for {} s, to claim their subnets again",
                end.saturating_duration_since(Instant::now()).as_secs()
            ));
        }
        let underlays = self.underlays(view, &observed, &network, holding).map_err(failed)?;
        if let Some((space, link)) =
            network.overlap(&on_link(&observed, &underlays).map(|(s, _)| s).collect::<Vec<_>>())
        {
            return Err(failed(format!(
                "the network {space} overlaps {link}, which this node's underlay interface reaches directly; \
                 {}",
                self.store.config_place().change
            )));
        }
        let public_ips = underlays.map(|family, u| self.node.public_ips.get(family).copied().unwrap_or(u.local));
        // Which address the lease has, and so which one is to stay, shows with the leases.
        if view.leases.is_some() {
            let wanted = Some(Wanted { network, public_ips });
            self.wanted.send_if_modified(|current| {
                let differs = *current != wanted;
                *current = wanted;
                differs
            });
        }
        view.warnings.extend(holding.rival.clone());
        let ours = observed.hazards.iter().filter(|(family, _)| network.spaces.get(*family).is_some());
        view.warnings.extend(ours.map(|(_, words)| words.clone()));
        let own = holding.own.clone().ok_or_else(|| match &holding.trouble {
            Some((code, reason)) => Blocked { code: *code, reason: reason.clone() },
            None => starting("waiting for a lease"),
        })?;
        if own.key.subnets().families().ne(network.spaces.families()) {
            return Err(starting("waiting for a lease of the network's address families"));
        }
        Ok((observed, network, own, underlays))
    }

    /// The underlay of each family. What is in use is known from the lease and from our devices, after a restart too.
    fn underlays(
        &mut self,
        view: &View,
        observed: &Observed,
        network: &NetworkConfig,
        holding: &Holding,
    ) -> Result<PerFamily<Underlay>, UnderlayError> {
        let recorded = || {
            let record = view.leases.as_ref().and_then(|leases| leases.of_node(&self.node.name));
            record.map(|lease| lease.record.endpoints()).unwrap_or_default()
        };
        let held = holding.own.as_ref().map_or_else(recorded, |own| own.endpoints);
        network.spaces.try_map(|family, _| {
            // An address that the operator publishes instead is somebody else's.
            let published = held.get(family).filter(|_| self.node.public_ips.get(family).is_none());
            let links = observed.ours.links.values().filter(|link| link.vni == network.vxlan.vni);
            let device = links.map(|link| link.local).find(|local| Family::of(*local) == family);
            let lease = published.map(|endpoint| endpoint.public_ip);
            self.underlays.choose(&self.node.selectors, &observed.host, family, lease, device)
        })
    }

    /// The config that counts: the first valid one, with what can change under running pods kept up to date. Until the
    /// store has shown one it is that of before the start.
    fn network_in_force(&mut self, view: &mut View, network: &Network) -> Result<NetworkConfig, Blocked> {
        let place = self.store.config_place();
        let key = &place.name;
        let trouble = match (network, self.applied) {
            (Network::Valid(config), None) => {
                (self.applied, self.remembered) = (Some(*config), None);
                return Ok(*config);
            }
            (Network::Valid(config), Some(applied)) => {
                view.pending = applied.lasting_differences(config);
                if view.pending.is_empty() {
                    self.applied = Some(*config);
                    return Ok(*config);
                }
                format!(
                    "the network config at {key} differs in what running pods depend on ({}); apply it on this node \
                     with: fabricctl network migrate",
                    view.pending.join(", ")
                )
            }
            (Network::Unknown, _) => match &view.connection {
                Connection::Down(reason) => format!("waiting for the network config: {reason}"),
                // The first listing is under way: what is remembered does meanwhile, and nothing needs attention.
                Connection::Unknown | Connection::Up => match self.applied.or(self.remembered) {
                    Some(applied) => return Ok(applied),
                    None => format!("waiting for the network config at {key}"),
                },
            },
            (Network::Missing, _) => format!("there is no network config at {key}; {}", place.make),
            (Network::Invalid(error), _) => format!("the network config at {key} can't be used: {error}"),
        };
        let Some(applied) = self.applied.or(self.remembered) else { return Err(starting(trouble)) };
        view.warnings.push(trouble);
        Ok(applied)
    }

    /// Lets the next pass take the store's config as it is.
    fn migrate(&mut self, reply: oneshot::Sender<Vec<String>>) {
        let pending = self.view.borrow().pending.clone();
        if !pending.is_empty() {
            warn!(changes = pending.join(", "), "told to apply the network config");
            self.applied = None;
        }
        // Whoever asked may have gone.
        let _ = reply.send(pending);
    }

    /// Answers those who asked what this pass saw: after its writes, so that what is left to do is what failed.
    async fn answer_snapshots(&mut self, view: &View) {
        if self.waiting.is_empty() {
            return;
        }
        let blocked = match &view.readiness {
            Readiness::Ready => String::new(),
            Readiness::NotReady { reason, .. } => reason.clone(),
        };
        let (wanted, last) = (self.plan.as_ref().map(|plan| Arc::clone(plan.desired())), self.last.clone());
        let observed = self.kernel.observe().await.ok();
        let left = wanted.as_ref().zip(observed.as_ref()).and_then(|(wanted, observed)| {
            let routing = &wanted.state;
            let docker_user = &self.rules.docker_user(view.network.as_ref()?, observed);
            let state = KernelState { routing, filter: self.rules.last()?, docker_user };
            Some(Arc::new(diff(state, observed.found(routing))))
        });
        let snapshot = Snapshot { wanted, observed, left, last, blocked };
        for reply in self.waiting.drain(..) {
            // Whoever asked may have gone.
            let _ = reply.send(snapshot.clone());
        }
    }

    /// Plans what the kernel should hold, and writes what it lacks. True when nothing failed.
    async fn converge(
        &mut self,
        view: &mut View,
        observed: &Observed,
        network: &NetworkConfig,
        own: &Own,
        underlays: &PerFamily<Underlay>,
        leases: &Arc<LeaseSet>,
    ) -> Result<bool, Blocked> {
        let vteps = vteps(network, own, underlays);
        view.mtu = vteps.values().map(|vtep| vtep.mtu).min().unwrap_or_default();
        let facts = Facts {
            nexthop_objects: observed.nexthop_objects,
            ipv6: observed.ours.sysctls.contains_key(&Sysctl::Ipv6Forward),
            on_link: on_link(observed, underlays).collect(),
        };
        let (have, foreign) = (&observed.ours, &observed.foreign);
        let inputs = Inputs { network, own: &own.key, vteps: &vteps, leases, facts: &facts, have, foreign };
        let (plan, changed) = match self.plan.take() {
            Some(mut plan) => {
                let changed = plan.update(&inputs, leases, &self.dirty);
                (plan, changed)
            }
            None => (PeerPlan::new(&inputs), Dirty::Everything),
        };
        self.dirty.extend(changed.clone());
        let desired = Arc::clone(plan.desired());
        let Desired { state, devices, refused, conflicts, .. } = &*desired;
        let turned = self.plan.insert(plan).turned();
        view.vteps = vteps
            .iter()
            .filter_map(|(family, vtep)| {
                Some(VtepView {
                    device: devices.get(family).copied().or_else(|| device::names(family, network.vxlan.vni).next())?,
                    underlay: underlays.get(family)?.dev,
                    public_ip: own.endpoints.get(family)?.public_ip,
                    vtep: *vtep,
                })
            })
            .collect();

        view.pod_bridges = self.rules.pod_bridges();
        view.unguarded_ports = self.rules.unguarded_ports(observed);
        view.dropped = observed.dropped.clone();
        view.firewall = self.firewall.judge(view, observed);
        let states_decide = view.firewall.judges_state.is_some();
        let docker_user = &self.rules.docker_user(network, observed);
        let filter = self.rules.wanted(network, own, observed, leases, refused, turned, states_decide);
        let wanted = KernelState { routing: state, filter, docker_user };
        // Routes that stand where ours should be are looked for among all.
        let dirty = if foreign.plain.is_empty() { &self.dirty } else { &Dirty::Everything };
        let mut plan = diff_of(wanted, observed.found(state), dirty);
        debug_assert_eq!(plan, diff(wanted, observed.found(state)), "only {dirty:?} may differ");
        // Whatever becomes of these steps, the next pass looks at it.
        self.dirty = match view.from_disk {
            true => Dirty::Everything,
            false => Dirty::Keys(plan.ops().iter().map(Op::key).collect()),
        };
        if view.from_disk {
            plan = plan.without_deletes();
        }
        view.warnings.extend(view.firewall.warnings_beside(&plan));
        view.troubles = refused.iter().map(|(key, refusal)| (*key, PeerTrouble::Refused(refusal.clone()))).collect();
        let causes = Causes { routing: changed, filter_unchanged: self.rules.unchanged() };
        let mut failures = self.execute(&plan, &causes).await;
        // What others have against a rule of ours is no reason not to be ready: the status shows their chain.
        failures.retain(|(op, _)| !matches!(op, Op::Filter(nft::Op::DockerUser(_))));
        let pending = Pending::new(&failures, conflicts);
        if !pending.is_empty() {
            let waits = |peer: &Arc<Lease>| Some((peer.key, PeerTrouble::Pending(pending.reason(peer)?.into())));
            let waiting: Vec<_> = view.peers().filter_map(waits).collect();
            for (key, trouble) in waiting {
                view.troubles.entry(key).or_insert(trouble);
            }
        }
        if let Some(conflict) = conflicts.iter().find(|c| !matches!(c, Conflict::Route { .. })) {
            return Err(failed(conflict));
        }
        if failures.is_empty() && !view.from_disk {
            self.repairs.in_sync();
        }
        // A peer's trouble is that peer's alone; without our own device nobody is reached, without the filter anybody
        // may be.
        let own_device = [TableName::Link, TableName::Address, TableName::Sysctl];
        let first_of = |tables: &[TableName]| failures.iter().find(|(op, _)| tables.contains(&op.table()));
        match first_of(&own_device).or_else(|| first_of(&[TableName::Filter])) {
            Some((_, why)) => Err(failed(why)),
            None => Ok(failures.is_empty()),
        }
    }

    /// Writes the files that others read. A file that can't be written makes the node not ready.
    fn hand_off(&self, view: &mut View) -> Result<(), ()> {
        let file = match (&view.network, &view.holding.own) {
            (Some(network), Some(own)) if view.mtu != 0 => {
                let subnet = |family| {
                    let (space, subnet) = (network.spaces.get(family)?, own.key.subnets().get(family)?);
                    Some(NodeSubnet { network: space.network, subnet: *subnet })
                };
                NodeFile {
                    version: NODE_FILE_VERSION,
                    node: self.node.name.clone(),
                    readiness: view.readiness.clone(),
                    ipv4: subnet(Family::V4),
                    ipv6: subnet(Family::V6),
                    mtu: view.mtu,
                    epoch: own.epoch,
                    cni_data_dir: None,
                }
            }
            // What was known of this node's subnets stays: a DEL may need them, and the next claim asks for them again.
            _ => NodeFile {
                readiness: view.readiness.clone(),
                ..self.files.read().unwrap_or_else(|| unknown(self.node.name.clone()))
            },
        };
        self.files.publish(&file).map_err(|error| {
            warn!(%error, "files for others not written");
            view.readiness = Readiness::NotReady { code: NotReady::Failed, reason: error.to_string() };
        })
    }

    /// Publishes what is known, and logs the transitions in it.
    fn publish(&self, view: View) {
        self.view.send_if_modified(|current| {
            match (&current.readiness, &view.readiness) {
                (before, now) if before == now => {}
                (_, Readiness::Ready) => info!(peers = view.peers().count(), mtu = view.mtu, "ready"),
                (_, Readiness::NotReady { code: NotReady::Starting, reason }) => info!(reason, "not ready"),
                (_, Readiness::NotReady { reason, .. }) => warn!(reason, "not ready"),
            }
            for warning in view.warnings.iter().filter(|warning| !current.warnings.contains(warning)) {
                warn!(warning, "needs attention");
            }
            if current.firewall.judges_state != view.firewall.judges_state {
                match &view.firewall.judges_state {
                    Some(rule) => info!(%rule, "encapsulated packets are tracked: a rule of others judges states"),
                    None => info!("no rule of others judges the state of encapsulated packets any more"),
                }
            }
            let mut fresh = view.troubles.iter().filter(|(key, trouble)| current.troubles.get(key) != Some(trouble));
            if let Some((key, trouble)) = fresh.next() {
                warn!(peer = %key, reason = %trouble, more = fresh.count(), "peer not reachable");
            }
            let differs = **current != view;
            *current = Arc::new(view);
            differs
        });
    }
}

fn vteps(network: &NetworkConfig, own: &Own, underlays: &PerFamily<Underlay>) -> PerFamily<Vtep> {
    let vtep = |(family, underlay): (Family, &Underlay)| {
        let endpoint = own.endpoints.get(family)?;
        let underlay_mtu = network.vxlan.underlay_mtu.map_or(underlay.mtu, |mtu| mtu.min(underlay.mtu));
        // 1500 less what VXLAN needs is what any link can do; a link below that is the kernel's to refuse.
        let mtu = underlay_mtu.saturating_sub(family.vxlan_overhead());
        Some((family, Vtep { mac: endpoint.vtep_mac, local: underlay.local, mtu }))
    };
    underlays.iter().filter_map(vtep).collect()
}

/// The prefixes that the chosen underlay interfaces reach without a gateway.
fn on_link<'a>(
    observed: &'a Observed,
    underlays: &'a PerFamily<Underlay>,
) -> impl Iterator<Item = (Subnet, fabric_core::model::IfName)> + 'a {
    let chosen: BTreeSet<_> = underlays.values().map(|underlay| &underlay.dev).collect();
    let links = observed.host.links.iter().filter(move |link| chosen.contains(&link.name));
    links.flat_map(|link| link.addresses.iter().map(|(_, prefix)| (*prefix, link.name)))
}
