//! What really passes an interface: a packet socket in its namespace, as tcpdump has one.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::packet::{Packet, VXLAN_PORT};
use super::spaces::Spaces;
use super::wait_until;

/// Room for bursts.
const RECEIVE_BUFFER: usize = 16 << 20;

/// How often the reader looks whether it shall stop, in microseconds.
const TICK: i64 = 50_000;

/// A running capture.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    packets: Arc<Mutex<Vec<Packet>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    /// Records all IP packets that pass an interface, both ways, from now on.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn start(network: &Spaces, interface: &str) -> Result<Self> {
        let (socket, index) = network.run(|| {
            let index = if_nametoindex(interface).with_context(|| format!("no interface {interface}"))?;
            let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            Ok((socket, index as usize))
        })?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::new(0, TICK))?;
        let (stop, packets) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(vec![])));
        let reader = {
            let (stop, packets) = (Arc::clone(&stop), Arc::clone(&packets));
            thread::spawn(move || {
                let mut frame = vec![0; 65_536];
                while !stop.load(Ordering::Relaxed) {
                    // The socket hears every interface of the namespace; one is asked for.
                    if let Ok((length, Some(from))) = recvfrom::<LinkAddr>(socket.as_raw_fd(), &mut frame)
                        && from.ifindex() == index
                        && let Some(packet) = Packet::parse(&frame[..length], VXLAN_PORT)
                    {
                        packets.lock().unwrap_or_else(PoisonError::into_inner).push(packet);
                    }
                }
            })
        };
        Ok(Self { stop, packets, reader: Some(reader) })
    }

    /// What has passed until now.
    #[must_use]
    pub fn packets(&self) -> Vec<Packet> {
        self.packets.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a packet and returns the first that fits.
    ///
    /// # Errors
    /// None passes in time: the error shows what did.
    pub fn wait_for(&self, what: &str, limit: Duration, fits: impl Fn(&Packet) -> bool) -> Result<Packet> {
        wait_until(what, limit, || {
            let packets = self.packets();
            let shown: Vec<String> = packets.iter().rev().take(10).map(ToString::to_string).collect();
            let found = packets.into_iter().find(&fits);
            ensure!(found.is_some(), "the last packets seen are:\n{}", shown.join("\n"));
            found.context("there is one")
        })
    }

    /// Ends the capture and returns all that has passed.
    #[must_use]
    pub fn stop(mut self) -> Vec<Packet> {
        self.end();
        self.packets()
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            reader.join().ok();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.end();
    }
}
