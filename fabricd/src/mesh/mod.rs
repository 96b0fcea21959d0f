//! The mesh: whether every peer is reached through the tunnel, and if not, why.
//!
//! From VTEP to VTEP each peer gets a small packet and one of full size, over UDP, and answers with one of the same
//! size. A flannel node's kernel answers too: that nobody listens there. What is lost is tried again; what stays lost is
//! looked into ([`diagnose`]). [`verdict`] names the cause that a round shows, and [`confirm`] tells it once it is sure.
//!
//! | file | what it is |
//! |---|---|
//! | [`schedule`] | who is probed when: at most five peers a second, however many there are |
//! | [`batch`] | the first probes of several peers at once |
//! | [`probe`] | one probe, and the answers to those of others |
//! | [`diagnose`] | one round: probes, and the evidence when a peer doesn't answer |
//! | [`routes`] | what this node's routes and policy rules say of the peer |
//! | [`tunnel`], [`ping`], [`frame`] | packets around parts of our own kernel, which tell whose entries are stale |
//! | [`verdict`] | the cause, by the evidence of one round: pure |
//! | [`confirm`] | the cause, by the rounds so far: pure |
//! | [`loss`] | how much is lost, and on which half of the path |
//! | [`path`] | what is remembered of a peer |
//! | [`messages`] | a verdict as an operator reads it |
//! | [`transitions`] | verdicts that change, as events and log lines |
//!
//! Nothing here writes to the kernel or waits for the reconcile loop, and nothing needs a capability.

pub mod batch;
pub mod confirm;
pub mod diagnose;
pub mod frame;
pub mod loss;
pub mod messages;
pub mod path;
pub mod ping;
pub mod probe;
pub mod routes;
pub mod schedule;
pub mod transitions;
pub mod tunnel;
pub mod verdict;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fabric_core::leases::Lease;
use fabric_core::model::{Family, IfName, MacAddr, NodeName, Vni};
use fabric_core::record::LeaseKey;
use prometheus_client::metrics::histogram::Histogram;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};

pub use self::path::Path;
pub use self::schedule::run;
pub use self::verdict::Cause;

/// UDP port of the probes, on every VTEP's address.
pub const PORT: u16 = 9474;
/// How long an answer may take.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// The shortest time from one probe of a peer to the next.
pub const ROUND: Duration = Duration::from_secs(5);
/// The shortest time between the probes of two peers, on average: what bounds the cost in a large cluster.
pub const GAP: Duration = Duration::from_millis(200);
/// So many peers are probed at once, when several are due. Each waking costs more than what it is for.
pub const BATCH: usize = 5;

/// A peer in one address family.
pub type Key = (LeaseKey, Family);

/// The path to be probed.
#[derive(Clone, Debug)]
pub struct Target {
    /// The peer.
    pub lease: Arc<Lease>,
    /// Its VTEP's address in the overlay.
    pub overlay: IpAddr,
    /// Its VTEP's MAC address, as published.
    pub mac: MacAddr,
    /// Its address in the underlay, as published.
    pub public_ip: IpAddr,
    /// Our side.
    pub ours: Arc<LocalVtep>,
}

impl Target {
    /// The path to a peer in one family; `None` if it isn't in that family.
    #[must_use]
    pub fn new(lease: &Arc<Lease>, family: Family, ours: &Arc<LocalVtep>) -> Option<Self> {
        let endpoint = *lease.record.endpoints().get(family)?;
        Some(Self {
            overlay: lease.key.subnets().get(family)?.base(),
            mac: endpoint.vtep_mac,
            public_ip: endpoint.public_ip,
            lease: Arc::clone(lease),
            ours: Arc::clone(ours),
        })
    }

    /// Whether both ends are where those of `other` are.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        let ends = |of: &Self| (of.overlay, of.mac, of.public_ip, of.ours.local, of.ours.overlay, of.ours.mac);
        ends(self) == ends(other)
    }

    /// The peer's name; its subnet for a flannel node.
    #[must_use]
    pub fn name(&self) -> String {
        self.lease.record.node().map_or_else(|| self.lease.key.to_string(), ToString::to_string)
    }
}

/// This node's end of the tunnels in one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalVtep {
    /// This node.
    pub node: NodeName,
    /// The VXLAN device.
    pub device: IfName,
    /// The underlay interface.
    pub underlay: IfName,
    /// The bridges that pods are attached to.
    pub pod_bridges: BTreeSet<IfName>,
    /// Our VTEP's address in the overlay.
    pub overlay: IpAddr,
    /// Our VTEP's MAC address.
    pub mac: MacAddr,
    /// Address that encapsulated packets are sent from.
    pub local: IpAddr,
    /// MTU of the VXLAN device, in bytes.
    pub mtu: u32,
    /// VXLAN network identifier.
    pub vni: Vni,
    /// UDP port of VXLAN.
    pub port: u16,
}

/// What is known of all paths. Shared by who probes and who reads; nobody holds it for long.
#[derive(Debug, Default)]
pub struct Mesh {
    paths: Mutex<BTreeMap<Key, Path>>,
    limits: Mutex<String>,
    /// Somebody wants a path to be probed now.
    asked: Notify,
    /// Rounds that have ended so far.
    rounds: watch::Sender<u64>,
    /// Takes every round trip of a small probe, in seconds.
    round_trips: Option<Histogram>,
}

impl Mesh {
    /// One whose round trips are counted there, in seconds.
    #[must_use]
    pub fn counted_by(round_trips: Histogram) -> Self {
        Self { round_trips: Some(round_trips), ..Self::default() }
    }

    /// Looks at every path in turn, without copying any.
    pub fn each(&self, mut look: impl FnMut(&Path)) {
        self.lock().values().for_each(&mut look);
    }

    /// How many paths there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    /// True when there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Seconds from one probe of a peer to the next, and packets that are sent a second, while all is well.
    #[must_use]
    pub fn cost(&self) -> (f64, f64) {
        let peers = self.lock().len();
        let round = round(peers).as_secs_f64();
        // Two probes, and two answers to the peer's own.
        (round, 4.0 * f64::from(u32::try_from(peers).unwrap_or(u32::MAX)) / round)
    }

    /// Probes the peers of these names now, all if there are none, and waits until each has a verdict that the next round
    /// won't change, but no longer than `patience`. They take their turns at the usual pace.
    pub async fn probe(&self, nodes: &[String], patience: Duration) {
        let (began, mut rounds) = (Instant::now(), self.rounds.subscribe());
        let wanted = |path: &Path| nodes.is_empty() || nodes.contains(&path.target.name());
        for path in self.lock().values_mut().filter(|path| wanted(path)) {
            match &mut path.due {
                // Their turns come in the order in which they are due: before all that wait.
                Some(due) => *due = (*due).min(began),
                None => path.again = true,
            }
        }
        self.asked.notify_one();
        let settled = |path: &Path| path.probed.is_some_and(|at| at > began) && !path.again && !path.is_open();
        // When it takes longer, what is known until then is all there is.
        let _ =
            timeout(patience, rounds.wait_for(|_| self.lock().values().filter(|path| wanted(path)).all(settled))).await;
    }

    /// Why not all causes can be told apart; empty when they can.
    #[must_use]
    pub fn limits(&self) -> String {
        self.limits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn limited(&self, why: String) {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Path>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FromIterator<(Key, Path)> for Mesh {
    fn from_iter<I: IntoIterator<Item = (Key, Path)>>(paths: I) -> Self {
        Self { paths: Mutex::new(paths.into_iter().collect()), ..Self::default() }
    }
}

/// How long it takes to probe so many peers.
#[must_use]
pub fn round(peers: usize) -> Duration {
    ROUND.max(pause(peers))
}

/// How long nobody else is probed after so many peers were.
fn pause(peers: usize) -> Duration {
    GAP.saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use fabric_core::leases::{Entry, LeaseSet};

    use super::*;

    /// The path from node-1 (10.244.1.0 at 192.0.2.1) to node-2 (10.244.2.0 at 192.0.2.2).
    pub(super) fn target() -> Target {
        let ours = LocalVtep {
            node: "node-1".parse().unwrap(),
            device: "fabric.1".parse().unwrap(),
            underlay: "eth0".parse().unwrap(),
            pod_bridges: ["cni0".parse().unwrap()].into(),
            overlay: "10.244.1.0".parse().unwrap(),
            mac: "02:00:00:00:00:01".parse().unwrap(),
            local: "192.0.2.1".parse().unwrap(),
            mtu: 1450,
            vni: Vni::try_from(1).unwrap(),
            port: 8472,
        };
        let record = r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan",
            "BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:02"},
            "Fabric":{"v":1,"node":"node-2","boot":"b","netns":1,"epoch":1}}"#;
        let entry = Entry { key: "10.244.2.0-24".into(), value: record.into(), create_revision: 1, mod_revision: 1 };
        let leases = LeaseSet::snapshot(&LeaseSet::default(), vec![entry], 1);
        let lease = leases.iter().next().expect("one was put in");
        Target::new(lease, Family::V4, &Arc::new(ours)).expect("it is in IPv4")
    }

    #[test]
    fn cost_is_bounded_however_many_peers_there_are() {
        for (peers, seconds, packets) in [(2, 5.0, 1.6), (25, 5.0, 20.0), (500, 100.0, 20.0), (5_000, 1000.0, 20.0)] {
            let round = round(peers).as_secs_f64();
            assert!((round - seconds).abs() < 1e-9, "{peers} peers are probed within {round} s");
            assert!((4.0 * peers as f64 / round - packets).abs() < 1e-9, "{peers} peers");
        }
    }
}
