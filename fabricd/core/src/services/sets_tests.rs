//! Properties of the sets: what they hold depends on the objects, never on how it came to them.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::choose::{Here, choose};
use super::model::ObjectName;
use super::objects::{Metadata, ServiceObject, SliceObject};
use super::sets::{ServiceSet, SliceSet, lacks_most_of, of_service};
use super::slices::backends;
use crate::model::Family;

/// Something that happens to one object: it is given a spec, or deleted.
type Event = Option<u8>;

fn metadata(name: &str, revision: usize, service: Option<u8>) -> Value {
    let labels = service.map(|service| json!({"kubernetes.io/service-name": format!("s{service}")}));
    json!({"name": name, "namespace": "default", "resourceVersion": revision.to_string(), "labels": labels})
}

fn service(number: u8, spec: u8) -> ServiceObject {
    let ips =
        [json!(["198.51.100.1"]), json!(["198.51.100.2", "2001:db8::2"]), json!(["None"]), json!(["2001:db8::3"])];
    let object = json!({
        "metadata": metadata(&format!("s{number}"), 1, None),
        "spec": {
            "clusterIPs": ips[usize::from(spec) % 4], "ports": [{"name": "a", "port": 80 + spec}, {"name": "b", "port": 53}],
            "internalTrafficPolicy": if spec > 3 { "Local" } else { "Cluster" },
        },
    });
    serde_json::from_value(object).unwrap()
}

/// Slices of one another's addresses and Services, some of which change their Service.
fn slice(number: u8, spec: u8, revision: usize) -> SliceObject {
    let endpoint = |n: u8| {
        let (ready, leaving) = (!n.is_multiple_of(3), n.is_multiple_of(2));
        json!({
            "addresses": [format!("192.0.2.{}", n % 4 + 1)], "nodeName": if leaving { "here" } else { "there" },
            "conditions": {"ready": ready, "serving": true, "terminating": leaving}, "targetRef": {"uid": format!("{}", n % 2)},
        })
    };
    let object = json!({
        "metadata": metadata(&format!("slice{number}"), revision, Some(spec % 3)),
        "addressType": "IPv4", "ports": [{"name": if spec > 3 { "a" } else { "b" }, "port": 8080}],
        "endpoints": (0..spec % 5).map(|n| endpoint(n + number + spec)).collect::<Vec<_>>(),
    });
    serde_json::from_value(object).unwrap()
}

fn name(kind: &str, number: u8) -> Metadata {
    Metadata { name: format!("{kind}{number}"), namespace: "default".into(), ..Metadata::default() }
}

/// What all of it decides.
fn decisions(services: &ServiceSet, slices: &SliceSet) -> String {
    let mut text = String::new();
    let here = Here { node: "here", zone: None };
    for (name, service) in services.services().iter() {
        for port in &service.ports {
            for family in Family::ALL {
                let of = of_service(slices.slices(), name).map(AsRef::as_ref);
                let backends = backends(service, port, family, of);
                let choice = choose(&backends, here);
                text += &format!("{service:?} {port:?} {choice:?}\n");
            }
        }
    }
    text
}

proptest! {
    /// Events of one object come in their order; those of several in any.
    #[test]
    fn order_of_events_never_matters_and_a_list_is_the_fold_of_a_watch(
        services in vec(vec(prop::option::weighted(0.8, 0..6_u8), 1..4), 4),
        slices in vec(vec(prop::option::weighted(0.8, 0..8_u8), 1..4), 5),
        order in vec(any::<prop::sample::Index>(), 64),
    ) {
        let mut queues = vec![];
        for (is_slice, objects) in [(false, &services), (true, &slices)] {
            for (number, events) in objects.iter().enumerate() {
                // A revision is the object's own, whenever its event comes.
                let events = events.iter().enumerate().rev().map(|(at, event)| (1 + at * 10 + number, *event));
                queues.push((is_slice, u8::try_from(number).unwrap(), events.collect::<Vec<(usize, Event)>>()));
            }
        }
        let (mut some, mut list) = ((ServiceSet::default(), SliceSet::default()), BTreeMap::new());
        for at in order.iter().cycle() {
            queues.retain(|(_, _, events)| !events.is_empty());
            if queues.is_empty() {
                break;
            }
            let at = at.index(queues.len());
            let (is_slice, number, events) = &mut queues[at];
            let (revision, event) = events.pop().unwrap();
            match (*is_slice, event) {
                (false, Some(spec)) => { some.0.apply(&service(*number, spec)); }
                (false, None) => { some.0.remove(&name("s", *number)); }
                (true, Some(spec)) => { some.1.apply(&slice(*number, spec, revision)); }
                (true, None) => { some.1.remove(&name("slice", *number)); }
            }
            list.insert((*is_slice, *number), (revision, event));
        }
        let listed = |wanted: bool| {
            let these = list.iter().filter(move |((is_slice, _), _)| *is_slice == wanted);
            these.filter_map(|((_, number), (revision, event))| Some((*number, (*event)?, *revision)))
        };
        let of_list = (
            ServiceSet::listed(&listed(false).map(|(number, spec, _)| service(number, spec)).collect::<Vec<_>>()),
            SliceSet::listed(&listed(true).map(|(number, spec, revision)| slice(number, spec, revision)).collect::<Vec<_>>()),
        );
        prop_assert_eq!(decisions(&some.0, &some.1), decisions(&of_list.0, &of_list.1));
        prop_assert_eq!(some.0.services(), of_list.0.services());
        prop_assert_eq!(some.1.slices(), of_list.1.slices());
    }
}

#[test]
fn what_says_the_same_again_is_no_change() {
    let (mut services, mut slices) = (ServiceSet::default(), SliceSet::default());
    assert!(services.apply(&service(1, 0)) && !services.apply(&service(1, 0)));
    assert!(slices.apply(&slice(1, 3, 7)) && !slices.apply(&slice(1, 3, 7)));
    assert!(services.remove(&name("s", 1)) && !services.remove(&name("s", 1)));
    assert!(slices.remove(&name("slice", 1)) && !slices.remove(&name("slice", 1)));
}

#[test]
fn service_that_becomes_headless_is_gone() {
    let mut services = ServiceSet::default();
    services.apply(&service(1, 0));
    assert!(services.apply(&service(1, 2)) && services.services().is_empty());
}

#[test]
fn slice_that_changes_its_service_leaves_the_former() {
    let mut slices = SliceSet::default();
    slices.apply(&slice(1, 3, 1));
    slices.apply(&slice(1, 4, 2));
    let of = |service: &str| of_service(slices.slices(), &ObjectName::new("default", service)).count();
    assert_eq!((of("s0"), of("s1")), (0, 1));
}

#[test]
fn more_than_half_of_four_are_most() {
    let set = |numbers: std::ops::Range<u8>| ServiceSet::listed(&numbers.map(|n| service(n, 0)).collect::<Vec<_>>());
    for (known, left, most) in [(4, 1, true), (4, 2, false), (3, 0, false), (100, 49, true), (100, 50, false)] {
        assert_eq!(lacks_most_of(set(0..left).services(), set(0..known).services()), most, "{left} of {known}");
    }
}
