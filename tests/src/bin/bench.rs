//! `bench`: measures fabricd beside what it is compared with. See [`fabric_tests::bench`].

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use fabric_tests::bench::{
    Report, change, changes, cni, cold_start, datapath, filter, firewalls, policy, rest, services,
};
use fabric_tests::lab::binaries;

/// Measure fabricd beside iproute2, a VXLAN made by hand, and flanneld
#[derive(Parser)]
struct Cli {
    /// What to measure; everything otherwise
    #[arg(value_enum)]
    parts: Vec<Part>,
    /// Numbers of peers for cold starts
    #[arg(long, value_delimiter = ',', default_value = "100,1000,5000,10000")]
    peers: Vec<u32>,
    /// Rounds of cold starts for each number of peers, and of what is done many times
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Peers beside which single changes are measured
    #[arg(long, default_value_t = 5000)]
    crowd: u32,
    /// Turns that each network between pods has: an even number is fairest
    #[arg(long, default_value_t = 4)]
    turns: usize,
    /// How long a turn is, in milliseconds
    #[arg(long, default_value_t = 1000)]
    slice: u64,
    /// How long rest is watched, in seconds
    #[arg(long, default_value_t = 60)]
    rest: u64,
    /// Services of `services`
    #[arg(long, default_value_t = 10_000)]
    services: u16,
    /// Endpoints of each of them
    #[arg(long, default_value_t = 15)]
    endpoints: u8,
    /// Pods that come and go for each way to attach one
    #[arg(long, default_value_t = 200)]
    pods: usize,
    /// A flanneld to be measured in the same run
    #[arg(long, env = "FLANNELD")]
    flanneld: Option<PathBuf>,
    /// A fabricd of another build, beside which single changes are measured
    #[arg(long, env = "BEFORE")]
    before: Option<PathBuf>,
    /// Where the figures go, as JSON
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    ColdStart,
    Change,
    Changes,
    Rest,
    Datapath,
    Filter,
    Firewalls,
    Services,
    Policy,
    Cni,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let mut report = Report { conditions: conditions(), ..Report::default() };
    for (name, value) in &report.conditions {
        println!("{name}: {value}");
    }
    let wanted = |part| cli.parts.is_empty() || cli.parts.contains(&part);
    if wanted(Part::ColdStart) {
        cold_start::run(&mut report, &cli.peers, cli.rounds, cli.flanneld.as_deref())?;
    }
    if wanted(Part::Change) {
        let before = cli.before.as_deref();
        change::run(&mut report, change::Options { peers: cli.crowd, changes: 200, rounds: cli.rounds, before })?;
    }
    if wanted(Part::Changes) {
        let options = changes::Options { peers: cli.crowd, singles: 300, burst: 1000, rounds: cli.rounds };
        changes::run(&mut report, options)?;
    }
    if wanted(Part::Rest) {
        rest::run(&mut report, cli.crowd, Duration::from_secs(cli.rest))?;
    }
    let slice = Duration::from_millis(cli.slice);
    let traffic = datapath::Options { rounds: cli.turns, slice, crowd: cli.crowd };
    if wanted(Part::Datapath) {
        datapath::run(&mut report, traffic)?;
    }
    if wanted(Part::Filter) {
        filter::run(&mut report, traffic)?;
    }
    if wanted(Part::Firewalls) {
        firewalls::run(&mut report, firewalls::Options { chains: 10_000, seconds: 20 })?;
    }
    if wanted(Part::Services) {
        let Cli { services, endpoints, .. } = *cli;
        services::run(&mut report, services::Options { services, endpoints, changes: 200.min(services) })?;
    }
    if wanted(Part::Policy) {
        let options = policy::Options { pods: 150_000, policies: 1000, local: 30, changes: 20 };
        policy::run(&mut report, options)?;
    }
    if wanted(Part::Cni) {
        cni::run(&mut report, &binaries::folder()?, cli.pods)?;
    }
    report.save(&cli.json)?;
    println!("\nall figures: {0}, as tables: {1}", cli.json.display(), cli.json.with_extension("md").display());
    Ok(())
}

fn conditions() -> Vec<(String, String)> {
    let file = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let build = if cfg!(debug_assertions) { "debug" } else { "release" };
    [
        ("kernel", file("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("CPUs", cpus.to_string()),
        ("load before", file("/proc/loadavg").split(' ').next().unwrap_or_default().to_owned()),
        ("build", build.to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}
