//! What shapes or encrypts packets on the kernel's path, and would be passed by: queueing disciplines and IPsec policies.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;

use fabric_core::plan::bypass::{Qdisc, Shaping, Side};
use fabric_core::state::fast_path::Place;
use fabric_netlink::{Frame, RECEIVE, Request, RequestSocket, attribute, is_overrun};
use netlink_sys::protocols::NETLINK_XFRM;
use netlink_sys::{AsyncSocket, AsyncSocketExt as _, TokioSocket};
use tokio::task::JoinHandle;

use super::filters::{self, CLSACT, PARENT_CLSACT, RTM_GETQDISC, TCMSG, TCMSG_INDEX, TCMSG_PARENT, kind, number};
use crate::kernel::monitor::{Monitor, Table};
use crate::kernel::routing::tables::Links;

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
    /// Filters of ours, with the number of their program.
    ours: BTreeMap<Place, u32>,
}

impl Reader {
    /// What was found when it was read last.
    pub(in crate::kernel) fn found(&self) -> &Shaping {
        &self.found
    }

    /// Reads what there is now. What can't be read is told in it. True when other filters of ours are there than before.
    pub(in crate::kernel) fn read(&mut self, socket: &mut RequestSocket, links: &Links) -> bool {
        let mut ours = BTreeMap::new();
        let qdiscs =
            qdiscs(socket, links, &mut ours).map_err(|error| format!("queueing disciplines can't be read: {error}"));
        let policies = self.policies().map_err(|error| format!("IPsec policies can't be read: {error}"));
        let unread = qdiscs.as_ref().err().or(policies.as_ref().err()).cloned();
        self.found =
            Shaping { qdiscs: qdiscs.unwrap_or_default(), ipsec_policies: policies.unwrap_or_default(), unread };
        let others = ours != self.ours;
        self.ours = ours;
        others
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

/// `tc qdisc show`, without what every interface has. Nor is a clsact that has no filters, or `ours` alone, anything that
/// packets would be led past.
fn qdiscs(socket: &mut RequestSocket, links: &Links, ours: &mut BTreeMap<Place, u32>) -> io::Result<BTreeSet<Qdisc>> {
    let found = socket.dump(&Request::raw(RTM_GETQDISC, 0, vec![0; TCMSG]), |frame| qdisc(frame, links))?;
    let mut qdiscs = BTreeSet::new();
    for (ifindex, qdisc) in found {
        if qdisc.side == Side::Ingress && qdisc.kind == CLSACT {
            let (here, has_others) = filters::at_clsact(socket, ifindex)?;
            ours.extend(here);
            if !has_others {
                continue;
            }
        }
        qdiscs.insert(qdisc);
    }
    Ok(qdiscs)
}

fn qdisc(frame: &Frame<'_>, links: &Links) -> Option<(u32, Qdisc)> {
    let (ifindex, kind) = (number(frame, TCMSG_INDEX)?, kind(frame)?);
    let link = links.get(&ifindex)?;
    let side = if number(frame, TCMSG_PARENT)? == PARENT_CLSACT { Side::Ingress } else { Side::Egress };
    (!NO_QUEUE.contains(&kind.as_str())).then_some((ifindex, Qdisc { dev: link.name, side, kind }))
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
