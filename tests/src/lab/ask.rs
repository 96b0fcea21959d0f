//! Who answers: servers that tell their name and whom they see, and clients that ask by TCP or UDP.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};

use super::spaces::Spaces;

/// How often a server looks whether it is to end.
const TICK: Duration = Duration::from_millis(100);
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// A connection of TCP.
    Tcp,
    /// One datagram of UDP.
    Udp,
}

/// What comes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// This server has answered, and saw this address.
    From(String, IpAddr),
    /// The client was told at once that nobody is there.
    Refused,
    /// Nothing has come.
    Nothing,
}

impl Answer {
    /// The server's name, if one has answered.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::From(name, _) => Some(name),
            Self::Refused | Self::Nothing => None,
        }
    }
}

/// Answers by TCP and UDP at one address until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts one of this name.
    ///
    /// # Errors
    /// The address can't be used there.
    pub fn start(place: &Spaces, name: &str, tcp: SocketAddr, udp: SocketAddr) -> Result<Self> {
        let (listener, socket) = place.run(|| Ok((TcpListener::bind(tcp)?, UdpSocket::bind(udp)?)))?;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(TICK))?;
        let stop = Arc::new(AtomicBool::new(false));
        let answer = |name: &str, client: SocketAddr| format!("{name} {}", client.ip());
        let (ended, called) = (Arc::clone(&stop), name.to_owned());
        let tcp = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                match listener.accept() {
                    // A client that has gone meanwhile is fine.
                    Ok((mut stream, client)) => drop(stream.write_all(answer(&called, client).as_bytes())),
                    Err(_) => thread::sleep(TICK / 10),
                }
            }
        });
        let (ended, called) = (Arc::clone(&stop), name.to_owned());
        let udp = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                if let Ok((_, client)) = socket.recv_from(&mut [0; 64]) {
                    let _ = socket.send_to(answer(&called, client).as_bytes(), client);
                }
            }
        });
        Ok(Self { stop, threads: vec![tcp, udp] })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Asks at an address, from a place.
///
/// # Errors
/// The question can't be asked at all: there is no route, or the place is gone.
pub fn ask(place: &Spaces, by: By, target: SocketAddr) -> Result<Answer> {
    let asked = place.run(|| {
        Ok(match by {
            By::Tcp => TcpStream::connect_timeout(&target, PATIENCE).and_then(|mut stream| {
                let mut text = String::new();
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.read_to_string(&mut text).map(|_| text)
            }),
            By::Udp => {
                let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
                let socket = UdpSocket::bind(any)?;
                socket.set_read_timeout(Some(PATIENCE))?;
                let mut buffer = [0; 128];
                let asked =
                    socket.connect(target).and_then(|()| socket.send(b"who?")).and_then(|_| socket.recv(&mut buffer));
                asked.map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned())
            }
        })
    })?;
    match asked {
        Ok(text) => {
            let (name, client) = text.split_once(' ').with_context(|| format!("{target} says {text:?}"))?;
            Ok(Answer::From(name.to_owned(), client.parse()?))
        }
        Err(error) => match error.kind() {
            // Of UDP that is rejected on its own host the kernel tells by EPERM, before the ICMP message comes.
            ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied => Ok(Answer::Refused),
            ErrorKind::TimedOut | ErrorKind::WouldBlock => Ok(Answer::Nothing),
            _ => Err(error).with_context(|| format!("cannot ask {target} by {by:?}")),
        },
    }
}
