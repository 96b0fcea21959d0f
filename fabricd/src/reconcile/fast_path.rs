//! [`FastPathPlan`]: what the reconcile loop knows of the fast path. What it should hold is decided by
//! [`fabric_core::plan::fast_path::fast_path`]; here is whether it is switched on, and what the CNI plugin tells of the pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fabric_bpf::abi::Traffic;
use fabric_core::diff::{Op, fast_path as steps};
use fabric_core::firewall::Evaluation;
use fabric_core::leases::Lease;
use fabric_core::model::{IfName, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::bypass::{bypass, shaped};
use fabric_core::plan::fast_path::{FastPathInputs, Planned, fast_path};
use fabric_core::plan::{Desired, Vtep};
use fabric_core::state::fast_path::{FastPath, Place, Program, Role};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::host::attachments::AttachedPods;
use crate::host::underlay::Underlay;
use crate::kernel::{FastPathFound, Observed, fast_path as kernel};
use crate::lease::Own;
use crate::status::fast_path::{FastPathView, Mode};

/// For so long nothing of others may have stood in the way, until `auto` is on again: who loads a firewall rule by rule, or
/// anew every few seconds, does not switch it each time.
const CLEAR: Duration = Duration::from_secs(30);

/// For so long a pod's port must have been there before programs are attached to it as filters of tc. The plugins behind ours
/// come after it, and `bandwidth` needs the place of our clsact for a qdisc of its own; where that is, programs stay away.
const FURNISHED: Duration = Duration::from_secs(10);

/// The fast path of one node, as it should be.
#[derive(Debug)]
pub struct FastPathPlan {
    mode: Mode,
    /// Why there must be none, though it is asked for.
    refused: Option<&'static str>,
    /// When something of others was last in the way, and what.
    in_the_way: Option<(Instant, String)>,
    /// When ports of bridges were first seen, where programs are filters of tc.
    ports: BTreeMap<u32, Instant>,
    programs: BTreeSet<Program>,
    pods: watch::Receiver<Arc<AttachedPods>>,
    wanted: FastPath,
    /// Why nothing is wanted, or not all of it.
    lacks: Option<String>,
}

impl FastPathPlan {
    /// One that wants nothing yet.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        let (_, pods) = watch::channel(Arc::default());
        let programs = if mode == Mode::Off { BTreeSet::new() } else { kernel::programs() };
        Self {
            mode,
            refused: None,
            in_the_way: None,
            ports: BTreeMap::new(),
            programs,
            pods,
            wanted: FastPath::new(),
            lacks: None,
        }
    }

    /// Wants nothing, whatever is asked for, and says why.
    pub fn refuse(&mut self, why: &'static str) {
        self.refused = Some(why);
    }

    /// Takes the packets of these pods.
    pub fn take_pods(&mut self, pods: watch::Receiver<Arc<AttachedPods>>) {
        self.pods = pods;
    }

    /// Waits until pods come or go. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.mode == Mode::Off || self.pods.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What should be there now. `evaluation` is what the chains of others make of pods' packets.
    #[expect(clippy::too_many_arguments, reason = "all that a pass knows, each used once")]
    pub fn wanted(
        &mut self,
        network: &NetworkConfig,
        own: &Own,
        vteps: &PerFamily<Vtep>,
        underlays: &PerFamily<Underlay>,
        desired: &Desired,
        observed: &Observed,
        evaluation: &Evaluation,
    ) -> &FastPath {
        (self.wanted, self.lacks) = (FastPath::new(), None);
        let pods = Arc::clone(&self.pods.borrow_and_update());
        let found = &observed.fast_path;
        if self.mode == Mode::Off {
            return &self.wanted;
        }
        if let Some(trouble) = self.refused.map(str::to_owned).or_else(|| found.trouble.clone()) {
            self.lacks = Some(trouble);
            return &self.wanted;
        }
        let chosen = underlays.values().map(|underlay| underlay.dev);
        let uplinks: BTreeSet<u32> = chosen
            .filter_map(|dev| observed.host.links.iter().find(|link| link.name == dev))
            .map(|link| link.index)
            .chain(found.paths.values().map(|path| path.ifindex))
            .collect();
        if self.mode == Mode::Auto {
            let named =
                |index: &u32| observed.host.links.iter().find(|link| link.index == *index).map(|link| link.name);
            let uplinks: BTreeSet<IfName> = uplinks.iter().filter_map(named).collect();
            let through = pods.bridges.iter().chain(desired.devices.values()).copied().collect();
            let now = bypass(evaluation, &found.shaping, &through, &uplinks).map(|found| found.to_string());
            if let Some(why) = self.leaves_off(now) {
                self.lacks = Some(why);
                return &self.wanted;
            }
        }
        let shaped = shaped(&found.shaping, &found.ports);
        let kept_off = &shaped | &self.unfurnished(found);
        let inputs = FastPathInputs {
            network,
            own: own.key.subnets(),
            vteps,
            devices: &desired.devices,
            indexes: &found.devices,
            routing: &desired.state,
            paths: &found.paths,
            uplinks: &uplinks,
            pods: &pods.ports,
            ports: &found.ports,
            kept_off: &kept_off,
            programs: &self.programs,
            tracked: observed.tracked,
            have: &found.state,
        };
        match fast_path(&inputs) {
            Ok(planned) => {
                self.lacks = lacks(&planned, desired, &shaped);
                self.wanted = planned.state;
            }
            Err(why) => self.lacks = Some(why.to_string()),
        }
        &self.wanted
    }

    /// Ports that plugins may not be done with.
    fn unfurnished(&mut self, found: &FastPathFound) -> BTreeSet<u32> {
        if !found.by_filters {
            return BTreeSet::new();
        }
        let now = Instant::now();
        let ports: BTreeSet<u32> = found.ports.values().map(|port| port.ifindex).collect();
        self.ports.retain(|ifindex, _| ports.contains(ifindex));
        for ifindex in ports {
            self.ports.entry(ifindex).or_insert(now);
        }
        // Where programs are, they were before this daemon began.
        let is_attached = |ifindex: &u32| {
            let place = Place { ifindex: *ifindex, hook: Role::PodOut.hook() };
            found.state.links.contains_key(&place)
        };
        let is_new = |(_, since): &(&u32, &Instant)| now.duration_since(**since) < FURNISHED;
        self.ports.iter().filter(is_new).map(|(ifindex, _)| *ifindex).filter(|ifindex| !is_attached(ifindex)).collect()
    }

    /// Why `auto` leaves it off: for what is in the way `now`, or was until a moment ago.
    fn leaves_off(&mut self, now: Option<String>) -> Option<String> {
        if let Some(why) = now {
            self.in_the_way = Some((Instant::now(), why));
        }
        match &self.in_the_way {
            Some((since, why)) if since.elapsed() < CLEAR => {
                Some(format!("{why}, and would be passed by; --fast-path=on would do so all the same"))
            }
            _ => None,
        }
    }

    /// What was last wanted.
    #[must_use]
    pub fn last(&self) -> &FastPath {
        &self.wanted
    }

    /// Why packets may still take it, though it is refused: a program could not be detached. Until then nothing judges what
    /// it takes.
    #[must_use]
    pub fn stays(&self, failures: &[(Op, String)]) -> Option<String> {
        let is_link = |op: &Op| matches!(op, Op::FastPath(steps::Op::Link(..)));
        let (_, why) = failures.iter().find(|(op, _)| self.refused.is_some() && is_link(op))?;
        Some(format!("packets of pods still take the fast path, where network policies are not enforced: {why}"))
    }

    /// What became of it, given the steps of this pass that failed.
    #[must_use]
    pub fn view(&self, failures: &[(Op, String)], observed: &Observed) -> FastPathView {
        let failed = failures.iter().find(|(op, _)| matches!(op, Op::FastPath(_)));
        let reason = match (self.mode, failed, &self.lacks) {
            (Mode::Off, ..) => "it is switched off (--fast-path=off)".to_owned(),
            (_, Some((_, why)), _) => why.clone(),
            (_, None, lacks) => lacks.clone().unwrap_or_default(),
        };
        let (asked, counts) = (self.mode != Mode::Off, observed.fast_path.counts.clone());
        let on = !self.wanted.links.is_empty() && failed.is_none();
        let fast = |slot| self.wanted.pods.get(slot).is_some_and(|pod| pod.fast);
        let pods = self.wanted.addresses.values().filter(|slot| fast(slot)).count();
        let left_off =
            self.mode == Mode::Auto && self.in_the_way.as_ref().is_some_and(|(since, _)| since.elapsed() < CLEAR);
        let traffic = Arc::clone(&observed.fast_path.traffic);
        FastPathView { asked, on, left_off, reason, pods, peers: peers(&self.wanted), counts, traffic }
    }
}

/// What doesn't take the fast path, though it is on.
fn lacks(Planned { state: wanted, without }: &Planned, desired: &Desired, shaped: &BTreeSet<u32>) -> Option<String> {
    let without = without.iter().map(|(family, why)| format!("{family} pods take the kernel's path: {why}"));
    let is_lacking = |subnet: &&Subnet| {
        let in_use = wanted.node.is_some_and(|node| node.ends.get(subnet.family()).is_some());
        in_use && !wanted.index.contains_key(*subnet)
    };
    let peers = of_most(desired.state.routes.keys().filter(is_lacking));
    let peers = (peers > 0).then(|| {
        format!("{peers} peers take the kernel's path: see fabricctl peers, and ip route get to their address")
    });
    let shaped: BTreeSet<u32> =
        wanted.pods.values().map(|pod| pod.ifindex).filter(|ifindex| shaped.contains(ifindex)).collect();
    let shaped = Some(shaped.len()).filter(|count| *count > 0).map(|shaped| {
        format!("{shaped} pods take the kernel's path, since their ports have queueing disciplines: see tc qdisc show")
    });
    let all: Vec<String> = without.chain(peers).chain(shaped).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

fn peers(wanted: &FastPath) -> usize {
    of_most(wanted.index.keys())
}

/// How many subnets there are of the family that has most: each peer has one of each.
fn of_most<'a>(subnets: impl Iterator<Item = &'a Subnet>) -> usize {
    let mut counts = PerFamily::<usize>::default();
    subnets.for_each(|subnet| *counts.slot(subnet.family()).get_or_insert_default() += 1);
    counts.values().copied().max().unwrap_or_default()
}

impl FastPathView {
    /// What went between the pods of this node and those of a peer, in all families. `None` for one that isn't known to the
    /// programs.
    #[must_use]
    pub fn traffic_of(&self, peer: &Lease) -> Option<Traffic> {
        let subnets = peer.key.subnets();
        subnets.values().filter_map(|subnet| self.traffic.get(subnet)).copied().reduce(Traffic::plus)
    }

    /// What an operator should know: that it is asked for, and packets take the kernel's path. That `auto` leaves it off is as
    /// it was asked for.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        (self.asked && !self.on && !self.left_off && !self.reason.is_empty())
            .then(|| format!("pods' packets take the kernel's path, not the fast one: {}", self.reason))
    }
}
