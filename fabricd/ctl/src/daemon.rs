//! The connection to the daemon of this node.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use fabric_proto::v1::fabric_client::FabricClient;
use fabricd::errors::errno;
use hyper_util::rt::TokioIo;
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// The largest answer that is read, in bytes: all kernel entries of 5,000 peers are 4 million.
const LARGEST: usize = 64 << 20;

/// Refuses whom the daemon's socket isn't for: silence would tell nothing of the daemon then.
///
/// # Errors
/// It is there, and this user may not write to it.
pub fn permitted(socket: &Path) -> anyhow::Result<()> {
    match access(socket, AccessFlags::W_OK) {
        Err(Errno::EACCES) => {
            bail!("cannot ask the daemon at {}: its socket is for root (EACCES); use sudo", socket.display())
        }
        _ => Ok(()),
    }
}

/// Connects to the daemon's socket.
pub async fn connect(socket: &Path) -> anyhow::Result<FabricClient<Channel>> {
    let told = || format!("cannot reach the daemon at {}; is fabricd running, and are you root?", socket.display());
    let path: PathBuf = socket.into();
    let connect = move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    };
    // The name is for HTTP's sake; the connector goes to the socket.
    let channel = Endpoint::from_static("http://fabricd").connect_with_connector(service_fn(connect)).await;
    let channel = channel.map_err(|error| {
        let error = anyhow::Error::from(error);
        let cause = error.root_cause();
        let cause = cause.downcast_ref::<io::Error>().map_or_else(|| cause.to_string(), errno::named);
        anyhow::anyhow!("{cause}; without a daemon: fabricctl doctor")
    });
    Ok(FabricClient::new(channel.with_context(told)?).max_decoding_message_size(LARGEST))
}

/// The daemon's own words, without gRPC's around them; of one that has ended meanwhile, what works without it.
pub fn told(status: &tonic::Status) -> anyhow::Error {
    let mut causes = std::iter::successors(std::error::Error::source(status), |cause| cause.source());
    match causes.find_map(|cause| cause.downcast_ref::<io::Error>()) {
        Some(cause) => {
            anyhow::anyhow!("the daemon is gone: {}; without a daemon: fabricctl doctor", errno::named(cause))
        }
        None => anyhow::anyhow!("{}", status.message()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn daemon_that_ends_before_it_is_asked_is_told_likewise() {
        let refused = tonic::Status::from_error(Box::new(io::Error::from_raw_os_error(111)));
        let words = told(&refused).to_string();
        assert!(words.ends_with("(ECONNREFUSED); without a daemon: fabricctl doctor"), "{words}");
        assert_eq!(told(&tonic::Status::not_found("there is no node x")).to_string(), "there is no node x");
    }

    #[tokio::test]
    async fn daemon_that_is_not_there_is_told_by_name_and_with_what_works_without_it() {
        let folder = tempfile::tempdir().unwrap();
        let (missing, deserted) = (folder.path().join("none.sock"), folder.path().join("deserted.sock"));
        drop(std::os::unix::net::UnixListener::bind(&deserted).unwrap());
        for (socket, cause) in [(missing, "(ENOENT)"), (deserted, "(ECONNREFUSED)")] {
            let told = format!("{:#}", connect(&socket).await.expect_err("nobody listens"));
            assert!(told.ends_with(&format!("{cause}; without a daemon: fabricctl doctor")), "{told}");
            assert!(!told.contains("os error"), "{told}");
        }
    }
}
