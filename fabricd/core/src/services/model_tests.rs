//! What objects of the API say: which are ours, what is missing, and what can't be used.

use serde_json::{Value, json};

use super::balance::Algorithm;
use super::model::{NodeFacts, Policy, Protocol, Service, ServiceType, Slice};
use super::objects::{NodeObject, ServiceObject, SliceObject};
use crate::interner::Interner;
use crate::model::Family;

/// A Service with another spec, status, or labels.
fn service(patch: &Value) -> Option<Service> {
    let mut object = json!({
        "metadata": {"name": "web", "namespace": "default", "creationTimestamp": "2026-11-28T10:20:30Z"},
        "spec": {
            "type": "ClusterIP", "clusterIP": "198.51.100.1", "clusterIPs": ["198.51.100.1"],
            "ports": [{"name": "http", "port": 80, "targetPort": "web"}],
        },
    });
    merge(&mut object, patch);
    let object: ServiceObject = serde_json::from_value(object).unwrap();
    Service::read(&object, &mut Interner::default())
}

fn slice(patch: &Value) -> Option<Slice> {
    let mut object = json!({
        "metadata": {
            "name": "web-x7d2k", "namespace": "default", "resourceVersion": "17",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "http", "protocol": "TCP", "port": 8080}],
        "endpoints": [{"addresses": ["192.0.2.1"], "conditions": {"ready": true}, "nodeName": "node-1"}],
    });
    merge(&mut object, patch);
    let object: SliceObject = serde_json::from_value(object).unwrap();
    Slice::read(&object, &mut Interner::default())
}

/// A merge patch (RFC 7386).
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(key);
        } else {
            merge(&mut target[key], value);
        }
    }
}

#[test]
fn service_has_its_addresses_ports_and_age() {
    let web = service(&json!({})).unwrap();
    assert_eq!((web.name.namespace(), web.name.name(), web.created), ("default", "web", 20_261_128_102_030));
    assert_eq!(web.cluster_ips.to_vec(), ["198.51.100.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!((web.ports[0].port, web.ports[0].protocol, &*web.ports[0].name), (80, Protocol::Tcp, "http"));
    assert_eq!(
        (web.kind, web.internal, web.external, web.affinity),
        (ServiceType::ClusterIp, Policy::Cluster, Policy::Cluster, None)
    );
}

#[test]
fn services_that_are_none_of_ours_are_passed_over() {
    for patch in [
        json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}),
        json!({"spec": {"clusterIP": "", "clusterIPs": []}}),
        json!({"spec": {"clusterIP": null, "clusterIPs": null}}),
        json!({"spec": {"type": "ExternalName", "externalName": "example.org"}}),
        json!({"spec": {"type": "SomethingNew"}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}}),
    ] {
        assert_eq!(service(&patch), None, "{patch}");
    }
}

#[test]
fn service_from_before_two_families_has_its_only_address() {
    let web = service(&json!({"spec": {"clusterIPs": null}})).unwrap();
    assert_eq!(web.cluster_ips.len(), 1);
}

#[test]
fn dual_stack_service_has_an_address_of_each_family() {
    let web = service(&json!({"spec": {"clusterIPs": ["198.51.100.1", "2001:db8::1"]}})).unwrap();
    let of = |family| web.addresses(family).count();
    assert_eq!((of(Family::V4), of(Family::V6)), (1, 1));
}

#[test]
fn node_port_of_a_cluster_ip_service_is_none() {
    let ports = json!([{"port": 80, "nodePort": 30080}]);
    let of = |kind: &str| service(&json!({"spec": {"type": kind, "ports": ports}})).unwrap().ports[0].node_port;
    assert_eq!([of("ClusterIP"), of("NodePort"), of("LoadBalancer")], [None, Some(30_080), Some(30_080)]);
}

#[test]
fn load_balancer_without_node_ports_has_none() {
    let web = service(&json!({"spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false}})).unwrap();
    assert_eq!(web.ports[0].node_port, None);
}

#[test]
fn addresses_of_a_load_balancer_are_those_that_packets_arrive_with() {
    let ingress = json!([
        {"ip": "203.0.113.1"}, {"ip": "203.0.113.2", "ipMode": "VIP"}, {"ip": "203.0.113.3", "ipMode": "Proxy"},
        {"hostname": "lb.example.org"}, {"ip": "203.0.113.1"},
    ]);
    let of = |kind: &str| {
        let web = service(&json!({"spec": {"type": kind}, "status": {"loadBalancer": {"ingress": ingress}}})).unwrap();
        web.balancer_ips.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(of("LoadBalancer"), ["203.0.113.1", "203.0.113.2"]);
    assert!(of("ClusterIP").is_empty());
}

#[test]
fn affinity_lasts_three_hours_unless_it_is_said() {
    let of = |config: Value| {
        service(&json!({"spec": {"sessionAffinity": "ClientIP", "sessionAffinityConfig": config}})).unwrap().affinity
    };
    let seconds = |seconds: i64| json!({"clientIP": {"timeoutSeconds": seconds}});
    let found = [of(Value::Null), of(json!({})), of(seconds(60)), of(seconds(0)), of(seconds(1 << 40))];
    assert_eq!(found, [Some(10_800), Some(10_800), Some(60), Some(1), Some(86_400)]);
    assert_eq!(
        service(&json!({"spec": {"sessionAffinity": "None", "sessionAffinityConfig": seconds(60)}})).unwrap().affinity,
        None
    );
}

#[test]
fn health_is_asked_of_local_load_balancers_alone() {
    let of = |kind: &str, policy: &str| {
        let spec = json!({"type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": 30900});
        service(&json!({"spec": spec})).unwrap().health_check_port
    };
    assert_eq!(of("LoadBalancer", "Local"), Some(30_900));
    assert_eq!([of("LoadBalancer", "Cluster"), of("NodePort", "Local")], [None, None]);
}

/// The ranges of each family; `-` lets everybody in.
fn ranges(texts: Value) -> (String, usize) {
    let web = service(&json!({"spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": texts}})).unwrap();
    let of = |family| {
        web.source_ranges.of(family).map_or_else(
            || "-".to_owned(),
            |ranges| ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "),
        )
    };
    (format!("{} | {}", of(Family::V4), of(Family::V6)), web.refused.len())
}

#[test]
fn source_ranges_are_trimmed_and_split_by_family() {
    assert_eq!(ranges(json!(null)), ("- | -".to_owned(), 0));
    assert_eq!(ranges(json!([" 192.0.2.77/24 ", "192.0.2.0/24"])), ("192.0.2.0/24 | -".to_owned(), 0));
    assert_eq!(ranges(json!(["192.0.2.128/25", "192.0.2.0/24", "192.0.2.7/32"])), ("192.0.2.0/24 | -".to_owned(), 0));
    assert_eq!(ranges(json!(["192.0.2.0/24", "2001:db8::/32"])), ("192.0.2.0/24 | 2001:db8::/32".to_owned(), 0));
}

#[test]
fn source_ranges_that_cant_be_read_let_nobody_in() {
    assert_eq!(ranges(json!(["192.0.2.0", "everybody", "192.0.2.0/40"])), (" | ".to_owned(), 3));
    assert_eq!(ranges(json!(["192.0.2.0/24", "2001:db8:/32"])), ("192.0.2.0/24 | ".to_owned(), 1));
}

#[test]
fn what_cant_be_used_costs_itself_alone_and_is_told() {
    let web = service(&json!({"spec": {
        "externalIPs": ["203.0.113.1", "127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "::ffff:192.0.2.1", "elsewhere"],
        "ports": [{"port": 80}, {"port": 0}, {"port": 70000}, {"port": -1}, {"port": 81, "protocol": "DCCP"}],
    }}))
    .unwrap();
    assert_eq!((web.external_ips.len(), web.ports.len(), web.refused.len()), (1, 1, 10), "{:?}", web.refused);
}

#[test]
fn null_is_nothing_said() {
    let object: ServiceObject = serde_json::from_value(json!({"metadata": {}, "spec": null, "status": null})).unwrap();
    assert_eq!(Service::read(&object, &mut Interner::default()), None);
    let status = json!({"loadBalancer": null});
    let object = json!({"metadata": {}, "spec": {"clusterIP": "198.51.100.1", "clusterIPs": null}, "status": status});
    let object: ServiceObject = serde_json::from_value(object).unwrap();
    assert!(Service::read(&object, &mut Interner::default()).is_some());
    let endpoints = json!([{"addresses": null, "conditions": null, "hints": null, "targetRef": null}]);
    let object: SliceObject = serde_json::from_value(json!({"metadata": {}, "endpoints": endpoints})).unwrap();
    assert_eq!(Slice::read(&object, &mut Interner::default()), None);
    let object: NodeObject = serde_json::from_value(json!({"metadata": {}, "spec": null})).unwrap();
    assert_eq!(NodeFacts::read(&object), NodeFacts::default());
}

#[test]
fn slice_has_its_service_ports_and_endpoints() {
    let web = slice(&json!({})).unwrap();
    assert_eq!((web.service.to_string(), web.revision, web.family), ("default/web".to_owned(), 17, Family::V4));
    assert_eq!((&*web.ports[0].name, web.ports[0].port), ("http", 8080));
    assert_eq!(
        (web.endpoints[0].ip.to_string(), web.endpoints[0].node.as_deref()),
        ("192.0.2.1".to_owned(), Some("node-1"))
    );
}

#[test]
fn slices_that_tell_nothing_of_a_service_are_passed_over() {
    for patch in [
        json!({"addressType": "FQDN"}),
        json!({"metadata": {"labels": {"kubernetes.io/service-name": null}}}),
        json!({"metadata": {"labels": {"kubernetes.io/service-name": ""}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}}),
        json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "other"}}}),
    ] {
        assert_eq!(slice(&patch), None, "{patch}");
    }
}

#[test]
fn what_is_not_said_of_an_endpoint_is_as_the_api_defines_it() {
    let of = |conditions: Value| {
        let web = slice(&json!({"endpoints": [{"addresses": ["192.0.2.1"], "conditions": conditions}]})).unwrap();
        (web.endpoints[0].ready, web.endpoints[0].serving, web.endpoints[0].terminating)
    };
    assert_eq!(of(json!(null)), (true, true, false));
    assert_eq!(of(json!({})), (true, true, false));
    assert_eq!(of(json!({"ready": false})), (false, false, false));
    assert_eq!(of(json!({"ready": false, "serving": true, "terminating": true})), (false, true, true));
    assert_eq!(of(json!({"ready": null, "serving": false})), (true, false, false));
}

#[test]
fn endpoints_that_nobody_can_be_sent_to_are_passed_over() {
    let addresses = [
        json!(["192.0.2.1"]),
        json!(["192.0.2.2", "192.0.2.3"]),
        json!([]),
        json!(["127.0.0.1"]),
        json!(["169.254.1.1"]),
        json!(["224.0.0.1"]),
        json!(["0.0.0.0"]),
        json!(["2001:db8::1"]),
        json!(["pod.example.org"]),
    ];
    let endpoints: Vec<Value> = addresses.into_iter().map(|addresses| json!({"addresses": addresses})).collect();
    let web = slice(&json!({"endpoints": endpoints})).unwrap();
    assert_eq!(web.endpoints.iter().map(|e| e.ip.to_string()).collect::<Vec<_>>(), ["192.0.2.1", "192.0.2.2"]);
}

#[test]
fn slice_of_v1beta1_names_its_nodes_by_label() {
    let web = slice(&json!({"endpoints": [
        {"addresses": ["192.0.2.1"], "topology": {"kubernetes.io/hostname": "node-7", "topology.kubernetes.io/zone": "x"}},
    ]}))
    .unwrap();
    assert_eq!(web.endpoints[0].node.as_deref(), Some("node-7"));
}

#[test]
fn ports_of_a_slice_without_a_number_are_passed_over() {
    let web = slice(
        &json!({"ports": [{"name": "a"}, {"name": "b", "port": 0}, {"name": null, "port": 53, "protocol": "UDP"}]}),
    );
    let ports: Vec<_> =
        web.unwrap().ports.iter().map(|port| (port.name.to_string(), port.protocol, port.port)).collect();
    assert_eq!(ports, [(String::new(), Protocol::Udp, 53)]);
}

#[test]
fn slice_without_endpoints_or_ports_is_empty() {
    let web = slice(&json!({"endpoints": null, "ports": null})).unwrap();
    assert!(web.endpoints.is_empty() && web.ports.is_empty());
}

#[test]
fn hints_of_an_endpoint_are_kept() {
    let hints = json!({"forZones": [{"name": "x"}, {"name": "y"}], "forNodes": [{"name": "node-1"}]});
    let web = slice(&json!({"endpoints": [{"addresses": ["192.0.2.1"], "hints": hints}]})).unwrap();
    let hints = web.endpoints[0].hints.as_ref().unwrap();
    assert_eq!((hints.zones.len(), hints.nodes.len()), (2, 1));
}

#[test]
fn nodes_zone_addresses_and_going_are_read() {
    let of = |object: Value| NodeFacts::read(&serde_json::from_value::<NodeObject>(object).unwrap());
    let zone = of(json!({"metadata": {"labels": {"topology.kubernetes.io/zone": "x"}}}));
    assert_eq!((zone.zone.as_deref(), zone.going), (Some("x"), false));
    assert!(of(json!({"metadata": {"deletionTimestamp": "2026-11-28T10:00:00Z"}})).going);
    assert!(of(json!({"spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}})).going);
    assert_eq!(of(json!({"metadata": {}, "spec": {"taints": [{"key": "other"}]}})), NodeFacts::default());
    let address = |kind: &str, address: &str| json!({"type": kind, "address": address});
    let addresses = [
        address("ExternalIP", "203.0.113.1"),
        address("InternalIP", "192.0.2.1"),
        address("InternalIP", "192.0.2.2"),
        address("InternalIP", "2001:db8::1"),
        address("Hostname", "node-1"),
    ];
    let ips: Vec<String> =
        of(json!({"status": {"addresses": addresses}})).internal_ips.iter().map(ToString::to_string).collect();
    assert_eq!(ips, ["192.0.2.1", "2001:db8::1"]);
}

#[test]
fn names_that_nobody_has_any_more_are_forgotten() {
    let mut names = Interner::<str>::default();
    let kept = names.share("kept");
    for number in 0..1_000 {
        names.share(format!("node-{number}").as_str());
    }
    assert!(std::sync::Arc::ptr_eq(&kept, &names.share("kept")));
    assert!(names.len() <= 200, "{} names are known", names.len());
}

#[test]
fn annotation_says_how_endpoints_are_picked_and_a_bad_one_is_told() {
    let of = |value: &str, spec: Value| {
        let web =
            service(&json!({"metadata": {"annotations": {"fabric.io/lb-algorithm": value}}, "spec": spec})).unwrap();
        (web.algorithm, web.refused.join(" "))
    };
    assert_eq!(service(&json!({})).unwrap().algorithm, Algorithm::Random);
    for (value, algorithm) in [
        ("random", Algorithm::Random),
        ("round-robin", Algorithm::RoundRobin),
        (" source-hash ", Algorithm::SourceHash),
    ] {
        assert_eq!(of(value, json!({})), (algorithm, String::new()));
        assert_eq!(algorithm.word(), value.trim());
    }
    for value in ["", "RoundRobin", "least-connections"] {
        let (algorithm, told) = of(value, json!({}));
        assert_eq!(algorithm, Algorithm::Random);
        assert!(told.contains(&format!("{value:?}")) && told.contains("random, round-robin and source-hash"), "{told}");
    }
    let (algorithm, told) = of("round-robin", json!({"sessionAffinity": "ClientIP"}));
    assert_eq!(algorithm, Algorithm::Random);
    assert!(told.contains("has no effect beside sessionAffinity ClientIP"), "{told}");
    assert_eq!(of("random", json!({"sessionAffinity": "ClientIP"})), (Algorithm::Random, String::new()));
}

#[test]
fn slice_says_when_what_it_tells_of_happened() {
    let of = |value: &str| {
        let annotation = json!({"endpoints.kubernetes.io/last-change-trigger-time": value});
        slice(&json!({"metadata": {"annotations": annotation}})).unwrap().triggered
    };
    assert_eq!(slice(&json!({})).unwrap().triggered, None);
    assert_eq!(of("2026-11-29T10:00:00.25Z").map(jiff::Timestamp::as_millisecond), Some(1_795_946_400_250));
    assert_eq!(of("yesterday"), None);
}
