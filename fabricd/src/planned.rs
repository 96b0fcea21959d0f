//! [`Planned`]: what was last found to be desired, and from what. At thousands of peers to find that anew costs far more
//! than to see what has changed: mostly nothing, since after every write the loop comes back to see what became of it, or
//! a lease or two, which [`Desired::follow`] takes over.

use std::sync::Arc;

use fabric_core::leases::LeaseSet;
use fabric_core::model::PerFamily;
use fabric_core::network::NetworkConfig;
use fabric_core::plan::{Desired, Facts, Inputs, Vtep, desired};
use fabric_core::record::LeaseKey;
use fabric_core::state::Foreign;

/// What is desired, as long as what decides it stays the same.
#[derive(Clone, Debug, Default)]
pub struct Planned(Option<(Given, Arc<Desired>)>);

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
        let kept = self.0.take().and_then(|(mut given, mut known)| {
            let followed = given.decides(inputs) && {
                let (went, came): (Vec<_>, Vec<_>) = leases.changes(&given.leases).unzip();
                let (went, came): (Vec<_>, Vec<_>) = (
                    went.into_iter().flatten().map(Arc::as_ref).collect(),
                    came.into_iter().flatten().map(Arc::as_ref).collect(),
                );
                (went.is_empty() && came.is_empty()) || Arc::make_mut(&mut known).follow(inputs, &went, &came)
            };
            given.leases = Arc::clone(leases);
            followed.then_some((given, known))
        });
        let (_, desired) =
            self.0.insert(kept.unwrap_or_else(|| (Given::of(inputs, leases), Arc::new(desired(inputs)))));
        desired
    }

    /// What was desired last. Copied by the next change for as long as somebody keeps it.
    pub fn last(&self) -> Option<Arc<Desired>> {
        self.0.as_ref().map(|(_, desired)| Arc::clone(desired))
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
