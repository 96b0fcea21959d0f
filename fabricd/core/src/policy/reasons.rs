//! What a person is told of a connection that policies drop: what each rule allows instead or denies, and a rule that would
//! allow it.

use std::fmt;
use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::evaluate::{Cluster, Side, Who};
use super::labels::Labels;
use super::model::{Conn, Direction, IpBlock, Namespaces, ObjectName, PodPeer, PortMatch, Problem, Protocol, Rule};
use super::tiers::{Action, PolicyName, RuleName, Tier};

/// How many peers or ports of a rule are told.
const TOLD: usize = 6;
/// The label that every namespace has since Kubernetes 1.21.
const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";

/// A rule that isolates one end of a connection with others, and doesn't allow it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The policy.
    pub policy: ObjectName,
    /// The index of the rule in its list.
    pub rule: usize,
    /// What it allows.
    pub allows: String,
    /// The other end is one that it allows.
    pub is_peer: bool,
    /// The port is one that it allows.
    pub is_port: bool,
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, rule, allows, is_peer, is_port } = self;
        let other = match (is_peer, is_port) {
            (false, true) => "another peer",
            (true, false) => "another port",
            _ => "another peer and port",
        };
        write!(f, "rule {rule} of NetworkPolicy {policy} allows {allows}: this is {other}")
    }
}

/// A rule that would allow a connection at one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remedy {
    /// One of the policies that isolate the pod, or the one that denies it.
    pub policy: PolicyName,
    /// In which list the rule belongs.
    pub direction: Direction,
    /// The rule.
    pub rule: Value,
    /// Where in the list; `None` where not all of the policy is understood.
    pub place: Option<Place>,
}

/// Where a rule is put in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// It is the first one, of a list that may not be there.
    Alone,
    /// At the end.
    Last,
    /// Before the rule of this index.
    Before(usize),
}

impl Remedy {
    /// The patch (RFC 6902) that adds the rule.
    #[must_use]
    pub fn patch(&self) -> Option<Value> {
        let (direction, rule) = (self.direction, &self.rule);
        let add = |path: String, value: Value| json!([{"op": "add", "path": path, "value": value}]);
        Some(match self.place? {
            Place::Last => add(format!("/spec/{direction}/-"), json!(rule)),
            Place::Before(index) => add(format!("/spec/{direction}/{index}"), json!(rule)),
            Place::Alone => add(format!("/spec/{direction}"), json!([rule])),
        })
    }
}

impl fmt::Display for Remedy {
    /// A command of kubectl, or the rule.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { policy, direction, rule, .. } = self;
        let (namespace, name) = (policy.name.namespace(), policy.name.name());
        let of_namespace = if namespace.is_empty() { String::new() } else { format!("-n {namespace} ") };
        let kind = policy.tier.kind().to_lowercase();
        // What comes from the API server has no quotes; what has some is no command.
        match self.patch().map(|patch| patch.to_string()).filter(|patch| !patch.contains('\'')) {
            Some(patch) => write!(f, "kubectl {of_namespace}patch {kind} {name} --type=json -p '{patch}'"),
            None => write!(f, "this {direction} rule in {policy}: {rule}"),
        }
    }
}

impl Cluster<'_> {
    /// The rules at one end of a connection, none of which allows it.
    #[must_use]
    pub fn misses(&self, direction: Direction, conn: &Conn) -> Vec<Miss> {
        let (own, other) = ends(direction, conn);
        let Some(Who::Pod(pod)) = self.member(own).map(|member| member.who) else { return vec![] };
        let rules = self.policies_of(pod).flat_map(|(policy, said)| {
            said.rules(direction).unwrap_or_default().iter().map(move |rule| (policy, rule))
        });
        let miss = |(policy, rule): (&ObjectName, &Rule)| Miss {
            policy: policy.clone(),
            rule: rule.index,
            allows: words(direction, rule),
            is_peer: self.is_peer_of(rule, other),
            is_port: self.is_port_of(rule, conn),
        };
        rules.map(miss).filter(|miss| !(miss.is_peer && miss.is_port)).collect()
    }

    /// A rule with which a connection is allowed at one end: for one of the policies that isolate the pod, or before the rule
    /// that denies it. `None` where no rule can say so.
    #[must_use]
    pub fn remedy(&self, direction: Direction, conn: &Conn) -> Option<Remedy> {
        let (own, other) = ends(direction, conn);
        let Some(Who::Pod(pod)) = self.member(own).map(|member| member.who) else { return None };
        let verdict = self.evaluate(conn);
        let side = match direction {
            Direction::Ingress => verdict.ingress,
            Direction::Egress => verdict.egress,
        };
        if let Side::Refused(rule) = side {
            return self.accepting(direction, conn, other, rule);
        }
        let (policy, said) = self.policies_of(pod).find(|(_, said)| said.rules(direction).is_some())?;
        let mut rule = Map::new();
        rule.insert(peers_are(direction).into(), json!([self.peer(policy.namespace(), other)]));
        if let Some(protocol) = Protocol::of(conn.protocol) {
            rule.insert("ports".into(), json!([{"protocol": protocol.to_string().to_uppercase(), "port": conn.port}]));
        }
        let has_rules = said.rules(direction).is_some_and(|rules| !rules.is_empty());
        let place = said.problems.is_empty().then_some(if has_rules { Place::Last } else { Place::Alone });
        let policy = PolicyName { tier: Tier::NetworkPolicy, name: policy.clone() };
        Some(Remedy { policy, direction, rule: rule.into(), place })
    }

    /// A rule of a ClusterNetworkPolicy that accepts what one of its rules denies.
    fn accepting(&self, direction: Direction, conn: &Conn, other: IpAddr, denies: RuleName) -> Option<Remedy> {
        let peer = match (self.cluster_peer(other), direction) {
            (Some(peer), _) => peer,
            (None, Direction::Egress) => json!({"networks": [one_address(other)]}),
            // Who isn't a pod can't be named.
            (None, Direction::Ingress) => return None,
        };
        let mut rule = Map::new();
        rule.insert("action".into(), Action::Accept.word().into());
        rule.insert(peers_are(direction).into(), json!([peer]));
        if let Some(protocol) = Protocol::of(conn.protocol) {
            let port = json!({"destinationPort": {"number": conn.port}});
            rule.insert("protocols".into(), json!([{protocol.to_string(): port}]));
        }
        let said = self.state().cluster_policies.get(&denies.policy.name)?;
        let place = said.problems.is_empty().then_some(Place::Before(denies.rule));
        Some(Remedy { policy: denies.policy, direction, rule: rule.into(), place })
    }

    /// What the rule of a ClusterNetworkPolicy denies, in words.
    #[must_use]
    pub fn denied_by(&self, direction: Direction, rule: &RuleName) -> Option<String> {
        let policy = self.state().cluster_policies.get(&rule.policy.name)?;
        let said = policy.rules(direction).iter().find(|said| said.matches.index == rule.rule)?;
        let place = format!("spec.{direction}[{}]", rule.rule);
        let is_of_rule = |problem: &&Problem| problem.place.starts_with(&place) || !problem.place.contains('[');
        let told = match policy.problems.iter().find(is_of_rule) {
            Some(problem) => format!("denies everything, as it can't be understood: {problem}"),
            None => format!("denies {}", words(direction, &said.matches)),
        };
        Some(format!("{rule} {told}"))
    }

    /// A pod as a ClusterNetworkPolicy names it.
    fn cluster_peer(&self, ip: IpAddr) -> Option<Value> {
        let Some(Who::Pod(pod)) = self.member(ip).map(|member| member.who) else { return None };
        let namespaces = self.namespace_selector(pod.name.namespace())?;
        let pods = json!({"matchLabels": labels(pod.labels())});
        Some(json!({"pods": {"namespaceSelector": namespaces, "podSelector": pods}}))
    }

    fn namespace_selector(&self, name: &str) -> Option<Value> {
        let all = self.namespace(name)?;
        Some(match all.get(NAMESPACE_NAME) {
            Some(name) => json!({"matchLabels": {NAMESPACE_NAME: name}}),
            None => json!({"matchLabels": labels(all)}),
        })
    }

    /// An address as a policy of this namespace names it.
    fn peer(&self, namespace: &str, ip: IpAddr) -> Value {
        let block = || json!({"ipBlock": {"cidr": one_address(ip)}});
        let Some(Who::Pod(pod)) = self.member(ip).map(|member| member.who) else { return block() };
        let pods = json!({"matchLabels": labels(pod.labels())});
        let own = pod.name.namespace();
        if own == namespace {
            return json!({"podSelector": pods});
        }
        match self.namespace_selector(own) {
            Some(namespaces) => json!({"namespaceSelector": namespaces, "podSelector": pods}),
            None => block(),
        }
    }
}

/// The pod that is judged, and the other end.
fn ends(direction: Direction, conn: &Conn) -> (IpAddr, IpAddr) {
    match direction {
        Direction::Ingress => (conn.dst, conn.src),
        Direction::Egress => (conn.src, conn.dst),
    }
}

fn peers_are(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    }
}

fn one_address(ip: IpAddr) -> String {
    format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })
}

fn labels(all: &Labels) -> Map<String, Value> {
    all.iter().map(|(key, value)| (key.to_owned(), value.into())).collect()
}

/// What a rule is about: `tcp 8080 from pods app=web of namespace shop`.
fn words(direction: Direction, rule: &Rule) -> String {
    let ports = match &rule.ports {
        None => "everything".to_owned(),
        Some(ports) if ports.is_empty() => "nothing".to_owned(),
        Some(ports) => first_few(ports.iter().map(port)),
    };
    let way = peers_are(direction);
    let peers = match &rule.peers {
        None => "anybody".to_owned(),
        Some(peers) => {
            let all = peers.pods.iter().map(pods).chain(peers.blocks.iter().map(block));
            let all = first_few(all);
            if all.is_empty() { "nobody".to_owned() } else { all }
        }
    };
    format!("{ports} {way} {peers}")
}

fn first_few(all: impl Iterator<Item = String>) -> String {
    let all: Vec<String> = all.collect();
    let more = all.len().saturating_sub(TOLD);
    let text = all.iter().take(TOLD).map(String::as_str).collect::<Vec<_>>().join(", ");
    if more == 0 { text } else { format!("{text} and {more} more") }
}

fn port(port: &PortMatch) -> String {
    match port {
        PortMatch::Range(protocol, 0, u16::MAX) => format!("all of {protocol}"),
        PortMatch::Range(protocol, first, last) if first == last => format!("{protocol} {first}"),
        PortMatch::Range(protocol, first, last) => format!("{protocol} {first}-{last}"),
        PortMatch::Named(protocol, name) => format!("{protocol} port {name:?}"),
    }
}

fn pods(peer: &PodPeer) -> String {
    let pods = if peer.pods.is_everything() { "all pods".to_owned() } else { format!("pods {}", peer.pods) };
    match &peer.namespaces {
        Namespaces::Named(name) => format!("{pods} of namespace {name}"),
        Namespaces::Selected(selector) if selector.is_everything() => format!("{pods} of all namespaces"),
        Namespaces::Selected(selector) => format!("{pods} of namespaces {selector}"),
    }
}

fn block(block: &IpBlock) -> String {
    let except: Vec<String> = block.except.iter().map(ToString::to_string).collect();
    if except.is_empty() { block.cidr.to_string() } else { format!("{} but {}", block.cidr, except.join(", ")) }
}
