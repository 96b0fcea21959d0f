//! [`ServiceChange`]: one Service comes into the plan, or goes.
//!
//! Both are one course through its frontends, by which rows are added or removed. What was made of a Service can so be made
//! out from what it was made of, and is not kept a second time: with 10,000 Services that would be ten megabytes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use smallvec::SmallVec;

use super::pools::elements;
use super::rows::{self, Class, FrontendKey, Map, Shape, Target};
use super::{Context, ServicePlan, drawn};
use crate::model::{Family, Subnet};
use crate::services::balance::Algorithm;
use crate::services::choose::{Answer, Choice, choose};
use crate::services::model::{ObjectName, Policy, Service, Slice};
use crate::services::sets::of_service;
use crate::services::slices::{Backend, backends};
use crate::state::nft::{Element, Part};

/// Numbers of a Service's ports. Most have one or two.
pub(super) type Ids = SmallVec<[u32; 2]>;

/// What a Service was planned by.
#[derive(Debug)]
pub(super) struct Planned {
    service: Arc<Service>,
    /// Most have one for each family.
    slices: SmallVec<[Arc<Slice>; 1]>,
    ids: Ids,
}

impl Planned {
    /// Its slices.
    pub(super) fn slices(&self) -> impl Iterator<Item = &Slice> {
        self.slices.iter().map(AsRef::as_ref)
    }
}

impl ServicePlan {
    /// Plans a Service, whose ports had these numbers.
    pub(super) fn add(&mut self, service: Arc<Service>, before: Ids) {
        let mut before = before.into_iter();
        let mut ids = Ids::new();
        for port in &service.ports {
            let known = before.next().inspect(|id| self.ids.give_back(*id));
            let remembered = |(key, _)| self.remembered.get(&key).copied();
            let known = known.or_else(|| self.context.frontends(&service, port).find_map(remembered));
            ids.push(self.ids.take(known));
        }
        before.for_each(|id| self.ids.give_back(id));
        let slices = of_service(&self.slices, &service.name).cloned().collect();
        let planned = Planned { service, slices, ids };
        ServiceChange::new(self, &planned.service, true).take(&planned);
        self.planned.insert(planned.service.name.clone(), planned);
    }

    /// Takes out what was made of a Service; gives the numbers of its ports. Whoever may have its frontends now has
    /// `changed`.
    pub(super) fn remove(&mut self, name: &ObjectName, changed: &mut BTreeSet<ObjectName>) -> Ids {
        let Some(planned) = self.planned.remove(name) else { return Ids::new() };
        changed.extend(ServiceChange::new(self, &planned.service, false).take(&planned));
        planned.ids
    }
}

/// A Service that comes or goes.
struct ServiceChange<'p> {
    plan: &'p mut ServicePlan,
    service: &'p Service,
    comes: bool,
    /// Its endpoints on this node that are counted already.
    local: Vec<IpAddr>,
    /// Who else would have the frontends that it no longer has.
    waiting: Vec<ObjectName>,
}

/// The frontends of one of its ports in one family.
struct PortChange<'c, 'p, 'a> {
    change: &'c mut ServiceChange<'p>,
    context: &'c Context,
    family: Family,
    id: u32,
    choice: &'c Choice<'a>,
}

impl<'p> ServiceChange<'p> {
    fn new(plan: &'p mut ServicePlan, service: &'p Service, comes: bool) -> Self {
        Self { plan, service, comes, local: vec![], waiting: vec![] }
    }

    /// Adds or removes all of it; gives who else would have its frontends.
    fn take(mut self, planned: &Planned) -> Vec<ObjectName> {
        let (service, context) = (self.service, Arc::clone(&self.plan.context));
        for (port, id) in service.ports.iter().zip(&planned.ids) {
            for family in Family::ALL {
                let frontends = context.frontends(service, port).filter(|(key, _)| key.family() == family);
                let frontends: SmallVec<[_; 4]> = frontends.collect();
                if frontends.is_empty() {
                    continue;
                }
                let backends = backends(service, port, family, planned.slices());
                let choice = choose(&backends, context.here());
                let mut change = PortChange { change: &mut self, context: &context, family, id: *id, choice: &choice };
                for (key, is_cluster_ip) in frontends {
                    if change.change.claim(key) {
                        change.rows(key, is_cluster_ip);
                        change.udp(key, is_cluster_ip, &backends);
                    }
                }
                self.note_local(&backends, &context);
            }
        }
        for ip in &service.cluster_ips {
            let key = FrontendKey::whole(*ip);
            if self.claim(key) {
                self.row(Map::ClusterIps, key.family(), Element::new([Part::Ip(*ip)]));
            }
        }
        self.note_what_is_told();
        self.waiting
    }

    /// Whether this Service has the frontend; one that goes lets go of it. Whoever one that comes goes before has let go.
    fn claim(&mut self, key: FrontendKey) -> bool {
        let (plan, name, is_port) = (&mut *self.plan, &self.service.name, usize::from(key.port != 0));
        match (plan.owners.get(&key), self.comes) {
            (None, true) => {
                plan.owners.insert(key, name.clone());
                plan.frontends += is_port;
                true
            }
            // An address may be listed twice, as one of a load balancer and an external one.
            (Some(owner), true) if owner == name => false,
            (Some(_), true) => {
                plan.waiting.entry(key).or_default().insert(name.clone());
                false
            }
            (Some(owner), false) if owner == name => {
                plan.owners.remove(&key);
                plan.frontends -= is_port;
                self.waiting.extend(plan.waiting.get(&key).into_iter().flatten().cloned());
                true
            }
            (_, false) => {
                if let Some(others) = plan.waiting.get_mut(&key) {
                    others.remove(name);
                    if others.is_empty() {
                        plan.waiting.remove(&key);
                    }
                }
                false
            }
        }
    }

    fn row(&mut self, map: Map, family: Family, element: Element) {
        let set = elements(&mut self.plan.table, map, family);
        if self.comes {
            set.insert(element, ());
        } else {
            set.remove(&element);
        }
    }

    /// Endpoints on this node, which answer by it.
    fn note_local(&mut self, backends: &[Backend<'_>], context: &Context) {
        for backend in backends.iter().filter(|backend| context.here().has(backend.endpoint)) {
            let ip = backend.endpoint.ip;
            if !self.local.contains(&ip) {
                self.local.push(ip);
                self.count_local(ip, context);
            }
        }
    }

    fn count_local(&mut self, ip: IpAddr, context: &Context) {
        let family = Family::of(ip);
        let users = self.plan.local.entry(ip).or_default();
        *users = if self.comes { *users + 1 } else { *users - 1 };
        let (is_first, is_last) = (self.comes && *users == 1, *users == 0);
        if is_last {
            self.plan.local.remove(&ip);
        }
        if is_first || is_last {
            let part = Part::Ip(ip);
            self.row(Map::Local, family, Element::new([part]));
            // One of the host's network reaches itself without leaving the host.
            if context.own.get(family).is_some_and(|own| own.contains(ip)) {
                self.row(Map::Hairpin, family, Element::new([part, part]));
            }
        }
    }

    /// What people and load balancers are told of.
    fn note_what_is_told(&mut self) {
        let Service { name, created, health_check_port, refused, .. } = self.service;
        if health_check_port.is_some() {
            let asked = (*created, name.clone());
            _ = if self.comes { self.plan.asked.insert(asked) } else { self.plan.asked.remove(&asked) };
        }
        if !refused.is_empty() {
            _ = if self.comes { self.plan.refused.insert(name.clone()) } else { self.plan.refused.remove(name) };
        }
    }
}

impl PortChange<'_, '_, '_> {
    fn row(&mut self, map: Map, element: Element) {
        self.change.row(map, self.family, element);
    }

    /// What the frontend leads to.
    fn rows(&mut self, key: FrontendKey, is_cluster_ip: bool) {
        let service = self.change.service;
        let (inside, outside) = match is_cluster_ip {
            true => (service.internal, None),
            false => (Policy::Cluster, Some(service.external).filter(|policy| *policy == Policy::Local)),
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
        let ranges = service.source_ranges.of(self.family);
        if let Some(ranges) = ranges.filter(|_| service.balancer_ips.contains(&key.ip)) {
            self.row(Map::Guarded, key.guarded_by(self.id));
            // A node that may come may also come by way of the address itself.
            let by_itself = ranges.iter().any(|range| self.context.node_ips.iter().any(|ip| range.contains(*ip)));
            let itself =
                by_itself.then(|| Subnet::host(key.ip)).filter(|ip| !ranges.iter().any(|range| range.covers(*ip)));
            for range in ranges.into_iter().chain(itself) {
                self.row(Map::Ranges, rows::range(self.id, range));
            }
        }
    }

    fn leads_to(&mut self, map: Map, key: FrontendKey, list: &[Backend<'_>]) {
        let ServiceChange { plan, service, comes, .. } = &mut *self.change;
        let (is_sticky, sockets) = (service.affinity.is_some(), drawn(service, list));
        let shape = match service.algorithm {
            Algorithm::Random => Shape::Shared,
            Algorithm::RoundRobin => Shape::OfPort(self.id),
            Algorithm::SourceHash => Shape::Hashed,
        };
        let (pools, table) = (&mut plan.pools[self.family as usize], &mut plan.table);
        let pool = match comes {
            true => pools.take(shape, &sockets, is_sticky, table),
            false => pools.leave(shape, &sockets, is_sticky, table),
        };
        let endpoints = u32::try_from(sockets.len()).unwrap_or(u32::MAX);
        let class = match (service.affinity, service.algorithm) {
            (Some(timeout), _) => Class::Sticky { endpoints, timeout },
            (None, Algorithm::Random) => Class::Random { endpoints },
            (None, Algorithm::RoundRobin) => Class::Turns { endpoints, pool },
            (None, Algorithm::SourceHash) => Class::Hashed,
        };
        let draw = (self.family, map, class);
        let users = plan.draws.entry(draw).or_default();
        *users = if *comes { *users + 1 } else { *users - 1 };
        if *users == 0 {
            plan.draws.remove(&draw);
        }
        self.row(map, key.leads_to(Target { id: self.id, pool, class: class.number() }));
    }

    /// Who may answer what is sent to the frontend by UDP.
    fn udp(&mut self, key: FrontendKey, is_cluster_ip: bool, backends: &[Backend<'_>]) {
        let ServiceChange { plan, service, comes, .. } = &mut *self.change;
        match comes {
            true => plan.udp.come(key, || self.context.serving(service, is_cluster_ip, backends)),
            false => plan.udp.go(key),
        }
    }
}
