//! What passes between the ports of a bridge, which the packet filter of the host doesn't see by itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use fabric_core::model::IfName;
use fabric_netlink::{Attributes, Request, RequestSocket};
use netlink_sys::protocols::NETLINK_ROUTE;

/// Numbers of rtnetlink (linux/if_link.h, linux/rtnetlink.h).
const NEW_LINK: u16 = 16;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_BR_NF_CALL_IPTABLES: u16 = 36;
const IFLA_BR_NF_CALL_IP6TABLES: u16 = 37;

/// Lets the packet filter see what passes between the ports of these bridges, and of no others: `ip link set cni0 type bridge
/// nf_call_iptables 1 nf_call_ip6tables 1`. A bridge that is not there yet is passed over, and so is one that has it: whoever
/// listens to rtnetlink is told of each write.
///
/// # Errors
/// When the kernel can't do it, or refuses, with the way out.
pub fn filter_bridged(bridges: &BTreeSet<IfName>, sysctl_root: &Path) -> Result<(), String> {
    let is_to_be_set = |bridge: &&IfName| {
        let link = Path::new("/sys/class/net").join(bridge.as_str());
        let is_on =
            |setting: &str| fs::read_to_string(link.join("bridge").join(setting)).is_ok_and(|on| on.trim() == "1");
        link.exists() && !(is_on("nf_call_iptables") && is_on("nf_call_ip6tables"))
    };
    let bridges: Vec<&IfName> = bridges.iter().filter(is_to_be_set).collect();
    if bridges.is_empty() {
        return Ok(());
    }
    if !sysctl_root.join("bridge").exists() {
        return Err("the kernel's module br_netfilter is missing; load it with: modprobe br_netfilter".to_owned());
    }
    let mut socket = RequestSocket::open(NETLINK_ROUTE).map_err(|error| error.to_string())?;
    let requests: Vec<Request> = bridges.iter().map(|bridge| request(bridge)).collect();
    let answers = bridges.iter().zip(socket.write(&requests));
    let refused: Vec<String> =
        answers.filter_map(|(bridge, answer)| Some(format!("{bridge}: {}", answer.err()?.error))).collect();
    if refused.is_empty() { Ok(()) } else { Err(format!("a bridge can't be set: {}", refused.join(", "))) }
}

fn request(bridge: &IfName) -> Request {
    // A struct ifinfomsg, of which nothing is said: the name stands below.
    let body = Attributes::behind([0; 16]).text(IFLA_IFNAME, bridge.as_str()).nested(IFLA_LINKINFO, |info| {
        info.text(IFLA_INFO_KIND, "bridge").nested(IFLA_INFO_DATA, |data| {
            data.bytes(IFLA_BR_NF_CALL_IPTABLES, &[1]).bytes(IFLA_BR_NF_CALL_IP6TABLES, &[1])
        })
    });
    Request::raw(NEW_LINK, 0, body.into_bytes())
}
