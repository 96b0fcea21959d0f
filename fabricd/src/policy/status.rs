//! What the loop of network policies tells: what is in force, and what it counts.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::policy::State;
use fabric_core::policy::plan::{Isolation, Origin};
use fabric_core::state::nft::Name;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::connections::Judged;
use super::drops::DropLog;
use crate::status::section::SectionStatus;

/// What the kernel holds of network policies, and from what it was made.
#[derive(Clone, Debug, Default)]
pub struct InForce {
    /// All that decides.
    pub state: Arc<State>,
    /// Pods of this node by their addresses, those that are judged, with the policies that isolate them.
    pub pods: BTreeMap<IpAddr, Isolation>,
    /// What the rules of their chains are made of.
    pub chains: BTreeMap<Name, Origin>,
}

/// What there is to see of network policies on this node.
#[derive(Clone, Debug)]
pub struct PolicyView {
    /// How it stands with them.
    pub status: watch::Receiver<Arc<SectionStatus>>,
    /// What is in force; `None` until policies were written for the first time.
    pub in_force: watch::Receiver<Option<Arc<InForce>>>,
    /// What is dropped.
    pub drops: DropLog,
}

/// How many of this node's pods there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Policies of the cluster.
    pub policies: usize,
    /// Those of which something can't be understood.
    pub unreadable: usize,
    /// Pods that a policy isolates.
    pub isolated: usize,
    /// Pods that are closed, as their policies are not in force yet.
    pub not_judged: usize,
}

/// What the loop counts. A clone counts into the same ones.
#[derive(Clone, Debug, Default)]
pub struct PolicyCounters {
    policies: Gauge,
    isolated: Gauge,
    not_judged: Gauge,
    changes: Counter,
    unreadable: Gauge,
    denied: Counter,
    allowed: Counter,
    forgotten: Counter,
}

impl PolicyCounters {
    /// Shows them in a registry, under its prefix.
    pub fn register(&self, all: &mut Registry) {
        all.register("policies", "NetworkPolicies of the cluster", self.policies.clone());
        all.register("policy_isolated_pods", "Pods of this node that a NetworkPolicy isolates", self.isolated.clone());
        let help = "Pods of this node that are closed, as their NetworkPolicies are not in force yet";
        all.register("policy_pods_not_judged", help, self.not_judged.clone());
        all.register("policy_changes", "Changes of network policies written to the kernel", self.changes.clone());
        let help = "NetworkPolicies of which something can't be understood, and so allows nothing";
        all.register("policies_unreadable", help, self.unreadable.clone());
        let help = "Open connections that were cut off, as they are not allowed any more";
        all.register("policy_connections_denied", help, self.denied.clone());
        let help = "Connections that had been cut off and go on, as they are allowed again";
        all.register("policy_connections_allowed_again", help, self.allowed.clone());
        let help = "Connections that were forgotten with the pod that had their address";
        all.register("policy_connections_forgotten", help, self.forgotten.clone());
    }

    pub(super) fn counted(&self, counts: Counts) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.policies.set(number(counts.policies));
        self.unreadable.set(number(counts.unreadable));
        self.isolated.set(number(counts.isolated));
        self.not_judged.set(number(counts.not_judged));
    }

    pub(super) fn written(&self) {
        self.changes.inc();
    }

    pub(super) fn judged(&self, judged: &Judged) {
        for (counter, count) in
            [(&self.denied, judged.denied), (&self.allowed, judged.allowed), (&self.forgotten, judged.forgotten)]
        {
            counter.inc_by(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}
