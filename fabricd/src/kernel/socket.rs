//! The request socket: whole batches out, and each answer put to the message that it is about.
//!
//! The kernel works through a datagram of many messages inside `send`, so when `send` returns every answer lies in our
//! receive queue. Only the last message of a datagram asks to be acknowledged; one that fails answers for itself, with
//! its own sequence number, and the rest still run. So nothing here ever waits for an answer: an empty queue means
//! that there is none. A full queue would lose answers (`ENOBUFS`, after 256 of them with the default buffer), hence
//! the large one; if it happens all the same, every message without an answer counts as failed and the next look at
//! the kernel tells what became of it.

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, parse_i32};
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};

use super::wire::{Frame, Request, attributes, frames};

/// Bytes in one `send`: about 1,260 messages. The kernel takes up to 212,960.
const SEND: usize = 64 << 10;
/// More than any datagram that the kernel makes of a dump (32 KiB).
pub(super) const RECEIVE: usize = 128 << 10;
const RECEIVE_BUFFER: usize = 4 << 20;
/// How often a dump that the kernel calls torn (`NLM_F_DUMP_INTR`) is begun again.
const DUMP_TRIES: usize = 5;

/// `NLMSGERR_ATTR_MSG`: the kernel's words about a refusal.
const ATTR_MSG: u16 = 1;
/// `NLM_F_ACK_TLVS`: such attributes follow.
const ACK_TLVS: u16 = 0x200;
/// `NLM_F_CAPPED`: of our message the header alone is quoted.
const CAPPED: u16 = 0x100;

/// The kernel's no.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: io::Error,
    pub(super) words: Option<String>,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self { error, words: None }
    }
}

/// A netlink socket for requests, in the network namespace of the thread that opened it.
pub(super) struct RequestSocket {
    socket: Socket,
    port: u32,
    sequence: u32,
    received: Vec<u8>,
}

impl RequestSocket {
    /// Opens a socket of one netlink protocol (`NETLINK_ROUTE`, `NETLINK_NETFILTER`).
    pub(super) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        let port = socket.bind_auto()?.port_number();
        grow_receive_buffer(&socket, RECEIVE_BUFFER)?;
        // Comforts of newer kernels; without them answers are longer, wordless, and dumps unfiltered.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_ext_ack(true);
        let _ = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, port, sequence: 0, received: Vec::with_capacity(RECEIVE) })
    }

    /// Its address: what the kernel tells others of our writes carries it.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends writes that happen as one or not at all, one of which asks for an acknowledgement. They have to be in one
    /// datagram, however large.
    pub(super) fn transact(&mut self, requests: &[Request]) -> Result<(), Refusal> {
        let room: usize = requests.iter().map(Request::len).sum();
        setsockopt(&self.socket, sockopt::SndBufForce, &(2 * room))
            .or_else(|_| setsockopt(&self.socket, sockopt::SndBuf, &(2 * room)))
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
                Err(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS).into()),
            }
        }
    }

    /// Sends writes, one result for each.
    pub(super) fn write(&mut self, requests: &[Request]) -> Vec<Result<(), Refusal>> {
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
            let lost = lost.unwrap_or_else(|| io::Error::from_raw_os_error(libc::ENOBUFS));
            for result in results.iter_mut().filter(|result| result.is_ok()) {
                *result = Err(Refusal {
                    error: again(&lost),
                    words: Some("the kernel's answer was lost: whether this was done shows at the next look".into()),
                });
            }
        }
        results
    }

    /// Reads a table: every message that `decode` takes.
    pub(super) fn dump<T>(
        &mut self,
        request: &Request,
        mut decode: impl FnMut(&Frame<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(std::slice::from_ref(request), NLM_F_DUMP)?;
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

    /// Asks for one thing.
    pub(super) fn ask<T>(
        &mut self,
        request: &Request,
        mut decode: impl FnMut(&Frame<'_>) -> Option<T>,
    ) -> io::Result<Option<T>> {
        let sequence = self.send(std::slice::from_ref(request), 0)?;
        for frame in frames(self.receive()?).filter(|frame| frame.sequence == sequence) {
            match frame.kind {
                NLMSG_ERROR => errno(frame.body)?,
                _ => return Ok(decode(&frame)),
            }
        }
        Ok(None)
    }

    /// One datagram; its last message gets `last_flags`. Returns the first message's sequence number.
    fn send(&mut self, requests: &[Request], last_flags: u16) -> io::Result<u32> {
        // What an earlier request left behind (a dump broken off in the middle) would hold up this one.
        while self.receive().map_or_else(|error| is_overrun(&error), |_| true) {}
        let first = self.sequence.wrapping_add(1);
        let mut datagram = Vec::with_capacity(requests.iter().map(Request::len).sum());
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

/// The next datagram in a socket's queue; `WouldBlock` when there is none.
pub(super) fn receive<'a>(socket: &Socket, buffer: &'a mut Vec<u8>) -> io::Result<&'a [u8]> {
    loop {
        buffer.clear();
        buffer.reserve(RECEIVE);
        match socket.recv(buffer, libc::MSG_DONTWAIT) {
            Ok(_) => return Ok(buffer),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Gives a socket room for what comes in, above the system's limit where we may.
pub(super) fn grow_receive_buffer(socket: &Socket, bytes: usize) -> io::Result<()> {
    setsockopt(socket, sockopt::RcvBufForce, &bytes).or_else(|_| setsockopt(socket, sockopt::RcvBuf, &bytes))?;
    Ok(())
}

/// True when the queue was full and answers or events were thrown away; what is left in it can still be read.
pub(super) fn is_overrun(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOBUFS)
}

/// How many of these go into one datagram; at least one.
fn fitting(requests: &[Request]) -> usize {
    let mut room = SEND;
    let fits = requests.iter().take_while(|request| {
        let left = room.checked_sub(request.len());
        room = left.unwrap_or(0);
        left.is_some()
    });
    fits.count().max(1)
}

/// What a frame says about the write that it answers.
fn verdict(frame: &Frame<'_>) -> Option<Result<(), Refusal>> {
    (frame.kind == NLMSG_ERROR)
        .then(|| errno(frame.body).map_err(|error| Refusal { error, words: words(frame).map(str::to_owned) }))
}

/// The error number that opens the body of `NLMSG_ERROR` and `NLMSG_DONE`, negative; 0 is success.
fn errno(body: &[u8]) -> io::Result<()> {
    match body.get(..4).map(parse_i32) {
        Some(Ok(code)) if code < 0 => Err(io::Error::from_raw_os_error(-code)),
        _ => Ok(()),
    }
}

/// The kernel's words: they follow the error number and the quoted message.
fn words<'a>(frame: &Frame<'a>) -> Option<&'a str> {
    if frame.flags & ACK_TLVS == 0 {
        return None;
    }
    let quoted = frames(frame.body.get(4..)?).next().map_or(0, |quoted| quoted.body.len());
    let skip = 4 + 16 + if frame.flags & CAPPED == 0 { quoted.next_multiple_of(4) } else { 0 };
    let (_, text) = attributes(frame.body.get(skip..)?).find(|(kind, _)| *kind == ATTR_MSG)?;
    std::str::from_utf8(text).ok().map(|text| text.trim_end_matches('\0'))
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

    #[test]
    fn the_kernels_words_are_found_behind_a_capped_message() {
        let mut body = vec![0xea, 0xff, 0xff, 0xff];
        body.extend([36, 0, 0, 0, 104, 0, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        body.extend([9, 0, 1, 0]);
        body.extend(b"none\0\0\0\0");
        let frame = Frame { kind: NLMSG_ERROR, flags: CAPPED | ACK_TLVS, sequence: 1, port: 0, body: &body };
        assert_eq!(words(&frame), Some("none"));
        assert_eq!(errno(&body).map_err(|e| e.raw_os_error()), Err(Some(libc::EINVAL)));
    }
}
