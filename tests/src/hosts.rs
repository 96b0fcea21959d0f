//! Hosts of a test: network namespaces, each with a thread of its own that does what it is told.
//!
//! ```text
//!  client ── c0 │ this namespace, which routes │ b0 ── backend
//! ```

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};

use crate::lab::wait_until;
use crate::netns::ip;

/// Far more than an answer takes that comes at all.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long an answer is waited for that is not to come.
const SILENCE: Duration = Duration::from_millis(300);

type Job = Box<dyn FnOnce() + Send>;

/// A host, reached over a link from the namespace that made it. It goes when this is dropped.
pub struct Host {
    jobs: Sender<Job>,
}

impl Host {
    /// Makes one: its end of the link is `eth0` with these addresses, ours is `link` with the first address of each prefix,
    /// which is its gateway. Prefixes are /24 or /64.
    ///
    /// # Panics
    /// When it can't be made; it takes root.
    #[must_use]
    pub fn new(link: &str, gateways: [&str; 2], addresses: &[IpAddr]) -> Self {
        let (jobs, todo) = channel::<Job>();
        let (made, thread_id) = channel();
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own; is this root?");
            made.send(nix::unistd::gettid()).expect("who made it waits");
            todo.into_iter().for_each(|job| job());
        });
        let host = Self { jobs };
        let thread_id = thread_id.recv().expect("the thread tells");
        ip(&format!("link add {link} type veth peer name eth0 netns {thread_id}"));
        ip(&format!("link set {link} up"));
        let length = |address: &IpAddr| if address.is_ipv4() { "24" } else { "64 nodad" };
        let with_length = |address: &str| {
            let (address, length): (IpAddr, _) =
                (address.parse().expect("an address"), length(&address.parse().expect("one")));
            format!("{address}/{length}")
        };
        for gateway in gateways {
            ip(&format!("address add {} dev {link}", with_length(gateway)));
        }
        let addresses: Vec<String> = addresses.iter().map(|address| with_length(&address.to_string())).collect();
        let gateways = gateways.map(str::to_owned);
        host.run(move || {
            ip("link set lo up");
            ip("link set eth0 up");
            for address in addresses {
                ip(&format!("address add {address} dev eth0"));
            }
            for gateway in gateways {
                ip(&format!("route add default via {gateway}"));
            }
        });
        host
    }

    /// Does something there, and waits for it.
    ///
    /// # Panics
    /// When it does.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let job = move || drop(done.send(std::panic::catch_unwind(std::panic::AssertUnwindSafe(job))));
        self.jobs.send(Box::new(job)).expect("the host is there");
        result.recv().expect("a job ends").unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Answers there at an address, by TCP and UDP, with `ADDRESS CLIENT`: its own, and where it is asked from.
    ///
    /// # Panics
    /// When the address is taken.
    pub fn serve(&self, address: (IpAddr, u16)) {
        self.run(move || {
            let address = SocketAddr::from(address);
            let (tcp, udp) = (TcpListener::bind(address).expect("free"), UdpSocket::bind(address).expect("free"));
            thread::spawn(move || {
                while let Ok((mut stream, client)) = tcp.accept() {
                    thread::spawn(move || {
                        let mut asked = [0; 1];
                        while stream.read_exact(&mut asked).is_ok() {
                            let _ = stream.write_all(format!("{address} {}\n", client.ip()).as_bytes());
                        }
                    });
                }
            });
            thread::spawn(move || {
                let mut asked = [0; 1];
                while let Ok((_, client)) = udp.recv_from(&mut asked) {
                    let _ = udp.send_to(format!("{address} {}\n", client.ip()).as_bytes(), client);
                }
            });
        });
    }
}

/// Routes between the hosts of this namespace.
///
/// # Panics
/// When the settings can't be written.
pub fn forward() {
    for setting in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
        std::fs::write(format!("/proc/sys/net/{setting}"), "1").expect("root may write settings");
    }
}

/// Who answers at an address, and whom it thinks it answers: see [`Host::serve`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The backend.
    pub from: SocketAddr,
    /// The client, as the backend sees it.
    pub client: IpAddr,
}

fn answer(text: &str) -> Answer {
    let (from, client) = text.trim().split_once(' ').expect("two words");
    Answer { from: from.parse().expect("an address"), client: client.parse().expect("an address") }
}

/// A connection over which one asks again and again.
pub struct Connection(TcpStream);

impl Connection {
    /// Connects from this thread's namespace.
    ///
    /// # Errors
    /// As `connect` has them.
    pub fn open(to: (IpAddr, u16)) -> std::io::Result<Self> {
        let stream = TcpStream::connect_timeout(&to.into(), PATIENCE)?;
        Ok(Self(stream))
    }

    /// The port that it comes from.
    ///
    /// # Panics
    /// When the socket has none.
    #[must_use]
    pub fn local_port(&self) -> u16 {
        self.0.local_addr().expect("it is connected").port()
    }

    /// Asks once; `None` when there is no answer for long.
    ///
    /// # Panics
    /// When the answer is none.
    pub fn ask(&mut self) -> Option<Answer> {
        self.ask_within(PATIENCE)
    }

    /// Asks once, when no answer is to come.
    pub fn ask_in_vain(&mut self) -> Option<Answer> {
        self.ask_within(SILENCE)
    }

    fn ask_within(&mut self, limit: Duration) -> Option<Answer> {
        self.0.write_all(b"?").ok()?;
        self.listen(limit)
    }

    /// Waits for the answer to a question that was asked before.
    pub fn wait(&mut self) -> Option<Answer> {
        self.listen(PATIENCE)
    }

    fn listen(&mut self, limit: Duration) -> Option<Answer> {
        self.0.set_read_timeout(Some(limit)).expect("not zero");
        let mut text = vec![];
        let mut byte = [0; 1];
        while text.last() != Some(&b'\n') {
            self.0.read_exact(&mut byte).ok()?;
            text.push(byte[0]);
        }
        Some(answer(&String::from_utf8(text).expect("text")))
    }
}

/// Asks by TCP.
///
/// # Errors
/// As `connect` has them.
pub fn ask_tcp(to: (IpAddr, u16)) -> std::io::Result<Answer> {
    Ok(Connection::open(to)?.ask().expect("who accepts answers"))
}

/// Asks by TCP until there is an answer: links come up, and addresses and neighbours become usable, in their own time.
///
/// # Panics
/// When there is none after half a minute.
pub fn wait_for_answer(to: (IpAddr, u16)) {
    wait_until("a backend answers", Duration::from_secs(30), || Ok(ask_tcp(to)?)).expect("it does");
}

/// The next port to ask from. The kernel picks at random from 32768 on, so of some dozens one comes again now and then, and
/// meets what connection tracking has decided for it before.
static PORT: AtomicU16 = AtomicU16::new(20_000);

/// Asks by UDP, from a port that nobody had before.
///
/// # Errors
/// What came back instead: `ConnectionRefused`, or `WouldBlock` when nothing did.
pub fn ask_udp(to: (IpAddr, u16)) -> std::io::Result<Answer> {
    let any: IpAddr = if to.0.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, PORT.fetch_add(1, Ordering::Relaxed)))?;
    socket.connect(SocketAddr::from(to))?;
    ask_udp_by(&socket)
}

/// Asks by UDP over a socket that is connected.
///
/// # Errors
/// As [`ask_udp`].
///
/// # Panics
/// When the answer is none.
pub fn ask_udp_by(socket: &UdpSocket) -> std::io::Result<Answer> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.send(b"?")?;
    let mut text = [0; 200];
    let length = socket.recv(&mut text)?;
    Ok(answer(std::str::from_utf8(&text[..length]).expect("text")))
}
