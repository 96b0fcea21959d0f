//! Whether an address is a Service's, by the rules that kube-proxy makes for it.

use std::net::IpAddr;

use fabric_netlink::{Request, RequestSocket};
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::attributes::{Attributes, Nfnetlink as _};
use super::uapi::{GET_ELEMENTS, GET_RULE, message};

/// True when kube-proxy's rules name the address: with iptables-nft the chain `KUBE-SERVICES` of `nat`, with nftables the
/// map `service-ips`. Of iptables-legacy nothing is seen here.
#[must_use]
pub fn is_service(ip: IpAddr) -> bool {
    let Ok(mut socket) = RequestSocket::open(NETLINK_NETFILTER) else { return false };
    let (family, octets) = match ip {
        IpAddr::V4(ip) => (libc::NFPROTO_IPV4, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::NFPROTO_IPV6, ip.octets().to_vec()),
    };
    let start = || Attributes::message(family.try_into().expect("a small number"), 0);
    // NFTA_RULE_TABLE, NFTA_RULE_CHAIN; NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET
    [
        Request::raw(message(GET_RULE), 0, start().text(1, "nat").text(2, "KUBE-SERVICES").into_bytes()),
        Request::raw(message(GET_ELEMENTS), 0, start().text(1, "kube-proxy").text(2, "service-ips").into_bytes()),
    ]
    .iter()
    .any(|request| {
        // An address in a rule or an element is an attribute, so it stands at a multiple of four.
        let names =
            |body: &[u8]| body.chunks(4).collect::<Vec<_>>().windows(octets.len() / 4).any(|w| w.concat() == octets);
        let found = socket.dump(request, |frame| names(frame.body).then_some(()));
        found.is_ok_and(|found| !found.is_empty())
    })
}
