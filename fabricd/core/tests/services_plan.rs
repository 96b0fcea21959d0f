//! The planned table of Services against what was decided about them, by an interpreter of its rules.

#![allow(clippy::unwrap_used, reason = "a test that unwraps says where it broke")]

mod interpreter;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use fabric_core::model::{Family, PerFamily, Subnet};
use fabric_core::services::model::{
    Endpoint, ObjectName, Policy, Protocol, Service, ServicePort, ServiceType, Slice, SlicePort, SourceRanges,
};
use fabric_core::services::plan::{Context, ServicePlan, Socket, UdpFrontends, Unused};
use fabric_core::services::sets::{Services, SliceKey, Slices};
use fabric_core::services::{Answer, Frontend, Here, Origin, backends, choose};
use fabric_core::state::nft::{FoundTable, Reject, Table, ct_state, ct_status};
use proptest::collection::vec;
use proptest::prelude::*;

use self::interpreter::{Machine, Outcome, Packet};

const HERE: Here<'static> = Here { node: "here", zone: None };

fn ip(family: Family, net: u8, host: u8) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 244, net, host).into(),
        Family::V6 => Ipv6Addr::new(0xfd00, 0x10, 0x244, net.into(), 0, 0, 0, host.into()).into(),
    }
}

/// The ClusterIP, the load balancer's address and the node's. All nodes together have the second one.
fn vip(family: Family, service: u8) -> IpAddr {
    ip(family, 96, service)
}

fn balancer(family: Family, service: u8) -> IpAddr {
    ip(family, 203, service)
}

fn node(family: Family) -> IpAddr {
    ip(family, 99, 11)
}

fn context() -> Context {
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
type Seed = (Vec<(u8, u8, u8)>, bool, bool, bool, u8);

fn seed() -> impl Strategy<Value = Seed> {
    (vec((0..3_u8, 0..6_u8, 0..6_u8), 0..6), any::<bool>(), any::<bool>(), any::<bool>(), 0..3_u8)
}

fn service(number: u8, (_, internal, external, sticky, kind): &Seed) -> Service {
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
        health_check_port: None,
        source_ranges: SourceRanges::default(),
        refused: Box::default(),
    }
}

fn slice(number: u8, family: Family, (endpoints, ..): &Seed) -> Slice {
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
        family,
        ports: [port("http", Protocol::Tcp, 8080), port("dns", Protocol::Udp, 5353)].into(),
        endpoints: endpoints.iter().map(endpoint).collect(),
    }
}

fn sets(seeds: &BTreeMap<u8, Seed>) -> (Services, Slices) {
    let services = seeds.iter().map(|(number, seed)| service(*number, seed));
    let slices = seeds.iter().flat_map(|(number, seed)| Family::ALL.map(|family| slice(*number, family, seed)));
    let key = |slice: &Slice| SliceKey { service: slice.service.clone(), slice: slice.name.clone() };
    (
        services.map(|service| (service.name.clone(), Arc::new(service))).collect(),
        slices.map(|slice| (key(&slice), Arc::new(slice))).collect(),
    )
}

fn plan(seeds: &BTreeMap<u8, Seed>) -> ServicePlan {
    let (services, slices) = sets(seeds);
    ServicePlan::new(context(), &services, &slices, &FoundTable::default())
}

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    /// A pod of this node, by its number.
    Pod(u8),
    /// A pod of another node.
    OtherPod,
    /// This host.
    Host,
    /// Beyond the cluster.
    Outside,
}

/// Where it is addressed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum To {
    ClusterIp,
    Balancer,
    NodePort,
}

#[derive(Clone, Copy, Debug)]
struct Question {
    service: u8,
    is_udp: bool,
    from: From,
    to: To,
    family: Family,
    wrong_port: bool,
}

fn question() -> impl Strategy<Value = Question> {
    let from =
        prop_oneof![(10..16_u8).prop_map(From::Pod), Just(From::OtherPod), Just(From::Host), Just(From::Outside)];
    let to = prop_oneof![Just(To::ClusterIp), Just(To::Balancer), Just(To::NodePort)];
    let wrong_port = prop::bool::weighted(0.05);
    (0..7_u8, any::<bool>(), from, to, any::<bool>(), wrong_port).prop_map(
        |(service, is_udp, from, to, is_v4, wrong_port)| {
            let family = if is_v4 { Family::V4 } else { Family::V6 };
            Question { service, is_udp, from, to, family, wrong_port }
        },
    )
}

/// What becomes of a connection's first packet.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fate {
    /// It goes there, and whether with another source.
    To(Socket, bool),
    Rejected,
    Dropped,
    /// Services have nothing to do with it.
    Passes,
}

impl Question {
    fn packet(&self) -> Packet {
        let source = match self.from {
            From::Pod(number) => ip(self.family, 1, number),
            From::OtherPod => ip(self.family, 2, 77),
            From::Host => node(self.family),
            From::Outside => ip(self.family, 198, 7),
        };
        let (protocol, port) = if self.is_udp { (Protocol::Udp, 53) } else { (Protocol::Tcp, 80) };
        let port = port + u16::from(self.wrong_port);
        let (target, port) = match self.to {
            To::ClusterIp => (vip(self.family, self.service), port),
            To::Balancer => (balancer(self.family, self.service), port),
            To::NodePort => (node(self.family), 30_000 + u16::from(self.service) * 10 + port % 7),
        };
        let (original, protocol) = ((target, port), protocol.number());
        Packet { source, target, protocol, port, original, ct_state: ct_state::NEW, ct_status: 0 }
    }

    /// What the rules make of it, chain by chain.
    fn fate(&self, machine: &mut Machine<'_>) -> Fate {
        let mut packet = self.packet();
        let is_host = self.from == From::Host;
        let hooks = if is_host { ["guard-output", "output"] } else { ["guard-prerouting", "prerouting"] };
        match machine.run(hooks[0], &packet) {
            Outcome::Dropped => return Fate::Dropped,
            outcome => assert_eq!(outcome, Outcome::Passes),
        }
        let is_translated = match machine.run(hooks[1], &packet) {
            Outcome::Translated(ip, port) => {
                (packet.target, packet.port, packet.ct_status) = (ip, port, ct_status::DESTINATION_NAT);
                true
            }
            outcome => {
                assert_eq!(outcome, Outcome::Passes);
                false
            }
        };
        match machine.run(if is_host { "refuse-output" } else { "forward" }, &packet) {
            Outcome::Dropped => return Fate::Dropped,
            Outcome::Rejected(Reject::PortUnreachable) => return Fate::Rejected,
            outcome => assert_eq!(outcome, Outcome::Passes),
        }
        let is_masqueraded = machine.run("postrouting", &packet) == Outcome::Masqueraded;
        if is_translated { Fate::To((packet.target, packet.port), is_masqueraded) } else { Fate::Passes }
    }

    /// What it may become, by the objects.
    fn may(&self, seeds: &BTreeMap<u8, Seed>) -> Vec<Fate> {
        let Some(seed) = seeds.get(&self.service) else { return vec![Fate::Passes] };
        let service = service(self.service, seed);
        let exists = match self.to {
            To::ClusterIp => true,
            To::Balancer => service.kind == ServiceType::LoadBalancer,
            To::NodePort => service.kind != ServiceType::ClusterIp,
        };
        if !exists {
            return vec![Fate::Passes];
        }
        let packet = self.packet();
        let has_port = match self.to {
            To::NodePort => service
                .ports
                .iter()
                .any(|of| of.node_port == Some(packet.port) && of.protocol.number() == packet.protocol),
            _ => !self.wrong_port,
        };
        if !has_port {
            return vec![if self.to == To::ClusterIp { Fate::Rejected } else { Fate::Passes }];
        }
        let port = &service.ports[usize::from(self.is_udp)];
        let slice = slice(self.service, self.family, seed);
        let backends = backends(&service, port, self.family, [&slice]);
        let choice = choose(&backends, HERE);
        let frontend = if self.to == To::ClusterIp { Frontend::ClusterIp } else { Frontend::External };
        let origin = if self.from == From::Outside { Origin::Outside } else { Origin::Inside };
        match choice.answer(service.policy(frontend, origin)) {
            Answer::Reject => vec![Fate::Rejected],
            Answer::Drop => vec![Fate::Dropped],
            Answer::To(list) => {
                let fate = |backend: &fabric_core::services::Backend<'_>| {
                    let itself = backend.endpoint.ip == packet.source;
                    let answers_here = matches!(self.from, From::Pod(_)) || HERE.has(backend.endpoint);
                    Fate::To(backend.socket(), itself || !answers_here)
                };
                list.iter().map(fate).collect()
            }
        }
    }
}

/// Numbers that look random and are always the same.
fn numbers(mut state: u64) -> impl FnMut(u32) -> u32 {
    move |below| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((state >> 33) % u64::from(below)).unwrap()
    }
}

proptest! {
    // 250 clusters with 400 packets each.
    #![proptest_config(ProptestConfig { cases: 250, ..ProptestConfig::default() })]

    #[test]
    fn rules_agree_with_what_was_decided_about_every_packet(
        seeds in vec(seed(), 6), questions in vec(question(), 400), start in any::<u64>(),
    ) {
        let seeds: BTreeMap<u8, Seed> = (1..).zip(seeds).collect();
        let plan = plan(&seeds);
        let mut machine = Machine::new(plan.table(), numbers(start));
        let mut clients: BTreeMap<(IpAddr, u8, bool, Family), Socket> = BTreeMap::new();
        for question in questions {
            let (fate, may) = (question.fate(&mut machine), question.may(&seeds));
            prop_assert!(may.contains(&fate), "{:?}: {:?} is none of {:?}", question, fate, may);
            // A client that has been somewhere stays there, whatever address of the Service it asks, as long as it may.
            let is_sticky = seeds.get(&question.service).is_some_and(|seed| seed.3);
            if let (Fate::To(socket, _), true) = (&fate, is_sticky) {
                let client = (question.packet().source, question.service, question.is_udp, question.family);
                let before = clients.insert(client, *socket);
                let might = |socket: &Socket| may.iter().any(|fate| matches!(fate, Fate::To(to, _) if to == socket));
                if let Some(before) = before.filter(might) {
                    prop_assert_eq!(*socket, before, "{:?}", question);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_endpoint_is_drawn_and_each_as_often_as_the_others(seed in seed(), from in question()) {
        let seeds = BTreeMap::from([(1, (seed.0, seed.1, seed.2, false, seed.4))]);
        let question = Question { service: 1, wrong_port: false, ..from };
        let plan = plan(&seeds);
        let may = question.may(&seeds);
        let endpoints = may.len();
        for (number, fate) in may.iter().enumerate().filter(|(_, fate)| matches!(fate, Fate::To(..))) {
            let mut machine = Machine::new(plan.table(), move |below| {
                assert_eq!(below as usize, endpoints);
                u32::try_from(number).unwrap()
            });
            prop_assert_eq!(&question.fate(&mut machine), fate);
        }
    }

    #[test]
    fn any_course_of_changes_leads_to_the_plan_of_all_at_once(
        courses in vec(vec((0..5_u8, prop::option::weighted(0.8, seed())), 1..5), 1..8),
    ) {
        let mut seeds = BTreeMap::new();
        let mut changed = plan(&seeds);
        for changes in courses {
            for (number, seed) in changes {
                match seed {
                    Some(seed) => drop(seeds.insert(number, seed)),
                    None => drop(seeds.remove(&number)),
                }
            }
            let (services, slices) = sets(&seeds);
            changed.update(&services, &slices);
            prop_assert_eq!(described(changed.table()), described(plan(&seeds).table()));
        }
    }

    #[test]
    fn table_that_is_as_planned_is_described_as_such(seeds in vec(seed(), 5)) {
        let plan = plan(&(0..).zip(seeds).collect());
        for service in plan.find("") {
            let described = plan.describe(&service, &plan.table().found());
            let differences: Vec<_> = described.differences().collect();
            prop_assert!(differences.is_empty(), "{:?}", differences);
        }
    }

    #[test]
    fn restarted_daemon_plans_what_is_there(
        first in vec(seed(), 4), then in vec(seed(), 4),
    ) {
        let seeds = |of: &[Seed]| -> BTreeMap<u8, Seed> { (0..).zip(of.iter().cloned()).collect() };
        let mut before = plan(&seeds(&first));
        let (services, slices) = sets(&seeds(&then));
        before.update(&services, &slices);
        let after = ServicePlan::new(context(), &services, &slices, &before.table().found());
        prop_assert_eq!(after.table(), before.table());
    }
}

/// A table with the endpoints in the place of their pools, and no numbers that count up.
fn described(table: &Table) -> BTreeSet<String> {
    let mut lines: BTreeSet<String> = table
        .to_string()
        .lines()
        .filter(|line| {
            !line.starts_with("map svc")
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
                format!("{name}{family} {key:?} {:?} {:?}", pools[&number(&data[4..])], &data[8..])
            }));
        }
        lines.extend(pools.values().map(|sockets| format!("pool{family} {sockets:?}")));
        lines.insert(format!("{} live", elements("live").count()));
    }
    lines
}

/// Two Services with one load balancer's address, and one whose ClusterIP another has as an external address.
#[test]
fn frontend_that_two_services_claim_is_the_older_ones_and_a_cluster_ip_goes_first() {
    let endpoints = vec![(0, 1, 0)];
    let seed = |kind| (endpoints.clone(), false, false, false, kind);
    let seeds = BTreeMap::from([(1, seed(2)), (2, seed(2)), (3, seed(0))]);
    let (mut services, slices) = sets(&seeds);
    let claimed = balancer(Family::V4, 1);
    let mut second = service(2, &seeds[&2]);
    second.balancer_ips = [claimed].into();
    let mut first = service(1, &seeds[&1]);
    first.external_ips = [vip(Family::V4, 3)].into();
    for service in [&first, &second] {
        services.insert(service.name.clone(), Arc::new(service.clone()));
    }
    let told = |plan: &ServicePlan| {
        let line = |c: fabric_core::services::plan::Conflict<'_>| {
            format!("{} {} {}", c.frontend, c.owner.name(), c.other.name())
        };
        plan.conflicts().map(line).collect::<Vec<_>>()
    };
    let mut plan = ServicePlan::new(context(), &services, &slices, &FoundTable::default());
    assert_eq!(
        told(&plan),
        [
            "10.244.96.3:80/tcp s3 s1",
            "10.244.96.3:53/udp s3 s1",
            "10.244.203.1:80/tcp s1 s2",
            "10.244.203.1:53/udp s1 s2",
        ]
    );
    // Whatever the order, and it comes to the other one with the end of the owner.
    let mut other = ServicePlan::new(context(), &Services::default(), &slices, &FoundTable::default());
    let mut one_by_one = Services::default();
    for name in ["s2", "s1", "s3"] {
        let name = ObjectName::new("default", name);
        one_by_one.insert(name.clone(), services.get(&name).unwrap().clone());
        other.update(&one_by_one, &slices);
    }
    assert_eq!((told(&other), described(other.table())), (told(&plan), described(plan.table())));
    services.remove(&first.name);
    plan.update(&services, &slices);
    assert!(told(&plan).is_empty());
    let question = Question {
        service: 1,
        is_udp: false,
        from: From::Outside,
        to: To::Balancer,
        family: Family::V4,
        wrong_port: false,
    };
    let fate = question.fate(&mut Machine::new(plan.table(), |_| 0));
    assert_eq!(fate, Fate::To((ip(Family::V4, 1, 11), 8080), false));
}

#[test]
fn source_ranges_let_nobody_else_in() {
    let seeds = BTreeMap::from([(1, (vec![(0, 1, 0)], false, false, false, 2))]);
    let (mut services, slices) = sets(&seeds);
    let with = |ranges: &[&str]| {
        let object = serde_json::json!({
            "metadata": {"name": "s1", "namespace": "default"},
            "spec": {
                "type": "LoadBalancer", "clusterIP": "10.244.96.1", "loadBalancerSourceRanges": ranges,
                "ports": [{"name": "http", "port": 80, "nodePort": 30013}],
            },
            "status": {"loadBalancer": {"ingress": [{"ip": "10.244.203.1"}]}},
        });
        let object = serde_json::from_value(object).unwrap();
        Arc::new(Service::read(&object, &mut fabric_core::services::model::Names::default()).unwrap())
    };
    let mut fates = |ranges: &[&str]| {
        services.insert(ObjectName::new("default", "s1"), with(ranges));
        let plan = ServicePlan::new(context(), &services, &slices, &FoundTable::default());
        let mut machine = Machine::new(plan.table(), |_| 0);
        let ask = |from, to| Question { service: 1, is_udp: false, from, to, family: Family::V4, wrong_port: false };
        [
            (From::Outside, To::Balancer),
            (From::Pod(10), To::Balancer),
            (From::Host, To::Balancer),
            (From::Outside, To::NodePort),
        ]
        .map(|(from, to)| ask(from, to).fate(&mut machine) != Fate::Dropped)
    };
    assert_eq!(fates(&[]), [true, true, true, true]);
    assert_eq!(fates(&["10.244.198.0/24"]), [true, false, false, true]);
    assert_eq!(fates(&["10.244.1.0/24"]), [false, true, false, true]);
    assert_eq!(fates(&["10.244.99.11/32"]), [false, false, true, true]);
    assert_eq!(fates(&["everybody"]), [false, false, false, true]);
}

#[test]
fn udp_connection_is_forgotten_when_no_endpoint_that_serves_answers_it() {
    // One of this node that is ready, one elsewhere that is going, one that neither is ready nor serves.
    let endpoints = vec![(0, 0, 0), (1, 1, 4), (1, 2, 5)];
    for family in Family::ALL {
        let socket = |net: u8, host: u8| (ip(family, net + 1, 10 + host), 5353);
        let [ready, leaving, gone] = [socket(0, 0), socket(1, 1), socket(1, 2)];
        let (target, of_node) = ((vip(family, 1), 53), (node(family), 30_014));
        for internal_is_local in [false, true] {
            let seeds =
                [(1, (endpoints.clone(), internal_is_local, false, false, 1)), (2, (vec![], false, false, false, 0))];
            let now = plan(&BTreeMap::from(seeds)).udp_frontends();
            let nothing = UdpFrontends::default();
            let forgets = |target, answers| now.forget(&nothing, target, answers);
            assert!(!forgets(target, ready));
            assert_eq!(forgets(target, leaving), internal_is_local, "it serves, elsewhere");
            assert!(forgets(target, gone));
            assert!(forgets(target, target), "translated by nobody");
            assert!(forgets(target, (ready.0, 53)), "another port of an endpoint's address");
            assert!(!forgets((vip(family, 1), 54), gone), "no frontend");
            assert!(!forgets((vip(family, 1), 80), gone), "TCP's");
            assert!(forgets((vip(family, 2), 53), gone), "nobody serves");
            assert!(!forgets(of_node, leaving), "the local policy is that of the ClusterIP");
            assert!(nothing.forget(&now, target, ready), "the Service is gone");
            assert!(!nothing.forget(&nothing, target, ready));
        }
        let seeds = BTreeMap::from([(1, (endpoints.clone(), false, false, false, 0))]);
        let found = UdpFrontends::found(&plan(&seeds).table().found());
        assert!(UdpFrontends::default().forget(&found, target, ready), "it went while nobody looked");
        assert!(!UdpFrontends::default().forget(&found, (vip(family, 1), 80), ready));
    }
}

#[test]
fn service_is_described_with_why_endpoints_take_nothing_and_with_what_the_kernel_lacks() {
    // Ready here, ready elsewhere, terminating, not ready.
    let endpoints = vec![(0, 0, 0), (1, 1, 0), (1, 2, 4), (1, 3, 5)];
    let plan = plan(&BTreeMap::from([(1, (endpoints, true, false, false, 0)), (2, (vec![], false, false, false, 0))]));
    let names = |what: &str| plan.find(what).iter().map(|service| service.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names("s1"), ["default/s1"]);
    assert_eq!(names("default/s2"), ["default/s2"]);
    assert_eq!(names(&vip(Family::V6, 2).to_string()), ["default/s2"]);
    assert!(names("other/s1").is_empty() && names("192.0.2.1").is_empty());
    let service = &plan.find("s1")[0];
    let described = plan.describe(service, &plan.table().found());
    assert_eq!(described.ports.len(), 4, "two ports in two families");
    for port in &described.ports {
        let unused: Vec<_> = port.endpoints.iter().map(|endpoint| endpoint.unused).collect();
        assert_eq!(unused, [None, Some(Unused::OtherNode), Some(Unused::Terminating), Some(Unused::NotReady)]);
        assert!(port.endpoints[0].takes_inside && !port.endpoints[1].takes_inside);
    }
    let nothing = plan.describe(service, &FoundTable::default());
    assert_eq!(nothing.differences().count(), 4);
    assert_eq!(nothing.differences().next().unwrap().kernel, [None, None]);
}

#[test]
fn sctp_is_translated_as_tcp_is() {
    let seed: Seed = (vec![(0, 1, 0)], false, false, false, 0);
    for family in Family::ALL {
        let (mut services, mut slices) = sets(&BTreeMap::from([(1, seed.clone())]));
        let (mut service, mut slice) = (service(1, &seed), slice(1, family, &seed));
        (service.ports[0].protocol, slice.ports[0].protocol) = (Protocol::Sctp, Protocol::Sctp);
        let key = SliceKey { service: slice.service.clone(), slice: slice.name.clone() };
        services.insert(service.name.clone(), Arc::new(service));
        slices.insert(key, Arc::new(slice));
        let plan = ServicePlan::new(context(), &services, &slices, &FoundTable::default());
        let mut machine = Machine::new(plan.table(), |_| 0);
        let from_pod =
            Question { service: 1, is_udp: false, from: From::Pod(10), to: To::ClusterIp, family, wrong_port: false };
        let sctp = Packet { protocol: Protocol::Sctp.number(), ..from_pod.packet() };
        assert_eq!(machine.run("prerouting", &sctp), Outcome::Translated(ip(family, 1, 11), 8080));
        assert_eq!(from_pod.fate(&mut machine), Fate::Rejected, "it has no such port of TCP");
    }
}

#[test]
fn address_that_no_service_has_is_dropped_where_the_prefixes_of_services_are_known() {
    let (services, slices) = sets(&BTreeMap::from([(1, (vec![(0, 1, 0)], false, false, false, 0))]));
    for family in Family::ALL {
        let of = |cidrs: Vec<Subnet>, service, from| {
            let context = Context { service_cidrs: cidrs, ..context() };
            let plan = ServicePlan::new(context, &services, &slices, &FoundTable::default());
            let question = Question { service, is_udp: false, from, to: To::ClusterIp, family, wrong_port: false };
            question.fate(&mut Machine::new(plan.table(), |_| 0))
        };
        let prefix = Subnet::holding(vip(family, 0), if family == Family::V4 { 24 } else { 64 }).unwrap();
        for from in [From::Pod(10), From::Host, From::Outside] {
            assert_eq!(of(vec![prefix], 9, from), Fate::Dropped);
            assert_eq!(of(vec![], 9, from), Fate::Passes);
            assert!(matches!(of(vec![prefix], 1, from), Fate::To(..)));
        }
    }
}

/// Of two Services with one port the older one is told of; the other one's load balancer gets no answer of its own.
#[test]
fn health_checks_count_ready_endpoints_of_this_node_by_family() {
    let seed = |endpoints: &[(u8, u8, u8)]| (endpoints.to_vec(), false, true, false, 2);
    // Two ready here, one elsewhere, one terminating.
    let seeds = BTreeMap::from([(1, seed(&[(0, 0, 0), (0, 1, 0), (1, 2, 0), (0, 3, 4)])), (2, seed(&[(0, 0, 0)]))]);
    let (mut services, slices) = sets(&seeds);
    for (number, seed) in &seeds {
        let service = Service { health_check_port: Some(32_000), ..service(*number, seed) };
        services.insert(service.name.clone(), Arc::new(service));
    }
    let plan = ServicePlan::new(context(), &services, &slices, &FoundTable::default());
    let (checks, late) = plan.health_checks();
    let told: Vec<_> = checks.iter().map(|(at, check)| (at.ip(), check.service.name(), check.endpoints)).collect();
    assert_eq!(told, [(node(Family::V4), "s1", 2), (node(Family::V6), "s1", 2)]);
    assert_eq!(late, BTreeSet::from([ObjectName::new("default", "s2")]));
}
