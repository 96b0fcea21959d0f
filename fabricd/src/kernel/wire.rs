//! The frames of netlink: what goes out ([`Request`]) and what comes back ([`Frame`]), without a word about what is in
//! them. A datagram holds any number of frames, each a 16-byte header and a body of attributes (netlink(7)).

use netlink_packet_core::{
    NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator, emit_u16, emit_u32,
    parse_u16, parse_u32,
};
use netlink_packet_route::RouteNetlinkMessage;

const HEADER: usize = 16;

/// One message to the kernel, but for its sequence number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// A message of any kind; `NLM_F_REQUEST` is understood.
    pub(super) fn new(message: &impl NetlinkSerializable, flags: u16) -> Self {
        let mut body = vec![0; message.buffer_len()];
        message.serialize(&mut body);
        Self::raw(message.message_type(), flags, body)
    }

    /// A message whose body is encoded already.
    pub(super) fn raw(kind: u16, flags: u16, body: Vec<u8>) -> Self {
        Self { kind, flags: flags | NLM_F_REQUEST, body }
    }

    /// With more flags.
    pub(super) fn add_flags(&mut self, flags: u16) {
        self.flags |= flags;
    }

    /// Bytes that it takes in a datagram.
    pub(super) fn len(&self) -> usize {
        HEADER + self.body.len().next_multiple_of(4)
    }

    /// Appends it to a datagram.
    pub(super) fn put(&self, sequence: u32, more_flags: u16, datagram: &mut Vec<u8>) {
        let start = datagram.len();
        datagram.resize(start + HEADER, 0);
        let length = u32::try_from(HEADER + self.body.len()).expect("a body is far below 4 GiB");
        let header = &mut datagram[start..];
        const SIZED: &str = "the slice has the size of the number";
        emit_u32(&mut header[0..4], length).expect(SIZED);
        emit_u16(&mut header[4..6], self.kind).expect(SIZED);
        emit_u16(&mut header[6..8], self.flags | more_flags).expect(SIZED);
        emit_u32(&mut header[8..12], sequence).expect(SIZED);
        datagram.extend_from_slice(&self.body);
        datagram.resize(start + self.len(), 0);
    }
}

/// One message from the kernel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    /// Whose request it answers or tells of.
    pub(super) port: u32,
    pub(super) body: &'a [u8],
}

impl Frame<'_> {
    /// The frame as a message of the route family, if it is one that the codec understands. A message that it does
    /// not (a newer kernel, an odd driver) must not stop us from seeing the others.
    pub(super) fn route_message(&self) -> Option<RouteNetlinkMessage> {
        let mut header = NetlinkHeader::default();
        header.message_type = self.kind;
        RouteNetlinkMessage::deserialize(&header, self.body)
            .inspect_err(|error| tracing::debug!(kind = self.kind, %error, "netlink message not understood"))
            .ok()
    }
}

/// The frames of a datagram, up to the first that is cut off.
pub(super) fn frames(mut datagram: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    std::iter::from_fn(move || {
        let header = datagram.get(..HEADER)?;
        let length = usize::try_from(parse_u32(&header[0..4]).ok()?).ok()?;
        let body = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Frame {
            kind: parse_u16(&header[4..6]).ok()?,
            flags: parse_u16(&header[6..8]).ok()?,
            sequence: parse_u32(&header[8..12]).ok()?,
            port: parse_u32(&header[12..16]).ok()?,
            body,
        })
    })
}

/// The attributes in a body: type without its flag bits, and value.
pub(super) fn attributes(body: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(body).flatten().map(|attribute| {
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        (kind, &attribute.into_inner()[4..length])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_a_datagram_come_back_as_they_were_put() {
        let mut datagram = vec![];
        Request::raw(16, 0, vec![1, 2, 3]).put(7, 4, &mut datagram);
        Request::raw(17, 0x100, vec![]).put(8, 0, &mut datagram);
        let seen: Vec<_> = frames(&datagram).map(|f| (f.kind, f.flags, f.sequence, f.body.to_vec())).collect();
        assert_eq!(seen, [(16, 5, 7, vec![1, 2, 3]), (17, 0x101, 8, vec![])]);
    }

    #[test]
    fn datagram_cut_off_anywhere_is_no_reason_to_panic() {
        let mut datagram = vec![];
        Request::raw(16, 0, vec![8, 0, 1, 0, 1, 2, 3, 4]).put(7, 0, &mut datagram);
        for end in 0..datagram.len() {
            assert_eq!(frames(&datagram[..end]).count(), 0, "{end} bytes");
            assert!(attributes(&datagram[..end]).count() < 4);
        }
    }
}
