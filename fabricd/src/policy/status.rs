//! What the loop of network policies counts.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// How many of this node's pods there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Policies of the cluster.
    pub policies: usize,
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
}

impl PolicyCounters {
    /// Shows them in a registry, under its prefix.
    pub fn register(&self, all: &mut Registry) {
        all.register("policies", "NetworkPolicies of the cluster", self.policies.clone());
        all.register("policy_isolated_pods", "Pods of this node that a NetworkPolicy isolates", self.isolated.clone());
        let help = "Pods of this node that are closed, as their NetworkPolicies are not in force yet";
        all.register("policy_pods_not_judged", help, self.not_judged.clone());
        all.register("policy_changes", "Changes of network policies written to the kernel", self.changes.clone());
    }

    pub(super) fn counted(&self, counts: Counts) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.policies.set(number(counts.policies));
        self.isolated.set(number(counts.isolated));
        self.not_judged.set(number(counts.not_judged));
    }

    pub(super) fn written(&self) {
        self.changes.inc();
    }
}
