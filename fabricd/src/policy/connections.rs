//! Connections that are open when policies change: evaluated again, as if they began now. Those of pods that are gone are
//! forgotten, so that whoever gets their addresses has none of them.
//!
//! The packet filter evaluates the first packet of a connection and lets its others pass. So one that is not allowed any more
//! gets a label ([`DENIED_LABEL`]), by which the filter drops what it has to say, in both directions; and loses it when it is
//! allowed again, and goes on. Nobody else's connections are touched.

use std::collections::BTreeSet;
use std::net::IpAddr;

use fabric_core::policy::plan::DENIED_LABEL;
use fabric_core::policy::{Cluster, Conn, State};

use crate::kernel::KernelError;
use crate::kernel::conntrack::{Change, Connection, Connections, Filter};

/// How many connections changed.
#[derive(Debug, Default)]
pub(super) struct Evaluated {
    /// Cut off.
    pub denied: usize,
    /// Allowed again.
    pub allowed: usize,
    /// Of pods that are gone.
    pub forgotten: usize,
    /// Could not be changed.
    pub failed: usize,
    /// Why the first of these couldn't.
    pub why: Option<KernelError>,
}

/// Judges all connections of this node's pods, and forgets those of addresses that are `gone`. Takes as long as it takes to
/// list them.
///
/// # Errors
/// When they can't be listed.
pub(super) fn reevaluate(state: &State, gone: &BTreeSet<IpAddr>) -> Result<Evaluated, KernelError> {
    let cluster = Cluster::new(state);
    let ends = |connection: &Connection| [connection.original.source, connection.reply.source];
    let mut changes = vec![];
    let mut connections = Connections::open()?;
    connections.each(&Filter::default(), |connection| {
        if ends(connection).iter().any(|ip| gone.contains(ip)) {
            changes.push((*connection, Change::Delete));
        } else if ends(connection).iter().any(|ip| state.local.pods.contains_key(ip)) {
            let denied = !cluster.evaluate_here(&conn(connection)).is_allowed();
            if denied != connection.has_label(DENIED_LABEL) {
                changes.push((*connection, Change::Label { bit: DENIED_LABEL, on: denied }));
            }
        }
    })?;
    let mut evaluated = Evaluated::default();
    for ((_, change), result) in changes.iter().zip(connections.change(&changes)) {
        match (result, change) {
            // It has ended.
            (Ok(false), _) => {}
            (Ok(true), Change::Label { on: true, .. }) => evaluated.denied += 1,
            (Ok(true), Change::Delete) => evaluated.forgotten += 1,
            (Ok(true), _) => evaluated.allowed += 1,
            (Err(error), _) => {
                evaluated.failed += 1;
                evaluated.why.get_or_insert(error);
            }
        }
    }
    Ok(evaluated)
}

/// What policies see of it: who began it, and who answers where.
fn conn(connection: &Connection) -> Conn {
    let protocol = connection.original.protocol;
    let has_ports = matches!(protocol, 6 | 17 | 132);
    let port = if has_ports { connection.reply.source_port } else { 0 };
    Conn { src: connection.original.source, dst: connection.reply.source, protocol, port }
}
