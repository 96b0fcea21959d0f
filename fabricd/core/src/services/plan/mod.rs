//! [`ServicePlan`]: what the table `fabric-services` should hold, kept up to date change by change.
//!
//! A Service makes rows of maps, each by a frontend: an address, protocol and port. Of two Services that claim one frontend
//! the older has it, and a ClusterIP goes before any other address; the other one keeps the rest of its frontends. When
//! frontend or owner go, the next one has it. So what is planned depends on the objects alone.
//!
//! The rows lie in the table, and nowhere else: a Service that goes is planned once more, to be removed ([`change`]).
//!
//! [`rows`] says what the maps are, [`chains`] what the rules do with them, [`pools`] which numbers endpoints have,
//! [`describe`] what people are told of a Service, [`health`] what load balancers are.

mod chains;
mod change;
mod describe;
mod health;
mod pools;
mod rows;
mod udp;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use jiff::Timestamp;

use self::chains::Draw;
use self::change::{Ids, Planned};
pub use self::describe::{
    AddressKind, Described, DescribedEndpoint, DescribedFrontend, DescribedPort, Outcome, Unused,
};
pub use self::health::{HealthCheck, HealthChecks};
use self::pools::{Numbers, Pools};
use self::rows::{Class, Map, Shape};
pub use self::rows::{FrontendKey, Socket};
pub use self::udp::UdpFrontends;
use super::balance::{Algorithm, with_slots};
use super::choose::Here;
use super::model::{ObjectName, Service, ServicePort, Slice};
use super::sets::{Services, SliceKey, Slices};
use super::slices::{Backend, backends};
use crate::cow_map::Entry;
use crate::model::{Family, PerFamily, Subnet};
use crate::state::nft::{FoundTable, Table};

/// As many changes of slices are waited for at once, while the kernel refuses what is planned.
const MOST_TRIGGERS: usize = 10_000;

/// What is known of this node. Another context is another plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Context {
    /// Its name in Kubernetes.
    pub node: Arc<str>,
    /// Its zone.
    pub zone: Option<Arc<str>>,
    /// The subnets of its pods, where they are known.
    pub own: PerFamily<Subnet>,
    /// Those of all pods, where they are known.
    pub network: PerFamily<Subnet>,
    /// Its addresses that take NodePorts.
    pub node_ips: Vec<IpAddr>,
    /// The prefixes that ClusterIPs are from, where they are known.
    pub service_cidrs: Vec<Subnet>,
}

impl Context {
    fn here(&self) -> Here<'_> {
        Here { node: &self.node, zone: self.zone.as_deref() }
    }

    /// Where connections to a port are addressed to, and whether that is a ClusterIP.
    fn frontends<'a>(
        &'a self,
        service: &'a Service,
        port: &'a ServicePort,
    ) -> impl Iterator<Item = (FrontendKey, bool)> + 'a {
        let key = |ip: IpAddr, number| FrontendKey { ip, protocol: port.protocol, port: number };
        let outside = service.external_ips.iter().chain(&service.balancer_ips);
        let has = |ip: &IpAddr| service.cluster_ips.iter().any(|of| Family::of(*of) == Family::of(*ip));
        let of_nodes = port
            .node_port
            .into_iter()
            .flat_map(move |number| self.node_ips.iter().copied().filter(has).map(move |ip| (key(ip, number), false)));
        let at_cluster_ips = service.cluster_ips.iter().map(move |ip| (key(*ip, port.port), true));
        at_cluster_ips.chain(outside.map(move |ip| (key(*ip, port.port), false))).chain(of_nodes)
    }
}

/// What the table should hold.
#[derive(Debug)]
pub struct ServicePlan {
    context: Arc<Context>,
    services: Services,
    slices: Slices,
    table: Table,
    pools: [Pools; 2],
    ids: Numbers,
    /// The numbers that service ports had before the start, by their frontends.
    remembered: HashMap<FrontendKey, u32>,
    planned: HashMap<ObjectName, Planned>,
    /// Who has a frontend.
    owners: HashMap<FrontendKey, ObjectName>,
    /// How many of these are addresses with a port.
    frontends: usize,
    /// Who else would have it.
    waiting: BTreeMap<FrontendKey, BTreeSet<ObjectName>>,
    /// How many Services have an endpoint on this node.
    local: BTreeMap<IpAddr, u32>,
    draws: BTreeMap<Draw, u32>,
    udp: UdpFrontends,
    /// Services whose load balancer asks for health, from the oldest on.
    asked: BTreeSet<(u64, ObjectName)>,
    /// Services with members that can't be used.
    refused: BTreeSet<ObjectName>,
    /// When the changes of slices happened that were planned since somebody asked.
    triggers: Vec<Timestamp>,
}

/// A frontend that two Services claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict<'a> {
    /// The frontend.
    pub frontend: FrontendKey,
    /// Who has it.
    pub owner: &'a ObjectName,
    /// Who would have it too.
    pub other: &'a ObjectName,
}

impl ServicePlan {
    /// The plan of all Services, with the numbers that a table of before has.
    #[must_use]
    pub fn new(context: Context, services: &Services, slices: &Slices, before: &FoundTable) -> Self {
        let mut table = Table::default();
        Map::declare(&mut table);
        chains::add(&mut table, &context);
        let found = |map: Map, family| {
            before.sets.get(map.name(family).as_str()).filter(|set| set.kind == Some(map.kind(family)))
        };
        let mut remembered = HashMap::new();
        let pools = Family::ALL.map(|family| {
            let mut shapes: HashMap<u32, Shape> = HashMap::new();
            for set in [Map::Services, Map::Outside].into_iter().filter_map(|map| found(map, family)) {
                for (key, target) in set.elements.keys().filter_map(|element| rows::frontend(family, element)) {
                    remembered.insert(key, target.id);
                    shapes.insert(target.pool, target.shape());
                }
            }
            let elements = found(Map::Pools, family).map(|set| set.elements.clone()).unwrap_or_default();
            Pools::remembering(family, &elements, &shapes)
        });
        let mut plan = Self {
            context: Arc::new(context),
            services: Services::default(),
            slices: Slices::default(),
            table,
            pools,
            ids: Numbers::behind(remembered.values().max().copied()),
            remembered,
            planned: HashMap::new(),
            owners: HashMap::new(),
            frontends: 0,
            waiting: BTreeMap::new(),
            local: BTreeMap::new(),
            draws: BTreeMap::new(),
            udp: UdpFrontends::default(),
            asked: BTreeSet::new(),
            refused: BTreeSet::new(),
            triggers: vec![],
        };
        plan.update(services, slices);
        // What was there at the start happened whenever it did.
        plan.triggers = vec![];
        plan.remembered = HashMap::new();
        plan.pools.iter_mut().for_each(Pools::forget_remembered);
        // In as little memory as it takes.
        plan.planned.shrink_to_fit();
        plan.owners.shrink_to_fit();
        plan.table.sets.values_mut().for_each(|set| set.elements.compact());
        plan
    }

    /// What it was made for.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// What the table should hold.
    #[must_use]
    pub fn table(&self) -> &Table {
        &self.table
    }

    /// How many Services and frontends there are.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        (self.services.len(), self.frontends)
    }

    /// Lets the table share its elements with what is there.
    pub fn share(&mut self, found: &FoundTable) {
        self.table.share(found);
    }

    /// The frontends that two Services claim.
    pub fn conflicts(&self) -> impl Iterator<Item = Conflict<'_>> {
        self.waiting.iter().flat_map(|(frontend, others)| {
            let owner = self.owners.get(frontend);
            others.iter().filter_map(move |other| Some(Conflict { frontend: *frontend, owner: owner?, other }))
        })
    }

    /// Services with members that can't be used.
    pub fn refused(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.refused.iter().filter_map(|name| self.services.get(name))
    }

    /// The endpoints of a Service's port in a family, as it is planned.
    fn backends<'a>(&'a self, service: &Service, port: &ServicePort, family: Family) -> Vec<Backend<'a>> {
        let planned = self.planned.get(&service.name);
        backends(service, port, family, planned.into_iter().flat_map(Planned::slices))
    }

    /// When the changes of slices happened that were planned since this was asked last, the first ones of many. A slice that
    /// goes tells of none.
    pub fn take_triggers(&mut self) -> Vec<Timestamp> {
        std::mem::take(&mut self.triggers)
    }

    /// Takes over what Services and slices are now. A change costs itself.
    pub fn update(&mut self, services: &Services, slices: &Slices) {
        let mut changed = BTreeSet::new();
        for (was, is) in services.changes(&self.services, |was, is| was == is) {
            changed.extend(is.or(was).map(|(name, _)| name.clone()));
        }
        for (was, is) in slices.changes(&self.slices, |was, is| was == is) {
            let triggered =
                |entry: Option<Entry<'_, SliceKey, Arc<Slice>>>| entry.and_then(|(_, slice)| slice.triggered);
            let new = triggered(is).filter(|at| triggered(was) != Some(*at));
            self.triggers.extend(new.filter(|_| self.triggers.len() < MOST_TRIGGERS));
            changed.extend(is.or(was).map(|(key, _)| key.service.clone()));
        }
        (self.services, self.slices) = (services.clone(), slices.clone());
        let drawn: Vec<Draw> = self.draws.keys().copied().collect();
        // Whoever loses a frontend, or may have one now, is planned anew, with the numbers that it has.
        let mut ids: HashMap<ObjectName, Ids> = HashMap::new();
        while let Some(name) = changed.pop_first() {
            let before = ids.remove(&name).unwrap_or_else(|| self.remove(&name, &mut changed));
            let Some(service) = self.services.get(&name).cloned() else {
                before.into_iter().for_each(|id| self.ids.give_back(id));
                continue;
            };
            for other in self.displaced_by(&service) {
                ids.insert(other.clone(), self.remove(&other, &mut changed));
                changed.insert(other);
            }
            changed.remove(&name);
            self.add(service, before);
        }
        if !self.draws.keys().eq(&drawn) {
            self.renew_draws(&drawn);
        }
    }

    /// Who has frontends that this Service goes before them in claiming.
    fn displaced_by(&self, service: &Service) -> BTreeSet<ObjectName> {
        let of_ports = service.ports.iter().flat_map(|port| self.context.frontends(service, port));
        let whole = service.cluster_ips.iter().map(|ip| (FrontendKey::whole(*ip), true));
        let loses = |(key, is_cluster_ip)| {
            let owner = self.owners.get(&key).filter(|owner| **owner != service.name)?;
            self.goes_first(key, is_cluster_ip, service, owner).then(|| owner.clone())
        };
        of_ports.chain(whole).filter_map(loses).collect()
    }

    /// Whether a Service goes before another one in claiming a frontend.
    fn goes_first(&self, key: FrontendKey, is_cluster_ip: bool, service: &Service, owner: &ObjectName) -> bool {
        let Some(other) = self.services.get(owner) else { return true };
        let others_is_cluster_ip = other.cluster_ips.contains(&key.ip);
        (!is_cluster_ip, service.created, &service.name) < (!others_is_cluster_ip, other.created, &other.name)
    }

    /// Chains for the sizes of pools that there are.
    fn renew_draws(&mut self, before: &[Draw]) {
        let draws: Vec<Draw> = self.draws.keys().copied().collect();
        chains::remove_draws(&mut self.table, before.iter().filter(|draw| !self.draws.contains_key(draw)).copied());
        chains::add_draws(&mut self.table, draws.into_iter().filter(|draw| !before.contains(draw)));
    }
}

/// The endpoints that a connection's one is drawn from, in order.
fn drawn(service: &Service, list: &[Backend<'_>]) -> Box<[Socket]> {
    let most = service.affinity.map_or(usize::MAX, |_| Class::MOST_STICKY);
    let all: Box<[Socket]> = list.iter().take(most).map(Backend::socket).collect();
    if service.algorithm == Algorithm::SourceHash { with_slots(&all) } else { all }
}
