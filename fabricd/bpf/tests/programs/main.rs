//! The programs in the real kernel. By `BPF_PROG_TEST_RUN` each packet is also put before the model, and what comes out is
//! compared byte by byte; [`traffic`] sends real traffic between pods. Needs root, and for that Linux 6.6.

mod network;
mod packets;
mod random;
mod rig;
mod traffic;

use fabric_bpf::abi::{self, Map};
use fabric_bpf::model::{Answer, Effect, Frame};
use fabric_bpf::{Path, Program, Reason};

use self::packets::{IPV4, IPV6, Mac, frame, ip4, ip6, is_sum4_right, sum4, tcp, udp, vxlan, with};
use self::rig::{
    GATEWAY, Links, MTU, PEER4, PEER6, POD_A, POD_B, PORT, Ran, Rig, VNI, in_namespace, pod_mac, pod4, pod6, tables,
    underlay4, underlay6, uplink_mac, vtep,
};

const TCP: u8 = 6;
const UDP: u8 = 17;

/// From pod A of node 1 to its gateway.
fn sent(ethertype: u16, packet: &[u8]) -> Vec<u8> {
    frame(GATEWAY, pod_mac(1, 10), ethertype, packet)
}

fn sent4(protocol: u8, rest: &[u8]) -> Vec<u8> {
    sent(IPV4, &ip4(pod4(1, 10), pod4(2, 10), protocol, rest))
}

fn sent6(next: u8, rest: &[u8]) -> Vec<u8> {
    sent(IPV6, &ip6(pod6(1, 10), pod6(2, 10), next, rest))
}

/// What node 1 gets on the wire from `from`, with this inside.
fn tunnelled4(from: std::net::Ipv4Addr, inside: &[u8]) -> Vec<u8> {
    let packet = ip4(from, underlay4(1), UDP, &udp(50_000, PORT, &vxlan(VNI, inside)));
    frame(uplink_mac(1), uplink_mac(2), IPV4, &packet)
}

fn tunnelled6(from: std::net::Ipv6Addr, inside: &[u8]) -> Vec<u8> {
    let rest = with(udp(50_000, PORT, &vxlan(VNI, inside)), |udp| udp[6..8].copy_from_slice(&[0xbe, 0xef]));
    frame(uplink_mac(1), uplink_mac(2), IPV6, &ip6(from, underlay6(1), UDP, &rest))
}

/// From pod 10 of node 2 to pod A of node 1, as node 2's device puts it into the tunnel.
fn inside4(protocol: u8, rest: &[u8]) -> Vec<u8> {
    frame(vtep(1, 4), vtep(2, 4), IPV4, &ip4(pod4(2, 10), pod4(1, 10), protocol, rest))
}

fn inside6(next: u8, rest: &[u8]) -> Vec<u8> {
    frame(vtep(1, 6), vtep(2, 6), IPV6, &ip6(pod6(2, 10), pod6(1, 10), next, rest))
}

fn run(rig: &Rig, program: Program, links: Links, bytes: &[u8]) -> Ran {
    rig.run(program, &of(program, links, bytes))
}

fn compared(rig: &Rig, program: Program, links: Links, bytes: &[u8]) -> Answer {
    rig.compare(program, &of(program, links, bytes))
}

fn of<'a>(program: Program, links: Links, bytes: &'a [u8]) -> Frame<'a> {
    match program {
        Program::WireIn => Frame { is_for_host: bytes[..6] == uplink_mac(1), ..Frame::new(bytes, links.uplink) },
        Program::PodOut | Program::PodIn => Frame::new(bytes, links.pod_a),
        Program::WireOut => Frame::new(bytes, links.device6),
    }
}

#[test]
fn what_a_pod_sends_arrives_at_the_other_nodes_pod_two_hops_older() {
    in_namespace(2, |links| {
        let mut sender = Rig::new(tables(1, links));
        let receiver = Rig::new(tables(2, links));
        let original = sent4(TCP, &tcp(40_000, 80, 700));
        for (class, outer) in [(0, 0), (0b1011_1000, 0), (1, 1), (2, 2), (3, 2)] {
            let original = with(original.clone(), |bytes| {
                bytes[15] = class;
                sum4(&mut bytes[14..34]);
            });
            let ran = run(&sender, Program::PodOut, links, &original);
            assert!(matches!(
                compared(&sender, Program::PodOut, links, &original),
                Answer::Fast(Reason::FastTunnel, _)
            ));
            assert_eq!((ran.returned, ran.reasons), (rig::REDIRECT, vec![Reason::FastTunnel]));
            let wire = ran.bytes;
            assert_eq!(wire.len(), original.len() + 50);
            assert!(is_sum4_right(&wire[14..34]) && is_sum4_right(&wire[64..84]));
            assert_eq!(wire[15], outer, "congestion is told outside as well");
            assert!(u16::from_be_bytes([wire[34], wire[35]]) >= 49_152, "a port of the flow");
            assert_eq!(wire[40..42], [0, 0], "no UDP checksum");
            assert_eq!(&wire[42..64], &[&vxlan(VNI, &[])[..], &vtep(2, 4), &vtep(1, 4), &[8, 0]].concat());

            let wire = [&uplink_mac(2), &uplink_mac(1), &wire[12..]].concat();
            let arrived = Frame::new(&wire, links.uplink);
            assert!(matches!(receiver.compare(Program::WireIn, &arrived), Answer::Fast(Reason::FastTunnel, _)));
            let delivered = receiver.run(Program::WireIn, &arrived).bytes;
            let expected = with(frame(pod_mac(2, 10), GATEWAY, IPV4, &original[14..]), |bytes| {
                bytes[22] -= 2;
                sum4(&mut bytes[14..34]);
            });
            assert_eq!(delivered, expected);
        }
        let received = receiver.words(Map::PeerCounters, &PEER4.to_ne_bytes()).expect("an array");
        assert_eq!(received, [0, 0, 10, 10 * 740], "each packet went twice");
        let counted = sender.words(Map::PeerCounters, &PEER4.to_ne_bytes()).expect("an array");
        assert_eq!(counted, [10, 10 * 740, 0, 0]);

        sender.change(|tables| tables.peers.get_mut(&PEER4).expect("there").mtu = 739);
        let ran = run(&sender, Program::PodOut, links, &original);
        assert_eq!((ran.returned, ran.reasons), (rig::NEXT, vec![Reason::SlowTooLarge]));
    });
}

#[test]
fn ipv6_is_sent_through_the_device_and_received_by_the_program() {
    in_namespace(1, |links| {
        let rig = Rig::new(tables(1, links));
        let sent = sent6(UDP, &udp(40_000, 53, &[7; 100]));
        let Answer::Fast(Reason::FastDevice, exit) = compared(&rig, Program::PodOut, links, &sent) else {
            panic!("not through the device")
        };
        assert_eq!((exit.ifindex, exit.bytes.len(), exit.bytes[21]), (links.device6, sent.len(), 63));
        assert_eq!(exit.bytes[..14], frame(vtep(2, 6), vtep(1, 6), IPV6, &[]));

        let wire = tunnelled6(underlay6(2), &inside6(UDP, &udp(53, 40_000, &[7; 100])));
        let Answer::Fast(Reason::FastTunnel, exit) = compared(&rig, Program::WireIn, links, &wire) else {
            panic!("not decapsulated")
        };
        assert_eq!((exit.ifindex, exit.bytes.len(), exit.bytes[21]), (links.pod_a, wire.len() - 70, 63));
        // Congestion that the underlay tells is told to the pod.
        let marked = with(wire, |bytes| {
            bytes[15] |= 3 << 4;
            bytes[14 + 70 + 1] |= 1 << 4;
        });
        assert_eq!(compared(&rig, Program::WireIn, links, &marked).reason(), Some(Reason::FastTunnel));
        let traffic = rig.words(Map::PeerCounters, &PEER6.to_ne_bytes()).expect("an array");
        assert_eq!(traffic, [1, 148, 2, 2 * 148]);
    });
}

#[test]
fn peers_on_the_link_are_reached_without_encapsulation() {
    in_namespace(1, |links| {
        let mut direct = tables(1, links);
        for peer in direct.peers.values_mut() {
            (peer.flags, peer.ifindex) = (peer.flags | abi::PEER_DIRECT, links.uplink);
        }
        let mut rig = Rig::new(direct);
        let on_wire = |ethertype, packet: &[u8]| frame(uplink_mac(1), uplink_mac(2), ethertype, packet);
        let back4 = on_wire(IPV4, &ip4(pod4(2, 10), pod4(1, 10), TCP, &tcp(80, 40_000, 0)));
        let padded = with(back4.clone(), |bytes| bytes.resize(60, 0));
        let back6 = on_wire(IPV6, &ip6(pod6(2, 10), pod6(1, 10), TCP, &tcp(80, 40_000, 9)));
        for sent in [sent4(TCP, &tcp(40_000, 80, 9)), sent6(TCP, &tcp(40_000, 80, 9))] {
            let answer = compared(&rig, Program::PodOut, links, &sent);
            let Answer::Fast(Reason::FastDirect, exit) = answer else { panic!("{answer:?}") };
            assert_eq!((exit.ifindex, exit.bytes.len()), (links.uplink, sent.len()));
        }
        for wire in [&back4, &padded, &back6] {
            assert_eq!(compared(&rig, Program::WireIn, links, wire).reason(), Some(Reason::FastDirect));
        }
        // In a tunnel they are what they say as well.
        let wire = tunnelled4(underlay4(2), &inside4(UDP, &udp(53, 40_000, &[1])));
        assert_eq!(compared(&rig, Program::WireIn, links, &wire).reason(), Some(Reason::FastTunnel));
        // Nobody else sends so: no peer with a tunnel, none on another link.
        rig.change(|tables| tables.peers.values_mut().for_each(|peer| peer.ifindex = links.device6));
        for wire in [&back4, &back6] {
            assert_eq!(compared(&rig, Program::WireIn, links, wire).reason(), Some(Reason::SlowSender));
        }
    });
}

#[test]
fn pods_of_one_node_are_joined_as_by_the_bridge() {
    in_namespace(1, |links| {
        let rig = Rig::new(tables(1, links));
        let to = |mac: Mac, packet: &[u8], ethertype| frame(mac, pod_mac(1, 10), ethertype, packet);
        let four = ip4(pod4(1, 10), pod4(1, 11), UDP, &udp(1_000, 2_000, &[1, 2, 3]));
        let six = ip6(pod6(1, 10), pod6(1, 11), TCP, &tcp(1_000, 2_000, 3));
        for (packet, ethertype) in [(&four, IPV4), (&six, IPV6)] {
            let bytes = to(pod_mac(1, 11), packet, ethertype);
            let answer = compared(&rig, Program::PodOut, links, &bytes);
            let Answer::Fast(Reason::FastSameNode, exit) = answer else { panic!("{answer:?}") };
            assert_eq!((exit.ifindex, exit.bytes), (links.pod_b, bytes), "not one byte is another");
        }
        let by_gateway = compared(&rig, Program::PodOut, links, &to(GATEWAY, &four, IPV4));
        assert_eq!(by_gateway.reason(), Some(Reason::SlowMac));
    });
}

#[test]
fn ports_that_talk_to_what_is_no_pod_are_slow_in_both_directions() {
    in_namespace(1, |links| {
        let mut rig = Rig::new(tables(1, links));
        let service = [192, 0, 2, 100].into();
        let service6 = "2001:db8:5::1".parse().expect("an address");
        let to_service = |protocol, rest: &[u8]| sent(IPV4, &ip4(pod4(1, 10), service, protocol, rest));
        let to_service6 = |next, rest: &[u8]| sent(IPV6, &ip6(pod6(1, 10), service6, next, rest));
        let fragment = with(to_service(UDP, &udp(1_003, 53, &[0; 32])), |bytes| bytes[20] = 0x20);
        let later = with(to_service(UDP, &udp(1_004, 53, &[0; 32])), |bytes| bytes[21] = 4);
        let options = with(to_service(UDP, &[[1; 4].to_vec(), udp(1_005, 53, &[])].concat()), |bytes| bytes[14] = 0x46);
        let hop_by_hop =
            [[44, 0, 1, 4, 0, 0, 0, 0].to_vec(), vec![UDP, 0, 0, 1, 0, 0, 0, 9], udp(1_006, 53, &[])].concat();
        let cases = [
            (to_service(TCP, &tcp(1_001, 443, 5)), Some((false, 1_001))),
            (to_service(UDP, &udp(1_002, 53, &[])), Some((true, 1_002))),
            (fragment, Some((true, 1_003))),
            (later, None),
            (options, Some((true, 1_005))),
            (to_service6(0, &hop_by_hop), Some((true, 1_006))),
            (to_service6(TCP, &tcp(1_007, 443, 0)), Some((false, 1_007))),
            (to_service(1, &[8, 0, 0, 0, 0, 0, 0, 0]), None),
        ];
        for (bytes, port) in cases {
            let mark = port.map_or(Effect::None, |(udp, port)| {
                let (word, bit) = abi::nat_bit(POD_A, udp, port);
                Effect::Mark(word, bit)
            });
            assert_eq!(compared(&rig, Program::PodOut, links, &bytes), Answer::Slow(Reason::SlowNotAPod, mark));
        }

        // What was marked is slow when it talks to a pod, and when a pod answers; the next port isn't.
        let (word, bit) = abi::nat_bit(POD_A, false, 1_001);
        for generation in [Map::NatBits0, Map::NatBits1] {
            for map in [Map::NatBits0, Map::NatBits1] {
                rig.set(map, &word, &if map == generation { bit } else { 0 });
            }
            for (port, reason) in [(1_001, Reason::SlowNat), (1_008, Reason::FastTunnel)] {
                let there = run(&rig, Program::PodOut, links, &sent4(TCP, &tcp(port, 80, 0)));
                let back = tunnelled4(underlay4(2), &inside4(TCP, &tcp(80, port, 0)));
                let back = run(&rig, Program::WireIn, links, &back);
                assert_eq!((there.reasons, back.reasons), (vec![reason], vec![reason]));
            }
        }
        // New marks go where the daemon says.
        rig.set(Map::NatCurrent, &0_u32, &1_u32);
        run(&rig, Program::PodOut, links, &to_service(UDP, &udp(2_000, 53, &[])));
        let (word, bit) = abi::nat_bit(POD_A, true, 2_000);
        assert_eq!(rig.words(Map::NatBits1, &word.to_ne_bytes()), Some(vec![bit]));
        assert_eq!(rig.words(Map::NatBits0, &word.to_ne_bytes()), Some(vec![0]));

        // A pod of this node is as careful about the other's port.
        let (word, bit) = abi::nat_bit(POD_B, true, 3_000);
        rig.set(Map::NatBits1, &word, &bit);
        let packet = ip4(pod4(1, 10), pod4(1, 11), UDP, &udp(1_009, 3_000, &[]));
        let neighbour = run(&rig, Program::PodOut, links, &frame(pod_mac(1, 11), pod_mac(1, 10), IPV4, &packet));
        assert_eq!(neighbour.reasons, [Reason::SlowNat]);

        // Where no connection is tracked there is nothing to fear.
        rig.change(|tables| tables.config.flags &= !abi::CONFIG_GUARD);
        let there = run(&rig, Program::PodOut, links, &sent4(TCP, &tcp(1_001, 80, 0)));
        assert_eq!(there.reasons, [Reason::FastTunnel]);
    });
}

#[test]
fn flows_that_came_by_the_kernels_path_stay_there_in_both_directions() {
    in_namespace(1, |links| {
        let rig = Rig::new(tables(1, links));
        let arriving = |packet: &[u8], ethertype| frame(pod_mac(1, 10), GATEWAY, ethertype, packet);
        let asked4 = arriving(&ip4(pod4(2, 10), pod4(1, 10), TCP, &tcp(50_000, 80, 0)), IPV4);
        let asked6 = arriving(&ip6(pod6(2, 10), pod6(1, 10), UDP, &udp(50_000, 53, &[])), IPV6);
        for (asked, answered) in
            [(asked4, sent4(TCP, &tcp(80, 50_000, 0))), (asked6, sent6(UDP, &udp(53, 50_000, &[])))]
        {
            assert_eq!(run(&rig, Program::PodOut, links, &answered).returned, rig::REDIRECT);
            let answer = compared(&rig, Program::PodIn, links, &asked);
            let Answer::Slow(Reason::SlowRecorded, Effect::Record(POD_A, flow)) = answer else { panic!("{answer:?}") };
            assert!(rig.has_slow_flow(&flow));
            assert_eq!(run(&rig, Program::PodOut, links, &answered).reasons, [Reason::SlowFlow]);
            // What else the peer sends of it as well: connection tracking sees both directions, or none.
            let inside = frame(vtep(1, 4), vtep(2, 4), IPV4, &asked[14..]);
            let inside6 = frame(vtep(1, 6), vtep(2, 6), IPV6, &asked[14..]);
            let wire =
                if asked[12] == 8 { tunnelled4(underlay4(2), &inside) } else { tunnelled6(underlay6(2), &inside6) };
            assert_eq!(run(&rig, Program::WireIn, links, &wire).reasons, [Reason::SlowFlow]);
        }
        assert_eq!(run(&rig, Program::PodOut, links, &sent4(TCP, &tcp(80, 50_001, 0))).returned, rig::REDIRECT);

        // Of a pod of this node the port is marked, once: connection tracking may have chosen it (br_netfilter).
        let bytes = arriving(&ip4(pod4(1, 11), pod4(1, 10), TCP, &tcp(50_007, 80, 0)), IPV4);
        let to_it =
            frame(pod_mac(1, 11), pod_mac(1, 10), IPV4, &ip4(pod4(1, 10), pod4(1, 11), TCP, &tcp(80, 50_007, 0)));
        assert_eq!(run(&rig, Program::PodOut, links, &to_it).reasons, [Reason::FastSameNode]);
        let (word, bit) = abi::nat_bit(POD_B, false, 50_007);
        let marked = Answer::Slow(Reason::SlowRecorded, Effect::Mark(word, bit));
        assert_eq!(compared(&rig, Program::PodIn, links, &bytes), marked);
        assert_eq!(run(&rig, Program::PodIn, links, &bytes).reasons, []);
        assert_eq!(run(&rig, Program::PodOut, links, &to_it).reasons, [Reason::SlowNat]);

        // The host, the outside, the gateway and other interfaces are no such thing.
        for from in [underlay4(2), [203, 0, 113, 5].into(), pod4(1, 1), pod4(9, 9)] {
            let bytes = arriving(&ip4(from, pod4(1, 10), TCP, &tcp(50_000, 80, 0)), IPV4);
            assert_eq!(compared(&rig, Program::PodIn, links, &bytes), Answer::NotOurs, "{from}");
        }
        let bytes = arriving(&ip4(pod4(2, 10), pod4(1, 11), TCP, &tcp(50_000, 80, 0)), IPV4);
        assert_eq!(compared(&rig, Program::PodIn, links, &bytes), Answer::NotOurs, "pod B has an interface of its own");
    });
}

#[test]
fn what_is_not_fully_understood_goes_on_as_it_is() {
    in_namespace(1, |links| {
        let mut known = tables(1, links);
        known.pods.get_mut(&POD_B).expect("there").flags = 0;
        let rig = Rig::new(known);
        let plain = sent4(UDP, &udp(1_000, 2_000, &[5; 30]));
        let plain6 = sent6(UDP, &udp(1_000, 2_000, &[5; 30]));
        let to = |destination, protocol, rest: &[u8]| sent(IPV4, &ip4(pod4(1, 10), destination, protocol, rest));
        let out = [
            (sent(0x0806, &[0; 28]), Reason::SlowNotIp),
            (sent(0x8100, &[0; 46]), Reason::SlowNotIp),
            (plain[..41].to_vec(), Reason::SlowTruncated),
            (with(plain.clone(), |bytes| bytes[14] = 0x65), Reason::SlowTruncated),
            (with(plain.clone(), |bytes| bytes[14] = 0x44), Reason::SlowTruncated),
            (plain[..plain.len() - 1].to_vec(), Reason::SlowTruncated),
            (with(plain.clone(), |bytes| bytes.push(0)), Reason::SlowTruncated),
            (sent4(TCP, &[0; 19]), Reason::SlowTruncated),
            (with(plain.clone(), |bytes| bytes[14] = 0x46), Reason::SlowOptions),
            (with(plain.clone(), |bytes| bytes[20] = 0x20), Reason::SlowFragment),
            (with(plain.clone(), |bytes| bytes[21] = 0x08), Reason::SlowFragment),
            (sent4(1, &[8, 0, 0, 0, 0, 0, 0, 0]), Reason::SlowProtocol),
            (sent4(132, &[0; 32]), Reason::SlowProtocol),
            (with(plain.clone(), |bytes| bytes[22] = 1), Reason::SlowTtl),
            (with(plain.clone(), |bytes| bytes[22] = 0), Reason::SlowTtl),
            (sent4(UDP, &udp(1_000, 2_000, &[0; MTU as usize - 27])), Reason::SlowTooLarge),
            (with(plain.clone(), |bytes| bytes[11] = 99), Reason::SlowSender),
            (sent(IPV4, &ip4(pod4(1, 11), pod4(2, 10), UDP, &udp(1, 2, &[]))), Reason::SlowSender),
            (sent(IPV4, &ip4(pod4(2, 10), pod4(1, 10), UDP, &udp(1, 2, &[]))), Reason::SlowSender),
            (sent(IPV4, &ip4(underlay4(1), pod4(2, 10), UDP, &udp(1, 2, &[]))), Reason::SlowSender),
            (frame(pod_mac(1, 11), pod_mac(1, 10), IPV4, &plain[14..]), Reason::SlowMac),
            (to(pod4(1, 11), UDP, &udp(1, 2, &[])), Reason::SlowPodOff),
            (to(pod4(1, 1), UDP, &udp(1, 2, &[])), Reason::SlowNotAPod),
            (to(pod4(1, 10), UDP, &udp(2_000, 3, &[])), Reason::SlowNotAPod),
            (to(pod4(9, 10), UDP, &udp(4_000, 3, &[])), Reason::SlowNotAPod),
            (to(underlay4(2), UDP, &udp(5_000, 3, &[])), Reason::SlowNotAPod),
            (sent4(UDP, &udp(1_001, PORT, &[0; 60])), Reason::SlowTunnelPort),
            (plain6[..61].to_vec(), Reason::SlowTruncated),
            (with(plain6.clone(), |bytes| bytes[14] = 0x45), Reason::SlowTruncated),
            (with(plain6.clone(), |bytes| bytes.push(0)), Reason::SlowTruncated),
            (sent6(0, &[UDP, 0, 1, 4, 0, 0, 0, 0]), Reason::SlowOptions),
            (sent6(44, &[UDP, 0, 0, 1, 0, 0, 0, 9]), Reason::SlowFragment),
            (sent6(58, &[128, 0, 0, 0, 0, 0, 0, 0]), Reason::SlowProtocol),
            (with(plain6.clone(), |bytes| bytes[21] = 1), Reason::SlowTtl),
            (sent6(UDP, &udp(1_000, 2_000, &[0; MTU as usize - 47])), Reason::SlowTooLarge),
            (sent6(UDP, &udp(1_001, PORT, &[0; 60])), Reason::SlowTunnelPort),
            (sent(IPV6, &ip6(pod6(1, 11), pod6(2, 10), UDP, &udp(1, 2, &[]))), Reason::SlowSender),
            (sent(IPV6, &ip6(pod6(1, 10), pod6(9, 10), UDP, &udp(4_000, 2, &[]))), Reason::SlowNotAPod),
        ];
        for (at, (bytes, reason)) in out.into_iter().enumerate() {
            assert_eq!(compared(&rig, Program::PodOut, links, &bytes).reason(), Some(reason), "case {at}");
        }
        // Another pod's interface.
        let stolen = Frame::new(&plain, links.pod_b);
        assert_eq!(rig.compare(Program::PodOut, &stolen).reason(), Some(Reason::SlowSender));
    });
}

#[test]
fn what_does_not_belong_together_is_not_decapsulated() {
    in_namespace(1, |links| {
        let mut known = tables(1, links);
        known.pods.get_mut(&POD_B).expect("there").flags = 0;
        let rig = Rig::new(known);
        let inside = inside4(UDP, &udp(1_000, 2_000, &[5; 30]));
        let good = tunnelled4(underlay4(2), &inside);
        let good6 = tunnelled6(underlay6(2), &inside6(UDP, &udp(1_000, 2_000, &[5; 30])));
        // Over IPv4 it is as the sender likes: the kernel's devices make one, the program none.
        let summed = with(good.clone(), |bytes| bytes[41] = 1);
        for good in [&good, &summed, &good6] {
            assert_eq!(compared(&rig, Program::WireIn, links, good).reason(), Some(Reason::FastTunnel));
        }
        let from = |source, destination, rest: &[u8]| {
            let inside = frame(vtep(1, 4), vtep(2, 4), IPV4, &ip4(source, destination, UDP, rest));
            tunnelled4(underlay4(2), &inside)
        };
        let ports = udp(1_000, 2_000, &[]);
        let outer = |change: fn(&mut Vec<u8>)| {
            with(good.clone(), |bytes| {
                change(bytes);
                sum4(&mut bytes[14..34]);
            })
        };
        let refused = [
            // A stranger, and one whose inner address is somebody else's.
            (tunnelled4(underlay4(3), &inside), Reason::SlowSender),
            (tunnelled4(underlay4(1), &inside), Reason::SlowSender),
            (tunnelled4([0, 0, 0, 0].into(), &inside), Reason::SlowSender),
            (from(pod4(9, 10), pod4(1, 10), &ports), Reason::SlowSender),
            (from(pod4(1, 10), pod4(1, 11), &ports), Reason::SlowSender),
            (from(pod4(1, 1), pod4(1, 10), &ports), Reason::SlowSender),
            (from(underlay4(2), pod4(1, 10), &ports), Reason::SlowSender),
            (from([203, 0, 113, 7].into(), pod4(1, 10), &ports), Reason::SlowSender),
            (tunnelled6(underlay6(3), &inside6(UDP, &ports)), Reason::SlowSender),
            // Not for a pod of this node, or for one that may not have it so.
            (from(pod4(2, 10), pod4(1, 12), &ports), Reason::SlowNotAPod),
            (from(pod4(2, 10), pod4(2, 11), &ports), Reason::SlowNotAPod),
            (from(pod4(2, 10), underlay4(1), &ports), Reason::SlowNotAPod),
            (from(pod4(2, 10), pod4(1, 11), &ports), Reason::SlowPodOff),
            // Another VNI, other flags, another device, another protocol.
            (with(good.clone(), |bytes| bytes[48] = 2), Reason::SlowVni),
            (with(good.clone(), |bytes| bytes[42] = 0x88), Reason::SlowVni),
            (with(good.clone(), |bytes| bytes[49] = 1), Reason::SlowVni),
            (with(good.clone(), |bytes| bytes[55] ^= 1), Reason::SlowMac),
            (with(good.clone(), |bytes| bytes[62..64].copy_from_slice(&[8, 6])), Reason::SlowNotIp),
            (tunnelled4(underlay4(2), &inside6(UDP, &[0; 32])), Reason::SlowMac),
            // No checksum, where there must be one.
            (with(good6.clone(), |bytes| bytes[60..62].fill(0)), Reason::SlowChecksum),
            // Cut off, or more than the headers say.
            (good[..83].to_vec(), Reason::SlowTruncated),
            (good[..good.len() - 1].to_vec(), Reason::SlowTruncated),
            (with(good.clone(), |bytes| bytes.push(0)), Reason::SlowTruncated),
            (with(good.clone(), |bytes| bytes[39] += 1), Reason::SlowTruncated),
            (with(good.clone(), |bytes| bytes[67] -= 1), Reason::SlowTruncated),
            (with(good.clone(), |bytes| bytes[64] = 0x55), Reason::SlowTruncated),
            (good6[..good6.len() - 1].to_vec(), Reason::SlowTruncated),
            (good6[..100].to_vec(), Reason::SlowTruncated),
            // What the kernel knows better.
            (with(good.clone(), |bytes| bytes[64] = 0x46), Reason::SlowOptions),
            (with(good.clone(), |bytes| bytes[70] = 0x20), Reason::SlowFragment),
            (tunnelled4(underlay4(2), &inside4(1, &[0; 8])), Reason::SlowProtocol),
            (with(good.clone(), |bytes| bytes[72] = 1), Reason::SlowTtl),
            (outer(|bytes| bytes[15] = 3), Reason::SlowCongestion),
            (tunnelled4(underlay4(2), &inside4(UDP, &udp(1, 2, &[0; MTU as usize - 27]))), Reason::SlowTooLarge),
        ];
        for (at, (bytes, reason)) in refused.into_iter().enumerate() {
            assert_eq!(compared(&rig, Program::WireIn, links, &bytes).reason(), Some(reason), "case {at}");
        }
        let not_ours = [
            outer(|bytes| bytes[14] = 0x46),
            outer(|bytes| bytes[20] = 0x20),
            outer(|bytes| bytes[33] = 9),
            outer(|bytes| bytes[23] = 6),
            with(good.clone(), |bytes| bytes[36..38].copy_from_slice(&4789_u16.to_be_bytes())),
            with(good.clone(), |bytes| bytes[5] = 77),
            frame(uplink_mac(1), uplink_mac(2), 0x0806, &[0; 28]),
            frame(uplink_mac(1), uplink_mac(2), IPV4, &ip4(underlay4(2), underlay4(1), TCP, &tcp(1, 22, 0))),
        ];
        for (at, bytes) in not_ours.into_iter().enumerate() {
            assert_eq!(compared(&rig, Program::WireIn, links, &bytes), Answer::NotOurs, "case {at}");
        }
        // To a pod without a tunnel: whoever isn't on this link with us.
        let bytes = frame(uplink_mac(1), uplink_mac(2), IPV4, &inside[14..]);
        assert_eq!(compared(&rig, Program::WireIn, links, &bytes).reason(), Some(Reason::SlowSender));
    });
}

#[test]
fn flows_that_leave_by_the_kernels_path_stay_there_with_the_port_that_they_leave_with() {
    in_namespace(1, |links| {
        let mut rig = Rig::new(tables(1, links));
        // Connection tracking has made 1,027 of the pod's 4,000.
        let leaving = |from, to| frame(vtep(2, 4), vtep(1, 4), IPV4, &ip4(from, to, UDP, &udp(1_027, 53, &[])));
        let leaving6 = frame(vtep(2, 6), vtep(1, 6), IPV6, &ip6(pod6(1, 10), pod6(2, 10), UDP, &udp(1_027, 53, &[])));
        let answer4 = tunnelled4(underlay4(2), &inside4(UDP, &udp(53, 1_027, &[])));
        let answer6 = frame(vtep(1, 6), vtep(2, 6), IPV6, &ip6(pod6(2, 10), pod6(1, 10), UDP, &udp(53, 1_027, &[])));
        let answer6 = tunnelled6(underlay6(2), &answer6);
        for (leaves, answer) in [(leaving(pod4(1, 10), pod4(2, 10)), answer4), (leaving6, answer6)] {
            assert_eq!(compared(&rig, Program::WireIn, links, &answer).reason(), Some(Reason::FastTunnel));
            let noted = compared(&rig, Program::WireOut, links, &leaves);
            let Answer::Slow(Reason::SlowRecorded, Effect::Record(POD_A, flow)) = noted else { panic!("{noted:?}") };
            assert!(rig.has_slow_flow(&flow));
            assert_eq!(run(&rig, Program::WireIn, links, &answer).reasons, [Reason::SlowFlow]);
        }
        let others = [
            (pod4(1, 11), pod4(1, 10)),
            (pod4(1, 99), pod4(2, 10)),
            (pod4(1, 10), [203, 0, 113, 5].into()),
            (underlay4(1), pod4(2, 10)),
        ];
        for (from, to) in others {
            assert_eq!(compared(&rig, Program::WireOut, links, &leaving(from, to)), Answer::NotOurs, "{from} to {to}");
        }
        // A port that is marked is slow without a note, and where nothing is translated nothing is noted.
        let leaves = leaving(pod4(1, 11), pod4(2, 10));
        let (word, bit) = abi::nat_bit(POD_B, true, 1_027);
        rig.set(Map::NatBits1, &word, &bit);
        rig.tables.nat_bits.insert(word, bit);
        assert_eq!(compared(&rig, Program::WireOut, links, &leaves), Answer::NotOurs);
        rig.change(|tables| tables.config.flags &= !abi::CONFIG_GUARD);
        assert_eq!(compared(&rig, Program::WireOut, links, &leaving(pod4(1, 10), pod4(2, 10))), Answer::NotOurs);
    });
}

#[test]
fn peer_that_changes_its_address_is_known_by_both() {
    in_namespace(1, |links| {
        let mut rig = Rig::new(tables(1, links));
        rig.change(|tables| {
            let peer = tables.peers.get_mut(&PEER4).expect("there");
            (peer.underlay, peer.former) = (abi::padded(underlay4(8)), peer.underlay);
        });
        let inside = inside4(TCP, &tcp(80, 1_000, 1));
        for (node, reason) in [(8, Reason::FastTunnel), (2, Reason::FastTunnel), (3, Reason::SlowSender)] {
            let wire = tunnelled4(underlay4(node), &inside);
            assert_eq!(compared(&rig, Program::WireIn, links, &wire).reason(), Some(reason));
        }
    });
}

#[test]
fn nothing_is_taken_before_the_maps_are_filled() {
    in_namespace(1, |links| {
        let rig = Rig::new(fabric_bpf::model::Tables::default());
        let frames = [
            sent4(UDP, &udp(1, 2, &[])),
            sent6(UDP, &udp(1, 2, &[])),
            tunnelled4(underlay4(2), &inside4(UDP, &[0; 8])),
        ];
        for program in Program::ALL {
            for bytes in &frames {
                let answer = compared(&rig, program, links, bytes);
                assert!(answer.reason().is_none_or(|reason| reason.path() == Path::Slow), "{answer:?}");
            }
        }
    });
}
