//! What the daemon and its CNI plugin tell each other, and others, through files.
//!
//! `node.json` is for `fabric-cni`, which reads nothing else. `subnet.env` is flannel's file, for programs
//! that expect it. Both are replaced by rename, so a reader sees an old one or a new one, whole. The other way goes
//! what `fabric-cni` remembers of each pod, from which the daemon learns whose a port of the bridge is.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::model::{IfName, MacAddr, NodeName, PerFamily, Subnet};

/// Version of `node.json` that this code writes.
pub const NODE_FILE_VERSION: u32 = 1;

/// Default folder of both files. It is memory: after a reboot there is none until the daemon is ready.
pub const RUN_DIR: &str = "/run/fabric";

/// Name of the file in the run folder.
pub const NODE_FILE: &str = "node.json";

/// Why `node.json` can't be used.
#[derive(Debug, thiserror::Error)]
pub enum HandoffError {
    /// Not the JSON that the daemon writes.
    #[error("not a node file: {0}")]
    Json(#[from] serde_json::Error),
    /// Written by a newer daemon in a form that this code doesn't know.
    #[error(
        "version {0} is newer than {NODE_FILE_VERSION}, the newest known here; install the fabric-cni of the same release"
    )]
    Version(u32),
    /// Says ready but names no subnet.
    #[error("it says ready but names no subnet")]
    NoSubnet,
}

/// Whether pods may be added to this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Readiness {
    /// Yes.
    Ready,
    /// No; running pods are not touched.
    NotReady {
        /// What kind of trouble.
        code: NotReady,
        /// In words, with the way out.
        reason: String,
    },
}

/// Kinds of trouble that keep pods from being added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NotReady {
    /// Not everything has been set up yet.
    Starting,
    /// The lease of this node is gone or another's: running pods go on, no address is handed out.
    Quarantine,
    /// Something must be mended by a person first.
    Failed,
    /// Of a newer version.
    #[serde(other)]
    Other,
}

/// One family of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSubnet {
    /// The whole network; pods get a route to it.
    pub network: Subnet,
    /// This node's slice, which pods get their addresses from.
    pub subnet: Subnet,
}

/// The content of `node.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFile {
    /// Version of this format.
    pub version: u32,
    /// This node.
    pub node: NodeName,
    /// Whether pods may be added.
    #[serde(flatten)]
    pub readiness: Readiness,
    /// The IPv4 subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<NodeSubnet>,
    /// The IPv6 subnet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<NodeSubnet>,
    /// MTU of pods' interfaces in bytes: of the larger tunnel, which is IPv4's.
    pub mtu: u32,
    /// MTU of pods' IPv6 routes by a gateway in bytes, where IPv6's tunnel takes less than that; unknown to earlier daemons,
    /// whose `mtu` was the smaller one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ipv6_mtu: Option<u32>,
    /// Rises with every claim of a lease.
    pub epoch: u64,
    /// The folder in which the addresses of the subnet are kept, by the daemon's settings; unknown to earlier daemons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cni_data_dir: Option<PathBuf>,
}

impl NodeFile {
    /// Reads `node.json`.
    ///
    /// # Errors
    /// [`HandoffError`]; the file is then as good as missing.
    pub fn decode(json: &[u8]) -> Result<Self, HandoffError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(json)?;
        if version > NODE_FILE_VERSION {
            return Err(HandoffError::Version(version));
        }
        let file: Self = serde_json::from_slice(json)?;
        if file.readiness == Readiness::Ready && file.subnets().is_empty() {
            return Err(HandoffError::NoSubnet);
        }
        Ok(file)
    }

    /// The file's content.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut json = serde_json::to_vec_pretty(self).expect("plain members");
        json.push(b'\n');
        json
    }

    /// Both families.
    #[must_use]
    pub fn subnets(&self) -> PerFamily<NodeSubnet> {
        PerFamily { v4: self.ipv4, v6: self.ipv6 }
    }

    /// The same facts as flannel's `subnet.env`: addresses are those of the gateway.
    #[must_use]
    pub fn subnet_env(&self, masquerade: bool) -> String {
        let mut env = String::new();
        for (names, subnet) in [("", self.ipv4), ("IPV6_", self.ipv6)] {
            if let Some(NodeSubnet { network, subnet }) = subnet {
                let _ = writeln!(env, "FLANNEL_{names}NETWORK={network}");
                let _ = writeln!(env, "FLANNEL_{names}SUBNET={}/{}", subnet.gateway(), subnet.prefix_len());
            }
        }
        let _ = write!(env, "FLANNEL_MTU={}\nFLANNEL_IPMASQ={masquerade}\n", self.mtu);
        env
    }
}

/// The folder beside [`NODE_FILE`] in which there is a file for each pod whose network policies are applied; there while
/// network policies are on.
pub const POLICY_APPLIED: &str = "policy-applied";

/// The name of an attachment's file in [`POLICY_APPLIED`].
#[must_use]
pub fn policy_file(container: &str, ifname: &IfName) -> String {
    format!("{container}@{ifname}")
}

/// Default folder of what `fabric-cni` remembers: a folder for each network, a file for each attachment.
pub const ATTACHMENTS_DIR: &str = "/var/lib/cni/fabric";

/// How a pod was attached: the second line of its attachment's file, once that has succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The host's ends of its veths.
    pub ports: Vec<String>,
    /// The bridge that these are ports of, if they are; unknown in files of earlier releases.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<IfName>,
    /// MAC address of its own end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Its addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<IpAddr>,
    /// The [`BOOT_ID`] at that time; unknown in files of earlier releases, which leave out what they don't know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<String>,
}

/// Where the kernel tells one boot of a machine from another: a UUID and a newline.
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

impl Attached {
    /// Whether the path of the pod's network namespace tells nothing: the pod was attached before `boot`, and paths such as
    /// `/proc/<pid>/ns/net` are used again. Whether it is gone its ports tell. Without ports the path always counts: LXC
    /// shows its processes a boot ID of its own, and the containers inside of it the kernel's.
    #[must_use]
    pub fn outlived_namespace(&self, boot: Option<&str>) -> bool {
        !self.ports.is_empty() && self.boot.as_deref().zip(boot).is_some_and(|(then, now)| then != now)
    }

    /// Reads the second line of an attachment's file; `None` when it is missing, or cut.
    #[must_use]
    pub fn decode(file: &[u8]) -> Option<Self> {
        serde_json::from_slice(file.splitn(2, |byte| *byte == b'\n').nth(1)?).ok()
    }

    /// That line.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("plain members")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachment_is_read_from_the_second_line_of_a_file_of_any_release() {
        let attached = Attached {
            ports: vec!["veth1".into()],
            bridge: Some("cni0".parse().expect("valid")),
            mac: Some("02:42:c0:00:02:01".parse().expect("valid")),
            ips: vec!["10.244.3.7".parse().expect("valid"), "fd00::7".parse().expect("valid")],
            boot: Some("6a7e5c1d-9d1f-4a55-8c5b-1f0d3b1c9a10".into()),
        };
        let file = [b"{\"the\":\"first\"}\n".as_slice(), &attached.encode()].concat();
        assert_eq!(Attached::decode(&file), Some(attached));
        let before = Attached { ports: vec!["veth1".into()], ..Attached::default() };
        assert_eq!(Attached::decode(b"{}\n{\"ports\":[\"veth1\"]}"), Some(before));
        for missing in [b"".as_slice(), b"{}", b"{}\n", &file[..file.len() - 1], b"{}\n{\"ports\":[],\"mac\":\"x\"}"] {
            assert_eq!(Attached::decode(missing), None);
        }
    }

    fn dual_stack() -> NodeFile {
        let subnet = |network: &str, subnet: &str| NodeSubnet {
            network: network.parse().expect("valid"),
            subnet: subnet.parse().expect("valid"),
        };
        NodeFile {
            version: NODE_FILE_VERSION,
            node: "node-1".parse().expect("valid"),
            readiness: Readiness::Ready,
            ipv4: Some(subnet("10.244.0.0/16", "10.244.3.0/24")),
            ipv6: Some(subnet("fd00:10:244::/48", "fd00:10:244:3::/64")),
            mtu: 1450,
            ipv6_mtu: Some(1430),
            epoch: 7,
            cni_data_dir: Some("/var/lib/cni/networks".into()),
        }
    }

    #[test]
    fn node_file_round_trips() {
        let mut file = dual_stack();
        assert_eq!(NodeFile::decode(&file.encode()).expect("readable"), file);
        file.readiness = Readiness::NotReady { code: NotReady::Quarantine, reason: "the lease is node-2's".into() };
        assert_eq!(NodeFile::decode(&file.encode()).expect("readable"), file);
    }

    #[test]
    fn subnet_env_is_flannels() {
        let want = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\n\
                    FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:3::1/64\n\
                    FLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";
        assert_eq!(dual_stack().subnet_env(false), want);
    }

    #[test]
    fn empty_cut_and_newer_files_are_refused() {
        let whole = dual_stack().encode();
        for cut in [0, 1, whole.len() / 2, whole.len() - 3] {
            assert!(NodeFile::decode(&whole[..cut]).is_err(), "cut at {cut}");
        }
        assert!(matches!(NodeFile::decode(br#"{"version":99}"#), Err(HandoffError::Version(99))));
        let nobody = NodeFile { ipv4: None, ipv6: None, ..dual_stack() };
        assert!(matches!(NodeFile::decode(&nobody.encode()), Err(HandoffError::NoSubnet)));
    }
}
