//! UDP connections that lead to nobody who serves: forgotten, so that their clients find who does.

use fabric_core::services::model::Protocol;
use fabric_core::services::plan::UdpFrontends;

use crate::kernel::KernelError;
use crate::kernel::conntrack::{Change, Connection, Connections, Filter, Tuple};

/// Forgets those to frontends of `now` or `before` that no endpoint of `now` answers. Returns how many. Takes as long as it
/// takes to list all of UDP.
///
/// # Errors
/// When they can't be listed, or one can't be deleted.
pub(super) fn forget(now: &UdpFrontends, before: &UdpFrontends) -> Result<usize, KernelError> {
    let mut connections = Connections::open()?;
    let mut stale: Vec<(Connection, Change)> = vec![];
    connections.each(&Filter { protocol: Some(Protocol::Udp.number()), ..Filter::default() }, |connection| {
        let Connection { original, reply, .. } = connection;
        if now.forget(before, target(original), (reply.source, reply.source_port)) {
            stale.push((*connection, Change::Delete));
        }
    })?;
    let gone = connections.change(&stale).into_iter().collect::<Result<Vec<bool>, _>>()?;
    Ok(gone.into_iter().filter(|was_there| *was_there).count())
}

fn target(tuple: &Tuple) -> (std::net::IpAddr, u16) {
    (tuple.target, tuple.target_port)
}
