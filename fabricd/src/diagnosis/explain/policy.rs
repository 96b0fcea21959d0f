//! What network policies say of a connection at the end that is on this node.

use fabric_core::policy::evaluate::{Side, Verdict};
use fabric_core::policy::{Cluster, Conn, Direction};

use super::outside::Place;
use super::{Hop, ICMP, ICMPV6, Question};
use crate::diagnosis::Inspection;

/// How many rules that don't allow it are told.
const TOLD: usize = 5;

/// What the policies of one end say; `None` where they are not enforced, or are not asked.
pub(super) fn hop(inspection: &Inspection, question: &Question, direction: Direction) -> Option<Hop> {
    let policy = inspection.policy.as_ref()?;
    let Some(applied) = policy.applied.borrow().clone() else {
        let reason = policy.status.borrow().ready.clone().err().unwrap_or_default();
        return Some(Hop::unknown("policy", format!("network policies are not applied yet: {reason}")));
    };
    // They see the endpoint that a Service leads to.
    if question.to.is_none() && Place::of(inspection, question.target) == Place::Service {
        return None;
    }
    let conn = Conn { src: question.source, dst: question.target, protocol: question.protocol, port: question.port };
    let cluster = Cluster::new(&applied.state);
    let verdict = cluster.evaluate_here(&conn);
    let (side, pod) = match direction {
        Direction::Egress => (verdict.egress, conn.src),
        Direction::Ingress => (verdict.ingress, conn.dst),
    };
    let found = format!("{direction} of {pod}, {}: {side}", words(&conn));
    Some(match &side {
        Side::Elsewhere => return None,
        Side::Denied(_) => Hop::failed("policy", found, remedy(&cluster, direction, &conn)),
        Side::Refused(rule) => {
            let denies = cluster.denied_by(direction, rule);
            let lines = denies.into_iter().chain([remedy(&cluster, direction, &conn)]).filter(|line| !line.is_empty());
            Hop::failed("policy", found, lines.collect::<Vec<_>>().join("\n"))
        }
        Side::NotYetKnown(_) => {
            Hop::failed("policy", found, "the API server tells of it within a moment: fabricctl policy")
        }
        _ => Hop::fine("policy", found),
    })
}

/// What is judged: `tcp to port 80`, `a ping`.
fn words(conn: &Conn) -> String {
    match (conn.protocol, fabric_core::policy::model::Protocol::of(conn.protocol)) {
        (ICMP | ICMPV6, _) => "a ping".to_owned(),
        (_, Some(protocol)) => format!("{protocol} to port {}", conn.port),
        (number, None) => format!("protocol {number}"),
    }
}

/// What would allow it, and what the rules that are there allow instead.
fn remedy(cluster: &Cluster<'_>, direction: Direction, conn: &Conn) -> String {
    let mut lines = vec![];
    if let Some(remedy) = cluster.remedy(direction, conn) {
        lines.push("a rule that allows it, if it is to be allowed:".to_owned());
        lines.push(remedy.to_string());
    }
    let misses = match cluster.evaluate_here(conn) {
        Verdict { ingress: Side::Denied(_), .. } if direction == Direction::Ingress => cluster.misses(direction, conn),
        Verdict { egress: Side::Denied(_), .. } if direction == Direction::Egress => cluster.misses(direction, conn),
        _ => vec![],
    };
    lines.extend(misses.iter().take(TOLD).map(ToString::to_string));
    if let Some(more @ 1..) = misses.len().checked_sub(TOLD) {
        lines.push(format!("{more} more rules allow other connections"));
    }
    lines.join("\n")
}
