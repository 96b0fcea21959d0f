//! [`choose`]: which endpoints of a Service's port take connections, as kube-proxy decides it (`CategorizeEndpoints` in
//! kubernetes/pkg/proxy/topology.go; KEP-1669 for those that are going, KEP-2433 and KEP-3015 for topology hints).

use super::model::{Endpoint, Policy, Service};
use super::slices::Backend;

/// This node, as endpoints and their hints name it.
#[derive(Clone, Copy, Debug)]
pub struct Here<'a> {
    /// Its name.
    pub node: &'a str,
    /// Its zone.
    pub zone: Option<&'a str>,
}

impl Here<'_> {
    /// Whether an endpoint is on this node. One of the host's network counts too.
    #[must_use]
    pub fn has(&self, endpoint: &Endpoint) -> bool {
        endpoint.node.as_deref() == Some(self.node)
    }
}

/// Who takes connections, by policy.
#[derive(Clone, Debug, Default)]
pub struct Choice<'a> {
    /// Those of the cluster that are best for this node.
    pub cluster: Vec<Backend<'a>>,
    /// Those of this node.
    pub local: Vec<Backend<'a>>,
    /// Whether anybody anywhere could take a connection.
    pub any: bool,
}

/// What becomes of a new connection.
#[derive(Clone, Copy, Debug)]
pub enum Answer<'c, 'a> {
    /// It goes to one of these, of which there is at least one.
    To(&'c [Backend<'a>]),
    /// Nobody can take it: the client is told at once.
    Reject,
    /// Others could, but not here: it is dropped, as a load balancer that asks for health expects.
    Drop,
}

/// Where a connection is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frontend {
    /// The Service's address in the cluster.
    ClusterIp,
    /// A node's address, or one that leads to nodes: a NodePort, an external address, one of a load balancer.
    External,
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A pod, or this host.
    Inside,
    /// Elsewhere.
    Outside,
}

/// Decides about the endpoints of a port of one family.
#[must_use]
pub fn choose<'a>(backends: &[Backend<'a>], here: Here<'_>) -> Choice<'a> {
    let kept = |keep: &dyn Fn(&Endpoint) -> bool| -> Vec<Backend<'a>> {
        backends.iter().filter(|backend| keep(backend.endpoint)).copied().collect()
    };
    // Those that are going take connections only where there is nobody else, and as long as they can.
    let is_ready = |endpoint: &Endpoint| endpoint.ready;
    let is_leaving = |endpoint: &Endpoint| !endpoint.ready && endpoint.serving && endpoint.terminating;
    let first_of = |ready: Vec<Backend<'a>>, leaving: &dyn Fn(&Endpoint) -> bool| {
        if ready.is_empty() { kept(leaving) } else { ready }
    };
    let topology = Topology::of(backends, here);
    let cluster = first_of(kept(&|e| is_ready(e) && topology.keeps(e, here)), &is_leaving);
    let local = first_of(kept(&|e| is_ready(e) && here.has(e)), &|e| is_leaving(e) && here.has(e));
    let any = backends.iter().any(|backend| is_ready(backend.endpoint) || is_leaving(backend.endpoint));
    Choice { cluster, local, any }
}

impl<'a> Choice<'a> {
    /// What becomes of a new connection to a Service with this policy.
    #[must_use]
    pub fn answer(&self, policy: Policy) -> Answer<'_, 'a> {
        let list = match policy {
            Policy::Cluster => &self.cluster,
            Policy::Local => &self.local,
        };
        match list.as_slice() {
            [] if self.any => Answer::Drop,
            [] => Answer::Reject,
            some => Answer::To(some),
        }
    }
}

impl Service {
    /// The policy that a connection is under. What comes from inside to an address that is meant for the outside goes
    /// straight to the endpoints of the cluster, as if it had gone out and come in where there is one.
    #[must_use]
    pub fn policy(&self, frontend: Frontend, origin: Origin) -> Policy {
        match (frontend, origin) {
            (Frontend::ClusterIp, _) => self.internal,
            (Frontend::External, Origin::Outside) => self.external,
            (Frontend::External, Origin::Inside) => Policy::Cluster,
        }
    }
}

/// How the hints of endpoints are followed. Only hints decide: what a Service asks for is the controller's to turn into hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology {
    /// Not at all: some ready endpoint has none, or none of them is meant for us.
    Ignored,
    /// Those that are meant for this node.
    Node,
    /// Those that are meant for this node's zone.
    Zone,
}

impl Topology {
    fn of(backends: &[Backend<'_>], here: Here<'_>) -> Self {
        let ready: Vec<&Endpoint> = backends.iter().map(|backend| backend.endpoint).filter(|e| e.ready).collect();
        let all_have = |hinted: fn(&Endpoint) -> bool| ready.iter().all(|endpoint| hinted(endpoint));
        let one_is_kept = |topology: Self| ready.iter().any(|endpoint| topology.keeps(endpoint, here));
        let has_nodes = |endpoint: &Endpoint| endpoint.hints.as_ref().is_some_and(|hints| !hints.nodes.is_empty());
        let has_zones = |endpoint: &Endpoint| endpoint.hints.as_ref().is_some_and(|hints| !hints.zones.is_empty());
        if all_have(has_nodes) && one_is_kept(Self::Node) {
            Self::Node
        } else if all_have(has_zones) && one_is_kept(Self::Zone) {
            Self::Zone
        } else {
            Self::Ignored
        }
    }

    fn keeps(self, endpoint: &Endpoint, here: Here<'_>) -> bool {
        let hints = endpoint.hints.as_deref();
        let names = |wanted: &str, names: &[std::sync::Arc<str>]| names.iter().any(|name| **name == *wanted);
        match self {
            Self::Ignored => true,
            Self::Node => hints.is_some_and(|hints| names(here.node, &hints.nodes)),
            Self::Zone => hints.zip(here.zone).is_some_and(|(hints, zone)| names(zone, &hints.zones)),
        }
    }
}
