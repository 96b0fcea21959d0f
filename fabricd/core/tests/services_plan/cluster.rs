//! Services and slices that are made up from a few numbers, and their plan.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use fabric_core::model::{Family, PerFamily, Subnet};
use fabric_core::services::Here;
use fabric_core::services::balance::Algorithm;
use fabric_core::services::model::{
    Endpoint, ObjectName, Policy, Protocol, Service, ServicePort, ServiceType, Slice, SlicePort, SourceRanges,
};
use fabric_core::services::plan::{Context, ServicePlan};
use fabric_core::services::sets::{Services, SliceKey, Slices};
use fabric_core::state::nft::{FoundTable, Table};
use proptest::collection::vec;
use proptest::prelude::*;

pub const HERE: Here<'static> = Here { node: "here", zone: None };

pub fn ip(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, net, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, net.into(), 0, 0, 0, host.into()).into(),
    }
}

/// The ClusterIP, the load balancer's address and the node's. All nodes together have the second one.
pub fn vip(family: Family, service: u8) -> IpAddr {
    ip(family, 96, service)
}

pub fn balancer(family: Family, service: u8) -> IpAddr {
    ip(family, 203, service)
}

pub fn node(family: Family) -> IpAddr {
    ip(family, 99, 11)
}

pub fn context() -> Context {
    let of = |len4, len6, net| PerFamily {
        v4: Some(Subnet::holding(ip(Family::V4, net, 0), len4).unwrap()),
        v6: Some(Subnet::holding(ip(Family::V6, net, 0), len6).unwrap()),
    };
    // Pods have 10.244.0.0/20, those of this node 10.244.1.0/24.
    let network = PerFamily {
        v4: Some(Subnet::holding(ip(Family::V4, 0, 0), 20).unwrap()),
        v6: Some(Subnet::holding(ip(Family::V6, 0, 0), 60).unwrap()),
    };
    Context {
        node: "here".into(),
        zone: None,
        own: of(24, 64, 1),
        network,
        node_ips: Family::ALL.map(node).into(),
        service_cidrs: vec![],
    }
}

/// What a Service is made from: endpoints (where, what about them), policies, affinity, type.
pub type Seed = (Vec<(u8, u8, u8)>, bool, bool, bool, u8);

pub fn seed() -> impl Strategy<Value = Seed> {
    (vec((0..3_u8, 0..6_u8, 0..6_u8), 0..6), any::<bool>(), any::<bool>(), any::<bool>(), 0..3_u8)
}

/// How a Service's endpoints are picked, where none has affinity.
pub fn algorithm(number: u8) -> Algorithm {
    [Algorithm::SourceHash, Algorithm::Random, Algorithm::RoundRobin][usize::from(number % 3)]
}

pub fn service(number: u8, (_, internal, external, sticky, kind): &Seed) -> Service {
    let local = |is_local: bool| if is_local { Policy::Local } else { Policy::Cluster };
    let kind = [ServiceType::ClusterIp, ServiceType::NodePort, ServiceType::LoadBalancer][usize::from(*kind)];
    let port = |name: &str, protocol, port: u16| ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: (kind != ServiceType::ClusterIp).then(|| 30_000 + u16::from(number) * 10 + port % 7),
    };
    Service {
        name: ObjectName::new("default", &format!("s{number}")),
        created: number.into(),
        kind,
        cluster_ips: Family::ALL.map(|family| vip(family, number)).into(),
        external_ips: Box::default(),
        balancer_ips: match kind {
            ServiceType::LoadBalancer => Family::ALL.map(|family| balancer(family, number)).into(),
            _ => Box::default(),
        },
        ports: [port("http", Protocol::Tcp, 80), port("dns", Protocol::Udp, 53)].into(),
        internal: local(*internal),
        external: local(*external && kind != ServiceType::ClusterIp),
        affinity: sticky.then_some(10_800),
        algorithm: if *sticky { Algorithm::Random } else { algorithm(number) },
        health_check_port: None,
        source_ranges: SourceRanges::default(),
        refused: Box::default(),
    }
}

pub fn slice(number: u8, family: Family, (endpoints, ..): &Seed) -> Slice {
    let endpoint = |(net, host, condition): &(u8, u8, u8)| {
        let (ready, leaving) = (*condition < 3, *condition == 4);
        let nodes = [Some("here"), Some("there"), None];
        Endpoint {
            ip: ip(family, net + 1, 10 + host),
            ready,
            serving: ready || leaving,
            terminating: leaving,
            node: nodes[usize::from(*net)].map(Arc::from),
            pod: u64::from(*condition),
            hints: None,
        }
    };
    let port = |name: &str, protocol, port| SlicePort { name: name.into(), protocol, port };
    Slice {
        name: ObjectName::new("default", &format!("s{number}-{family:?}")),
        service: ObjectName::new("default", &format!("s{number}")),
        revision: 1,
        triggered: None,
        family,
        ports: [port("http", Protocol::Tcp, 8080), port("dns", Protocol::Udp, 5353)].into(),
        endpoints: endpoints.iter().map(endpoint).collect(),
    }
}

pub fn sets(seeds: &BTreeMap<u8, Seed>) -> (Services, Slices) {
    let services = seeds.iter().map(|(number, seed)| service(*number, seed));
    let slices = seeds.iter().flat_map(|(number, seed)| Family::ALL.map(|family| slice(*number, family, seed)));
    let key = |slice: &Slice| SliceKey { service: slice.service.clone(), slice: slice.name.clone() };
    (
        services.map(|service| (service.name.clone(), Arc::new(service))).collect(),
        slices.map(|slice| (key(&slice), Arc::new(slice))).collect(),
    )
}

pub fn plan(seeds: &BTreeMap<u8, Seed>) -> ServicePlan {
    let (services, slices) = sets(seeds);
    ServicePlan::new(context(), &services, &slices, &FoundTable::default())
}

/// A table with the endpoints in the place of their pools, and no numbers that count up.
pub fn described(table: &Table) -> BTreeSet<String> {
    let mut lines: BTreeSet<String> = table
        .to_string()
        .lines()
        .filter(|line| {
            // By the number of a pool.
            let has_turns = |line: &str| line.contains("turn-") || line.contains("to each endpoint by turns");
            !has_turns(line)
                && !line.starts_with("map svc")
                && !line.starts_with("map out4")
                && !line.starts_with("map out6")
                && !line.starts_with("map pool")
                && !line.starts_with("set live")
        })
        .map(str::to_owned)
        .collect();
    for family in [4, 6] {
        let elements = |name: &str| {
            let set = &table.sets[format!("{name}{family}").as_str()];
            set.elements.keys().map(|element| {
                let (key, data) = element.split(set.kind);
                (key.to_vec(), data.to_vec())
            })
        };
        let number = |bytes: &[u8]| u32::from_ne_bytes(bytes[..4].try_into().unwrap());
        let mut pools: BTreeMap<u32, BTreeSet<Vec<u8>>> = BTreeMap::new();
        for (key, data) in elements("pool") {
            pools.entry(number(&key)).or_default().insert(data);
        }
        for name in ["svc", "out"] {
            lines.extend(elements(name).map(|(key, data)| {
                let (pool, class) = (number(&data[4..]), number(&data[8..]));
                let class = if class == 1 << 30 | pool { "by turns".to_owned() } else { class.to_string() };
                format!("{name}{family} {key:?} {:?} {class}", pools[&pool])
            }));
        }
        lines.extend(pools.values().map(|sockets| format!("pool{family} {sockets:?}")));
        lines.insert(format!("{} live", elements("live").count()));
    }
    lines
}
