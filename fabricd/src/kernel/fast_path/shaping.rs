//! What shapes or encrypts packets on the kernel's path, and would be passed by: queueing disciplines and IPsec policies.

use std::io;
use std::sync::Arc;

use fabric_core::plan::passed_by::{Qdisc, Shaping, Side};
use fabric_netlink::{Frame, RECEIVE, Request, RequestSocket, attribute, is_overrun};
use netlink_sys::protocols::NETLINK_XFRM;
use netlink_sys::{AsyncSocket, AsyncSocketExt as _, TokioSocket};
use tokio::task::JoinHandle;

use crate::kernel::monitor::{Monitor, Table};
use crate::kernel::routing::tables::Links;

/// linux/rtnetlink.h.
const RTM_GETQDISC: u16 = 38;
/// `struct tcmsg`: family, the interface's index, handle, parent and more.
const TCMSG: usize = 20;
const TCMSG_INDEX: usize = 4;
const TCMSG_PARENT: usize = 12;
/// `TC_H_INGRESS`, which is `TC_H_CLSACT` too.
const PARENT_INGRESS: u32 = 0xffff_fff1;
const TCA_KIND: u16 = 1;
/// What every interface without a queue has, and what has no effect.
const NO_QUEUE: [&str; 2] = ["noqueue", "noop"];

/// linux/xfrm.h: the question for the number of policies, the answer, and the group that tells of changes.
const XFRM_MSG_GETSPDINFO: u16 = 0x25;
const XFRMA_SPD_INFO: u16 = 1;
const XFRMNLGRP_POLICY: u32 = 4;

/// Reads them, and knows what was read last.
#[derive(Default)]
pub(in crate::kernel) struct Reader {
    xfrm: Option<RequestSocket>,
    found: Shaping,
}

impl Reader {
    /// What was found when it was read last.
    pub(in crate::kernel) fn found(&self) -> &Shaping {
        &self.found
    }

    /// Reads what there is now. What can't be read is told in it.
    pub(in crate::kernel) fn read(&mut self, socket: &mut RequestSocket, links: &Links) {
        let qdiscs = qdiscs(socket, links).map_err(|error| format!("queueing disciplines can't be read: {error}"));
        let policies = self.policies().map_err(|error| format!("IPsec policies can't be read: {error}"));
        let unread = qdiscs.as_ref().err().or(policies.as_ref().err()).cloned();
        self.found = Shaping {
            qdiscs: qdiscs.unwrap_or_default().into_iter().collect(),
            ipsec_policies: policies.unwrap_or_default(),
            unread,
        };
    }

    /// `ip xfrm policy count`, without those of sockets.
    fn policies(&mut self) -> io::Result<u32> {
        let socket = match &mut self.xfrm {
            Some(socket) => socket,
            None => match RequestSocket::open(NETLINK_XFRM) {
                // A kernel without IPsec.
                Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(0),
                opened => self.xfrm.insert(opened?),
            },
        };
        let question = Request::raw(XFRM_MSG_GETSPDINFO, 0, vec![0; 4]);
        let answer = socket.ask(&question, |frame| {
            let counts = attribute(frame.body.get(4..)?, XFRMA_SPD_INFO)?;
            // In, out and forwarded; then the same of sockets.
            Some(
                counts
                    .chunks_exact(4)
                    .take(3)
                    .filter_map(|count| count.first_chunk())
                    .map(|c| u32::from_ne_bytes(*c))
                    .sum(),
            )
        })?;
        answer.ok_or_else(|| io::Error::other("the kernel gives no number of them"))
    }
}

/// `tc qdisc show`, without what every interface has.
fn qdiscs(socket: &mut RequestSocket, links: &Links) -> io::Result<Vec<Qdisc>> {
    socket.dump(&Request::raw(RTM_GETQDISC, 0, vec![0; TCMSG]), |frame| qdisc(frame, links))
}

fn qdisc(frame: &Frame<'_>, links: &Links) -> Option<Qdisc> {
    let number = |at: usize| frame.body.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
    let kind = attribute(frame.body.get(TCMSG..)?, TCA_KIND)?;
    let kind = std::str::from_utf8(kind).ok()?.trim_end_matches('\0').to_owned();
    let link = links.get(&number(TCMSG_INDEX)?)?;
    let side = if number(TCMSG_PARENT)? == PARENT_INGRESS { Side::Ingress } else { Side::Egress };
    (!NO_QUEUE.contains(&kind.as_str())).then_some(Qdisc { dev: link.name, side, kind })
}

/// Tells `monitor` when IPsec policies come or go. `None` where the kernel has none. Must be called within a tokio runtime.
pub(in crate::kernel) fn watch_policies(monitor: Arc<Monitor>) -> io::Result<Option<JoinHandle<()>>> {
    let mut socket = match TokioSocket::new(NETLINK_XFRM) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
        socket => socket?,
    };
    socket.socket_mut().bind_auto()?;
    socket.socket_ref().add_membership(XFRMNLGRP_POLICY)?;
    Ok(Some(tokio::spawn(async move {
        let mut buffer = Vec::with_capacity(RECEIVE);
        loop {
            buffer.clear();
            match socket.recv(&mut buffer).await {
                Err(error) if !is_overrun(&error) => {
                    tracing::error!(%error, "IPsec monitor ended: changes of policies show at audits only");
                    return;
                }
                _ => monitor.distrust([Table::Shaping]),
            }
        }
    })))
}
