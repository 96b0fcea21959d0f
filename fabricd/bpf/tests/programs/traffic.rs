//! Real traffic between real pods: nothing is lost or changed, whatever is cut or put together on the way, and what connection
//! tracking translates still arrives.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use fabric_bpf::{Program, Reason};

use super::network::{Node, Space, nodes};
use super::rig::{pod4, underlay4};

const LIMIT: Duration = Duration::from_secs(30);
/// What a stream carries: some thousand packets of full size.
const STREAM: usize = 4 << 20;
/// What datagrams carry. The last two are larger than the MTU, and travel in fragments.
const DATAGRAMS: [usize; 6] = [0, 1, 600, 1_422, 4_000, 40_000];
const FRAGMENTED: usize = 2;
/// Fewer packets than any stream has.
const MANY: u64 = 40;

/// The same bytes for whoever asks, and no two blocks alike.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

/// A TCP connection from one space to `to`, on which `listen` answers in the other: all that is said comes back.
fn echoed_stream(client: &Space, to: SocketAddr, server: &Space, listen: SocketAddr) -> io::Result<()> {
    let listener = server.run(|| TcpListener::bind(listen))?;
    let mut asking = client.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
    let (mut answering, _) = listener.accept()?;
    [&asking, &answering].into_iter().try_for_each(|stream| stream.set_read_timeout(Some(LIMIT)))?;
    let (said, mut speaking) = (pattern(STREAM), asking.try_clone()?);
    let heard = thread::scope(|scope| {
        let speak = || speaking.write_all(&said).and_then(|()| speaking.shutdown(Shutdown::Write));
        let answer =
            || io::copy(&mut answering.try_clone()?, &mut answering).and_then(|_| answering.shutdown(Shutdown::Write));
        let (speaker, answerer) = (scope.spawn(speak), scope.spawn(answer));
        let mut heard = vec![];
        asking.read_to_end(&mut heard)?;
        speaker.join().expect("no panic")?;
        answerer.join().expect("no panic")?;
        io::Result::Ok(heard)
    })?;
    assert!(heard == said, "{} of {STREAM} bytes came back, or others", heard.len());
    Ok(())
}

/// Datagrams of all sizes there and back.
fn echoed_datagrams(client: &Space, to: SocketAddr, server: &Space) {
    let bind = |space: &Space, address: SocketAddr| space.run(|| UdpSocket::bind(address)).expect("bound");
    let sink = bind(server, to);
    let source = bind(client, (Ipv4Addr::UNSPECIFIED, 0).into());
    source.connect(to).expect("connected");
    [&source, &sink].iter().for_each(|socket| socket.set_read_timeout(Some(LIMIT)).expect("set"));
    let mut buffer = vec![0; 65_536];
    for length in DATAGRAMS {
        let said = pattern(length);
        source.send(&said).expect("sent");
        let (count, from) = sink.recv_from(&mut buffer).expect("received");
        assert!(buffer[..count] == said, "{length} bytes there");
        sink.send_to(&buffer[..count], from).expect("sent");
        let count = source.recv(&mut buffer).expect("received");
        assert!(buffer[..count] == said, "{length} bytes back");
    }
}

fn pod(node: &Node) -> &Space {
    &node.pods[&10]
}

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// Pod 10 of node 1 talks to pod 10 of node 2.
fn talk(nodes: &[Node; 2]) {
    let to = at(pod4(2, 10), 7_000);
    echoed_stream(pod(&nodes[0]), to, pod(&nodes[1]), to).unwrap_or_else(|error| panic!("{error}"));
    echoed_datagrams(pod(&nodes[0]), to, pod(&nodes[1]));
}

/// How packets are cut and put together.
fn offloads(nodes: &[Node; 2], uplink: &str, pods: &str) {
    for node in nodes {
        let set = |link: &str, to: &str| format!("ethtool -K {link} tso {to} gso {to} gro {to} >/dev/null 2>&1; ");
        node.space.sh(&format!("{}:", ["wire", "fabric.1"].map(|link| set(link, uplink)).concat()));
        node.space.sh(&format!("{}:", ["cni0", "pod-10", "pod-11"].map(|link| set(link, pods)).concat()));
        node.pods.values().for_each(|pod| pod.sh(&format!("{}:", set("eth0", pods))));
    }
}

#[test]
fn all_arrives_as_it_was_sent_however_it_is_cut_on_the_way() {
    let mut nodes = nodes();
    nodes.iter_mut().for_each(Node::attach);
    for (uplink, pods) in [("on", "on"), ("off", "on"), ("off", "off")] {
        offloads(&nodes, uplink, pods);
        let before = nodes.each_ref().map(|node| (node.fast_and_slow(), slow_by_nature(node)));
        talk(&nodes);
        for (node, ((fast, slow), expected)) in nodes.iter().zip(before) {
            let (fast, slow) = (node.fast_and_slow().0 - fast, node.fast_and_slow().1 - slow);
            let expected = slow_by_nature(node) - expected;
            assert!(expected >= 2 * FRAGMENTED as u64, "{expected} fragments");
            assert!(fast > MANY && slow == expected, "uplink {uplink}, pods {pods}: {}", node.counts());
        }
    }
}

/// Fragments, and ARP.
fn slow_by_nature(node: &Node) -> u64 {
    let reasons = [Reason::SlowFragment, Reason::SlowNotIp];
    reasons
        .iter()
        .flat_map(|reason| [Program::PodOut, Program::WireIn].map(|program| node.count(program, *reason)))
        .sum()
}

#[test]
fn nodes_with_and_without_programs_understand_each_other() {
    let mut nodes = nodes();
    nodes[0].attach();
    talk(&nodes);
    assert!(nodes[0].fast_and_slow().0 > MANY && nodes[1].fast_and_slow().0 == 0, "{}", nodes[0].counts());
    nodes[0].detach();
    nodes[1].attach();
    talk(&nodes);
    assert!(nodes[1].fast_and_slow().0 > MANY);
}

#[test]
fn filters_of_tc_do_what_links_do() {
    let nodes = nodes();
    nodes.iter().for_each(Node::attach_by_tc);
    talk(&nodes);
    for node in &nodes {
        let (fast, slow) = node.fast_and_slow();
        assert!(fast > MANY && slow == slow_by_nature(node), "{}", node.counts());
    }
    let [one, other] = [&nodes[0].pods[&10], &nodes[0].pods[&11]];
    let to = at(pod4(1, 11), 7_000);
    echoed_stream(one, to, other, to).unwrap_or_else(|error| panic!("{error}"));
    assert!(nodes[0].count(Program::PodOut, Reason::FastSameNode) > MANY);
}

#[test]
fn peers_on_one_link_need_no_tunnel() {
    let mut nodes = nodes();
    for (node, other) in nodes.iter_mut().zip([2, 1]) {
        node.space.sh(&format!("ip route replace 198.18.{other}.0/24 via 192.0.2.{other} dev wire"));
        node.go_direct();
        node.attach();
    }
    talk(&nodes);
    for node in &nodes {
        assert!(
            node.count(Program::PodOut, Reason::FastDirect) > MANY
                && node.count(Program::WireIn, Reason::FastDirect) > MANY
        );
        assert_eq!(node.count(Program::PodOut, Reason::FastTunnel), 0);
    }
}

#[test]
fn pods_of_one_node_talk_past_the_bridge() {
    let mut nodes = nodes();
    nodes[0].attach();
    let (one, other) = (&nodes[0].pods[&10], &nodes[0].pods[&11]);
    let to = at(pod4(1, 11), 7_000);
    echoed_stream(one, to, other, to).unwrap_or_else(|error| panic!("{error}"));
    echoed_datagrams(one, to, other);
    assert!(nodes[0].count(Program::PodOut, Reason::FastSameNode) > MANY);
}

#[test]
fn programs_come_and_go_under_a_stream() {
    let mut nodes = nodes();
    nodes.iter_mut().for_each(Node::attach);
    let (client, server) =
        (pod(&nodes[0]).run(|| UdpSocket::bind("0.0.0.0:0")), pod(&nodes[1]).run(|| UdpSocket::bind("0.0.0.0:7000")));
    let (client, server) = (client.expect("bound"), server.expect("bound"));
    server.set_read_timeout(Some(LIMIT)).expect("set");
    let mut number = [0; 4];
    for round in 0_u32..40 {
        for sent in 0..20 {
            client.send_to(&(round * 20 + sent).to_be_bytes(), at(pod4(2, 10), 7_000)).expect("sent");
            server.recv(&mut number).expect("none is lost");
            assert_eq!(u32::from_be_bytes(number), round * 20 + sent);
        }
        let node = &mut nodes[round as usize % 2];
        match round % 4 {
            0 | 1 => node.detach(),
            _ => node.attach(),
        }
    }
}

#[test]
fn services_and_published_ports_answer_by_the_path_that_was_asked() {
    let mut nodes = nodes();
    nodes.iter_mut().for_each(Node::attach);
    nodes.iter().for_each(drop_invalid);
    // As kube-proxy and portmap translate: a service's address on the client's node, a node's port on the server's, both without
    // another source address.
    nodes[0].space.sh(
        "nft 'table ip nat { chain pre { type nat hook prerouting priority -100; ip daddr 203.0.113.10 tcp dport 80 dnat to 198.18.2.10:7000; }; }'",
    );
    nodes[1].space.sh(
        "nft 'table ip nat { chain pre { type nat hook prerouting priority -100; ip daddr 192.0.2.2 tcp dport 30080 dnat to 198.18.2.10:7000; }; }'",
    );
    let listen = at(pod4(2, 10), 7_000);
    let stream = |nodes: &[Node; 2], to| echoed_stream(pod(&nodes[0]), to, pod(&nodes[1]), listen);
    for round in 0..3 {
        for to in [at([203, 0, 113, 10].into(), 80), at(underlay4(2), 30_080), listen] {
            stream(&nodes, to).unwrap_or_else(|error| panic!("round {round}, {to}: {error}"));
        }
    }
    let [client, server] = nodes.each_ref();
    assert!(client.count(Program::WireIn, Reason::SlowNat) > 0, "answers of the service: {}", client.counts());
    assert!(server.count(Program::PodOut, Reason::SlowFlow) > 0, "answers of the port: {}", server.counts());
    assert!(server.count(Program::PodOut, Reason::FastTunnel) > 0, "answers to the pod's own address");
    // And with no pod fast any more, all the same.
    nodes.iter_mut().for_each(|node| node.set_fast(false));
    for to in [at([203, 0, 113, 10].into(), 80), at(underlay4(2), 30_080), listen] {
        stream(&nodes, to).unwrap_or_else(|error| panic!("slow, {to}: {error}"));
    }
}

/// As kube-proxy does: what connection tracking calls invalid is dropped.
fn drop_invalid(node: &Node) {
    node.space.sh(
        "nft 'table ip invalid { chain forward { type filter hook forward priority 0; ct state invalid counter drop; }; }'",
    );
}

#[test]
fn a_connection_outlives_every_switch_though_invalid_packets_are_dropped() {
    for begins_fast in [true, false] {
        let mut nodes = nodes();
        nodes.iter_mut().for_each(|node| node.set_fast(begins_fast));
        nodes.iter_mut().for_each(Node::attach);
        nodes.iter().for_each(drop_invalid);
        let to = at(pod4(2, 10), 7_000);
        let listener = pod(&nodes[1]).run(|| TcpListener::bind(to)).expect("bound");
        let client = pod(&nodes[0]).run(|| TcpStream::connect(to)).expect("connected");
        let (server, _) = listener.accept().expect("accepted");
        [&client, &server].iter().for_each(|stream| stream.set_read_timeout(Some(LIMIT)).expect("set"));
        let whole = pattern(STREAM / 2);
        let said = &whole[..];
        let mut heard = vec![0; said.len()];
        for round in 0..4 {
            for (mut from, mut to) in [(&client, &server), (&server, &client)] {
                thread::scope(|scope| {
                    scope.spawn(move || from.write_all(said));
                    to.read_exact(&mut heard).unwrap_or_else(|error| {
                        panic!("begins fast: {begins_fast}, round {round}: {error}; {}", nodes[1].counts())
                    });
                });
                assert!(heard == said);
            }
            let fast = begins_fast ^ (round % 2 == 0);
            nodes.iter_mut().for_each(|node| node.set_fast(fast));
        }
    }
}
