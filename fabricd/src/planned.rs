//! [`Planned`]: what was last found to be desired, and from what. At thousands of peers to find that anew costs far more
//! than to see that nothing has changed; and after every write the loop comes back to see what became of it.

use std::sync::Arc;

use fabric_core::leases::LeaseSet;
use fabric_core::model::PerFamily;
use fabric_core::network::NetworkConfig;
use fabric_core::plan::{Desired, Facts, Inputs, Vtep, desired};
use fabric_core::record::LeaseKey;
use fabric_core::state::Foreign;

/// What is desired, as long as what decides it stays the same.
#[derive(Clone, Debug, Default)]
pub struct Planned(Option<(Given, Desired)>);

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
        let same = self.0.as_ref().is_some_and(|(given, _)| given.decides(inputs, leases));
        if !same {
            self.0 = None;
        }
        let (_, desired) = self.0.get_or_insert_with(|| (Given::of(inputs, leases), desired(inputs)));
        desired
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

    fn decides(&self, inputs: &Inputs<'_>, leases: &Arc<LeaseSet>) -> bool {
        Arc::ptr_eq(&self.leases, leases)
            && self.network == *inputs.network
            && self.own == *inputs.own
            && self.vteps == *inputs.vteps
            && self.facts == *inputs.facts
            && self.foreign == *inputs.foreign
    }
}
