//! Beside kube-proxy, and in its place.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::kubernetes::{Nodes as _, api_on_underlay};
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{By, Lab, wait_until};
use fabric_tests::services::{SERVICES, V1, service, slice, slices_of};
use serde_json::json;

use crate::{Cluster, SOON, UdpClient, answered_by, at, vip};

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
    let api = api_on_underlay(&lab)?;
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
