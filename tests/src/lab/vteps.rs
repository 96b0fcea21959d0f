//! The VTEPs of a crowd: what its nodes would answer to probes of the mesh, were they there.
//!
//! All of their underlay addresses are one machine's, on which one socket takes whatever comes encapsulated, and gives
//! it back from where it was sent to.

use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::libc::in_pktinfo;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, recvmsg, sendmsg, setsockopt, sockopt,
};

use super::Lab;
use super::packet::VXLAN_PORT;

/// VXLAN, Ethernet, IPv4 and UDP headers, which come before what a probe says.
const HEADERS: usize = 8 + 14 + 20 + 8;

/// Answers until it is dropped.
#[derive(Debug)]
pub struct Vteps {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Lab {
    /// Lets every peer of the crowd answer the mesh's probes, over IPv4.
    ///
    /// # Errors
    /// The underlay has a tunnel of its own.
    pub fn crowd_answers(&self) -> Result<Vteps> {
        let underlay = &self.underlay().machine;
        underlay.run(&["ip", "route", "add", "local", "198.18.0.0/15", "dev", "lo"])?;
        let socket = underlay.network()?.run(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, VXLAN_PORT)).context("the crowd's VTEPs")?;
            socket.set_read_timeout(Some(Duration::from_millis(100)))?;
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
            Ok(socket)
        })?;
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&answered));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if answer(&socket).is_ok_and(|came| came) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        Ok(Vteps { stop, answered, thread: Some(thread) })
    }
}

impl Vteps {
    /// How many probes were answered so far.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }
}

impl Drop for Vteps {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It ends within a read's time-out, and panics nowhere.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Takes one packet and gives it back. False when none came, or none that is a probe.
fn answer(socket: &UdpSocket) -> Result<bool> {
    let (mut packet, mut room) = ([0; 2048], nix::cmsg_space!(in_pktinfo));
    let (length, from, at) = {
        let mut buffer = [IoSliceMut::new(&mut packet)];
        let got = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut buffer, Some(&mut room), MsgFlags::empty());
        let got = match got.map_err(std::io::Error::from) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            got => got?,
        };
        let at = got.cmsgs()?.find_map(|message| match message {
            ControlMessageOwned::Ipv4PacketInfo(info) => Some(info),
            _ => None,
        });
        (got.bytes, got.address.context("a sender")?, at.context("where it was sent to")?)
    };
    let Some(answer) = turn(&mut packet[..length]) else { return Ok(false) };
    // From the address that it was sent to, by whatever way leads back.
    let info = in_pktinfo { ipi_ifindex: 0, ipi_spec_dst: at.ipi_addr, ipi_addr: at.ipi_addr };
    let back = SockaddrIn::from(SocketAddrV4::new(from.ip(), VXLAN_PORT));
    let message = [ControlMessage::Ipv4PacketInfo(&info)];
    sendmsg(socket.as_raw_fd(), &[IoSlice::new(answer)], &message, MsgFlags::empty(), Some(&back))?;
    Ok(true)
}

/// A probe made its own answer.
fn turn(packet: &mut [u8]) -> Option<&[u8]> {
    let (headers, said) = packet.split_at_mut_checked(HEADERS)?;
    let (is_ipv4_udp, probe) = (headers[20..22] == [8, 0] && headers[31] == 17, said.starts_with(b"FABM"));
    if !is_ipv4_udp || !probe {
        return None;
    }
    swap(headers, 8, 14, 6);
    swap(headers, 34, 38, 4);
    swap(headers, 42, 44, 2);
    // Without a checksum of UDP (RFC 768): the sender's kernel may have left it to a network card.
    headers[48..50].fill(0);
    *said.get_mut(5)? = 1;
    Some(packet)
}

/// Swaps two fields of so many bytes.
fn swap(bytes: &mut [u8], a: usize, b: usize, length: usize) {
    (0..length).for_each(|n| bytes.swap(a + n, b + n));
}
