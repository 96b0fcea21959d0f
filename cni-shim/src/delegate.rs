//! The plugin that does the work, `bridge` unless the user says otherwise, and what it is told.
//!
//! `fabric-bridge`, which does `bridge`'s work faster, is part of this binary and called as a function: when the user
//! says `"type": "fabric-bridge"`, and wherever `bridge` isn't installed.
//!
//! The shim knows what `bridge` can't: this node's subnet, the whole network and the MTU. It renders them into
//! a network configuration and calls the delegate with it, as the spec's section 4 describes ("Plugin
//! Delegation"): the same environment, but one network name for all networks, since it is host-local's folder too and the
//! subnet is the node's ([`crate::node_ipam`]).
//!
//! The delegate is called in the highest version that it and the runtime both know. Which it knows is asked
//! once and kept in a cache; its key is the binary's path, time and size, so that an upgrade asks again.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use fabric_core::attachments::{DEFAULT_BRIDGE, IPAM_NETWORK};
use fabric_core::handoff::NodeFile;
use fabric_core::model::Family;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::bridge::BridgeConf;
use crate::conf::{self, Conf, PluginConf};
use crate::error::{CniError, Code};
use crate::exec::{Exec, ExecError, Exit, Invocation};
use crate::request::{Action, Attachment, Call};
use crate::spec::{Identifier, Verb};
use crate::state;
use crate::version::{SpecVersion, convert};

/// The plugin that does the work unless the user says otherwise.
const BRIDGE: &str = "bridge";

/// Our own.
const OURS: &str = "fabric-bridge";

/// Members of our own configuration that are the delegate's as well.
const PASSED_ON: [&str; 4] = ["args", "capabilities", "dns", "runtimeConfig"];

/// What the delegate is told about `node`, the user's keys last. `cniVersion` and `prevResult` are set anew at
/// every call.
///
/// Without a node it is told enough to detach. host-local frees by container ID and interface, looking through
/// all of `<dataDir>/fabric`; the ranges only have to be there and valid (plugins' ipam/host-local
/// main.go, `cmdDel`: `LoadIPAMConfig` wants at least one). So a range that belongs to nobody does, and an
/// address is freed even if the node's subnet has changed since. `bridge` deletes the interface by its name.
#[must_use]
pub fn render(conf: &PluginConf, node: Option<&NodeFile>) -> Map<String, Value> {
    let ours = json!({
        "name": IPAM_NETWORK,
        "type": "bridge",
        "bridge": DEFAULT_BRIDGE,
        "isGateway": true,
        "isDefaultGateway": true,
        // A pod may reach itself through a service address.
        "hairpinMode": true,
        // Pods see each other's own addresses.
        "ipMasq": false,
    });
    let mut told = Map::new();
    told.extend(ours.as_object().cloned().unwrap_or_default());
    told.extend(node.map(|node| ("mtu".to_owned(), node.mtu.into())));
    told.extend(PASSED_ON.iter().filter_map(|key| Some(((*key).to_owned(), conf.others.get(*key)?.clone()))));
    told.extend(conf.delegate.clone());
    told.insert("ipam".into(), Value::Object(ipam(conf, node)));
    told
}

/// Where the delegate gets addresses from.
fn ipam(conf: &PluginConf, node: Option<&NodeFile>) -> Map<String, Value> {
    let users = conf.delegate.get("ipam").and_then(Value::as_object).cloned().unwrap_or_default();
    if !conf.uses_host_local() {
        return users;
    }
    let (ranges, routes): (Vec<Value>, Vec<Value>) = match node {
        Some(node) => {
            let subnets = node.subnets();
            let ranges = subnets.values().map(|ours| json!([{ "subnet": ours.subnet }])).collect();
            // The gateway is what host-local would take by itself, but bridge's CHECK looks for a route without
            // one unless the result says so.
            let network = subnets.values().map(|ours| json!({ "dst": ours.network, "gw": ours.subnet.gateway() }));
            // Only bridges know isDefaultGateway.
            let any = |family| if family == Family::V4 { "0.0.0.0/0" } else { "::/0" };
            let default = subnets.values().filter(|_| !on_a_bridge(conf)).map(|ours| ours.subnet.family());
            let default = default.map(|family| json!({ "dst": any(family) }));
            (ranges, network.chain(default).collect())
        }
        // TEST-NET-1 of RFC 5737.
        None => (vec![json!([{ "subnet": "192.0.2.0/24" }])], Vec::new()),
    };
    let mut ipam = Map::from_iter([
        ("type".to_owned(), "host-local".into()),
        ("ranges".to_owned(), ranges.into()),
        ("routes".to_owned(), routes.into()),
    ]);
    ipam.extend(conf.data_dir.as_ref().map(|dir| ("dataDir".to_owned(), json!(dir))));
    ipam.extend(users);
    ipam
}

/// True when the delegate attaches pods to a bridge.
#[must_use]
pub fn on_a_bridge(conf: &PluginConf) -> bool {
    conf.delegate.get("type").is_none_or(|kind| kind == BRIDGE || kind == OURS)
}

/// A delegate that was found and asked for its versions.
pub struct Delegate<'a> {
    exec: &'a dyn Exec,
    /// Its binary; none for our own, which is part of this one.
    plugin: Option<PathBuf>,
    /// What the runtime's user adds, for our own; a process inherits it.
    args: &'a str,
    kind: Identifier,
    /// The version that it is called in.
    pub version: SpecVersion,
    /// The version that the runtime speaks.
    requested: SpecVersion,
}

impl<'a> Delegate<'a> {
    /// Finds the plugin `kind` in the folders of `call`, in their order, and agrees on a version.
    ///
    /// # Errors
    /// Code 100 when there is none, 1 when it knows no version that can be converted.
    pub fn find(call: &'a Call<PluginConf>, kind: Identifier, exec: &'a dyn Exec) -> Result<Self, CniError> {
        let (conf, dirs) = (&call.conf, &call.plugin_dirs);
        let found = dirs.iter().map(|dir| dir.join(kind.as_str())).find(|path| path.is_file());
        let (plugin, kind) = match found {
            _ if kind.as_str() == OURS => (None, kind),
            None if kind.as_str() == BRIDGE => (None, OURS.to_owned().try_into().expect("a plugin's name")),
            None => {
                let dirs = dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ");
                let msg = format!("there is no CNI plugin {kind} in CNI_PATH ({dirs}); install the CNI plugins there");
                return Err(CniError::new(Code::DelegateMissing, msg));
            }
            Some(path) => (Some(path), kind),
        };
        let (version, requested) = (conf.version, conf.version);
        let mut delegate = Self { exec, plugin, kind, args: &call.args, version, requested };
        let Some(plugin) = &delegate.plugin else { return Ok(delegate) };
        let known = delegate.versions(plugin, &conf.state_dir.join(".versions"))?;
        let common = SpecVersion::ALL
            .into_iter()
            .rfind(|version| *version <= conf.version && known.iter().any(|known| known == version.as_str()));
        delegate.version = common.ok_or_else(|| {
            let (plugin, known) = (plugin.display(), known.join(", "));
            let msg = format!("{plugin} speaks CNI {known}; none of it serves a request in {}", conf.version);
            CniError::new(Code::IncompatibleVersion, msg)
        })?;
        Ok(delegate)
    }

    /// Whether it is our own, a part of this program.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.plugin.is_none()
    }

    /// Calls it for `verb`. The result, if any, is in the version that the runtime speaks.
    ///
    /// # Errors
    /// The delegate's own error with its code, or one of ours when it has none to tell.
    pub fn call(
        &self,
        verb: Verb,
        attachment: Option<&Attachment>,
        config: &Map<String, Value>,
        prev_result: Option<&Value>,
    ) -> Result<Value, CniError> {
        let mut config = config.clone();
        config.insert("cniVersion".into(), self.version.as_str().into());
        if let Some(result) = prev_result {
            match convert(result.clone(), self.version) {
                Ok(result) => drop(config.insert("prevResult".into(), result)),
                // A DEL must not fail on what it can do without.
                Err(_) if verb == Verb::Del => {}
                Err(e) => return Err(CniError::new(Code::InvalidConfig, format!("prevResult can't be used: {e}"))),
            }
        }
        let Some(plugin) = &self.plugin else {
            return self.call_ours(verb, attachment, config).map_err(|e| e.said_by(format_args!("{OURS} {verb}")));
        };
        let answer = self.run(plugin, verb, attachment, Value::Object(config).to_string().into_bytes())?;
        if verb != Verb::Add {
            return Ok(Value::Null);
        }
        self.result(&answer)
    }

    /// Calls our own plugin, as a function.
    fn call_ours(
        &self,
        verb: Verb,
        attachment: Option<&Attachment>,
        config: Map<String, Value>,
    ) -> Result<Value, CniError> {
        let action = match (verb, attachment.cloned()) {
            (Verb::Add, Some(pod)) => Action::Add(pod),
            (Verb::Del, Some(pod)) => Action::Del(pod),
            (Verb::Check, Some(pod)) => Action::Check(pod, conf::required(config.get("prevResult").cloned())?),
            (Verb::Gc, _) => Action::Gc(conf::valid_attachments(&config)?),
            _ => Action::Status,
        };
        let (conf, args) = (BridgeConf::decode(config)?, self.args.to_owned());
        let call = Call { action, conf, plugin_dirs: Vec::new(), args };
        Ok(call.answer()?.unwrap_or_default())
    }

    fn result(&self, answer: &[u8]) -> Result<Value, CniError> {
        let result: Value = serde_json::from_slice(answer).map_err(|e| self.failed(Verb::Add, answer, &e))?;
        let version = result.get("cniVersion").and_then(Value::as_str).unwrap_or("none");
        if SpecVersion::parse(version).is_none() {
            return Err(self.failed(Verb::Add, answer, &format_args!("its cniVersion is {version:.40}")));
        }
        convert(result, self.requested).map_err(|e| self.failed(Verb::Add, answer, &e))
    }

    fn run(
        &self,
        plugin: &Path,
        verb: Verb,
        attachment: Option<&Attachment>,
        stdin: Vec<u8>,
    ) -> Result<Vec<u8>, CniError> {
        let mut env = vec![("CNI_COMMAND", verb.as_str().into())];
        if let Some(Attachment { id, netns }) = attachment {
            env.push(("CNI_CONTAINERID", id.container.as_str().into()));
            env.push(("CNI_IFNAME", id.ifname.as_str().into()));
            env.push(("CNI_NETNS", netns.as_ref().map_or_else(OsString::new, OsString::from)));
        }
        let exit = self.exec.exec(&Invocation { plugin: plugin.to_owned(), env, stdin }).map_err(|e| {
            let code = match e {
                ExecError::Start { .. } => Code::DelegateMissing,
                ExecError::TimedOut { .. } => Code::DelegateTimedOut,
                ExecError::Follow { .. } => Code::DelegateFailed,
            };
            CniError::new(code, format!("{verb} by the delegate: {e}"))
        })?;
        if exit.status.success() { Ok(exit.stdout) } else { Err(self.relay(verb, &exit)) }
    }

    /// The delegate's error object with a word on where it comes from.
    fn relay(&self, verb: Verb, exit: &Exit) -> CniError {
        #[derive(Deserialize)]
        struct PluginError {
            code: u32,
            msg: String,
            details: Option<String>,
        }
        match serde_json::from_slice::<PluginError>(&exit.stdout) {
            Ok(PluginError { code, msg, details }) if code != 0 => {
                let error = CniError::new(Code::Relayed(code), format!("{} {verb}: {msg}", self.kind));
                details.filter(|text| !text.is_empty()).map_or(error.clone(), |text| error.with_details(text))
            }
            _ => {
                let how = match (exit.status.code(), exit.status.signal()) {
                    (Some(code), _) => format!("it ended with exit code {code} and no CNI error"),
                    (None, signal) => format!("it was killed by signal {}", signal.unwrap_or_default()),
                };
                self.failed(verb, &exit.stdout, &how)
            }
        }
    }

    fn failed(&self, verb: Verb, stdout: &[u8], how: &dyn std::fmt::Display) -> CniError {
        let msg = format!("{verb} by {} failed: {how}", self.kind);
        let said: String = String::from_utf8_lossy(stdout).chars().take(200).collect();
        CniError::new(Code::DelegateFailed, msg).with_details(format!("it printed {said:?}"))
    }

    /// The versions that the delegate says it speaks, from the cache if that is of this binary.
    fn versions(&self, plugin: &Path, cache: &Path) -> Result<Vec<String>, CniError> {
        let cache = cache.join(format!("{}.json", self.kind));
        let binary = Binary::of(plugin);
        if let Some(known) = binary.as_ref().and_then(|binary| CachedVersions::load(&cache, binary)) {
            return Ok(known);
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Answer {
            supported_versions: Vec<String>,
        }
        let question = json!({ "cniVersion": self.requested.as_str() }).to_string();
        let answer = self.run(plugin, Verb::Version, None, question.into_bytes())?;
        let Answer { supported_versions } =
            serde_json::from_slice(&answer).map_err(|e| self.failed(Verb::Version, &answer, &e))?;
        if let Some(binary) = binary {
            CachedVersions { binary, supported_versions: supported_versions.clone() }.save(&cache);
        }
        Ok(supported_versions)
    }
}

/// What tells one build of a plugin from another.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Binary {
    path: PathBuf,
    modified_ns: i128,
    size: u64,
}

impl Binary {
    fn of(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok()?;
        let modified_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        Some(Self { path: path.to_owned(), modified_ns, size: meta.size() })
    }
}

/// A delegate's answer to VERSION, in the cache.
#[derive(Debug, Serialize, Deserialize)]
struct CachedVersions {
    binary: Binary,
    supported_versions: Vec<String>,
}

impl CachedVersions {
    fn load(cache: &Path, binary: &Binary) -> Option<Vec<String>> {
        let known: Self = serde_json::from_slice(&fs::read(cache).ok()?).ok()?;
        (known.binary == *binary).then_some(known.supported_versions)
    }

    /// Without it the delegate is asked again next time, so a full disk is no reason to fail.
    fn save(&self, cache: &Path) {
        if let Ok(json) = serde_json::to_vec(self) {
            let _ = state::replace(cache, &json);
        }
    }
}

#[cfg(test)]
#[path = "delegate_tests.rs"]
mod tests;
