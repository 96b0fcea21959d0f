//! More daemons at once than there are subnets: two whole ones, and the store's side of the others.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::network::NetworkConfig;
use fabricd::store::etcd::{Etcd, Options};
use tokio::runtime::Builder;
use tokio::time::timeout;

use super::Trial;
use crate::keepers::{Keepers, OneKeeper};
use crate::lab::Lab;

const DAEMONS: u32 = 50;
const SUBNETS: usize = 40;
const WHOLE: u16 = 2;

/// How long all of them may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn trial(trial: &mut Trial) -> Result<()> {
    // 40 subnets.
    let network = ["--network", "10.244.0.0/16", "--subnet-min", "10.244.1.0", "--subnet-max", "10.244.40.0"];
    let fabric = trial.leased_in(Lab::builder().network(&network), WHOLE)?;
    let had = fabric.subnets()?;
    let config = fabric.etcdctl(&["get", "--print-value-only", "/coreos.com/network/config"])?;
    let endpoints = fabric.lab.etcd().endpoints();
    let etcd = Options::new(endpoints.split(',').map(str::to_owned).collect());
    let network = NetworkConfig::decode(config.trim().as_bytes())?;
    let keepers = Keepers { etcd, network, ttl: Duration::from_secs(3600) };
    let mut order: Vec<u32> = (0..DAEMONS - u32::from(WHOLE)).collect();
    trial.random.shuffle(&mut order);
    fabric.lab.underlay().machine.network()?.run(|| {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        runtime.block_on(stampede(&keepers, &order))
    })?;
    for node in &fabric.nodes {
        fabric.until_routes(node, SUBNETS - 1)?;
    }
    fabric.until_all_hold(&had)?;
    fabric.lost_nothing()
}

async fn stampede(keepers: &Keepers, order: &[u32]) -> Result<()> {
    let mut waiting: Vec<OneKeeper> = vec![];
    let mut holding: Vec<OneKeeper> = vec![];
    let mut all: Vec<OneKeeper> = order.iter().map(|n| keepers.start(*n)).collect();
    while let Some(mut keeper) = all.pop() {
        let answer = timeout(PATIENCE, keeper.answers()).await.with_context(|| format!("{} is silent", keeper.node))?;
        match answer {
            Ok(()) => holding.push(keeper),
            Err(why) => {
                ensure!(why.contains("all 40 IPv4 subnets of 10.244.0.0/16 are leased or reserved"), "{why}");
                ensure!(why.contains("fabricctl lease release NODE"), "it doesn't tell the way out: {why}");
                waiting.push(keeper);
            }
        }
    }
    let (held, refused) = (holding.len(), waiting.len());
    ensure!((held, refused) == (SUBNETS - usize::from(WHOLE), 10), "{held} hold subnets, {refused} were refused");

    // One goes for good, and exactly one of those that wait gets its subnet.
    let gone = holding.pop().context("somebody holds one")?.node;
    Etcd::start(keepers.etcd.clone()).release_node(&gone).await?;
    let answers = waiting.iter_mut().map(|keeper| Box::pin(keeper.holds()));
    let (_, _, others) = timeout(PATIENCE, futures::future::select_all(answers)).await.context("nobody takes it")?;
    drop(others);
    let lucky = waiting.iter().filter(|keeper| keeper.holding.borrow().trouble.is_none()).count();
    ensure!(lucky == 1, "{lucky} got it");
    Ok(())
}
