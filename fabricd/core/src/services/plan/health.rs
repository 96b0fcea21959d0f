//! [`HealthChecks`]: what load balancers are told that ask a node whether it has endpoints of a Service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::ServicePlan;
use crate::model::Family;
use crate::services::model::{ObjectName, Service};

/// What is told, by where it is asked.
pub type HealthChecks = BTreeMap<SocketAddr, HealthCheck>;

/// What is told of one Service in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// How many of its endpoints on this node are ready. Those that are terminating don't count: whoever asks had better
    /// go elsewhere.
    pub endpoints: usize,
}

impl ServicePlan {
    /// The health checks of all Services that have a `healthCheckNodePort`, at this node's addresses that take NodePorts, and
    /// the Services that came too late for a port that another one has.
    #[must_use]
    pub fn health_checks(&self) -> (HealthChecks, BTreeSet<ObjectName>) {
        let (mut checks, mut late) = (HealthChecks::new(), BTreeSet::new());
        let asked = self.asked.iter().filter_map(|(_, name)| self.services.get(name));
        for (port, service) in asked.filter_map(|service| Some((service.health_check_port?, service))) {
            for ip in self.context.node_ips.iter().filter(|ip| service.addresses(Family::of(**ip)).next().is_some()) {
                let check = || HealthCheck {
                    service: service.name.clone(),
                    endpoints: self.ready_here(service, Family::of(*ip)).len(),
                };
                let has = checks.entry(SocketAddr::new(*ip, port)).or_insert_with(check);
                if has.service != service.name {
                    late.insert(service.name.clone());
                }
            }
        }
        (checks, late)
    }

    /// The addresses of a Service's endpoints on this node that are ready, whichever of its ports they serve.
    fn ready_here(&self, service: &Service, family: Family) -> BTreeSet<IpAddr> {
        let all = service.ports.iter().flat_map(|port| self.backends(service, port, family));
        let ready = all.filter(|backend| backend.endpoint.ready && self.context.here().has(backend.endpoint));
        ready.map(|backend| backend.endpoint.ip).collect()
    }
}
