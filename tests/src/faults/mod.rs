//! Faults that must cost nothing: a table of them, each tried in a Lab of its own under traffic.
//!
//! A row is a [`Fault`]: what is done, what must hold, and a function that does it on a [`Pair`] and fails when it
//! doesn't hold. Where it leaves a choice (when, which, in what order) the trial's random numbers make it, so that
//! every seed is another trial and the same seed the same one. To add a row, write such a function in a module here and
//! list it in [`all`]; `make faults` and the tests run what is listed.

mod cni;
mod drift;
mod garbage;
mod kernel;
mod leased;
mod outage;
mod outages;
mod ownership;
mod pair;
mod processes;
pub mod rules;
mod runtime;
mod stampede;
mod underlay;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

pub use pair::Pair;

/// A row of the table.
#[derive(Clone, Copy)]
pub struct Fault {
    /// Its number in the list that the project began with.
    pub number: u8,
    /// What happens.
    pub what: &'static str,
    /// What must hold all the same.
    pub holds: &'static str,
    /// Makes it happen, and fails when that doesn't hold.
    pub trial: fn(&mut Trial) -> Result<()>,
}

/// One time that a fault is tried.
pub struct Trial {
    /// The name of its lab.
    pub name: String,
    /// What leaves a choice is chosen by this.
    pub random: fastrand::Rng,
    /// How many times the limits a busy machine may take. Four keep what an event must tell within an audit's time.
    pub slack: u32,
}

/// All rows.
#[must_use]
pub fn all() -> Vec<Fault> {
    let leases = [outages::ROWS, ownership::ROWS, garbage::ROWS].concat();
    [processes::ROWS, &leases, underlay::ROWS, drift::ROWS, kernel::ROWS, cni::ROWS, rules::ROWS].concat()
}

/// How a trial went.
pub struct Outcome {
    /// Which seed.
    pub seed: u64,
    /// How long it took.
    pub took: Duration,
    /// Why it does not hold.
    pub broken: Option<anyhow::Error>,
}

impl Fault {
    /// Tries it once, with limits so many times as long.
    #[must_use]
    pub fn try_with(&self, seed: u64, slack: u32) -> Outcome {
        let began = Instant::now();
        let mut trial =
            Trial { name: format!("fault-{}-{seed}", self.number), random: fastrand::Rng::with_seed(seed), slack };
        let broken = (self.trial)(&mut trial).with_context(|| format!("fault {}, seed {seed}", self.number)).err();
        Outcome { seed, took: began.elapsed(), broken }
    }
}
