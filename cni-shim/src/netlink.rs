//! A conversation with the kernel about links, addresses and routes (rtnetlink(7)), of one network namespace.
//!
//! Writes go out in batches: one `send`, which the kernel works off before it returns, and one answer to the last
//! message. A message that fails answers for itself, and those behind it still run (net/netlink/af_netlink.c,
//! `netlink_rcv_skb`); so a batch is a list whose later messages can't do harm when an earlier one has failed.

use std::fmt;
use std::io;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkMessage,
    NetlinkPayload, NlasIterator, parse_i32, parse_u16, parse_u32,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// The kernel never sends a larger datagram.
const RECEIVE: usize = 64 * 1024;

/// How often a dump is begun anew that changes under its reader.
const DUMP_TRIES: usize = 10;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// `NLM_F_CAPPED` and `NLM_F_ACK_TLVS`: the quoted message is cut to its header, the kernel's words follow.
const CAPPED: u16 = 0x100;
const ACK_TLVS: u16 = 0x200;
const ATTR_MSG: u16 = 1;

/// One message to the kernel, and the `ip` or `bridge` command that would send the same.
#[derive(Clone, Debug)]
pub struct Request {
    command: String,
    message: RouteNetlinkMessage,
    flags: u16,
}

impl Request {
    /// A message with flags besides `NLM_F_REQUEST`.
    pub fn new(command: impl Into<String>, message: RouteNetlinkMessage, flags: u16) -> Self {
        Self { command: command.into(), message, flags }
    }
}

/// The kernel refused a request.
#[derive(Debug)]
pub struct Refused {
    /// Its place in the batch.
    pub position: usize,
    command: String,
    source: io::Error,
    words: Option<String>,
}

impl Refused {
    /// What the kernel's number stands for.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        Errno::from_io_error(&self.source)
    }

    fn new(position: usize, request: &Request, source: io::Error) -> Self {
        Self { position, command: request.command.clone(), source, words: None }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the kernel refused `{}`: {}", self.command, self.source)?;
        self.words.as_ref().map_or(Ok(()), |words| write!(f, " ({words})"))
    }
}

impl std::error::Error for Refused {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// A socket in the network namespace in which it was opened, wherever its owner goes.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    received: Vec<u8>,
}

impl Netlink {
    /// Opens one in the namespace of this thread.
    ///
    /// # Errors
    /// What the system says.
    pub fn open() -> io::Result<Self> {
        Self::following(0)
    }

    /// Opens one that hears the events of the multicast groups in the mask `groups` (`RTMGRP_LINK`).
    pub(crate) fn following(groups: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, groups))?;
        // Comforts of newer kernels; without them answers are longer, wordless, and dumps unfiltered.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, sequence: 0, received: Vec::with_capacity(RECEIVE) })
    }

    /// Sends writes. All are tried.
    ///
    /// # Errors
    /// The first that the kernel refused.
    pub fn write(&mut self, requests: &[Request]) -> Result<(), Refused> {
        let Some((last, before)) = requests.split_last() else { return Ok(()) };
        let unsent = |e| Refused::new(0, &requests[0], e);
        let first = self.send(requests, NLM_F_ACK).map_err(unsent)?;
        let mut refused: Option<Refused> = None;
        loop {
            for frame in frames(self.receive().map_err(|e| Refused::new(before.len(), last, e))?) {
                let position = usize::try_from(frame.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                let (NLMSG_ERROR, Some(request)) = (frame.kind, requests.get(position)) else { continue };
                if let Err(e) = errno(frame.body) {
                    refused.get_or_insert(Refused { words: words(&frame), ..Refused::new(position, request, e) });
                }
                if position == before.len() {
                    return refused.map_or(Ok(()), Err);
                }
            }
        }
    }

    /// Asks for one thing; `None` when there is no such thing.
    ///
    /// # Errors
    /// The kernel refused, for another reason.
    pub fn get(&mut self, request: &Request) -> Result<Option<RouteNetlinkMessage>, Refused> {
        let failed = |e| Refused::new(0, request, e);
        let sequence = self.send(std::slice::from_ref(request), 0).map_err(failed)?;
        loop {
            let mut answers = frames(self.receive().map_err(failed)?).filter(|frame| frame.sequence == sequence);
            let Some(frame) = answers.next() else { continue };
            return match (frame.kind, errno(frame.body)) {
                (NLMSG_ERROR, Err(e)) if Errno::from_io_error(&e) == Some(Errno::NODEV) => Ok(None),
                (NLMSG_ERROR, outcome) => outcome.map(|()| None).map_err(failed),
                _ => Ok(frame.message()),
            };
        }
    }

    /// Reads a table. Rows that this code doesn't understand are passed over.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn dump(&mut self, request: &Request) -> Result<Vec<RouteNetlinkMessage>, Refused> {
        let failed = |e| Refused::new(0, request, e);
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(std::slice::from_ref(request), NLM_F_DUMP).map_err(failed)?;
            let (mut rows, mut done, mut torn) = (Vec::new(), false, false);
            while !done {
                for frame in frames(self.receive().map_err(failed)?).filter(|frame| frame.sequence == sequence) {
                    torn |= frame.flags & NLM_F_DUMP_INTR != 0;
                    match frame.kind {
                        NLMSG_DONE | NLMSG_ERROR => {
                            errno(frame.body).map_err(failed)?;
                            done = true;
                        }
                        _ => rows.extend(frame.message()),
                    }
                }
            }
            if !torn {
                return Ok(rows);
            }
        }
        Err(failed(io::Error::new(io::ErrorKind::Interrupted, "the table changed under every reading of it")))
    }

    /// Waits for an event, so long. False when there was none.
    pub(crate) fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        if poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout))? == 0 {
            return Ok(false);
        }
        match self.receive() {
            // More has happened than the socket could hold, which is news as well.
            Err(e) if e.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => Ok(true),
            heard => heard.map(|_| true),
        }
    }

    /// One datagram; its last message gets `last_flags`. Returns the first message's sequence number.
    fn send(&mut self, requests: &[Request], last_flags: u16) -> io::Result<u32> {
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::with_capacity(1024);
        for (position, request) in requests.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let more = if position + 1 == requests.len() { last_flags } else { 0 };
            let mut header = NetlinkHeader::default();
            header.flags = NLM_F_REQUEST | request.flags | more;
            header.sequence_number = self.sequence;
            let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request.message.clone()));
            message.finalize();
            let start = datagram.len();
            datagram.resize(start + message.buffer_len().next_multiple_of(4), 0);
            message.serialize(&mut datagram[start..]);
        }
        self.socket.send_to(&datagram, &SocketAddr::new(0, 0), 0)?;
        Ok(first)
    }

    /// The next datagram.
    fn receive(&mut self) -> io::Result<&[u8]> {
        loop {
            self.received.clear();
            self.received.reserve(RECEIVE);
            match self.socket.recv(&mut self.received, 0) {
                Ok(_) => return Ok(&self.received),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// One message from the kernel.
struct Frame<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Frame<'_> {
    fn message(&self) -> Option<RouteNetlinkMessage> {
        let mut header = NetlinkHeader::default();
        header.message_type = self.kind;
        RouteNetlinkMessage::deserialize(&header, self.body).ok()
    }
}

/// The frames of a datagram, up to the first that is cut off.
fn frames(mut datagram: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    const HEADER: usize = 16;
    std::iter::from_fn(move || {
        let header = datagram.get(..HEADER)?;
        let length = usize::try_from(parse_u32(&header[0..4]).ok()?).ok()?;
        let body = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Frame {
            kind: parse_u16(&header[4..6]).ok()?,
            flags: parse_u16(&header[6..8]).ok()?,
            sequence: parse_u32(&header[8..12]).ok()?,
            body,
        })
    })
}

/// The error number that opens the body of `NLMSG_ERROR` and `NLMSG_DONE`, negative; 0 is success.
fn errno(body: &[u8]) -> io::Result<()> {
    match body.get(..4).map(parse_i32) {
        Some(Ok(code)) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
        _ => Ok(()),
    }
}

/// The kernel's words: they follow the error number and the quoted message.
fn words(frame: &Frame<'_>) -> Option<String> {
    if frame.flags & ACK_TLVS == 0 {
        return None;
    }
    let quoted = frames(frame.body.get(4..)?).next().map_or(0, |quoted| quoted.body.len());
    let skip = 4 + 16 + if frame.flags & CAPPED == 0 { quoted.next_multiple_of(4) } else { 0 };
    let attributes = NlasIterator::new(frame.body.get(skip..)?).flatten();
    let text = attributes.into_iter().find(|attribute| attribute.kind() == ATTR_MSG)?;
    let text = std::str::from_utf8(text.value()).ok()?;
    Some(text.trim_end_matches('\0').to_owned())
}
