//! What each verb does: CNI spec section 2, "CNI operations".
//!
//! Three rules hold it together. Nothing is attached that isn't remembered first. An ADD that fails undoes
//! itself, and forgets only when the undoing has succeeded. DEL succeeds whenever nothing is left, whatever
//! of daemon, node file, state file or network namespace is missing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabric_core::handoff::{NodeFile, NotReady, Readiness};
use serde_json::{Value, json};

use crate::delegate::{Delegate, render};
use crate::error::{CniError, Code};
use crate::exec::Exec;
use crate::request::{Action, Attachment, AttachmentId, Call, Request, Verb};
use crate::state::{Attachments, PATIENCE, Saved};
use crate::version::SpecVersion;

/// The largest node file that is read, in bytes.
const MAX_NODE_FILE: u64 = 1024 * 1024;

/// Does what is asked, and returns what to print, if anything.
///
/// # Errors
/// What the runtime is to be told.
pub fn answer(request: &Request, exec: &dyn Exec) -> Result<Option<Value>, CniError> {
    let call = match request {
        Request::Version(version) => {
            let spoken = SpecVersion::ALL.map(SpecVersion::as_str);
            return Ok(Some(json!({ "cniVersion": version.as_str(), "supportedVersions": spoken })));
        }
        Request::Call(call) => Answering { call, attachments: Attachments::of(&call.conf), exec },
    };
    match &call.call.action {
        Action::Add(pod) => call.add(pod).map(Some),
        Action::Del(pod) => call.del(pod, PATIENCE).map(|()| None),
        Action::Check(pod, prev_result) => call.check(pod, prev_result).map(|()| None),
        Action::Gc(valid) => call.gc(valid).map(|()| None),
        Action::Status => call.status().map(|()| None),
    }
}

/// A call with what answering it takes.
struct Answering<'a> {
    call: &'a Call,
    attachments: Attachments,
    exec: &'a dyn Exec,
}

impl Answering<'_> {
    fn add(&self, pod: &Attachment) -> Result<Value, CniError> {
        let conf = &self.call.conf;
        let node = self.ready_node().map_err(|reason| CniError::new(Code::TryAgainLater, reason))?;
        let delegate = self.delegate()?;
        let config = render(conf, Some(&node));
        let saved = Saved { id: pod.id.clone(), netns: pod.netns.clone(), config };
        let held = self.attachments.create(&saved)?;

        let attach = || delegate.call(Verb::Add, Some(pod), &saved.config, conf.prev_result.as_ref());
        held.sync_during(attach).map_err(|failure| {
            match delegate.call(Verb::Del, Some(pod), &saved.config, None).and_then(|_| held.forget()) {
                Ok(()) => failure,
                // The file stays, for the DEL or GC that the runtime owes.
                Err(e) => failure.with_details(format!("cleaning up failed as well, DEL has to finish it: {e}")),
            }
        })
    }

    fn del(&self, pod: &Attachment, patience: Duration) -> Result<(), CniError> {
        let conf = &self.call.conf;
        let held = self.attachments.open(&pod.id, patience)?;
        let saved = held.as_ref().and_then(|held| held.saved());
        let config = saved.map_or_else(|| render(conf, None), |saved| saved.config);
        // A namespace that is gone took the interface along: what is left is the address.
        let netns = pod.netns.clone().filter(|path| is_namespace(path));
        let pod = Attachment { id: pod.id.clone(), netns };
        self.delegate()?.call(Verb::Del, Some(&pod), &config, conf.prev_result.as_ref())?;
        self.attachments.sweep_drafts(Some(&pod.id));
        held.map_or(Ok(()), |held| held.forget())
    }

    fn check(&self, pod: &Attachment, prev_result: &Value) -> Result<(), CniError> {
        let saved = self.attachments.read(&pod.id).ok_or_else(|| {
            let msg = format!("{} was not attached by this plugin, or its state is lost; DEL and ADD it again", pod.id);
            CniError::new(Code::NotAttached, msg)
        })?;
        let delegate = self.delegate()?;
        if delegate.version < Verb::Check.since() {
            return Ok(());
        }
        delegate.call(Verb::Check, Some(pod), &saved.config, Some(prev_result)).map(drop)
    }

    /// Goes by what is remembered: a DEL for each attachment that isn't named, but for one that is being worked
    /// on at this moment. A delegate that knows GC gets it too, for what it remembers and we don't.
    fn gc(&self, valid: &BTreeSet<AttachmentId>) -> Result<(), CniError> {
        let netns_of = |id: &AttachmentId| self.attachments.read(id).and_then(|saved| saved.netns);
        // Paths of namespaces are used again: one that a valid attachment has is not the old one's any more.
        let in_use: BTreeSet<PathBuf> = valid.iter().filter_map(netns_of).collect();
        let mut failures = Vec::new();
        for id in self.attachments.all()?.into_iter().filter(|id| !valid.contains(id)) {
            let pod = Attachment { netns: netns_of(&id).filter(|netns| !in_use.contains(netns)), id };
            match self.del(&pod, Duration::ZERO) {
                Err(e) if e.code() != Code::TryAgainLater => failures.push(format!("{}: {e}", pod.id)),
                _ => {}
            }
        }
        self.attachments.sweep_drafts(None);
        let delegate = self.delegate()?;
        if delegate.version >= Verb::Gc.since() {
            let mut config = render(&self.call.conf, self.ready_node().ok().as_ref());
            config.insert("cni.dev/valid-attachments".into(), json!(valid));
            failures.extend(delegate.call(Verb::Gc, None, &config, None).err().map(|e| e.to_string()));
        }
        if failures.is_empty() {
            return Ok(());
        }
        let msg = format!("GC could not detach all: {} failed; the next GC tries again", failures.len());
        Err(CniError::new(Code::DelegateFailed, msg).with_details(failures.join("; ")))
    }

    fn status(&self) -> Result<(), CniError> {
        let unavailable = |reason: String| CniError::new(Code::NotAvailable, reason);
        let node = self.ready_node().map_err(unavailable)?;
        let delegate = self.delegate().map_err(|e| unavailable(e.to_string()))?;
        if delegate.version < Verb::Status.since() {
            return Ok(());
        }
        delegate.call(Verb::Status, None, &render(&self.call.conf, Some(&node)), None).map(drop)
    }

    fn delegate(&self) -> Result<Delegate<'_>, CniError> {
        Delegate::find(&self.call.conf, &self.call.plugin_dirs, self.exec)
    }

    /// The node file if pods may be added, else why not. That the daemon is alive is not asked: while it is
    /// upgraded, what it said last holds.
    fn ready_node(&self) -> Result<NodeFile, String> {
        let path = &self.call.conf.node_file;
        let at = path.display();
        let node =
            read_node_file(path).map_err(|e| format!("cannot use {at}: {e}; is fabricd running on this node?"))?;
        match &node.readiness {
            Readiness::Ready => Ok(node),
            Readiness::NotReady { code, reason } => {
                let what = match code {
                    NotReady::Starting => "still starting",
                    NotReady::Quarantine => "in quarantine",
                    NotReady::Failed | NotReady::Other => "not ready",
                };
                Err(format!("node {} is {what}: {reason:.1000} (from {at})", node.node))
            }
        }
    }
}

fn read_node_file(path: &Path) -> Result<NodeFile, Box<dyn std::error::Error>> {
    let mut json = Vec::new();
    File::open(path)?.take(MAX_NODE_FILE).read_to_end(&mut json)?;
    Ok(NodeFile::decode(&json)?)
}

/// False when there is surely no namespace at `path`: nothing is there, or a plain file that a mount has left.
/// `bridge` would fail on that one. Namespaces are files of one kernel-internal file system.
fn is_namespace(path: &Path) -> bool {
    match (fs::metadata(path), fs::metadata("/proc/self/ns/net")) {
        (Ok(there), Ok(ours)) => there.dev() == ours.dev(),
        (Err(_), _) => false,
        (Ok(_), Err(_)) => true,
    }
}

#[cfg(test)]
#[path = "verbs_tests.rs"]
mod tests;
