//! May a connection be? The rules of Kubernetes to the letter, tier by tier, one policy after another: what the packet filter does, what
//! happens to connections that are open, and what a person is told must all agree with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use super::labels::Labels;
use super::model::{Conn, Direction, NamedPort, Namespaces, ObjectName, Peers, Pod, PodPeer, Policy, PortMatch, Rule};
use super::state::State;
use super::tiers::{Action, ClusterPolicy, PolicyName, RuleName, Tier};

/// The state with its policies by their namespaces and this node's pods by their names: what looking at many connections
/// needs. However many pods the cluster has, this costs nothing more.
#[derive(Debug)]
pub struct Cluster<'a> {
    state: &'a State,
    locals: BTreeMap<&'a ObjectName, Attached>,
    policies: BTreeMap<&'a str, Vec<(&'a ObjectName, &'a Policy)>>,
    /// In the order in which they are asked.
    cluster_policies: Vec<(&'a ObjectName, &'a ClusterPolicy)>,
}

/// A pod of this node, as `fabric-cni` attached it.
#[derive(Debug, Default)]
struct Attached {
    uid: Option<u64>,
    ips: Vec<IpAddr>,
}

/// Whose an address is, as far as policies are concerned.
#[derive(Clone, Copy, Debug)]
pub struct Member<'a> {
    /// Whether it is a pod of this node.
    pub is_local: bool,
    /// Which pod.
    pub who: Who<'a>,
}

/// A pod behind an address.
#[derive(Clone, Copy, Debug)]
pub enum Who<'a> {
    /// A pod that policies can select.
    Pod(&'a Pod),
    /// A pod of this node that isn't Kubernetes'.
    Other,
    /// A pod of this node of which the API server has not told yet.
    Unknown(&'a ObjectName),
}

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// What the policies of the pod that begins it say.
    pub egress: Side,
    /// What the policies of the pod that answers it say.
    pub ingress: Side,
}

/// What the policies at one end of a connection say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Side {
    /// It may be: there is no pod at this end that a policy could be about.
    NoPod,
    /// It may be, as far as this node is asked: the pod is another node's, which evaluates it.
    Elsewhere,
    /// It may be: no policy isolates the pod in this direction.
    NotIsolated,
    /// It may be: the other end is the pod's own node.
    OwnNode,
    /// It may be: both ends are one pod.
    Itself,
    /// It may be, by this rule.
    Allowed {
        /// The policy.
        policy: ObjectName,
        /// The index of the rule in its list.
        rule: usize,
    },
    /// It may not: these policies isolate the pod, and none allows it.
    Denied(Vec<ObjectName>),
    /// It may be, by this rule of a ClusterNetworkPolicy.
    Accepted(RuleName),
    /// It may not, by this rule of a ClusterNetworkPolicy.
    Refused(RuleName),
    /// It may be: ClusterNetworkPolicies select the pod, and none decides; no policy isolates it.
    Undecided,
    /// It may not yet: the API server has not told of the pod.
    NotYetKnown(ObjectName),
}

impl Side {
    /// Whether this end lets the connection be.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        !matches!(self, Self::Denied(_) | Self::Refused(_) | Self::NotYetKnown(_))
    }
}

impl Verdict {
    /// Whether both ends let it be.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.egress.is_allowed() && self.ingress.is_allowed()
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPod => f.write_str("allowed: no pod that a policy could select"),
            Self::Elsewhere => f.write_str("allowed here: the pod's own node evaluates it"),
            Self::NotIsolated => f.write_str("allowed: no policy selects the pod"),
            Self::OwnNode => f.write_str("allowed: the pod's own node"),
            Self::Itself => f.write_str("allowed: the pod itself"),
            Self::Allowed { policy, rule } => write!(f, "allowed by rule {rule} of NetworkPolicy {policy}"),
            Self::Denied(policies) => {
                let names: Vec<String> = policies.iter().map(ToString::to_string).collect();
                write!(f, "dropped: no rule allows it of NetworkPolicy {}", names.join(", "))
            }
            Self::Accepted(rule) => write!(f, "allowed by {rule}"),
            Self::Refused(rule) => write!(f, "dropped by {rule}"),
            Self::Undecided => {
                f.write_str("allowed: no rule of a ClusterNetworkPolicy decides, and no NetworkPolicy selects the pod")
            }
            Self::NotYetKnown(pod) => write!(f, "dropped: the API server has not told of pod {pod} yet"),
        }
    }
}

impl<'a> Cluster<'a> {
    /// Sorts the policies.
    #[must_use]
    pub fn new(state: &'a State) -> Self {
        let mut locals: BTreeMap<&ObjectName, Attached> = BTreeMap::new();
        for (ip, pod) in &state.local.pods {
            let Some(identity) = &pod.identity else { continue };
            let attached = locals.entry(&identity.name).or_default();
            attached.uid = identity.uid;
            attached.ips.push(*ip);
        }
        let mut policies: BTreeMap<&str, Vec<_>> = BTreeMap::new();
        for (name, policy) in state.policies.iter() {
            policies.entry(name.namespace()).or_default().push((name, &**policy));
        }
        let mut cluster_policies: Vec<(&ObjectName, &ClusterPolicy)> =
            state.cluster_policies.iter().map(|(name, policy)| (name, &**policy)).collect();
        cluster_policies.sort_by_key(|(name, policy)| (policy.tier, policy.priority, *name));
        Self { state, locals, policies, cluster_policies }
    }

    /// The policies that select a pod, in the order of their names.
    pub fn policies_of(&self, pod: &Pod) -> impl Iterator<Item = (&'a ObjectName, &'a Policy)> {
        let of_namespace = self.policies.get(pod.name.namespace()).into_iter().flatten();
        of_namespace.filter(|(_, policy)| policy.subject.matches(pod.labels())).copied()
    }

    /// The policies of the whole cluster that select a pod, in the order in which a tier asks them.
    pub fn cluster_policies_of(
        &self,
        tier: Tier,
        pod: &Pod,
    ) -> impl Iterator<Item = (&'a ObjectName, &'a ClusterPolicy)> {
        let of_tier = self.cluster_policies.iter().filter(move |(_, policy)| policy.tier == tier);
        of_tier.filter(|(_, policy)| self.is_selected(&policy.subject, pod.name.namespace(), pod.labels())).copied()
    }

    /// The state that it is of.
    #[must_use]
    pub fn state(&self) -> &'a State {
        self.state
    }

    /// All addresses of pods of this node.
    pub fn locals(&self) -> impl Iterator<Item = (IpAddr, Member<'a>)> + '_ {
        self.state.local.pods.keys().filter_map(|ip| Some((*ip, self.member(*ip)?)))
    }

    /// Whose an address is.
    #[must_use]
    pub fn member(&self, ip: IpAddr) -> Option<Member<'a>> {
        let told = || self.told(ip).map(Who::Pod);
        let Some(local) = self.state.local.pods.get(&ip) else {
            return told().map(|who| Member { is_local: false, who });
        };
        let who = match &local.identity {
            // Attached by another plugin or an earlier release: the API server may know whose the address is.
            None => told().unwrap_or(Who::Other),
            Some(identity) => match self.state.pods.get(&identity.name) {
                Some(pod) if identity.uid.is_none_or(|uid| uid == pod.uid) => Who::Pod(pod),
                _ => Who::Unknown(&identity.name),
            },
        };
        // Its namespace was created before it, but may be told after it.
        let is_told =
            |pod: &Pod| self.state.cluster_policies.is_empty() || self.namespace(pod.name.namespace()).is_some();
        let who = match who {
            Who::Pod(pod) if !is_told(pod) => Who::Unknown(&pod.name),
            who => who,
        };
        Some(Member { is_local: true, who })
    }

    /// Whose an address is as the API server tells it. A pod of this node has the addresses that fabric-cni saved, and no
    /// others.
    fn told(&self, ip: IpAddr) -> Option<&'a Pod> {
        let all = self.state.pods.with_address(ip).map(|pod| &**pod);
        all.filter(|pod| pod.is_live(self.state.now) && !self.is_attached(pod)).max_by_key(|pod| age(pod))
    }

    fn is_attached(&self, pod: &Pod) -> bool {
        self.locals.get(&pod.name).is_some_and(|attached| attached.uid.is_none_or(|uid| uid == pod.uid))
    }

    /// The addresses that may be those of a pod of this name.
    pub(super) fn candidates(&self, name: &ObjectName) -> impl Iterator<Item = IpAddr> {
        let saved = self.locals.get(name).into_iter().flat_map(|attached| attached.ips.iter().copied());
        saved.chain(self.state.pods.get(name).into_iter().flat_map(|pod| pod.ips()))
    }

    /// What both ends say, wherever they are.
    #[must_use]
    pub fn evaluate(&self, conn: &Conn) -> Verdict {
        Verdict {
            egress: self.side(Direction::Egress, conn, conn.src, conn.dst),
            ingress: self.side(Direction::Ingress, conn, conn.dst, conn.src),
        }
    }

    /// What the ends on this node say. The others' nodes evaluate for themselves.
    #[must_use]
    pub fn evaluate_here(&self, conn: &Conn) -> Verdict {
        let is_elsewhere = |ip| self.member(ip).is_some_and(|member| !member.is_local);
        let mut verdict = self.evaluate(conn);
        if is_elsewhere(conn.src) {
            verdict.egress = Side::Elsewhere;
        }
        if is_elsewhere(conn.dst) {
            verdict.ingress = Side::Elsewhere;
        }
        verdict
    }

    fn side(&self, direction: Direction, conn: &Conn, own: IpAddr, other: IpAddr) -> Side {
        let Some(member) = self.member(own) else { return Side::NoPod };
        let is_own_node = member.is_local && self.state.local.host.contains(&other);
        if is_own_node && direction == Direction::Ingress {
            return Side::OwnNode;
        }
        let pod = match member.who {
            Who::Pod(pod) => pod,
            Who::Other => return Side::NoPod,
            Who::Unknown(name) => return Side::NotYetKnown(name.clone()),
        };
        if is_own_node && self.state.local.own_node_allowed {
            return Side::OwnNode;
        }
        if let Some(side) = self.decided(Tier::Admin, direction, pod, conn, other) {
            return side;
        }
        let mut isolated_by = vec![];
        for (policy_name, policy) in self.policies_of(pod) {
            let Some(rules) = policy.rules(direction) else { continue };
            if own == other {
                return Side::Itself;
            }
            if let Some(rule) = rules.iter().find(|rule| self.matches(rule, conn, other)) {
                return Side::Allowed { policy: policy_name.clone(), rule: rule.index };
            }
            isolated_by.push(policy_name.clone());
        }
        if !isolated_by.is_empty() {
            return Side::Denied(isolated_by);
        }
        if let Some(side) = self.decided(Tier::Baseline, direction, pod, conn, other) {
            return side;
        }
        let mut all = [Tier::Admin, Tier::Baseline].into_iter().flat_map(|tier| self.cluster_policies_of(tier, pod));
        if own == other {
            Side::Itself
        } else if all.any(|(_, policy)| !policy.rules(direction).is_empty()) {
            Side::Undecided
        } else {
            Side::NotIsolated
        }
    }

    /// What the policies of the whole cluster in one tier decide: `None` where the next tier is asked.
    fn decided(&self, tier: Tier, direction: Direction, pod: &Pod, conn: &Conn, other: IpAddr) -> Option<Side> {
        let (name, rule) = self
            .cluster_policies_of(tier, pod)
            .flat_map(|(name, policy)| policy.rules(direction).iter().map(move |rule| (name, rule)))
            .find(|(_, rule)| self.matches(&rule.matches, conn, other))?;
        let (policy, index) = (PolicyName { tier, name: name.clone() }, rule.matches.index);
        let rule_name = || RuleName { policy, rule: index, name: rule.name.clone() };
        match rule.action {
            Action::Accept => Some(Side::Accepted(rule_name())),
            Action::Deny => Some(Side::Refused(rule_name())),
            Action::Pass => None,
        }
    }

    fn matches(&self, rule: &Rule, conn: &Conn, other: IpAddr) -> bool {
        self.is_peer_of(rule, other) && self.is_port_of(rule, conn)
    }

    /// Whether the other end is one that a rule is about.
    pub(super) fn is_peer_of(&self, rule: &Rule, other: IpAddr) -> bool {
        rule.peers.as_ref().is_none_or(|peers| self.is_peer(peers, other))
    }

    /// Whether a connection goes to a port that a rule is about.
    pub(super) fn is_port_of(&self, rule: &Rule, conn: &Conn) -> bool {
        let named = self.named_ports(conn.dst);
        let to_a_port = |ports: &BTreeSet<PortMatch>| ports.iter().any(|port| port.matches(conn, named));
        rule.ports.as_ref().is_none_or(to_a_port)
    }

    fn named_ports(&self, ip: IpAddr) -> &'a [NamedPort] {
        match self.member(ip).map(|member| member.who) {
            Some(Who::Pod(pod)) => pod.ports(),
            _ => &[],
        }
    }

    /// The labels of a namespace.
    #[must_use]
    pub fn namespace(&self, name: &str) -> Option<&'a Labels> {
        self.state.namespaces.find(|other| (**other).cmp(name)).map(|(_, labels)| &**labels)
    }

    /// Whether pods of this namespace, with these labels, are meant.
    #[must_use]
    pub fn is_selected(&self, peer: &PodPeer, namespace: &str, labels: &Labels) -> bool {
        let in_namespace = match &peer.namespaces {
            Namespaces::Named(name) => **name == *namespace,
            // Of a namespace that is not known nothing can be said.
            Namespaces::Selected(selector) => self.namespace(namespace).is_some_and(|labels| selector.matches(labels)),
        };
        in_namespace && peer.pods.matches(labels)
    }

    /// Whether a pod is one of these.
    pub(super) fn is_any_of(&self, peers: &BTreeSet<PodPeer>, pod: &Pod) -> bool {
        peers.iter().any(|peer| self.is_selected(peer, pod.name.namespace(), pod.labels()))
    }

    pub(super) fn is_peer(&self, peers: &Peers, ip: IpAddr) -> bool {
        let is_pod = || match self.member(ip).map(|member| member.who) {
            Some(Who::Pod(pod)) => self.is_any_of(&peers.pods, pod),
            _ => false,
        };
        peers.blocks.iter().any(|block| block.contains(ip)) || is_pod()
    }
}

/// The order of two pods that say the same address: the one that was made last has it.
fn age(pod: &Pod) -> (bool, u32, &ObjectName) {
    (pod.ends.is_none(), pod.created, &pod.name)
}
