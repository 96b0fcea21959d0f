//! The way to the Kubernetes API server: where it is, who we are, and a connection that notices when the other end is
//! gone.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::ServiceBuilder;

/// How long a connection may be silent before the other end's machine is asked whether it is there, how often then, and
/// how many times. A watch has nothing to say for minutes, and nobody tells that a router has forgotten it.
const PROBE_AFTER: Duration = Duration::from_secs(6);
const PROBE_EVERY: Duration = Duration::from_secs(3);
const PROBES: u32 = 3;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(3);

/// A client, by a kubeconfig or else as a pod of the cluster. A pod's token and the authority's certificate are read
/// again as they change. Connects when it is used.
///
/// # Errors
/// When kubeconfig or service account can't be read.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client> {
    let config = match kubeconfig {
        Some(file) => {
            let read = Kubeconfig::read_from(file);
            let read = read.with_context(|| format!("cannot read the kubeconfig {}", file.display()))?;
            let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
            config.with_context(|| format!("cannot use the kubeconfig {}", file.display()))?
        }
        None => Config::incluster().context(
            "cannot use this pod's service account; outside of a cluster, say with --kubeconfig how to reach it",
        )?,
    };
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_keepalive(Some(PROBE_AFTER));
    tcp.set_keepalive_interval(Some(PROBE_EVERY));
    tcp.set_keepalive_retries(Some(PROBES));
    // What was sent and is not acknowledged counts too, which probes don't look at.
    tcp.set_tcp_user_timeout(Some(PROBE_AFTER + PROBE_EVERY * PROBES));
    let tls = config.rustls_https_connector_with_connector(tcp).context("cannot set up TLS to the API server")?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("cannot use the credentials for the API server")?)
        .map_err(tower::BoxError::from)
        .service(HttpClient::builder(TokioExecutor::new()).build(tls));
    Ok(Client::new(service, config.default_namespace))
}
