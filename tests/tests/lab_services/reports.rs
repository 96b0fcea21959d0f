//! What others' users have reported of Services, each as a case. `k/k` is kubernetes/kubernetes.
//!
//! | report | what went wrong | the test |
//! |---|---|---|
//! | k/k#74839 | a packet out of the window resets the client | `external_addresses_lead_in_…`, `services::tests::setting_is_written_once_it_is_there` |
//! | k/k#122740, #139628, #141371, #126934, #48370, #105657, #106163, #96174 | UDP goes on to who served before | `udp_client_that_keeps_its_port_follows_…` |
//! | k/k#89869 | clients are masqueraded although the policy is Local | `node_ports_and_load_balancers_lead_in_…` |
//! | k/k#55429 | affinity and Local | `external_addresses_lead_in_…` |
//! | k/k#110302, cilium#27096 | a client stays with a pod that is gone | `client_with_affinity_stays_…` |
//! | k/k#53775, #87426, flannel#1702 | a pod reaches itself, or its node's others, by no Service | `cluster_ips_lead_…` |
//! | k/k#111863 | NodePorts at a load balancer's address | `reconcile::tests::node_ports_are_taken_at_addresses_…` |
//! | k/k#119656 | source ranges that hold the node's address | `services_plan::source_ranges_let_nobody_else_in` |
//! | k/k#57922 | NodePorts on localhost | `external_addresses_lead_in_…`: not there |
//! | k/k#135334, #121231 | one address twice, half-moved slices | `choose_tests`: `ready_pod_that_has_a_former_pods_address_counts`, `pod_that_moves_between_slices_is_there_all_the_while` |
//! | k/k#44311, #134648, kube-router#455 | health checks stay 200, know no network, aren't there | `load_balancers_ask_each_node_…` |
//! | k/k#139513, #135639 | thousands of Services take minutes | `bench services` |
//! | k/k#119265 | a dead kube-proxy's rules refuse | `kube_proxy_is_replaced_…` |
//! | cilium#23744, #19810 | endpoints that are going, with Local | `choose_tests`: `local_external_frontend_leads_to_one_leaving_here` and those beside it |
//! | cilium#43206, #44430 | an external address that is a node's takes its other ports | `external_addresses_lead_in_…` |
//! | cilium#45252 | Local from inside | `node_ports_and_load_balancers_lead_in_…` |
//! | cilium#22557 | an endpoint on a node's network behind the tunnel | `external_addresses_lead_in_…` |

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Answer, By, Server, ask, wait_until};
use fabric_tests::services::{SERVICES, V1, endpoint, slices_of};
use serde_json::json;

use crate::{Cluster, EACH, SOON, UdpClient, answered_by, answered_by_one_of, at, ends, seen, vip};

impl UdpClient {
    /// What comes of one more datagram.
    fn asks(&self) -> Result<Answer> {
        let mut buffer = [0; 64];
        match self.0.send(b"who?").and_then(|_| self.0.recv(&mut buffer)) {
            Ok(length) => {
                let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let (name, client) = answer.split_once(' ').unwrap_or_default();
                Ok(Answer::From(name.to_owned(), client.parse()?))
            }
            Err(error) => match error.kind() {
                ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied => Ok(Answer::Refused),
                ErrorKind::TimedOut | ErrorKind::WouldBlock => Ok(Answer::Nothing),
                // As a router says it that knows no such network.
                ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => Ok(Answer::Nothing),
                _ => Err(error.into()),
            },
        }
    }

    fn ends(&self, expected: &Answer) -> Result<()> {
        wait_until(&format!("{expected:?} from the same port"), SOON, || {
            let answer = self.asks()?;
            ensure!(answer == *expected, "{answer:?}");
            Ok(())
        })
    }
}

#[test]
fn udp_client_that_keeps_its_port_follows_every_change_of_who_serves() -> Result<()> {
    let cluster = Cluster::start()?;
    let place = cluster.pod("b").network()?;
    for (family, number) in Family::ALL.into_iter().zip([10, 11]) {
        let name = format!("dns{number}");
        let client = UdpClient::new(&place, at(vip(family, number), By::Udp))?;
        // Before there is a Service the kernel remembers a connection that nobody has translated.
        client.asks()?;
        cluster.serve(&name, number, &[], &json!({}));
        client.ends(&Answer::Refused)?;
        // First it isn't ready.
        let slice = format!("{name}-{family:?}").to_lowercase();
        let mut endpoints = cluster.endpoints(family, &["a"]);
        endpoints[0]["conditions"] = json!({"ready": false});
        cluster.api.change(&slices_of(V1), &slice, &json!({"endpoints": endpoints}));
        client.ends(&Answer::Refused)?;
        cluster.change(&name, &["a"]);
        client.is_answered_by("a")?;
        // Nobody serves, and somebody again.
        cluster.change(&name, &[]);
        client.ends(&Answer::Refused)?;
        cluster.change(&name, &["c"]);
        client.is_answered_by("c")?;
        // It serves still, but for its own node alone.
        cluster.api.change(SERVICES, &name, &json!({"spec": {"internalTrafficPolicy": "Local"}}));
        client.ends(&Answer::Nothing)?;
        cluster.change(&name, &["a", "c"]);
        client.is_answered_by("a")?;
        // a serves on, though no Service leads there any more.
        cluster.api.delete(SERVICES, &name);
        wait_until("nobody answers", SOON, || {
            let answer = client.asks()?;
            ensure!(answer.name().is_none(), "{answer:?}");
            Ok(())
        })?;
    }
    // By a NodePort, from outside.
    let outside = cluster.outside()?;
    let spec = json!({
        "type": "NodePort", "ports": [{"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 30053}],
    });
    cluster.serve("rolled", 12, &["a"], &spec);
    for family in Family::ALL {
        cluster.change("rolled", &["a"]);
        let client = UdpClient::new(&outside, (cluster.nodes[0].underlay_ip(family), 30053).into())?;
        for name in ["a", "c", "b"] {
            cluster.change("rolled", &[name]);
            client.is_answered_by(name)?;
        }
    }
    Ok(())
}

fn external(family: Family, number: u8) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([198, 51, 100, number]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 0x198, 0, 0, 0, 0, number.into()]),
    }
}

#[test]
fn external_addresses_lead_in_from_outside_and_take_nothing_else_of_the_node() -> Result<()> {
    let cluster = Cluster::start()?;
    let (outside, node) = (cluster.outside()?, &cluster.nodes[0]);
    let to_us = |number| json!(Family::ALL.map(|family| external(family, number)));
    let machine = &cluster.lab.underlay().machine;
    for (family, number) in Family::ALL.into_iter().flat_map(|family| [(family, 9), (family, 10), (family, 11)]) {
        let (ip, via) = (external(family, number).to_string(), node.underlay_ip(family).to_string());
        machine.run(&["ip", "route", "add", &ip, "via", &via])?;
    }
    let own = json!(Family::ALL.map(|family| node.underlay_ip(family)));
    let local = |number| json!({"externalIPs": to_us(number), "externalTrafficPolicy": "Local"});
    cluster.serve("web", 10, &["a", "c"], &json!({"externalIPs": to_us(9)}));
    cluster.serve("of-node", 11, &["c"], &json!({"externalIPs": own}));
    cluster.serve("local", 12, &["a", "b", "c"], &local(10));
    let sticky = json!({"sessionAffinity": "ClientIP", "externalIPs": to_us(11), "externalTrafficPolicy": "Local"});
    cluster.serve("sticky", 13, &["a", "b", "c"], &sticky);
    cluster.serve("on-node", 14, &["a"], &json!({}));
    // A pod on its node's network.
    let other = &cluster.nodes[1];
    let mut servers = vec![];
    for family in Family::ALL {
        let ip = other.underlay_ip(family);
        servers.push(Server::start(&other.network()?, "host", (ip, 8080).into(), (ip, 5353).into())?);
        let endpoints = json!([endpoint(&ip.to_string(), &other.name)]);
        let slice = format!("on-node-{family:?}").to_lowercase();
        cluster.api.change(&slices_of(V1), &slice, &json!({"endpoints": endpoints}));
        // What else listens on the node, as its SSH does.
        let own = node.underlay_ip(family);
        servers.push(Server::start(&node.network()?, "ssh", (own, 22).into(), (own, 22).into())?);
    }

    let (pod, host, far) = (cluster.pod("b").network()?, node.network()?, cluster.pod("d").network()?);
    for (by, family) in EACH {
        let us: [IpAddr; 2] = match family {
            Family::V4 => [[10, 99, 0, 1].into(), [10, 99, 0, 2].into()],
            Family::V6 => ["fd00:99::1".parse()?, "fd00:99::2".parse()?],
        };
        let web = at(external(family, 9), by);
        for place in [&outside, &pod, &host, &far] {
            answered_by(place, by, web, &["a", "c"])?;
        }
        // Of both endpoints the one on this node sees the client, as its answers come by this node anyway.
        for _ in 0..8 {
            if let Answer::From(name, client) = ask(&outside, by, web)? {
                assert_eq!(us.contains(&client), name == "a", "{name} sees {client}");
            }
        }
        // The address of a node: this port of it, and no other.
        answered_by(&outside, by, at(node.underlay_ip(family), by), &["c"])?;
        answered_by(&outside, by, SocketAddr::new(node.underlay_ip(family), 22), &["ssh"])?;
        // Local: those of this node from outside, which see the client; all from inside.
        answered_by(&outside, by, at(external(family, 10), by), &["a", "b"])?;
        assert!(us.contains(&seen(&outside, by, at(external(family, 10), by))?));
        answered_by(&far, by, at(external(family, 10), by), &["a", "b", "c"])?;
        // With affinity a client from outside stays with one of this node.
        let stays = at(external(family, 11), by);
        answered_by_one_of(&outside, by, stays, &["a", "b"])?;
        let first = ask(&outside, by, stays)?;
        for _ in 0..6 {
            assert_eq!(ask(&outside, by, stays)?, first);
        }
        for place in [&pod, &host, &outside, &far] {
            answered_by(place, by, at(vip(family, 14), by), &["host"])?;
        }
    }
    // Nobody serves: the client is told.
    cluster.change("web", &[]);
    for (by, family) in EACH {
        ends(&outside, by, at(external(family, 9), by), &Answer::Refused)?;
    }
    // On localhost there are no NodePorts.
    let spec =
        json!({"type": "NodePort", "ports": [{"name": "http", "port": 80, "protocol": "TCP", "nodePort": 30080}]});
    cluster.serve("by-node-port", 15, &["a"], &spec);
    answered_by(&host, By::Tcp, (node.underlay_ip(Family::V4), 30080).into(), &["a"])?;
    assert_eq!(ask(&host, By::Tcp, ([127, 0, 0, 1], 30080).into())?, Answer::Refused);
    // Out of the window is no reason to call a packet invalid.
    let setting = node.run(&["sysctl", "-n", "net.netfilter.nf_conntrack_tcp_be_liberal"])?;
    assert_eq!(setting.trim(), "1");
    Ok(())
}
