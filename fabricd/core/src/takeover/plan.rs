//! The two decisions.

use std::path::PathBuf;

use super::{Cni, Conflist, Device, Facts, Iptables, Naming, Pod, Refusal, Route, Step};
use crate::device;
use crate::leases::Lease;
use crate::model::{Family, IfName, PerFamily, Subnet};
use crate::record::LeaseKey;

/// What is left to do until fabricd has this node.
///
/// # Errors
/// All that refuses it; nothing is to be changed then.
pub fn takeover(facts: &Facts) -> Result<Vec<Step>, Vec<Refusal>> {
    let mut refusals = vec![];
    let (devices, lease) = facts.check(&mut refusals);
    refusals.extend(facts.flanneld.clone().map(Refusal::FlanneldRuns));
    if devices.values().any(|device| facts.is_flannels(device)) && facts.naming == Naming::Fixed {
        refusals.push(Refusal::NoAltname);
    }
    // Before the node is ready the filter may be half there.
    let lacks_it = facts.ready.is_some() && facts.masquerades == Some(false);
    let masquerades = facts.masquerade_wanted && !lacks_it;
    if !masquerades && !facts.masquerade_waived {
        refusals.push(Refusal::NoMasquerade);
    }
    refusals.extend(facts.cni.plugin_missing.clone().map(Refusal::NoPlugin));
    let Some(lease) = lease.filter(|_| refusals.is_empty()) else { return Err(refusals) };

    let mut steps: Vec<Step> = devices.iter().filter_map(|(family, device)| facts.to_us(family, device)).collect();
    let is_ready = facts.fabricd.is_some() && facts.ready == Some(lease.key) && steps.is_empty();
    // By its new name: the device is renamed before.
    let then = |dev: IfName| {
        let renamed = steps.iter().find_map(|step| match step {
            Step::Rename(from, to) if *from == dev => Some(*to),
            _ => None,
        });
        renamed.unwrap_or(dev)
    };
    let is_on_them = |route: &&Route| devices.values().any(|device| device.name == route.dev);
    let stale = facts.routes.iter().filter(is_on_them).filter(|route| facts.is_stale(route));
    let stale: Vec<Step> =
        stale.map(|route| Step::DeleteRoute(Route { dev: then(route.dev), ..route.clone() })).collect();
    steps.extend((!is_ready).then_some(Step::AwaitFabricd));
    steps.extend(stale);
    let cni = &facts.cni;
    if let Some(network) = cni.network()
        && (cni.ours.as_ref().is_none_or(|ours| ours.network != network) || cni.flannels.is_some())
    {
        // A giveback that was turned round half-way: one network name for all pods.
        let others = cni.pods.iter().filter(|pod| pod.network != network);
        steps.extend(others.map(|pod| Step::HandOverPod(pod.clone(), network.clone())));
        let theirs = cni.flannels.as_ref().map(|file| file.file.clone());
        steps.push(Step::OurConflist(cni.dir.join(&cni.our_file), network, theirs));
    }
    for (family, space) in facts.network.spaces.iter() {
        if let Some(rules) = facts.iptables.get(family) {
            steps.extend(rules.without_flannels(space.network).into_iter().map(|rules| Step::Iptables(family, rules)));
        }
    }
    // flannel makes both, whatever families the network has.
    steps.extend(facts.flannel_tables.families().map(Step::DeleteFlannelTable));
    Ok(steps)
}

/// What is left to do until flannel has this node.
///
/// # Errors
/// All that refuses it; nothing is to be changed then.
pub fn giveback(facts: &Facts) -> Result<Vec<Step>, Vec<Refusal>> {
    let mut refusals = vec![];
    let (devices, lease) = facts.check(&mut refusals);
    refusals.extend(facts.fabricd.clone().map(Refusal::FabricdRuns));
    let misnamed: Vec<Step> = devices.iter().filter_map(|(family, device)| facts.to_flannel(family, device)).collect();
    refusals.extend(misnamed.iter().find_map(|step| match step {
        Step::Rename(from, _) if facts.naming < Naming::Rename => Some(Refusal::NoRename(*from)),
        _ => None,
    }));
    refusals.extend(facts.services.then_some(Refusal::ServicesAreOurs));
    refusals.extend(facts.policies.then_some(Refusal::PoliciesAreOurs));
    let cni = &facts.cni;
    let flannels = cni.flannels();
    if flannels.is_none() && (cni.ours.is_some() || !cni.pods.is_empty()) {
        refusals.push(Refusal::NoConflist(cni.dir.clone(), cni.our_file.clone()));
    }
    let Some(lease) = lease.filter(|_| refusals.is_empty()) else { return Err(refusals) };

    let has_begun = facts.flanneld_wrote_subnet_env && (facts.assigned || lease.record.owner.is_none());
    // It has made its rules before it writes that file; one of older versions makes them at the same time.
    let has_begun = has_begun && !facts.network.spaces.families().any(|family| facts.lacks_flannels_rules(family));

    let fast_path = (!facts.fast_path.is_empty()).then(|| Step::DeleteFastPath(facts.fast_path.clone()));
    let mut steps: Vec<Step> = fast_path.into_iter().collect();
    let mut last = vec![];
    for (family, space) in facts.network.spaces.iter() {
        let Some(rules) = facts.iptables.get(family) else { continue };
        // While the device has our name flanneld can't start, so they are there when it does.
        let beside = rules.with_ours(space.network).filter(|_| !has_begun);
        last.extend(match beside {
            Some(beside) => {
                steps.push(Step::Iptables(family, beside));
                Some(Step::Iptables(family, Iptables::without_added(space.network)))
            }
            // A flanneld with --iptables-forward-rules=false makes none: then ours stay.
            None if has_begun && !rules.has_flannels_forward() => None,
            None => rules.without_ours().map(|rules| Step::Iptables(family, rules)),
        });
    }
    let is_misnamed = !misnamed.is_empty();
    steps.extend(misnamed);
    let of_peers = |route: &&Route| route.ours && facts.is_leased(route.dst);
    if !has_begun || facts.routes.iter().any(|route| of_peers(&route)) || is_misnamed {
        steps.push(Step::AwaitFlanneld);
    }
    if !facts.ours.is_empty() {
        steps.push(Step::DeleteOurs(facts.ours.clone()));
    }
    steps.extend(last);
    if let Some(flannels) = flannels {
        if facts.ready.is_some() {
            steps.push(Step::CloseNode);
        }
        let pods = cni.pods.iter().cloned().map(|pod: Pod| Step::HandOverPod(pod, flannels.network.clone()));
        steps.extend(pods);
        let name = |file: &Conflist| file.file.clone();
        // flannel's DaemonSet writes its file anew whenever it starts.
        let (back, old) = match &cni.flannels {
            None => (cni.aside.as_ref().map(name), None),
            Some(_) => (None, cni.aside.as_ref().map(name)),
        };
        let gone: Vec<String> = cni.ours.as_ref().map(name).into_iter().chain(old).collect();
        if back.is_some() || !gone.is_empty() {
            steps.push(Step::FlannelsConflist { dir: PathBuf::clone(&cni.dir), back, gone });
        }
    }
    Ok(steps)
}

impl Cni {
    /// flannel's conflist, wherever it is.
    fn flannels(&self) -> Option<&Conflist> {
        self.flannels.as_ref().or(self.aside.as_ref())
    }

    /// The name that the network has when fabricd has the node: flannel's, by which runtimes know its pods. On a node that
    /// fabricd had from the start, and of which no pod was handed over yet, it stays what it was.
    fn network(&self) -> Option<String> {
        let is_of = |file: &&Conflist| self.pods.iter().any(|pod| pod.network == file.network);
        let kept = self.ours.as_ref().filter(|ours| is_of(ours) && !self.has_flannels_pods);
        kept.or(self.flannels()).or(self.ours.as_ref()).map(|file| file.network.clone())
    }
}

impl Facts {
    /// The devices of this node and its lease, held against each other.
    fn check(&self, refusals: &mut Vec<Refusal>) -> (PerFamily<&Device>, Option<&Lease>) {
        let mut lease: Option<&Lease> = None;
        let mut devices = PerFamily::default();
        for family in self.network.spaces.families() {
            let device = match self.device(family) {
                Ok(device) => device,
                Err(refusal) => {
                    refusals.push(refusal);
                    continue;
                }
            };
            *devices.slot(family) = Some(device);
            match self.lease_of(family, device) {
                Ok(found) => lease = Some(found),
                Err(refusal) => refusals.push(refusal),
            }
        }
        (devices, lease)
    }

    /// The one device of this node in a family, whosever name it has.
    fn device(&self, family: Family) -> Result<&Device, Refusal> {
        let vxlan = &self.network.vxlan;
        let named = |name: IfName| self.devices.iter().find(move |device| device.name == name);
        let theirs = self.flannels_name(family).and_then(named);
        let ours = device::names(family, vxlan.vni).find_map(named);
        let device = match (theirs, ours) {
            (Some(theirs), Some(ours)) => return Err(Refusal::TwoDevices(theirs.name, ours.name)),
            (None, None) => {
                let name = |name: Option<IfName>| name.map(|name| name.to_string()).unwrap_or_default();
                let (theirs, ours) = (name(self.flannels_name(family)), name(self.our_name(family)));
                return Err(Refusal::NoDevice(theirs, ours, vxlan.vni.get()));
            }
            (Some(device), None) | (None, Some(device)) => device,
        };
        if (device.vni, device.port) != (vxlan.vni.get(), vxlan.port) || Family::of(device.local) != family {
            let wanted = format!("VNI {}, port {} and {family}", vxlan.vni, vxlan.port);
            return Err(Refusal::OtherDevice { name: device.name, vni: device.vni, port: device.port, wanted });
        }
        if !self.addresses.contains(&device.local) {
            return Err(Refusal::NotOurAddress(device.name, device.local));
        }
        Ok(device)
    }

    /// The lease that says what the device is.
    fn lease_of(&self, family: Family, device: &Device) -> Result<&Lease, Refusal> {
        let public = self.public_ips.get(family).copied().unwrap_or(device.local);
        let found = self.leases.iter().filter(|lease| !lease.record.is_placeholder()).find_map(|lease| {
            let endpoint = lease.record.endpoints().get(family).copied()?;
            (endpoint.public_ip == public).then_some((lease, endpoint))
        });
        let (lease, endpoint) = found.ok_or(Refusal::NoLease(public))?;
        if let Some(node) = lease.record.node().filter(|node| **node != self.node) {
            return Err(Refusal::AnotherNode(lease.key, node.clone(), self.node.clone()));
        }
        if endpoint.vtep_mac != device.mac {
            let (key, name, mac) = (lease.key, device.name, device.mac);
            return Err(Refusal::OtherMac { key, published: endpoint.vtep_mac, name, mac });
        }
        let base = lease.key.subnets().get(family).map(|subnet| subnet.base());
        match base.filter(|base| !device.addresses.contains(base)) {
            Some(base) => Err(Refusal::OtherSubnet(device.name, base)),
            None => Ok(lease),
        }
    }

    /// `flannel.1`, `flannel-v6.1`; `None` where that is no name.
    fn flannels_name(&self, family: Family) -> Option<IfName> {
        let stem = match family {
            Family::V4 => "flannel",
            Family::V6 => "flannel-v6",
        };
        format!("{stem}.{}", self.network.vxlan.vni).parse().ok()
    }

    fn our_name(&self, family: Family) -> Option<IfName> {
        let vni = self.network.vxlan.vni;
        let has = |name: &IfName| self.devices.iter().any(|device| device.name == *name);
        device::names(family, vni).find(has).or_else(|| device::names(family, vni).next())
    }

    /// A device of flannel's doesn't have a name of ours beside its own.
    fn is_flannels(&self, device: &Device) -> bool {
        let is_named_so = Family::ALL.into_iter().any(|family| self.flannels_name(family) == Some(device.name));
        is_named_so && self.our_altname(device).is_none()
    }

    fn our_altname(&self, device: &Device) -> Option<IfName> {
        let is_ours = |name: &&IfName| device::is_ours(name, self.network.vxlan.vni);
        device.altnames.iter().find(is_ours).copied()
    }

    /// The step by which a device becomes ours; `None` when it is.
    fn to_us(&self, family: Family, device: &Device) -> Option<Step> {
        let name = self.our_name(family).filter(|_| self.is_flannels(device))?;
        Some(match self.keep_name || self.naming < Naming::Rename {
            true => Step::AddAltname(device.name, name),
            false => Step::Rename(device.name, name),
        })
    }

    /// The step by which a device becomes flannel's; `None` when it is.
    fn to_flannel(&self, family: Family, device: &Device) -> Option<Step> {
        let name = self.flannels_name(family).filter(|_| !self.is_flannels(device))?;
        Some(match self.our_altname(device).filter(|_| device.name == name) {
            Some(ours) => Step::DeleteAltname(name, ours),
            None => Step::Rename(device.name, name),
        })
    }

    fn is_leased(&self, subnet: Subnet) -> bool {
        self.leases.subnets(subnet.family()).any(|leased| leased == subnet)
    }

    /// Whether rules of flannel's that ours give way to are not there yet.
    fn lacks_flannels_rules(&self, family: Family) -> bool {
        let lacks = self.iptables.get(family).is_some_and(|rules| !rules.has_flannels_masquerade());
        self.flannels_masquerade && lacks && self.flannel_tables.get(family).is_none()
    }

    /// A route over this node's device to a subnet of the network that nobody leases: flannel's, of a node that left.
    fn is_stale(&self, route: &Route) -> bool {
        let network = self.network.spaces.get(route.dst.family()).map(|space| space.network);
        let inside = network.is_some_and(|network| network.covers(route.dst) && network != route.dst);
        !route.ours && inside && route.gateway == route.dst.base() && !self.is_leased(route.dst)
    }
}

/// The subnets whose guards a node that was given back leaves behind.
#[must_use]
pub fn guarded(facts: &Facts) -> Option<LeaseKey> {
    facts.check(&mut vec![]).1.map(|lease| lease.key)
}
