//! What keeps a node from being ready, and what is warned of: each is told with the way out.

use std::time::Duration;

use fabric_core::state::VxlanLink;
use tokio::time::sleep;

use crate::node::{DUAL, DUAL_PEER, Host, V4, V4_PEER, dev};

#[tokio::test(start_paused = true)]
async fn every_obstacle_is_said_with_the_way_out() {
    let config = |json: &str| Host::new(json, &[]);
    let mut host = config("{}");
    host.cluster.delete("config");
    assert!(host.start().refusing("there is no network config").await.contains("make one"));

    let reason = config(r#"{"Network":"10.244.0.0/16"}"#).start().refusing("there is no Backend").await;
    assert!(reason.contains(r#"add "Backend": {"Type": "vxlan"}"#), "{reason}");

    let reason = config(&V4.replace("10.244.0.0", "192.0.0.0")).start().refusing("overlaps").await;
    assert!(reason.contains("192.0.0.0/16 overlaps 192.0.2.0/24"), "{reason}");

    host = config(V4);
    host.iface = "eth7";
    let reason = host.start().refusing("no interface fits").await;
    assert!(reason.contains("eth0 (192.0.2.1 2001:db8::1)"), "{reason}");

    host = config(V4);
    host.kernel.edit(|tables| tables.add_link(dev("fabric.1"), "bridge", 1500));
    let reason = host.start().refusing("exists and is not ours").await;
    assert!(reason.contains("(bridge)") && reason.contains("ip link del fabric.1"), "{reason}");

    host = config(V4);
    host.kernel.fail(libc::EPERM, |_| true);
    host.start().refusing("ip link add fabric.1").await;

    let tiny = r#"{"Network":"10.244.0.0/28","SubnetLen":30,"SubnetMax":"10.244.0.4","Backend":{"Type":"vxlan"}}"#;
    let full = V4_PEER.1.replace("192.0.2.2", "192.0.2.77");
    host = Host::new(tiny, &[("subnets/10.244.0.4-30", &full)]);
    host.start().refusing("all 1 IPv4 subnets of 10.244.0.0/28 are leased or reserved").await;

    let twin = V4_PEER
        .1
        .replace("192.0.2.2", "192.0.2.1")
        .replace("}}", r#"},"Fabric":{"v":1,"node":"node-9","boot":"b","netns":1,"epoch":1}}"#);
    host = Host::new(V4, &[(V4_PEER.0, &twin)]);
    let reason = host.start().refusing("the public address 192.0.2.1").await;
    assert!(reason.contains("node-1") && reason.contains("node-9") && reason.contains("--iface"), "{reason}");
}

#[tokio::test(start_paused = true)]
async fn device_conflict_shows_every_peer_as_pending_with_the_conflict() {
    for (config, peer, name) in [(V4, V4_PEER, "fabric.1"), (DUAL, DUAL_PEER, "fabric6.1")] {
        let host = Host::new(config, &[peer]);
        let mut daemon = host.start();
        daemon.ready().await;
        host.kernel.edit(|tables| {
            tables.delete_link(&dev(name));
            tables.add_link(dev(name), "bridge", 1500);
        });
        let reason = daemon.refusing("exists and is not ours (bridge)").await;
        let view = daemon.view.borrow().clone();
        let troubles: Vec<String> = view.troubles.values().map(ToString::to_string).collect();
        assert_eq!(troubles, [reason], "{name}");
        // When it is gone the peer is programmed.
        host.kernel.edit(|tables| tables.delete_link(&dev(name)));
        daemon.ready().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_cannot_have_a_device_claims_nothing_and_writes_nothing_until_it_can() {
    // flannel's record of this node, and its device.
    let own = ("subnets/10.244.9.0-24", V4_PEER.1.replace("192.0.2.2", "192.0.2.1").replace("00:02:02", "00:02:01"));
    let host = Host::new(V4, &[V4_PEER, (own.0, &own.1)]);
    let vxlan = VxlanLink {
        vni: 1.try_into().expect("valid"),
        port: 8472,
        gbp: false,
        mac: "02:42:c0:00:02:01".parse().expect("valid"),
        local: "192.0.2.1".parse().expect("ip"),
        mtu: 1450,
        learning: false,
        up: true,
    };
    host.kernel.edit(|tables| tables.add_vxlan(dev("flannel.1"), vxlan).expect("added"));
    let before = host.kernel.tables();
    let mut daemon = host.start();
    let reason = daemon.refusing("the interface flannel.1 already uses VNI 1 on UDP port 8472").await;
    assert!(reason.contains("ip link del flannel.1"), "{reason}");
    sleep(Duration::from_secs(60)).await;
    assert_eq!(host.cluster.get(own.0).as_deref(), Some(own.1.as_bytes()), "the record is as flannel wrote it");
    assert_eq!((host.kernel.tables(), host.kernel.writes()), (before, vec![]));

    host.kernel.edit(|tables| tables.delete_link(&dev("flannel.1")));
    let view = daemon.ready().await;
    let held = view.holding.own.clone().expect("held");
    assert_eq!(format!("subnets/{}", held.key.encode()), own.0);
}

#[tokio::test(start_paused = true)]
async fn flannel_in_a_network_without_ipv4_is_warned_of() {
    let config =
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;
    let value = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::2","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:42:c0:00:06:02"}}"#;
    for (config, peer, warns) in
        [(config, ("subnets/0.0.0.0-0&fd00:10:244:2::-64", value), true), (DUAL, DUAL_PEER, false)]
    {
        let host = Host::new(config, &[peer]);
        let view = host.start().ready().await;
        let told = view.warnings.iter().any(|warning| warning.contains("leased by a flannel node"));
        assert_eq!(told, warns, "{:?}", view.warnings);
    }
}
