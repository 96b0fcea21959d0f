//! Conversations with the kernel, each in a network namespace of its own. They have to run as root.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use fabric_netlink::{EventSocket, Frame, Request, RequestSocket};
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage as Rtnl};
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::sched::{CloneFlags, unshare};

/// Linux's errno numbers.
const ENODEV: i32 = 19;
const EOPNOTSUPP: i32 = 95;
const ENOBUFS: i32 = 105;
/// `RTNLGRP_LINK`.
const LINK_GROUP: u32 = 1;
/// The loopback device of every network namespace.
const LOOPBACK: u32 = 1;

/// A socket in a new network namespace, in which this test's thread stays.
fn socket() -> RequestSocket {
    unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace; this test has to run as root");
    RequestSocket::open(NETLINK_ROUTE).expect("a socket")
}

fn link(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

/// `ip link set lo up`.
fn raise() -> Request {
    let mut message = link(LOOPBACK);
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    Request::new(&Rtnl::SetLink(message), 0)
}

/// `ip link set lo mtu MTU`.
fn mtu(mtu: u32) -> Request {
    let mut message = link(LOOPBACK);
    message.attributes.push(LinkAttribute::Mtu(mtu));
    Request::new(&Rtnl::SetLink(message), 0)
}

/// `ip address add 10.9.X.Y/32 dev lo`.
fn address(number: u16) -> Request {
    let [high, low] = number.to_be_bytes();
    let ip = IpAddr::V4(Ipv4Addr::new(10, 9, high, low));
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = 32;
    message.header.index = LOOPBACK;
    message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
    Request::new(&Rtnl::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// `ip address show`.
fn addresses() -> Request {
    Request::new(&Rtnl::GetAddress(AddressMessage::default()), 0)
}

fn index_of(frame: &Frame<'_>) -> Option<u32> {
    match frame.decode().ok()? {
        Rtnl::NewLink(link) => Some(link.header.index),
        _ => None,
    }
}

fn errno(error: &std::io::Error) -> i32 {
    error.raw_os_error().expect("the kernel's number")
}

#[test]
fn table_is_read_as_it_is() {
    let mut socket = socket();
    let all = Request::new(&Rtnl::GetLink(LinkMessage::default()), 0);
    // Kernels may be told to put devices of old tunnels into each namespace.
    assert!(socket.dump(&all, index_of).expect("readable").contains(&LOOPBACK));
    assert_eq!(socket.dump(&all, |_| None::<()>).expect("readable"), []);
}

#[test]
fn one_thing_is_asked_for_and_what_is_not_there_is_an_error() {
    let mut socket = socket();
    let loopback = Request::new(&Rtnl::GetLink(link(LOOPBACK)), 0);
    assert_eq!(socket.ask(&loopback, index_of).expect("there"), Some(LOOPBACK));
    assert_eq!(socket.ask(&loopback, |_| None::<()>).expect("there"), None);
    let missing = Request::new(&Rtnl::GetLink(link(999)), 0);
    assert_eq!(errno(&socket.ask(&missing, index_of).expect_err("not there")), ENODEV);
}

#[test]
fn each_write_of_many_datagrams_has_its_own_answer() {
    let mut socket = socket();
    let mut requests: Vec<Request> = (1_000..6_000).map(|index| Request::new(&Rtnl::DelLink(link(index)), 0)).collect();
    for place in [0, 2_500, 4_999] {
        requests[place] = raise();
    }
    let results = socket.write(&requests);
    assert_eq!(results.len(), requests.len());
    for (place, result) in results.into_iter().enumerate() {
        match result {
            Ok(()) => assert!([0, 2_500, 4_999].contains(&place), "write {place} was acknowledged"),
            Err(refusal) => assert_eq!(errno(&refusal.error), ENODEV, "write {place}: {refusal}"),
        }
    }
}

#[test]
fn no_write_is_no_conversation() {
    assert!(socket().write(&[]).is_empty());
}

#[test]
fn refusal_has_the_kernels_words() {
    let mut socket = socket();
    let mut message = LinkMessage::default();
    let kind = LinkInfo::Kind(InfoKind::Other("nonsense".to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![kind]));
    let request = Request::new(&Rtnl::NewLink(message), NLM_F_CREATE | NLM_F_EXCL);
    let refusal = socket.write(&[request]).remove(0).expect_err("there is no such kind");
    assert_eq!(errno(&refusal.error), EOPNOTSUPP);
    assert_eq!(refusal.words.as_deref(), Some("Unknown device type"));
}

#[test]
fn transaction_is_done_when_it_is_acknowledged() {
    let mut socket = socket();
    let mut acknowledged = raise();
    acknowledged.add_flags(NLM_F_ACK);
    socket.transact(&[acknowledged]).expect("the device is there");
    let refused = Request::new(&Rtnl::DelLink(link(999)), NLM_F_ACK);
    assert_eq!(errno(&socket.transact(&[refused]).expect_err("not there").error), ENODEV);
    let unanswered = socket.transact(&[raise()]).expect_err("nothing told that it is done");
    assert_eq!(errno(&unanswered.error), ENOBUFS);
}

#[test]
fn what_an_earlier_answer_left_behind_disturbs_no_later_one() {
    let mut socket = socket();
    let all = Request::new(&Rtnl::GetLink(LinkMessage::default()), NLM_F_DUMP);
    // The end of this dump stays in the queue.
    assert!(socket.ask(&all, index_of).expect("readable").is_some());
    let missing = Request::new(&Rtnl::GetLink(link(999)), 0);
    assert_eq!(errno(&socket.ask(&missing, index_of).expect_err("not there")), ENODEV);
    assert!(socket.dump(&all, index_of).expect("readable").contains(&LOOPBACK));
}

/// So many that the kernel tells them in several datagrams.
const MANY: u16 = 3_000;

#[test]
fn dump_that_the_table_has_changed_under_is_begun_again() {
    let (mut socket, mut other) = (socket(), RequestSocket::open(NETLINK_ROUTE).expect("a socket"));
    let many: Vec<Request> = (0..MANY).map(address).collect();
    assert!(socket.write(&many).iter().all(Result::is_ok));
    let mut seen = 0;
    let rows = socket.dump(&addresses(), |_| {
        seen += 1;
        if seen == 1 {
            assert!(other.write(&[address(MANY)]).iter().all(Result::is_ok));
        }
        Some(())
    });
    let rows = rows.expect("the second reading is undisturbed").len();
    assert_eq!(rows, usize::from(MANY) + 1);
    assert!(seen > rows, "the table was read once");
}

#[test]
fn table_that_changes_under_every_reading_is_not_told() {
    let (mut socket, mut other) = (socket(), RequestSocket::open(NETLINK_ROUTE).expect("a socket"));
    let many: Vec<Request> = (0..MANY).map(address).collect();
    assert!(socket.write(&many).iter().all(Result::is_ok));
    let (mut seen, mut added) = (0_usize, MANY);
    let rows = socket.dump(&addresses(), |_| {
        if seen.is_multiple_of(1_000) {
            assert!(other.write(&[address(added)]).iter().all(Result::is_ok));
            added += 1;
        }
        seen += 1;
        Some(())
    });
    assert_eq!(rows.expect_err("torn").kind(), std::io::ErrorKind::Interrupted);
}

#[test]
fn events_are_waited_for_and_lost_ones_are_news_as_well() {
    let mut socket = socket();
    let mut events = EventSocket::open(NETLINK_ROUTE, &[LINK_GROUP]).expect("a socket");
    assert!(!events.wait(Duration::ZERO).expect("a socket"), "nothing has happened");
    assert!(socket.write(&[raise()]).iter().all(Result::is_ok));
    while events.wait(Duration::ZERO).expect("raising a device is an event, or several") {}

    // More than the socket can hold.
    let changes: Vec<Request> = (0..1_000).map(|number| mtu(1_280 + number)).collect();
    assert!(socket.write(&changes).iter().all(Result::is_ok));
    assert!(events.wait(Duration::ZERO).expect("that events were lost is no error"));
}

#[test]
fn kernel_without_a_protocol_says_so() {
    // There are 32 at most.
    assert!(RequestSocket::open(40).is_err());
}

#[test]
fn socket_stays_in_the_namespace_in_which_it_was_opened() {
    let mut first = socket();
    let mut second = socket();
    assert!(first.write(&[address(1)]).iter().all(Result::is_ok));
    let count = |socket: &mut RequestSocket| socket.dump(&addresses(), |_| Some(())).expect("readable").len();
    assert_eq!((count(&mut first), count(&mut second)), (1, 0));
}
