//! [`FakeKernel`]: a kernel in memory that behaves as Linux does where fabricd can tell the difference.
//!
//! [`Tables`] is what it holds, whoever made it, with the kernel's rules: what an entry needs to exist, and what goes
//! in silence when a link goes down, a link or a nexthop object is deleted. A test plays the other programs of the host
//! by [`FakeKernel::edit`], breaks writes by [`FakeKernel::fail`], and reads what was written from
//! [`FakeKernel::writes`]. The conformance suite keeps it honest: the same cases run on it and on the real kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fabric_core::derived::Dirty;
use fabric_core::device;
use fabric_core::diff::nft::{self, Transaction};
use fabric_core::diff::{Change, Key, Op, diff, fast_path, routing};
use fabric_core::firewall::Firewall;
use fabric_core::model::{Family, IfName, MacAddr, Subnet};
use fabric_core::plan::fast_path::Port;
use fabric_core::plan::passed_by::Shaping;
use fabric_core::state::fast_path::{FastPath, UnderlayPath};
use fabric_core::state::nft::FoundRuleset;
use fabric_core::state::{
    Foreign, ForeignLink, NEXTHOP_ID_BASE, Nexthop, NexthopId, ROUTE_PROTOCOL, Routing, Sysctl, Via, VxlanLink,
};
use fabricd::host::underlay::{DefaultRoute, Host, HostLink};
use fabricd::kernel::{FastPathFound, Kernel, KernelError, Observed, Touched};
use tokio::sync::Notify;

use crate::fake_filter as filter;

/// `RTPROT_STATIC`: what an administrator's `ip route add … proto static` has.
pub const STATIC: u8 = 4;

/// `RTPROT_BOOT`: what a route has that was made without naming a protocol, flannel's among them.
pub const BOOT: u8 = 3;

/// A link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index, never used again.
    pub index: u32,
    /// Type: `veth`, `vxlan`, …
    pub kind: String,
    /// MTU in bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// All of it when it is a VXLAN device.
    pub vxlan: Option<VxlanLink>,
}

/// Everything that the kernel holds, ours and others'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// Links by name.
    pub links: BTreeMap<IfName, Link>,
    /// Addresses with the prefix that they make reachable.
    pub addresses: BTreeSet<(IfName, IpAddr, Subnet)>,
    /// FDB entries of VXLAN devices.
    pub fdb: BTreeMap<(IfName, MacAddr), IpAddr>,
    /// Permanent neighbours.
    pub neighbours: BTreeMap<(IfName, IpAddr), MacAddr>,
    /// Nexthop objects with their protocol.
    pub nexthops: BTreeMap<NexthopId, (u8, Nexthop)>,
    /// Routes of the main table with our metric, with their protocol.
    pub routes: BTreeMap<Subnet, (u8, Via)>,
    /// Default routes.
    pub default_routes: Vec<DefaultRoute>,
    /// Answers to `--iface-can-reach`.
    pub reaches: Vec<(IpAddr, IfName, IpAddr)>,
    /// Settings.
    pub sysctls: BTreeMap<Sysctl, u32>,
    /// Firewall chains of others.
    pub firewall: Arc<Firewall>,
    /// Our tables of nftables.
    pub filter: FoundRuleset,
    /// The fast path.
    pub fast_path: FastPath,
    /// Ports of bridges.
    pub ports: BTreeMap<IfName, Port>,
    /// Why there can be no fast path.
    pub fast_path_trouble: Option<String>,
    /// What of others shapes packets.
    pub shaping: Shaping,
    /// Whether nexthop objects are unknown (a kernel before 5.3).
    pub without_nexthop_objects: bool,
    last_index: u32,
}

impl Tables {
    /// A host with one interface: `eth0`, up, with these addresses.
    #[must_use]
    pub fn host(addresses: &[(IpAddr, Subnet)]) -> Self {
        let mut tables = Self::default();
        let eth0: IfName = "eth0".parse().expect("valid");
        tables.add_link(eth0, "veth", 1500);
        tables.addresses = addresses.iter().map(|(ip, prefix)| (eth0, *ip, *prefix)).collect();
        tables.sysctls = [(Sysctl::Ipv4Forward, 0), (Sysctl::Ipv6Forward, 0)].into();
        tables
    }

    /// `ip link add NAME mtu MTU up type KIND`.
    pub fn add_link(&mut self, name: IfName, kind: &str, mtu: u32) {
        self.last_index += 1;
        self.links.insert(name, Link { index: self.last_index, kind: kind.into(), mtu, up: true, vxlan: None });
    }

    /// `ip link add NAME type vxlan …`.
    ///
    /// # Errors
    /// `EEXIST` when the name, or the VNI and port, are taken.
    pub fn add_vxlan(&mut self, name: IfName, vxlan: VxlanLink) -> Result<(), i32> {
        let same = |other: &VxlanLink| {
            (other.vni, other.port, Family::of(other.local)) == (vxlan.vni, vxlan.port, Family::of(vxlan.local))
        };
        if self.links.contains_key(&name) || self.links.values().filter_map(|l| l.vxlan.as_ref()).any(same) {
            return Err(libc::EEXIST);
        }
        self.add_link(name, "vxlan", vxlan.mtu);
        self.sysctls.extend([(Sysctl::AcceptRa(name), 1), (Sysctl::RpFilter(name), 0)]);
        let link = self.links.get_mut(&name).expect("just added");
        link.up = vxlan.up;
        link.vxlan = Some(vxlan);
        Ok(())
    }

    /// `ip link del DEV`: takes all that hangs on it along.
    pub fn delete_link(&mut self, dev: &IfName) {
        self.set_down(dev);
        let gone = self.links.remove(dev);
        self.ports.remove(dev);
        // With an interface go the links of programs at it.
        self.fast_path.links.retain(|place, _| gone.as_ref().is_none_or(|link| link.index != place.ifindex));
        self.addresses.retain(|(d, _, _)| d != dev);
        self.fdb.retain(|(d, _), _| d != dev);
        self.sysctls.retain(|sysctl, _| sysctl.device() != Some(*dev));
    }

    /// `ip link set DEV down`: routes, nexthop objects, permanent neighbours and IPv6 addresses go; FDB entries and
    /// IPv4 addresses stay.
    pub fn set_down(&mut self, dev: &IfName) {
        if let Some(link) = self.links.get_mut(dev) {
            link.up = false;
            if let Some(vxlan) = &mut link.vxlan {
                vxlan.up = false;
            }
        }
        self.addresses.retain(|(d, ip, _)| d != dev || ip.is_ipv4());
        self.neighbours.retain(|(d, _), _| d != dev);
        self.nexthops.retain(|_, (_, nexthop)| nexthop.dev != *dev);
        self.routes.retain(|_, (_, via)| !matches!(via, Via::Gateway(to) | Via::Direct(to) if to.dev == *dev));
        self.default_routes.retain(|route| route.dev != *dev);
        self.drop_routes_without_nexthop();
    }

    /// `ip nexthop del id ID`: takes the routes through it along.
    pub fn delete_nexthop(&mut self, id: NexthopId) {
        self.nexthops.remove(&id);
        self.drop_routes_without_nexthop();
    }

    fn drop_routes_without_nexthop(&mut self) {
        let nexthops = &self.nexthops;
        self.routes.retain(|_, (_, via)| !matches!(via, Via::Nexthop(id) if !nexthops.contains_key(id)));
    }

    /// A VXLAN device whose name says that it is ours.
    fn our_link(&self, dev: &IfName) -> Option<&VxlanLink> {
        self.links.get(dev)?.vxlan.as_ref().filter(|vxlan| device::is_ours(dev, vxlan.vni))
    }

    /// Routes with our metric that are not ours.
    fn routes_of_others(&self, which: impl Fn(&Subnet, &Via) -> bool) -> BTreeMap<Subnet, String> {
        let others = self.routes.iter().filter(|(dst, (protocol, via))| *protocol != ROUTE_PROTOCOL && which(dst, via));
        others.map(|(dst, (protocol, via))| (*dst, format!("{dst} {via:?} proto {protocol}"))).collect()
    }

    /// What flannel makes for a peer, over our own device.
    fn is_plain(&self, dst: &Subnet, via: &Via) -> bool {
        matches!(via, Via::Gateway(to) | Via::Direct(to) if to.gateway == dst.base() && self.our_link(&to.dev).is_some())
    }

    fn is_our_nexthop(&self, id: NexthopId, protocol: u8, nexthop: &Nexthop) -> bool {
        protocol == ROUTE_PROTOCOL && id.0 >= NEXTHOP_ID_BASE && self.our_link(&nexthop.dev).is_some()
    }

    /// A device that something can be led out of.
    fn usable(&self, dev: &IfName) -> Result<(), i32> {
        match self.links.get(dev) {
            None => Err(libc::ENODEV),
            Some(link) if !link.up => Err(libc::ENETDOWN),
            Some(_) => Ok(()),
        }
    }

    fn present(&self, dev: &IfName) -> Result<(), i32> {
        self.links.contains_key(dev).then_some(()).ok_or(libc::ENODEV)
    }

    fn check_route(&self, dst: Subnet, via: &Via) -> Result<(), i32> {
        match via {
            Via::Nexthop(id) => self.nexthops.contains_key(id).then_some(()).ok_or(libc::EINVAL),
            Via::Gateway(to) => self.usable(&to.dev),
            Via::Direct(to) => {
                self.usable(&to.dev)?;
                let on_link =
                    |(dev, _, prefix): &(IfName, IpAddr, Subnet)| *dev == to.dev && prefix.contains(to.gateway);
                let unreachable = if dst.family() == Family::V4 { libc::ENETUNREACH } else { libc::EHOSTUNREACH };
                self.addresses.iter().any(on_link).then_some(()).ok_or(unreachable)
            }
            Via::Other(_) => Err(libc::EINVAL),
        }
    }

    /// One write of the fast path, as the kernel takes it: maps before what is in them and before programs, programs before
    /// links, and these at interfaces that are there.
    fn write_fast_path(&mut self, op: &fast_path::Op) -> Result<(), i32> {
        use fast_path::Op;
        let has = |there: bool, errno| if there { Ok(()) } else { Err(errno) };
        match op {
            Op::Maps(_) | Op::Program(Change::Delete(_)) | Op::Link(_, Change::Delete(_)) => {}
            Op::Link(place, Change::Create(program) | Change::Replace { now: program, .. }) => {
                has(self.fast_path.programs.contains(program), libc::ENOENT)?;
                has(self.links.values().any(|link| link.index == place.ifindex), libc::ENODEV)?;
            }
            Op::Peer(..) | Op::Index(..) | Op::Address(..) => has(self.fast_path.node.is_some(), libc::EINVAL)?,
            Op::Node(_) | Op::Pod(..) | Op::Seed(_) | Op::Program(_) => {
                has(self.fast_path.maps.is_some(), libc::EINVAL)?;
            }
        }
        op.apply_to(&mut self.fast_path);
        Ok(())
    }

    /// The way to each underlay address: over the interface that has its prefix.
    fn paths(&self) -> BTreeMap<IpAddr, UnderlayPath> {
        let path = |ip: &IpAddr| {
            let (dev, ..) = self.addresses.iter().find(|(_, _, prefix)| prefix.contains(*ip))?;
            Some((*ip, UnderlayPath { ifindex: self.links.get(dev)?.index, gateway: *ip }))
        };
        self.fdb.values().filter_map(path).collect()
    }

    /// One write of routing, as the kernel takes it. Deleting what is gone is fine.
    fn write(&mut self, op: &routing::Op) -> Result<(), i32> {
        use routing::Op;
        match op {
            Op::Link(name, Change::Create(link)) => self.add_vxlan(*name, *link)?,
            Op::Link(name, Change::Replace { now, .. }) => {
                let was = *self.our_link(name).ok_or(libc::ENODEV)?;
                if !was.can_become(now) {
                    return Err(libc::EOPNOTSUPP);
                }
                if was.up && !now.up {
                    self.set_down(name);
                }
                if was.mac != now.mac {
                    self.neighbours.retain(|(dev, _), _| dev != name);
                }
                let link = self.links.get_mut(name).expect("just seen");
                (link.up, link.mtu, link.vxlan) = (now.up, now.mtu, Some(*now));
            }
            Op::Link(name, Change::Delete(_)) | Op::Outgrown(name, _) => {
                if self.our_link(name).is_some() {
                    self.delete_link(name);
                }
            }
            Op::Sysctl(setting, value) => {
                *self.sysctls.get_mut(setting).ok_or(libc::ENOENT)? = *value;
            }
            Op::Address(dev, Change::Create(address) | Change::Replace { now: address, .. }) => {
                self.present(dev)?;
                self.addresses.insert((*dev, address.base(), *address));
            }
            Op::Address(dev, Change::Delete(address)) => {
                self.addresses.remove(&(*dev, address.base(), *address));
            }
            Op::Fdb(dev, mac, Change::Create(dst) | Change::Replace { now: dst, .. }) => {
                self.present(dev)?;
                self.fdb.insert((*dev, *mac), *dst);
            }
            Op::Fdb(dev, mac, Change::Delete(_)) => {
                self.fdb.remove(&(*dev, *mac));
            }
            Op::Neighbour(dev, ip, Change::Create(mac) | Change::Replace { now: mac, .. }) => {
                self.present(dev)?;
                self.neighbours.insert((*dev, *ip), *mac);
            }
            Op::Neighbour(dev, ip, Change::Delete(_)) => {
                self.neighbours.remove(&(*dev, *ip));
            }
            Op::Nexthop(..) if self.without_nexthop_objects => return Err(libc::EOPNOTSUPP),
            Op::Nexthop(id, Change::Create(to)) => {
                self.usable(&to.dev)?;
                if self.nexthops.contains_key(id) {
                    return Err(libc::EEXIST);
                }
                self.nexthops.insert(*id, (ROUTE_PROTOCOL, *to));
            }
            Op::Nexthop(id, Change::Replace { now: to, .. }) => {
                self.usable(&to.dev)?;
                self.nexthops.insert(*id, (ROUTE_PROTOCOL, *to));
            }
            Op::Nexthop(id, Change::Delete(_)) => self.delete_nexthop(*id),
            Op::Route(dst, Change::Create(via)) => {
                self.check_route(*dst, via)?;
                if self.routes.contains_key(dst) {
                    return Err(libc::EEXIST);
                }
                self.routes.insert(*dst, (ROUTE_PROTOCOL, via.clone()));
            }
            Op::Route(dst, Change::Replace { now: via, .. }) => {
                self.check_route(*dst, via)?;
                self.routes.insert(*dst, (ROUTE_PROTOCOL, via.clone()));
            }
            Op::Route(dst, Change::Delete(via)) => {
                if self.routes.get(dst) == Some(&(ROUTE_PROTOCOL, via.clone())) {
                    self.routes.remove(dst);
                }
            }
        }
        Ok(())
    }

    /// What an observer sees of it.
    #[must_use]
    pub fn observed(&self) -> Observed {
        let ours = |dev: &IfName| self.our_link(dev).is_some();
        let others = || self.links.iter().filter(|(name, _)| !ours(name));
        Observed {
            ours: Routing {
                links: self.links.keys().filter_map(|dev| Some((*dev, *self.our_link(dev)?))).collect(),
                addresses: self
                    .addresses
                    .iter()
                    .filter(|(dev, ip, prefix)| ours(dev) && *ip == prefix.base())
                    .map(|(dev, _, prefix)| (*dev, *prefix))
                    .collect(),
                fdb: self.fdb.iter().filter(|((dev, _), _)| ours(dev)).map(|(k, v)| (*k, *v)).collect(),
                neighbours: self.neighbours.iter().filter(|((dev, _), _)| ours(dev)).map(|(k, v)| (*k, *v)).collect(),
                nexthops: self
                    .nexthops
                    .iter()
                    .filter(|(id, (protocol, nexthop))| self.is_our_nexthop(**id, *protocol, nexthop))
                    .map(|(id, (_, nexthop))| (*id, *nexthop))
                    .collect(),
                routes: self
                    .routes
                    .iter()
                    .filter(|(_, (protocol, _))| *protocol == ROUTE_PROTOCOL)
                    .map(|(dst, (_, via))| (*dst, via.clone()))
                    .collect(),
                sysctls: self
                    .sysctls
                    .iter()
                    .filter(|(setting, _)| setting.device().is_none_or(|dev| ours(&dev)))
                    .map(|(setting, value)| (*setting, *value))
                    .collect(),
            },
            foreign: Foreign {
                nexthop_ids: self
                    .nexthops
                    .iter()
                    .filter(|(id, (protocol, nexthop))| !self.is_our_nexthop(**id, *protocol, nexthop))
                    .map(|(id, _)| *id)
                    .collect(),
                routes: self.routes_of_others(|dst, via| !self.is_plain(dst, via)),
                plain: self.routes_of_others(|dst, via| self.is_plain(dst, via)),
                direct: self
                    .routes
                    .iter()
                    .filter(|(dst, (protocol, via))| *protocol == BOOT && !self.is_plain(dst, via))
                    .filter_map(|(dst, (_, via))| match via {
                        Via::Direct(to) if self.our_link(&to.dev).is_none() => Some((*dst, to.gateway)),
                        _ => None,
                    })
                    .collect(),
                links: others()
                    .map(|(name, link)| {
                        let vxlan = link.vxlan.as_ref().map(|v| (v.vni.get(), v.port, Family::of(v.local)));
                        (*name, ForeignLink { kind: link.kind.clone(), vxlan })
                    })
                    .collect(),
            },
            host: Host {
                links: others()
                    .map(|(name, link)| HostLink {
                        index: link.index,
                        name: *name,
                        mtu: link.mtu,
                        up: link.up,
                        loopback: name.as_str() == "lo",
                        addresses: self
                            .addresses
                            .iter()
                            .filter(|(dev, _, _)| dev == name)
                            .map(|(_, ip, prefix)| (*ip, *prefix))
                            .collect(),
                        passing: vec![],
                    })
                    .collect(),
                default_routes: self.default_routes.clone(),
                reaches: self.reaches.clone(),
            },
            nexthop_objects: !self.without_nexthop_objects,
            firewall: Arc::clone(&self.firewall),
            filter: self.filter.clone(),
            dropped: BTreeMap::new(),
            docker_user: vec![],
            hazards: vec![],
            bridges: BTreeMap::new(),
            tracked: false,
            fast_path: FastPathFound {
                state: Arc::new(self.fast_path.clone()),
                trouble: self.fast_path_trouble.clone(),
                paths: self.paths(),
                ports: self.ports.clone(),
                devices: self.links.iter().map(|(name, link)| (*name, link.index)).collect(),
                shaping: self.shaping.clone(),
                counts: BTreeMap::new(),
            },
        }
    }
}

/// One write that was asked for, and what came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    /// The step.
    pub op: Op,
    /// The errno when it was refused.
    pub result: Result<(), i32>,
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.result {
            Ok(()) => self.op.fmt(f),
            Err(errno) => write!(f, "{}: {}", self.op, io::Error::from_raw_os_error(errno)),
        }
    }
}

type Matches = Box<dyn FnMut(&Op) -> bool + Send>;

#[derive(Default)]
struct State {
    tables: Tables,
    writes: Vec<Write>,
    faults: Vec<(Matches, i32)>,
    unreadable: Option<i32>,
    observed: Arc<Observed>,
    touched: Dirty<Key>,
    stale: bool,
    overrun: bool,
    muted: bool,
    stalled: bool,
}

/// A kernel in memory. Clones are handles of the same one: the daemon gets one, the test keeps another.
#[derive(Clone)]
pub struct FakeKernel {
    state: Arc<Mutex<State>>,
    woken: Arc<Notify>,
    resumed: Arc<Notify>,
}

impl FakeKernel {
    /// A kernel that holds this.
    #[must_use]
    pub fn new(tables: Tables) -> Self {
        let state = State { tables, stale: true, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), woken: Arc::new(Notify::new()), resumed: Arc::default() }
    }

    /// What it holds now.
    #[must_use]
    pub fn tables(&self) -> Tables {
        self.state().tables.clone()
    }

    /// Another program of the host changes something.
    pub fn edit(&self, change: impl FnOnce(&mut Tables)) {
        let mut state = self.state();
        change(&mut state.tables);
        self.announce(&mut state);
    }

    /// Every write asked for since the last call, in order.
    #[must_use]
    pub fn writes(&self) -> Vec<Write> {
        std::mem::take(&mut self.state().writes)
    }

    /// From now on writes for which `matches` says so fail with `errno`, those of the packet filter with all of their
    /// transaction. It is asked once for each write, so that it can count: `move |_| { n += 1; n == 3 }`.
    pub fn fail(&self, errno: i32, matches: impl FnMut(&Op) -> bool + Send + 'static) {
        self.state().faults.push((Box::new(matches), errno));
    }

    /// From now on nothing can be read (`Some`), or all can be again (`None`).
    pub fn fail_reads(&self, errno: Option<i32>) {
        self.state().unreadable = errno;
    }

    /// From now on no write is answered (`true`), or all are again (`false`), those that wait included.
    pub fn stall(&self, stalled: bool) {
        self.state().stalled = stalled;
        self.resumed.notify_one();
    }

    /// Takes all faults away.
    pub fn heal(&self) {
        let mut state = self.state();
        state.faults.clear();
        state.unreadable = None;
    }

    /// Changes go unannounced from now on: neither does `changed` wake nor `observe` show them.
    pub fn lose_notifications(&self) {
        self.state().muted = true;
    }

    /// The monitor learns that notifications were lost, and hears again from now on.
    pub fn overrun(&self) {
        let mut state = self.state();
        state.muted = false;
        state.overrun = true;
        self.announce(&mut state);
    }

    fn announce(&self, state: &mut State) {
        if !state.muted {
            state.stale = true;
            self.woken.notify_one();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kernel for FakeKernel {
    async fn observe(&mut self) -> Result<Arc<Observed>, KernelError> {
        let mut state = self.state();
        if let Some(errno) = state.unreadable {
            return Err(KernelError::Dump { table: "tables", source: io::Error::from_raw_os_error(errno) });
        }
        state.overrun = false;
        if std::mem::take(&mut state.stale) {
            let now = state.tables.observed();
            let touched = touched(&state.observed.ours, &now.ours);
            state.touched.extend(touched);
            state.observed = Arc::new(now);
        }
        Ok(Arc::clone(&state.observed))
    }

    fn touched(&mut self) -> Dirty<Key> {
        std::mem::take(&mut self.state().touched)
    }

    async fn apply(&mut self, ops: &[Op]) -> Vec<Result<(), KernelError>> {
        while self.state().stalled {
            self.resumed.notified().await;
        }
        let mut state = self.state();
        // Each fault is asked, so that each counts every write.
        let mut refused_by_fault = |op: &Op| {
            let faults = state.faults.iter_mut().filter_map(|(hits, errno)| hits(op).then_some(*errno));
            faults.collect::<Vec<i32>>().first().map_or(Ok(()), |errno| Err(*errno))
        };
        let mut results: Vec<Result<(), i32>> = ops.iter().map(&mut refused_by_fault).collect();
        let mut transactions: BTreeMap<Transaction, Vec<(usize, &nft::Op)>> = BTreeMap::new();
        for (at, op) in ops.iter().enumerate() {
            match op {
                Op::Routing(op) => {
                    results[at] = results[at].and_then(|()| state.tables.write(op));
                    if results[at].is_ok() {
                        self.announce(&mut state);
                    }
                }
                Op::Filter(op) => transactions.entry(op.transaction()).or_default().push((at, op)),
                Op::FastPath(op) => {
                    results[at] = results[at].and_then(|()| state.tables.write_fast_path(op));
                    if results[at].is_ok() {
                        self.announce(&mut state);
                    }
                }
            }
        }
        for steps in transactions.values() {
            let fault = steps.iter().find_map(|(at, _)| results[*at].err());
            let steps_alone: Vec<&nft::Op> = steps.iter().map(|(_, op)| *op).collect();
            let result = fault.map_or_else(|| filter::write(&mut state.tables.filter, &steps_alone), Err);
            steps.iter().for_each(|(at, _)| results[*at] = result);
        }
        // As with the real one, our own writes of the packet filter wake nobody.
        if !transactions.is_empty() {
            let filter = state.tables.filter.clone();
            Arc::make_mut(&mut state.observed).filter = filter;
        }
        state.writes.extend(ops.iter().zip(&results).map(|(op, result)| Write { op: op.clone(), result: *result }));
        let refusal = |(op, errno)| KernelError::of_op(op, io::Error::from_raw_os_error(errno), None);
        ops.iter().zip(results).map(|(op, result)| result.map_err(|errno| refusal((op, errno)))).collect()
    }

    async fn changed(&mut self) -> Touched {
        loop {
            {
                let state = self.state();
                if state.overrun {
                    return Touched::Everything;
                } else if state.stale {
                    return Touched::State;
                }
            }
            self.woken.notified().await;
        }
    }

    fn audit(&mut self) {
        let mut state = self.state();
        state.stale = true;
        self.woken.notify_one();
    }
}

/// The entries that differ, as the real one hears of them.
fn touched(was: &Routing, now: &Routing) -> Dirty<Key> {
    let own = |state: &Routing| (state.links.clone(), state.addresses.clone(), state.sysctls.clone());
    match own(was) == own(now) {
        true => Dirty::Keys(diff(now, was).ops().iter().map(Op::key).collect()),
        false => Dirty::Everything,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(value: u32) -> Op {
        routing::Op::Sysctl(Sysctl::Ipv4Forward, value).into()
    }

    #[tokio::test]
    async fn nth_write_fails_and_all_are_recorded() {
        let mut kernel = FakeKernel::new(Tables::host(&[]));
        let mut writes = 0;
        kernel.fail(libc::ENOBUFS, move |_| {
            writes += 1;
            writes == 2
        });
        let results = kernel.apply(&[forward(1), forward(2), forward(3)]).await;
        assert_eq!(results.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!(kernel.tables().sysctls[&Sysctl::Ipv4Forward], 3);
        let written: Vec<_> = kernel.writes().into_iter().map(|write| write.result).collect();
        assert_eq!(written, [Ok(()), Err(libc::ENOBUFS), Ok(())]);
    }

    #[tokio::test]
    async fn change_whose_notification_is_lost_shows_after_the_overrun() {
        let mut kernel = FakeKernel::new(Tables::host(&[]));
        let before = kernel.observe().await.expect("readable");
        kernel.lose_notifications();
        kernel.edit(|tables| tables.links.clear());
        assert_eq!(kernel.observe().await.expect("readable"), before);
        kernel.overrun();
        assert_eq!(kernel.changed().await, Touched::Everything);
        assert!(kernel.observe().await.expect("readable").host.links.is_empty());
    }
}
