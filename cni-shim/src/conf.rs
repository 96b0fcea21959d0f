//! The network configuration: CNI spec section 1, and the keys of our own.
//!
//! | key          | default                    | what                                                           |
//! |--------------|----------------------------|----------------------------------------------------------------|
//! | `nodeFile`   | `/run/fabric/node.json`    | where the daemon says what this node has                       |
//! | `stateDir`   | `/var/lib/cni/fabric`      | where attachments are remembered                               |
//! | `dataDir`    | host-local's own           | where host-local remembers addresses                           |
//! | `delegate`   | `{"type": "bridge"}`       | keys for the delegate that win over ours, as flannel's plugin has it |
//! | `flannelDir` | `/var/lib/cni/flannel`     | what flannel's plugin remembers of pods from before this node was taken over |
//! | `readyTimeout` | 5                        | seconds that ADD waits for a node that isn't ready             |
//! | `policyTimeout` | 5                       | seconds that ADD waits for the pod's network policies; 0: it doesn't |
//!
//! What can't be honoured is refused, not ignored: `ipam.ranges` would be somebody's belief about addresses. Another
//! IPAM plugin than host-local is the user's own affair, and gets `delegate.ipam` as it stands.

use std::collections::BTreeSet;
use std::path::PathBuf;

use fabric_core::handoff::{ATTACHMENTS_DIR, NODE_FILE, RUN_DIR};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::{CniError, Code};
use crate::flannel::FLANNEL_DIR;
use crate::spec::{AttachmentId, Identifier, Verb};
use crate::version::SpecVersion;

/// The network configuration, as the runtime passes it on stdin: CNI spec section 1, plus our keys.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PluginConf {
    /// The version that the runtime speaks.
    #[serde(rename = "cniVersion")]
    pub version: SpecVersion,
    /// The network's name; its attachments' folder is called so, too.
    pub name: Identifier,
    /// How this plugin is called.
    #[serde(rename = "type")]
    pub plugin: Identifier,
    /// Where the daemon puts `node.json`.
    #[serde(default = "default_node_file")]
    pub node_file: PathBuf,
    /// Where attachments are remembered.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Where host-local remembers addresses, if not at its default `/var/lib/cni/networks`.
    pub data_dir: Option<PathBuf>,
    /// Where flannel's plugin remembered the pods that it attached.
    #[serde(default = "default_flannel_dir")]
    pub flannel_dir: PathBuf,
    /// The user's keys for the delegate; they win over ours.
    #[serde(default)]
    pub delegate: Map<String, Value>,
    /// How many seconds ADD waits for the node to become ready.
    #[serde(default = "default_ready_timeout")]
    pub ready_timeout: u16,
    /// How many seconds ADD waits for the pod's network policies to be applied, where these are on; with 0 it doesn't wait.
    #[serde(default = "default_ready_timeout")]
    pub policy_timeout: u16,
    /// The result of the plugin before, or, on CHECK and DEL, of ADD.
    pub prev_result: Option<Value>,
    /// All other members, of which some go on to the delegate.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

fn default_node_file() -> PathBuf {
    PathBuf::from(RUN_DIR).join(NODE_FILE)
}

fn default_flannel_dir() -> PathBuf {
    FLANNEL_DIR.into()
}

fn default_ready_timeout() -> u16 {
    5
}

fn default_state_dir() -> PathBuf {
    ATTACHMENTS_DIR.into()
}

/// A plugin's configuration.
pub trait Conf: DeserializeOwned {
    /// The version that the runtime speaks.
    fn version(&self) -> SpecVersion;

    /// Refuses what can't work or can't be honoured.
    ///
    /// # Errors
    /// Codes 7 and 2.
    fn check(&self) -> Result<(), CniError>;

    /// Decodes and checks it.
    ///
    /// # Errors
    /// Codes 7 and 2.
    fn decode(object: Map<String, Value>) -> Result<Self, CniError> {
        let conf: Self = serde_json::from_value(Value::Object(object))
            .map_err(|e| invalid(format!("the network configuration can't be used: {e}")))?;
        conf.check()?;
        Ok(conf)
    }
}

/// The configuration of a request for `verb` as an object of a version that has the verb.
///
/// # Errors
/// Codes 6 and 1.
pub fn object(json: &[u8], verb: Verb) -> Result<Map<String, Value>, CniError> {
    let object: Map<String, Value> = serde_json::from_slice(json).map_err(|e| {
        CniError::new(Code::Decode, "the network configuration on stdin is not a JSON object").with_details(e)
    })?;
    let asked = object.get("cniVersion").and_then(Value::as_str).unwrap_or("none");
    let version = SpecVersion::parse(asked).ok_or_else(|| {
        let spoken = SpecVersion::ALL.map(|v| v.as_str()).join(", ");
        incompatible(format!("cniVersion is {asked:.40}, spoken are {spoken}"))
    })?;
    if version < verb.since() {
        return Err(incompatible(format!(
            "cniVersion {version} has no {verb}; say \"cniVersion\": \"{}\" or newer in the network configuration",
            verb.since()
        )));
    }
    Ok(object)
}

/// The result that CHECK can't do without.
///
/// # Errors
/// Code 7 when it is missing.
pub fn required(prev_result: Option<Value>) -> Result<Value, CniError> {
    prev_result.ok_or_else(|| {
        invalid("CHECK needs prevResult, the result of ADD, in the network configuration; the runtime left it out")
    })
}

/// The attachments that GC must spare.
///
/// libcni writes the list under two names, since the spec's text and its code once differed.
///
/// # Errors
/// Code 7 when it is missing or no such list.
pub fn valid_attachments(object: &Map<String, Value>) -> Result<BTreeSet<AttachmentId>, CniError> {
    let list = object.get("cni.dev/valid-attachments").or_else(|| object.get("cni.dev/attachments"));
    // Without a list nothing is known to be valid, which must not read as "nothing is valid".
    let list = list.ok_or_else(|| invalid("GC needs cni.dev/valid-attachments; the runtime left it out"))?;
    if list.is_null() {
        // How Go writes an empty one.
        return Ok(BTreeSet::new());
    }
    serde_json::from_value(list.clone()).map_err(|e| invalid(format!("cni.dev/valid-attachments can't be used: {e}")))
}

impl Conf for PluginConf {
    fn version(&self) -> SpecVersion {
        self.version
    }

    fn check(&self) -> Result<(), CniError> {
        for (key, path) in [
            ("nodeFile", Some(&self.node_file)),
            ("stateDir", Some(&self.state_dir)),
            ("dataDir", self.data_dir.as_ref()),
            ("flannelDir", Some(&self.flannel_dir)),
        ] {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                return Err(invalid(format!("{key} is {}, which is not an absolute path", path.display())));
            }
        }
        for (key, value, reason) in [
            ("ipam", self.others.get("ipam"), "fabricd leases the addresses; delegate.ipam is for another IPAM plugin"),
            ("delegate.ipam.ranges", self.own_ipam("ranges"), "fabricd leases the addresses"),
            ("delegate.ipam.subnet", self.own_ipam("subnet"), "fabricd leases the addresses"),
            (
                "delegate.name",
                self.delegate.get("name"),
                "all networks of the node share one IPAM state, which is called so",
            ),
            ("delegate.cniVersion", self.delegate.get("cniVersion"), "the version is negotiated with the delegate"),
        ] {
            if let Some(value) = value {
                let value: String = value.to_string().chars().take(80).collect();
                let msg = format!("{key} is {value}, but can't be set: {reason}; take it out");
                return Err(CniError::new(Code::UnsupportedField, msg));
            }
        }
        if self.delegate.get("ipam").is_some_and(|ipam| !ipam.is_object()) {
            return Err(invalid("delegate.ipam is not an object"));
        }
        if self.delegate_type()? == self.plugin {
            return Err(invalid(format!("delegate.type is {}, which is this plugin itself", self.plugin)));
        }
        Ok(())
    }
}

impl PluginConf {
    /// True when host-local keeps the addresses, as it does unless the user says otherwise.
    #[must_use]
    pub fn uses_host_local(&self) -> bool {
        let kind = self.delegate.get("ipam").and_then(|ipam| ipam.get("type"));
        kind.is_none_or(|kind| kind == "host-local")
    }

    /// A key of the user's for host-local.
    fn own_ipam(&self, key: &str) -> Option<&Value> {
        self.delegate.get("ipam").filter(|_| self.uses_host_local())?.get(key)
    }

    /// The plugin that does the work: `delegate.type`, else `bridge`.
    ///
    /// # Errors
    /// When it is no plugin's name.
    pub fn delegate_type(&self) -> Result<Identifier, CniError> {
        match self.delegate.get("type") {
            None => "bridge".to_owned().try_into(),
            Some(Value::String(plugin)) => plugin.clone().try_into(),
            Some(_) => Err("it is not a string".to_owned()),
        }
        .map_err(|e| invalid(format!("delegate.type can't be used: {e}")))
    }
}

pub(crate) fn incompatible(msg: impl Into<String>) -> CniError {
    CniError::new(Code::IncompatibleVersion, msg)
}

pub(crate) fn invalid(msg: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidConfig, msg)
}
