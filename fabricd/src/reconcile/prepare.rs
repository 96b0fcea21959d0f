//! What must be known before anything can be planned: the kernel, the network config in force, the underlay, our lease.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use fabric_core::leases::LeaseSet;
use fabric_core::model::{Family, IfName, PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::device_conflict;
use tokio::time::Instant;

use super::{Blocked, Reconciler, failed, starting};
use crate::host::underlay::{self, Underlay, UnderlayError};
use crate::kernel::{Kernel, Observed};
use crate::lease::{DesiredLease, Holding, Own};
use crate::status::view::View;
use crate::store::{LeaseStore, Network};

/// All that a plan needs beside the leases of the others.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) observed: Arc<Observed>,
    pub(super) network: NetworkConfig,
    pub(super) own: Own,
    pub(super) underlays: PerFamily<Underlay>,
}

impl<S: LeaseStore, K: Kernel> Reconciler<S, K> {
    /// Everything that must be known before anything can be planned; what is missing is said with the way out.
    pub(super) async fn prepare(
        &mut self,
        view: &mut View,
        network: &Network,
        holding: &Holding,
    ) -> Result<Prepared, Blocked> {
        // Always looked at, since only what changes after a look wakes the loop.
        let observed = self.kernel.observe().await.map_err(failed)?;
        self.dirty.extend(self.kernel.touched());
        // Not only once the store has answered: a mistake in the settings shows at once.
        underlay::judge(&self.node.selectors, &observed.host).map_err(failed)?;
        let network = self.network_in_force(view, network)?;
        view.network = Some(network);
        view.warnings.extend(network.warnings());
        if let Some(end) = self.retention.until() {
            view.warnings.push(format!(
                "the store was emptied or set back: peers that it has lost stay for {} s, to claim their subnets again",
                end.saturating_duration_since(Instant::now()).as_secs()
            ));
        }
        let underlays = self.underlays(view, &observed, &network, holding).map_err(failed)?;
        if let Some((space, link)) =
            network.overlap(&on_link(&observed, &underlays).map(|(s, _)| s).collect::<Vec<_>>())
        {
            return Err(failed(format!(
                "the network {space} overlaps {link}, which this node's underlay interface reaches directly; \
                 {}",
                self.store.config_place().change
            )));
        }
        if self.store.assigned().is_none() {
            view.warnings.extend(flannel_beside_ipv6_alone(&network, view.leases.as_deref()));
        }
        // What is from an address that has gone waits for answers that never come.
        let has = |ip: &IpAddr| observed.host.links.iter().any(|link| link.addresses.iter().any(|(has, _)| has == ip));
        if self.sources.values().any(|ip| !has(ip)) {
            self.store.give_up_connections();
        }
        self.sources = underlays.map(|_, underlay| underlay.local);
        // A node that can't have a device announces none.
        if self.wanted.borrow().is_none()
            && let Some(conflict) =
                device_conflict(&network, &underlays.map(|_, u| u.local), &observed.ours, &observed.foreign)
        {
            return Err(failed(conflict));
        }
        let public_ips = underlays.map(|family, u| self.node.public_ips.get(family).copied().unwrap_or(u.local));
        // Which address the lease has, and so which one is to stay, shows with the leases.
        if view.leases.is_some() {
            let wanted = Some(DesiredLease { network, public_ips });
            self.wanted.send_if_modified(|current| {
                let differs = *current != wanted;
                *current = wanted;
                differs
            });
        }
        view.warnings.extend(holding.duplicate_name.clone());
        let ours = observed.hazards.iter().filter(|(family, _)| network.spaces.get(*family).is_some());
        view.warnings.extend(ours.map(|(_, words)| words.clone()));
        let own = holding.own.clone().ok_or_else(|| match &holding.trouble {
            Some((code, reason)) => Blocked { code: *code, reason: reason.clone() },
            None => starting("waiting for a lease"),
        })?;
        if own.key.subnets().families().ne(network.spaces.families()) {
            return Err(starting("waiting for a lease of the network's address families"));
        }
        Ok(Prepared { observed, network, own, underlays })
    }

    /// The underlay of each family. What is in use is known from the lease and from our devices, after a restart too.
    fn underlays(
        &mut self,
        view: &View,
        observed: &Observed,
        network: &NetworkConfig,
        holding: &Holding,
    ) -> Result<PerFamily<Underlay>, UnderlayError> {
        let recorded = || {
            let record = view.leases.as_ref().and_then(|leases| leases.of_node(&self.node.name));
            record.map(|lease| lease.record.endpoints()).unwrap_or_default()
        };
        let held = holding.own.as_ref().map_or_else(recorded, |own| own.endpoints);
        network.spaces.try_map(|family, _| {
            // An address that the operator publishes instead is somebody else's.
            let published = held.get(family).filter(|_| self.node.public_ips.get(family).is_none());
            let links = observed.ours.links.values().filter(|link| link.vni == network.vxlan.vni);
            let device = links.map(|link| link.local).find(|local| Family::of(*local) == family);
            let lease = published.map(|endpoint| endpoint.public_ip);
            self.underlays.choose(&self.node.selectors, &observed.host, family, lease, device)
        })
    }

    /// The config that counts: the first valid one, with what can change under running pods kept up to date. Until the
    /// store has shown one it is that of before the start.
    fn network_in_force(&mut self, view: &mut View, network: &Network) -> Result<NetworkConfig, Blocked> {
        let place = self.store.config_place();
        let key = &place.name;
        let trouble = match (network, self.applied) {
            (Network::Valid(config), None) => {
                (self.applied, self.remembered) = (Some(*config), None);
                return Ok(*config);
            }
            (Network::Valid(config), Some(applied)) => {
                view.pending = applied.lasting_differences(config);
                if view.pending.is_empty() {
                    self.applied = Some(*config);
                    return Ok(*config);
                }
                format!(
                    "the network config at {key} differs in what running pods depend on ({}); apply it on this node \
                     with: fabricctl network migrate",
                    view.pending.join(", ")
                )
            }
            (Network::Unknown, _) => match view.connection.trouble() {
                Some(reason) => format!("waiting for the network config: {reason}"),
                // The first listing is under way: what is remembered does meanwhile, and nothing needs attention.
                None => match self.applied.or(self.remembered) {
                    Some(applied) => return Ok(applied),
                    None => format!("waiting for the network config at {key}"),
                },
            },
            (Network::Missing, _) => format!("there is no network config at {key}; {}", place.make),
            (Network::Invalid(error), _) => format!("the network config at {key} can't be used: {error}"),
        };
        let Some(applied) = self.applied.or(self.remembered) else { return Err(starting(trouble)) };
        view.warnings.push(trouble);
        Ok(applied)
    }
}

/// Each flanneld of an IPv6-only network says PublicIP 0.0.0.0, and takes the first record that says so for its own.
fn flannel_beside_ipv6_alone(network: &NetworkConfig, leases: Option<&LeaseSet>) -> Option<String> {
    let mut others = leases?.iter().filter(|lease| lease.record.owner.is_none() && !lease.record.is_placeholder());
    let flannels = others.next().filter(|_| network.spaces.v4.is_none())?;
    Some(format!(
        "{} is leased by a flannel node, and the network has no IPv4: each flanneld without it takes the first such record \
         for its own, this node's too; give the network IPv4, or end flannel here",
        flannels.key
    ))
}

/// The prefixes that the chosen underlay interfaces reach without a gateway.
pub(super) fn on_link<'a>(
    observed: &'a Observed,
    underlays: &'a PerFamily<Underlay>,
) -> impl Iterator<Item = (Subnet, IfName)> + 'a {
    let chosen: BTreeSet<_> = underlays.values().map(|underlay| &underlay.dev).collect();
    let links = observed.host.links.iter().filter(move |link| chosen.contains(&link.name));
    links.flat_map(|link| link.addresses.iter().map(|(_, prefix)| (*prefix, link.name)))
}
