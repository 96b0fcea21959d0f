//! `GetPolicies` and `WatchDrops`: network policies in the API's words.

use std::collections::BTreeMap;
use std::pin::Pin;

use fabric_core::policy::chains::Counts;
use fabric_core::policy::drops::DropCause;
use fabric_core::policy::model::Protocol;
use fabric_core::policy::tiers::{Action, PolicyName, Tier};
use fabric_core::policy::{Direction, ObjectName};
use fabric_core::state::nft::TableKey;
use fabric_proto::v1;
use tokio::task::spawn_blocking;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use crate::kernel::{self, Counted};
use crate::policy::applied::Applied;
use crate::policy::drops::{DropEvent, Dropped};
use crate::policy::status::PolicyView;

/// A stream of what is dropped.
pub type Drops = Pin<Box<dyn Stream<Item = Result<v1::Drop, Status>> + Send>>;

const OFF: &str = "network policies are not enforced here; fabricd does it with --network-policy on";

/// Who is isolated, and what the rules have counted.
///
/// # Errors
/// When the kernel can't be asked.
pub async fn all(policy: Option<PolicyView>) -> Result<v1::GetPoliciesResponse, Status> {
    let Some(PolicyView { status, applied, .. }) = policy else { return Ok(v1::GetPoliciesResponse::default()) };
    let (status, applied) = (status.borrow().clone(), applied.borrow().clone().unwrap_or_default());
    let counted = spawn_blocking(|| kernel::counted(TableKey::Policy)).await;
    let counted = counted.map_err(|error| Status::internal(error.to_string()))?;
    let counted = counted.map_err(|error| Status::unavailable(format!("the kernel can't be asked: {error}")))?;
    Ok(v1::GetPoliciesResponse {
        on: true,
        reason: status.ready.clone().err().unwrap_or_default(),
        warnings: status.warnings.clone(),
        policies: u32::try_from(applied.state.policies.len()).unwrap_or(u32::MAX),
        pods: pods(&applied),
        rules: rules(&applied, &counted),
        cluster_policies: u32::try_from(applied.state.cluster_policies.len()).unwrap_or(u32::MAX),
    })
}

/// What is dropped from now on.
///
/// # Errors
/// When policies are not enforced here.
pub fn drops(policy: Option<&PolicyView>) -> Result<Drops, Status> {
    let policy = policy.ok_or_else(|| Status::failed_precondition(OFF))?;
    Ok(Box::pin(policy.drops.listen().map(|told| match told {
        DropEvent::Dropped(dropped) => Ok(drop_of(&dropped)),
        DropEvent::Missed(packets) => {
            Ok(v1::Drop { missed: true, missed_packets: packets.unwrap_or(0), ..v1::Drop::default() })
        }
        DropEvent::Failed(reason) => Err(Status::unavailable(reason)),
    })))
}

/// Pods with all their addresses; those without a name each by itself.
fn pods(applied: &Applied) -> Vec<v1::PolicyPod> {
    let mut pods: BTreeMap<(Option<&ObjectName>, Option<String>), v1::PolicyPod> = BTreeMap::new();
    for (ip, local) in &applied.state.local.pods {
        let isolation = applied.pods.get(ip);
        let name = isolation.and_then(|isolation| isolation.pod.as_ref());
        let name = name.or_else(|| local.identity.as_ref().map(|identity| &identity.name));
        let key = (name, name.is_none().then(|| ip.to_string()));
        let pod = pods.entry(key).or_insert_with(|| v1::PolicyPod {
            pod: name.map(ToString::to_string).unwrap_or_default(),
            applied: true,
            ..v1::PolicyPod::default()
        });
        pod.addresses.push(ip.to_string());
        pod.applied &= isolation.is_some();
        if let Some(isolation) = isolation {
            (pod.ingress, pod.egress) = (names(&isolation.ingress), names(&isolation.egress));
        }
    }
    pods.into_values().collect()
}

fn names(policies: &[PolicyName]) -> Vec<String> {
    let name = |policy: &PolicyName| match policy.tier {
        Tier::NetworkPolicy => policy.name.to_string(),
        tier => format!("{} ({tier})", policy.name),
    };
    policies.iter().map(name).collect()
}

/// Of which policies a counter is, in which direction, and of which rule; `None` for what no rule allowed.
type Counter = (Tier, Vec<String>, Direction, Option<(usize, Action)>);

/// Each rule of a policy, and what each set of policies drops, whichever chains they are in.
fn rules(applied: &Applied, counted: &[Counted]) -> Vec<v1::PolicyRule> {
    let mut by_chain: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for rule in counted {
        by_chain.entry(&rule.chain).or_default().push(rule.packets.unwrap_or(0));
    }
    let mut sums: BTreeMap<Counter, u64> = BTreeMap::new();
    for (chain, origin) in &applied.chains {
        // Of a chain that was written anew meanwhile nothing is known.
        let packets = by_chain.get(chain.as_str()).filter(|packets| packets.len() == origin.rules.len());
        for (at, counts) in origin.rules.iter().enumerate() {
            let (tier, policies, rule) = match counts {
                Counts::Rule { policy, rule, action } => {
                    (policy.tier, vec![policy.name.to_string()], Some((*rule, *action)))
                }
                Counts::NoRule(policies) => {
                    (Tier::NetworkPolicy, policies.iter().map(ToString::to_string).collect(), None)
                }
                Counts::Nothing => continue,
            };
            let sum = sums.entry((tier, policies, origin.direction, rule)).or_default();
            *sum += packets.and_then(|packets| packets.get(at)).copied().unwrap_or(0);
        }
    }
    let rule = |((tier, policies, direction, rule), packets): (Counter, u64)| v1::PolicyRule {
        policies,
        direction: direction.to_string(),
        drops: rule.is_none(),
        rule: rule.and_then(|(rule, _)| u32::try_from(rule).ok()).unwrap_or(0),
        packets,
        tier: tier.to_string(),
        action: rule.map_or(Action::Deny, |(_, action)| action).to_string(),
    };
    sums.into_iter().map(rule).collect()
}

fn drop_of(dropped: &Dropped) -> v1::Drop {
    let Dropped { unix_millis, cause, packet, source, target, reasons } = dropped;
    let name = |pod: &Option<ObjectName>| pod.as_ref().map(ToString::to_string).unwrap_or_default();
    v1::Drop {
        unix_millis: *unix_millis,
        cause: DropCause::name(*cause).into(),
        words: cause.to_string(),
        protocol: protocol(packet.protocol),
        source: packet.source.to_string(),
        source_port: packet.source_port.into(),
        source_pod: name(source),
        target: packet.target.to_string(),
        target_port: packet.target_port.into(),
        target_pod: name(target),
        reasons: reasons.clone(),
        ..v1::Drop::default()
    }
}

fn protocol(number: u8) -> String {
    match (Protocol::of(number), number) {
        (Some(protocol), _) => protocol.to_string(),
        (None, 1 | 58) => "icmp".to_owned(),
        (None, number) => number.to_string(),
    }
}
