//! How pods are remembered on a node: the attachments that `fabric-cni` saves, and whose an address of host-local's is.
//!
//! ```text
//! <stateDir>/<network>/<container>@<ifname>.json   an attachment: what the delegate was told; how the pod was attached
//! <dataDir>/fabric/10.244.3.7                      an address that is taken: "<container>\r\n<interface>"
//! ```
//!
//! host-local keeps the addresses of each CNI network apart, but the subnet is the node's. So the plugins that keep
//! addresses are told one network name, [`IPAM_NETWORK`], whatever the network is called, and pods of other networks get
//! the network's name before their container ID: [`told_container`].

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::handoff::Attached;
use crate::model::{IfName, Subnet};

/// The name by which the delegate, and so host-local, knows the network: the folder of the node's IPAM state.
pub const IPAM_NETWORK: &str = "fabric";

/// The bridge that pods are attached to unless a conflist says otherwise.
pub const DEFAULT_BRIDGE: &str = "cni0";

/// The container ID by which the delegate knows a container of `network`: the runtime's own in the network called
/// [`IPAM_NETWORK`]; in others `<length of the name>.<name>.<container>`, so that one container can have one interface
/// name in two networks, and each address has one owner.
#[must_use]
pub fn told_container(network: &str, container: &str) -> String {
    if network == IPAM_NETWORK { container.to_owned() } else { format!("{}.{network}.{container}", network.len()) }
}

/// The network and the container that a container ID of the delegate's stands for.
#[must_use]
pub fn meant_container(told: &str) -> (&str, &str) {
    let parse = || {
        let (length, rest) = told.split_once('.')?;
        let (network, container) = rest.split_at_checked(length.parse().ok()?)?;
        Some((network, container.strip_prefix('.').filter(|container| !container.is_empty())?))
    };
    parse().unwrap_or((IPAM_NETWORK, told))
}

/// Whose an address is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner {
    /// The CNI network.
    pub network: String,
    /// The container, as the runtime calls it.
    pub container: String,
    /// Its interface.
    pub ifname: String,
}

impl Owner {
    /// The owner by the content of an address's file in the folder of `network`; `None` when it is empty or cut.
    #[must_use]
    pub fn read(network: &str, content: &str) -> Option<Self> {
        let (told, ifname) = content.trim().split_once('\n')?;
        let told = told.trim();
        let (network, container) = if network == IPAM_NETWORK { meant_container(told) } else { (network, told) };
        Some(Self { network: network.to_owned(), container: container.to_owned(), ifname: ifname.trim().to_owned() })
    }

    /// The owner of an attachment by its file, `<network>/<container>@<ifname>.json`; `None` for any other file.
    #[must_use]
    pub fn of_attachment(file: &Path) -> Option<Self> {
        let network = file.parent()?.file_name()?.to_str()?.to_owned();
        let (container, ifname) = file.file_name()?.to_str()?.strip_suffix(".json")?.split_once('@')?;
        (!container.starts_with('.')).then(|| Self { network, container: container.into(), ifname: ifname.into() })
    }
}

/// Which pod of Kubernetes a container is, as the runtime tells it (`CNI_ARGS`).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SavedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; not every runtime tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
}

impl SavedPod {
    /// The pod by the arguments of a call: `K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=…`; `None` when it is none
    /// of Kubernetes'.
    #[must_use]
    pub fn of_args(args: &str) -> Option<Self> {
        let value = |key: &str| {
            let mut pairs = args.split(';').filter_map(|pair| pair.split_once('='));
            pairs.find(|(name, _)| *name == key).map(|(_, value)| value.to_owned()).filter(|value| !value.is_empty())
        };
        Some(Self { namespace: value("K8S_POD_NAMESPACE")?, name: value("K8S_POD_NAME")?, uid: value("K8S_POD_UID") })
    }
}

/// What is saved of an attachment, as far as it is read by others than `fabric-cni`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedAttachment {
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// The bridge that the pod is attached to, if it is to one.
    pub bridge: Option<IfName>,
    /// Where its addresses are from.
    pub subnets: Vec<Subnet>,
    /// The pod of Kubernetes that it is; unknown in files of earlier releases.
    pub pod: Option<SavedPod>,
    /// How it was attached; `None` while ADD is at work, or when it was cut off.
    pub attached: Option<Attached>,
}

impl SavedAttachment {
    /// Reads a file of any release. What is spoiled of it reads as missing.
    #[must_use]
    pub fn decode(file: &[u8]) -> Self {
        #[derive(Default, Deserialize)]
        struct FirstLine {
            netns: Option<PathBuf>,
            #[serde(default)]
            pod: Option<SavedPod>,
            #[serde(default)]
            config: Config,
        }
        #[derive(Default, Deserialize)]
        struct Config {
            bridge: Option<IfName>,
            #[serde(default)]
            ipam: Ipam,
        }
        #[derive(Default, Deserialize)]
        struct Ipam {
            #[serde(default)]
            ranges: Vec<Vec<Range>>,
        }
        #[derive(Deserialize)]
        struct Range {
            subnet: Subnet,
        }
        let first = file.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let FirstLine { netns, pod, config } = serde_json::from_slice(first).unwrap_or_default();
        let mut subnets: Vec<Subnet> = config.ipam.ranges.iter().flatten().map(|range| range.subnet).collect();
        subnets.dedup();
        let attached = Attached::decode(file);
        let bridge = attached.as_ref().and_then(|attached| attached.bridge).or(config.bridge);
        Self { netns, bridge, subnets, pod, attached }
    }

    /// The addresses that the pod got.
    #[must_use]
    pub fn ips(&self) -> &[IpAddr] {
        self.attached.as_ref().map_or(&[], |attached| &attached.ips)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(network: &str, container: &str) -> Option<Owner> {
        Some(Owner { network: network.into(), container: container.into(), ifname: "eth0".into() })
    }

    #[test]
    fn container_of_any_network_has_an_id_of_its_own_and_is_known_by_it() {
        assert_eq!(told_container("fabric", "c1"), "c1");
        assert_eq!(told_container("net2", "c1"), "4.net2.c1");
        for (network, container) in [("fabric", "c1"), ("net2", "c1"), ("a.b", "c"), ("a", "b.c"), ("3", "3.a.b")] {
            let told = told_container(network, container);
            assert_eq!(meant_container(&told), (network, container), "{told}");
        }
        for odd in ["4.net2", "4.net2.", "9.net2.c1", "x.net2.c1", "1.\u{e4}.c1"] {
            assert_eq!(meant_container(odd), ("fabric", odd));
        }
    }

    #[test]
    fn owner_of_an_address_is_read_from_its_folder_and_its_content() {
        assert_eq!(Owner::read("fabric", "c1\r\neth0"), owner("fabric", "c1"));
        assert_eq!(Owner::read("fabric", "4.net2.c1\r\neth0"), owner("net2", "c1"));
        assert_eq!(Owner::read("cbr0", "4.net2.c1\neth0\n"), owner("cbr0", "4.net2.c1"), "of an earlier release");
        assert_eq!(Owner::read("fabric", "c1"), None);
        assert_eq!(Owner::of_attachment(Path::new("/s/net2/c1@eth0.json")), owner("net2", "c1"));
        for other in ["/s/net2/.c1@eth0.17", "/s/net2/c1@eth0", "/s/.versions/bridge.json", "/"] {
            assert_eq!(Owner::of_attachment(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn pod_is_known_by_the_arguments_of_its_call() {
        let pod = |uid: Option<&str>| {
            Some(SavedPod { namespace: "shop".into(), name: "web".into(), uid: uid.map(str::to_owned) })
        };
        let args =
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=c1;K8S_POD_UID=u1";
        assert_eq!(SavedPod::of_args(args), pod(Some("u1")));
        assert_eq!(SavedPod::of_args("K8S_POD_NAME=web;K8S_POD_NAMESPACE=shop"), pod(None));
        for none in ["", "K8S_POD_NAME=web", "K8S_POD_NAMESPACE=;K8S_POD_NAME=web", "K8S_POD_NAMESPACE"] {
            assert_eq!(SavedPod::of_args(none), None, "{none}");
        }
        let saved = SavedAttachment::decode(br#"{"pod":{"namespace":"shop","name":"web","uid":"u1"}}"#);
        assert_eq!(saved.pod, pod(Some("u1")));
    }

    #[test]
    fn attachment_of_any_release_tells_namespace_bridge_subnets_and_addresses() {
        let first = r#"{"containerID":"c1","ifname":"eth0","netns":"/run/netns/p","config":{"bridge":"br-pods",
            "ipam":{"ranges":[[{"subnet":"10.244.3.0/24"}],[{"subnet":"fd00:3::/64"}]]}}}"#
            .replace('\n', "");
        let saved =
            SavedAttachment::decode(format!("{first}\n{{\"ports\":[\"veth1\"],\"ips\":[\"10.244.3.7\"]}}").as_bytes());
        assert_eq!((saved.netns.as_deref(), saved.subnets.len()), (Some(Path::new("/run/netns/p")), 2));
        assert_eq!(saved.bridge.expect("named").as_str(), "br-pods");
        assert_eq!(saved.ips(), ["10.244.3.7".parse::<IpAddr>().expect("valid")]);
        let told = SavedAttachment::decode(b"{}\n{\"ports\":[],\"bridge\":\"br9\"}");
        assert_eq!((told.bridge.map(|name| name.to_string()), told.ips()), (Some("br9".into()), [].as_slice()));
        for spoiled in ["", "{", "{}\n{"] {
            assert_eq!(SavedAttachment::decode(spoiled.as_bytes()), SavedAttachment::default());
        }
    }
}
