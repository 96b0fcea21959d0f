//! [`Node::bypassed`]: what of others filters or changes the packets between pods, so that the fast path would pass it by.
//!
//! Asked is not whether a packet passes, as for [`BlockingChain`](super::traffic::BlockingChain)s, but whether every packet of TCP and
//! UDP does, whatever its ports, its state and its addresses in the network are. What can't be read counts as if it dropped.
//!
//! Two kinds of rules are passed by and not told. Those that only count, log or remember packets. And those of kube-proxy: in
//! the filter they refuse what goes to a Service without endpoints, which is nobody's address, and drop what connection
//! tracking calls invalid.

use std::collections::BTreeSet;
use std::fmt;

use super::evaluate::{Blocked, effects};
use super::packet::{Connection, Content, Flow};
use super::traffic::{BlockingChain, Node};
use super::{Firewall, Packet};

/// A rule or a policy of others that packets between pods would pass by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bypassed {
    /// What.
    pub by: Blocked,
    /// What it does, or may do.
    pub does: Does,
}

/// What a rule does to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Does {
    /// It drops it.
    Drops,
    /// It changes it, or marks it for somebody else.
    Changes,
}

impl fmt::Display for Bypassed {
    /// `inet firewalld filter_FORWARD rule 3 (handle 12): reject may drop packets between pods`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let does = match self.does {
            Does::Drops => "drop",
            Does::Changes => "change",
        };
        write!(f, "{} may {does} packets between pods", self.by)
    }
}

/// Chains of kube-proxy and the kubelet in tables of iptables.
const KUBE_PROXY: [&str; 9] = [
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-FIREWALL",
    "KUBE-FORWARD",
    "KUBE-IPTABLES-HINT",
    "KUBE-KUBELET-CANARY",
    "KUBE-NODEPORTS",
    "KUBE-PROXY-CANARY",
    "KUBE-PROXY-FIREWALL",
    "KUBE-SERVICES",
];
/// Its table of nftables.
const KUBE_PROXY_TABLE: &str = "kube-proxy";

impl Node {
    /// What of others filters or changes packets between pods: those of this node, and those of others. `encapsulated` is what
    /// stands in the way of what carries them between nodes.
    #[must_use]
    pub fn bypassed(&self, firewall: &Firewall, encapsulated: &[BlockingChain]) -> Vec<Bypassed> {
        let mut found = BTreeSet::new();
        for packet in self.between_pods() {
            let effects = effects(firewall, &packet);
            let of = |does| move |by| Bypassed { by, does };
            found.extend(effects.drops.into_iter().map(of(Does::Drops)));
            found.extend(effects.changes.into_iter().map(of(Does::Changes)));
        }
        let tunnel = encapsulated.iter().filter(|obstacle| {
            obstacle.family == self.family() && matches!(obstacle.flow, Flow::Received | Flow::Sent)
        });
        found.extend(tunnel.map(|obstacle| Bypassed { by: obstacle.by.clone(), does: Does::Drops }));
        found.into_iter().filter(|bypassed| !is_of_kube_proxy(&bypassed.by)).collect()
    }

    /// All packets of pods that the fast path may take, as classes.
    fn between_pods(&self) -> Vec<Packet> {
        let mut packets = vec![];
        for (source, target) in [(self.own, self.network), (self.network, self.own), (self.own, self.own)] {
            for content in [Content::AnyTcp, Content::AnyUdp] {
                let packet = self.forwarded(source, target, content, Connection::Open);
                if self.direct {
                    packets.push(self.without_tunnel(&packet));
                }
                packets.push(packet);
            }
        }
        packets
    }
}

fn is_of_kube_proxy(by: &Blocked) -> bool {
    by.table == KUBE_PROXY_TABLE || KUBE_PROXY.contains(&by.chain.as_str())
}
