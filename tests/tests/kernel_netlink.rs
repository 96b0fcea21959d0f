//! What only the real kernel can show, with `ip -j`, `nft` and `iptables` as independent witnesses.

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabric_core::diff::{Change, Op};
use fabric_core::model::{Family, IfName};
use fabric_core::state::{KernelState, Sysctl};
use fabric_tests::conformance::kernel::{World, device, look, settle, v, wanted, woken};
use fabric_tests::conformance::real_world::RealWorld;
use fabric_tests::netns::{in_netns_async, ip, run};
use fabricd::kernel::bridge::{Bridge, remove_unless_used};
use fabricd::kernel::netlink::{Netlink, Options};
use fabricd::kernel::{Kernel, KernelError, Touched};
use serde_json::Value;

/// The first row of a JSON answer of iproute2.
fn first(answer: &str) -> Value {
    let rows: Value = serde_json::from_str(answer).expect("JSON");
    rows[0].clone()
}

/// True when nothing was read again, hence nothing heard that matters. (An observe hears all that happened before.)
async fn nobody_was_woken(kernel: &mut impl Kernel, act: impl FnOnce()) -> bool {
    let before = look(kernel).await;
    act();
    Arc::ptr_eq(&before, &look(kernel).await)
}

#[test]
fn iproute2_sees_what_was_made_over_ipv4() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        settle(world.kernel(), &wanted(Family::V4, 3)).await;
        let link = first(&ip("-j -d link show dev fabric.1"));
        assert_eq!(link["address"], "02:42:00:00:00:00");
        assert_eq!(link["mtu"], 1450);
        assert!(link["flags"].as_array().expect("flags").contains(&"UP".into()));
        assert_eq!(link["link"], Value::Null, "no parent: it outlives the underlay interface");
        let vxlan = &link["linkinfo"]["info_data"];
        assert_eq!((&vxlan["id"], &vxlan["port"], &vxlan["local"]), (&1.into(), &8472.into(), &"192.0.2.1".into()));
        assert_eq!((&vxlan["learning"], &vxlan["ttl"]), (&false.into(), &0.into()));
        assert_eq!(first(&ip("-j nexthop show"))["flags"], serde_json::json!(["onlink"]));
        let route = first(&ip("-j route show 10.64.1.0/24"));
        assert_eq!((&route["protocol"], &route["nhid"]), (&"250".into(), &0xFA00_0001_u32.into()));
        assert_eq!(route["metric"], Value::Null);
        assert_eq!(ip("route show 10.64.3.0/24"), "10.64.3.0/24 via 192.0.2.5 dev eth0 proto 250 \n");
        assert_eq!(
            run("bridge", "fdb show dev fabric.1"),
            "02:42:00:00:00:02 dst 192.0.2.4 self permanent\n02:42:00:00:00:01 dst 192.0.2.3 self permanent\n"
        );
        assert_eq!(ip("neighbour show 10.64.1.0"), "10.64.1.0 dev fabric.1 lladdr 02:42:00:00:00:01 PERMANENT \n");
    });
}

#[test]
fn iproute2_sees_what_was_made_over_ipv6() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        settle(world.kernel(), &wanted(Family::V6, 3)).await;
        let vxlan = first(&ip("-j -d link show dev fabric6.1"))["linkinfo"]["info_data"].clone();
        assert_eq!((&vxlan["local6"], &vxlan["port"]), (&"2001:db8:ff::1".into(), &8472.into()));
        assert_eq!((&vxlan["udp_zero_csum6_tx"], &vxlan["udp_zero_csum6_rx"]), (&false.into(), &false.into()));
        let address = ip("address show dev fabric6.1 scope global");
        assert!(address.contains("2001:db8::/128") && address.contains("nodad"), "{address}");
        assert!(!address.contains("tentative"), "{address}");
        assert_eq!(
            ip("-6 route show 2001:db8:0:1::/64"),
            "2001:db8:0:1::/64 via 2001:db8:0:1:: dev fabric6.1 proto 250 metric 1024 onlink pref medium\n"
        );
        assert!(ip("-6 neighbour show 2001:db8:0:1::").contains("lladdr 02:42:00:00:00:01 PERMANENT"));
    });
}

#[test]
fn link_local_addresses_of_the_kernel_are_neither_ours_nor_touched() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        for family in Family::ALL {
            let want = wanted(family, 2);
            settle(world.kernel(), &want).await;
            assert!(ip(&format!("address show dev {}", device(family))).contains("inet6 fe80::"));
            assert_eq!(settle(world.kernel(), &want).await, "");
            settle(world.kernel(), &KernelState::default()).await;
        }
    });
}

#[test]
fn restarted_daemon_sees_what_the_one_before_made_and_writes_nothing() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        let mut want = wanted(Family::V4, 20);
        let v6 = wanted(Family::V6, 20);
        want.links.extend(v6.links);
        want.addresses.extend(v6.addresses);
        want.fdb.extend(v6.fdb);
        want.neighbours.extend(v6.neighbours);
        want.routes.extend(v6.routes);
        want.sysctls.extend(v6.sysctls);
        settle(world.kernel(), &want).await;
        drop(world);
        let mut restarted = Netlink::new(Options::default()).expect("netlink opens");
        assert_eq!(settle(&mut restarted, &want).await, "");
    });
}

#[test]
fn churn_of_pods_on_the_node_wakes_nobody() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        settle(world.kernel(), &wanted(Family::V4, 3)).await;
        ip("link add cni0 type bridge");
        ip("link add pod1 type veth peer name pod1-peer");
        look(world.kernel()).await;
        let quiet = nobody_was_woken(world.kernel(), || {
            ip("neighbour add 10.64.0.5 lladdr 02:00:00:00:00:05 dev cni0");
            ip("neighbour del 10.64.0.5 dev cni0");
            ip("address add fe80::5/64 dev pod1");
            ip("route add 10.64.0.6/32 dev lo metric 77");
            ip("route add 10.64.0.6/32 dev lo table 100");
        });
        assert!(quiet.await);
    });
}

#[test]
fn changed_setting_wakes() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        for (family, file, setting) in [
            (Family::V4, "/proc/sys/net/ipv4/ip_forward", Sysctl::Ipv4Forward),
            (Family::V6, "/proc/sys/net/ipv6/conf/all/forwarding", Sysctl::Ipv6Forward),
        ] {
            settle(world.kernel(), &wanted(family, 2)).await;
            look(world.kernel()).await;
            std::fs::write(file, "0").expect("written");
            woken(world.kernel()).await;
            assert_eq!(look(world.kernel()).await.ours.sysctls[&setting], 0);
        }
    });
}

#[test]
fn setting_that_cannot_be_written_says_which_file_and_the_way_out() {
    in_netns_async(|| async {
        let mut world = RealWorld::new(Options { sysctl_root: "/proc/sys/net/nowhere".into(), ..Options::default() });
        let op = Op::Sysctl(Sysctl::Ipv4Forward, 1);
        let error = world.kernel().apply(&[op]).await.remove(0).expect_err("no such file");
        assert_eq!(
            error.to_string(),
            "sysctl -w net/ipv4/ip_forward=1: No such file or directory (ENOENT): \
             /proc/sys/net/nowhere/ipv4/ip_forward; is IPv6 turned off on this host, or the device gone?"
        );
    });
}

#[test]
fn refusal_carries_the_kernels_own_words() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        ip("link add flannel.1 type vxlan id 1 dstport 8472 local 192.0.2.1");
        let dev = device(Family::V4);
        let create = Op::Link(dev, Change::Create(wanted(Family::V4, 1).links[&dev]));
        let error = world.kernel().apply(&[create]).await.remove(0).expect_err("the VNI is taken");
        let KernelError::Refused { op, detail, .. } = &error else { panic!("{error}") };
        assert!(op.starts_with("ip link add fabric.1 "), "{op}");
        assert!(
            detail.starts_with("A VXLAN device with the specified VNI already exists; an interface with"),
            "{detail}"
        );
    });
}

#[test]
fn lost_notifications_make_everything_be_read_again() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        settle(world.kernel(), &wanted(Family::V4, 2)).await;
        look(world.kernel()).await;
        // More events than the monitor's buffer holds, while this thread, on which it runs, does nothing else.
        let mut batch = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().expect("ip runs");
        let lines: String = (0..60_000)
            .map(|n| format!("route add 172.{}.{}.{}/32 dev eth0\n", 16 + n / 65536, n / 256 % 256, n % 256))
            .collect();
        std::io::Write::write_all(&mut batch.stdin.take().expect("piped"), lines.as_bytes()).expect("taken");
        assert!(batch.wait().expect("ip ends").success());
        ip("neighbour del 10.64.1.0 dev fabric.1");
        assert_eq!(woken(world.kernel()).await, Touched::Everything);
        let steps = settle(world.kernel(), &wanted(Family::V4, 2)).await;
        assert_eq!(steps, "+ ip neighbour replace 10.64.1.0 lladdr 02:42:00:00:00:01 dev fabric.1 nud permanent\n");
        assert_eq!(look(world.kernel()).await.foreign.routes.len(), 60_001);
    });
}

#[test]
fn host_is_seen_with_its_addresses_default_routes_and_ways() {
    in_netns_async(|| async {
        let far: IpAddr = v("203.0.113.9");
        let far6: IpAddr = v("2001:db8:77::9");
        let nowhere: IpAddr = v("2001:db9::1");
        let mut world = RealWorld::new(Options { can_reach: vec![far, far6, nowhere], ..Options::default() });
        ip("address add 2001:db8:ff::77/64 dev eth0 preferred_lft 0");
        ip("address add 192.0.2.77/32 peer 198.51.100.0/24 dev eth0");
        ip("route add default via 192.0.2.254 dev eth0 metric 50 src 192.0.2.1");
        ip("-6 route add 2001:db8:77::/64 via 2001:db8:ff::fe dev eth0");
        let host = look(world.kernel()).await.host.clone();
        let eth0 = host.links.iter().find(|link| link.name == v::<IfName>("eth0")).expect("seen");
        assert!(eth0.up && !eth0.loopback && eth0.mtu == 1500);
        let addresses: Vec<String> = eth0.addresses.iter().map(|(ip, prefix)| format!("{ip} in {prefix}")).collect();
        assert_eq!(
            addresses,
            ["192.0.2.1 in 192.0.2.0/24", "192.0.2.77 in 198.51.100.0/24", "2001:db8:ff::1 in 2001:db8:ff::/64"]
        );
        assert!(host.links.iter().any(|link| link.loopback));
        let [route] = &host.default_routes[..] else { panic!("{:?}", host.default_routes) };
        assert_eq!((route.dev.as_str(), route.metric, route.source), ("eth0", 50, Some(v("192.0.2.1"))));
        let dev: IfName = v("eth0");
        assert_eq!(
            host.reaches,
            [(far, dev, v("192.0.2.1")), (far6, dev, v("2001:db8:ff::1"))],
            "to the third there is no way"
        );
    });
}

#[test]
fn route_that_decides_the_way_to_an_address_wakes() {
    in_netns_async(|| async {
        let far: IpAddr = v("203.0.113.9");
        let mut world = RealWorld::new(Options { can_reach: vec![far], ..Options::default() });
        assert_eq!(look(world.kernel()).await.host.reaches, []);
        ip("route add 203.0.113.0/24 via 192.0.2.254 dev eth0 metric 9");
        woken(world.kernel()).await;
        assert_eq!(look(world.kernel()).await.host.reaches.len(), 1);
    });
}

#[test]
fn chains_that_drop_what_is_forwarded_are_found_with_their_remedy() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        assert_eq!(look(world.kernel()).await.forward_drops, []);
        run("iptables", "-P FORWARD DROP");
        run("iptables-legacy", "-P FORWARD DROP");
        run("ip6tables-legacy", "-A FORWARD -j ACCEPT");
        run("ip6tables-legacy", "-P FORWARD DROP");
        for table in ["inet guard", "inet fabric"] {
            run("nft", &format!("add table {table}"));
            run("nft", &format!("add chain {table} through {{ type filter hook forward priority 5 ; policy drop ; }}"));
            run("nft", &format!("add chain {table} inwards {{ type filter hook input priority 5 ; policy drop ; }}"));
        }
        run("nft", "add chain inet guard open { type filter hook forward priority 6 ; policy accept ; }");
        world.kernel().distrust();
        let drops = look(world.kernel()).await.forward_drops.clone();
        let chains: Vec<&str> = drops.iter().map(|drop| drop.chain.as_str()).collect();
        assert_eq!(
            chains,
            [
                "inet guard through",
                "ip filter FORWARD",
                "iptables-legacy FORWARD",
                "inet guard through",
                "ip6tables-legacy FORWARD",
            ]
        );
        for drop in &drops {
            // The remedy is to be believed: it runs as it stands.
            let network = if drop.family == Family::V6 { "2001:db8::/48" } else { "10.64.0.0/10" };
            for command in drop.remedy.replace("{network}", network).lines() {
                let (program, arguments) = command.split_once(' ').expect("a command");
                run(program, arguments);
            }
        }
        assert!(drops[1].remedy.starts_with("iptables -I FORWARD -s {network} -j ACCEPT\n"));
    });
}

#[test]
fn iptables_that_accepts_and_iptables_that_nobody_uses_are_not_reported() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        assert_eq!(look(world.kernel()).await.forward_drops, []);
        run("iptables-legacy", "-A FORWARD -j DROP");
        world.kernel().distrust();
        assert_eq!(look(world.kernel()).await.forward_drops, [], "its policy is accept");
    });
}

#[test]
fn five_thousand_peers_are_written_and_read_in_a_moment() {
    for family in Family::ALL {
        in_netns_async(|| async move {
            let mut world = RealWorld::default();
            let want = wanted(family, 5000);
            let began = Instant::now();
            settle(world.kernel(), &want).await;
            let written = began.elapsed();
            assert_eq!(settle(world.kernel(), &want).await, "");
            let all = began.elapsed();
            println!("5,000 {family} peers: written in {written:?}, read and compared in {:?}", all - written);
            // Far more than it takes: a sign that batches work, not a benchmark.
            assert!(all < Duration::from_secs(10), "{all:?}");
        });
    }
}

#[test]
fn bridge_of_the_pods_goes_when_no_pod_is_plugged_in_and_no_other_bridge_does() {
    in_netns_async(|| async {
        let gateways = ["10.244.3.1", "fd00:3::1"].map(|ip| ip.parse::<IpAddr>().expect("an address"));
        ip("link add docker0 type bridge");
        ip("address add 172.17.0.1/16 dev docker0");
        assert_eq!(remove_unless_used(&gateways).await.expect("looked"), Bridge::Absent);

        ip("link add cni0 type bridge");
        ip("address add 10.244.3.1/24 dev cni0");
        ip("link add pod type veth peer name veth1");
        ip("link set veth1 master cni0");
        let used = Bridge::InUse { name: "cni0".to_owned(), ports: 1 };
        assert_eq!(remove_unless_used(&gateways).await.expect("looked"), used);
        assert!(ip("link show cni0").contains("cni0"));

        ip("link delete pod");
        let removed = Bridge::Removed { name: "cni0".to_owned() };
        assert_eq!(remove_unless_used(&gateways).await.expect("removed"), removed);
        let left = ip("link show type bridge");
        assert!(left.contains("docker0") && !left.contains("cni0"), "{left}");
    });
}
