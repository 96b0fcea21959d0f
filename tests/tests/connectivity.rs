//! `fabricctl test` in Kubernetes, before the fake API server and a kubelet that is made up: it starts what the pods' specs
//! say as processes of this machine, each with an address of loopback.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_tests::fake_api::{FakeApi, NODES};
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::lab::binaries;
use serde_json::{Value, json};

const NAMESPACES: &str = "/api/v1/namespaces";

/// What the kubelet does with servers on node n2.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnN2 {
    Run,
    /// They run, and nothing comes through to them.
    CutOff,
    /// Their image isn't there.
    NoImage,
}

impl OnN2 {
    /// An address of loopback: tests run side by side.
    fn address(self, host: u8) -> String {
        let net = match self {
            Self::Run => 11,
            Self::CutOff => 12,
            Self::NoImage => 13,
        };
        format!("127.{net}.0.{host}")
    }
}

struct Kubelet {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Kubelet {
    fn start(api: Arc<FakeApi>, on_n2: OnN2, dir: PathBuf) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let thread = std::thread::spawn(move || {
            let mut running: BTreeMap<String, Child> = BTreeMap::new();
            while !ended.load(Ordering::Relaxed) {
                if let Err(error) = look(&api, on_n2, &dir, &mut running) {
                    eprintln!("kubelet: {error:#}");
                }
                std::thread::sleep(Duration::from_millis(50));
            }
            for child in running.values_mut() {
                let _ = child.kill();
                let _ = child.wait();
            }
        });
        Self { end, thread: Some(thread) }
    }
}

impl Drop for Kubelet {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

fn look(api: &FakeApi, on_n2: OnN2, dir: &Path, running: &mut BTreeMap<String, Child>) -> Result<()> {
    for namespace in api.all(NAMESPACES) {
        let namespace = namespace["metadata"]["name"].as_str().context("a name")?.to_owned();
        let services = format!("{NAMESPACES}/{namespace}/services");
        for service in api.all(&services).iter().filter(|service| service["spec"]["clusterIP"].is_null()) {
            let name = service["metadata"]["name"].as_str().context("a name")?;
            api.change(&services, name, &json!({"spec": {"clusterIP": on_n2.address(1)}}));
        }
        let pods = format!("{NAMESPACES}/{namespace}/pods");
        for pod in api.all(&pods).iter().filter(|pod| pod["status"]["phase"].is_null()) {
            let name = pod["metadata"]["name"].as_str().context("a name")?;
            let (node, container) =
                (pod["spec"]["nodeName"].as_str().context("a node")?, &pod["spec"]["containers"][0]);
            let ip = on_n2.address(if node == "n1" { 1 } else { 2 });
            let report = dir.join(name);
            let words = ["command", "args"].iter().flat_map(|part| container[*part].as_array().into_iter().flatten());
            let words = words.filter_map(Value::as_str).map(|word| word.replace("$(POD_IPS)", &ip));
            // The kubelet mounts a file there.
            let words: Vec<String> =
                words.map(|word| word.replace("/dev/termination-log", &report.display().to_string())).collect();
            let mut command = Command::new(binaries::folder()?.join(&words[0]));
            command.args(&words[1..]).stdout(std::process::Stdio::null());
            let status = match (pod["spec"]["restartPolicy"] == "Always", on_n2) {
                (true, OnN2::NoImage) if node == "n2" => {
                    let waiting = json!({"waiting": {"reason": "ErrImagePull", "message": "no such image"}});
                    json!({"phase": "Pending", "containerStatuses": [{"state": waiting}]})
                }
                (true, on_n2) => {
                    if node == "n1" || on_n2 == OnN2::Run {
                        running.insert(format!("{namespace}/{name}"), command.spawn()?);
                    }
                    json!({"phase": "Running", "podIPs": [{"ip": ip}]})
                }
                (false, _) => {
                    let ended = command.status()?;
                    let state =
                        json!({"terminated": {"exitCode": ended.code(), "message": std::fs::read_to_string(report)?}});
                    json!({"phase": if ended.success() { "Succeeded" } else { "Failed" }, "containerStatuses": [{"state": state}]})
                }
            };
            api.change(&pods, name, &json!({"status": status}));
        }
    }
    Ok(())
}

/// Runs the test in a cluster of two nodes; what it leaves is looked at after.
fn run(on_n2: OnN2, more: &[&str]) -> Result<(Output, Arc<FakeApi>)> {
    let dir = tempfile::tempdir()?;
    let api = Arc::new(FakeApi::start(([127, 0, 0, 1], 0).into())?);
    for node in ["n1", "n2"] {
        api.add_node(node, &[]);
        api.change(NODES, node, &json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}}));
    }
    let kubeconfig = api.kubeconfig(dir.path())?;
    let outside = TcpListener::bind("127.0.0.1:0")?;
    let address = outside.local_addr()?.to_string();
    let kubelet = Kubelet::start(api.clone(), on_n2, dir.path().into());
    let output = Command::new(binaries::folder()?.join("fabricctl"))
        .args(["test", "--timeout", "5", "--dns", "localhost", "--outside", &address, "--kubeconfig"])
        .arg(kubeconfig)
        .args(more)
        .output()?;
    drop(kubelet);
    Ok((output, api))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn pods_of_all_nodes_reach_pods_service_name_and_outside_and_nothing_is_left() -> Result<()> {
    let (output, api) = run(OnN2::Run, &["-o", "json"])?;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let steps: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    for from in ["n1", "n2"] {
        let other = if from == "n1" { "pod on n2" } else { "pod on n1" };
        for step in ["pod on the same node", other, "service", "dns", "outside"] {
            let found = steps.iter().find(|found| found["from"] == from && found["step"] == step);
            assert_eq!(found.map(|found| &found["result"]), Some(&json!("ok")), "{step} from {from}: {steps:#?}");
        }
    }
    assert_eq!(api.all(NAMESPACES), Vec::<Value>::new());
    Ok(())
}

#[test]
fn node_whose_pods_are_cut_off_is_named_and_nothing_is_left() -> Result<()> {
    let (output, api) = run(OnN2::CutOff, &[])?;
    let told = text(&output);
    assert_eq!(output.status.code(), Some(4), "{told}");
    assert!(told.contains("FAILED pod on n2 from n1 to 127.12.0.2:8080"), "{told}");
    assert!(!told.contains("FAILED pod on n1"), "{told}");
    assert_eq!(api.all(NAMESPACES), Vec::<Value>::new());
    Ok(())
}

#[test]
fn pod_that_does_not_start_is_told_in_the_clusters_words() -> Result<()> {
    let (output, api) = run(OnN2::NoImage, &["--pod-timeout", "2"])?;
    let told = text(&output);
    assert_eq!(output.status.code(), Some(4), "{told}");
    assert!(told.contains("FAILED server pod from n2: not running after 2 s: ErrImagePull: no such image"), "{told}");
    assert!(told.contains("ok") && told.contains("pod on the same node"), "the rest is tested all the same: {told}");
    assert_eq!(api.all(NAMESPACES), Vec::<Value>::new());
    Ok(())
}
