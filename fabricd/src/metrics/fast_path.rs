//! The fast path in numbers: whether it is on, which path the packets took that its programs saw, and what it carried to and
//! from each peer.

use std::sync::atomic::Ordering;

use fabric_bpf::Path;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::paths::EACH;
use crate::status::counters::LabelValue;
use crate::status::fast_path::FastPathView;
use crate::status::view::View;

/// The numbers.
#[derive(Debug, Default)]
pub(super) struct FastPath {
    state: Family<State, Gauge>,
    packets: Family<Seen, Counter>,
    peer_packets: Family<Carried, Counter>,
    peer_bytes: Family<Carried, Counter>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Seen {
    program: &'static str,
    path: &'static str,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Carried {
    peer: LabelValue,
    direction: &'static str,
}

impl FastPath {
    pub(super) fn register(&self, all: &mut Registry) {
        let help = "1 for the state that the fast path is in, 0 for the others";
        all.register("fast_path", help, self.state.clone());
        let help =
            "Packets that programs of the fast path saw, by the path they took and why; since its maps were made";
        all.register("fast_path_packets", help, self.packets.clone());
        let help = "Packets that the fast path carried between pods of this node and of one peer; in clusters of up to a hundred";
        all.register("fast_path_peer_packets", help, self.peer_packets.clone());
        let help = "Bytes of IP packets that the fast path carried between pods of this node and of one peer; in clusters of up to \
                    a hundred";
        all.register_with_unit("fast_path_peer", help, Unit::Bytes, self.peer_bytes.clone());
    }

    pub(super) fn show(&self, view: &View) {
        let now = state(&view.fast_path);
        for state in ["on", "left_off", "failed", "off"] {
            self.state.get_or_create(&State { state }).set(i64::from(state == now));
        }
        self.packets.clear();
        for ((program, reason), packets) in &view.fast_path.counts {
            let path = match reason.path() {
                Path::Fast => "fast",
                Path::Slow => "slow",
                Path::Dropped => "dropped",
            };
            let program = program.name().trim_start_matches("fabric_");
            let seen = Seen { program, path, reason: reason.label() };
            self.packets.get_or_create(&seen).inner().store(*packets, Ordering::Relaxed);
        }
        self.show_peers(view);
    }

    fn show_peers(&self, view: &View) {
        self.peer_packets.clear();
        self.peer_bytes.clear();
        if view.peers().count() > EACH {
            return;
        }
        for peer in view.peers() {
            let (Some(traffic), Some(node)) = (view.fast_path.traffic_of(peer), peer.record.node()) else { continue };
            let both = [
                ("sent", traffic.sent_packets, traffic.sent_bytes),
                ("received", traffic.received_packets, traffic.received_bytes),
            ];
            for (direction, packets, bytes) in both {
                let carried = Carried { peer: LabelValue(node.to_string()), direction };
                let set = |family: &Family<Carried, Counter>, number| {
                    family.get_or_create(&carried).inner().store(number, Ordering::Relaxed);
                };
                set(&self.peer_packets, packets);
                set(&self.peer_bytes, bytes);
            }
        }
    }
}

fn state(view: &FastPathView) -> &'static str {
    match view {
        FastPathView { asked: false, .. } => "off",
        FastPathView { on: true, .. } => "on",
        FastPathView { left_off: true, .. } => "left_off",
        _ => "failed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fast_path_is_in_one_state() {
        let view = |asked, on, left_off| FastPathView { asked, on, left_off, ..FastPathView::default() };
        let found =
            [view(false, false, false), view(true, true, false), view(true, false, true), view(true, false, false)];
        assert_eq!(found.map(|view| state(&view)), ["off", "on", "left_off", "failed"]);
    }
}
