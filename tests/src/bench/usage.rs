//! What a process used, as the kernel counts it.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::lab::process::Process;

/// CPU time of all its threads, those that have ended included.
///
/// # Errors
/// The process has ended.
pub fn cpu(process: &Process) -> Result<Duration> {
    let clock = ClockId::pid_cpu_clock_id(Pid::from_raw(process.pid))?;
    Ok(clock_gettime(clock)?.into())
}

/// Memory in MiB: resident now, and at its most.
///
/// # Errors
/// The process has ended.
pub fn resident(process: &Process) -> Result<(f64, f64)> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid))?;
    let of = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
        let kib: u32 = line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse()?;
        anyhow::Ok(f64::from(kib) / 1024.0)
    };
    Ok((of("VmRSS")?, of("VmHWM")?))
}

/// Time that all CPUs were busy, from `/proc/stat`.
///
/// # Errors
/// There is no such file.
pub fn busy() -> Result<Duration> {
    let stat = fs::read_to_string("/proc/stat")?;
    let all: Vec<u64> =
        stat.lines().next().unwrap_or_default().split_whitespace().skip(1).map_while(|n| n.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let idle = all.get(3).copied().unwrap_or(0) + all.get(4).copied().unwrap_or(0);
    Ok(Duration::from_millis((all.iter().take(8).sum::<u64>() - idle) * 10))
}
