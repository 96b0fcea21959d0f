//! [`UdpFrontends`]: which UDP connections that the kernel tracks lead to nobody who serves.
//!
//! UDP has no end of its own. What a client sends from one port goes where its first datagram went for as long as it goes on
//! sending, whatever the maps say meanwhile (kubernetes/pkg/proxy/conntrack). So such connections have to be forgotten: the
//! next datagram begins anew. Those that lead to an endpoint that serves stay, though others are drawn by now.

use std::collections::{BTreeMap, BTreeSet};

use super::rows::{self, Map, Socket};
use super::{Context, FrontendKey, ServicePlan};
use crate::model::Family;
use crate::services::model::{Policy, Protocol, Service};
use crate::services::sets::of_service;
use crate::services::slices::backends;
use crate::state::nft::FoundTable;

/// Where UDP is addressed to, and who may answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpFrontends(BTreeMap<Socket, BTreeSet<Socket>>);

impl UdpFrontends {
    /// The frontends of a table that is there.
    #[must_use]
    pub fn found(table: &FoundTable) -> Self {
        let mut frontends = BTreeMap::new();
        for family in Family::ALL {
            let sets = [Map::Services, Map::Outside].map(|map| (map, table.sets.get(map.name(family).as_str())));
            for set in sets.into_iter().filter_map(|(map, set)| set.filter(|set| set.kind == Some(map.kind(family)))) {
                let keys = set.elements.keys().filter_map(|element| Some(rows::frontend(family, element)?.0));
                frontends.extend(keys.filter(is_udp).map(|key| ((key.ip, key.port), BTreeSet::new())));
            }
        }
        Self(frontends)
    }

    /// Whether a connection is to be forgotten, whose first packet went to `target` and which `answers` answers: that is, or
    /// was `before`, a frontend, and no endpoint of it that serves. One that nobody has translated is answered by `target`.
    #[must_use]
    pub fn forget(&self, before: &Self, target: Socket, answers: Socket) -> bool {
        match self.0.get(&target) {
            Some(serving) => !serving.contains(&answers),
            None => before.0.contains_key(&target),
        }
    }
}

fn is_udp(key: &FrontendKey) -> bool {
    key.protocol == Protocol::Udp
}

impl ServicePlan {
    /// Where UDP is addressed to by now, and who may answer.
    #[must_use]
    pub fn udp_frontends(&self) -> UdpFrontends {
        let mut frontends = BTreeMap::new();
        for service in self.services.values() {
            for port in service.ports.iter().filter(|port| port.protocol == Protocol::Udp) {
                for (key, is_cluster_ip) in self.frontends(service, port) {
                    if self.owners.get(&key) != Some(&service.name) {
                        continue;
                    }
                    let backends = backends(service, port, key.family(), of_service(&self.slices, &service.name));
                    let serving = backends.into_iter().filter(|backend| {
                        let endpoint = backend.endpoint;
                        (endpoint.ready || endpoint.serving) && self.context.may_answer(service, is_cluster_ip, backend)
                    });
                    frontends.insert((key.ip, key.port), serving.map(|backend| backend.socket()).collect());
                }
            }
        }
        UdpFrontends(frontends)
    }
}

impl Context {
    fn may_answer(&self, service: &Service, is_cluster_ip: bool, backend: &crate::services::Backend<'_>) -> bool {
        !(is_cluster_ip && service.internal == Policy::Local) || self.here().has(backend.endpoint)
    }
}
