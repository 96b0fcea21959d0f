//! Traffic between two ends: as much as goes through, for the time of a slice, and what that cost the CPUs; or, with [`Whole`],
//! what one piece of it costs the one thread that does all of it.

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::socket::{setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};

use super::usage;
use crate::lab::spaces::Spaces;

/// Until a connection has its speed.
const WARM_UP: Duration = Duration::from_millis(200);
/// What is written in one go: as iperf3 does.
const BLOCK: usize = 128 << 10;
/// What a small packet carries, in bytes.
const SMALL: usize = 64;
/// Somebody who waits for packets looks so often whether it is over.
const LOOK: Duration = Duration::from_millis(50);

/// One end: a network namespace with an address in it.
#[derive(Debug)]
pub struct End {
    /// Where its sockets are opened.
    pub network: Spaces,
    /// Its address.
    pub ip: IpAddr,
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// TCP connections, each as fast as it goes. Counted in bytes.
    Streams(usize),
    /// One byte there and back, over and over on one TCP connection. Counted in round trips.
    RoundTrips,
    /// UDP packets of 64 bytes, as fast as one thread can send them. Counted where they arrive.
    SmallPackets,
}

/// What was carried in one slice.
#[derive(Clone, Copy, Debug)]
pub struct Carried {
    /// Bytes, round trips or packets, in a second.
    pub rate: f64,
    /// What one of them cost: time of all CPUs together, in nanoseconds. Both ends, and whatever else ran.
    pub cpu_ns: f64,
}

impl Load {
    /// Sends for one slice.
    ///
    /// # Errors
    /// The ends don't reach each other.
    pub fn carry(self, from: &End, to: &End, slice: Duration) -> Result<Carried> {
        let meter = Meter::default();
        match self {
            Self::Streams(streams) => {
                let mut pairs = (0..streams).map(|_| connected(from, to)).collect::<Result<Vec<_>>>()?;
                scope(|scope| {
                    for (source, sink) in &mut pairs {
                        scope.spawn(|| pour(source, &meter));
                        scope.spawn(|| drain(sink, &meter));
                    }
                    meter.take(slice)
                })
            }
            Self::RoundTrips => {
                let (mut client, mut server) = connected(from, to)?;
                client.set_nodelay(true)?;
                server.set_nodelay(true)?;
                scope(|scope| {
                    scope.spawn(|| ask(&mut client, &meter));
                    scope.spawn(|| echo(&mut server));
                    meter.take(slice)
                })
            }
            Self::SmallPackets => {
                let (source, sink) = datagrams(from, to)?;
                sink.set_read_timeout(Some(LOOK))?;
                scope(|scope| {
                    scope.spawn(|| flood(&source, &meter));
                    scope.spawn(|| catch(&sink, &meter));
                    meter.take(slice)
                })
            }
        }
    }
}

/// A connection from one end to the other: both sides of it.
fn connected(from: &End, to: &End) -> Result<(TcpStream, TcpStream)> {
    let listener = to.network.run(|| Ok(TcpListener::bind((to.ip, 0))?))?;
    let target = listener.local_addr()?;
    let client = from.network.run(|| Ok(TcpStream::connect_timeout(&target, Duration::from_secs(10))?));
    let client = client.with_context(|| format!("no connection from {} to {}", from.ip, to.ip))?;
    Ok((client, listener.accept()?.0))
}

/// A socket at each end, the first connected to the other.
fn datagrams(from: &End, to: &End) -> Result<(UdpSocket, UdpSocket)> {
    let sink = to.network.run(|| Ok(UdpSocket::bind((to.ip, 0))?))?;
    let target = sink.local_addr()?;
    let source = from.network.run(|| {
        let socket = UdpSocket::bind((from.ip, 0))?;
        socket.connect(target)?;
        Ok(socket)
    })?;
    Ok((source, sink))
}

/// Both ends in one thread, which sends, and then takes what it has sent. In between the kernel does its work in the same
/// thread, so nobody is woken and nobody waits: what the thread takes is the cost of the whole way, however busy the machine is.
#[derive(Debug)]
pub enum Whole {
    /// Blocks of 64 KiB.
    Stream(TcpStream, TcpStream),
    /// One byte there and back.
    RoundTrips(TcpStream, TcpStream),
    /// UDP packets of 64 bytes.
    SmallPackets(UdpSocket, UdpSocket),
}

impl Whole {
    /// Nothing that is on its way takes longer.
    const LIMIT: Duration = Duration::from_secs(5);
    /// Packets that are sent before they are taken: all of them find room.
    const BURST: usize = 32;

    /// Connects the ends.
    ///
    /// # Errors
    /// They don't reach each other.
    pub fn open(load: Load, from: &End, to: &End) -> Result<Self> {
        if load == Load::SmallPackets {
            let (source, sink) = datagrams(from, to)?;
            sink.set_read_timeout(Some(Self::LIMIT))?;
            return Ok(Self::SmallPackets(source, sink));
        }
        let (client, server) = connected(from, to)?;
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(Self::LIMIT))?;
            // A block has to find room before anybody reads.
            setsockopt(stream, sockopt::SndBuf, &(8 * BLOCK))?;
        }
        Ok(match load {
            Load::RoundTrips => Self::RoundTrips(client, server),
            _ => Self::Stream(client, server),
        })
    }

    /// Nanoseconds of CPU for one packet, round trip or block: over a batch that takes some milliseconds.
    ///
    /// # Errors
    /// Something is lost.
    pub fn batch(&mut self) -> Result<f64> {
        let began = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
        let count = match self {
            Self::Stream(client, server) => {
                let mut block = vec![0; BLOCK / 2];
                for _ in 0..40 {
                    client.write_all(&block)?;
                    server.read_exact(&mut block)?;
                }
                40
            }
            Self::RoundTrips(client, server) => {
                let mut byte = [0];
                for _ in 0..200 {
                    client.write_all(&byte)?;
                    server.read_exact(&mut byte)?;
                    server.write_all(&byte)?;
                    client.read_exact(&mut byte)?;
                }
                200
            }
            Self::SmallPackets(source, sink) => {
                let mut packet = [0; SMALL];
                for _ in 0..20 {
                    (0..Self::BURST).try_for_each(|_| source.send(&packet).map(drop))?;
                    (0..Self::BURST).try_for_each(|_| sink.recv(&mut packet).map(drop))?;
                }
                20 * Self::BURST
            }
        };
        let took = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)? - began;
        #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
        let each = Duration::from(took).as_secs_f64() * 1e9 / count as f64;
        Ok(each)
    }
}

/// What all workers of a load count together, and whether they are to end.
#[derive(Default)]
struct Meter {
    count: AtomicU64,
    over: AtomicBool,
}

impl Meter {
    /// Takes what is counted from the end of the warm-up to that of the slice, and ends it.
    fn take(&self, slice: Duration) -> Result<Carried> {
        let moment = || anyhow::Ok((self.count.load(Ordering::Relaxed), Instant::now(), usage::busy()?));
        sleep(WARM_UP);
        let before = moment();
        sleep(slice);
        let after = moment();
        self.over.store(true, Ordering::Relaxed);
        let ((first, began, busy_then), (last, ended, busy_now)) = (before?, after?);
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let carried = (last - first) as f64;
        let cpu_ns = (busy_now - busy_then).as_secs_f64() * 1e9 / carried.max(1.0);
        Ok(Carried { rate: carried / (ended - began).as_secs_f64(), cpu_ns })
    }

    fn add(&self, number: usize) {
        self.count.fetch_add(number as u64, Ordering::Relaxed);
    }

    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

fn pour(source: &mut TcpStream, meter: &Meter) {
    let block = vec![0; BLOCK];
    while !meter.is_over() && source.write_all(&block).is_ok() {}
    let _ = source.shutdown(Shutdown::Both);
}

fn drain(sink: &mut TcpStream, meter: &Meter) {
    let mut block = vec![0; BLOCK];
    while let Ok(bytes @ 1..) = sink.read(&mut block) {
        meter.add(bytes);
    }
}

fn ask(client: &mut TcpStream, meter: &Meter) {
    let mut byte = [0];
    while !meter.is_over() && client.write_all(&byte).and_then(|()| client.read_exact(&mut byte)).is_ok() {
        meter.add(1);
    }
    let _ = client.shutdown(Shutdown::Both);
}

fn echo(server: &mut TcpStream) {
    let mut byte = [0];
    while server.read_exact(&mut byte).and_then(|()| server.write_all(&byte)).is_ok() {}
}

fn flood(source: &UdpSocket, meter: &Meter) {
    while !meter.is_over() {
        // What finds no room is lost: only what arrives counts.
        let _ = source.send(&[0; SMALL]);
    }
}

fn catch(sink: &UdpSocket, meter: &Meter) {
    let mut packet = [0; 2 * SMALL];
    while !meter.is_over() {
        if sink.recv(&mut packet).is_ok() {
            meter.add(1);
        }
    }
}
