//! ClusterNetworkPolicies: tiers decide in their order, also about connections that are open, and the kind may come later.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::policy::Conn;
use fabric_tests::lab::{Node, Pod, wait_until};
use fabric_tests::policies::{CLUSTER_POLICIES, NAMESPACES, cluster_policy, namespace, policies_of, policy};
use serde_json::{Value, json};

use crate::drops::told;
use crate::{Cluster, Open, PORTS, SOON, Server, connects};

/// A kind that isn't there is looked for again after a minute at most.
const LATER: Duration = Duration::from_secs(180);

/// What the pods of namespace `x` may get.
fn of_x(tier: &str, rules: &Value) -> Value {
    json!({"tier": tier, "priority": 10, "subject": {"namespaces": {"matchLabels": {"ns": "x"}}}, "ingress": rules})
}

fn from(action: &str, space: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {"matchLabels": {"ns": space}}}]})
}

fn from_all(action: &str) -> Value {
    json!({"action": action, "from": [{"namespaces": {}}]})
}

/// Two nodes and the namespaces `x` and `y`: a database in `x`, and a client in each, the one of `y` on the other node.
struct Pods {
    cluster: Cluster,
    db: Pod,
    near: Pod,
    far: Pod,
    _server: Server,
}

impl Pods {
    fn start(before: impl FnOnce(&Cluster)) -> Result<Self> {
        let cluster = Cluster::start(2)?;
        for space in ["x", "y"] {
            cluster.api.create(NAMESPACES, namespace(space, &json!({"ns": space})));
        }
        before(&cluster);
        cluster.nodes.iter().try_for_each(|node| cluster.start_fabricd(node))?;
        let db = cluster.add_pod(&cluster.nodes[0], "x", "db")?;
        let near = cluster.add_pod(&cluster.nodes[0], "x", "near")?;
        let far = cluster.add_pod(&cluster.nodes[1], "y", "far")?;
        let server = Server::start(&db)?;
        Ok(Self { cluster, db, near, far, _server: server })
    }

    fn here(&self) -> &Node {
        &self.cluster.nodes[0]
    }

    /// Waits until these are who reaches the database, in both families.
    fn reach(&self, what: &str, near: bool, far: bool, patience: Duration) -> Result<()> {
        wait_until(what, patience, || {
            for (pod, may) in [(&self.near, near), (&self.far, far)] {
                for at in [0, 1] {
                    let (src, dst) = (pod.ips()[at], self.db.ips()[at]);
                    for protocol in [6, 17] {
                        let conn = Conn { src, dst, protocol, port: PORTS[0] };
                        let seen = connects(pod, &conn)?;
                        ensure!(seen == may, "{} {conn:?}: {seen}", pod.name());
                    }
                }
            }
            Ok(())
        })
    }

    fn set(&self, name: &str, rules: &Value) {
        self.cluster.api.change(CLUSTER_POLICIES, name, &json!({"spec": {"ingress": rules}}));
    }
}

#[test]
fn tiers_decide_in_their_order_and_cut_connections_that_are_open() -> Result<()> {
    let pods = Pods::start(|cluster| {
        cluster.api.create(CLUSTER_POLICIES, cluster_policy("last", &of_x("Baseline", &json!([from_all("Deny")]))));
    })?;
    let api = &pods.cluster.api;
    pods.reach("the baseline denies", false, false, SOON)?;
    let from_y =
        json!({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"ns": "y"}}}]}]});
    api.create(&policies_of("x"), policy("x", "from-y", &from_y));
    pods.reach("a NetworkPolicy comes before it", false, true, SOON)?;
    let mut open = Open::between(&pods.far, &pods.db, 0)?;
    assert!(open.arrives()?);

    api.create(CLUSTER_POLICIES, cluster_policy("first", &of_x("Admin", &json!([from("Deny", "y")]))));
    wait_until("the open connection is cut", SOON, || {
        ensure!(!open.arrives()?, "it goes on");
        Ok(())
    })?;
    pods.reach("Admin comes before both", false, false, SOON)?;

    // Who asks is told by which rule.
    let (far, db) = (pods.far.ips()[0].to_string(), pods.db.ips()[0].to_string());
    let (code, path) = told(pods.here(), &["explain", &far, &db, "--port", "8080"])?;
    let words = path.to_string();
    assert_eq!(code, Some(4), "{path:#}");
    assert!(
        words.contains("ingress of") && words.contains("dropped by rule 0 of ClusterNetworkPolicy first (Admin)"),
        "{path:#}"
    );
    assert!(words.contains("kubectl patch clusternetworkpolicy first --type=json"), "{path:#}");
    let seen = told(pods.here(), &["policy"])?.1;
    let rules = seen["rules"].as_array().context("rules")?;
    let denies = rules.iter().find(|rule| rule["tier"] == "Admin" && rule["action"] == "Deny").context("the rule")?;
    assert_eq!((&denies["policies"], &denies["rule"]), (&json!(["first"]), &json!(0)), "{seen:#}");
    assert!(denies["packets"].as_u64() > Some(0), "{seen:#}");

    pods.cluster.api.change(
        CLUSTER_POLICIES,
        "first",
        &json!({"spec": {"ingress": [from("Accept", "x"), from("Pass", "y"), from_all("Deny")]}}),
    );
    wait_until("it goes on: Pass leaves it to the NetworkPolicy", SOON, || {
        ensure!(open.arrives()?, "it is cut");
        Ok(())
    })?;
    pods.reach("Accept is final, whatever the NetworkPolicy isolates", true, true, SOON)?;
    wait_until("rules that deny are counted as such", SOON, || {
        let metrics = pods.here().http_get(9472, "/metrics")?.body;
        ensure!(metrics.contains("Admin Deny: ClusterNetworkPolicy first ingress rule 2"), "{metrics}");
        assert!(!metrics.contains("Admin Pass") && !metrics.contains("Admin Accept"), "these drop nothing: {metrics}");
        Ok(())
    })?;
    api.delete(&policies_of("x"), "from-y");
    pods.reach("without it Pass goes down to the baseline", true, false, SOON)?;
    wait_until("the open connection is cut again", SOON, || {
        ensure!(!open.arrives()?, "it goes on");
        Ok(())
    })?;

    // A rule that isn't understood fails closed, and is told where its author looks.
    pods.set("last", &json!([{"action": "Pass", "from": [{"serviceAccounts": {}}]}]));
    pods.set("first", &json!([]));
    pods.reach("a rule that is not understood denies", false, false, SOON)?;
    let seen = told(pods.here(), &["policy"])?.1;
    assert!(seen["warnings"].to_string().contains("ClusterNetworkPolicy last: spec.ingress[0].from[0]"), "{seen:#}");
    wait_until("an Event on the policy, once for both nodes", SOON, || {
        let events = api.all("/api/v1/namespaces/default/events");
        let of_policy = |event: &&Value| event["involvedObject"]["kind"] == "ClusterNetworkPolicy";
        let all: Vec<&Value> = events.iter().filter(of_policy).collect();
        let [event] = all.as_slice() else { anyhow::bail!("{all:?}") };
        ensure!(event["involvedObject"]["name"] == "last" && event["involvedObject"]["namespace"].is_null(), "{event}");
        Ok(())
    })
}

#[test]
fn cluster_policies_hold_once_their_kind_is_defined_and_nothing_waits_for_it() -> Result<()> {
    let version = "/apis/policy.networking.k8s.io/v1alpha2";
    let pods = Pods::start(|cluster| cluster.api.lacks(version))?;
    pods.reach("nothing waits for a kind that isn't there", true, true, SOON)?;
    let seen = told(pods.here(), &["policy"])?.1;
    assert_eq!(seen["warnings"], json!([]), "a cluster without the kind is as good as any");
    pods.cluster.api.create(CLUSTER_POLICIES, cluster_policy("first", &of_x("Admin", &json!([from("Deny", "y")]))));
    pods.cluster.api.has(version);
    pods.reach("the policy holds", true, false, LATER)?;

    // Without the right to read them what was read stays applied, and a warning says what is missing.
    pods.cluster.api.forbid(CLUSTER_POLICIES);
    pods.cluster.api.stop();
    pods.cluster._lab.underlay().machine.network()?.run(|| pods.cluster.api.start_again())?;
    wait_until("the missing right is told", SOON, || {
        let seen = told(pods.here(), &["policy"])?.1;
        let words = seen["warnings"].to_string();
        ensure!(words.contains("kubectl auth can-i list clusternetworkpolicies"), "{words}");
        Ok(())
    })?;
    pods.reach("what was read stays applied", true, false, SOON)
}
