//! The files that the CNI plugin and others read.

use fabric_core::handoff::{NODE_FILE_VERSION, NodeFile, NodeSubnet, NotReady, Readiness};
use fabric_core::model::Family;
use tracing::warn;

use super::Reconciler;
use crate::files::unknown;
use crate::kernel::Kernel;
use crate::status::view::View;
use crate::store::LeaseStore;

impl<S: LeaseStore, K: Kernel> Reconciler<S, K> {
    /// Writes the files that others read. A file that can't be written makes the node not ready.
    pub(super) fn hand_off(&self, view: &mut View) -> Result<(), ()> {
        let file = match (&view.network, &view.holding.own) {
            (Some(network), Some(own)) if view.mtu != 0 => {
                let subnet = |family| {
                    let (space, subnet) = (network.spaces.get(family)?, own.key.subnets().get(family)?);
                    Some(NodeSubnet { network: space.network, subnet: *subnet })
                };
                NodeFile {
                    version: NODE_FILE_VERSION,
                    node: self.node.name.clone(),
                    readiness: view.readiness.clone(),
                    ipv4: subnet(Family::V4),
                    ipv6: subnet(Family::V6),
                    mtu: view.mtu,
                    ipv6_mtu: view.ipv6_mtu,
                    epoch: own.epoch,
                    cni_data_dir: None,
                }
            }
            // What was known of this node's subnets stays: a DEL may need them, and the next claim asks for them again.
            _ => NodeFile {
                readiness: view.readiness.clone(),
                ..self.files.read().unwrap_or_else(|| unknown(self.node.name.clone()))
            },
        };
        self.files.publish(&file).map_err(|error| {
            warn!(%error, "files for others not written");
            view.readiness = Readiness::NotReady { code: NotReady::Failed, reason: error.to_string() };
        })
    }
}
