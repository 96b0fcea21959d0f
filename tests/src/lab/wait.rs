//! Waiting without sleeping: a condition is tried again and again until it holds or its time is up.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// How soon a condition is tried again, at first and at last: most of them start a program, and what is waited for for long
/// is waited for beside other tests.
const AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));

/// How long a process may wait for the disk: what etcd begins with and what fabricd ends with is forced to it (fsync(2)),
/// and while others compile on the same disk that was seen to take 13 s.
pub(super) const DISK: Duration = Duration::from_secs(60);

/// Tries `condition` until it succeeds and returns what it found.
///
/// ```
/// # use fabric_tests::lab::wait_until;
/// # use std::time::Duration;
/// let mut tries = 0;
/// let found = wait_until("the third try", Duration::from_secs(5), || {
///     tries += 1;
///     anyhow::ensure!(tries == 3, "only {tries} so far");
///     Ok(tries)
/// });
/// assert_eq!(found.ok(), Some(3));
/// ```
///
/// # Errors
/// It still fails after `limit`: names what was waited for and the last failure.
pub fn wait_until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<T>) -> Result<T> {
    let (began, end) = (Instant::now(), Instant::now() + limit);
    loop {
        match condition() {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() >= end => {
                return Err(error).with_context(|| format!("waited {limit:?} in vain: {what}"));
            }
            Err(_) => thread::sleep((began.elapsed() / 20).clamp(AGAIN.0, AGAIN.1)),
        }
    }
}
