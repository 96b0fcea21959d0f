//! [`Planned`]: what was last found to be desired, and from what. At thousands of peers to find that anew costs far more
//! than to see what has changed: mostly nothing, since after every write the loop comes back to see what became of it, or
//! a lease or two, which [`Desired::follow`] takes over.

use std::sync::Arc;

use fabric_core::leases::{Lease, LeaseSet};
use fabric_core::model::PerFamily;
use fabric_core::network::NetworkConfig;
use fabric_core::plan::{Desired, Facts, Inputs, Vtep, desired};
use fabric_core::record::LeaseKey;
use fabric_core::state::Foreign;

/// What is desired, as long as what decides it stays the same.
#[derive(Clone, Debug, Default)]
pub struct Planned {
    known: Option<(Given, Arc<Desired>)>,
    cause: Cause,
}

/// What has changed in what is desired.
#[derive(Clone, Debug, Default)]
pub enum Cause {
    /// Nothing: what is to be written the kernel has lost.
    Unchanged,
    /// These leases, as they were and as they are.
    Leases(Vec<Arc<Lease>>),
    /// Anything.
    #[default]
    Anew,
}

/// What decides, but for what the kernel has of ours: that only gives nexthop objects their ids, and those stay.
#[derive(Clone, Debug)]
struct Given {
    network: NetworkConfig,
    own: LeaseKey,
    vteps: PerFamily<Vtep>,
    leases: Arc<LeaseSet>,
    facts: Facts,
    foreign: Foreign,
}

impl Planned {
    /// What is desired. `leases` are those of `inputs`.
    pub fn desired(&mut self, inputs: &Inputs<'_>, leases: &Arc<LeaseSet>) -> &Desired {
        self.cause = Cause::Anew;
        let mut before = None;
        let kept = self.known.take().and_then(|(mut given, mut known)| {
            let (went, came): (Vec<_>, Vec<_>) = leases.changes(&given.leases).unzip();
            let (went, came): (Vec<_>, Vec<_>) =
                (went.into_iter().flatten().collect(), came.into_iter().flatten().collect());
            let all: Vec<Arc<Lease>> = went.iter().chain(&came).map(|lease| Arc::clone(lease)).collect();
            let [went, came] = [went, came].map(|some| some.into_iter().map(Arc::as_ref).collect::<Vec<_>>());
            let followed =
                given.decides(inputs) && (all.is_empty() || Arc::make_mut(&mut known).follow(inputs, &went, &came));
            given.leases = Arc::clone(leases);
            if followed {
                self.cause = if all.is_empty() { Cause::Unchanged } else { Cause::Leases(all) };
                return Some((given, known));
            }
            before = Some(known);
            None
        });
        let known = kept.unwrap_or_else(|| {
            let anew = Arc::new(desired(inputs));
            // Most of what the host's links do changes nothing.
            if before.is_some_and(|before| before == anew) {
                self.cause = Cause::Unchanged;
            }
            (Given::of(inputs, leases), anew)
        });
        let (_, desired) = self.known.insert(known);
        desired
    }

    /// What has changed when what is desired was last asked for.
    #[must_use]
    pub fn cause(&self) -> &Cause {
        &self.cause
    }

    /// What was desired last. Copied by the next change for as long as somebody keeps it.
    pub fn last(&self) -> Option<Arc<Desired>> {
        self.known.as_ref().map(|(_, desired)| Arc::clone(desired))
    }
}

impl Given {
    fn of(inputs: &Inputs<'_>, leases: &Arc<LeaseSet>) -> Self {
        Self {
            network: *inputs.network,
            own: *inputs.own,
            vteps: *inputs.vteps,
            leases: Arc::clone(leases),
            facts: inputs.facts.clone(),
            foreign: inputs.foreign.clone(),
        }
    }

    /// Whether all but the leases is the same.
    fn decides(&self, inputs: &Inputs<'_>) -> bool {
        self.network == *inputs.network
            && self.own == *inputs.own
            && self.vteps == *inputs.vteps
            && self.facts == *inputs.facts
            && self.foreign == *inputs.foreign
    }
}
