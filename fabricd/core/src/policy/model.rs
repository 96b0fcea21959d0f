//! What decides whether a connection may be: policies, the labels of namespaces and pods, and what a pod is here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::labels::Labels;
use super::selector::Selector;
use crate::model::Subnet;
pub use crate::services::{ObjectName, Protocol};

/// Which way a connection goes, as seen from the pod that is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// To the pod.
    Ingress,
    /// From the pod.
    Egress,
}

impl Direction {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ingress, Self::Egress];
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// A NetworkPolicy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The pods of its namespace that it is for.
    pub subject: Selector,
    /// Isolates these pods for what comes to them, but for what these rules allow; `None` when it isn't about that.
    pub ingress: Option<Vec<Rule>>,
    /// The same for what they send.
    pub egress: Option<Vec<Rule>>,
    /// What of it can't be understood, and so allows nothing.
    pub problems: Vec<Problem>,
}

impl Policy {
    /// One that isolates nobody.
    #[must_use]
    pub fn nothing() -> Self {
        Self { subject: Selector::default(), ingress: None, egress: None, problems: vec![] }
    }

    /// The rules of one direction, if it isolates in that.
    #[must_use]
    pub fn rules(&self, direction: Direction) -> Option<&[Rule]> {
        match direction {
            Direction::Ingress => self.ingress.as_deref(),
            Direction::Egress => self.egress.as_deref(),
        }
    }
}

/// Something in a policy that can't be understood.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where, as `spec.ingress[0].from[1].ipBlock`.
    pub place: String,
    /// What is wrong with it.
    pub what: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.what)
    }
}

/// One rule: it is about what both comes from (goes to) these peers and goes to these ports. One of a NetworkPolicy allows
/// that.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Its index in the policy: rules before it that can't be understood count too.
    pub index: usize,
    /// The other end; `None` is everybody, also beyond the cluster.
    pub peers: Option<Peers>,
    /// The destination's ports; `None` is every port of every protocol. Empty is none: nothing of a list was understood.
    pub ports: Option<BTreeSet<PortMatch>>,
}

/// The other ends that a rule is about: any of these.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Peers {
    /// Pods.
    pub pods: BTreeSet<PodPeer>,
    /// Addresses.
    pub blocks: BTreeSet<IpBlock>,
}

/// Pods by their labels, and by those of their namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodPeer {
    /// Of which namespaces.
    pub namespaces: Namespaces,
    /// Which of their pods.
    pub pods: Selector,
}

/// Some namespaces.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Namespaces {
    /// This one.
    Named(Arc<str>),
    /// Those with such labels.
    Selected(Selector),
}

/// A prefix without some that lie in it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpBlock {
    /// The whole.
    pub cidr: Subnet,
    /// What is not meant of it.
    pub except: BTreeSet<Subnet>,
}

impl IpBlock {
    /// Whether an address is meant.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        self.cidr.contains(ip) && !self.except.iter().any(|except| except.contains(ip))
    }
}

/// Ports of one protocol.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortMatch {
    /// From the first to the last.
    Range(Protocol, u16, u16),
    /// The port that the destination pod calls so.
    Named(Protocol, Arc<str>),
}

/// A port of a container that has a name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamedPort {
    /// Its name.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// A pod, as the API server has it. There may be 150,000, so one takes 72 bytes, its name and template aside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name.
    pub name: ObjectName,
    /// Tells it from an earlier pod of the same name: the hash of its uid.
    pub uid: u64,
    /// What it has in common with others.
    pub template: Arc<Template>,
    /// Its IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// Its IPv6 address.
    pub v6: Option<Ipv6Addr>,
    /// When it was made, in seconds since 1970.
    pub created: u32,
    /// When its addresses are nobody's any more, in seconds since 1970: the end of its grace period, once it is to go.
    pub ends: Option<u32>,
    /// It has ended (`Succeeded`, `Failed`), so its addresses are nobody's.
    pub completed: bool,
    /// It is in the network of its node: neither subject nor peer.
    pub host_network: bool,
}

/// What the pods of one owner have in common, as a ReplicaSet's template says it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Template {
    /// Their labels.
    pub labels: Labels,
    /// The ports that their containers name.
    pub ports: Box<[NamedPort]>,
}

impl Pod {
    /// One that says nothing but its name.
    #[must_use]
    pub fn named(name: ObjectName) -> Self {
        let template = Arc::default();
        Self {
            name,
            uid: 0,
            template,
            v4: None,
            v6: None,
            created: 0,
            ends: None,
            completed: false,
            host_network: false,
        }
    }

    /// Its labels.
    #[must_use]
    pub fn labels(&self) -> &Labels {
        &self.template.labels
    }

    /// The ports that its containers name.
    #[must_use]
    pub fn ports(&self) -> &[NamedPort] {
        &self.template.ports
    }

    /// Its addresses.
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// Whether it may have addresses of its own.
    #[must_use]
    pub fn has_own_network(&self) -> bool {
        !self.completed && !self.host_network
    }

    /// Whether its addresses are its own at this moment.
    #[must_use]
    pub fn is_live(&self, now: i64) -> bool {
        self.has_own_network() && self.ends.is_none_or(|ends| now <= ends.into())
    }
}

/// A pod of this node, as `fabric-cni` attached it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    /// Who it is; `None` when it is none of Kubernetes': no policy can select it.
    pub identity: Option<PodIdentity>,
}

/// A pod as the runtime names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PodIdentity {
    /// Its name.
    pub name: ObjectName,
    /// The hash of its uid; not every runtime tells it.
    pub uid: Option<u64>,
}

/// What is known of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Local {
    /// Its pods by their addresses: what `fabric-cni` saved, which is known before the API server tells it.
    pub pods: BTreeMap<IpAddr, LocalPod>,
    /// The host's own addresses.
    pub host: BTreeSet<IpAddr>,
    /// Pods may always connect to their own node, as Kubernetes' page on NetworkPolicy has it.
    pub own_node_allowed: bool,
}

/// A connection as it is after all translation of its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conn {
    /// Who began it.
    pub src: IpAddr,
    /// Who answers it: of a Service the endpoint.
    pub dst: IpAddr,
    /// The protocol's number.
    pub protocol: u8,
    /// The destination's port; 0 for protocols without.
    pub port: u16,
}

impl PortMatch {
    /// Whether a connection goes there, to a destination with these named ports.
    #[must_use]
    pub fn matches(&self, conn: &Conn, named: &[NamedPort]) -> bool {
        match self {
            Self::Range(protocol, first, last) => {
                conn.protocol == protocol.number() && (*first..=*last).contains(&conn.port)
            }
            Self::Named(protocol, name) => {
                conn.protocol == protocol.number()
                    && named.iter().any(|it| it.protocol == *protocol && it.name == *name && it.port == conn.port)
            }
        }
    }
}
