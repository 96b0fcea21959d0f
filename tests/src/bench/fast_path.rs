//! The programs of the fast path on two nodes of the Lab, put at their hooks by hand, since fabricd doesn't do it yet.
//!
//! Everything that they have to know is read from what fabricd and the CNI plugin made: subnets, MAC addresses, interfaces. The
//! kernel's path stays as it is below them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use fabric_bpf::abi::{self, Config, Map, MapKind, Peer, Pod};
use fabric_bpf::{OBJECT, Path, Program, Reason};
use fabric_core::model::Family;
use fabric_ebpf::{Hook, Kind, Link, Object, Shape};
use serde_json::Value;
use zerocopy::{Immutable, IntoBytes};

use crate::lab::Node;

const VNI: u32 = 1;
const PORT: u16 = 8472;
/// Slots of pods, and of peers.
const SLOTS: u32 = 8;
/// The pod that is measured, and the node that it talks to.
const ONLY: u32 = 1;

/// A node with programs at its hooks, as long as this lives.
pub(super) struct FastNode {
    maps: BTreeMap<Map, fabric_ebpf::Map>,
    /// They go with it.
    _links: Vec<Link>,
}

/// What is known of a node and its pod.
struct Facts {
    underlay: Ipv4Addr,
    vtep: [u8; 6],
    subnet: Ipv4Addr,
    address: Ipv4Addr,
    mtu: u32,
    uplink: u32,
    port: u32,
    mac: [u8; 6],
    gateway: [u8; 6],
}

/// Puts the programs at the hooks of two nodes, each with one pod called `pod`. `network` is the whole network of /24s.
pub(super) fn attach(nodes: &[Arc<Node>; 2], pod: &str, network: (Ipv4Addr, u8)) -> Result<[FastNode; 2]> {
    let [one, other] = [facts(&nodes[0], pod)?, facts(&nodes[1], pod)?];
    Ok([node(&nodes[0], &one, &other, network)?, node(&nodes[1], &other, &one, network)?])
}

fn facts(node: &Arc<Node>, name: &str) -> Result<Facts> {
    let pod = node.pod(name)?;
    let link = |text: String| -> Result<Value> { Ok(serde_json::from_str::<Vec<Value>>(&text)?.swap_remove(0)) };
    let on_node = |name: &str| link(node.run(&["ip", "-json", "link", "show", name])?);
    let inside = link(pod.run(&["ip", "-json", "link", "show", "eth0"])?)?;
    let number = |link: &Value, field: &str| -> Result<u32> {
        Ok(u32::try_from(link[field].as_u64().with_context(|| format!("no {field} in {link}"))?)?)
    };
    let mac = |link: &Value| -> Result<[u8; 6]> {
        let text = link["address"].as_str().context("no address")?;
        Ok(text.parse::<fabric_core::model::MacAddr>()?.octets())
    };
    let v4 = |ip| match ip {
        std::net::IpAddr::V4(v4) => Ok(v4),
        std::net::IpAddr::V6(v6) => bail!("{v6} is no IPv4 address"),
    };
    let address = v4(pod.ip(Family::V4)?)?;
    Ok(Facts {
        underlay: v4(node.underlay_ip(Family::V4))?,
        vtep: mac(&on_node("fabric.1")?)?,
        subnet: Ipv4Addr::from_bits(address.to_bits() & !0xff),
        address,
        mtu: number(&inside, "mtu")?,
        uplink: number(&on_node("eth0")?, "ifindex")?,
        port: number(&inside, "link_index")?,
        mac: mac(&inside)?,
        gateway: mac(&on_node("cni0")?)?,
    })
}

fn node(node: &Node, own: &Facts, other: &Facts, (network, length): (Ipv4Addr, u8)) -> Result<FastNode> {
    let make = |map: Map| Ok((map, fabric_ebpf::Map::create(map.name(), shape(map, 1 << (24 - length)))?));
    let maps = Map::ALL.into_iter().map(make).collect::<Result<BTreeMap<_, _>>>()?;
    let config = Config {
        flags: abi::CONFIG_IPV4 | abi::CONFIG_GUARD,
        vni: abi::vxlan_vni(VNI),
        network4: network.to_bits(),
        network4_mask: !0 << (32 - length),
        own4: own.subnet.to_bits(),
        own4_mask: !0xff,
        subnet4_shift: 8,
        local4: own.underlay.octets(),
        port: PORT.to_be_bytes(),
        vtep4: own.vtep,
        ..Config::default()
    };
    let template = abi::template4(own.underlay, other.underlay, PORT, VNI, [own.vtep, other.vtep]);
    let peer = Peer {
        ifindex: own.uplink,
        mtu: own.mtu,
        template_sum: abi::template_sum(&template),
        underlay: abi::padded(other.underlay),
        nexthop: abi::padded(other.underlay),
        template,
        ..Peer::default()
    };
    let pod = Pod {
        ifindex: own.port,
        flags: abi::POD_FAST,
        mtu: own.mtu,
        mac: own.mac,
        gateway: own.gateway,
        ..Pod::default()
    };
    set(&maps, Map::Config, &0_u32, &config)?;
    set(&maps, Map::Peers, &ONLY, &peer)?;
    set(&maps, Map::PeerIndex4, &((other.subnet.to_bits() - network.to_bits()) >> 8), &ONLY)?;
    set(&maps, Map::Pods, &ONLY, &pod)?;
    set(&maps, Map::PodIndex4, &(own.address.to_bits() & 0xff), &ONLY)?;

    let object = Object::parse(OBJECT)?;
    let named: Vec<_> = maps.iter().map(|(map, made)| (map.name(), made)).collect();
    let hooks = [
        (Program::WireIn, own.uplink, Hook::Ingress),
        (Program::PodOut, own.port, Hook::Ingress),
        (Program::PodIn, own.port, Hook::Egress),
    ];
    let links = node.network()?.run(|| {
        let attach = |(program, ifindex, hook): (Program, u32, Hook)| {
            let code = object.programs.iter().find(|code| code.name == program.name()).context("no such program")?;
            Ok(Link::attach(&fabric_ebpf::Program::load(code, abi::LICENSE, &named)?, ifindex, hook)?)
        };
        hooks.into_iter().map(attach).collect::<Result<Vec<_>>>()
    })?;
    Ok(FastNode { maps, _links: links })
}

fn set<K, V>(maps: &BTreeMap<Map, fabric_ebpf::Map>, map: Map, key: &K, value: &V) -> Result<()>
where
    K: IntoBytes + Immutable,
    V: IntoBytes + Immutable,
{
    maps[&map].set(key.as_bytes(), value.as_bytes()).with_context(|| format!("cannot write to {}", map.name()))
}

fn shape(map: Map, subnets: u32) -> Shape {
    let each = map.entries_per_slot().map(|each| each * SLOTS);
    let (kind, most) = match map.kind() {
        MapKind::Array => (Kind::Array, each.unwrap_or(1)),
        MapKind::PerCpuArray => (Kind::PerCpuArray, each.unwrap_or(abi::COUNTERS)),
        MapKind::ArrayOrHash => (Kind::Array, if map == Map::PeerIndex4 { subnets } else { 256 }),
        MapKind::Hash => (Kind::Hash, SLOTS),
        MapKind::LruHash => (Kind::LruHash, 65_536),
    };
    #[expect(clippy::cast_possible_truncation, reason = "some bytes")]
    let (key_size, value_size) = (map.key_size() as u32, map.value_size() as u32);
    Shape { kind, key_size, value_size, max_entries: most, flags: 0 }
}

impl FastNode {
    /// Packets that the programs saw: those that they took, and those that they left to the kernel.
    fn fast_and_slow(&self) -> Result<(u64, u64)> {
        let (mut fast, mut slow) = (0, 0);
        for (program, reason) in Reason::ALL.into_iter().flat_map(|r| [(Program::PodOut, r), (Program::WireIn, r)]) {
            let key = abi::counter(program, reason).to_ne_bytes();
            let value = self.maps[&Map::Counters].get(&key)?.context("counters is an array")?;
            let count: u64 =
                value.chunks_exact(8).filter_map(|word| Some(u64::from_ne_bytes(*word.first_chunk()?))).sum();
            match reason.path() {
                Path::Fast => fast += count,
                Path::Slow | Path::Dropped => slow += count,
            }
        }
        Ok((fast, slow))
    }
}

/// The share of packets that took the fast path, of all that these nodes' programs saw since the last time.
#[derive(Debug, Default)]
pub(super) struct Share {
    before: (u64, u64),
}

impl Share {
    /// Fails below 99 %: a fall to the kernel's path looks healthy, and would only be slow.
    pub(super) fn check(&mut self, nodes: &[FastNode; 2]) -> Result<f64> {
        let counts = nodes.iter().map(FastNode::fast_and_slow).collect::<Result<Vec<_>>>()?;
        let now = counts.into_iter().fold((0, 0), |sum, (fast, slow)| (sum.0 + fast, sum.1 + slow));
        let (fast, slow) = (now.0 - self.before.0, now.1 - self.before.1);
        self.before = now;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let share = fast as f64 / (fast + slow).max(1) as f64;
        ensure!(share >= 0.99, "only {fast} of {} packets took the fast path", fast + slow);
        Ok(share)
    }
}
