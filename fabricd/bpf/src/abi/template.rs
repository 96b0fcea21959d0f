//! The headers that go in front of a packet to a peer ([`Peer::template`](super::Peer::template)).

use std::net::Ipv4Addr;

/// Bytes that encapsulation over IPv4 adds: IPv4, UDP, VXLAN and the Ethernet header inside (RFC 7348 section 5).
pub const OVERHEAD4: usize = 20 + 8 + 8 + 14;
/// Bytes that it adds over IPv6.
pub const OVERHEAD6: usize = 40 + 8 + 8 + 14;
/// Size of [`Peer::template`](super::Peer::template): Ethernet, IPv4, UDP, VXLAN, Ethernet.
pub const TEMPLATE_SIZE: usize = 14 + OVERHEAD4;
/// Where the IPv4 header of a template begins.
pub const TEMPLATE_IP: usize = 14;
/// Where its UDP header begins.
pub const TEMPLATE_UDP: usize = 34;
/// Where its VXLAN header begins.
pub const TEMPLATE_VXLAN: usize = 42;
/// Where the Ethernet header inside begins.
pub const TEMPLATE_INNER: usize = 50;

/// The second word of a VXLAN header (RFC 7348 section 5).
#[must_use]
pub const fn vxlan_vni(vni: u32) -> [u8; 4] {
    (vni << 8).to_be_bytes()
}

/// The headers in front of a packet to an IPv4 peer, as our VXLAN device makes them but for the UDP checksum, which is left
/// out: from `local` to `underlay`, TTL 64. The outer MAC addresses are left to the kernel's neighbour table; lengths,
/// checksum, identification, type of service and source port to the program.
#[must_use]
pub fn template4(local: Ipv4Addr, underlay: Ipv4Addr, port: u16, vni: u32, vteps: [[u8; 6]; 2]) -> [u8; TEMPLATE_SIZE] {
    let mut template = [0; TEMPLATE_SIZE];
    let [ours, theirs] = vteps;
    let mut put = |at: usize, bytes: &[u8]| template[at..at + bytes.len()].copy_from_slice(bytes);
    put(TEMPLATE_IP - 2, &ETHERTYPE_IPV4);
    put(TEMPLATE_IP, &[0x45]);
    put(TEMPLATE_IP + 8, &[64, 17]);
    put(TEMPLATE_IP + 12, &local.octets());
    put(TEMPLATE_IP + 16, &underlay.octets());
    put(TEMPLATE_UDP + 2, &port.to_be_bytes());
    put(TEMPLATE_VXLAN, &[0x08]);
    put(TEMPLATE_VXLAN + 4, &vxlan_vni(vni));
    put(TEMPLATE_INNER, &theirs);
    put(TEMPLATE_INNER + 6, &ours);
    put(TEMPLATE_INNER + 12, &ETHERTYPE_IPV4);
    template
}

/// What [`Peer::template`](super::Peer::template) has for an IPv6 peer: the Ethernet header inside, as our VXLAN device
/// sends it on.
#[must_use]
pub fn template6(vteps: [[u8; 6]; 2]) -> [u8; TEMPLATE_SIZE] {
    let mut template = [0; TEMPLATE_SIZE];
    let [ours, theirs] = vteps;
    template[TEMPLATE_INNER..TEMPLATE_INNER + 6].copy_from_slice(&theirs);
    template[TEMPLATE_INNER + 6..TEMPLATE_INNER + 12].copy_from_slice(&ours);
    template[TEMPLATE_INNER + 12..].copy_from_slice(&ETHERTYPE_IPV6);
    template
}

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// The sum of the sixteen-bit words of a template's IPv4 header (RFC 1071), in network order, not yet folded.
#[must_use]
pub fn template_sum(template: &[u8; TEMPLATE_SIZE]) -> u32 {
    let words = template[TEMPLATE_IP..TEMPLATE_UDP].chunks_exact(2);
    words.map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum()
}
