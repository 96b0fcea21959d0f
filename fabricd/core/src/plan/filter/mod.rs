//! What the packet filter should hold.
//!
//! | module | whose packets it judges |
//! |---|---|
//! | [`senders`] | those that come encapsulated from other nodes |
//! | [`pods`] | those that come from this node's pods |
//! | [`masquerade`] | those that leave the network |
//! | [`docker_user`] | those that a chain of others would drop |

pub mod docker_user;
pub mod masquerade;
pub mod pods;
pub mod senders;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use crate::model::{Family, IfName, MacAddr, PerFamily, Subnet};
use crate::network::NetworkConfig;
use crate::state::nft::Ruleset;

/// What a node wants its filter to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilterOptions {
    /// Give packets that leave the network the node's address.
    pub masquerade: bool,
    /// Destinations beyond the network that see the pods' own addresses all the same.
    pub no_masquerade_to: Vec<Subnet>,
    /// … and the other nodes are such destinations.
    pub no_masquerade_to_nodes: bool,
    /// Decapsulate only what comes from a peer, with a source in that peer's subnet.
    pub check_senders: bool,
    /// Underlay addresses besides the peers' that may send, with any source of the network.
    pub senders: Vec<Subnet>,
    /// Remember no connections for encapsulated packets, where connections are remembered at all.
    pub notrack: bool,
    /// Let pods use no addresses but their own, send no router advertisements, and not speak VXLAN.
    pub check_pods: bool,
    /// Let the pods' packets through by rules in Docker's chain for rules of others, DOCKER-USER.
    pub docker_user_rules: bool,
}

impl Default for FilterOptions {
    fn default() -> Self {
        Self {
            masquerade: false,
            no_masquerade_to: vec![],
            no_masquerade_to_nodes: false,
            check_senders: true,
            senders: vec![],
            notrack: true,
            check_pods: true,
            docker_user_rules: true,
        }
    }
}

/// A node that may send encapsulated packets, and the addresses that they may come from inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Member {
    /// Its underlay address.
    pub underlay: IpAddr,
    /// Its subnet, which holds its VTEP's address too.
    pub subnet: Subnet,
}

impl Member {
    /// What is before all members of an underlay address, in their order.
    #[must_use]
    pub fn first_of(underlay: IpAddr) -> Self {
        Self { underlay, subnet: Subnet::holding(Ipv4Addr::UNSPECIFIED.into(), 0).expect("0 is at most 32") }
    }
}

/// A pod of this node: what it may send from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// The MAC address of its interface.
    pub mac: MacAddr,
    /// Its addresses.
    pub ips: BTreeSet<IpAddr>,
}

/// All that decides what the filter should hold.
#[derive(Clone, Debug)]
pub struct FilterInputs<'a> {
    /// The cluster's config.
    pub network: &'a NetworkConfig,
    /// The subnets that this node holds.
    pub own: &'a PerFamily<Subnet>,
    /// Who may send to it.
    pub members: &'a BTreeSet<Member>,
    /// The bridges of the pods.
    pub bridges: &'a BTreeSet<IfName>,
    /// Their ports.
    pub ports: &'a BTreeSet<IfName>,
    /// The pods, as far as it is known which are behind these ports.
    pub pods: &'a BTreeMap<IfName, Pod>,
    /// Prefixes that the pods have their addresses from: this node's subnets, and earlier ones that pods still use.
    pub pod_subnets: &'a BTreeSet<Subnet>,
    /// Whether the kernel tracks connections here, on whosever behalf.
    pub tracked: bool,
    /// What is wanted.
    pub options: &'a FilterOptions,
}

/// What the filter should hold. Every packet between pods passes these chains, on both nodes, so what most packets are is
/// asked first, in one rule.
#[must_use]
pub fn ruleset(inputs: &FilterInputs<'_>) -> Ruleset {
    let mut ruleset = Ruleset::new();
    // First, or a pod that takes a peer's address would be let in as that peer.
    if inputs.options.check_pods {
        pods::add(&mut ruleset, inputs);
    }
    if inputs.options.check_senders {
        senders::add(&mut ruleset, inputs);
    }
    if inputs.options.notrack && (inputs.tracked || inputs.options.masquerade) {
        senders::add_notrack(&mut ruleset, inputs);
    }
    if inputs.options.masquerade {
        masquerade::add(&mut ruleset, inputs);
    }
    ruleset
}

/// `ETH_P_IP`, `ETH_P_IPV6`.
pub(crate) const fn ether_type(family: Family) -> u32 {
    match family {
        Family::V4 => 0x0800,
        Family::V6 => 0x86dd,
    }
}
