//! What network policies cost a node in a large cluster: memory for what the API server tells of all pods, for the plan, and
//! what one label that changes takes.

use std::collections::BTreeSet;
use std::fs;
use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context as _, Result};
use fabric_core::model::IfName;
use fabric_core::policy::model::{LocalPod, PodIdentity};
use fabric_core::policy::objects::{NamespaceObject, PodObject, PolicyObject};
use fabric_core::policy::plan::{Planner, PolicyPlan};
use fabric_core::policy::sets::{NamespaceSet, PodSet, PolicySet};
use fabric_core::policy::{Cluster, State};
use serde_json::{Value, json};

use super::Report;
use super::report::ms;
use crate::policies::{namespace, pod, policy};

/// How large the cluster is.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Pods of the whole cluster.
    pub pods: u32,
    /// NetworkPolicies.
    pub policies: u32,
    /// Pods of this node.
    pub local: u32,
    /// How often a label changes.
    pub changes: usize,
}

/// Pods of a namespace, and of those that one set of labels has.
const OF_NAMESPACE: u32 = 150;
const ALIKE: u32 = 10;

/// Measures.
///
/// # Errors
/// This process' memory can't be read.
pub fn run(report: &mut Report, options: Options) -> Result<()> {
    let section = format!("{} pods, {} policies, {} pods here", options.pods, options.policies, options.local);
    let before = resident()?;
    let mut pods = PodSet::default();
    for number in 0..options.pods {
        pods.apply(&serde_json::from_value::<PodObject>(object(number, 0))?);
    }
    pods.compact();
    let with_pods = resident()?;
    report.number(&section, "pods as they are known", "MiB", with_pods - before);
    let team = |number: u32| json!({"team": (number % 20).to_string()});
    let namespaces = (0..=options.pods / OF_NAMESPACE).map(|number| namespace(&space(number), &team(number)));
    let namespaces: Vec<NamespaceObject> =
        namespaces.map(|object| Ok(serde_json::from_value(object)?)).collect::<Result<_>>()?;
    let policies = (0..options.policies).map(|number| Ok(serde_json::from_value(rules(number))?));
    let policies: Vec<PolicyObject> = policies.collect::<Result<_>>()?;
    let mut policy_set = PolicySet::default().listed(&policies);
    let mut state = State {
        policies: policy_set.policies().clone(),
        namespaces: NamespaceSet::listed(&namespaces).namespaces().clone(),
        pods: pods.pods().clone(),
        ..State::default()
    };
    // This node's are spread over the namespaces.
    let step = (options.pods / options.local.max(1)).max(1);
    let local = state.pods.iter().step_by(usize::try_from(step)?).take(usize::try_from(options.local)?);
    let local = local.flat_map(|pod| {
        let identity = PodIdentity { name: pod.name.clone(), uid: Some(pod.uid) };
        pod.ips().map(move |ip| (ip, LocalPod { identity: Some(identity.clone()) })).collect::<Vec<_>>()
    });
    state.local.pods = local.collect();
    let bridges: BTreeSet<IfName> = ["cni0".parse()?].into();
    let (mut planner, began) = (Planner::default(), Instant::now());
    let planned = planner.plan(&Cluster::new(&state), &bridges);
    report.number(&section, "planned for the first time", "ms", ms(began.elapsed()));
    let elements = |plan: &PolicyPlan| plan.table.sets.values().map(|set| set.elements.len()).sum::<usize>();
    report.number(&section, "elements of all sets", "", f64::from(u32::try_from(elements(&planned))?));
    report.number(&section, "chains", "", f64::from(u32::try_from(planned.table.chains.len())?));
    report.number(&section, "with the plan", "MiB", resident()? - before);
    let (mut labels, mut rules_of) = (vec![], vec![]);
    for round in 1..=options.changes {
        let round = u32::try_from(round)?;
        let changed = serde_json::from_value::<PodObject>(object(round % options.pods, round))?;
        let began = Instant::now();
        pods.apply(&changed);
        state.pods = pods.pods().clone();
        black_box(planner.plan(&Cluster::new(&state), &bridges));
        labels.push(ms(began.elapsed()));
        // The first namespace has a pod of this node.
        let began = Instant::now();
        let changed = serde_json::from_value::<PolicyObject>(versioned(round))?;
        policy_set.apply(&changed);
        state.policies = policy_set.policies().clone();
        black_box(planner.plan(&Cluster::new(&state), &bridges));
        rules_of.push(ms(began.elapsed()));
    }
    report.figure(&section, "one label changes", "ms", labels);
    report.figure(&section, "one policy changes, for pods of all namespaces", "ms", rules_of);
    report.number(&section, "resident, at its most since the start", "MiB", peak()?);
    black_box(&planned);
    Ok(())
}

fn tier(number: u32) -> &'static str {
    match number % 3 {
        0 => "front",
        1 => "back",
        _ => "data",
    }
}

fn space(number: u32) -> String {
    format!("namespace-{number}")
}

/// A pod as a Deployment makes it.
fn object(number: u32, version: u32) -> Value {
    let (space, deployment) = (space(number / OF_NAMESPACE), number / ALIKE);
    let name = format!("deployment-{deployment}-7d4b9c6f5-{number:05x}");
    let v4 = format!("10.{}.{}.{}", number >> 16 & 255, number >> 8 & 255, number & 255);
    let v6 = format!("fd00:10::{:x}:{:x}", number >> 16, number & 0xffff);
    let labels = json!({
        "app": format!("deployment-{deployment}"), "tier": tier(number),
        "pod-template-hash": format!("{deployment:x}"), "version": version.to_string(),
    });
    pod(&space, &name, &[&v4, &v6], &labels)
}

/// The first policy, which allows pods of a version of all namespaces instead.
fn versioned(version: u32) -> Value {
    let mut policy = rules(0);
    let labels = json!({"version": version.to_string()});
    let peer = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": labels}});
    policy["spec"]["ingress"][1] = json!({"from": [peer]});
    policy
}

/// One of a namespace: its pods for each other, and one port for those of another team.
fn rules(number: u32) -> Value {
    let spec = json!({
        "podSelector": {"matchLabels": {"tier": tier(number)}},
        "ingress": [
            {"from": [{"podSelector": {}}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": (number % 20).to_string()}}}], "ports": [{"port": 8080}]},
        ],
    });
    policy(&space(number), &format!("policy-{number}"), &spec)
}

fn resident() -> Result<f64> {
    status("VmRSS:")
}

fn peak() -> Result<f64> {
    status("VmHWM:")
}

/// Of this process, in MiB.
fn status(field: &str) -> Result<f64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("no such field")?;
    let kib: u32 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(f64::from(kib) / 1024.0)
}
