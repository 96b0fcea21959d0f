//! [`PeerPlan`]: what is desired for this node and its peers, kept up to date change by change.
//!
//! A lease that is accepted decides its own entries and nothing else; which leases are accepted [`Derived`] tells. So a
//! few changed leases change a few entries, which are named, and nobody has to look for them among thousands.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::own_device::own_device;
use super::{Conflict, Desired, Facts, PeerInputs, Refusal, Vtep};
use crate::derived::{self, Derived, Dirty, Planner, Turned};
use crate::diff::Key;
use crate::leases::{Lease, LeaseSet};
use crate::model::{Family, IfName, MacAddr, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::record::{Backend, Endpoint, LeaseKey};
use crate::state::{Foreign, NEXTHOP_ID_BASE, Nexthop, NexthopId, Routing, Sysctl, Via, VxlanLink};

/// What is desired, and what it was made of.
#[derive(Debug)]
pub struct PeerPlan {
    derived: Derived<Context>,
    leases: Arc<LeaseSet>,
    desired: Arc<Desired>,
    nexthop_ids: NexthopIds,
    turned: Turned<Lease>,
    is_anew: bool,
}

impl PeerPlan {
    /// Of all leases.
    #[must_use]
    pub fn new(inputs: &PeerInputs<'_>) -> Self {
        Self::of(inputs, Arc::new(inputs.leases.clone()), own(inputs), &Routing::default())
    }

    /// `before` is what was desired until now.
    fn of(inputs: &PeerInputs<'_>, leases: Arc<LeaseSet>, own: Own, before: &Routing) -> Self {
        let Own { links, addresses, sysctls, devices, conflicts } = own;
        let state = Routing { links, addresses, sysctls, ..Routing::default() };
        let context = Context::of(inputs, devices);
        let peers: Vec<Arc<Lease>> = leases.iter().filter(|lease| context.is_peer(lease)).cloned().collect();
        let (derived, turned) = Derived::new(context, peers);
        let mut plan = Self {
            derived,
            desired: Arc::new(Desired { state, devices, conflicts, ..Desired::default() }),
            leases: Arc::clone(&leases),
            nexthop_ids: NexthopIds::of(inputs.have, before),
            turned: Turned::default(),
            is_anew: true,
        };
        plan.turn(inputs, &turned);
        let desired = Arc::get_mut(&mut plan.desired).expect("nobody else has it yet");
        desired.state = std::mem::take(&mut desired.state).packed();
        plan
    }

    /// Takes over what has changed: `leases` are those of `inputs`, `touched` what may have changed in what the kernel has
    /// since the last time. Gives the entries whose desired value may be another.
    pub fn update(&mut self, inputs: &PeerInputs<'_>, leases: &Arc<LeaseSet>, touched: &Dirty<Key>) -> Dirty<Key> {
        let own = own(inputs);
        if !self.derived.planner().decides_as(inputs, &own.devices) || !own.is_in(&self.desired) {
            let anew = Self::of(inputs, Arc::clone(leases), own, &self.desired.state);
            let is_same = anew.desired == self.desired;
            *self = anew;
            // Most of what the host's links and routes do changes nothing.
            return if is_same { Dirty::default() } else { Dirty::Everything };
        }
        self.is_anew = false;
        self.nexthop_ids.take_over(inputs.have, &self.desired.state, touched);
        let context = self.derived.planner();
        let (went, came): (Vec<_>, Vec<_>) = leases.changes(&self.leases).unzip();
        let [went, came] = [went, came].map(|some| {
            some.into_iter().flatten().filter(|lease| context.is_peer(lease)).cloned().collect::<Vec<Arc<Lease>>>()
        });
        self.turned = self.derived.update(went, came);
        self.leases = Arc::clone(leases);
        let turned = std::mem::take(&mut self.turned);
        let dirty = self.turn(inputs, &turned);
        self.turned = turned;
        dirty
    }

    /// Takes the entries of leases out that are not accepted any more, and puts those in that are now.
    fn turn(&mut self, inputs: &PeerInputs<'_>, turned: &Turned<Lease>) -> Dirty<Key> {
        let mut dirty = BTreeSet::new();
        let has_refused = self.derived.refused().next().is_some();
        if turned.is_empty() && !has_refused && self.desired.refused.is_empty() {
            return Dirty::default();
        }
        let Self { derived, nexthop_ids, .. } = self;
        let desired = Arc::make_mut(&mut self.desired);
        let mut rows = Rows { context: derived.planner(), nexthop_ids, inputs, desired, dirty: &mut dirty };
        turned.went.iter().for_each(|lease| rows.remove(lease));
        turned.came.iter().for_each(|lease| rows.add(lease));
        desired.conflicts.sort_by_key(|conflict| match conflict {
            Conflict::Name { .. } | Conflict::Vni { .. } => None,
            Conflict::Route { dst, .. } => Some(*dst),
        });
        desired.peers = derived.accepted();
        desired.refused = derived.refused().map(|(lease, refusal)| (lease.key, refusal.clone())).collect();
        Dirty::Keys(dirty)
    }

    /// What is desired. Copied by the next change for as long as somebody keeps it.
    #[must_use]
    pub fn desired(&self) -> &Arc<Desired> {
        &self.desired
    }

    /// What is desired, for somebody who has no further changes.
    #[must_use]
    pub fn into_desired(self) -> Desired {
        Arc::unwrap_or_clone(self.desired)
    }

    /// The leases that the last update brought into force, and those that no longer are; `None` when all was planned anew.
    #[must_use]
    pub fn turned(&self) -> Option<&Turned<Lease>> {
        (!self.is_anew).then_some(&self.turned)
    }
}

/// What decides about peers besides their leases. Another context derives everything anew.
#[derive(Debug)]
pub struct Context {
    network: NetworkConfig,
    own: LeaseKey,
    vteps: PerFamily<Vtep>,
    facts: Facts,
    devices: PerFamily<IfName>,
    /// Of what others have in the kernel, what peers must step around.
    foreign_routes: BTreeMap<Subnet, String>,
    foreign_nexthops: BTreeSet<NexthopId>,
}

impl Context {
    fn of(inputs: &PeerInputs<'_>, devices: PerFamily<IfName>) -> Self {
        let PeerInputs { network, own, vteps, facts, foreign, leases: _, have: _ } = inputs;
        let Foreign { routes, nexthop_ids, plain: _, direct: _, links: _ } = foreign;
        Self {
            network: **network,
            own: **own,
            vteps: **vteps,
            facts: (*facts).clone(),
            devices,
            foreign_routes: routes.clone(),
            foreign_nexthops: nexthop_ids.clone(),
        }
    }

    /// Whether these inputs make the same context.
    fn decides_as(&self, inputs: &PeerInputs<'_>, devices: &PerFamily<IfName>) -> bool {
        let Self { network, own, vteps, facts, devices: with, foreign_routes, foreign_nexthops } = self;
        (network, own, vteps, facts, with) == (inputs.network, inputs.own, inputs.vteps, inputs.facts, devices)
            && (foreign_routes, foreign_nexthops) == (&inputs.foreign.routes, &inputs.foreign.nexthop_ids)
    }

    /// A placeholder is nobody.
    fn is_peer(&self, lease: &Lease) -> bool {
        lease.key != self.own && !lease.record.is_placeholder()
    }

    /// What a lease says of the families that the network has.
    fn ends<'a>(&'a self, lease: &'a Lease) -> impl Iterator<Item = (Family, Subnet, Endpoint)> + use<'a> {
        let endpoints = lease.record.endpoints();
        let families = lease.key.subnets().iter().filter(|(family, _)| self.network.spaces.get(*family).is_some());
        families.filter_map(move |(family, subnet)| Some((family, *subnet, *endpoints.get(family)?)))
    }

    fn direct_link(&self, peer: IpAddr) -> Option<IfName> {
        if !self.network.vxlan.direct_routing {
            return None;
        }
        let links = self.facts.on_link.iter().filter(|(prefix, _)| prefix.contains(peer));
        links.max_by_key(|(prefix, _)| prefix.prefix_len()).map(|(_, link)| *link)
    }
}

/// What only one peer can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PeerKey {
    /// A subnet, and so all that overlap it.
    Subnet(Subnet),
    /// The MAC address of a VTEP, in the FDB of one device.
    Mac(Family, MacAddr),
}

impl derived::Key for PeerKey {
    fn clashes(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Subnet(one), Self::Subnet(other)) => one.overlaps(*other),
            (one, other) => one == other,
        }
    }
}

impl Planner for Context {
    type Object = Lease;
    /// Of two leases that clash the older one counts, whatever order they are listed in.
    type Rank = (i64, LeaseKey);
    type Key = PeerKey;
    type Refusal = Refusal;

    fn rank(&self, lease: &Lease) -> Self::Rank {
        (lease.create_revision, lease.key)
    }

    fn claims(&self, lease: &Lease) -> Result<Vec<PeerKey>, Refusal> {
        if let Backend::Other(name) = &lease.record.backend {
            return Err(Refusal::Backend(name.clone()));
        }
        let mut keys = Vec::with_capacity(4);
        for (family, subnet, endpoint) in self.ends(lease) {
            self.check(family, subnet, &endpoint)?;
            keys.extend([PeerKey::Subnet(subnet), PeerKey::Mac(family, endpoint.vtep_mac)]);
        }
        Ok(keys)
    }

    fn refusal(&self, key: &PeerKey, holder: &Lease) -> Refusal {
        match key {
            PeerKey::Subnet(subnet) => Refusal::Overlaps(*subnet, holder.holder()),
            PeerKey::Mac(_, mac) => Refusal::SameMac(*mac, holder.holder()),
        }
    }
}

impl Context {
    /// Whether what a peer has in one family can be used here, whatever others have.
    fn check(&self, family: Family, subnet: Subnet, endpoint: &Endpoint) -> Result<(), Refusal> {
        let space = self.network.spaces.get(family).map(|space| space.network);
        if let Some(network) = space
            && (!network.covers(subnet) || subnet.prefix_len() < network.prefix_len() + 2)
        {
            return Err(Refusal::OutsideNetwork(subnet, network));
        }
        if let Some(own) = self.own.subnets().get(family).filter(|own| own.overlaps(subnet)) {
            return Err(Refusal::OverlapsOurs(subnet, *own));
        }
        if self.vteps.values().any(|vtep| vtep.local == endpoint.public_ip) {
            return Err(Refusal::OurAddress(endpoint.public_ip));
        }
        if endpoint.vni != self.network.vxlan.vni {
            return Err(Refusal::Vni(endpoint.vni, self.network.vxlan.vni));
        }
        if self.vteps.get(family).is_some_and(|vtep| vtep.mac == endpoint.vtep_mac) {
            return Err(Refusal::SameMac(endpoint.vtep_mac, "this node".into()));
        }
        Ok(())
    }
}

/// The entries of peers, being changed.
struct Rows<'a> {
    context: &'a Context,
    nexthop_ids: &'a mut NexthopIds,
    inputs: &'a PeerInputs<'a>,
    desired: &'a mut Desired,
    dirty: &'a mut BTreeSet<Key>,
}

impl Rows<'_> {
    fn add(&mut self, lease: &Lease) {
        for (family, subnet, endpoint) in self.context.ends(lease) {
            if let Some(dev) = self.context.devices.get(family) {
                self.add_end(*dev, subnet, &endpoint);
            }
        }
    }

    fn add_end(&mut self, dev: IfName, subnet: Subnet, endpoint: &Endpoint) {
        if let Some(route) = self.context.foreign_routes.get(&subnet) {
            self.desired.conflicts.push(Conflict::Route { dst: subnet, route: route.clone() });
            return;
        }
        let state = &mut self.desired.state;
        state.fdb.insert((dev, endpoint.vtep_mac), endpoint.public_ip);
        state.neighbours.insert((dev, subnet.base()), endpoint.vtep_mac);
        let via = match self.context.direct_link(endpoint.public_ip) {
            Some(link) => Via::Direct(Nexthop { gateway: endpoint.public_ip, dev: link }),
            None => {
                let nexthop = Nexthop { gateway: subnet.base(), dev };
                // IPv6 routes cost the kernel the same with and without nexthop objects.
                if subnet.family() == Family::V4 && self.context.facts.nexthop_objects {
                    let id = self.nexthop_ids.give(&nexthop, &state.nexthops, self.inputs);
                    state.nexthops.insert(id, nexthop);
                    self.dirty.insert(Key::Nexthop(id));
                    Via::Nexthop(id)
                } else {
                    Via::Gateway(nexthop)
                }
            }
        };
        state.routes.insert(subnet, via);
        self.touch(dev, subnet, endpoint);
    }

    fn remove(&mut self, lease: &Lease) {
        for (family, subnet, endpoint) in self.context.ends(lease) {
            let Some(dev) = self.context.devices.get(family) else { continue };
            if self.context.foreign_routes.contains_key(&subnet) {
                self.desired.conflicts.retain(|c| !matches!(c, Conflict::Route { dst, .. } if *dst == subnet));
                continue;
            }
            let state = &mut self.desired.state;
            state.fdb.remove(&(*dev, endpoint.vtep_mac));
            state.neighbours.remove(&(*dev, subnet.base()));
            if let Some(Via::Nexthop(id)) = state.routes.remove(&subnet) {
                state.nexthops.remove(&id);
                self.nexthop_ids.is_free(id);
                self.dirty.insert(Key::Nexthop(id));
            }
            self.touch(*dev, subnet, &endpoint);
        }
    }

    fn touch(&mut self, dev: IfName, subnet: Subnet, endpoint: &Endpoint) {
        let keys = [Key::Fdb(dev, endpoint.vtep_mac), Key::Neighbour(dev, subnet.base()), Key::Route(subnet)];
        self.dirty.extend(keys);
    }
}

/// Gives every nexthop an id: the one it has or is to have, else the lowest that nobody uses.
#[derive(Debug)]
struct NexthopIds {
    /// What the kernel has, by IPv4 gateway, as only those are planned. Of doubles (another daemon's doing) the lowest id
    /// stays, the others are swept. Of what it doesn't have, since it went with its device, what it is to have.
    held: HashMap<u32, NexthopId>,
    /// All lower ids are in use.
    next: u32,
}

impl NexthopIds {
    fn of(have: &Routing, desired: &Routing) -> Self {
        let all = desired.nexthops.iter().rev().chain(have.nexthops.iter().rev());
        Self { held: all.filter_map(|(id, nexthop)| Some((gateway(nexthop)?, *id))).collect(), next: NEXTHOP_ID_BASE }
    }

    /// Takes over what has changed in what the kernel has.
    fn take_over(&mut self, have: &Routing, desired: &Routing, touched: &Dirty<Key>) {
        let Dirty::Keys(keys) = touched else { return *self = Self::of(have, desired) };
        for key in keys {
            let Key::Nexthop(id) = key else { continue };
            match have.nexthops.get(id) {
                Some(nexthop) => {
                    let Some(gateway) = gateway(nexthop) else { continue };
                    let held = self.held.entry(gateway).or_insert(*id);
                    if *id < *held || have.nexthops.get(held) != Some(nexthop) {
                        *held = *id;
                    }
                }
                None => self.is_free(*id),
            }
        }
    }

    fn is_free(&mut self, id: NexthopId) {
        self.next = self.next.min(id.0).max(NEXTHOP_ID_BASE);
    }

    fn give(
        &mut self,
        nexthop: &Nexthop,
        planned: &BTreeMap<NexthopId, Nexthop>,
        inputs: &PeerInputs<'_>,
    ) -> NexthopId {
        let have = &inputs.have.nexthops;
        let used = |id| have.contains_key(&id) || planned.contains_key(&id) || inputs.foreign.nexthop_ids.contains(&id);
        if let Some(id) = gateway(nexthop).and_then(|gateway| self.held.get(&gateway)) {
            if have.get(id) == Some(nexthop) {
                return *id;
            }
            // It is gone, or leads over another device: there may be one beside it.
            if let Some((id, _)) = have.iter().find(|(_, other)| *other == nexthop) {
                return *id;
            }
            if !used(*id) {
                return *id;
            }
        }
        while used(NexthopId(self.next)) {
            self.next += 1;
        }
        self.next += 1;
        NexthopId(self.next - 1)
    }
}

fn gateway(nexthop: &Nexthop) -> Option<u32> {
    match nexthop.gateway {
        IpAddr::V4(gateway) => Some(gateway.to_bits()),
        IpAddr::V6(_) => None,
    }
}

/// What this node has for itself, without peers.
struct Own {
    links: BTreeMap<IfName, VxlanLink>,
    addresses: BTreeSet<(IfName, Subnet)>,
    sysctls: BTreeMap<Sysctl, u32>,
    devices: PerFamily<IfName>,
    conflicts: Vec<Conflict>,
}

impl Own {
    /// Whether `desired` has the same.
    fn is_in(&self, desired: &Desired) -> bool {
        let state = &desired.state;
        let devices = desired.conflicts.iter().filter(|conflict| !matches!(conflict, Conflict::Route { .. }));
        (&self.links, &self.addresses, &self.sysctls) == (&state.links, &state.addresses, &state.sysctls)
            && self.conflicts.iter().eq(devices)
    }
}

fn own(inputs: &PeerInputs<'_>) -> Own {
    let (mut state, mut conflicts, mut devices) = (Routing::default(), vec![], vec![]);
    for (family, vtep) in inputs.vteps.iter() {
        let (Some(own), Some(_)) = (inputs.own.subnets().get(family), inputs.network.spaces.get(family)) else {
            continue;
        };
        let link = own_link(inputs.network, *vtep);
        match own_device(family, &link, inputs.have, inputs.foreign) {
            Ok(dev) => {
                let ipv6 = inputs.facts.ipv6 && link.mtu >= IPV6_MIN_MTU;
                own_entries(&mut state, ipv6, family, *own, &dev);
                state.links.insert(dev, link);
                devices.push((family, dev));
            }
            Err(conflict) => conflicts.push(conflict),
        }
    }
    let Routing { links, addresses, sysctls, .. } = state;
    Own { links, addresses, sysctls, devices: devices.into_iter().collect(), conflicts }
}

fn own_link(network: &NetworkConfig, vtep: Vtep) -> VxlanLink {
    let vxlan = &network.vxlan;
    VxlanLink {
        vni: vxlan.vni,
        port: vxlan.port,
        gbp: vxlan.gbp,
        mac: vtep.mac,
        local: vtep.local,
        mtu: vtep.mtu,
        learning: vxlan.learning,
        up: true,
    }
}

/// RFC 8200 section 5. A device with less has no IPv6, and none of its settings.
const IPV6_MIN_MTU: u32 = 1280;

fn own_entries(state: &mut Routing, ipv6: bool, family: Family, own: Subnet, dev: &IfName) {
    state.addresses.insert((*dev, Subnet::host(own.base())));
    if ipv6 {
        state.sysctls.insert(Sysctl::AcceptRa(*dev), 0);
    }
    if family == Family::V4 {
        // A peer with a route past the tunnel (DirectRouting, a flannel node) may send by it all the same.
        state.sysctls.insert(Sysctl::RpFilter(*dev), 2);
    }
    let forward = match family {
        Family::V4 => Sysctl::Ipv4Forward,
        Family::V6 => Sysctl::Ipv6Forward,
    };
    state.sysctls.insert(forward, 1);
}
