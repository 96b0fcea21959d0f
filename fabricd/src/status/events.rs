//! [`Events`]: what happened on this node, the last of it remembered. Told from what the reconcile loop publishes, never
//! by the loop itself: who reads them, and how slowly, is none of its business.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::inquiry::unix_millis;
use fabric_core::leases::Lease;
use tokio::sync::{broadcast, watch};
use tokio_stream::wrappers::BroadcastStream;

use crate::status::section::SectionStatus;
use crate::status::view::{PeerTrouble, View};
use crate::store::Connection;

/// How many are remembered.
const REMEMBERED: usize = 500;
/// How many wait for a reader.
const WAITING: usize = 256;
/// More peers than that at once are told in one event.
const MANY: usize = 20;

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Whether this node is ready.
    Readiness,
    /// The connection to the store.
    Store,
    /// This node's lease.
    Lease,
    /// Another node.
    Peer,
    /// The path to another node.
    Mesh,
    /// A warning.
    Warning,
    /// What another program changed of ours, and was restored.
    Repaired,
    /// Whether packets take the fast path.
    FastPath,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Rises by one with every event.
    pub number: u64,
    /// When, in milliseconds since 1970.
    pub unix_millis: i64,
    /// What it is about.
    pub kind: Kind,
    /// Which one; empty when it is about this node.
    pub subject: String,
    /// What happened, in a sentence.
    pub message: String,
    /// True when somebody should look at it.
    pub warning: bool,
}

/// What happened, and who listens.
#[derive(Debug)]
pub struct Events {
    past: Mutex<VecDeque<Event>>,
    coming: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { past: Mutex::default(), coming: broadcast::channel(WAITING).0 }
    }
}

impl Events {
    /// Remembers and tells.
    pub fn tell(&self, kind: Kind, subject: impl Into<String>, message: impl Into<String>, warning: bool) {
        let mut past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        let number = past.back().map_or(1, |last| last.number + 1);
        let (subject, message) = (subject.into(), message.into());
        let event = Event { number, unix_millis: unix_millis(SystemTime::now()), kind, subject, message, warning };
        if past.len() == REMEMBERED {
            past.pop_front();
        }
        past.push_back(event.clone());
        // Nobody may be listening. Told under the lock, so that no reader gets one twice or misses one.
        let _ = self.coming.send(event);
    }

    /// Those that are remembered, and those that come.
    pub fn read(&self) -> (Vec<Event>, BroadcastStream<Event>) {
        let past = self.past.lock().unwrap_or_else(PoisonError::into_inner);
        (past.iter().cloned().collect(), BroadcastStream::new(self.coming.subscribe()))
    }
}

/// Tells what changes in what the loop publishes, until it ends.
pub async fn watch_view(events: Arc<Events>, mut view: watch::Receiver<Arc<View>>) {
    let mut was = view.borrow_and_update().clone();
    while view.changed().await.is_ok() {
        let now = view.borrow_and_update().clone();
        tell_changes(&events, &was, &now);
        was = now;
    }
}

/// Tells whether a section of its own is up to date, and its warnings, until its loop ends. `name` is what people call it.
pub async fn watch_section(events: Arc<Events>, name: &'static str, mut section: watch::Receiver<Arc<SectionStatus>>) {
    let mut was = section.borrow_and_update().clone();
    while section.changed().await.is_ok() {
        let now = section.borrow_and_update().clone();
        if was.ready != now.ready {
            match &now.ready {
                Ok(()) => events.tell(Kind::Readiness, name, "up to date", false),
                Err(reason) => events.tell(Kind::Readiness, name, format!("not up to date: {reason}"), true),
            }
        }
        for warning in now.warnings.iter().filter(|warning| !was.warnings.contains(warning)) {
            events.tell(Kind::Warning, name, warning, true);
        }
        for warning in was.warnings.iter().filter(|warning| !now.warnings.contains(warning)) {
            events.tell(Kind::Warning, name, format!("over: {warning}"), false);
        }
        was = now;
    }
}

fn tell_changes(events: &Events, was: &View, now: &View) {
    if was.connection != now.connection {
        match &now.connection {
            Connection::Up => events.tell(Kind::Store, "", "the store answers", false),
            Connection::Down(reason) => events.tell(Kind::Store, "", format!("the store is away: {reason}"), true),
            Connection::Refused(reason) => events.tell(Kind::Store, "", format!("the store refuses: {reason}"), true),
            Connection::Unknown => {}
        }
    }
    tell_lease(events, was, now);
    if was.readiness != now.readiness {
        match &now.readiness {
            Readiness::Ready => events.tell(Kind::Readiness, "", "ready", false),
            Readiness::NotReady { code, reason } => {
                events.tell(Kind::Readiness, "", format!("not ready: {reason}"), *code != NotReady::Starting);
            }
        }
    }
    tell_peers(events, was, now);
    tell_fast_path(events, was, now);
    for warning in now.warnings.iter().filter(|warning| !was.warnings.contains(warning)) {
        events.tell(Kind::Warning, "", warning, true);
    }
    let known = was.repairs.back().map_or(0, |repair| repair.number);
    for repair in now.repairs.iter().filter(|repair| repair.number > known) {
        events.tell(Kind::Repaired, "", &repair.message, true);
    }
    for warning in was.warnings.iter().filter(|warning| !now.warnings.contains(warning)) {
        events.tell(Kind::Warning, "", format!("over: {warning}"), false);
    }
}

/// That it is on, and why it is off. What doesn't take it though it is on shows in the status.
fn tell_fast_path(events: &Events, was: &View, now: &View) {
    let told = |view: &View| {
        let fast_path = &view.fast_path;
        match (fast_path.asked, fast_path.on, fast_path.reason.is_empty()) {
            (true, true, _) => "on".to_owned(),
            (true, false, false) => format!("off: {}", fast_path.reason),
            _ => String::new(),
        }
    };
    if told(was) != told(now) && !told(now).is_empty() {
        events.tell(Kind::FastPath, "", told(now), false);
    }
}

fn tell_lease(events: &Events, was: &View, now: &View) {
    let key = |view: &View| view.holding.own.as_ref().map(|own| own.key);
    match (key(was), key(now)) {
        (before, Some(key)) if before != Some(key) => {
            events.tell(Kind::Lease, key.to_string(), "held by this node", false);
        }
        (Some(key), None) => events.tell(Kind::Lease, key.to_string(), "no longer held by this node", true),
        _ => {}
    }
    let quarantine = |view: &View| matches!(view.holding.trouble, Some((NotReady::Quarantine, _)));
    if let (false, true, Some((_, reason))) = (quarantine(was), quarantine(now), &now.holding.trouble) {
        events.tell(Kind::Lease, "", format!("lease lost, pod creation suspended (quarantine): {reason}"), true);
    }
}

fn tell_peers(events: &Events, was: &View, now: &View) {
    let own = now.holding.own.as_ref().map(|own| own.key);
    if let (Some(before), Some(leases)) = (&was.leases, &now.leases) {
        let changes: Vec<_> = leases.changes(before).filter(|(w, n)| w.or(*n).map(|lease| lease.key) != own).collect();
        if changes.len() > MANY {
            let came = changes.iter().filter(|(was, _)| was.is_none()).count();
            let went = changes.iter().filter(|(_, now)| now.is_none()).count();
            let others = changes.len() - came - went;
            events.tell(Kind::Peer, "", format!("{came} peers added, {went} removed, {others} leases updated"), false);
        } else {
            for change in changes {
                let (lease, what) = match change {
                    (None, Some(lease)) => (lease, "added"),
                    (Some(lease), None) => (lease, "removed"),
                    (_, Some(lease)) => (lease, "lease updated"),
                    (None, None) => continue,
                };
                // A placeholder is no peer: it keeps the subnet of a node that is away.
                let of = if lease.record.is_placeholder() { "reservation " } else { "" };
                events.tell(Kind::Peer, name(lease), format!("{of}{what}: {}", lease.key), false);
            }
        }
    } else if let Some(leases) = &now.leases {
        let count = leases.iter().filter(|lease| Some(lease.key) != own).count();
        let known = if count == 1 { "1 peer is known".into() } else { format!("{count} peers are known") };
        events.tell(Kind::Peer, "", known, false);
    }
    let fresh: Vec<_> = now.troubles.iter().filter(|(key, trouble)| was.troubles.get(key) != Some(*trouble)).collect();
    for (key, trouble) in fresh.iter().take(MANY) {
        let word = if matches!(trouble, PeerTrouble::Refused(_)) { "refused" } else { "pending" };
        events.tell(Kind::Peer, key.to_string(), format!("{word}: {trouble}"), true);
    }
    if fresh.len() > MANY {
        events.tell(Kind::Peer, "", format!("{} more peers are in trouble", fresh.len() - MANY), true);
    }
}

/// The node that holds a lease, or its subnet.
fn name(lease: &Lease) -> String {
    lease.record.node().map_or_else(|| lease.key.to_string(), ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::fast_path::FastPathView;
    use crate::status::view::Repair;

    #[test]
    fn transitions_are_told_once_and_the_last_are_remembered() {
        let events = Events::default();
        let was = View::new("node-1".parse().unwrap());
        let now = View {
            readiness: Readiness::Ready,
            connection: Connection::Up,
            warnings: vec!["look".into()],
            ..was.clone()
        };
        tell_changes(&events, &was, &now);
        tell_changes(&events, &now, &now);
        tell_changes(&events, &now, &View { warnings: vec![], ..now.clone() });
        let repair = Repair { number: 1, message: "link fabric.1 was deleted".into() };
        let fast_path = |on, reason: &str| {
            let fast_path = FastPathView { asked: true, on, reason: reason.to_owned(), ..FastPathView::default() };
            View { warnings: vec![], fast_path, ..now.clone() }
        };
        let repaired = View { warnings: vec![], repairs: Arc::new([repair].into()), ..now.clone() };
        tell_changes(&events, &View { warnings: vec![], ..now.clone() }, &repaired);
        tell_changes(&events, &repaired, &repaired);
        tell_changes(&events, &repaired, &fast_path(true, "1 peers take the kernel's path"));
        tell_changes(&events, &fast_path(true, ""), &fast_path(true, "1 peers take the kernel's path"));
        tell_changes(&events, &fast_path(true, ""), &fast_path(false, "policy drop"));
        let said = |events: &Events| events.read().0.into_iter().map(|event| event.message).collect::<Vec<_>>();
        let told =
            ["the store answers", "ready", "look", "over: look", "link fabric.1 was deleted", "on", "off: policy drop"];
        assert_eq!(said(&events), told);
        for _ in 0..REMEMBERED {
            events.tell(Kind::Peer, "node-2", "lease updated", false);
        }
        let (past, _) = events.read();
        assert_eq!((past.len(), past[0].number, past[499].number), (500, 8, 507));
    }
}
