//! The settings of network policies: see docs/policy.md.

use clap::{Args, ValueEnum};

/// What is to be done about NetworkPolicies of Kubernetes.
#[derive(Clone, Debug, Args)]
pub struct PolicyArgs {
    /// Enforce NetworkPolicies of Kubernetes for this node's pods; no other policy controller may run on this node
    #[arg(long, env = "FABRICD_NETWORK_POLICY", value_name = "SWITCH", default_value = "off")]
    pub network_policy: PolicySwitch,

    /// What pods may send to their own node where a policy isolates them for egress
    #[arg(long, env = "FABRICD_POLICY_OWN_NODE", value_name = "HOW", default_value = "enforce")]
    pub policy_own_node: OwnNode,

    /// What becomes of connections that are open when a policy changes
    #[arg(long, env = "FABRICD_POLICY_OPEN_CONNECTIONS", value_name = "HOW", default_value = "enforce")]
    pub policy_open_connections: OpenConnections,
}

/// What becomes of connections that are open when a policy changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OpenConnections {
    /// They are evaluated again: what is not allowed any more is cut off.
    Enforce,
    /// They go on.
    Keep,
}

/// Whether policies are enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PolicySwitch {
    /// They are not: all pods reach each other.
    Off,
    /// They are.
    On,
}

/// What pods may send to their own node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OwnNode {
    /// What their policies allow.
    Enforce,
    /// Everything.
    Allow,
}
