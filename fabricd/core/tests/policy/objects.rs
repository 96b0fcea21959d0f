//! What Pods, Namespaces and NetworkPolicies say, as the API server has them.

use std::sync::Arc;

use fabric_core::policy::ObjectName;
use fabric_core::policy::model::NamedPort;
use fabric_core::policy::objects::{NamespaceObject, PodObject, PolicyObject, uid};
use fabric_core::policy::sets::{ClusterPolicySet, NamespaceSet, PodSet, PolicySet, problems};
use fabric_core::services::Protocol;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::world::name;

fn object<T: DeserializeOwned>(json: &Value) -> T {
    serde_json::from_value(json.clone()).expect("an object of the API")
}

fn pod(spec: Value, status: Value) -> PodObject {
    let metadata = json!({"name": "web", "namespace": "shop", "uid": "u1", "creationTimestamp": "2026-11-28T10:00:00Z",
        "labels": {"app": "web"}});
    object(&json!({"metadata": metadata, "spec": spec, "status": status}))
}

fn read(object: &PodObject) -> fabric_core::policy::model::Pod {
    let set = PodSet::listed(std::slice::from_ref(object));
    (**set.pods().get(&name("shop/web")).expect("read")).clone()
}

#[test]
fn pod_is_read_with_its_addresses_labels_and_times() {
    let status =
        json!({"phase": "Running", "podIP": "192.0.2.1", "podIPs": [{"ip": "192.0.2.1"}, {"ip": "2001:db8::1"}]});
    let mut web = pod(json!({}), status);
    let read_web = read(&web);
    assert_eq!(read_web.v4, Some([192, 0, 2, 1].into()));
    assert!(read_web.v6.is_some() && read_web.labels().get("app") == Some("web"));
    assert_eq!((read_web.created, read_web.ends, read_web.is_live(0)), (1_795_860_000, None, true));
    web.metadata.deletion_timestamp = Some("2026-11-28T10:00:30Z".into());
    let going = read(&web);
    assert!(going.is_live(1_795_860_030) && !going.is_live(1_795_860_031));
}

#[test]
fn named_ports_of_containers_and_sidecars_count_and_of_init_containers_not() {
    let port = |name: &str, port: i64, protocol: Value| json!({"ports": [{"name": name, "containerPort": port, "protocol": protocol}]});
    let mut sidecar = port("proxy", 15001, json!("TCP"));
    sidecar["restartPolicy"] = json!("Always");
    let spec = json!({
        "containers": [port("http", 80, json!(null)), port("dns", 53, json!("UDP")), port("big", 70000, json!("TCP")),
            port("icmp", 1, json!("ICMP")), {"ports": [{"containerPort": 9}]}, {}],
        "initContainers": [port("setup", 1, json!("TCP")), sidecar],
    });
    let named = |name: &str, protocol, port| NamedPort { name: name.into(), protocol, port };
    let read = read(&pod(spec, json!({})));
    let want =
        [named("dns", Protocol::Udp, 53), named("http", Protocol::Tcp, 80), named("proxy", Protocol::Tcp, 15001)];
    assert_eq!(read.ports(), want);
}

#[test]
fn completed_pods_and_those_in_their_nodes_network_have_no_address_of_their_own() {
    for (spec, phase) in [(json!({}), "Succeeded"), (json!({}), "Failed"), (json!({"hostNetwork": true}), "Running")] {
        assert!(!read(&pod(spec, json!({"phase": phase}))).is_live(0), "{phase}");
    }
    assert!(read(&pod(json!({}), json!({"phase": "Pending"}))).is_live(0));
}

#[test]
fn static_pod_is_known_by_what_the_kubelet_tells_the_runtime() {
    let mut web = pod(json!({}), json!({}));
    assert_eq!(read(&web).uid, uid("u1"));
    web.metadata.annotations = Some([("kubernetes.io/config.hash".to_owned(), "0123".to_owned())].into());
    assert_eq!(read(&web).uid, uid("0123"));
}

#[test]
fn only_what_matters_of_a_pod_is_a_change_and_equal_labels_are_kept_once() {
    let web = pod(json!({}), json!({"phase": "Pending"}));
    let mut set = PodSet::listed(std::slice::from_ref(&web));
    assert!(!set.apply(&pod(json!({"nodeName": "node-1"}), json!({"phase": "Running"}))));
    assert!(set.apply(&pod(json!({}), json!({"podIPs": [{"ip": "192.0.2.1"}]}))));
    let mut other = web.clone();
    other.metadata.name = "web-2".into();
    assert!(set.apply(&other));
    let pods: Vec<_> = set.pods().iter().collect();
    assert!(Arc::ptr_eq(&pods[0].template, &pods[1].template));
    assert!(set.remove(&other.metadata) && !set.remove(&other.metadata));
}

#[test]
fn labels_of_namespaces_are_followed() {
    let shop = |labels: Value| object::<NamespaceObject>(&json!({"metadata": {"name": "shop", "labels": labels}}));
    let mut set = NamespaceSet::listed(&[shop(json!({"team": "a"}))]);
    assert!(!set.apply(&shop(json!({"team": "a"}))) && set.apply(&shop(json!({"team": "b"}))));
    assert_eq!(set.namespaces().get(&"shop".into()).expect("known").get("team"), Some("b"));
    assert!(set.remove(&shop(json!({})).metadata) && set.namespaces().is_empty());
}

fn policy(spec: Value) -> PolicyObject {
    object(&json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec}))
}

#[test]
fn policy_that_cannot_be_read_keeps_its_last_good_value_and_is_named() {
    let (good, bad) = (policy(json!({"podSelector": {}})), policy(json!({"podSelector": {"matchFields": []}})));
    for mut set in [PolicySet::default().listed(std::slice::from_ref(&good)), PolicySet::default()] {
        let is_known = !set.policies().is_empty();
        assert!(set.apply(&bad) && !set.apply(&bad), "it is said once");
        let relisted = set.listed(std::slice::from_ref(&bad));
        for set in [&set, &relisted] {
            let read = set.policies().get(&name("shop/p")).expect("there");
            assert_eq!(read.ingress.is_some(), is_known, "isolates as before, or nobody");
            let told = problems(set.policies())[&name("shop/p")][0].to_string();
            assert!(told.starts_with("spec.podSelector: "), "{told}");
            let words = if is_known { "what it said before stays applied" } else { "it isolates nobody" };
            assert!(told.ends_with(words), "{told}");
        }
        assert!(set.apply(&good) && problems(set.policies()).is_empty());
        assert!(set.remove(&good.metadata) && set.policies().is_empty());
    }
}

#[test]
fn cluster_policy_that_cannot_be_read_keeps_its_last_good_value_and_is_named() {
    let of = |spec: Value| object::<PolicyObject>(&json!({"metadata": {"name": "p"}, "spec": spec}));
    let rules = json!([{"action": "Deny", "from": [{"namespaces": {}}]}]);
    let good = of(json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "ingress": rules}));
    let bad = of(json!({"tier": "Application", "priority": 1, "subject": {"namespaces": {}}, "ingress": rules}));
    for mut set in [ClusterPolicySet::default().listed([&good]), ClusterPolicySet::default()] {
        let is_known = !set.policies().is_empty();
        assert!(set.apply(&bad) && !set.apply(&bad), "it is said once");
        let read = set.policies().get(&ObjectName::of_cluster("p")).expect("there");
        assert_eq!(!read.ingress.is_empty(), is_known, "denies as before, or nothing");
        let told = problems(set.policies())[&ObjectName::of_cluster("p")][0].to_string();
        assert!(told.starts_with("spec.tier: "), "{told}");
        let words = if is_known { "what it said before stays applied" } else { "it decides nothing" };
        assert!(told.ends_with(words), "{told}");
        assert!(set.apply(&good) && problems(set.policies()).is_empty());
        assert!(set.remove(&good.metadata) && set.policies().is_empty());
    }
}
