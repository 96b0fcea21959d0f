//! The test in Kubernetes, from wherever a kubeconfig is: a namespace with short-lived pods, a server on each node and then
//! a client on each, which connects to all servers, to a Service, to a name and to the outside.
//!
//! The pods run `fabricctl probe` of fabricd's own image, which every node has, without any privilege. A client's report
//! is its termination message, so that a part of the Pod's status is all that has to be read.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, ListParams, PostParams};
use kube::config::Kubeconfig;
use kube::core::GroupVersionKind;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Instant, sleep};

use super::probe::{Plan, Server};
use super::{Step, TestArgs};

/// The image that the manifests install: a release is built with `FABRICD_IMAGE` (`deploy/release/build`).
pub const IMAGE: &str = match option_env!("FABRICD_IMAGE") {
    Some(image) => image,
    None => concat!("localhost/fabricd:", env!("CARGO_PKG_VERSION")),
};

/// TCP port of the servers.
const PORT: u16 = 8080;
/// How many nodes are tested unless some are named, and how many may be: a report has 4 KiB.
const NODES: usize = 3;
const MOST_NODES: usize = 8;
/// How often a Pod is looked at.
const EVERY: Duration = Duration::from_millis(500);
/// How long deleting the namespace may take.
const REMOVAL: Duration = Duration::from_secs(30);
const SERVICE: &str = "fabric-test";
const REPORT: &str = "/dev/termination-log";

/// The steps and how they went.
///
/// # Errors
/// The API server doesn't answer, or refuses; there is no node; it was interrupted. The namespace is deleted all the same.
pub async fn run(kubeconfig: &Path, args: &TestArgs) -> anyhow::Result<Vec<Step>> {
    let outside = outside(kubeconfig, args.outside.as_deref())?;
    let client = fabricd::kubernetes::client::client(Some(kubeconfig)).await?;
    let all: Api<DynamicObject> = Api::all_with(client.clone(), &kind("Node", "nodes"));
    let listed = all.list(&ListParams::default()).await.context("cannot list the Nodes")?;
    let nodes = choose(&listed.items, &args.cluster.nodes)?;

    let namespaces: Api<DynamicObject> = Api::all_with(client.clone(), &kind("Namespace", "namespaces"));
    let name = format!("fabric-test-{:08x}", fastrand::u32(..));
    let namespace = json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name } });
    let created = namespaces.create(&PostParams::default(), &serde_json::from_value(namespace)?).await;
    created.context("cannot create the namespace of the test")?;
    let cluster = Cluster {
        pods: Api::namespaced_with(client.clone(), &name, &kind("Pod", "pods")),
        services: Api::namespaced_with(client, &name, &kind("Service", "services")),
        namespace: name.clone(),
        nodes,
        outside,
        args,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let steps = tokio::select! {
        steps = cluster.test() => steps,
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
        _ = terminate.recv() => Err(anyhow::anyhow!("interrupted")),
    };
    let deleted = tokio::time::timeout(REMOVAL, namespaces.delete(&name, &DeleteParams::default())).await;
    let deleted = match deleted {
        Ok(Ok(_)) => Ok(format!("namespace {name} is deleted")),
        Ok(Err(error)) => Err(format!("{error}; run: kubectl delete namespace {name}")),
        Err(_) => Err(format!("no answer in {} s; run: kubectl delete namespace {name}", REMOVAL.as_secs())),
    };
    match (steps, deleted) {
        (Ok(mut steps), deleted) => {
            steps.push(Step::new("cleanup", "", deleted));
            Ok(steps)
        }
        (Err(error), Ok(_)) => Err(error),
        (Err(error), Err(left)) => Err(error.context(left)),
    }
}

/// The API server is outside of the pods' network, unless it is a port of this machine.
fn outside(kubeconfig: &Path, given: Option<&str>) -> anyhow::Result<Result<Option<String>, String>> {
    match given {
        Some("off") => return Ok(Ok(None)),
        Some(given) if given.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => {
            return Ok(Ok(Some(given.to_owned())));
        }
        Some(given) => bail!("--outside {given}: pods connect by TCP, so a port is needed, as in 192.0.2.1:443"),
        None => {}
    }
    let config = Kubeconfig::read_from(kubeconfig);
    let config = config.with_context(|| format!("cannot read the kubeconfig {}", kubeconfig.display()))?;
    let context = config.contexts.iter().find(|context| Some(&context.name) == config.current_context.as_ref());
    let wanted = context.and_then(|named| Some(named.context.as_ref()?.cluster.clone()));
    let cluster = config.clusters.iter().find(|cluster| wanted.as_ref().is_none_or(|wanted| cluster.name == *wanted));
    let server = cluster.and_then(|named| named.cluster.as_ref()?.server.clone()).unwrap_or_default();
    let (scheme, rest) = server.split_once("://").unwrap_or(("https", &server));
    let host = rest.split('/').next().unwrap_or_default();
    let is_local = ["127.", "localhost", "[::1]"].iter().any(|local| host.starts_with(local));
    Ok(match host {
        "" => Err("the kubeconfig names no API server; name a destination with --outside".into()),
        _ if is_local => {
            Err(format!("the API server {host} is a port of this machine; name a destination with --outside"))
        }
        host if host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => Ok(Some(host.to_owned())),
        host => Ok(Some(format!("{host}:{}", if scheme == "http" { 80 } else { 443 }))),
    })
}

fn kind(name: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", name), plural)
}

/// The nodes that are wanted, or the first that are ready.
fn choose(listed: &[DynamicObject], wanted: &[String]) -> anyhow::Result<Vec<String>> {
    let name = |node: &DynamicObject| node.metadata.name.clone().unwrap_or_default();
    let is_ready = |node: &&DynamicObject| {
        let conditions = node.data["status"]["conditions"].as_array();
        let ready = conditions.into_iter().flatten().any(|one| one["type"] == "Ready" && one["status"] == "True");
        ready && node.data["spec"]["unschedulable"] != true
    };
    if wanted.len() > MOST_NODES {
        bail!("--nodes: {MOST_NODES} are the most");
    }
    let known: Vec<String> = listed.iter().map(name).collect();
    if let Some(stranger) = wanted.iter().find(|node| !known.contains(node)) {
        bail!("there is no node {stranger}; there are: {}", known.join(" "));
    }
    let chosen = match wanted {
        [] => listed.iter().filter(is_ready).map(name).take(NODES).collect(),
        wanted => wanted.to_vec(),
    };
    if chosen.is_empty() {
        bail!("no node is ready for pods; see: kubectl get nodes");
    }
    Ok(chosen)
}

/// What the test has made.
struct Cluster<'a> {
    pods: Api<DynamicObject>,
    services: Api<DynamicObject>,
    namespace: String,
    nodes: Vec<String>,
    outside: Result<Option<String>, String>,
    args: &'a TestArgs,
}

impl Cluster<'_> {
    async fn test(&self) -> anyhow::Result<Vec<Step>> {
        let mut steps = vec![];
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": SERVICE },
            "spec": { "selector": { "app": SERVICE }, "ports": [{ "port": PORT, "targetPort": PORT }] },
        });
        let create = PostParams::default();
        self.services.create(&create, &serde_json::from_value(service)?).await.context("cannot create the Service")?;
        for (index, node) in self.nodes.iter().enumerate() {
            let args = ["serve", "--name", node, "--listen", "$(POD_IPS)", "--port", &PORT.to_string()];
            self.create_pod(&format!("server-{index}"), node, "Always", &args).await?;
        }
        let mut servers = vec![];
        for (index, node) in self.nodes.iter().enumerate() {
            let name = format!("server-{index}");
            let pod =
                self.until(&name, |pod| pod["status"]["phase"] == "Running" && !addresses(pod).is_empty()).await?;
            match pod {
                Ok(pod) => servers.extend(addresses(&pod).into_iter().map(|ip| (node, ip))),
                Err(reason) => steps.push(at(node, Step::new("server pod", "", Err(reason)))),
            }
        }
        let cluster_ip = self.services.get(SERVICE).await.context("cannot read the Service")?;
        let cluster_ip = cluster_ip.data["spec"]["clusterIP"].as_str().unwrap_or_default().to_owned();
        for (index, node) in self.nodes.iter().enumerate() {
            let plan = serde_json::to_string(&self.plan(node, &servers, &cluster_ip))?;
            self.create_pod(&format!("client-{index}"), node, "Never", &["run", "--plan", &plan, "--report", REPORT])
                .await?;
        }
        for (index, node) in self.nodes.iter().enumerate() {
            let name = format!("client-{index}");
            let done = |pod: &Value| ["Succeeded", "Failed"].iter().any(|phase| pod["status"]["phase"] == *phase);
            match self.until(&name, done).await?.and_then(|pod| report(&pod)) {
                Ok(report) => steps.extend(report),
                Err(reason) => steps.push(at(node, Step::new("client pod", "", Err(reason)))),
            }
        }
        if self.nodes.len() < 2 {
            steps.push(Step::skipped("pod to pod", "", "one node only; name others with --nodes"));
        }
        if let Err(reason) = &self.outside {
            steps.push(Step::skipped("outside", "", reason));
        }
        Ok(steps)
    }

    fn plan(&self, from: &str, servers: &[(&String, String)], cluster_ip: &str) -> Plan {
        let socket = |ip: &str| if ip.contains(':') { format!("[{ip}]:{PORT}") } else { format!("{ip}:{PORT}") };
        let server = |(node, ip): &(&String, String)| {
            let step = if *node == from { "pod on the same node".into() } else { format!("pod on {node}") };
            Server { step, at: socket(ip), name: (*node).clone() }
        };
        let service = Server { step: "service".into(), at: socket(cluster_ip), name: String::new() };
        let has_service = !servers.is_empty() && !["", "None"].contains(&cluster_ip);
        Plan {
            from: from.to_owned(),
            timeout: self.args.timeout,
            servers: servers.iter().map(server).chain(has_service.then_some(service)).collect(),
            dns: Some(self.args.dns.clone().unwrap_or_else(|| format!("{SERVICE}.{}.svc", self.namespace))),
            outside: self.outside.clone().unwrap_or_default(),
        }
    }

    async fn create_pod(&self, name: &str, node: &str, restart: &str, args: &[&str]) -> anyhow::Result<()> {
        let labels = if restart == "Always" { json!({ "app": SERVICE }) } else { json!({}) };
        let ips = json!({ "name": "POD_IPS", "valueFrom": { "fieldRef": { "fieldPath": "status.podIPs" } } });
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": { "name": name, "labels": labels },
            "spec": {
                "nodeName": node, "restartPolicy": restart, "automountServiceAccountToken": false,
                "terminationGracePeriodSeconds": 0,
                // What the strictest PodSecurity level asks for.
                "securityContext": { "runAsNonRoot": true, "runAsUser": 65534, "seccompProfile": { "type": "RuntimeDefault" } },
                "containers": [{
                    "name": "probe", "image": self.args.cluster.image, "imagePullPolicy": "IfNotPresent", "env": [ips],
                    "command": ["fabricctl", "probe"], "args": args,
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "securityContext": { "allowPrivilegeEscalation": false, "capabilities": { "drop": ["ALL"] } },
                }],
            },
        });
        let created = self.pods.create(&PostParams::default(), &serde_json::from_value(pod)?).await;
        created.map(drop).with_context(|| format!("cannot create the pod {name} on {node}"))
    }

    /// A pod when it is as it should be, or why it doesn't get there.
    async fn until(&self, name: &str, is_so: impl Fn(&Value) -> bool) -> anyhow::Result<Result<Value, String>> {
        let end = Instant::now() + Duration::from_secs(self.args.cluster.pod_timeout);
        loop {
            let pod = self.pods.get(name).await.with_context(|| format!("cannot read the pod {name}"))?.data;
            if is_so(&pod) {
                return Ok(Ok(pod));
            }
            if Instant::now() >= end {
                return Ok(Err(format!("not running after {} s: {}", self.args.cluster.pod_timeout, trouble(&pod))));
            }
            sleep(EVERY).await;
        }
    }
}

fn at(node: &str, mut step: Step) -> Step {
    node.clone_into(&mut step.from);
    step
}

fn addresses(pod: &Value) -> Vec<String> {
    let ips = pod["status"]["podIPs"].as_array();
    ips.into_iter().flatten().filter_map(|ip| ip["ip"].as_str()).map(str::to_owned).collect()
}

/// What keeps a pod from running, in the cluster's words.
fn trouble(pod: &Value) -> String {
    let waiting = &pod["status"]["containerStatuses"][0]["state"]["waiting"];
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let conditions = conditions.filter(|one| one["status"] == "False");
    let told = [(&waiting["reason"], &waiting["message"]), (&pod["status"]["reason"], &pod["status"]["message"])];
    let told = told.into_iter().chain(conditions.map(|one| (&one["reason"], &one["message"])));
    let told = told.filter_map(|(reason, message)| {
        Some([Some(reason.as_str()?), message.as_str()].into_iter().flatten().collect::<Vec<_>>().join(": "))
    });
    told.take(1).next().unwrap_or_else(|| {
        format!("phase {}", pod["status"]["phase"].as_str().unwrap_or("unknown, has its node a kubelet that runs?"))
    })
}

/// The client's report, which is its termination message.
fn report(pod: &Value) -> Result<Vec<Step>, String> {
    let terminated = &pod["status"]["containerStatuses"][0]["state"]["terminated"];
    let told = terminated["message"].as_str().unwrap_or_default();
    let reason = terminated["reason"].as_str().map(str::to_owned).unwrap_or_else(|| trouble(pod));
    serde_json::from_str(told).map_err(|_| format!("no report: {reason} {told}").trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, ready: &str) -> DynamicObject {
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
            "status": { "conditions": [{ "type": "Ready", "status": ready }] },
        });
        serde_json::from_value(node).unwrap()
    }

    #[test]
    fn nodes_are_those_that_are_named_or_ready() {
        let nodes = [node("n1", "True"), node("n2", "False"), node("n3", "True")];
        assert_eq!(choose(&nodes, &[]).unwrap(), ["n1", "n3"]);
        assert_eq!(choose(&nodes, &["n2".into()]).unwrap(), ["n2"]);
        assert!(choose(&nodes, &["n4".into()]).unwrap_err().to_string().contains("there are: n1 n2 n3"));
        assert!(choose(&nodes[1..2], &[]).unwrap_err().to_string().contains("kubectl get nodes"));
    }

    #[test]
    fn api_server_is_the_outside_unless_it_is_on_this_machine() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("kubeconfig");
        let told = |server: &str, given| {
            let config = json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "b",
                "clusters": [{"name": "a", "cluster": {"server": "https://192.0.2.9"}}, {"name": "b", "cluster": {"server": server}}],
                "contexts": [{"name": "b", "context": {"cluster": "b", "user": "b"}}], "users": [],
            });
            std::fs::write(&file, config.to_string()).unwrap();
            outside(&file, given).map_err(|error| error.to_string())
        };
        assert_eq!(told("https://192.0.2.10:6443/x", None), Ok(Ok(Some("192.0.2.10:6443".into()))));
        assert_eq!(told("https://api.example.com", None), Ok(Ok(Some("api.example.com:443".into()))));
        assert!(told("https://127.0.0.1:6443", None).unwrap().unwrap_err().contains("--outside"));
        assert_eq!(told("https://192.0.2.10", Some("off")), Ok(Ok(None)));
        assert!(told("https://192.0.2.10", Some("192.0.2.1")).unwrap_err().contains("192.0.2.1:443"));
    }

    #[test]
    fn reason_why_a_pod_does_not_run_is_the_clusters() {
        let waiting = json!({"status": {"phase": "Pending", "containerStatuses": [
            {"state": {"waiting": {"reason": "ErrImagePull", "message": "not found"}}}
        ]}});
        assert_eq!(trouble(&waiting), "ErrImagePull: not found");
        assert_eq!(trouble(&json!({"status": {"phase": "Pending"}})), "phase Pending");
        let failed = json!({"status": {"containerStatuses": [
            {"state": {"terminated": {"reason": "StartError", "message": "no such file"}}}
        ]}});
        assert_eq!(report(&failed), Err("no report: StartError no such file".into()));
    }
}
