//! The reconcile loop: makes the kernel hold what the leases say, and says how far it has come.
//!
//! One pass looks at the kernel, plans from everything that is known now, writes the difference, and publishes a
//! [`View`]. It never acts on an event as such: an event, of the kernel or of the store, only wakes it. So what was
//! missed, lost or done by hand is put right by the next pass, and a pass that finds nothing to do writes nothing.

mod converge;
pub mod fast_path;
pub mod filter;
pub mod firewall;
mod hand_off;
pub mod pending;
mod prepare;
pub mod repairs;
pub mod retention;
mod waiting;
mod write;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::derived::Dirty;
use fabric_core::diff::{Key, Plan, diff};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::{NodeName, PerFamily};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::FilterOptions;
use fabric_core::plan::{Desired, PeerPlan};
use fabric_core::state::docker_user::DockerUserRules;
use fabric_core::state::fast_path::FastPath;
use fabric_core::state::nft::{Ruleset, Section};
use fabric_core::state::{Routing, State as KernelState};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

pub use self::write::Written;
pub(crate) use self::write::lines;
use crate::files::Files;
use crate::files::state_dir::State;
use crate::host::attachments::AttachedPods;
use crate::host::underlay::{HoldDown, Selector};
use crate::kernel::{Kernel, Observed, Touched};
use crate::lease::{DesiredLease, Holding};
use crate::reconcile::fast_path::FastPathPlan;
use crate::reconcile::filter::Filter;
use crate::reconcile::firewall::Evaluator;
use crate::reconcile::repairs::Repairs;
use crate::reconcile::retention::Retention;
use crate::reconcile::waiting::Doing;
use crate::retry::Backoff;
use crate::status::counters::Counters;
use crate::status::fast_path::Mode;
use crate::status::view::View;
use crate::store::{LeaseStore, Network};

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
    pub filter: FilterOptions,
    /// Whether there is a fast path.
    pub fast_path: Mode,
}

/// The loop of one node.
#[derive(Debug)]
pub struct Reconciler<S, K> {
    node: Node,
    store: Arc<S>,
    kernel: K,
    files: Files,
    wanted: watch::Sender<Option<DesiredLease>>,
    view: watch::Sender<Arc<View>>,
    filter: Filter,
    fast_path: FastPathPlan,
    underlays: HoldDown,
    /// The underlay addresses of the last pass.
    sources: PerFamily<IpAddr>,
    firewall: Evaluator,
    applied: Option<NetworkConfig>,
    /// The config that was in force before the start, until the store has shown one.
    remembered: Option<NetworkConfig>,
    retention: Retention,
    commands: (mpsc::Sender<Command>, mpsc::Receiver<Command>),
    waiting: Vec<oneshot::Sender<Snapshot>>,
    last: Option<Arc<Written>>,
    /// What is desired, and what it was made of.
    plan: Option<PeerPlan>,
    /// The entries that may differ between what is desired and what the kernel has: only these are compared.
    dirty: Dirty<Key>,
    /// What the pass that is under way waits for.
    doing: watch::Sender<Doing>,
    counters: Counters,
    repairs: Repairs,
    retry: Backoff,
    /// Sections that somebody else writes.
    apart: BTreeSet<Section>,
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

/// What the kernel should hold, but for what somebody else writes.
fn kernel_state<'a>(
    routing: &'a Routing,
    filter: &'a Ruleset,
    docker_user: &'a DockerUserRules,
    fast_path: &'a FastPath,
    apart: &BTreeSet<Section>,
) -> KernelState<'a> {
    let KernelState { services, policy, .. } = KernelState::default();
    let services = services.filter(|_| !apart.contains(&Section::Services));
    let policy = policy.filter(|_| !apart.contains(&Section::Policy));
    KernelState { routing, filter, services, policy, docker_user, fast_path }
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
            filter: Filter::new(node.filter.clone()),
            fast_path: FastPathPlan::new(node.fast_path),
            underlays: HoldDown::default(),
            sources: PerFamily::default(),
            firewall: Evaluator::new(node.fast_path == Mode::Auto),
            node,
            store,
            kernel,
            files,
            wanted: watch::channel(None).0,
            view: watch::channel(Arc::new(view)).0,
            doing: watch::channel(Doing::Reading).0,
            applied: None,
            remembered: before.network,
            retention: Retention::new(before.leases),
            commands: mpsc::channel(8),
            waiting: vec![],
            last: None,
            plan: None,
            dirty: Dirty::Everything,
            counters: Counters::default(),
            repairs: Repairs::default(),
            retry: Backoff::new(RETRY, AUDIT),
            apart: BTreeSet::new(),
        }
    }

    /// Lets the pods of these ports use no addresses but their own.
    pub fn guard_ports(&mut self, pods: watch::Receiver<Arc<AttachedPods>>) {
        self.filter.guard_ports(pods);
    }

    /// Leaves the tables of a section to somebody else. Otherwise those that are there are removed.
    pub fn leave(&mut self, section: Section) {
        self.apart.insert(section);
    }

    /// Lets the packets of these pods take the fast path, if there is one.
    pub fn take_pods(&mut self, pods: watch::Receiver<Arc<AttachedPods>>) {
        self.fast_path.take_pods(pods);
    }

    /// Keeps all packets from the fast path, though it is asked for, and says why.
    pub fn refuse_fast_path(&mut self, why: &'static str) {
        self.fast_path.refuse(why);
    }

    /// What the lease should say, for the keeper.
    pub fn wanted(&self) -> watch::Receiver<Option<DesiredLease>> {
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
    pub fn counters(&self) -> Counters {
        self.counters.clone()
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
                self.retention.store_was_replaced();
            }
            (view.leases, view.from_disk) = self.retention.merge(set);
            let now = (network.borrow_and_update().clone(), holding.borrow_and_update().clone());
            let (teller, doing, held) = (self.view.clone(), self.doing.clone(), now.1.clone());
            let again = waiting::telling(&teller, &doing, held, self.pass(&mut view, now)).await;
            self.counters.passed();
            if view.readiness == Readiness::Ready
                && again.is_none()
                && let Some(since) = out_of_sync.take()
            {
                self.counters.in_sync(since.elapsed());
            }
            view.repairs = self.repairs.last();
            self.answer_snapshots(&view).await;
            self.publish(view);

            let retry = again.map(|delay| Instant::now() + delay).into_iter().chain(self.retention.until()).min();
            tokio::select! {
                touched = self.kernel.changed() => if touched == Touched::Everything { self.counters.resynced() },
                changed = leases.changed() => if changed.is_err() { return },
                changed = network.changed() => if changed.is_err() { return },
                changed = connection.changed() => if changed.is_err() { return },
                changed = holding.changed() => if changed.is_err() { return },
                () = self.filter.changed() => {}
                () = self.fast_path.changed() => {}
                Some(command) = self.commands.1.recv() => match command {
                    Command::Migrate { reply } => self.migrate(reply),
                    Command::Snapshot { reply } => self.waiting.push(reply),
                },
                () = sleep_until(retry.unwrap_or(audit)), if retry.is_some() => {}
                () = sleep_until(audit) => {
                    self.kernel.audit();
                    self.dirty = Dirty::Everything;
                    self.counters.audited();
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
            Ok(prepared) => match &leases {
                Some(leases) => self.converge(view, &prepared, leases).await,
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

    /// Lets the next pass take the store's config as it is.
    fn migrate(&mut self, reply: oneshot::Sender<Vec<String>>) {
        let pending = self.view.borrow().pending.clone();
        if !pending.is_empty() {
            warn!(changes = pending.join(", "), "asked to apply the network config");
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
            let docker_user = &self.filter.docker_user(view.network.as_ref()?, observed);
            let (filter, fast_path) = (self.filter.last()?, self.fast_path.last());
            let state = kernel_state(routing, filter, docker_user, fast_path, &self.apart);
            Some(Arc::new(diff(state, observed.found(routing))))
        });
        let snapshot = Snapshot { wanted, observed, left, last, blocked };
        for reply in self.waiting.drain(..) {
            // Whoever asked may have gone.
            let _ = reply.send(snapshot.clone());
        }
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
            // Who writes rules often, as kube-proxy does, gives the same rule another handle each time.
            if current.firewall.state_rule.is_some() != view.firewall.state_rule.is_some() {
                match &view.firewall.state_rule {
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
