//! The daemon's own packets: from this node's address on the bridge to the pods at both ends.
//!
//! They pass the forward chains of the other node, both ways, and of this one only its input and output. The other
//! node's daemon sends the same the other way round, so both together pass everything between two pods but what judges
//! the exact pair of addresses; that a program of this node sends from within the pod: see
//! docs/decisions/0052-explain-sends-real-packets.md.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;

use fabric_core::model::Family;

use super::{Hop, PACKET};
use crate::diagnosis::Inspection;
use crate::diagnosis::packet::{self, Seen};

/// What became of the packets, by where they went to.
#[derive(Debug, Default)]
pub(super) struct Probes {
    seen: BTreeMap<IpAddr, (IpAddr, Seen)>,
}

impl Probes {
    /// Sends to all of them at once, and waits.
    pub(super) fn send(inspection: &Inspection, targets: &[IpAddr]) -> Self {
        let from = |to: IpAddr| {
            let own = inspection.view.holding.own.as_ref()?.key.subnets().get(Family::of(to)).copied()?;
            let links = &inspection.snapshot.observed.as_ref()?.host.links;
            let has = links.iter().any(|link| link.addresses.iter().any(|(ip, _)| *ip == own.gateway()));
            (has && own.gateway() != to && own.base() != to).then(|| own.gateway())
        };
        let seen = thread::scope(|scope| {
            let pairs = targets.iter().filter_map(|to| Some((*to, from(*to)?)));
            let sent: Vec<_> =
                pairs.map(|(to, from)| (to, from, scope.spawn(move || packet::probe(from, to)))).collect();
            let seen = sent.into_iter().map(|(to, from, thread)| {
                let seen = thread.join().unwrap_or_else(|_| Seen::Unsent("the thread that sends has ended".into()));
                (to, (from, seen))
            });
            seen.collect()
        });
        Self { seen }
    }

    /// What became of the one to `to`.
    pub(super) fn hop(&self, to: IpAddr) -> Option<Hop> {
        let (from, seen) = self.seen.get(&to)?;
        let found = format!("from this node's {from} to {to}: {seen}");
        Some(match seen {
            Seen::Answered(_) => Hop::fine(PACKET, found),
            Seen::Refused { .. } => {
                Hop::failed(PACKET, found, "find the rule on the node that refuses\nnft list ruleset")
            }
            Seen::Unsent(_) => Hop::failed(PACKET, found, format!("ip route get {to} from {from}")),
            // A pod may be set to answer nothing.
            Seen::Nothing => Hop::doubtful(
                PACKET,
                found,
                format!("an answer; see where packets are on both nodes\ntcpdump -c 10 -ni any host {to}"),
            ),
        })
    }
}
