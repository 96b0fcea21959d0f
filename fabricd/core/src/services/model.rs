//! [`Service`], [`Slice`] and [`Endpoint`]: what objects of the API say, once it is checked, in little memory: names that
//! thousands share are one text ([`Interner`]).

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use super::balance::Algorithm;
use super::objects::{
    EndpointObject, EndpointPort, HintsObject, Metadata, NodeObject, ServiceObject, ServicePortSpec, SliceObject,
};
use crate::interner::Interner;
use crate::model::{Family, Subnet, stable_hash};

/// Who else handles a Service or a slice, if anybody: then it is none of ours (KEP-2447).
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// A Service without an address, or a slice of such a one.
const HEADLESS: &str = "service.kubernetes.io/headless";
/// The Service that a slice belongs to.
const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// When what a slice's last change tells of happened (RFC 3339), by the controller of slices.
const TRIGGERED: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// The zone of a Node.
const ZONE: &str = "topology.kubernetes.io/zone";
/// Where `v1beta1` has the name of an endpoint's node.
const HOSTNAME: &str = "kubernetes.io/hostname";
/// What the cluster autoscaler marks a Node with that is about to go.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// How long affinity lasts where nothing is said, in seconds (three hours), and at most.
const AFFINITY: u32 = 10_800;
const LONGEST_AFFINITY: i64 = 86_400;

/// A name in a namespace: `default/web`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName(Arc<str>);

impl ObjectName {
    /// The name of an object.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}/{name}").into())
    }

    /// The name of an object of the whole cluster: its namespace is empty.
    #[must_use]
    pub fn of_cluster(name: &str) -> Self {
        Self::new("", name)
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        self.0.split_once('/').map_or("", |(namespace, _)| namespace)
    }

    /// Its name in there.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.split_once('/').map_or("", |(_, name)| name)
    }
}

impl From<&Metadata> for ObjectName {
    fn from(metadata: &Metadata) -> Self {
        Self::new(&metadata.namespace, &metadata.name)
    }
}

impl fmt::Display for ObjectName {
    /// `shop/web`; without a namespace the name alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.strip_prefix('/').unwrap_or(&self.0))
    }
}

impl fmt::Debug for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What connections are made with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
    /// SCTP.
    Sctp = 132,
}

impl Protocol {
    /// The one of a port. One that isn't said is TCP.
    pub(crate) fn read(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }

    /// Its number in an IP header.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }

    /// The one of this number; `None` for one without ports that Kubernetes knows.
    #[must_use]
    pub fn of(number: u8) -> Option<Self> {
        [Self::Tcp, Self::Udp, Self::Sctp].into_iter().find(|protocol| protocol.number() == number)
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        })
    }
}

/// Which endpoints may take a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// Those of the whole cluster.
    #[default]
    Cluster,
    /// Those of this node.
    Local,
}

impl Policy {
    fn read(text: Option<&str>) -> Self {
        if text == Some("Local") { Self::Local } else { Self::Cluster }
    }
}

/// What reaches a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum ServiceType {
    /// Its addresses in the cluster, and external ones.
    #[default]
    ClusterIp,
    /// A port of every node too.
    NodePort,
    /// A load balancer too.
    LoadBalancer,
}

/// A Service that has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: ObjectName,
    /// Its age: `20261128100000` was created on 28 November 2026 at 10 h.
    pub created: u64,
    /// What reaches it.
    pub kind: ServiceType,
    /// Its addresses in the cluster, one for each family.
    pub cluster_ips: Box<[IpAddr]>,
    /// Addresses that lead to the nodes by somebody else's doing.
    pub external_ips: Box<[IpAddr]>,
    /// Addresses of its load balancer that packets arrive with.
    pub balancer_ips: Box<[IpAddr]>,
    /// Its ports.
    pub ports: Box<[ServicePort]>,
    /// Who takes what comes to its address in the cluster.
    pub internal: Policy,
    /// Who takes what comes from outside.
    pub external: Policy,
    /// How long, in seconds, a client's connections go to one endpoint.
    pub affinity: Option<u32>,
    /// How a new connection's endpoint is picked.
    pub algorithm: Algorithm,
    /// Where load balancers ask whether this node has an endpoint.
    pub health_check_port: Option<u16>,
    /// Who may come by the load balancer's addresses.
    pub source_ranges: SourceRanges,
    /// Members that can't be used, in words with the reason.
    pub refused: Box<[String]>,
}

/// Who may come by a load balancer's addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceRanges {
    ranges: Box<[Subnet]>,
    /// Some could not be read, so it isn't known of what family they are.
    is_partial: bool,
}

impl SourceRanges {
    /// Those of a family; `None` lets everybody in. A family without any is open although the other is not, as
    /// kube-proxy has it; but what can't be read never opens anything.
    #[must_use]
    pub fn of(&self, family: Family) -> Option<Vec<Subnet>> {
        let ranges: Vec<Subnet> = self.ranges.iter().copied().filter(|range| range.family() == family).collect();
        (self.is_partial || !ranges.is_empty()).then_some(ranges)
    }
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Its name; empty for an only port.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
    /// Its number on every node.
    pub node_port: Option<u16>,
}

impl Service {
    /// What an object says; `None` for a Service that has no address here or is another proxy's.
    #[must_use]
    pub fn read(object: &ServiceObject, names: &mut Interner<str>) -> Option<Self> {
        let ServiceObject { metadata, spec, status } = object;
        let kind = match spec.kind.as_deref() {
            None | Some("" | "ClusterIP") => ServiceType::ClusterIp,
            Some("NodePort") => ServiceType::NodePort,
            Some("LoadBalancer") => ServiceType::LoadBalancer,
            Some(_) => return None,
        };
        let ips = spec.cluster_ips.as_deref().filter(|ips| !ips.is_empty()).unwrap_or(spec.cluster_ip.as_slice());
        let is_headless = ips.first().is_none_or(|ip| ip.is_empty() || ip == "None");
        if is_headless || metadata.label(PROXY_NAME).is_some() {
            return None;
        }
        let mut refused = vec![];
        let cluster_ips = addresses("clusterIPs", ips.iter(), &mut refused);
        let external_ips = addresses("externalIPs", spec.external_ips.iter().flatten(), &mut refused);
        let is_vip = |mode: Option<&str>| mode.is_none_or(|mode| mode == "VIP");
        let ingress = status.load_balancer.ingress.iter().flatten().filter(|entry| is_vip(entry.ip_mode.as_deref()));
        let balancer_ips = match kind {
            ServiceType::LoadBalancer => {
                let ips = ingress.filter_map(|entry| entry.ip.as_ref()).filter(|ip| !ip.is_empty());
                addresses("status.loadBalancer.ingress", ips, &mut refused)
            }
            _ => Box::default(),
        };
        let ports = spec.ports.iter().flatten().filter_map(|port| ServicePort::read(port, kind, names, &mut refused));
        let ports = ports.collect();
        let external = Policy::read(spec.external_traffic_policy.as_deref());
        let affinity = affinity(object);
        let algorithm = Algorithm::read(metadata, affinity.is_some()).unwrap_or_else(|why| {
            refused.push(why);
            Algorithm::default()
        });
        let asks_for_health = kind == ServiceType::LoadBalancer && external == Policy::Local;
        Some(Self {
            name: metadata.into(),
            created: age(&metadata.creation_timestamp),
            kind,
            cluster_ips,
            external_ips,
            balancer_ips,
            ports,
            internal: Policy::read(spec.internal_traffic_policy.as_deref()),
            external,
            affinity,
            algorithm,
            health_check_port: spec.health_check_node_port.filter(|_| asks_for_health).and_then(number),
            source_ranges: source_ranges(object, kind, &mut refused),
            refused: refused.into(),
        })
    }

    /// Whether connections from outside of the cluster are asked for.
    #[must_use]
    pub fn is_external(&self) -> bool {
        self.kind != ServiceType::ClusterIp || !self.external_ips.is_empty()
    }

    /// Its addresses of a family, of every kind.
    pub fn addresses(&self, family: Family) -> impl Iterator<Item = IpAddr> {
        let all = self.cluster_ips.iter().chain(&self.external_ips).chain(&self.balancer_ips);
        all.copied().filter(move |ip| Family::of(*ip) == family)
    }
}

impl ServicePort {
    fn read(
        port: &ServicePortSpec,
        kind: ServiceType,
        names: &mut Interner<str>,
        refused: &mut Vec<String>,
    ) -> Option<Self> {
        let Some(protocol) = Protocol::read(port.protocol.as_deref()) else {
            refused.push(format!("port {} has the unknown protocol {:?}", port.port, port.protocol));
            return None;
        };
        let Some(number_) = number(port.port) else {
            refused.push(format!("{} is no number of a port", port.port));
            return None;
        };
        let name = names.share(port.name.as_deref().unwrap_or_default());
        let node_port = port.node_port.filter(|_| kind != ServiceType::ClusterIp).and_then(number);
        Some(Self { name, protocol, port: number_, node_port })
    }
}

/// A port's number. 0 is none.
fn number(value: i64) -> Option<u16> {
    u16::try_from(value).ok().filter(|port| *port != 0)
}

/// A time as a number that grows with it: its digits up to seconds.
fn age(timestamp: &str) -> u64 {
    let digits = timestamp.chars().take(19).filter(char::is_ascii_digit);
    digits.filter_map(|digit| digit.to_digit(10)).fold(0, |age, digit| age * 10 + u64::from(digit))
}

fn affinity(object: &ServiceObject) -> Option<u32> {
    if object.spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let config = object.spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = config.and_then(|config| config.timeout_seconds);
    Some(seconds.map_or(AFFINITY, |seconds| u32::try_from(seconds.clamp(1, LONGEST_AFFINITY)).unwrap_or(AFFINITY)))
}

fn addresses<'a>(member: &str, texts: impl Iterator<Item = &'a String>, refused: &mut Vec<String>) -> Box<[IpAddr]> {
    let mut ips: Vec<IpAddr> = vec![];
    for text in texts {
        match text.parse() {
            Ok(ip) if !is_special(ip) && !ips.contains(&ip) => ips.push(ip),
            Ok(ip) if ips.contains(&ip) => {}
            _ => refused.push(format!("{text} in {member} is no address that packets can be sent to")),
        }
    }
    ips.into()
}

fn source_ranges(object: &ServiceObject, kind: ServiceType, refused: &mut Vec<String>) -> SourceRanges {
    let (mut ranges, mut is_partial): (Vec<Subnet>, _) = (vec![], false);
    let texts = object.spec.load_balancer_source_ranges.iter().flatten().filter(|_| kind == ServiceType::LoadBalancer);
    for text in texts.map(|text| text.trim()) {
        let parts = text.split_once('/').and_then(|(ip, bits)| Some((ip.parse().ok()?, bits.parse().ok()?)));
        match parts.and_then(|(ip, bits)| Subnet::holding(ip, bits).ok()) {
            Some(range) => ranges.push(range),
            None => {
                is_partial = true;
                refused.push(format!("{text:?} in loadBalancerSourceRanges is no range such as 192.0.2.0/24"));
            }
        }
    }
    // A prefix goes before those that it covers.
    ranges.sort_unstable_by_key(|range| (range.prefix_len(), *range));
    let mut apart: Vec<Subnet> = vec![];
    ranges.into_iter().for_each(|range| {
        if !apart.iter().any(|wider| wider.covers(range)) {
            apart.push(range);
        }
    });
    SourceRanges { ranges: apart.into(), is_partial }
}

/// Addresses that no endpoint and no frontend can have: nothing but this host would answer, everybody, or nobody.
fn is_special(ip: IpAddr) -> bool {
    let is_link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local() || ip.is_broadcast(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.to_ipv4_mapped().is_some(),
    };
    is_link_local || ip.is_loopback() || ip.is_multicast() || ip.is_unspecified()
}

/// Some of the endpoints of a Service, in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Its name.
    pub name: ObjectName,
    /// The Service that it belongs to.
    pub service: ObjectName,
    /// The revision of its last change.
    pub revision: i64,
    /// When what its last change tells of happened: a pod became ready, a selector was changed.
    pub triggered: Option<Timestamp>,
    /// The family of its addresses.
    pub family: Family,
    /// The ports that each of its endpoints has.
    pub ports: Box<[SlicePort]>,
    /// Its endpoints.
    pub endpoints: Box<[Endpoint]>,
}

/// A port of every endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlicePort {
    /// The name of the Service's port.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number on the endpoint.
    pub port: u16,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Its address.
    pub ip: IpAddr,
    /// It takes connections, and isn't going. Where nothing is said it is so.
    pub ready: bool,
    /// It takes connections. Where nothing is said it is as ready.
    pub serving: bool,
    /// It is going. Where nothing is said it is not.
    pub terminating: bool,
    /// The node that it is on.
    pub node: Option<Arc<str>>,
    /// A number for its pod; 0 for what is none.
    pub pod: u64,
    /// Who had best use it.
    pub hints: Option<Box<Hints>>,
}

/// Who had best use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hints {
    /// Nodes of these zones.
    pub zones: Box<[Arc<str>]>,
    /// These nodes.
    pub nodes: Box<[Arc<str>]>,
}

impl Slice {
    /// What an object says; `None` for one that says nothing of a Service's endpoints.
    #[must_use]
    pub fn read(object: &SliceObject, names: &mut Interner<str>) -> Option<Self> {
        let metadata = &object.metadata;
        let family = match object.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => return None,
        };
        if metadata.label(HEADLESS).is_some() || metadata.label(PROXY_NAME).is_some() {
            return None;
        }
        let service = metadata.label(SERVICE_NAME).filter(|name| !name.is_empty())?;
        let endpoints = object.endpoints.iter().flatten();
        let endpoints = endpoints.filter_map(|endpoint| Endpoint::read(endpoint, family, names)).collect();
        let ports = object.ports.iter().flatten().filter_map(|port| SlicePort::read(port, names)).collect();
        Some(Self {
            name: metadata.into(),
            service: ObjectName::new(&metadata.namespace, service),
            revision: metadata.resource_version.parse().unwrap_or_default(),
            triggered: metadata.annotations.as_ref().and_then(|all| all.get(TRIGGERED)?.parse().ok()),
            family,
            ports,
            endpoints,
        })
    }
}

impl SlicePort {
    fn read(port: &EndpointPort, names: &mut Interner<str>) -> Option<Self> {
        let name = names.share(port.name.as_deref().unwrap_or_default());
        Some(Self { name, protocol: Protocol::read(port.protocol.as_deref())?, port: number(port.port?)? })
    }
}

impl Endpoint {
    fn read(object: &EndpointObject, family: Family, names: &mut Interner<str>) -> Option<Self> {
        let ip: IpAddr = object.addresses.first()?.parse().ok()?;
        if is_special(ip) || Family::of(ip) != family {
            return None;
        }
        let conditions = object.conditions.unwrap_or_default();
        let ready = conditions.ready.unwrap_or(true);
        let beta = || object.topology.as_ref().and_then(|topology| topology.get(HOSTNAME));
        let node = object.node_name.as_ref().or_else(beta).map(|name| names.share(&**name));
        let uid = object.target_ref.as_ref().and_then(|target| target.uid.as_deref());
        Some(Self {
            ip,
            ready,
            serving: conditions.serving.unwrap_or(ready),
            terminating: conditions.terminating.unwrap_or(false),
            node,
            pod: uid.map_or(0, |uid| stable_hash(uid.as_bytes())),
            hints: object.hints.as_deref().and_then(|hints| Hints::read(hints, names)),
        })
    }
}

impl Hints {
    fn read(object: &HintsObject, names: &mut Interner<str>) -> Option<Box<Self>> {
        let mut shared = |list: &Option<Vec<super::objects::Named>>| -> Box<[Arc<str>]> {
            list.iter().flatten().map(|named| names.share(&*named.name)).collect()
        };
        let hints = Self { zones: shared(&object.for_zones), nodes: shared(&object.for_nodes) };
        (hints != Self::default()).then(|| Box::new(hints))
    }
}

/// What is known of this node's Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// Whether it is about to go: load balancers had better not use it for new connections (KEP-3836).
    pub going: bool,
    /// Its addresses inside the cluster, the first of each family: those that take NodePorts.
    pub internal_ips: Vec<IpAddr>,
}

impl NodeFacts {
    /// What the object says.
    #[must_use]
    pub fn read(object: &NodeObject) -> Self {
        let zone = object.metadata.label(ZONE).filter(|zone| !zone.is_empty());
        let is_marked = object.spec.taints.iter().flatten().any(|taint| taint.key == TO_BE_DELETED);
        let internal = object.status.addresses.iter().flatten().filter(|address| address.kind == "InternalIP");
        let internal: Vec<IpAddr> = internal.filter_map(|address| address.address.parse().ok()).collect();
        let first = |family| internal.iter().copied().find(|ip| Family::of(*ip) == family && !is_special(*ip));
        Self {
            zone: zone.map(Arc::from),
            going: is_marked || object.metadata.deletion_timestamp.is_some(),
            internal_ips: Family::ALL.into_iter().filter_map(first).collect(),
        }
    }
}
