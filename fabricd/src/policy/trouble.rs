//! What is wrong with policies, as it is told: on the objects, and in the status.

use std::collections::BTreeMap;

use fabric_core::policy::State;
use fabric_core::policy::model::Problem;
use fabric_core::policy::sets::problems;
use fabric_core::services::ObjectName;

use super::watch::Sources;
use crate::kubernetes::event_recorder::{Kind, ObjectEvent, Reason};

/// What of policies can't be understood, and of how many.
pub(super) fn refused(state: &State) -> (usize, Vec<ObjectEvent>) {
    let kinds: [(Kind, BTreeMap<ObjectName, Vec<Problem>>); 2] = [
        (Kind::NetworkPolicy, problems(&state.policies)),
        (Kind::ClusterNetworkPolicy, problems(&state.cluster_policies)),
    ];
    let count = kinds.iter().map(|(_, all)| all.len()).sum();
    let mut events = vec![];
    for (kind, all) in kinds {
        for (object, problems) in all {
            let event = |problem: Problem| {
                let (object, message) = (object.clone(), problem.to_string());
                ObjectEvent { kind, object, reason: Reason::Refused, message }
            };
            events.extend(problems.into_iter().map(event));
        }
    }
    (count, events)
}

/// Why ClusterNetworkPolicies may be others than are applied.
pub(super) fn cluster_trouble(sources: &Sources) -> Option<String> {
    let trouble = sources.connection.borrow().cluster_trouble().cloned()?;
    let is_known = sources.cluster_policies.borrow().is_some();
    Some(if is_known {
        format!("ClusterNetworkPolicies are as they were known last: {trouble}")
    } else {
        format!("ClusterNetworkPolicies are not known, so none is applied: {trouble}")
    })
}
