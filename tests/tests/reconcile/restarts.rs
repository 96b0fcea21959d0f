//! Daemons that come and go, and a store out of reach: nothing is written without a reason, nothing deleted without a snapshot.

use std::net::IpAddr;
use std::time::Duration;

use fabric_core::handoff::Readiness;
use fabric_core::network::NetworkConfig;
use fabricd::files::state_dir::State;
use tokio::time::sleep;

use crate::node::{DUAL, DUAL_PEER, Host, V4, V4_PEER, dev, stays_silent};

#[tokio::test(start_paused = true)]
async fn node_becomes_ready_and_says_so_in_its_files() {
    for (config, peer) in [(V4, V4_PEER), (DUAL, DUAL_PEER)] {
        let host = Host::new(config, &[peer]);
        let mut daemon = host.start();
        daemon.ready().await;
        let file = host.files().read().expect("node.json");
        assert_eq!(file.readiness, Readiness::Ready);
        assert_eq!((file.mtu, file.ipv6_mtu), (1450, (config == DUAL).then_some(1430)));
        assert!(host.files().subnet.exists());
        stays_silent(&host.kernel).await;
    }
}

#[tokio::test(start_paused = true)]
async fn restart_with_nothing_changed_writes_nothing() {
    let host = Host::new(DUAL, &[DUAL_PEER]);
    host.start().ready().await;
    drop(host.kernel.writes());
    host.start().ready().await;
    stays_silent(&host.kernel).await;
    assert!(host.kernel.writes().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_restart_calls_for_no_attention_while_the_store_is_first_read() {
    let host = Host::new(V4, &[V4_PEER]);
    let network = NetworkConfig::decode(V4.as_bytes()).expect("valid");
    let before = State { network: Some(network), ..State::default() };
    let mut daemon = host.start_with(host.cluster.unanswered_node(), before);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(daemon.view.borrow().warnings, Vec::<String>::new());
    daemon.store.set_reachable(true);
    daemon.ready().await;
}

#[tokio::test(start_paused = true)]
async fn peers_that_left_while_the_daemon_was_down_are_swept() {
    let host = Host::new(V4, &[V4_PEER]);
    host.start().ready().await;
    host.cluster.delete(V4_PEER.0);
    host.start().ready().await;
    let tables = host.kernel.tables();
    assert!(
        tables.routes.is_empty() && tables.nexthops.is_empty() && tables.fdb.is_empty() && tables.neighbours.is_empty()
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_is_deleted_while_the_store_cannot_be_reached() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let done = host.kernel.tables();
    daemon.store.set_reachable(false);
    host.cluster.delete(V4_PEER.0);
    stays_silent(&host.kernel).await;
    assert_eq!(host.kernel.tables(), done);
    // Nor by a daemon that starts during the outage: it knows of no lease at all.
    drop(daemon);
    let blind = host.start();
    blind.store.set_reachable(false);
    stays_silent(&host.kernel).await;
    assert_eq!(host.kernel.tables(), done);
    // The word of the daemon before it stands: pods go on being added.
    assert_eq!(host.files().read().expect("node.json").readiness, Readiness::Ready);
}

#[tokio::test(start_paused = true)]
async fn connections_to_the_store_are_given_up_once_when_the_underlay_address_goes() {
    let host = Host::new(V4, &[V4_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let address =
        |text: &str| (dev("eth0"), text.parse::<IpAddr>().expect("ip"), "192.0.2.0/24".parse().expect("valid"));
    host.kernel.edit(|tables| tables.addresses.extend([address("192.0.2.7")]));
    sleep(Duration::from_secs(60)).await;
    assert_eq!(daemon.store.given_up(), 0, "another address that comes changes nothing");
    host.kernel.edit(|tables| tables.addresses.retain(|one| *one != address("192.0.2.1")));
    daemon.until("moved", |view| view.vteps.iter().any(|vtep| vtep.public_ip.to_string() == "192.0.2.7")).await;
    daemon.ready().await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(daemon.store.given_up(), 1);
}
