//! The mesh: whether every peer is reached through the tunnel, and if not, why.
//!
//! From VTEP to VTEP each peer gets a small packet and one of full size, over UDP, and answers with one of the same
//! size. A flannel node's kernel answers too: that nobody listens there. What is lost is tried again; what stays lost is
//! looked into ([`diagnose`]), and [`verdict`] names the cause.
//!
//! | file | what it is |
//! |---|---|
//! | [`schedule`] | who is probed when: at most five peers a second, however many there are |
//! | [`probe`] | one probe, and the answers to those of others |
//! | [`echo`] | pings around parts of our own kernel, which tell whose entries are stale |
//! | [`diagnose`] | the evidence, when a peer doesn't answer |
//! | [`verdict`] | the cause, by the evidence: pure |
//! | [`path`] | what is remembered of a peer |
//!
//! Nothing here writes to the kernel or waits for the reconcile loop.

pub mod diagnose;
pub mod echo;
pub mod path;
pub mod probe;
pub mod schedule;
pub mod verdict;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fabric_core::leases::Lease;
use fabric_core::model::{Family, MacAddr, Vni};
use fabric_core::record::LeaseKey;

pub use self::path::Path;
pub use self::schedule::run;
pub use self::verdict::Cause;

/// UDP port of the probes, on every VTEP's address.
pub const PORT: u16 = 9474;
/// How long an answer may take.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// The shortest time from one probe of a peer to the next.
pub const ROUND: Duration = Duration::from_secs(5);
/// The shortest time between the probes of two peers: what bounds the cost in a large cluster.
pub const GAP: Duration = Duration::from_millis(200);

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
    pub ours: Arc<Ours>,
}

impl Target {
    /// The path to a peer in one family; `None` if it isn't in that family.
    #[must_use]
    pub fn new(lease: &Arc<Lease>, family: Family, ours: &Arc<Ours>) -> Option<Self> {
        let endpoint = *lease.record.endpoints().get(family)?;
        Some(Self {
            overlay: lease.key.subnets().get(family)?.base(),
            mac: endpoint.vtep_mac,
            public_ip: endpoint.public_ip,
            lease: Arc::clone(lease),
            ours: Arc::clone(ours),
        })
    }

    /// The peer's name; its subnet for a flannel node.
    #[must_use]
    pub fn name(&self) -> String {
        self.lease.record.node().map_or_else(|| self.lease.key.to_string(), ToString::to_string)
    }
}

/// This node's end of the tunnels in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ours {
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
}

impl Mesh {
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
        Self { paths: Mutex::new(paths.into_iter().collect()), limits: Mutex::default() }
    }
}

/// How long it takes to probe so many peers.
#[must_use]
pub fn round(peers: usize) -> Duration {
    ROUND.max(GAP.saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cost_is_bounded_however_many_peers_there_are() {
        for (peers, seconds, packets) in [(2, 5.0, 1.6), (25, 5.0, 20.0), (500, 100.0, 20.0), (5_000, 1000.0, 20.0)] {
            let round = round(peers).as_secs_f64();
            assert!((round - seconds).abs() < 1e-9, "{peers} peers are probed within {round} s");
            assert!((4.0 * peers as f64 / round - packets).abs() < 1e-9, "{peers} peers");
        }
    }
}
