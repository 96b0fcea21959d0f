//! The fast path of two nodes' daemons: switched on, and counted. A fall to the kernel's path looks healthy, and would only be
//! slow; so whoever measures asks for the share of packets that was fast.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use fabric_bpf::abi::{self, Map};
use fabric_bpf::{Path, Program, Reason};

use super::datapath::LIMIT;
use crate::lab::{Node, wait_until};

/// Restarts the daemons of these nodes with `--fast-path=on`.
pub(super) fn switch_on(nodes: &[Arc<Node>; 2]) -> Result<()> {
    nodes.iter().try_for_each(|node| {
        node.stop_fabricd()?;
        node.start_fabricd_with(&["--fast-path=on"], &[])?;
        node.wait_ready()
    })
}

/// Waits until the pod and so many peers of a node are on the fast path.
pub(super) fn wait_for_peers(node: &Node, peers: u32) -> Result<()> {
    wait_until("the pod and all peers are on the fast path", LIMIT, || {
        let status = node.status()?;
        let fast_path = &status["fast_path"];
        let all = fast_path["peers"].as_u64() == Some(peers.into()) && fast_path["pods"].as_u64() == Some(1);
        ensure!(all && fast_path["on"] == true, "{fast_path}");
        Ok(())
    })
}

/// Packets that the programs of both nodes saw: those that they took, and those that they left to the kernel.
fn fast_and_slow(nodes: &[Arc<Node>; 2]) -> Result<(u64, u64)> {
    let (mut fast, mut slow) = (0, 0);
    for node in nodes {
        // The maps of before may be gone: as many peers come, larger ones take their place.
        let pin = node.path(&format!("/sys/fs/bpf/fabric/{}/maps/{}", abi::LAYOUT, Map::Counters.name()))?;
        let counters = fabric_ebpf::Map::open(&pin).with_context(|| format!("cannot open {}", pin.display()))?;
        for (program, reason) in Reason::ALL.into_iter().flat_map(|r| [(Program::PodOut, r), (Program::WireIn, r)]) {
            let value = counters.get(&abi::counter(program, reason).to_ne_bytes())?.context("counters is an array")?;
            let count: u64 =
                value.chunks_exact(8).filter_map(|word| Some(u64::from_ne_bytes(*word.first_chunk()?))).sum();
            match reason.path() {
                Path::Fast => fast += count,
                Path::Slow | Path::Dropped => slow += count,
            }
        }
    }
    Ok((fast, slow))
}

/// The share of packets that took the fast path, of all that the programs of these nodes saw since this was made.
#[derive(Debug)]
pub(super) struct Share<'a> {
    nodes: &'a [Arc<Node>; 2],
    before: (u64, u64),
}

impl<'a> Share<'a> {
    /// Counts from now on.
    pub(super) fn since_now(nodes: &'a [Arc<Node>; 2]) -> Result<Self> {
        Ok(Self { nodes, before: fast_and_slow(nodes)? })
    }

    /// Fails below 99 %.
    pub(super) fn check(&self) -> Result<f64> {
        let now = fast_and_slow(self.nodes)?;
        let gone = "the maps were made anew while it was measured";
        let fast = now.0.checked_sub(self.before.0).context(gone)?;
        let slow = now.1.checked_sub(self.before.1).context(gone)?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let share = fast as f64 / (fast + slow).max(1) as f64;
        ensure!(share >= 0.99, "only {fast} of {} packets took the fast path", fast + slow);
        Ok(share)
    }
}
