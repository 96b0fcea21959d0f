//! A TCP proxy on loopback that a test can cut, freeze or make deaf: the network's faults, without its privileges.

use std::net::SocketAddr;

use anyhow::Context as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What the proxy does with what it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Passes it on.
    Up,
    /// Closes every connection, new ones too.
    Cut,
    /// Passes nothing on, and closes nothing: a half-open connection, as when a firewall drops all.
    Frozen,
    /// Passes requests on and no answers.
    Mute,
}

/// A proxy in front of one address.
pub struct TcpProxy {
    address: SocketAddr,
    link: watch::Sender<Link>,
    _accepting: JoinSet<()>,
}

impl TcpProxy {
    /// Starts one in front of `target`, such as `127.0.0.1:2379`.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(target: &str) -> anyhow::Result<Self> {
        let target: SocketAddr = target.parse().with_context(|| format!("{target} is no address"))?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (address, (link, state)) = (listener.local_addr()?, watch::channel(Link::Up));
        let mut accepting = JoinSet::new();
        accepting.spawn(accept(listener, target, state));
        Ok(Self { address, link, _accepting: accepting })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets what it does from now on.
    pub fn set(&self, link: Link) {
        self.link.send_replace(link);
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, link: watch::Receiver<Link>) {
    let mut connections = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        if *link.borrow() != Link::Cut {
            connections.spawn(connection(client, target, link.clone()));
        }
    }
}

/// One connection, until either side or a cut ends it.
async fn connection(client: TcpStream, target: SocketAddr, mut link: watch::Receiver<Link>) {
    let Ok(server) = TcpStream::connect(target).await else { return };
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    let requests = pass(from_client, to_server, link.clone(), &[Link::Up, Link::Mute]);
    let answers = pass(from_server, to_client, link.clone(), &[Link::Up]);
    tokio::select! {
        () = requests => {}
        () = answers => {}
        _ = link.wait_for(|link| *link == Link::Cut) => {}
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut link: watch::Receiver<Link>,
    when: &[Link],
) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if link.wait_for(|link| when.contains(link)).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
