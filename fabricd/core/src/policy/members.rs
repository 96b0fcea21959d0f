//! [`Members`]: who is in each group, kept up to date: a pod or a label that changes costs itself, whatever else the cluster
//! has. A group that is new costs a look at the pods of the namespaces that it is about.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::evaluate::{Cluster, Who};
use super::groups::{NamedGroup, Numbers, PodGroup};
use super::labels::Labels;
use super::model::{LocalPod, Namespaces, ObjectName, Pod};
use super::pods::Pods;
use crate::cow_map::{CowMap, CowSet};
use crate::model::Family;
use crate::state::nft::{Element, Part};

/// The members of all groups that rules ask for, as elements of sets.
#[derive(Debug, Default)]
pub struct Members {
    /// Group and address.
    peers: Elements<PodGroup>,
    /// Group, address, protocol and port.
    ports: Elements<NamedGroup>,
    /// What they were made from.
    from: From,
}

/// What decides who is a member.
#[derive(Debug, Default)]
struct From {
    pods: Pods,
    namespaces: CowMap<Arc<str>, Arc<Labels>>,
    local: BTreeMap<IpAddr, LocalPod>,
    /// While there are policies of the whole cluster, a pod of this node isn't known before its namespace is.
    has_cluster_policies: bool,
    now: i64,
}

/// The elements of some groups.
#[derive(Debug)]
struct Elements<G> {
    groups: BTreeMap<G, u32>,
    v4: CowSet<Element>,
    v6: CowSet<Element>,
}

impl<G> Default for Elements<G> {
    fn default() -> Self {
        Self { groups: BTreeMap::new(), v4: CowSet::default(), v6: CowSet::default() }
    }
}

impl Members {
    /// Takes in what a cluster is now, and which groups are asked for.
    pub fn update(&mut self, cluster: &Cluster<'_>, peers: &Numbers<PodGroup>, ports: &Numbers<NamedGroup>) {
        let is_empty = self.peers.groups.is_empty() && self.ports.groups.is_empty();
        let changed = if is_empty { BTreeSet::new() } else { self.from.changed(cluster) };
        let pods = |group: &PodGroup| selected(cluster, group);
        let is_member = |group: &PodGroup, ip| {
            let pod = pod_of(cluster, ip).filter(|pod| cluster.is_any_of(group, pod));
            pod.map(|_| vec![]).into_iter().collect()
        };
        self.peers.update(peers, &changed, pods, is_member);
        let pods = |group: &NamedGroup| match &group.peers {
            // Blocks may hold any pod.
            Some(peers) if peers.blocks.is_empty() => selected(cluster, &peers.pods),
            _ => cluster.state().pods.iter().flat_map(|pod| cluster.candidates(&pod.name)).collect(),
        };
        self.ports.update(ports, &changed, pods, |group, ip| ports_of(cluster, group, ip));
        let state = cluster.state();
        let (pods, namespaces, local) = (state.pods.clone(), state.namespaces.clone(), state.local.pods.clone());
        let has_cluster_policies = !state.cluster_policies.is_empty();
        self.from = From { pods, namespaces, local, has_cluster_policies, now: state.now };
    }

    /// Group and address, for addresses of a family.
    #[must_use]
    pub fn peers(&self, family: Family) -> &CowSet<Element> {
        self.peers.of(family)
    }

    /// Group, address, protocol and port, for addresses of a family.
    #[must_use]
    pub fn ports(&self, family: Family) -> &CowSet<Element> {
        self.ports.of(family)
    }
}

/// The addresses that pods selected by a group may have.
fn selected(cluster: &Cluster<'_>, group: &PodGroup) -> Vec<IpAddr> {
    let pods = &cluster.state().pods;
    let mut all = vec![];
    for peer in group {
        let mut of_namespace = |namespace: &str| {
            // Pods of one template follow each other, as their names begin alike.
            let (mut template, mut is_meant) = (None, false);
            for pod in pods.of_namespace(namespace) {
                if !template.is_some_and(|before| Arc::ptr_eq(before, &pod.template)) {
                    (template, is_meant) = (Some(&pod.template), cluster.is_selected(peer, namespace, pod.labels()));
                }
                if is_meant {
                    all.extend(cluster.candidates(&pod.name));
                }
            }
        };
        match &peer.namespaces {
            Namespaces::Named(name) => of_namespace(name),
            Namespaces::Selected(selector) => {
                let namespaces = cluster.state().namespaces.iter();
                let meant = namespaces.filter(|(_, labels)| selector.matches(labels));
                meant.for_each(|(name, _)| of_namespace(name));
            }
        }
    }
    all
}

fn pod_of<'a>(cluster: &Cluster<'a>, ip: IpAddr) -> Option<&'a Pod> {
    match cluster.member(ip)?.who {
        Who::Pod(pod) => Some(pod),
        Who::Other | Who::Unknown(_) => None,
    }
}

/// Where the pod with an address has the ports of a group.
fn ports_of(cluster: &Cluster<'_>, group: &NamedGroup, ip: IpAddr) -> Vec<Vec<Part>> {
    let is_meant = group.peers.as_ref().is_none_or(|peers| cluster.is_peer(peers, ip));
    let pod = is_meant.then(|| pod_of(cluster, ip)).flatten();
    let named = pod.into_iter().flat_map(Pod::ports);
    let meant = named.filter(|port| group.ports.contains(&(port.protocol, port.name.clone())));
    meant.map(|port| vec![Part::Protocol(port.protocol.number()), Part::Port(port.port)]).collect()
}

impl From {
    /// The addresses whose pod may be another than it was, or may be in other groups.
    fn changed(&self, cluster: &Cluster<'_>) -> BTreeSet<IpAddr> {
        let (state, mut changed) = (cluster.state(), BTreeSet::new());
        for (was, is) in state.pods.changes(&self.pods) {
            changed.extend(was.into_iter().flat_map(Pod::ips));
            changed.extend(was.or(is).into_iter().flat_map(|pod| cluster.candidates(&pod.name)));
        }
        for (was, is) in state.namespaces.changes(&self.namespaces, |was, is| was == is) {
            let name = was.or(is).map(|(name, _)| &**name).unwrap_or_default();
            changed.extend(state.pods.of_namespace(name).flat_map(|pod| cluster.candidates(&pod.name)));
        }
        // Of a pod that comes to this node or goes, the addresses count that fabric-cni saved.
        let is_other =
            |(ip, pod): &(&IpAddr, &LocalPod), others: &BTreeMap<IpAddr, LocalPod>| others.get(*ip) != Some(*pod);
        let come = state.local.pods.iter().filter(|entry| is_other(entry, &self.local));
        let gone = self.local.iter().filter(|entry| is_other(entry, &state.local.pods));
        for (ip, pod) in come.chain(gone) {
            changed.insert(*ip);
            changed.extend(pod.identity.iter().flat_map(|identity| cluster.candidates(&identity.name)));
        }
        if self.has_cluster_policies == state.cluster_policies.is_empty() {
            changed.extend(state.local.pods.keys());
        }
        let (earlier, later) = (self.now.min(state.now), self.now.max(state.now));
        let ended: Vec<&ObjectName> = state.pods.ending(earlier - 1, later).map(|pod| &pod.name).collect();
        changed.extend(ended.into_iter().flat_map(|name| cluster.candidates(name)));
        changed
    }
}

impl<G: Ord + Clone + std::fmt::Debug> Elements<G> {
    fn of(&self, family: Family) -> &CowSet<Element> {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// `changed` are addresses to look at again, `candidates` those that a group may have, and `rest` says what follows number
    /// and address in the elements of one: nothing at all if it is no member.
    fn update(
        &mut self,
        groups: &Numbers<G>,
        changed: &BTreeSet<IpAddr>,
        candidates: impl Fn(&G) -> Vec<IpAddr>,
        rest: impl Fn(&G, IpAddr) -> Vec<Vec<Part>>,
    ) {
        let elements = |group: &G, number, ip| -> Vec<Element> {
            let of = |rest: Vec<Part>| Element::new([Part::Number(number), Part::Ip(ip)].into_iter().chain(rest));
            rest(group, ip).into_iter().map(of).collect()
        };
        let is_new = |group: &G, number| self.groups.get(group) != Some(&number);
        let gone: BTreeSet<u32> = self
            .groups
            .iter()
            .filter(|(group, number)| groups.get(group) != Some(**number))
            .map(|(_, number)| *number)
            .collect();
        let (mut put, mut cut) = (vec![], vec![]);
        for number in gone {
            let start = Element::from([Part::Number(number)]);
            cut.extend([&self.v4, &self.v6].into_iter().flat_map(|set| starting_with(set, &start)));
        }
        for (group, number) in groups.iter() {
            if is_new(group, number) {
                put.extend(
                    candidates(group)
                        .into_iter()
                        .flat_map(|ip| elements(group, number, ip).into_iter().map(move |it| (ip, it))),
                );
                continue;
            }
            for ip in changed {
                let (is, start) = (elements(group, number, *ip), Element::from([Part::Number(number), Part::Ip(*ip)]));
                let was: Vec<Element> = starting_with(self.of(Family::of(*ip)), &start).collect();
                cut.extend(was.iter().filter(|element| !is.contains(element)).cloned());
                put.extend(is.into_iter().filter(|element| !was.contains(element)).map(|element| (*ip, element)));
            }
        }
        // A number that is another group's now has elements in both.
        for element in cut {
            self.v4.remove(&element);
            self.v6.remove(&element);
        }
        let many = put.len() > (self.v4.len() + self.v6.len()) / 4;
        for (ip, element) in put {
            let set = if ip.is_ipv4() { &mut self.v4 } else { &mut self.v6 };
            set.insert(element, ());
        }
        if many {
            self.v4.compact();
            self.v6.compact();
        }
        self.groups = groups.iter().map(|(group, number)| (group.clone(), number)).collect();
    }
}

fn starting_with<'a>(set: &'a CowSet<Element>, start: &Element) -> impl Iterator<Item = Element> + use<'a> {
    let start = start.clone();
    let from_there = set.starting_at(&start).map(|(element, ())| element);
    from_there.take_while(move |element| element.starts_with(&start)).cloned()
}
