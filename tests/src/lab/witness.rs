//! A witness: hears all that a kernel says about its tables, with the time, and shares no code with fabricd.
//!
//! So whoever programs the kernel (fabricd, flanneld, iproute2) is measured alike; and that a daemon wrote nothing shows
//! in that nothing was said.

use std::fmt;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::machine::Machine;

/// Links, neighbours and FDB, addresses, routes, nexthop objects (`RTNLGRP_*`).
const GROUPS: [u32; 7] = [1, 3, 5, 7, 9, 11, 32];
/// Our protocol number, in routes and nexthop objects.
const OURS: u8 = 250;
/// `RT_SCOPE_LINK`.
const LINK_SCOPE: u8 = 253;
const BUFFER: usize = 64 << 20;

/// What is said of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A link (`RTM_*LINK`).
    Link,
    /// An address.
    Address,
    /// A neighbour or FDB entry.
    Neighbour,
    /// A route.
    Route,
    /// A nexthop object.
    Nexthop,
}

/// Something that the kernel said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// When it was heard.
    pub at: Instant,
    /// What it is about.
    pub kind: Kind,
    /// Whether something is new or changed, or has gone.
    pub gone: bool,
    body: Vec<u8>,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?} {:02x?}", if self.gone { '-' } else { '+' }, self.kind, self.body)
    }
}

impl Event {
    /// What follows the header, as the kernel sent it.
    #[must_use]
    pub fn body(&self) -> &[u8] {
        &self.body
    }

    fn word(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.body.get(at..at + 4)?.try_into().ok()?))
    }

    /// The IPv4 destination of a route to a /24.
    #[must_use]
    pub fn subnet(&self) -> Option<Ipv4Addr> {
        // A `struct rtmsg` is family, destination length, source length, TOS, table, protocol, scope, type, flags; the
        // destination is the attribute of type 1.
        let is_route = self.kind == Kind::Route && self.body.first() == Some(&2) && self.body.get(1) == Some(&24);
        let mut rest = self.body.get(12..).filter(|_| is_route)?;
        while let [a, b, kind, _, ..] = *rest {
            let length = usize::from(u16::from_ne_bytes([a, b])).max(4);
            if kind == 1 {
                return Some(Ipv4Addr::from(<[u8; 4]>::try_from(rest.get(4..8)?).ok()?));
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
        None
    }

    /// True when it is about something that fabricd keeps: by the protocol, or by the device with this index.
    fn is_about_fabric(&self, devices: &[u32]) -> bool {
        let on_device = |at| self.word(at).is_some_and(|index| devices.contains(&index));
        match self.kind {
            Kind::Route => self.body.get(5) == Some(&OURS),
            Kind::Nexthop => self.body.get(2) == Some(&OURS),
            // Link-local addresses are the kernel's own doing.
            Kind::Address => on_device(4) && self.body.get(3) != Some(&LINK_SCOPE),
            Kind::Link | Kind::Neighbour => on_device(4),
        }
    }
}

/// A witness at work.
pub struct Witness {
    heard: Arc<Heard>,
    stop: Arc<AtomicBool>,
    listener: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Heard {
    events: Mutex<Vec<Event>>,
    more: Condvar,
}

impl Heard {
    fn events(&self) -> MutexGuard<'_, Vec<Event>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Witness {
    /// Begins to listen on a machine.
    ///
    /// # Errors
    /// The machine is off.
    pub fn of(machine: &Machine) -> Result<Self> {
        let socket = machine.network()?.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            for group in GROUPS {
                socket.add_membership(group)?;
            }
            Ok(socket)
        })?;
        setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &BUFFER)?;
        setsockopt(&socket.as_fd(), sockopt::ReceiveTimeout, &TimeVal::new(0, 20_000))?;
        let (heard, stop) = (Arc::new(Heard::default()), Arc::new(AtomicBool::new(false)));
        let listener = {
            let (heard, stop) = (Arc::clone(&heard), Arc::clone(&stop));
            thread::spawn(move || listen(&socket, &heard, &stop))
        };
        Ok(Self { heard, stop, listener: Some(listener) })
    }

    /// Forgets what was said until now.
    pub fn forget(&self) {
        self.heard.events().clear();
    }

    /// Everything that was said, as far as it is about what fabricd keeps on the devices with these indexes.
    #[must_use]
    pub fn about_fabric(&self, devices: &[u32]) -> Vec<Event> {
        self.heard.events().iter().filter(|event| event.is_about_fabric(devices)).cloned().collect()
    }

    /// Waits until an event fits, and says when it came. Those heard before count.
    ///
    /// # Errors
    /// None comes in time.
    pub fn wait_for(&self, what: &str, limit: Duration, mut fits: impl FnMut(&Event) -> bool) -> Result<Instant> {
        let end = Instant::now() + limit;
        let mut looked_at = 0;
        let mut events = self.heard.events();
        loop {
            if let Some(event) = events[looked_at..].iter().find(|event| fits(event)) {
                return Ok(event.at);
            }
            looked_at = events.len();
            let left = end.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "waited {limit:?} in vain: {what} ({looked_at} events)");
            events = self.heard.more.wait_timeout(events, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until so many different routes to a /24 have come (or gone), and says when the last did.
    ///
    /// # Errors
    /// They don't in time.
    pub fn wait_for_routes(&self, count: usize, gone: bool, limit: Duration) -> Result<Instant> {
        let mut seen = std::collections::HashSet::new();
        let what = format!("{count} routes {}", if gone { "go" } else { "come" });
        self.wait_for(&what, limit, |event| {
            seen.extend(event.subnet().filter(|_| event.gone == gone));
            seen.len() >= count
        })
        .with_context(|| format!("{} of them", seen.len()))
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(listener) = self.listener.take()
            && let Ok(Err(error)) = listener.join()
        {
            eprintln!("the witness of the kernel has ended early: {error:#}");
        }
    }
}

fn listen(socket: &Socket, heard: &Heard, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; 128 << 10];
    while !stop.load(Ordering::Relaxed) {
        let length = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).map_err(std::io::Error::from) {
            Ok(length) => length,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => continue,
            Err(error) => bail!(error),
        };
        let at = Instant::now();
        let mut rest = &buffer[..length];
        let mut events = heard.events();
        while let Some((length, kind, body)) = frame(rest) {
            events.extend(about(kind).map(|(kind, gone)| Event { at, kind, gone, body: body.to_vec() }));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        heard.more.notify_all();
    }
    Ok(())
}

/// Length, type and body of the first message (netlink(7)).
fn frame(bytes: &[u8]) -> Option<(usize, u16, &[u8])> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    Some((length, kind, bytes.get(16..length)?))
}

fn about(kind: u16) -> Option<(Kind, bool)> {
    Some(match kind {
        16 | 17 => (Kind::Link, kind == 17),
        20 | 21 => (Kind::Address, kind == 21),
        24 | 25 => (Kind::Route, kind == 25),
        28 | 29 => (Kind::Neighbour, kind == 29),
        104 | 105 => (Kind::Nexthop, kind == 105),
        _ => return None,
    })
}
