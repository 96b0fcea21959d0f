//! What is known of NetworkPolicies before an API server: when, of which pods, and that nothing of it is lost.

use std::sync::Arc;

use fabric_core::services::ObjectName;
use fabric_tests::conformance::store::shows;
use fabric_tests::fake_api::FakeApi;
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::policies::{NAMESPACES, namespace, pod, pods_of, policies_of, policy};
use fabricd::kubernetes::client::{ApiError, ApiServer};
use fabricd::policy::watch::{Connections, Sources};
use serde_json::json;
use tempfile::TempDir;

fn fake() -> FakeApi {
    FakeApi::start(([127, 0, 0, 1], 0).into()).expect("a free port")
}

fn watch(api: &FakeApi) -> (Sources, TempDir) {
    let dir = tempfile::tempdir().expect("a folder");
    let server = ApiServer::new(Some(api.kubeconfig(dir.path()).expect("written")));
    (Sources::watch(&Arc::new(server)), dir)
}

/// A namespace with a policy and a pod.
fn shop(api: &FakeApi) {
    api.create(NAMESPACES, namespace("shop", &json!({"team": "a"})));
    api.create(&pods_of("shop"), pod("shop", "web", &["192.0.2.1"], &json!({"app": "web"})));
    api.create(&policies_of("shop"), policy("shop", "closed", &json!({"podSelector": {}})));
}

async fn all_are_known(sources: &mut Sources) {
    shows(&mut sources.policies, "the policies", Option::is_some).await;
    shows(&mut sources.namespaces, "the namespaces", Option::is_some).await;
    shows(&mut sources.pods, "the pods", Option::is_some).await;
    assert_eq!(sources.missing(), None);
}

#[tokio::test]
async fn policies_namespaces_and_pods_are_watched() {
    let api = fake();
    shop(&api);
    let (mut sources, _dir) = watch(&api);
    all_are_known(&mut sources).await;
    let web = ObjectName::new("shop", "web");
    assert_eq!(sources.pods.borrow().as_ref().expect("known").get(&web).expect("there").ports()[0].port, 8080);

    api.change(NAMESPACES, "shop", &json!({"metadata": {"labels": {"team": "b"}}}));
    let team = |team: &'static str| {
        move |all: &Option<fabric_core::policy::sets::Namespaces>| {
            all.as_ref().and_then(|all| all.get(&"shop".into())?.get("team")) == Some(team)
        }
    };
    shows(&mut sources.namespaces, "the new label", team("b")).await;
    api.change(&policies_of("shop"), "closed", &json!({"spec": {"policyTypes": ["Egress"]}}));
    let closed = ObjectName::new("shop", "closed");
    shows(&mut sources.policies, "the other direction", |all| {
        all.as_ref().and_then(|all| all.get(&closed)).is_some_and(|policy| policy.ingress.is_none())
    })
    .await;
    api.change(&pods_of("shop"), "web", &json!({"status": {"phase": "Succeeded"}}));
    shows(&mut sources.pods, "no pod that has ended", |all| all.as_ref().is_some_and(|all| all.is_empty())).await;
}

#[tokio::test]
async fn nothing_is_forgotten_in_an_outage() {
    let api = fake();
    shop(&api);
    let (mut sources, _dir) = watch(&api);
    all_are_known(&mut sources).await;
    api.stop();
    let is_down = |all: &Connections| matches!(all.trouble(), Some(ApiError::Unreachable(_)));
    shows(&mut sources.connection, "the outage", is_down).await;
    assert_eq!(sources.policies.borrow().as_ref().expect("known").len(), 1);
    api.delete(&policies_of("shop"), "closed");
    api.start_again().expect("the same port");
    shows(&mut sources.policies, "no policy", |all| all.as_ref().is_some_and(|all| all.is_empty())).await;
}

#[tokio::test]
async fn without_an_api_server_nothing_is_known() {
    let api = fake();
    api.stop();
    let (mut sources, _dir) = watch(&api);
    shows(&mut sources.connection, "the outage", |all| all.trouble().is_some()).await;
    assert_eq!(sources.missing(), Some("NetworkPolicies"));
}
