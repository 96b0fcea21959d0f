//! The Kubernetes API server: where it is, who we are, a connection that notices when the other end is gone, and what
//! its refusals mean.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use axum::http::Uri;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::api::GetParams;
use kube::client::ConfigExt as _;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::Request;
use kube::{Client, Config};
use serde::de::IgnoredAny;
use tokio::time::error::Elapsed;
use tokio::time::timeout;
use tower::ServiceBuilder;

use super::addresses::Addresses;
use crate::errors::chain;

/// How long a connection may be silent before the other end's machine is asked whether it is there, how often then, and
/// how many times. A watch has nothing to say for minutes, and nobody tells that a router has forgotten it.
const PROBE_AFTER: Duration = Duration::from_secs(6);
const PROBE_EVERY: Duration = Duration::from_secs(3);
const PROBES: u32 = 3;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(3);

/// How long one of several addresses may take to answer before the next is tried.
const ANSWER: Duration = Duration::from_secs(5);

/// A client, by a kubeconfig or else as a pod of the cluster. A pod's token and the authority's certificate are read
/// again as they change. Connects when it is used.
///
/// # Errors
/// When kubeconfig or service account can't be read.
pub async fn client(kubeconfig: Option<&Path>) -> anyhow::Result<Client> {
    connect(config(kubeconfig, false).await?)
}

/// Who we are, and where the API server is. A pod needs no address of it where others are known.
async fn config(kubeconfig: Option<&Path>, others_are_known: bool) -> anyhow::Result<Config> {
    match kubeconfig {
        Some(file) => {
            let read = Kubeconfig::read_from(file);
            let read = read.with_context(|| format!("cannot read the kubeconfig {}", file.display()))?;
            let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
            config.with_context(|| format!("cannot use the kubeconfig {}", file.display()))
        }
        None => match Config::incluster() {
            Err(_) if others_are_known => Config::incluster_dns(),
            other => other,
        }
        .context("cannot use this pod's service account; outside of a cluster, say with --kubeconfig how to reach it"),
    }
}

fn connect(config: Config) -> anyhow::Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT));
    tcp.set_keepalive(Some(PROBE_AFTER));
    tcp.set_keepalive_interval(Some(PROBE_EVERY));
    tcp.set_keepalive_retries(Some(PROBES));
    // What was sent and is not acknowledged counts too, which probes don't look at.
    tcp.set_tcp_user_timeout(Some(PROBE_AFTER + PROBE_EVERY * PROBES));
    let url = config.cluster_url.clone();
    let tls = config.rustls_https_connector_with_connector(tcp).context("cannot set up TLS to the API server")?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().context("cannot use the credentials for the API server")?)
        .map_err(move |error| tower::BoxError::from(Unanswered::new(&url, &error)))
        .service(HttpClient::builder(TokioExecutor::new()).build(tls));
    Ok(Client::new(service, config.default_namespace))
}

/// Why the API server did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// It doesn't answer, or can't do anything at the moment. Whether a write happened is not known.
    #[error("cannot reach the API server of Kubernetes: {0}")]
    Unreachable(String),
    /// It answers, and refuses.
    #[error("the API server of Kubernetes refused to {verb}: {reason}")]
    Refused {
        /// What was asked for, by the word that rights are granted by: `list`, `watch`, `patch`.
        verb: &'static str,
        /// What it said, and where a right is missing, what gives it.
        reason: String,
    },
}

impl ApiError {
    /// What an answer, or none, means.
    #[must_use]
    pub fn new(verb: &'static str, error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 403 => {
                Self::Refused { verb, reason: with_way_out(verb, &status.message) }
            }
            kube::Error::Api(status) if status.code < 500 && status.code != 429 => {
                Self::Refused { verb, reason: status.message.clone() }
            }
            kube::Error::Api(status) => Self::Unreachable(status.message.clone()),
            error => Self::Unreachable(match root_of(error).downcast_ref() {
                Some(unanswered) => Unanswered::with_way_out(unanswered),
                None => root_of(error).to_string(),
            }),
        }
    }
}

/// Nobody answers where the API server was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{url}: {reason}")]
struct Unanswered {
    url: Uri,
    reason: String,
}

impl Unanswered {
    /// What is said where nothing is heard in time.
    const SILENT: &str = "it does not answer";

    fn new(url: &Uri, error: &(dyn Error + 'static)) -> Self {
        let root = root_of(error);
        // The time of an attempt to connect ends by an error that says `deadline has elapsed`.
        let is_late = root
            .downcast_ref()
            .is_some_and(|error: &io::Error| error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none());
        let is_late = is_late || root.is::<Elapsed>();
        let reason = if is_late { Self::SILENT.to_owned() } else { root.to_string() };
        Self { url: url.clone(), reason }
    }

    /// With the command that shows whether it is so, and what gives other addresses.
    fn with_way_out(&self) -> String {
        format!("{self}; {}", way_out(&self.url))
    }
}

/// What can be done where the API server doesn't answer at an address.
fn way_out(url: &Uri) -> String {
    format!("does it answer this node? curl -k {url}version; --api-server gives other addresses of it")
}

/// The words of RBAC, `User "u" cannot list resource "nodes" in API group "" at the cluster scope`, with the commands by
/// which the right is given back, and by which one sees that it is there. Words of others stay as they are.
fn with_way_out(verb: &str, message: &str) -> String {
    let quoted = |before: &str| message.split_once(before)?.1.split_once('"').map(|(value, _)| value);
    let (Some(user), Some(resource), Some(group)) = (quoted("User \""), quoted("resource \""), quoted("API group \""))
    else {
        return message.to_owned();
    };
    let group = if group.is_empty() { String::new() } else { format!(".{group}") };
    format!(
        "{message}; apply the manifests or the chart that fabricd was installed with again, then see: \
         kubectl auth can-i {verb} {resource}{group} --as={user}"
    )
}

/// What an error says at its root: `Connection refused (os error 111)` lies three causes deep.
fn root_of<'a>(error: &'a (dyn Error + 'static)) -> &'a (dyn Error + 'static) {
    let mut root = error;
    while let Some(deeper) = root.source() {
        root = deeper;
    }
    root
}

/// Asks for the version, which everybody may see. Whatever else is said, somebody is there.
async fn answer(url: &Uri, client: &Client) -> Result<(), Unanswered> {
    let request = Request::new("").get("version", &GetParams::default());
    let request = request.map_err(|error| Unanswered::new(url, &error))?;
    match timeout(ANSWER, client.request::<IgnoredAny>(request)).await {
        Err(elapsed) => Err(Unanswered::new(url, &elapsed)),
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => match ApiError::new("get", &error) {
            ApiError::Refused { .. } => Ok(()),
            ApiError::Unreachable(_) => Err(match root_of(&error).downcast_ref::<Unanswered>() {
                Some(unanswered) => unanswered.clone(),
                None => Unanswered::new(url, &error),
            }),
        },
    }
}

/// How the API server is reached.
#[derive(Default)]
struct Connection {
    client: Option<Client>,
    /// Where it is, or was asked last.
    url: Option<Uri>,
}

/// The API server, for all that read and write there over one connection.
pub struct ApiServer {
    kubeconfig: Option<PathBuf>,
    addresses: Addresses,
    connection: Mutex<Connection>,
    /// Held by who looks for an address that answers: the others wait for what it finds.
    looking: tokio::sync::Mutex<()>,
}

impl ApiServer {
    /// The one that a kubeconfig names, or else the one of the cluster that this pod is in.
    #[must_use]
    pub fn new(kubeconfig: Option<PathBuf>) -> Self {
        Self { kubeconfig, addresses: Addresses::default(), connection: Mutex::default(), looking: Default::default() }
    }

    /// The same, which may be reached at other addresses too.
    #[must_use]
    pub fn at(self, addresses: Addresses) -> Self {
        Self { addresses, ..self }
    }

    /// Where else it may be reached.
    #[must_use]
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The client, made when it is first needed: a service account may come later than the daemon. Of several addresses
    /// the first that answers is taken.
    ///
    /// # Errors
    /// [`ApiError::Unreachable`] when kubeconfig or service account can't be read, or none of several addresses answers.
    pub async fn client(&self) -> Result<Client, ApiError> {
        let _looking = self.looking.lock().await;
        if let Some(client) = self.held().client.clone() {
            return Ok(client);
        }
        let (url, made) = self.find().await.map_err(|error| ApiError::Unreachable(chain(&error)))?;
        let mut held = self.held();
        held.url = Some(url);
        Ok(held.client.insert(made).clone())
    }

    /// It takes requests, and says nothing for too long.
    #[must_use]
    pub fn silent(&self) -> ApiError {
        let reason = Unanswered::SILENT.to_owned();
        ApiError::Unreachable(match self.held().url.clone() {
            Some(url) => Unanswered { url, reason }.with_way_out(),
            None => reason,
        })
    }

    async fn find(&self) -> anyhow::Result<(Uri, Client)> {
        let config = config(self.kubeconfig.as_deref(), self.addresses.are_some()).await?;
        let mut all = self.addresses.all(&config);
        if all.len() <= 1 {
            let config = all.pop().unwrap_or(config);
            return Ok((config.cluster_url.clone(), connect(config)?));
        }
        let first = way_out(&all[0].cluster_url);
        let mut unanswered = vec![];
        for config in all {
            let url = config.cluster_url.clone();
            let client = connect(config)?;
            match answer(&url, &client).await {
                Ok(()) => return Ok((url, client)),
                Err(error) => unanswered.push(error.to_string()),
            }
        }
        anyhow::bail!("none of its addresses answers: {}; {first}", unanswered.join(", "))
    }

    /// Reads anew how the API server is reached, before the next request. What is under way goes on.
    pub fn reconnect(&self) {
        self.held().client = None;
    }

    fn held(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    /// As the API server of Kubernetes 1.37 says it.
    fn forbidden(message: &str) -> ApiError {
        let status = Status::failure(message, "Forbidden").with_code(403);
        ApiError::new("list", &kube::Error::Api(Box::new(status)))
    }

    #[tokio::test]
    async fn kubeconfig_that_cannot_be_read_tells_its_cause_once() {
        let error = client(Some(Path::new("/nowhere/kubeconfig"))).await.err().expect("there is none");
        let told = chain(&error);
        assert!(told.starts_with("cannot read the kubeconfig /nowhere/kubeconfig: "), "{told}");
        assert_eq!(told.matches("No such file or directory").count(), 1, "{told}");
    }

    #[test]
    fn right_that_is_missing_is_told_with_the_command_that_shows_it() {
        let user = "system:serviceaccount:fabric-system:fabricd";
        for (resource, group, asked) in
            [("nodes", "", "nodes"), ("endpointslices", "discovery.k8s.io", "endpointslices.discovery.k8s.io")]
        {
            let said = format!(
                "{resource} is forbidden: User \"{user}\" cannot list resource \"{resource}\" in API group \"{group}\" at \
                 the cluster scope"
            );
            let told = forbidden(&said).to_string();
            assert!(
                told.contains(&said) && told.ends_with(&format!("kubectl auth can-i list {asked} --as={user}")),
                "{told}"
            );
        }
        assert_eq!(forbidden("quota").to_string(), "the API server of Kubernetes refused to list: quota");
    }
}
