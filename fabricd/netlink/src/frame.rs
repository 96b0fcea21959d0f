//! What goes out ([`Request`]) and what comes back ([`Frame`]). A datagram holds any number of frames, each a
//! `struct nlmsghdr` of 16 bytes and a body, begun at a multiple of four (linux/netlink.h).

use netlink_packet_core::{NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable};

/// Bytes of a `struct nlmsghdr`: length, kind, flags, sequence number, port.
const HEADER: usize = 16;

/// One message to the kernel, but for its sequence number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Request {
    /// A message of one of the netlink-packet crates; `NLM_F_REQUEST` is understood.
    pub fn new(message: &impl NetlinkSerializable, flags: u16) -> Self {
        let mut body = vec![0; message.buffer_len()];
        message.serialize(&mut body);
        Self::raw(message.message_type(), flags, body)
    }

    /// A message whose body is encoded already.
    #[must_use]
    pub fn raw(kind: u16, flags: u16, body: Vec<u8>) -> Self {
        Self { kind, flags: flags | NLM_F_REQUEST, body }
    }

    /// With more flags.
    pub fn add_flags(&mut self, flags: u16) {
        self.flags |= flags;
    }

    /// Bytes that it takes in a datagram.
    #[must_use]
    pub fn size(&self) -> usize {
        HEADER + self.body.len().next_multiple_of(4)
    }

    /// Appends it to a datagram.
    pub fn put(&self, sequence: u32, more_flags: u16, datagram: &mut Vec<u8>) {
        let end = datagram.len() + self.size();
        let length = u32::try_from(HEADER + self.body.len()).expect("a body is far below 4 GiB");
        datagram.extend(length.to_ne_bytes());
        datagram.extend(self.kind.to_ne_bytes());
        datagram.extend((self.flags | more_flags).to_ne_bytes());
        datagram.extend(sequence.to_ne_bytes());
        // The port: the kernel knows whose socket it is.
        datagram.extend([0; 4]);
        datagram.extend_from_slice(&self.body);
        datagram.resize(end, 0);
    }
}

/// One message from the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What it is: below 16 `NLMSG_*`, else the family's.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// That of the request which it answers; 0 for an event.
    pub sequence: u32,
    /// Whose request it answers or tells of.
    pub port: u32,
    /// What it says: a fixed header of the family, and attributes.
    pub body: &'a [u8],
}

impl Frame<'_> {
    /// The frame as a message of one of the netlink-packet crates.
    ///
    /// # Errors
    /// When that crate doesn't understand it: a newer kernel, an odd driver.
    pub fn decode<M: NetlinkDeserializable>(&self) -> Result<M, M::Error> {
        let mut header = NetlinkHeader::default();
        header.message_type = self.kind;
        M::deserialize(&header, self.body)
    }
}

/// The frames of a datagram, up to the first that is cut off or whose length can't be.
pub fn frames(mut datagram: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    std::iter::from_fn(move || {
        let (header, _) = datagram.split_first_chunk::<HEADER>()?;
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, p0, p1, p2, p3] = *header;
        let length = usize::try_from(u32::from_ne_bytes([l0, l1, l2, l3])).ok()?;
        let body = datagram.get(HEADER..length)?;
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Frame {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            port: u32::from_ne_bytes([p0, p1, p2, p3]),
            body,
        })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
    fn datagram_cut_off_anywhere_has_only_its_whole_frames() {
        let mut datagram = vec![];
        Request::raw(16, 0, vec![8, 0, 1, 0, 1, 2, 3, 4]).put(7, 0, &mut datagram);
        let first = datagram.len();
        Request::raw(17, 0, vec![1]).put(8, 0, &mut datagram);
        for end in 0..=datagram.len() {
            // The last frame is whole without the padding behind it.
            let whole = usize::from(end >= first) + usize::from(end > first + HEADER);
            assert_eq!(frames(&datagram[..end]).count(), whole, "{end} bytes");
        }
    }

    #[test]
    fn frame_whose_length_lies_ends_the_datagram() {
        for length in [0, 1, 15, 37, u32::MAX - 3, u32::MAX] {
            let mut datagram = vec![];
            Request::raw(16, 0, vec![1, 2, 3, 4]).put(1, 0, &mut datagram);
            Request::raw(17, 0, vec![]).put(2, 0, &mut datagram);
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(frames(&datagram).count(), 0, "a length of {length} in a datagram of {} bytes", datagram.len());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_frames_that_lie_within_them(datagram in proptest::collection::vec(any::<u8>(), 0..200)) {
            let taken: usize = frames(&datagram).map(|frame| HEADER + frame.body.len()).sum();
            prop_assert!(taken <= datagram.len());
        }
    }
}
