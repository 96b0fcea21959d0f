//! [`Evaluation`]: what was found of a node's own traffic.

use super::Blocked;
use super::bypass::Bypassed;
use super::packet::Flow;
use super::traffic::BlockingChain;

/// What foreign chains make of packets of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evaluation {
    /// What stands in the way; what is sure comes first.
    pub obstacles: Vec<BlockingChain>,
    /// A rule whose decision on encapsulated packets hangs on the state of their connection: so they are tracked.
    pub state_rule: Option<Blocked>,
    /// Base chains that are not evaluated: those of bridges and devices.
    pub unread: Vec<String>,
    /// What packets between pods would pass by on the fast path; empty unless that was asked.
    pub bypassed: Vec<Bypassed>,
}

impl Evaluation {
    /// What stands in the way of these kinds of packets.
    pub fn of<'a>(&'a self, flows: &'a [Flow]) -> impl Iterator<Item = &'a BlockingChain> + use<'a> {
        self.obstacles.iter().filter(|obstacle| flows.contains(&obstacle.flow))
    }
}
