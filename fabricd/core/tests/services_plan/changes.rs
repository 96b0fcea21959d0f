//! Changes and restarts: any course of them leads to one plan, and connections that nobody answers are forgotten.

use std::collections::BTreeMap;
use std::sync::Arc;

use fabric_core::model::Family;
use fabric_core::services::Slice;
use fabric_core::services::plan::{ServicePlan, UdpFrontends};
use fabric_core::services::sets::SliceKey;
use fabric_core::state::nft::FoundTable;
use jiff::Timestamp;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::cluster::{Seed, context, described, ip, node, plan, seed, sets, slice, vip};

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

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

#[test]
fn changes_of_slices_tell_once_when_what_they_tell_of_happened() {
    let seeds = BTreeMap::from([(1, (vec![(0, 0, 0)], false, false, false, 0))]);
    let (services, mut slices) = sets(&seeds);
    let at = |second: i64| Timestamp::from_second(1_796_000_000 + second).unwrap();
    let mut change = |second: Option<i64>, hosts: u8| {
        let seed = ((0..hosts).map(|host| (0, host, 0)).collect(), false, false, false, 0);
        let slice = Slice { triggered: second.map(at), ..slice(1, Family::V4, &seed) };
        let key = SliceKey { service: slice.service.clone(), slice: slice.name.clone() };
        slices.insert(key, Arc::new(slice));
        slices.clone()
    };
    let mut plan = ServicePlan::new(context(), &services, &change(Some(0), 1), &FoundTable::default());
    assert!(plan.take_triggers().is_empty(), "it happened before the start");
    plan.update(&services, &change(Some(1), 2));
    plan.update(&services, &change(Some(2), 3));
    assert_eq!(plan.take_triggers(), [at(1), at(2)]);
    plan.update(&services, &change(Some(2), 1));
    plan.update(&services, &change(None, 2));
    assert!(plan.take_triggers().is_empty(), "neither says when");
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
            let plan = plan(&BTreeMap::from(seeds));
            let now = plan.udp_frontends();
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
            assert!(nothing.forget(now, target, ready), "the Service is gone");
            assert!(!nothing.forget(&nothing, target, ready));
        }
        let seeds = BTreeMap::from([(1, (endpoints.clone(), false, false, false, 0))]);
        let found = UdpFrontends::found(&plan(&seeds).table().found());
        assert!(UdpFrontends::default().forget(&found, target, ready), "it went while nobody looked");
        assert!(!UdpFrontends::default().forget(&found, (vip(family, 1), 80), ready));
    }
}
