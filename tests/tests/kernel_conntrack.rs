//! Connections that the real kernel tracks, listed, marked and deleted, with packets as witnesses.

use std::net::{IpAddr, UdpSocket};

use fabric_core::model::Family;
use fabric_core::state::nft::{
    ChainKind, Field, Match, Place, Rule, Ruleset, Step, Table, TableKey, Test, ct_state, ct_status,
};
use fabric_tests::conformance::kernel::{settle, v};
use fabric_tests::conformance::maps::{Service, services, vip};
use fabric_tests::hosts::{Connection as Stream, Host, ask_udp_by, forward, wait_for_answer};
use fabric_tests::netns::{in_netns_async, ip};
use fabricd::kernel::Options;
use fabricd::kernel::conntrack::{Change, Connection, Connections, Filter};
use fabricd::kernel::netlink::Netlink;

const DENIED: u8 = 0;

fn client(family: Family) -> IpAddr {
    v(if family == Family::V4 { "198.51.100.2" } else { "2001:db8:c::2" })
}

fn backends(family: Family) -> [(IpAddr, u16); 2] {
    let ips = match family {
        Family::V4 => ["10.64.1.2", "10.64.1.3"],
        Family::V6 => ["2001:db8:1::2", "2001:db8:1::3"],
    };
    [(v(ips[0]), 8080), (v(ips[1]), 8081)]
}

/// A client and backends, with a route to the Services' addresses.
fn hosts() -> (Host, Host) {
    let host = Host::new("c0", ["198.51.100.1", "2001:db8:c::1"], &Family::ALL.map(client));
    let all: Vec<(IpAddr, u16)> = Family::ALL.iter().flat_map(|family| backends(*family)).collect();
    let addresses: Vec<IpAddr> = all.iter().map(|(ip, _)| *ip).collect();
    let backend = Host::new("b0", ["10.64.1.1", "2001:db8:1::1"], &addresses);
    all.iter().for_each(|address| backend.serve(*address));
    forward();
    ip("route add 203.0.113.0/24 via 10.64.1.2");
    ip("route add 2001:db8:53::/48 via 2001:db8:1::2");
    // By now the links have come up, and neighbours are known.
    host.run(move || {
        for to in all {
            wait_for_answer(to);
        }
    });
    (host, backend)
}

async fn write(want: &Ruleset) {
    settle(&mut Netlink::new(Options::default()).expect("netlink opens"), want).await;
}

/// Forwarded packets are dropped whose connection is denied, by its label or by its mark.
fn denying() -> Ruleset {
    let mut table = Table::default();
    let denied = |field| Rule::drop([Match::new(field, Test::AnyBit(1 << DENIED))], "denied");
    let forward = table.at("forward", ChainKind::Filter, Place::Forward, 0);
    forward.extend([denied(Field::CtLabels), denied(Field::CtMark)]);
    // What sets a label has the kernel make room for labels. No connection is of this mark.
    let never = Match::is(Field::Mark, 0x7fff_ffff);
    forward.push(Rule::new([never], Step::SetCtLabel(DENIED), "room for labels"));
    [(TableKey::Policy, table)].into()
}

fn all(filter: &Filter) -> Vec<Connection> {
    let mut found = vec![];
    Connections::open().expect("netlink opens").each(filter, |one| found.push(*one)).expect("the table is read");
    found
}

fn change(connection: &Connection, change: Change) -> bool {
    let mut table = Connections::open().expect("netlink opens");
    let [result] = <[_; 1]>::try_from(table.change(&[(*connection, change)])).expect("one result");
    result.expect("the kernel takes it")
}

#[test]
fn connection_with_our_bit_is_dropped_at_its_next_packet_and_goes_on_without() {
    for family in Family::ALL {
        in_netns_async(|| async {
            let (client_host, _backend) = hosts();
            write(&denying()).await;
            let [first, second] = backends(family);
            let (mut judged, mut other) = client_host
                .run(move || {
                    [first, second].map(|to| {
                        let mut stream = Stream::open(to).expect("a backend takes it");
                        stream.ask().expect("it answers");
                        stream
                    })
                })
                .into();
            let filter = Filter { reply_source: Some(first.0), protocol: Some(6), ..Filter::default() };
            for denies in [|on| Change::Label { bit: DENIED, on }, |on| Change::Mark { mask: 1, value: u32::from(on) }]
            {
                let port = judged.local_port();
                let found = all(&filter);
                let connection = found.iter().find(|one| one.original.source_port == port).expect("it is tracked");
                assert!(connection.status & ct_status::SEEN_REPLY != 0);
                assert!(change(connection, denies(true)));
                let marked = all(&filter).into_iter().find(|one| one.id == connection.id).expect("still there");
                assert!(marked.has_label(DENIED) || marked.mark == 1, "{marked:?}");
                assert_eq!(judged.ask_in_vain(), None);
                assert!(other.ask().is_some(), "the other connection is none of it");
                assert!(change(connection, denies(false)));
                assert!(judged.wait().is_some(), "what was sent meanwhile comes through");
                assert!(judged.ask().is_some());
            }
        });
    }
}

#[test]
fn udp_connection_that_is_deleted_finds_the_backend_of_now() {
    for family in Family::ALL {
        in_netns_async(|| async {
            let (client_host, _backend) = hosts();
            let [first, second] = backends(family);
            let to = |backend, pool| -> Ruleset {
                [(TableKey::Services, services(family, &[Service::new(53, pool, &[backend])]))].into()
            };
            write(&to(first, 1)).await;
            let socket = client_host.run(move || {
                let socket = UdpSocket::bind((client(family), 0)).expect("its address");
                socket.connect((vip(family), 53)).expect("a route");
                socket
            });
            let asks = |socket: &UdpSocket| ask_udp_by(socket).expect("an answer").from;
            assert_eq!(asks(&socket), first.into());
            write(&to(second, 2)).await;
            assert_eq!(asks(&socket), first.into(), "the kernel remembers the connection");
            let stale = Filter { protocol: Some(17), original_target: Some(vip(family)), ..Filter::default() };
            let found = all(&stale);
            let [connection] = found.as_slice() else { panic!("one connection: {found:?}") };
            assert_eq!((connection.reply.source, connection.reply.source_port), first);
            assert!(connection.status & ct_status::DESTINATION_NAT != 0);
            // One of another id is another connection, and is gone.
            assert!(!change(&Connection { id: connection.id ^ 1, ..*connection }, Change::Delete));
            assert_eq!(asks(&socket), first.into());
            assert!(change(connection, Change::Delete));
            assert_eq!(asks(&socket), second.into());
            let now = all(&stale);
            assert_eq!(now.iter().map(|one| one.reply.source).collect::<Vec<_>>(), [second.0]);
        });
    }
}

#[test]
fn listing_shows_what_the_filter_asks_for_and_nothing_else() {
    in_netns_async(|| async {
        let (client_host, _backend) = hosts();
        let rule = Rule::new([Match::new(Field::CtState, Test::AnyBit(ct_state::NEW))], Step::Count, "tracked");
        let mut table = Table::default();
        table.at("forward", ChainKind::Filter, Place::Forward, 0).push(rule);
        write(&[(TableKey::Policy, table)].into()).await;
        client_host.run(|| {
            for family in Family::ALL {
                for to in backends(family) {
                    wait_for_answer(to);
                    let socket = UdpSocket::bind((client(family), 0)).expect("its address");
                    socket.connect(to).expect("a route");
                    ask_udp_by(&socket).expect("an answer");
                }
            }
        });
        let everything = Filter::default();
        let seen = all(&everything);
        assert!(seen.len() >= 8, "{seen:?}");
        for family in Family::ALL {
            for protocol in [6, 17] {
                for (backend, _) in backends(family) {
                    let filter = Filter {
                        family: Some(family),
                        protocol: Some(protocol),
                        original_source: Some(client(family)),
                        reply_source: Some(backend),
                        ..everything
                    };
                    let found = all(&filter);
                    assert_eq!(found.len(), 1, "{filter:?}: {found:?}");
                    assert!(found.iter().all(|one| filter.covers(one)));
                }
            }
        }
        let nobody = Filter { original_source: Some(v("192.0.2.99")), ..everything };
        assert_eq!(all(&nobody), []);
    });
}
