//! The monitor: listens to what the kernel says about itself, and keeps it until the next look.
//!
//! Most events carry a row: that of an FDB entry, neighbour, route or nexthop object which came, changed or went. The
//! [`Mirror`](super::mirror::Mirror) takes it over, so that one change never costs a table of thousands. What an event
//! can't tell in full (a link, an address) names tables that are *stale*, to be read again.
//!
//! A node's pods make many events that are none of our business. [`Interest`] tells the links that matter; it is
//! known after a look at the kernel. While a look is under way everything matters, since what the look will find is
//! not known yet.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use fabric_core::state::nft::TableKey;
use fabric_netlink::{Frame, RECEIVE, attribute, frames, grow_receive_buffer, is_overrun, receive};
use futures::FutureExt as _;
use netlink_packet_core::parse_i32;
use netlink_packet_route::address::{AddressHeader, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, TokioSocket};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::Touched;
use super::routing::nexthop::{self, NexthopRow, RTM_DELNEXTHOP, RTM_NEWNEXTHOP};
use super::routing::route_message;
use super::routing::routes::{self, RouteRow};
use super::routing::tables::{self, Entry};

/// Room for the events of a burst: some 20,000.
const RECEIVE_BUFFER: usize = 8 << 20;
/// More events than this are not kept: reading everything again costs less.
const QUEUE: usize = 100_000;

const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
/// Classes and actions of queueing disciplines, and chains of filters.
const RTM_BELOW_QDISC: [std::ops::RangeInclusive<u16>; 2] = [40..=50, 100..=102];
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;
/// `NETCONFA_IFINDEX` and its value for the whole host.
const NETCONF_INDEX: u16 = 1;
const NETCONF_ALL: i32 = -1;

/// What we listen to (`RTNLGRP_*`, linux/rtnetlink.h): links, neighbours and FDB, queueing disciplines, addresses, routes,
/// settings, nexthops.
const GROUPS: [u32; 10] = [1, 3, 4, 5, 7, 9, 11, 24, 25, NEXTHOP_GROUP];
/// Only from kernel 5.3 on.
const NEXTHOP_GROUP: u32 = 32;

/// What is read from the kernel in one go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    Links,
    Addresses,
    Fdb,
    Neighbours,
    Nexthops,
    Routes,
    HostRoutes,
    Sysctls,
    Firewalls,
    /// One of our tables of nftables.
    Rules(TableKey),
    /// Maps, programs and links of eBPF.
    FastPath,
    /// Queueing disciplines and IPsec policies.
    Shaping,
}

impl Table {
    pub(super) const ALL: [Self; 16] = [
        Self::Links,
        Self::Addresses,
        Self::Fdb,
        Self::Neighbours,
        Self::Nexthops,
        Self::Routes,
        Self::HostRoutes,
        Self::Sysctls,
        Self::Firewalls,
        Self::Rules(TableKey::Fabric),
        Self::Rules(TableKey::Bridge),
        Self::Rules(TableKey::Services),
        Self::Rules(TableKey::Policy),
        Self::Rules(TableKey::PolicyBridge),
        Self::FastPath,
        Self::Shaping,
    ];
    /// What depends on our devices.
    pub(super) const ON_OUR_DEVICES: [Self; 8] = [
        Self::Links,
        Self::Addresses,
        Self::Fdb,
        Self::Neighbours,
        Self::Nexthops,
        Self::Routes,
        Self::HostRoutes,
        Self::Sysctls,
    ];
}

/// Which events matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interest {
    /// Our devices, by index: entries of other devices are not looked at.
    pub(super) ours: BTreeSet<u32>,
    /// Whether any change of routing may change the answer to `--iface-can-reach`.
    pub(super) every_route: bool,
    /// Whether queueing disciplines matter.
    pub(super) shaping: bool,
}

/// The monitor's socket and the notifications that it has received.
pub(super) struct Monitor {
    socket: TokioSocket,
    pending: Mutex<Notifications>,
    woken: Notify,
    /// In microseconds.
    firewalls_took: AtomicU64,
}

#[derive(Default)]
struct Notifications {
    events: Vec<Event>,
    stale: BTreeSet<Table>,
    overrun: bool,
    /// There is more to do, as far as is known already.
    woken: bool,
    interest: Option<Interest>,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Starts to listen in the network namespace of this thread. Must be called within a tokio runtime.
    pub(super) fn start() -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        grow_receive_buffer(socket.socket_ref(), RECEIVE_BUFFER)?;
        for group in GROUPS {
            socket
                .socket_ref()
                .add_membership(group)
                .or_else(|error| if group == NEXTHOP_GROUP { Ok(()) } else { Err(error) })?;
        }
        let pending = Notifications { stale: Table::ALL.into(), ..Notifications::default() };
        let monitor = Arc::new(Self {
            socket,
            pending: Mutex::new(pending),
            woken: Notify::new(),
            firewalls_took: AtomicU64::new(0),
        });
        let listener = Arc::clone(&monitor);
        Ok((monitor, tokio::spawn(async move { listener.listen().await })))
    }

    /// Empties the socket whenever something comes in. Receiving and taking note are one step under the lock, so that
    /// [`Monitor::take`] never misses an event that is out of the socket but not yet noted.
    async fn listen(&self) {
        std::future::poll_fn(|context| {
            let mut pending = self.lock();
            let mut buffer = std::mem::take(&mut pending.buffer);
            let end = loop {
                buffer.clear();
                buffer.reserve(RECEIVE);
                match self.socket.poll_recv(context, &mut buffer) {
                    Poll::Pending => break Poll::Pending,
                    Poll::Ready(received) => {
                        if let Err(error) = self.receive_events(&mut pending, received.map(|()| buffer.as_slice())) {
                            break Poll::Ready(error);
                        }
                    }
                }
            };
            pending.buffer = buffer;
            end
        })
        .map(|error| tracing::error!(%error, "kernel monitor ended: changes show at audits only"))
        .await;
    }

    /// What lies in the socket now.
    fn drain(&self, pending: &mut Notifications) {
        let mut buffer = std::mem::take(&mut pending.buffer);
        // Any other error ends the queue here; `listen` reports it.
        while self.receive_events(pending, receive(self.socket.socket_ref(), &mut buffer)).is_ok() {}
        pending.buffer = buffer;
    }

    fn receive_events(&self, pending: &mut Notifications, received: io::Result<&[u8]>) -> io::Result<()> {
        match received {
            Ok(datagram) => {
                for event in frames(datagram).filter_map(|frame| Event::of(&frame)) {
                    if pending.interest.as_ref().is_none_or(|interest| interest.covers(&event)) {
                        pending.events.push(event);
                    }
                }
                if pending.events.len() > QUEUE {
                    self.lose(pending);
                }
            }
            Err(error) if is_overrun(&error) => self.lose(pending),
            Err(error) => return Err(error),
        }
        if !pending.events.is_empty() {
            self.woken.notify_one();
        }
        Ok(())
    }

    /// Something went unheard: only reading everything tells what.
    fn lose(&self, pending: &mut Notifications) {
        pending.overrun = true;
        pending.events = vec![];
        self.note(pending, Table::ALL);
    }

    /// What was said since the last call, in order, that lying in the socket included, and the tables that are stale.
    /// Until [`Monitor::mind`] every event counts, unless there was nothing.
    pub(super) fn take(&self) -> (Vec<Event>, BTreeSet<Table>) {
        let mut pending = self.lock();
        self.drain(&mut pending);
        pending.woken = false;
        let said = (std::mem::take(&mut pending.events), std::mem::take(&mut pending.stale));
        if !said.0.is_empty() || !said.1.is_empty() {
            pending.interest = None;
        }
        said
    }

    /// From now on only events that touch these count.
    pub(super) fn set_interest(&self, interest: Interest) {
        self.lock().interest = Some(interest);
    }

    /// Takes note of how long it took to read the firewall chains of others.
    pub(super) fn pace_firewalls(&self, took: Duration) {
        self.firewalls_took.store(took.as_micros().try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How long that took the last time.
    pub(super) fn firewalls_took(&self) -> Duration {
        Duration::from_micros(self.firewalls_took.load(Ordering::Relaxed))
    }

    /// Has the loop look again, though no table is stale.
    pub(super) fn wake(&self) {
        self.lock().woken = true;
        self.woken.notify_one();
    }

    /// Calls tables stale that no event speaks of.
    pub(super) fn distrust(&self, tables: impl IntoIterator<Item = Table>) {
        self.note(&mut self.lock(), tables);
    }

    /// Waits until something was said or a table is stale. A loss is told once, even if all was read since: it is counted.
    pub(super) async fn changed(&self) -> Touched {
        loop {
            {
                let mut pending = self.lock();
                if std::mem::take(&mut pending.overrun) {
                    return Touched::Everything;
                } else if pending.woken || !pending.stale.is_empty() || !pending.events.is_empty() {
                    return Touched::State;
                }
            }
            // A change between the look and the wait has left a permit.
            self.woken.notified().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Notifications> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, pending: &mut Notifications, tables: impl IntoIterator<Item = Table>) {
        let before = pending.stale.len();
        pending.stale.extend(tables);
        if pending.stale.len() > before {
            self.woken.notify_one();
        }
    }
}

/// Something that the kernel said, as far as it matters here.
#[derive(Debug)]
pub(super) enum Event {
    /// A link came, changed or went.
    Link(u32),
    /// An address of a link came, changed or went.
    Address(u32),
    /// An FDB entry or neighbour is such as this now.
    Entry(Entry),
    /// A route with our protocol is such as this now.
    Route(RouteRow),
    /// A route of somebody else came, changed or went.
    HostRoute(Option<fabric_core::model::Subnet>),
    /// A route came, changed or went that matters only to `--iface-can-reach`.
    AnyRoute,
    /// A nexthop object is such as this now.
    Nexthop(NexthopRow),
    /// A nexthop object is gone.
    NexthopGone(NexthopRow),
    /// A queueing discipline, or a filter of one, came, changed or went.
    Qdisc,
    /// Forwarding was turned on or off for the whole host.
    Forwarding,
    /// Not understood: whatever may be meant.
    Unknown,
}

impl Event {
    fn of(frame: &Frame<'_>) -> Option<Self> {
        match frame.kind {
            RTM_NEWNEXTHOP => return Some(nexthop::decode(frame).map_or(Self::Unknown, Self::Nexthop)),
            RTM_DELNEXTHOP => return Some(nexthop::decode(frame).map_or(Self::Unknown, Self::NexthopGone)),
            RTM_NEWNEIGH | RTM_DELNEIGH => {
                return tables::entry(frame, frame.kind == RTM_DELNEIGH).map(Self::Entry);
            }
            RTM_NEWROUTE | RTM_DELROUTE if routes::is_ours(frame) => {
                return routes::row(frame, frame.kind == RTM_DELROUTE).map(Self::Route);
            }
            RTM_NEWQDISC | RTM_DELQDISC | RTM_NEWTFILTER | RTM_DELTFILTER => return Some(Self::Qdisc),
            kind if RTM_BELOW_QDISC.iter().any(|below| below.contains(&kind)) => return None,
            RTM_NEWNETCONF => return netconf(frame),
            // Every pod's device takes its settings along; if one was ours, its end is told too.
            RTM_DELNETCONF => return None,
            _ => {}
        }
        match route_message(frame) {
            // A bridge speaks of its ports in messages of its own family; the links are as they were.
            Some(Rtnl::NewLink(link) | Rtnl::DelLink(link)) => {
                (link.header.interface_family == AddressFamily::Unspec).then_some(Self::Link(link.header.index))
            }
            // IPv6 link-local addresses come and go with every pod, and never show.
            Some(Rtnl::NewAddress(address) | Rtnl::DelAddress(address)) => match address.header {
                AddressHeader { family: AddressFamily::Inet6, scope: AddressScope::Link, .. } => None,
                AddressHeader { index, .. } => Some(Self::Address(index)),
            },
            Some(Rtnl::NewRoute(route) | Rtnl::DelRoute(route)) => match routes::beside_ours(&route) {
                Some(dst) => Some(Self::HostRoute(Some(dst))),
                None if routes::is_default(&route) => Some(Self::HostRoute(None)),
                None => Some(Self::AnyRoute),
            },
            Some(_) => None,
            None => Some(Self::Unknown),
        }
    }
}

impl Interest {
    /// Whether an event matters.
    fn covers(&self, event: &Event) -> bool {
        match event {
            Event::Entry(entry) => self.ours.contains(&entry.index),
            Event::AnyRoute => self.every_route,
            Event::Qdisc => self.shaping,
            _ => true,
        }
    }
}

/// Settings are announced for every new device; only the host's own matter. (`accept_ra` is announced to nobody.)
fn netconf(frame: &Frame<'_>) -> Option<Event> {
    // A `struct netconfmsg` is one byte, padded to four.
    let index = frame.body.get(4..).and_then(|body| attribute(body, NETCONF_INDEX));
    match index.map(parse_i32) {
        Some(Ok(NETCONF_ALL)) => Some(Event::Forwarding),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::routing::tables::EntryRow;

    #[test]
    fn settings_of_a_pods_device_that_goes_say_nothing() {
        // AF_INET, NETCONFA_IFINDEX 7; as the kernel says for each family when a veth is deleted.
        let body = [2, 0, 0, 0, 8, 0, 1, 0, 7, 0, 0, 0];
        let frame = Frame { kind: RTM_DELNETCONF, flags: 0, sequence: 0, port: 0, body: &body };
        assert!(Event::of(&frame).is_none());
        assert!(matches!(Event::of(&Frame { kind: 0xfff0, ..frame }), Some(Event::Unknown)));
    }

    #[test]
    fn an_fdb_entry_that_is_told_without_its_destination_stays_what_it_is() {
        // As Linux 5.10 tells `bridge fdb replace 02:42:c0:00:02:02 dev fabric.1 dst 192.0.2.2 self permanent`: the VXLAN
        // driver with destination and age, rtnetlink after it with neither.
        let head = [7, 0, 0, 0, 5, 0, 0, 0, 0x80, 0, 2, 0];
        let mac = [10, 0, 2, 0, 2, 0x42, 0xc0, 0, 2, 2, 0, 0];
        let (dst, age) = ([8, 0, 1, 0, 192, 0, 2, 2], [&[20, 0, 3, 0][..], &[0; 16]].concat());
        let (driver, again) = ([&head[..], &mac, &dst, &age].concat(), [&head[..], &mac].concat());
        let event = |kind, body: &[u8]| Event::of(&Frame { kind, flags: 0, sequence: 0, port: 0, body });
        let row = |event| match event {
            Some(Event::Entry(entry)) => Some(entry.row),
            _ => None,
        };
        let mac = "02:42:c0:00:02:02".parse().expect("a MAC address");
        let dst = "192.0.2.2".parse().expect("an address");
        assert_eq!(row(event(RTM_NEWNEIGH, &driver)), Some(EntryRow::Fdb(mac, Some(dst))));
        assert!(event(RTM_NEWNEIGH, &again).is_none());
        // Deleted it is, whoever tells.
        assert_eq!(row(event(RTM_DELNEIGH, &again)), Some(EntryRow::Fdb(mac, None)));
        // One that really has no destination is none of ours.
        let without = [&head[..], &[10, 0, 2, 0, 2, 0x42, 0xc0, 0, 2, 2, 0, 0], &age].concat();
        assert_eq!(row(event(RTM_NEWNEIGH, &without)), Some(EntryRow::Fdb(mac, None)));
    }
}
