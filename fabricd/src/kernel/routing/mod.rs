//! rtnetlink(7): links, addresses, FDB, neighbours, nexthop objects, routes and the rules that choose between route tables.
//!
//! [`encode`] makes messages of steps; [`tables`] and [`routes`] read what is there and tell what of it is ours
//! (docs/kernel-state.md); [`fib`] answers as the kernel would where a packet goes.

pub mod bridge;
pub(super) mod encode;
pub mod fib;
pub(super) mod nexthop;
pub(super) mod routes;
pub(super) mod tables;

pub use self::routes::{RouteLookup, route_of_packet, route_to};

use fabric_netlink::Frame;
use netlink_packet_route::RouteNetlinkMessage;

/// A frame as a message of rtnetlink, if it is one that the codec understands. A message that it does not (a newer kernel, an
/// odd driver) must not stop us from seeing the others.
pub(super) fn route_message(frame: &Frame<'_>) -> Option<RouteNetlinkMessage> {
    let message = frame.decode();
    message.inspect_err(|error| tracing::debug!(kind = frame.kind, %error, "netlink message not understood")).ok()
}
