//! Legacy iptables: its FORWARD chain's policy, by the two socket options through which `iptables-legacy -S` reads it
//! (linux/netfilter_ipv4/ip_tables.h).
//!
//! Asking for a table makes the kernel load its module, so the question is only put when
//! `/proc/net/ip_tables_names` shows that somebody uses the table already.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use fabric_core::model::Family;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::ForwardDrop;
use super::forward::iptables;

/// `NF_INET_FORWARD`, and how many hooks there are.
const FORWARD: usize = 2;
const HOOKS: usize = 5;
const TABLE_NAME: [u8; 32] = {
    let mut name = [0; 32];
    name.split_at_mut(6).0.copy_from_slice(b"filter");
    name
};

/// Where one family has it: the socket options' numbers and the sizes of `struct ipt_entry` and `struct ip6t_entry`.
struct Protocol {
    family: Family,
    sockets: AddressFamily,
    level: i32,
    command: &'static str,
    in_use: &'static str,
    entry: usize,
}

const PROTOCOLS: [Protocol; 2] = [
    Protocol {
        family: Family::V4,
        sockets: AddressFamily::Inet,
        level: libc::IPPROTO_IP,
        command: "iptables-legacy",
        in_use: "/proc/thread-self/net/ip_tables_names",
        entry: 112,
    },
    Protocol {
        family: Family::V6,
        sockets: AddressFamily::Inet6,
        level: libc::IPPROTO_IPV6,
        command: "ip6tables-legacy",
        in_use: "/proc/thread-self/net/ip6_tables_names",
        entry: 168,
    },
];

/// `IP(6)T_SO_GET_INFO` and `IP(6)T_SO_GET_ENTRIES`: the same for both families.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;

/// `struct ipt_getinfo`: name, valid hooks, each hook's first entry and its policy's, how many entries, their size.
const INFO_SIZE: usize = 32 + 4 * (1 + HOOKS + HOOKS + 2);
const INFO_POLICY: usize = 32 + 4 * (1 + HOOKS);
const INFO_BYTES: usize = INFO_SIZE - 4;
/// `struct ipt_get_entries`: name, size, and (from a multiple of eight on) the entries.
const ENTRIES: usize = 40;
/// `struct xt_standard_target`: a header of 32 bytes and the verdict. A policy of drop is `-NF_DROP - 1`.
const TARGET: usize = 32;
const DROP: i32 = -1;

/// The families whose FORWARD chain drops what no rule accepts.
pub(super) fn drops() -> io::Result<Vec<ForwardDrop>> {
    let mut found = vec![];
    for protocol in &PROTOCOLS {
        if in_use(protocol) && policy(protocol)? == Some(DROP) {
            let chain = format!("{} FORWARD", protocol.command);
            found.push(ForwardDrop { family: protocol.family, chain, remedy: iptables(protocol.command) });
        }
    }
    Ok(found)
}

fn in_use(protocol: &Protocol) -> bool {
    fs::read_to_string(protocol.in_use).is_ok_and(|names| names.lines().any(|name| name == "filter"))
}

/// The verdict at the end of FORWARD, as the kernel stores it.
fn policy(protocol: &Protocol) -> io::Result<Option<i32>> {
    // Any socket of the family takes these options; a raw one, which iptables itself uses, would need CAP_NET_RAW.
    let socket = socket(protocol.sockets, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut info = [0; INFO_SIZE];
    info[..TABLE_NAME.len()].copy_from_slice(&TABLE_NAME);
    ask(&socket, protocol.level, GET_INFO, &mut info)?;
    let (Some(offset), Some(bytes)) = (number(&info, INFO_POLICY + 4 * FORWARD), number(&info, INFO_BYTES)) else {
        return Ok(None);
    };
    let mut entries = vec![0; ENTRIES + bytes];
    entries[..TABLE_NAME.len()].copy_from_slice(&TABLE_NAME);
    entries[32..36].copy_from_slice(&u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
    // Somebody who changes the table between the two questions makes the sizes differ: EAGAIN, and the next look.
    ask(&socket, protocol.level, GET_ENTRIES, &mut entries)?;
    let verdict = entries.get(ENTRIES + offset + protocol.entry + TARGET..).and_then(|rest| rest.first_chunk());
    Ok(verdict.map(|bytes| i32::from_ne_bytes(*bytes)))
}

/// `getsockopt` with a question in the buffer that the answer overwrites.
fn ask(socket: &OwnedFd, level: i32, option: i32, buffer: &mut [u8]) -> io::Result<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).map_err(io::Error::other)?;
    // SAFETY: the pointer and the length describe `buffer`, of which the kernel reads and writes at most that much.
    #[expect(unsafe_code, reason = "no crate offers a getsockopt whose buffer carries a question")]
    let answer =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn number(bytes: &[u8], offset: usize) -> Option<usize> {
    let bytes = bytes.get(offset..)?.first_chunk()?;
    usize::try_from(u32::from_ne_bytes(*bytes)).ok()
}
