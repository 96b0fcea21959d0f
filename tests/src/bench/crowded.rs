//! A node beside thousands of peers, all of which answer the mesh's probes from the first on: nothing of what is measured
//! is the search for what is wrong with them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;

use crate::lab::process::Process;
use crate::lab::{Crowd, Lab, Node, Vteps, Witness, crowd};

/// How long anything may take on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The node, ready, and what surrounds it.
pub struct Crowded {
    /// The lab.
    pub lab: Lab,
    /// The peers with the numbers from 1 on, in etcd.
    pub crowd: Crowd,
    /// Their answers, for as long as this is there.
    pub vteps: Vteps,
    /// The node.
    pub node: Arc<Node>,
    /// What the node's kernel announces.
    pub witness: Witness,
    /// Its daemon.
    pub process: Process,
}

impl Crowded {
    /// Starts a lab of this name with one node, and waits until its peers are programmed.
    ///
    /// # Errors
    /// The lab breaks.
    pub fn start(name: &str, peers: u32) -> Result<Self> {
        let mut lab = Lab::builder().name(name).nodes(0).network(crowd::NETWORK).start()?;
        let mut crowd = lab.crowd()?;
        crowd.join(1..peers + 1)?;
        let vteps = lab.crowd_answers()?;
        let node = lab.boot_node()?;
        let witness = Witness::of(&node)?;
        node.start_fabricd()?;
        node.wait_ready()?;
        witness.wait_for_routes(peers as usize, false, LIMIT)?;
        let process = node.running_service("fabricd")?;
        Ok(Self { lab, crowd, vteps, node, witness, process })
    }
}
