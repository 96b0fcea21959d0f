//! Packets that rules show by `log group …` (nfnetlink_log, linux/netfilter/nfnetlink_log.h).

use std::io;
use std::time::Duration;

use fabric_netlink::{EventSocket, Refusal, Request, RequestSocket};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::KernelError;
use super::nft::{Attributes, Nfnetlink as _, Values};

/// `NFNL_SUBSYS_ULOG << 8 | NFULNL_MSG_*`: a packet, and what we want of the group.
const PACKET: u16 = 4 << 8;
const CONFIG: u16 = 4 << 8 | 1;
/// `NFULA_CFG_CMD`, `_MODE`, `_TIMEOUT`.
const COMMAND: u16 = 1;
const MODE: u16 = 2;
const TIMEOUT: u16 = 4;
/// `NFULNL_CFG_CMD_BIND`
const BIND: u8 = 1;
/// `NFULNL_COPY_PACKET`
const COPY_PACKET: u8 = 2;
/// `NFULA_PAYLOAD`, `NFULA_PREFIX`.
const PAYLOAD: u16 = 9;
const PREFIX: u16 = 10;
/// How long the kernel gathers packets before it sends them, in hundredths of a second.
const GATHERED: u32 = 20;

/// Listens to a group. The kernel forgets it with the socket; what doesn't fit into that's queue is lost.
#[derive(Debug)]
pub struct Nflog(EventSocket);

/// A packet that a rule has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// What the rule says.
    pub prefix: String,
    /// The packet from its IP header on, as much as was asked for.
    pub packet: Vec<u8>,
}

impl Nflog {
    /// Listens to a group in this thread's network namespace, to so many bytes of each packet.
    ///
    /// # Errors
    /// Another program listens to it, or the kernel can't do it.
    pub fn open(group: u16, bytes: u32) -> Result<Self, KernelError> {
        let failed = |refusal: Refusal| {
            let source = refusal.error;
            let detail = match source.raw_os_error() {
                Some(libc::EPERM | libc::EBUSY) => "another program listens to it, or fabricd lacks CAP_NET_ADMIN",
                Some(libc::EINVAL | libc::EPROTONOSUPPORT) => {
                    "does the kernel have nfnetlink_log? Load it with: modprobe nfnetlink_log"
                }
                _ => "the kernel says no more; see: dmesg | tail",
            };
            KernelError::Refused { op: format!("listen to group {group} of nflog"), source, detail: detail.into() }
        };
        let mut socket = RequestSocket::open(NETLINK_NETFILTER).map_err(|error| failed(error.into()))?;
        let about = || Attributes::message(0, group);
        // A struct nfulnl_msg_config_mode: how much, how, and a byte for nothing.
        let mode = [&bytes.to_be_bytes()[..], &[COPY_PACKET, 0]].concat();
        for body in [about().bytes(COMMAND, &[BIND]), about().bytes(MODE, &mode), about().number(TIMEOUT, GATHERED)] {
            let answers = socket.write(&[Request::raw(CONFIG, 0, body.into_bytes())]);
            answers.into_iter().try_for_each(|answer| answer.map_err(failed))?;
        }
        Ok(Self(socket.into_events()))
    }

    /// Waits for packets, so long. There may be none.
    ///
    /// # Errors
    /// What the system says; `ENOBUFS` when some were lost.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<Vec<Shown>> {
        let mut shown = vec![];
        self.0.hear(timeout, |frame| {
            if frame.kind == PACKET {
                let values = Values::of(&frame);
                let prefix = values.text(PREFIX).unwrap_or_default().to_owned();
                shown.push(Shown { prefix, packet: values.bytes(PAYLOAD).unwrap_or_default().to_vec() });
            }
        })?;
        Ok(shown)
    }
}
