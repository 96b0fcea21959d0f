//! [`FastPathPlan`]: what the reconcile loop knows of the fast path. What it should hold is decided by
//! [`fabric_core::plan::fast_path::fast_path`]; here is whether it is switched on, and what the CNI plugin tells of the pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use clap::ValueEnum;
use fabric_core::diff::Op;
use fabric_core::model::PerFamily;
use fabric_core::network::NetworkConfig;
use fabric_core::plan::fast_path::{FastPathInputs, fast_path};
use fabric_core::plan::{Desired, Vtep};
use fabric_core::state::fast_path::{FastPath, Program};
use tokio::sync::watch;

use crate::host::attachments::AttachedPods;
use crate::host::underlay::Underlay;
use crate::kernel::{Observed, fast_path as kernel};
use crate::lease::Own;

/// Whether pods' packets take the fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Where the programs know all of it.
    On,
    /// Never: what an earlier daemon made goes.
    #[default]
    Off,
}

/// The fast path of one node, as it should be.
#[derive(Debug)]
pub struct FastPathPlan {
    mode: Mode,
    /// Why there must be none, though it is asked for.
    refused: Option<&'static str>,
    programs: BTreeSet<Program>,
    pods: watch::Receiver<Arc<AttachedPods>>,
    wanted: FastPath,
    /// Why nothing is wanted, or not all of it.
    lacks: Option<String>,
}

/// What became of the fast path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastPathView {
    /// It is asked for.
    pub asked: bool,
    /// Packets take it.
    pub on: bool,
    /// Why it is off, or what doesn't take it, with the way out. Empty when there is nothing to say.
    pub reason: String,
    /// Pods that it knows.
    pub pods: usize,
    /// Peers that it knows.
    pub peers: usize,
    /// Packets that the programs saw, by program and reason.
    pub counts: kernel::Counts,
}

impl FastPathPlan {
    /// One that wants nothing yet.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        let (_, pods) = watch::channel(Arc::default());
        let programs = if mode == Mode::Off { BTreeSet::new() } else { kernel::programs() };
        Self { mode, refused: None, programs, pods, wanted: FastPath::new(), lacks: None }
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

    /// What should be there now.
    pub fn wanted(
        &mut self,
        network: &NetworkConfig,
        own: &Own,
        vteps: &PerFamily<Vtep>,
        underlays: &PerFamily<Underlay>,
        desired: &Desired,
        observed: &Observed,
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
        let chosen = underlays.v4.iter().map(|underlay| underlay.dev);
        let uplinks: BTreeSet<u32> = chosen
            .filter_map(|dev| observed.host.links.iter().find(|link| link.name == dev))
            .map(|link| link.index)
            .chain(found.paths.values().map(|path| path.ifindex))
            .collect();
        let inputs = FastPathInputs {
            network,
            own: own.key.subnets(),
            vteps,
            devices: &desired.devices,
            routing: &desired.state,
            paths: &found.paths,
            uplinks: &uplinks,
            pods: &pods.ports,
            ports: &found.ports,
            programs: &self.programs,
            tracked: observed.tracked,
            have: &found.state,
        };
        match fast_path(&inputs) {
            Ok(wanted) => {
                let others = desired.peers.saturating_sub(wanted.index.len());
                self.lacks = (others > 0).then(|| {
                    format!(
                        "{others} peers take the kernel's path: see fabricctl peers, and ip route get to their address"
                    )
                });
                self.wanted = wanted;
            }
            Err(why) => self.lacks = Some(why.to_string()),
        }
        &self.wanted
    }

    /// What was last wanted.
    #[must_use]
    pub fn last(&self) -> &FastPath {
        &self.wanted
    }

    /// What became of it, given the steps of this pass that failed.
    #[must_use]
    pub fn view(&self, failures: &[(Op, String)], observed: &Observed) -> FastPathView {
        let failed = failures.iter().find(|(op, _)| matches!(op, Op::FastPath(_)));
        let reason = match (self.mode, failed, &self.lacks) {
            (Mode::Off, ..) => "it is switched off (--fast-path=off)".to_owned(),
            (Mode::On, Some((_, why)), _) => why.clone(),
            (Mode::On, None, lacks) => lacks.clone().unwrap_or_default(),
        };
        let (asked, counts) = (self.mode != Mode::Off, observed.fast_path.counts.clone());
        let on = !self.wanted.links.is_empty() && failed.is_none();
        let (pods, peers) = (self.wanted.addresses.len(), self.wanted.index.len());
        FastPathView { asked, on, reason, pods, peers, counts }
    }
}

impl FastPathView {
    /// What an operator should know: that it is asked for, and packets take the kernel's path.
    #[must_use]
    pub fn warning(&self) -> Option<String> {
        (self.asked && !self.on && !self.reason.is_empty())
            .then(|| format!("pods' packets take the kernel's path, not the fast one: {}", self.reason))
    }
}

/// How many packets took the fast path, and how many that could have been fast for all we know did not: of both programs
/// that packets of pods meet first.
#[must_use]
pub fn fast_and_slow(counts: &kernel::Counts) -> (u64, u64) {
    let by_path: BTreeMap<bool, u64> = counts.iter().fold(BTreeMap::new(), |mut sums, ((program, reason), count)| {
        if *program != fabric_bpf::Program::PodIn {
            *sums.entry(reason.path() == fabric_bpf::Path::Fast).or_default() += count;
        }
        sums
    });
    let of = |fast| by_path.get(&fast).copied().unwrap_or_default();
    (of(true), of(false))
}
