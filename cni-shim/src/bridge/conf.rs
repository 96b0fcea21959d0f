//! The configuration of `fabric-bridge`: the keys of `bridge` and `host-local`, as far as they concern pods on a
//! bridge. What it can't do is refused by name, since a key that is passed over would be a network that isn't what
//! its owner believes.

use std::net::IpAddr;
use std::path::PathBuf;

use fabric_core::model::{IfName, MacAddr};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::conf::{Conf, invalid};
use crate::error::{CniError, Code};
use crate::host_local::{DATA_DIR, Range};
use crate::spec::Identifier;
use crate::version::SpecVersion;

/// The network configuration.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BridgeConf {
    /// The version that the runtime speaks.
    #[serde(rename = "cniVersion")]
    version: SpecVersion,
    /// The network's name; the IPAM state is called so, too.
    pub name: Identifier,
    /// The bridge that pods are attached to.
    #[serde(default = "cni0")]
    pub bridge: IfName,
    /// The bridge gets the gateway's address.
    #[serde(default)]
    is_gateway: bool,
    /// And pods a default route to it.
    #[serde(default)]
    pub is_default_gateway: bool,
    /// Another address that is in the gateway's way is removed.
    #[serde(default)]
    pub force_address: bool,
    /// A pod may reach itself through the bridge.
    #[serde(default)]
    pub hairpin_mode: bool,
    /// The bridge takes in all frames.
    #[serde(default)]
    promisc_mode: bool,
    /// MTU of the bridge and the pods' interfaces in bytes; 0 for the kernel's default.
    #[serde(default)]
    pub mtu: u32,
    /// Name servers, for the result.
    #[serde(default)]
    pub dns: Option<Value>,
    /// Where addresses come from.
    pub ipam: Ipam,
    #[serde(default)]
    runtime_config: Requested,
    #[serde(default)]
    args: Args,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// `ipam` of host-local.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ipam {
    #[serde(rename = "type")]
    kind: Identifier,
    /// Where the IPAM state is.
    #[serde(default = "data_dir")]
    pub data_dir: PathBuf,
    /// A pod gets one address of each.
    #[serde(default)]
    pub ranges: Vec<Vec<Range>>,
    /// What pods reach besides their subnet.
    #[serde(default)]
    pub routes: Vec<Route>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// A route of pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub dst: IpNetwork,
    /// By which way, if not by the gateway.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Args {
    #[serde(default)]
    cni: Requested,
}

/// What is requested for one pod.
#[derive(Clone, Debug, Default, Deserialize)]
struct Requested {
    mac: Option<MacAddr>,
    #[serde(default)]
    ips: Vec<RequestedAddress>,
}

/// An address with or without its length.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
struct RequestedAddress(IpAddr);

impl TryFrom<String> for RequestedAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let ip = text.split('/').next().unwrap_or_default().trim();
        ip.parse().map(Self).map_err(|_| format!("{text:.60?} is not an IP address"))
    }
}

fn cni0() -> IfName {
    "cni0".parse().expect("a valid name")
}

fn data_dir() -> PathBuf {
    DATA_DIR.into()
}

impl Conf for BridgeConf {
    fn version(&self) -> SpecVersion {
        self.version
    }

    fn check(&self) -> Result<(), CniError> {
        let unsupported = |key: String, way_out: &str| {
            let msg = format!("{key} is set, but fabric-bridge can't do that; {way_out}");
            Err(CniError::new(Code::UnsupportedField, msg))
        };
        if self.ipam.kind.as_str() != "host-local" {
            let key = format!("ipam.type {}", self.ipam.kind);
            return unsupported(key, "install the plugin bridge and say \"delegate\": {\"type\": \"bridge\"}");
        }
        let asked = |value: &&Value| !matches!(value, Value::Null | Value::Bool(false)) && **value != 0;
        for key in ["ipMasq", "vlan", "vlanTrunk", "macspoofchk", "portIsolation", "disableContainerInterface"] {
            if self.others.get(key).filter(asked).is_some() {
                return unsupported(key.to_owned(), "take it out, or use the plugin bridge");
            }
        }
        for key in ["resolvConf", "subnet"] {
            if self.ipam.others.get(key).filter(asked).is_some() {
                return unsupported(format!("ipam.{key}"), "say dns or ipam.ranges, or use the plugin bridge");
            }
        }
        if !self.ipam.data_dir.is_absolute() {
            return Err(invalid(format!("ipam.dataDir is {}, not an absolute path", self.ipam.data_dir.display())));
        }
        if self.ipam.ranges.iter().any(Vec::is_empty) || self.ipam.ranges.is_empty() {
            return Err(invalid("ipam.ranges names no subnet, so there are no addresses for pods"));
        }
        Ok(())
    }
}

impl BridgeConf {
    /// The bridge gets the gateway's address.
    #[must_use]
    pub fn is_gateway(&self) -> bool {
        self.is_gateway || self.is_default_gateway
    }

    /// The bridge takes in all frames. With hairpin mode it can't, as in the reference.
    #[must_use]
    pub fn promiscuous(&self) -> bool {
        self.promisc_mode && !self.hairpin_mode
    }

    /// The addresses requested for a pod, by whom they may be: `CNI_ARGS`, `args`, `runtimeConfig`.
    ///
    /// # Errors
    /// Code 4 when `CNI_ARGS` names something else.
    pub fn requested_ips(&self, cni_args: &str) -> Result<Vec<IpAddr>, CniError> {
        let named = |text: &str| RequestedAddress::try_from(text.to_owned()).map_err(|e| args_error("IP", &e));
        let by_args = value_of(cni_args, "IP").map(named).transpose()?;
        let all = by_args.iter().chain(&self.args.cni.ips).chain(&self.runtime_config.ips);
        Ok(all.map(|wish| wish.0).collect())
    }

    /// The MAC address requested for a pod.
    ///
    /// # Errors
    /// Code 4 when `CNI_ARGS` names something else.
    pub fn requested_mac(&self, cni_args: &str) -> Result<Option<MacAddr>, CniError> {
        let named = |text: &str| text.parse().map_err(|e: fabric_core::model::Invalid| args_error("MAC", &e));
        let by_args = value_of(cni_args, "MAC").map(named).transpose()?;
        Ok(self.runtime_config.mac.or(self.args.cni.mac).or(by_args))
    }
}

fn value_of<'a>(cni_args: &'a str, key: &str) -> Option<&'a str> {
    cni_args.split(';').find_map(|pair| pair.split_once('=').filter(|(name, _)| *name == key)).map(|(_, value)| value)
}

fn args_error(key: &str, e: &dyn std::fmt::Display) -> CniError {
    CniError::new(Code::InvalidEnvironment, format!("CNI_ARGS, {key}: {e}"))
}
