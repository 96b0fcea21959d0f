//! `lab page`: the status page of a node, which listens on loopback inside of its namespace, for a browser on this machine.

use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use anyhow::{Context as _, Result};

use super::node::Node;
use super::spaces::Spaces;

/// Where a node serves its page.
pub const PORT: u16 = 9472;

/// A port of this machine's loopback that leads to a node's page.
#[derive(Debug)]
pub struct Page {
    listener: TcpListener,
    inside: Arc<Spaces>,
}

impl Page {
    /// Opens port `port` (0: any) for the page of `node`.
    ///
    /// # Errors
    /// The port is taken, or the node is off.
    pub fn open(node: &Node, port: u16) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
        let listener =
            listener.with_context(|| format!("cannot listen on 127.0.0.1:{port}; choose another port with --port"))?;
        Ok(Self { listener, inside: Arc::new(node.network()?) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Never, while it is open.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.listener.local_addr()?)
    }

    /// Passes connections on, for ever.
    ///
    /// # Errors
    /// When no more connections can be taken.
    pub fn serve(self) -> Result<()> {
        for client in self.listener.incoming() {
            let (client, inside) = (client?, Arc::clone(&self.inside));
            // One that fails is that browser's alone: it asks again.
            thread::spawn(move || pass(&client, &inside).ok());
        }
        Ok(())
    }
}

fn pass(client: &TcpStream, inside: &Spaces) -> Result<()> {
    let server = inside.run(|| Ok(TcpStream::connect((Ipv4Addr::LOCALHOST, PORT))?))?;
    thread::scope(|scope| {
        scope.spawn(|| copy(client, &server));
        copy(&server, client);
    });
    Ok(())
}

/// Copies until the sender is done, or either side is gone, and says so to the other.
fn copy(mut from: &TcpStream, mut to: &TcpStream) {
    io::copy(&mut from, &mut to).ok();
    to.shutdown(Shutdown::Write).ok();
}
