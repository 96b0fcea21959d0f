//! [`View`]: what the daemon knows, as the reconcile loop saw it last. The API, readiness and metrics only read it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::firewall::Evaluation;
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::{IfName, NodeName};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::{Refusal, Vtep};
use fabric_core::record::LeaseKey;

use crate::host::attachments::AttachedPods;
use crate::kernel::Dropped;
use crate::lease::Holding;
use crate::status::fast_path::FastPathView;
use crate::store::Connection;

/// What is known after one pass.
#[derive(Clone, Debug, PartialEq)]
pub struct View {
    /// This node.
    pub node: NodeName,
    /// Whether pods may be added.
    pub readiness: Readiness,
    /// The connection to the store.
    pub connection: Connection,
    /// The config in force.
    pub network: Option<NetworkConfig>,
    /// The lease that is held.
    pub holding: Holding,
    /// All leases that count, those among them that are kept for a while although the store has lost them.
    pub leases: Option<Arc<LeaseSet>>,
    /// True while they come from disk, because the store has not answered yet.
    pub from_disk: bool,
    /// What the store's config wants to be different and only a restart or a person applies.
    pub pending: Vec<String>,
    /// This node's ends of the tunnels.
    pub vteps: Vec<VtepView>,
    /// MTU of the pods' interfaces in bytes; 0 until it is known.
    pub mtu: u32,
    /// MTU of the pods' IPv6 routes in bytes, where that is smaller.
    pub ipv6_mtu: Option<u32>,
    /// Peers that are not fully programmed.
    pub troubles: BTreeMap<LeaseKey, PeerTrouble>,
    /// What an operator should know, each with the way out.
    pub warnings: Vec<String>,
    /// The bridges that this node's pods are attached to.
    pub pod_bridges: BTreeSet<IfName>,
    /// Ports of the pods' bridge of which nobody has told whose they are: every address of this node may send there.
    pub unguarded_ports: BTreeSet<IfName>,
    /// What the packet filter has dropped since its rules were written, by reason; not older than an audit.
    pub dropped: Dropped,
    /// What another program changed and was written again, the last of it.
    pub repairs: Arc<VecDeque<Repair>>,
    /// What the firewalls of others make of packets of ours.
    pub firewall: Arc<Evaluation>,
    /// The fast path.
    pub fast_path: FastPathView,
}

/// One end of the tunnels, with what surrounds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VtepView {
    /// The VXLAN device.
    pub device: IfName,
    /// The underlay interface.
    pub underlay: IfName,
    /// The address that peers send to.
    pub public_ip: IpAddr,
    /// The rest.
    pub vtep: Vtep,
}

/// Something that was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repair {
    /// Rises by one with each.
    pub number: u64,
    /// What was done to what, in a sentence.
    pub message: String,
}

/// Why a peer is not fully programmed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerTrouble {
    /// Its lease can't be used.
    #[error(transparent)]
    Refused(Refusal),
    /// A write failed and is being retried.
    #[error("{0}")]
    Pending(String),
}

impl View {
    /// What a daemon knows that has just begun.
    #[must_use]
    pub fn new(node: NodeName) -> Self {
        Self {
            node,
            readiness: Readiness::NotReady { code: NotReady::Starting, reason: "starting".into() },
            connection: Connection::Unknown,
            network: None,
            holding: Holding::default(),
            leases: None,
            from_disk: false,
            pending: vec![],
            vteps: vec![],
            mtu: 0,
            ipv6_mtu: None,
            troubles: BTreeMap::new(),
            warnings: vec![],
            pod_bridges: AttachedPods::default().bridges,
            unguarded_ports: BTreeSet::new(),
            dropped: Dropped::new(),
            repairs: Arc::default(),
            firewall: Arc::default(),
            fast_path: FastPathView::default(),
        }
    }

    /// All leases but ours, once they can be programmed.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<Lease>> {
        let own = self.holding.own.as_ref().map(|own| own.key);
        let leases = self.leases.iter().filter(|_| !self.vteps.is_empty());
        leases
            .flat_map(|leases| leases.iter())
            .filter(move |lease| Some(lease.key) != own && !lease.record.is_placeholder())
    }
}
