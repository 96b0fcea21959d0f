//! `fabricctl`: shows what the daemon of this node sees, and sets up network and leases in the datastore.

mod all;
mod bundle;
mod capture;
mod daemon;
mod doctor;
mod events;
mod explain;
mod lease;
mod log_level;
mod manual;
mod mesh;
mod network;
mod network_config;
mod network_set;
mod output;
mod peers;
mod plan;
mod policy;
mod service;
mod settings;
mod status;
mod table;
mod test;
mod top;

use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use clap_complete::Shell;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::{DiagnoseRequest, GetMeshRequest, GetStatusRequest};
use fabricd::config::{Config, DEFAULT_SOCKET, parse_duration};
use fabricd::errors::chain;

use crate::all::AllArgs;
use crate::manual::Program;
use crate::output::OutputArg;

/// Show and set up the fabricd overlay network
#[derive(Debug, Parser)]
#[command(name = "fabricctl", version, after_help = EXIT_CODES)]
struct Cli {
    /// Unix socket of the daemon [default: as in the daemon's settings file, else /run/fabric/fabricd.sock]
    #[arg(long, global = true, env = "FABRICD_SOCKET", value_name = "FILE")]
    socket: Option<PathBuf>,

    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 all is well, 1 error, 2 wrong usage, 3 the node is not ready, 4 something else needs attention: the \
datastore is not connected, a peer is not programmed or not reachable, a check or test failed, a warning, a pending change.";

/// Exit code of a node that is not ready.
const NOT_READY: u8 = 3;
/// Exit code when something else is not well.
const NOT_ALL_WELL: u8 = 4;

#[derive(Debug, Subcommand)]
enum Command {
    /// State of this node and its peers
    Status {
        #[command(flatten)]
        form: OutputArg,
        /// Wait until the node is ready, at most so long (5m if no time is given)
        #[arg(
            long,
            value_name = "TIME",
            num_args = 0..=1,
            default_missing_value = "5m",
            value_parser = parse_duration,
            conflicts_with_all = ["all", "nodes"]
        )]
        wait: Option<Duration>,
        #[command(flatten)]
        whom: AllArgs,
    },
    /// The other nodes: whether they are programmed, and reachable
    Peers {
        #[command(flatten)]
        form: OutputArg,
        /// Watch for changes
        #[arg(short, long)]
        watch: bool,
    },
    /// The leases that the daemon knows; see also: fabricctl lease list, which asks the datastore
    Leases {
        #[command(flatten)]
        form: OutputArg,
        /// Watch for changes
        #[arg(short, long)]
        watch: bool,
    },
    /// Reachability of the peers through the tunnel: round trip, loss, MTU, causes and fixes
    Mesh {
        /// Only these peers
        #[arg(value_name = "NODE", conflicts_with_all = ["all", "nodes"])]
        peers: Vec<String>,
        /// Probe them now, and wait for the verdict
        #[arg(long, conflicts_with_all = ["all", "nodes"])]
        probe: bool,
        #[command(flatten)]
        form: OutputArg,
        #[command(flatten)]
        whom: AllArgs,
    },
    /// Check this node, and print a fix for each problem; works without a daemon, too
    Doctor {
        #[command(flatten)]
        form: OutputArg,
        #[command(flatten)]
        what: doctor::DoctorArgs,
        #[command(flatten)]
        whom: AllArgs,
    },
    /// Path of a packet from a pod to an address, and where it is lost; sends one, too
    Explain {
        /// Source address
        source: IpAddr,
        /// Destination address
        target: IpAddr,
        /// Destination port: whether network policies allow it, and an attempt to connect instead of a ping
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        port: Option<u16>,
        /// Protocol of the port
        #[arg(long, value_enum, default_value_t, requires = "port")]
        protocol: explain::Protocol,
        #[command(flatten)]
        form: OutputArg,
    },
    /// Services of Kubernetes as fabricd translates them here: frontends, endpoints and why not, what the kernel holds
    Service {
        /// In full: namespace/name, a name in any namespace, or an address of one
        name: Option<String>,
        #[command(flatten)]
        form: OutputArg,
    },
    /// Network policies: which pods of this node they isolate, and what each rule has counted
    Policy {
        #[command(flatten)]
        form: OutputArg,
    },
    /// What network policies drop from now on, with names of pods and policies: of each cause up to 100 packets a second
    Drops {
        #[command(flatten)]
        form: OutputArg,
        /// Follow, as it does anyway
        #[arg(short, long)]
        follow: bool,
    },
    /// Packets of a pod of this node, or to and from another node, on whichever path they go: by tcpdump
    Capture(capture::CaptureArgs),
    /// Test connectivity with real traffic: gateway, other nodes, Services, DNS, outside
    Test(Box<test::TestArgs>),
    /// Node, mesh and events, live until Ctrl-C
    Top {
        /// Seconds between updates
        #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
        every: u64,
        /// Show it once; json and yaml imply that
        #[arg(long)]
        once: bool,
        #[command(flatten)]
        form: OutputArg,
    },
    /// Events on this node since the daemon started
    Events {
        #[command(flatten)]
        form: OutputArg,
        /// Follow new events
        #[arg(short, long, visible_alias = "watch", visible_short_alias = 'w')]
        follow: bool,
    },
    /// Desired and actual state of the kernel, the difference, and the last changes
    Plan {
        #[command(flatten)]
        form: OutputArg,
        /// List all entries
        #[arg(short, long)]
        entries: bool,
    },
    /// The network config that all nodes share
    #[command(subcommand)]
    Network(Box<network::Command>),
    /// The nodes' leases
    #[command(subcommand)]
    Lease(Box<lease::Command>),
    /// Show the daemon's log level, or change it until the daemon ends
    LogLevel {
        /// As in info, debug or warn,fabricd::kernel=debug
        level: Option<String>,
        #[command(flatten)]
        form: OutputArg,
    },
    /// Print the completion for a shell
    Completion {
        /// Which shell
        shell: Shell,
        /// Of which program
        #[arg(long, value_name = "PROGRAM", default_value = "fabricctl")]
        program: Program,
    },
    /// Write the manual pages of fabricctl and fabricd into a folder
    #[command(hide = true)]
    Manual {
        /// Gets man1 and man8
        folder: PathBuf,
    },
    /// What the pods of a test run
    #[command(subcommand, hide = true)]
    Probe(test::probe::Command),
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = run(cli.command, &cli.socket.unwrap_or_else(socket)).await;
    match outcome {
        Ok(Answer { text, code }) => {
            print(&text);
            code
        }
        Err(error) => {
            // Nobody may read that either: `fabricctl doctor 2>&1 | head`.
            let _ = writeln!(std::io::stderr(), "fabricctl: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Where the daemon's settings say that its socket is. What is wrong with them is told where they are needed.
fn socket() -> PathBuf {
    Config::of_host(None).map_or_else(|_| DEFAULT_SOCKET.into(), |(config, _)| config.socket)
}

async fn run(command: Command, socket: &Path) -> anyhow::Result<Answer> {
    match command {
        Command::Status { form, whom, .. } if whom.asked() => {
            all::ask(socket, form.output, whom, Question::Status(GetStatusRequest {})).await
        }
        Command::Mesh { form, whom, .. } if whom.asked() => {
            all::ask(socket, form.output, whom, Question::Mesh(GetMeshRequest {})).await
        }
        Command::Doctor { form, whom, .. } if whom.asked() => {
            all::ask(socket, form.output, whom, Question::Diagnose(DiagnoseRequest {})).await
        }
        Command::Status { form, wait, .. } => status::show(socket, form.output, wait).await,
        Command::Peers { form, watch: false } => peers::peers(socket, form.output).await,
        Command::Peers { form, watch: true } => peers::watch_peers(socket, form.output).await,
        Command::Leases { form, watch: false } => peers::leases(socket, form.output).await,
        Command::Leases { form, watch: true } => peers::watch_leases(socket, form.output).await,
        Command::Mesh { form, peers, probe, .. } => mesh::show(socket, form.output, peers, probe).await,
        Command::Doctor { form, what, .. } => doctor::show(socket, form.output, &what).await,
        Command::Explain { source, target, port, protocol, form } => {
            explain::show(socket, form.output, (source, target), port.map(|port| (protocol, port))).await
        }
        Command::Policy { form } => policy::show(socket, form.output).await,
        Command::Drops { form, .. } => policy::drops(socket, form.output).await,
        Command::Capture(args) => capture::run(socket, args).await,
        Command::Service { name, form } => service::show(socket, form.output, name).await,
        Command::Top { once, form, .. } if once || form.output.is_data() => top::once(socket, form.output).await,
        Command::Top { every, .. } => top::run(socket, Duration::from_secs(every)).await,
        Command::Events { form, follow } => events::show(socket, form.output, follow).await,
        Command::Plan { form, entries } => plan::show(socket, form.output, entries).await,
        Command::Network(command) => network::run(*command, socket).await,
        Command::Lease(command) => lease::run(*command, socket).await,
        Command::LogLevel { level, form } => log_level::run(socket, form.output, level).await,
        Command::Completion { shell, program } => Ok(manual::completion(program, shell)),
        Command::Manual { folder } => manual::write(&folder),
        Command::Test(args) => test::run(*args, socket).await,
        Command::Probe(command) => test::probe::run(command),
    }
}

/// Prints, and says whether anybody reads on: `fabricctl status | head` is no error.
fn print(text: &str) -> bool {
    let mut out = std::io::stdout();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok()
}

/// What a command has to say.
struct Answer {
    text: String,
    code: ExitCode,
}

impl Answer {
    fn fine(text: String) -> Self {
        Self { text, code: ExitCode::SUCCESS }
    }

    /// With `code` unless all is well.
    fn well_if(well: bool, text: String, code: u8) -> Self {
        Self { text, code: if well { ExitCode::SUCCESS } else { ExitCode::from(code) } }
    }
}
