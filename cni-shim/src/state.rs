//! What was attached, remembered in files, so that DEL needs nothing else.
//!
//! ```text
//! <stateDir>/<network>/<container>@<ifname>.json     one attachment; '@' is in no container ID
//! <stateDir>/<network>/.<container>@<ifname>.<pid>   being written, or left by a crash; DEL and GC sweep it
//! <stateDir>/.versions/<plugin>.json                 which spec versions a delegate speaks
//! ```
//!
//! ADD writes the file before the delegate runs and gives it its name only when it is whole: so a killed ADD leaves
//! either no file and nothing attached, or a file from which DEL can undo whatever was done. When the delegate has
//! ended, ADD appends a line: the host's ends of the pod's veths, by which a sweep knows that the pod is gone, and the
//! pod's addresses, by which the daemon keeps it to them.
//!
//! Nothing is forced to the disk. A power cut that loses the file ends the pod too, and what is left of that, its
//! address, the sweep frees (docs/decisions/0009-cni-state-is-not-forced-to-the-disk.md).
//!
//! The open file carries a lock (`flock`), and the delegate inherits it. When a runtime kills the shim in the
//! middle of an ADD, the delegate goes on alone for a moment; a DEL that ran now would free an address that
//! is only about to be taken. Since the delegate still holds the lock, DEL waits for its end.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fabric_core::attachments::SavedPod;
use fabric_core::handoff::{Attached, BOOT_ID};
use fabric_core::model::stable_hash;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::{FdFlags, fcntl_setfd};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{CniError, Code};
use crate::spec::{AttachmentId, Identifier};

/// The largest state file that is read, in bytes: a network configuration and a little more.
const MAX_STATE: u64 = 2 * 1024 * 1024;

/// How long DEL waits for a delegate that a killed ADD left running. With the delegate's own deadline on top it
/// is less than the two minutes that a kubelet waits.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The ID of this boot, if the kernel tells it.
pub fn boot_id() -> Option<String> {
    Some(fs::read_to_string(BOOT_ID).ok()?.trim().to_owned())
}

/// What is remembered of an attachment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    /// Which one.
    #[serde(flatten)]
    pub id: AttachmentId,
    /// The container's network namespace.
    pub netns: Option<PathBuf>,
    /// The pod of Kubernetes that the container is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<SavedPod>,
    /// What the delegate was told.
    pub config: Map<String, Value>,
    /// How it was attached; `None` while ADD is at work, or if it was cut off.
    #[serde(skip)]
    pub attached: Option<Attached>,
}

impl Saved {
    /// The content of a state file; `None` when it is cut, empty, spoiled or something else.
    #[must_use]
    pub fn decode(content: &[u8]) -> Option<Self> {
        let FirstLine { saved, checksum } =
            serde_json::from_slice(content.split(|byte| *byte == b'\n').next()?).ok()?;
        if checksum.is_some_and(|checksum| checksum != saved.checksum()) {
            return None;
        }
        Some(Self { attached: Attached::decode(content), ..saved })
    }

    /// What ADD writes before the delegate runs.
    fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let mut line = serde_json::to_vec(&FirstLine { checksum: Some(self.checksum()), saved: self.clone() })?;
        line.push(b'\n');
        Ok(line)
    }

    fn checksum(&self) -> String {
        format!("{:016x}", stable_hash(serde_json::to_string(self).expect("plain members").as_bytes()))
    }
}

/// The first line of a state file. A bad disk can leave JSON that is still JSON: a DEL that used it would free nothing.
#[derive(Serialize, Deserialize)]
struct FirstLine {
    #[serde(flatten)]
    saved: Saved,
    /// Missing in files of earlier builds.
    #[serde(default)]
    checksum: Option<String>,
}

/// The attachments of one network.
#[derive(Debug)]
pub struct Attachments {
    /// The network.
    pub network: Identifier,
    dir: PathBuf,
}

/// An attachment's file, open and locked.
#[derive(Debug)]
pub struct Held {
    file: File,
    path: PathBuf,
}

impl Attachments {
    /// Those of `network`.
    #[must_use]
    pub fn of(state_dir: &Path, network: &Identifier) -> Self {
        Self { dir: state_dir.join(network.as_str()), network: network.clone() }
    }

    /// Those of each network that anything is saved of.
    ///
    /// # Errors
    /// Code 5 when the folder can't be read. One that doesn't exist is empty.
    pub fn of_all_networks(state_dir: &Path) -> Result<Vec<Self>, CniError> {
        let folders = list(state_dir)?.into_iter().filter(|name| state_dir.join(name).is_dir());
        let networks = folders.filter_map(|name| Identifier::try_from(name).ok());
        Ok(networks.map(|network| Self::of(state_dir, &network)).collect())
    }

    fn path(&self, id: &AttachmentId) -> PathBuf {
        self.dir.join(format!("{}@{}.json", id.container, id.ifname))
    }

    /// How the names of files that are being written for `id` begin.
    fn draft_prefix(id: &AttachmentId) -> String {
        format!(".{}@{}.", id.container, id.ifname)
    }

    /// Remembers an attachment that is about to be made.
    ///
    /// # Errors
    /// Code 103 when there is one already, which stays as it is; 5 when the disk refuses.
    pub fn create(&self, saved: &Saved) -> Result<Held, CniError> {
        let path = self.path(&saved.id);
        let draft = self.dir.join(format!("{}{}", Self::draft_prefix(&saved.id), std::process::id()));
        let written = self.write(saved, &draft, &path);
        written.map_err(|e| {
            let _ = fs::remove_file(&draft);
            if e.kind() == io::ErrorKind::AlreadyExists {
                let msg = format!("{} is attached already; DEL it before the next ADD", saved.id);
                return CniError::new(Code::AlreadyAttached, msg).with_details(format!("{} exists", path.display()));
            }
            let msg = format!("cannot save the attachment to {}: {e}; nothing was attached", path.display());
            CniError::new(Code::Io, msg)
        })
    }

    fn write(&self, saved: &Saved, draft: &Path, path: &Path) -> io::Result<Held> {
        if path.try_exists()? {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        fs::create_dir_all(&self.dir)?;
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(draft)?;
        file.lock()?;
        file.write_all(&saved.encode()?)?;
        // A plain rename would replace the file of an ADD that runs at the same time.
        renameat_with(CWD, draft, CWD, path, RenameFlags::NOREPLACE)?;
        Held::inherited(file, path.to_owned())
    }

    /// The attachment's file if there is one, after waiting for whoever works on it, up to `patience`.
    ///
    /// # Errors
    /// Code 11 when somebody works on it for longer; 5 when it can't be opened.
    pub fn open(&self, id: &AttachmentId, patience: Duration) -> Result<Option<Held>, CniError> {
        let path = self.path(id);
        let failed = |e: io::Error| CniError::new(Code::Io, format!("cannot open {}: {e}", path.display()));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        let file = lock(file, patience).map_err(failed)?.ok_or_else(|| {
            let msg = format!("an earlier request for {id} has not ended after {patience:?}");
            let hint = format!("to see the processes that hold it: fuser -v {}", path.display());
            CniError::new(Code::TryAgainLater, msg).with_details(hint)
        })?;
        // Whoever held it before may have removed it.
        if file.metadata().map_err(failed)?.nlink() == 0 {
            return Ok(None);
        }
        Held::inherited(file, path.clone()).map(Some).map_err(failed)
    }

    /// What is saved of an attachment, without waiting for whoever works on it.
    #[must_use]
    pub fn read(&self, id: &AttachmentId) -> Option<Saved> {
        decode(&File::open(self.path(id)).ok()?)
    }

    /// Whether anything is saved of an attachment.
    #[must_use]
    pub fn exists(&self, id: &AttachmentId) -> bool {
        self.path(id).exists()
    }

    /// Which attachments are remembered, by the names of their files. Foreign names are passed over.
    ///
    /// # Errors
    /// Code 5 when the folder can't be read. One that doesn't exist is empty.
    pub fn all(&self) -> Result<Vec<AttachmentId>, CniError> {
        Ok(self.file_names()?.iter().filter_map(|name| parse_stem(name.strip_suffix(".json")?)).collect())
    }

    /// Removes what crashes left half written, of one attachment or of all.
    pub fn sweep_drafts(&self, id: Option<&AttachmentId>) {
        let prefix = id.map_or_else(|| ".".to_owned(), Self::draft_prefix);
        // What can't be listed or removed now is removed another time: nothing depends on it.
        for name in self.file_names().unwrap_or_default().iter().filter(|name| name.starts_with(&prefix)) {
            let path = self.dir.join(name);
            if File::open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    /// What is saved of each of them; `None` where that can't be read.
    ///
    /// # Errors
    /// As for [`Attachments::all`].
    pub fn read_all(&self) -> Result<Vec<(AttachmentId, Option<Saved>)>, CniError> {
        Ok(self.all()?.into_iter().map(|id| (id.clone(), self.read(&id))).collect())
    }

    fn file_names(&self) -> Result<Vec<String>, CniError> {
        list(&self.dir)
    }
}

/// The names in a folder; one that is missing has none.
///
/// # Errors
/// Code 5 when it can't be read.
pub fn list(dir: &Path) -> Result<Vec<String>, CniError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(CniError::new(Code::Io, format!("cannot list {}: {e}", dir.display()))),
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// Locks a file and returns it; `None` when somebody holds its lock for longer than `patience`. Waits in a thread,
/// since `flock` knows no deadline; nearly always there is nothing to wait for.
///
/// # Errors
/// What the system says.
pub fn lock(file: File, patience: Duration) -> io::Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::Error(e)) => return Err(e),
        Err(TryLockError::WouldBlock) if patience.is_zero() => return Ok(None),
        Err(TryLockError::WouldBlock) => {}
    }
    let (done, outcome) = mpsc::channel();
    thread::Builder::new().spawn(move || done.send(file.lock().map(|()| file)))?;
    outcome.recv_timeout(patience).map_or(Ok(None), |locked| locked.map(Some))
}

fn decode(file: &File) -> Option<Saved> {
    let mut content = Vec::new();
    file.take(MAX_STATE).read_to_end(&mut content).ok()?;
    Saved::decode(&content)
}

fn parse_stem(stem: &str) -> Option<AttachmentId> {
    let (container, ifname) = stem.split_once('@')?;
    Some(AttachmentId { container: container.to_owned().try_into().ok()?, ifname: ifname.parse().ok()? })
}

impl Held {
    /// Lets processes that are started from here on inherit the file and its lock.
    fn inherited(file: File, path: PathBuf) -> io::Result<Self> {
        fcntl_setfd(&file, FdFlags::empty())?;
        Ok(Self { file, path })
    }

    /// Remembers how the pod was attached. Without it the attachment is merely not swept, and its port not guarded.
    pub fn attached(&self, attached: &Attached) {
        let _ = (&self.file).write_all(&attached.encode());
    }

    /// What was saved; `None` when the file is cut, empty or something else.
    #[must_use]
    pub fn saved(&self) -> Option<Saved> {
        decode(&self.file)
    }

    /// Removes the file: there is nothing left to undo.
    ///
    /// # Errors
    /// Code 5 when the disk refuses.
    pub fn forget(self) -> Result<(), CniError> {
        fs::remove_file(&self.path).map_err(|e| {
            let msg = format!("detached, but cannot remove {}: {e}; DEL again when it can be", self.path.display());
            CniError::new(Code::Io, msg)
        })
    }
}

/// Replaces a small file by rename. For caches: it isn't forced to the disk.
///
/// # Errors
/// What the file system says; the old file is then still there.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let draft = path.with_extension(std::process::id().to_string());
    fs::write(&draft, content).and_then(|()| fs::rename(&draft, path)).inspect_err(|_| {
        let _ = fs::remove_file(&draft);
    })
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
