//! What is known of Services before an API server: when, in which version, and that nothing of it is lost.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::services::ObjectName;
use fabric_core::services::sets::{Services, Slices};
use fabric_tests::conformance::store::shows;
use fabric_tests::fake_api::{FakeApi, Fault, NODES};
use fabric_tests::kubernetes::Nodes;
use fabric_tests::real_api::RealApi;
use fabric_tests::services::{SERVICES, V1, V1BETA1, Writes, endpoint, service, slice, slices_of};
use fabricd::kubernetes::addresses::{Addresses, FILE, parse_url};
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
async fn api_server_that_does_not_answer_is_named_with_a_command_that_shows_whether_it_does() {
    let api = fake();
    let at = format!("http://{}/", api.address());
    let curl = |command: String| async move {
        let words: Vec<&str> = command.split(' ').collect();
        let done = tokio::process::Command::new(words[0]).args(&words[1..]).output().await.expect("curl runs");
        done.status.success()
    };
    api.stop();
    let (mut sources, _dir) = watch(&api);
    let outage = shows(&mut sources.connection, "the outage", |all| all.trouble().is_some()).await;
    let told = outage.trouble().expect("an outage").to_string();
    assert!(told.contains(&format!("{at}: Connection refused")), "{told}");
    let command = told.split("answer this node? ").nth(1).and_then(|rest| rest.split(';').next()).expect("a command");
    assert_eq!(command, format!("curl -k {at}version"));
    assert!(!curl(command.to_owned()).await);
    api.start_again().expect("the same port");
    assert!(curl(command.to_owned()).await);
    shows(&mut sources.connection, "the connection", |all| all.trouble().is_none()).await;
    // It takes requests, and says nothing.
    api.set(Fault::Hangs);
    api.bookmark();
    tokio::time::pause();
    let silent = |all: &Connections| {
        all.trouble().is_some_and(|error| error.to_string().contains(&format!("{at}: it does not answer; ")))
    };
    let noticed = tokio::time::timeout(Duration::from_secs(600), sources.connection.wait_for(silent)).await;
    assert!(noticed.is_ok(), "no silence was noticed");
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

/// The kubeconfig names an address at which nobody answers, as the API server's ClusterIP is before anybody translates it.
#[tokio::test]
async fn api_server_is_found_at_an_address_that_is_given_or_was_kept_and_its_endpoints_are_kept() {
    let (api, nobody, dir) = (fake(), fake(), tempfile::tempdir().expect("a folder"));
    nobody.stop();
    let (kubeconfig, file) = (nobody.kubeconfig(dir.path()).expect("written"), dir.path().join(FILE));
    let watch = |given: &[&str]| {
        let given = given.iter().map(|url| parse_url(url).expect("a URL")).collect();
        let server = ApiServer::new(Some(kubeconfig.clone())).at(Addresses::new(given, dir.path()));
        Sources::watch(Arc::new(server), &"node-1".parse().expect("a name"))
    };
    let here = api.address().to_string();
    api.make(SERVICES, service("web", &["10.96.0.20"], &json!({})));
    api.make(&slices_of(V1), slice("web-1", "web", &[("192.0.2.1", "node-1")]));

    let mut sources = watch(&["http://127.0.0.1:1"]);
    let is_told = |all: &Connections| all.trouble().is_some_and(|error| error.to_string().contains("127.0.0.1:1"));
    shows(&mut sources.connection, "which addresses don't answer", is_told).await;
    let mut sources = watch(&["http://127.0.0.1:1", &format!("http://{here}")]);
    knows(&mut sources, &["web"], &["192.0.2.1"]).await;
    assert!(!file.exists(), "the Service kubernetes has no endpoints yet");

    std::fs::write(&file, json!([here]).to_string()).expect("written");
    let mut sources = watch(&[]);
    knows(&mut sources, &["web"], &["192.0.2.1"]).await;
    let mut own = slice("kubernetes", "kubernetes", &[("192.0.2.10", "node-1"), ("192.0.2.11", "node-2")]);
    own["ports"] = json!([{"name": "https", "port": 6443, "protocol": "TCP"}]);
    api.make(&slices_of(V1), own);
    let kept = || std::fs::read_to_string(&file).unwrap_or_default();
    let written = async {
        while kept() != r#"["192.0.2.10:6443","192.0.2.11:6443"]"# {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), written).await.unwrap_or_else(|_| panic!("{}", kept()));
}
