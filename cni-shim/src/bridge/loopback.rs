//! `loopback`: what container runtimes call before a pod's own network, by a program of that name.
//!
//! containerd wants it in its folder of plugins and adds no pod without. Distributions of Kubernetes that bring a network of
//! their own (k3s, RKE2) leave the folder empty when it is switched off. So `fabric-bridge` does it under this name, and
//! `fabricd install-cni` puts the name where there is none.

use std::fs::File;
use std::path::Path;

use fabric_core::model::IfName;
use serde::Deserialize;
use serde_json::{Value, json};

use super::errors::refused;
use super::netns::inside;
use super::wiring::{self, Link};
use crate::conf::Conf;
use crate::error::{CniError, Code};
use crate::netlink::Netlink;
use crate::request::{Action, Attachment, Call, Request};
use crate::version::{SpecVersion, convert};

/// The name that runtimes call.
pub const NAME: &str = "loopback";

/// What a runtime says to it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoopbackConf {
    #[serde(rename = "cniVersion")]
    version: SpecVersion,
    prev_result: Option<Value>,
}

impl Conf for LoopbackConf {
    fn version(&self) -> SpecVersion {
        self.version
    }

    fn check(&self) -> Result<(), CniError> {
        Ok(())
    }
}

/// Does what is asked, and returns what to print, if anything. DEL has nothing to do: `lo` goes with its namespace.
///
/// # Errors
/// What the runtime is to be told.
pub fn answer(request: &Request<LoopbackConf>) -> Result<Option<Value>, CniError> {
    let call = match request {
        Request::Version(version) => return Ok(Some(SpecVersion::spoken(*version))),
        Request::Call(call) => call,
    };
    match &call.action {
        Action::Add(pod) => call.raise(pod).map(Some),
        Action::Check(pod, _) if !Loopback::of(pod)?.link.up => {
            Err(CniError::new(Code::NotAttached, "lo is down in the pod's network namespace"))
        }
        Action::Check(..) | Action::Del(_) | Action::Gc(_) | Action::Status => Ok(None),
    }
}

/// `lo` of a pod, and a socket in its namespace.
struct Loopback {
    inside: Netlink,
    name: IfName,
    link: Link,
}

impl Loopback {
    fn of(pod: &Attachment) -> Result<Self, CniError> {
        let path = pod.netns.as_deref().unwrap_or(Path::new(""));
        let opened = File::open(path).and_then(|netns| inside(&netns, Netlink::open));
        let mut inside = opened.map_err(|e| {
            CniError::new(
                Code::InvalidEnvironment,
                format!("cannot enter the network namespace {}: {e}", path.display()),
            )
        })?;
        let name: IfName = "lo".parse().expect("a valid name");
        let link = wiring::link(&mut inside, &name).map_err(|e| refused(&e))?;
        let link = link.ok_or_else(|| CniError::new(Code::Kernel, "the pod's network namespace has no lo"))?;
        Ok(Self { inside, name, link })
    }
}

impl Call<LoopbackConf> {
    /// `ip link set lo up`; the kernel gives it its addresses.
    fn raise(&self, pod: &Attachment) -> Result<Value, CniError> {
        let mut lo = Loopback::of(pod)?;
        lo.inside.write(&[wiring::raise(lo.link.index, &lo.name, false)]).map_err(|e| refused(&e))?;
        let result = self.conf.prev_result.clone().unwrap_or_else(|| {
            json!({
                "interfaces": [{ "name": "lo", "mac": "00:00:00:00:00:00", "sandbox": pod.netns }],
                "ips": [{ "interface": 0, "address": "127.0.0.1/8" }, { "interface": 0, "address": "::1/128" }],
            })
        });
        convert(result, self.conf.version).map_err(|e| CniError::new(Code::Decode, e.to_string()))
    }
}
