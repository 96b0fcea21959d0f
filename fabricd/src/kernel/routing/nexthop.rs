//! Codec of nexthop objects (`RTM_*NEXTHOP`, linux/nexthop.h), which the netlink crates lack: a `struct nhmsg` of eight
//! bytes (family, scope, protocol, one reserved, flags) and attributes.

use std::net::IpAddr;

use fabric_core::model::Family;
use fabric_core::state::{NexthopId, ROUTE_PROTOCOL};
use fabric_netlink::{Attributes, Frame, Request, attribute};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, parse_ip, parse_u32};

pub(in crate::kernel) const RTM_NEWNEXTHOP: u16 = 104;
pub(in crate::kernel) const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;

const HEADER: usize = 8;
const ID: u16 = 1;
const OIF: u16 = 5;
const GATEWAY: u16 = 6;
/// `RTNH_F_ONLINK`: the gateway counts as reachable on the device, whatever the addresses there.
const ONLINK: u32 = 4;

/// A nexthop object as a dump shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::kernel) struct NexthopRow {
    pub(in crate::kernel) id: NexthopId,
    pub(in crate::kernel) protocol: u8,
    pub(in crate::kernel) gateway: Option<IpAddr>,
    pub(in crate::kernel) device: Option<u32>,
}

/// `ip nexthop add id ID via GATEWAY dev DEV onlink proto 250`, or `replace`.
pub(in crate::kernel) fn set(id: NexthopId, gateway: IpAddr, device: u32, replace: bool) -> Request {
    let family = match Family::of(gateway) {
        Family::V4 => libc::AF_INET,
        Family::V6 => libc::AF_INET6,
    };
    let mut header = vec![u8::try_from(family).unwrap_or_default(), 0, ROUTE_PROTOCOL, 0];
    header.extend(ONLINK.to_ne_bytes());
    let body = Attributes::behind(header).bytes(ID, &id.0.to_ne_bytes());
    let body = match gateway {
        IpAddr::V4(ip) => body.bytes(GATEWAY, &ip.octets()),
        IpAddr::V6(ip) => body.bytes(GATEWAY, &ip.octets()),
    };
    let body = body.bytes(OIF, &device.to_ne_bytes()).into_bytes();
    Request::raw(RTM_NEWNEXTHOP, NLM_F_CREATE | if replace { NLM_F_REPLACE } else { NLM_F_EXCL }, body)
}

/// `ip nexthop del id ID`.
pub(in crate::kernel) fn delete(id: NexthopId) -> Request {
    let body = Attributes::behind([0; HEADER]).bytes(ID, &id.0.to_ne_bytes());
    Request::raw(RTM_DELNEXTHOP, 0, body.into_bytes())
}

/// `ip nexthop show`.
pub(in crate::kernel) fn all() -> Request {
    Request::raw(RTM_GETNEXTHOP, 0, vec![0; HEADER])
}

/// A nexthop object out of a dump or an event.
pub(in crate::kernel) fn decode(frame: &Frame<'_>) -> Option<NexthopRow> {
    let body = frame.body.get(HEADER..)?;
    let number = |wanted| attribute(body, wanted).and_then(|value| parse_u32(value).ok());
    Some(NexthopRow {
        id: NexthopId(number(ID)?),
        protocol: frame.body[2],
        gateway: attribute(body, GATEWAY).and_then(|value| parse_ip(value).ok()),
        device: number(OIF),
    })
}

#[cfg(test)]
mod tests {
    use fabric_netlink::frames;

    use super::*;

    #[test]
    fn nexthop_survives_its_encoding_in_both_families() {
        for gateway in ["10.244.7.0", "2001:db8:7::"] {
            let gateway: IpAddr = gateway.parse().expect("valid");
            let mut datagram = vec![];
            set(NexthopId(0xFA00_0007), gateway, 12, false).put(1, 0, &mut datagram);
            let row = frames(&datagram).next().and_then(|frame| decode(&frame)).expect("decodes");
            let want = NexthopRow {
                id: NexthopId(0xFA00_0007),
                protocol: ROUTE_PROTOCOL,
                gateway: Some(gateway),
                device: Some(12),
            };
            assert_eq!(row, want);
        }
    }
}
