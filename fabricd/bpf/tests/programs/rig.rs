//! The programs in the real kernel, for one node whose maps are as the test says.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;

use fabric_bpf::abi::{self, Address6, Config, Flow, Map, MapKind, Peer, Pod};
use fabric_bpf::model::{Answer, Effect, Frame, Tables};
use fabric_bpf::{OBJECT, Program, Reason};
use fabric_ebpf::{Kind, Object, Shape};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use zerocopy::IntoBytes as _;

use super::packets::Mac;

pub(crate) use fabric_bpf::NEXT;
pub(crate) const REDIRECT: i32 = 7;

pub(crate) const PORT: u16 = 8472;
pub(crate) const VNI: u32 = 1;
pub(crate) const MTU: u32 = 1450;
/// Slots of pods; of peers twice as many.
const SLOTS: u32 = 4;
pub(crate) const POD_A: u32 = 1;
pub(crate) const POD_B: u32 = 2;
/// The slots of the other node's families.
pub(crate) const PEER4: u32 = 1;
pub(crate) const PEER6: u32 = 2;
pub(crate) const GATEWAY: Mac = [2, 0, 0, 0, 0, 1];

/// The interfaces of a node, all in a namespace of this thread's own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Links {
    pub(crate) uplink: u32,
    pub(crate) pod_a: u32,
    pub(crate) pod_b: u32,
    pub(crate) device6: u32,
}

pub(crate) fn underlay4(node: u8) -> Ipv4Addr {
    [192, 0, 2, node].into()
}

pub(crate) fn underlay6(node: u8) -> Ipv6Addr {
    [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, node.into()].into()
}

pub(crate) fn pod4(node: u8, host: u8) -> Ipv4Addr {
    [198, 18, node, host].into()
}

pub(crate) fn pod6(node: u8, host: u8) -> Ipv6Addr {
    [0x2001, 0xdb8, 0, node.into(), 0, 0, 0, host.into()].into()
}

pub(crate) fn uplink_mac(node: u8) -> Mac {
    [2, 0, 0, 0, 1, node]
}

pub(crate) fn vtep(node: u8, family: u8) -> Mac {
    [2, 0, 0, family, 2, node]
}

pub(crate) fn pod_mac(node: u8, host: u8) -> Mac {
    [2, 0, 0, 3, node, host]
}

/// What node `own` knows: two pods, and the other one of two nodes as its peer.
pub(crate) fn tables(own: u8, links: Links) -> Tables {
    let other = 3 - own;
    let number = u32::from(other);
    let pod = |ifindex, host| Pod {
        ifindex,
        flags: abi::POD_FAST,
        mtu: MTU,
        mac: pod_mac(own, host),
        gateway: GATEWAY,
        ..Pod::default()
    };
    let template = abi::template4(underlay4(own), underlay4(other), PORT, VNI, [vtep(own, 4), vtep(other, 4)]);
    let peer4 = Peer {
        ifindex: links.uplink,
        mtu: MTU,
        template_sum: abi::template_sum(&template),
        underlay: abi::padded(underlay4(other)),
        nexthop: abi::padded(underlay4(other)),
        template,
        ..Peer::default()
    };
    let peer6 = Peer {
        flags: abi::PEER_NEXTHOP_IPV6,
        ifindex: links.device6,
        mtu: MTU,
        underlay: underlay6(other).octets(),
        nexthop: underlay6(other).octets(),
        template: abi::template6([vtep(own, 6), vtep(other, 6)]),
        ..Peer::default()
    };
    let address6 = |host| Address6 { bytes: pod6(own, host).octets() };
    Tables {
        config: Config {
            flags: abi::CONFIG_IPV4 | abi::CONFIG_IPV6 | abi::CONFIG_GUARD,
            vni: abi::vxlan_vni(VNI),
            network4: Ipv4Addr::from([198, 18, 0, 0]).to_bits(),
            network4_mask: 0xffff_0000,
            own4: pod4(own, 0).to_bits(),
            own4_mask: 0xffff_ff00,
            subnet4_shift: 8,
            subnet6_shift: 64,
            network6: abi::halves([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0].into()),
            network6_mask: [!0 << 16, 0],
            own6: abi::halves(pod6(own, 0)),
            own6_mask: [!0, 0],
            local4: underlay4(own).octets(),
            port: PORT.to_be_bytes(),
            local6: underlay6(own).octets(),
            vtep4: vtep(own, 4),
            vtep6: vtep(own, 6),
            ..Config::default()
        },
        peer_index4: BTreeMap::from([(number, PEER4)]),
        peer_index6: BTreeMap::from([(number, PEER6)]),
        peers: BTreeMap::from([(PEER4, peer4), (PEER6, peer6)]),
        pod_index4: BTreeMap::from([(10, POD_A), (11, POD_B)]),
        pod_index6: BTreeMap::from([(address6(10), POD_A), (address6(11), POD_B)]),
        pods: BTreeMap::from([(POD_A, pod(links.pod_a, 10)), (POD_B, pod(links.pod_b, 11))]),
        ..Tables::default()
    }
}

/// Links of a node in a namespace of its own; `test` has them.
pub(crate) fn in_namespace(own: u8, test: impl FnOnce(Links) + Send + 'static) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
        let mac = uplink_mac(own).map(|byte| format!("{byte:02x}")).join(":");
        let script = format!(
            "ip link add uplink address {mac} type veth peer name wire
             ip link add pod-a type veth peer name in-a
             ip link add pod-b type veth peer name in-b
             ip link add fabric6.1 type veth peer name other"
        );
        let made = Command::new("sh").args(["-ec", &script]).output().expect("sh runs");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let index = |name: &str| if_nametoindex(CString::new(name).expect("a name").as_c_str()).expect("there");
        test(Links {
            uplink: index("uplink"),
            pod_a: index("pod-a"),
            pod_b: index("pod-b"),
            device6: index("fabric6.1"),
        });
    };
    std::thread::spawn(run).join().expect("no panic");
}

/// A loaded node.
pub(crate) struct Rig {
    pub(crate) tables: Tables,
    maps: BTreeMap<Map, fabric_ebpf::Map>,
    programs: BTreeMap<Program, fabric_ebpf::Program>,
}

/// What a program did with a frame.
pub(crate) struct Ran {
    pub(crate) returned: i32,
    pub(crate) bytes: Vec<u8>,
    /// What was counted.
    pub(crate) reasons: Vec<Reason>,
}

impl Rig {
    pub(crate) fn new(tables: Tables) -> Self {
        let maps = Map::ALL.map(|map| (map, fabric_ebpf::Map::create(map.name(), shape(map)).expect("made")));
        let maps = BTreeMap::from(maps);
        let named: Vec<_> = maps.iter().map(|(map, made)| (map.name(), made)).collect();
        let object = Object::parse(OBJECT).expect("an object file");
        let programs = Program::ALL.map(|program| {
            let code = object.programs.iter().find(|code| code.name == program.name()).expect("in the object");
            let loaded = fabric_ebpf::Program::load(code, abi::LICENSE, &named);
            (program, loaded.unwrap_or_else(|error| panic!("{}: {error}", program.name())))
        });
        let rig = Self { tables, maps, programs: BTreeMap::from(programs) };
        rig.fill();
        rig.fill_notes();
        rig
    }

    pub(crate) fn program(&self, program: Program) -> &fabric_ebpf::Program {
        &self.programs[&program]
    }

    /// Writes the tables into the maps.
    fn fill(&self) {
        let Tables { config, peer_index4, peer_index6, peers, pod_index4, pod_index6, pods, .. } = &self.tables;
        self.set(Map::Config, &0_u32, config);
        for (map, index) in
            [(Map::PeerIndex4, peer_index4), (Map::PeerIndex6, peer_index6), (Map::PodIndex4, pod_index4)]
        {
            index.iter().for_each(|(key, slot)| self.set(map, key, slot));
        }
        peers.iter().for_each(|(slot, peer)| self.set(Map::Peers, slot, peer));
        pod_index6.iter().for_each(|(address, slot)| self.set(Map::PodIndex6, address, slot));
        pods.iter().for_each(|(slot, pod)| self.set(Map::Pods, slot, pod));
    }

    /// Writes what the programs note by themselves.
    fn fill_notes(&self) {
        let Tables { nat_bits, slow_flows, .. } = &self.tables;
        nat_bits.iter().for_each(|(word, bits)| self.set(Map::NatBits0, word, bits));
        for flow in slow_flows {
            self.set(Map::SlowFlows, flow, &1_u64);
            (1..SLOTS).for_each(|slot| self.set(Map::SlowPods, &slot, &1_u64));
        }
    }

    /// Changes tables and maps, but for what the programs note.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Tables)) {
        change(&mut self.tables);
        self.fill();
    }

    pub(crate) fn set<K, V>(&self, map: Map, key: &K, value: &V)
    where
        K: zerocopy::IntoBytes + zerocopy::Immutable,
        V: zerocopy::IntoBytes + zerocopy::Immutable,
    {
        self.maps[&map].set(key.as_bytes(), value.as_bytes()).unwrap_or_else(|error| panic!("{}: {error}", map.name()));
    }

    /// A value, as numbers of 64 bits: of all processors together, if each has its own.
    pub(crate) fn words(&self, map: Map, key: &[u8]) -> Option<Vec<u64>> {
        let value = self.maps[&map].get(key).expect("read")?;
        let words = value.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().expect("eight")));
        let words: Vec<u64> = words.collect();
        let each = map.value_size() / 8;
        Some((0..each).map(|at| words[at..].iter().step_by(each).sum()).collect())
    }

    /// Runs a program on a frame.
    pub(crate) fn run(&self, program: Program, frame: &Frame<'_>) -> Ran {
        let before = self.counted(program);
        // `struct __sk_buff`: ifindex, gso_segs, gso_size; the kernel takes no others that count here.
        let mut context = [0; 192];
        context[40..44].copy_from_slice(&frame.ifindex.to_ne_bytes());
        if frame.gso_size > 0 {
            context[164..168].copy_from_slice(&2_u32.to_ne_bytes());
            context[176..180].copy_from_slice(&frame.gso_size.to_ne_bytes());
        }
        let ran = self.programs[&program].test_run(frame.bytes, &context, 1).expect("run");
        let after = self.counted(program);
        let reasons = Reason::ALL.into_iter().filter(|reason| before[reason] != after[reason]).collect();
        Ran { returned: ran.returned.cast_signed(), bytes: ran.packet, reasons }
    }

    fn counted(&self, program: Program) -> BTreeMap<Reason, u64> {
        let count = |reason| {
            let key = abi::counter(program, reason).to_ne_bytes();
            self.words(Map::Counters, &key).expect("an array")[0]
        };
        Reason::ALL.into_iter().map(|reason| (reason, count(reason))).collect()
    }

    /// Whether the kernel takes it for a test: not what ends within an IP header.
    pub(crate) fn takes(frame: &Frame<'_>) -> bool {
        match frame.bytes[12..14] {
            [0x08, 0x00] => frame.bytes.len() >= 34,
            [0x86, 0xdd] => frame.bytes.len() >= 54,
            _ => frame.bytes.len() > 14,
        }
    }

    /// Runs a program on a frame, and compares what it did with what the model says, byte by byte.
    pub(crate) fn compare(&self, program: Program, frame: &Frame<'_>) -> Answer {
        let answer = self.tables.decide(program, frame);
        let ran = self.run(program, frame);
        let seen = format!("{program:?}, model: {:?}, program: {} {:?}", answer.reason(), ran.returned, ran.reasons);
        match &answer {
            Answer::NotOurs => {
                assert_eq!((ran.returned, ran.bytes == frame.bytes, ran.reasons), (NEXT, true, vec![]), "{seen}");
            }
            Answer::Slow(reason, effect) => {
                assert_eq!(
                    (ran.returned, ran.bytes == frame.bytes, ran.reasons),
                    (NEXT, true, vec![*reason]),
                    "{seen}"
                );
                self.assert_written(effect, &seen);
            }
            // Without knowing what kind of segments they are, the kernel refuses to make room: BPF_PROG_TEST_RUN can't tell it.
            Answer::Fast(Reason::FastTunnel, _) if frame.gso_size > 0 => {
                assert_eq!((ran.returned, ran.reasons), (NEXT, vec![Reason::SlowRefused]), "{seen}");
            }
            Answer::Fast(reason, exit) => {
                assert_eq!((ran.returned, ran.reasons), (REDIRECT, vec![*reason]), "{seen}");
                let expected = match (program, reason) {
                    (Program::PodOut, Reason::FastTunnel) => with_flow_of(exit.bytes.clone(), &ran.bytes),
                    _ => exit.bytes.clone(),
                };
                assert_eq!(hex(&ran.bytes), hex(&expected), "{seen}");
            }
        }
        answer
    }

    fn assert_written(&self, effect: &Effect, seen: &str) {
        match effect {
            Effect::None => {}
            Effect::Mark(word, bit) => {
                let bits = self.words(Map::NatBits0, &word.to_ne_bytes()).expect("an array")[0];
                assert_eq!(bits & bit, *bit, "{seen}");
            }
            Effect::Record(slot, flow) => {
                let latest = self.words(Map::SlowPods, &slot.to_ne_bytes()).expect("an array");
                assert_eq!(self.words(Map::SlowFlows, flow.as_bytes()), Some(latest), "{seen}");
            }
        }
    }

    /// Whether a flow was noted.
    pub(crate) fn has_slow_flow(&self, flow: &Flow) -> bool {
        self.words(Map::SlowFlows, flow.as_bytes()).is_some()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the model leaves open of an encapsulated packet, as it was seen: identification and source port.
fn with_flow_of(mut bytes: Vec<u8>, seen: &[u8]) -> Vec<u8> {
    for open in [18..20, 34..36] {
        bytes[open.clone()].copy_from_slice(&seen[open]);
    }
    super::packets::sum4(&mut bytes[14..34]);
    bytes
}

fn shape(map: Map) -> Shape {
    let (kind, most) = match (map.kind(), map.entries_per_slot()) {
        (MapKind::Array, Some(each)) => (Kind::Array, each * 2 * SLOTS),
        (MapKind::PerCpuArray, each) => (Kind::PerCpuArray, each.map_or(abi::COUNTERS, |each| each * 2 * SLOTS)),
        (MapKind::Array, None) => (Kind::Array, 1),
        (MapKind::ArrayOrHash, _) if map == Map::PeerIndex6 => (Kind::Hash, 16),
        (MapKind::ArrayOrHash, _) => (Kind::Array, 256),
        (MapKind::Hash, _) => (Kind::Hash, 16),
        // No flow is to be forgotten.
        (MapKind::LruHash, _) => (Kind::LruHash, 65_536),
    };
    let (key_size, value_size) = (map.key_size() as u32, map.value_size() as u32);
    Shape { kind, key_size, value_size, max_entries: most, flags: 0 }
}
