//! What the loop of network policies tells: which policies are applied, and what it counts.

use std::sync::Arc;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;

use super::applied::Applied;
use super::connections::Evaluated;
use super::drops::DropLog;
use crate::status::section::SectionStatus;

/// What there is to see of network policies on this node.
#[derive(Clone, Debug)]
pub struct PolicyView {
    /// How it stands with them.
    pub status: watch::Receiver<Arc<SectionStatus>>,
    /// What is applied; `None` until policies were written for the first time.
    pub applied: watch::Receiver<Option<Arc<Applied>>>,
    /// What is dropped.
    pub drops: DropLog,
}

/// How many of this node's pods there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// NetworkPolicies of the cluster.
    pub policies: usize,
    /// ClusterNetworkPolicies of the cluster.
    pub cluster_policies: usize,
    /// Those of which something can't be understood.
    pub unreadable: usize,
    /// Pods that a policy selects in some direction.
    pub isolated: usize,
    /// Pods that are closed, as their policies are not applied yet.
    pub pending: usize,
}

/// What the loop counts. A clone counts into the same ones.
#[derive(Clone, Debug, Default)]
pub struct PolicyCounters {
    policies: Gauge,
    cluster_policies: Gauge,
    isolated: Gauge,
    pending: Gauge,
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
        let help = "ClusterNetworkPolicies of the cluster";
        all.register("cluster_policies", help, self.cluster_policies.clone());
        let help = "Pods of this node that a policy isolates, or has rules for";
        all.register("policy_isolated_pods", help, self.isolated.clone());
        let help = "Pods of this node that are closed, as their NetworkPolicies are not applied yet";
        all.register("policy_pods_pending", help, self.pending.clone());
        all.register("policy_changes", "Changes of network policies written to the kernel", self.changes.clone());
        let help = "Policies of which something can't be understood, and so allows nothing";
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
        self.cluster_policies.set(number(counts.cluster_policies));
        self.unreadable.set(number(counts.unreadable));
        self.isolated.set(number(counts.isolated));
        self.pending.set(number(counts.pending));
    }

    pub(super) fn written(&self) {
        self.changes.inc();
    }

    pub(super) fn reevaluated(&self, open: &Evaluated) {
        for (counter, count) in
            [(&self.denied, open.denied), (&self.allowed, open.allowed), (&self.forgotten, open.forgotten)]
        {
            counter.inc_by(u64::try_from(count).unwrap_or(u64::MAX));
        }
    }
}
