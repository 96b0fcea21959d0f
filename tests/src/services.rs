//! Services and their endpoints as objects of Kubernetes, for tests before an API server.

use serde_json::{Value, json};

use crate::fake_api::FakeApi;
use crate::real_api::RealApi;

/// The path of the Services of a namespace.
pub const SERVICES: &str = "/api/v1/namespaces/default/services";

/// The version of `discovery.k8s.io` since Kubernetes 1.21.
pub const V1: &str = "/apis/discovery.k8s.io/v1";
/// And before.
pub const V1BETA1: &str = "/apis/discovery.k8s.io/v1beta1";

/// The path of the slices of a namespace, in a version.
#[must_use]
pub fn slices_of(version: &str) -> String {
    format!("{version}/namespaces/default/endpointslices")
}

/// An API server as a test writes to it.
pub trait Writes {
    /// Makes an object.
    fn make(&self, collection: &str, object: Value);

    /// Changes one by a merge patch.
    fn patch(&self, collection: &str, name: &str, patch: &Value);

    /// Deletes one.
    fn remove(&self, collection: &str, name: &str);
}

impl Writes for FakeApi {
    fn make(&self, collection: &str, object: Value) {
        self.create(collection, object);
    }

    fn patch(&self, collection: &str, name: &str, patch: &Value) {
        self.change(collection, name, patch);
    }

    fn remove(&self, collection: &str, name: &str) {
        self.delete(collection, name);
    }
}

impl Writes for RealApi {
    fn make(&self, collection: &str, object: Value) {
        self.ask("POST", collection, Some(("json", &object))).expect("an object that is new");
    }

    fn patch(&self, collection: &str, name: &str, patch: &Value) {
        let path = format!("{collection}/{name}");
        self.ask("PATCH", &path, Some(("merge-patch+json", patch))).expect("an object that can be changed");
    }

    fn remove(&self, collection: &str, name: &str) {
        self.ask("DELETE", &format!("{collection}/{name}"), None).expect("an object that is there");
    }
}

/// A Service with these ClusterIPs and a port 80 of TCP called `http`, and what else `spec` says.
#[must_use]
pub fn service(name: &str, cluster_ips: &[&str], spec: &Value) -> Value {
    let mut all = json!({
        "clusterIP": cluster_ips.first(), "clusterIPs": cluster_ips,
        "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}],
    });
    if let Value::Object(spec) = spec {
        spec.iter().for_each(|(member, value)| all[member] = value.clone());
    }
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"}, "spec": all})
}

/// A slice of a Service's endpoints, each an address and its node, with port 8080 called `http`.
#[must_use]
pub fn slice(name: &str, service: &str, endpoints: &[(&str, &str)]) -> Value {
    let is_v6 = endpoints.first().is_some_and(|(ip, _)| ip.contains(':'));
    let endpoints: Vec<Value> = endpoints.iter().map(|(ip, node)| endpoint(ip, node)).collect();
    json!({
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
        "addressType": if is_v6 { "IPv6" } else { "IPv4" },
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

/// A ready endpoint.
#[must_use]
pub fn endpoint(ip: &str, node: &str) -> Value {
    json!({"addresses": [ip], "conditions": {"ready": true}, "nodeName": node, "targetRef": {"kind": "Pod", "uid": ip}})
}
