//! Leases that change: those of peers reach the kernel, and without its own one a node hands out no address.

use std::time::Duration;

use fabric_core::diff::{Change, Op, routing};
use fabric_core::handoff::{NotReady, Readiness};
use tokio::time::sleep;

use crate::node::{Host, V4, V4_PEER};

#[tokio::test(start_paused = true)]
async fn a_change_of_mind_of_the_store_reaches_the_kernel() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let reborn = V4_PEER.1.replace("02:42:c0:00:02:02", "02:42:c0:00:02:99");
    host.cluster.put(V4_PEER.0, reborn.as_bytes());
    sleep(Duration::from_secs(1)).await;
    let macs: Vec<String> = host.kernel.tables().fdb.keys().map(|(_, mac)| mac.to_string()).collect();
    assert_eq!(macs, ["02:42:c0:00:02:99"]);
    let changes = host.kernel.writes();
    let last = changes.last().expect("written");
    assert!(matches!(last.op, Op::Routing(routing::Op::Fdb(_, _, Change::Delete(_)))), "{last}");
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_a_quarantine_until_the_same_subnet_is_held_again() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    let own = daemon.ready().await.holding.own.clone().expect("held");
    let (key, before) = (format!("subnets/{}", own.key.encode()), host.kernel.tables());

    // Somebody else writes over it: running pods go on, no address is handed out.
    host.cluster.put(&key, V4_PEER.1.replace("192.0.2.2", "192.0.2.8").as_bytes());
    daemon.refusing("was taken over by 192.0.2.8").await;
    let file = host.files().read().expect("node.json");
    assert!(matches!(file.readiness, Readiness::NotReady { code: NotReady::Quarantine, .. }));
    assert_eq!(host.kernel.tables(), before);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_lease_is_taken_again_at_once() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    let own = daemon.ready().await.holding.own.clone().expect("held");
    host.cluster.delete(&format!("subnets/{}", own.key.encode()));
    daemon
        .until("in quarantine or past it", |view| {
            view.holding.own.as_ref().is_some_and(|now| now.epoch != own.epoch || now != &own)
                || host.cluster.get(&format!("subnets/{}", own.key.encode())).is_some()
        })
        .await;
    let again = daemon.ready().await.holding.own.clone().expect("held");
    assert_eq!((again.key, again.endpoints), (own.key, own.endpoints));
}
