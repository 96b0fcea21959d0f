//! A NetworkPolicy's `spec` (networking.k8s.io/v1) as a [`Policy`], item by item.
//!
//! What can't be understood of it, be it mistyped or newer than we are, matches nothing and is named: left out, it would
//! make a rule wider. An empty list means everything in Kubernetes, so a list of which nothing was understood is another
//! thing than an empty one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

use super::json::object;
use super::model::{Direction, IpBlock, Namespaces, Peers, PodPeer, Policy, PortMatch, Problem, Protocol, Rule};
use super::selector::Selector;
use crate::model::Subnet;

/// Why nothing at all is known of a policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Undecodable(pub Problem);

impl Policy {
    /// Reads the `spec` of a policy of this namespace.
    ///
    /// # Errors
    /// When it isn't known for which pods it is, or in which directions.
    pub fn decode(namespace: &str, spec: &Value) -> Result<Self, Undecodable> {
        let undecodable = |place: &str, what: String| Undecodable(Problem { place: place.to_owned(), what });
        let Some(members) = spec.as_object() else {
            return Err(undecodable("spec", "it is missing, or no object".into()));
        };
        let subject = match members.get("podSelector") {
            None | Some(Value::Null) => Selector::default(),
            Some(selector) => Selector::decode(selector).map_err(|error| undecodable("spec.podSelector", error))?,
        };
        let mut problems = Problems::default();
        let rules = |member: &str| -> Result<Option<&Vec<Value>>, Undecodable> {
            match members.get(member) {
                None | Some(Value::Null) => Ok(None),
                Some(Value::Array(rules)) => Ok(Some(rules)),
                Some(_) => Err(undecodable(&format!("spec.{member}"), "it is no list".into())),
            }
        };
        let (ingress, egress) = (rules("ingress")?, rules("egress")?);
        let types = policy_types(members.get("policyTypes"), &mut problems)
            .map_err(|error| undecodable("spec.policyTypes", error))?;
        let (to_them, from_them) = types.unwrap_or((true, egress.is_some_and(|rules| !rules.is_empty())));
        let known = ["podSelector", "policyTypes", "ingress", "egress"];
        let mut unknown = members.keys().filter(|member| !known.contains(&member.as_str())).peekable();
        // It may well narrow what the rules allow.
        let allows_nothing = unknown.peek().is_some();
        for member in unknown {
            problems.add(&format!("spec.{member}"), "it is not known here, so the policy allows nothing");
        }
        let mut decode = |isolates: bool, rules: Option<&Vec<Value>>, direction| {
            isolates.then(|| {
                let rules = rules.map(Vec::as_slice).unwrap_or_default();
                let decoded = decode_rules(namespace, direction, rules, &mut problems);
                if allows_nothing { vec![] } else { decoded }
            })
        };
        let ingress = decode(to_them, ingress, Direction::Ingress);
        let egress = decode(from_them, egress, Direction::Egress);
        Ok(Self { subject, ingress, egress, problems: problems.0 })
    }
}

/// What can't be understood.
#[derive(Default)]
pub(super) struct Problems(pub(super) Vec<Problem>);

impl Problems {
    pub(super) fn add(&mut self, place: &str, what: impl Into<String>) {
        self.0.push(Problem { place: place.to_owned(), what: what.into() });
    }

    /// What was understood, if it was.
    pub(super) fn note<T>(&mut self, place: &str, decoded: Result<T, String>) -> Option<T> {
        decoded.map_err(|error| self.add(place, error)).ok()
    }
}

/// Whether ingress and egress are meant; `None` when it isn't said.
fn policy_types(types: Option<&Value>, problems: &mut Problems) -> Result<Option<(bool, bool)>, String> {
    let types = match types {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(types)) if types.is_empty() => return Ok(None),
        Some(Value::Array(types)) => types,
        Some(_) => return Err("it is no list".into()),
    };
    let (mut ingress, mut egress) = (false, false);
    for (at, kind) in types.iter().enumerate() {
        match kind.as_str() {
            Some("Ingress") => ingress = true,
            Some("Egress") => egress = true,
            _ => problems.add(&format!("spec.policyTypes[{at}]"), format!("{kind} is neither Ingress nor Egress")),
        }
    }
    if ingress || egress { Ok(Some((ingress, egress))) } else { Err("none of them is known here".into()) }
}

fn decode_rules(namespace: &str, direction: Direction, rules: &[Value], problems: &mut Problems) -> Vec<Rule> {
    let mut decoded = vec![];
    for (index, rule) in rules.iter().enumerate() {
        let place = format!("spec.{direction}[{index}]");
        let raw = match direction {
            Direction::Ingress => object(rule).map(|IngressRule { from, ports }| ("from", from, ports)),
            Direction::Egress => object(rule).map(|EgressRule { to, ports }| ("to", to, ports)),
        };
        let Some((peers_are, peers, ports)) = problems.note(&place, raw) else { continue };
        let peers = peers.filter(|peers| !peers.is_empty()).map(|peers| {
            let mut all = Peers::default();
            for (at, peer) in peers.iter().enumerate() {
                let place = format!("{place}.{peers_are}[{at}]");
                match problems.note(&place, decode_peer(namespace, peer)) {
                    Some(Peer::Pods(peer)) => drop(all.pods.insert(peer)),
                    Some(Peer::Block(block)) => drop(all.blocks.insert(block)),
                    None => {}
                }
            }
            all
        });
        let ports = ports.filter(|ports| !ports.is_empty()).map(|ports| {
            let decoded = ports
                .iter()
                .enumerate()
                .filter_map(|(at, port)| problems.note(&format!("{place}.ports[{at}]"), decode_port(port)));
            decoded.collect::<BTreeSet<PortMatch>>()
        });
        decoded.push(Rule { index, peers, ports });
    }
    decoded
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IngressRule {
    #[serde(default)]
    from: Option<Vec<Value>>,
    #[serde(default)]
    ports: Option<Vec<Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct EgressRule {
    #[serde(default)]
    to: Option<Vec<Value>>,
    #[serde(default)]
    ports: Option<Vec<Value>>,
}

enum Peer {
    Pods(PodPeer),
    Block(IpBlock),
}

fn decode_peer(namespace: &str, peer: &Value) -> Result<Peer, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Raw {
        #[serde(default)]
        pod_selector: Option<Value>,
        #[serde(default)]
        namespace_selector: Option<Value>,
        #[serde(default)]
        ip_block: Option<Value>,
    }
    let Raw { pod_selector, namespace_selector, ip_block } = object(peer)?;
    match (pod_selector, namespace_selector, ip_block) {
        (None, None, Some(block)) => decode_block(&block).map(Peer::Block),
        (None, None, None) => Err("it names nobody: podSelector, namespaceSelector or ipBlock".into()),
        (_, _, Some(_)) => Err("ipBlock excludes podSelector and namespaceSelector".into()),
        (pods, namespaces, None) => {
            let pods = pods.map_or_else(|| Ok(Selector::default()), |it| Selector::decode(&it))?;
            let namespaces = match namespaces {
                None => Namespaces::Named(namespace.into()),
                Some(selector) => Namespaces::Selected(Selector::decode(&selector)?),
            };
            Ok(Peer::Pods(PodPeer { namespaces, pods }))
        }
    }
}

fn decode_block(block: &Value) -> Result<IpBlock, String> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Raw {
        cidr: String,
        #[serde(default)]
        except: Option<Vec<String>>,
    }
    let Raw { cidr, except } = object(block)?;
    let cidr = prefix(&cidr)?;
    let except: BTreeSet<Subnet> =
        except.unwrap_or_default().iter().map(|one| prefix(one)).collect::<Result<_, _>>()?;
    match except.iter().find(|one| !cidr.covers(**one)) {
        Some(outside) => Err(format!("except {outside} is not in {cidr}")),
        None => Ok(IpBlock { cidr, except }),
    }
}

/// Bits after the prefix count for nothing, as in Kubernetes.
pub(super) fn prefix(text: &str) -> Result<Subnet, String> {
    let wrong = || {
        format!("{:?} is no prefix, as 192.0.2.0/24 or 2001:db8::/32 are", text.chars().take(80).collect::<String>())
    };
    let net: IpNetwork = text.contains('/').then(|| text.parse().ok()).flatten().ok_or_else(wrong)?;
    match net.ip() {
        // Such an address is in no packet (RFC 4291 section 2.5.5.2), and is meant as IPv4.
        IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => Err(wrong()),
        ip => Subnet::holding(ip, net.prefix()).map_err(|error| error.to_string()),
    }
}

fn decode_port(port: &Value) -> Result<PortMatch, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase", deny_unknown_fields)]
    struct Raw {
        #[serde(default)]
        protocol: Option<String>,
        #[serde(default)]
        port: Option<Value>,
        #[serde(default)]
        end_port: Option<Value>,
    }
    let Raw { protocol, port, end_port } = object(port)?;
    let protocol = Protocol::read(protocol.as_deref())
        .ok_or_else(|| format!("protocol {:?} is none of TCP, UDP, SCTP", protocol.unwrap_or_default()))?;
    match (port, end_port) {
        (None, None) => Ok(PortMatch::Range(protocol, 0, u16::MAX)),
        (None, Some(_)) => Err("endPort needs port".into()),
        (Some(Value::String(_)), Some(_)) => Err("endPort needs a port with a number".into()),
        (Some(Value::String(name)), None) => Ok(PortMatch::Named(protocol, name.into())),
        (Some(port), end_port) => {
            let first = number("port", &port)?;
            let last = end_port.map_or(Ok(first), |end| number("endPort", &end))?;
            if first > last {
                Err(format!("endPort {last} is less than port {first}"))
            } else {
                Ok(PortMatch::Range(protocol, first, last))
            }
        }
    }
}

/// A port.
pub(super) fn number(member: &str, value: &Value) -> Result<u16, String> {
    let number = value.as_u64().and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
    number.ok_or_else(|| format!("{member} {value} is not from 1 to 65535"))
}
