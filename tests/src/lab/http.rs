//! One HTTP GET from inside a machine, for health checks and metrics: no client library needed.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use super::spaces::Spaces;

/// How long the other side may think.
const PATIENCE: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Clone, Debug)]
pub struct Reply {
    /// 200, 503, …
    pub status: u16,
    /// All after the headers.
    pub body: String,
}

/// `GET path` from a server that is reached from inside `network`.
///
/// # Errors
/// Nothing listens there, or it doesn't speak HTTP.
pub fn get(network: &Spaces, server: SocketAddr, path: &str) -> Result<Reply> {
    let mut stream = network.run(|| Ok(TcpStream::connect_timeout(&server, PATIENCE)?))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.0\r\nHost: lab\r\n\r\n")?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (head, body) = reply.split_once("\r\n\r\n").context("an answer without headers")?;
    let status = head.split(' ').nth(1).context("an answer without a status")?.parse()?;
    Ok(Reply { status, body: body.to_owned() })
}
