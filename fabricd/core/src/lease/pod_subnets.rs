//! Where the pods of this node live. No node becomes ready with another subnet than the one that its attached pods have
//! addresses in: they would be cut off, and nobody would say so.
//!
//! The subnet of the pods is asked for before any other; where it is another node's, the node waits and says so. Pods in
//! a subnet that a person told this node to leave don't count.

use super::reason::Obstacle;
use super::situation::Situation;
use crate::model::{Family, PerFamily, Subnet};
use crate::record::LeaseKey;

/// True when attached pods have addresses in these subnets.
pub(super) fn occupied(now: &Situation<'_>, key: &LeaseKey) -> bool {
    let within = |pod: &Subnet| key.subnets().values().any(|subnet| subnet.covers(*pod) || pod.covers(*subnet));
    counted(now).any(|pod| within(&pod))
}

/// What attached pods have of the network outside of these subnets.
pub(super) fn pods_outside(now: &Situation<'_>, key: &LeaseKey) -> Vec<Subnet> {
    let is_outside = |pod: &Subnet| key.subnets().get(pod.family()).is_some_and(|subnet| !subnet.covers(*pod));
    counted(now).filter(|pod| in_network(now, *pod) && is_outside(pod)).collect()
}

/// The subnet of each family that all attached pods live in, as the network cuts them; none where there are no pods, or
/// where they live in several.
pub(super) fn pod_subnet(now: &Situation<'_>) -> PerFamily<Subnet> {
    let of_family = |family: Family| {
        let space = now.network.spaces.get(family)?;
        let pods = counted(now).filter(|pod| pod.family() == family && in_network(now, *pod));
        let mut subnets = pods.map(|pod| match Subnet::holding(pod.base(), space.subnet_len) {
            Ok(whole) if whole.covers(pod) => whole,
            _ => pod,
        });
        let first = subnets.next()?;
        (subnets.all(|pod_subnet| pod_subnet == first) && first.prefix_len() == space.subnet_len)
            .then_some((family, first))
    };
    Family::ALL.into_iter().filter_map(of_family).collect()
}

/// Why this node can't be ready with these subnets.
pub(super) fn cut_off(now: &Situation<'_>, key: &LeaseKey) -> Option<Obstacle> {
    let mut pods = pods_outside(now, key);
    pods.sort_unstable();
    pods.dedup();
    (!pods.is_empty()).then_some(Obstacle::PodsOutside { key: *key, pods })
}

fn in_network(now: &Situation<'_>, pod: Subnet) -> bool {
    now.network.spaces.get(pod.family()).is_some_and(|space| space.network.covers(pod))
}

fn counted(now: &Situation<'_>) -> impl Iterator<Item = Subnet> {
    let leave = now.leave.map(|key| *key.subnets()).unwrap_or_default();
    let is_left = move |pod: &Subnet| leave.values().chain(now.left).any(|subnet| subnet.covers(*pod));
    now.pods.iter().copied().filter(move |pod| !is_left(pod))
}
