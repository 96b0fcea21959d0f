//! The bridge that the CNI plugins made for this node's pods. The plugins never take it away, so `--cleanup` does.

use std::net::IpAddr;

use futures::TryStreamExt as _;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};

use super::KernelError;

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bridge {
    /// There is none with a gateway address of this node's subnets.
    Absent,
    /// It had no port, and is gone.
    Removed {
        /// Its name.
        name: String,
    },
    /// Pods are plugged in.
    InUse {
        /// Its name.
        name: String,
        /// How many of them.
        ports: usize,
    },
}

/// `ip link delete cni0`, if that has one of these addresses and no port.
///
/// # Errors
/// When netlink can't be spoken, or the kernel refuses.
pub async fn remove_unless_used(gateways: &[IpAddr]) -> Result<Bridge, KernelError> {
    let gone = |error: std::io::Error| KernelError::Disconnected(error.to_string());
    let told = |error: rtnetlink::Error| KernelError::Disconnected(error.to_string());
    let (connection, handle, _) = rtnetlink::new_connection().map_err(gone)?;
    let connection = tokio::spawn(connection);

    let links: Vec<LinkMessage> = handle.link().get().execute().try_collect().await.map_err(told)?;
    let addresses: Vec<_> = handle.address().get().execute().try_collect().await.map_err(told)?;
    let has_gateway = |index: u32| {
        addresses.iter().filter(|message| message.header.index == index).any(|message| {
            message
                .attributes
                .iter()
                .any(|attribute| matches!(attribute, AddressAttribute::Address(ip) if gateways.contains(ip)))
        })
    };
    let Some(bridge) = links.iter().find(|link| is_bridge(link) && has_gateway(link.header.index)) else {
        connection.abort();
        return Ok(Bridge::Absent);
    };
    let index = bridge.header.index;
    let name = name(bridge);
    let ports = links.iter().filter(|link| link.attributes.contains(&LinkAttribute::Controller(index))).count();
    let outcome = if ports == 0 {
        handle.link().del(index).execute().await.map_err(told)?;
        Bridge::Removed { name }
    } else {
        Bridge::InUse { name, ports }
    };
    connection.abort();
    Ok(outcome)
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(
        |attribute| matches!(attribute, LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Bridge))),
    )
}

fn name(link: &LinkMessage) -> String {
    let names = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    names.unwrap_or_default()
}
