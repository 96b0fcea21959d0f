//! Services in the Lab: who answers, whom it sees, and what a client is told where nobody can.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::fake_api::{FakeApi, NODES};
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{Answer, By, Families, Lab, Node, Pod, Server, ask, http, wait_until};
use fabric_tests::services::{SERVICES, V1, endpoint, service, slice, slices_of};
use serde_json::{Value, json};

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

const NETWORK: &str = r#"{
    "EnableIPv6": true, "Network": "10.244.0.0/16", "IPv6Network": "fd00:10:244::/48", "Backend": { "Type": "vxlan" }
}"#;

const EACH: [(By, Family); 4] =
    [(By::Tcp, Family::V4), (By::Udp, Family::V4), (By::Tcp, Family::V6), (By::Udp, Family::V6)];

/// The ClusterIP of a Service by its number.
fn vip(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([10, 96, 0, number]),
        Family::V6 => IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, number.into()]),
    }
}

/// An address of a load balancer.
fn balancer(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([203, 0, 113, 9]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 203, 0, 0, 0, 0, 9]),
    }
}

/// The port of a Service by which it is asked.
fn at(ip: IpAddr, by: By) -> SocketAddr {
    SocketAddr::new(ip, if by == By::Tcp { 80 } else { 53 })
}

/// Two nodes with two pods each, all of which serve.
struct Cluster {
    api: FakeApi,
    env: Vec<(&'static str, String)>,
    pods: Vec<Pod>,
    nodes: Vec<Arc<Node>>,
    lab: Lab,
    _servers: Vec<Server>,
}

impl Cluster {
    fn start() -> Result<Self> {
        let mut lab = Lab::builder().families(Families::Dual).create()?;
        let api = lab.underlay().machine.network()?.run(|| FakeApi::start(([10, 99, 0, 2], 6443).into()))?;
        let config = lab.dir().join("net-conf.json");
        fs::write(&config, NETWORK)?;
        let env = vec![
            ("FABRICD_STORE", "kubernetes".to_owned()),
            ("FABRICD_SERVICES", "on".to_owned()),
            ("FABRICD_KUBECONFIG", api.kubeconfig(lab.dir())?.display().to_string()),
            ("FABRICD_NET_CONFIG_PATH", config.display().to_string()),
        ];
        let nodes: Vec<Arc<Node>> = (0..2).map(|_| lab.boot_node()).collect::<Result<_>>()?;
        let mut cluster = Self { api, env, pods: vec![], nodes, lab, _servers: vec![] };
        for node in cluster.nodes.clone() {
            let n = node.index;
            cluster.api.add_node(&node.name, &[&format!("10.244.{n}.0/24"), &format!("fd00:10:244:{n}::/64")]);
            let addresses =
                Family::ALL.map(|family| json!({"type": "InternalIP", "address": node.underlay_ip(family)}));
            cluster.api.change(NODES, &node.name, &json!({"status": {"addresses": addresses}}));
            cluster.start_fabricd(&node)?;
        }
        cluster.nodes.iter().try_for_each(|node| node.wait_ready())?;
        for (node, names) in cluster.nodes.clone().iter().zip([["a", "b"], ["c", "d"]]) {
            for name in names {
                let pod = node.add_pod(name)?;
                for ip in pod.ips() {
                    let (tcp, udp) = (SocketAddr::new(*ip, 8080), SocketAddr::new(*ip, 5353));
                    cluster._servers.push(Server::start(&pod.network()?, name, tcp, udp)?);
                }
                cluster.pods.push(pod);
            }
        }
        Ok(cluster)
    }

    fn start_fabricd(&self, node: &Node) -> Result<()> {
        let env: Vec<(&str, &str)> = self.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        node.start_fabricd_with(&[], &env)
    }

    fn pod(&self, name: &str) -> &Pod {
        self.pods.iter().find(|pod| pod.name() == name).expect("a pod of this name")
    }

    /// Makes a Service with TCP 80 and UDP 53, on which these pods serve.
    fn serve(&self, name: &str, number: u8, endpoints: &[&str], spec: &Value) {
        let mut spec = spec.clone();
        if spec["ports"].is_null() {
            spec["ports"] = json!([
                {"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"},
            ]);
        }
        let ips = Family::ALL.map(|family| vip(family, number).to_string());
        let object = service(name, &ips.each_ref().map(String::as_str), &spec);
        self.api.create(SERVICES, object);
        for family in Family::ALL {
            let mut slice = slice(&format!("{name}-{family:?}").to_lowercase(), name, &[]);
            slice["addressType"] = json!(format!("IP{family:?}").to_lowercase().replace("ip", "IP"));
            slice["ports"] = json!([
                {"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"},
            ]);
            slice["endpoints"] = self.endpoints(family, endpoints);
            self.api.create(&slices_of(V1), slice);
        }
    }

    fn endpoints(&self, family: Family, names: &[&str]) -> Value {
        let of = |name: &&str| {
            let pod = self.pod(name);
            endpoint(&pod.ip(family).expect("dual stack").to_string(), &pod.node.name)
        };
        names.iter().map(of).collect()
    }

    /// Gives a Service other endpoints.
    fn change(&self, name: &str, endpoints: &[&str]) {
        for family in Family::ALL {
            let slice = format!("{name}-{family:?}").to_lowercase();
            self.api.change(&slices_of(V1), &slice, &json!({"endpoints": self.endpoints(family, endpoints)}));
        }
    }

    /// Somebody beyond the cluster, who sends what is for Services to node-1.
    fn outside(&self) -> Result<Spaces> {
        let machine = &self.lab.underlay().machine;
        let node = &self.nodes[0];
        for family in Family::ALL {
            let (all, via) =
                (if family == Family::V4 { "10.96.0.0/16" } else { "fd00:96::/64" }, node.underlay_ip(family));
            for target in [all.to_owned(), balancer(family).to_string()] {
                machine.run(&["ip", "route", "replace", &target, "via", &via.to_string()])?;
            }
        }
        machine.network()
    }
}

/// Waits until all of these have answered, and nobody else.
fn answered_by(place: &Spaces, by: By, target: SocketAddr, expected: &[&str]) -> Result<()> {
    let mut seen = BTreeSet::new();
    wait_until(&format!("{target} by {by:?} is answered by {expected:?}"), SOON, || {
        let answer = ask(place, by, target)?;
        let Some(name) = answer.name().filter(|name| expected.contains(name)) else {
            seen.clear();
            anyhow::bail!("{answer:?}");
        };
        seen.insert(name.to_owned());
        ensure!(seen.len() == expected.len(), "so far {seen:?}");
        Ok(())
    })
}

/// Waits until a question ends so.
fn ends(place: &Spaces, by: By, target: SocketAddr, expected: &Answer) -> Result<()> {
    wait_until(&format!("{target} by {by:?}: {expected:?}"), SOON, || {
        let answer = ask(place, by, target)?;
        ensure!(answer == *expected, "{answer:?}");
        Ok(())
    })
}

/// The pods' client address as a server sees it.
fn seen(place: &Spaces, by: By, target: SocketAddr) -> Result<IpAddr> {
    match ask(place, by, target)? {
        Answer::From(_, ip) => Ok(ip),
        other => anyhow::bail!("{target}: {other:?}"),
    }
}

#[test]
fn cluster_ips_lead_pods_host_and_outside_to_every_endpoint() -> Result<()> {
    let cluster = Cluster::start()?;
    cluster.serve("web", 10, &["a", "c"], &json!({}));
    cluster.serve("itself", 11, &["a"], &json!({}));
    cluster.serve("elsewhere", 12, &["c"], &json!({}));
    cluster.serve("nobody", 13, &[], &json!({}));
    cluster.serve("local", 14, &["c"], &json!({"internalTrafficPolicy": "Local"}));
    let (pod, client, host) = (cluster.pod("a"), cluster.pod("b").network()?, cluster.nodes[0].network()?);
    let outside = cluster.outside()?;
    // Rules that it has no words for must not be the end of it.
    cluster.nodes[0].run(&["nft", "list", "ruleset"])?;
    let other_client = cluster.pod("d").network()?;
    for (by, family) in EACH {
        let web = at(vip(family, 10), by);
        for place in [&client, &other_client, &host, &outside] {
            answered_by(place, by, web, &["a", "c"])?;
        }
        // A pod keeps its address, towards pods of its node and of others; one that reaches itself has the gateway's.
        let own = cluster.pod("b").ip(family)?;
        assert_eq!(seen(&client, by, at(vip(family, 11), by))?, own);
        assert_eq!(seen(&client, by, at(vip(family, 12), by))?, own);
        let itself = seen(&pod.network()?, by, at(vip(family, 11), by))?;
        assert_ne!(itself, pod.ip(family)?, "{by:?} {family:?}");
        // Who can't be served is told so.
        for place in [&client, &host, &outside] {
            ends(place, by, at(vip(family, 13), by), &Answer::Refused)?;
            let unknown = SocketAddr::new(vip(family, 10), 81);
            ends(place, by, unknown, &Answer::Refused)?;
        }
        // Others could: no answer, as a load balancer would look elsewhere.
        ends(&client, by, at(vip(family, 14), by), &Answer::Nothing)?;
        answered_by(&other_client, by, at(vip(family, 14), by), &["c"])?;
    }
    Ok(())
}

#[test]
fn changes_reach_every_node_and_a_restart_writes_nothing() -> Result<()> {
    let cluster = Cluster::start()?;
    cluster.serve("web", 10, &["a"], &json!({}));
    let node = &cluster.nodes[0];
    let (client, other_client) = (cluster.pod("b").network()?, cluster.pod("d").network()?);
    for (by, family) in EACH {
        answered_by(&client, by, at(vip(family, 10), by), &["a"])?;
        answered_by(&other_client, by, at(vip(family, 10), by), &["a"])?;
    }
    cluster.change("web", &["c", "d"]);
    for (by, family) in EACH {
        answered_by(&client, by, at(vip(family, 10), by), &["c", "d"])?;
    }
    // From none to some, and back.
    cluster.change("web", &[]);
    for (by, family) in EACH {
        ends(&client, by, at(vip(family, 10), by), &Answer::Refused)?;
    }
    cluster.change("web", &["a", "d"]);
    for (by, family) in EACH {
        answered_by(&client, by, at(vip(family, 10), by), &["a", "d"])?;
    }

    // nft can't print our rules, whose keys it has no words for; maps and names of chains it can.
    let listed = || -> Result<String> {
        let maps = ["svc4", "svc6", "pool4", "pool6", "pick4", "pick6"];
        let maps = maps.map(|map| node.run(&["nft", "list", "map", "inet", "fabric-services", map]));
        Ok(maps.into_iter().collect::<Result<Vec<_>>>()?.concat())
    };
    let before = listed()?;
    node.kill_fabricd()?;
    answered_by(&client, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["a", "d"])?;
    cluster.start_fabricd(node)?;
    node.wait_ready()?;
    assert_eq!(listed()?, before);
    let metrics = node.http_get(9472, "/metrics")?.body;
    assert!(metrics.contains("fabricd_services_changes_total 0"), "{metrics}");

    // What somebody else takes away is put back.
    for deed in ["flush map inet fabric-services svc4", "delete table inet fabric-services"] {
        node.run(&["nft", deed])?;
        answered_by(&client, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["a", "d"])?;
    }

    // A Service that is deleted is gone; with the API server away all stays.
    cluster.api.stop();
    answered_by(&client, By::Udp, at(vip(Family::V6, 10), By::Udp), &["a", "d"])?;
    cluster.api.delete(SERVICES, "web");
    cluster.lab.underlay().machine.network()?.run(|| cluster.api.start_again())?;
    wait_until("the Service is gone", SOON, || {
        let now = listed()?;
        ensure!(!now.contains("10.96.0.10"), "{now}");
        Ok(())
    })
}

#[test]
fn node_ports_and_load_balancers_lead_in_from_outside_and_local_ones_keep_the_client() -> Result<()> {
    let cluster = Cluster::start()?;
    let outside = cluster.outside()?;
    let spec = |policy: &str, first: u16| {
        json!({
            "type": "LoadBalancer", "externalTrafficPolicy": policy,
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "nodePort": first},
                {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": first + 1},
            ],
        })
    };
    cluster.serve("web", 10, &["a", "c"], &spec("Cluster", 30080));
    cluster.serve("local", 11, &["a"], &spec("Local", 30090));
    let ingress = Family::ALL.map(|family| json!({"ip": balancer(family)}));
    cluster.api.change(SERVICES, "local", &json!({"status": {"loadBalancer": {"ingress": ingress}}}));
    let node_port = |node: usize, family, first: u16, by| {
        SocketAddr::new(cluster.nodes[node].underlay_ip(family), first + u16::from(by == By::Udp))
    };
    let (client, host) = (cluster.pod("b").network()?, cluster.nodes[0].network()?);
    for (by, family) in EACH {
        // The underlay's machine has two addresses of each family.
        let us: [IpAddr; 2] = match family {
            Family::V4 => [[10, 99, 0, 1].into(), [10, 99, 0, 2].into()],
            Family::V6 => ["fd00:99::1".parse()?, "fd00:99::2".parse()?],
        };
        for node in 0..2 {
            answered_by(&outside, by, node_port(node, family, 30080, by), &["a", "c"])?;
        }
        for place in [&client, &host] {
            answered_by(place, by, node_port(0, family, 30080, by), &["a", "c"])?;
        }
        // Where the endpoint is, its clients are seen as they are; elsewhere it is not served, but from inside.
        for target in [node_port(0, family, 30090, by), at(balancer(family), by)] {
            answered_by(&outside, by, target, &["a"])?;
            assert!(us.contains(&seen(&outside, by, target)?), "{target} by {by:?}");
        }
        assert_eq!(ask(&outside, by, node_port(1, family, 30090, by))?, Answer::Nothing);
        answered_by(&cluster.pod("d").network()?, by, node_port(1, family, 30090, by), &["a"])?;
        answered_by(&client, by, at(balancer(family), by), &["a"])?;
    }
    // Nobody anywhere: the client is told.
    cluster.change("local", &[]);
    for (by, family) in EACH {
        ends(&outside, by, node_port(0, family, 30090, by), &Answer::Refused)?;
    }
    // Who may come by the load balancer's address is limited, and node ports are not.
    cluster.change("local", &["a"]);
    cluster.api.change(
        SERVICES,
        "local",
        &json!({"spec": {"loadBalancerSourceRanges": ["198.51.100.0/24", "2001:db8::/64"]}}),
    );
    for (by, family) in EACH {
        ends(&outside, by, at(balancer(family), by), &Answer::Nothing)?;
        answered_by(&outside, by, node_port(0, family, 30090, by), &["a"])?;
    }
    Ok(())
}

#[test]
fn client_with_affinity_stays_with_its_endpoint_over_changes_and_a_restart() -> Result<()> {
    let cluster = Cluster::start()?;
    cluster.serve("sticky", 10, &["a", "b", "c", "d"], &json!({"sessionAffinity": "ClientIP"}));
    let node = &cluster.nodes[0];
    let client = cluster.pod("b").network()?;
    let name = |by, family| -> Result<String> {
        wait_until("an answer", SOON, || {
            let answer = ask(&client, by, at(vip(family, 10), by))?;
            answer.name().map(str::to_owned).ok_or_else(|| anyhow::anyhow!("{answer:?}"))
        })
    };
    for (by, family) in EACH {
        let first = name(by, family)?;
        for _ in 0..8 {
            assert_eq!(name(by, family)?, first);
        }
    }
    // Other endpoints come and go: it stays. Its own one goes: it gets another, and stays with that.
    let (by, family) = (By::Tcp, Family::V4);
    let first = name(by, family)?;
    let others: Vec<&str> = ["a", "b", "c", "d"].into_iter().filter(|other| *other != first).collect();
    cluster.change("sticky", &[&first, others[0]]);
    node.kill_fabricd()?;
    cluster.start_fabricd(node)?;
    node.wait_ready()?;
    for _ in 0..8 {
        assert_eq!(name(by, family)?, first);
    }
    cluster.change("sticky", &others[1..]);
    answered_by_one_of(&client, by, at(vip(family, 10), by), &others[1..])?;
    let then = name(by, family)?;
    for _ in 0..8 {
        assert_eq!(name(by, family)?, then);
    }
    Ok(())
}

/// Waits until one of these answers.
fn answered_by_one_of(place: &Spaces, by: By, target: SocketAddr, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{target} is answered by one of {expected:?}"), SOON, || {
        let answer = ask(place, by, target)?;
        ensure!(answer.name().is_some_and(|name| expected.contains(&name)), "{answer:?}");
        Ok(())
    })
}

/// One port of a client: what it sends is one connection to the kernel, whoever answers.
struct UdpClient(UdpSocket);

impl UdpClient {
    fn new(place: &Spaces, target: SocketAddr) -> Result<Self> {
        let socket = place.run(|| {
            let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(target)?;
            Ok(socket)
        })?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        Ok(Self(socket))
    }

    fn is_answered_by(&self, expected: &str) -> Result<()> {
        wait_until(&format!("{expected} answers the same port"), SOON, || {
            let mut buffer = [0; 64];
            self.0.send(b"who?")?;
            let length = self.0.recv(&mut buffer)?;
            let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
            ensure!(answer.split(' ').next() == Some(expected), "{answer}");
            Ok(())
        })
    }
}

/// The endpoints that are taken away go on serving, so whoever is sent there is answered.
#[test]
fn udp_client_that_keeps_its_port_is_led_to_who_serves_now() -> Result<()> {
    let cluster = Cluster::start()?;
    cluster.serve("dns", 20, &["a"], &json!({}));
    cluster.serve("other", 21, &["a"], &json!({}));
    let (client, node) = (cluster.pod("b").network()?, &cluster.nodes[0]);
    for family in Family::ALL {
        let target = |number| at(vip(family, number), By::Udp);
        let (dns, other) = (UdpClient::new(&client, target(20))?, UdpClient::new(&client, target(21))?);
        dns.is_answered_by("a")?;
        other.is_answered_by("a")?;
        cluster.change("dns", &["c"]);
        dns.is_answered_by("c")?;
        node.kill_fabricd()?;
        cluster.change("dns", &["a"]);
        cluster.start_fabricd(node)?;
        dns.is_answered_by("a")?;
        other.is_answered_by("a")?;
    }
    Ok(())
}

#[test]
fn beside_kube_proxy_services_stay_off_and_say_so() -> Result<()> {
    let cluster = Cluster::start()?;
    let node = &cluster.nodes[0];
    node.stop_fabricd()?;
    node.run(&["nft", "add", "table", "ip", "kube-proxy"])?;
    node.run(&["nft", "add", "chain", "ip", "kube-proxy", "services"])?;
    let before = node.run(&["nft", "list", "map", "inet", "fabric-services", "svc4"])?;
    cluster.start_fabricd(node)?;
    cluster.serve("web", 10, &["a"], &json!({}));
    wait_until("it says what is in the way", SOON, || {
        let reply = node.http_get(9472, "/readyz")?;
        ensure!(
            reply.status == 503 && reply.body.contains("kube-proxy runs on this node"),
            "{} {}",
            reply.status,
            reply.body
        );
        Ok(())
    })?;
    assert_eq!(node.run(&["nft", "list", "map", "inet", "fabric-services", "svc4"])?, before);
    node.run(&["nft", "delete", "table", "ip", "kube-proxy"])?;
    node.wait_ready()?;
    answered_by(&cluster.pod("b").network()?, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["a"])
}

#[test]
fn services_that_are_switched_off_and_cleanup_leave_no_table() -> Result<()> {
    let cluster = Cluster::start()?;
    let [off, cleaned] = &cluster.nodes[..] else { unreachable!("two nodes") };
    let has_table = |node: &Node| -> Result<bool> {
        Ok(node.exec(&["nft", "list", "map", "inet", "fabric-services", "svc4"])?.status.success())
    };
    assert!(has_table(off)? && has_table(cleaned)?);
    off.stop_fabricd()?;
    assert!(has_table(off)?, "a daemon that ends leaves it");
    let env: Vec<(&str, &str)> = cluster.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    off.start_fabricd_with(&["--services", "off"], &env)?;
    wait_until("the table is gone", SOON, || {
        ensure!(!has_table(off)?, "it is there");
        Ok(())
    })?;
    cleaned.stop_fabricd()?;
    let cleanup =
        env.iter().fold(cleaned.command(&["fabricd", "--cleanup"])?, |command, (name, value)| command.env(name, value));
    cleanup.run()?;
    assert!(!has_table(cleaned)?);
    Ok(())
}

/// What `fabricctl service` says of Services, with its exit code.
fn told(node: &Node, name: &str) -> Result<(Option<i32>, Value)> {
    let shown = node.exec(&["fabricctl", "service", name, "-o", "json"])?;
    let told = serde_json::from_str(&shown.stdout).with_context(|| format!("{shown:?}"))?;
    Ok((shown.status.code(), told))
}

#[test]
fn fabricctl_shows_who_takes_connections_why_others_do_not_and_what_the_kernel_holds() -> Result<()> {
    let cluster = Cluster::start()?;
    let node = &cluster.nodes[0];
    cluster.serve("web", 10, &["a", "c"], &json!({"internalTrafficPolicy": "Local"}));
    cluster.serve("late", 11, &["b"], &json!({}));
    let mut endpoints = cluster.endpoints(Family::V4, &["a", "b", "c"]);
    endpoints[1]["conditions"] = json!({"ready": false});
    cluster.api.change(&slices_of(V1), "web-v4", &json!({"endpoints": endpoints}));
    let web = at(vip(Family::V4, 10), By::Tcp);
    let service = wait_until("three endpoints are known, and written", SOON, || {
        let (code, told) = told(node, "web")?;
        let service = told["services"][0].clone();
        ensure!(service["endpoint_list"].as_array().is_some_and(|all| all.len() == 10), "{service}");
        ensure!(code == Some(0) && told["ready"] == true, "{code:?} {told}");
        Ok(service)
    })?;
    let of = |list: &str, address: String| {
        let all = service[list].as_array().expect("a list");
        all.iter().find(|one| one["address"] == address).cloned().unwrap_or_default()
    };
    let ip = |name: &str| cluster.pod(name).ip(Family::V4).map(|ip| SocketAddr::new(ip, 8080).to_string());
    let (frontend, local) = (of("frontends", web.to_string()), ip("a")?);
    assert_eq!(frontend["kind"], "cluster_ip");
    assert_eq!((&frontend["programmed"], &frontend["inside"]), (&json!(true), &json!(format!("to {local}"))));
    for (name, takes, why) in [("a", true, ""), ("b", false, "not ready"), ("c", false, "on another node")] {
        let endpoint = of("endpoint_list", ip(name)?);
        assert_eq!(endpoint["takes_inside"], takes, "{endpoint}");
        assert!(endpoint["reason"].as_str().is_some_and(|reason| reason.starts_with(why)), "{endpoint}");
    }
    let by_address = told(node, "10.96.0.11")?.1;
    assert_eq!(by_address["services"][0]["name"], "default/late");
    let all = node.run(&["fabricctl", "service"])?;
    assert!(all.contains("default/late") && all.contains("default/web"), "{all}");
    assert_eq!(node.exec(&["fabricctl", "service", "nobody"])?.status.code(), Some(1));

    // The path of a packet, and the checks.
    let from = cluster.pod("b").ip(Family::V4)?.to_string();
    let explained = node.exec(&["fabricctl", "explain", &from, "10.96.0.10"])?.stdout;
    assert!(explained.contains(&format!("10.96.0.10:80/tcp is default/web's: to {local}")), "{explained}");
    let checks = node.exec(&["fabricctl", "doctor", "-o", "json"])?.stdout;
    let checks = checks.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    let check = checks.iter().find(|check| check["id"] == "services").context("no such check")?;
    assert_eq!(check["result"], "ok", "{check}");

    // Nobody serves.
    cluster.change("late", &[]);
    wait_until("the end of the endpoints is told", SOON, || {
        let explained = node.exec(&["fabricctl", "explain", &from, "10.96.0.11"])?.stdout;
        ensure!(explained.contains("rejected, as nobody serves"), "{explained}");
        Ok(())
    })
}

#[test]
fn load_balancers_ask_each_node_whether_it_has_endpoints() -> Result<()> {
    let cluster = Cluster::start()?;
    let outside = cluster.outside()?;
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32000,
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
    });
    cluster.serve("web", 10, &["a"], &spec);
    let says = |node: usize, family, status: u16, body: &str| {
        wait_until(&format!("node-{} says {status} {body}", node + 1), SOON, || {
            let reply = http::get(&outside, (cluster.nodes[node].underlay_ip(family), 32000).into(), "/any/path")?;
            ensure!(reply.status == status && reply.body.contains(body), "{reply:?}");
            Ok(())
        })
    };
    for family in Family::ALL {
        says(0, family, 200, "\t\"localEndpoints\": 1,\n\t\"serviceProxyHealthy\": true\n")?;
        says(1, family, 503, "\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 0")?;
    }
    // The last endpoint leaves a node: the balancer is told, and by the other one that it may come.
    cluster.change("web", &["c"]);
    for family in Family::ALL {
        says(0, family, 503, "\"localEndpoints\": 0")?;
        says(1, family, 200, "\"localEndpoints\": 1")?;
    }

    // A node that is about to go is eligible no more, and lives all the same.
    let node = &cluster.nodes[0];
    let of_node = |path: &str, status: u16, body: &str| {
        wait_until(&format!("{path} says {status} {body}"), SOON, || {
            let reply = node.http_get(10256, path)?;
            ensure!(reply.status == status && reply.body.contains(body), "{reply:?}");
            Ok(())
        })
    };
    of_node("/healthz", 200, "\"nodeEligible\":true")?;
    let taints = json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}});
    cluster.api.change(NODES, &node.name, &taints);
    of_node("/healthz", 503, "\"nodeEligible\":false")?;
    of_node("/livez", 200, "lastUpdated")?;
    Ok(())
}

#[test]
fn what_is_wrong_with_a_service_is_told_on_it_and_the_rest_of_it_works() -> Result<()> {
    let cluster = Cluster::start()?;
    let node = &cluster.nodes[0];
    let taken = node.network()?.run(|| Ok(TcpListener::bind((node.underlay_ip(Family::V4), 32001))?))?;
    let spec = json!({
        "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 32001,
        "externalIPs": ["10.96.0.11"], "loadBalancerSourceRanges": ["everybody"],
        "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}],
    });
    cluster.serve("web", 10, &["a"], &spec);
    cluster.serve("other", 11, &["c"], &json!({}));
    let events = "/api/v1/namespaces/default/events";
    let is_told = |reason: &str, words: &str, count: usize| {
        wait_until(&format!("{count} events {reason}"), SOON, || {
            let all = cluster.api.all(events);
            let is_so = |event: &&Value| {
                event["reason"] == reason
                    && event["involvedObject"]["name"] == "web"
                    && event["message"].as_str().is_some_and(|message| message.contains(words))
            };
            ensure!(all.iter().filter(is_so).count() == count, "{all:?}");
            Ok(())
        })
    };
    // Two nodes see the same, and say it once; of one node's port that node tells.
    is_told("FieldRefused", "\"everybody\" in loadBalancerSourceRanges", 1)?;
    is_told("FrontendConflict", "default/other has 10.96.0.11:80/tcp too", 1)?;
    is_told("FailedToStartServiceHealthcheck", "32001 of this node: Address already in use", 1)?;
    // An event can be there before the pass that it is of has ended.
    wait_until("the status warns of it", SOON, || {
        let warnings = node.status()?["warnings"].to_string();
        ensure!(warnings.contains("Service default/web: ") && warnings.contains("everybody"), "{warnings}");
        Ok(())
    })?;
    let (code, told) = told(node, "web")?;
    assert!(code == Some(4) && told["services"][0]["problems"].to_string().contains("everybody"), "{told}");
    // What is well of both works, and the port is listened on once it is free.
    let client = cluster.pod("b").network()?;
    answered_by(&client, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["a"])?;
    answered_by(&client, By::Tcp, at(vip(Family::V4, 11), By::Tcp), &["c"])?;
    drop(taken);
    let health = SocketAddr::new(node.underlay_ip(Family::V4), 32001);
    wait_until("the health check is answered", SOON, || {
        let reply = http::get(&node.network()?, health, "/")?;
        ensure!(reply.status == 200, "{reply:?}");
        Ok(())
    })
}

#[test]
fn address_that_no_service_has_is_not_sent_to_the_default_route() -> Result<()> {
    let mut cluster = Cluster::start()?;
    cluster.env.push(("FABRICD_SERVICE_CIDR", "10.96.0.0/16,fd00:96::/64".to_owned()));
    let node = cluster.nodes[0].clone();
    node.stop_fabricd()?;
    cluster.start_fabricd(&node)?;
    node.wait_ready()?;
    cluster.serve("web", 10, &["a"], &json!({}));
    // Who is beyond the node has all addresses, and knows the way back.
    let machine = &cluster.lab.underlay().machine;
    let (stranger, beyond) = (vip(Family::V4, 99), IpAddr::from([203, 0, 113, 99]));
    for ip in [stranger, beyond] {
        machine.run(&["ip", "address", "add", &ip.to_string(), "dev", "lo"])?;
    }
    machine.run(&["ip", "route", "add", "10.244.1.0/24", "via", &node.underlay_ip(Family::V4).to_string()])?;
    let any = IpAddr::from([0; 4]);
    let _server = Server::start(&machine.network()?, "outside", (any, 80).into(), (any, 53).into())?;
    let client = cluster.pod("b").network()?;
    answered_by(&client, By::Tcp, at(vip(Family::V4, 10), By::Tcp), &["a"])?;
    answered_by(&client, By::Tcp, at(beyond, By::Tcp), &["outside"])?;
    for place in [client, node.network()?] {
        ends(&place, By::Tcp, at(stranger, By::Tcp), &Answer::Nothing)?;
    }
    Ok(())
}

/// One line after the other over one connection of TCP.
struct Talk(BufReader<TcpStream>);

impl Talk {
    fn new(place: &Spaces, target: SocketAddr) -> Result<Self> {
        let stream = place.run(|| Ok(TcpStream::connect_timeout(&target, Duration::from_secs(5))?))?;
        stream.set_read_timeout(Some(SOON))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Says something, and is told the same.
    fn goes_on(&mut self) -> Result<()> {
        let mut line = String::new();
        self.0.get_mut().write_all(b"still there?\n")?;
        self.0.read_line(&mut line)?;
        ensure!(line == "still there?\n", "{line:?}");
        Ok(())
    }
}

/// Answers each line with itself until the test ends.
fn echo(place: &Spaces, at: SocketAddr) -> Result<()> {
    let listener = place.run(|| Ok(TcpListener::bind(at)?))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || -> std::io::Result<()> {
                let mut lines = BufReader::new(stream);
                let mut line = String::new();
                while lines.read_line(&mut line)? > 0 {
                    lines.get_mut().write_all(line.as_bytes())?;
                    line.clear();
                }
                Ok(())
            });
        }
    });
    Ok(())
}

/// As kube-proxy's nftables mode has it, but for the number of chains.
const KUBE_PROXY: &str = "
table ip kube-proxy {
    chain services {
        ip daddr 10.96.0.10 tcp dport 80 dnat to TARGET:8080
        ip daddr 10.96.0.10 tcp dport 7 dnat to TARGET:7
        ip daddr 10.96.0.10 udp dport 53 dnat to TARGET:5353
    }
    chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
    chain nat-output { type nat hook output priority -100; jump services; }
}
table ip kube-filter {
    chain keep { ip daddr 192.0.2.1 accept; }
}";

/// Rules of the iptables mode beside those of others, among them kubelet's.
const IPTABLES: &str = "
*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ERIFXISQEP7F7OF4 - [0:0]
:KUBE-SEP-1 - [0:0]
:OTHER - [0:0]
-A PREROUTING -m comment --comment \"KUBE-SERVICES of others\" -j OTHER
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.77/32 -j KUBE-SVC-ERIFXISQEP7F7OF4
-A KUBE-SVC-ERIFXISQEP7F7OF4 -j KUBE-SEP-1
-A KUBE-SEP-1 -j RETURN
-A OTHER -d 192.0.2.1/32 -j RETURN
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
-A INPUT -j KUBE-FIREWALL
-A FORWARD -j KUBE-FORWARD
-A KUBE-FORWARD -j RETURN
COMMIT
";

#[test]
fn kube_proxy_is_replaced_under_connections_of_which_none_is_lost_and_comes_back() -> Result<()> {
    let cluster = Cluster::start()?;
    let (node, client) = (&cluster.nodes[0], cluster.pod("b").network()?);
    let pod = cluster.pod("c").ip(Family::V4)?;
    echo(&cluster.pod("c").network()?, SocketAddr::new(pod, 7))?;
    let ports = json!([
        {"name": "http", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "echo", "port": 7, "protocol": "TCP"},
    ]);
    cluster.serve("web", 10, &["c"], &json!({"ports": ports}));
    let of_slice = json!([
        {"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 5353, "protocol": "UDP"},
        {"name": "echo", "port": 7, "protocol": "TCP"},
    ]);
    cluster.api.change(&slices_of(V1), "web-v4", &json!({"ports": of_slice}));
    let (web, dns) = (at(vip(Family::V4, 10), By::Tcp), at(vip(Family::V4, 10), By::Udp));
    let echoed = SocketAddr::new(web.ip(), 7);
    let start = |args: &[&str]| {
        let env: Vec<(&str, &str)> = cluster.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        node.start_fabricd_with(args, &env)?;
        node.wait_ready()
    };
    let kube_proxy_comes = || {
        fs::write(cluster.lab.dir().join("kube-proxy.nft"), KUBE_PROXY.replace("TARGET", &pod.to_string()))?;
        node.run(&["nft", "-f", &cluster.lab.dir().join("kube-proxy.nft").display().to_string()])
    };
    // kube-proxy alone.
    node.stop_fabricd()?;
    start(&["--services", "off"])?;
    node.stop_fabricd()?;
    kube_proxy_comes()?;
    fs::write(cluster.lab.dir().join("iptables"), IPTABLES)?;
    let file = cluster.lab.dir().join("iptables").display().to_string();
    node.run(&["iptables-nft-restore", "--noflush", &file])?;
    let mut open = (0..100).map(|_| Talk::new(&client, echoed)).collect::<Result<Vec<_>>>()?;
    let stream = UdpClient::new(&client, dns)?;
    let all_go_on = |open: &mut Vec<Talk>| -> Result<()> {
        open.iter_mut().try_for_each(Talk::goes_on)?;
        stream.is_answered_by("c")
    };
    all_go_on(&mut open)?;

    // fabricd takes its place, and all that is its goes: nothing of others.
    start(&["--services", "on", "--replace-kube-proxy"])?;
    wait_until("kube-proxy's rules are gone", SOON, || {
        let rules = node.run(&["nft", "list", "tables"])?;
        ensure!(!rules.contains("kube-proxy"), "{rules}");
        Ok(())
    })?;
    all_go_on(&mut open)?;
    answered_by(&client, By::Tcp, web, &["c"])?;
    Talk::new(&client, echoed)?.goes_on()?;
    let left = node.run(&["iptables-nft-save"])?;
    let rules: Vec<&str> = left.lines().filter(|line| line.starts_with("-A ")).collect();
    let others = [
        "-A INPUT -j KUBE-FIREWALL",
        "-A PREROUTING -m comment --comment \"KUBE-SERVICES of others\" -j OTHER",
        "-A OTHER -d 192.0.2.1/32 -j RETURN",
    ];
    assert!(others.iter().all(|rule| rules.contains(rule)) && rules.len() == others.len(), "{left}");
    let chains: Vec<&str> = left.lines().filter(|line| line.starts_with(":KUBE-")).collect();
    assert_eq!(chains.len(), 1, "kubelet's alone: {left}");
    assert!(node.run(&["nft", "list", "tables"])?.contains("kube-filter"));

    // And back: first no more replacing, then kube-proxy, then no more Services.
    node.stop_fabricd()?;
    kube_proxy_comes()?;
    start(&["--services", "off"])?;
    wait_until("our table is gone", SOON, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("fabric-services"), "{tables}");
        Ok(())
    })?;
    all_go_on(&mut open)?;
    answered_by(&client, By::Tcp, web, &["c"])?;
    Talk::new(&client, echoed)?.goes_on()
}

/// A node whose lease is in an etcd that is away, and whose kubeconfig names the API server's ClusterIP, which nobody
/// translates but this daemon.
#[test]
fn services_wait_for_no_lease_and_the_api_server_is_found_without_its_cluster_ip() -> Result<()> {
    let mut lab = Lab::builder().create()?;
    let api = lab.underlay().machine.network()?.run(|| FakeApi::start(([10, 99, 0, 2], 6443).into()))?;
    let node = lab.boot_node()?;
    api.add_node(&node.name, &[]);
    let kubeconfig = api.kubeconfig(lab.dir())?;
    let text = fs::read_to_string(&kubeconfig)?.replace("10.99.0.2:6443", "10.96.0.1:80");
    fs::write(&kubeconfig, text)?;
    let ports = json!({"ports": [{"name": "https", "port": 80, "protocol": "TCP"}]});
    api.create(SERVICES, service("kubernetes", &["10.96.0.1"], &ports));
    let mut own = slice("kubernetes", "kubernetes", &[("10.99.0.2", "control-plane")]);
    own["ports"] = json!([{"name": "https", "port": 6443, "protocol": "TCP"}]);
    api.create(&slices_of(V1), own);
    let start = |given: &[&str]| {
        let kubeconfig = kubeconfig.display().to_string();
        let env = [
            ("FABRICD_ETCD_ENDPOINTS", "http://192.0.2.1:2379"),
            ("FABRICD_SERVICES", "on"),
            ("FABRICD_KUBECONFIG", &kubeconfig),
        ];
        node.start_fabricd_with(given, &env)
    };
    let holds = |what: &str| {
        wait_until("the kernel holds the Services", SOON, || {
            let map = node.run(&["nft", "list", "map", "inet", "fabric-services", "svc4"])?;
            ensure!(map.contains(what), "{map}");
            Ok(())
        })
    };
    let is_without_lease = || -> Result<()> {
        let ready = node.http_get(9472, "/readyz")?;
        ensure!(ready.status == 503, "{}", ready.body);
        Ok(())
    };

    start(&["--api-server", "http://10.99.0.2:6443"])?;
    holds("10.96.0.1 . ")?;
    is_without_lease()?;
    wait_until("the addresses are kept", SOON, || {
        let kept = node.run(&["cat", "/var/lib/fabric/api-servers.json"])?;
        ensure!(kept.contains("10.99.0.2:6443"), "{kept}");
        Ok(())
    })?;

    // Without the flag, and without rules that would lead to the ClusterIP.
    node.stop_fabricd()?;
    node.run(&["nft", "delete", "table", "inet", "fabric-services"])?;
    start(&[])?;
    holds("10.96.0.1 . ")?;
    api.create(SERVICES, service("web", &["10.96.0.20"], &json!({"ports": [{"port": 80}]})));
    let mut web = slice("web", "web", &[("10.99.0.7", "elsewhere")]);
    web["ports"] = json!([{"port": 8080}]);
    api.create(&slices_of(V1), web);
    holds("10.96.0.20 . ")?;
    is_without_lease()
}
