//! `fabricd --cleanup`: removes all that fabricd made on this node, and gives its lease back.

use std::io::ErrorKind;
use std::time::Duration;

use anyhow::Context as _;
use fabric_core::diff::diff;
use fabric_core::state::{Routing, State};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tracing::warn;

use super::leftovers::Leftovers;
use crate::atomic_file::remove_if_there;
use crate::config::{Config, DEFAULT_ENDPOINT, StoreKind};
use crate::daemon::{holder, instance, open_kernel};
use crate::files::Files;
use crate::files::state_dir::{Disk, Uptime};
use crate::host::lock::{self, Lock};
use crate::kernel::Kernel as _;
use crate::lease::{DepartingNode, GivenBack};
use crate::policy::applied::AppliedPolicies;
use crate::store::etcd::Etcd;
use crate::store::kubernetes::Kubernetes;

/// How long `--cleanup` waits for the store before it leaves the lease to end by itself.
const GIVE_UP: Duration = Duration::from_secs(10);

/// Removes all that fabricd made on this node, and gives its lease back.
///
/// # Errors
/// When the kernel refuses to let something go, or a file can't be removed. What could be removed is.
pub async fn cleanup(config: Config) -> anyhow::Result<()> {
    let _lock = Lock::take(&holder(&config, true)).await?;
    let mut kernel = open_kernel(&config)?;
    let leftovers = Leftovers::of_node(&config);
    // No pod may be added while the rest goes.
    Files::new(&config.run_dir, &config.subnet_file).remove()?;
    AppliedPolicies::new(&config.run_dir)
        .turn_off()
        .context("cannot remove the folder of pods whose policies are applied")?;
    let disk = Disk::new(&config.state_dir, config.node());
    let remembered = Uptime::now().ok().and_then(|now| disk.load(&now).lease);
    disk.remove()?;

    let observed = kernel.observe().await?;
    let has = observed.host.links.iter().flat_map(|link| link.addresses.iter().map(|(ip, _)| *ip));
    let departing = DepartingNode {
        node: config.node().clone(),
        instance: instance()?,
        addresses: has.chain(config.public_ips().values().copied()).collect(),
        remembered,
        ttl: config.lease_ttl,
    };
    // Forwarding and the like stay: others may need them by now. The filter goes last: while a device is there, not
    // everybody may send to it.
    let plan = diff(State::default(), observed.found(&Routing::new()));
    let mut refused = vec![];
    for stage in plan.stages() {
        for (op, result) in stage.iter().zip(kernel.apply(stage).await) {
            println!("{op}");
            refused.extend(result.err());
        }
    }
    println!("{} kernel entries removed", plan.ops().len() - refused.len());
    print!("{}", leftovers.remove().await?);

    if is_without_store(&config).await {
        println!("no datastore is named: a lease, if there is one, expires");
    } else {
        give_lease_back(&config, departing).await;
    }
    for file in [&config.socket, &lock::file(&config.run_dir)] {
        remove_if_there(file)?;
    }
    match refused.into_iter().next() {
        Some(first) => Err(first).context("not everything could be removed"),
        None => Ok(()),
    }
}

/// Nobody has named a datastore, and where etcd is by default there is none for fabricd: nobody listens, or this is a pod, where
/// it would be the cluster's own.
async fn is_without_store(config: &Config) -> bool {
    if config.store != StoreKind::Etcd || config.etcd.endpoints != [DEFAULT_ENDPOINT] {
        return false;
    }
    let address = DEFAULT_ENDPOINT.trim_start_matches("http://");
    let refuses = |error: std::io::Error| error.kind() == ErrorKind::ConnectionRefused;
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() || TcpStream::connect(address).await.is_err_and(refuses)
}

/// Waits for the store for a while, and then leaves the lease to end by itself.
async fn give_lease_back(config: &Config, departing: DepartingNode) {
    let released = timeout(GIVE_UP, async {
        match config.store {
            StoreKind::Etcd => departing.give_back(&Etcd::start(config.etcd.options()?)).await,
            StoreKind::Kubernetes => departing.give_back(&Kubernetes::start(config.kubernetes())).await,
        }
    });
    match released.await {
        Ok(Ok(GivenBack::Released(key))) => println!("lease of {key} given back"),
        Ok(Ok(GivenBack::Nothing)) => println!("this node, {}, holds no lease", config.node()),
        Ok(Ok(GivenBack::Anothers(key, there))) => println!(
            "{key} is leased to {node} at {there}, not to this machine; if that one is gone: fabricctl lease release {node}",
            node = config.node()
        ),
        Ok(Err(error)) => warn!(%error, "lease not given back, it expires"),
        Err(_) => warn!(store = ?config.store, "store not reached, the lease expires"),
    }
}
