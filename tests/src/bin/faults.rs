//! `faults`: tries every fault of [`fabric_tests::faults`], as often as asked, and prints a table.

use std::io::{Write as _, stdout};
use std::process::ExitCode;

use clap::Parser;
use fabric_tests::faults::{self, Fault, Outcome};

/// Try the faults that must cost nothing
#[derive(Parser)]
struct Cli {
    /// Numbers of the faults; all otherwise
    numbers: Vec<u8>,
    /// Trials of each, every one with another seed
    #[arg(long, env = "SEEDS", default_value_t = 1)]
    seeds: u64,
    /// The first seed
    #[arg(long, default_value_t = 1)]
    first: u64,
    /// How many times the limits a busy machine may take
    #[arg(long, env = "SLACK", default_value_t = 1)]
    slack: u32,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut rows = faults::all();
    rows.retain(|fault| cli.numbers.is_empty() || cli.numbers.contains(&fault.number));
    let widest = |text: fn(&Fault) -> &str| rows.iter().map(|fault| text(fault).len()).max().unwrap_or_default();
    let (what, holds) = (widest(|fault| fault.what), widest(|fault| fault.holds));
    println!("  #  {:<what$}  {:<holds$}  held, by seeds from {} on", "fault", "what holds", cli.first);
    let mut all_held = true;
    for fault in &rows {
        print!("{:>3}  {:<what$}  {:<holds$}  ", fault.number, fault.what, fault.holds);
        stdout().flush().ok();
        let outcomes: Vec<_> = (cli.first..cli.first + cli.seeds).map(|seed| tried(fault, seed, cli.slack)).collect();
        let held = outcomes.iter().filter(|outcome| outcome.broken.is_none()).count();
        let longest = outcomes.iter().map(|outcome| outcome.took).max().unwrap_or_default();
        println!(" {held}/{} ({:.0} s at most)", outcomes.len(), longest.as_secs_f64());
        for error in outcomes.iter().filter_map(|outcome| outcome.broken.as_ref()) {
            println!("     {error:#}");
            all_held = false;
        }
    }
    if all_held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// A trial and its mark in the row, which so tells how far it is.
fn tried(fault: &Fault, seed: u64, slack: u32) -> Outcome {
    let outcome = fault.try_with(seed, slack);
    print!("{}", if outcome.broken.is_none() { '.' } else { 'x' });
    // A mark that isn't seen yet is no reason to end.
    stdout().flush().ok();
    outcome
}
