//! The chains of the pods' policies: one for each [`EffectivePolicy`], numbered, with the rules in it and what they count.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::drops::DropCause;
use super::effective::{Condition, EffectivePolicy, PeerTest, PortTest};
use super::evaluate::Cluster;
use super::groups::Numbers;
use super::model::{Direction, ObjectName};
use super::plan::{Groups, PORT, Sets};
use super::tiers::{Action, PolicyName, Tier};
use crate::model::Family;
use crate::state::nft::{Field, Match, Name, Rule, Step, Verdict};

/// What the rules of a chain are made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The direction that it evaluates.
    pub direction: Direction,
    /// What each of its rules counts, in their order.
    pub rules: Vec<Counts>,
}

/// What a rule counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Counts {
    /// What a rule of a policy matches.
    Rule {
        /// The policy.
        policy: PolicyName,
        /// The rule's index in its list.
        rule: usize,
        /// What becomes of it.
        action: Action,
    },
    /// What no rule of these NetworkPolicies allows.
    NoRule(Vec<ObjectName>),
    /// Nothing that belongs to a policy's rule.
    Nothing,
}

/// The effective policies that there are, and whose they are.
#[derive(Default)]
pub(super) struct EffectivePolicies(BTreeMap<EffectivePolicy, Users>);

/// The pods of an effective policy.
#[derive(Default)]
struct Users {
    /// Whose first tier it is.
    beginning: BTreeSet<IpAddr>,
    /// All of them.
    all: BTreeSet<IpAddr>,
}

/// An effective policy with its number, what it is about, and whose it is.
pub(super) struct Planned {
    pub(super) effective: EffectivePolicy,
    number: u32,
    /// The number of the next one.
    next: Option<u32>,
    pub(super) conditions: Vec<Condition>,
    users: Users,
}

impl EffectivePolicies {
    /// A pod has this one.
    pub(super) fn add(&mut self, effective: EffectivePolicy, ip: IpAddr) {
        let mut next = effective.next.clone();
        let users = self.0.entry(effective).or_default();
        users.beginning.insert(ip);
        users.all.insert(ip);
        while let Some(effective) = next {
            self.0.entry((*effective).clone()).or_default().all.insert(ip);
            next = effective.next.clone();
        }
    }

    pub(super) fn numbered(self, cluster: &Cluster<'_>) -> Vec<Planned> {
        let numbers = Numbers::of(self.0.keys().cloned());
        let planned = self.0.into_iter().filter_map(|(effective, users)| {
            let (number, conditions) = (numbers.get(&effective)?, effective.conditions(cluster));
            let next = effective.next.as_ref().and_then(|next| numbers.get(next));
            Some(Planned { effective, number, next, conditions, users })
        });
        planned.collect()
    }
}

impl Planned {
    /// The chain for addresses of a family.
    pub(super) fn chain(&self, family: Family) -> Name {
        self.numbered(family, self.number)
    }

    fn numbered(&self, family: Family, number: u32) -> Name {
        let word = match (self.effective.direction, family) {
            (Direction::Ingress, Family::V4) => "in4",
            (Direction::Ingress, Family::V6) => "in6",
            (Direction::Egress, Family::V4) => "eg4",
            (Direction::Egress, Family::V6) => "eg6",
        };
        Name::numbered(word, &[number])
    }

    /// Whether a pod has an address of the family.
    pub(super) fn is_used(&self, family: Family) -> bool {
        self.users.all.iter().any(|ip| Family::of(*ip) == family)
    }

    /// The addresses of the pods whose first tier it is.
    pub(super) fn begins_with(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        self.users.beginning.iter().copied().filter(move |ip| Family::of(*ip) == family)
    }

    /// The chain's rules, with what they count.
    pub(super) fn rules(&self, sets: &Sets, groups: &Groups) -> Vec<(Rule, Counts)> {
        let (direction, tier) = (self.effective.direction, self.effective.tier);
        // Where this tier leaves it open.
        let go_on = match self.next {
            Some(next) => Verdict::Goto(self.numbered(sets.family, next)),
            None => Verdict::Return,
        };
        let mut rules = vec![];
        if tier == Tier::NetworkPolicy {
            let both = Match::all_in(&[sets.began(), sets.answers()], sets.itself);
            let itself = Rule::new([both], Verdict::Return, "a pod to itself, through a Service");
            rules.push((itself, Counts::Nothing));
        }
        for condition in &self.conditions {
            let Condition { policy, rule, action, .. } = condition;
            let why = match tier {
                Tier::NetworkPolicy => format!("NetworkPolicy {policy} {direction} rule {rule}"),
                _ => format!("{tier} {action}: ClusterNetworkPolicy {policy} {direction} rule {rule}"),
            };
            let matches = self.matches(condition, sets, groups);
            let then = |verdict: Verdict| {
                let steps = matches.iter().cloned().map(Step::Match).chain([Step::Count, verdict.into()]);
                Rule { steps: steps.collect(), why: why.clone().into() }
            };
            let planned = match action {
                Action::Accept => then(Verdict::Return),
                Action::Pass => then(go_on),
                Action::Deny => DropCause::ByRule.rule(matches, why),
            };
            let policy = PolicyName { tier, name: policy.clone() };
            rules.push((planned, Counts::Rule { policy, rule: *rule, action: *action }));
        }
        match (tier, self.next) {
            (Tier::NetworkPolicy, _) => {
                let policies: Vec<String> = self.effective.policies.iter().map(ToString::to_string).collect();
                let why = format!("NetworkPolicy: no {direction} rule of {}", policies.join(", "));
                rules.push((DropCause::NoRule.rule([], why), Counts::NoRule(self.effective.policies.clone())));
            }
            (_, Some(_)) => rules.push((Rule::new([], go_on, "the next tier"), Counts::Nothing)),
            (_, None) => {}
        }
        rules
    }

    fn matches(&self, condition: &Condition, sets: &Sets, groups: &Groups) -> Vec<Match> {
        let peer = match self.effective.direction {
            Direction::Ingress => sets.began(),
            Direction::Egress => sets.answers(),
        };
        let peers = match &condition.peers {
            PeerTest::Anybody => None,
            PeerTest::Pods(group) => Some((groups.pods.get(group), sets.peer)),
            PeerTest::Blocks(group) => Some((groups.blocks.get(group), sets.block)),
        };
        let peers = peers.and_then(|(group, set)| Some(Match::all_in(&[Field::Number(group?), peer], set)));
        let ports = match &condition.ports {
            PortTest::Any => None,
            PortTest::Ports(group) => groups
                .ports
                .get(group)
                .map(|group| Match::all_in(&[Field::Number(group), Field::Protocol, PORT], "ports")),
            PortTest::Named(group) => groups.named.get(group).map(|group| {
                Match::all_in(&[Field::Number(group), sets.answers(), Field::Protocol, PORT], sets.peer_port)
            }),
        };
        peers.into_iter().chain(ports).collect()
    }
}
