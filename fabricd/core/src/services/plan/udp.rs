//! [`UdpFrontends`]: which UDP connections that the kernel tracks lead to nobody who serves.
//!
//! UDP has no end of its own. What a client sends from one port goes where its first datagram went for as long as it goes on
//! sending, whatever the maps say meanwhile (kubernetes/pkg/proxy/conntrack). So such connections have to be forgotten: the
//! next datagram begins anew. Those that lead to an endpoint that serves stay, though others are drawn by now.

use std::sync::Arc;

use super::rows::{self, Map, Socket};
use super::{Context, FrontendKey, ServicePlan};
use crate::cow_map::CowMap;
use crate::model::Family;
use crate::services::model::{Policy, Protocol, Service};
use crate::services::slices::Backend;
use crate::state::nft::FoundTable;

/// Where UDP is addressed to, and who may answer. Cheap to clone, and to compare with what it was a change before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UdpFrontends(CowMap<Socket, Arc<[Socket]>>);

impl UdpFrontends {
    /// The frontends of a table that is there.
    #[must_use]
    pub fn found(table: &FoundTable) -> Self {
        let mut frontends = vec![];
        for family in Family::ALL {
            let sets = [Map::Services, Map::Outside].map(|map| (map, table.sets.get(map.name(family).as_str())));
            for set in sets.into_iter().filter_map(|(map, set)| set.filter(|set| set.kind == Some(map.kind(family)))) {
                let keys = set.elements.keys().filter_map(|element| Some(rows::frontend(family, element)?.0));
                frontends.extend(keys.filter(is_udp).map(|key| ((key.ip, key.port), Arc::default())));
            }
        }
        Self(frontends.into_iter().collect())
    }

    /// Whether a connection is to be forgotten, whose first packet went to `target` and which `answers` answers: that is, or
    /// was `before`, a frontend, and no endpoint of it that serves. One that nobody has translated is answered by `target`.
    #[must_use]
    pub fn forget(&self, before: &Self, target: Socket, answers: Socket) -> bool {
        match self.0.get(&target) {
            Some(serving) => !serving.contains(&answers),
            None => before.0.contains(&target),
        }
    }
}

fn is_udp(key: &FrontendKey) -> bool {
    key.protocol == Protocol::Udp
}

impl ServicePlan {
    /// Where UDP is addressed to by now, and who may answer.
    #[must_use]
    pub fn udp_frontends(&self) -> &UdpFrontends {
        &self.udp
    }
}

impl UdpFrontends {
    /// A frontend comes, that is one of UDP.
    pub(super) fn come(&mut self, key: FrontendKey, serving: impl FnOnce() -> Arc<[Socket]>) {
        if is_udp(&key) {
            self.0.insert((key.ip, key.port), serving());
        }
    }

    /// A frontend goes.
    pub(super) fn go(&mut self, key: FrontendKey) {
        if is_udp(&key) {
            self.0.remove(&(key.ip, key.port));
        }
    }
}

impl Context {
    /// Those of a Service's endpoints that may answer at a frontend.
    pub(super) fn serving(&self, service: &Service, is_cluster_ip: bool, backends: &[Backend<'_>]) -> Arc<[Socket]> {
        let serves = |backend: &&Backend<'_>| backend.endpoint.ready || backend.endpoint.serving;
        let is_local = is_cluster_ip && service.internal == Policy::Local;
        let may_answer = |backend: &&Backend<'_>| !is_local || self.here().has(backend.endpoint);
        backends.iter().filter(serves).filter(may_answer).map(Backend::socket).collect()
    }
}
