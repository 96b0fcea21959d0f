//! Network policies, as far as attaching a pod has to do with them: a pod reaches nobody until the daemon has applied its
//! policies, so ADD waits for that, and DEL takes the pod's addresses from those that are known, so that whoever
//! gets them next is closed again, with or without a daemon.
//!
//! ```text
//! <folder of node.json>/policy-applied/<container>@<ifname>   its policies are applied; the folder is there while policies are on
//! ```

use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabric_core::handoff::{POLICY_APPLIED, policy_file};
use fabric_netlink::{Attributes, Refusal, Request, RequestSocket};
use netlink_packet_core::NLM_F_ACK;
use netlink_sys::protocols::NETLINK_NETFILTER;
use rustix::io::Errno;

use crate::ready::wait_for;
use crate::spec::AttachmentId;

/// Where the daemon says which pods' policies are applied; `None` while network policies are off.
#[must_use]
pub fn folder(node_file: &Path) -> Option<PathBuf> {
    let folder = node_file.with_file_name(POLICY_APPLIED);
    folder.is_dir().then_some(folder)
}

/// Waits until an attachment's policies are applied. False when the time was up before; the pod is closed then, and the
/// daemon opens it whenever it comes to it.
#[must_use]
pub fn is_applied(folder: &Path, id: &AttachmentId, patience: Duration) -> bool {
    let file = folder.join(policy_file(id.container.as_str(), &id.ifname));
    wait_for(&file, patience, || file.try_exists().ok().filter(|there| *there).ok_or(())).is_ok()
}

/// `NFNL_SUBSYS_NFTABLES`, `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END` and `NFT_MSG_DELSETELEM`.
const NFTABLES: u16 = 10;
const BATCH_BEGIN: u16 = 16;
const BATCH_END: u16 = 17;
const DELETE_ELEMENTS: u16 = 14;
/// `NFPROTO_INET`.
const INET: u8 = 1;
/// `NFTA_SET_ELEM_LIST_*`, `NFTA_LIST_ELEM`, `NFTA_SET_ELEM_KEY`, `NFTA_DATA_VALUE`.
const LIST_TABLE: u16 = 1;
const LIST_SET: u16 = 2;
const LIST_ELEMENTS: u16 = 3;
const ELEMENT: u16 = 1;
const KEY: u16 = 1;
const VALUE: u16 = 1;

/// Closes the pod with these addresses: `nft delete element inet fabric-policy known4 { 10.244.3.7 }`. Addresses that are
/// not known are closed already.
///
/// # Errors
/// What the kernel says.
pub fn close(ips: &[IpAddr]) -> io::Result<()> {
    if ips.is_empty() {
        return Ok(());
    }
    let mut socket = RequestSocket::open(NETLINK_NETFILTER)?;
    for ip in ips {
        // Each alone: of a transaction all goes or nothing.
        if let Err(Refusal { error, .. }) = socket.transact(&without(*ip))
            && !matches!(Errno::from_io_error(&error), Some(Errno::NOENT))
        {
            return Err(error);
        }
    }
    Ok(())
}

fn without(ip: IpAddr) -> [Request; 3] {
    let (set, address) = match ip {
        IpAddr::V4(ip) => ("known4", ip.octets().to_vec()),
        IpAddr::V6(ip) => ("known6", ip.octets().to_vec()),
    };
    let header = |family: u8, resource: u16| {
        let [high, low] = resource.to_be_bytes();
        [family, 0, high, low]
    };
    let elements = Attributes::behind(header(INET, 0))
        .text(LIST_TABLE, "fabric-policy")
        .text(LIST_SET, set)
        .nested(LIST_ELEMENTS, |list| {
            list.nested(ELEMENT, |element| element.nested(KEY, |key| key.bytes(VALUE, &address)))
        });
    let batch = |kind| Request::raw(kind, 0, header(0, NFTABLES).to_vec());
    let delete = Request::raw(NFTABLES << 8 | DELETE_ELEMENTS, NLM_F_ACK, elements.into_bytes());
    [batch(BATCH_BEGIN), delete, batch(BATCH_END)]
}
