//! The gRPC API: `fabric.v1` with the health and reflection services.
//!
//! | file | what it is |
//! |---|---|
//! | `mod` | where it is served, and to whom |
//! | [`service`] | the methods |
//! | [`sources`] | what they answer from, and where they send what a person wants |
//! | [`convert`] | the daemon's types in the API's words |
//! | [`services`] | Services in the API's words |
//! | [`changes`] | what `Watch…` methods tell |
//! | [`policies`] | network policies |
//! | [`questions`] | methods whose answers take a while |
//! | [`remote`] | other daemons, asked through the fabric |
//! | [`tls`] | certificates for TCP |
//!
//! Everything here only reads what the reconcile loop publishes; nothing it does can hold up the loop.

pub mod changes;
pub mod convert;
pub mod policies;
pub mod questions;
pub mod remote;
pub mod service;
pub mod services;
pub mod sources;
pub mod tls;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;

use fabric_core::handoff::Readiness;
use fabric_proto::v1;
use fabric_proto::v1::fabric_server::FabricServer;
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::Ipv6V6Only;
use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};
use tonic_health::server::HealthReporter;

pub use self::remote::Remote;
pub use self::service::Service;
pub use self::sources::{Controls, Sources};
pub use self::tls::Tls;
use crate::status::view::View;

/// How many connections may wait to be accepted.
const BACKLOG: u32 = 128;

/// Opens the socket, with mode 0600. One that a daemon before us left behind is replaced: that it is not in use is
/// what the lock on the run folder is for.
///
/// # Errors
/// When the folder can't be written.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Opens a TCP address. `[::]` means both families, whatever the host's `bindv6only` says, and IPv4 alone on a host without
/// IPv6.
///
/// # Errors
/// When it is taken or not this host's.
pub fn listen_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => match TcpSocket::new_v6() {
            Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
                return listen_tcp((Ipv4Addr::UNSPECIFIED, address.port()).into());
            }
            socket => socket?,
        },
    };
    if address.is_ipv6() && address.ip().is_unspecified() {
        setsockopt(&socket, Ipv6V6Only, &false)?;
    }
    // A daemon that is restarted doesn't wait for the connections of the one before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Answers on `listener` until the process ends. Who asks must be root, or the daemon's own user.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: UnixListener, sources: Sources) -> anyhow::Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(report_health(reporter, sources.view.clone()));
    Server::builder()
        .layer(InterceptorLayer::new(known_user))
        .add_service(health)
        .add_service(reflection()?)
        .add_service(FabricServer::new(Service::for_root(sources)))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await?;
    Ok(())
}

/// Answers those who show a certificate of our authority, until the process ends. Nothing can be changed this way.
///
/// # Errors
/// When the listener breaks. Certificates that can't be used keep everybody out until they can.
pub async fn serve_tls(listener: TcpListener, tls: Tls, sources: Sources) -> anyhow::Result<()> {
    let (reporter, health) = tonic_health::server::health_reporter();
    tokio::spawn(report_health(reporter, sources.view.clone()));
    Server::builder()
        .add_service(health)
        .add_service(reflection()?)
        .add_service(FabricServer::new(Service::for_peers(sources)))
        .serve_with_incoming(tls::accept(listener, tls))
        .await?;
    Ok(())
}

fn reflection() -> Result<
    tonic_reflection::server::v1::ServerReflectionServer<impl tonic_reflection::server::v1::ServerReflection>,
    tonic_reflection::server::Error,
> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(v1::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
}

/// The mode of the socket keeps others out; this does too when somebody has changed it.
fn known_user(request: Request<()>) -> Result<Request<()>, Status> {
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    match peer.map(|cred| cred.uid()) {
        Some(uid) if uid == 0 || uid == nix::unistd::geteuid().as_raw() => Ok(request),
        Some(uid) => Err(Status::permission_denied(format!("user {uid} may not ask; only root may"))),
        None => Err(Status::permission_denied("the kernel doesn't tell who asks")),
    }
}

async fn report_health(reporter: HealthReporter, mut view: watch::Receiver<Arc<View>>) {
    loop {
        if view.borrow_and_update().readiness == Readiness::Ready {
            reporter.set_serving::<FabricServer<Service>>().await;
        } else {
            reporter.set_not_serving::<FabricServer<Service>>().await;
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}
