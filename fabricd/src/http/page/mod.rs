//! The page: what this node sees, for a browser. It reads, and can change nothing; all of it is in the binary.
//!
//! `page.js` asks for `/page.json` every few seconds; [`mesh`] is the heat map in it.

mod mesh;

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName};
use axum::routing::get;
use fabric_proto::Word as _;
use fabric_proto::v1;
use fabric_proto::v1::node_answer::Answer;
use serde::Serialize;
use tokio::time::Instant;

use self::mesh::{Others, Table};
use crate::api::{Sources, convert};
use crate::mesh::Cause;

/// How many events are shown, and how many troubles.
const MOST: usize = 50;

/// What the page shows.
#[derive(Debug, Serialize)]
struct Page {
    /// Without its peers: what is wrong with them is in `troubles`.
    status: v1::GetStatusResponse,
    /// How many there are.
    peers: usize,
    leases: Vec<v1::LeaseRecord>,
    /// The last one first.
    events: Vec<v1::Event>,
    troubles: Vec<Trouble>,
    /// Round trip of a small packet: the median over all peers, in milliseconds.
    median_ms: f64,
    /// Why not all causes can be told apart.
    limits: String,
    mesh: Table,
    /// The words for the letters in `mesh`, from `a` on.
    causes: Vec<&'static str>,
}

/// A peer that is not as it should be.
#[derive(Debug, Serialize)]
struct Trouble {
    peer: String,
    what: String,
    evidence: String,
    fix: String,
}

struct Seen {
    sources: Sources,
    others: Arc<Others>,
}

/// The page and what it asks for.
pub fn router(sources: Sources) -> Router {
    Router::new()
        .route("/", get(|| async { file("text/html; charset=utf-8", include_str!("index.html")) }))
        .route("/page.js", get(|| async { file("text/javascript; charset=utf-8", include_str!("page.js")) }))
        .route("/page.css", get(|| async { file("text/css; charset=utf-8", include_str!("page.css")) }))
        .route("/page.json", get(json))
        .with_state(Arc::new(Seen { sources, others: Arc::default() }))
}

type File = ([(HeaderName, &'static str); 3], &'static str);

fn file(kind: &'static str, content: &'static str) -> File {
    // Nothing from elsewhere is ever loaded, or run.
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:";
    ([(CONTENT_TYPE, kind), (CACHE_CONTROL, "no-cache"), (CONTENT_SECURITY_POLICY, policy)], content)
}

async fn json(State(seen): State<Arc<Seen>>) -> ([(HeaderName, &'static str); 1], String) {
    let page = page(&seen.sources, &seen.others, Instant::now());
    ([(CONTENT_TYPE, "application/json")], serde_json::to_string(&page).unwrap_or_else(|error| format!("{error:?}")))
}

fn page(sources: &Sources, others: &Arc<Others>, now: Instant) -> Page {
    let view = sources.view.borrow().clone();
    let mut status = convert::status_of(&view, now);
    let peers = std::mem::take(&mut status.peers);
    let mesh = convert::mesh(&sources.mesh, now);
    let mut trips: Vec<f64> = mesh.peers.iter().map(|peer| peer.rtt_ms).filter(|trip| *trip > 0.0).collect();
    trips.sort_by(f64::total_cmp);
    let (mut events, _) = sources.events.read();
    let (troubles, limits) = (troubles(&peers, &mesh.peers), mesh.limits.clone());
    let ours = v1::NodeAnswer { node: status.node.clone(), answer: Some(Answer::Mesh(mesh)), ..Default::default() };
    Page {
        peers: peers.len(),
        troubles,
        leases: view.leases.iter().flat_map(|leases| leases.iter()).map(|l| convert::lease_record(&view, l)).collect(),
        events: events.drain(events.len().saturating_sub(MOST)..).rev().map(|event| convert::event(&event)).collect(),
        median_ms: trips.get(trips.len() / 2).copied().unwrap_or_default(),
        limits,
        mesh: others.table(sources, peers.len() + 1, ours),
        causes: Cause::ALL.map(Cause::word).into(),
        status,
    }
}

fn troubles(peers: &[v1::Peer], paths: &[v1::MeshPeer]) -> Vec<Trouble> {
    let refused = peers.iter().filter(|peer| peer.state() != v1::PeerState::Programmed).map(|peer| Trouble {
        peer: if peer.node.is_empty() { peer.subnets.join(" ") } else { peer.node.clone() },
        what: peer.state().word(),
        evidence: peer.reason.clone(),
        fix: "fabricctl peers".into(),
    });
    let bad = paths.iter().filter(|path| !path.fix.is_empty()).map(|path| Trouble {
        peer: path.node.clone(),
        what: path.cause().word(),
        evidence: path.evidence.clone(),
        fix: path.fix.clone(),
    });
    refused.chain(bad).take(MOST).collect()
}
