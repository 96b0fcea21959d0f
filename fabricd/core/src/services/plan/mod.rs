//! [`ServicePlan`]: what the table `fabric-services` should hold, kept up to date change by change.
//!
//! A Service makes rows of maps, each by a frontend: an address, protocol and port. Of two Services that claim one frontend
//! the older has it, and a ClusterIP goes before any other address; the other one keeps the rest of its frontends. When
//! frontend or owner go, the next one has it. So what is planned depends on the objects alone.
//!
//! [`rows`] says what the maps are, [`chains`] what the rules do with them, [`pools`] which numbers endpoints have,
//! [`describe`] what people are told of a Service, [`health`] what load balancers are.

mod chains;
mod describe;
mod health;
mod pools;
mod rows;
mod udp;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use self::chains::Draw;
pub use self::describe::{AddressKind, Described, DescribedEndpoint, DescribedFrontend, DescribedPort, Fate, Unused};
pub use self::health::{HealthCheck, HealthChecks};
use self::pools::{Content, Numbers, Pools, elements};
use self::rows::{Class, Map, Target};
pub use self::rows::{FrontendKey, Socket};
pub use self::udp::UdpFrontends;
use super::choose::{Answer, Choice, Here, choose};
use super::model::{ObjectName, Policy, Service, ServicePort};
use super::sets::{Services, Slices, of_service};
use super::slices::{Backend, backends};
use crate::model::{Family, PerFamily, Subnet};
use crate::state::nft::{Element, FoundTable, Part, Table};

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
    /// Who else would have it.
    waiting: BTreeMap<FrontendKey, BTreeSet<ObjectName>>,
    /// How many Services have an endpoint on this node.
    local: BTreeMap<IpAddr, u32>,
    draws: BTreeMap<Draw, u32>,
}

/// What was made of a Service.
#[derive(Debug, Default)]
struct Planned {
    ids: Vec<u32>,
    rows: Vec<(Family, Map, Element)>,
    claims: Vec<FrontendKey>,
    /// Claims of frontends that another one has.
    lost: Vec<FrontendKey>,
    pools: Vec<(Family, Content, bool)>,
    local: Vec<IpAddr>,
    draws: Vec<Draw>,
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
        let pools = Family::ALL.map(|family| {
            let elements = found(Map::Pools, family).map(|set| set.elements.clone()).unwrap_or_default();
            Pools::remembering(family, &elements)
        });
        let mut remembered = HashMap::new();
        for family in Family::ALL {
            for set in [Map::Services, Map::Outside].into_iter().filter_map(|map| found(map, family)) {
                let frontends = set.elements.keys().filter_map(|element| rows::frontend(family, element));
                remembered.extend(frontends.map(|(key, target)| (key, target.id)));
            }
        }
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
            waiting: BTreeMap::new(),
            local: BTreeMap::new(),
            draws: BTreeMap::new(),
        };
        plan.update(services, slices);
        plan.remembered = HashMap::new();
        plan.pools.iter_mut().for_each(Pools::forget_remembered);
        for set in plan.table.sets.values_mut() {
            // In as little memory as it takes.
            set.elements = set.elements.keys().cloned().collect();
        }
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
        (self.services.len(), self.owners.keys().filter(|key| key.port != 0).count())
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

    /// Takes over what Services and slices are now. A change costs itself.
    pub fn update(&mut self, services: &Services, slices: &Slices) {
        let mut changed = BTreeSet::new();
        for (was, is) in services.changes(&self.services, |was, is| was == is) {
            changed.extend(is.or(was).map(|(name, _)| name.clone()));
        }
        for (was, is) in slices.changes(&self.slices, |was, is| was == is) {
            changed.extend(is.or(was).map(|(key, _)| key.service.clone()));
        }
        (self.services, self.slices) = (services.clone(), slices.clone());
        let drawn: Vec<Draw> = self.draws.keys().copied().collect();
        // Whoever loses a frontend, or may have one now, is planned anew, with the numbers that it has.
        let mut ids = HashMap::new();
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
            let planned = self.plan(&service, before);
            self.planned.insert(name, planned);
        }
        if !self.draws.keys().eq(&drawn) {
            self.renew_draws(&drawn);
        }
    }

    /// Takes out what was made of a Service; gives the numbers of its ports.
    fn remove(&mut self, name: &ObjectName, changed: &mut BTreeSet<ObjectName>) -> Vec<u32> {
        let Some(planned) = self.planned.remove(name) else { return vec![] };
        for (family, map, element) in &planned.rows {
            elements(&mut self.table, *map, *family).remove(element);
        }
        for (family, sockets, is_sticky) in &planned.pools {
            self.pools[*family as usize].leave(sockets, *is_sticky, &mut self.table);
        }
        for ip in &planned.local {
            self.count_local(*ip, false);
        }
        for draw in planned.draws {
            if let Some(users) = self.draws.get_mut(&draw) {
                *users -= 1;
                if *users == 0 {
                    self.draws.remove(&draw);
                }
            }
        }
        for key in planned.claims {
            if self.owners.get(&key) == Some(name) {
                self.owners.remove(&key);
                changed.extend(self.waiting.get(&key).into_iter().flatten().cloned());
            }
        }
        for key in planned.lost {
            if let Some(others) = self.waiting.get_mut(&key) {
                others.remove(name);
                if others.is_empty() {
                    self.waiting.remove(&key);
                }
            }
        }
        planned.ids
    }

    fn plan(&mut self, service: &Service, ids: Vec<u32>) -> Planned {
        let mut planned = Planned::default();
        let mut ids = ids.into_iter();
        let slices = self.slices.clone();
        let context = self.context.clone();
        for port in &service.ports {
            let known = ids.next().inspect(|id| self.ids.give_back(*id));
            let known =
                known.or_else(|| self.frontends(service, port).find_map(|(key, _)| self.remembered.get(&key).copied()));
            let id = self.ids.take(known);
            planned.ids.push(id);
            for family in Family::ALL {
                let frontends: Vec<_> =
                    self.frontends(service, port).filter(|(key, _)| key.family() == family).collect();
                if frontends.is_empty() {
                    continue;
                }
                let backends = backends(service, port, family, of_service(&slices, &service.name));
                let choice = choose(&backends, context.here());
                let mut port = PortPlan { plan: self, planned: &mut planned, service, family, id, choice: &choice };
                for (key, is_cluster_ip) in frontends {
                    if port.claim(key) {
                        port.rows(key, is_cluster_ip);
                    }
                }
                port.note_local(&backends, context.here());
            }
        }
        ids.for_each(|id| self.ids.give_back(id));
        for ip in &service.cluster_ips {
            let key = FrontendKey::whole(*ip);
            let family = key.family();
            let choice = Choice::default();
            let mut port = PortPlan { plan: self, planned: &mut planned, service, family, id: 0, choice: &choice };
            if port.claim(key) {
                port.row(Map::ClusterIps, Element::new([Part::Ip(*ip)]));
            }
        }
        planned
    }

    /// Where connections to a port are addressed to, and whether that is a ClusterIP.
    fn frontends<'a>(
        &'a self,
        service: &'a Service,
        port: &'a ServicePort,
    ) -> impl Iterator<Item = (FrontendKey, bool)> + 'a {
        let key = |ip: IpAddr, number| FrontendKey { ip, protocol: port.protocol, port: number };
        let outside = service.external_ips.iter().chain(&service.balancer_ips);
        let of_nodes = port.node_port.into_iter().flat_map(move |number| {
            let has = |ip: &IpAddr| service.cluster_ips.iter().any(|of| Family::of(*of) == Family::of(*ip));
            self.context
                .node_ips
                .iter()
                .copied()
                .filter(has)
                .map(move |ip| (key(ip, number), false))
                .collect::<Vec<_>>()
        });
        let at_cluster_ips = service.cluster_ips.iter().map(move |ip| (key(*ip, port.port), true));
        at_cluster_ips.chain(outside.map(move |ip| (key(*ip, port.port), false))).chain(of_nodes)
    }

    /// Who has frontends that this Service goes before them in claiming.
    fn displaced_by(&self, service: &Service) -> BTreeSet<ObjectName> {
        let of_ports = service.ports.iter().flat_map(|port| self.frontends(service, port));
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

    fn count_local(&mut self, ip: IpAddr, comes: bool) {
        let family = Family::of(ip);
        let users = self.local.entry(ip).or_default();
        *users = if comes { *users + 1 } else { *users - 1 };
        let (is_first, is_last) = (comes && *users == 1, *users == 0);
        if is_last {
            self.local.remove(&ip);
        }
        let part = Part::Ip(ip);
        // One of the host's network reaches itself without leaving the host.
        let may_reach_itself = self.context.own.get(family).is_some_and(|own| own.contains(ip));
        for (map, element) in [(Map::Local, Element::new([part])), (Map::Hairpin, Element::new([part, part]))] {
            let set = elements(&mut self.table, map, family);
            if is_last {
                set.remove(&element);
            } else if is_first && (map == Map::Local || may_reach_itself) {
                set.insert(element, ());
            }
        }
    }

    /// Chains for the sizes of pools that there are.
    fn renew_draws(&mut self, before: &[Draw]) {
        let draws: Vec<Draw> = self.draws.keys().copied().collect();
        chains::remove_draws(&mut self.table, before.iter().filter(|draw| !self.draws.contains_key(draw)).copied());
        chains::add_draws(&mut self.table, draws.into_iter().filter(|draw| !before.contains(draw)));
    }
}

/// The frontends of one port in one family, while they are planned.
struct PortPlan<'p, 'a> {
    plan: &'p mut ServicePlan,
    planned: &'p mut Planned,
    service: &'p Service,
    family: Family,
    id: u32,
    choice: &'p Choice<'a>,
}

impl PortPlan<'_, '_> {
    /// Whether this Service has the frontend now. Whoever it goes before has let go of it.
    fn claim(&mut self, key: FrontendKey) -> bool {
        let name = &self.service.name;
        match self.plan.owners.get(&key) {
            None => {
                self.plan.owners.insert(key, name.clone());
                self.planned.claims.push(key);
                true
            }
            // An address may be listed twice, as one of a load balancer and an external one.
            Some(owner) if owner == name => false,
            Some(_) => {
                self.plan.waiting.entry(key).or_default().insert(name.clone());
                self.planned.lost.push(key);
                false
            }
        }
    }

    fn row(&mut self, map: Map, element: Element) {
        elements(&mut self.plan.table, map, self.family).insert(element.clone(), ());
        self.planned.rows.push((self.family, map, element));
    }

    /// What the frontend leads to.
    fn rows(&mut self, key: FrontendKey, is_cluster_ip: bool) {
        let (inside, outside) = match is_cluster_ip {
            true => (self.service.internal, None),
            false => (Policy::Cluster, Some(self.service.external).filter(|policy| *policy == Policy::Local)),
        };
        match self.choice.answer(inside) {
            Answer::To(list) => self.leads_to(Map::Services, key, list),
            Answer::Drop => self.row(Map::Held, key.element()),
            // What has a ClusterIP and is not translated is rejected anyway.
            Answer::Reject if is_cluster_ip => {}
            Answer::Reject => self.row(Map::Rejected, key.element()),
        }
        match outside.map(|policy| self.choice.answer(policy)) {
            Some(Answer::To(list)) => self.leads_to(Map::Outside, key, list),
            Some(Answer::Drop) => self.row(Map::Shut, key.element()),
            Some(Answer::Reject) | None => {}
        }
        let ranges = self.service.source_ranges.of(self.family);
        if let Some(ranges) = ranges.filter(|_| self.service.balancer_ips.contains(&key.ip)) {
            self.row(Map::Guarded, key.guarded_by(self.id));
            // A node that may come may also come by way of the address itself.
            let by_itself = ranges.iter().any(|range| self.plan.context.node_ips.iter().any(|ip| range.contains(*ip)));
            let itself =
                by_itself.then(|| Subnet::host(key.ip)).filter(|ip| !ranges.iter().any(|range| range.covers(*ip)));
            for range in ranges.into_iter().chain(itself) {
                self.row(Map::Ranges, rows::range(self.id, range));
            }
        }
    }

    fn leads_to(&mut self, map: Map, key: FrontendKey, list: &[Backend<'_>]) {
        let affinity = self.service.affinity;
        let sockets = drawn(self.service, list);
        let pools = &mut self.plan.pools[self.family as usize];
        let (pool, content) = pools.take(&sockets, affinity.is_some(), &mut self.plan.table);
        let class = Class { endpoints: u32::try_from(sockets.len()).unwrap_or(u32::MAX), affinity };
        self.planned.pools.push((self.family, content, affinity.is_some()));
        let draw = (self.family, map, class);
        *self.plan.draws.entry(draw).or_default() += 1;
        self.planned.draws.push(draw);
        self.row(map, key.leads_to(Target { id: self.id, pool, class: class.number() }));
    }

    /// Endpoints on this node, which answer by it.
    fn note_local(&mut self, backends: &[Backend<'_>], here: Here<'_>) {
        for backend in backends.iter().filter(|backend| here.has(backend.endpoint)) {
            let ip = backend.endpoint.ip;
            if !self.planned.local.contains(&ip) {
                self.planned.local.push(ip);
                self.plan.count_local(ip, true);
            }
        }
    }
}

/// The endpoints that a connection's one is drawn from, in order.
fn drawn(service: &Service, list: &[Backend<'_>]) -> Box<[Socket]> {
    let most = service.affinity.map_or(usize::MAX, |_| Class::MOST_STICKY);
    list.iter().take(most).map(Backend::socket).collect()
}
