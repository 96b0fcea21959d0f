//! The truth table: every pod connects to every other, at each port of each protocol, in both families, by address and by
//! Service, and what arrives is what `evaluate` says. Kernels of CI have no SCTP sockets: `core/tests/policy` has its rules.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use fabric_core::policy::objects::{NamespaceObject, PodObject, PolicyObject};
use fabric_core::policy::sets::{NamespaceSet, PodSet, PolicySet};
use fabric_core::policy::{Cluster as Rules, Conn, State};
use fabric_tests::fake_api::NODES;
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::lab::{Pod, wait_until};
use fabric_tests::policies::{NAMESPACES, namespace, policies_of, policy};
use fabric_tests::services::{SERVICES, V1, endpoint, service, slice, slices_of};
use serde_json::{Value, json};

use crate::{Cluster, PORTS, SOON, Server, reaches};

const SPACES: [&str; 3] = ["x", "y", "z"];

/// Three namespaces of three pods each, on two nodes, all of which listen.
struct Nine {
    cluster: Cluster,
    pods: BTreeMap<String, Pod>,
    _servers: Vec<Server>,
}

fn namespaces() -> [Value; 3] {
    SPACES.map(|space| namespace(space, &json!({"ns": space})))
}

fn policies() -> [Value; 6] {
    let only = |name: &str| json!({"matchLabels": {"pod": name}});
    let from = |space: &str| json!({"namespaceSelector": {"matchLabels": {"ns": space}}});
    [
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
    ]
}

fn create_policies(cluster: &Cluster, policies: &[Value]) -> Result<()> {
    for object in policies {
        let space = object["metadata"]["namespace"].as_str().context("a namespace")?;
        cluster.api.create(&policies_of(space), object.clone());
    }
    Ok(())
}

impl Nine {
    /// With these policies, before there is any pod.
    fn start(flags: &[&str], policies: &[Value]) -> Result<Self> {
        let cluster = Cluster::start(2)?;
        for object in namespaces() {
            cluster.api.create(NAMESPACES, object);
        }
        create_policies(&cluster, policies)?;
        for node in &cluster.nodes {
            let n = node.index;
            cluster.api.add_node(&node.name, &[&format!("10.244.{n}.0/24"), &format!("fd00:10:244:{n}::/64")]);
            let addresses = fabric_core::model::Family::ALL
                .map(|family| json!({"type": "InternalIP", "address": node.underlay_ip(family)}));
            cluster.api.change(NODES, &node.name, &json!({"status": {"addresses": addresses}}));
            cluster.start_fabricd_with(node, flags)?;
        }
        let mut pods = BTreeMap::new();
        for space in SPACES {
            for (name, node) in [("a", 0), ("b", 1), ("c", 0)] {
                pods.insert(format!("{space}/{name}"), cluster.add_pod(&cluster.nodes[node], space, name)?);
            }
        }
        let servers = pods.values().map(Server::start).collect::<Result<_>>()?;
        Ok(Self { cluster, pods, _servers: servers })
    }

    /// Makes a Service for each pod, by whose addresses in their order it has its own.
    fn create_services(&self) -> Result<()> {
        for (number, pod) in self.pods.values().enumerate() {
            let name = format!("pod-{number}");
            let ports = |port: fn(usize) -> u16| -> Value {
                let all = ["TCP", "UDP"].into_iter().flat_map(|protocol| [0, 1].map(|at| (protocol, at)));
                let all = all.map(|(protocol, at)| {
                    json!({"name": format!("{}-{at}", protocol.to_lowercase()), "protocol": protocol, "port": port(at)})
                });
                all.collect()
            };
            let ips = pod.ips().iter().map(|ip| vip(*ip, number).to_string()).collect::<Vec<_>>();
            let ips = ips.iter().map(String::as_str).collect::<Vec<_>>();
            self.cluster.api.create(SERVICES, service(&name, &ips, &json!({"ports": ports(|at| SERVICE_PORTS[at])})));
            for ip in pod.ips() {
                let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
                let mut slice = slice(&format!("{name}-{}", family.to_lowercase()), &name, &[]);
                slice["addressType"] = json!(family);
                slice["ports"] = ports(|at| PORTS[at]);
                slice["endpoints"] = json!([endpoint(&ip.to_string(), &pod.node.name)]);
                self.cluster.api.create(&slices_of(V1), slice);
            }
        }
        Ok(())
    }

    /// The state as a test knows it: what it gave the API server.
    fn state(&self, policies: &[Value]) -> Result<State> {
        fn read<T: serde::de::DeserializeOwned>(objects: &[Value]) -> Result<Vec<T>> {
            objects.iter().map(|object| Ok(serde_json::from_value(object.clone())?)).collect()
        }
        let objects = self.pods.keys().map(|name| {
            let (space, name) = name.split_once('/').context("a name")?;
            self.cluster.object(space, name)
        });
        let objects = objects.collect::<Result<Vec<Value>>>()?;
        Ok(State {
            policies: PolicySet::default().listed(&read::<PolicyObject>(policies)?).policies().clone(),
            namespaces: NamespaceSet::listed(&read::<NamespaceObject>(&namespaces())?).namespaces().clone(),
            pods: PodSet::listed(&read::<PodObject>(&objects)?).pods().clone(),
            ..State::default()
        })
    }

    /// All connections of these to each other that differ from what policies say, in words. By Services each pod connects to
    /// itself, too.
    fn wrong(&self, rules: &Rules<'_>, by: By) -> Result<Vec<String>> {
        let mut conns = vec![];
        for (from, source) in &self.pods {
            for (number, (to, target)) in self.pods.iter().enumerate() {
                if to == from && by == By::Address {
                    continue;
                }
                for (src, dst) in source.ips().iter().flat_map(|src| target.ips().iter().map(move |dst| (*src, *dst))) {
                    for (protocol, at) in [6, 17].into_iter().flat_map(|protocol| [0, 1].map(|at| (protocol, at))) {
                        let conn = Conn { src, dst, protocol, port: PORTS[at] };
                        let asked = match by {
                            By::Address => SocketAddr::new(dst, PORTS[at]),
                            By::Service => SocketAddr::new(vip(dst, number), SERVICE_PORTS[at]),
                        };
                        if src.is_ipv4() == dst.is_ipv4() {
                            conns.push((from, to, conn, asked));
                        }
                    }
                }
            }
        }
        let mut wrong = vec![];
        for batch in conns.chunks(200) {
            let seen: Vec<Result<bool>> = thread::scope(|scope| {
                let probe = |(from, _, conn, asked): &(&String, &String, Conn, SocketAddr)| {
                    let (pod, conn, asked) = (&self.pods[*from], *conn, *asked);
                    scope.spawn(move || reaches(pod, &conn, asked))
                };
                let probes: Vec<_> = batch.iter().map(probe).collect();
                probes.into_iter().map(|probe| probe.join().expect("a probe does not panic")).collect()
            });
            for ((from, to, conn, asked), seen) in batch.iter().zip(seen) {
                let said = rules.evaluate(conn);
                let seen = seen.with_context(|| format!("{from} to {to} by {asked}: {conn:?}"))?;
                if said.is_allowed() != seen {
                    wrong
                        .push(format!("{from} → {to} {conn:?} by {asked}: {seen}; {} | {}", said.egress, said.ingress));
                }
            }
        }
        Ok(wrong)
    }

    fn are_as_said(&self, what: &str, policies: &[Value], by: By) -> Result<()> {
        let state = self.state(policies)?;
        let rules = Rules::new(&state);
        // The other node hears of a pod's addresses a moment later.
        wait_until(what, SOON * 2, || {
            let wrong = self.wrong(&rules, by)?;
            ensure!(wrong.is_empty(), "{} connections: {}", wrong.len(), wrong.join("\n"));
            Ok(())
        })
    }
}

/// What pods connect to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Address,
    Service,
}

/// The ports of a Service that lead to [`PORTS`]: what policies name is the pod's port.
const SERVICE_PORTS: [u16; 2] = [80, 90];

/// The ClusterIP of the family of a pod's address.
fn vip(ip: IpAddr, number: usize) -> IpAddr {
    let host = u8::try_from(number + 10).expect("nine pods");
    match ip {
        IpAddr::V4(_) => IpAddr::from([10, 96, 0, host]),
        IpAddr::V6(_) => Ipv6Addr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, host.into()]).into(),
    }
}

#[test]
fn every_connection_of_nine_pods_on_two_nodes_is_what_policies_say() -> Result<()> {
    let nine = Nine::start(&[], &policies())?;
    nine.are_as_said("every connection is as policies say", &policies(), By::Address)?;
    // Restarted, it finds all applied, and writes nothing.
    let node = &nine.cluster.nodes[0];
    let before = node.run(&["nft", "list", "table", "inet", "fabric-policy"])?;
    node.kill_fabricd()?;
    nine.cluster.start_fabricd(node)?;
    let metrics = node.http_get(9472, "/metrics")?.body;
    assert!(metrics.contains("fabricd_policy_changes_total 0"), "{metrics}");
    let handles = |text: &str| text.lines().filter(|line| !line.contains("counter")).collect::<Vec<_>>().join("\n");
    let after = node.run(&["nft", "list", "table", "inet", "fabric-policy"])?;
    assert_eq!(handles(&before), handles(&after));
    Ok(())
}

#[test]
fn every_connection_of_nine_pods_through_services_is_what_policies_say() -> Result<()> {
    let nine = Nine::start(&["--services", "on"], &[])?;
    nine.create_services()?;
    // A connection to a Service that isn't written yet is refused, and no answer of a policy: so each has to be reached first.
    nine.are_as_said("every pod reaches every Service", &[], By::Service)?;
    create_policies(&nine.cluster, &policies())?;
    nine.are_as_said("every connection is as policies say", &policies(), By::Service)
}
