//! The bridges that the CNI plugins made for this node's pods. The plugins never remove them, so `--cleanup` does.

use std::collections::BTreeSet;

use fabric_core::model::IfName;
use futures::TryStreamExt as _;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use crate::kernel::KernelError;

/// `ip link delete BRIDGE` for those of `names` that are bridges and have no port. Returns them.
///
/// # Errors
/// When netlink can't be spoken, or the kernel refuses.
pub async fn remove_unused(names: &BTreeSet<IfName>) -> Result<Vec<IfName>, KernelError> {
    let gone = |error: std::io::Error| KernelError::Disconnected(error.to_string());
    let told = |error: rtnetlink::Error| KernelError::Disconnected(error.to_string());
    let (connection, handle, _) = rtnetlink::new_connection().map_err(gone)?;
    let connection = tokio::spawn(connection);
    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.map_err(told)?;
    let mut removed = vec![];
    for link in links.iter().filter(|link| is_bridge(link)) {
        let index = link.header.index;
        let is_used = links.iter().any(|port| port.attributes.contains(&LinkAttribute::Controller(index)));
        if let Some(name) = name(link).filter(|name| names.contains(name) && !is_used) {
            handle.link().del(index).execute().await.map_err(told)?;
            removed.push(name);
        }
    }
    connection.abort();
    Ok(removed)
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(
        |attribute| matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Bridge))),
    )
}

fn name(link: &LinkMessage) -> Option<IfName> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => name.parse().ok(),
        _ => None,
    })
}
