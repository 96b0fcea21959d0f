//! Packets through tables of the kind that Services and network policies need, on the real kernel: the rules of
//! `conformance::maps`, from a client over a router to backends, each a network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};

use fabric_core::model::Family;
use fabric_core::state::nft::{Ruleset, Table, TableKey};
use fabric_tests::conformance::kernel::{look, settle, v, woken};
use fabric_tests::conformance::maps::{Allowed, Service, policy, services, vip};
use fabric_tests::hosts::{Answer, Host, ask_tcp, ask_udp, forward, wait_for_answer};
use fabric_tests::netns::{in_netns_async, ip, run};
use fabricd::kernel::Options;
use fabricd::kernel::netlink::Netlink;

fn client(family: Family) -> IpAddr {
    v(if family == Family::V4 { "198.51.100.2" } else { "2001:db8:c::2" })
}

/// The router's address on the link to the backends.
fn router(family: Family) -> IpAddr {
    v(if family == Family::V4 { "10.64.1.1" } else { "2001:db8:1::1" })
}

fn backends(family: Family) -> [(IpAddr, u16); 3] {
    let ips = match family {
        Family::V4 => ["10.64.1.2", "10.64.1.3", "10.64.1.4"],
        Family::V6 => ["2001:db8:1::2", "2001:db8:1::3", "2001:db8:1::4"],
    };
    [(v(ips[0]), 8080), (v(ips[1]), 8081), (v(ips[2]), 8082)]
}

/// A client and backends that answer; this namespace routes, also to the Services' addresses.
fn hosts() -> (Host, Host) {
    let client = Host::new("c0", ["198.51.100.1", "2001:db8:c::1"], &Family::ALL.map(client));
    let all: Vec<(IpAddr, u16)> = Family::ALL.iter().flat_map(|family| backends(*family)).collect();
    let addresses: Vec<IpAddr> = all.iter().map(|(ip, _)| *ip).collect();
    let backend = Host::new("b0", ["10.64.1.1", "2001:db8:1::1"], &addresses);
    all.into_iter().for_each(|address| backend.serve(address));
    forward();
    ip("route add 203.0.113.0/24 via 10.64.1.2");
    ip("route add 2001:db8:53::/48 via 2001:db8:1::2");
    // By now the links have come up, and neighbours are known.
    for family in Family::ALL {
        let to = backends(family);
        client.run(move || to.map(wait_for_answer));
    }
    (client, backend)
}

fn kernel() -> Netlink {
    Netlink::new(Options::default()).expect("netlink opens")
}

fn of_services(table: Table) -> Ruleset {
    [(TableKey::Services, table)].into()
}

type Asked = std::io::Result<Answer>;

/// Asks by both protocols, so many times.
fn ask_both(to: (IpAddr, u16), times: usize) -> [Vec<Answer>; 2] {
    let ask = |ask: fn((IpAddr, u16)) -> Asked| {
        (0..times).map(|_| ask(to).unwrap_or_else(|error| panic!("{to:?}: {error}"))).collect()
    };
    [ask(ask_tcp), ask(ask_udp)]
}

/// In each family, a namespace with its hosts and nothing of the others'.
fn in_each_family<F: Future<Output = ()>>(test: impl Fn(Family, Host, Host) -> F + Send + Sync) {
    for family in Family::ALL {
        in_netns_async(|| async {
            let (client, backend) = hosts();
            test(family, client, backend).await;
        });
    }
}

#[test]
fn connections_to_a_service_reach_all_its_backends_from_outside_and_from_the_host() {
    in_each_family(|family, client, _backend| async move {
        let [first, second, _] = backends(family);
        let want = of_services(services(family, &[Service::new(80, 1, &[first, second])]));
        settle(&mut kernel(), &want).await;
        let to = (vip(family), 80);
        let from_outside = client.run(move || ask_both(to, 40));
        for answers in from_outside.into_iter().chain(ask_both(to, 40)) {
            let reached: BTreeSet<SocketAddr> = answers.iter().map(|answer| answer.from).collect();
            assert_eq!(reached, [first, second].map(SocketAddr::from).into());
        }
    });
}

#[test]
fn clients_keep_their_address_unless_the_service_is_masqueraded() {
    in_each_family(|family, host, _backend| async move {
        let [first, second, _] = backends(family);
        let masked = Service { masquerade: true, ..Service::new(81, 2, &[second]) };
        settle(&mut kernel(), &of_services(services(family, &[Service::new(80, 1, &[first]), masked]))).await;
        for (port, seen) in [(80, client(family)), (81, router(family))] {
            let to = (vip(family), port);
            let answers = host.run(move || ask_both(to, 1)).concat();
            assert!(answers.iter().all(|answer| answer.client == seen), "port {port}: {answers:?}");
        }
    });
}

#[test]
fn service_without_endpoints_refuses_and_takes_connections_once_it_has_one() {
    in_each_family(|family, client, _backend| async move {
        let mut kernel = kernel();
        let to = (vip(family), 80);
        settle(&mut kernel, &of_services(services(family, &[Service::new(80, 1, &[])]))).await;
        let refused =
            move || [ask_tcp, ask_udp].map(|ask: fn((IpAddr, u16)) -> Asked| ask(to).map_err(|error| error.kind()));
        let expected = [Err(ErrorKind::ConnectionRefused), Err(ErrorKind::ConnectionRefused)];
        assert_eq!(client.run(refused), expected);
        // The host itself is told by `sendto`, which fails with EPERM.
        assert_eq!(refused(), [Err(ErrorKind::ConnectionRefused), Err(ErrorKind::PermissionDenied)]);
        let [first, ..] = backends(family);
        settle(&mut kernel, &of_services(services(family, &[Service::new(80, 2, &[first])]))).await;
        let answers = client.run(move || ask_both(to, 1)).concat();
        assert!(answers.iter().all(|answer| answer.from == first.into()), "{answers:?}");
    });
}

#[test]
fn sticky_clients_stay_with_their_backend_as_long_as_it_is_one() {
    in_each_family(|family, client, _backend| async move {
        let mut kernel = kernel();
        let all = backends(family);
        let sticky = |pool, backends: &[(IpAddr, u16)]| {
            let service = Service { sticky: true, ..Service::new(80, pool, backends) };
            of_services(services(family, &[service]))
        };
        settle(&mut kernel, &sticky(1, &all)).await;
        let to = (vip(family), 80);
        let asked = |times| {
            let answers = client.run(move || ask_both(to, times));
            answers.concat().iter().map(|answer| answer.from).collect::<BTreeSet<SocketAddr>>()
        };
        let first = asked(20);
        assert_eq!(first.len(), 1, "{first:?}");
        let listed = || run("nft", "list map inet fabric-services stick");
        assert!(listed().contains("timeout 3h expires"), "{}", listed());
        assert_eq!(settle(&mut kernel, &sticky(1, &all)).await, "", "what packets add is not looked at");
        // The others change: it stays.
        let stays = all.into_iter().find(|backend| first.contains(&SocketAddr::from(*backend))).expect("one of them");
        let others: Vec<(IpAddr, u16)> = all.into_iter().filter(|backend| *backend != stays).collect();
        settle(&mut kernel, &sticky(2, &[others[0], stays])).await;
        assert_eq!(asked(10), first);
        // It goes: the client goes to another, and stays there.
        settle(&mut kernel, &sticky(3, &others)).await;
        let second = asked(20);
        assert!(second.len() == 1 && second.is_disjoint(&first), "{first:?}, then {second:?}");
    });
}

#[test]
fn policy_judges_whom_a_connection_reaches_behind_a_service_and_where_it_comes_from() {
    in_each_family(|family, host, _backend| async move {
        let mut kernel = kernel();
        let [first, second, third] = backends(family);
        let of = |port, backend| Service::new(port, u32::from(port), &[backend]);
        let table = services(family, &[of(80, first), of(81, second), of(82, third)]);
        let from = |text: &str| vec![v(text)];
        let (ours, others) = match family {
            Family::V4 => (from("198.51.100.0/25"), from("192.0.2.0/24")),
            Family::V6 => (from("2001:db8:c::/64"), from("2001:db8:d::/64")),
        };
        let allowed =
            |pod: (IpAddr, u16), chain, from: &Vec<_>, ports| Allowed { pod: pod.0, chain, from: from.clone(), ports };
        // The first pod takes clients of this prefix at its port, the second only others; the third is not isolated.
        let judged =
            |ports| policy(family, &[allowed(first, 1, &ours, ports), allowed(second, 2, &others, (1, 65_535))]);
        let want =
            |ports| -> Ruleset { [(TableKey::Services, table.clone()), (TableKey::Policy, judged(ports))].into() };
        settle(&mut kernel, &want((8080, 8089))).await;
        let passes = |port| {
            let to = (vip(family), port);
            host.run(move || {
                let socket = std::net::UdpSocket::bind((client(family), 0)).expect("an address of the client");
                socket.connect(SocketAddr::from(to)).expect("a route");
                socket.send(b"?").expect("sent");
                socket.set_read_timeout(Some(std::time::Duration::from_millis(500))).expect("not zero");
                socket.recv(&mut [0; 200]).is_ok()
            })
        };
        assert_eq!([80, 81, 82].map(passes), [true, false, true]);
        assert!(host.run(move || ask_tcp((vip(family), 80))).is_ok());
        settle(&mut kernel, &want((1, 8079))).await;
        assert_eq!([80, 81, 82].map(passes), [false, false, true]);
        let counted = run("nft", "list chain inet fabric-policy c-2");
        assert!(counted.contains("counter packets 2 "), "{counted}");
    });
}

#[test]
fn restart_reads_every_element_back_and_writes_nothing() {
    for family in Family::ALL {
        in_netns_async(|| async {
            let [first, second, third] = backends(family);
            let mut all: Vec<Service> =
                (1..=2_000).map(|port| Service::new(port, port.into(), &[first, second])).collect();
            all.push(Service { sticky: true, masquerade: true, ..Service::new(9_000, 9_000, &[second, third]) });
            all.push(Service::new(9_001, 9_001, &[]));
            let pods: Vec<Allowed> = (1..=300_u16)
                .map(|n| {
                    let pod = match family {
                        Family::V4 => v(&format!("10.64.{}.{}", n / 200, n % 200)),
                        Family::V6 => v(&format!("2001:db8:1::{n:x}")),
                    };
                    let from = match family {
                        Family::V4 => vec![v("0.0.0.0/0"), v("198.51.100.7/32")],
                        Family::V6 => vec![v("::/1"), v("2001:db8::7/128")],
                    };
                    Allowed { pod, chain: n.into(), from: from[usize::from(n % 2)..].to_vec(), ports: (n, 65_535) }
                })
                .map(|allowed| Allowed { from: allowed.from[..1].to_vec(), ..allowed })
                .collect();
            let want: Ruleset =
                [(TableKey::Services, services(family, &all)), (TableKey::Policy, policy(family, &pods))].into();
            settle(&mut kernel(), &want).await;
            let mut restarted = kernel();
            let found = look(&mut restarted).await;
            for (key, table) in &want {
                let there = &found.filter[key];
                assert_eq!(there.chains, table.found().chains, "{key}");
                for (name, set) in &table.found().sets {
                    assert!(there.sets[name] == *set, "{key} {name}: {:?}", there.sets[name].kind);
                }
            }
            assert_eq!(settle(&mut restarted, &want).await, "");
        });
    }
}

#[test]
fn nft_shows_the_tables_and_what_it_does_to_one_has_that_one_read_and_put_right() {
    in_netns_async(|| async {
        let family = Family::V4;
        let [first, second, _] = backends(family);
        let sticky = Service { sticky: true, ..Service::new(443, 2, &[second]) };
        let pods = [Allowed { pod: first.0, chain: 1, from: vec![v("198.51.100.0/24")], ports: (80, 89) }];
        let want: Ruleset = [
            (TableKey::Services, services(family, &[Service::new(80, 1, &[first, second]), sticky])),
            (TableKey::Policy, policy(family, &pods)),
        ]
        .into();
        let mut kernel = kernel();
        settle(&mut kernel, &want).await;
        let listed = run("nft", "-n list ruleset");
        assert!(listed.matches("comment \"").count() == 17, "each rule by its comment:\n{listed}");
        for line in [
            "type ipv4_addr . inet_proto . inet_service : mark . mark . mark",
            "203.0.113.1 . 6 . 80 : 0x00000050 . 0x00000001 . 0x00000002",
            "type mark : verdict",
            "0x00000002 : jump pick-2",
            "flags dynamic,timeout",
            "size 65536",
            "type mark . inet_proto . inet_service",
            "0x01000000 . 6 . 80-89",
            "10.64.1.2 : jump c-1",
            "limit rate 10/second",
            "log prefix \"policy\" group 107",
            "@none counter packets 0 bytes 0 reject",
            "masquerade fully-random",
            "ct state 0x2,0x4 accept",
        ] {
            assert!(listed.contains(line), "{line}\nis not in\n{listed}");
        }
        for deed in [
            "delete element inet fabric-services pool { 0x1 . 0x0 }",
            "add element inet fabric-services svc { 203.0.113.9 . 6 . 80 : 0x9 . 0x1 . 0x2 }",
            "flush chain inet fabric-services pick-2",
            "delete element inet fabric-services pick { 0x2 }",
            "add element inet fabric-policy known { 192.0.2.0/25 }",
            "delete element inet fabric-policy known { 10.64.1.2 }",
            "flush map inet fabric-policy in",
            "add rule inet fabric-policy c-1 accept",
            "add chain inet fabric-policy extra",
            "delete table inet fabric-services",
        ] {
            let before = look(&mut kernel).await.filter.clone();
            run("nft", deed);
            woken(&mut kernel).await;
            let steps = settle(&mut kernel, &want).await;
            assert_ne!(steps, "", "{deed}");
            let other = if deed.contains("fabric-policy") { TableKey::Services } else { TableKey::Policy };
            assert!(!steps.contains(&other.to_string()), "{deed}: {steps}");
            assert_eq!(look(&mut kernel).await.filter, before, "{deed}");
            let anew = look(&mut self::kernel()).await.filter.clone();
            assert_eq!(anew, before, "{deed}");
        }
        let counts: BTreeMap<_, _> = want.iter().map(|(key, table)| (*key, table.sets.len())).collect();
        assert_eq!(counts, [(TableKey::Services, 7), (TableKey::Policy, 4)].into());
    });
}
