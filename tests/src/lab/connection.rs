//! A TCP connection between two pods that stays open: every line sent comes back, in order, without reset.
//!
//! TCP sends lost packets again, so this doesn't count losses (that is [`Stream`](super::Stream)'s) but
//! finds what a connection can't survive: a reset, bytes missing or out of order, an endless stall.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;

use super::pod::Pod;
use super::wait_until;

/// Time between two requests.
const INTERVAL: Duration = Duration::from_millis(5);

/// A request without an answer for so long is a broken connection.
const PATIENCE: Duration = Duration::from_secs(30);

/// An open connection, in use.
#[derive(Debug)]
pub struct Connection {
    stop: Arc<AtomicBool>,
    echoed: Arc<AtomicU64>,
    client: Option<JoinHandle<Report>>,
    server: Option<JoinHandle<()>>,
}

/// How a connection went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Requests that came back as they were.
    pub echoed: u64,
    /// The slowest of them.
    pub longest_wait: Duration,
    /// What broke the connection, if something did.
    pub broken: Option<String>,
}

impl Connection {
    /// Opens a connection between the first addresses of both pods; it is in use when this returns.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn start(from: &Pod, to: &Pod) -> Result<Self> {
        let family = from.ips().first().copied().map(Family::of).context("a pod without address")?;
        let address = to.ip(family)?;
        let listener = to.network()?.run(|| Ok(TcpListener::bind((address, 0))?))?;
        let target = listener.local_addr()?;
        let mut client = from.network()?.run(|| Ok(TcpStream::connect_timeout(&target, Duration::from_secs(10))?))?;
        let (mut server, _) = listener.accept()?;
        client.set_nodelay(true)?;
        client.set_read_timeout(Some(PATIENCE))?;
        server.set_nodelay(true)?;

        let stop = Arc::new(AtomicBool::new(false));
        let echoed = Arc::new(AtomicU64::new(0));
        let server = thread::spawn(move || echo(&mut server));
        let client = {
            let (stop, echoed) = (Arc::clone(&stop), Arc::clone(&echoed));
            thread::spawn(move || ask(&mut client, &stop, &echoed))
        };
        let connection = Self { stop, echoed, client: Some(client), server: Some(server) };
        wait_until("the first echo", Duration::from_secs(10), || {
            ensure!(connection.echoed.load(Ordering::Relaxed) > 0, "none yet");
            Ok(())
        })?;
        Ok(connection)
    }

    /// Closes the connection and tells how it went.
    ///
    /// # Errors
    /// None but that of a bug in here.
    pub fn stop(mut self) -> Result<Report> {
        self.stop.store(true, Ordering::Relaxed);
        let report = self.client.take().and_then(|thread| thread.join().ok()).context("the client panicked")?;
        self.server.take().and_then(|thread| thread.join().ok()).context("the server panicked")?;
        Ok(report)
    }
}

impl Drop for Connection {
    /// A connection that nobody asks is closed too.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask(stream: &mut TcpStream, stop: &AtomicBool, echoed: &AtomicU64) -> Report {
    let mut report = Report::default();
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let request = report.echoed.to_be_bytes();
        let mut answer = [0; 8];
        if let Err(error) = stream.write_all(&request).and_then(|()| stream.read_exact(&mut answer)) {
            report.broken = Some(error.to_string());
            return report;
        }
        if answer != request {
            report.broken = Some(format!("sent {request:?}, got {answer:?}"));
            return report;
        }
        report.echoed += 1;
        report.longest_wait = report.longest_wait.max(asked.elapsed());
        echoed.store(report.echoed, Ordering::Relaxed);
        thread::sleep(INTERVAL);
    }
    report
}

fn echo(stream: &mut TcpStream) {
    let mut bytes = [0; 64];
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        if stream.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
}
