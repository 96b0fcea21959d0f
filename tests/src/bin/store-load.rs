//! The store's side of many nodes, in one process, against one real etcd: what joins at once cost, and what an hour of
//! rest does. Prints the table of docs/performance.md.

use std::fs;
use std::io::{Read as _, Write as _, stderr};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::Parser;
use fabric_core::network::NetworkConfig;
use fabric_tests::etcd::EtcdServer;
use fabric_tests::keepers::{Keepers, OneKeeper};
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::revisions::Witness;
use fabricd::store::etcd::Options;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep, sleep_until};
use tracing_subscriber::EnvFilter;

/// How often it is told how far the joins are.
const PROGRESS: Duration = Duration::from_secs(10);

const CONFIG: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

/// Many nodes' leases on one etcd.
#[derive(Debug, Parser)]
struct Args {
    /// How many nodes join at once
    #[arg(long, default_value_t = 5000)]
    nodes: u32,
    /// How long the rest is watched, in seconds
    #[arg(long, default_value_t = 60)]
    rest: u64,
    /// Time to live of the leases, in seconds
    #[arg(long, default_value_t = 86_400)]
    ttl: u64,
    /// How long all joins may take, in seconds
    #[arg(long, default_value_t = 1800)]
    limit: u64,
    /// How long a request may take, in seconds; that long if not given. A daemon takes 3
    #[arg(long)]
    request_timeout: Option<u64>,
}

/// What etcd has used since its start.
#[derive(Clone, Copy)]
struct Usage {
    cpu_seconds: f64,
    memory_mib: f64,
    requests: f64,
    revision_writes: f64,
}

#[tokio::main]
async fn main() -> Result<()> {
    let args = Args::parse();
    // `RUST_LOG=info` shows what the nodes say.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(stderr).init();
    let etcd = EtcdServer::start().await?;
    etcd.ctl(&["put", &format!("{}/config", Options::DEFAULT_PREFIX), CONFIG]).await;
    let witness = Witness::start(Spaces::own(), etcd.endpoint(), Options::DEFAULT_PREFIX);

    let limit = Duration::from_secs(args.limit);
    let request_timeout = args.request_timeout.map_or(limit, Duration::from_secs);
    let keepers = Keepers {
        // One machine does the work of all of them. A request that is given up because of that is sent again, and soon
        // the work is nothing else.
        etcd: Options { request_timeout, ..Options::new(vec![etcd.endpoint().to_owned()]) },
        network: NetworkConfig::decode(CONFIG.as_bytes())?,
        ttl: Duration::from_secs(args.ttl),
    };
    let (before, began) = (Usage::of(&etcd)?, Instant::now());
    let mut joins = JoinSet::new();
    for n in 0..args.nodes {
        let mut keeper = keepers.start(n);
        joins.spawn(async move {
            keeper.holds().await;
            (began.elapsed(), keeper)
        });
    }
    // In the order of their joining.
    let (mut times, mut keepers) = (vec![], vec![]);
    let mut progress = interval(PROGRESS);
    while times.len() < usize::try_from(args.nodes)? {
        tokio::select! {
            Some(joined) = joins.join_next() => {
                let (time, keeper): (Duration, OneKeeper) = joined?;
                times.push(time);
                keepers.push(keeper);
            }
            _ = progress.tick() => eprintln!("{:4} s: {} of {} hold a lease", began.elapsed().as_secs(), times.len(), args.nodes),
            () = sleep_until(began + limit) => bail!("{} of {} nodes hold a lease after {limit:?}", times.len(), args.nodes),
        }
    }
    let after_joins = Usage::of(&etcd)?;

    // What the joins have left in queues is not of the rest.
    sleep(Duration::from_secs(10)).await;
    let rest_began = Usage::of(&etcd)?;
    sleep(Duration::from_secs(args.rest)).await;
    let rest_ended = Usage::of(&etcd)?;
    let owners = witness.stop()?;

    let hours = f64::from(u32::try_from(args.rest)?) / 3600.0;
    let per_node_hour = |now: f64, then: f64| (now - then) / hours / f64::from(args.nodes);
    println!("| {} nodes, leases of {} s | all joins at once | rest, per node-hour |", args.nodes, args.ttl);
    println!("|---|---|---|");
    println!(
        "| time: median, last | {:.1} s, {:.1} s | |",
        times[times.len() / 2].as_secs_f64(),
        times.last().map_or(0.0, Duration::as_secs_f64)
    );
    println!(
        "| etcd's CPU | {:.1} s | {:.3} s |",
        after_joins.cpu_seconds - before.cpu_seconds,
        per_node_hour(rest_ended.cpu_seconds, rest_began.cpu_seconds)
    );
    println!("| etcd's memory | {:.0} MiB | {:.0} MiB in all |", after_joins.memory_mib, rest_ended.memory_mib);
    println!("| memory of the nodes, all in one process | {:.0} MiB | |", resident_mib("self")?);
    println!(
        "| requests | {:.1} a node | {:.2} |",
        (after_joins.requests - before.requests) / f64::from(args.nodes),
        per_node_hour(rest_ended.requests, rest_began.requests)
    );
    println!(
        "| writes | {:.2} a node | {:.2} |",
        (after_joins.revision_writes - before.revision_writes) / f64::from(args.nodes),
        per_node_hour(rest_ended.revision_writes, rest_began.revision_writes)
    );
    println!("\nI1 held at every revision: {} changes of leases were followed.", owners.changes);
    Ok(())
}

impl Usage {
    fn of(etcd: &EtcdServer) -> Result<Self> {
        let pid = etcd.pid().context("etcd has ended")?.to_string();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let ticks: Vec<f64> = stat.rsplit(')').next().unwrap_or_default().split(' ').flat_map(str::parse).collect();
        // Fields 14 and 15 of proc(5); the state letter is no number.
        let cpu_seconds = ticks.iter().skip(10).take(2).sum::<f64>() / 100.0;
        let metrics = metrics(etcd.endpoint())?;
        let sum = |name: &str| {
            let lines = metrics.lines().filter(|line| line.starts_with(name));
            lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
        };
        Ok(Self {
            cpu_seconds,
            memory_mib: resident_mib(&pid)?,
            requests: sum("grpc_server_started_total"),
            revision_writes: sum("etcd_debugging_mvcc_put_total"),
        })
    }
}

fn resident_mib(pid: &str) -> Result<f64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
    Ok(resident.unwrap_or(0.0) / 1024.0)
}

fn metrics(endpoint: &str) -> Result<String> {
    let address = endpoint.trim_start_matches("http://");
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
