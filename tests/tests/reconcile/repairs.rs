//! What other programs of the host do: their changes to what is ours are repaired, and what is theirs is left alone.

use std::time::Duration;

use fabric_core::model::Subnet;
use fabric_core::state::{Nexthop, NexthopId, Sysctl, Via};
use fabric_tests::fake_kernel::{BOOT, STATIC, Tables};
use fabricd::status::view::View;
use tokio::time::sleep;

use crate::node::{DUAL, DUAL_PEER, Host, V4, V4_PEER, dev, stays_silent};

#[tokio::test(start_paused = true)]
async fn what_another_program_changes_is_a_repair_and_what_a_lease_changes_is_none() {
    let host = Host::new(DUAL, &[DUAL_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let told = |view: &View| view.repairs.iter().map(|repair| repair.message.clone()).collect::<Vec<_>>();
    assert_eq!(told(&daemon.view.borrow()), [""; 0], "a start repairs nothing");
    host.cluster.put(DUAL_PEER.0, DUAL_PEER.1.replace("02:42:c0:00:02:02", "02:42:c0:00:02:99").as_bytes());
    sleep(Duration::from_secs(15)).await;
    assert_eq!(told(&daemon.view.borrow()), [""; 0], "nor does a peer's change");
    type Damage = fn(&mut Tables);
    let damages: [(Damage, &str); 8] = [
        (
            |t| {
                t.routes.pop_first();
            },
            "route 10.244.2.0/24 was deleted by another program, restored",
        ),
        (
            |t| {
                t.fdb.pop_first();
            },
            "FDB entry 02:42:c0:00:02:99 of fabric.1 was deleted",
        ),
        (
            |t| {
                t.neighbours.pop_first();
            },
            "neighbour 10.244.2.0 of fabric.1 was deleted",
        ),
        (
            |t| {
                t.sysctls.insert(Sysctl::Ipv4Forward, 0);
            },
            "setting net/ipv4/ip_forward was changed",
        ),
        (|t| t.addresses.retain(|(name, ip, _)| name.as_str() == "eth0" || ip.is_ipv6()), "address "),
        (|t| t.delete_nexthop(NexthopId(fabric_core::state::NEXTHOP_ID_BASE)), "; with it 1 route"),
        (
            |t| t.delete_link(&dev("fabric.1")),
            "link fabric.1 was deleted by another program, restored; with it 1 address",
        ),
        (|t| t.filter.clear(), "of the packet filter was deleted by another program, restored"),
    ];
    for (damage, words) in damages {
        // Events about one table keep their distance.
        sleep(Duration::from_secs(11)).await;
        let before = told(&daemon.view.borrow()).len();
        host.kernel.edit(damage);
        daemon.until(words, |view| view.repairs.len() == before + 1 || view.repairs.len() == before + 2).await;
        sleep(Duration::from_secs(1)).await;
        let told = told(&daemon.view.borrow());
        assert!(told.last().is_some_and(|last| last.contains(words)), "{words}: {told:?}");
        assert_eq!(told.len(), before + 1, "{told:?}");
    }
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn whatever_is_taken_away_in_silence_comes_back() {
    type Damage = fn(&mut Tables);
    let damages: [(&str, Damage); 7] = [
        ("device deleted", |tables| tables.delete_link(&dev("fabric.1"))),
        ("device set down", |tables| tables.set_down(&dev("fabric6.1"))),
        ("nexthop deleted", |tables| tables.delete_nexthop(NexthopId(fabric_core::state::NEXTHOP_ID_BASE))),
        ("routes flushed", |tables| tables.routes.clear()),
        ("neighbours flushed", |tables| tables.neighbours.clear()),
        ("FDB flushed", |tables| tables.fdb.clear()),
        ("settings reset", |tables| {
            // IPv4's reverse path filter of the device for IPv6 is nobody's.
            let set = tables.sysctls.iter_mut().filter(|(sysctl, _)| **sysctl != Sysctl::RpFilter(dev("fabric6.1")));
            set.for_each(|(_, value)| *value = 9);
        }),
    ];
    let host = Host::new(DUAL, &[DUAL_PEER]);
    let mut daemon = host.start();
    daemon.ready().await;
    let done = host.kernel.tables().observed().ours;
    for (what, damage) in damages {
        for announced in [true, false] {
            if !announced {
                host.kernel.lose_notifications();
            }
            host.kernel.edit(damage);
            // By event at once; unannounced at the next audit.
            sleep(Duration::from_secs(if announced { 1 } else { 11 })).await;
            host.kernel.overrun();
            let now = host.kernel.tables().observed().ours;
            assert_eq!(now, done, "{what}, announced: {announced}");
        }
    }
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_foreign_is_never_touched() {
    let host = Host::new(V4, &[V4_PEER]);
    let foreign_route = |dst: &str| {
        (
            dst.parse::<Subnet>().expect(dst),
            (STATIC, Via::Direct(Nexthop { gateway: "192.0.2.9".parse().expect("ip"), dev: dev("eth0") })),
        )
    };
    host.kernel.edit(|tables| {
        tables.routes.extend([foreign_route("10.244.2.0/24"), foreign_route("198.51.100.0/24")]);
        tables.nexthops.insert(
            NexthopId(fabric_core::state::NEXTHOP_ID_BASE),
            (STATIC, Nexthop { gateway: "192.0.2.9".parse().expect("ip"), dev: dev("eth0") }),
        );
    });
    let before = host.kernel.tables();
    let mut daemon = host.start();
    let view = daemon.until("in conflict", |view| !view.troubles.is_empty()).await;
    let trouble = view.troubles.values().next().expect("one").to_string();
    assert!(trouble.contains("a route that is not ours leads to 10.244.2.0/24"), "{trouble}");
    assert_eq!(host.kernel.tables().routes, before.routes);
    assert_eq!(host.kernel.tables().nexthops, before.nexthops);
    // When it is gone, ours takes its place, under an id of its own.
    host.kernel.edit(|tables| drop(tables.routes.remove(&"10.244.2.0/24".parse().expect("valid"))));
    daemon.ready().await;
    assert_eq!(host.kernel.tables().nexthops.len(), 2);
    stays_silent(&host.kernel).await;
}

#[tokio::test(start_paused = true)]
async fn flannels_direct_route_to_the_peer_itself_gives_way_and_no_other() {
    for (config, direct) in [(V4.to_owned(), false), (V4.replace("}}", r#","DirectRouting":true}}"#), true)] {
        for (gateway, protocol, yields) in
            [("192.0.2.2", BOOT, true), ("192.0.2.9", BOOT, false), ("192.0.2.2", STATIC, false)]
        {
            let host = Host::new(&config, &[V4_PEER]);
            let (dst, gateway) = ("10.244.2.0/24".parse::<Subnet>().expect("valid"), gateway.parse().expect("ip"));
            let theirs = (protocol, Via::Direct(Nexthop { gateway, dev: dev("eth0") }));
            host.kernel.edit(|tables| drop(tables.routes.insert(dst, theirs.clone())));
            let mut daemon = host.start();
            if yields {
                daemon.ready().await;
                let (protocol, via) = host.kernel.tables().routes[&dst].clone();
                assert_eq!((protocol, matches!(via, Via::Direct(_))), (250, direct));
            } else {
                let view = daemon.until("in conflict", |view| !view.troubles.is_empty()).await;
                let trouble = view.troubles.values().next().expect("one").to_string();
                assert!(trouble.contains("a route that is not ours leads to 10.244.2.0/24"), "{trouble}");
                assert_eq!(host.kernel.tables().routes[&dst], theirs);
            }
            stays_silent(&host.kernel).await;
        }
    }
}
