//! Listens to the events of nftables, of which only those about our tables count.
//!
//! kube-proxy and its like write thousands of rules in a second. So of each event no more is looked at than its family
//! and the name of its table.

use std::io;
use std::sync::Arc;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt as _, TokioSocket};
use tokio::task::JoinHandle;

use super::read::concerns_us;
use crate::kernel::monitor::{Monitor, Table};
use crate::kernel::socket;
use crate::kernel::wire::frames;

/// Room for the events of a large transaction of others.
const RECEIVE_BUFFER: usize = 8 << 20;
/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;

/// Tells `monitor` whenever somebody else than the socket at `own_port` has touched a table of ours. Must be called
/// within a tokio runtime.
pub(in crate::kernel) fn start(monitor: Arc<Monitor>, own_port: u32) -> io::Result<JoinHandle<()>> {
    let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
    socket.socket_mut().bind_auto()?;
    socket::grow_receive_buffer(socket.socket_ref(), RECEIVE_BUFFER)?;
    socket.socket_ref().add_membership(GROUP)?;
    Ok(tokio::spawn(async move {
        let mut buffer = Vec::with_capacity(socket::RECEIVE);
        loop {
            buffer.clear();
            match socket.recv(&mut buffer).await {
                Ok(_) if !frames(&buffer).any(|frame| frame.port != own_port && concerns_us(&frame)) => {}
                Ok(_) => monitor.distrust([Table::Rules]),
                Err(error) if socket::is_overrun(&error) => monitor.distrust([Table::Rules]),
                Err(error) => {
                    tracing::error!(%error, "nftables monitor ended: changes of rules show at audits only");
                    return;
                }
            }
        }
    }))
}
