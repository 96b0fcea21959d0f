//! What the loop of Services counts.

use std::time::Duration;

use jiff::Timestamp;
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
    programming: Histogram,
}

impl Default for ServicesCounters {
    fn default() -> Self {
        let (services, frontends, changes) = (Gauge::default(), Gauge::default(), Counter::default());
        // From half a millisecond to sixteen seconds.
        let latency = Histogram::new(exponential_buckets(0.000_5, 2.0, 16));
        // From eight milliseconds to two minutes.
        let programming = Histogram::new(exponential_buckets(0.008, 2.0, 15));
        Self { services, frontends, changes, latency, programming }
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
        let help =
            "From what a change of endpoints tells of (a pod became ready) to the kernel's acknowledgement, in seconds";
        let name = "services_network_programming_duration";
        all.register_with_unit(name, help, Unit::Seconds, self.programming.clone());
    }

    /// The kernel holds what happened at these times.
    pub(super) fn programmed(&self, triggers: &[Timestamp], now: Timestamp) {
        for at in triggers {
            // Clocks differ.
            self.programming.observe(now.duration_since(*at).as_secs_f64().max(0.0));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_programming_is_told_by_the_time_that_slices_have_and_never_below_nothing() {
        let (counters, mut registry) = (ServicesCounters::default(), Registry::with_prefix("fabricd"));
        counters.register(&mut registry);
        let at = |text: &str| text.parse::<Timestamp>().expect("a time");
        let now = at("2026-11-29T10:00:03Z");
        counters.programmed(&[at("2026-11-29T10:00:00.5Z"), at("2026-11-29T10:00:04Z")], now);
        let mut told = String::new();
        prometheus_client::encoding::text::encode(&mut told, &registry).expect("text");
        let name = "fabricd_services_network_programming_duration_seconds";
        for line in [format!("{name}_sum 2.5"), format!("{name}_count 2"), format!("{name}_bucket{{le=\"0.008\"}} 1")] {
            assert!(told.lines().any(|told| told == line), "{line}: {told}");
        }
    }
}
