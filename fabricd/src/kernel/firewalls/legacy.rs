//! Tables of iptables-legacy and ip6tables-legacy, by the two socket options through which `iptables-legacy -S` reads
//! them (linux/netfilter_ipv4/ip_tables.h, linux/netfilter_ipv6/ip6_tables.h).
//!
//! A table is one block: entries one behind the other, each with conditions, matches and a target. A hook has a first
//! entry, and the last, which is its policy. A chain that is jumped to begins behind an entry with the target `ERROR`,
//! which has its name.
//!
//! Asking for a table makes the kernel load its module, so the question is only put when `/proc/net/ip_tables_names`
//! shows that somebody uses the table already.
//!
//! Nobody is told of changes, so the blocks are read by every audit. One that is as before, but for its counters, is not
//! parsed again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use fabric_core::firewall::{Base, Chain, Decision, End, Hook, Rule, Step, Table, TableKind, Test};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::xt::{self, Info};

/// The tables that judge, and where they stand among the chains of a hook (`NF_IP_PRI_*`).
const TABLES: [(&str, i32); 4] = [("raw", -300), ("mangle", -150), ("filter", 0), ("security", 50)];
pub(in crate::kernel) const HOOKS: [Hook; 5] =
    [Hook::Prerouting, Hook::Input, Hook::Forward, Hook::Output, Hook::Postrouting];

/// Where one family has it: the socket options' numbers and the sizes of `struct ipt_entry` and `struct ip6t_entry`.
pub(in crate::kernel) struct Protocol {
    pub(in crate::kernel) kind: TableKind,
    pub(in crate::kernel) sockets: AddressFamily,
    pub(in crate::kernel) level: i32,
    /// The file that has the names of the tables that somebody uses.
    pub(in crate::kernel) in_use: &'static str,
    /// Bytes of an entry, without matches and target.
    entry: usize,
    /// Bytes of an address.
    address: usize,
}

pub(in crate::kernel) const PROTOCOLS: [Protocol; 2] = [
    Protocol {
        kind: TableKind::Iptables,
        sockets: AddressFamily::Inet,
        level: libc::IPPROTO_IP,
        in_use: "/proc/thread-self/net/ip_tables_names",
        entry: 112,
        address: 4,
    },
    Protocol {
        kind: TableKind::Ip6tables,
        sockets: AddressFamily::Inet6,
        level: libc::IPPROTO_IPV6,
        in_use: "/proc/thread-self/net/ip6_tables_names",
        entry: 168,
        address: 16,
    },
];

/// `IP(6)T_SO_GET_INFO` and `IP(6)T_SO_GET_ENTRIES`: the same for both families.
const GET_INFO: i32 = 64;
const GET_ENTRIES: i32 = 65;

/// `struct ipt_getinfo`: name, valid hooks, each hook's first entry and its policy's, how many entries, their size.
pub(in crate::kernel) const NAME: usize = 32;
pub(in crate::kernel) const FIRST_ENTRIES: usize = NAME + 4;
pub(in crate::kernel) const POLICIES: usize = FIRST_ENTRIES + 4 * HOOKS.len();
const BYTES: usize = POLICIES + 4 * HOOKS.len() + 4;
const INFO: usize = BYTES + 4;
/// `struct ipt_get_entries`: name, size, and (from a multiple of eight on) the entries.
const ENTRIES: usize = 40;
/// Behind a match's or a target's size, name and revision is what it has to say.
pub(in crate::kernel) const HEADER: usize = 32;
/// `struct xt_counters`, with which an entry's head ends.
pub(in crate::kernel) const COUNTERS: usize = 16;
/// `XT_RETURN`: verdicts below zero are `-NF_… - 1`.
const RETURN: i32 = -5;
/// A table that somebody changes between the two questions is asked for again.
pub(in crate::kernel) const TRIES: usize = 5;

/// The tables that are in use, as they were last read.
#[derive(Default)]
pub(super) struct Legacy {
    blocks: Vec<Block>,
    pub(super) tables: Vec<Table>,
}

impl Legacy {
    /// Reads them. True when any of them is another than before.
    pub(super) fn read(&mut self) -> io::Result<bool> {
        let mut blocks = vec![];
        for (place, protocol) in PROTOCOLS.iter().enumerate() {
            let names = fs::read_to_string(protocol.in_use).unwrap_or_default();
            for (name, priority) in TABLES.iter().filter(|(name, _)| names.lines().any(|used| used == *name)) {
                let read = read_table(protocol, name)?;
                blocks.extend(read.map(|(info, entries)| Block { place, name, priority: *priority, info, entries }));
            }
        }
        let differ = blocks != self.blocks;
        if differ {
            self.tables = blocks.iter().map(Block::parse).collect();
            self.blocks = blocks;
        }
        Ok(differ)
    }
}

/// A table as the kernel gives it, with its counters at zero.
#[derive(PartialEq, Eq)]
struct Block {
    /// Which of [`PROTOCOLS`].
    place: usize,
    name: &'static str,
    priority: i32,
    info: Vec<u8>,
    entries: Vec<u8>,
}

impl Block {
    fn parse(&self) -> Table {
        parse(&PROTOCOLS[self.place], self.name, self.priority, &self.info, &self.entries)
    }
}

/// `struct ipt_getinfo` of a table, and its entries.
pub(in crate::kernel) fn read_table(protocol: &Protocol, name: &str) -> io::Result<Option<(Vec<u8>, Vec<u8>)>> {
    // Any socket of the family takes these options; a raw one, which iptables itself uses, would need CAP_NET_RAW.
    let socket = socket(protocol.sockets, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    for _ in 0..TRIES {
        let mut info = vec![0; INFO];
        info[..name.len()].copy_from_slice(name.as_bytes());
        ask(&socket, protocol.level, GET_INFO, &mut info)?;
        let Some(bytes) = number(&info, BYTES) else { return Ok(None) };
        let mut block = vec![0; ENTRIES + bytes];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[NAME..NAME + 4].copy_from_slice(&u32::try_from(bytes).unwrap_or(u32::MAX).to_ne_bytes());
        match ask(&socket, protocol.level, GET_ENTRIES, &mut block) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => return Err(error),
            Ok(()) => {
                let mut entries = block.split_off(ENTRIES);
                clear_counters(protocol, &mut entries);
                return Ok(Some((info, entries)));
            }
        }
    }
    Err(io::Error::new(io::ErrorKind::Interrupted, "the table changed under every reading of it"))
}

/// Every packet raises them: `struct xt_counters`, two numbers of eight bytes, the last of an entry's head.
fn clear_counters(protocol: &Protocol, entries: &mut [u8]) {
    let mut offset = 0;
    while let Some(next) = Entry::at(protocol, entries, offset).map(|entry| entry.next()) {
        entries[offset + protocol.entry - COUNTERS..offset + protocol.entry].fill(0);
        offset = next;
    }
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

pub(in crate::kernel) fn number(bytes: &[u8], offset: usize) -> Option<usize> {
    usize::try_from(Info(bytes).long(offset)?).ok()
}

/// One entry, where it stands.
pub(in crate::kernel) struct Entry<'a> {
    pub(in crate::kernel) offset: usize,
    pub(in crate::kernel) bytes: &'a [u8],
    /// Where its target begins.
    pub(in crate::kernel) target: usize,
}

impl<'a> Entry<'a> {
    pub(in crate::kernel) fn at(protocol: &Protocol, block: &'a [u8], offset: usize) -> Option<Self> {
        let rest = block.get(offset..)?;
        // `target_offset` and `next_offset` are before the counters, which are the last of the entry.
        let offsets = protocol.entry - COUNTERS - if protocol.address == 4 { 8 } else { 12 };
        let info = Info(rest);
        let (target, next) = (usize::from(info.short(offsets)?), usize::from(info.short(offsets + 2)?));
        let bytes = rest.get(..next).filter(|_| target >= protocol.entry && next >= target + HEADER)?;
        Some(Self { offset, bytes, target })
    }

    /// Where the next one begins.
    pub(in crate::kernel) fn next(&self) -> usize {
        self.offset + self.bytes.len()
    }

    /// The target's name; a standard one has none.
    pub(in crate::kernel) fn target_name(&self) -> &'a str {
        Info(self.bytes).text(self.target + 2, 29).unwrap_or_default()
    }

    /// Below zero what happens to the packet, else where it goes on.
    pub(in crate::kernel) fn verdict(&self) -> Option<i32> {
        Info(self.bytes).long(self.target + HEADER).map(u32::cast_signed)
    }
}

fn parse(protocol: &Protocol, name: &str, priority: i32, info: &[u8], block: &[u8]) -> Table {
    let mut entries = vec![];
    let mut offset = 0;
    while let Some(entry) = Entry::at(protocol, block, offset) {
        offset = entry.next();
        entries.push(entry);
    }
    let valid = Info(info).long(NAME).unwrap_or(0);
    // Where each chain begins, and of a hook where its policy is.
    let mut starts: BTreeMap<usize, (String, Option<(Hook, usize)>)> = BTreeMap::new();
    for (position, hook) in HOOKS.iter().enumerate().filter(|(position, _)| valid & (1 << position) != 0) {
        let at = |table: usize| number(info, table + 4 * position);
        if let (Some(first), Some(policy)) = (at(FIRST_ENTRIES), at(POLICIES)) {
            starts.insert(first, (hook.to_string().to_uppercase(), Some((*hook, policy))));
        }
    }
    for entry in entries.iter().filter(|entry| entry.target_name() == "ERROR") {
        if let Some(chain) = Info(entry.bytes).text(entry.target + HEADER, 30) {
            starts.insert(entry.next(), (chain.to_owned(), None));
        }
    }
    let named: BTreeMap<usize, String> = starts.iter().map(|(offset, (name, _))| (*offset, name.clone())).collect();
    let mut chains = BTreeMap::new();
    for (offset, (chain, hook)) in starts {
        let own = || entries.iter().skip_while(|entry| entry.offset < offset);
        let end = match hook {
            Some((_, policy)) => policy,
            // Up to the next chain's entry with its name; the last of its own is a return, which changes nothing.
            None => own().find(|entry| entry.target_name() == "ERROR").map_or(block.len(), |entry| entry.offset),
        };
        let rules = own().take_while(|entry| entry.offset < end).map(|entry| rule(protocol, entry, &named)).collect();
        let base = hook.map(|(hook, policy)| {
            let verdict = entries.iter().find(|entry| entry.offset == policy).and_then(Entry::verdict);
            Base { hook, priority, drops: verdict == Some(-1) }
        });
        chains.insert(chain, Chain { base, rules });
    }
    Table { kind: protocol.kind, name: name.to_owned(), chains, sets: BTreeMap::new() }
}

fn rule(protocol: &Protocol, entry: &Entry<'_>, chains: &BTreeMap<usize, String>) -> Rule {
    let mut steps = header(protocol, entry.bytes).unwrap_or_else(|| vec![Step::Opaque("a rule's head".to_owned())]);
    let mut comment = None;
    let mut at = protocol.entry;
    while at < entry.target {
        let info = Info(&entry.bytes[at..entry.target]);
        let size = info.short(0).map_or(0, usize::from);
        let (Some(name), Some(revision), Some(data)) =
            (info.text(2, 29), info.byte(31), size.checked_sub(HEADER).and_then(|len| info.bytes(HEADER, len)))
        else {
            steps.push(Step::Opaque("a match".to_owned()));
            break;
        };
        if name == "comment" {
            comment = Info(data).text(0, data.len()).map(str::to_owned);
        }
        steps.extend(xt::conditions(name, revision.into(), data, protocol.address == 16));
        at += size;
    }
    steps.extend(target(protocol, entry, chains));
    Rule { handle: None, comment, steps }
}

fn target(protocol: &Protocol, entry: &Entry<'_>, chains: &BTreeMap<usize, String>) -> Vec<Step> {
    let info = Info(&entry.bytes[entry.target..]);
    let decided = |decision| vec![Step::Decide(decision)];
    match entry.target_name() {
        "" => match entry.verdict() {
            Some(-1) => decided(Decision::Drop("drop")),
            Some(-2) => decided(Decision::Accept),
            Some(RETURN) => decided(Decision::Return),
            Some(to) if usize::try_from(to) == Ok(entry.next()) => vec![],
            Some(to) => match usize::try_from(to).ok().and_then(|to| chains.get(&to)) {
                Some(chain) if goes(protocol, entry.bytes) => decided(Decision::Goto(chain.clone())),
                Some(chain) => decided(Decision::Jump(chain.clone())),
                None => decided(Decision::Elsewhere("a verdict".to_owned())),
            },
            None => vec![],
        },
        name => {
            let revision = info.byte(31).map_or(0, u32::from);
            xt::target(name, revision, info.bytes(HEADER, info.0.len() - HEADER).unwrap_or_default())
        }
    }
}

/// Whether the entry goes to a chain without coming back (`IPT_F_GOTO`, `IP6T_F_GOTO`).
fn goes(protocol: &Protocol, entry: &[u8]) -> bool {
    let (at, bit) = if protocol.address == 4 { (82, 2) } else { (131, 4) };
    entry.get(at).is_some_and(|flags| flags & bit != 0)
}

/// The conditions of an entry's head: `struct ipt_ip`, `struct ip6t_ip6`.
fn header(protocol: &Protocol, bytes: &[u8]) -> Option<Vec<Step>> {
    let (info, len) = (Info(bytes), protocol.address);
    let names = 4 * len;
    let behind = names + 64;
    let (number, flags, inverted) = match protocol.address {
        4 => (info.short(behind)?, info.byte(behind + 2)?, info.byte(behind + 3)?),
        _ => (info.short(behind)?, info.byte(behind + 3)?, info.byte(behind + 4)?),
    };
    let mut steps = vec![];
    let mut test = |test, bit: u8| steps.push(Step::Test { test, inverted: inverted & bit != 0 });
    for (end, at, bit) in [(End::Source, 0, 0x08), (End::Target, len, 0x10)] {
        let (address, mask) = (info.bytes(at, len)?.to_vec(), info.bytes(at + 2 * len, len)?.to_vec());
        if mask.iter().any(|byte| *byte != 0) || inverted & bit != 0 {
            test(Test::Address { end, address, mask }, bit);
        }
    }
    for (end, at, bit) in [(End::Source, names, 0x01), (End::Target, names + 16, 0x02)] {
        let mask = info.bytes(at + 32, 16)?.to_vec();
        // The plus of `cni+` is in the name, and beyond what counts.
        let name: Vec<u8> = info.bytes(at, 16)?.iter().zip(&mask).map(|(byte, counts)| byte & counts).collect();
        if mask.iter().any(|byte| *byte != 0) {
            test(Test::Interface { end, name, mask }, bit);
        }
    }
    // IP6T_F_PROTO; of IPv4 zero is any protocol.
    if number != 0 && (len == 4 || flags & 1 != 0) {
        test(Test::Protocol(u8::try_from(number).ok()?), 0x40);
    }
    // IPT_F_FRAG
    if len == 4 && (flags & 1 != 0 || inverted & 0x20 != 0) {
        test(Test::Fragment, 0x20);
    }
    // IP6T_F_TOS
    if len == 16 && flags & 2 != 0 {
        steps.push(Step::Opaque("--tos".to_owned()));
    }
    Some(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rule of `iptables-legacy -S`, as `struct ipt_entry` and a standard target, that has counted so many packets.
    fn entry(verdict: i32, packets: u64) -> Vec<u8> {
        let mut entry = vec![0; 112 + 40];
        entry[88..90].copy_from_slice(&112_u16.to_ne_bytes());
        entry[90..92].copy_from_slice(&152_u16.to_ne_bytes());
        entry[96..104].copy_from_slice(&packets.to_ne_bytes());
        entry[112 + HEADER..112 + HEADER + 4].copy_from_slice(&verdict.to_ne_bytes());
        entry
    }

    #[test]
    fn packets_that_were_counted_are_no_change_and_another_verdict_is() {
        let block = |entries: [Vec<u8>; 2]| {
            let mut entries = entries.concat();
            clear_counters(&PROTOCOLS[0], &mut entries);
            entries
        };
        let before = block([entry(-1, 0), entry(-2, 7)]);
        assert!(before == block([entry(-1, 400), entry(-2, 8)]));
        assert!(before != block([entry(-1, 0), entry(-1, 7)]));
    }
}
