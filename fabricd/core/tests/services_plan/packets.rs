//! Packets by the planned rules: each goes where the Services say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::model::{Family, Subnet};
use fabric_core::services::model::{ObjectName, Protocol, Service};
use fabric_core::services::plan::{Context, ServicePlan, Socket};
use fabric_core::services::sets::{Services, SliceKey};
use fabric_core::state::nft::FoundTable;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use crate::cluster::{Seed, balancer, context, described, ip, plan, seed, service, sets, slice, vip};
use crate::interpreter::{Machine, Outcome, Packet};
use crate::question::{Delivery, From, Question, To, question};

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
            let (delivery, may) = (question.delivery(&mut machine), question.may(&seeds));
            prop_assert!(may.contains(&delivery), "{:?}: {:?} is none of {:?}", question, delivery, may);
            // A client that has been somewhere stays there, whatever address of the Service it asks, as long as it may.
            let is_sticky = seeds.get(&question.service).is_some_and(|seed| seed.3);
            if let (Delivery::To(socket, _), true) = (&delivery, is_sticky) {
                let client = (question.packet().source, question.service, question.is_udp, question.family);
                let before = clients.insert(client, *socket);
                let might = |socket: &Socket| may.iter().any(|delivery| matches!(delivery, Delivery::To(to, _) if to == socket));
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
        for (number, delivery) in may.iter().enumerate().filter(|(_, delivery)| matches!(delivery, Delivery::To(..))) {
            let mut machine = Machine::new(plan.table(), move |below| {
                assert_eq!(below as usize, endpoints);
                u32::try_from(number).unwrap()
            });
            prop_assert_eq!(&question.delivery(&mut machine), delivery);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// The client is the same on every node, as its packet is: the plan alone differs.
    #[test]
    fn client_is_hashed_to_one_endpoint_on_every_node_and_moves_only_with_it(
        hosts in btree_set(0..200_u8, 2..12), gone in any::<prop::sample::Index>(), from in question(),
    ) {
        let endpoints = |hosts: &[u8]| hosts.iter().map(|host| (1, *host, 0)).collect::<Vec<_>>();
        let hosts: Vec<u8> = hosts.into_iter().collect();
        let question = Question { service: 3, wrong_port: false, to: To::ClusterIp, ..from };
        let deliveries = |hosts: &[u8], before: &FoundTable| {
            let (services, slices) = sets(&BTreeMap::from([(3, (endpoints(hosts), false, false, false, 0))]));
            let plan = ServicePlan::new(context(), &services, &slices, before);
            let deliveries: Vec<Delivery> = (10..60)
                .map(|client| Question { from: From::Pod(client), ..question }.delivery(&mut Machine::new(plan.table(), |_| 0)))
                .collect();
            (deliveries, plan.table().found())
        };
        let (was, table) = deliveries(&hosts, &FoundTable::default());
        let turned: Vec<u8> = hosts.iter().rev().copied().collect();
        prop_assert_eq!(&deliveries(&turned, &FoundTable::default()).0, &was);
        let mut left = hosts;
        let gone = left.remove(gone.index(left.len()));
        let of_gone = ip(question.family, 2, 10 + gone);
        for (was, is) in was.iter().zip(deliveries(&left, &table).0) {
            let (Delivery::To(was, _), Delivery::To(is, _)) = (was, &is) else { panic!("{was:?} {is:?}") };
            prop_assert!(was == is || was.0 == of_gone, "{:?} was moved to {:?}", was, is);
        }
    }
}

/// Two Services with as many endpoints are asked in turn, as by a client that always asks both.
#[test]
fn round_robin_gives_each_endpoint_its_turn_whatever_other_services_do() {
    let endpoints: Vec<_> = (0..3).map(|host| (1, host, 0)).collect();
    let seeds = BTreeMap::from([2, 5].map(|number| (number, (endpoints.clone(), false, false, false, 1))));
    let plan = plan(&seeds);
    let mut machine = Machine::new(plan.table(), |_| panic!("nothing is random"));
    for family in Family::ALL {
        for (from, to) in [(From::Pod(10), To::ClusterIp), (From::Host, To::NodePort), (From::Outside, To::NodePort)] {
            let mut ask = |service| {
                let asked = Question { service, is_udp: false, from, to, family, wrong_port: false };
                match asked.delivery(&mut machine) {
                    Delivery::To(socket, _) => socket,
                    other => panic!("{asked:?}: {other:?}"),
                }
            };
            let rounds: Vec<[Socket; 2]> = (0..6).map(|_| [ask(2), ask(5)]).collect();
            for service in 0..2 {
                let turns: Vec<Socket> = rounds.iter().map(|round| round[service]).collect();
                assert_eq!(turns[..3], turns[3..]);
                assert_eq!(turns[..3].iter().collect::<BTreeSet<_>>().len(), 3, "{turns:?}");
            }
        }
    }
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
    let delivery = question.delivery(&mut Machine::new(plan.table(), |_| 0));
    assert_eq!(delivery, Delivery::To((ip(Family::V4, 1, 11), 8080), false));
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
        Arc::new(Service::read(&object, &mut fabric_core::interner::Interner::default()).unwrap())
    };
    let mut deliveries = |ranges: &[&str]| {
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
        .map(|(from, to)| ask(from, to).delivery(&mut machine) != Delivery::Dropped)
    };
    assert_eq!(deliveries(&[]), [true, true, true, true]);
    assert_eq!(deliveries(&["10.244.198.0/24"]), [true, false, false, true]);
    assert_eq!(deliveries(&["10.244.1.0/24"]), [false, true, false, true]);
    assert_eq!(deliveries(&["10.244.99.11/32"]), [false, false, true, true]);
    assert_eq!(deliveries(&["everybody"]), [false, false, false, true]);
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
        assert_eq!(from_pod.delivery(&mut machine), Delivery::Rejected, "it has no such port of TCP");
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
            question.delivery(&mut Machine::new(plan.table(), |_| 0))
        };
        let prefix = Subnet::holding(vip(family, 0), if family == Family::V4 { 24 } else { 64 }).unwrap();
        for from in [From::Pod(10), From::Host, From::Outside] {
            assert_eq!(of(vec![prefix], 9, from), Delivery::Dropped);
            assert_eq!(of(vec![], 9, from), Delivery::Passes);
            assert!(matches!(of(vec![prefix], 1, from), Delivery::To(..)));
        }
    }
}
