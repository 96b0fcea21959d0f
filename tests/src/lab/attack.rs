//! What an attacker sends: encapsulated packets that no node made, messages that only a router may send, frames with tags.
//!
//! A packet to a pod is built whole, inner Ethernet header included, and sent as what UDP carries: so it comes from
//! wherever the sender is, and is cut into fragments where the sender's MTU says so.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use fabric_core::model::{Family, MacAddr};

use super::packet::VXLAN_PORT;
use super::pod::Pod;
use super::spaces::Spaces;
use super::stream::udp_socket;

/// How long a packet may take that arrives.
const PATIENCE: Duration = Duration::from_millis(300);

/// A UDP packet in VXLAN.
#[derive(Clone, Debug)]
pub struct Forged {
    /// The VTEP that it is for.
    pub vtep: MacAddr,
    /// The VXLAN network.
    pub vni: u32,
    /// Where it claims to come from, inside.
    pub source: IpAddr,
    /// How many bytes the inner packet carries: many make fragments of the outer one.
    pub size: usize,
}

impl Forged {
    /// Sends it from `sender` to the node at `node`, and tells whether `pod` got it.
    ///
    /// # Errors
    /// A socket can't be opened.
    pub fn reaches(&self, sender: &Spaces, node: IpAddr, pod: &Pod) -> Result<bool> {
        let sink = udp_socket(pod, Family::of(self.source))?;
        sink.set_read_timeout(Some(PATIENCE))?;
        // The first may be lost while the way is looked up; an attacker has patience.
        for _ in 0..3 {
            self.send(sender, node, sink.local_addr()?)?;
            let mut got = vec![0; self.size + 1];
            match sink.recv_from(&mut got) {
                Ok((length, from)) => return Ok(length == self.size && from.ip() == self.source),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => bail!("the pod's socket: {error}"),
            }
        }
        Ok(false)
    }

    /// Sends it once from `sender` to the node at `node`, for whoever listens at `target` inside.
    ///
    /// # Errors
    /// A socket can't be opened.
    pub fn send(&self, sender: &Spaces, node: IpAddr, target: SocketAddr) -> Result<()> {
        let any: IpAddr = if node.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = sender.run(|| UdpSocket::bind((any, 0)).context("a socket to attack from"))?;
        socket.send_to(&self.packet(target)?, (node, VXLAN_PORT)).context("cannot send the forged packet")?;
        Ok(())
    }

    /// VXLAN header, Ethernet header, IP header, UDP header, zeros: what UDP carries to the node.
    ///
    /// # Errors
    /// Source and target are of two families.
    pub fn packet(&self, target: SocketAddr) -> Result<Vec<u8>> {
        let mut packet = (0x0800_0000_u32).to_be_bytes().to_vec();
        packet.extend((self.vni << 8).to_be_bytes());
        packet.extend(self.vtep.octets());
        packet.extend([2, 0, 0, 0, 0, 1]);
        packet.extend(behind_the_addresses(self.source, target, self.size)?);
        Ok(packet)
    }
}

/// What stands behind the addresses of a frame with a UDP packet: Ethernet type, IP header, UDP header, zeros.
fn behind_the_addresses(source: IpAddr, target: SocketAddr, size: usize) -> Result<Vec<u8>> {
    let mut packet = vec![];
    let length = u16::try_from(8 + size)?;
    let mut udp = [7_u16, target.port(), length, 0].iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<u8>>();
    udp.resize(8 + size, 0);
    match (source, target.ip()) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            packet.extend([8, 0]);
            let mut header = vec![0x45, 0];
            header.extend((20 + length).to_be_bytes());
            header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
            header.extend(source.octets());
            header.extend(target.octets());
            let sum = checksum(&header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            packet.extend(header);
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([17, 64]);
            packet.extend(source.octets());
            packet.extend(target.octets());
            let pseudo = [&source.octets()[..], &target.octets(), &[0, 0], &length.to_be_bytes(), &[0, 0, 0, 17]];
            let sum = checksum(&[&pseudo.concat()[..], &udp].concat());
            udp[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        _ => bail!("{source} and {target} are of two families"),
    }
    packet.extend(udp);
    Ok(packet)
}

/// Sends a UDP packet that claims to be from `source` from a pod to another on its bridge, in a frame with these tags (`ETH_P_8021Q`, `ETH_P_8021AD`), and tells
/// whether it got there. The tags are of VLAN 0, which is none: whoever gets such a frame takes the packet behind them.
///
/// # Errors
/// A socket can't be opened.
pub fn frame_reaches(from: &Pod, source: IpAddr, to: &Pod, tags: &[u16]) -> Result<bool> {
    use nix::ifaddrs::getifaddrs;
    use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, sendto, socket};
    use std::os::fd::AsRawFd as _;

    let family = Family::of(source);
    let sink = udp_socket(to, family)?;
    sink.set_read_timeout(Some(PATIENCE))?;
    let eth0 = |pod: &Pod| {
        pod.network()?.run(|| {
            let of_link = |link: nix::ifaddrs::InterfaceAddress| link.address?.as_link_addr().copied();
            let mut links = getifaddrs()?.filter(|link| link.interface_name == "eth0").filter_map(of_link);
            let eth0: LinkAddr = links.next().context("no eth0")?;
            Ok(eth0)
        })
    };
    let (own, other) = (eth0(from)?, eth0(to)?);
    let mut frame = [other.addr().context("no MAC address")?, own.addr().context("no MAC address")?].concat();
    tags.iter().for_each(|tag| frame.extend([tag.to_be_bytes(), [0, 0]].concat()));
    let target = SocketAddr::new(to.ip(family)?, sink.local_addr()?.port());
    frame.extend(behind_the_addresses(source, target, 9)?);
    let open = || Ok(socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?);
    let socket = from.network()?.run(open)?;
    for _ in 0..3 {
        sendto(socket.as_raw_fd(), &frame, &own, MsgFlags::empty())?;
        match sink.recv_from(&mut [0; 64]) {
            Ok(_) => return Ok(true),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => bail!("the pod's socket: {error}"),
        }
    }
    Ok(false)
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0)
}

/// Sends a router advertisement (RFC 4861 section 4.2) from a pod to its whole link.
///
/// # Errors
/// The pod's kernel refuses.
pub fn advertise_router(pod: &Pod) -> Result<()> {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt, socket, sockopt,
    };
    use std::os::fd::AsRawFd as _;

    let index: u32 = pod.run(&["cat", "/sys/class/net/eth0/ifindex"])?.trim().parse()?;
    let open = || {
        let (family, kind) = (AddressFamily::Inet6, SockType::Raw);
        Ok(socket(family, kind, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)?)
    };
    let socket = pod.network()?.run(open)?;
    setsockopt(&socket, sockopt::Ipv6MulticastHops, &255)?;
    // Type 134, code 0, checksum (the kernel's to fill in), hop limit 64, no flags, lifetime 1800 s, no timers.
    let message = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let everybody = std::net::SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index);
    sendto(socket.as_raw_fd(), &message, &SockaddrIn6::from(everybody), MsgFlags::empty())?;
    Ok(())
}
