//! Reading frames: what the programs look at, and nothing else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::reason::Reason;

pub(super) const ETHERNET: usize = 14;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;

/// Congestion (RFC 3168 section 5).
pub(super) const ECN: u8 = 3;

/// A frame as a program gets it, and what the kernel knows of it besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// From the destination MAC address on.
    pub bytes: &'a [u8],
    /// The interface of the hook.
    pub ifindex: u32,
    /// Payload of each segment that it will be cut into; 0 when it is one packet.
    pub gso_size: u32,
    /// A VLAN tag that the card has taken off.
    pub is_tagged: bool,
    /// Whether its destination MAC address is that of the interface.
    pub is_for_host: bool,
}

impl<'a> Frame<'a> {
    /// A plain frame for `ifindex` itself.
    #[must_use]
    pub fn new(bytes: &'a [u8], ifindex: u32) -> Self {
        Self { bytes, ifindex, gso_size: 0, is_tagged: false, is_for_host: true }
    }

    pub(super) fn ethertype(&self) -> Option<u16> {
        word(self.bytes, 12)
    }

    pub(super) fn has(&self, length: usize) -> bool {
        self.bytes.len() >= length
    }
}

/// An IP header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ip {
    /// Where it begins.
    pub(super) at: usize,
    /// With its options; of IPv6 without extension headers.
    header: usize,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// All of the packet, from this header on.
    pub(super) length: usize,
    pub(super) ttl: u8,
    pub(super) class: u8,
    /// Of IPv6 what follows this header.
    pub(super) protocol: u8,
    /// Flags and offset of IPv4.
    fragment: u16,
}

impl Ip {
    /// The header at `at`, of the family that the caller expects there.
    pub(super) fn read(bytes: &[u8], at: usize, ethertype: u16) -> Option<Self> {
        match ethertype {
            IPV4 => Self::read4(bytes, at),
            _ => Self::read6(bytes, at),
        }
    }

    fn read4(bytes: &[u8], at: usize) -> Option<Self> {
        let ip: &[u8; 20] = bytes.get(at..)?.first_chunk()?;
        let header = usize::from(ip[0] & 15) * 4;
        let address = |at: usize| IpAddr::from(Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]));
        (ip[0] >> 4 == 4 && header >= 20).then_some(Self {
            at,
            header,
            source: address(12),
            destination: address(16),
            length: word(ip, 2)?.into(),
            ttl: ip[8],
            class: ip[1],
            protocol: ip[9],
            fragment: word(ip, 6)? & 0x3fff,
        })
    }

    fn read6(bytes: &[u8], at: usize) -> Option<Self> {
        let ip: &[u8; 40] = bytes.get(at..)?.first_chunk()?;
        let address = |at: usize| ip[at..].first_chunk::<16>().map(|bytes| IpAddr::from(Ipv6Addr::from(*bytes)));
        (ip[0] >> 4 == 6).then_some(Self {
            at,
            header: 40,
            source: address(8)?,
            destination: address(24)?,
            length: 40 + usize::from(word(ip, 4)?),
            ttl: ip[7],
            class: ip[0] << 4 | ip[1] >> 4,
            protocol: ip[6],
            fragment: 0,
        })
    }

    pub(super) fn is_v4(&self) -> bool {
        self.source.is_ipv4()
    }

    /// The same header where the packet begins elsewhere.
    pub(super) fn moved_to(self, at: usize) -> Self {
        Self { at, ..self }
    }

    /// Where TCP or UDP begins, if there is no extension header.
    pub(super) fn transport_at(&self) -> usize {
        self.at + self.header
    }

    /// Options of IPv4.
    pub(super) fn has_options(&self) -> bool {
        self.is_v4() && self.header > 20
    }

    pub(super) fn is_fragment(&self) -> bool {
        self.fragment != 0
    }

    /// TCP or UDP behind it, or what is in the way.
    pub(super) fn transport(&self, bytes: &[u8]) -> Result<Transport, Reason> {
        if self.has_options() {
            return Err(Reason::SlowOptions);
        }
        if self.is_fragment() {
            return Err(Reason::SlowFragment);
        }
        let header = match (self.protocol, self.is_v4()) {
            (TCP, _) => 20,
            (UDP, _) => 8,
            (44, false) => return Err(Reason::SlowFragment),
            (0 | 43 | 60, false) => return Err(Reason::SlowOptions),
            _ => return Err(Reason::SlowProtocol),
        };
        let at = self.transport_at();
        let whole = bytes.get(at..at + header).filter(|_| self.length >= self.header + header);
        let Some(bytes) = whole else { return Err(Reason::SlowTruncated) };
        let header = if self.protocol == TCP { usize::from(bytes[12] >> 4) * 4 } else { 8 };
        Ok(Transport {
            is_udp: self.protocol == UDP,
            source: u16::from_be_bytes([bytes[0], bytes[1]]),
            destination: u16::from_be_bytes([bytes[2], bytes[3]]),
            headers: self.header + header,
        })
    }

    /// The port that connection tracking would know the sender by, also where options or extension headers are in between;
    /// of fragments the first has it. `true` is UDP.
    pub(super) fn source_port(&self, bytes: &[u8]) -> Option<(bool, u16)> {
        let (mut at, mut next) = (self.transport_at(), self.protocol);
        if self.fragment & 0x1fff != 0 {
            return None;
        }
        for _ in 0..if self.is_v4() { 0 } else { 4 } {
            let (first, size) = match next {
                0 | 43 | 60 | 44 => (bytes.get(at..at + 8)?, bytes.get(at + 1)?),
                _ => break,
            };
            if next == 44 {
                if u16::from_be_bytes([first[2], first[3]]) & 0xfff8 != 0 {
                    return None;
                }
                at += 8;
            } else {
                at += (usize::from(*size) + 1) * 8;
            }
            next = first[0];
        }
        // The programs read both ports at once.
        let ports = bytes.get(at..at + 4)?;
        matches!(next, TCP | UDP).then_some((next == UDP, u16::from_be_bytes([ports[0], ports[1]])))
    }
}

/// A TCP or UDP header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Transport {
    pub(super) is_udp: bool,
    pub(super) source: u16,
    pub(super) destination: u16,
    /// Bytes of all headers from IP on.
    pub(super) headers: usize,
}

pub(super) fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

pub(super) fn mac(bytes: &[u8], at: usize) -> Option<[u8; 6]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// The checksum of an IPv4 header (RFC 1071) whose own field is passed over.
pub(super) fn checksum4(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2).enumerate().filter(|(at, _)| *at != 5);
    let mut sum: u32 = words.map(|(_, word)| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("it was folded")
}
