//! The store's side of many nodes in one process: of each the real lease keeper and the real store, with a connection, a
//! watch and a lease of its own.

use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::model::{NodeName, PerFamily};
use fabric_core::network::NetworkConfig;
use fabric_core::record::Instance;
use fabricd::host::addresses::{CniDirs, NodePods};
use fabricd::kernel::links::HostLinks;
use fabricd::lease::{DesiredLease, Holding, Hosts, Keeper, LeaseOptions};
use fabricd::store::etcd::{Etcd, Options};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// What all of them have in common.
#[derive(Clone, Debug)]
pub struct Keepers {
    /// Where etcd is.
    pub etcd: Options,
    /// The network config, which is in etcd too.
    pub network: NetworkConfig,
    /// Time to live of the leases.
    pub ttl: Duration,
}

/// One node's. Its task ends with the value, and its lease stays.
pub struct OneKeeper {
    /// Its name.
    pub node: NodeName,
    /// What it holds.
    pub holding: watch::Receiver<Holding>,
    _wanted: watch::Sender<Option<DesiredLease>>,
    _task: JoinSet<()>,
}

impl Keepers {
    /// Starts that of the N-th node, `many-N` at an address of the range for benchmarks (RFC 2544).
    ///
    /// # Panics
    /// Outside a runtime.
    #[must_use]
    pub fn start(&self, n: u32) -> OneKeeper {
        let node: NodeName = format!("many-{n}").parse().expect("a name");
        let options = LeaseOptions {
            node: node.clone(),
            instance: Instance { boot: format!("boot-{n}"), netns: 1 },
            ttl: self.ttl,
            grace: Duration::from_secs(86_400),
            pods: pods_in(Path::new("/nonexistent")),
            since: 0,
            hosts: no_hosts(),
        };
        let keeper = Keeper::new(Arc::new(Etcd::start(self.etcd.clone())), options, None);
        let ip = Ipv4Addr::from_bits(Ipv4Addr::new(198, 18, 0, 0).to_bits() + n);
        let public_ips = PerFamily { v4: Some(ip.into()), v6: None };
        let (wanted, wants) = watch::channel(Some(DesiredLease { network: self.network, public_ips }));
        let holding = keeper.holding();
        let mut task = JoinSet::new();
        task.spawn(keeper.run(wants));
        OneKeeper { node, holding, _wanted: wanted, _task: task }
    }
}

impl OneKeeper {
    /// Waits until it holds a lease.
    pub async fn holds(&mut self) {
        let held = self.holding.wait_for(|holding| holding.own.is_some() && holding.trouble.is_none()).await;
        drop(held.expect("its task lives as long as it does"));
    }

    /// Waits until it holds a lease, or says why not.
    ///
    /// # Errors
    /// Why not.
    pub async fn answers(&mut self) -> Result<(), String> {
        let holding = self.holding.wait_for(|holding| holding.own.is_some() || holding.trouble.is_some()).await;
        match &holding.expect("its task lives as long as it does").trouble {
            None => Ok(()),
            Some((_, why)) => Err(why.clone()),
        }
    }
}

/// Pods with the addresses in this folder of host-local's, attached to a port of `cni0` that no attachment names.
#[must_use]
pub fn pods_in(addresses: &Path) -> NodePods {
    let links = || {
        let (bridge, port) = ("cni0".parse().expect("a name"), "veth1".parse().expect("a name"));
        Ok(HostLinks { ports: [(bridge, [port].into())].into(), ..HostLinks::default() })
    };
    NodePods::with_links(CniDirs { addresses: addresses.into(), attachments: "/nonexistent".into() }, links)
}

/// An underlay on which nothing answers.
#[must_use]
pub fn no_hosts() -> Hosts {
    Hosts::new(|_| Box::pin(async { false }))
}
