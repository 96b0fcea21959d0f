//! ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2): what the administrator of a cluster says, before and after
//! the NetworkPolicies of its namespaces.
//!
//! ```text
//! tier Admin ─ undecided, or Pass ─► NetworkPolicies ─ none selects the pod in this direction ─► tier Baseline ─► allowed
//!   Accept, Deny: final                final                                                       Accept, Deny: final
//! ```
//!
//! Within a tier the policy of the lowest priority is asked first, and of a policy its first rule: the first rule that
//! matches decides. Of two policies of one priority Kubernetes leaves open which comes first; here it is the one whose
//! name does.

use std::fmt;
use std::sync::Arc;

use super::model::{Direction, Namespaces, ObjectName, PodPeer, Problem, Rule};
use super::selector::Selector;

/// Where a policy stands among all, in the order in which they are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// ClusterNetworkPolicies that nobody overrides.
    Admin,
    /// NetworkPolicies.
    NetworkPolicy,
    /// ClusterNetworkPolicies for pods that no NetworkPolicy selects.
    Baseline,
}

impl Tier {
    /// What the API server calls its policies.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self {
            Self::Admin | Self::Baseline => "ClusterNetworkPolicy",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Admin => "Admin",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::Baseline => "Baseline",
        })
    }
}

/// A policy of any tier by its name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PolicyName {
    /// Its tier.
    pub tier: Tier,
    /// Its name; of a ClusterNetworkPolicy without a namespace.
    pub name: ObjectName,
}

impl fmt::Display for PolicyName {
    /// `NetworkPolicy shop/web`, `ClusterNetworkPolicy no-lab (Admin)`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.tier.kind(), self.name)?;
        match self.tier {
            Tier::Admin | Tier::Baseline => write!(f, " ({})", self.tier),
            Tier::NetworkPolicy => Ok(()),
        }
    }
}

/// A ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterPolicy {
    /// Its tier: [`Tier::Admin`] or [`Tier::Baseline`].
    pub tier: Tier,
    /// Its place there, from 0 to 1000: the lowest comes first.
    pub priority: u16,
    /// The pods that it is for.
    pub subject: PodPeer,
    /// The rules for what comes to them, in their order.
    pub ingress: Vec<ClusterRule>,
    /// The rules for what they send.
    pub egress: Vec<ClusterRule>,
    /// What of it can't be understood: its rules that have such fail closed.
    pub problems: Vec<Problem>,
}

impl ClusterPolicy {
    /// One that says nothing about anybody.
    #[must_use]
    pub fn nothing() -> Self {
        let subject = PodPeer { namespaces: Namespaces::Selected(Selector::default()), pods: Selector::default() };
        Self { tier: Tier::Admin, priority: 0, subject, ingress: vec![], egress: vec![], problems: vec![] }
    }

    /// The rules of one direction. Without any it says nothing about that direction.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> &[ClusterRule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// A rule of a ClusterNetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterRule {
    /// What its author calls it.
    pub name: Option<Arc<str>>,
    /// What becomes of a connection that it matches.
    pub action: Action,
    /// What it matches.
    pub matches: Rule,
}

/// What becomes of a connection that a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// It is allowed, as far as this end is asked.
    Accept,
    /// It is dropped.
    Deny,
    /// The next tier decides.
    Pass,
}

impl Action {
    /// What the API server calls it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Accept => "Accept",
            Self::Deny => "Deny",
            Self::Pass => "Pass",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A rule of a ClusterNetworkPolicy by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleName {
    /// The policy.
    pub policy: PolicyName,
    /// The rule's index in its list.
    pub rule: usize,
    /// What its author calls it.
    pub name: Option<Arc<str>>,
}

impl fmt::Display for RuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, rule, name } = self;
        match name {
            Some(name) => write!(f, "rule {rule} {name:?} of {policy}"),
            None => write!(f, "rule {rule} of {policy}"),
        }
    }
}
