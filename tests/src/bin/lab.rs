//! `lab`: a cluster on this machine to look at and play with. See [`fabric_tests::lab`] for how it is made.

use std::ffi::OsString;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use fabric_tests::lab::exec::Exec;
use fabric_tests::lab::init::Init;
use fabric_tests::lab::page::{self, Page};
use fabric_tests::lab::tcx;
use fabric_tests::lab::tour::{self, Up};
use fabric_tests::lab::{Lab, Matrix};
use nix::sys::signal::{SigHandler, Signal, signal};

/// A cluster of nodes, etcd and pods in network namespaces of this machine
#[derive(Parser)]
#[command(name = "lab", disable_help_subcommand = true)]
struct Cli {
    /// Which lab; any number can be up side by side
    #[arg(long, global = true, default_value = "fabric", value_name = "NAME")]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Bring a lab up, show that it works, leave it up
    Up(Up),
    /// Take the lab down and remove its files
    Down {
        /// All labs that are up
        #[arg(long)]
        all: bool,
    },
    /// Show machines, processes and pods
    Status,
    /// Run a command on a machine or in a pod
    Exec {
        /// node-1, node-1/pod-a or underlay
        place: String,
        /// The command and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<String>,
    },
    /// Open a shell on a machine or in a pod
    Shell {
        /// node-1, node-1/pod-a or underlay
        place: String,
    },
    /// Add a node with pods
    AddNode {
        /// Pods on it
        #[arg(long, default_value_t = 2)]
        pods: u8,
    },
    /// Power a node off
    Kill {
        /// node-2, say
        node: String,
    },
    /// Switch a node on again
    Boot {
        /// node-2, say
        node: String,
        /// Pods on it
        #[arg(long, default_value_t = 2)]
        pods: u8,
    },
    /// Ping every pod from every pod
    Ping,
    /// Open the status page of a node to a browser on this machine, until Ctrl-C
    Page {
        /// Whose page
        #[arg(default_value = "node-1")]
        node: String,
        /// Port on 127.0.0.1
        #[arg(long, default_value_t = page::PORT)]
        port: u16,
    },
    /// Show the log of a process
    Logs {
        /// node-1 or underlay
        machine: String,
        /// Which: fabricd, etcd-1, …
        #[arg(default_value = "fabricd")]
        process: String,
    },
    /// Show the packets that pass a node's port on the underlay, until Ctrl-C
    Capture {
        /// Whose port
        #[arg(default_value = "node-1")]
        node: String,
    },
    /// Run a program that finds no tcx in its kernel
    #[command(hide = true)]
    WithoutTcx {
        /// The program and its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        command: Vec<OsString>,
    },
    /// The first process of a machine
    #[command(hide = true)]
    Init(Init),
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    if matches!(cli.command, Command::Status | Command::Ping | Command::Logs { .. } | Command::Capture { .. }) {
        end_with_our_reader()?;
    }
    match &cli.command {
        Command::Init(init) => init.run()?,
        Command::WithoutTcx { command } => tcx::run_without(command)?,
        Command::Up(up) => up.run(&cli.name)?,
        Command::Down { all: false } => down(&cli.name)?,
        Command::Down { all: true } => Lab::all()?.iter().try_for_each(|name| down(name))?,
        Command::Status => tour::print_status(&Lab::open(&cli.name)?)?,
        Command::Exec { place, command } => {
            let command: Vec<&str> = command.iter().map(String::as_str).collect();
            return interactive(command_at(&Lab::open(&cli.name)?, place, &command)?);
        }
        Command::Shell { place } => {
            return interactive(
                command_at(&Lab::open(&cli.name)?, place, &["bash"])?.env("PS1", &format!("{place}# ")),
            );
        }
        Command::AddNode { pods } => tour::add_node(&mut Lab::open(&cli.name)?, *pods)?,
        Command::Kill { node } => {
            Lab::open(&cli.name)?.node(node)?.power_off()?;
            println!("{node} is off; `lab boot {node}` switches it on again");
        }
        Command::Boot { node, pods } => tour::boot_node(&Lab::open(&cli.name)?, node, *pods)?,
        Command::Ping => {
            let matrix = Matrix::of(&Lab::open(&cli.name)?.pods()?)?;
            print!("{matrix}");
            if !matrix.is_perfect() {
                return Ok(ExitCode::FAILURE);
            }
        }
        Command::Page { node, port } => {
            let page = Page::open(Lab::open(&cli.name)?.node(node)?, *port)?;
            println!("http://{}/ is the page of {node}, until Ctrl-C", page.address()?);
            page.serve()?;
        }
        Command::Logs { machine, process } => {
            let lab = Lab::open(&cli.name)?;
            print!("{}", lab.machine(machine)?.log(process));
        }
        Command::Capture { node } => capture(&Lab::open(&cli.name)?, node)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets SIGPIPE end this process quietly, as in `lab status | head`.
#[expect(unsafe_code, reason = "signal handlers may do anything; this one is the kernel's")]
fn end_with_our_reader() -> Result<()> {
    // SAFETY: the default action runs no code of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    Ok(())
}

fn down(name: &str) -> Result<()> {
    Lab::open(name)?.destroy()?;
    println!("lab {name} is down");
    Ok(())
}

fn command_at(lab: &Lab, place: &str, argv: &[&str]) -> Result<Exec> {
    match place.split_once('/') {
        Some((node, pod)) => lab.node(node)?.pod(pod)?.command(argv),
        None => lab.machine(place)?.command(argv),
    }
}

fn interactive(command: Exec) -> Result<ExitCode> {
    let status = command.interactive()?;
    let Some(code) = status.code() else { bail!("ended by {status}") };
    Ok(ExitCode::from(u8::try_from(code).context("an exit code above 255")?))
}

fn capture(lab: &Lab, node: &str) -> Result<()> {
    let capture = lab.underlay().capture(node)?;
    let mut shown = 0;
    loop {
        let packets = capture.packets();
        packets[shown..].iter().for_each(|packet| println!("{packet}"));
        shown = packets.len();
        thread::sleep(Duration::from_millis(200));
    }
}
