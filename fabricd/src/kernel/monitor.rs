//! The monitor: listens to what the kernel says about itself and keeps the set of tables that must be read again.
//!
//! It holds no rows, only which tables are *stale*, because what the kernel does not say matters as much as what it
//! says. A device that is deleted or set down takes IPv4 routes and nexthop objects along without a word, a deleted
//! nexthop object its routes, a deleted address the routes that used it: so an event names the table that it is about
//! and every table that may have shrunk in silence ([`Touch::of`]).
//!
//! A node's pods make many events that are none of our business. [`Interest`] tells the links that matter; it is
//! known after a look at the kernel. While a look is under way everything matters, since what the look will find is
//! not known yet.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures::FutureExt as _;
use netlink_packet_core::parse_i32;
use netlink_packet_route::address::{AddressHeader, AddressScope};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, TokioSocket};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::nexthop::{RTM_DELNEXTHOP, RTM_NEWNEXTHOP};
use super::wire::{Frame, attributes, frames};
use super::{Touched, routes, socket};

/// Room for the events of a burst: some 20,000.
const RECEIVE_BUFFER: usize = 8 << 20;

const RTM_NEWNETCONF: u16 = 80;
/// `NETCONFA_IFINDEX` and its value for the whole host.
const NETCONF_INDEX: u16 = 1;
const NETCONF_ALL: i32 = -1;

/// What we listen to (`RTNLGRP_*`, linux/rtnetlink.h): links, neighbours and FDB, addresses, routes, settings, nexthops.
const GROUPS: [u32; 9] = [1, 3, 5, 7, 9, 11, 24, 25, NEXTHOP_GROUP];
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
    ForwardDrops,
    Rules,
}

impl Table {
    pub(super) const ALL: [Self; 10] = [
        Self::Links,
        Self::Addresses,
        Self::Fdb,
        Self::Neighbours,
        Self::Nexthops,
        Self::Routes,
        Self::HostRoutes,
        Self::Sysctls,
        Self::ForwardDrops,
        Self::Rules,
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

/// The links whose events mean more than that a link changed, by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interest {
    /// Our devices.
    pub(super) ours: BTreeSet<u32>,
    /// Links that routes of the main table lead out of.
    pub(super) carriers: BTreeSet<u32>,
    /// Whether any change of routing may change the answer to `--iface-can-reach`.
    pub(super) every_route: bool,
}

/// The monitor's socket and what it has heard.
pub(super) struct Monitor {
    socket: TokioSocket,
    heard: Mutex<Heard>,
    woken: Notify,
}

struct Heard {
    stale: BTreeSet<Table>,
    overrun: bool,
    interest: Option<Interest>,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Starts to listen in the network namespace of this thread. Must be called within a tokio runtime.
    pub(super) fn start() -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
        socket.socket_mut().bind_auto()?;
        socket::grow_receive_buffer(socket.socket_ref(), RECEIVE_BUFFER)?;
        for group in GROUPS {
            socket
                .socket_ref()
                .add_membership(group)
                .or_else(|error| if group == NEXTHOP_GROUP { Ok(()) } else { Err(error) })?;
        }
        let heard = Heard { stale: Table::ALL.into(), overrun: false, interest: None, buffer: vec![] };
        let monitor = Arc::new(Self { socket, heard: Mutex::new(heard), woken: Notify::new() });
        let listener = Arc::clone(&monitor);
        Ok((monitor, tokio::spawn(async move { listener.listen().await })))
    }

    /// Empties the socket whenever something comes in. Receiving and taking note are one step under the lock, so that
    /// [`Monitor::take`] never misses an event that is out of the socket but not yet noted.
    async fn listen(&self) {
        std::future::poll_fn(|context| {
            let mut heard = self.heard();
            let mut buffer = std::mem::take(&mut heard.buffer);
            let end = loop {
                buffer.clear();
                buffer.reserve(socket::RECEIVE);
                match self.socket.poll_recv(context, &mut buffer) {
                    Poll::Pending => break Poll::Pending,
                    Poll::Ready(received) => {
                        if let Err(error) = self.hear(&mut heard, received.map(|()| buffer.as_slice())) {
                            break Poll::Ready(error);
                        }
                    }
                }
            };
            heard.buffer = buffer;
            end
        })
        .map(|error| tracing::error!(%error, "kernel monitor ended: changes show at audits only"))
        .await;
    }

    /// What lies in the socket now.
    fn drain(&self, heard: &mut Heard) {
        let mut buffer = std::mem::take(&mut heard.buffer);
        // Any other error ends the queue here; `listen` reports it.
        while self.hear(heard, socket::receive(self.socket.socket_ref(), &mut buffer)).is_ok() {}
        heard.buffer = buffer;
    }

    fn hear(&self, heard: &mut Heard, received: io::Result<&[u8]>) -> io::Result<()> {
        match received {
            Ok(datagram) => {
                for frame in frames(datagram) {
                    let tables = Touch::of(&frame).tables(heard.interest.as_ref());
                    self.note(heard, tables);
                }
            }
            Err(error) if socket::is_overrun(&error) => {
                heard.overrun = true;
                self.note(heard, Table::ALL);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// The tables that events were about since the last call, those lying in the socket included. Until
    /// [`Monitor::mind`] every event counts, unless there were none.
    pub(super) fn take(&self) -> BTreeSet<Table> {
        let mut heard = self.heard();
        self.drain(&mut heard);
        heard.overrun = false;
        if !heard.stale.is_empty() {
            heard.interest = None;
        }
        std::mem::take(&mut heard.stale)
    }

    /// From now on only events that touch these count.
    pub(super) fn mind(&self, interest: Interest) {
        self.heard().interest = Some(interest);
    }

    /// Calls tables stale that no event speaks of.
    pub(super) fn distrust(&self, tables: impl IntoIterator<Item = Table>) {
        self.note(&mut self.heard(), tables);
    }

    /// Waits until a table is stale.
    pub(super) async fn changed(&self) -> Touched {
        loop {
            {
                let heard = self.heard();
                if heard.overrun {
                    return Touched::Everything;
                } else if !heard.stale.is_empty() {
                    return Touched::State;
                }
            }
            // A change between the look and the wait has left a permit.
            self.woken.notified().await;
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, heard: &mut Heard, tables: impl IntoIterator<Item = Table>) {
        let before = heard.stale.len();
        heard.stale.extend(tables);
        if heard.stale.len() > before {
            self.woken.notify_one();
        }
    }
}

/// What an event is about, as far as it matters here.
#[derive(Debug)]
enum Touch {
    Nothing,
    Link(u32),
    Address(u32),
    Neighbour {
        index: u32,
        fdb: bool,
    },
    Route(Box<RouteMessage>),
    Nexthop {
        deleted: bool,
    },
    Forwarding,
    /// Not understood: whatever may be meant.
    Unknown,
}

impl Touch {
    fn of(frame: &Frame<'_>) -> Self {
        match frame.kind {
            RTM_NEWNEXTHOP => return Self::Nexthop { deleted: false },
            RTM_DELNEXTHOP => return Self::Nexthop { deleted: true },
            RTM_NEWNETCONF => return netconf(frame),
            _ => {}
        }
        match frame.route_message() {
            // A bridge speaks of its ports in messages of its own family; the links are as they were.
            Some(Rtnl::NewLink(link) | Rtnl::DelLink(link)) => match link.header.interface_family {
                AddressFamily::Unspec => Self::Link(link.header.index),
                _ => Self::Nothing,
            },
            // IPv6 link-local addresses come and go with every pod, and never show.
            Some(Rtnl::NewAddress(address) | Rtnl::DelAddress(address)) => match address.header {
                AddressHeader { family: AddressFamily::Inet6, scope: AddressScope::Link, .. } => Self::Nothing,
                AddressHeader { index, .. } => Self::Address(index),
            },
            Some(Rtnl::NewNeighbour(entry) | Rtnl::DelNeighbour(entry)) => {
                Self::Neighbour { index: entry.header.ifindex, fdb: entry.header.family == AddressFamily::Bridge }
            }
            Some(Rtnl::NewRoute(route) | Rtnl::DelRoute(route)) => Self::Route(Box::new(route)),
            Some(_) => Self::Nothing,
            None => Self::Unknown,
        }
    }

    /// The tables that this makes stale.
    fn tables(&self, interest: Option<&Interest>) -> Vec<Table> {
        use Table::{Addresses, Fdb, HostRoutes, Links, Neighbours, Nexthops, Routes, Sysctls};
        let ours = |index| interest.is_none_or(|interest| interest.ours.contains(index));
        let carrier = |index| interest.is_none_or(|interest| interest.carriers.contains(index));
        match self {
            Self::Nothing => vec![],
            // Down or gone, it took routes, nexthop objects and neighbours along; up again, it may have got some.
            Self::Link(index) if ours(index) => Table::ON_OUR_DEVICES.into(),
            Self::Link(index) if carrier(index) => vec![Links, Addresses, Routes, HostRoutes],
            Self::Link(_) => vec![Links],
            // With the last address of a link go its routes, with any address those that have it as their source.
            Self::Address(index) if ours(index) || carrier(index) => vec![Addresses, Routes, HostRoutes],
            Self::Address(_) => vec![Addresses, HostRoutes],
            Self::Neighbour { index, fdb: true } if ours(index) => vec![Fdb],
            Self::Neighbour { index, fdb: false } if ours(index) => vec![Neighbours],
            Self::Neighbour { .. } => vec![],
            Self::Route(route) if routes::is_ours(route) => vec![Routes],
            Self::Route(route) if routes::is_of_interest(route) => vec![HostRoutes],
            Self::Route(_) if interest.is_none_or(|interest| interest.every_route) => vec![HostRoutes],
            Self::Route(_) => vec![],
            Self::Nexthop { deleted: false } => vec![Nexthops],
            Self::Nexthop { deleted: true } => vec![Nexthops, Routes, HostRoutes],
            Self::Forwarding => vec![Sysctls],
            Self::Unknown => Table::ON_OUR_DEVICES.into(),
        }
    }
}

/// Settings are announced for every new device; only the host's own matter. (`accept_ra` is announced to nobody.)
fn netconf(frame: &Frame<'_>) -> Touch {
    // A `struct netconfmsg` is one byte, padded to four.
    let index = frame.body.get(4..).and_then(|body| attributes(body).find(|(kind, _)| *kind == NETCONF_INDEX));
    match index.map(|(_, value)| parse_i32(value)) {
        Some(Ok(NETCONF_ALL)) => Touch::Forwarding,
        _ => Touch::Nothing,
    }
}
