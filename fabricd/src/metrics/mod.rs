//! What the daemon did, in numbers: `/metrics`, in the format that is asked for.
//!
//! [`Counters`] are raised by the reconcile loop and the mesh. What the [`View`] says already (peers, readiness, lease, store)
//! is read from it at the moment of asking, so that the two can't differ.

mod fast_path;
mod format;
mod paths;
mod process;
mod traffic;

use std::time::Duration;

use fabric_core::handoff::{NotReady, Readiness};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use tokio::time::Instant;

use self::fast_path::FastPath;
pub use self::format::Format;
use self::paths::Paths;
use self::process::Process;
use self::traffic::Traffic;
use crate::kernel::Drops;
use crate::mesh::Mesh;
use crate::policy::status::PolicyCounters;
use crate::services::status::ServicesCounters;
use crate::status::counters::Counters;
use crate::status::view::{PeerTrouble, View};
use crate::store::Connection;

/// The registry, and what is filled in when it is shown.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    peers: Family<Peers, Gauge>,
    ready: Gauge,
    connected: Gauge,
    revision: Gauge,
    lease: Family<Lease, Gauge>,
    expiry: Gauge,
    age: Gauge,
    paths: Paths,
    traffic: Traffic,
    fast_path: FastPath,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Peers {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Lease {
    state: &'static str,
}

impl Metrics {
    /// What is shown of these counters, beside what is asked for when it is shown.
    #[must_use]
    pub fn new(counters: &Counters) -> Self {
        let metrics = Self {
            registry: Registry::default(),
            peers: Family::default(),
            ready: Gauge::default(),
            connected: Gauge::default(),
            revision: Gauge::default(),
            lease: Family::default(),
            expiry: Gauge::default(),
            age: Gauge::default(),
            paths: Paths::default(),
            traffic: Traffic::default(),
            fast_path: FastPath::default(),
        };
        metrics.registered(counters)
    }

    fn registered(mut self, counters: &Counters) -> Self {
        let all = self.registry.sub_registry_with_prefix("fabricd");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION")), ("arch", std::env::consts::ARCH)]);
        all.register("build", "Version and architecture of this daemon; always 1", build);
        counters.register(all);
        all.register("peers", "Leases of other nodes, by state", self.peers.clone());
        all.register("ready", "1 while pods can be added to this node, else 0", self.ready.clone());
        all.register("store_connected", "1 while the datastore answers, else 0", self.connected.clone());
        all.register("store_revision", "Revision of the datastore that the daemon acts on", self.revision.clone());
        all.register("lease", "1 for the state that this node's lease is in, 0 for the others", self.lease.clone());
        all.register_with_unit(
            "lease_expiry",
            "Time until this node's lease expires unless it is renewed, in seconds",
            Unit::Seconds,
            self.expiry.clone(),
        );
        all.register_with_unit(
            "lease_age",
            "Time since this node's lease was renewed, in seconds",
            Unit::Seconds,
            self.age.clone(),
        );
        self.paths.register(all);
        self.traffic.register(all);
        self.fast_path.register(all);
        self.registry.register_collector(Box::new(Process));
        self
    }

    /// The same with what is counted of network policies.
    #[must_use]
    pub fn with_policies(mut self, counters: &PolicyCounters) -> Self {
        counters.register(self.registry.sub_registry_with_prefix("fabricd"));
        self
    }

    /// The same with what is counted of Services.
    #[must_use]
    pub fn with_services(mut self, counters: &ServicesCounters) -> Self {
        counters.register(self.registry.sub_registry_with_prefix("fabricd"));
        self
    }

    /// All of it in OpenMetrics, which [`Format`] turns into another. `now` is what the lease's end is counted from.
    #[must_use]
    pub fn render(&self, view: &View, mesh: &Mesh, drops: &[Drops], now: Instant) -> String {
        self.show(view, now);
        self.paths.show(mesh, drops);
        self.traffic.show(view);
        self.fast_path.show(view);
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string does not fail");
        text
    }

    fn show(&self, view: &View, now: Instant) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let refused = view.troubles.values().filter(|t| matches!(t, PeerTrouble::Refused(_))).count();
        let known = view.peers().count();
        for (state, count) in [
            ("known", known),
            ("programmed", known.saturating_sub(view.troubles.len())),
            ("refused", refused),
            ("pending", view.troubles.len() - refused),
        ] {
            self.peers.get_or_create(&Peers { state }).set(number(count));
        }
        self.ready.set(i64::from(view.readiness == Readiness::Ready));
        self.connected.set(i64::from(view.connection == Connection::Up));
        self.revision.set(view.leases.as_ref().map_or(0, |leases| leases.revision()));
        let held = match (&view.holding.own, &view.holding.trouble) {
            (_, Some((NotReady::Quarantine, _))) => "quarantine",
            (Some(_), None) => "held",
            _ => "none",
        };
        for state in ["held", "quarantine", "none"] {
            self.lease.get_or_create(&Lease { state }).set(i64::from(state == held));
        }
        let left = view.holding.expires.map_or(Duration::ZERO, |expires| expires.saturating_duration_since(now));
        let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
        self.expiry.set(seconds(left));
        let ttl = view.holding.mark.map_or(left, |mark| mark.ttl);
        self.age.set(seconds(ttl.saturating_sub(left)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::KernelError;
    use fabric_core::diff::{Change, Op, TableName, nft, routing};
    use fabric_core::state::nft::TableKey;
    use std::io;

    #[test]
    fn writes_and_refusals_are_counted_by_what_they_were() {
        let counters = Counters::default();
        let address = Change::Create("10.244.1.0/32".parse().unwrap());
        let op: Op = routing::Op::Address("fabric.1".parse().unwrap(), address).into();
        let source = io::Error::from_raw_os_error(libc::EPERM);
        counters.wrote(&op, &Err(KernelError::of_op(&op, source, None)));
        counters.wrote(&op, &Ok(()));
        let table = nft::Op::DeleteTable(TableKey::Fabric).into();
        let busy = io::Error::from_raw_os_error(libc::EBUSY);
        counters.wrote(&table, &Err(KernelError::of_op(&table, busy, None)));
        counters.repaired(TableName::Route, 2);
        counters.repaired(TableName::Fdb, 0);
        counters.in_sync(Duration::from_millis(3));
        counters.round_trips().observe(0.003);
        let (table, chain, why) = (TableKey::Fabric, "senders".to_owned(), "from no peer".to_owned());
        let drops = [Drops { table, chain, why, packets: 7 }];
        let text = Metrics::new(&counters).render(
            &View::new("node-1".parse().unwrap()),
            &Mesh::default(),
            &drops,
            Instant::now(),
        );
        for line in [
            r#"fabricd_kernel_operations_total{table="address",verb="create"} 2"#,
            r#"fabricd_kernel_errors_total{errno="EPERM"} 1"#,
            r#"fabricd_kernel_operations_total{table="filter",verb="delete"} 1"#,
            r#"fabricd_kernel_errors_total{errno="EBUSY"} 1"#,
            r#"fabricd_repairs_total{table="route"} 2"#,
            r#"fabricd_reconcile_lag_seconds_bucket{le="0.004"} 1"#,
            r#"fabricd_lease{state="none"} 1"#,
            "fabricd_ready 0",
            r#"fabricd_filter_dropped_packets_total{table="inet fabric",chain="senders",reason="from no peer"} 7"#,
            r#"fabricd_mesh_peers{cause="port_blocked"} 0"#,
            r#"fabricd_mesh_rtt_seconds_bucket{le="0.0016"} 0"#,
            r#"fabricd_mesh_rtt_seconds_bucket{le="0.0032"} 1"#,
            r#"fabricd_mesh_loss_ratio{size="full"} 0.0"#,
        ] {
            assert!(text.lines().any(|shown| shown == line), "{line} is not in\n{text}");
        }
    }
}
