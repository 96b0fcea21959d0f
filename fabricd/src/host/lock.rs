//! One daemon for a network namespace, and one for a run folder: two would undo each other's work.
//!
//! A network namespace has one packet filter, one route protocol and one range of nexthop ids of ours, whatever the
//! folders, VNI and etcd prefix are. So the lock has to go with the namespace: the abstract unix socket `@fabricd`, which
//! the kernel keeps for each namespace apart and frees with the process that bound it (unix(7)). Whoever connects is told
//! who holds it. The lock on the run folder is for two daemons of two namespaces that were given one folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tracing::warn;

/// How long a daemon that was killed may take until the kernel has closed its files.
const WAY_OUT: Duration = Duration::from_secs(2);
/// How long the holder of the lock may take to say who it is.
const ANSWER: Duration = Duration::from_secs(1);
/// The most that it may say, in bytes.
const LONGEST_ANSWER: u64 = 64 * 1024;
/// The abstract socket; `ss -xlp` shows it as `@fabricd`.
const SOCKET: &str = "fabricd";

/// What a daemon says of itself to another that would start beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The node that it is.
    pub node: String,
    /// Its run folder.
    pub run_dir: PathBuf,
    /// Its gRPC socket, as a path.
    pub socket: PathBuf,
    /// True for `fabricd --cleanup`, which ends by itself.
    pub cleanup: bool,
}

/// Why there may be no daemon here.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another one works in this network namespace.
    #[error("another {} runs in this network namespace: {}; two would undo each other's work. {}", program(.0.as_ref()), who(.0.as_ref(), *.1), remedy(.0.as_ref(), *.1))]
    Namespace(Option<Holder>, Option<i32>),
    /// One of another network namespace has this run folder.
    #[error(
        "another fabricd, of another network namespace, holds {0}; give each its own --run-dir, or end that one: \
         fuser -k -TERM {0}"
    )]
    Folder(String),
    /// The lock can't be made.
    #[error("cannot open {0}: {1}; is the folder writable?")]
    File(String, io::Error),
    /// The lock can't be made.
    #[error("cannot make the abstract unix socket @{SOCKET}: {0}")]
    Socket(io::Error),
}

fn program(holder: Option<&Holder>) -> &'static str {
    if holder.is_some_and(|holder| holder.cleanup) { "fabricd --cleanup" } else { "fabricd" }
}

fn who(holder: Option<&Holder>, pid: Option<i32>) -> String {
    let pid = pid.map_or_else(|| "a process of another PID namespace".to_owned(), |pid| format!("pid {pid}"));
    match holder {
        Some(Holder { node, run_dir, .. }) => format!("{pid}, node {node}, run folder {}", run_dir.display()),
        None => format!("{pid}, which holds the socket @{SOCKET} and doesn't answer (stopped, or hanging)"),
    }
}

fn remedy(holder: Option<&Holder>, pid: Option<i32>) -> String {
    let look = match holder {
        Some(Holder { cleanup: false, socket, .. }) => format!("fabricctl status --socket {}", socket.display()),
        _ => format!("ss -xlp | grep @{SOCKET}"),
    };
    let end = match pid {
        Some(pid) if holder.is_none_or(|holder| !holder.cleanup) => format!("; end it with: kill {pid}"),
        _ => String::new(),
    };
    format!("See it with: {look}{end}")
}

/// Both locks, held until this is dropped.
#[derive(Debug)]
pub struct Lock {
    _namespace: Option<Namespace>,
    _folder: Flock<fs::File>,
}

impl Lock {
    /// Takes both. One that was killed may still be on its way out, so this takes up to two seconds to fail. Must be
    /// called within a tokio runtime.
    ///
    /// # Errors
    /// Another daemon has one of them, or they can't be made.
    pub async fn take(holder: &Holder) -> Result<Self, LockError> {
        let namespace = Namespace::take(SOCKET, holder, WAY_OUT).await?;
        Ok(Self { _namespace: namespace, _folder: folder(&holder.run_dir).await? })
    }
}

/// Where the lock of a run folder is.
#[must_use]
pub fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("fabricd.lock")
}

/// The socket, and the task that says whose it is.
#[derive(Debug)]
struct Namespace(JoinHandle<()>);

impl Drop for Namespace {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Namespace {
    /// Binds the socket. `None` when a program that isn't root's has its name: such a one can't be a fabricd, and no user
    /// may keep the daemon from starting.
    async fn take(name: &str, holder: &Holder, patience: Duration) -> Result<Option<Self>, LockError> {
        let path = format!("\0{name}");
        let end = Instant::now() + patience;
        loop {
            match UnixListener::bind(&path) {
                Ok(listener) => return Ok(Some(Self(tokio::spawn(introduce(listener, holder.clone()))))),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(LockError::Socket(error)),
            }
            if Instant::now() > end {
                return match ask(&path).await {
                    Other::Fabricd(holder, pid) => Err(LockError::Namespace(holder, pid)),
                    Other::Stranger(who) => {
                        warn!(
                            holder = who,
                            "the abstract unix socket @fabricd isn't a fabricd's; a second fabricd in this network \
                             namespace won't be noticed"
                        );
                        Ok(None)
                    }
                };
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Who holds the lock of this network namespace, as far as it says so, and its process; `None` when no fabricd does.
pub async fn holder() -> Option<(Option<Holder>, Option<i32>)> {
    // A socket that nobody has bound refuses as well.
    match ask(&format!("\0{SOCKET}")).await {
        Other::Fabricd(holder, pid) => Some((holder, pid)),
        Other::Stranger(_) => None,
    }
}

/// Tells everybody who connects who holds the lock.
async fn introduce(listener: UnixListener, holder: Holder) {
    let words = serde_json::to_vec(&holder).unwrap_or_default();
    loop {
        match listener.accept().await {
            // Who doesn't read has gone.
            Ok((mut stream, _)) => drop(timeout(ANSWER, stream.write_all(&words)).await),
            Err(error) => {
                warn!(%error, "cannot answer at the abstract unix socket @fabricd");
                sleep(ANSWER).await;
            }
        }
    }
}

/// Who has the socket.
#[derive(Debug)]
enum Other {
    Fabricd(Option<Holder>, Option<i32>),
    Stranger(String),
}

async fn ask(path: &str) -> Other {
    let mut stream = match timeout(ANSWER, UnixStream::connect(path)).await {
        Ok(Ok(stream)) => stream,
        // Bound, but not listened to: none of ours.
        Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
            return Other::Stranger("a process that doesn't listen at it".to_owned());
        }
        Ok(Err(_)) | Err(_) => return Other::Fabricd(None, None),
    };
    // Those of the moment in which it began to listen.
    let Ok(peer) = stream.peer_cred() else { return Other::Fabricd(None, None) };
    let pid = peer.pid().filter(|pid| *pid > 0);
    if peer.uid() != 0 && peer.uid() != nix::unistd::geteuid().as_raw() {
        let pid = pid.map_or_else(|| "a process".to_owned(), |pid| format!("pid {pid}"));
        return Other::Stranger(format!("{pid} of user {}", peer.uid()));
    }
    let mut words = vec![];
    let mut limited = (&mut stream).take(LONGEST_ANSWER);
    let read = timeout(ANSWER, limited.read_to_end(&mut words)).await;
    Other::Fabricd(read.ok().and_then(|_| serde_json::from_slice(&words).ok()), pid)
}

/// The lock on the run folder.
async fn folder(run_dir: &Path) -> Result<Flock<fs::File>, LockError> {
    let path = file(run_dir);
    let shown = || path.display().to_string();
    let open = || {
        fs::create_dir_all(run_dir)?;
        fs::File::options().create(true).append(true).open(&path)
    };
    let mut file = open().map_err(|error| LockError::File(shown(), error))?;
    let end = Instant::now() + WAY_OUT;
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((_, Errno::EAGAIN)) if Instant::now() > end => return Err(LockError::Folder(shown())),
            Err((again, Errno::EAGAIN)) => file = again,
            Err((_, errno)) => return Err(LockError::File(shown(), errno.into())),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(cleanup: bool) -> Holder {
        let (run_dir, socket) = ("/run/fabric".into(), "/run/fabric/fabricd.sock".into());
        Holder { node: "node-1".into(), run_dir, socket, cleanup }
    }

    /// A name that no other test and no daemon of this machine has.
    fn name(of: &str) -> String {
        format!("fabricd-test-{}-{of}", std::process::id())
    }

    #[tokio::test]
    async fn second_daemon_is_told_of_the_first_and_may_start_when_that_is_gone() {
        for (cleanup, program, look, end) in [
            (false, "fabricd", "fabricctl status --socket /run/fabric/fabricd.sock", "; end it with: kill "),
            (true, "fabricd --cleanup", "ss -xlp | grep @fabricd", ""),
        ] {
            let name = name(if cleanup { "cleanup" } else { "daemon" });
            let first = Namespace::take(&name, &holder(cleanup), Duration::ZERO).await.expect("free").expect("ours");
            let refused = Namespace::take(&name, &holder(false), Duration::ZERO).await.expect_err("taken").to_string();
            let pid = std::process::id();
            let end = if end.is_empty() { String::new() } else { format!("{end}{pid}") };
            assert_eq!(
                refused,
                format!(
                    "another {program} runs in this network namespace: pid {pid}, node node-1, run folder /run/fabric; \
                     two would undo each other's work. See it with: {look}{end}"
                )
            );
            drop(first);
            Namespace::take(&name, &holder(false), WAY_OUT).await.expect("free again");
        }
    }

    #[tokio::test]
    async fn daemon_that_does_not_answer_is_named_by_its_process() {
        let name = name("silent");
        let _stopped = UnixListener::bind(format!("\0{name}")).expect("free");
        let refused = Namespace::take(&name, &holder(false), Duration::ZERO).await.expect_err("taken").to_string();
        let pid = std::process::id();
        assert!(
            refused.contains(&format!("pid {pid}, which holds the socket @fabricd and doesn't answer")),
            "{refused}"
        );
        assert!(refused.ends_with(&format!("end it with: kill {pid}")), "{refused}");
    }

    #[tokio::test]
    async fn lock_of_a_run_folder_is_named() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let _held = folder(dir.path()).await.expect("free");
        let refused = folder(dir.path()).await.expect_err("taken").to_string();
        assert!(refused.contains("fabricd.lock") && refused.contains("--run-dir"), "{refused}");
        let unwritable = folder(Path::new("/proc/fabric")).await.expect_err("no folder").to_string();
        assert!(unwritable.starts_with("cannot open /proc/fabric/fabricd.lock"), "{unwritable}");
    }
}
