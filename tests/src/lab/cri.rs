//! A pod as a kubelet asks for it: containerd's CRI, by a gRPC client with as much of the API as a pod's network needs.
//!
//! The messages are a hand-made part of `runtime.v1` (k8s.io/cri-api, api.proto): a name for each field number that is
//! used. The image of the sandbox is made here from busybox, since a lab has no registry.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::cgroup::Cgroup;
use super::containerd::Containerd;
use super::node::Node;
use super::pod::Pod;

const CONFIG: &str = r#"
version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "fabric.test/pause:1"
restrict_oom_score_adj = true
"#;

/// Where the image is, on the node.
const IMAGE: &str = "/run/pause.tar";

/// Makes it.
const MAKE_IMAGE: &str = include_str!("image.sh");

/// How long containerd may take for a pod.
const PATIENCE: Duration = Duration::from_secs(60);

/// The CRI of a node's containerd.
#[derive(Debug)]
pub struct Cri {
    node: Arc<Node>,
    _containerd: Containerd,
    cgroup: Cgroup,
}

impl Cri {
    /// Starts containerd with an image for sandboxes.
    ///
    /// # Errors
    /// It doesn't start, or the image can't be made.
    pub fn start(node: &Arc<Node>) -> Result<Self> {
        let folder = node.path("/etc/containerd")?;
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("config.toml"), CONFIG)?;
        let containerd = Containerd::start(node)?;
        node.run(&["sh", "-c", MAKE_IMAGE, "sh", "fabric.test/pause:1", IMAGE])?;
        node.run(&["ctr", "-n", "k8s.io", "images", "import", IMAGE])?;
        Ok(Self { node: Arc::clone(node), _containerd: containerd, cgroup: Cgroup::of(node)? })
    }

    /// Runs a pod's sandbox (`RunPodSandbox`): what has the pod's network.
    ///
    /// # Errors
    /// containerd's own.
    pub fn run(&self, name: &str) -> Result<Sandbox> {
        let metadata = PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "default".into() };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            linux: Some(LinuxPodSandboxConfig { cgroup_parent: self.cgroup.name().to_owned() }),
        };
        let request = RunPodSandboxRequest { config: Some(config) };
        let answer: RunPodSandboxResponse = self.call("RunPodSandbox", request)?;
        let id = answer.pod_sandbox_id;
        let tasks = self.node.run(&["ctr", "-n", "k8s.io", "task", "ls"])?;
        let task = tasks.lines().find(|line| line.starts_with(&id)).context("the sandbox has no task")?;
        let pid = task.split_whitespace().nth(1).context("a task without a process")?;
        let pod = self.node.adopt_pod(name, &format!("/proc/{pid}/ns/net"))?;
        Ok(Sandbox { id, pod })
    }

    /// Stops and removes it, as a kubelet does when a pod is deleted.
    ///
    /// # Errors
    /// containerd's own.
    pub fn remove(&self, sandbox: Sandbox) -> Result<()> {
        let request = PodSandboxRequest { pod_sandbox_id: sandbox.id };
        let _: Empty = self.call("StopPodSandbox", request.clone())?;
        let _: Empty = self.call("RemovePodSandbox", request)?;
        sandbox.pod.forget()
    }

    fn call<Q, A>(&self, method: &str, request: Q) -> Result<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let socket = self.node.path("/run/containerd/containerd.sock")?;
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display()))?.timeout(PATIENCE);
        let path: PathAndQuery = format!("/runtime.v1.RuntimeService/{method}").parse()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let mut client: Grpc<Channel> = Grpc::new(endpoint.connect().await?);
            client.ready().await?;
            let answer = client.unary(tonic::Request::new(request), path, ProstCodec::<Q, A>::default()).await;
            Ok(answer
                .with_context(|| format!("{method} on {}: {}", self.node.name, self.node.log_tail("containerd")))?
                .into_inner())
        })
    }
}

/// A pod of the CRI.
#[derive(Clone, Debug)]
pub struct Sandbox {
    id: String,
    /// The pod, as the lab knows it.
    pub pod: Pod,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<PodSandboxMetadata>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RunPodSandboxResponse {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSandboxRequest {
    #[prost(string, tag = "1")]
    pod_sandbox_id: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Empty {}
