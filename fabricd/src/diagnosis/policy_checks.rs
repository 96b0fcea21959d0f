//! The checks of `fabricctl doctor` of network policies.

use std::collections::BTreeSet;

use fabric_core::firewall::Firewall;

use super::Inspection;
use super::finding::{Finding, Problem};

/// Programs that enforce NetworkPolicies, by what their chains or their table are called.
const CONTROLLERS: [(&str, &str); 8] = [
    ("KUBE-ROUTER-", "kube-router"),
    ("KUBE-NWPLCY-", "kube-router"),
    ("cali-", "Calico"),
    ("CILIUM_", "Cilium"),
    ("WEAVE-NPC", "Weave Net"),
    ("AZURE-NPM", "Azure NPM"),
    ("kube-network-policies", "kube-network-policies"),
    ("kindnet-network-policies", "kindnet"),
];

/// Whoever else drops what policies don't allow: two of them agree on less than each allows, and one that has been removed
/// leaves its rules.
pub(super) fn controllers(inspection: &Inspection) -> Finding {
    let Some(observed) = &inspection.snapshot.observed else { return Finding::skipped("the kernel can't be read") };
    let names = names(&observed.firewall);
    if inspection.policy.is_none() && !names.is_empty() {
        return Finding::fine(format!("NetworkPolicies are enforced by {}", list(names)));
    }
    let problems = names.into_iter().map(|name| {
        Problem::warning(
            format!("{name} has rules for NetworkPolicies here, as fabricd has"),
            format!("let one of them do it: end {name} and remove its rules, or set --network-policy off"),
        )
    });
    Finding::of(problems.collect(), "no other program has rules for NetworkPolicies")
}

fn list(names: BTreeSet<&str>) -> String {
    names.into_iter().collect::<Vec<_>>().join(" and ")
}

fn names(firewall: &Firewall) -> BTreeSet<&'static str> {
    let words = firewall.tables.iter().flat_map(|table| table.chains.keys().chain([&table.name]));
    let known = words.filter_map(|word| CONTROLLERS.iter().find(|(prefix, _)| word.starts_with(prefix)));
    known.map(|(_, name)| *name).collect()
}
