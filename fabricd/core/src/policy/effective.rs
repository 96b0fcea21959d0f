//! What the policies of one pod amount to in one direction: an [`EffectivePolicy`]. Pods that the same policies select share
//! it, and with it a chain of rules.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::evaluate::Cluster;
use super::groups::{BlockGroup, NamedGroup, PodGroup, PortGroup, merged};
use super::model::{Direction, NamedPort, ObjectName, Pod, PortMatch, Protocol, Rule};

/// What tells the chain of a pod from others.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct EffectivePolicy {
    /// Of what comes to it, or of what it sends.
    pub direction: Direction,
    /// The policies that isolate it, in order.
    pub policies: Vec<ObjectName>,
    /// Its own ports, as far as these policies name them; of what comes to it alone.
    pub named: BTreeSet<NamedPort>,
}

/// What one rule of a policy lets through: all of these must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowance {
    /// Whose rule it is.
    pub policy: ObjectName,
    /// The rule's index in the policy.
    pub rule: usize,
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
    /// That of a pod; `None` when no policy isolates it in this direction.
    #[must_use]
    pub fn of(cluster: &Cluster<'_>, direction: Direction, pod: &Pod) -> Option<Self> {
        let mut effective = Self { direction, policies: vec![], named: BTreeSet::new() };
        for (policy_name, policy) in cluster.policies_of(pod) {
            let Some(rules) = policy.rules(direction) else { continue };
            effective.policies.push(policy_name.clone());
            if direction == Direction::Ingress {
                let names: BTreeSet<(Protocol, &Arc<str>)> = rules.iter().flat_map(named_ports).collect();
                let meant = pod.ports().iter().filter(|port| names.contains(&(port.protocol, &port.name)));
                effective.named.extend(meant.cloned());
            }
        }
        (!effective.policies.is_empty()).then_some(effective)
    }

    /// What it lets through, in the order of the policies and their rules.
    #[must_use]
    pub fn allowances(&self, cluster: &Cluster<'_>) -> Vec<Allowance> {
        let policies = self.policies.iter().filter_map(|name| Some((name, cluster.state().policies.get(name)?)));
        let rules = policies.flat_map(|(name, policy)| {
            policy.rules(self.direction).unwrap_or_default().iter().map(move |rule| (name, rule))
        });
        rules.flat_map(|(name, rule)| self.allowances_of(name, rule)).collect()
    }

    fn allowances_of(&self, policy: &ObjectName, rule: &Rule) -> Vec<Allowance> {
        let peers = match &rule.peers {
            None => vec![PeerTest::Anybody],
            Some(peers) => {
                let pods = (!peers.pods.is_empty()).then(|| PeerTest::Pods(peers.pods.clone()));
                pods.into_iter()
                    .chain((!peers.blocks.is_empty()).then(|| PeerTest::Blocks(peers.blocks.clone())))
                    .collect()
            }
        };
        let allowance = |peers, ports| Allowance { policy: policy.clone(), rule: rule.index, peers, ports };
        let Some(ports) = &rule.ports else {
            return peers.into_iter().map(|peers| allowance(peers, PortTest::Any)).collect();
        };
        let numbers = merged(ports.iter().flat_map(|port| self.numbers(port)));
        let mut all = vec![];
        if !numbers.is_empty() {
            all.extend(peers.into_iter().map(|peers| allowance(peers, PortTest::Ports(numbers.clone()))));
        }
        let named: BTreeSet<(Protocol, Arc<str>)> =
            named_ports(rule).map(|(protocol, name)| (protocol, Arc::clone(name))).collect();
        if self.direction == Direction::Egress && !named.is_empty() {
            let group = NamedGroup { peers: rule.peers.clone(), ports: named };
            all.push(allowance(PeerTest::Anybody, PortTest::Named(group)));
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
