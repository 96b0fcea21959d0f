//! A crowd: thousands of peers that exist in etcd only, for a node to program.
//!
//! Their subnets are 10.128.N/24 and up, so a crowded lab has the network [`NETWORK`]; its real nodes have theirs at
//! the end of it. Each is written as flannel writes one.

use std::future::Future;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use etcd_client::{Client, PutOptions, Txn, TxnOp, WatchOptions};
use tokio::runtime::{Builder, Runtime};

use super::Lab;

/// Arguments of `fabricctl network init` for a lab with a crowd of up to 10,000 and more.
pub const NETWORK: &[&str] = &["--network", "10.128.0.0/10", "--subnet-min", "10.190.0.0"];
/// The network of these arguments: its first address, and the length of its prefix. Subnets are /24.
pub const SPACE: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 128, 0, 0), 10);

const SUBNETS: &str = "/coreos.com/network/subnets/";
/// etcd takes 128 operations in one transaction.
const IN_ONE_GO: usize = 128;

/// One that is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its subnet is the N-th of the network.
    pub number: u32,
    /// Another generation has another MAC address.
    pub generation: u8,
    /// Another move has another underlay address.
    pub moves: u8,
}

impl Peer {
    /// The peer with this number, as it came first.
    #[must_use]
    pub fn new(number: u32) -> Self {
        Self { number, generation: 0, moves: 0 }
    }

    /// The first address of its subnet, a /24.
    #[must_use]
    pub fn subnet(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(Ipv4Addr::new(10, 128, 0, 0).to_bits() + self.number * 256)
    }

    /// The address that packets for it are sent to: of the range for benchmarks (RFC 2544).
    #[must_use]
    pub fn underlay_ip(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + self.number + (u32::from(self.moves) << 16))
    }

    /// The address of its VTEP.
    #[must_use]
    pub fn mac(self) -> String {
        let [_, a, b, c] = self.number.to_be_bytes();
        format!("02:42:{:02x}:{a:02x}:{b:02x}:{c:02x}", self.generation)
    }

    fn key(self) -> String {
        format!("{SUBNETS}{}-24", self.subnet())
    }

    fn value(self) -> String {
        format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
            self.underlay_ip(),
            self.mac()
        )
    }
}

/// A hand on the lab's etcd that makes peers come and go.
pub struct Crowd {
    runtime: Runtime,
    client: Client,
}

impl Lab {
    /// A hand on the lab's etcd.
    ///
    /// # Errors
    /// etcd can't be reached.
    pub fn crowd(&self) -> Result<Crowd> {
        let endpoints = self.etcd().endpoints();
        // The connection is opened inside the underlay and stays there, whoever uses it.
        self.underlay().machine.network()?.run(|| {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let client = runtime.block_on(async {
                let mut client = Client::connect(endpoints.split(',').collect::<Vec<_>>(), None).await?;
                client.get("/", None).await?;
                anyhow::Ok(client)
            })?;
            Ok(Crowd { runtime, client })
        })
    }
}

impl Crowd {
    /// Peers come, or change.
    ///
    /// # Errors
    /// etcd refuses.
    pub fn put(&mut self, peers: impl IntoIterator<Item = Peer>) -> Result<()> {
        self.write(peers.into_iter().map(|peer| TxnOp::put(peer.key(), peer.value(), None::<PutOptions>)).collect())
    }

    /// The peers with these numbers come.
    ///
    /// # Errors
    /// etcd refuses.
    pub fn join(&mut self, numbers: Range<u32>) -> Result<()> {
        self.put(numbers.map(Peer::new))
    }

    /// They go.
    ///
    /// # Errors
    /// etcd refuses.
    pub fn leave(&mut self, numbers: Range<u32>) -> Result<()> {
        self.write(numbers.map(|number| TxnOp::delete(Peer::new(number).key(), None)).collect())
    }

    fn write(&mut self, operations: Vec<TxnOp>) -> Result<()> {
        let client = &mut self.client;
        self.runtime.block_on(async {
            for some in operations.chunks(IN_ONE_GO) {
                client.txn(Txn::new().and_then(some.to_vec())).await?;
            }
            Ok(())
        })
    }

    /// Puts peers one at a time, or deletes them, and says for each when that was sent and when a bare watch told of it: the
    /// time that etcd itself takes. `seen` is called after each, with the peer.
    ///
    /// # Errors
    /// etcd refuses, or `seen` fails.
    pub fn watched(
        &mut self,
        what: Watch,
        peers: impl IntoIterator<Item = Peer>,
        mut seen: impl FnMut(Peer) -> Result<()>,
    ) -> Result<Vec<Watched>> {
        let client = &mut self.client;
        self.runtime.block_on(async {
            let mut told = client.watch(SUBNETS, Some(WatchOptions::new().with_prefix())).await?;
            told.message().await?;
            let mut times = vec![];
            for peer in peers {
                let sent = Instant::now();
                let operation = match what {
                    Watch::Put => TxnOp::put(peer.key(), peer.value(), None),
                    Watch::Delete => TxnOp::delete(peer.key(), None),
                };
                let mut other = client.clone();
                let (written, event) = tokio::join!(other.txn(Txn::new().and_then([operation])), async {
                    let event = told.message().await;
                    (event, Instant::now())
                });
                written?;
                event.0?.context("the watch has ended")?;
                times.push(Watched { sent, told: event.1 - sent });
                seen(peer)?;
            }
            Ok(times)
        })
    }

    /// Runs something on the runtime that keeps the connection.
    pub fn block_on<T>(&self, task: impl Future<Output = T>) -> T {
        self.runtime.block_on(task)
    }
}

/// What happens to a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// It comes, or changes.
    Put,
    /// It goes.
    Delete,
}

/// How long a change took to be told of.
#[derive(Clone, Copy, Debug)]
pub struct Watched {
    /// When it was sent.
    pub sent: Instant,
    /// Until a bare watch told of it.
    pub told: Duration,
}
