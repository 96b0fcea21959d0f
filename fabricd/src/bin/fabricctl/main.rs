//! `fabricctl`: shows what the daemon of this node sees, and sets up network and leases in the store.

mod daemon;
mod lease;
mod network;
mod status;
mod table;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use fabricd::config::DEFAULT_SOCKET;

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

const EXIT_CODES: &str = "Exit codes: 0 fine, 1 an error, 2 wrong usage, 3 the node is not ready.";

#[derive(Debug, Subcommand)]
enum Command {
    /// This node and its peers, as the daemon sees them
    Status {
        /// Form of the output
        #[arg(short, long, default_value = "table")]
        output: Output,
    },
    /// The network config that all nodes share
    #[command(subcommand)]
    Network(Box<network::Command>),
    /// The nodes' leases
    #[command(subcommand)]
    Lease(Box<lease::Command>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.command {
        Command::Status { output } => status::show(&cli.socket, output == Output::Json).await,
        Command::Network(command) => network::run(*command, &cli.socket).await,
        Command::Lease(command) => lease::run(*command, &cli.socket).await,
    };
    match outcome {
        Ok(Answer { text, code }) => {
            // Whoever reads may have seen enough: `fabricctl status | head` is no error.
            let _ = std::io::stdout().write_all(text.as_bytes());
            code
        }
        Err(error) => {
            eprintln!("fabricctl: {error:#}");
            ExitCode::FAILURE
        }
    }
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
}
