//! The mirror: what the kernel holds, as it was last read and as has been heard since.
//!
//! A table is read by a dump, and then kept by its events. An event that came while its table was read says again what
//! the dump has shown or says what came after it, so all events are taken over, in their order.
//!
//! What the kernel does *not* say matters as much. A device that is deleted or set down takes IPv4 routes and nexthop
//! objects along without a word, a deleted nexthop object its routes, a deleted address the routes that used it: what
//! went with a nexthop object is known and taken out here; any other such event makes every table stale that may have
//! shrunk in silence, and a stale table is read anew at the next look.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::derived::Dirty;
use fabric_core::diff::{Key, nft};
use fabric_core::model::{Family, IfName, MacAddr, Subnet};
use fabric_core::plan::fast_path::Port;
use fabric_core::state::fast_path::UnderlayPath;
use fabric_core::state::nft::TableKey;
use fabric_core::state::{Foreign, ForeignLink, NexthopId, Routing, Sysctl, Via};
use fabric_netlink::RequestSocket;

use super::fast_path::{Bpf, shaping};
use super::firewalls::{self, bridge_nf};
use super::links::{bridges, host_link};
use super::monitor::{Event, Interest, Table};
use super::nft::Filter;
use super::routing::routes;
use super::routing::tables::{self, Address, EntryRow, Link, Links};
use super::{KernelError, Observed, Options, sysctl};

/// What the kernel holds.
#[derive(Default)]
pub(super) struct Mirror {
    /// What a look shows. The tables of thousands are kept here and nowhere else.
    observed: Arc<Observed>,
    links: Links,
    addresses: Vec<Address>,
    /// Indexes of the links that routes of others lead out of.
    carriers: Vec<u32>,
    /// Tables to be read anew.
    stale: BTreeSet<Table>,
    /// What may have changed of ours since that was asked last.
    touched: Dirty<Key>,
    /// Nexthop objects whose routes the kernel has removed in silence.
    gone: BTreeSet<NexthopId>,
    /// FDB entries that we deleted ourselves since the last look.
    deleted: BTreeSet<(IfName, MacAddr)>,
    /// What was written to our tables of nftables since the last look.
    written: Vec<nft::Op>,
    /// Reads the chains of others.
    firewalls: firewalls::Reader,
    /// Reads what of others shapes packets.
    shaping: shaping::Reader,
    /// Why the chains of others can't be read.
    firewalls_unread: Option<String>,
    /// The way to each underlay address that was asked for; `None` where programs know none.
    paths: BTreeMap<IpAddr, Option<UnderlayPath>>,
}

impl Mirror {
    /// Takes over what was heard, reads what is stale, and shows the whole.
    ///
    /// # Errors
    /// When a table can't be read; it stays stale.
    pub(super) fn look(
        &mut self,
        (events, stale): (Vec<Event>, BTreeSet<Table>),
        socket: &mut RequestSocket,
        filter: &mut Filter,
        bpf: &mut Bpf,
        options: &Options,
    ) -> Result<Arc<Observed>, KernelError> {
        self.stale.extend(stale);
        for op in std::mem::take(&mut self.written) {
            op.apply_to(&mut Arc::make_mut(&mut self.observed).filter);
        }
        for event in events {
            self.hear(event);
        }
        // Each of them has been heard of by now, unless the device went at the same time.
        self.deleted.clear();
        self.drop_routes_of_gone_nexthops();
        if !self.stale.is_empty() {
            self.read(socket, filter, options)?;
        }
        self.look_at_fast_path(socket, bpf, options);
        self.stale.clear();
        Ok(Arc::clone(&self.observed))
    }

    /// What of the fast path is there, and what it depends on.
    fn look_at_fast_path(&mut self, socket: &mut RequestSocket, bpf: &mut Bpf, options: &Options) {
        // Filters of ours that came or went; a link does so unheard.
        let shaping =
            options.fast_path && [Table::Links, Table::Shaping].iter().any(|table| self.stale.contains(table));
        if shaping && self.shaping.read(socket, &self.links) {
            bpf.distrust();
        }
        if self.stale.contains(&Table::FastPath) {
            bpf.distrust();
            // Marks that are a little old cost speed alone.
            if let Err(error) = bpf.renew_guard() {
                tracing::warn!(%error, "cannot renew the NAT guard of the fast path");
            }
        }
        let state = bpf.look();
        let trouble = if options.fast_path { bpf.trouble() } else { None };
        if [Table::Links, Table::Addresses, Table::HostRoutes].iter().any(|table| self.stale.contains(table)) {
            self.paths.clear();
        }
        let counts = self
            .stale
            .contains(&Table::Sysctls)
            .then(|| (bpf.counts().unwrap_or_default(), bpf.traffic().unwrap_or_default()));
        let mut paths = BTreeMap::new();
        if options.fast_path {
            let locals = self.observed.ours.links.values().map(|link| (Family::of(link.local), link.local));
            let locals: BTreeMap<Family, IpAddr> = locals.collect();
            for ip in self.observed.ours.fdb.values() {
                let ask = || routes::path(socket, &self.links, *ip, locals.get(&Family::of(*ip)).copied());
                paths.extend(self.paths.entry(*ip).or_insert_with(ask).map(|path| (*ip, path)));
            }
        }
        self.paths.retain(|ip, path| path.is_none() || paths.contains_key(ip));
        let ports = self.stale.contains(&Table::Links).then(|| ports(&self.links));
        let devices = our_names(&self.links).into_iter().map(|(index, name)| (name, index)).collect();
        let mut shaping = self.shaping.found().clone();
        shaping.unread = shaping.unread.or_else(|| self.firewalls_unread.clone());
        let known = &self.observed.fast_path;
        let same = known.state == state
            && known.trouble == trouble
            && known.paths == paths
            && known.shaping == shaping
            && known.devices == devices;
        if !same || counts.is_some() || ports.is_some() {
            let found = &mut Arc::make_mut(&mut self.observed).fast_path;
            (found.state, found.trouble, found.paths, found.shaping) = (state, trouble, paths, shaping);
            (found.devices, found.by_filters) = (devices, bpf.by_filters());
            if let Some((counts, traffic)) = counts {
                (found.counts, found.traffic) = (counts, Arc::new(traffic));
            }
            found.ports = ports.unwrap_or_else(|| std::mem::take(&mut found.ports));
        }
    }

    /// What may have changed of ours since this was asked last.
    pub(super) fn touched(&mut self) -> Dirty<Key> {
        std::mem::take(&mut self.touched)
    }

    /// Takes note of what we wrote ourselves to our tables of nftables: it needn't be read again. The next look takes it
    /// over, since whoever looks at the last one still holds it, and to change it now would be to copy all of it.
    pub(super) fn wrote(&mut self, ops: impl Iterator<Item = nft::Op>) {
        self.written.extend(ops);
    }

    /// Has the next look read these anew. Nobody is woken for it.
    pub(super) fn distrust(&mut self, tables: &[Table]) {
        self.stale.extend(tables);
    }

    /// Takes note that we deleted an FDB entry ourselves: that it goes doesn't mean that its device does.
    pub(super) fn deleted(&mut self, dev: IfName, mac: MacAddr) {
        self.deleted.insert((dev, mac));
    }

    /// What to listen to from now on.
    pub(super) fn interest(&self, options: &Options) -> Interest {
        let ours = self.links.values().filter(|link| link.ours.is_some()).map(|link| link.index).collect();
        Interest { ours, every_route: options.fast_path || !options.can_reach.is_empty(), shaping: options.fast_path }
    }

    /// The tunnel interfaces of others that use this UDP port, each with what it is. One that doesn't tell its port, as
    /// all but VXLAN's, is not among them.
    pub(super) fn on_port(&self, port: u16) -> Vec<(String, String)> {
        let others = self.links.values().filter(|link| link.ours.is_none() && link.up);
        let on_port = others.filter(|link| link.vxlan.is_some_and(|(_, other, _)| other == port));
        let what = |vni| if vni == 0 { "vxlan, external".to_owned() } else { format!("vxlan with VNI {vni}") };
        on_port.map(|link| (link.name.to_string(), what(link.vxlan.map_or(0, |(vni, ..)| vni)))).collect()
    }

    fn hear(&mut self, event: Event) {
        use Table::{Addresses, HostRoutes, Links, Routes, Sysctls};
        let is_ours = |index| self.links.get(&index).is_some_and(|link| link.ours.is_some());
        match event {
            // Down or gone, it took routes, nexthop objects and neighbours along; up again, it may have got some.
            Event::Link(index) if is_ours(index) => self.stale.extend(Table::ON_OUR_DEVICES),
            Event::Link(index) if self.carries(index) => self.stale.extend([Links, Addresses, Routes, HostRoutes]),
            Event::Link(_) => self.stale.extend([Links]),
            // With the last address of a link go its routes, with any address those that have it as their source.
            Event::Address(index) if is_ours(index) || self.carries(index) => {
                self.stale.extend([Addresses, Routes, HostRoutes]);
            }
            Event::Address(_) => self.stale.extend([Addresses, HostRoutes]),
            Event::Entry(entry) => {
                let Some(link) = self.links.get(&entry.index).filter(|link| link.ours.is_some()) else { return };
                let ours = &mut Arc::make_mut(&mut self.observed).ours;
                self.touched.add(match entry.row {
                    EntryRow::Fdb(mac, _) => Key::Fdb(link.name, mac),
                    EntryRow::Neighbour(ip, _) => Key::Neighbour(link.name, ip),
                });
                match entry.row {
                    EntryRow::Fdb(mac, Some(dst)) => drop(ours.fdb.insert((link.name, mac), dst)),
                    EntryRow::Fdb(mac, None) => {
                        ours.fdb.remove(&(link.name, mac));
                        // It may go with its device, whose own end is told last; until then all writes wait for that.
                        if !self.deleted.remove(&(link.name, mac)) {
                            self.stale.extend([Links]);
                        }
                    }
                    EntryRow::Neighbour(ip, Some(mac)) => drop(ours.neighbours.insert((link.name, ip), mac)),
                    EntryRow::Neighbour(ip, None) => drop(ours.neighbours.remove(&(link.name, ip))),
                }
            }
            Event::Route(row) => {
                self.drop_routes_of_gone_nexthops();
                let observed = Arc::make_mut(&mut self.observed);
                // It may have taken the place of somebody's.
                let Foreign { routes, plain, .. } = &observed.foreign;
                if routes.contains_key(&row.dst) || plain.contains_key(&row.dst) {
                    self.stale.extend([HostRoutes]);
                }
                self.touched.add(Key::Route(row.dst));
                match row.target {
                    Some(target) => drop(observed.ours.routes.insert(row.dst, target.via(row.dst, &self.links))),
                    None => drop(observed.ours.routes.remove(&row.dst)),
                }
            }
            // One of others may have taken the place of ours.
            Event::HostRoute(Some(dst)) if self.observed.ours.routes.contains_key(&dst) => {
                self.stale.extend([Routes, HostRoutes]);
            }
            Event::HostRoute(_) | Event::AnyRoute => self.stale.extend([HostRoutes]),
            Event::Nexthop(row) => {
                self.touched.add(Key::Nexthop(row.id));
                let observed = Arc::make_mut(&mut self.observed);
                match tables::nexthop_of(&row, &self.links) {
                    Some(nexthop) => {
                        observed.foreign.nexthop_ids.remove(&row.id);
                        observed.ours.nexthops.insert(row.id, nexthop);
                    }
                    None => {
                        observed.ours.nexthops.remove(&row.id);
                        observed.foreign.nexthop_ids.insert(row.id);
                    }
                }
            }
            Event::NexthopGone(row) => {
                self.touched.add(Key::Nexthop(row.id));
                let observed = Arc::make_mut(&mut self.observed);
                if observed.ours.nexthops.remove(&row.id).is_none() {
                    observed.foreign.nexthop_ids.remove(&row.id);
                    self.stale.extend([HostRoutes]);
                }
                self.gone.insert(row.id);
            }
            Event::Qdisc => self.stale.extend([Table::Shaping]),
            Event::Forwarding => self.stale.extend([Sysctls]),
            Event::Unknown => self.stale.extend(Table::ON_OUR_DEVICES),
        }
    }

    /// Once for many: each goes through all routes.
    fn drop_routes_of_gone_nexthops(&mut self) {
        let gone = std::mem::take(&mut self.gone);
        let lost = |via: &Via| matches!(via, Via::Nexthop(id) if gone.contains(id));
        if gone.is_empty() {
            return;
        }
        let routes = self.observed.ours.routes.iter();
        let lost: Vec<Subnet> = routes.filter(|(_, via)| lost(via)).map(|(dst, _)| *dst).collect();
        for dst in lost {
            self.touched.add(Key::Route(dst));
            Arc::make_mut(&mut self.observed).ours.routes.remove(&dst);
        }
    }

    /// True for a link whose loss costs routes.
    fn carries(&self, index: u32) -> bool {
        let direct = |name: &IfName| {
            self.observed.ours.routes.values().any(|via| matches!(via, Via::Direct(to) if to.dev == *name))
        };
        self.carriers.contains(&index) || self.links.get(&index).is_none_or(|link| direct(&link.name))
    }

    /// How long it took to read the firewall chains of others the last time.
    pub(super) fn firewalls_took(&self) -> Duration {
        self.firewalls.took()
    }

    /// Reads what is stale.
    fn read(&mut self, socket: &mut RequestSocket, filter: &mut Filter, options: &Options) -> Result<(), KernelError> {
        let Self { observed, stale, firewalls, firewalls_unread, touched, .. } = self;
        if stale.contains(&Table::Links) {
            let links = tables::links(socket)?;
            // Whatever was said about a device before it was known to be ours has been passed over.
            if our_names(&links) != our_names(&self.links) {
                stale.extend(Table::ON_OUR_DEVICES);
            }
            self.links = links;
        }
        let observed = Arc::make_mut(observed);
        let before = own_part(&observed.ours);
        let ours: Vec<&Link> = self.links.values().filter(|link| link.ours.is_some()).collect();
        if stale.contains(&Table::Addresses) {
            self.addresses = tables::addresses(socket)?;
        }
        if stale.contains(&Table::Fdb) {
            take_over(touched, &mut observed.ours.fdb, tables::fdb(socket, &ours)?);
        }
        if stale.contains(&Table::Neighbours) {
            take_over(touched, &mut observed.ours.neighbours, tables::neighbours(socket, &ours)?);
        }
        if stale.contains(&Table::Nexthops) {
            let found = tables::nexthops(socket, &self.links)?;
            observed.nexthop_objects = found.is_some();
            let found = found.unwrap_or_default();
            take_over(touched, &mut observed.ours.nexthops, found.ours);
            observed.foreign.nexthop_ids = found.foreign;
        }
        if stale.contains(&Table::Routes) && !stale.contains(&Table::HostRoutes) {
            take_over(touched, &mut observed.ours.routes, routes::ours(socket, &self.links)?);
        }
        if stale.contains(&Table::HostRoutes) {
            let (ours, found) = routes::all(socket, &self.links)?;
            take_over(touched, &mut observed.ours.routes, ours);
            (observed.foreign.routes, observed.foreign.plain) = (found.beside_ours, found.plain);
            observed.foreign.direct = found.direct;
            observed.host.default_routes = found.defaults;
            self.carriers = found.devices;
        }
        if [Table::Links, Table::Addresses, Table::HostRoutes].iter().any(|table| stale.contains(table)) {
            observed.host.reaches.clear();
            for ip in &options.can_reach {
                let way = routes::reach(socket, &self.links, *ip);
                observed.host.reaches.extend(way.map(|(dev, source): (IfName, IpAddr)| (*ip, dev, source)));
            }
            observed.ours.links = self.links.values().filter_map(|link| Some((link.name, link.ours?))).collect();
            observed.ours.addresses = addresses_of(&ours, &self.addresses);
            observed.bridges = bridges(&self.links);
            let others = || self.links.values().filter(|link| link.ours.is_none());
            observed.host.links = others().map(|link| host_link(link, &self.addresses)).collect();
            observed.foreign.links =
                others().map(|l| (l.name, ForeignLink { kind: l.kind.clone(), vxlan: l.vxlan })).collect();
        }
        if stale.contains(&Table::Sysctls) {
            // For good: rules that come and go with a connection would be worse than one that costs a little.
            observed.tracked |= sysctl::tracks_connections(&options.sysctl_root);
            let wanted = [Sysctl::Ipv4Forward, Sysctl::Ipv6Forward]
                .into_iter()
                .chain(ours.iter().flat_map(|link| [Sysctl::AcceptRa(link.name), Sysctl::RpFilter(link.name)]));
            observed.ours.sysctls.clear();
            for setting in wanted {
                let value = sysctl::read(&options.sysctl_root, &setting).map_err(tables::reading("settings"))?;
                observed.ours.sysctls.extend(value.map(|value| (setting, value)));
            }
        }
        if stale.contains(&Table::Firewalls) {
            // A diagnosis: that it can't be made is no reason to do nothing.
            match firewalls.read() {
                Ok(found) => (observed.firewall, *firewalls_unread) = (found, None),
                Err(error) => {
                    tracing::warn!(%error, "cannot read the firewall chains of others");
                    *firewalls_unread = Some(format!("the firewall chains of others can't be read: {error}"));
                }
            }
            let others = filter.others().map_err(tables::reading("nftables"))?;
            observed.docker_user.clone_from(&others.docker_user);
            observed.hazards = if others.kube_proxy { bridge_nf::lacking(&options.sysctl_root) } else { vec![] };
        }
        let is_ours = |table: &TableKey| !options.services_apart || *table != TableKey::Services;
        let stale_tables = TableKey::ALL.into_iter().filter(|table| stale.contains(&Table::Rules(*table)));
        for table in stale_tables.filter(is_ours) {
            match filter.read(table).map_err(tables::reading("nftables"))? {
                Some(Some(mut found)) => {
                    observed.filter.get(&table).into_iter().for_each(|known| found.share(known));
                    observed.filter.insert(table, found);
                }
                Some(None) => drop(observed.filter.remove(&table)),
                None => {}
            }
            observed.dropped = filter.dropped();
        }
        // With a device may have come and gone what hangs on it.
        if own_part(&observed.ours) != before {
            *touched = Dirty::Everything;
        }
        Ok(())
    }
}

/// What a node has for itself, without peers: a few entries.
fn own_part(ours: &Routing) -> Routing {
    let Routing { links, addresses, sysctls, .. } = ours;
    Routing { links: links.clone(), addresses: addresses.clone(), sysctls: sysctls.clone(), ..Routing::default() }
}

/// Puts what was read in the place of what is known, unless it says the same: then nothing of thousands is made anew.
fn take_over<K: Ord, V: PartialEq>(touched: &mut Dirty<Key>, known: &mut BTreeMap<K, V>, read: Vec<(K, V)>) {
    if known.len() != read.len() || read.iter().any(|(key, value)| known.get(key) != Some(value)) {
        *known = read.into_iter().collect();
        *touched = Dirty::Everything;
    }
}

/// The ports of bridges, as the fast path needs them.
fn ports(links: &Links) -> BTreeMap<IfName, Port> {
    let port = |port: &Link| {
        let bridge_mac = links.get(&port.controller?).filter(|bridge| bridge.kind == "bridge")?.mac?;
        Some((port.name, Port { ifindex: port.index, mtu: port.mtu, bridge_mac }))
    };
    links.values().filter_map(port).collect()
}

fn our_names(links: &Links) -> Vec<(u32, IfName)> {
    links.values().filter(|link| link.ours.is_some()).map(|link| (link.index, link.name)).collect()
}

/// Ours are the first address of what they span; another is somebody's who put it there.
fn addresses_of(devices: &[&Link], addresses: &[Address]) -> BTreeSet<(IfName, Subnet)> {
    let ours = |address: &Address| {
        let device = devices.iter().find(|device| device.index == address.index)?;
        let subnet = Subnet::holding(address.ip, address.prefix.prefix_len()).ok()?;
        (subnet.base() == address.ip).then_some((device.name, subnet))
    };
    addresses.iter().filter_map(ours).collect()
}
