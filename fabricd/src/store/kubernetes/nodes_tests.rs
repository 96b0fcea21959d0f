use serde_json::{Value, json};

use super::*;

/// A Node as the API server shows it, with much that is of no interest.
fn node(name: &str, subnet: &str, ip: Option<&str>, revision: i64) -> Node {
    let prefix = "flannel.alpha.coreos.com";
    let annotations = ip.map(|ip| {
        json!({
            format!("{prefix}/kube-subnet-manager"): "true",
            format!("{prefix}/backend-type"): "vxlan",
            format!("{prefix}/backend-data"): r#"{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"}"#,
            format!("{prefix}/public-ip"): ip,
            "volumes.kubernetes.io/controller-managed-attach-detach": "true",
        })
    });
    let node: Value = json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": name, "uid": format!("uid-of-{name}"), "resourceVersion": revision.to_string(),
            "creationTimestamp": "2026-01-01T00:00:00Z", "annotations": annotations,
        },
        "spec": {"podCIDR": subnet, "podCIDRs": [subnet], "taints": [{"key": "k", "effect": "NoSchedule"}]},
        "status": {"images": [{"names": ["a"], "sizeBytes": 1}]},
    });
    serde_json::from_value(node).expect("a Node")
}

fn first() -> Node {
    node("node-1", "10.244.1.0/24", Some("192.0.2.1"), 3)
}

fn cluster() -> Nodes {
    let nodes = [first(), node("node-2", "10.244.2.0/24", Some("192.0.2.2"), 4), node("new", "10.244.3.0/24", None, 5)];
    Nodes::listed(&Nodes::default(), &nodes, 9)
}

fn shown(nodes: &Nodes) -> Vec<String> {
    nodes
        .set()
        .iter()
        .map(|lease| format!("{} {} {}", lease.key.encode(), lease.holder(), lease.mod_revision))
        .collect()
}

#[test]
fn annotated_nodes_are_leases_with_their_nodes_names() {
    assert_eq!(shown(&cluster()), ["10.244.1.0-24 node-1 3", "10.244.2.0-24 node-2 4"]);
}

#[test]
fn kubelets_report_is_no_change_of_the_lease_in_a_watch_or_a_list() {
    let mut nodes = cluster();
    assert!(
        !nodes.apply(&Node { metadata: node("node-1", "10.244.1.0/24", Some("192.0.2.1"), 20).metadata, ..first() })
    );
    assert_eq!(shown(&nodes), shown(&cluster()));
    let again = Nodes::listed(&nodes, &[node("node-1", "10.244.1.0/24", Some("192.0.2.1"), 30)], 31);
    assert_eq!(shown(&again), ["10.244.1.0-24 node-1 3"]);
}

#[test]
fn changed_address_is_a_change_at_its_revision() {
    let mut nodes = cluster();
    assert!(nodes.apply(&node("node-1", "10.244.1.0/24", Some("192.0.2.9"), 20)));
    assert_eq!(shown(&nodes)[0], "10.244.1.0-24 node-1 20");
    assert_eq!(nodes.set().revision(), 20);
}

#[test]
fn erased_annotations_depart_and_a_deleted_node_is_gone() {
    let departed = |nodes: &Nodes| nodes.set().departed().keys().map(ToString::to_string).collect::<Vec<_>>();
    let mut nodes = cluster();
    assert!(nodes.apply(&node("node-1", "10.244.1.0/24", None, 20)));
    assert_eq!((shown(&nodes).len(), departed(&nodes)), (1, vec!["10.244.1.0/24".to_owned()]));
    let listed = Nodes::listed(&cluster(), &[node("node-1", "10.244.1.0/24", None, 20)], 21);
    assert_eq!(departed(&listed), ["10.244.1.0/24"], "and not node-2, which is gone");

    assert!(nodes.remove(&node("node-1", "10.244.1.0/24", None, 22)));
    assert_eq!(departed(&nodes), Vec::<String>::new());
    assert!(nodes.remove(&node("node-2", "10.244.2.0/24", Some("192.0.2.2"), 23)));
    assert_eq!((shown(&nodes).len(), departed(&nodes).len()), (0, 0));
}

#[test]
fn node_that_is_made_anew_with_another_subnet_leaves_the_old_one() {
    let mut nodes = cluster();
    nodes.remove(&first());
    nodes.apply(&node("node-1", "10.244.7.0/24", Some("192.0.2.1"), 20));
    assert_eq!(shown(&nodes), ["10.244.2.0-24 node-2 4", "10.244.7.0-24 node-1 20"]);
    // A list shows it without the deletion.
    let listed = Nodes::listed(&cluster(), &[node("node-1", "10.244.7.0/24", Some("192.0.2.1"), 20)], 21);
    assert_eq!((shown(&listed), listed.set().departed().len()), (vec!["10.244.7.0-24 node-1 20".to_owned()], 0));
}

#[test]
fn older_of_two_nodes_with_one_subnet_has_it_until_it_goes() {
    let mut nodes = cluster();
    let mut twin = node("node-9", "10.244.1.0/24", Some("192.0.2.9"), 20);
    twin.metadata.creation_timestamp = serde_json::from_value(json!("2026-01-02T00:00:00Z")).expect("a time");
    nodes.apply(&twin);
    assert_eq!(shown(&nodes)[0], "10.244.1.0-24 node-1 3");
    nodes.remove(&first());
    assert_eq!(shown(&nodes)[0], "10.244.1.0-24 node-9 20");
}

#[test]
fn unreadable_annotations_keep_the_last_good_ones() {
    let mut nodes = cluster();
    assert!(nodes.apply(&node("node-1", "10.244.1.0/24", Some("224.0.0.1"), 20)));
    assert_eq!(shown(&nodes), shown(&cluster()));
    assert!(nodes.set().unreadable().contains_key("10.244.1.0-24"));
}
