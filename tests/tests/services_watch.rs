//! What is known of Services before an API server: when, in which version, and that nothing of it is lost.

use std::path::Path;
use std::sync::Arc;

use fabric_core::services::ObjectName;
use fabric_core::services::sets::{Services, Slices};
use fabric_tests::conformance::store::shows;
use fabric_tests::fake_api::{FakeApi, NODES};
use fabric_tests::kubernetes::Nodes;
use fabric_tests::real_api::RealApi;
use fabric_tests::services::{SERVICES, V1, V1BETA1, Writes, endpoint, service, slice, slices_of};
use fabricd::kubernetes::client::{ApiError, ApiServer};
use fabricd::services::watch::{Connections, Sources};
use serde_json::json;
use tempfile::TempDir;

/// What watches an API server as node-1.
fn watch(api: &impl Nodes) -> (Sources, TempDir) {
    let dir = tempfile::tempdir().expect("a folder");
    let server = ApiServer::new(Some(api.kubeconfig(dir.path()).expect("written")));
    (Sources::watch(Arc::new(server), &"node-1".parse().expect("a name")), dir)
}

fn fake() -> FakeApi {
    FakeApi::start(([127, 0, 0, 1], 0).into()).expect("a free port")
}

/// The Services, by name, but for the API server's own.
fn names(services: &Option<Services>) -> Vec<&str> {
    services.iter().flat_map(Services::keys).map(ObjectName::name).filter(|name| *name != "kubernetes").collect()
}

/// The endpoints of those Services, by address.
fn ips(slices: &Option<Slices>) -> Vec<String> {
    let slices = slices.iter().flat_map(Slices::values).filter(|slice| slice.service.name() != "kubernetes");
    let mut ips: Vec<String> = slices.flat_map(|slice| &slice.endpoints).map(|e| e.ip.to_string()).collect();
    ips.sort();
    ips
}

/// Waits until these are the Services, by name, and these the endpoints, by address.
async fn knows(sources: &mut Sources, services: &[&str], endpoints: &[&str]) {
    let are = |all: &Option<Services>| all.is_some() && names(all) == services;
    shows(&mut sources.services, &format!("{services:?}"), are).await;
    let are = |all: &Option<Slices>| all.is_some() && ips(all) == endpoints;
    shows(&mut sources.slices, &format!("{endpoints:?}"), are).await;
}

/// The course of a Service before any API server, with slices in a version.
async fn service_comes_changes_and_goes(api: &(impl Writes + Nodes), version: &str) {
    let slices = slices_of(version);
    let mut web = slice("web-1", "web", &[("192.0.2.1", "node-1"), ("192.0.2.2", "node-2")]);
    web["apiVersion"] = json!(version.trim_start_matches("/apis/"));
    api.add_node("node-1", &[]);
    api.make(SERVICES, service("web", &["10.96.0.20"], &json!({})));
    api.make(SERVICES, service("headless", &["None"], &json!({})));
    api.make(&slices, web);
    let (mut sources, _dir) = watch(api);
    knows(&mut sources, &["web"], &["192.0.2.1", "192.0.2.2"]).await;
    shows(&mut sources.node, "the Node", Option::is_some).await;
    assert_eq!(sources.missing(), None);

    let others = [endpoint("192.0.2.1", "node-1"), endpoint("192.0.2.3", "node-3")];
    api.patch(&slices, "web-1", &json!({"endpoints": others}));
    knows(&mut sources, &["web"], &["192.0.2.1", "192.0.2.3"]).await;
    let is_anothers =
        |name: Option<&str>| json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": name}}});
    api.patch(SERVICES, "web", &is_anothers(Some("other")));
    knows(&mut sources, &[], &["192.0.2.1", "192.0.2.3"]).await;
    api.patch(SERVICES, "web", &is_anothers(None));
    knows(&mut sources, &["web"], &["192.0.2.1", "192.0.2.3"]).await;
    api.remove(&slices, "web-1");
    knows(&mut sources, &["web"], &[]).await;
    api.remove(SERVICES, "web");
    knows(&mut sources, &[], &[]).await;
}

#[tokio::test]
async fn services_slices_and_the_own_node_are_watched() {
    service_comes_changes_and_goes(&fake(), V1).await;
}

#[tokio::test]
async fn api_server_without_version_1_is_asked_for_v1beta1() {
    let api = fake();
    api.lacks(V1);
    service_comes_changes_and_goes(&api, V1BETA1).await;
}

#[tokio::test]
async fn api_server_that_is_upgraded_is_asked_for_version_1_and_loses_nothing() {
    let api = fake();
    api.lacks(V1);
    api.make(SERVICES, service("web", &["10.96.0.20"], &json!({})));
    api.make(&slices_of(V1BETA1), slice("web-1", "web", &[("192.0.2.1", "node-1")]));
    let (mut sources, _dir) = watch(&api);
    knows(&mut sources, &["web"], &["192.0.2.1"]).await;
    api.stop();
    api.lacks(V1BETA1);
    // The same objects, by the other version's path.
    api.make(&slices_of(V1), slice("web-1", "web", &[("192.0.2.1", "node-1"), ("192.0.2.2", "node-1")]));
    api.has(V1);
    api.start_again().expect("the same port");
    knows(&mut sources, &["web"], &["192.0.2.1", "192.0.2.2"]).await;
    assert_eq!(sources.missing(), None);
}

#[tokio::test]
async fn nothing_is_known_before_all_was_listed_and_nothing_is_forgotten_in_an_outage() {
    let api = fake();
    let (mut sources, _dir) = watch(&api);
    api.make(SERVICES, service("web", &["10.96.0.20"], &json!({})));
    api.make(&slices_of(V1), slice("web-1", "web", &[("192.0.2.1", "node-1")]));
    knows(&mut sources, &["web"], &["192.0.2.1"]).await;
    shows(&mut sources.node, "no Node", Option::is_some).await;
    assert_eq!(sources.missing(), None);
    api.stop();
    let is_down = |all: &Connections| matches!(all.trouble(), Some(ApiError::Unreachable(_)));
    shows(&mut sources.connection, "the outage", is_down).await;
    knows(&mut sources, &["web"], &["192.0.2.1"]).await;
    api.remove(SERVICES, "web");
    api.start_again().expect("the same port");
    knows(&mut sources, &[], &["192.0.2.1"]).await;
    shows(&mut sources.connection, "the connection", |all| all.trouble().is_none()).await;
}

#[tokio::test]
async fn without_an_api_server_nothing_is_known() {
    let api = fake();
    api.stop();
    let (mut sources, _dir) = watch(&api);
    shows(&mut sources.connection, "the outage", |all| all.trouble().is_some()).await;
    assert_eq!(sources.missing(), Some("Services"));
}

#[tokio::test]
async fn zone_of_the_own_node_is_followed_and_others_are_not() {
    let api = fake();
    api.add_node("node-1", &[]);
    api.add_node("node-2", &[]);
    let (mut sources, _dir) = watch(&api);
    let zone = |zone: &str| json!({"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}});
    api.change(NODES, "node-2", &zone("y"));
    api.change(NODES, "node-1", &zone("x"));
    let facts = shows(&mut sources.node, "a zone", |node| node.as_ref().is_some_and(|node| node.zone.is_some())).await;
    assert_eq!(facts.and_then(|facts| facts.zone).as_deref(), Some("x"));
}

#[tokio::test]
#[ignore = "needs a kube-apiserver, named by KUBE_APISERVER: make api-server builds one"]
async fn before_a_real_api_server() {
    let program = std::env::var_os("KUBE_APISERVER").expect("KUBE_APISERVER names a kube-apiserver");
    let api = RealApi::start(Path::new(&program)).await.expect("it starts");
    let version = if api.ask("GET", V1, None).is_ok() { V1 } else { V1BETA1 };
    service_comes_changes_and_goes(&api, version).await;
}
