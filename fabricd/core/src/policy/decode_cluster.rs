//! A ClusterNetworkPolicy's `spec` (policy.networking.k8s.io/v1alpha2, `apis/v1alpha2/clusternetworkpolicy_types.go` in
//! kubernetes-sigs/network-policy-api) as a [`ClusterPolicy`], rule by rule.
//!
//! A rule of which anything can't be understood, be it mistyped or newer than we are, fails closed, as its API demands: one
//! that accepts matches nothing then, and one that denies or passes denies everything. It is named. Nodes and domain names
//! as peers, which are experimental there, aren't understood here.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::decode::{Problems, Undecodable, number, prefix};
use super::json::object;
use super::model::{Direction, IpBlock, Namespaces, Peers, PodPeer, PortMatch, Problem, Protocol, Rule};
use super::selector::Selector;
use super::tiers::{Action, ClusterPolicy, ClusterRule, Tier};

/// The members of a `spec` that are known.
const KNOWN: [&str; 5] = ["tier", "priority", "subject", "ingress", "egress"];

impl ClusterPolicy {
    /// Reads the `spec` of a policy.
    ///
    /// # Errors
    /// When it isn't known for which pods it is, or where among other policies.
    pub fn decode(spec: &Value) -> Result<Self, Undecodable> {
        let undecodable = |place: &str, what: String| Undecodable(Problem { place: place.to_owned(), what });
        let Some(members) = spec.as_object() else {
            return Err(undecodable("spec", "it is missing, or no object".into()));
        };
        let member = |name: &str| members.get(name).unwrap_or(&Value::Null);
        let tier = match member("tier").as_str() {
            Some("Admin") => Tier::Admin,
            Some("Baseline") => Tier::Baseline,
            _ => return Err(undecodable("spec.tier", format!("{} is neither Admin nor Baseline", member("tier")))),
        };
        let priority = member("priority").as_u64().and_then(|number| u16::try_from(number).ok());
        let priority = priority
            .filter(|number| *number <= 1000)
            .ok_or_else(|| undecodable("spec.priority", format!("{} is not from 0 to 1000", member("priority"))))?;
        let subject = decode_subject(member("subject")).map_err(|error| undecodable("spec.subject", error))?;
        let mut problems = Problems::default();
        let mut unknown = members.keys().filter(|member| !KNOWN.contains(&member.as_str())).peekable();
        // It may change what any rule means.
        let all_fail = unknown.peek().is_some();
        for member in unknown {
            problems.add(&format!("spec.{member}"), "it is not known here, so each rule fails closed");
        }
        let mut decode = |direction: Direction| match member(&direction.to_string()) {
            Value::Null => Ok(vec![]),
            Value::Array(rules) => {
                let rules = rules.iter().enumerate();
                Ok(rules.filter_map(|(at, rule)| decode_rule(direction, at, rule, all_fail, &mut problems)).collect())
            }
            _ => Err(undecodable(&format!("spec.{direction}"), "it is no list".into())),
        };
        let (ingress, egress) = (decode(Direction::Ingress)?, decode(Direction::Egress)?);
        Ok(Self { tier, priority, subject, ingress, egress, problems: problems.0 })
    }
}

/// `None` where it fails closed by matching nothing.
fn decode_rule(
    direction: Direction,
    index: usize,
    rule: &Value,
    fails: bool,
    problems: &mut Problems,
) -> Option<ClusterRule> {
    let place = format!("spec.{direction}[{index}]");
    let before = problems.0.len();
    let action = match rule.get("action").and_then(Value::as_str) {
        Some("Accept") => Action::Accept,
        Some("Pass") => Action::Pass,
        Some("Deny") => Action::Deny,
        _ => {
            problems.add(&format!("{place}.action"), "it is none of Accept, Deny, Pass");
            Action::Deny
        }
    };
    let name = rule.get("name").and_then(Value::as_str).filter(|name| !name.is_empty()).map(Arc::from);
    let matches = decode_matches(direction, index, &place, rule, problems);
    match matches.filter(|_| !fails && problems.0.len() == before) {
        Some(matches) => Some(ClusterRule { name, action, matches }),
        None if action == Action::Accept => None,
        // It may have been meant to pass on what would be denied.
        None => Some(ClusterRule { name, action: Action::Deny, matches: Rule { index, peers: None, ports: None } }),
    }
}

/// What a rule matches, as far as it was understood.
fn decode_matches(
    direction: Direction,
    index: usize,
    place: &str,
    rule: &Value,
    problems: &mut Problems,
) -> Option<Rule> {
    let peers_are = match direction {
        Direction::Ingress => "from",
        Direction::Egress => "to",
    };
    let known = ["name", "action", peers_are, "protocols"];
    let members = problems.note(place, rule.as_object().ok_or_else(|| "it is no object".to_owned()))?;
    for member in members.keys().filter(|member| !known.contains(&member.as_str())) {
        problems.add(&format!("{place}.{member}"), "it is not known here");
    }
    let mut peers = Peers::default();
    for (at, peer) in problems.note(&format!("{place}.{peers_are}"), items(members, peers_are))?.iter().enumerate() {
        let decoded = problems.note(&format!("{place}.{peers_are}[{at}]"), decode_peer(direction, peer));
        let Peers { pods, blocks } = decoded.unwrap_or_default();
        peers.pods.extend(pods);
        peers.blocks.extend(blocks);
    }
    let ports = match members.get("protocols") {
        None | Some(Value::Null) => None,
        // It can't be told from an absent one by who wrote it in Go.
        Some(Value::Array(none)) if none.is_empty() => None,
        Some(_) => {
            let protocols = problems.note(&format!("{place}.protocols"), items(members, "protocols"))?;
            let mut all = BTreeSet::new();
            for (at, protocol) in protocols.iter().enumerate() {
                let decoded = decode_protocol(protocol, !peers.blocks.is_empty());
                all.extend(problems.note(&format!("{place}.protocols[{at}]"), decoded).unwrap_or_default());
            }
            Some(all)
        }
    };
    Some(Rule { index, peers: Some(peers), ports })
}

/// A list that must have items.
fn items<'a>(members: &'a Map<String, Value>, name: &str) -> Result<&'a Vec<Value>, String> {
    let items = members.get(name).and_then(Value::as_array).ok_or("it is no list")?;
    if items.is_empty() { Err("it is empty".into()) } else { Ok(items) }
}

/// The one member of an object that has one.
fn only(json: &Value) -> Result<(&str, &Value), String> {
    let mut members = json.as_object().ok_or("it is no object")?.iter().filter(|(_, value)| !value.is_null());
    match (members.next(), members.next()) {
        (Some((name, value)), None) => Ok((name, value)),
        (None, _) => Err("it says nothing".into()),
        (Some(_), Some(_)) => Err("it says more than one thing".into()),
    }
}

fn decode_subject(subject: &Value) -> Result<PodPeer, String> {
    let (name, value) = only(subject)?;
    decode_pods(name, value)?.ok_or_else(|| format!("{name} is neither namespaces nor pods"))
}

/// Pods, if that is how they are named.
fn decode_pods(name: &str, value: &Value) -> Result<Option<PodPeer>, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Raw {
        #[serde(default)]
        namespace_selector: Option<Value>,
        pod_selector: Value,
    }
    match name {
        "namespaces" => {
            let namespaces = Namespaces::Selected(Selector::decode(value)?);
            Ok(Some(PodPeer { namespaces, pods: Selector::default() }))
        }
        "pods" => {
            let Raw { namespace_selector, pod_selector } = object(value)?;
            // "If empty, it selects all Namespaces", and it is optional.
            let namespaces = namespace_selector.map_or_else(|| Ok(Selector::default()), |it| Selector::decode(&it))?;
            Ok(Some(PodPeer { namespaces: Namespaces::Selected(namespaces), pods: Selector::decode(&pod_selector)? }))
        }
        _ => Ok(None),
    }
}

fn decode_peer(direction: Direction, peer: &Value) -> Result<Peers, String> {
    let (name, value) = only(peer)?;
    let mut peers = Peers::default();
    match (decode_pods(name, value)?, name, direction) {
        (Some(pods), ..) => drop(peers.pods.insert(pods)),
        (None, "networks", Direction::Egress) => {
            let networks = value.as_array().filter(|all| !all.is_empty()).ok_or("networks is no list of prefixes")?;
            for network in networks {
                let cidr = prefix(network.as_str().ok_or_else(|| format!("{network} is no prefix"))?)?;
                peers.blocks.insert(IpBlock { cidr, except: BTreeSet::new() });
            }
        }
        _ => return Err(format!("{name} is no peer that is known here")),
    }
    Ok(peers)
}

/// `to_networks`: of addresses that needn't be pods' there are no named ports.
fn decode_protocol(protocol: &Value, to_networks: bool) -> Result<Vec<PortMatch>, String> {
    let (name, value) = only(protocol)?;
    let protocol = match name {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        "destinationNamedPort" => {
            let name: Arc<str> = match value.as_str() {
                Some(name) if !name.is_empty() => name.into(),
                _ => return Err(format!("{value} is no name of a port")),
            };
            if to_networks {
                return Err("networks have no named ports".into());
            }
            // A name is one port of a pod, whatever its protocol.
            let named = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].map(|it| PortMatch::Named(it, name.clone()));
            return Ok(named.into());
        }
        _ => return Err(format!("{name} is no protocol that is known here")),
    };
    let (member, port) = only(value)?;
    if member != "destinationPort" {
        return Err(format!("{member} is not known here"));
    }
    let (first, last) = match only(port)? {
        ("number", port) => {
            let port = number("number", port)?;
            (port, port)
        }
        ("range", range) => decode_range(range)?,
        (member, _) => return Err(format!("{member} is neither number nor range")),
    };
    Ok(vec![PortMatch::Range(protocol, first, last)])
}

fn decode_range(range: &Value) -> Result<(u16, u16), String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        start: Value,
        end: Value,
    }
    let Raw { start, end } = object(range)?;
    let (start, end) = (number("start", &start)?, number("end", &end)?);
    if start < end { Ok((start, end)) } else { Err(format!("end {end} is not more than start {start}")) }
}
