//! Finds what would drop the pods' packets on their way through this host: base chains on the forward hook whose
//! policy is drop, as Docker and many a firewall leave behind. They are reported, never changed.
//!
//! nftables (and iptables-nft, which is nftables underneath) is asked over netlink. Legacy iptables is a table of its
//! own in the kernel: see [`super::iptables_legacy`].

use std::io;

use fabric_core::model::Family;
use netlink_packet_core::parse_u32_be;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::socket::RequestSocket;
use super::wire::{Frame, Request, attributes};
use super::{ForwardDrop, KernelError, iptables_legacy, tables};

/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETCHAIN` (linux/netfilter/nf_tables.h).
const GET_CHAIN: u16 = 10 << 8 | 4;
/// `NFTA_CHAIN_*`.
const TABLE: u16 = 1;
const NAME: u16 = 3;
const HOOK: u16 = 4;
const POLICY: u16 = 5;
/// `NFTA_HOOK_HOOKNUM`; of the address families 2 is the forward hook.
const HOOK_NUMBER: u16 = 1;
const FORWARD: u32 = 2;
/// `NF_DROP`.
const DROP: u32 = 0;

/// Our own tables are named so.
const OURS: &str = "fabric";

/// `nft list chains`, those that drop what is forwarded, and `iptables-legacy -S FORWARD`.
pub(super) fn drops() -> Result<Vec<ForwardDrop>, KernelError> {
    let mut found = nftables().map_err(tables::reading("nftables chains"))?;
    found.extend(iptables_legacy::drops().map_err(tables::reading("iptables-legacy FORWARD chain"))?);
    found.sort();
    Ok(found)
}

fn nftables() -> io::Result<Vec<ForwardDrop>> {
    let mut socket = match RequestSocket::open(NETLINK_NETFILTER) {
        Ok(socket) => socket,
        // A kernel without netfilter drops nothing.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(vec![]),
        Err(error) => return Err(error),
    };
    // A `struct nfgenmsg`: family (0 is all), version, resource id.
    match socket.dump(&Request::raw(GET_CHAIN, 0, vec![0; 4]), chain) {
        // Nor does one without nftables, whose module nobody has loaded.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(vec![]),
        found => Ok(found?.into_iter().flatten().collect()),
    }
}

/// What a chain drops: nothing, or what it drops of each of its families.
fn chain(frame: &Frame<'_>) -> Option<Vec<ForwardDrop>> {
    let (word, families): (_, &[Family]) = match i32::from(*frame.body.first()?) {
        libc::NFPROTO_INET => ("inet", &Family::ALL),
        libc::NFPROTO_IPV4 => ("ip", &[Family::V4]),
        libc::NFPROTO_IPV6 => ("ip6", &[Family::V6]),
        _ => return None,
    };
    let body = frame.body.get(4..)?;
    let value = |wanted| attributes(body).find(|(kind, _)| *kind == wanted).map(|(_, value)| value);
    let text = |wanted| value(wanted).and_then(|v| std::str::from_utf8(v).ok()).map(|t| t.trim_end_matches('\0'));
    let (table, name) = (text(TABLE)?, text(NAME)?);
    let hook = attributes(value(HOOK)?).find(|(kind, _)| *kind == HOOK_NUMBER).and_then(|(_, v)| parse_u32_be(v).ok());
    let policy = value(POLICY).and_then(|v| parse_u32_be(v).ok());
    let drops = hook == Some(FORWARD) && policy == Some(DROP) && table != OURS;
    let chain = format!("{word} {table} {name}");
    drops.then(|| {
        families
            .iter()
            .map(|family| ForwardDrop { family: *family, chain: chain.clone(), remedy: remedy(&chain, *family) })
            .collect()
    })
}

/// In the words of the tool that made the chain: `filter FORWARD` of one family is iptables-nft's.
fn remedy(chain: &str, family: Family) -> String {
    let address = match (chain, family) {
        ("ip filter FORWARD", _) => return iptables("iptables"),
        ("ip6 filter FORWARD", _) => return iptables("ip6tables"),
        (_, Family::V4) => "ip",
        (_, Family::V6) => "ip6",
    };
    ["saddr", "daddr"].map(|end| format!("nft insert rule {chain} {address} {end} {{network}} accept")).join("\n")
}

/// Two rules at the head of iptables' FORWARD chain.
pub(super) fn iptables(command: &str) -> String {
    ["-s", "-d"].map(|end| format!("{command} -I FORWARD {end} {{network}} -j ACCEPT")).join("\n")
}
