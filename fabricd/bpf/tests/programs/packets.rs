//! Packets, byte by byte.

use std::net::{Ipv4Addr, Ipv6Addr};

pub(crate) type Mac = [u8; 6];

pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const IPV6: u16 = 0x86dd;

/// A frame.
pub(crate) fn frame(destination: Mac, source: Mac, ethertype: u16, packet: &[u8]) -> Vec<u8> {
    [&destination[..], &source[..], &ethertype.to_be_bytes()[..], packet].concat()
}

/// TCP without options, of `payload` bytes.
pub(crate) fn tcp(source: u16, destination: u16, payload: usize) -> Vec<u8> {
    let mut bytes = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 0xff, 0xff, 0xab, 0xcd, 0, 0]);
    bytes.extend((0..payload).map(|at| at as u8));
    bytes
}

/// UDP with `payload` bytes.
pub(crate) fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 8).expect("it fits").to_be_bytes();
    [&source.to_be_bytes()[..], &destination.to_be_bytes(), &length, &[0, 0], payload].concat()
}

/// An IPv4 packet of `protocol`, with a checksum that is right.
pub(crate) fn ip4(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len() + 20).expect("it fits").to_be_bytes();
    let mut header = vec![0x45, 0, length[0], length[1], 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0];
    header.extend(source.octets());
    header.extend(destination.octets());
    sum4(&mut header);
    [header, rest.to_vec()].concat()
}

/// Makes the checksum of an IPv4 header right.
pub(crate) fn sum4(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = !add(&header[..20]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// Whether the checksum of an IPv4 header is right.
pub(crate) fn is_sum4_right(header: &[u8]) -> bool {
    add(&header[..20]) == 0xffff
}

fn add(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// An IPv6 packet whose next header is `next`.
pub(crate) fn ip6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).expect("it fits").to_be_bytes();
    let header = [0x60, 0, 0, 0, length[0], length[1], next, 64];
    [&header[..], &source.octets(), &destination.octets(), rest].concat()
}

/// A VXLAN header and the frame behind it.
pub(crate) fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes(), frame].concat()
}

/// The same with something changed.
pub(crate) fn with(mut bytes: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut bytes);
    bytes
}
