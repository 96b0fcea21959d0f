//! Which pods are still there, by the veths of the host and what is saved of them.
//!
//! A veth is a pod's when an attachment names it, or when it is a port of a bridge for pods: one that an attachment or the
//! configuration names, `cni0`, or one that has an address of this node's subnet. So is one that has such an address
//! itself, as `ptp` makes them. Others are nobody's here: the uplink of a node that is a container, or Docker's.

use std::collections::BTreeSet;
use std::path::Path;

use fabric_core::attachments::DEFAULT_BRIDGE;
use ipnetwork::IpNetwork;
use serde_json::{Map, Value};

use crate::bridge::wiring::{self, Link};
use crate::bridge::{namespace, open_netlink};
use crate::error::CniError;
use crate::state::{Attachments, Saved, boot_id};
use crate::sweep::{bridge_of, gateways, refused};

/// The links of the host, as far as they tell of pods.
#[derive(Debug)]
pub struct Veths {
    names: BTreeSet<String>,
    unknown: bool,
}

impl Veths {
    /// Those of this network namespace, with what is saved in all networks. `config` is a rendered configuration.
    ///
    /// # Errors
    /// Code 105 when the kernel doesn't tell, 5 when a folder can't be read.
    pub fn look(config: &Map<String, Value>, state_dir: &Path) -> Result<Self, CniError> {
        let mut saved: Vec<Saved> = Vec::new();
        for attachments in Attachments::of_all_networks(state_dir)? {
            saved.extend(attachments.read_all()?.into_iter().filter_map(|(_, saved)| saved));
        }
        let configs = saved.iter().map(|saved| &saved.config).chain([config]);
        let mut bridges: BTreeSet<String> = configs.filter_map(bridge_of).map(|name| name.to_string()).collect();
        bridges.insert(DEFAULT_BRIDGE.into());
        let named: BTreeSet<&String> =
            saved.iter().filter_map(|saved| saved.attached.as_ref()).flat_map(|a| &a.ports).collect();

        let mut netlink = open_netlink()?;
        let links = wiring::links(&mut netlink).map_err(|e| refused(&e))?;
        let addresses = wiring::all_addresses(&mut netlink).map_err(|e| refused(&e))?;
        let gateways = gateways(config);
        let of_the_node = |has: &IpNetwork| gateways.iter().any(|gateway| gateway.contains(has.ip()));
        let is_gateway = |link: &Link| addresses.iter().any(|(index, has)| *index == link.index && of_the_node(has));
        let of_pods = |link: &&Link| link.is_bridge && (bridges.contains(&link.name) || is_gateway(link));
        let controllers: BTreeSet<u32> = links.iter().filter(of_pods).map(|link| link.index).collect();
        let is_pods = |link: &Link| link.controller.is_some_and(|c| controllers.contains(&c)) || is_gateway(link);
        let unknown = links.iter().any(|link| link.is_veth && !named.contains(&link.name) && is_pods(link));
        Ok(Self { names: links.into_iter().map(|link| link.name).collect(), unknown })
    }

    /// True when the pod no longer exists of which this is saved, or nothing that can be read.
    #[must_use]
    pub fn show_the_end_of(&self, saved: Option<&Saved>) -> bool {
        let attached = saved.and_then(|saved| saved.attached.as_ref());
        let gone = attached.is_some_and(|attached| attached.outlived_namespace(boot_id().as_deref()))
            || saved.and_then(|saved| saved.netns.as_deref()).is_none_or(|path| namespace(path).is_none());
        gone && match attached {
            Some(attached) => !attached.ports.iter().any(|port| self.names.contains(port)),
            None => self.all_are_known(),
        }
    }

    /// True when every pod's veth is one that an attachment names: so there is no pod that nothing is saved of.
    #[must_use]
    pub fn all_are_known(&self) -> bool {
        !self.unknown
    }
}
