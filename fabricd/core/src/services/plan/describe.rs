//! [`Described`]: what a Service amounts to on this node, and what the kernel holds of it, for people who ask.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use super::rows::{self, FrontendKey, Map, Socket};
use super::{ServicePlan, drawn};
use crate::model::Family;
use crate::services::choose::{Answer, Choice, Frontend, Here, Origin, choose};
use crate::services::model::{Endpoint, ObjectName, Policy, Protocol, Service};
use crate::state::nft::{Element, FoundTable, Part};

/// A Service as this node translates it.
#[derive(Clone, Debug)]
pub struct Described {
    /// What the API server says of it.
    pub service: Arc<Service>,
    /// Its ports, once for each family that it has.
    pub ports: Vec<DescribedPort>,
}

/// A port of a Service in one family.
#[derive(Clone, Debug)]
pub struct DescribedPort {
    /// Its name; empty for an only port.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The family.
    pub family: Family,
    /// Where connections to it are addressed to.
    pub frontends: Vec<DescribedFrontend>,
    /// Who might take them.
    pub endpoints: Vec<DescribedEndpoint>,
}

/// What an address of a Service is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressKind {
    /// Its address in the cluster.
    ClusterIp,
    /// One that leads to the nodes by somebody else's doing.
    ExternalIp,
    /// One of its load balancer.
    LoadBalancer,
    /// A node's.
    NodePort,
}

/// An address and port of a Service.
#[derive(Clone, Debug)]
pub struct DescribedFrontend {
    /// The address, protocol and port.
    pub key: FrontendKey,
    /// What the address is.
    pub kind: AddressKind,
    /// The Service that has it, where that is another one.
    pub taken_by: Option<ObjectName>,
    /// What becomes of connections from pods and nodes.
    pub inside: Outcome,
    /// What becomes of those from elsewhere.
    pub outside: Outcome,
    /// What the kernel makes of both; `None` where it translates none.
    pub kernel: [Option<Outcome>; 2],
}

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It goes to one of these.
    To(Vec<Socket>),
    /// The client is told that nobody serves.
    Rejected,
    /// Nobody here serves, and the client isn't told.
    Dropped,
}

/// An endpoint of a port.
#[derive(Clone, Debug)]
pub struct DescribedEndpoint {
    /// Where connections would go.
    pub socket: Socket,
    /// The node that it is on.
    pub node: Option<Arc<str>>,
    /// Whether that is this node.
    pub is_here: bool,
    /// Whether it takes connections to the ClusterIP.
    pub takes_inside: bool,
    /// Whether it takes connections from outside of the cluster.
    pub takes_outside: bool,
    /// Why it doesn't take all of them.
    pub unused: Option<Unused>,
}

/// Why an endpoint takes no connections here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unused {
    /// It is not ready.
    NotReady,
    /// It is terminating, and doesn't serve any more.
    Ended,
    /// It is terminating, and others are ready.
    Terminating,
    /// It is on another node, and the traffic policy is `Local`.
    OtherNode,
    /// Topology hints keep it for others.
    Hints,
}

impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::Ended => "terminating, serves no more",
            Self::Terminating => "terminating: used while no other is ready",
            Self::OtherNode => "on another node, and the traffic policy is Local",
            Self::Hints => "kept for other zones or nodes by topology hints",
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(sockets) => {
                let sockets = sockets.iter().map(|(ip, port)| std::net::SocketAddr::new(*ip, *port).to_string());
                write!(f, "to {}", sockets.collect::<Vec<_>>().join(" "))
            }
            Self::Rejected => f.write_str("rejected"),
            Self::Dropped => f.write_str("dropped"),
        }
    }
}

impl Described {
    /// Frontends of which the kernel holds something else than it should. Those of another Service don't count.
    pub fn differences(&self) -> impl Iterator<Item = &DescribedFrontend> {
        self.ports.iter().flat_map(|port| &port.frontends).filter(|frontend| !frontend.is_programmed())
    }
}

impl DescribedFrontend {
    /// Whether the kernel holds what it should.
    #[must_use]
    pub fn is_programmed(&self) -> bool {
        let [inside, outside] = &self.kernel;
        self.taken_by.is_some() || (inside.as_ref() == Some(&self.inside) && outside.as_ref() == Some(&self.outside))
    }
}

impl ServicePlan {
    /// The Services that are meant: by `namespace/name`, a name in any namespace, one of their addresses, or all by an empty
    /// text.
    #[must_use]
    pub fn find(&self, what: &str) -> Vec<Arc<Service>> {
        let ip: Option<IpAddr> = what.parse().ok();
        let is_meant = |service: &&Arc<Service>| match ip {
            Some(ip) => service.addresses(Family::of(ip)).any(|of| of == ip),
            None => what.is_empty() || service.name.name() == what || service.name.to_string() == what,
        };
        self.services.values().filter(is_meant).cloned().collect()
    }

    /// What a Service amounts to here. `found` is the table that is there.
    #[must_use]
    pub fn describe(&self, service: &Arc<Service>, found: &FoundTable) -> Described {
        let mut ports = vec![];
        for port in &service.ports {
            for family in Family::ALL {
                let keys: Vec<_> =
                    self.context.frontends(service, port).filter(|(key, _)| key.family() == family).collect();
                if keys.is_empty() {
                    continue;
                }
                let backends = self.backends(service, port, family);
                let (here, choice) = (self.context.here(), choose(&backends, self.context.here()));
                let frontends = keys.into_iter().map(|(key, _)| self.frontend(service, key, &choice, found));
                let frontends: Vec<DescribedFrontend> = frontends.collect();
                let endpoints = backends.iter().map(|backend| {
                    let takes = |policy| match choice.answer(policy) {
                        Answer::To(list) => list.iter().any(|one| one.socket() == backend.socket()),
                        Answer::Reject | Answer::Drop => false,
                    };
                    let policies = [service.internal, service.policy(Frontend::External, Origin::Outside)];
                    let policies = &policies[..1 + usize::from(service.is_external())];
                    let not_of = policies.iter().copied().find(|policy| !takes(*policy));
                    DescribedEndpoint {
                        socket: backend.socket(),
                        node: backend.endpoint.node.clone(),
                        is_here: here.has(backend.endpoint),
                        takes_inside: takes(policies[0]),
                        takes_outside: policies.get(1).is_some_and(|policy| takes(*policy)),
                        unused: not_of.map(|policy| unused(backend.endpoint, policy, here)),
                    }
                });
                let endpoints = endpoints.collect();
                let (name, protocol) = (port.name.clone(), port.protocol);
                ports.push(DescribedPort { name, protocol, family, frontends, endpoints });
            }
        }
        Described { service: Arc::clone(service), ports }
    }

    fn frontend(
        &self,
        service: &Service,
        key: FrontendKey,
        choice: &Choice<'_>,
        found: &FoundTable,
    ) -> DescribedFrontend {
        let kind = if service.cluster_ips.contains(&key.ip) {
            AddressKind::ClusterIp
        } else if service.balancer_ips.contains(&key.ip) {
            AddressKind::LoadBalancer
        } else if service.external_ips.contains(&key.ip) {
            AddressKind::ExternalIp
        } else {
            AddressKind::NodePort
        };
        let frontend = if kind == AddressKind::ClusterIp { Frontend::ClusterIp } else { Frontend::External };
        let outcome = |origin| match choice.answer(service.policy(frontend, origin)) {
            Answer::To(list) => Outcome::To(drawn(service, list).into()),
            Answer::Reject => Outcome::Rejected,
            Answer::Drop => Outcome::Dropped,
        };
        let owner = self.owners.get(&key).filter(|owner| **owner != service.name);
        let (inside, outside) = (outcome(Origin::Inside), outcome(Origin::Outside));
        DescribedFrontend { key, kind, taken_by: owner.cloned(), inside, outside, kernel: held(found, key) }
    }
}

/// Why an endpoint takes nothing under a policy.
fn unused(endpoint: &Endpoint, policy: Policy, here: Here<'_>) -> Unused {
    match (endpoint.ready, endpoint.serving, endpoint.terminating) {
        (false, true, true) => Unused::Terminating,
        (false, _, true) => Unused::Ended,
        (false, ..) => Unused::NotReady,
        (true, ..) if policy == Policy::Local && !here.has(endpoint) => Unused::OtherNode,
        (true, ..) => Unused::Hints,
    }
}

/// What a table makes of connections to a frontend, from inside and from outside.
fn held(found: &FoundTable, key: FrontendKey) -> [Option<Outcome>; 2] {
    let family = key.family();
    let set = |map: Map| found.sets.get(map.name(family).as_str()).filter(|set| set.kind == Some(map.kind(family)));
    let has = |map: Map, element: &Element| set(map).is_some_and(|set| set.elements.contains(element));
    let target = |map: Map| {
        let first = set(map)?.elements.starting_at(&key.element()).next()?.0;
        rows::frontend(family, first).filter(|(of, _)| *of == key).map(|(_, target)| target)
    };
    let endpoints = |pool: u32| {
        let of_pool = |set: &'_ crate::state::nft::FoundSet| {
            let all = set.elements.starting_at(&Element::new([Part::Number(pool)])).map(|(element, ())| element);
            let all = all.map_while(|element| rows::endpoint(family, element)).take_while(|(of, ..)| *of == pool);
            all.map(|(.., socket)| socket).collect::<Vec<_>>()
        };
        let mut sockets = set(Map::Pools).map(of_pool).unwrap_or_default();
        sockets.sort_unstable();
        // One that clients are hashed to has several slots.
        sockets.dedup();
        Outcome::To(sockets)
    };
    let vip = Element::new([Part::Ip(key.ip)]);
    let inside = match target(Map::Services) {
        Some(target) => Some(endpoints(target.pool)),
        None if has(Map::Held, &key.element()) => Some(Outcome::Dropped),
        None if has(Map::Rejected, &key.element()) || has(Map::ClusterIps, &vip) => Some(Outcome::Rejected),
        None => None,
    };
    let outside = match target(Map::Outside) {
        _ if has(Map::Shut, &key.element()) => Some(Outcome::Dropped),
        Some(target) => Some(endpoints(target.pool)),
        None => inside.clone(),
    };
    [inside, outside]
}
