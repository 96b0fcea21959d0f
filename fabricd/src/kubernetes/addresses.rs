//! [`Addresses`]: where the API server may be reached, beside the one address that kubeconfig or pod know.
//!
//! A pod knows the API server by a Service's address (`kubernetes.default`), and on a node without kube-proxy nobody
//! translates that before fabricd does. So they are tried in turn: those of `--api-server`, then that of the kubeconfig or of
//! `KUBERNETES_SERVICE_HOST`, then those of the Service's endpoints when they were seen last, which are kept in a file. The
//! API server has to prove by its certificate that it is who was asked for, wherever the address comes from.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::http::Uri;
use fabric_core::services::ObjectName;
use fabric_core::services::model::Slice;
use fabric_core::services::sets::{Slices, of_service};
use kube::Config;
use tokio::sync::watch::Receiver;
use tracing::{info, warn};

use crate::atomic_file::replace;

/// The file in the state directory.
pub const FILE: &str = "api-servers.json";

/// The API server's own Service, and what its port is called.
const SERVICE: (&str, &str) = ("default", "kubernetes");
const PORT: &str = "https";

/// Where else the API server may be reached.
#[derive(Clone, Debug, Default)]
pub struct Addresses {
    /// Those to try first.
    pub given: Vec<Uri>,
    /// Where those that were seen are kept.
    pub file: Option<PathBuf>,
}

impl Addresses {
    /// Those of `--api-server`, and those kept in this state directory.
    #[must_use]
    pub fn new(given: Vec<Uri>, state_dir: &Path) -> Self {
        Self { given, file: Some(state_dir.join(FILE)) }
    }

    /// Whether there are others than that of the kubeconfig.
    #[must_use]
    pub fn are_some(&self) -> bool {
        !self.given.is_empty() || !self.remembered().is_empty()
    }

    /// How the API server is reached at each of them, that of `config` included, in the order in which they are tried. Where
    /// certificates aren't checked nothing is sent to an address that was only seen.
    #[must_use]
    pub fn all(&self, config: &Config) -> Vec<Config> {
        let scheme = config.cluster_url.scheme_str().unwrap_or("https");
        let seen = if config.accept_invalid_certs { vec![] } else { self.remembered() };
        let seen = seen.into_iter().filter_map(|at| format!("{scheme}://{at}/").parse::<Uri>().ok());
        let mut urls: Vec<Uri> = vec![];
        for url in self.given.iter().cloned().chain([config.cluster_url.clone()]).chain(seen) {
            if !urls.contains(&url) {
                urls.push(url);
            }
        }
        let at = |url| {
            let mut config = config.clone();
            config.cluster_url = url;
            config
        };
        urls.into_iter().map(at).collect()
    }

    /// Those that were seen last; none where that isn't known.
    #[must_use]
    pub fn remembered(&self) -> Vec<SocketAddr> {
        let text = self.file.as_ref().and_then(|file| fs::read_to_string(file).ok());
        text.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// Keeps those that the Service `kubernetes` has, whenever they change, until the slices end. One without any, as while
    /// all API servers start, is no reason to forget them.
    pub async fn remember(self, mut slices: Receiver<Option<Slices>>) {
        let Some(file) = self.file.clone() else { return };
        let mut known = self.remembered();
        while slices.changed().await.is_ok() {
            let seen = slices.borrow_and_update().as_ref().map(of_api_servers).unwrap_or_default();
            if seen.is_empty() || seen == known {
                continue;
            }
            let (to, text) = (file.clone(), serde_json::json!(seen).to_string());
            match tokio::task::spawn_blocking(move || replace(&to, text.as_bytes(), 0o600)).await {
                Ok(Ok(())) => info!(addresses = ?seen, "addresses of the API server are kept for the next start"),
                Ok(Err(error)) => {
                    warn!(%error, "addresses of the API server can't be kept for the next start");
                    continue;
                }
                Err(_) => return,
            }
            known = seen;
        }
    }
}

/// Where the endpoints of the Service `kubernetes` are, in order.
fn of_api_servers(slices: &Slices) -> Vec<SocketAddr> {
    let at = |slice: &Arc<Slice>| {
        let port = slice.ports.iter().find(|port| *port.name == *PORT)?.port;
        let ready = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
        Some(ready.map(|endpoint| SocketAddr::new(endpoint.ip, port)).collect::<Vec<_>>())
    };
    let service = ObjectName::new(SERVICE.0, SERVICE.1);
    let all: BTreeSet<SocketAddr> = of_service(slices, &service).filter_map(at).flatten().collect();
    all.into_iter().collect()
}

/// Reads the value of `--api-server`.
///
/// # Errors
/// Why it is no address of an API server.
pub fn parse_url(text: &str) -> Result<Uri, String> {
    let url: Uri = text.trim().parse().map_err(|error| format!("{error}; say it as https://192.0.2.10:6443"))?;
    match (url.scheme_str(), url.host()) {
        (Some("https" | "http"), Some(host)) if !host.is_empty() => Ok(url),
        _ => Err("no URL; say it as https://192.0.2.10:6443".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_tried_in_the_order_given_configured_seen_and_each_once() {
        let dir = tempfile::tempdir().expect("a folder");
        let url = |text: &str| parse_url(text).expect("a URL");
        let all = |addresses: &Addresses, config: &Config| -> Vec<String> {
            addresses.all(config).iter().map(|at| at.cluster_url.to_string()).collect()
        };
        let mut config = Config::new(url("https://10.96.0.1:443"));
        let addresses = Addresses::new(vec![url("https://api.example.com:6443")], dir.path());
        let known = ["https://api.example.com:6443/", "https://10.96.0.1:443/"];
        assert_eq!(all(&addresses, &config), known, "nothing was seen yet");
        let file = dir.path().join(FILE);
        fs::write(&file, r#"["192.0.2.10:6443","192.0.2.10:6443","[2001:db8::10]:6443"]"#).expect("written");
        let seen = ["https://192.0.2.10:6443/", "https://[2001:db8::10]:6443/"];
        assert_eq!(all(&addresses, &config), [known, seen].concat());
        config.accept_invalid_certs = true;
        assert_eq!(all(&addresses, &config), known);
        config.accept_invalid_certs = false;
        fs::write(&file, "{").expect("written");
        assert_eq!(all(&addresses, &config), known, "what can't be read is not known");
    }

    #[test]
    fn what_is_no_url_is_refused_with_an_example() {
        for text in ["192.0.2.10", "192.0.2.10:6443", "ftp://192.0.2.10", "https://", ""] {
            let error = parse_url(text).expect_err(text);
            assert!(error.contains("https://192.0.2.10:6443"), "{text}: {error}");
        }
    }
}
