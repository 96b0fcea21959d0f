//! How a node changes hands between flannel and fabricd with its pods running: [`takeover`] and [`giveback`] tell the steps
//! that are left, given what is there.
//!
//! ```text
//!            takeover ──►                                   ◄── giveback
//!   flannel.1      ip link set … name …      fabric.1       device, MAC address, FDB, neighbours and routes stay
//!   flanneld       (ended by its owner)      fabricd        each replaces the other's routes in place
//!   flannel's CNI  the conflist              fabric-cni     one network name, one rename
//!   its rules      one transaction a table   table fabric   ours before theirs go, theirs before ours go
//! ```
//!
//! Nothing is remembered: the steps are the difference between what is there and what should be. So whoever is killed
//! between two of them goes on by looking again, in the same direction or back. What a step is, as iproute2, nft and file
//! lines, its `Display` says.

mod iptables;
mod plan;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

pub use self::iptables::{Iptables, OUR_COMMENT};
pub use self::plan::{giveback, guarded, takeover};
use crate::leases::LeaseSet;
use crate::model::{Family, IfName, MacAddr, NodeName, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::record::LeaseKey;

/// What is there.
#[derive(Clone, Debug)]
pub struct Facts {
    /// This node's name.
    pub node: NodeName,
    /// The cluster's config.
    pub network: NetworkConfig,
    /// Everybody's leases.
    pub leases: Arc<LeaseSet>,
    /// All VXLAN devices of the host.
    pub devices: Vec<Device>,
    /// All addresses of the host.
    pub addresses: Vec<IpAddr>,
    /// Addresses that the daemon's settings publish instead of the underlay's.
    pub public_ips: PerFamily<IpAddr>,
    /// Routes of the main table that say nothing beyond a gateway or a nexthop object, and a device.
    pub routes: Vec<Route>,
    /// What the kernel can do with the name of a device that is up.
    pub naming: Naming,
    /// Whether a person says that the device keeps its name.
    pub keep_name: bool,
    /// How to end the flanneld that runs here, if one does.
    pub flanneld: Option<String>,
    /// Whether the flanneld that runs here has written `subnet.env` since it started.
    pub flanneld_wrote_subnet_env: bool,
    /// How to end the fabricd that runs here, if one does.
    pub fabricd: Option<String>,
    /// The subnets for which `node.json` says that pods may be added.
    pub ready: Option<LeaseKey>,
    /// Whether our packet filter masquerades; `None` as long as it isn't there.
    pub masquerades: Option<bool>,
    /// Whether the daemon's settings say that it is to.
    pub masquerade_wanted: bool,
    /// Whether a person says that pods need no masquerade.
    pub masquerade_waived: bool,
    /// Whether `subnet.env` says that flanneld masquerades.
    pub flannels_masquerade: bool,
    /// What `iptables` shows of flannel's and our rules, where that program is.
    pub iptables: PerFamily<Iptables>,
    /// flannel's tables of nftables.
    pub flannel_tables: PerFamily<()>,
    /// Whether the cluster assigns the subnets, so that a record of ours and one of flannel's are one.
    pub assigned: bool,
    /// Steps that take away what is only ours in the kernel, as their commands.
    pub ours: Vec<String>,
    /// Steps that take the fast path away, as their commands.
    pub fast_path: Vec<String>,
    /// Whether our table of Services is there.
    pub services: bool,
    /// Whether our table of network policies is there.
    pub policies: bool,
    /// The network configurations of the container runtime.
    pub cni: Cni,
}

/// What a kernel can do with the name of a device that is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Naming {
    /// Nothing.
    Fixed,
    /// Give it another one beside it: `altname`, since Linux 5.5.
    Altname,
    /// Rename it, since Linux 6.2 (`dev_change_name` in net/core/dev.c).
    Rename,
}

/// A VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: IfName,
    /// Its alternative names.
    pub altnames: Vec<IfName>,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Where its packets are sent from.
    pub local: IpAddr,
    /// Its MAC address.
    pub mac: MacAddr,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

/// A route to a peer's subnet, or to one that was a peer's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// The destination.
    pub dst: Subnet,
    /// The gateway, be it a nexthop object's.
    pub gateway: IpAddr,
    /// The device.
    pub dev: IfName,
    /// Whether it has our protocol.
    pub ours: bool,
}

/// A file of the runtime's network configurations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflist {
    /// Its name in the folder.
    pub file: String,
    /// The network's name.
    pub network: String,
}

/// The network configurations, and the pods that the plugins know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cni {
    /// The folder.
    pub dir: PathBuf,
    /// The name that our file has, or would have.
    pub our_file: String,
    /// The file that names flannel's plugin.
    pub flannels: Option<Conflist>,
    /// flannel's file where a takeover has put it.
    pub aside: Option<Conflist>,
    /// Our file.
    pub ours: Option<Conflist>,
    /// Where `fabric-cni` is missing.
    pub plugin_missing: Option<PathBuf>,
    /// Pods that `fabric-cni` attached to the cluster's network, whatever that was called then.
    pub pods: Vec<Pod>,
    /// Whether flannel's plugin remembers pods of its network.
    pub has_flannels_pods: bool,
}

/// How flannel's file is called while fabricd has the node: no runtime reads a file that ends so.
pub const ASIDE: &str = ".before-fabricd";

/// A pod that `fabric-cni` attached.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    /// The CNI network.
    pub network: String,
    /// The container.
    pub container: String,
    /// Its interface.
    pub ifname: String,
}

/// One step. Each can be taken again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Gives a device its other name, while it is up.
    Rename(IfName, IfName),
    /// Gives a device our name beside that which it has.
    AddAltname(IfName, IfName),
    /// Takes our name from a device that has it beside its own.
    DeleteAltname(IfName, IfName),
    /// Waits until fabricd says that pods may be added.
    AwaitFabricd,
    /// Waits until flanneld has replaced our routes by its own.
    AwaitFlanneld,
    /// Deletes flannel's route to a subnet that nobody leases.
    DeleteRoute(Route),
    /// Changes rules by one `iptables-restore --noflush`.
    Iptables(Family, String),
    /// Deletes flannel's table of nftables.
    DeleteFlannelTable(Family),
    /// Takes the fast path away: without a daemon it would go on by what was true before.
    DeleteFastPath(Vec<String>),
    /// Deletes our nexthop objects, routes and tables of nftables.
    DeleteOurs(Vec<String>),
    /// Writes our conflist under the network's name, and then moves flannel's aside.
    OurConflist(PathBuf, String, Option<String>),
    /// Moves flannel's conflist back, if it is aside and not there otherwise, and then removes ours, and what is aside.
    FlannelsConflist {
        /// The folder.
        dir: PathBuf,
        /// The file that is moved back.
        back: Option<String>,
        /// Those that go.
        gone: Vec<String>,
    },
    /// Removes `node.json`, so that `fabric-cni` adds no more pods.
    CloseNode,
    /// Hands a pod from `fabric-cni` to flannel's plugin: its file, its addresses in the network's folder.
    HandOverPod(Pod, String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rename(from, to) => write!(f, "ip link set dev {from} name {to}"),
            Self::AddAltname(dev, name) => write!(f, "ip link property add dev {dev} altname {name}"),
            Self::DeleteAltname(dev, name) => write!(f, "ip link property del dev {dev} altname {name}"),
            Self::AwaitFabricd => {
                f.write_str("# fabricd claims the lease and replaces flannel's routes; start it if it doesn't run")
            }
            Self::AwaitFlanneld => f.write_str(
                "# flanneld takes device and lease over and replaces fabricd's routes; start it if it doesn't run",
            ),
            Self::DeleteRoute(Route { dst, gateway, dev, .. }) => {
                write!(f, "ip route del {dst} via {gateway} dev {dev}")
            }
            Self::Iptables(family, rules) => {
                let program = iptables::program(*family);
                write!(f, "{program}-restore --noflush --wait <<EOF\n{rules}EOF")
            }
            Self::DeleteFlannelTable(family) => write!(f, "nft delete table {}", iptables::table(*family)),
            Self::DeleteFastPath(lines) | Self::DeleteOurs(lines) => f.write_str(&lines.join("\n")),
            Self::OurConflist(file, network, None) => write!(f, "write {} (network {network})", file.display()),
            Self::OurConflist(file, network, Some(flannels)) => {
                let theirs = file.with_file_name(flannels);
                write!(f, "write {} (network {network})\nmv {1} {1}{ASIDE}", file.display(), theirs.display())
            }
            Self::FlannelsConflist { dir, back, gone } => {
                let moved = back.as_ref().map(|name| {
                    let name = dir.join(name).display().to_string();
                    format!("mv {name} {}", name.trim_end_matches(ASIDE))
                });
                let removed = gone.iter().map(|name| format!("rm {}", dir.join(name).display()));
                f.write_str(&moved.into_iter().chain(removed).collect::<Vec<_>>().join("\n"))
            }
            Self::CloseNode => f.write_str("rm node.json"),
            Self::HandOverPod(pod, network) => {
                write!(f, "write /var/lib/cni/flannel/{} and its addresses in {network}", pod.container)
            }
        }
    }
}

/// Why nothing is changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is no device to take.
    #[error(
        "there is no {0}, nor {1}: this node has not been flannel's with the backend vxlan and VNI {2}; start fabricd as on any node"
    )]
    NoDevice(String, String, u32),
    /// Both names are taken.
    #[error("{0} and {1} are both there; remove the one that is of no use: ip -d link show type vxlan shows both")]
    TwoDevices(IfName, IfName),
    /// The device is of another network.
    #[error("{name} has VNI {vni} and UDP port {port}, the network config says {wanted}; they must agree")]
    OtherDevice {
        /// The device.
        name: IfName,
        /// Its VNI.
        vni: u32,
        /// Its port.
        port: u16,
        /// What the config says.
        wanted: String,
    },
    /// The device sends from an address that the host hasn't got.
    #[error("{0} sends from {1}, which is no address of this host; flanneld recreates the device when it starts")]
    NotOurAddress(IfName, IpAddr),
    /// The store knows no lease of this node.
    #[error(
        "the store has no lease with the public address {0}; is it the store that flanneld uses? See: fabricctl leases"
    )]
    NoLease(IpAddr),
    /// The lease names another MAC address than the device has.
    #[error(
        "the lease of {key} says VTEP {published}, {name} has {mac}: peers can't reach this node; restart its daemon first"
    )]
    OtherMac {
        /// The lease.
        key: LeaseKey,
        /// What it says.
        published: MacAddr,
        /// The device.
        name: IfName,
        /// What it has.
        mac: MacAddr,
    },
    /// The device has another subnet's address.
    #[error("{0} hasn't got {1}, the first address of the subnet that this node leases; restart its daemon first")]
    OtherSubnet(IfName, IpAddr),
    /// Another node's lease has our address.
    #[error(
        "the lease of {0} is that of {1}, this node is called {2}; name it so with --node-name, or end that lease: fabricctl lease release {1}"
    )]
    AnotherNode(LeaseKey, NodeName, NodeName),
    /// flanneld lives.
    #[error("flanneld runs; end it so that it can't come back: {0}")]
    FlanneldRuns(String),
    /// fabricd lives.
    #[error("fabricd runs; end it so that it can't come back: {0}")]
    FabricdRuns(String),
    /// The kernel can give a device that is up no name, be it a second one.
    #[error(
        "this kernel is older than 5.5 and gives no second name to a device; drain the node and restart it with fabricd"
    )]
    NoAltname,
    /// The kernel can't rename a device that is up.
    #[error(
        "{0} has to be renamed, and this kernel is older than 6.2 and renames no device that is up; drain the node and restart it with flannel"
    )]
    NoRename(IfName),
    /// The daemon would not masquerade.
    #[error(
        "pods reach the outside by this node's address, whether or not flanneld has --ip-masq (its CNI plugin does it otherwise); start fabricd with --ip-masq, or say --no-masquerade if what is outside has routes to the pods"
    )]
    NoMasquerade,
    /// The plugin isn't installed.
    #[error("there is no fabric-cni in {}; install it with: fabricd install-cni --only plugins", .0.display())]
    NoPlugin(PathBuf),
    /// Services would be nobody's.
    #[error(
        "fabricd translates this node's Services (nft list table inet fabric-services), and flannel translates none: start \
         kube-proxy, then fabricd with --services off, which deletes the table; end it and run this again"
    )]
    ServicesAreOurs,
    /// Network policies would hold no longer.
    #[error(
        "fabricd enforces this node's NetworkPolicies (nft list table inet fabric-policy), and flannel enforces none: start \
         fabricd with --network-policy off, which deletes the table; end it and run this again"
    )]
    PoliciesAreOurs,
    /// There is no conflist of flannel's to go back to.
    #[error("no file in {} names flannel's plugin; put flannel's conflist there, under a name that sorts behind {}", .0.display(), .1)]
    NoConflist(PathBuf, String),
}
