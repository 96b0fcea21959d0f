//! What the runtime asks, read from the environment and stdin: CNI spec section 2, "Parameters".
//!
//! [`Request::read`] turns both into a value in which everything has been checked, so that the rest of the
//! shim neither reads the environment nor meets a name that could be a path. Checks run in the order of the
//! spec's error codes that a runtime relies on: the environment (4), reading (5), JSON (6), the version (1),
//! the network configuration (7, 2).

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::io::Read;
use std::path::PathBuf;

use fabric_core::model::Invalid;
use serde::Deserialize;
use serde_json::Value;

use crate::conf::{self, Conf};
use crate::error::{CniError, Code};
use crate::spec::{AttachmentId, Verb};
use crate::version::SpecVersion;

/// The largest network configuration that is read, in bytes. Real ones have a few thousand.
pub const MAX_STDIN: u64 = 1024 * 1024;

/// An attachment and where it ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// Which.
    pub id: AttachmentId,
    /// The container's network namespace; on DEL it may be gone.
    pub netns: Option<PathBuf>,
}

/// A verb with what it works on.
#[derive(Debug)]
pub enum Action {
    /// Attach.
    Add(Attachment),
    /// Detach.
    Del(Attachment),
    /// Compare with the result of ADD.
    Check(Attachment, Value),
    /// Detach all but these.
    Gc(BTreeSet<AttachmentId>),
    /// Tell whether ADD would work.
    Status,
}

/// A request about a network.
#[derive(Debug)]
pub struct Call<C> {
    /// What is asked.
    pub action: Action,
    /// Of which network.
    pub conf: C,
    /// The folders of plugins, in order (`CNI_PATH`).
    pub plugin_dirs: Vec<PathBuf>,
    /// What the runtime's user adds (`CNI_ARGS`): `KEY=VALUE;…`.
    pub args: String,
}

/// All that a runtime may ask of a plugin that is configured by a `C`.
#[derive(Debug)]
pub enum Request<C> {
    /// VERSION; the answer is in this version.
    Version(SpecVersion),
    /// Everything else.
    Call(Box<Call<C>>),
}

impl<C: Conf> Request<C> {
    /// Reads a request from `env`, which looks a variable up, and `stdin`.
    ///
    /// # Errors
    /// What the runtime is to be told, by the spec's code for it.
    pub fn read(env: impl Fn(&str) -> Option<OsString>, stdin: impl Read) -> Result<Self, CniError> {
        // An empty variable counts as a missing one, as in the reference implementation.
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let verb = read_verb(env)?;
        let missing: Vec<_> = verb.required().iter().copied().filter(|name| env(name).is_none()).collect();
        if !missing.is_empty() {
            return Err(environment(format!("{verb} needs {}, which the runtime has not set", missing.join(", "))));
        }
        let json = read_bounded(stdin)?;
        if verb == Verb::Version {
            return read_version_request(&json);
        }
        Self::decode(verb, env, &json).map_err(|error| error.told_in(asked_version(&json).ok().flatten()))
    }

    fn decode(verb: Verb, env: impl Fn(&str) -> Option<OsString>, json: &[u8]) -> Result<Self, CniError> {
        let object = conf::object(json, verb)?;
        let prev_result = object.get("prevResult").filter(|result| !result.is_null()).cloned();
        let valid = if verb == Verb::Gc { conf::valid_attachments(&object)? } else { BTreeSet::new() };
        let conf = C::decode(object)?;
        let attachment = || -> Result<Attachment, CniError> {
            Ok(Attachment { id: read_id(&env)?, netns: env("CNI_NETNS").map(PathBuf::from) })
        };
        let action = match verb {
            Verb::Add => Action::Add(attachment()?),
            Verb::Del => Action::Del(attachment()?),
            Verb::Check => Action::Check(attachment()?, conf::required(prev_result)?),
            Verb::Gc => Action::Gc(valid),
            Verb::Status | Verb::Version => Action::Status,
        };
        let plugin_dirs = env("CNI_PATH").map(|path| std::env::split_paths(&path).collect()).unwrap_or_default();
        let args = env("CNI_ARGS").unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self::Call(Box::new(Call { action, conf, plugin_dirs, args })))
    }

    /// The version to answer in.
    #[must_use]
    pub fn version(&self) -> SpecVersion {
        match self {
            Self::Version(version) => *version,
            Self::Call(call) => call.conf.version(),
        }
    }
}

fn read_verb(env: impl Fn(&str) -> Option<OsString>) -> Result<Verb, CniError> {
    let command = env("CNI_COMMAND").ok_or_else(|| {
        environment(
            "CNI_COMMAND is not set: this is a CNI plugin, which a container runtime starts; \
             for a look at it run: echo '{}' | CNI_COMMAND=VERSION fabric-cni",
        )
    })?;
    let known = Verb::ALL.into_iter().find(|verb| command == verb.as_str());
    known.ok_or_else(|| {
        let all = Verb::ALL.map(Verb::as_str).join(", ");
        environment(format!("CNI_COMMAND is {:.80}, not one of {all}", command.display()))
    })
}

fn read_id(env: impl Fn(&str) -> Option<OsString>) -> Result<AttachmentId, CniError> {
    let wrong = |name: &str, e: &dyn fmt::Display| environment(format!("{name}: {e}"));
    let text = |name| {
        let text = env(name).unwrap_or_default().into_string();
        text.map_err(|raw| wrong(name, &format_args!("{:.80} is not UTF-8", raw.display())))
    };
    let container = text("CNI_CONTAINERID")?.try_into().map_err(|e: String| wrong("CNI_CONTAINERID", &e))?;
    let ifname = text("CNI_IFNAME")?.parse().map_err(|e: Invalid| wrong("CNI_IFNAME", &e))?;
    Ok(AttachmentId { container, ifname })
}

fn read_bounded(stdin: impl Read) -> Result<Vec<u8>, CniError> {
    let mut json = Vec::new();
    stdin
        .take(MAX_STDIN + 1)
        .read_to_end(&mut json)
        .map_err(|e| CniError::new(Code::Io, format!("cannot read the network configuration from stdin: {e}")))?;
    if json.len() as u64 > MAX_STDIN {
        let msg = format!("the network configuration on stdin has more than {MAX_STDIN} bytes");
        return Err(CniError::new(Code::Decode, msg));
    }
    Ok(json)
}

/// VERSION is how a runtime finds out what is spoken, so no version is refused here, nor an empty stdin,
/// which is what runtimes before spec 0.4.0 send.
fn read_version_request<C>(json: &[u8]) -> Result<Request<C>, CniError> {
    if json.is_empty() {
        return Ok(Request::Version(SpecVersion::NEWEST));
    }
    let version = asked_version(json)
        .map_err(|e| CniError::new(Code::Decode, "the request on stdin is not a JSON object").with_details(e))?;
    Ok(Request::Version(version.unwrap_or(SpecVersion::NEWEST)))
}

/// The version in which a request asks, if it is one that is known.
fn asked_version(json: &[u8]) -> serde_json::Result<Option<SpecVersion>> {
    #[derive(Deserialize)]
    struct Versioned {
        #[serde(rename = "cniVersion")]
        version: Option<String>,
    }
    let asked: Versioned = serde_json::from_slice(json)?;
    Ok(asked.version.as_deref().and_then(SpecVersion::parse))
}

fn environment(msg: impl Into<String>) -> CniError {
    CniError::new(Code::InvalidEnvironment, msg)
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
