//! Whether pods may be added to this node: what the daemon says in `node.json`.
//!
//! That the daemon is alive is not asked: while it is upgraded, what it said last holds.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use fabric_core::handoff::{NodeFile, NotReady, Readiness};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

/// The largest node file that is read, in bytes.
const MAX_NODE_FILE: u64 = 1024 * 1024;

/// The node file at `path` if pods may be added, else why not.
///
/// # Errors
/// The reason, in words for the runtime's log.
pub fn ready_node(path: &Path) -> Result<NodeFile, String> {
    let at = path.display();
    let node = read(path).map_err(|e| format!("cannot use {at}: {e}; is fabricd running on this node?"))?;
    match &node.readiness {
        Readiness::Ready => Ok(node),
        Readiness::NotReady { code, reason } => {
            let what = match code {
                NotReady::Starting => "still starting",
                NotReady::Quarantine => "in quarantine",
                NotReady::Failed | NotReady::Other => "not ready",
            };
            Err(format!("node {} is {what}: {reason:.1000} (from {at})", node.node))
        }
    }
}

/// As [`ready_node`], but waits for a node that isn't ready yet. The daemon replaces the file, so the folder tells.
///
/// # Errors
/// The reason at the end of the time.
pub fn await_ready_node(path: &Path, patience: Duration) -> Result<NodeFile, String> {
    wait_for(path, patience, || ready_node(path))
}

/// Looks at what a file says, or that it is there, until that is fine or the time is up.
///
/// # Errors
/// What was wrong at the end of the time.
pub fn wait_for<T, E>(path: &Path, patience: Duration, look: impl Fn() -> Result<T, E>) -> Result<T, E> {
    let found = look();
    if found.is_ok() || patience.is_zero() {
        return found;
    }
    let deadline = Instant::now() + patience;
    // Without a watch (too many of them) the first word stands, as it does when the time is up.
    let Ok(events) = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK) else { return found };
    let nearest = || path.ancestors().skip(1).find(|folder| folder.is_dir());
    loop {
        // Watched before it is read, so that no change falls between. While the folder doesn't exist its parent tells.
        let folder = nearest();
        let changes = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE;
        if folder.is_none_or(|folder| inotify::add_watch(&events, folder, changes).is_err()) {
            return look();
        }
        // Of a folder that was made before its parent was watched, the parent says nothing more.
        if nearest() != folder {
            continue;
        }
        let found = look();
        let left = deadline.saturating_duration_since(Instant::now());
        if found.is_ok() || left.is_zero() || !wait(&events, left).unwrap_or(false) {
            return found;
        }
    }
}

/// Waits for an event, so long, and takes all that have come. False when there was none.
fn wait(events: &rustix::fd::OwnedFd, left: Duration) -> io::Result<bool> {
    let left = Timespec::try_from(left).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&left))? == 0 {
        return Ok(false);
    }
    let mut buffer = [0; 4096];
    while rustix::io::read(events, &mut buffer).is_ok_and(|bytes| bytes > 0) {}
    Ok(true)
}

/// The node file at `path`, whether pods may be added or not.
#[must_use]
pub fn known_node(path: &Path) -> Option<NodeFile> {
    read(path).ok()
}

fn read(path: &Path) -> Result<NodeFile, Box<dyn std::error::Error>> {
    let mut json = Vec::new();
    File::open(path)?.take(MAX_NODE_FILE).read_to_end(&mut json)?;
    Ok(NodeFile::decode(&json)?)
}
