//! What is known of network policies before an API server: when, of which pods, and that nothing of it is lost.

use std::sync::Arc;
use std::time::Duration;

use fabric_core::policy::sets::ClusterPolicies;
use fabric_core::services::ObjectName;
use fabric_tests::conformance::store::shows;
use fabric_tests::fake_api::FakeApi;
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::policies::{
    CLUSTER_POLICIES, NAMESPACES, cluster_policy, namespace, pod, pods_of, policies_of, policy,
};
use fabricd::kubernetes::client::{ApiError, ApiServer};
use fabricd::policy::watch::{Connections, Sources};
use serde_json::json;
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

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

/// What a ClusterNetworkPolicy says that denies everything to everybody.
fn denies_all() -> serde_json::Value {
    json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}]})
}

fn has(policies: usize) -> impl Fn(&Option<ClusterPolicies>) -> bool {
    move |all| all.as_ref().is_some_and(|all| all.len() == policies)
}

#[tokio::test]
async fn cluster_policies_are_watched() {
    let api = fake();
    let (mut sources, _dir) = watch(&api);
    shows(&mut sources.cluster_policies, "no policy", has(0)).await;
    api.create(CLUSTER_POLICIES, cluster_policy("closed", &denies_all()));
    shows(&mut sources.cluster_policies, "the policy", has(1)).await;
    api.delete(CLUSTER_POLICIES, "closed");
    shows(&mut sources.cluster_policies, "no policy", has(0)).await;
}

#[tokio::test]
async fn where_cluster_policies_are_no_kind_there_are_none_until_they_are_one() {
    let api = fake();
    shop(&api);
    api.lacks("/apis/policy.networking.k8s.io/v1alpha2");
    let (mut sources, _dir) = watch(&api);
    all_are_known(&mut sources).await;
    shows(&mut sources.cluster_policies, "none", has(0)).await;
    assert!(!sources.awaits_cluster_policies());
    let connection = sources.connection.borrow().clone();
    assert!(connection.trouble().is_none() && connection.cluster_trouble().is_none(), "{connection:?}");
    api.create(CLUSTER_POLICIES, cluster_policy("closed", &denies_all()));
    api.has("/apis/policy.networking.k8s.io/v1alpha2");
    // It is looked for again after a minute at most.
    let known = timeout(Duration::from_secs(180), sources.cluster_policies.wait_for(has(1))).await;
    known.expect("the policy").expect("the watch lives");
}

#[tokio::test]
async fn kind_that_is_away_for_a_moment_is_not_forgotten() {
    let api = fake();
    api.create(CLUSTER_POLICIES, cluster_policy("closed", &denies_all()));
    let (mut sources, _dir) = watch(&api);
    shows(&mut sources.cluster_policies, "the policy", has(1)).await;
    // The watch has to begin anew.
    api.lacks("/apis/policy.networking.k8s.io/v1alpha2");
    api.stop();
    api.start_again().expect("the same port");
    shows(&mut sources.connection, "the outage", |all| all.cluster_trouble().is_some()).await;
    // Meanwhile it is told that there is no such kind.
    sleep(Duration::from_secs(3)).await;
    api.has("/apis/policy.networking.k8s.io/v1alpha2");
    shows(&mut sources.connection, "that it is watched", |all| all.cluster_trouble().is_none()).await;
    assert!(has(1)(&sources.cluster_policies.borrow()));
}

#[tokio::test]
async fn cluster_policies_that_may_not_be_read_hold_up_nothing_and_keep_their_last_value() {
    let api = fake();
    shop(&api);
    api.create(CLUSTER_POLICIES, cluster_policy("closed", &denies_all()));
    api.forbid(CLUSTER_POLICIES);
    let (mut sources, _dir) = watch(&api);
    all_are_known(&mut sources).await;
    let is_refused = |all: &Connections| matches!(all.cluster_trouble(), Some(ApiError::Refused { .. }));
    shows(&mut sources.connection, "the refusal", is_refused).await;
    assert!(!sources.awaits_cluster_policies() && sources.connection.borrow().trouble().is_none());
    let words = sources.connection.borrow().cluster_trouble().map(ToString::to_string).unwrap_or_default();
    assert!(words.contains("kubectl auth can-i list clusternetworkpolicies"), "{words}");
    api.allow(CLUSTER_POLICIES);
    shows(&mut sources.cluster_policies, "the policy", has(1)).await;

    api.forbid(CLUSTER_POLICIES);
    api.stop();
    api.start_again().expect("the same port");
    shows(&mut sources.connection, "the refusal", is_refused).await;
    assert!(has(1)(&sources.cluster_policies.borrow()), "it stays known");
}
