//! Who has which address: host-local's IPAM state, in host-local's own form.
//!
//! ```text
//! <dataDir>/<network>/10.244.3.7            "<container>\r\n<interface>", for each address that is given out
//! <dataDir>/<network>/last_reserved_ip.0    where the search in the first set of ranges goes on
//! <dataDir>/<network>/lock                  locked (`flock`) by whoever reads or writes
//! ```
//!
//! So this code and the plugin can take turns under running pods (plugins' ipam/host-local/backend/disk). One thing
//! is done better: a file gets the name of its address only when it is whole, so that a full disk or a kill leaves
//! no address that belongs to nobody.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fabric_core::model::{Family, from_bits, to_bits};
use ipnetwork::IpNetwork;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};

use crate::spec::{AttachmentId, Identifier};
use crate::state;

/// Where host-local keeps its IPAM state unless told otherwise.
pub const DATA_DIR: &str = "/var/lib/cni/networks";

/// How long others may hold the lock. They hold it for a millisecond.
const PATIENCE: Duration = Duration::from_secs(30);

/// Our own name for an address that is being written.
const DRAFT: &str = ".draft";

/// Addresses to choose from: `ipam.ranges[][]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Range {
    /// What they lie in; its length goes with the address.
    pub subnet: IpNetwork,
    /// The first, if not the subnet's second.
    pub range_start: Option<IpAddr>,
    /// The last, if not the subnet's last (but for IPv4's broadcast address).
    pub range_end: Option<IpAddr>,
    /// The gateway, if not the subnet's second address. Nobody gets it.
    pub gateway: Option<IpAddr>,
}

/// Why no address was given.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// None is left.
    #[error("no IP addresses available in range set: {0}; delete pods, or give the node a larger subnet")]
    Exhausted(String),
    /// The one that was asked for is somebody's.
    #[error("requested IP address {0} is not available in range set {1}")]
    Taken(IpAddr, String),
    /// The one that was asked for is not for pods.
    #[error("requested IP address {0} is the gateway's")]
    Gateway(IpAddr),
    /// The attachment has one.
    #[error("{0} has been allocated to {1}, duplicate allocation is not allowed; DEL it before the next ADD")]
    Duplicate(IpAddr, AttachmentId),
    /// The range makes no sense.
    #[error("{0}")]
    Senseless(String),
    /// The disk refused.
    #[error("cannot write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// An address that is given out, and to whom; `None` when its file doesn't tell.
pub type Entry = (IpAddr, Option<AttachmentId>);

/// The ipam of one network, locked.
#[derive(Debug)]
pub struct IpamState {
    dir: PathBuf,
    _lock: File,
}

/// A range, checked, with all that may be left out filled in.
struct Span {
    range: Range,
    first: u128,
    last: u128,
    gateway: IpAddr,
}

impl IpamState {
    /// Opens the ipam of `network`, which need not exist yet, and waits for its lock.
    ///
    /// # Errors
    /// What the disk says, or that somebody holds the lock for too long.
    pub fn open(data_dir: &Path, network: &Identifier) -> io::Result<Self> {
        let dir = data_dir.join(network.as_str());
        let path = dir.join("lock");
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o644).open(&path);
        let lock = match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&dir)?;
                open()?
            }
            other => other?,
        };
        let lock = state::lock(lock, PATIENCE)?.ok_or_else(|| {
            let held = format!("another process has held its lock for {PATIENCE:?}; fuser -v shows it");
            io::Error::new(io::ErrorKind::TimedOut, held)
        })?;
        Ok(Self { dir, _lock: lock })
    }

    /// As [`IpamState::open`], but `None` when there is no such ipam.
    ///
    /// # Errors
    /// As for [`IpamState::open`].
    pub fn existing(data_dir: &Path, network: &Identifier) -> io::Result<Option<Self>> {
        if data_dir.join(network.as_str()).is_dir() { Self::open(data_dir, network).map(Some) } else { Ok(None) }
    }

    /// Gives `owner` an address of a set of ranges, number `set` of the configuration; one of `requested` if any is
    /// in the set. Returns it with its prefix length, and its gateway.
    ///
    /// # Errors
    /// [`AllocateError`]; nothing is taken then.
    pub fn reserve(
        &self,
        owner: &AttachmentId,
        set: usize,
        ranges: &[Range],
        requested: &[IpAddr],
    ) -> Result<(IpNetwork, IpAddr), AllocateError> {
        let spans = ranges.iter().map(Span::of).collect::<Result<Vec<_>, _>>()?;
        let given = |ip: IpAddr, span: &Span| {
            let address = IpNetwork::new(ip, span.range.subnet.prefix()).expect("the subnet's own length");
            (address, span.gateway)
        };
        if let Some((ip, span)) = requested.iter().find_map(|ip| Some((*ip, spans.iter().find(|s| s.has(*ip))?))) {
            if ip == span.gateway {
                return Err(AllocateError::Gateway(ip));
            }
            return if self.take(ip, owner)? {
                Ok(given(ip, span))
            } else {
                Err(AllocateError::Taken(ip, names(ranges)))
            };
        }
        let cursor = self.dir.join(format!("last_reserved_ip.{set}"));
        let last = fs::read_to_string(&cursor).ok().and_then(|text| text.trim().parse().ok());
        for (ip, span) in candidates(&spans, last) {
            if ip != span.gateway && self.take(ip, owner)? {
                // Without it the next search merely begins elsewhere.
                let _ = overwrite(&cursor, &ip.to_string());
                return Ok(given(ip, span));
            }
        }
        Err(AllocateError::Exhausted(names(ranges)))
    }

    /// Frees all addresses of `owner` and returns them.
    ///
    /// # Errors
    /// What the disk says.
    pub fn release(&self, owner: &AttachmentId) -> io::Result<Vec<IpAddr>> {
        Ok(self.release_where(|_, holder| holder == Some(owner))?.into_iter().map(|(ip, _)| ip).collect())
    }

    /// Frees the addresses that `doomed` picks. A holder is `None` when the file doesn't tell: since the ipam
    /// is locked, nobody is about to write it.
    ///
    /// # Errors
    /// What the disk says.
    pub fn release_where(&self, doomed: impl Fn(IpAddr, Option<&AttachmentId>) -> bool) -> io::Result<Vec<Entry>> {
        // A kill may have left it, and nobody is writing it now.
        let _ = fs::remove_file(self.dir.join(DRAFT));
        let entries = self.entries()?.into_iter();
        let freed: Vec<Entry> = entries.filter(|(ip, holder)| doomed(*ip, holder.as_ref())).collect();
        freed.iter().try_for_each(|(ip, _)| fs::remove_file(self.dir.join(ip.to_string())))?;
        Ok(freed)
    }

    /// The addresses of `owner`.
    ///
    /// # Errors
    /// What the disk says.
    pub fn held_by(&self, owner: &AttachmentId) -> io::Result<BTreeSet<IpAddr>> {
        Ok(self.entries()?.into_iter().filter(|(_, holder)| holder.as_ref() == Some(owner)).map(|(ip, _)| ip).collect())
    }

    /// All addresses that are given out, and to whom.
    ///
    /// # Errors
    /// What the disk says.
    pub fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if let Some(ip) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                entries.push((ip, holder(&fs::read_to_string(entry.path()).unwrap_or_default())));
            }
        }
        Ok(entries)
    }

    /// Takes an address; false when it is somebody's.
    fn take(&self, ip: IpAddr, owner: &AttachmentId) -> Result<bool, AllocateError> {
        let (path, draft) = (self.dir.join(ip.to_string()), self.dir.join(DRAFT));
        if path.exists() {
            return Ok(false);
        }
        let written = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
            write!(file, "{}\r\n{}", owner.container, owner.ifname)?;
            renameat_with(CWD, &draft, CWD, &path, RenameFlags::NOREPLACE)?;
            Ok(true)
        };
        written().map_err(|source| AllocateError::Io { path, source })
    }
}

impl Span {
    /// As host-local fills it in (plugins' ipam/host-local/backend/allocator, `Range.Canonicalize`).
    fn of(range: &Range) -> Result<Self, AllocateError> {
        let subnet = range.subnet;
        let bits = if subnet.is_ipv4() { 32 } else { 128 };
        if subnet.ip() != subnet.network() {
            let msg = format!("subnet {subnet} has host bits set; for example it could be {}", subnet.network());
            return Err(AllocateError::Senseless(msg));
        }
        if subnet.prefix() > bits - 2 {
            return Err(AllocateError::Senseless(format!("subnet {subnet} is too small to have addresses for pods")));
        }
        let (base, end) = (to_bits(subnet.network()), to_bits(last_of(subnet)));
        let span = Self {
            first: range.range_start.map_or(base + 1, to_bits),
            last: range.range_end.map_or(if subnet.is_ipv4() { end - 1 } else { end }, to_bits),
            gateway: range.gateway.unwrap_or_else(|| from_bits(Family::of(subnet.ip()), base + 1)),
            range: range.clone(),
        };
        if !(base..=end).contains(&span.first) || !(span.first..=end).contains(&span.last) {
            let msg = format!("rangeStart and rangeEnd do not lie in this order in subnet {subnet}");
            return Err(AllocateError::Senseless(msg));
        }
        Ok(span)
    }

    fn has(&self, ip: IpAddr) -> bool {
        ip.is_ipv4() == self.range.subnet.is_ipv4() && (self.first..=self.last).contains(&to_bits(ip))
    }
}

/// Replaces a file's content in place. To cut it first, as `fs::write` does, makes ext4 force it to the disk at once
/// (ext4(5), `auto_da_alloc`): 4 ms for what may as well be lost.
fn overwrite(path: &Path, content: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)?;
    file.write_all(content.as_bytes())?;
    file.set_len(content.len() as u64)
}

/// Every address once, from the one after `last` on and around.
fn candidates(spans: &[Span], last: Option<IpAddr>) -> impl Iterator<Item = (IpAddr, &Span)> {
    let at = last.and_then(|last| Some((spans.iter().position(|span| span.has(last))?, to_bits(last))));
    let (start, after) = at.unwrap_or((0, 0));
    let whole = move |index: usize| {
        let span = &spans[index % spans.len()];
        (span.first..=span.last).map(move |n| (n, span))
    };
    let rest = spans.get(start).into_iter().flat_map(move |_| whole(start)).filter(move |(n, _)| *n > after);
    let again = (start + 1..=start + spans.len()).flat_map(whole);
    rest.chain(again).map(|(n, span)| (from_bits(Family::of(span.gateway), n), span))
}

fn last_of(subnet: IpNetwork) -> IpAddr {
    match subnet {
        IpNetwork::V4(subnet) => subnet.broadcast().into(),
        IpNetwork::V6(subnet) => subnet.broadcast().into(),
    }
}

fn names(ranges: &[Range]) -> String {
    ranges.iter().map(|range| range.subnet.to_string()).collect::<Vec<_>>().join(",")
}

/// Whose an address is, by the content of its file.
#[must_use]
pub fn holder(text: &str) -> Option<AttachmentId> {
    let (container, ifname) = text.trim().split_once("\r\n")?;
    AttachmentId::owning(container, ifname)
}

#[cfg(test)]
#[path = "host_local_tests.rs"]
mod tests;
