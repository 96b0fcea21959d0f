//! What is told of Services: to `fabricctl`, and to health checks of load balancers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use fabric_core::model::Family;
use fabric_core::services::model::{ObjectName, Service};
use fabric_core::services::plan::{ServicePlan, Unused};
use fabric_core::state::nft::FoundTable;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::cluster::{context, node, plan, seed, service, sets, vip};

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn table_that_is_as_planned_is_described_as_such(seeds in vec(seed(), 5)) {
        let plan = plan(&(0..).zip(seeds).collect());
        for service in plan.find("") {
            let described = plan.describe(&service, &plan.table().found());
            let differences: Vec<_> = described.differences().collect();
            prop_assert!(differences.is_empty(), "{:?}", differences);
        }
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
