//! NetworkPolicies in the Lab: real nodes, pods and packets, and an API server that is told what there is.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_core::policy::objects::{NamespaceObject, PodObject, PolicyObject};
use fabric_core::policy::sets::{NamespaceSet, PodSet, PolicySet};
use fabric_core::policy::{Cluster as Judge, Conn, State};
use fabric_tests::fake_api::FakeApi;
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::lab::attack::frame_reaches;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{Connection, Families, Lab, Node, Pod, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, pod, pods_of, policies_of, policy};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

/// A lab whose nodes put the policies of an API server in force.
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
        let api = lab.underlay().machine.network()?.run(|| FakeApi::start(([10, 99, 0, 2], 6443).into()))?;
        let env = vec![("FABRICD_KUBECONFIG", api.kubeconfig(lab.dir())?.display().to_string())];
        let nodes: Vec<Arc<Node>> = (0..nodes).map(|_| lab.boot_node()).collect::<Result<_>>()?;
        Ok(Self { api, env, _lab: lab, nodes })
    }

    /// Starts the daemon of a node, and waits until policies are in force.
    fn start_fabricd(&self, node: &Node) -> Result<()> {
        self.start_fabricd_with(node, &[])
    }

    /// The same with more flags.
    fn start_fabricd_with(&self, node: &Node, flags: &[&str]) -> Result<()> {
        start_fabricd(node, flags, &self.env)?;
        wait_until("policies are in force", SOON, || {
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
    _tcp: Vec<TcpListener>,
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
        let (stop, heard) = (Arc::new(AtomicBool::new(false)), Arc::new([const { AtomicU64::new(0) }; 2]));
        let (stopped, hears) = (Arc::clone(&stop), Arc::clone(&heard));
        let echo = thread::spawn(move || {
            let mut buffer = [0; 64];
            while !stopped.load(Ordering::Relaxed) {
                for (socket, heard) in udp.iter().zip(hears.iter()) {
                    if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                        heard.fetch_add(1, Ordering::Relaxed);
                        // Who asks sees whether it arrives.
                        let _ = socket.send_to(&buffer[..length], from);
                    }
                }
            }
        });
        Ok(Self { _tcp: tcp, stop, echo: Some(echo), heard })
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
    let to = SocketAddr::new(conn.dst, conn.port);
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

/// All connections of these to each other that differ from what policies say, in words.
fn wrong(pods: &BTreeMap<String, Pod>, judge: &Judge<'_>) -> Result<Vec<String>> {
    let mut conns = vec![];
    for (from, source) in pods {
        for (to, target) in pods.iter().filter(|(to, _)| *to != from) {
            for (src, dst) in source.ips().iter().flat_map(|src| target.ips().iter().map(move |dst| (*src, *dst))) {
                if src.is_ipv4() == dst.is_ipv4() {
                    let ports = [6, 17].into_iter().flat_map(|protocol| PORTS.map(|port| (protocol, port)));
                    let all = ports.map(|(protocol, port)| Conn { src, dst, protocol, port });
                    conns.extend(all.map(|conn| (from.clone(), to.clone(), conn)));
                }
            }
        }
    }
    let mut wrong = vec![];
    for batch in conns.chunks(200) {
        let seen: Vec<Result<bool>> = thread::scope(|scope| {
            let probe = |(from, _, conn): &(String, String, Conn)| {
                let (pod, conn) = (&pods[from], *conn);
                scope.spawn(move || connects(pod, &conn))
            };
            let probes: Vec<_> = batch.iter().map(probe).collect();
            probes.into_iter().map(|probe| probe.join().expect("a probe does not panic")).collect()
        });
        for ((from, to, conn), seen) in batch.iter().zip(seen) {
            let (said, seen) = (judge.evaluate(conn), seen.with_context(|| format!("{from} to {to}: {conn:?}"))?);
            if said.is_allowed() != seen {
                wrong.push(format!("{from} → {to} {conn:?}: {}; {} | {}", seen, said.egress, said.ingress));
            }
        }
    }
    Ok(wrong)
}

/// The state as a test knows it: what it gave the API server.
fn state(cluster: &Cluster, namespaces: &[Value], pods: &BTreeMap<String, Pod>, policies: &[Value]) -> Result<State> {
    fn read<T: serde::de::DeserializeOwned>(objects: &[Value]) -> Result<Vec<T>> {
        objects.iter().map(|object| Ok(serde_json::from_value(object.clone())?)).collect()
    }
    let objects = pods.keys().map(|name| {
        let (space, name) = name.split_once('/').context("a name")?;
        cluster.object(space, name)
    });
    let objects = objects.collect::<Result<Vec<Value>>>()?;
    Ok(State {
        policies: PolicySet::default().listed(&read::<PolicyObject>(policies)?).policies().clone(),
        namespaces: NamespaceSet::listed(&read::<NamespaceObject>(namespaces)?).namespaces().clone(),
        pods: PodSet::listed(&read::<PodObject>(&objects)?).pods().clone(),
        ..State::default()
    })
}

#[test]
fn every_connection_of_nine_pods_on_two_nodes_is_what_policies_say() -> Result<()> {
    let cluster = Cluster::start(2)?;
    let spaces = ["x", "y", "z"];
    let namespaces = spaces.map(|space| namespace(space, &json!({"ns": space})));
    let only = |name: &str| json!({"matchLabels": {"pod": name}});
    let from = |space: &str| json!({"namespaceSelector": {"matchLabels": {"ns": space}}});
    let policies = [
        policy("x", "closed", &json!({"podSelector": only("a")})),
        policy(
            "x",
            "web",
            &json!({"podSelector": only("b"), "ingress": [
                {"from": [from("y"), {"podSelector": only("a")}], "ports": [{"port": "http"}]},
                {"from": [from("z")], "ports": [{"protocol": "UDP", "port": 9000, "endPort": 9100}]},
            ]}),
        ),
        policy(
            "y",
            "out",
            &json!({"podSelector": only("a"), "policyTypes": ["Egress"], "egress": [
                {"to": [{"namespaceSelector": {}, "podSelector": only("b")}], "ports": [{"port": "http"}]},
                {"ports": [{"protocol": "UDP", "port": 9090}]},
            ]}),
        ),
        policy("y", "udp", &json!({"podSelector": only("c"), "ingress": [{"ports": [{"protocol": "UDP"}]}]})),
        policy(
            "z",
            "blocks",
            &json!({"podSelector": only("c"), "ingress": [{"from": [
                {"ipBlock": {"cidr": "10.244.0.0/16", "except": ["10.244.2.0/24"]}},
                {"ipBlock": {"cidr": "::/0", "except": ["fd00:10:244:1::/64"]}},
            ]}]}),
        ),
        policy("z", "in", &json!({"podSelector": only("b"), "policyTypes": ["Ingress", "Egress"], "egress": [{}]})),
    ];
    for object in &namespaces {
        cluster.api.create(NAMESPACES, object.clone());
    }
    for object in &policies {
        let space = object["metadata"]["namespace"].as_str().context("a namespace")?;
        cluster.api.create(&policies_of(space), object.clone());
    }
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let mut pods = BTreeMap::new();
    for space in spaces {
        for (name, node) in [("a", 0), ("b", 1), ("c", 0)] {
            pods.insert(format!("{space}/{name}"), cluster.add_pod(&cluster.nodes[node], space, name)?);
        }
    }
    let servers: Vec<Server> = pods.values().map(Server::start).collect::<Result<_>>()?;
    let state = state(&cluster, &namespaces, &pods, &policies)?;
    let judge = Judge::new(&state);
    // The other node hears of a pod's addresses a moment later.
    wait_until("every connection is as policies say", SOON * 2, || {
        let wrong = wrong(&pods, &judge)?;
        ensure!(wrong.is_empty(), "{} connections: {}", wrong.len(), wrong.join("\n"));
        Ok(())
    })?;
    // Restarted, it finds all in force, and writes nothing.
    let before = cluster.nodes[0].run(&["nft", "list", "table", "inet", "fabric-policy"])?;
    cluster.nodes[0].kill_fabricd()?;
    cluster.start_fabricd(&cluster.nodes[0])?;
    let metrics = cluster.nodes[0].http_get(9472, "/metrics")?.body;
    assert!(metrics.contains("fabricd_policy_changes_total 0"), "{metrics}");
    let handles = |text: &str| text.lines().filter(|line| !line.contains("counter")).collect::<Vec<_>>().join("\n");
    let after = cluster.nodes[0].run(&["nft", "list", "table", "inet", "fabric-policy"])?;
    assert_eq!(handles(&before), handles(&after));
    drop(servers);
    Ok(())
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

#[test]
fn pod_that_is_attached_without_a_daemon_sends_nothing_that_is_forbidden() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let target = cluster.add_pod(node, "open", "target")?;
    let server = Server::start(&target)?;
    let to = target.ips()[0];
    node.kill_fabricd()?;
    let closed = cluster.add_pod(node, "closed", "web")?;
    let sender = Sender::start(&closed, SocketAddr::new(to, PORTS[1]))?;
    let free = cluster.add_pod(node, "open", "web")?;
    let conn = |from: &Pod| Conn { src: from.ips()[0], dst: to, protocol: 17, port: PORTS[0] };
    assert!(!connects(&free, &conn(&free))?, "nobody has judged it");
    assert!(
        !connects(&target, &Conn { src: to, dst: free.ips()[0], protocol: 6, port: 1 })?,
        "nor may others reach it"
    );
    node.run(&["ping", "-c1", "-W5", &free.ips()[0].to_string()]).context("its own node reaches it")?;
    assert_eq!(server.heard(), [0, 0]);
    cluster.start_fabricd(node)?;
    wait_until("the pod that no policy selects is judged", SOON, || {
        ensure!(connects(&free, &conn(&free))?, "it is closed");
        Ok(())
    })?;
    drop(sender);
    let [free_sent, closed_sent] = server.heard();
    assert!(free_sent > 0 && closed_sent == 0, "{closed_sent} forbidden packets");
    assert!(!connects(&closed, &conn(&closed))?);
    Ok(())
}

#[test]
fn pod_with_the_address_of_one_that_is_gone_is_judged_anew() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let target = cluster.add_pod(node, "open", "target")?;
    let server = Server::start(&target)?;
    let to = SocketAddr::new(target.ips()[0], PORTS[0]);
    let first = cluster.add_pod(node, "open", "first")?;
    let ips = first.ips().to_vec();
    let conn = Conn { src: ips[0], dst: to.ip(), protocol: 17, port: to.port() };
    assert!(connects(&first, &conn)?);
    let heard = server.heard();
    node.kill_fabricd()?;
    first.del()?;
    cluster.api.delete(&pods_of("open"), "first");
    // host-local gives out the next address.
    let book = node.path("/var/lib/cni/networks/fabric")?;
    for (range, ip) in ips.iter().enumerate() {
        let before = match ip {
            IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() - 1).into()),
            IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() - 1).into()),
        };
        std::fs::write(book.join(format!("last_reserved_ip.{range}")), before.to_string())?;
    }
    let second = cluster.add_pod(node, "closed", "second")?;
    assert_eq!(second.ips(), ips, "the same addresses");
    assert!(!connects(&second, &conn)?, "no daemon has judged it");
    cluster.start_fabricd(node)?;
    assert!(!connects(&second, &conn)?, "it may send nothing");
    assert_eq!(server.heard(), heard);
    Ok(())
}

#[test]
fn open_connection_that_a_policy_forbids_is_cut_and_others_go_on() -> Result<()> {
    let cluster = Cluster::start(2)?;
    cluster.api.create(NAMESPACES, namespace("x", &json!({})));
    let from = |name: &str| json!({"podSelector": {"matchLabels": {"pod": name}}});
    let spec = |peers: &[&str]| {
        let peers: Vec<Value> = peers.iter().map(|name| from(name)).collect();
        json!({"podSelector": {"matchLabels": {"pod": "db"}}, "ingress": [{"from": peers}]})
    };
    cluster.api.create(&policies_of("x"), policy("x", "db", &spec(&["web", "other"])));
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let db = cluster.add_pod(&cluster.nodes[0], "x", "db")?;
    let web = cluster.add_pod(&cluster.nodes[1], "x", "web")?;
    let other = cluster.add_pod(&cluster.nodes[0], "x", "other")?;
    let _server = Server::start(&db)?;
    let conn = |from: &Pod| Conn { src: from.ips()[0], dst: db.ips()[0], protocol: 6, port: PORTS[0] };
    for pod in [&web, &other] {
        wait_until("it may connect", SOON, || {
            ensure!(connects(pod, &conn(pod))?, "it may not");
            Ok(())
        })?;
    }
    let mut open = Open::between(&web, &db, 0)?;
    assert!(open.arrives()?);
    let kept = Connection::start(&other, &db)?;

    cluster.api.change(&policies_of("x"), "db", &json!({"spec": spec(&["other"])}));
    wait_until("the connection is cut", SOON, || {
        ensure!(!open.arrives()?, "it goes on");
        Ok(())
    })?;
    assert!(!connects(&web, &conn(&web))?);
    cluster.api.change(&policies_of("x"), "db", &json!({"spec": spec(&["web", "other"])}));
    wait_until("the connection goes on", SOON, || {
        ensure!(open.arrives()?, "it is cut");
        Ok(())
    })?;
    let report = kept.stop()?;
    assert!(report.broken.is_none() && report.echoed > 0, "{report:?}");
    Ok(())
}

#[test]
fn an_isolated_pod_is_never_on_the_fast_path() -> Result<()> {
    let cluster = Cluster::start(2)?;
    cluster.api.create(NAMESPACES, namespace("x", &json!({})));
    let nodes = [(&cluster.nodes[0], "--fast-path=on"), (&cluster.nodes[1], "--fast-path=auto")];
    for (node, flag) in nodes {
        node.start_fabricd_with(&[flag], &[])?;
    }
    let add = |node: usize, name: &str| cluster.add_pod(&cluster.nodes[node], "x", name);
    let (shut, near, far) = (add(0, "shut")?, add(0, "near")?, add(1, "far")?);
    for ((node, _), addresses) in nodes.into_iter().zip([4, 2]) {
        wait_until("all pods and the other node on the fast path", SOON, || {
            let status = node.status()?;
            let fast = &status["fast_path"];
            ensure!(fast["on"] == true && fast["pods"] == addresses && fast["peers"] == 1, "{fast}");
            Ok(())
        })?;
    }
    // It sends, and it is sent to; on its own node, and from another one.
    let forbidden = [(&shut, &far), (&far, &shut), (&shut, &near), (&near, &shut)];
    let all = |pairs: &[(&Pod, &Pod)]| -> Result<Vec<(String, Open)>> {
        let ends = pairs.iter().flat_map(|(from, to)| [0, 1].map(|at| (*from, *to, at)));
        let name = |from: &Pod, to: &Pod, at: usize| format!("{} to {}, {}", from.name(), to.name(), to.ips()[at]);
        ends.map(|(from, to, at)| Ok((name(from, to, at), Open::between(from, to, at)?))).collect()
    };
    let (mut cut, mut kept) = (all(&forbidden)?, all(&[(&near, &far), (&far, &near)])?);
    let are = |opened: &mut [(String, Open)], arrive: bool, when: &str| {
        opened.iter_mut().try_for_each(|(name, open)| {
            wait_until(&format!("{name}, {when}"), SOON, || {
                ensure!(open.arrives()? == arrive, "arrives: {}", !arrive);
                Ok(())
            })
        })
    };
    are(&mut cut, true, "fast")?;
    are(&mut kept, true, "fast")?;
    wait_until("packets of all these connections on the fast path", SOON, || {
        // Five at least of each: opened, said and heard, in both families.
        for ((node, _), least) in nodes.into_iter().zip([60, 40]) {
            let fast = &node.status()?["fast_path"]["fast_packets"];
            let packets = fast.as_u64().or_else(|| fast.as_str()?.parse().ok()).unwrap_or_default();
            ensure!(packets >= least, "{packets} on {}", node.name);
        }
        Ok(())
    })?;

    let nothing = || {
        policy(
            "x",
            "shut",
            &json!({
                "podSelector": {"matchLabels": {"pod": "shut"}}, "policyTypes": ["Ingress", "Egress"],
            }),
        )
    };
    cluster.api.create(&policies_of("x"), nothing());
    for (node, flag) in nodes {
        node.kill_fabricd()?;
        cluster.start_fabricd_with(node, &[flag])?;
        let pins = node.exec(&["ls", "-R", "/sys/fs/bpf/fabric"])?;
        assert!(!pins.success(), "{}: {}", node.name, pins.stdout);
        let fast = node.status()?["fast_path"].clone();
        let reason = fast["reason"].as_str().unwrap_or_default();
        assert!(fast["on"] != true && reason.contains("NetworkPolicies are put in force here"), "{fast}");
    }
    // New ones, all at once: each that is refused takes its whole time.
    let refused = || {
        let ends = forbidden.iter().flat_map(|(from, to)| [6, 17].map(|protocol| (*from, *to, protocol)));
        let reaches: Vec<Result<bool>> = thread::scope(|scope| {
            let probe = |(from, to, protocol): (&Pod, &Pod, u8)| {
                let conn = Conn { src: from.ips()[0], dst: to.ips()[0], protocol, port: PORTS[0] };
                let from = from.clone();
                scope.spawn(move || connects(&from, &conn))
            };
            let probes: Vec<_> = ends.map(probe).collect();
            probes.into_iter().map(|probe| probe.join().expect("a probe does not panic")).collect()
        });
        let reaches = reaches.into_iter().collect::<Result<Vec<_>>>()?;
        ensure!(!reaches.contains(&true), "{reaches:?}");
        Ok(())
    };
    let _servers = [&shut, &near, &far].map(Server::start).into_iter().collect::<Result<Vec<_>>>()?;
    are(&mut cut, false, "which was fast when the policy came")?;
    are(&mut kept, true, "which no policy forbids")?;
    refused()?;
    cluster.api.delete(&policies_of("x"), "shut");
    are(&mut cut, true, "without the policy")?;
    cluster.api.create(&policies_of("x"), nothing());
    are(&mut cut, false, "with the policy again")?;
    are(&mut kept, true, "all the time")?;
    refused()
}

#[test]
fn frame_with_vlan_tags_reaches_no_pod() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let (web, target) = (cluster.add_pod(node, "open", "web")?, cluster.add_pod(node, "open", "target")?);
    let closed = cluster.add_pod(node, "closed", "closed")?;
    let (priority, service) = (0x8100, 0x88a8);
    for family in [Family::V4, Family::V6] {
        let source = web.ip(family)?;
        let reaches = |to: &Pod, tags: &[u16]| frame_reaches(&web, source, to, tags);
        wait_until("a frame without tags gets where policies let it", SOON, || {
            ensure!(reaches(&target, &[])?, "it doesn't");
            Ok(())
        })?;
        for tags in [&[][..], &[priority], &[service], &[priority, priority], &[service, priority]] {
            assert!(!reaches(&closed, tags)?, "{family} {tags:x?}: nothing may reach it");
            assert_eq!(reaches(&target, tags)?, tags.is_empty(), "{family} {tags:x?}: not even where all may");
        }
    }
    let dropped = node.http_get(9472, "/metrics")?.body;
    let counted = |line: &&str| line.contains("pods send each other no VLAN tags") && !line.ends_with(" 0");
    assert!(dropped.lines().any(|line| counted(&line)), "{dropped}");
    Ok(())
}

/// What `fabricctl` says with these arguments, and its exit code.
fn told(node: &Node, args: &[&str]) -> Result<(Option<i32>, Value)> {
    let output = node.exec(&[&["fabricctl"][..], args, &["-o", "json"]].concat())?;
    Ok((output.status.code(), serde_json::from_str(&output.stdout).with_context(|| format!("{output:?}"))?))
}

#[test]
fn what_is_dropped_is_told_with_pods_and_policies_and_a_rule_that_would_allow_it() -> Result<()> {
    let cluster = Cluster::start(2)?;
    for space in ["shop", "lab"] {
        cluster.api.create(NAMESPACES, namespace(space, &json!({"kubernetes.io/metadata.name": space})));
    }
    let only = |name: &str| json!({"matchLabels": {"pod": name}});
    let spec = json!({"podSelector": only("db"), "ingress": [
        {"from": [{"podSelector": only("web")}], "ports": [{"port": "http"}]},
        {"from": [{"serviceSelector": {}}]},
    ]});
    cluster.api.create(&policies_of("shop"), policy("shop", "db", &spec));
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let (here, there) = (&cluster.nodes[0], &cluster.nodes[1]);
    let (web, other) = (cluster.add_pod(here, "shop", "web")?, cluster.add_pod(here, "lab", "other")?);
    let db = cluster.add_pod(there, "shop", "db")?;
    let _server = Server::start(&db)?;
    let [web_ip, other_ip, db_ip] = [&web, &other, &db].map(|pod| pod.ips()[0].to_string());
    let policies = |path: &Value| -> Vec<Value> {
        path["hops"].as_array().into_iter().flatten().filter(|hop| hop["layer"] == "policy").cloned().collect()
    };

    // Both nodes say what their own pods' policies say; the pod connects.
    let fine = wait_until("the connection is explained as allowed", SOON * 2, || {
        let (code, path) = told(here, &["explain", &web_ip, &db_ip, "--port", "8080"])?;
        ensure!(code == Some(0), "{path:#}");
        Ok(path)
    })?;
    let words: Vec<_> = policies(&fine).iter().map(|hop| format!("{} {}", hop["node"], hop["found"])).collect();
    assert!(words[0].contains("node-1") && words[0].contains("no policy selects the pod"), "{words:?}");
    assert!(
        words[1].contains("node-2") && words[1].contains("allowed by rule 0 of NetworkPolicy shop/db"),
        "{words:?}"
    );
    let tcp = fine["hops"].as_array().and_then(|hops| hops.last()).context("a packet")?;
    assert!(tcp["found"].as_str().is_some_and(|found| found.starts_with("tcp from the pod, ")), "{tcp}");

    // Another pod, another port, a ping: each is dropped there.
    for (from, port) in [(&other_ip, Some("8080")), (&web_ip, Some("9090")), (&web_ip, None)] {
        let mut args = vec!["explain", from.as_str(), db_ip.as_str()];
        args.extend(port.iter().flat_map(|port| ["--port", *port]));
        let (code, path) = told(here, &args)?;
        let hop = policies(&path).into_iter().find(|hop| hop["result"] == "failed").context("a hop that failed")?;
        assert!(code == Some(4) && hop["node"] == "node-2", "{path:#}");
        let found = hop["found"].as_str().unwrap_or_default();
        assert!(found.contains("no rule allows it of NetworkPolicy shop/db"), "{found}");
        let expected = hop["expected"].as_str().unwrap_or_default();
        assert!(
            expected.contains("rule 0 of NetworkPolicy shop/db allows tcp port \"http\" from pods pod=web"),
            "{expected}"
        );
    }
    let page = here.exec(&["fabricctl", "explain", &other_ip, &db_ip, "--port", "8080"])?.stdout;
    assert!(page.contains("Here packets are lost: policy of node-2"), "{page}");

    // Who is isolated, by what, and how often each rule was asked. A rule that isn't understood is named.
    let (code, seen) = told(there, &["policy"])?;
    assert_eq!(code, Some(4), "a warning: {seen:#}");
    assert!(seen["warnings"].to_string().contains("NetworkPolicy shop/db: spec.ingress[1]"), "{seen:#}");
    wait_until("an Event on the policy, once for both nodes", SOON, || {
        let events = cluster.api.all("/api/v1/namespaces/shop/events");
        let [event] = events.as_slice() else { anyhow::bail!("{} events", events.len()) };
        let object = &event["involvedObject"];
        let message = event["message"].as_str().unwrap_or_default();
        ensure!(object["kind"] == "NetworkPolicy" && object["name"] == "db", "{event}");
        ensure!(message.starts_with("spec.ingress[1]"), "{event}");
        Ok(())
    })?;
    let pod = seen["pods"].as_array().and_then(|pods| pods.iter().find(|pod| pod["pod"] == "shop/db")).context("db")?;
    assert_eq!((&pod["ingress"], &pod["egress"], &pod["judged"]), (&json!(["shop/db"]), &json!([]), &json!(true)));
    let packets = |drops: bool| {
        let rules = seen["rules"].as_array().into_iter().flatten();
        let mut rules = rules.filter(move |rule| rule["drops"] == drops && rule["rule"] == 0);
        rules.next().and_then(|rule| rule["packets"].as_u64())
    };
    assert!(packets(false) > Some(0) && packets(true) > Some(0), "{seen:#}");

    // While somebody listens what is dropped is shown; then no rule shows anything.
    let shows = |wanted: bool| {
        wait_until("rules show what they drop while somebody listens", SOON, || {
            let table = there.run(&["nft", "list", "table", "inet", "fabric-policy"])?;
            ensure!(table.contains("log prefix") == wanted, "{table}");
            Ok(())
        })
    };
    shows(false)?;
    there.start_service("drops", &["fabricctl", "drops", "-f"], &[])?;
    shows(true)?;
    let line = wait_until("a packet is told with its pods and policies", SOON, || {
        let conn = Conn { src: other.ips()[0], dst: db.ips()[0], protocol: 17, port: PORTS[0] };
        assert!(!connects(&other, &conn)?);
        let log = there.log("drops");
        let line = log.lines().find(|line| line.contains(" udp lab/other (")).map(str::to_owned);
        line.with_context(|| format!("no such packet: {log}"))
    })?;
    let rest = format!("→ shop/db ({db_ip}:8080): ingress dropped: no rule allows it of NetworkPolicy shop/db");
    assert!(line.ends_with(&rest), "{line}");
    let counted = told(there, &["policy"])?.1;
    there.end("drops", Signal::SIGTERM)?;
    shows(false)?;
    let after = told(there, &["policy"])?.1;
    let sum = |seen: &Value| -> u64 {
        seen["rules"].as_array().into_iter().flatten().filter_map(|rule| rule["packets"].as_u64()).sum()
    };
    assert!(sum(&after) >= sum(&counted), "the counters go on: {counted:#} {after:#}");
    Ok(())
}

#[test]
fn pod_reaches_nothing_by_the_address_of_another_or_by_fragments() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let (web, target) = (cluster.add_pod(node, "open", "web")?, cluster.add_pod(node, "open", "target")?);
    let closed = cluster.add_pod(node, "closed", "closed")?;
    for family in [Family::V4, Family::V6] {
        wait_until("the pod itself gets there", SOON, || {
            ensure!(frame_reaches(&web, web.ip(family)?, &target, &[])?, "it doesn't");
            Ok(())
        })?;
        assert!(!frame_reaches(&closed, web.ip(family)?, &target, &[])?, "{family}: another's address");
        let sink = target.network()?.run(|| Ok(UdpSocket::bind((target.ip(family)?, 0))?))?;
        sink.set_read_timeout(Some(PATIENCE / 8))?;
        let to = sink.local_addr()?;
        // Larger than any packet here: the pod's kernel makes three of it.
        for (from, is_allowed) in [(&web, true), (&closed, false)] {
            let socket = from.network()?.run(|| Ok(UdpSocket::bind((from.ip(family)?, 0))?))?;
            let arrives = || -> Result<bool> {
                socket.send_to(&[7; 4000], to)?;
                Ok(sink.recv(&mut [0; 4096]).is_ok())
            };
            let tries = (0..5).map(|_| arrives()).collect::<Result<Vec<_>>>()?;
            assert_eq!(tries.contains(&true), is_allowed, "{family}: fragments");
        }
    }
    Ok(())
}

/// A Service as kube-proxy translates it: connections to port 80 of an address reach port 8080 of a pod.
fn translate(node: &Node, service: IpAddr, pod: IpAddr) -> Result<()> {
    let (family, target) = if pod.is_ipv4() { ("ip", pod.to_string()) } else { ("ip6", format!("[{pod}]")) };
    // A pod that reaches itself gets the node's address, or it would answer itself past the node.
    let rules = format!(
        "table {family} service {{\nchain pre {{\ntype nat hook prerouting priority -100;\n\
         {family} daddr {service} tcp dport 80 dnat to {target}:8080\n}}\n\
         chain post {{\ntype nat hook postrouting priority 100;\n\
         {family} saddr {pod} {family} daddr {pod} masquerade\n}}\n}}\n"
    );
    node.command(&["nft", "-f", "-"])?.stdin(rules).run().map(drop)
}

#[test]
fn policies_see_the_endpoint_of_a_service_that_others_translate_and_never_its_address() -> Result<()> {
    let cluster = Cluster::start(2)?;
    cluster.api.create(NAMESPACES, namespace("x", &json!({})));
    let only = |name: &str| json!({"matchLabels": {"pod": name}});
    let services: [IpAddr; 2] = ["203.0.113.10".parse()?, "2001:db8::10".parse()?];
    let blocks =
        services.map(|ip| json!({"ipBlock": {"cidr": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })}}));
    let welcome = ["web", "far", "vip"].map(|name| json!({"podSelector": only(name)}));
    for (name, subject, spec) in [
        ("db", "db", json!({"ingress": [{"from": welcome}]})),
        ("far", "far", json!({"policyTypes": ["Egress"], "egress": [{"to": [{"podSelector": only("db")}]}]})),
        ("web", "web", json!({"policyTypes": ["Egress"], "egress": [{"ports": [{"port": 8080}]}]})),
        ("vip", "vip", json!({"policyTypes": ["Egress"], "egress": [{"to": blocks}]})),
    ] {
        let mut spec = spec;
        spec["podSelector"] = only(subject);
        cluster.api.create(&policies_of("x"), policy("x", name, &spec));
    }
    cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
    let add = |node: usize, name: &str| cluster.add_pod(&cluster.nodes[node], "x", name);
    let (db, web, near) = (add(0, "db")?, add(0, "web")?, add(0, "near")?);
    let (far, other, vip) = (add(1, "far")?, add(1, "other")?, add(1, "vip")?);
    let _server = Server::start(&db)?;
    for (at, service) in services.into_iter().enumerate() {
        cluster.nodes.iter().try_for_each(|node| translate(node, service, db.ips()[at]))?;
        let conn = |from: &Pod| Conn { src: from.ips()[at], dst: service, protocol: 6, port: 80 };
        for (from, is_allowed) in
            [(&web, true), (&far, true), (&db, true), (&near, false), (&other, false), (&vip, false)]
        {
            wait_until("it is as policies say", SOON, || {
                let seen = connects(from, &conn(from))?;
                ensure!(seen == is_allowed, "{} to {service}: {seen}", from.name());
                Ok(())
            })?;
        }
    }
    Ok(())
}

#[test]
fn without_br_netfilter_pods_that_a_policy_isolates_are_cut_off_from_those_of_their_node() -> Result<()> {
    let cluster = open_and_closed()?;
    let (node, elsewhere) = (&cluster.nodes[0], "/run/net");
    node.kill_fabricd()?;
    let settings = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];
    for setting in settings {
        node.run(&["sysctl", "-w", &format!("net.bridge.{setting}=0")])?;
    }
    // As where the module is missing: no such folder.
    node.run(&["mkdir", elsewhere])?;
    for folder in ["core", "ipv4", "ipv6", "netfilter"] {
        node.run(&["ln", "-s", &format!("/proc/sys/net/{folder}"), elsewhere])?;
    }
    let without: Vec<(&str, String)> = [&cluster.env[..], &[("FABRICD_SYSCTL_ROOT", elsewhere.to_owned())]].concat();
    start_fabricd(node, &[], &without)?;
    let (web, target) = (cluster.add_pod(node, "open", "web")?, cluster.add_pod(node, "open", "target")?);
    let closed = cluster.add_pod(node, "closed", "closed")?;
    let _servers = [Server::start(&target)?, Server::start(&closed)?];
    let conn =
        |from: &Pod, to: &Pod, at: usize| Conn { src: from.ips()[at], dst: to.ips()[at], protocol: 6, port: PORTS[0] };
    wait_until("the node says that it has no br_netfilter", SOON, || {
        let reply = node.http_get(9472, "/readyz")?;
        ensure!(
            reply.body.contains("cut off from the others here") && reply.body.contains("br_netfilter"),
            "{}",
            reply.body
        );
        Ok(())
    })?;
    for at in [0, 1] {
        wait_until("what no policy isolates connects", SOON, || {
            ensure!(connects(&web, &conn(&web, &target, at))?, "it doesn't");
            Ok(())
        })?;
        assert!(!connects(&web, &conn(&web, &closed, at))?, "nothing gets to an isolated pod");
        assert!(!connects(&closed, &conn(&closed, &target, at))?, "nor from there");
    }
    // With the module all is as ever.
    node.kill_fabricd()?;
    cluster.start_fabricd(node)?;
    wait_until("nothing judges frames any more", SOON, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("bridge fabric-policy"), "{tables}");
        Ok(())
    })?;
    assert!(!connects(&web, &conn(&web, &closed, 0))?);
    Ok(())
}

/// How many pods are started: `POD_STARTS=1000` takes the better part of an hour.
fn starts() -> usize {
    std::env::var("POD_STARTS").ok().and_then(|count| count.parse().ok()).unwrap_or(8)
}

/// Sends from a pod as soon as it has a network namespace, before its ADD ends.
fn send_early(node: &Arc<Node>, pod: &str, to: SocketAddr) -> Sender {
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, node, netns) = (Arc::clone(&stop), Arc::clone(node), format!("/run/netns/{pod}"));
    thread::spawn(move || {
        let any: IpAddr = if to.is_ipv4() { [0, 0, 0, 0].into() } else { [0_u16; 8].into() };
        let open = || Spaces::of_network(&node.path(&netns)?)?.run(|| Ok(UdpSocket::bind((any, 0))?));
        let mut socket = None;
        while !stopped.load(Ordering::Relaxed) {
            match &socket {
                None => socket = open().ok(),
                // Without an address it is refused.
                Some(socket) => drop(socket.send_to(b"!", to)),
            }
            thread::sleep(Duration::from_millis(1));
        }
    });
    Sender(stop)
}

#[test]
fn pods_that_start_while_the_daemon_is_stopped_slow_or_crashing_send_nothing_that_is_forbidden() -> Result<()> {
    let cluster = open_and_closed()?;
    let node = &cluster.nodes[0];
    let conflist = "/etc/cni/net.d/10-fabric.conflist";
    node.run(&["sed", "-i", r#"s/"type": *"fabric-cni"/&, "policyTimeout": 1/"#, conflist])?;
    let target = cluster.add_pod(node, "open", "target")?;
    let server = Server::start(&target)?;
    let [allowed, forbidden] = PORTS.map(|port| SocketAddr::new(target.ips()[0], port));
    for start in 0..starts() {
        let name = format!("web-{start}");
        match start % 4 {
            0 => node.kill_fabricd()?,
            1 => node.freeze_fabricd()?,
            _ => {}
        }
        let sender = send_early(node, &format!("closed-{name}"), forbidden);
        // … or crashes while the pod is added.
        let (crashing, env) = (Arc::clone(node), cluster.env.clone());
        let crash = (start % 4 == 2).then(|| {
            thread::spawn(move || {
                (0..3).try_for_each(|_| {
                    crashing.kill_fabricd()?;
                    start_fabricd(&crashing, &[], &env)
                })
            })
        });
        let closed = cluster.add_pod(node, "closed", &name)?;
        crash.map_or(Ok(()), |crash| crash.join().expect("it does not panic"))?;
        assert_eq!(server.heard()[1], 0, "start {start}: forbidden packets");
        match start % 4 {
            0 => cluster.start_fabricd(node)?,
            1 => node.thaw_fabricd()?,
            _ => {}
        }
        // It is judged, and then gone: the next one may have its address.
        let judged = format!("/run/fabric/judged/closed-{name}-");
        wait_until("the pod is judged", SOON, || {
            node.run(&["sh", "-c", &format!("ls {judged}*")])?;
            Ok(())
        })?;
        assert_eq!(server.heard()[1], 0, "start {start}: forbidden packets");
        drop(sender);
        closed.del()?;
        cluster.api.delete(&pods_of("closed"), &name);
    }
    // The same by a pod that may: else nothing has been shown.
    let sender = send_early(node, "open-web", allowed);
    let _web = cluster.add_pod(node, "open", "web")?;
    wait_until("what is allowed arrives", SOON, || {
        ensure!(server.heard()[0] > 0, "it doesn't");
        Ok(())
    })?;
    drop(sender);
    Ok(())
}
