//! [`Rules`]: what the reconcile loop knows of the packet filter. What it should hold is decided by
//! [`fabric_core::rules::ruleset`]; here is the clock, for peers that change their address, and what the CNI plugin tells
//! of the pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use fabric_core::leases::LeaseSet;
use fabric_core::model::{IfName, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::Refusal;
use fabric_core::record::LeaseKey;
use fabric_core::rules::{Member, RuleInputs, RuleOptions, Ruleset, ruleset};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::kernel::Observed;
use crate::lease::Own;
use crate::ports::PodPorts;

/// How long the address that a peer had before may go on sending: its packets are still under way, and its kernel may
/// follow its lease a little later.
const GRACE: Duration = Duration::from_secs(30);

/// The bridge that the CNI plugin attaches pods to.
const BRIDGE: &str = "cni0";

/// The packet filter of one node, as it should be.
#[derive(Debug)]
pub struct Rules {
    options: RuleOptions,
    bridge: IfName,
    members: BTreeSet<Member>,
    /// Members that have moved, and until when they count.
    moved: BTreeMap<Member, Instant>,
    /// Whose the bridge's ports are.
    pods: watch::Receiver<Arc<PodPorts>>,
}

impl Rules {
    /// A filter with these options.
    #[must_use]
    pub fn new(options: RuleOptions) -> Self {
        let bridge = BRIDGE.parse().expect("a valid name");
        let (_, pods) = watch::channel(Arc::default());
        Self { options, bridge, members: BTreeSet::new(), moved: BTreeMap::new(), pods }
    }

    /// Lets the pods of these ports use no addresses but their own.
    pub fn guard_ports(&mut self, pods: watch::Receiver<Arc<PodPorts>>) {
        self.pods = pods;
    }

    /// Waits until something changes that the loop doesn't learn from the kernel or the leases. Cancel-safe.
    pub async fn changed(&mut self) {
        if self.pods.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Ports whose pods are not known.
    #[must_use]
    pub fn open_ports(&self, observed: &Observed) -> BTreeSet<IfName> {
        let (ports, pods) = (observed.bridges.get(&self.bridge), self.pods.borrow());
        let open = ports.into_iter().flatten().filter(|port| !pods.contains_key(port));
        open.filter(|_| self.options.check_pods).copied().collect()
    }

    /// What the filter should hold now, given the leases and which of them are refused.
    pub fn wanted(
        &mut self,
        network: &NetworkConfig,
        own: &Own,
        observed: &Observed,
        leases: &LeaseSet,
        refused: &BTreeMap<LeaseKey, Refusal>,
    ) -> Ruleset {
        let peers = leases.iter().filter(|lease| lease.key != own.key && !refused.contains_key(&lease.key));
        let members = peers.flat_map(|lease| {
            let endpoints = lease.record.endpoints();
            let member = |(family, subnet): (_, &Subnet)| {
                Some(Member { underlay: endpoints.get(family)?.public_ip, subnet: *subnet })
            };
            lease.key.subnets().iter().filter_map(member).collect::<Vec<_>>()
        });
        let members = self.with_moved(members.collect(), Instant::now());
        let no_ports = BTreeSet::new();
        let pods = Arc::clone(&self.pods.borrow_and_update());
        ruleset(&RuleInputs {
            network,
            own: own.key.subnets(),
            members: &members,
            bridge: &self.bridge,
            ports: observed.bridges.get(&self.bridge).unwrap_or(&no_ports),
            pods: &pods,
            pod_subnets: &self.pod_subnets(network, own, observed),
            options: &self.options,
        })
    }

    /// The members, and those that have moved not long ago: their subnet is another address's now.
    fn with_moved(&mut self, members: BTreeSet<Member>, now: Instant) -> BTreeSet<Member> {
        let subnets: BTreeSet<Subnet> = members.iter().map(|member| member.subnet).collect();
        for left in self.members.difference(&members) {
            self.moved.insert(*left, now + GRACE);
        }
        self.moved
            .retain(|member, until| *until > now && subnets.contains(&member.subnet) && !members.contains(member));
        let all = members.iter().chain(self.moved.keys()).copied().collect();
        self.members = members;
        all
    }

    /// Where the pods have their addresses from: after this node has moved to another subnet, those of before too.
    fn pod_subnets(&self, network: &NetworkConfig, own: &Own, observed: &Observed) -> BTreeSet<Subnet> {
        let bridge = observed.host.links.iter().filter(|link| link.name == self.bridge);
        let there = bridge.flat_map(|link| link.addresses.iter().map(|(_, prefix)| *prefix));
        let of_the_network =
            |prefix: &Subnet| network.spaces.get(prefix.family()).is_some_and(|space| space.network.covers(*prefix));
        there.filter(of_the_network).chain(own.key.subnets().values().copied()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(underlay: &str) -> Member {
        Member { underlay: underlay.parse().expect("valid"), subnet: "10.244.7.0/24".parse().expect("valid") }
    }

    #[tokio::test(start_paused = true)]
    async fn peer_that_moves_is_a_member_under_both_addresses_for_a_while() {
        let mut rules = Rules::new(RuleOptions::default());
        let (before, after) = (member("192.0.2.7"), member("192.0.2.8"));
        assert_eq!(rules.with_moved([before].into(), Instant::now()), [before].into());
        assert_eq!(rules.with_moved([after].into(), Instant::now()), [before, after].into());
        tokio::time::advance(GRACE).await;
        assert_eq!(rules.with_moved([after].into(), Instant::now()), [after].into());
        assert_eq!(rules.with_moved(BTreeSet::new(), Instant::now()), BTreeSet::new(), "gone is gone at once");
    }
}
