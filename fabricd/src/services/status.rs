//! What the loop of Services counts.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// What the loop counts. A clone counts into the same ones.
#[derive(Clone, Debug)]
pub struct ServicesCounters {
    services: Gauge,
    frontends: Gauge,
    changes: Counter,
    latency: Histogram,
}

impl Default for ServicesCounters {
    fn default() -> Self {
        let (services, frontends, changes) = (Gauge::default(), Gauge::default(), Counter::default());
        // From half a millisecond to sixteen seconds.
        Self { services, frontends, changes, latency: Histogram::new(exponential_buckets(0.000_5, 2.0, 16)) }
    }
}

impl ServicesCounters {
    /// Shows them in a registry, under its prefix.
    pub fn register(&self, all: &mut Registry) {
        all.register("services", "Services that this node translates", self.services.clone());
        let help = "Addresses and ports of Services that this node translates";
        all.register("services_frontends", help, self.frontends.clone());
        all.register("services_changes", "Changes of Services that were written to the kernel", self.changes.clone());
        let help = "From a change that the API server told of to the kernel's acknowledgement, in seconds";
        all.register_with_unit("services_latency", help, Unit::Seconds, self.latency.clone());
    }

    pub(super) fn planned(&self, (services, frontends): (usize, usize)) {
        self.services.set(i64::try_from(services).unwrap_or(i64::MAX));
        self.frontends.set(i64::try_from(frontends).unwrap_or(i64::MAX));
    }

    pub(super) fn written(&self, after: Duration) {
        self.changes.inc();
        self.latency.observe(after.as_secs_f64());
    }
}
