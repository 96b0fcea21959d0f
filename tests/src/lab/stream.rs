//! A numbered stream of UDP packets from one pod to another: what is lost, doubled or late shows.
//!
//! The sockets are opened inside the pods, the threads that use them run outside. The sender keeps to its
//! timetable: if the machine was busy it sends what is due in one go, so a gap at the receiver is never
//! one of the sender.

use std::collections::{BTreeSet, HashSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use nix::sys::socket::{setsockopt, sockopt};

use super::pod::Pod;
use super::wait_until;

/// Packets per second unless told otherwise.
const RATE: u32 = 1_000;

/// How long the receiver waits for packets that are under way when the sender has stopped.
const GRACE: Duration = Duration::from_secs(2);

/// How long the first packet may take.
const FIRST_PACKET: Duration = Duration::from_secs(10);

/// How much a sender that is late makes up for.
const LATE: Duration = Duration::from_millis(200);

/// Room for four thousand packets, so that none is lost inside the receiver's socket.
const RECEIVE_BUFFER: usize = 4 << 20;

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    what: String,
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    sender: Option<JoinHandle<Sent>>,
    receiver: Option<JoinHandle<Received>>,
    /// Set by the sender at its end: the number of packets that were due.
    total: Arc<AtomicU64>,
}

/// How a stream went.
#[derive(Clone, Debug)]
pub struct Report {
    /// Packets that were due before the first one arrived: the stream didn't flow yet.
    pub early: u64,
    /// Packets due since.
    pub sent: u64,
    /// Different packets that arrived.
    pub received: u64,
    /// Packets that never arrived, those included that could not even be sent.
    pub lost: u64,
    /// Packets that arrived once more.
    pub duplicated: u64,
    /// Packets refused by the sender's own kernel, early ones included.
    pub refused: u64,
    /// The first such reason.
    pub refusal: Option<String>,
    /// The longest time without any packet.
    pub longest_gap: Duration,
    /// The source addresses that the receiver saw.
    pub sources: BTreeSet<IpAddr>,
}

#[derive(Debug, Default)]
struct Sent {
    refused: u64,
    refusal: Option<String>,
}

#[derive(Debug, Default)]
struct Received {
    numbers: HashSet<u64>,
    duplicated: u64,
    longest_gap: Duration,
    sources: BTreeSet<IpAddr>,
}

impl Received {
    /// True when nothing since the first packet is missing any more.
    fn is_complete(&self, total: u64) -> bool {
        self.numbers.iter().min().is_some_and(|first| self.numbers.len() as u64 == total - first)
    }
}

impl Stream {
    /// Starts a stream of 1,000 packets per second between the first addresses of both pods; it flows
    /// when this returns.
    ///
    /// # Errors
    /// No packet arrives.
    pub fn start(from: &Pod, to: &Pod) -> Result<Self> {
        let family = from.ips().first().copied().map(Family::of).context("a pod without address")?;
        Self::start_with(from, to, family, RATE)
    }

    /// Starts a stream of a given family and rate (packets per second).
    ///
    /// # Errors
    /// No packet arrives.
    pub fn start_with(from: &Pod, to: &Pod, family: Family, rate: u32) -> Result<Self> {
        let what = format!("{} → {} ({family})", from.full_name(), to.full_name());
        let source = udp_socket(from, family)?;
        let sink = udp_socket(to, family)?;
        let target = sink.local_addr()?;
        setsockopt(&sink, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
        sink.set_read_timeout(Some(Duration::from_millis(50)))?;

        let stop = Arc::new(AtomicBool::new(false));
        let total = Arc::new(AtomicU64::new(u64::MAX));
        let (sent, received) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let sender = {
            let (stop, sent, total) = (Arc::clone(&stop), Arc::clone(&sent), Arc::clone(&total));
            let interval = Duration::from_secs(1) / rate;
            thread::spawn(move || send(&source, target, interval, &stop, &sent, &total))
        };
        let receiver = {
            let (total, received) = (Arc::clone(&total), Arc::clone(&received));
            thread::spawn(move || receive(&sink, &total, &received))
        };
        let stream = Self { what, stop, sent, received, sender: Some(sender), receiver: Some(receiver), total };
        stream.wait_for(1, FIRST_PACKET)?;
        Ok(stream)
    }

    /// How many packets have been sent until now.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// How many packets have arrived until now.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Waits until so many packets more have arrived: a fault's aftermath seen from the wire.
    ///
    /// # Errors
    /// They don't arrive in time.
    pub fn wait_for(&self, more: u64, limit: Duration) -> Result<()> {
        let before = self.received();
        wait_until(&format!("{more} packets {}", self.what), limit, || {
            ensure!(self.received() >= before + more, "{} arrived", self.received() - before);
            Ok(())
        })
    }

    /// Stops the sender, waits for what is under way, and tells how it went.
    ///
    /// # Errors
    /// None but that of a bug in here.
    pub fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let sent = self.sender.take().and_then(|thread| thread.join().ok()).context("the sender panicked")?;
        let got = self.receiver.take().and_then(|thread| thread.join().ok()).context("the receiver panicked")?;
        let total = self.total.load(Ordering::Acquire);
        let early = got.numbers.iter().min().copied().unwrap_or(total);
        let (sent_since, received) = (total - early, got.numbers.len() as u64);
        Ok(Report {
            early,
            sent: sent_since,
            received,
            lost: sent_since - received,
            duplicated: got.duplicated,
            refused: sent.refused,
            refusal: sent.refusal,
            longest_gap: got.longest_gap,
            sources: got.sources,
        })
    }
}

impl Drop for Stream {
    /// A stream that nobody asks ends too, by itself and soon.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn send(
    socket: &UdpSocket,
    target: SocketAddr,
    interval: Duration,
    stop: &AtomicBool,
    count: &AtomicU64,
    total: &AtomicU64,
) -> Sent {
    let mut sent = Sent::default();
    let mut number: u64 = 0;
    let mut due = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if let Err(error) = socket.send_to(&number.to_be_bytes(), target) {
            sent.refused += 1;
            sent.refusal.get_or_insert_with(|| error.to_string());
        }
        number += 1;
        count.store(number, Ordering::Relaxed);
        // A sender that got no CPU for a while doesn't make up for it: such a burst is lost in the receiver's socket.
        due = due.max(Instant::now().checked_sub(LATE).unwrap_or(due)) + interval;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    total.store(number, Ordering::Release);
    sent
}

fn receive(socket: &UdpSocket, total: &AtomicU64, count: &AtomicU64) -> Received {
    let mut got = Received::default();
    let mut last: Option<Instant> = None;
    let mut sender_ended: Option<Instant> = None;
    loop {
        let total = total.load(Ordering::Acquire);
        if total != u64::MAX {
            let ended = *sender_ended.get_or_insert_with(Instant::now);
            if got.is_complete(total) || ended.elapsed() > GRACE {
                return got;
            }
        }
        let mut packet = [0; 8];
        match socket.recv_from(&mut packet) {
            Ok((8, source)) => {
                if !got.numbers.insert(u64::from_be_bytes(packet)) {
                    got.duplicated += 1;
                }
                got.sources.insert(source.ip());
                let now = Instant::now();
                got.longest_gap = last.map_or(got.longest_gap, |last| got.longest_gap.max(now - last));
                last = Some(now);
                count.store(got.numbers.len() as u64, Ordering::Relaxed);
            }
            Ok(_) => {}
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return got,
        }
    }
}

/// A socket in the pod, bound to its own address.
pub(super) fn udp_socket(pod: &Pod, family: Family) -> Result<UdpSocket> {
    let ip = pod.ip(family)?;
    let bind = || UdpSocket::bind((ip, 0)).with_context(|| format!("cannot bind {ip} in {}", pod.full_name()));
    pod.network()?.run(bind)
}
