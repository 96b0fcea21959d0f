//! What each verb does: CNI spec section 2, "CNI operations".
//!
//! Three rules hold it together. Nothing is attached that isn't remembered first. An ADD that fails undoes
//! itself, and forgets only when the undoing has succeeded. DEL succeeds whenever nothing is left, whatever
//! of daemon, node file, state file or network namespace is missing.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabric_core::attachments::{IPAM_NETWORK, SavedPod};
use fabric_core::handoff::{Attached, NodeFile};
use ipnetwork::IpNetwork;
use serde_json::{Map, Value, json};

use crate::bridge::namespace;
use crate::conf::PluginConf;
use crate::delegate::{Delegate, on_a_bridge, render};
use crate::error::{CniError, Code};
use crate::exec::Exec;
use crate::fast_path;
use crate::flannel;
use crate::node_ipam::NodeIpam;
use crate::policy;
use crate::ready::{await_ready_node, known_node, ready_node};
use crate::request::{Action, Attachment, Call, Request};
use crate::spec::{AttachmentId, Identifier, Verb};
use crate::state::{Attachments, PATIENCE, Saved, boot_id};
use crate::sweep::{Bridge, bridge_of, gateways, make_way};
use crate::version::SpecVersion;
use crate::veths::Veths;

/// Does what is asked, and returns what to print, if anything.
///
/// # Errors
/// What the runtime is to be told.
pub fn answer(request: &Request<PluginConf>, exec: &dyn Exec) -> Result<Option<Value>, CniError> {
    let call = match request {
        Request::Version(version) => return Ok(Some(SpecVersion::spoken(*version))),
        Request::Call(call) => {
            Answering { call, attachments: Attachments::of(&call.conf.state_dir, &call.conf.name), exec }
        }
    };
    match &call.call.action {
        Action::Add(pod) => call.add(pod).map(Some),
        Action::Del(pod) => call.del(pod).map(|()| None),
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
        self.refuse_two_of_one(pod, &config, &node)?;
        let kubernetes = SavedPod::of_args(&self.call.args);
        let saved = Saved { id: pod.id.clone(), netns: pod.netns.clone(), pod: kubernetes, config, attached: None };
        self.forget_earlier_boot(pod)?;
        let held = self.attachments.create(&saved)?;

        let told = told(&conf.name, pod, &saved.config);
        let undo = || delegate.call(Verb::Del, Some(&told), &saved.config, None).map(drop);
        let attach = || {
            let config = self
                .ipam(&saved.config)
                .map_or_else(|| Ok(saved.config.clone()), |ipam| ipam.without_taken(&saved.config))?;
            let result = delegate.call(Verb::Add, Some(&told), &config, conf.prev_result.as_ref())?;
            self.limit_ipv6(pod, &config, &node).map(|()| result)
        };
        let attempt = || self.make_way(&saved.config).and_then(|()| attach()).map_err(|failure| (failure, undo()));
        let attached = attempt().or_else(|(failure, undone)| {
            // Perhaps for want of what dead pods hold.
            let freed = || self.sweep(&saved.config).is_ok_and(|freed| freed > 0);
            if undone.is_ok() && freed() { attempt() } else { Err((failure, undone)) }
        });
        match attached {
            Ok(result) => {
                held.attached(&attached_by(&result, &saved.config));
                self.await_policies(&pod.id);
                Ok(result)
            }
            Err((failure, undone)) => Err(match undone.and_then(|()| held.forget()) {
                Ok(()) => failure,
                // The file stays, for the DEL or GC that the runtime owes.
                Err(e) => failure.with_details(format!("cleaning up failed as well, DEL has to finish it: {e}")),
            }),
        }
    }

    /// IPv6's tunnel takes less than IPv4's, by which the interface goes.
    fn limit_ipv6(&self, pod: &Attachment, config: &Map<String, Value>, node: &NodeFile) -> Result<(), CniError> {
        let Some(mtu) = node.ipv6_mtu.filter(|_| node.ipv6.is_some() && on_a_bridge(&self.call.conf)) else {
            return Ok(());
        };
        // A person may have said a smaller one for the interface.
        let is_larger = config.get("mtu").and_then(Value::as_u64).is_some_and(|interface| interface > mtu.into());
        match &pod.netns {
            Some(netns) if is_larger => self.exec.limit_ipv6(netns, &pod.id.ifname, mtu),
            _ => Ok(()),
        }
    }

    /// Waits until the pod's network policies are applied. Until then it is closed, so a pod whose time is up is attached
    /// all the same.
    fn await_policies(&self, id: &AttachmentId) {
        let conf = &self.call.conf;
        let patience = Duration::from_secs(conf.policy_timeout.into());
        let Some(folder) = policy::folder(&conf.node_file).filter(|_| !patience.is_zero()) else { return };
        if !policy::is_applied(&folder, id, patience) {
            // By the spec, text for the runtime's log.
            let _ = writeln!(
                io::stderr(),
                "{id} is attached, but its network policies are not applied after {} s: it reaches nobody before \
                 fabricd has applied them; to see what it waits for: fabricctl status",
                conf.policy_timeout
            );
        }
    }

    /// Closes a pod that goes: whoever gets its addresses next is closed until its own policies are applied.
    fn close(&self, saved: Option<&Saved>) -> Result<(), CniError> {
        let ips = saved.and_then(|saved| saved.attached.as_ref()).map_or(&[][..], |attached| &attached.ips);
        if policy::folder(&self.call.conf.node_file).is_none() {
            return Ok(());
        }
        policy::close(ips).map_err(|error| {
            let msg =
                format!("cannot take the pod's addresses from the table fabric-policy: {error}; nothing was detached");
            CniError::new(Code::Io, msg)
        })
    }

    /// Refuses what would make one address that of two pods.
    fn refuse_two_of_one(
        &self,
        pod: &Attachment,
        config: &Map<String, Value>,
        node: &NodeFile,
    ) -> Result<(), CniError> {
        pod.id.refuse_ambiguous(&self.call.conf.name)?;
        self.ipam(config).map_or(Ok(()), |ipam| ipam.refuse_another_than(node.cni_data_dir.as_deref()))
    }

    /// Undoes what is saved of a pod of the same ID that ended with an earlier boot, of which the runtime never said DEL: `ctr`
    /// and others are given IDs by people, who use them again.
    fn forget_earlier_boot(&self, pod: &Attachment) -> Result<(), CniError> {
        let Some(saved) = self.attachments.read(&pod.id) else { return Ok(()) };
        let is_earlier = saved.attached.as_ref().is_some_and(|one| one.outlived_namespace(boot_id().as_deref()));
        if is_earlier && Veths::look(&saved.config, &self.call.conf.state_dir)?.show_the_end_of(Some(&saved)) {
            self.detach(&self.attachments, &Attachment { id: pod.id.clone(), netns: None }, PATIENCE)?;
        }
        Ok(())
    }

    fn del(&self, pod: &Attachment) -> Result<(), CniError> {
        self.detach_flannels(pod)?;
        if self.detach(&self.attachments, pod, PATIENCE)? { Ok(()) } else { self.detach_elsewhere(pod) }
    }

    /// Undoes one attachment of a network. False when nothing was saved of it that could be read.
    fn detach(&self, attachments: &Attachments, pod: &Attachment, patience: Duration) -> Result<bool, CniError> {
        let conf = &self.call.conf;
        let held = attachments.open(&pod.id, patience)?;
        let saved = held.as_ref().and_then(|held| held.saved());
        self.close(saved.as_ref())?;
        // Before its address can be another pod's: programs may still deliver to this one's port, with no daemon to tell them.
        let ips = saved.as_ref().and_then(|saved| saved.attached.as_ref()).map_or(&[][..], |attached| &attached.ips);
        fast_path::forget(Path::new(fast_path::BPFFS), ips)?;
        let (known, gone) = (saved.is_some(), saved.clone());
        let mut config = saved.map_or_else(|| render(conf, None), |saved| saved.config);
        // A namespace that is gone took the interface along: what is left is the address.
        let netns = pod.netns.clone().filter(|path| namespace(path).is_some());
        let pod = Attachment { id: pod.id.clone(), netns };
        // The plugin that attached it, whatever the configuration says by now.
        let kind = kind_of(&config).map_or_else(|| conf.delegate_type(), Ok)?;
        let delegate = self.delegate(kind)?;
        let detach = |config: &Map<String, Value>| {
            let told = told(&attachments.network, &pod, config);
            delegate.call(Verb::Del, Some(&told), config, conf.prev_result.as_ref()).map(drop)
        };
        detach(&config)?;
        if !known && self.ipam(&config).is_some_and(|ipam| ipam.has_folder_of(&attachments.network)) {
            // It may have been attached before all networks shared one IPAM state.
            config.insert("name".into(), attachments.network.as_str().into());
            detach(&config)?;
        }
        attachments.sweep_drafts(Some(&pod.id));
        held.map_or(Ok(()), |held| held.forget())?;
        // Once more: a daemon that has seen the pod still attached may have opened it again.
        self.close(gone.as_ref())?;
        Ok(known)
    }

    /// Undoes what flannel's plugin attached, as that would. Before anything else, since the delegate learns from the pod's
    /// interface which chains are its own.
    fn detach_flannels(&self, pod: &Attachment) -> Result<(), CniError> {
        let dir = &self.call.conf.flannel_dir;
        let Some(config) = flannel::told(dir, &pod.id.container).filter(|_| !self.attachments.exists(&pod.id)) else {
            return Ok(());
        };
        let netns = pod.netns.clone().filter(|path| namespace(path).is_some());
        let pod = Attachment { id: pod.id.clone(), netns };
        let delegate = self.delegate(kind_of(&config).map_or_else(|| self.call.conf.delegate_type(), Ok)?)?;
        delegate.call(Verb::Del, Some(&pod), &config, self.call.conf.prev_result.as_ref())?;
        flannel::forget(dir, &pod.id.container)
    }

    /// Undoes what was attached under another network's name, as after a conflist was renamed, or by another plugin, as
    /// flannel's: the runtime says DEL under today's name.
    fn detach_elsewhere(&self, pod: &Attachment) -> Result<(), CniError> {
        let conf = &self.call.conf;
        let config = render(conf, known_node(&conf.node_file).as_ref());
        for attachments in Attachments::of_all_networks(&conf.state_dir)? {
            let Some(saved) = attachments.read(&pod.id).filter(|_| attachments.network != conf.name) else { continue };
            let is_this_pod = saved.netns == pod.netns && pod.netns.as_deref().and_then(namespace).is_some();
            if is_this_pod || Veths::look(&config, &conf.state_dir)?.show_the_end_of(Some(&saved)) {
                self.detach(&attachments, pod, PATIENCE)?;
            }
        }
        self.ipam(&config).map_or(Ok(()), |ipam| ipam.free_elsewhere(&pod.id))
    }

    fn check(&self, pod: &Attachment, prev_result: &Value) -> Result<(), CniError> {
        let conf = &self.call.conf;
        let saved = self.attachments.read(&pod.id).map(|saved| (saved.config, prev_result.clone()));
        let flannels = || {
            let config = flannel::told(&conf.flannel_dir, &pod.id.container)?;
            Some((config, flannel::without_onlink_routes(prev_result)))
        };
        let (config, prev_result) = saved.or_else(flannels).ok_or_else(|| {
            let msg = format!("{} was not attached by this plugin, or its state is lost; DEL and ADD it again", pod.id);
            CniError::new(Code::NotAttached, msg)
        })?;
        let delegate = self.delegate(kind_of(&config).map_or_else(|| conf.delegate_type(), Ok)?)?;
        if delegate.version < Verb::Check.since() {
            return Ok(());
        }
        let told = told(&conf.name, pod, &config);
        delegate.call(Verb::Check, Some(&told), &config, Some(&prev_result)).map(drop)
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
            match self.detach(&self.attachments, &pod, Duration::ZERO) {
                Err(e) if e.code() != Code::TryAgainLater => failures.push(format!("{}: {e}", pod.id)),
                _ => {}
            }
        }
        self.attachments.sweep_drafts(None);
        let mut config = render(conf, ready_node(&conf.node_file).ok().as_ref());
        let mut spared: BTreeSet<AttachmentId> = valid.iter().map(|id| id.told(&conf.name)).collect();
        if let Some(ipam) = self.ipam(&config) {
            failures.extend(ipam.free_all_but(&conf.name, valid).err().map(|e| e.to_string()));
            // What it is told to share is other networks' too.
            spared.extend(ipam.told_of_others(&conf.name)?);
        }
        // Their addresses are freed by now; what flannel's plugin remembered of them is of no use any more.
        let is_valid = |container: &Identifier| valid.iter().any(|id| id.container == *container);
        for container in flannel::containers(&conf.flannel_dir, &conf.name)?.iter().filter(|one| !is_valid(one)) {
            failures.extend(flannel::forget(&conf.flannel_dir, container).err().map(|e| e.to_string()));
        }
        let delegate = self.delegate(conf.delegate_type()?)?;
        // Our own would do what has just been done.
        if !delegate.is_ours() && delegate.version >= Verb::Gc.since() {
            config.insert("cni.dev/valid-attachments".into(), json!(spared));
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
        let config = render(conf, Some(&node));
        let refused = self.ipam(&config).map(|ipam| ipam.refuse_another_than(node.cni_data_dir.as_deref()));
        refused.unwrap_or(Ok(())).map_err(|e| unavailable(e.to_string()))?;
        if delegate.version < Verb::Status.since() {
            return Ok(());
        }
        delegate.call(Verb::Status, None, &config, None).map(drop)
    }

    /// Undoes the attachments of pods that no longer exist, of all networks, and frees the addresses that no pod can
    /// have. Returns how many.
    fn sweep(&self, config: &Map<String, Value>) -> Result<usize, CniError> {
        let state_dir = &self.call.conf.state_dir;
        let veths = Veths::look(config, state_dir)?;
        let mut freed = 0;
        for attachments in Attachments::of_all_networks(state_dir)? {
            for (id, saved) in attachments.read_all()? {
                let gone = veths.show_the_end_of(saved.as_ref());
                let detach = || self.detach(&attachments, &Attachment { id: id.clone(), netns: None }, Duration::ZERO);
                freed += usize::from(gone && detach().is_ok());
            }
        }
        let Some(ipam) = self.ipam(config).filter(|_| on_a_bridge(&self.call.conf)) else { return Ok(freed) };
        let none_is_lost = || Ok(Veths::look(config, state_dir)?.all_are_known());
        Ok(freed + ipam.free_orphans(&self.call.conf.name, none_is_lost)?)
    }

    /// Makes way for a pod where earlier ones have left something.
    fn make_way(&self, config: &Map<String, Value>) -> Result<(), CniError> {
        let conf = &self.call.conf;
        if on_a_bridge(conf) && make_way(config, &conf.state_dir)? == Bridge::Missing {
            // The first pod since the node was booted.
            self.sweep(config)?;
            if let (Some(bridge), true) = (bridge_of(config), gateways(config).iter().any(IpNetwork::is_ipv6)) {
                let mtu = config.get("mtu").and_then(Value::as_u64).and_then(|mtu| mtu.try_into().ok());
                self.exec.make_bridge(&bridge, mtu.unwrap_or_default())?;
            }
        }
        Ok(())
    }

    /// The addresses of this node, if host-local keeps them.
    fn ipam(&self, config: &Map<String, Value>) -> Option<NodeIpam<'_>> {
        let conf = &self.call.conf;
        conf.uses_host_local().then(|| NodeIpam::of(config, &conf.state_dir))
    }

    fn delegate(&self, kind: Identifier) -> Result<Delegate<'_>, CniError> {
        Delegate::find(self.call, kind, self.exec)
    }
}

/// The plugin that a rendered configuration is for.
fn kind_of(config: &Map<String, Value>) -> Option<Identifier> {
    config.get("type")?.as_str()?.to_owned().try_into().ok()
}

/// What the delegate is told of an attachment to `network`: files of before all networks shared one IPAM state name the
/// network itself, and then the container is called as the runtime calls it.
fn told(network: &Identifier, pod: &Attachment, config: &Map<String, Value>) -> Attachment {
    let shared = config.get("name").is_some_and(|name| name == IPAM_NETWORK);
    let id = if shared { pod.id.told(network) } else { pod.id.clone() };
    Attachment { id, netns: pod.netns.clone() }
}

/// How a pod was attached, by the result of ADD. The bridge, which is there too, is no end of a veth.
fn attached_by(result: &Value, config: &Map<String, Value>) -> Attached {
    let list = |key: &str| result[key].as_array().into_iter().flatten();
    let (in_the_pod, on_the_host): (Vec<&Value>, Vec<&Value>) =
        list("interfaces").partition(|i| i["sandbox"].as_str().is_some_and(|sandbox| !sandbox.is_empty()));
    let veths = on_the_host.iter().filter(|i| Some(&i["name"]) != config.get("bridge"));
    let prefixes = list("ips").filter_map(|ip| ip["address"].as_str()?.parse::<IpNetwork>().ok());
    Attached {
        ports: veths.filter_map(|i| i["name"].as_str()).map(str::to_owned).collect(),
        bridge: bridge_of(config).filter(|bridge| on_the_host.iter().any(|i| i["name"] == bridge.as_str())),
        mac: in_the_pod.first().and_then(|i| i["mac"].as_str()?.parse().ok()),
        ips: prefixes.map(|prefix| prefix.ip()).collect(),
        boot: boot_id(),
    }
}

#[cfg(test)]
#[path = "verbs_tests.rs"]
mod tests;
