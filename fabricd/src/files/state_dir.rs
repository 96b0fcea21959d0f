//! What the daemon remembers over its own end, and the machine's: files in the state folder.
//!
//! ```text
//! lease.state   the config in force, this node's subnets, and by what its record in the store is known again
//! peers.state   all leases, as the store last showed them
//! ```
//!
//! With these a daemon that starts while the store is away brings the data plane up, and one that starts with it goes on
//! with its lease without a word to the store. Each file is a line with version and checksum, then JSON:
//!
//! ```text
//! fabricd-state 1 9c3f0b5a7d24e681
//! {"node":"node-1", … }
//! ```
//!
//! Members are only ever added, and unknown ones passed over, so that the previous version can read it; the version is
//! raised when that can't be kept up. A file that can't be used is set aside under another name, and the daemon starts as
//! if there was none: the store knows it all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use fabric_core::handoff::BOOT_ID;
use fabric_core::leases::{Entry, LeaseSet};
use fabric_core::model::{NodeName, Subnet, stable_hash};
use fabric_core::network::{NetworkConfig, NetworkDocument};
use fabric_core::record::{Backend, LeaseKey, Record};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{error, warn};

use crate::atomic_file::{FileError, replace};
use crate::kubernetes::addresses;
use crate::lease::{Holding, Mark, Own, Remembered};
use crate::status::view::View;

/// Default folder.
pub const STATE_DIR: &str = "/var/lib/fabric";

const VERSION: u32 = 1;
const MAGIC: &str = "fabricd-state";
const LEASE: &str = "lease.state";
const PEERS: &str = "peers.state";

/// How long the peers are not written again, for each of them: 5,000 are more than a megabyte, may change all the time,
/// and are written every ten seconds; a few are written at once.
const REST_PER_PEER: Duration = Duration::from_millis(2);

/// Why a file can't be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Unusable {
    #[error("it is empty")]
    Empty,
    #[error("it is no state file of fabricd")]
    Foreign,
    #[error("it has version {0}, this fabricd reads version {VERSION}")]
    Version(u32),
    #[error("it is damaged: its checksum is another")]
    Damaged,
    #[error("it can't be understood: {0}")]
    Content(String),
    #[error("it belongs to the node {0}; was this disk copied?")]
    OtherNode(String),
}

/// The state folder of one node.
#[derive(Clone, Debug)]
pub struct Disk {
    dir: PathBuf,
    node: NodeName,
}

/// What a daemon finds at its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// The config that was in force.
    pub network: Option<NetworkConfig>,
    /// The lease.
    pub lease: Option<Remembered>,
    /// All leases.
    pub leases: Option<Arc<LeaseSet>>,
}

#[derive(Serialize, Deserialize)]
struct LeaseState {
    node: NodeName,
    network: NetworkDocument,
    subnets: String,
    record: Value,
    epoch: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mark: Option<MarkState>,
    /// Seconds since this boot at which the lease ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expires: Option<(String, u64)>,
    /// What pods had that a person has cut off: addresses and subnets.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    left: Vec<Subnet>,
}

#[derive(Serialize, Deserialize)]
struct MarkState {
    mod_revision: i64,
    lease_id: i64,
    ttl_seconds: u64,
}

#[derive(Serialize)]
struct PeersState<'a> {
    node: &'a NodeName,
    revision: i64,
    #[serde(serialize_with = "one_by_one")]
    leases: &'a LeaseSet,
}

#[derive(Deserialize)]
struct StoredPeers {
    node: NodeName,
    revision: i64,
    leases: Vec<StoredEntry>,
}

/// Taken out of its JSON at once: the trees of thousands would be tens of megabytes.
#[derive(Deserialize)]
#[serde(from = "LeaseEntry")]
struct StoredEntry(Entry);

#[derive(Serialize, Deserialize)]
struct LeaseEntry {
    key: String,
    /// As it is in the store.
    record: Box<RawValue>,
    create_revision: i64,
    mod_revision: i64,
}

impl From<LeaseEntry> for StoredEntry {
    fn from(LeaseEntry { key, record, create_revision, mod_revision }: LeaseEntry) -> Self {
        Self(Entry { key, value: record.get().into(), create_revision, mod_revision })
    }
}

/// Made into JSON and written before the next is, for the same reason.
fn one_by_one<S: Serializer>(leases: &LeaseSet, to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(leases.iter().map(|lease| LeaseEntry {
        key: lease.key.encode(),
        record: serde_json::from_slice(&lease.record.encode()).expect("just encoded"),
        create_revision: lease.create_revision,
        mod_revision: lease.mod_revision,
    }))
}

/// The clock that goes on through a restart of the daemon: seconds since which boot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uptime {
    /// [`BOOT_ID`].
    pub boot: String,
    /// `/proc/uptime`; time in suspension counts.
    pub seconds: u64,
}

impl Uptime {
    /// Now.
    ///
    /// # Errors
    /// When `/proc` isn't there.
    pub fn now() -> io::Result<Self> {
        let boot = fs::read_to_string(BOOT_ID)?.trim().to_owned();
        let uptime = fs::read_to_string("/proc/uptime")?;
        let seconds = uptime.split('.').next().and_then(|seconds| seconds.parse().ok());
        Ok(Self { boot, seconds: seconds.ok_or(io::ErrorKind::InvalidData)? })
    }
}

impl Disk {
    /// The state of `node` in `dir`.
    #[must_use]
    pub fn new(dir: &Path, node: &NodeName) -> Self {
        Self { dir: dir.into(), node: node.clone() }
    }

    /// All that is there. What can't be used is set aside, with a word in the log.
    #[must_use]
    pub fn load(&self, now: &Uptime) -> State {
        let mut state = State::default();
        if let Some((network, lease)) = self.read(LEASE, |lease: LeaseState| self.understand(lease, now)) {
            // Under another name, in another boot, it may be a copy of another node's disk.
            let is_ours = lease.formerly.is_none() || lease.this_boot;
            (state.network, state.lease) = (is_ours.then_some(network), Some(lease));
        }
        let former = state.lease.as_ref().filter(|lease| lease.this_boot).and_then(|lease| lease.formerly.clone());
        state.leases = self.read(PEERS, |peers: StoredPeers| {
            if peers.node != self.node && Some(&peers.node) != former.as_ref() {
                return Err(Unusable::OtherNode(peers.node.to_string()));
            }
            let entries = peers.leases.into_iter().map(|StoredEntry(entry)| entry).collect();
            Ok(Arc::new(LeaseSet::snapshot(&LeaseSet::default(), entries, peers.revision)))
        });
        if let (Some(lease), Some(leases)) = (&mut state.lease, &state.leases) {
            lease.revision = lease.revision.max(leases.revision());
        }
        state
    }

    /// Remembers the config in force and the lease, if they are known.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn save_lease(&self, network: &NetworkConfig, holding: &Holding, now: &Uptime) -> Result<(), FileError> {
        let Some(Own { key, endpoints, epoch }) = &holding.own else { return Ok(()) };
        let record = Record { backend: Backend::Vxlan(*endpoints), owner: None, unknown: Map::new() };
        let left = holding.expires.map(|end| end.saturating_duration_since(Instant::now()).as_secs());
        let mark = holding.mark.map(|Mark { mod_revision, lease_id, ttl }| MarkState {
            mod_revision,
            lease_id,
            ttl_seconds: ttl.as_secs(),
        });
        self.write(
            LEASE,
            &LeaseState {
                node: self.node.clone(),
                network: network.document(),
                subnets: key.encode(),
                record: serde_json::from_slice(&record.encode()).expect("just encoded"),
                epoch: *epoch,
                mark,
                // A lease that was lost has ended now, whatever it said before.
                expires: Some((now.boot.clone(), now.seconds + left.unwrap_or_default())),
                left: holding.left.clone(),
            },
        )
    }

    /// Remembers all leases.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn save_peers(&self, leases: &LeaseSet) -> Result<(), FileError> {
        self.write(PEERS, &PeersState { node: &self.node, revision: leases.revision(), leases })
    }

    /// Removes all of it; that there is nothing is no error.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn remove(&self) -> Result<(), FileError> {
        for file in [LEASE, PEERS, addresses::FILE].map(|name| self.dir.join(name)) {
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(FileError { file, error }),
                _ => {}
            }
        }
        Ok(())
    }

    fn understand(&self, lease: LeaseState, now: &Uptime) -> Result<(NetworkConfig, Remembered), Unusable> {
        let wrong = |error: &dyn std::fmt::Display| Unusable::Content(error.to_string());
        let network = lease.network.validate().map_err(|e| wrong(&e))?;
        let key = LeaseKey::decode(&lease.subnets).map_err(|e| wrong(&e))?;
        let record = Record::decode(&key, lease.record.to_string().as_bytes()).map_err(|e| wrong(&e))?;
        let mark = lease.mark.map(|MarkState { mod_revision, lease_id, ttl_seconds }| Mark {
            mod_revision,
            lease_id,
            ttl: Duration::from_secs(ttl_seconds),
        });
        let ends = lease.expires.filter(|(boot, _)| *boot == now.boot);
        let this_boot = ends.is_some();
        let formerly = Some(lease.node).filter(|name| *name != self.node);
        if let Some(former) = &formerly {
            warn!(node = %self.node, %former, this_boot, "this node had another name when the state on disk was written");
        }
        let left = ends.map(|(_, end)| Duration::from_secs(end.saturating_sub(now.seconds)));
        let own = Own { key, endpoints: record.endpoints(), epoch: lease.epoch };
        let revision = mark.map_or(0, |mark| mark.mod_revision);
        let expires = left.map(|left| Instant::now() + left);
        let left = lease.left;
        Ok((network, Remembered { own, mark, expires, revision, left, formerly, this_boot }))
    }

    fn read<T: DeserializeOwned, U>(&self, name: &str, understand: impl FnOnce(T) -> Result<U, Unusable>) -> Option<U> {
        let file = self.dir.join(name);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                warn!(file = %file.display(), %error, "state on disk can't be read; starting without it");
                return None;
            }
        };
        match decode(&bytes).and_then(understand) {
            Ok(found) => Some(found),
            Err(reason) => {
                let aside = file.with_extension("unusable");
                let moved = fs::rename(&file, &aside).is_ok();
                error!(file = %file.display(), %reason, moved, aside = %aside.display(), "state on disk can't be used; starting without it");
                None
            }
        }
    }

    fn write(&self, name: &str, content: &impl Serialize) -> Result<(), FileError> {
        replace(&self.dir.join(name), &encode(content), 0o600)
    }
}

/// The checksum is put in last: what thousands of peers make is not copied for it.
fn encode(content: &impl Serialize) -> Vec<u8> {
    let head = |checksum: u64| format!("{MAGIC} {VERSION} {checksum:016x}\n");
    let mut file = head(0).into_bytes();
    let start = file.len();
    serde_json::to_writer(&mut file, content).expect("plain members");
    let head = head(stable_hash(&file[start..]));
    file[..start].copy_from_slice(head.as_bytes());
    file
}

fn decode<T: DeserializeOwned>(file: &[u8]) -> Result<T, Unusable> {
    if file.is_empty() {
        return Err(Unusable::Empty);
    }
    let end = file.iter().position(|byte| *byte == b'\n').ok_or(Unusable::Foreign)?;
    let (head, json) = (&file[..end], &file[end + 1..]);
    let head = std::str::from_utf8(head).map_err(|_| Unusable::Foreign)?;
    let words: Vec<&str> = head.split(' ').collect();
    let [MAGIC, version, checksum] = words[..] else { return Err(Unusable::Foreign) };
    match version.parse() {
        Ok(VERSION) => {}
        Ok(version) => return Err(Unusable::Version(version)),
        Err(_) => return Err(Unusable::Foreign),
    }
    if checksum != format!("{:016x}", stable_hash(json)) {
        return Err(Unusable::Damaged);
    }
    serde_json::from_slice(json).map_err(|error| Unusable::Content(error.to_string()))
}

/// Keeps the disk up to date with what the loop sees, until the loop is gone. What comes from the disk itself is not
/// written again.
pub async fn watch_view(disk: Disk, mut view: watch::Receiver<Arc<View>>) {
    let mut lease: Option<(NetworkConfig, Holding)> = None;
    let mut peers: Option<Arc<LeaseSet>> = None;
    let mut peers_due = Instant::now();
    loop {
        let now = view.borrow_and_update().clone();
        let holding = now.network.map(|network| (network, now.holding.clone()));
        if !now.from_disk && holding.is_some() && holding != lease {
            lease.clone_from(&holding);
            let disk = disk.clone();
            write(move || match (holding, Uptime::now()) {
                (Some((network, holding)), Ok(uptime)) => disk.save_lease(&network, &holding, &uptime),
                _ => Ok(()),
            })
            .await;
        }
        let changed = !now.from_disk && now.leases.is_some() && now.leases != peers;
        if changed && peers_due <= Instant::now() {
            peers.clone_from(&now.leases);
            let count = now.leases.as_ref().map_or(0, |leases| leases.len());
            peers_due = Instant::now() + REST_PER_PEER.saturating_mul(count.try_into().unwrap_or(u32::MAX));
            let (disk, leases) = (disk.clone(), now.leases.clone());
            write(move || leases.map_or(Ok(()), |leases| disk.save_peers(&leases))).await;
        }
        tokio::select! {
            changed = view.changed() => if changed.is_err() { return },
            () = sleep_until(peers_due), if changed && peers_due > Instant::now() => {}
        }
    }
}

/// Writes on a thread that may wait for the disk. What fails is said, and tried again with the next change: nothing
/// depends on it until a restart.
async fn write(write: impl FnOnce() -> Result<(), FileError> + Send + 'static) {
    if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
        warn!(%error, "state not kept on disk; a restart while the store is away would miss it");
    }
}

#[cfg(test)]
#[path = "state_dir_tests.rs"]
mod tests;
