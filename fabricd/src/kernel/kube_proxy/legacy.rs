//! What kube-proxy has in iptables-legacy.
//!
//! Such a table is read and written as one block, so the block is written without the chains and without the entries that
//! lead to them, and every jump is set to where its target is then. It is what `iptables-legacy-restore` does; its lock is
//! held meanwhile. The kernel refuses a block if another has as many entries no longer (`EAGAIN`), and gives the counters of
//! the block that goes, which are added to the entries that stay.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{SockFlag, SockType, socket};

use super::names::{IPTABLES, SERVICES, is_its_chain};
use crate::kernel::firewalls::legacy::{
    COUNTERS, Entry, FIRST_ENTRIES, HEADER, HOOKS, NAME, POLICIES, PROTOCOLS, Protocol, TRIES, number, read_table,
};
use crate::kernel::firewalls::xt::Info;

/// The lock of all programs of iptables-legacy (`XT_LOCK_NAME`).
const LOCK: &str = "/run/xtables.lock";
/// How long to wait for it, and from one try to the next: others have it for the time of one command.
const LOCK_TIME: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// `IP(6)T_SO_SET_REPLACE` and `IP(6)T_SO_SET_ADD_COUNTERS`: the same for both families.
const REPLACE: i32 = 64;
const ADD_COUNTERS: i32 = 65;
/// `struct ipt_replace`: name, valid hooks, how many entries, their size, each hook's first entry and its policy's, how many
/// counters there are, where the kernel puts them, entries.
const HEAD: usize = 96;
const VALID: usize = NAME;
const COUNT: usize = NAME + 4;
const SIZE: usize = NAME + 8;
const STARTS: usize = NAME + 12;
const OLD: usize = STARTS + 8 * HOOKS.len();
const WHERE: usize = OLD + 4;
/// `struct xt_counters_info`: name, how many, and (from a multiple of eight on) the counters.
const COUNTERS_HEAD: usize = 40;

/// A table without what is kube-proxy's.
struct Rest {
    /// The entries, with jumps to where their targets are now.
    entries: Vec<u8>,
    /// Where each hook begins, and its policy: `struct ipt_replace` has them one behind the other.
    starts: Vec<u8>,
    /// Which entries were kept, and of how many.
    kept: Vec<usize>,
    before: usize,
    /// How many chains are gone.
    chains: usize,
}

/// Whether kube-proxy is or was here.
///
/// # Errors
/// When a table can't be read.
pub(super) fn is_here() -> io::Result<bool> {
    for protocol in PROTOCOLS.iter().filter(|protocol| uses(protocol, "nat")) {
        if read_table(protocol, "nat")?
            .is_some_and(|(_, block)| chains(protocol, &block).any(|chain| chain == SERVICES))
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Removes its chains, and what leads to them; says in words what there was.
///
/// # Errors
/// When another program has the lock, when a table can't be read, or the kernel refuses.
pub(super) fn remove() -> io::Result<Vec<String>> {
    let mut removed = vec![];
    let mut lock = None;
    for (protocol, table) in PROTOCOLS.iter().flat_map(|protocol| IPTABLES.map(|table| (protocol, table))) {
        if !uses(protocol, table) {
            continue;
        }
        if lock.is_none() {
            lock = Some(take_lock()?);
        }
        let chains = remove_from(protocol, table)?;
        if chains > 0 {
            removed.push(format!("{chains} chains of {} {table}", protocol.kind));
        }
    }
    Ok(removed)
}

/// Whether somebody uses a table: to ask for one that nobody uses would make it.
fn uses(protocol: &Protocol, table: &str) -> bool {
    fs::read_to_string(protocol.in_use).unwrap_or_default().lines().any(|name| name == table)
}

/// None where there can be no such file: then nobody else has it either.
#[expect(clippy::disallowed_methods, reason = "no task waits on this thread: it was made for blocking calls")]
fn take_lock() -> io::Result<Option<Flock<File>>> {
    let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(LOCK);
    let Ok(mut file) = file else { return Ok(None) };
    let end = Instant::now() + LOCK_TIME;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(Some(lock)),
            Err((unlocked, _)) if Instant::now() < end => file = unlocked,
            Err((_, errno)) => {
                let told = format!("another program changes rules of iptables-legacy, see: fuser -v {LOCK} ({errno})");
                return Err(io::Error::new(io::ErrorKind::WouldBlock, told));
            }
        }
        sleep(LOCK_PAUSE);
    }
}

/// How many chains there were.
fn remove_from(protocol: &Protocol, table: &str) -> io::Result<usize> {
    for _ in 0..TRIES {
        let Some((info, block)) = read_table(protocol, table)? else { return Ok(0) };
        let Some(rest) = without_its_chains(protocol, &info, &block) else { return Ok(0) };
        match replace(protocol, table, &info, &rest) {
            // Somebody has changed it meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {}
            Err(error) => return Err(error),
            Ok(()) => return Ok(rest.chains),
        }
    }
    Err(io::Error::new(io::ErrorKind::Interrupted, "the table changed under every writing of it"))
}

fn entries<'a>(protocol: &'a Protocol, block: &'a [u8]) -> impl Iterator<Item = Entry<'a>> {
    let mut offset = 0;
    std::iter::from_fn(move || {
        let entry = Entry::at(protocol, block, offset)?;
        offset = entry.next();
        Some(entry)
    })
}

/// The names of the chains that are jumped to.
fn chains<'a>(protocol: &'a Protocol, block: &'a [u8]) -> impl Iterator<Item = &'a str> {
    entries(protocol, block).filter_map(|entry| chain_name(&entry))
}

/// The name of the chain that begins behind an entry.
fn chain_name<'a>(entry: &Entry<'a>) -> Option<&'a str> {
    (entry.target_name() == "ERROR").then(|| Info(entry.bytes).text(entry.target + HEADER, 30))?
}

/// The table without its chains; `None` when it has none.
fn without_its_chains(protocol: &Protocol, info: &[u8], block: &[u8]) -> Option<Rest> {
    let all: Vec<Entry<'_>> = entries(protocol, block).collect();
    let (mut is_in_its_chain, mut starts) = (false, BTreeSet::new());
    let mut kept: Vec<usize> = vec![];
    for (place, entry) in all.iter().enumerate() {
        if let Some(name) = chain_name(entry) {
            is_in_its_chain = is_its_chain(name);
            if is_in_its_chain {
                starts.insert(entry.next());
            }
        }
        if !is_in_its_chain {
            kept.push(place);
        }
    }
    if starts.is_empty() {
        return None;
    }
    let target = |entry: &Entry<'_>| {
        let verdict = entry.verdict().filter(|_| entry.target_name().is_empty())?;
        usize::try_from(verdict).ok()
    };
    kept.retain(|place| target(&all[*place]).is_none_or(|target| !starts.contains(&target)));
    // Where an entry is now, or the next one that was kept.
    let mut places: Vec<(usize, usize)> = vec![];
    let mut length = 0;
    for entry in kept.iter().map(|place| &all[*place]) {
        places.push((entry.offset, length));
        length += entry.bytes.len();
    }
    let now = |before: usize| {
        let place = places.partition_point(|(offset, _)| *offset < before);
        places.get(place).map_or(length, |(_, offset)| *offset)
    };
    let mut rest = Vec::with_capacity(length);
    for entry in kept.iter().map(|place| &all[*place]) {
        let start = rest.len();
        rest.extend_from_slice(entry.bytes);
        if let Some(target) = target(entry) {
            // To the entry behind it: it only counts.
            let target = if target == entry.next() { rest.len() } else { now(target) };
            let at = start + entry.target + HEADER;
            rest[at..at + 4].copy_from_slice(&i32::try_from(target).ok()?.to_ne_bytes());
        }
    }
    let mut begins = vec![];
    for table in [FIRST_ENTRIES, POLICIES] {
        for hook in 0..HOOKS.len() {
            let is_valid = Info(info).long(NAME).unwrap_or(0) & (1 << hook) != 0;
            let at = number(info, table + 4 * hook).filter(|_| is_valid).map_or(0, now);
            begins.extend(u32::try_from(at).ok()?.to_ne_bytes());
        }
    }
    Some(Rest { entries: rest, starts: begins, kept, before: all.len(), chains: starts.len() })
}

fn replace(protocol: &Protocol, table: &str, info: &[u8], rest: &Rest) -> io::Result<()> {
    let number = |number: usize| u32::try_from(number).map(u32::to_ne_bytes).map_err(io::Error::other);
    let mut counters = vec![0_u8; rest.before * COUNTERS];
    let mut head = vec![0; HEAD];
    head[..table.len()].copy_from_slice(table.as_bytes());
    head[VALID..VALID + 4].copy_from_slice(&info[NAME..NAME + 4]);
    head[COUNT..COUNT + 4].copy_from_slice(&number(rest.kept.len())?);
    head[SIZE..SIZE + 4].copy_from_slice(&number(rest.entries.len())?);
    head[STARTS..OLD].copy_from_slice(&rest.starts);
    head[OLD..WHERE].copy_from_slice(&number(rest.before)?);
    let at = counters.as_mut_ptr().expose_provenance();
    head[WHERE..WHERE + size_of::<usize>()].copy_from_slice(&at.to_ne_bytes());
    head.extend(&rest.entries);
    // The buffer of counters is as long as the head says, and outlives the call.
    set(protocol, REPLACE, &head)?;
    let mut adds = vec![0; COUNTERS_HEAD];
    adds[..table.len()].copy_from_slice(table.as_bytes());
    adds[NAME..NAME + 4].copy_from_slice(&number(rest.kept.len())?);
    for place in &rest.kept {
        adds.extend(&counters[place * COUNTERS..(place + 1) * COUNTERS]);
    }
    // The rules are as they should be; that they count from zero is no reason to fail.
    let _ = set(protocol, ADD_COUNTERS, &adds);
    Ok(())
}

fn set(protocol: &Protocol, option: i32, value: &[u8]) -> io::Result<()> {
    let socket = socket(protocol.sockets, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the pointer and the length describe `value`, which the kernel reads; where it says that the kernel is to put
    // the counters, `replace` keeps a buffer of that size.
    #[expect(unsafe_code, reason = "no crate offers a setsockopt of any bytes")]
    let answer = unsafe { libc::setsockopt(socket.as_raw_fd(), protocol.level, option, value.as_ptr().cast(), length) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
