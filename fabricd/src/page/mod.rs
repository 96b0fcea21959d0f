//! The page: what this node sees, for a browser. It reads, and can change nothing; all of it is in the binary.
//!
//! `page.js` asks for `/page.json` every few seconds. How others see each other is asked of their daemons, if that is
//! set up ([`crate::api::remote`]), and remembered for a while, however many look.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName};
use axum::routing::get;
use fabric_proto::v1;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::node_answer::Answer;
use serde::Serialize;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use crate::api::{Sources, convert, questions};
use crate::mesh::Cause;

/// How long what the others have said is taken for true.
const FRESH: Duration = Duration::from_secs(10);

/// What the page shows.
#[derive(Debug, Serialize)]
struct Page {
    status: v1::GetStatusResponse,
    mesh: v1::GetMeshResponse,
    leases: Vec<v1::LeaseRecord>,
    events: Vec<v1::Event>,
    /// The words for the letters of the matrix, from `a` on.
    causes: Vec<&'static str>,
    matrix: Vec<Row>,
}

/// How one node sees the others.
#[derive(Clone, Debug, Serialize)]
struct Row {
    node: String,
    /// Why it has not said. Empty when it has.
    error: String,
    /// A letter for each of `names`: what is wrong.
    causes: String,
    /// Whom it sees.
    names: Vec<String>,
}

struct Seen {
    sources: Sources,
    others: Mutex<Option<(Instant, Vec<Row>)>>,
}

/// The page and what it asks for.
pub fn router(sources: Sources) -> Router {
    Router::new()
        .route("/", get(|| async { file("text/html; charset=utf-8", include_str!("index.html")) }))
        .route("/page.js", get(|| async { file("text/javascript; charset=utf-8", include_str!("page.js")) }))
        .route("/page.css", get(|| async { file("text/css; charset=utf-8", include_str!("page.css")) }))
        .route("/page.json", get(json))
        .with_state(Arc::new(Seen { sources, others: Mutex::default() }))
}

type File = ([(HeaderName, &'static str); 3], &'static str);

fn file(kind: &'static str, content: &'static str) -> File {
    // Nothing from elsewhere is ever loaded, or run.
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:";
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache"), (CONTENT_SECURITY_POLICY, policy)], content)
}

async fn json(State(seen): State<Arc<Seen>>) -> ([(HeaderName, &'static str); 1], String) {
    let (sources, now) = (&seen.sources, Instant::now());
    let view = sources.view.borrow().clone();
    let leases = view.leases.iter().flat_map(|leases| leases.iter());
    let (mut events, _) = sources.events.read();
    let page = Page {
        status: convert::status_of(&view, now),
        mesh: convert::mesh(&sources.mesh, now),
        leases: leases.map(|lease| convert::lease_record(&view, lease)).collect(),
        events: events.drain(events.len().saturating_sub(50)..).rev().map(|event| convert::event(&event)).collect(),
        causes: Cause::ALL.map(Cause::word).into(),
        matrix: matrix(&seen).await,
    };
    ([(CONTENT_TYPE, "application/json")], serde_json::to_string(&page).unwrap_or_else(|error| format!("{error:?}")))
}

/// A row for every node that was asked; for this one alone when others can't be.
async fn matrix(seen: &Seen) -> Vec<Row> {
    let mut others = seen.others.lock().await;
    if let Some((at, rows)) = others.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
        tracing::trace!(?at, "page from memory");
        return rows.clone();
    }
    let question = Some(Question::Mesh(v1::GetMeshRequest {}));
    let request = v1::AskNodesRequest { question, ..v1::AskNodesRequest::default() };
    let rows = match questions::ask_nodes(seen.sources.clone(), request) {
        Ok(answers) => answers.filter_map(Result::ok).map(row).collect().await,
        Err(_) => {
            let mesh = convert::mesh(&seen.sources.mesh, Instant::now());
            let node = seen.sources.view.borrow().node.to_string();
            return vec![row(v1::NodeAnswer { node, answer: Some(Answer::Mesh(mesh)), ..v1::NodeAnswer::default() })];
        }
    };
    let (_, rows) = others.insert((Instant::now(), rows));
    rows.clone()
}

fn row(answer: v1::NodeAnswer) -> Row {
    let peers = match answer.answer {
        Some(Answer::Mesh(mesh)) => mesh.peers,
        _ => vec![],
    };
    let letter = |peer: &v1::MeshPeer| {
        let place = Cause::ALL.iter().position(|cause| convert::cause(*cause) == peer.cause());
        char::from(b'a' + u8::try_from(place.unwrap_or(0)).unwrap_or(0))
    };
    let causes = peers.iter().map(letter).collect();
    let names = peers.into_iter().map(|peer| peer.node).collect();
    Row { node: answer.node, error: answer.error, causes, names }
}
