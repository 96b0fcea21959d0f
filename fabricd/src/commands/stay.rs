//! What a container beside the daemon does for as long as it lives.

use std::time::Duration;

use anyhow::Result;
use tokio::signal::unix::{SignalKind, signal};

/// Does something again and again, each time after as long as it says, until SIGTERM: the first process of a container
/// only notices that if it asks for it.
///
/// # Errors
/// The first one of `again`.
pub fn until_terminated(mut again: impl FnMut() -> Result<Duration>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        loop {
            let period = again()?;
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                () = tokio::time::sleep(period) => {}
            }
        }
    })
}
