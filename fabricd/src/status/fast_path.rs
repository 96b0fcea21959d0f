//! [`FastPathView`]: what became of the fast path, and how it was asked for.

use std::collections::BTreeMap;
use std::sync::Arc;

use clap::ValueEnum;

use crate::kernel::fast_path as kernel;

/// Whether pods' packets take the fast path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Where the programs know all of it, whatever rules of others that passes by.
    On,
    /// The same, as long as it passes by nothing of others.
    Auto,
    /// Never: what an earlier daemon made goes.
    #[default]
    Off,
}

/// What became of the fast path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FastPathView {
    /// It is asked for.
    pub asked: bool,
    /// Packets take it.
    pub on: bool,
    /// It is off for as long as something of others would be passed by, as `auto` has it.
    pub left_off: bool,
    /// Why it is off, or what doesn't take it, with the way out. Empty when there is nothing to say.
    pub reason: String,
    /// Addresses of pods that it takes packets of.
    pub pods: usize,
    /// Peers that it knows, in the family in which it knows most.
    pub peers: usize,
    /// Packets that the programs saw, by program and reason.
    pub counts: kernel::Counts,
    /// What they took, by subnet of a peer.
    pub traffic: Arc<kernel::Traffic>,
}

/// How many packets took the fast path, and how many that could have been fast for all we know did not: of both programs
/// that packets of pods meet first.
#[must_use]
pub fn fast_and_slow(counts: &kernel::Counts) -> (u64, u64) {
    let by_path: BTreeMap<bool, u64> = counts.iter().fold(BTreeMap::new(), |mut sums, ((program, reason), count)| {
        if matches!(program, fabric_bpf::Program::PodOut | fabric_bpf::Program::WireIn) {
            *sums.entry(reason.path() == fabric_bpf::Path::Fast).or_default() += count;
        }
        sums
    });
    let of = |fast| by_path.get(&fast).copied().unwrap_or_default();
    (of(true), of(false))
}
