//! Services in the Lab: who answers, whom it sees, and what a client is told where nobody can.

mod algorithms;
mod churn;
mod clients;
mod kube_proxy;
mod reports;
mod sctp;
mod told;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::fake_api::{FakeApi, NODES};
use fabric_tests::kubernetes::{DUAL_STACK, add_dual_stack_node, api_on_underlay, lease_settings};
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{Answer, By, Families, Lab, Node, Pod, Server, ask, wait_until};
use fabric_tests::services::{SERVICES, V1, endpoint, service, slice, slices_of};
use serde_json::{Value, json};

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(60);

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
        let api = api_on_underlay(&lab)?;
        let mut env = lease_settings(&lab, &api, DUAL_STACK)?;
        env.push(("FABRICD_SERVICES", "on".to_owned()));
        let nodes: Vec<Arc<Node>> = (0..2).map(|_| lab.boot_node()).collect::<Result<_>>()?;
        let mut cluster = Self { api, env, pods: vec![], nodes, lab, _servers: vec![] };
        for node in cluster.nodes.clone() {
            add_dual_stack_node(&cluster.api, &node);
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
    // Slices tell when it happened.
    let told = json!({
        "metadata": {"annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "2026-11-29T10:00:00Z"}},
        "endpoints": cluster.endpoints(Family::V4, &["c"]),
    });
    cluster.api.change(&slices_of(V1), "web-v4", &told);
    wait_until("the metric has one change", SOON, || {
        let metrics = node.http_get(9472, "/metrics")?.body;
        let line = "fabricd_services_network_programming_duration_seconds_count 1";
        ensure!(metrics.lines().any(|of| of == line), "{metrics}");
        Ok(())
    })?;
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

/// Waits until one of these answers.
fn answered_by_one_of(place: &Spaces, by: By, target: SocketAddr, expected: &[&str]) -> Result<()> {
    wait_until(&format!("{target} is answered by one of {expected:?}"), SOON, || {
        let answer = ask(place, by, target)?;
        ensure!(answer.name().is_some_and(|name| expected.contains(&name)), "{answer:?}");
        Ok(())
    })
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
