//! Listens to the events of nftables.
//!
//! kube-proxy and its like write thousands of rules in a second. So of each event no more is looked at than its family
//! and the name of its table: one of ours has to be put right, any other may decide on our packets, unless it only
//! translates addresses.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::state::nft::TableKey;
use fabric_netlink::{Frame, RECEIVE, frames, grow_receive_buffer, is_overrun};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt as _, TokioSocket};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::attributes::Values;
use super::read::concerned;
use super::uapi::{NEW_GENERATION, message};
use crate::kernel::monitor::{Monitor, Table};

/// Room for the events of a large transaction of others.
const RECEIVE_BUFFER: usize = 8 << 20;
/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;
/// What others write is told at once, and then no more often than this, so that a firewall that is being filled rule by
/// rule doesn't keep the loop busy.
const PAUSE: Duration = Duration::from_millis(500);
/// Where reading all of their chains takes long, it takes this part of the time at most: one of twenty.
const PART: u32 = 20;
/// By then an audit looks anyway.
const LONGEST: Duration = Duration::from_secs(10);

/// Tells `monitor` whenever somebody else than the socket at `own_port` has written rules; of those of Services only if
/// they are not read apart. Must be called within a tokio
/// runtime.
pub(in crate::kernel) fn start(
    monitor: Arc<Monitor>,
    own_port: u32,
    services_apart: bool,
) -> io::Result<JoinHandle<()>> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    grow_receive_buffer(socket.socket_ref(), RECEIVE_BUFFER)?;
    socket.socket_ref().add_membership(GROUP)?;
    Ok(tokio::spawn(async move {
        let mut buffer = Vec::with_capacity(RECEIVE);
        let mut told = Instant::now() - PAUSE;
        let mut to_tell = false;
        loop {
            buffer.clear();
            let received = tokio::select! {
                received = socket.recv(&mut buffer) => received.map(|_| ()),
                () = sleep_until(told + pause(monitor.firewalls_took())), if to_tell => {
                    (told, to_tell) = (Instant::now(), false);
                    monitor.distrust([Table::Firewalls]);
                    continue;
                }
            };
            match received {
                Ok(()) => {
                    let theirs = || frames(&buffer).filter(|frame| frame.port != own_port);
                    let tables = theirs().filter_map(|frame| concerned(&frame));
                    let ours = tables.filter(|table| !services_apart || *table != TableKey::Services);
                    monitor.distrust(ours.map(Table::Rules));
                    to_tell |= theirs().any(|frame| may_decide(&frame));
                }
                Err(error) if is_overrun(&error) => {
                    monitor.distrust(TableKey::ALL.map(Table::Rules));
                    to_tell = true;
                }
                Err(error) => {
                    tracing::error!(%error, "nftables monitor ended: changes of rules show at audits only");
                    return;
                }
            }
        }
    }))
}

/// How long others are not told of again, where the last reading took so long.
fn pause(took: Duration) -> Duration {
    took.saturating_mul(PART).clamp(PAUSE, LONGEST)
}

/// Whether an event is about a table of others that may decide on packets: that of iptables for translation never does.
fn may_decide(frame: &Frame<'_>) -> bool {
    frame.kind != message(NEW_GENERATION) && concerned(frame).is_none() && Values::of(frame).text(1) != Some("nat")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chains_that_take_long_to_read_are_read_less_often() {
        let millis = Duration::from_millis;
        let pauses = [0, 10, 25, 100, 5_000].map(|took| pause(millis(took)));
        assert_eq!(pauses, [500, 500, 500, 2_000, 10_000].map(millis));
    }
}
