//! The fabric on `--store kubernetes`: real nodes, pods and packets, and an API server that is told when to be away.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::fake_api::{FakeApi, Fault, NODES};
use fabric_tests::kubernetes::{DUAL_STACK, PREFIX, TAINT, add_dual_stack_node, api_on_underlay, lease_settings};
use fabric_tests::lab::{Families, Lab, Matrix, Node, Pod, Stream, wait_until};
use serde_json::{Value, json};

/// How long anything here may take on a busy machine.
const SOON: Duration = Duration::from_secs(30);

/// A lab whose nodes are Nodes.
struct Cluster {
    api: FakeApi,
    env: Vec<(&'static str, String)>,
    lab: Lab,
}

impl Cluster {
    /// Three nodes, each with a pod, all ready.
    fn start() -> Result<(Self, Vec<Pod>)> {
        let mut lab = Lab::builder().families(Families::Dual).create()?;
        let api = api_on_underlay(&lab)?;
        let mut env = lease_settings(&lab, &api, DUAL_STACK)?;
        env.push(("FABRICD_STARTUP_TAINT", TAINT.to_owned()));
        let nodes: Vec<Arc<Node>> = (0..3).map(|_| lab.boot_node()).collect::<Result<_>>()?;
        let cluster = Self { api, env, lab };
        for node in &nodes {
            cluster.register(node);
            cluster.start_fabricd(node)?;
        }
        nodes.iter().try_for_each(|node| node.wait_ready())?;
        let pods = nodes.iter().map(|node| node.add_pod("a")).collect::<Result<Vec<_>>>()?;
        Ok((cluster, pods))
    }

    /// Makes the Node, as a kubelet and a controller manager do.
    fn register(&self, node: &Node) {
        add_dual_stack_node(&self.api, node);
        let taint = json!({"spec": {"taints": [{"key": TAINT, "effect": "NoSchedule"}]}});
        self.api.change(NODES, &node.name, &taint);
    }

    fn start_fabricd(&self, node: &Node) -> Result<()> {
        let env: Vec<(&str, &str)> = self.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
        node.start_fabricd_with(&[], &env)
    }

    /// Brings the API server back, on the underlay.
    fn bring_back_the_api(&self) -> Result<()> {
        self.lab.underlay().machine.network()?.run(|| self.api.start_again())
    }

    fn node(&self, name: &str) -> Value {
        self.api.get(NODES, name).unwrap_or_default()
    }

    /// Waits until a Node says that its network works.
    fn wait_until_announced(&self, name: &str) -> Result<()> {
        wait_until(&format!("{name} is announced"), SOON, || {
            let node = self.node(name);
            let condition = json!("False") == node["status"]["conditions"][0]["status"];
            let taints = node["spec"]["taints"].as_array().map_or(0, Vec::len);
            ensure!(condition && taints == 0, "{node}");
            Ok(())
        })
    }
}

/// How long until what is wrong with a node is told on its Node: it has to last a while.
const TOLD: Duration = Duration::from_secs(60);

#[test]
fn what_is_wrong_with_a_node_that_was_ready_is_told_on_its_node_with_the_way_out() -> Result<()> {
    let (cluster, pods) = Cluster::start()?;
    let node = &pods[0].node;
    let events = "/api/v1/namespaces/default/events";
    let is_told = |reason: &str, words: &[&str]| {
        wait_until(&format!("an event {reason}"), TOLD, || {
            let all = cluster.api.all(events);
            let has = |event: &&Value| {
                let message = event["message"].as_str().unwrap_or_default();
                event["reason"] == reason && words.iter().all(|word| message.contains(word))
            };
            let event = all.iter().find(has).with_context(|| format!("{all:?}"))?;
            let object = &event["involvedObject"];
            ensure!(
                object == &json!({"apiVersion": "v1", "kind": "Node", "name": node.name, "uid": node.name}),
                "{event}"
            );
            Ok(event["message"].as_str().unwrap_or_default().to_owned())
        })
    };

    // Another network's configuration, which a runtime takes first.
    let other = "/etc/cni/net.d/05-other.conflist";
    fs::write(node.path(other)?, r#"{"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "ptp"}]}"#)?;
    let told = is_told("FabricWarning", &[other, "new pods get that network"])?;
    let fix = told.rsplit("; ").next().context("no fix")?.to_owned();
    let status = || node.exec(&["fabricctl", "status"]).map(|shown| shown.stdout);
    ensure!(status()?.contains(&fix), "{}", status()?);
    node.run(&["sh", "-ec", &fix])?;
    ensure!(!status()?.contains(other), "{}", status()?);

    // A cluster whose network is this node's own as well.
    node.run(&["ip", "address", "add", "10.244.7.1/16", "dev", "eth0"])?;
    is_told("FabricIsNotReady", &["10.244.0.0/16 overlaps 10.244.0.0/16", "this node's underlay"])?;
    node.run(&["ip", "address", "delete", "10.244.7.1/16", "dev", "eth0"])?;
    node.wait_ready()?;

    // Rights that were taken away: the API server takes Events still, and refuses lists and watches.
    let stream = Stream::start(&pods[0], &pods[1])?;
    cluster.api.forbid(NODES);
    // The watch that runs goes on for some minutes; here it ends with the next event.
    cluster.api.set(Fault::BreaksWatches(500));
    cluster.api.change(NODES, "node-3", &json!({"metadata": {"labels": {"news": "one"}}}));
    is_told("FabricStoreRefuses", &["nodes", "kubectl auth can-i"])?;
    let doctor = node.exec(&["fabricctl", "doctor"])?;
    ensure!(doctor.stdout.contains("kubectl auth can-i"), "{doctor:?}");
    ensure!(status()?.contains("kubectl auth can-i"), "{}", status()?);
    node.wait_ready()?;
    cluster.api.set(Fault::None);
    cluster.api.allow(NODES);
    wait_until("the store is connected again", SOON, || {
        let status = node.status()?;
        ensure!(status["store"]["connected"] == true, "{}", status["store"]);
        Ok(())
    })?;
    let report = stream.stop()?;
    ensure!(report.lost == 0, "{report:?}");
    Ok(())
}

fn routes(node: &Node) -> Result<String> {
    node.run(&["ip", "route", "show", "proto", "250"])
}

#[test]
fn nodes_of_kubernetes_reach_each_other_and_outlive_their_api_server() -> Result<()> {
    let (cluster, pods) = Cluster::start()?;
    let [a, b, c] = &pods[..] else { unreachable!("three nodes") };
    let matrix = Matrix::of(&pods)?;
    assert!(matrix.is_perfect(), "{matrix}");
    for pod in &pods {
        cluster.wait_until_announced(&pod.node.name)?;
    }
    // What flannel nodes of the same cluster would go by.
    let annotations = &cluster.node("node-1")["metadata"]["annotations"];
    assert_eq!(annotations[format!("{PREFIX}/public-ip")], a.node.underlay_ip(Family::V4).to_string());
    assert_eq!(annotations[format!("{PREFIX}/public-ipv6")], a.node.underlay_ip(Family::V6).to_string());
    // Annotations, condition and taint, once for each node.
    assert_eq!(cluster.api.writes().len(), 9, "{:?}", cluster.api.writes());

    // The API server goes, and the daemon starts cold from its disk: it repairs and deletes nothing.
    let stream = Stream::start(a, b)?;
    cluster.api.stop();
    a.node.kill_fabricd()?;
    let before = routes(&a.node)?;
    assert!(before.contains("10.244.3.0/24"), "{before}");
    a.node.run(&["ip", "route", "del", "10.244.3.0/24"])?;
    cluster.start_fabricd(&a.node)?;
    wait_until("the route to node-3 is back", SOON, || {
        let now = routes(&a.node)?;
        ensure!(now == before, "{now}");
        Ok(())
    })?;
    wait_until("it says what it goes by", SOON, || {
        let reply = a.node.http_get(9472, "/readyz")?;
        ensure!(reply.status == 503 && reply.body.contains("remembered from disk"), "{} {}", reply.status, reply.body);
        Ok(())
    })?;
    cluster.bring_back_the_api()?;
    a.node.wait_ready()?;
    let report = stream.stop()?;
    assert_eq!((report.lost, report.duplicated, report.refused), (0, 0, 0), "{report:?}");
    assert!(Matrix::of(&pods)?.is_perfect());
    assert_eq!(cluster.api.writes().len(), 9, "a restart writes nothing");

    // A Node that is deleted is nobody's peer; made anew, it is one again, on the same subnets.
    cluster.api.delete(NODES, "node-3");
    wait_until("node-1 forgets node-3", SOON, || {
        let now = routes(&a.node)?;
        ensure!(!now.contains("10.244.3.0/24"), "{now}");
        Ok(())
    })?;
    wait_until("node-3 hands out no address", SOON, || {
        let reply = c.node.http_get(9472, "/readyz")?;
        ensure!(
            reply.status == 503 && reply.body.contains("no IPv4 subnet is assigned"),
            "{} {}",
            reply.status,
            reply.body
        );
        Ok(())
    })?;
    cluster.register(&c.node);
    c.node.wait_ready()?;
    cluster.wait_until_announced("node-3")?;
    wait_until("node-3 is reached again", SOON, || {
        let matrix = Matrix::of(&pods)?;
        ensure!(matrix.is_perfect(), "{matrix}");
        Ok(())
    })?;

    // Whoever erases what a node says finds it said again, and no packet is lost over it.
    let stream = Stream::start(a, b)?;
    let erased = json!({"metadata": {"annotations": {format!("{PREFIX}/kube-subnet-manager"): null}}});
    cluster.api.change(NODES, "node-2", &erased);
    wait_until("node-2 says again what it said", SOON, || {
        let node = cluster.node("node-2");
        ensure!(node["metadata"]["annotations"][format!("{PREFIX}/kube-subnet-manager")] == "true", "{node}");
        Ok(())
    })?;
    stream.wait_for(500, SOON)?;
    let report = stream.stop()?;
    assert_eq!((report.lost, report.duplicated, report.refused), (0, 0, 0), "{report:?}");

    // Cleaned up, it leaves nothing of the lease.
    b.node.stop_fabricd()?;
    let env: Vec<(&str, &str)> = cluster.env.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let mut command = vec!["env".to_owned()];
    command.extend(env.iter().map(|(name, value)| format!("{name}={value}")));
    command.extend(["fabricd".to_owned(), "--cleanup".to_owned()]);
    b.node.run(&command.iter().map(String::as_str).collect::<Vec<_>>())?;
    assert_eq!(cluster.node("node-2")["metadata"]["annotations"], json!({}));
    wait_until("node-1 forgets node-2", SOON, || {
        let now = routes(&a.node)?;
        ensure!(!now.contains("10.244.2.0/24"), "{now}");
        Ok(())
    })
}
