//! `fabricctl`: shows what the daemon of this node sees, and sets up network and leases in the store.

mod all;
mod daemon;
mod doctor;
mod events;
mod explain;
mod lease;
mod log_level;
mod mesh;
mod network;
mod output;
mod peers;
mod plan;
mod status;
mod table;
mod top;

use std::io::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use fabric_proto::v1::ask_nodes_request::Question;
use fabric_proto::v1::{DiagnoseRequest, GetMeshRequest, GetStatusRequest};
use fabricd::config::DEFAULT_SOCKET;

use crate::all::AllArgs;
use crate::output::OutputArg;

/// Shows and sets up the fabricd overlay network.
#[derive(Debug, Parser)]
#[command(name = "fabricctl", version, after_help = EXIT_CODES)]
struct Cli {
    /// Unix socket of the daemon
    #[arg(long, global = true, env = "FABRICD_SOCKET", value_name = "FILE", default_value = DEFAULT_SOCKET)]
    socket: PathBuf,

    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "\
Exit codes: 0 fine, 1 an error, 2 wrong usage, 3 the node is not ready, 4 something else is not well.";

/// Exit code of a node that is not ready.
const NOT_READY: u8 = 3;
/// Exit code when something else is not well.
const NOT_ALL_WELL: u8 = 4;

#[derive(Debug, Subcommand)]
enum Command {
    /// This node and its peers, as the daemon sees them
    Status {
        #[command(flatten)]
        form: OutputArg,
        #[command(flatten)]
        whom: AllArgs,
    },
    /// The other nodes, and whether they are programmed
    Peers {
        #[command(flatten)]
        form: OutputArg,
        /// Go on with what changes
        #[arg(short, long)]
        watch: bool,
    },
    /// The leases that the daemon knows; see also: fabricctl lease list, which asks the store
    Leases {
        #[command(flatten)]
        form: OutputArg,
        /// Go on with what changes
        #[arg(short, long)]
        watch: bool,
    },
    /// How well the peers are reached through the tunnel, and what to do about those that aren't
    Mesh {
        #[command(flatten)]
        form: OutputArg,
        #[command(flatten)]
        whom: AllArgs,
    },
    /// Look for what is wrong on this node, each with its fix
    Doctor {
        #[command(flatten)]
        form: OutputArg,
        /// Only what is wrong
        #[arg(short, long)]
        quiet: bool,
        #[command(flatten)]
        whom: AllArgs,
        /// Write all that helps others to look for it into a tar archive, without secrets
        #[arg(long, value_name = "FILE")]
        bundle: Option<PathBuf>,
    },
    /// The way of a packet from one pod to another, and where it is lost
    Explain {
        /// Address that packets come from
        source: IpAddr,
        /// Address that packets go to
        target: IpAddr,
        #[command(flatten)]
        form: OutputArg,
    },
    /// Node, mesh and events, live; Ctrl-C ends it
    Top {
        /// Seconds between two looks
        #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
        every: u64,
    },
    /// What happened on this node since the daemon began
    Events {
        #[command(flatten)]
        form: OutputArg,
        /// Go on with what happens
        #[arg(short, long)]
        follow: bool,
    },
    /// What would be written to the kernel now, and what was written last
    Plan {
        #[command(flatten)]
        form: OutputArg,
        /// All entries too
        #[arg(short, long)]
        entries: bool,
    },
    /// The network config that all nodes share
    #[command(subcommand)]
    Network(Box<network::Command>),
    /// The nodes' leases
    #[command(subcommand)]
    Lease(Box<lease::Command>),
    /// Show what the daemon logs, or change it until the daemon ends
    LogLevel {
        /// As in info, debug or warn,fabricd::kernel=debug
        level: Option<String>,
    },
    /// Print the completion for a shell
    Completion {
        /// Which shell
        shell: Shell,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = run(cli.command, &cli.socket).await;
    match outcome {
        Ok(Answer { text, code }) => {
            print(&text);
            code
        }
        Err(error) => {
            eprintln!("fabricctl: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(command: Command, socket: &Path) -> anyhow::Result<Answer> {
    match command {
        Command::Status { form, whom } if whom.asked() => {
            all::ask(socket, form.output, whom, Question::Status(GetStatusRequest {})).await
        }
        Command::Mesh { form, whom } if whom.asked() => {
            all::ask(socket, form.output, whom, Question::Mesh(GetMeshRequest {})).await
        }
        Command::Doctor { form, whom, .. } if whom.asked() => {
            all::ask(socket, form.output, whom, Question::Diagnose(DiagnoseRequest {})).await
        }
        Command::Status { form, .. } => status::show(socket, form.output).await,
        Command::Peers { form, watch: false } => peers::peers(socket, form.output).await,
        Command::Peers { form, watch: true } => peers::watch_peers(socket, form.output).await,
        Command::Leases { form, watch: false } => peers::leases(socket, form.output).await,
        Command::Leases { form, watch: true } => peers::watch_leases(socket, form.output).await,
        Command::Mesh { form, .. } => mesh::show(socket, form.output).await,
        Command::Doctor { form, quiet, bundle, .. } => {
            doctor::show(socket, form.output, quiet, bundle.as_deref()).await
        }
        Command::Explain { source, target, form } => explain::show(socket, form.output, source, target).await,
        Command::Top { every } => top::run(socket, Duration::from_secs(every)).await,
        Command::Events { form, follow } => events::show(socket, form.output, follow).await,
        Command::Plan { form, entries } => plan::show(socket, form.output, entries).await,
        Command::Network(command) => network::run(*command, socket).await,
        Command::Lease(command) => lease::run(*command, socket).await,
        Command::LogLevel { level } => log_level::run(socket, level).await,
        Command::Completion { shell } => Ok(completion(shell)),
    }
}

fn completion(shell: Shell) -> Answer {
    let mut script = vec![];
    clap_complete::generate(shell, &mut Cli::command(), "fabricctl", &mut script);
    Answer::fine(String::from_utf8_lossy(&script).into_owned())
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
