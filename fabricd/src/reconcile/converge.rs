//! From what is known to what the kernel holds: plan, compare, write, and say what is left.

use std::sync::Arc;

use fabric_core::derived::Dirty;
use fabric_core::device;
use fabric_core::diff::{Op, TableName, diff, diff_of, nft};
use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::{Family, PerFamily};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::{Conflict, Desired, Facts, PeerInputs, PeerPlan, Vtep};
use fabric_core::state::Sysctl;

use super::prepare::{Prepared, on_link};
use super::{Blocked, Reconciler, failed, kernel_state};
use crate::host::underlay::Underlay;
use crate::kernel::Kernel;
use crate::lease::Own;
use crate::reconcile::firewall::warnings_beside;
use crate::reconcile::pending::Pending;
use crate::reconcile::repairs::Causes;
use crate::status::view::{PeerTrouble, View, VtepView};
use crate::store::LeaseStore;

impl<S: LeaseStore, K: Kernel> Reconciler<S, K> {
    /// Plans what the kernel should hold, and writes what it lacks. True when nothing failed.
    pub(super) async fn converge(
        &mut self,
        view: &mut View,
        prepared: &Prepared,
        leases: &Arc<LeaseSet>,
    ) -> Result<bool, Blocked> {
        let Prepared { observed, network, own, underlays } = prepared;
        let vteps = vteps(network, own, underlays);
        // As flannel has it: pods of both kinds of nodes send IPv4 of the same size.
        view.mtu = vteps.values().map(|vtep| vtep.mtu).max().unwrap_or_default();
        view.ipv6_mtu = vteps.v6.as_ref().map(|vtep| vtep.mtu).filter(|mtu| *mtu < view.mtu);
        let facts = Facts {
            nexthop_objects: observed.nexthop_objects,
            ipv6: observed.ours.sysctls.contains_key(&Sysctl::Ipv6Forward),
            on_link: on_link(observed, underlays).collect(),
        };
        let (have, foreign) = (&observed.ours, &*observed.foreign.yielding_to(leases));
        let inputs = PeerInputs { network, own: &own.key, vteps: &vteps, leases, facts: &facts, have, foreign };
        let (plan, changed) = match self.plan.take() {
            Some(mut plan) => {
                let changed = plan.update(&inputs, leases, &self.dirty);
                (plan, changed)
            }
            None => (PeerPlan::new(&inputs), Dirty::Everything),
        };
        self.dirty.extend(changed.clone());
        let desired = Arc::clone(plan.desired());
        let Desired { state, devices, refused, conflicts, .. } = &*desired;
        let turned = self.plan.insert(plan).turned();
        view.vteps = vteps
            .iter()
            .filter_map(|(family, vtep)| {
                Some(VtepView {
                    device: devices.get(family).copied().or_else(|| device::names(family, network.vxlan.vni).next())?,
                    underlay: underlays.get(family)?.dev,
                    public_ip: own.endpoints.get(family)?.public_ip,
                    vtep: *vtep,
                })
            })
            .collect();

        view.pod_bridges = self.filter.pod_bridges();
        view.unguarded_ports = self.filter.unguarded_ports(observed);
        view.dropped = observed.dropped.clone();
        view.firewall = self.firewall.evaluate(view, observed);
        let states_decide = view.firewall.state_rule.is_some();
        let docker_user = &self.filter.docker_user(network, observed);
        let filter = self.filter.wanted(network, own, observed, leases, refused, turned, states_decide);
        let fast_path = self.fast_path.wanted(network, own, &vteps, underlays, &desired, observed, &view.firewall);
        let wanted = kernel_state(state, filter, docker_user, fast_path, &self.apart);
        // Routes that stand where ours should be are looked for among all.
        let dirty =
            if foreign.plain.is_empty() && foreign.direct.is_empty() { &self.dirty } else { &Dirty::Everything };
        let mut plan = diff_of(wanted, observed.found(state), dirty);
        debug_assert_eq!(plan, diff(wanted, observed.found(state)), "only {dirty:?} may differ");
        // Whatever becomes of these steps, the next pass looks at it.
        self.dirty = match view.from_disk {
            true => Dirty::Everything,
            false => Dirty::Keys(plan.ops().iter().map(Op::key).collect()),
        };
        if view.from_disk {
            plan = plan.without_deletes();
        }
        view.warnings.extend(warnings_beside(&view.firewall, &plan));
        view.troubles = refused.iter().map(|(key, refusal)| (*key, PeerTrouble::Refused(refusal.clone()))).collect();
        let causes = Causes { routing: changed, filter_unchanged: self.filter.unchanged() };
        let mut failures = self.execute(&plan, &causes).await;
        view.fast_path = self.fast_path.view(&failures, observed);
        let stays = self.fast_path.stays(&failures);
        view.warnings.extend(view.fast_path.warning().filter(|_| stays.is_none()));
        // What others have against a rule of ours is no reason not to be ready: the status shows their chain.
        failures.retain(|(op, _)| !matches!(op, Op::Filter(nft::Op::DockerUser(_))));
        let pending = Pending::new(&failures, conflicts);
        if !pending.is_empty() {
            let waits = |peer: &Arc<Lease>| Some((peer.key, PeerTrouble::Pending(pending.reason(peer)?.into())));
            let waiting: Vec<_> = view.peers().filter_map(waits).collect();
            for (key, trouble) in waiting {
                view.troubles.entry(key).or_insert(trouble);
            }
        }
        if let Some(conflict) = conflicts.iter().find(|c| !matches!(c, Conflict::Route { .. })) {
            return Err(failed(conflict));
        }
        if failures.is_empty() && !view.from_disk {
            self.repairs.in_sync();
        }
        if let Some(why) = stays {
            return Err(failed(why));
        }
        // A peer's trouble is that peer's alone; without our own device nobody is reached, without the filter anybody
        // may be.
        let own_device = [TableName::Link, TableName::Address, TableName::Sysctl];
        let first_of = |tables: &[TableName]| failures.iter().find(|(op, _)| tables.contains(&op.table()));
        match first_of(&own_device).or_else(|| first_of(&[TableName::Filter])) {
            Some((_, why)) => Err(failed(why)),
            None => Ok(failures.is_empty()),
        }
    }
}

/// Our end of the tunnels in each family.
fn vteps(network: &NetworkConfig, own: &Own, underlays: &PerFamily<Underlay>) -> PerFamily<Vtep> {
    let vtep = |(family, underlay): (Family, &Underlay)| {
        let endpoint = own.endpoints.get(family)?;
        let underlay_mtu = network.vxlan.underlay_mtu.map_or(underlay.mtu, |mtu| mtu.min(underlay.mtu));
        // 1500 less what VXLAN needs is what any link can do; a link below that is the kernel's to refuse.
        let mtu = underlay_mtu.saturating_sub(family.vxlan_overhead());
        Some((family, Vtep { mac: endpoint.vtep_mac, local: underlay.local, mtu }))
    };
    underlays.iter().filter_map(vtep).collect()
}
