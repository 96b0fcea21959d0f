//! A conversation with the kernel about links, addresses and routes (rtnetlink(7)), of one network namespace.
//!
//! Each request has the `ip` or `bridge` command that would do the same, which an error tells. Writes go out as a batch of
//! [`fabric_netlink`]: a message that fails doesn't keep those behind it from running, so a batch is a list whose later
//! messages can't do harm when an earlier one has failed.

use std::fmt;
use std::io;

use fabric_netlink::{Frame, Refusal, RequestSocket};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;

/// One message to the kernel, and the `ip` or `bridge` command that would send the same.
#[derive(Clone, Debug)]
pub struct Request {
    command: String,
    message: fabric_netlink::Request,
}

impl Request {
    /// A message with flags besides `NLM_F_REQUEST`.
    pub fn new(command: impl Into<String>, message: &RouteNetlinkMessage, flags: u16) -> Self {
        Self { command: command.into(), message: fabric_netlink::Request::new(message, flags) }
    }

    fn refused(&self, position: usize, refusal: impl Into<Refusal>) -> Refused {
        Refused { position, command: self.command.clone(), refusal: refusal.into() }
    }
}

/// The kernel refused a request.
#[derive(Debug)]
pub struct Refused {
    /// Its place in the batch.
    pub position: usize,
    command: String,
    refusal: Refusal,
}

impl Refused {
    /// What the kernel's number stands for.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        Errno::from_io_error(&self.refusal.error)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the kernel refused `{}`: {}", self.command, self.refusal)
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.refusal)
    }
}

/// A socket in the network namespace in which it was opened, wherever its owner goes.
#[derive(Debug)]
pub struct Netlink(RequestSocket);

impl Netlink {
    /// Opens one in the namespace of this thread.
    ///
    /// # Errors
    /// What the system says.
    pub fn open() -> io::Result<Self> {
        RequestSocket::open(NETLINK_ROUTE).map(Self)
    }

    /// Sends writes. All are tried.
    ///
    /// # Errors
    /// The first that the kernel refused.
    pub fn write(&mut self, requests: &[Request]) -> Result<(), Refused> {
        let messages: Vec<_> = requests.iter().map(|request| request.message.clone()).collect();
        let mut results = self.0.write(&messages).into_iter().zip(requests).enumerate();
        results.try_for_each(|(position, (result, request))| result.map_err(|no| request.refused(position, no)))
    }

    /// Asks for one thing; `None` when there is no such thing.
    ///
    /// # Errors
    /// The kernel refused, for another reason.
    pub fn get(&mut self, request: &Request) -> Result<Option<RouteNetlinkMessage>, Refused> {
        match self.0.ask(&request.message, decode) {
            Err(e) if Errno::from_io_error(&e) == Some(Errno::NODEV) => Ok(None),
            answer => answer.map_err(|e| request.refused(0, e)),
        }
    }

    /// Reads a table. Rows that this code doesn't understand are passed over.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn dump(&mut self, request: &Request) -> Result<Vec<RouteNetlinkMessage>, Refused> {
        self.0.dump(&request.message, decode).map_err(|e| request.refused(0, e))
    }
}

fn decode(frame: &Frame<'_>) -> Option<RouteNetlinkMessage> {
    frame.decode().ok()
}
