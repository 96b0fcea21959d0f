//! Random packets before programs and model: valid ones of all kinds, most with something wrong.

use fabric_bpf::abi::{CONFIG_GUARD, CONFIG_IPV4, CONFIG_IPV6, PEER_DIRECT};
use fabric_bpf::model::{Answer, Frame};
use fabric_bpf::{Path, Program};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::TestRunner;

use super::packets::{IPV4, IPV6, frame, ip4, ip6, sum4, tcp, udp, vxlan, with};
use super::rig::{
    GATEWAY, Links, POD_A, POD_B, PORT, Rig, VNI, in_namespace, pod_mac, pod4, pod6, tables, underlay4, underlay6,
    uplink_mac, vtep,
};

const CASES: u32 = 2_000;

/// What a packet is made of. Most choices are the right one.
#[derive(Clone, Debug)]
struct Recipe {
    is_v6: bool,
    is_tcp: bool,
    node: u8,
    hosts: (u8, u8),
    ports: (u16, u16),
    payload: usize,
    ttl: u8,
    class: u8,
    outer_class: u8,
    tunnel: Option<u8>,
    gso_size: u32,
    interface: u8,
    mac: u8,
    cut: Option<Index>,
    wrong: Vec<(Index, u8)>,
}

fn mostly<T: Clone + std::fmt::Debug + 'static>(usual: T, others: Vec<T>) -> impl Strategy<Value = T> {
    prop_oneof![6 => Just(usual), 1 => select(others)]
}

fn recipe() -> impl Strategy<Value = Recipe> {
    let port = || prop_oneof![select(vec![80, 53, 1_000, PORT, 0, 65_535]), any::<u16>()];
    let shape = (
        any::<(bool, bool)>(),
        mostly(2, vec![1, 3, 9]),
        (mostly(10, vec![11, 1, 12]), mostly(10, vec![11, 1, 12])),
        (port(), port()),
        prop_oneof![4 => 0..200_usize, 1 => 1_350..1_500_usize],
    );
    let headers = (
        mostly(64, vec![0, 1, 2, 255]),
        any::<u8>(),
        mostly(0, vec![1, 2, 3]),
        mostly(None, vec![Some(2), Some(3), Some(1)]).boxed(),
    );
    let around = (
        mostly(0, vec![536, 1_398, 1_410, 9_000]),
        mostly(0, vec![1, 2]),
        mostly(0, vec![1, 2, 3]),
        prop_oneof![6 => Just(None), 1 => any::<Index>().prop_map(Some)],
        prop_oneof![2 => Just(vec![]), 1 => prop::collection::vec(any::<(Index, u8)>(), 1..3)],
    );
    (shape, headers, around).prop_map(|(shape, headers, around)| {
        let ((is_v6, is_tcp), node, hosts, ports, payload) = shape;
        let (ttl, class, outer_class, tunnel) = headers;
        let (gso_size, interface, mac, cut, wrong) = around;
        Recipe {
            is_v6,
            is_tcp,
            node,
            hosts,
            ports,
            payload,
            ttl,
            class,
            outer_class,
            tunnel,
            gso_size,
            interface,
            mac,
            cut,
            wrong,
        }
    })
}

impl Recipe {
    fn ethertype(&self) -> u16 {
        if self.is_v6 { IPV6 } else { IPV4 }
    }

    /// From host `.0` of this node, or to it.
    fn packet(&self, is_sent: bool) -> Vec<u8> {
        let (from, to) = if is_sent {
            ((1, self.hosts.0), (self.node, self.hosts.1))
        } else {
            ((self.node, self.hosts.1), (1, self.hosts.0))
        };
        let (next, rest) = match self.is_tcp {
            true => (6, tcp(self.ports.0, self.ports.1, self.payload)),
            false => (17, udp(self.ports.0, self.ports.1, &vec![7; self.payload])),
        };
        if self.is_v6 {
            return with(ip6(pod6(from.0, from.1), pod6(to.0, to.1), next, &rest), |bytes| {
                (bytes[0], bytes[1], bytes[7]) = (0x60 | self.class >> 4, self.class << 4, self.ttl);
            });
        }
        with(ip4(pod4(from.0, from.1), pod4(to.0, to.1), next, &rest), |bytes| {
            (bytes[1], bytes[8]) = (self.class, self.ttl);
            sum4(bytes);
        })
    }

    fn sent(&self) -> Vec<u8> {
        let destination = if self.node == 1 { pod_mac(1, self.hosts.1) } else { GATEWAY };
        let destination = if self.mac == 1 { vtep(1, 4) } else { destination };
        let source = pod_mac(1, if self.mac == 2 { 11 } else { self.hosts.0 });
        self.spoiled(frame(destination, source, self.ethertype(), &self.packet(true)))
    }

    fn delivered(&self) -> Vec<u8> {
        self.spoiled(frame(pod_mac(1, self.hosts.0), GATEWAY, self.ethertype(), &self.packet(false)))
    }

    fn received(&self) -> Vec<u8> {
        let packet = self.packet(false);
        let destination = uplink_mac(if self.mac == 3 { 7 } else { 1 });
        // Without a tunnel one time of seven.
        if self.tunnel == Some(1) {
            return self.spoiled(frame(destination, uplink_mac(2), self.ethertype(), &packet));
        }
        let node = self.tunnel.unwrap_or(2);
        let device = vtep(if self.mac == 1 { 9 } else { 1 }, if self.is_v6 { 6 } else { 4 });
        let inside = vxlan(VNI, &frame(device, vtep(2, 4), self.ethertype(), &packet));
        let outer = match self.is_v6 {
            true => with(ip6(underlay6(node), underlay6(1), 17, &udp(50_000, PORT, &inside)), |bytes| {
                (bytes[1], bytes[46]) = (self.outer_class << 4, 0xbe);
            }),
            false => with(ip4(underlay4(node), underlay4(1), 17, &udp(50_000, PORT, &inside)), |bytes| {
                bytes[1] = self.outer_class;
                sum4(bytes);
            }),
        };
        self.spoiled(frame(destination, uplink_mac(2), self.ethertype(), &outer))
    }

    fn spoiled(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        if let Some(cut) = self.cut {
            bytes.truncate(15.max(cut.index(bytes.len())));
        }
        for (at, value) in &self.wrong {
            let headers = bytes.len().min(130);
            bytes[at.index(headers)] = *value;
        }
        bytes
    }

    fn frames<'a>(&self, links: Links, frames: &'a [(Program, Vec<u8>)]) -> Vec<(Program, Frame<'a>)> {
        let of = |(program, bytes): &'a (Program, Vec<u8>)| {
            let pods = [links.pod_a, links.pod_b, links.uplink];
            let ifindex = match program {
                Program::WireIn => [links.uplink, links.device6, links.uplink][usize::from(self.interface)],
                Program::PodOut | Program::PodIn | Program::WireOut => pods[usize::from(self.interface)],
            };
            let is_for_host = ifindex == links.uplink && bytes[..6] == uplink_mac(1);
            (*program, Frame { gso_size: self.gso_size, is_for_host, ..Frame::new(bytes, ifindex) })
        };
        frames.iter().map(of).collect()
    }
}

/// What a node is like: flags of the config, of peers and of pods.
fn flags() -> impl Strategy<Value = (u32, bool, [u32; 2])> {
    let all = CONFIG_IPV4 | CONFIG_IPV6 | CONFIG_GUARD;
    let config = mostly(all, vec![all - CONFIG_IPV4, all - CONFIG_IPV6, all - CONFIG_GUARD]);
    (config, any::<bool>(), [mostly(1, vec![0]).boxed(), mostly(1, vec![0]).boxed()])
}

#[test]
fn programs_and_model_decide_the_same_about_random_packets() {
    in_namespace(1, |links| {
        let plain = tables(1, links);
        let rig = std::cell::RefCell::new(Rig::new(plain.clone()));
        let ways = std::cell::RefCell::new([0_u32; 3]);
        let mut runner =
            TestRunner::new(ProptestConfig { cases: CASES, failure_persistence: None, ..Default::default() });
        let outcome = runner.run(&(recipe(), flags()), |(recipe, (config, is_direct, pods))| {
            let mut rig = rig.borrow_mut();
            let noted = (rig.tables.nat_bits.clone(), rig.tables.slow_flows.clone());
            rig.change(|tables| {
                *tables = plain.clone();
                (tables.nat_bits, tables.slow_flows) = noted;
                tables.config.flags = config;
                for (slot, flags) in [POD_A, POD_B].into_iter().zip(pods) {
                    tables.pods.get_mut(&slot).expect("there").flags = flags;
                }
                for peer in tables.peers.values_mut().filter(|_| is_direct) {
                    (peer.flags, peer.ifindex) = (peer.flags | PEER_DIRECT, links.uplink);
                }
            });
            let made = [
                (Program::PodOut, recipe.sent()),
                (Program::WireIn, recipe.received()),
                (Program::PodIn, recipe.delivered()),
                (Program::WireOut, recipe.sent()),
            ];
            for (program, frame) in recipe.frames(links, &made).into_iter().filter(|(_, frame)| Rig::takes(frame)) {
                let answer = rig.compare(program, &frame);
                if let Answer::Slow(_, effect) = &answer {
                    rig.tables.apply(effect);
                }
                let way = match answer.reason().map(fabric_bpf::Reason::path) {
                    None => 0,
                    Some(Path::Slow) => 1,
                    Some(Path::Fast | Path::Dropped) => 2,
                };
                ways.borrow_mut()[way] += 1;
            }
            Ok(())
        });
        outcome.unwrap_or_else(|error| panic!("{error}"));
        let ways = ways.into_inner();
        assert!(ways.iter().all(|count| *count > CASES / 20), "not ours, slow, fast: {ways:?}");
    });
}
