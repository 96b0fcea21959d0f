//! NetworkPolicies in the Lab: real nodes, pods and packets, and an API server that is told what there is.

mod changes;
mod drops;
mod evasion;
mod fast_path;
mod starts;
mod tiers;
mod truth;

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fabric_core::policy::Conn;
use fabric_tests::fake_api::FakeApi;
use fabric_tests::kubernetes::{Nodes as _, api_on_underlay};
use fabric_tests::lab::{Families, Lab, Node, Pod, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, pod, pods_of, policies_of, policy};
use serde_json::{Value, json};

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A lab whose nodes enforce the policies of an API server.
struct Cluster {
    api: FakeApi,
    env: Vec<(&'static str, String)>,
    /// Ends with this.
    _lab: Lab,
    nodes: Vec<Arc<Node>>,
}

impl Cluster {
    fn start(nodes: u16) -> Result<Self> {
        let mut lab = Lab::builder().families(Families::Dual).create()?;
        lab.etcd().start()?;
        lab.init_network()?;
        let api = api_on_underlay(&lab)?;
        let env = vec![("FABRICD_KUBECONFIG", api.kubeconfig(lab.dir())?.display().to_string())];
        let nodes: Vec<Arc<Node>> = (0..nodes).map(|_| lab.boot_node()).collect::<Result<_>>()?;
        Ok(Self { api, env, _lab: lab, nodes })
    }

    /// Starts the daemon of a node, and waits until policies are applied.
    fn start_fabricd(&self, node: &Node) -> Result<()> {
        self.start_fabricd_with(node, &[])
    }

    /// The same with more flags.
    fn start_fabricd_with(&self, node: &Node, flags: &[&str]) -> Result<()> {
        start_fabricd(node, flags, &self.env)?;
        wait_until("policies are applied", SOON, || {
            let reply = node.http_get(9472, "/readyz")?;
            ensure!(reply.status == 200, "{}", reply.body);
            Ok(())
        })
    }

    /// Makes a Pod, and attaches it to a node.
    fn add_pod(&self, node: &Arc<Node>, space: &str, name: &str) -> Result<Pod> {
        let uid = format!("uid-{space}-{name}");
        let mut object = pod(space, name, &[], &json!({"pod": name}));
        object["metadata"]["uid"] = json!(uid);
        self.api.create(&pods_of(space), object);
        // The API server gives it an uid of its own.
        let uid = self.object(space, name)?["metadata"]["uid"].as_str().context("a uid")?.to_owned();
        let attached = node.add_pod_of(space, name, &uid)?;
        let ips: Vec<Value> = attached.ips().iter().map(|ip| json!({"ip": ip.to_string()})).collect();
        self.api.change(&pods_of(space), name, &json!({"status": {"podIPs": ips}}));
        Ok(attached)
    }

    fn object(&self, space: &str, name: &str) -> Result<Value> {
        self.api.get(&pods_of(space), name).with_context(|| format!("no pod {space}/{name}"))
    }
}

/// Starts the daemon of a node.
fn start_fabricd(node: &Node, flags: &[&str], env: &[(&'static str, String)]) -> Result<()> {
    let env: Vec<(&str, &str)> = env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    node.start_fabricd_with(&[&["--network-policy", "on"], flags].concat(), &env)
}

/// What a pod listens on: ports of TCP, and of UDP where it sends back what comes.
const PORTS: [u16; 2] = [8080, 9090];

/// Listens in a pod until it is dropped.
struct Server {
    stop: Arc<AtomicBool>,
    echo: Option<JoinHandle<()>>,
    /// How many packets of UDP have come, by port.
    heard: Arc<[AtomicU64; 2]>,
}

impl Server {
    fn start(pod: &Pod) -> Result<Self> {
        let (tcp, udp) = pod.network()?.run(|| {
            let any: IpAddr = "::".parse()?;
            let tcp = PORTS.map(|port| TcpListener::bind((any, port)));
            let udp = PORTS.map(|port| UdpSocket::bind((any, port)));
            let tcp = tcp.into_iter().collect::<std::io::Result<Vec<_>>>()?;
            Ok((tcp, udp.into_iter().collect::<std::io::Result<Vec<_>>>()?))
        })?;
        for socket in &udp {
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        }
        for listener in &tcp {
            listener.set_nonblocking(true)?;
        }
        let (stop, heard) = (Arc::new(AtomicBool::new(false)), Arc::new([const { AtomicU64::new(0) }; 2]));
        let (stopped, hears) = (Arc::clone(&stop), Arc::clone(&heard));
        let echo = thread::spawn(move || {
            let mut buffer = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                // A queue that is full of connections nobody takes answers no further one (net.core.somaxconn).
                for listener in &tcp {
                    while listener.accept().is_ok() {}
                }
                for (socket, heard) in udp.iter().zip(hears.iter()) {
                    if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        heard.fetch_add(1, Ordering::Relaxed);
                        // Who asks sees whether it arrives.
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
            }
        });
        Ok(Self { stop, echo: Some(echo), heard })
    }

    fn heard(&self) -> [u64; 2] {
        [0, 1].map(|port| self.heard[port].load(Ordering::Relaxed))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(echo) = self.echo.take() {
            let _ = echo.join();
        }
    }
}

/// How long a connection may take that is allowed.
const PATIENCE: Duration = Duration::from_secs(4);

/// Whether a connection from a pod succeeds.
fn connects(from: &Pod, conn: &Conn) -> Result<bool> {
    reaches(from, conn, SocketAddr::new(conn.dst, conn.port))
}

/// The same of one to an address that leads there.
fn reaches(from: &Pod, conn: &Conn, to: SocketAddr) -> Result<bool> {
    from.network()?.run(|| {
        if conn.protocol == 6 {
            return match TcpStream::connect_timeout(&to, PATIENCE) {
                Ok(_) => Ok(true),
                Err(error) if error.kind() == ErrorKind::TimedOut => Ok(false),
                Err(error) => Err(error.into()),
            };
        }
        let socket = UdpSocket::bind((conn.src, 0))?;
        socket.set_read_timeout(Some(PATIENCE / 8))?;
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            socket.send_to(b"?", to)?;
            if socket.recv(&mut [0; 8]).is_ok() {
                return Ok(true);
            }
        }
        Ok(false)
    })
}

/// A connection of TCP that is open, and carries nothing unless it is asked to.
struct Open {
    client: TcpStream,
    accepted: TcpStream,
}

impl Open {
    /// Between the pods' addresses of this place in their lists.
    fn between(from: &Pod, to: &Pod, at: usize) -> Result<Self> {
        let listener = to.network()?.run(|| Ok(TcpListener::bind((to.ips()[at], 0))?))?;
        let client = from.network()?.run(|| Ok(TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?))?;
        let (accepted, _) = listener.accept()?;
        accepted.set_read_timeout(Some(Duration::from_millis(500)))?;
        Ok(Self { client, accepted })
    }

    /// Whether what the client says arrives.
    fn arrives(&mut self) -> Result<bool> {
        self.client.write_all(b"?")?;
        match self.accepted.read(&mut [0; 64]) {
            Ok(length) => Ok(length > 0),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Sends to an address from a pod, every millisecond, until it is dropped.
struct Sender(Arc<AtomicBool>);

impl Sender {
    fn start(from: &Pod, to: SocketAddr) -> Result<Self> {
        let any: IpAddr = if to.is_ipv4() { "0.0.0.0".parse()? } else { "::".parse()? };
        let socket = from.network()?.run(|| Ok(UdpSocket::bind((any, 0))?))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                // What isn't sent doesn't arrive.
                let _ = socket.send_to(b"!", to);
                thread::sleep(Duration::from_millis(1));
            }
        });
        Ok(Self(stop))
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A node, a namespace `open` without policies and one, `closed`, whose pods may send nothing and get nothing.
fn open_and_closed() -> Result<Cluster> {
    let cluster = Cluster::start(1)?;
    for space in ["open", "closed"] {
        cluster.api.create(NAMESPACES, namespace(space, &json!({})));
    }
    let nothing = json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]});
    cluster.api.create(&policies_of("closed"), policy("closed", "nothing", &nothing));
    cluster.start_fabricd(&cluster.nodes[0])?;
    Ok(cluster)
}
