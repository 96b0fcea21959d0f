//! The programs once more, in Rust: which way a packet takes, why, and what it looks like afterwards.
//!
//! `explain` asks it, the fake kernel acts by it, and `tests/programs.rs` throws packets at both and compares. It follows what
//! the programs are to do, not how: nothing here is fast.

mod frame;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

pub use self::frame::Frame;
use self::frame::{ECN, ETHERNET, IPV4, IPV6, Ip, TCP, Transport, UDP, checksum4, mac, word};
use crate::abi::{
    Address6, CONFIG_GUARD, CONFIG_IPV4, CONFIG_IPV6, Config, Flow, OVERHEAD4, OVERHEAD6, PEER_DIRECT, POD_FAST, Peer,
    Pod, TEMPLATE_INNER, TEMPLATE_IP, TEMPLATE_SIZE, TEMPLATE_UDP, nat_bit, subnet_number,
};
use crate::reason::{Program, Reason};

/// What the maps hold. Slots are within the arrays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    /// `config`.
    pub config: Config,
    /// `peer_index4`.
    pub peer_index4: BTreeMap<u32, u32>,
    /// `peer_index6`.
    pub peer_index6: BTreeMap<u32, u32>,
    /// `peers`.
    pub peers: BTreeMap<u32, Peer>,
    /// `pod_index4`.
    pub pod_index4: BTreeMap<u32, u32>,
    /// `pod_index6`.
    pub pod_index6: BTreeMap<Address6, u32>,
    /// `pods`.
    pub pods: BTreeMap<u32, Pod>,
    /// `nat_bits0` and `nat_bits1` together.
    pub nat_bits: BTreeMap<u32, u64>,
    /// `slow_flows`, without their times. A pod that has one has its word in `slow_pods`.
    pub slow_flows: BTreeSet<Flow>,
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It takes the kernel's path, and isn't counted: none of the fabric's.
    NotOurs,
    /// It takes the kernel's path, for this reason.
    Slow(Reason, Effect),
    /// A program sends it on.
    Fast(Reason, Exit),
}

/// What a program writes down on the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    #[default]
    None,
    /// A bit of `nat_bits`: the word and the bit.
    Mark(u32, u64),
    /// An entry of `slow_flows`, for a pod's slot.
    Record(u32, Flow),
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    /// The interface: of a peer where it leaves by, of a pod its veth on the host.
    pub ifindex: u32,
    /// The slot of the peer that it is counted for.
    pub peer: Option<u32>,
    /// The frame. Of an encapsulated one the outer identification and UDP source port are zero, and the outer checksum is
    /// made for that: both come of the kernel's hash of the flow.
    pub bytes: Vec<u8>,
}

impl From<Reason> for Answer {
    fn from(reason: Reason) -> Self {
        Self::Slow(reason, Effect::None)
    }
}

impl Answer {
    fn of(answer: Result<Self, Self>) -> Self {
        answer.unwrap_or_else(|answer| answer)
    }

    /// Why, if it is ours.
    #[must_use]
    pub fn reason(&self) -> Option<Reason> {
        match self {
            Self::NotOurs => None,
            Self::Slow(reason, _) | Self::Fast(reason, _) => Some(*reason),
        }
    }
}

impl Tables {
    /// What `program` does with a frame.
    #[must_use]
    pub fn decide(&self, program: Program, frame: &Frame<'_>) -> Answer {
        match program {
            Program::PodOut => self.pod_out(frame),
            Program::WireIn => self.wire_in(frame),
            Program::PodIn => self.noted(self.received_slow(frame)),
            Program::WireOut => self.noted(self.sent_slow(frame)),
        }
    }

    /// Writes down what a program would write down.
    pub fn apply(&mut self, effect: &Effect) {
        match effect {
            Effect::None => {}
            Effect::Mark(word, bit) => *self.nat_bits.entry(*word).or_default() |= bit,
            Effect::Record(_, flow) => _ = self.slow_flows.insert(*flow),
        }
    }

    /// The family of a frame, if pods have it here.
    fn family(&self, frame: &Frame<'_>) -> Option<u16> {
        let flag = match frame.ethertype()? {
            IPV4 => CONFIG_IPV4,
            IPV6 => CONFIG_IPV6,
            _ => return None,
        };
        if self.config.flags & flag == 0 { None } else { frame.ethertype() }
    }

    fn pod_out(&self, frame: &Frame<'_>) -> Answer {
        match self.family(frame).filter(|_| !frame.is_tagged) {
            None => Reason::SlowNotIp.into(),
            Some(family) => Answer::of(self.sent(frame, family)),
        }
    }

    fn sent(&self, frame: &Frame<'_>, family: u16) -> Result<Answer, Answer> {
        let bytes = frame.bytes;
        let ip = Ip::read(bytes, ETHERNET, family).ok_or(Reason::SlowTruncated)?;
        let (slot, pod) = self.pod_of(ip.source).ok_or(Reason::SlowSender)?;
        if pod.ifindex != frame.ifindex || mac(bytes, 6) != Some(pod.mac) {
            return Err(Reason::SlowSender.into());
        }
        let is_here = self.is_own(ip.destination);
        let other = match is_here {
            true => self.pod_slot(ip.destination),
            false => self.peer_slot(ip.destination),
        };
        let Some(other) = other else {
            let mark = ip.source_port(bytes).map(|(is_udp, port)| nat_bit(slot, is_udp, port));
            return Err(Answer::Slow(
                Reason::SlowNotAPod,
                mark.map_or(Effect::None, |(word, bit)| Effect::Mark(word, bit)),
            ));
        };
        let transport = ip.transport(bytes)?;
        if ip.length + ETHERNET != bytes.len() {
            return Err(Reason::SlowTruncated.into());
        }
        if transport.is_udp && transport.destination.to_be_bytes() == self.config.port {
            return Err(Reason::SlowTunnelPort.into());
        }
        if pod.flags & POD_FAST == 0 {
            return Err(Reason::SlowPodOff.into());
        }
        if self.is_marked(slot, transport.is_udp, transport.source) {
            return Err(Reason::SlowNat.into());
        }
        let flow = flow(ip.source, ip.destination, transport.source, transport.destination, transport.is_udp);
        if self.is_guarded() && self.slow_flows.contains(&flow) {
            return Err(Reason::SlowFlow.into());
        }
        if is_here {
            return self.same_node(frame, &ip, &transport, slot, other);
        }
        if mac(bytes, 0) != Some(pod.gateway) {
            return Err(Reason::SlowMac.into());
        }
        let peer = self.peers.get(&other).filter(|peer| peer.ifindex != 0).ok_or(Reason::SlowNoRoute)?;
        if ip.ttl <= 1 {
            return Err(Reason::SlowTtl.into());
        }
        let fits_tunnel =
            peer.flags & PEER_DIRECT != 0 || !ip.is_v4() || ip.length + OVERHEAD4 <= usize::from(u16::MAX);
        if !fits(frame, &ip, &transport, peer.mtu) || !fits_tunnel {
            return Err(Reason::SlowTooLarge.into());
        }
        let mut bytes = bytes.to_vec();
        set_ttl(&mut bytes, &ip);
        let reason = match (peer.flags & PEER_DIRECT != 0, ip.is_v4()) {
            (true, _) => Reason::FastDirect,
            (false, true) => {
                bytes = encapsulated(peer, &ip, &bytes[ETHERNET..]);
                Reason::FastTunnel
            }
            (false, false) => {
                bytes[..ETHERNET].copy_from_slice(&peer.template[TEMPLATE_INNER..]);
                Reason::FastDevice
            }
        };
        Ok(Answer::Fast(reason, Exit { ifindex: peer.ifindex, peer: Some(other), bytes }))
    }

    fn same_node(
        &self,
        frame: &Frame<'_>,
        ip: &Ip,
        transport: &Transport,
        from: u32,
        to: u32,
    ) -> Result<Answer, Answer> {
        let pod = self.pods.get(&to).filter(|pod| pod.ifindex != 0 && to != from).ok_or(Reason::SlowNotAPod)?;
        if pod.flags & POD_FAST == 0 {
            return Err(Reason::SlowPodOff.into());
        }
        if mac(frame.bytes, 0) != Some(pod.mac) {
            return Err(Reason::SlowMac.into());
        }
        if !fits(frame, ip, transport, pod.mtu) {
            return Err(Reason::SlowTooLarge.into());
        }
        if self.is_marked(to, transport.is_udp, transport.destination) {
            return Err(Reason::SlowNat.into());
        }
        let exit = Exit { ifindex: pod.ifindex, peer: None, bytes: frame.bytes.to_vec() };
        Ok(Answer::Fast(Reason::FastSameNode, exit))
    }

    fn wire_in(&self, frame: &Frame<'_>) -> Answer {
        let family = self.family(frame).filter(|_| frame.is_for_host && !frame.is_tagged);
        let outer = family.and_then(|family| Some((family, Ip::read(frame.bytes, ETHERNET, family)?)));
        let Some((family, outer)) = outer else { return Answer::NotOurs };
        let udp = ETHERNET + if outer.is_v4() { 20 } else { 40 };
        if !frame.has(udp + 8) {
            return Answer::NotOurs;
        }
        let local = match outer.is_v4() {
            true => IpAddr::from(self.config.local4),
            false => IpAddr::from(self.config.local6),
        };
        let is_plain = outer.protocol == UDP && !outer.has_options() && !outer.is_fragment();
        if is_plain && outer.destination == local && frame.bytes[udp + 2..udp + 4] == self.config.port {
            return Answer::of(self.decapsulated(frame, family, &outer, udp));
        }
        if self.is_own(outer.destination) {
            return Answer::of(self.received_direct(frame, &outer));
        }
        Answer::NotOurs
    }

    fn decapsulated(&self, frame: &Frame<'_>, family: u16, outer: &Ip, udp: usize) -> Result<Answer, Answer> {
        let bytes = frame.bytes;
        let (vxlan, inner) = (udp + 8, udp + 16);
        if !frame.has(inner + ETHERNET + if outer.is_v4() { 20 } else { 40 }) {
            return Err(Reason::SlowTruncated.into());
        }
        if bytes[udp + 6..udp + 8] == [0, 0] && !outer.is_v4() {
            return Err(Reason::SlowChecksum.into());
        }
        let lengths = [ETHERNET + outer.length, udp + usize::from(word(bytes, udp + 4).unwrap_or_default())];
        if lengths != [bytes.len(); 2] {
            return Err(Reason::SlowTruncated.into());
        }
        if bytes[vxlan..vxlan + 4] != [8, 0, 0, 0] || bytes[vxlan + 4..vxlan + 8] != self.config.vni {
            return Err(Reason::SlowVni.into());
        }
        let vtep = if outer.is_v4() { self.config.vtep4 } else { self.config.vtep6 };
        if mac(bytes, inner) != Some(vtep) {
            return Err(Reason::SlowMac.into());
        }
        if word(bytes, inner + 12) != Some(family) {
            return Err(Reason::SlowNotIp.into());
        }
        let ip = Ip::read(bytes, inner + ETHERNET, family).ok_or(Reason::SlowTruncated)?;
        let slot = self.peer_slot(ip.source).ok_or(Reason::SlowSender)?;
        let peer = self.peers.get(&slot).ok_or(Reason::SlowSender)?;
        if !is_address_of(peer, outer.source) {
            return Err(Reason::SlowSender.into());
        }
        let transport = ip.transport(bytes)?;
        if inner + ETHERNET + ip.length != bytes.len() {
            return Err(Reason::SlowTruncated.into());
        }
        if ip.ttl <= 1 {
            return Err(Reason::SlowTtl.into());
        }
        let ecn = inner_ecn(outer.class & ECN, ip.class & ECN).ok_or(Reason::SlowCongestion)?;
        let pod = self.receiver(frame, &ip, &transport)?;
        let mut bytes = bytes[inner..].to_vec();
        let ip = ip.moved_to(ETHERNET);
        set_ttl(&mut bytes, &ip);
        set_ecn(&mut bytes, &ip, ecn);
        Ok(delivered(bytes, pod, slot, Reason::FastTunnel))
    }

    /// What comes to a pod's address without a tunnel.
    fn received_direct(&self, frame: &Frame<'_>, ip: &Ip) -> Result<Answer, Answer> {
        let slot = self.peer_slot(ip.source).ok_or(Reason::SlowSender)?;
        let direct = |peer: &&Peer| peer.flags & PEER_DIRECT != 0 && peer.ifindex == frame.ifindex;
        self.peers.get(&slot).filter(direct).ok_or(Reason::SlowSender)?;
        let transport = ip.transport(frame.bytes)?;
        if ip.length + ETHERNET > frame.bytes.len() {
            return Err(Reason::SlowTruncated.into());
        }
        if ip.ttl <= 1 {
            return Err(Reason::SlowTtl.into());
        }
        let pod = self.receiver(frame, ip, &transport)?;
        let mut bytes = frame.bytes.to_vec();
        set_ttl(&mut bytes, ip);
        Ok(delivered(bytes, pod, slot, Reason::FastDirect))
    }

    /// The pod of this node that a packet is for, if it may have it.
    fn receiver(&self, frame: &Frame<'_>, ip: &Ip, transport: &Transport) -> Result<&Pod, Reason> {
        let (slot, pod) = self.pod_of(ip.destination).filter(|(_, pod)| pod.ifindex != 0).ok_or(Reason::SlowNotAPod)?;
        if pod.flags & POD_FAST == 0 {
            return Err(Reason::SlowPodOff);
        }
        if !fits(frame, ip, transport, pod.mtu) {
            return Err(Reason::SlowTooLarge);
        }
        if self.is_marked(slot, transport.is_udp, transport.destination) {
            return Err(Reason::SlowNat);
        }
        let flow = flow(ip.destination, ip.source, transport.destination, transport.source, transport.is_udp);
        if self.is_guarded() && self.slow_flows.contains(&flow) {
            return Err(Reason::SlowFlow);
        }
        Ok(pod)
    }

    fn noted(&self, effect: Option<Effect>) -> Answer {
        effect.map_or(Answer::NotOurs, |effect| Answer::Slow(Reason::SlowRecorded, effect))
    }

    fn received_slow(&self, frame: &Frame<'_>) -> Option<Effect> {
        let (ip, is_udp, [source, destination]) = self.with_ports(frame)?;
        let (slot, _) = self.pod_of(ip.destination).filter(|(_, pod)| pod.ifindex == frame.ifindex)?;
        if self.is_elsewhere(ip.source) {
            return Some(Effect::Record(slot, flow(ip.destination, ip.source, destination, source, is_udp)));
        }
        // Of this node: the port may be connection tracking's.
        let from = self.pod_slot(ip.source).filter(|_| self.is_guarded())?;
        let (word, bit) = nat_bit(from, is_udp, source);
        (!self.is_marked(from, is_udp, source)).then_some(Effect::Mark(word, bit))
    }

    fn sent_slow(&self, frame: &Frame<'_>) -> Option<Effect> {
        let (ip, is_udp, [source, destination]) = self.with_ports(frame).filter(|_| self.is_guarded())?;
        let slot = self.pod_slot(ip.source).filter(|_| self.is_elsewhere(ip.destination))?;
        let flow = flow(ip.source, ip.destination, source, destination, is_udp);
        (!self.is_marked(slot, is_udp, source)).then_some(Effect::Record(slot, flow))
    }

    fn is_elsewhere(&self, address: IpAddr) -> bool {
        !self.is_own(address) && self.peer_slot(address).is_some()
    }

    /// A packet of TCP or UDP, whether it is of UDP, and its ports. Extension headers aren't passed over here: what may be
    /// translated has none.
    fn with_ports(&self, frame: &Frame<'_>) -> Option<(Ip, bool, [u16; 2])> {
        let ip = Ip::read(frame.bytes, ETHERNET, self.family(frame)?)?;
        let (is_udp, source) = ip.source_port(frame.bytes).filter(|_| matches!(ip.protocol, TCP | UDP))?;
        let destination = word(frame.bytes, ip.transport_at() + 2)?;
        let minimum = ETHERNET + if ip.is_v4() { 28 } else { 48 };
        frame.has(minimum).then_some((ip, is_udp, [source, destination]))
    }

    fn is_guarded(&self) -> bool {
        self.config.flags & CONFIG_GUARD != 0
    }

    fn is_marked(&self, slot: u32, is_udp: bool, port: u16) -> bool {
        let (word, bit) = nat_bit(slot, is_udp, port);
        self.is_guarded() && self.nat_bits.get(&word).is_some_and(|bits| bits & bit != 0)
    }

    fn is_own(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => v4.to_bits() & self.config.own4_mask == self.config.own4,
            IpAddr::V6(v6) => v6.to_bits() & whole(self.config.own6_mask) == whole(self.config.own6),
        }
    }

    fn pod_slot(&self, address: IpAddr) -> Option<u32> {
        let slot = match address {
            IpAddr::V4(v4) => self.pod_index4.get(&(v4.to_bits() & !self.config.own4_mask)),
            IpAddr::V6(v6) => self.pod_index6.get(&Address6 { bytes: v6.octets() }),
        };
        slot.copied().filter(|slot| self.is_own(address) && *slot != 0)
    }

    fn pod_of(&self, address: IpAddr) -> Option<(u32, &Pod)> {
        let slot = self.pod_slot(address)?;
        Some((slot, self.pods.get(&slot)?))
    }

    fn peer_slot(&self, address: IpAddr) -> Option<u32> {
        let Config { network4, network4_mask, network6, network6_mask, subnet4_shift, subnet6_shift, .. } = self.config;
        let (index, network, mask, bits, shift) = match address {
            IpAddr::V4(v4) => {
                (&self.peer_index4, network4.into(), network4_mask.into(), v4.to_bits().into(), subnet4_shift)
            }
            IpAddr::V6(v6) => (&self.peer_index6, whole(network6), whole(network6_mask), v6.to_bits(), subnet6_shift),
        };
        (bits & mask == network).then_some(())?;
        index.get(&subnet_number(network, bits, shift)?).copied().filter(|slot| *slot != 0)
    }
}

fn whole([upper, lower]: [u64; 2]) -> u128 {
    u128::from(upper) << 64 | u128::from(lower)
}

fn is_address_of(peer: &Peer, address: IpAddr) -> bool {
    let bytes = match address {
        IpAddr::V4(v4) => crate::abi::padded(v4),
        IpAddr::V6(v6) => v6.octets(),
    };
    bytes != [0; 16] && (peer.underlay == bytes || peer.former == bytes)
}

fn flow(source: IpAddr, destination: IpAddr, from: u16, to: u16, is_udp: bool) -> Flow {
    let mapped = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => Ipv6Addr::octets(&v6),
    };
    Flow {
        source: mapped(source),
        destination: mapped(destination),
        source_port: from.to_be_bytes(),
        destination_port: to.to_be_bytes(),
        protocol: if is_udp { UDP } else { TCP },
        reserved: [0; 3],
    }
}

fn fits(frame: &Frame<'_>, ip: &Ip, transport: &Transport, mtu: u32) -> bool {
    let size = match frame.gso_size {
        0 => ip.length,
        segment => segment as usize + transport.headers,
    };
    size <= mtu as usize
}

/// What the packet inside carries when the outer one said `outer` (RFC 6040 section 4.2); `None` where the kernel would drop
/// it or do more.
fn inner_ecn(outer: u8, inner: u8) -> Option<u8> {
    match (outer, inner) {
        (0, _) => Some(inner),
        _ if outer == inner => Some(inner),
        (_, 0) | (1, 2) => None,
        (3, _) => Some(3),
        _ => Some(inner),
    }
}

/// One hop less.
fn set_ttl(bytes: &mut [u8], ip: &Ip) {
    if ip.is_v4() {
        change4(&mut bytes[ip.at..ip.at + 20], 8, ip.ttl - 1);
    } else {
        bytes[ip.at + 7] -= 1;
    }
}

fn set_ecn(bytes: &mut [u8], ip: &Ip, ecn: u8) {
    if ip.is_v4() {
        change4(&mut bytes[ip.at..ip.at + 20], 1, ip.class & !ECN | ecn);
    } else {
        bytes[ip.at + 1] = bytes[ip.at + 1] & !(ECN << 4) | ecn << 4;
    }
}

/// Changes a byte of an IPv4 header, and the checksum by the difference (RFC 1624, equation 3): one that was wrong stays so.
fn change4(header: &mut [u8], at: usize, value: u8) {
    let read = |header: &[u8], at: usize| u32::from(word(header, at & !1).expect("a whole header"));
    let before = read(header, at);
    if header[at] == value {
        return;
    }
    header[at] = value;
    let sum = (0xffff - read(header, 10)) + (0xffff - before) + read(header, at);
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    header[10..12].copy_from_slice(&(0xffff - folded).to_be_bytes()[2..]);
}

/// A packet whose hop is counted, in the headers that lead to its peer.
fn encapsulated(peer: &Peer, ip: &Ip, packet: &[u8]) -> Vec<u8> {
    let mut bytes = peer.template.to_vec();
    let length = u16::try_from(packet.len() + OVERHEAD4).expect("it was found to fit");
    bytes[TEMPLATE_IP + 1] = if ip.class & ECN == 3 { 2 } else { ip.class & ECN };
    bytes[TEMPLATE_IP + 2..TEMPLATE_IP + 4].copy_from_slice(&length.to_be_bytes());
    bytes[TEMPLATE_UDP + 4..TEMPLATE_UDP + 6].copy_from_slice(&(length - 20).to_be_bytes());
    let checksum = checksum4(&bytes[TEMPLATE_IP..TEMPLATE_UDP]);
    bytes[TEMPLATE_IP + 10..TEMPLATE_IP + 12].copy_from_slice(&checksum.to_be_bytes());
    bytes.extend_from_slice(packet);
    bytes
}

fn delivered(mut bytes: Vec<u8>, pod: &Pod, peer: u32, reason: Reason) -> Answer {
    bytes[..6].copy_from_slice(&pod.mac);
    bytes[6..12].copy_from_slice(&pod.gateway);
    Answer::Fast(reason, Exit { ifindex: pod.ifindex, peer: Some(peer), bytes })
}

const _: () = assert!(TEMPLATE_SIZE == ETHERNET + OVERHEAD4 && OVERHEAD6 == OVERHEAD4 + 20);
