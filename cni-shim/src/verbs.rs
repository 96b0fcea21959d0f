//! What each verb does: CNI spec section 2, "CNI operations".
//!
//! Three rules hold it together. Nothing is attached that isn't remembered first. An ADD that fails undoes
//! itself, and forgets only when the undoing has succeeded. DEL succeeds whenever nothing is left, whatever
//! of daemon, node file, state file or network namespace is missing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabric_core::handoff::Attached;
use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use crate::bridge::namespace;
use crate::conf::PluginConf;
use crate::delegate::{Delegate, on_a_bridge, render};
use crate::error::{CniError, Code};
use crate::exec::Exec;
use crate::ready::{await_ready_node, ready_node};
use crate::request::{Action, Attachment, AttachmentId, Call, Identifier, Request, Verb};
use crate::state::{Attachments, PATIENCE, Saved};
use crate::sweep::{Bridge, Cables, bridge_of, free_orphans, gateways, make_way};
use crate::version::SpecVersion;

/// Does what is asked, and returns what to print, if anything.
///
/// # Errors
/// What the runtime is to be told.
pub fn answer(request: &Request<PluginConf>, exec: &dyn Exec) -> Result<Option<Value>, CniError> {
    let call = match request {
        Request::Version(version) => return Ok(Some(SpecVersion::spoken(*version))),
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
    call: &'a Call<PluginConf>,
    attachments: Attachments,
    exec: &'a dyn Exec,
}

impl Answering<'_> {
    fn add(&self, pod: &Attachment) -> Result<Value, CniError> {
        let conf = &self.call.conf;
        let node = await_ready_node(&conf.node_file, Duration::from_secs(conf.ready_timeout.into()))
            .map_err(|reason| CniError::new(Code::TryAgainLater, reason))?;
        let delegate = self.delegate(conf.delegate_type()?)?;
        let config = render(conf, Some(&node));
        let saved = Saved { id: pod.id.clone(), netns: pod.netns.clone(), config, ports: None };
        let held = self.attachments.create(&saved)?;

        let undo = || delegate.call(Verb::Del, Some(pod), &saved.config, None).map(drop);
        let attach = || delegate.call(Verb::Add, Some(pod), &saved.config, conf.prev_result.as_ref());
        let attempt = || self.make_way(&saved.config).and_then(|()| attach()).map_err(|failure| (failure, undo()));
        let attached = attempt().or_else(|(failure, undone)| {
            // Perhaps for want of what dead pods hold.
            if undone.is_ok() && self.sweep().is_ok_and(|freed| freed > 0) { attempt() } else { Err((failure, undone)) }
        });
        match attached {
            Ok(result) => {
                held.attached(&attached_by(&result, &saved.config));
                Ok(result)
            }
            Err((failure, undone)) => Err(match undone.and_then(|()| held.forget()) {
                Ok(()) => failure,
                // The file stays, for the DEL or GC that the runtime owes.
                Err(e) => failure.with_details(format!("cleaning up failed as well, DEL has to finish it: {e}")),
            }),
        }
    }

    fn del(&self, pod: &Attachment, patience: Duration) -> Result<(), CniError> {
        let conf = &self.call.conf;
        let held = self.attachments.open(&pod.id, patience)?;
        let saved = held.as_ref().and_then(|held| held.saved());
        let config = saved.map_or_else(|| render(conf, None), |saved| saved.config);
        // A namespace that is gone took the interface along: what is left is the address.
        let netns = pod.netns.clone().filter(|path| namespace(path).is_some());
        let pod = Attachment { id: pod.id.clone(), netns };
        // The plugin that attached it, whatever the configuration says by now.
        let kind = kind_of(&config).map_or_else(|| conf.delegate_type(), Ok)?;
        self.delegate(kind)?.call(Verb::Del, Some(&pod), &config, conf.prev_result.as_ref())?;
        self.attachments.sweep_drafts(Some(&pod.id));
        held.map_or(Ok(()), |held| held.forget())
    }

    fn check(&self, pod: &Attachment, prev_result: &Value) -> Result<(), CniError> {
        let saved = self.attachments.read(&pod.id).ok_or_else(|| {
            let msg = format!("{} was not attached by this plugin, or its state is lost; DEL and ADD it again", pod.id);
            CniError::new(Code::NotAttached, msg)
        })?;
        let delegate = self.delegate(kind_of(&saved.config).map_or_else(|| self.call.conf.delegate_type(), Ok)?)?;
        if delegate.version < Verb::Check.since() {
            return Ok(());
        }
        delegate.call(Verb::Check, Some(pod), &saved.config, Some(prev_result)).map(drop)
    }

    /// Goes by what is remembered: a DEL for each attachment that isn't named, but for one that is being worked
    /// on at this moment. A delegate that knows GC gets it too, for what it remembers and we don't.
    fn gc(&self, valid: &BTreeSet<AttachmentId>) -> Result<(), CniError> {
        let conf = &self.call.conf;
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
        let mut config = render(conf, ready_node(&conf.node_file).ok().as_ref());
        if conf.uses_host_local() {
            let freed = free_orphans(data_dir(&config), &conf.name, &self.attachments, Some(valid));
            failures.extend(freed.err().map(|e| e.to_string()));
        }
        let delegate = self.delegate(conf.delegate_type()?)?;
        if delegate.version >= Verb::Gc.since() {
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
        let conf = &self.call.conf;
        let node = ready_node(&conf.node_file).map_err(unavailable)?;
        let delegate = self.delegate(conf.delegate_type()?).map_err(|e| unavailable(e.to_string()))?;
        if delegate.version < Verb::Status.since() {
            return Ok(());
        }
        delegate.call(Verb::Status, None, &render(conf, Some(&node)), None).map(drop)
    }

    /// Undoes the attachments of pods that no longer exist, and returns how many.
    fn sweep(&self) -> Result<usize, CniError> {
        let cables = Cables::of_the_host()?;
        let dead = |id: &AttachmentId| cables.show_the_end_of(self.attachments.read(id).as_ref());
        let undone = |id: AttachmentId| self.del(&Attachment { id, netns: None }, Duration::ZERO).is_ok();
        Ok(self.attachments.all()?.into_iter().filter(dead).filter(|id| undone(id.clone())).count())
    }

    /// Makes way for a pod where earlier ones have left something.
    fn make_way(&self, config: &Map<String, Value>) -> Result<(), CniError> {
        let conf = &self.call.conf;
        if on_a_bridge(conf) && make_way(config, &self.attachments)? == Bridge::Missing {
            // The first pod since the node was booted.
            self.sweep()?;
            if conf.uses_host_local() {
                free_orphans(data_dir(config), &conf.name, &self.attachments, None)?;
            }
            if let (Some(bridge), true) = (bridge_of(config), gateways(config).iter().any(IpNetwork::is_ipv6)) {
                let mtu = config.get("mtu").and_then(Value::as_u64).and_then(|mtu| mtu.try_into().ok());
                self.exec.make_bridge(&bridge, mtu.unwrap_or_default())?;
            }
        }
        Ok(())
    }

    fn delegate(&self, kind: Identifier) -> Result<Delegate<'_>, CniError> {
        Delegate::find(self.call, kind, self.exec)
    }
}

/// The plugin that a rendered configuration is for.
fn kind_of(config: &Map<String, Value>) -> Option<Identifier> {
    config.get("type")?.as_str()?.to_owned().try_into().ok()
}

/// host-local's folder, if a rendered configuration names one.
fn data_dir(config: &Map<String, Value>) -> Option<&Path> {
    config.get("ipam")?.get("dataDir")?.as_str().map(Path::new)
}

/// How a pod was attached, by the result of ADD. The bridge, which is there too, is no end of a cable.
fn attached_by(result: &Value, config: &Map<String, Value>) -> Attached {
    let list = |key: &str| result[key].as_array().into_iter().flatten();
    let (in_the_pod, on_the_host): (Vec<&Value>, Vec<&Value>) =
        list("interfaces").partition(|i| i["sandbox"].as_str().is_some_and(|sandbox| !sandbox.is_empty()));
    let cables = on_the_host.iter().filter(|i| Some(&i["name"]) != config.get("bridge"));
    let prefixes = list("ips").filter_map(|ip| ip["address"].as_str()?.parse::<IpNetwork>().ok());
    Attached {
        ports: cables.filter_map(|i| i["name"].as_str()).map(str::to_owned).collect(),
        bridge: bridge_of(config).filter(|bridge| on_the_host.iter().any(|i| i["name"] == bridge.as_str())),
        mac: in_the_pod.first().and_then(|i| i["mac"].as_str()?.parse().ok()),
        ips: prefixes.map(|prefix| prefix.ip()).collect(),
    }
}

#[cfg(test)]
#[path = "verbs_tests.rs"]
mod tests;
