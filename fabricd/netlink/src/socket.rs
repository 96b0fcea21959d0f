//! Sockets: [`RequestSocket`] for what we ask and write, [`EventSocket`] for what the kernel tells by itself.
//!
//! The kernel works through a datagram of many messages inside `send` (net/netlink/af_netlink.c, `netlink_rcv_skb`), so when
//! `send` returns every answer lies in our receive queue. Only the last message of a datagram asks to be acknowledged; one
//! that fails answers for itself, with its own sequence number, and the rest still run. So nothing here ever waits for an
//! answer: an empty queue means that there is none. A full queue would lose answers (`ENOBUFS`, after 256 of them with the
//! default buffer), hence a larger one for larger batches; if it happens all the same, every message without an answer counts
//! as failed, and a look at the kernel tells what became of it.

use std::io;
use std::slice;
use std::time::Duration;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR};
use netlink_sys::{Socket, SocketAddr};
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv, sockopt};

use crate::answer::{Refusal, errno, verdict};
use crate::frame::{Frame, Request, frames};

/// Bytes in one `send`: about 1,260 messages. The kernel takes up to 212,960.
const SEND: usize = 64 << 10;
/// Bytes to receive a datagram in: more than any that the kernel makes of a dump (32 KiB).
pub const RECEIVE: usize = 128 << 10;
/// Bytes of the receive queue for the answers to a full datagram.
const RECEIVE_BUFFER: usize = 4 << 20;
/// That many answers have room in any receive queue.
const FEW: usize = 32;
/// How often a dump that the kernel calls torn (`NLM_F_DUMP_INTR`) is begun again.
const DUMP_TRIES: usize = 10;

/// A netlink socket for requests, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct RequestSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
    received: Vec<u8>,
    /// Whether the receive queue has been made larger.
    large: bool,
}

impl RequestSocket {
    /// Opens a socket of one netlink protocol (`NETLINK_ROUTE`, `NETLINK_NETFILTER`, `NETLINK_GENERIC`).
    ///
    /// # Errors
    /// What the system says; `EPROTONOSUPPORT` when the kernel doesn't know the protocol.
    pub fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        let port = socket.bind_auto()?.port_number();
        // Comforts of newer kernels; without them answers are longer, wordless, and dumps unfiltered.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, port, sequence: 0, received: Vec::with_capacity(RECEIVE), large: false })
    }

    /// Its address: what the kernel tells others of our writes carries it.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.port
    }

    /// From now on it hears what the kernel sends to it by itself, as some of its parts do when they are asked to.
    #[must_use]
    pub fn into_events(self) -> EventSocket {
        EventSocket { socket: self.socket, received: self.received }
    }

    /// Sends writes that happen as one or not at all, one of which asks for an acknowledgement. They have to be in one
    /// datagram, however large.
    ///
    /// # Errors
    /// The first refusal; nothing was written then. `ENOBUFS` when no answer came.
    pub fn transact(&mut self, requests: &[Request]) -> Result<(), Refusal> {
        let room: usize = 2 * requests.iter().map(Request::size).sum::<usize>();
        sockopt::set_socket_send_buffer_size_force(&self.socket, room)
            .or_else(|_| sockopt::set_socket_send_buffer_size(&self.socket, room))
            .map_err(io::Error::from)?;
        self.send(requests, 0)?;
        let mut done = false;
        loop {
            match self.receive() {
                Ok(datagram) => {
                    for answer in frames(datagram).filter_map(|frame| verdict(&frame)) {
                        answer?;
                        done = true;
                    }
                }
                Err(error) if is_overrun(&error) => return Err(error.into()),
                Err(_) if done => return Ok(()),
                Err(_) => return Err(io::Error::from(Errno::NOBUFS).into()),
            }
        }
    }

    /// Sends writes, one result for each. All are tried: a later one can't count on an earlier one.
    pub fn write(&mut self, requests: &[Request]) -> Vec<Result<(), Refusal>> {
        let mut results = Vec::with_capacity(requests.len());
        while let rest @ [_, ..] = &requests[results.len()..] {
            results.append(&mut self.write_datagram(&rest[..fitting(rest)]));
        }
        results
    }

    fn write_datagram(&mut self, requests: &[Request]) -> Vec<Result<(), Refusal>> {
        let first = match self.send(requests, NLM_F_ACK) {
            Ok(first) => first,
            // The datagram was not taken: nothing of it has run.
            Err(error) => return requests.iter().map(|_| Err(again(&error).into())).collect(),
        };
        let mut results: Vec<Result<(), Refusal>> = requests.iter().map(|_| Ok(())).collect();
        let (mut complete, mut lost) = (false, None);
        while !complete {
            match self.receive() {
                Ok(datagram) => {
                    for frame in frames(datagram) {
                        let which = usize::try_from(frame.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                        let (Some(result), Some(answer)) = (results.get_mut(which), verdict(&frame)) else { continue };
                        *result = answer;
                        complete |= which + 1 == requests.len();
                    }
                }
                Err(error) if is_overrun(&error) => lost = Some(error),
                Err(_) => break,
            }
        }
        if !complete || lost.is_some() {
            let lost = lost.unwrap_or_else(|| Errno::NOBUFS.into());
            for result in results.iter_mut().filter(|result| result.is_ok()) {
                *result = Err(Refusal {
                    error: again(&lost),
                    words: Some("the kernel's answer was lost: whether this was done shows at the next look".into()),
                });
            }
        }
        results
    }

    /// Reads a table: every message that `decode` takes. A dump that the table has changed under is begun again.
    ///
    /// # Errors
    /// The kernel refused, or the table changed under every reading of it (`ErrorKind::Interrupted`).
    pub fn dump<T>(
        &mut self,
        request: &Request,
        mut decode: impl FnMut(&Frame<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(slice::from_ref(request), NLM_F_DUMP)?;
            let mut rows = vec![];
            let (mut done, mut torn) = (false, false);
            while !done {
                for frame in frames(self.receive()?).filter(|frame| frame.sequence == sequence) {
                    torn |= frame.flags & NLM_F_DUMP_INTR != 0;
                    match frame.kind {
                        NLMSG_DONE | NLMSG_ERROR => {
                            errno(frame.body)?;
                            done = true;
                        }
                        _ => rows.extend(decode(&frame)),
                    }
                }
            }
            if !torn {
                return Ok(rows);
            }
        }
        Err(io::Error::new(io::ErrorKind::Interrupted, "the table changed under every reading of it"))
    }

    /// Asks for one thing. `None` when the answer is none that `decode` takes.
    ///
    /// # Errors
    /// The kernel refused: mostly there is no such thing.
    pub fn ask<T>(
        &mut self,
        request: &Request,
        mut decode: impl FnMut(&Frame<'_>) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let sequence = self.send(slice::from_ref(request), 0)?;
        match frames(self.receive()?).find(|frame| frame.sequence == sequence) {
            Some(frame) if frame.kind == NLMSG_ERROR => errno(frame.body).map(|()| None),
            answer => Ok(answer.and_then(|frame| decode(&frame))),
        }
    }

    /// One datagram; its last message gets `last_flags`. Returns the first message's sequence number.
    fn send(&mut self, requests: &[Request], last_flags: u16) -> io::Result<u32> {
        if requests.len() > FEW && !self.large {
            grow_receive_buffer(&self.socket, RECEIVE_BUFFER)?;
            self.large = true;
        }
        // What an earlier request left behind (a dump broken off in the middle) would hold up this one.
        while self.receive().map_or_else(|error| is_overrun(&error), |_| true) {}
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::with_capacity(requests.iter().map(Request::size).sum());
        for (position, request) in requests.iter().enumerate() {
            self.sequence = self.sequence.wrapping_add(1);
            let flags = if position + 1 == requests.len() { last_flags } else { 0 };
            request.put(self.sequence, flags, &mut datagram);
        }
        self.socket.send_to(&datagram, &SocketAddr::new(0, 0), 0)?;
        Ok(first)
    }

    /// The next datagram of the queue; `WouldBlock` when there is none.
    fn receive(&mut self) -> io::Result<&[u8]> {
        receive(&self.socket, &mut self.received)
    }
}

/// A netlink socket that hears the events of multicast groups, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct EventSocket {
    socket: Socket,
    received: Vec<u8>,
}

impl EventSocket {
    /// Opens one of a netlink protocol for groups by their numbers (`RTNLGRP_LINK`, `NFNLGRP_NFTABLES`).
    ///
    /// # Errors
    /// What the system says.
    pub fn open(protocol: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        groups.iter().try_for_each(|group| socket.add_membership(*group))?;
        Ok(Self { socket, received: vec![] })
    }

    /// Waits for an event, so long. False when there was none. That events were lost is news as well.
    ///
    /// # Errors
    /// What the system says.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<bool> {
        match self.hear(timeout, |_| ()) {
            Err(error) if is_overrun(&error) => Ok(true),
            heard => heard,
        }
    }

    /// Waits for a datagram, so long, and gives each of its frames to `read`. False when there was none.
    ///
    /// # Errors
    /// What the system says; see [`is_overrun`] for what is to be expected.
    pub fn hear(&mut self, timeout: Duration, read: impl FnMut(Frame<'_>)) -> io::Result<bool> {
        let timeout = Timespec::try_from(timeout).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(Errno::INTR) => return Ok(false),
            polled => polled?,
        };
        frames(receive(&self.socket, &mut self.received)?).for_each(read);
        Ok(true)
    }
}

/// The next datagram in a socket's queue.
///
/// # Errors
/// `WouldBlock` when there is none; see [`is_overrun`] for another that is to be expected.
pub fn receive<'a>(socket: &Socket, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
    buffer.clear();
    buffer.reserve(RECEIVE);
    loop {
        match recv(socket, spare_capacity(buffer), RecvFlags::DONTWAIT) {
            Ok(_) => return Ok(buffer),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Gives a socket's queue room for so many bytes, above the system's limit where we may.
///
/// # Errors
/// What the system says.
pub fn grow_receive_buffer(socket: &Socket, bytes: usize) -> io::Result<()> {
    sockopt::set_socket_recv_buffer_size_force(socket, bytes)
        .or_else(|_| sockopt::set_socket_recv_buffer_size(socket, bytes))?;
    Ok(())
}

/// True when the queue was full and answers or events were thrown away; what is left in it can still be read.
#[must_use]
pub fn is_overrun(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::NOBUFS)
}

/// How many of these go into one datagram; at least one.
fn fitting(requests: &[Request]) -> usize {
    let mut room = SEND;
    let fits = requests.iter().take_while(|request| {
        let left = room.checked_sub(request.size());
        room = left.unwrap_or(0);
        left.is_some()
    });
    fits.count().max(1)
}

/// The same error once more: `io::Error` can't be cloned.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn datagrams_stay_below_their_limit_and_always_carry_something() {
        let request = |bytes| Request::raw(1, 0, vec![0; bytes]);
        assert_eq!(fitting(&[request(SEND)]), 1);
        assert_eq!(fitting(&[request(SEND - 16 - 20), request(4), request(4)]), 2);
    }
}
