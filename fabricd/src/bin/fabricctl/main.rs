//! `fabricctl`: shows what the daemon of this node sees, and sets up network and leases in the store.

mod daemon;
mod events;
mod lease;
mod log_level;
mod network;
mod output;
mod peers;
mod plan;
mod status;
mod table;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;
use fabricd::config::DEFAULT_SOCKET;

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
        Command::Status { form } => status::show(socket, form.output).await,
        Command::Peers { form, watch: false } => peers::peers(socket, form.output).await,
        Command::Peers { form, watch: true } => peers::watch_peers(socket, form.output).await,
        Command::Leases { form, watch: false } => peers::leases(socket, form.output).await,
        Command::Leases { form, watch: true } => peers::watch_leases(socket, form.output).await,
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
