//! What is wrong with this node, as Events on its Node: `kubectl describe node` shows it to those who can't ask the daemon.
//! The condition `NetworkUnavailable` says why a network has not worked yet; these also tell of one that did.

use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::services::ObjectName;
use tokio::sync::watch;
use tokio::time::sleep;

use super::Inspector;
use crate::kubernetes::event_recorder::{EventRecorder, Kind, OF_NODES, ObjectEvent, Reason};
use crate::status::view::View;
use crate::store::Connection;

/// From one look to the next. What two of them see in a row is told: what passes by itself, and words that change all the
/// time, are not.
const EVERY: Duration = Duration::from_secs(10);

/// Tells until the reconcile loop has ended.
pub async fn run(mut events: EventRecorder, view: watch::Receiver<Arc<View>>, inspector: Arc<Inspector>) {
    let mut before: Vec<ObjectEvent> = vec![];
    while view.has_changed().is_ok() {
        let now = troubles(&view.borrow(), inspector.warnings_of_node());
        let lasting: Vec<ObjectEvent> = now.iter().filter(|event| before.contains(event)).cloned().collect();
        events.update(&lasting);
        before = now;
        sleep(EVERY).await;
    }
}

/// What is wrong at one moment, each with the way out.
fn troubles(view: &View, warnings: Vec<String>) -> Vec<ObjectEvent> {
    let event = |reason, message| {
        let object = ObjectName::new(OF_NODES, view.node.as_str());
        ObjectEvent { kind: Kind::Node, object, reason, message }
    };
    let not_ready = match &view.readiness {
        Readiness::NotReady { code, reason } if *code != NotReady::Starting => Some(reason.clone()),
        Readiness::NotReady { .. } | Readiness::Ready => None,
    };
    let store = match &view.connection {
        Connection::Refused(reason) => Some(reason.clone()),
        // One that is away takes no Events.
        Connection::Down(_) | Connection::Up | Connection::Unknown => None,
    };
    let peers = view.troubles.iter().next().map(|(key, trouble)| {
        let node = view.leases.as_ref().and_then(|leases| leases.get(key)?.record.node().map(ToString::to_string));
        let first = node.unwrap_or_else(|| key.to_string());
        format!("{} of the peers are not fully programmed, the first of them {first}: {trouble}", view.troubles.len())
    });
    let all = [not_ready.map(|words| (Reason::NotReady, words)), store.map(|words| (Reason::StoreRefuses, words))];
    let warnings = peers.into_iter().chain(view.warnings.iter().cloned()).chain(warnings);
    let warnings = warnings.map(|words| (Reason::NodeWarning, words));
    all.into_iter().flatten().chain(warnings).map(|(reason, words)| event(reason, words)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn troubles_of_a_node_are_told_with_their_kind_and_a_start_is_none() {
        let mut view = View::new("node-1".parse().expect("a name"));
        assert_eq!(troubles(&view, vec![]), []);
        view.readiness = Readiness::NotReady { code: NotReady::Failed, reason: "no device".into() };
        view.connection = Connection::Refused("forbidden".into());
        view.warnings = vec!["one".into()];
        let all = troubles(&view, vec!["two".into()]);
        let told: Vec<_> = all.iter().map(|event| (event.reason, event.message.as_str())).collect();
        let warned = |words| (Reason::NodeWarning, words);
        let expected =
            [(Reason::NotReady, "no device"), (Reason::StoreRefuses, "forbidden"), warned("one"), warned("two")];
        assert_eq!(told, expected);
        assert!(all.iter().all(|event| event.kind == Kind::Node && event.object.name() == "node-1"));
    }
}
