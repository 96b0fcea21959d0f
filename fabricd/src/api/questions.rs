//! `Diagnose`, `Explain` and `AskNodes`: what takes a while to answer.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::leases::Lease;
use fabric_core::policy::model::Protocol;
use fabric_core::record::LeaseKey;
use fabric_proto::v1;
use fabric_proto::v1::ask_nodes_request::Question as Asked;
use fabric_proto::v1::node_answer::Answer;
use futures::StreamExt as _;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert;
use super::remote::{NO_ACCESS, PATIENCE};
use super::sources::Sources;
use crate::diagnosis::Inspection;
use crate::diagnosis::checks;
use crate::diagnosis::explain::{PACKET, Question, explain, sender};
use crate::diagnosis::finding::Finding;

/// How many nodes are asked at once.
const AT_ONCE: usize = 64;

/// How long a node may take to explain a path: it sends packets, and waits for answers.
const EXPLAIN: Duration = Duration::from_secs(6);

/// A stream of answers.
pub type Answers<T> = ReceiverStream<Result<T, Status>>;

async fn look(sources: &Sources) -> Result<Inspection, Status> {
    let view = sources.view.borrow().clone();
    let inspection = sources.inspector.look(view, &sources.controls.network).await;
    inspection.ok_or_else(|| Status::unavailable("the daemon is ending; try again"))
}

/// Makes all checks, each told when it is done.
pub fn diagnose(sources: Sources) -> Answers<v1::Check> {
    let (to, from) = mpsc::channel(8);
    tokio::spawn(async move {
        // Whoever asked may go in the middle of it.
        let _ = make_checks(&sources, &to).await;
    });
    ReceiverStream::new(from)
}

async fn make_checks(
    sources: &Sources,
    to: &mpsc::Sender<Result<v1::Check, Status>>,
) -> Result<(), mpsc::error::SendError<Result<v1::Check, Status>>> {
    let inspection = match look(sources).await {
        Ok(inspection) => inspection,
        Err(status) => return to.send(Err(status)).await,
    };
    let store = checks::store(&sources.inspector, &inspection).await;
    to.send(Ok(convert::check("store", "datastore", store))).await?;
    for (id, title, check) in checks::ALL {
        let inspection = inspection.clone();
        let finding = spawn_blocking(move || check(&inspection)).await;
        let finding = finding.unwrap_or_else(|error| Finding::skipped(format!("the check broke: {error}")));
        to.send(Ok(convert::check(id, title, finding))).await?;
    }
    Ok(())
}

/// The path of a packet, on this node and, unless `request` says not to, on the others that decide on it.
///
/// # Errors
/// When an address is none, or the daemon is ending.
pub async fn explain_all(sources: &Sources, request: v1::ExplainRequest) -> Result<v1::ExplainResponse, Status> {
    let parse = |text: &str| {
        text.parse().map_err(|_| Status::invalid_argument(format!("{text:?} is no IP address, as in 10.244.3.7")))
    };
    let (source, target) = (parse(&request.source)?, parse(&request.target)?);
    let to = destination(&request)?;
    let inspection = look(sources).await?;
    let mut question = Question::new(&inspection, source, target, to);
    if let Some(services) = &sources.services {
        question.services = services.describe(&target.to_string()).await.unwrap_or_default();
    }
    let own = inspection.view.holding.own.as_ref().map(|own| own.key);
    let mut response = v1::ExplainResponse::default();
    let mut asked: BTreeSet<LeaseKey> = BTreeSet::new();
    for lease in [&question.from, &question.to] {
        match lease {
            None => {}
            Some(lease) if !asked.insert(lease.key) => {}
            Some(lease) if Some(lease.key) == own => {
                let (inspection, question) = (inspection.clone(), question.clone());
                let node = inspection.view.node.to_string();
                let told = spawn_blocking(move || (explain(&inspection, &question), sender(&inspection, &question)));
                let (hops, sender) = told.await.map_err(|error| Status::internal(error.to_string()))?;
                response.sender = sender.map(|sender| convert::sender(&node, sender));
                response.hops.extend(hops.into_iter().map(|hop| convert::hop(&node, hop)));
            }
            Some(_) if request.local_only => {}
            Some(lease) => {
                let question = v1::ExplainRequest { local_only: true, ..request.clone() };
                let answer = sources.remote.ask(Arc::clone(lease), Asked::Explain(question), EXPLAIN).await;
                match answer.answer {
                    Some(Answer::Explain(theirs)) => response.hops.extend(theirs.hops),
                    _ => add(&mut response.missing, &format!("{} was not asked: {}", answer.node, answer.error)),
                }
            }
        }
    }
    for (ip, lease) in [(source, &question.from), (target, &question.to)] {
        // Else the hops say so.
        if lease.is_none() && response.hops.is_empty() {
            add(&mut response.missing, &format!("no node has a lease with {ip}"));
        }
    }
    // What was read comes first, on the path's order: packets show that something is wrong, not what.
    response.hops.sort_by_key(|hop| hop.layer == PACKET);
    Ok(response)
}

/// Protocol and port that are asked about; `None` when it is about a ping.
fn destination(request: &v1::ExplainRequest) -> Result<Option<(Protocol, u16)>, Status> {
    let port = u16::try_from(request.port)
        .map_err(|_| Status::invalid_argument(format!("port {} is not from 1 to 65535", request.port)))?;
    let protocol = match request.protocol.as_str() {
        "" | "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(Status::invalid_argument(format!("protocol {other:?} is none of tcp, udp, sctp"))),
    };
    Ok((port > 0).then_some((protocol, port)))
}

fn add(text: &mut String, more: &str) {
    if !text.is_empty() {
        text.push_str("; ");
    }
    text.push_str(more);
}

/// Asks the nodes, this one among them. Each answer is told when it is there; one that doesn't come, with the reason.
///
/// # Errors
/// When there is no question, no such node, or no way to ask.
pub fn ask_nodes(sources: Sources, request: v1::AskNodesRequest) -> Result<Answers<v1::NodeAnswer>, Status> {
    let question = request.question.ok_or_else(|| Status::invalid_argument("there is no question"))?;
    if sources.remote.access.is_none() {
        return Err(Status::failed_precondition(NO_ACCESS));
    }
    let patience = match request.timeout_ms {
        0 => PATIENCE,
        millis => Duration::from_millis(millis.into()),
    };
    let view = sources.view.borrow().clone();
    let wanted = |name: &str| request.nodes.is_empty() || request.nodes.iter().any(|node| node == name);
    let peers: Vec<Arc<Lease>> = view.peers().filter(|lease| wanted(&lease.holder())).cloned().collect();
    let known: BTreeSet<String> = peers.iter().map(|lease| lease.holder()).chain([view.node.to_string()]).collect();
    if let Some(stranger) = request.nodes.iter().find(|node| !known.contains(*node)) {
        return Err(Status::not_found(format!("there is no node {stranger}; see them with: fabricctl peers")));
    }
    let (to, from) = mpsc::channel(AT_ONCE);
    let ours = wanted(view.node.as_str());
    tokio::spawn(async move {
        if ours && to.send(Ok(answer_ourselves(&sources, question.clone()).await)).await.is_err() {
            return;
        }
        let remote = &sources.remote;
        let answers = futures::stream::iter(peers).map(|lease| remote.ask(lease, question.clone(), patience));
        let mut answers = std::pin::pin!(answers.buffer_unordered(AT_ONCE));
        while let Some(answer) = answers.next().await {
            if to.send(Ok(answer)).await.is_err() {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(from))
}

async fn answer_ourselves(sources: &Sources, question: Asked) -> v1::NodeAnswer {
    let begin = Instant::now();
    let view = sources.view.borrow().clone();
    let answer = match question {
        Asked::Status(_) => Ok(Answer::Status(sources.status())),
        Asked::Mesh(_) => Ok(Answer::Mesh(convert::mesh(&sources.mesh, begin))),
        Asked::Explain(request) => {
            explain_all(sources, v1::ExplainRequest { local_only: true, ..request }).await.map(Answer::Explain)
        }
        Asked::Diagnose(_) => {
            let checks: Vec<_> = diagnose(sources.clone()).collect().await;
            checks.into_iter().collect::<Result<_, _>>().map(|checks| Answer::Checks(v1::Checks { checks }))
        }
    };
    let took_ms = begin.elapsed().as_secs_f64() * 1e3;
    let (answer, error) = match answer {
        Ok(answer) => (Some(answer), String::new()),
        Err(status) => (None, status.message().to_owned()),
    };
    v1::NodeAnswer { node: view.node.to_string(), error, took_ms, answer }
}
