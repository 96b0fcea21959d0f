//! A host beyond the network that answers UDP, and a pod that asks it.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result};
use fabric_core::model::Family;

use super::pod::Pod;
use super::spaces::Spaces;

const SOON: Duration = Duration::from_secs(5);

/// Two sockets, in two network namespaces.
#[derive(Debug)]
pub struct Outside {
    server: UdpSocket,
    client: UdpSocket,
}

impl Outside {
    /// Somebody who answers at this address of this place, and a pod that asks.
    ///
    /// # Errors
    /// The address can't be used there, or the pod has none of its family.
    pub fn at(place: Spaces, ip: IpAddr, pod: &Pod) -> Result<Self> {
        Self::between((place, ip), (pod.network()?, pod.ip(Family::of(ip))?))
    }

    /// Somebody who answers at the first place, and somebody who asks at the second.
    ///
    /// # Errors
    /// An address can't be used there.
    pub fn between(server: (Spaces, IpAddr), client: (Spaces, IpAddr)) -> Result<Self> {
        let socket = |(place, ip): (Spaces, IpAddr)| place.run(move || Ok(UdpSocket::bind((ip, 0))?));
        let (server, client) = (socket(server)?, socket(client)?);
        client.connect(server.local_addr()?)?;
        server.set_read_timeout(Some(SOON))?;
        client.set_read_timeout(Some(SOON))?;
        Ok(Self { server, client })
    }

    /// The client's address as the outside sees it, once question and answer have come.
    ///
    /// # Errors
    /// One of them doesn't come within 5 seconds.
    pub fn sees(&self) -> Result<IpAddr> {
        self.client.send(b"hello")?;
        let (_, from) = self.server.recv_from(&mut [0; 16]).context("nothing arrives outside")?;
        self.server.send_to(b"hello", from)?;
        self.client.recv(&mut [0; 16]).context("no answer from outside")?;
        Ok(from.ip())
    }
}
