//! `machines`: a lab with nodes that have kernels of their own. See [`fabric_tests::machines`] for how it is made.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};
use fabric_tests::lab::{Families, Lab};
use fabric_tests::machines::preflight::Accelerator;
use fabric_tests::machines::{Kernel, Machines, Spec, System, record};

/// A cluster whose nodes are machines with kernels of Debian's, by QEMU
#[derive(Parser)]
#[command(name = "machines", disable_help_subcommand = true)]
struct Cli {
    /// Which lab; `lab --name NAME` shows the same one
    #[arg(long, global = true, default_value = "machines", value_name = "NAME")]
    name: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// List the kernels that there are
    Kernels,
    /// Check what machines need of this one, and fetch what they run, without starting any
    Check {
        /// All that are to be on at once
        #[arg(required = true)]
        machines: Vec<Spec>,
    },
    /// Bring a lab up, or add machines to one that is up, and leave it up
    Up {
        /// Kernel, then what differs: `6.1`, `newest,memory=512,nics=2,clock=+3600,hostname=other`; or `debian`, a bookworm
        /// with systemd, on which fabricd isn't installed yet
        #[arg(required = true)]
        machines: Vec<Spec>,
        /// Nodes beside them that are namespaces
        #[arg(long, default_value_t = 0)]
        nodes: u16,
        /// Don't start fabricd on the machines
        #[arg(long)]
        bare: bool,
    },
    /// Run a script of sh on a machine
    Exec {
        /// linux-6.1, say
        machine: String,
        /// The script
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        script: Vec<String>,
        /// How many seconds it may take
        #[arg(long, default_value_t = 600)]
        within: u64,
    },
    /// Show what a machine's kernel and first process have said
    Console {
        /// linux-6.1, say
        machine: String,
    },
    /// Pull a machine's plug
    Kill {
        /// linux-6.1, say
        machine: String,
    },
    /// Switch a machine on again
    Boot {
        /// linux-6.1, say
        machine: String,
    },
    /// Keep what the tests have noted of each kernel, and render it into docs/kernels.md
    Record,
    /// Show the machines
    Status,
    /// Take the lab down and remove its files
    Down,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("machines: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    match &cli.command {
        Command::Kernels => Kernel::all().iter().for_each(|kernel| println!("{}", kernel.name)),
        Command::Check { machines } => check(machines)?,
        Command::Up { machines, nodes, bare } => up(&cli.name, machines, *nodes, *bare)?,
        Command::Exec { machine, script, within } => {
            let machines = Machines::open(&cli.name)?;
            let answer = machines.vm(machine)?.exec_within(&script.join(" "), Duration::from_secs(*within))?;
            print!("{}", answer.stdout);
            eprint!("{}", answer.stderr);
            return Ok(ExitCode::from(u8::try_from(answer.code)?));
        }
        Command::Console { machine } => print!("{}", Machines::open(&cli.name)?.vm(machine)?.console()),
        Command::Kill { machine } => {
            Machines::open(&cli.name)?.vm(machine)?.power_off()?;
            println!("{machine} is off; `machines boot {machine}` switches it on again");
        }
        Command::Boot { machine } => {
            Machines::open(&cli.name)?.vm(machine)?.boot()?;
            println!("{machine} is up; fabricd is not started");
        }
        Command::Record => record::keep()?,
        Command::Status => status(&Machines::open(&cli.name)?)?,
        Command::Down => {
            Machines::open(&cli.name)?.lab.destroy()?;
            println!("lab {} is down", cli.name);
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn check(specs: &[Spec]) -> Result<()> {
    Machines::check(specs)?;
    for spec in specs.iter().take(1) {
        println!("{}", Accelerator::of_this_machine(&Kernel::named(&spec.kernel)?)?.in_words());
    }
    Ok(())
}

fn up(name: &str, specs: &[Spec], nodes: u16, bare: bool) -> Result<()> {
    check(specs)?;
    let mut machines = match Machines::open(name) {
        Ok(machines) if machines.lab.is_on() => machines,
        _ => {
            let builder = Lab::builder().name(name).nodes(nodes).families(Families::Dual).masquerade(true);
            Machines::start(builder.stays())?
        }
    };
    let added = machines.add(specs)?;
    if !bare {
        let with_programs = || added.iter().filter(|vm| vm.spec.system == System::Programs);
        with_programs().try_for_each(|vm| vm.start_fabricd(""))?;
        with_programs().try_for_each(|vm| vm.wait_ready())?;
    }
    status(&machines)
}

fn status(machines: &Machines) -> Result<()> {
    for vm in machines.vms() {
        let state = if vm.is_on() { "on" } else { "off" };
        let (release, spec) = (Kernel::named(&vm.spec.kernel)?.release()?, &vm.spec);
        println!("{:<14} {state:<4} {release:<28} {} MiB, {} NICs", vm.name, spec.memory, spec.nics);
    }
    Ok(())
}
