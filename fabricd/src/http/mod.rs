//! `/healthz` and `/readyz` over HTTP, for probes, `/metrics` beside them, and the page at `/`.

pub mod page;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::{ACCEPT, CONTENT_TYPE, HeaderName};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::get;
use fabric_core::handoff::Readiness;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

use crate::api::Sources;
use crate::diagnosis::Sections;
use crate::kernel;
use crate::mesh::Mesh;
use crate::metrics::{Format, Metrics};
use crate::status::view::View;

/// Answers on `listener` until the process ends.
///
/// `/healthz` is 200 while the reconcile loop lives, 500 when it has ended. `/readyz` is 200 when pods may be added, and
/// network policies and Services, those that are on, are in the kernel, else 503 with the reason in the body. `/metrics` is
/// for Prometheus, `/` for people.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: TcpListener, sources: Sources, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let (view, mesh) = (sources.view.clone(), sources.mesh.clone());
    let sections = (view.clone(), sources.inspector.sections.clone());
    let ready = Router::new().route("/readyz", get(readyz)).with_state(sections);
    let probes = Router::new().route("/healthz", get(healthz)).with_state(view.clone()).merge(ready);
    let numbers = Router::new().route("/metrics", get(numbers)).with_state((view, mesh, metrics));
    axum::serve(listener, probes.merge(numbers).merge(page::router(sources))).await
}

/// Opens the address of `--health-addr`.
///
/// # Errors
/// When it is taken or not this host's, with the way out.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    use anyhow::Context as _;
    let told = || {
        format!(
            "cannot listen on {address} for /healthz, /readyz and /metrics; choose another with --health-addr, or off"
        )
    };
    TcpListener::bind(address).await.with_context(told)
}

async fn healthz(State(view): State<watch::Receiver<Arc<View>>>) -> (StatusCode, &'static str) {
    // The loop owns the sending half.
    match view.has_changed() {
        Ok(_) => (StatusCode::OK, "ok\n"),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the reconcile loop has ended\n"),
    }
}

type ReadySources = (watch::Receiver<Arc<View>>, Sections);

async fn readyz(State((view, sections)): State<ReadySources>) -> (StatusCode, String) {
    let reason = match (&view.borrow().readiness, sections.not_ready()) {
        (Readiness::NotReady { reason, .. }, _) => reason.clone(),
        (Readiness::Ready, Some(reason)) => reason,
        (Readiness::Ready, None) => return (StatusCode::OK, "ready\n".into()),
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n"))
}

type MetricsSources = (watch::Receiver<Arc<View>>, Arc<Mesh>, Arc<Metrics>);

async fn numbers(
    State((view, mesh, metrics)): State<MetricsSources>,
    headers: HeaderMap,
) -> ([(HeaderName, &'static str); 1], String) {
    let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok());
    let format = Format::accepted(accept.unwrap_or_default());
    let view = view.borrow().clone();
    // A kernel that can't be asked shows in the other numbers.
    let drops = spawn_blocking(kernel::drops).await.ok().and_then(Result::ok).unwrap_or_default();
    let numbers = metrics.render(&view, &mesh, &drops, Instant::now());
    ([(CONTENT_TYPE, format.content_type())], format.write(numbers))
}
