//! What the policies of one pod amount to in one direction: an [`EffectivePolicy`] of each tier. Pods that the same policies select
//! share them, and with them chains of rules.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::evaluate::Cluster;
use super::groups::{BlockGroup, NamedGroup, PodGroup, PortGroup, merged};
use super::model::{Direction, NamedPort, ObjectName, Pod, PortMatch, Protocol, Rule};
use super::tiers::{Action, PolicyName, Tier};

/// What tells the chain of a pod from others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EffectivePolicy {
    /// Of what comes to it, or of what it sends.
    pub direction: Direction,
    /// The tier of these policies.
    pub tier: Tier,
    /// The policies that say something about it, in the order in which they are asked.
    pub policies: Vec<ObjectName>,
    /// Its own ports, as far as these policies name them; of what comes to it alone.
    pub named: BTreeSet<NamedPort>,
    /// What is asked where these leave it open.
    pub next: Option<Arc<EffectivePolicy>>,
}

/// What one rule of a policy is about: all of these must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Whose rule it is.
    pub policy: ObjectName,
    /// The rule's index in the policy.
    pub rule: usize,
    /// What becomes of a connection for which they hold.
    pub action: Action,
    /// The other end.
    pub peers: PeerTest,
    /// The destination's port.
    pub ports: PortTest,
}

/// Who the other end must be.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerTest {
    /// Anybody.
    Anybody,
    /// A pod of this group.
    Pods(PodGroup),
    /// An address of these blocks.
    Blocks(BlockGroup),
}

/// Which port the destination must have.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PortTest {
    /// Any, of any protocol.
    Any,
    /// One of these.
    Ports(PortGroup),
    /// One that the other end calls so; says who the other end must be, too.
    Named(NamedGroup),
}

impl EffectivePolicy {
    /// That of a pod, of the first tier that says something about it; `None` when no policy does in this direction.
    #[must_use]
    pub fn of(cluster: &Cluster<'_>, direction: Direction, pod: &Pod) -> Option<Self> {
        let isolating = cluster.policies_of(pod).filter_map(|(name, policy)| Some((name, policy.rules(direction)?)));
        let isolating = isolating.map(|(name, rules)| (name, rules.iter().collect()));
        let next = Self::of_tier(direction, Tier::NetworkPolicy, pod, isolating)
            // NetworkPolicies have the last word on pods that they select.
            .or_else(|| Self::of_cluster(cluster, direction, Tier::Baseline, pod));
        match Self::of_cluster(cluster, direction, Tier::Admin, pod) {
            Some(admin) => Some(Self { next: next.map(Arc::new), ..admin }),
            None => next,
        }
    }

    fn of_cluster(cluster: &Cluster<'_>, direction: Direction, tier: Tier, pod: &Pod) -> Option<Self> {
        let all = cluster.cluster_policies_of(tier, pod).map(|(name, policy)| (name, policy.rules(direction)));
        let all = all.filter(|(_, rules)| !rules.is_empty());
        let all = all.map(|(name, rules)| (name, rules.iter().map(|rule| &rule.matches).collect()));
        Self::of_tier(direction, tier, pod, all)
    }

    fn of_tier<'a>(
        direction: Direction,
        tier: Tier,
        pod: &Pod,
        said: impl Iterator<Item = (&'a ObjectName, Vec<&'a Rule>)>,
    ) -> Option<Self> {
        let mut effective = Self { direction, tier, policies: vec![], named: BTreeSet::new(), next: None };
        for (policy, rules) in said {
            effective.policies.push(policy.clone());
            if direction == Direction::Ingress {
                let names: BTreeSet<(Protocol, &Arc<str>)> = rules.into_iter().flat_map(named_ports).collect();
                let meant = pod.ports().iter().filter(|port| names.contains(&(port.protocol, &port.name)));
                effective.named.extend(meant.cloned());
            }
        }
        (!effective.policies.is_empty()).then_some(effective)
    }

    /// The policies of all its tiers, in the order in which they are asked.
    #[must_use]
    pub fn all_policies(&self) -> Vec<PolicyName> {
        let own = self.policies.iter().map(|name| PolicyName { tier: self.tier, name: name.clone() });
        own.chain(self.next.iter().flat_map(|next| next.all_policies())).collect()
    }

    /// What its own tier says, in the order of the policies and their rules.
    #[must_use]
    pub fn conditions(&self, cluster: &Cluster<'_>) -> Vec<Condition> {
        let (state, direction) = (cluster.state(), self.direction);
        let mut all = vec![];
        for name in &self.policies {
            if self.tier == Tier::NetworkPolicy {
                let rules = state.policies.get(name).and_then(|policy| policy.rules(direction)).unwrap_or_default();
                all.extend(rules.iter().flat_map(|rule| self.conditions_of(name, Action::Accept, rule)));
            } else {
                let rules = state.cluster_policies.get(name).map(|policy| policy.rules(direction)).unwrap_or_default();
                all.extend(rules.iter().flat_map(|rule| self.conditions_of(name, rule.action, &rule.matches)));
            }
        }
        all
    }

    fn conditions_of(&self, policy: &ObjectName, action: Action, rule: &Rule) -> Vec<Condition> {
        let peers = match &rule.peers {
            None => vec![PeerTest::Anybody],
            Some(peers) => {
                let pods = (!peers.pods.is_empty()).then(|| PeerTest::Pods(peers.pods.clone()));
                pods.into_iter()
                    .chain((!peers.blocks.is_empty()).then(|| PeerTest::Blocks(peers.blocks.clone())))
                    .collect()
            }
        };
        let condition = |peers, ports| Condition { policy: policy.clone(), rule: rule.index, action, peers, ports };
        let Some(ports) = &rule.ports else {
            return peers.into_iter().map(|peers| condition(peers, PortTest::Any)).collect();
        };
        let numbers = merged(ports.iter().flat_map(|port| self.numbers(port)));
        let mut all = vec![];
        if !numbers.is_empty() {
            all.extend(peers.into_iter().map(|peers| condition(peers, PortTest::Ports(numbers.clone()))));
        }
        let named: BTreeSet<(Protocol, Arc<str>)> =
            named_ports(rule).map(|(protocol, name)| (protocol, Arc::clone(name))).collect();
        if self.direction == Direction::Egress && !named.is_empty() {
            let group = NamedGroup { peers: rule.peers.clone(), ports: named };
            all.push(condition(PeerTest::Anybody, PortTest::Named(group)));
        }
        all
    }

    /// The numbers of a port, as far as they are the same whoever the other end is.
    fn numbers(&self, port: &PortMatch) -> Vec<(Protocol, u16, u16)> {
        match port {
            PortMatch::Range(protocol, first, last) => vec![(*protocol, *first, *last)],
            PortMatch::Named(protocol, name) => {
                let meant = self.named.iter().filter(|own| own.protocol == *protocol && own.name == *name);
                meant.map(|own| (*protocol, own.port, own.port)).collect()
            }
        }
    }
}

fn named_ports(rule: &Rule) -> impl Iterator<Item = (Protocol, &Arc<str>)> {
    rule.ports.iter().flatten().filter_map(|port| match port {
        PortMatch::Named(protocol, name) => Some((*protocol, name)),
        PortMatch::Range(..) => None,
    })
}
