//! [`HealthServer`]: what load balancers and cloud controllers ask this node, over HTTP.
//!
//! | where | who asks | 200 |
//! |---|---|---|
//! | a Service's `healthCheckNodePort`, any path | the load balancer of a Service with `externalTrafficPolicy: Local` | an endpoint of it on this node is ready, and what is known is in the kernel |
//! | port 10256 `/healthz` | load balancers of other Services (KEP-3836) | what is known is in the kernel, and the Node isn't about to go |
//! | port 10256 `/livez` | whoever wants to know whether Services work here | what is known is in the kernel |
//!
//! All else is 503. Paths, members and headers are kube-proxy's (kubernetes/pkg/proxy/healthcheck).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, X_CONTENT_TYPE_OPTIONS};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use fabric_core::services::plan::{HealthCheck, HealthChecks};
use jiff::Timestamp;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// How long a change may wait to be written before this node is no longer sent anything.
const OVERDUE: Duration = Duration::from_secs(60);

/// Load balancers of clouds weigh nodes by it.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// How the loop gets on. A clone is the same.
#[derive(Clone, Debug, Default)]
pub struct Progress(Arc<Mutex<Passes>>);

#[derive(Clone, Copy, Debug, Default)]
struct Passes {
    /// When the kernel held what is known.
    written: Option<Timestamp>,
    /// Since when it doesn't.
    overdue_since: Option<Instant>,
    /// Whether this node is about to go.
    going: bool,
}

impl Progress {
    /// Notes whether a pass brought the kernel up to date.
    pub fn passed(&self, is_up_to_date: bool) {
        self.change(|passes| {
            if is_up_to_date {
                (passes.written, passes.overdue_since) = (Some(Timestamp::now()), None);
            } else {
                passes.overdue_since.get_or_insert_with(Instant::now);
            }
        });
    }

    /// Notes whether this node is about to go.
    pub fn node_is_going(&self, going: bool) {
        self.change(|passes| passes.going = going);
    }

    fn change(&self, change: impl FnOnce(&mut Passes)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn now(&self) -> Passes {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Passes {
    fn is_healthy(&self) -> bool {
        self.written.is_some() && self.overdue_since.is_none_or(|since| since.elapsed() < OVERDUE)
    }
}

/// Answers health checks.
pub struct HealthServer {
    progress: Progress,
    /// Port 10256, once it is open.
    of_node: Option<Listening>,
    of_services: BTreeMap<SocketAddr, Listening>,
    checks: watch::Sender<HealthChecks>,
}

/// Ends with its owner.
struct Listening(AbortHandle);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl HealthServer {
    /// One that doesn't listen yet.
    #[must_use]
    pub fn new(progress: Progress) -> Self {
        Self { progress, of_node: None, of_services: BTreeMap::new(), checks: watch::Sender::default() }
    }

    /// Whether the node's own port is open: then nobody else has it.
    #[must_use]
    pub fn has_node_port(&self) -> bool {
        self.of_node.is_some()
    }

    /// Answers nobody any more: somebody else does.
    pub fn close(&mut self) {
        self.of_node = None;
        self.of_services.clear();
    }

    /// Opens the node's own port, where that isn't done yet.
    ///
    /// # Errors
    /// When it is taken, or not this host's.
    pub async fn open_node_port(&mut self, address: SocketAddr) -> io::Result<()> {
        if self.of_node.is_none() {
            let router = Router::new()
                .route("/healthz", get(healthz))
                .route("/livez", get(livez))
                .with_state(self.progress.clone());
            self.of_node = Some(serve(listen(address).await?, router));
        }
        Ok(())
    }

    /// Answers these checks and no others. Gives those that can't be answered, with the reason; they are tried again with
    /// the next call.
    pub async fn answer(&mut self, checks: HealthChecks) -> Vec<(SocketAddr, HealthCheck, io::Error)> {
        self.of_services.retain(|address, _| checks.contains_key(address));
        let mut refused = vec![];
        for (address, check) in &checks {
            if self.of_services.contains_key(address) {
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    let state = (*address, self.checks.subscribe(), self.progress.clone());
                    let router = Router::new().fallback(of_service).with_state(state);
                    self.of_services.insert(*address, serve(listener, router));
                }
                Err(error) => refused.push((*address, check.clone(), error)),
            }
        }
        self.checks.send_if_modified(|known| {
            let differs = *known != checks;
            *known = checks;
            differs
        });
        refused
    }
}

/// Listens; where the host has no IPv6, on every address of IPv4 in the place of every address.
async fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        other => other,
    }
}

fn serve(listener: TcpListener, router: Router) -> Listening {
    // It ends with its listener alone.
    Listening(tokio::spawn(async { axum::serve(listener, router).await }).abort_handle())
}

async fn healthz(State(progress): State<Progress>) -> Response {
    let passes = progress.now();
    let mut body = times(&passes);
    body["nodeEligible"] = json!(!passes.going);
    of_node(passes.is_healthy() && !passes.going, &body)
}

async fn livez(State(progress): State<Progress>) -> Response {
    let passes = progress.now();
    of_node(passes.is_healthy(), &times(&passes))
}

fn times(passes: &Passes) -> serde_json::Value {
    let now = Timestamp::now();
    // As long as nothing waits, all is as of now.
    let written = passes.written.map(|written| if passes.overdue_since.is_none() { now } else { written });
    json!({
        "lastUpdated": written.map(|written| written.to_string()).unwrap_or_default(),
        "currentTime": now.to_string(),
    })
}

fn of_node(is_well: bool, body: &serde_json::Value) -> Response {
    (code(is_well), headers(), body.to_string()).into_response()
}

type ServiceState = (SocketAddr, watch::Receiver<HealthChecks>, Progress);

async fn of_service(State((address, checks, progress)): State<ServiceState>) -> Response {
    let Some(HealthCheck { service, endpoints }) = checks.borrow().get(&address).cloned() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let is_healthy = progress.now().is_healthy();
    // As kube-proxy puts it, by tabs.
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": {:?},\n\t\t\"name\": {:?}\n\t}},\n\t\"localEndpoints\": {endpoints},\n\t\
         \"serviceProxyHealthy\": {is_healthy}\n}}",
        service.namespace(),
        service.name()
    );
    let weight = HeaderValue::from(endpoints);
    (code(endpoints > 0 && is_healthy), headers(), [(WEIGHT, weight)], body).into_response()
}

fn code(is_well: bool) -> StatusCode {
    if is_well { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

fn headers() -> [(HeaderName, &'static str); 2] {
    [(CONTENT_TYPE, "application/json"), (X_CONTENT_TYPE_OPTIONS, "nosniff")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn change_that_waits_for_a_minute_makes_the_node_unhealthy_until_it_is_written() {
        let progress = Progress::default();
        let is_healthy = || progress.now().is_healthy();
        assert!(!is_healthy(), "nothing was written yet");
        progress.passed(true);
        assert!(is_healthy());
        progress.passed(false);
        tokio::time::advance(OVERDUE / 2).await;
        progress.passed(false);
        assert!(is_healthy());
        tokio::time::advance(OVERDUE / 2).await;
        assert!(!is_healthy(), "it is the first failure that counts");
        progress.passed(true);
        assert!(is_healthy());
    }
}
