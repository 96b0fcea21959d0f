//! [`Counters`]: what the daemon did, in numbers. The reconcile loop and the mesh raise them; [`crate::metrics`] shows them.

use std::fmt;
use std::time::Duration;

use fabric_core::diff::{Op, TableName};
use nix::errno::Errno;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::kernel::KernelError;

/// All counters. A clone counts into the same ones.
#[derive(Clone, Debug)]
pub struct Counters {
    passes: Counter,
    audits: Counter,
    resyncs: Counter,
    operations: Family<Operation, Counter>,
    errors: Family<Failure, Counter>,
    repairs: Family<Repairs, Counter>,
    lag: Histogram,
    round_trips: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Operation {
    table: &'static str,
    verb: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Failure {
    errno: LabelValue,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Repairs {
    table: &'static str,
}

/// A label that is made at run time.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct LabelValue(pub(crate) String);

impl EncodeLabelValue for LabelValue {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        self.0.encode(encoder)
    }
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            passes: Counter::default(),
            audits: Counter::default(),
            resyncs: Counter::default(),
            operations: Family::default(),
            errors: Family::default(),
            repairs: Family::default(),
            // From one millisecond to half a minute.
            lag: Histogram::new(exponential_buckets(0.001, 2.0, 16)),
            // From 50 microseconds, between two machines of a rack, to more than a probe's patience.
            round_trips: Histogram::new(exponential_buckets(0.000_05, 2.0, 16)),
        }
    }
}

impl Counters {
    /// Shows them in a registry, under its prefix.
    pub fn register(&self, all: &mut Registry) {
        all.register("passes", "Passes of the reconcile loop", self.passes.clone());
        all.register("audits", "Looks at the kernel although nothing has happened", self.audits.clone());
        let help = "Full resyncs because notifications of the kernel were lost";
        all.register("kernel_resyncs", help, self.resyncs.clone());
        all.register("kernel_operations", "Writes to the kernel, by table and kind", self.operations.clone());
        all.register("kernel_errors", "Writes that the kernel refused, by errno", self.errors.clone());
        let help = "Entries that another program changed or deleted, and that were restored, by table";
        all.register("repairs", help, self.repairs.clone());
        let help = "Reconcile latency: from the first event to a kernel state as desired, in seconds";
        all.register_with_unit("reconcile_lag", help, Unit::Seconds, self.lag.clone());
        let help = "Round trips of small probes to the peers and back, through the tunnel, in seconds";
        all.register_with_unit("mesh_rtt", help, Unit::Seconds, self.round_trips.clone());
    }

    /// The loop looked at everything that it was woken for.
    pub fn passed(&self) {
        self.passes.inc();
    }

    /// The loop looks at the kernel although nothing has happened.
    pub fn audited(&self) {
        self.audits.inc();
    }

    /// The kernel said more than could be heard.
    pub fn resynced(&self) {
        self.resyncs.inc();
    }

    /// The kernel was asked for something.
    pub fn wrote(&self, op: &Op, result: &Result<(), KernelError>) {
        for (verb, count) in op.counts().into_iter().filter(|(_, count)| *count > 0) {
            let operation = Operation { table: op.table().as_str(), verb: verb.as_str() };
            self.operations.get_or_create(&operation).inc_by(count as u64);
        }
        if let Err(error) = result {
            let errno = error.errno().map_or_else(|| "none".into(), |errno| format!("{:?}", Errno::from_raw(errno)));
            self.errors.get_or_create(&Failure { errno: LabelValue(errno) }).inc();
        }
    }

    /// So many entries of a table were restored after another program had changed them.
    pub fn repaired(&self, table: TableName, count: u64) {
        if count > 0 {
            self.repairs.get_or_create(&Repairs { table: table.as_str() }).inc_by(count);
        }
    }

    /// The kernel holds what is wanted, so long after that was first known.
    pub fn in_sync(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }

    /// Where the mesh counts its round trips, in seconds; a clone is the same histogram.
    #[must_use]
    pub fn round_trips(&self) -> Histogram {
        self.round_trips.clone()
    }
}
