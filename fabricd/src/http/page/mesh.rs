//! The mesh as a table of letters: how all nodes see each other, or while only this one can be asked, how it sees them.
//!
//! What the others say is asked of their daemons in the background, if that is set up ([`crate::api::remote`]): the page
//! shows what is known, however long they take, and however many look at it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fabric_proto::v1;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::node_answer::Answer;
use serde::Serialize;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use crate::api::{Sources, convert, questions};
use crate::mesh::Cause;

/// How long what the others have said is taken for true.
const FRESH: Duration = Duration::from_secs(10);
/// How long a node may take to answer: nobody waits for it, since the page shows each answer as it comes.
const PATIENCE: Duration = Duration::from_secs(10);
/// In larger clusters the others are not asked: together they would say a word for each pair of nodes.
const MOST_NODES: usize = 500;

/// Who sees whom, and how well.
#[derive(Debug, Serialize)]
pub struct Table {
    /// Who is seen, and who sees.
    names: Vec<String>,
    rows: Vec<Row>,
}

/// How one node sees the others.
#[derive(Debug, Serialize)]
struct Row {
    node: String,
    /// Why it has not said. Empty when it has.
    error: String,
    /// A letter for each of `names`, as [`letter`] says; a space where nothing was said.
    cells: String,
}

/// What the others have said.
#[derive(Default)]
pub struct Others(Mutex<Said>);

#[derive(Default)]
struct Said {
    asking: bool,
    at: Option<Instant>,
    nodes: BTreeMap<String, NodeSaid>,
}

/// What one node has said: a letter for each peer, or why nothing.
struct NodeSaid {
    node: String,
    error: String,
    peers: BTreeMap<String, char>,
}

impl Others {
    /// What is known now in a cluster of so many nodes; `ours` is what this one says.
    pub fn table(self: &Arc<Self>, sources: &Sources, nodes: usize, ours: v1::NodeAnswer) -> Table {
        let mut said = self.lock();
        if nodes <= MOST_NODES && !said.asking && said.at.is_none_or(|at| at.elapsed() >= FRESH) {
            said.asking = true;
            tokio::spawn(Arc::clone(self).ask(sources.clone()));
        }
        let ours = heard(ours);
        table(&said.nodes.values().filter(|other| other.node != ours.node).chain([&ours]).collect::<Vec<_>>())
    }

    async fn ask(self: Arc<Self>, sources: Sources) {
        let question = Some(Question::Mesh(v1::GetMeshRequest {}));
        let timeout_ms = u32::try_from(PATIENCE.as_millis()).unwrap_or(u32::MAX);
        let request = v1::AskNodesRequest { question, timeout_ms, ..v1::AskNodesRequest::default() };
        let mut answered = BTreeSet::new();
        // It is refused where nodes don't ask each other.
        if let Ok(mut answers) = questions::ask_nodes(sources, request) {
            while let Some(answer) = answers.next().await {
                let Ok(answer) = answer.map(heard) else { continue };
                answered.insert(answer.node.clone());
                self.lock().nodes.insert(answer.node.clone(), answer);
            }
        }
        let mut said = self.lock();
        said.nodes.retain(|node, _| answered.contains(node));
        (said.asking, said.at) = (false, Some(Instant::now()));
    }

    fn lock(&self) -> MutexGuard<'_, Said> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn heard(answer: v1::NodeAnswer) -> NodeSaid {
    let paths = match answer.answer {
        Some(Answer::Mesh(mesh)) => mesh.peers,
        _ => vec![],
    };
    let mut peers = BTreeMap::new();
    for path in paths {
        let letter = letter(&path);
        // A peer of both families is as well as the worse of them.
        peers.entry(path.node).and_modify(|worst: &mut char| *worst = letter.max(*worst)).or_insert(letter);
    }
    NodeSaid { node: answer.node, error: answer.error, peers }
}

fn table(nodes: &[&NodeSaid]) -> Table {
    let names = nodes.iter().flat_map(|heard| heard.peers.keys().chain([&heard.node]));
    let names: BTreeSet<&String> = names.collect();
    let row = |heard: &&NodeSaid| Row {
        node: heard.node.clone(),
        error: heard.error.clone(),
        cells: names.iter().map(|name| heard.peers.get(*name).copied().unwrap_or(' ')).collect(),
    };
    Table { rows: nodes.iter().map(row).collect(), names: names.iter().map(|name| (*name).clone()).collect() }
}

/// When all is well a digit for the round trip: up to 0.1 ms, up to twice that, and so on. Else what is wrong: a letter
/// for its place in [`Cause::ALL`].
fn letter(path: &v1::MeshPeer) -> char {
    let (first, place) = if path.cause() == v1::MeshCause::Fine {
        (b'0', (0..9_u8).find(|step| path.rtt_ms <= 0.1 * f64::from(1_u16 << step)).map_or(9, usize::from))
    } else {
        (b'a', Cause::ALL.iter().position(|cause| convert::cause(*cause) == path.cause()).unwrap_or(0))
    };
    char::from(first + u8::try_from(place).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn row_has_a_digit_for_each_round_trip_and_the_letter_of_what_is_wrong() {
        let path = |node: &str, cause: v1::MeshCause, rtt_ms| v1::MeshPeer {
            node: node.into(),
            cause: cause.into(),
            rtt_ms,
            ..v1::MeshPeer::default()
        };
        let peers = vec![
            path("b", v1::MeshCause::Fine, 0.1),
            path("c", v1::MeshCause::Fine, 0.3),
            path("d", v1::MeshCause::Fine, 900.0),
            // Well in one family, not in the other.
            path("e", v1::MeshCause::PeerDown, 0.0),
            path("e", v1::MeshCause::Fine, 0.1),
        ];
        let mesh = v1::GetMeshResponse { peers, ..v1::GetMeshResponse::default() };
        let answer = Some(Answer::Mesh(mesh));
        let ours = heard(v1::NodeAnswer { node: "a".into(), answer, ..v1::NodeAnswer::default() });
        let silent = NodeSaid { node: "f".into(), error: "no answer".into(), peers: BTreeMap::new() };
        let table = table(&[&ours, &silent]);
        assert_eq!(table.names, ["a", "b", "c", "d", "e", "f"]);
        let rows: Vec<_> = table.rows.iter().map(|row| (row.cells.as_str(), row.error.as_str())).collect();
        assert_eq!(rows, [(" 029j ", ""), ("      ", "no answer")]);
    }
}
