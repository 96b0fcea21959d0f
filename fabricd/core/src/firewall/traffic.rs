//! The packets of ours that foreign chains are asked about, and what stands in their way.
//!
//! They are evaluated as classes: the packets of any peer, of any pod of this node. Only where a rule tells some addresses
//! from others is each peer evaluated by itself.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use super::Firewall;
use super::bits::Unknown;
use super::evaluate::{Blocked, Verdict, evaluate, state_decides};
use super::packet::{Connection, Content, Flow, Interface, Packet, Path};
use super::remedy::remedy;
use crate::model::{Family, Subnet, Vni};
use crate::subnet::from_bits;

/// A packet between pods goes from an ordinary port to another one.
const FROM: u16 = 40_001;
const TO: u16 = 50_001;

/// What drops which packets, why that isn't sure, and the peers whose packets they are.
type Found = BTreeMap<(Flow, Blocked), (Option<Unknown>, Vec<IpAddr>)>;

/// Where packets of ours pass on this node, in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// The cluster's network.
    pub network: Subnet,
    /// This node's subnet.
    pub own: Subnet,
    /// The bridge of the pods.
    pub bridge: Interface,
    /// The VXLAN device.
    pub tunnel: Interface,
    /// The underlay interface.
    pub underlay: Interface,
    /// This node's underlay address.
    pub local: IpAddr,
    /// Destination port of encapsulated packets.
    pub port: u16,
    /// VXLAN network identifier.
    pub vni: Vni,
    /// Whether rules of ours keep encapsulated packets out of connection tracking.
    pub untracked: bool,
    /// Whether some peers are reached without encapsulation, over the underlay interface.
    pub direct: bool,
}

/// A chain of others that stands in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockingChain {
    /// The family.
    pub family: Family,
    /// Of what.
    pub flow: Flow,
    /// What drops it.
    pub by: Blocked,
    /// Why that isn't sure; none when it is.
    pub because: Option<Unknown>,
    /// The peers that are concerned; empty for all.
    pub peers: Vec<IpAddr>,
    /// UDP port of encapsulated packets.
    pub port: u16,
    /// Complete commands that let the packets through, in their order.
    pub remedy: Vec<String>,
}

impl BlockingChain {
    /// Whether it is sure that packets which should pass are dropped.
    #[must_use]
    pub fn is_sure(&self) -> bool {
        self.because.is_none()
    }
}

impl fmt::Display for BlockingChain {
    /// `inet fw forward policy drop drops IPv4 packets between pods of this node and of others`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { by, family, port, .. } = self;
        let drops = if self.is_sure() { "drops" } else { "may drop" };
        let flow = match self.flow {
            Flow::Received => format!("{family} VXLAN packets that arrive at UDP port {port}"),
            Flow::Sent => format!("{family} VXLAN packets to UDP port {port} of peers"),
            Flow::Pods => format!("{family} packets between pods of this node and of others"),
            Flow::Outside => format!("{family} packets between pods and what is outside the network"),
        };
        write!(f, "{by} {drops} {flow}")?;
        match self.peers.as_slice() {
            [] => {}
            [one] => write!(f, ", those of {one}")?,
            [first, rest @ ..] => write!(f, ", those of {first} and {} more peers", rest.len())?,
        }
        match &self.because {
            Some(Unknown::Address) => f.write_str(", depending on their addresses"),
            Some(why) => write!(f, ", depending on: {why}"),
            None => Ok(()),
        }
    }
}

impl Node {
    /// The family.
    #[must_use]
    pub fn family(&self) -> Family {
        self.network.family()
    }

    /// An encapsulated packet that arrives from a peer, or from any.
    #[must_use]
    pub fn received(&self, peer: Option<IpAddr>) -> Packet {
        Packet {
            source: peer.map_or_else(|| self.anywhere(), Subnet::host),
            target: Subnet::host(self.local),
            content: Content::Vxlan { port: self.port, vni: self.vni },
            path: Path::Received,
            input: Some(self.underlay),
            output: None,
            connection: self.tunnel_connection(),
            reverse_path: Some(true),
        }
    }

    /// An encapsulated packet to a peer, or to any.
    #[must_use]
    pub fn sent(&self, peer: Option<IpAddr>) -> Packet {
        Packet {
            source: Subnet::host(self.local),
            target: peer.map_or_else(|| self.anywhere(), Subnet::host),
            path: Path::Sent,
            input: Some(self.tunnel),
            output: Some(self.underlay),
            reverse_path: None,
            ..self.received(None)
        }
    }

    /// A packet between two addresses, one of which is of this node's pods: how it passes here.
    #[must_use]
    pub fn forwarded(&self, source: Subnet, target: Subnet, content: Content, connection: Connection) -> Packet {
        let side = |net: Subnet| match () {
            () if self.own.covers(net) => self.bridge,
            () if self.network.covers(net) => self.tunnel,
            () => self.underlay,
        };
        // Of a class that holds this node's subnet too, those beyond it are meant.
        let (input, output) = (side(source), side(target));
        Packet {
            source,
            target,
            content,
            path: Path::Forwarded,
            input: Some(input),
            output: Some(output),
            connection,
            reverse_path: Some(true),
        }
    }

    /// The same packet of a peer that is reached without encapsulation.
    pub(super) fn without_tunnel(&self, packet: &Packet) -> Packet {
        let over = |side: Option<Interface>| side.map(|side| if side == self.tunnel { self.underlay } else { side });
        Packet { input: over(packet.input), output: over(packet.output), ..packet.clone() }
    }

    /// All packets that are evaluated, as classes.
    #[must_use]
    pub fn packets(&self) -> Vec<(Flow, Packet)> {
        use Connection::{Established, New};
        let tcp = Content::Tcp { from: FROM, to: TO };
        let udp = Content::Udp { from: FROM, to: TO };
        let mut packets = vec![(Flow::Received, self.received(None)), (Flow::Sent, self.sent(None))];
        let kinds = [(tcp, New), (tcp, Established), (udp, New), (Content::Icmp { reply: false }, New)];
        for (source, target) in [(self.own, self.network), (self.network, self.own)] {
            for (content, connection) in kinds {
                let packet = self.forwarded(source, target, content, connection);
                if self.direct {
                    packets.push((Flow::Pods, self.without_tunnel(&packet)));
                }
                packets.push((Flow::Pods, packet));
            }
        }
        packets.push((Flow::Outside, self.forwarded(self.own, self.anywhere(), tcp, New)));
        packets.push((Flow::Outside, self.forwarded(self.anywhere(), self.own, tcp, Established)));
        packets
    }

    /// What of others stands in the way of packets of ours; what is sure comes first. The peers are asked for only where a
    /// rule looks at their addresses.
    #[must_use]
    pub fn obstacles(&self, firewall: &Firewall, peers: impl Fn() -> Vec<IpAddr>) -> Vec<BlockingChain> {
        let mut found = Found::new();
        for (flow, packet) in self.packets() {
            match evaluate(firewall, &packet) {
                Verdict::Passes => {}
                Verdict::Dropped(by) => {
                    found.extend(by.into_iter().map(|by| ((flow, by), (None, vec![]))));
                }
                // Who may reach which address outside is the firewall's business.
                Verdict::Unknown(doubts) if flow == Flow::Outside => {
                    for doubt in doubts.into_iter().filter(|doubt| doubt.because != Unknown::Address) {
                        found.entry((flow, doubt.by)).or_insert((Some(doubt.because), vec![]));
                    }
                }
                Verdict::Unknown(doubts) => {
                    let by_peer = flow != Flow::Pods && doubts.iter().any(|doubt| doubt.because == Unknown::Address);
                    if by_peer {
                        for peer in peers() {
                            self.of_peer(firewall, flow, peer, &mut found);
                        }
                    } else {
                        for doubt in doubts {
                            found.entry((flow, doubt.by)).or_insert((Some(doubt.because), vec![]));
                        }
                    }
                }
            }
        }
        // What keeps pods from each other is told once.
        let between: Vec<Blocked> =
            found.keys().filter(|(flow, _)| *flow == Flow::Pods).map(|(_, by)| by.clone()).collect();
        found.retain(|(flow, by), _| *flow != Flow::Outside || !between.contains(by));
        let obstacle =
            |((flow, by), (because, peers)): ((Flow, Blocked), (Option<Unknown>, Vec<IpAddr>))| BlockingChain {
                family: self.family(),
                flow,
                remedy: self.remedy(firewall, &by, flow),
                by,
                because,
                peers,
                port: self.port,
            };
        let mut obstacles: Vec<BlockingChain> = found.into_iter().map(obstacle).collect();
        obstacles.sort_by_key(|obstacle| !obstacle.is_sure());
        obstacles
    }

    fn of_peer(&self, firewall: &Firewall, flow: Flow, peer: IpAddr, found: &mut Found) {
        let packet = if flow == Flow::Received { self.received(Some(peer)) } else { self.sent(Some(peer)) };
        match evaluate(firewall, &packet) {
            Verdict::Passes => {}
            Verdict::Dropped(by) => {
                by.into_iter().for_each(|by| found.entry((flow, by)).or_insert((None, vec![])).1.push(peer));
            }
            Verdict::Unknown(doubts) => doubts.into_iter().for_each(|doubt| {
                found.entry((flow, doubt.by)).or_insert((Some(doubt.because), vec![])).1.push(peer);
            }),
        }
    }

    /// The commands that let packets of `flow` pass what blocks them.
    #[must_use]
    pub fn remedy(&self, firewall: &Firewall, by: &Blocked, flow: Flow) -> Vec<String> {
        remedy(firewall, by, flow, self.network, self.port)
    }

    /// A rule of others whose decision on encapsulated packets hangs on the state of their connection: where there is
    /// one, they have to be tracked, or a firewall that lets new connections in would keep them out.
    #[must_use]
    pub fn needs_tracking(&self, firewall: &Firewall) -> Option<Blocked> {
        [self.received(None), self.sent(None)].iter().find_map(|packet| state_decides(firewall, packet))
    }

    fn anywhere(&self) -> Subnet {
        Subnet::holding(from_bits(self.family(), 0), 0).expect("0 is at most 32")
    }

    fn tunnel_connection(&self) -> Connection {
        // Each direction of a tunnel has source ports of its own, so no packet of it is ever an answer to another.
        if self.untracked { Connection::Untracked } else { Connection::New }
    }
}
