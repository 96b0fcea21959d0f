//! The numbers of the mesh and of the packet filter. They are read when somebody asks.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::kernel::Drops;
use crate::mesh::{Cause, Mesh};
use crate::status::counters::LabelValue;

/// Each peer has numbers of its own up to so many: beyond, a cluster would have millions of them.
pub(super) const EACH: usize = 100;

type Number = Gauge<f64, AtomicU64>;

/// Mesh and filter in numbers.
#[derive(Debug, Default)]
pub(super) struct Paths {
    peers: Family<ByCause, Gauge>,
    loss: Family<BySize, Number>,
    peer_rtt: Family<ByPeer, Number>,
    peer_loss: Family<ByPeerAndSize, Number>,
    probes: Counter,
    dropped: Family<Filtered, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByCause {
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BySize {
    size: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPeer {
    peer: LabelValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ByPeerAndSize {
    peer: LabelValue,
    size: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Filtered {
    table: LabelValue,
    chain: LabelValue,
    reason: LabelValue,
}

impl Paths {
    pub(super) fn register(&self, all: &mut Registry) {
        all.register("mesh_peers", "Paths to peers, by verdict", self.peers.clone());
        let help = "Share of the last probes without an answer, over all peers";
        all.register_with_unit("mesh_loss", help, Unit::Other("ratio".into()), self.loss.clone());
        let help = "Round trip to one peer, in seconds; in clusters of up to a hundred";
        all.register_with_unit("mesh_peer_rtt", help, Unit::Seconds, self.peer_rtt.clone());
        let help = "Share of the last probes of one peer without an answer; in clusters of up to a hundred";
        all.register_with_unit("mesh_peer_loss", help, Unit::Other("ratio".into()), self.peer_loss.clone());
        all.register("mesh_probes", "Probes that were sent", self.probes.clone());
        all.register("filter_dropped_packets", "Packets that our packet filter threw away", self.dropped.clone());
    }

    pub(super) fn show(&self, mesh: &Mesh, drops: &[Drops]) {
        self.show_mesh(mesh);
        for drop in drops {
            let (table, chain, reason) = (drop.table.to_string(), drop.chain.clone(), drop.why.clone());
            let labels = Filtered { table: LabelValue(table), chain: LabelValue(chain), reason: LabelValue(reason) };
            self.dropped.get_or_create(&labels).inner().store(drop.packets, Ordering::Relaxed);
        }
    }

    fn show_mesh(&self, mesh: &Mesh) {
        let mut by_cause = Cause::ALL.map(|cause| (cause, 0));
        let (mut small, mut full, mut probes, mut count) = (0.0, 0.0, 0, 0_u32);
        self.peer_rtt.clear();
        self.peer_loss.clear();
        let each = mesh.len() <= EACH;
        mesh.each(|path| {
            by_cause.iter_mut().filter(|(cause, _)| *cause == path.cause()).for_each(|(_, paths)| *paths += 1);
            (small, full) = (small + path.small.loss(), full + path.full.loss());
            (probes, count) = (probes + path.probes, count + 1);
            if each {
                let peer = LabelValue(path.target.name());
                if let Some(trip) = path.round_trip() {
                    self.peer_rtt.get_or_create(&ByPeer { peer: peer.clone() }).set(trip.as_secs_f64());
                }
                for (size, window) in [("small", path.small), ("full", path.full)] {
                    self.peer_loss.get_or_create(&ByPeerAndSize { peer: peer.clone(), size }).set(window.loss());
                }
            }
        });
        for (cause, paths) in by_cause {
            self.peers.get_or_create(&ByCause { cause: cause.word() }).set(paths);
        }
        for (size, sum) in [("small", small), ("full", full)] {
            self.loss.get_or_create(&BySize { size }).set(sum / f64::from(count.max(1)));
        }
        self.probes.inner().store(probes, Ordering::Relaxed);
    }
}
