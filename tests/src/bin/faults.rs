//! `faults`: tries every fault of [`fabric_tests::faults`], as often as asked, and prints a table.

use std::process::ExitCode;

use clap::Parser;
use fabric_tests::faults;

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
    let mut all_held = true;
    println!("{:>3}  {:<56} {:<62} held", "#", "fault", "what holds");
    for fault in faults::all().iter().filter(|f| cli.numbers.is_empty() || cli.numbers.contains(&f.number)) {
        let outcomes: Vec<_> = (cli.first..cli.first + cli.seeds).map(|seed| fault.try_with(seed, cli.slack)).collect();
        let held = outcomes.iter().filter(|outcome| outcome.broken.is_none()).count();
        let longest = outcomes.iter().map(|outcome| outcome.took).max().unwrap_or_default();
        println!(
            "{:>3}  {:<56} {:<62} {held}/{}  ({:.1} s)",
            fault.number,
            fault.what,
            fault.holds,
            outcomes.len(),
            longest.as_secs_f64()
        );
        for error in outcomes.iter().filter_map(|outcome| outcome.broken.as_ref()) {
            println!("     {error:#}");
            all_held = false;
        }
    }
    if all_held { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
