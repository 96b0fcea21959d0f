//! What only the real kernel can show, with `ip -j`, `nft` and `iptables` as independent witnesses.

use std::net::IpAddr;
use std::os::fd::{FromRawFd as _, IntoRawFd as _};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use fabric_core::diff::Change;
use fabric_core::diff::routing::Op;
use fabric_core::firewall::Interface;
use fabric_core::firewall::traffic::{BlockingChain, Node};
use fabric_core::model::{Family, IfName, Vni};
use fabric_core::state::{NexthopId, Routing, Sysctl, Via};
use fabric_tests::conformance::kernel::{World, device, look, settle, v, wanted, woken};
use fabric_tests::conformance::real_world::RealWorld;
use fabric_tests::netns::{in_netns_async, ip, run};
use fabricd::kernel::netlink::Netlink;
use fabricd::kernel::routing::bridge::remove_unused;
use fabricd::kernel::{AUDITS, Kernel, KernelError, Observed, Options, Touched};
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
            settle(world.kernel(), &Routing::default()).await;
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
        let error = world.kernel().apply(&[op.into()]).await.remove(0).expect_err("no such file");
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
        let error = world.kernel().apply(&[create.into()]).await.remove(0).expect_err("the VNI is taken");
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

/// From now on the kernel's notifications go to nobody in this namespace. (Nobody but the monitor asks for any.)
#[expect(unsafe_code, reason = "the monitor's socket is nobody's to hand out")]
fn deafen() {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").expect("the namespace's sockets");
    let inodes: Vec<String> = sockets
        .lines()
        .filter_map(|line| {
            let [_, "0", _, groups, .., inode] = line.split_whitespace().collect::<Vec<_>>()[..] else { return None };
            (u32::from_str_radix(groups, 16) != Ok(0)).then(|| format!("socket:[{inode}]"))
        })
        .collect();
    assert_eq!(inodes.len(), 1, "the monitor's:\n{sockets}");
    let mut found = 0;
    for file in std::fs::read_dir("/proc/self/fd").expect("our files").flatten() {
        if std::fs::read_link(file.path()).is_ok_and(|target| inodes.contains(&target.display().to_string())) {
            let number = file.file_name().to_str().and_then(|name| name.parse().ok()).expect("a number");
            // SAFETY: the monitor, which outlives this, has it open; it is given back without being closed.
            let socket = unsafe { netlink_sys::Socket::from_raw_fd(number) };
            (1..=32).for_each(|group| socket.drop_membership(group).expect("the socket's own to leave"));
            assert_eq!(socket.into_raw_fd(), number);
            found += 1;
        }
    }
    assert_eq!(found, 1);
}

#[test]
fn what_was_never_announced_shows_within_six_audits_and_what_is_small_at_the_first() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        settle(world.kernel(), &wanted(Family::V4, 2)).await;
        let before = look(world.kernel()).await.ours.clone();
        deafen();
        ip("link set fabric.1 mtu 1300");
        ip("address add 192.0.2.99/24 dev eth0");
        run("bridge", "fdb del 02:42:00:00:00:01 dev fabric.1 dst 192.0.2.3 self");
        ip("neighbour del 10.64.1.0 dev fabric.1");
        ip("nexthop add id 4194304099 via 10.64.1.0 dev fabric.1 onlink proto 250");
        ip("route del 10.64.1.0/24");
        ip("route add 10.64.9.0/24 dev lo");
        assert_eq!(look(world.kernel()).await.ours, before, "nobody has told");

        world.kernel().audit();
        let first = look(world.kernel()).await;
        assert_eq!(first.ours.links[&v::<IfName>("fabric.1")].mtu, 1300);
        let eth0 = first.host.links.iter().find(|link| link.name == v::<IfName>("eth0")).expect("seen");
        assert!(eth0.addresses.iter().any(|(ip, _)| *ip == v::<IpAddr>("192.0.2.99")));
        let missed = |seen: &Observed| {
            let (ours, was) = (&seen.ours, &before);
            [
                ours.fdb.len() == was.fdb.len(),
                ours.neighbours.len() == was.neighbours.len(),
                ours.nexthops.len() == was.nexthops.len(),
                ours.routes.len() == was.routes.len(),
                !seen.foreign.routes.contains_key(&v("10.64.9.0/24")),
            ]
        };
        let late = missed(&first).into_iter().filter(|missed| *missed).count();
        assert!(late >= 3, "no audit reads all the tables of thousands");
        for _ in 1..AUDITS {
            world.kernel().audit();
            look(world.kernel()).await;
        }
        assert_eq!(missed(&*look(world.kernel()).await), [false; 5]);
    });
}

#[test]
fn refused_write_has_its_tables_read_anew_and_wakes_nobody() {
    in_netns_async(|| async {
        let mut world = RealWorld::new(Options { sysctl_root: "/proc/sys/net/nowhere".into(), ..Options::default() });
        let mut want = wanted(Family::V4, 2);
        want.sysctls.clear();
        settle(world.kernel(), &want).await;
        look(world.kernel()).await;
        deafen();
        ip("nexthop del id 4194304001");
        let route = Op::Route(v("10.64.7.0/24"), Change::Create(Via::Nexthop(NexthopId(0xFA00_0001))));
        for op in [route, Op::Sysctl(Sysctl::Ipv4Forward, 1)] {
            let refused = world.kernel().apply(&[op.clone().into()]).await;
            assert!(refused[0].is_err(), "{op}");
            let woken = tokio::time::timeout(Duration::ZERO, world.kernel().changed()).await;
            assert!(woken.is_err(), "the next try comes in its own time: {op}");
        }
        let seen = look(world.kernel()).await;
        assert!(!seen.ours.nexthops.contains_key(&NexthopId(0xFA00_0001)), "why it was refused is known");
        assert!(!seen.ours.routes.contains_key(&v("10.64.1.0/24")), "and what went with it");
    });
}

/// What the kernel announces, and what nobody would know of but for an audit: docs/kernel-state.md.
#[test]
fn kernel_announces_every_change_of_the_tables_of_thousands() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        let want = wanted(Family::V4, 2);
        for deed in [
            "bridge fdb flush dev fabric.1",
            "bridge fdb replace 02:42:00:00:00:01 dev fabric.1 dst 192.0.2.9 self permanent",
            "ip link set fabric.1 down",
            "ip link set fabric.1 arp off",
            "ip link set fabric.1 type vxlan learning",
            "ip link set fabric.1 address 02:00:00:00:00:98",
            "ip neighbour flush dev fabric.1 nud permanent",
            "ip nexthop flush proto 250",
            "ip route del 10.64.1.0/24",
            "ip address flush dev fabric.1",
        ] {
            settle(world.kernel(), &want).await;
            look(world.kernel()).await;
            let (program, arguments) = deed.split_once(' ').expect("a command");
            run(program, arguments);
            woken(world.kernel()).await;
            assert_ne!(settle(world.kernel(), &want).await, "", "{deed}");
        }
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

/// Where packets of ours pass on the host of these tests.
fn node(family: Family) -> Node {
    let interface = |name, kind| Interface { name: v(name), index: None, kind };
    let (network, own, local) = match family {
        Family::V4 => ("10.64.0.0/12", "10.64.3.0/24", "192.0.2.1"),
        Family::V6 => ("2001:db8::/48", "2001:db8:0:3::/64", "2001:db8:ff::1"),
    };
    Node {
        network: v(network),
        own: v(own),
        bridge: interface("cni0", Some("bridge")),
        tunnel: interface("fabric.1", Some("vxlan")),
        underlay: interface("eth0", None),
        local: v(local),
        port: 8472,
        vni: Vni::DEFAULT,
        untracked: false,
        direct: false,
    }
}

/// What stands in the way of packets of ours, in both families.
async fn obstacles(kernel: &mut impl Kernel) -> Vec<BlockingChain> {
    kernel.audit();
    let firewall = look(kernel).await.firewall.clone();
    Family::ALL.iter().flat_map(|family| node(*family).obstacles(&firewall, Vec::new)).collect()
}

/// Loads rules of others, and runs what is printed for each chain that they drop by, until none is left.
async fn remedies_clear(world: &mut RealWorld, rules: &[&str], chains: &[&str]) {
    for rule in rules {
        let (program, arguments) = rule.split_once(' ').expect("a command");
        run(program, arguments);
    }
    let found = obstacles(world.kernel()).await;
    let named: Vec<String> = found.iter().map(|o| format!("{} {} {}", o.by.kind, o.by.table, o.by.chain)).collect();
    assert_eq!(named, chains, "{found:#?}");
    let mut done: Vec<&String> = vec![];
    for command in found.iter().flat_map(|obstacle| &obstacle.remedy) {
        if !done.contains(&command) {
            let (program, arguments) = command.split_once(' ').expect("a command");
            run(program, arguments);
            done.push(command);
        }
    }
    assert_eq!(obstacles(world.kernel()).await, [], "after {done:?}");
}

#[test]
fn chains_that_drop_packets_of_ours_are_found_and_their_remedies_clear_that() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        assert_eq!(obstacles(world.kernel()).await, []);
        let base = |name: &str, hook: &str, policy: &str| {
            format!("nft add chain inet guard {name} {{ type filter hook {hook} priority 5 ; policy {policy} ; }}")
        };
        remedies_clear(
            &mut world,
            &[
                "nft add table inet guard",
                &base("through", "forward", "drop"),
                &base("inwards", "input", "drop"),
                &base("open", "forward", "accept"),
                "nft add rule inet guard open ip saddr 10.64.0.0/12 drop",
            ],
            &[
                "inet guard inwards",
                "inet guard open",
                "inet guard through",
                "inet guard inwards",
                "inet guard through",
            ],
        )
        .await;
        run("nft", "delete table inet guard");
        remedies_clear(
            &mut world,
            &[
                "iptables-nft -P FORWARD DROP",
                "ip6tables-nft -A FORWARD -j REJECT",
                "iptables-nft -N gone",
                "iptables-nft -A gone -p udp -j DROP",
                "iptables-nft -A INPUT -j gone",
                "iptables-nft -t raw -A PREROUTING -s 10.64.0.0/12 -j DROP",
            ],
            &["ip filter gone", "ip filter FORWARD", "ip raw PREROUTING", "ip6 filter FORWARD"],
        )
        .await;
        run("nft", "flush ruleset");
        remedies_clear(
            &mut world,
            &[
                "iptables-legacy -P FORWARD DROP",
                "ip6tables-legacy -A FORWARD -j ACCEPT",
                "ip6tables-legacy -P FORWARD DROP",
                "ip6tables-legacy -A INPUT -p udp --dport 8472 -j REJECT",
                "iptables-legacy -t mangle -A INPUT -i eth0 -j DROP",
            ],
            &["iptables-legacy mangle INPUT", "iptables-legacy filter FORWARD", "ip6tables-legacy filter INPUT"],
        )
        .await;
    });
}

#[test]
fn chains_of_bridges_and_devices_are_named_and_not_judged() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        run("nft", "add table bridge guard");
        run("nft", "add chain bridge guard through { type filter hook forward priority 0 ; policy drop ; }");
        world.kernel().audit();
        let unread = look(world.kernel()).await.firewall.unread.clone();
        assert_eq!(unread, ["bridge guard through".to_owned()].into());
    });
}

#[test]
fn firewalld_is_told_in_its_own_words_and_is_open_after_its_own_commands() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/firewalld");
        let cluster = Node { network: v("10.244.0.0/16"), own: v("10.244.3.0/24"), ..node(Family::V4) };
        run("nft", &format!("-f {folder}/closed.nft"));
        world.kernel().audit();
        let firewall = look(world.kernel()).await.firewall.clone();
        let found = cluster.obstacles(&firewall, Vec::new);
        let told: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 2, "{told:#?}");
        assert!(told[0].starts_with("inet firewalld filter_IN_public rule") && told[0].contains("reject"), "{told:#?}");
        assert!(told[1].starts_with("inet firewalld filter_FWD_public rule"), "{told:#?}");
        assert_eq!(
            found.iter().flat_map(|obstacle| &obstacle.remedy).collect::<Vec<_>>(),
            [
                "firewall-cmd --permanent --zone=public --add-port=8472/udp",
                "firewall-cmd --reload",
                "firewall-cmd --permanent --zone=trusted --add-source=10.244.0.0/16",
                "firewall-cmd --reload"
            ]
        );
        assert!(cluster.needs_tracking(&firewall).is_some(), "it judges states");

        run("nft", "flush ruleset");
        run("nft", &format!("-f {folder}/open.nft"));
        world.kernel().audit();
        let firewall = look(world.kernel()).await.firewall.clone();
        assert_eq!(cluster.obstacles(&firewall, Vec::new), []);
    });
}

#[test]
fn ten_thousand_services_of_kube_proxy_are_read_in_a_moment() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        // As kube-proxy has them: chains for translation, and a set of addresses that is looked into on forward.
        let chains: String = (0..10_000).map(|n| format!("chain KUBE-SVC-{n} {{ }}\n")).collect();
        let ips: Vec<String> = (0..10_000).map(|n| format!("198.18.{}.{}", n / 250, n % 250)).collect();
        let rules = format!(
            "table ip kube-proxy {{\n{chains} set cluster-ips {{ type ipv4_addr; elements = {{ {} }} }}\n\
             chain filter-forward {{ type filter hook forward priority 0; ct state new ip daddr @cluster-ips reject; }}\n}}\n",
            ips.join(", ")
        );
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), rules).expect("written");
        run("nft", &format!("-f {}", file.path().display()));
        let began = Instant::now();
        assert_eq!(obstacles(world.kernel()).await, []);
        let first = began.elapsed();
        let began = Instant::now();
        assert_eq!(obstacles(world.kernel()).await, []);
        println!("10,000 services: read and judged in {first:?}, judged again in {:?}", began.elapsed());
        let firewall = look(world.kernel()).await.firewall.clone();
        let table = firewall.tables.iter().find(|table| table.name == "kube-proxy").expect("it is read");
        assert_eq!(table.chains.len(), 1, "chains that are not reached are not read");
        assert_eq!(table.sets["cluster-ips"].elements.len(), 10_000);
    });
}

#[test]
fn foreign_rule_wakes_and_one_of_translation_is_not_read() {
    in_netns_async(|| async {
        let mut world = RealWorld::default();
        look(world.kernel()).await;
        for line in ["-N KUBE-SERVICES", "-A PREROUTING -j KUBE-SERVICES"] {
            run("iptables-nft", &format!("-t nat {line}"));
        }
        run("iptables-nft", "-A FORWARD -s 192.0.2.0/24 -j DROP");
        woken(world.kernel()).await;
        let firewall = look(world.kernel()).await.firewall.clone();
        let chains: Vec<&String> = firewall.tables.iter().flat_map(|table| table.chains.keys()).collect();
        assert_eq!(chains, ["FORWARD"]);
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
fn bridge_is_removed_when_it_has_no_port_and_no_other_bridge_is() {
    in_netns_async(|| async {
        let names = ["cni0", "br-pods", "veth1"].map(|name| name.parse::<IfName>().expect("a name")).into();
        ip("link add docker0 type bridge");
        assert_eq!(remove_unused(&names).await.expect("looked"), []);

        ip("link add cni0 type bridge");
        ip("link add br-pods type bridge");
        ip("link add pod type veth peer name veth1");
        ip("link set veth1 master cni0");
        assert_eq!(remove_unused(&names).await.expect("removed"), ["br-pods".parse().expect("a name")]);
        assert!(ip("link show cni0").contains("cni0"));

        ip("link delete pod");
        assert_eq!(remove_unused(&names).await.expect("removed"), ["cni0".parse().expect("a name")]);
        let left = ip("link show type bridge");
        assert!(left.contains("docker0") && !left.contains("cni0"), "{left}");
    });
}
