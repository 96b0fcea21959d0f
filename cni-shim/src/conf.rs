//! The network configuration: CNI spec section 1, and the keys of our own.
//!
//! | key          | default                    | what                                                           |
//! |--------------|----------------------------|----------------------------------------------------------------|
//! | `nodeFile`   | `/run/fabric/node.json`    | where the daemon says what this node has                       |
//! | `stateDir`   | `/var/lib/cni/fabric`      | where attachments are remembered                               |
//! | `dataDir`    | host-local's own           | where host-local remembers addresses                           |
//! | `delegate`   | `{"type": "bridge"}`       | keys for the delegate that win over ours, as flannel's plugin has it |
//!
//! What can't be honoured is refused, not ignored: an `ipam` would be somebody's belief about addresses.

use std::collections::BTreeSet;
use std::path::PathBuf;

use fabric_core::handoff::{NODE_FILE, RUN_DIR};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{CniError, Code};
use crate::request::{AttachmentId, Identifier, Verb};
use crate::version::SpecVersion;

/// The network configuration, as the runtime passes it on stdin: CNI spec section 1, plus our keys.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PluginConf {
    /// The version that the runtime speaks.
    #[serde(rename = "cniVersion")]
    pub version: SpecVersion,
    /// The network's name; host-local's folder is called so, too.
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
    /// The user's keys for the delegate; they win over ours.
    #[serde(default)]
    pub delegate: Map<String, Value>,
    /// The result of the plugin before, or, on CHECK and DEL, of ADD.
    pub prev_result: Option<Value>,
    /// All other members, of which some go on to the delegate.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

fn default_node_file() -> PathBuf {
    PathBuf::from(RUN_DIR).join(NODE_FILE)
}

fn default_state_dir() -> PathBuf {
    "/var/lib/cni/fabric".into()
}

impl PluginConf {
    /// Decodes and checks the configuration of a request for `verb`.
    ///
    /// # Errors
    /// Codes 6, 1, 7 and 2, looked for in this order.
    pub fn decode(json: &[u8], verb: Verb) -> Result<Self, CniError> {
        let object: Map<String, Value> = serde_json::from_slice(json).map_err(|e| {
            CniError::new(Code::Decode, "the network configuration on stdin is not a JSON object").with_details(e)
        })?;
        let asked = object.get("cniVersion").and_then(Value::as_str).unwrap_or("none");
        let version = SpecVersion::parse(asked).ok_or_else(|| {
            incompatible(format!(
                "cniVersion is {asked:.40}, spoken are {}",
                SpecVersion::ALL.map(|v| v.as_str()).join(", ")
            ))
        })?;
        if version < verb.since() {
            return Err(incompatible(format!(
                "cniVersion {version} has no {verb}; say \"cniVersion\": \"{}\" or newer in the network configuration",
                verb.since()
            )));
        }
        let conf: Self = serde_json::from_value(Value::Object(object))
            .map_err(|e| invalid(format!("the network configuration can't be used: {e}")))?;
        conf.check()?;
        Ok(conf)
    }

    fn check(&self) -> Result<(), CniError> {
        for (key, path) in [
            ("nodeFile", Some(&self.node_file)),
            ("stateDir", Some(&self.state_dir)),
            ("dataDir", self.data_dir.as_ref()),
        ] {
            if let Some(path) = path.filter(|path| !path.is_absolute()) {
                return Err(invalid(format!("{key} is {}, which is not an absolute path", path.display())));
            }
        }
        for (key, value, reason) in [
            ("ipam", self.others.get("ipam"), "fabricd leases the addresses"),
            ("delegate.ipam", self.delegate.get("ipam"), "fabricd leases the addresses"),
            ("delegate.name", self.delegate.get("name"), "the delegate's network has the name of this one"),
            ("delegate.cniVersion", self.delegate.get("cniVersion"), "the version is negotiated with the delegate"),
        ] {
            if let Some(value) = value {
                let value: String = value.to_string().chars().take(80).collect();
                let msg = format!("{key} is {value}, but can't be set: {reason}; take it out");
                return Err(CniError::new(Code::UnsupportedField, msg));
            }
        }
        if self.delegate_type()? == self.plugin {
            return Err(invalid(format!("delegate.type is {}, which is this plugin itself", self.plugin)));
        }
        Ok(())
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

    /// The result that CHECK can't do without.
    ///
    /// # Errors
    /// Code 7 when it is missing.
    pub fn required_prev_result(&self) -> Result<Value, CniError> {
        self.prev_result.clone().ok_or_else(|| {
            invalid("CHECK needs prevResult, the result of ADD, in the network configuration; the runtime left it out")
        })
    }

    /// The attachments that GC must spare.
    ///
    /// libcni writes the list under two names, since the spec's text and its code once differed.
    ///
    /// # Errors
    /// Code 7 when it is missing or no such list.
    pub fn valid_attachments(&self) -> Result<BTreeSet<AttachmentId>, CniError> {
        let list = self.others.get("cni.dev/valid-attachments").or_else(|| self.others.get("cni.dev/attachments"));
        // Without a list nothing is known to be valid, which must not read as "nothing is valid".
        let list = list.ok_or_else(|| invalid("GC needs cni.dev/valid-attachments; the runtime left it out"))?;
        if list.is_null() {
            // How Go writes an empty one.
            return Ok(BTreeSet::new());
        }
        serde_json::from_value(list.clone())
            .map_err(|e| invalid(format!("cni.dev/valid-attachments can't be used: {e}")))
    }
}

fn incompatible(msg: impl Into<String>) -> CniError {
    CniError::new(Code::IncompatibleVersion, msg)
}

fn invalid(msg: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidConfig, msg)
}
