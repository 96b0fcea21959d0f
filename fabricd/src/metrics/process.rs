//! What this process uses, under the names that Prometheus' own clients have (`process_…`). Read from `/proc` (proc(5))
//! when somebody asks.

use std::fmt;
use std::fs;

use nix::unistd::{SysconfVar, sysconf};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// The `process_…` metrics.
#[derive(Debug)]
pub(super) struct Process;

/// What `/proc` says at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Usage {
    /// User and system time, in seconds.
    cpu: f64,
    /// In seconds since 1970.
    started: f64,
    /// In bytes.
    resident: i64,
    /// In bytes.
    virtual_size: i64,
    open_files: i64,
    max_files: i64,
}

impl Collector for Process {
    fn encode(&self, mut to: DescriptorEncoder<'_>) -> fmt::Result {
        // Without /proc there is nothing to tell, which is no reason to keep the rest back.
        let Some(usage) = Usage::now() else { return Ok(()) };
        let help = "User and system CPU time spent, in seconds";
        show(&mut to, "process_cpu", help, Some(Unit::Seconds), &ConstCounter::new(usage.cpu))?;
        let help = "Start time of the process, in seconds since 1970 (UTC)";
        show(&mut to, "process_start_time", help, Some(Unit::Seconds), &ConstGauge::new(usage.started))?;
        let help = "Resident memory, in bytes";
        show(&mut to, "process_resident_memory", help, Some(Unit::Bytes), &ConstGauge::new(usage.resident))?;
        let help = "Virtual memory, in bytes";
        show(&mut to, "process_virtual_memory", help, Some(Unit::Bytes), &ConstGauge::new(usage.virtual_size))?;
        show(&mut to, "process_open_fds", "Open file descriptors", None, &ConstGauge::new(usage.open_files))?;
        let help = "File descriptors that may be open at once";
        show(&mut to, "process_max_fds", help, None, &ConstGauge::new(usage.max_files))
    }
}

fn show(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<Unit>,
    value: &impl EncodeMetric,
) -> fmt::Result {
    // The trailing full stop is what the registry gives the others.
    let metric = to.encode_descriptor(name, &format!("{help}."), unit.as_ref(), value.metric_type())?;
    value.encode(metric)
}

impl Usage {
    fn now() -> Option<Self> {
        let read = |file: &str| fs::read_to_string(file).ok();
        let open_files = fs::read_dir("/proc/self/fd").ok()?.count();
        let ticks = sysconf(SysconfVar::CLK_TCK).ok()??;
        #[expect(clippy::cast_precision_loss, reason = "a hundred")]
        let ticks = ticks as f64;
        let usage = Self::parse(
            &read("/proc/self/stat")?,
            &read("/proc/self/status")?,
            &read("/proc/self/limits")?,
            &read("/proc/stat")?,
            ticks,
        )?;
        Some(Self { open_files: i64::try_from(open_files).ok()?, ..usage })
    }

    fn parse(stat: &str, status: &str, limits: &str, machine: &str, ticks: f64) -> Option<Self> {
        // Fields 14, 15 and 22, of which the second, the name, may have spaces and brackets of its own.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let time = |field: usize| Some(fields.get(field - 3)?.parse::<f64>().ok()? / ticks);
        let line = |text: &str, name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)).map(|rest| rest.trim().to_owned())
        };
        let kilobytes = |name: &str| Some(line(status, name)?.strip_suffix(" kB")?.parse::<i64>().ok()? * 1024);
        let soft_limit = line(limits, "Max open files")?;
        let soft_limit = soft_limit.split_whitespace().next()?.parse().unwrap_or(i64::MAX); // or "unlimited"
        Some(Self {
            cpu: time(14)? + time(15)?,
            started: line(machine, "btime")?.parse::<f64>().ok()? + time(22)?,
            resident: kilobytes("VmRSS:")?,
            virtual_size: kilobytes("VmSize:")?,
            open_files: 0,
            max_files: soft_limit,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_read_whatever_the_process_is_called() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194304 1 0 0 0 250 50 0 0 20 0 4 0 1000 2 3 4";
        let status = "Name:\ta) b\nVmSize:\t   2048 kB\nVmRSS:\t    100 kB\n";
        let limits =
            "Limit Soft Hard Units\nMax open files            1024                 524288               files\n";
        let usage = Usage::parse(stat, status, limits, "cpu 1 2\nbtime 1700000000\n", 100.0).expect("all there");
        assert_eq!(
            usage,
            Usage {
                cpu: 3.0,
                started: 1_700_000_010.0,
                resident: 102_400,
                virtual_size: 2_097_152,
                open_files: 0,
                max_files: 1024
            }
        );
        assert_eq!(Usage::parse("7 (a", status, limits, "", 100.0), None);
    }

    #[test]
    fn this_process_uses_something() {
        let usage = Usage::now().expect("there is a /proc");
        assert!(usage.resident > 100_000 && usage.resident < usage.virtual_size, "{usage:?}");
        assert!(usage.open_files >= 3 && usage.open_files <= usage.max_files, "{usage:?}");
        assert!(usage.started > 1_600_000_000.0, "{usage:?}");
    }
}
