//! `--all`: what the daemons of all nodes say, through the daemon of this one.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use clap::Args;
use fabric_proto::Word as _;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::node_answer::Answer as Said;
use fabric_proto::v1::{
    AskNodesRequest, CheckResult, Checks, GetMeshResponse, GetStatusRequest, GetStatusResponse, NodeAnswer,
};

use crate::output::{Output, Screen, Severity};
use crate::table::{Cell, render};
use crate::{Answer, NOT_ALL_WELL, daemon, mesh, status};

/// How many milliseconds a node may take, unless it is said otherwise.
const NODE_TIMEOUT: u32 = 2000;

/// Whom to ask.
#[derive(Debug, Args)]
pub struct AllArgs {
    /// Ask the daemons of all nodes
    #[arg(long)]
    pub all: bool,
    /// Ask the daemons of these nodes only
    #[arg(long, value_name = "NODE,…", value_delimiter = ',')]
    nodes: Vec<String>,
    /// Timeout for each node's answer, in milliseconds
    #[arg(long, value_name = "MILLIS", default_value_t = NODE_TIMEOUT)]
    node_timeout: u32,
}

impl AllArgs {
    /// These nodes; all, if none is named.
    pub fn of(nodes: Vec<String>) -> Self {
        Self { all: nodes.is_empty(), nodes, node_timeout: NODE_TIMEOUT }
    }

    /// Whether others are asked at all.
    pub fn asked(&self) -> bool {
        self.all || !self.nodes.is_empty()
    }
}

/// Asks, and shows a line for each node; exit code 4 when one has not answered, or is not well.
pub async fn ask(socket: &Path, output: Output, args: AllArgs, question: Question) -> anyhow::Result<Answer> {
    let answers = answers(socket, args, question).await?;
    let well = answers.iter().all(|answer| said(answer).1 == Severity::Good);
    Ok(Answer::well_if(well, output.show(&answers, |screen| table(screen, &answers))?, NOT_ALL_WELL))
}

/// The status of each node that answers.
///
/// # Errors
/// Nodes can't be asked from here.
pub async fn statuses(socket: &Path, args: AllArgs) -> anyhow::Result<Vec<GetStatusResponse>> {
    let answers = answers(socket, args, Question::Status(GetStatusRequest {})).await?;
    let statuses = answers.into_iter().filter_map(|answer| match answer.answer {
        Some(Said::Status(status)) => Some(status),
        _ => None,
    });
    Ok(statuses.collect())
}

async fn answers(socket: &Path, args: AllArgs, question: Question) -> anyhow::Result<Vec<NodeAnswer>> {
    let request = AskNodesRequest { nodes: args.nodes, timeout_ms: args.node_timeout, question: Some(question) };
    let stream = daemon::connect(socket).await?.ask_nodes(request).await;
    let mut stream = stream.map_err(|status| daemon::told(&status))?.into_inner();
    let mut answers = vec![];
    while let Some(answer) = stream.message().await? {
        answers.push(answer);
    }
    answers.sort_by(|a, b| a.node.cmp(&b.node));
    Ok(answers)
}

fn table(screen: &Screen, answers: &[NodeAnswer]) -> String {
    let row = |answer: &NodeAnswer| -> [Cell; 3] {
        let (words, severity) = said(answer);
        let took = Duration::from_secs_f64((answer.took_ms / 1e3).max(0.0));
        [answer.node.clone().into(), format!("{} ms", took.as_millis()).into(), Cell::coloured(words, severity)]
    };
    let rows: Vec<[Cell; 3]> = answers.iter().map(row).collect();
    let mut text = render(screen, ["NODE", "TOOK", "ANSWER"], &rows);
    let came = answers.iter().filter(|answer| answer.error.is_empty()).count();
    let _ = writeln!(text, "\n{came} of {} answered", answers.len());
    text
}

/// An answer in a few words.
fn said(answer: &NodeAnswer) -> (String, Severity) {
    match &answer.answer {
        None => (format!("no answer: {}", answer.error), Severity::Bad),
        Some(Said::Status(status)) => of_status(status),
        Some(Said::Mesh(mesh)) => of_mesh(mesh),
        Some(Said::Checks(checks)) => of_checks(checks),
        Some(Said::Explain(path)) => (format!("{} hops", path.hops.len()), Severity::Good),
    }
}

fn of_status(status: &GetStatusResponse) -> (String, Severity) {
    let subnets = status.lease.iter().flat_map(|lease| lease.subnets.clone()).collect::<Vec<_>>().join(" ");
    let peers = format!("{} of {} peers programmed", status.peers_programmed, status.peers.len());
    let wrong: Vec<String> = status::not_well(status).into_iter().map(|what| format!(", {what}")).collect();
    let severity = if wrong.is_empty() { Severity::Good } else { Severity::Doubtful };
    match status.ready {
        true => (format!("ready, {subnets}, {peers}{}, version {}", wrong.concat(), status.version), severity),
        false => (format!("NOT READY: {}", status.reason), Severity::Bad),
    }
}

fn of_mesh(said: &GetMeshResponse) -> (String, Severity) {
    let bad: Vec<String> = said
        .peers
        .iter()
        .filter(|peer| mesh::severity(peer.cause()) == Severity::Bad)
        .map(|peer| format!("{}: {}", peer.node, peer.cause().word()))
        .collect();
    match bad.first() {
        None => (format!("{} peers, none is bad", said.peers.len()), Severity::Good),
        Some(_) => (format!("{} of {} peers are bad: {}", bad.len(), said.peers.len(), bad.join(", ")), Severity::Bad),
    }
}

fn of_checks(said: &Checks) -> (String, Severity) {
    let failed: Vec<&str> =
        said.checks.iter().filter(|c| c.result() == CheckResult::Failed).map(|c| c.id.as_str()).collect();
    match failed.first() {
        None => (format!("{} checks, none has failed", said.checks.len()), Severity::Good),
        Some(_) => (format!("failed: {}", failed.join(", ")), Severity::Bad),
    }
}
