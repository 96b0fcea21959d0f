//! [`LeaseFold`]: what is made of all Nodes: the leases, this node's own Node, and what it is assigned.

use std::sync::Arc;

use fabric_core::leases::LeaseSet;

use super::node::Node;
use super::nodes::Nodes;
use super::{Connection, Shared, StoreError, publish};
use crate::kubernetes::client::ApiError;
use crate::kubernetes::reflector::Fold;

/// The Nodes, and who is told of them. The own Node of an event is told at once, before the leases.
pub(super) struct LeaseFold {
    shared: Arc<Shared>,
    nodes: Nodes,
    /// This node's Node in a list that is not published yet, if there is such a list.
    own_listed: Option<Option<Node>>,
}

impl LeaseFold {
    /// Knows nothing yet.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, nodes: Nodes::default(), own_listed: None }
    }

    fn set(&self) -> &LeaseSet {
        self.nodes.set()
    }
}

impl Fold for LeaseFold {
    type Object = Node;

    fn listed(&self, nodes: Vec<Node>, revision: i64) -> Self {
        let listed = Nodes::listed(&self.nodes, &nodes, revision);
        let own = nodes.into_iter().find(|node| self.shared.is_own(node));
        Self { shared: self.shared.clone(), nodes: listed, own_listed: Some(own) }
    }

    fn applied(&mut self, node: Node) -> bool {
        let changed = self.nodes.apply(&node);
        self.shared.observe(node);
        changed
    }

    fn deleted(&mut self, node: Node) -> bool {
        if self.shared.is_own(&node) {
            self.shared.own_is(None);
        }
        self.nodes.remove(&node)
    }

    fn would_lose_most(&self) -> bool {
        self.shared.leases.borrow().as_ref().is_some_and(|published| self.set().lacks_most_of(published))
    }

    fn publish(&mut self) {
        if let Some(own) = self.own_listed.take() {
            self.shared.own_is(own);
        }
        publish(&self.shared.leases, Some(Arc::new(self.set().clone())));
    }

    fn was_set_back(&mut self) {
        self.shared.replaced.send_modify(|times| *times += 1);
    }

    fn connection_is(&mut self, state: Result<(), &ApiError>) {
        let state = match state {
            Ok(()) => Connection::Up,
            Err(error) => Connection::from(&StoreError::from(error.clone())),
        };
        publish(&self.shared.connection, state);
    }
}
