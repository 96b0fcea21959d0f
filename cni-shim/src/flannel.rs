//! Pods that flannel's plugin attached before this node was taken over.
//!
//! ```text
//! /var/lib/cni/flannel/<container>      what flannel's plugin told its delegate: one JSON object
//! /var/lib/cni/networks/cbr0/<address>  the container's address, under the network's name
//! ```
//!
//! The conflist keeps the network's name when the plugin changes, so the runtime says DEL, CHECK and GC of these pods to
//! `fabric-cni`. It does what flannel's plugin would (cni-plugin, `flannel_linux.go`, `doCmdDel`): the delegate gets the
//! configuration of ADD, which frees the address in the network's own folder and, with `ipMasq`, removes the pod's chain
//! `CNI-…` in the table `nat`; then the file goes.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{CniError, Code};
use crate::spec::Identifier;
use crate::state::list;

/// Where flannel's plugin keeps its files unless its configuration says `dataDir`.
pub const FLANNEL_DIR: &str = "/var/lib/cni/flannel";

/// The largest file that is read, in bytes: a delegate's configuration is some hundred.
const MAX_FILE: u64 = 1024 * 1024;

/// What the delegate was told of a container; `None` when flannel's plugin has not attached it, or the file says nothing.
#[must_use]
pub fn told(dir: &Path, container: &Identifier) -> Option<Map<String, Value>> {
    let mut content = Vec::new();
    fs::File::open(dir.join(container.as_str())).ok()?.take(MAX_FILE).read_to_end(&mut content).ok()?;
    let config: Map<String, Value> = serde_json::from_slice(&content).ok()?;
    let has = |key: &str| config.get(key).is_some_and(Value::is_string);
    (has("type") && has("name")).then_some(config)
}

/// A result of ADD without its routes that name no gateway. flannel's plugin gives the network's route so; `bridge` makes
/// it through the gateway all the same, and then its CHECK looks for one without. flannel's plugin checks nothing at all.
#[must_use]
pub fn without_onlink_routes(result: &Value) -> Value {
    let mut result = result.clone();
    if let Some(routes) = result.get_mut("routes").and_then(Value::as_array_mut) {
        routes.retain(|route| route.get("gw").is_some());
    }
    result
}

/// Forgets a container that is detached.
///
/// # Errors
/// Code 5 when the disk refuses.
pub fn forget(dir: &Path, container: &Identifier) -> Result<(), CniError> {
    let file = dir.join(container.as_str());
    match fs::remove_file(&file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            let msg = format!("detached, but cannot remove {}: {e}; DEL again when it can be", file.display());
            Err(CniError::new(Code::Io, msg))
        }
        _ => Ok(()),
    }
}

/// The containers that flannel's plugin attached to `network` and that nobody has detached since.
///
/// # Errors
/// Code 5 when the folder can't be read. One that doesn't exist is empty.
pub fn containers(dir: &Path, network: &Identifier) -> Result<Vec<Identifier>, CniError> {
    let names = list(dir)?.into_iter().filter_map(|name| Identifier::try_from(name).ok());
    let of_it = |container: &Identifier| {
        told(dir, container).is_some_and(|config| config.get("name").is_some_and(|name| name == network.as_str()))
    };
    Ok(names.filter(of_it).collect())
}
