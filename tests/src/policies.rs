//! NetworkPolicies, ClusterNetworkPolicies, Namespaces and Pods as objects of Kubernetes, for tests before an API server.

use serde_json::{Value, json};

/// The path of the Namespaces.
pub const NAMESPACES: &str = "/api/v1/namespaces";

/// The path of the Pods of a namespace.
#[must_use]
pub fn pods_of(namespace: &str) -> String {
    format!("{NAMESPACES}/{namespace}/pods")
}

/// The path of the NetworkPolicies of a namespace.
#[must_use]
pub fn policies_of(namespace: &str) -> String {
    format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies")
}

/// The path of the ClusterNetworkPolicies.
pub const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";

/// A Namespace.
#[must_use]
pub fn namespace(name: &str, labels: &Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A Pod that runs, with these addresses and labels.
#[must_use]
pub fn pod(namespace: &str, name: &str, ips: &[&str], labels: &Value) -> Value {
    let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": labels, "creationTimestamp": "2026-11-28T10:00:00Z"},
        "spec": {"containers": [{"name": "main", "image": "main", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": ips},
    })
}

/// A NetworkPolicy.
#[must_use]
pub fn policy(namespace: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    })
}

/// A ClusterNetworkPolicy.
#[must_use]
pub fn cluster_policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": name}, "spec": spec,
    })
}
