use std::time::Duration;

use super::*;

fn address(text: &str) -> (IpAddr, Subnet) {
    let net: ipnetwork::IpNetwork = text.parse().expect(text);
    (net.ip(), Subnet::holding(net.ip(), net.prefix()).expect(text))
}

fn host() -> Host {
    let link = |index, name: &str, addresses: &[&str]| HostLink {
        index,
        name: name.parse().expect(name),
        mtu: 1500,
        up: true,
        loopback: name == "lo",
        addresses: addresses.iter().map(|text| address(text)).collect(),
        passing: vec![],
    };
    let route = |family, dev: &str, metric| DefaultRoute {
        family,
        dev: dev.parse().expect(dev),
        metric,
        source: None,
        gateway: None,
    };
    Host {
        links: vec![
            link(1, "lo", &[]),
            link(2, "eth0", &["10.0.2.15/24", "2001:db8::15/64"]),
            link(3, "eth1", &["192.0.2.7/24", "192.0.2.8/24", "2001:db8:1::7/64"]),
            link(4, "eth2", &[]),
        ],
        default_routes: vec![
            route(Family::V4, "eth1", 100),
            route(Family::V4, "eth0", 10),
            route(Family::V6, "eth1", 1024),
        ],
        reaches: vec![(
            "198.51.100.1".parse().expect("ip"),
            "eth1".parse().expect("name"),
            "192.0.2.8".parse().expect("ip"),
        )],
    }
}

fn chosen(selectors: &[Selector], family: Family) -> String {
    match choose(selectors, &host(), family, &[]) {
        Ok(Choice { underlay, .. }) => format!("{} {}", underlay.dev, underlay.local),
        Err(error) => error.to_string(),
    }
}

fn regex(text: &str) -> Selector {
    Selector::Matching(Regex::new(text).expect(text))
}

#[test]
fn default_route_with_the_smallest_metric_decides_in_each_family() {
    assert_eq!(chosen(&[], Family::V4), "eth0 10.0.2.15");
    assert_eq!(chosen(&[], Family::V6), "eth1 2001:db8:1::7");
}

#[test]
fn default_route_of_the_address_in_use_counts_while_it_stands() {
    let mut host = host();
    let chosen = |host: &Host, in_use: &[&str]| {
        let in_use: Vec<IpAddr> = in_use.iter().map(|ip| ip.parse().expect("ip")).collect();
        local(choose(&[], host, Family::V4, &in_use))
    };
    // eth0's metric is the smaller one.
    assert_eq!(chosen(&host, &["192.0.2.8"]), "192.0.2.8");
    assert_eq!(chosen(&host, &["203.0.113.1", "192.0.2.8"]), "192.0.2.8", "the lease's is gone, the device's is there");
    assert_eq!(chosen(&host, &["10.0.2.15", "192.0.2.8"]), "10.0.2.15", "the lease's comes before the device's");
    assert_eq!(chosen(&host, &["203.0.113.1"]), "10.0.2.15");
    // It no longer leads outside.
    host.default_routes.retain(|route| route.dev.as_str() != "eth1");
    assert_eq!(chosen(&host, &["192.0.2.8"]), "10.0.2.15");
}

#[test]
fn interface_is_named_in_every_way() {
    let iface = |name: &str| Selector::Iface(name.into());
    for (selector, v4, v6) in &[
        (iface("eth1"), "eth1 192.0.2.7", "eth1 2001:db8:1::7"),
        (iface("192.0.2.8"), "eth1 192.0.2.8", "eth1 2001:db8:1::7"),
        (iface("2001:db8::15"), "eth0 10.0.2.15", "eth0 2001:db8::15"),
        (regex("^eth[1-9]$"), "eth1 192.0.2.7", "eth1 2001:db8:1::7"),
        (regex(r"^192\.0\.2\.8"), "eth1 192.0.2.8", "eth1 2001:db8:1::7"),
        (Selector::CanReach("198.51.100.1".parse().expect("ip")), "eth1 192.0.2.8", "eth1 2001:db8:1::7"),
    ] {
        assert_eq!(chosen(std::slice::from_ref(selector), Family::V4), *v4, "{selector:?}");
        assert_eq!(chosen(std::slice::from_ref(selector), Family::V6), *v6, "{selector:?}");
    }
}

#[test]
fn first_selector_that_fits_wins() {
    let selectors = [Selector::Iface("eth7".into()), Selector::Iface("eth1".into())];
    assert_eq!(chosen(&selectors, Family::V4), "eth1 192.0.2.7");
}

#[test]
fn unknown_interface_is_answered_with_those_that_exist() {
    assert_eq!(
        chosen(&[Selector::Iface("eth7".into())], Family::V4),
        "no interface fits --iface eth7; this host has lo (no address), eth0 (10.0.2.15 2001:db8::15), \
         eth1 (192.0.2.7 192.0.2.8 2001:db8:1::7), eth2 (no address)"
    );
    assert!(
        chosen(&[Selector::Iface("eth2".into())], Family::V6).starts_with("the interface eth2 has no IPv6 address")
    );
}

/// A host whose `eth0`, with the default route, has these addresses; those behind a `~` are passing.
fn eth0(addresses: &str, source: Option<&str>, gateway: Option<&str>) -> Host {
    let (passing, lasting): (Vec<&str>, Vec<&str>) =
        addresses.split_whitespace().partition(|text| text.starts_with('~'));
    let ip = |text: &str| text.parse::<IpAddr>().expect(text);
    let link = HostLink {
        index: 2,
        name: "eth0".parse().expect("valid"),
        mtu: 1500,
        up: true,
        loopback: false,
        addresses: lasting.into_iter().map(address).collect(),
        passing: passing.into_iter().map(|text| address(&text[1..])).collect(),
    };
    let route = |family| DefaultRoute {
        family,
        dev: link.name,
        metric: 0,
        source: source.map(ip).filter(|ip| Family::of(*ip) == family),
        gateway: gateway.map(ip).filter(|ip| Family::of(*ip) == family),
    };
    Host { default_routes: Family::ALL.map(route).into(), links: vec![link], reaches: vec![] }
}

fn local(choice: Result<Choice, UnderlayError>) -> String {
    choice.map_or_else(|error| error.to_string(), |choice| choice.underlay.local.to_string())
}

#[test]
fn address_in_use_comes_first_then_the_routes_source_then_what_lasts() {
    const VIP: &str = "192.0.2.200/32";
    const VIP6: &str = "2001:db8::200/128";
    for (why, addresses, source, gateway, in_use, chosen) in [
        ("the first one", "192.0.2.7/24 192.0.2.8/24", None, None, None, "192.0.2.7"),
        ("in the lease", "192.0.2.7/24 192.0.2.8/24", None, None, Some("192.0.2.8"), "192.0.2.8"),
        ("lease gone", "192.0.2.7/24 192.0.2.8/24", None, None, Some("192.0.2.9"), "192.0.2.7"),
        ("route's source", "192.0.2.7/24 192.0.2.8/24", Some("192.0.2.8"), None, None, "192.0.2.8"),
        ("lease before source", "192.0.2.7/24 192.0.2.8/24", Some("192.0.2.8"), None, Some("192.0.2.7"), "192.0.2.7"),
        ("source of another link", "192.0.2.7/24", Some("203.0.113.1"), None, None, "203.0.113.1"),
        ("next to the gateway", "198.51.100.7/24 192.0.2.8/24", None, Some("192.0.2.1"), None, "192.0.2.8"),
        ("virtual one first", &format!("{VIP} 192.0.2.7/24"), None, Some("192.0.2.1"), None, "192.0.2.7"),
        ("virtual one alone", VIP, None, None, None, "192.0.2.200"),
        ("virtual one in the lease", &format!("192.0.2.7/24 {VIP}"), None, None, Some("192.0.2.200"), "192.0.2.200"),
        ("not virtual: of no other's prefix", "203.0.113.9/32 192.0.2.7/24", None, None, None, "203.0.113.9"),
        ("two virtual ones", &format!("192.0.2.201/32 {VIP} 192.0.2.7/24"), None, None, None, "192.0.2.7"),
        ("IPv6: newest first", &format!("{VIP6} 2001:db8::7/64"), None, Some("fe80::1"), None, "2001:db8::7"),
        ("IPv6: in the lease", "2001:db8::8/64 2001:db8::7/64", None, None, Some("2001:db8::7"), "2001:db8::7"),
        ("temporary", "~2001:db8::bad/64 2001:db8::7/64", None, None, None, "2001:db8::7"),
        ("temporary alone", "~2001:db8::bad/64", None, None, None, "2001:db8::bad"),
        ("deprecated in the lease", "2001:db8:1::7/64 ~2001:db8::7/64", None, None, Some("2001:db8::7"), "2001:db8::7"),
        ("virtual worse than deprecated", &format!("{VIP6} ~2001:db8::7/64"), None, None, None, "2001:db8::7"),
        ("keepalived's is deprecated too", "~2001:db8::200/128 ~2001:db8::7/64", None, None, None, "2001:db8::7"),
    ] {
        let family = Family::of(chosen.parse().expect(chosen));
        let in_use: Vec<IpAddr> = in_use.iter().map(|ip| ip.parse().expect("ip")).collect();
        assert_eq!(local(choose(&[], &eth0(addresses, source, gateway), family, &in_use)), chosen, "{why}");
    }
}

#[test]
fn what_the_operator_names_wins_over_the_address_in_use() {
    let host = eth0("192.0.2.7/24 192.0.2.8/24 192.0.2.200/32", None, None);
    let reaching = |source: &str| {
        let ip = |text: &str| text.parse::<IpAddr>().expect(text);
        let reaches = vec![(ip("198.51.100.1"), "eth0".parse().expect("valid"), ip(source))];
        (Selector::CanReach(ip("198.51.100.1")), Host { reaches, ..host.clone() })
    };
    let in_use = ["192.0.2.8".parse().expect("ip")];
    let iface = |name: &str| (Selector::Iface(name.into()), host.clone());
    for ((selector, host), used, chosen) in [
        (iface("192.0.2.7"), &in_use[..], "192.0.2.7"),
        (iface("192.0.2.200"), &in_use, "192.0.2.200"),
        (iface("eth0"), &in_use, "192.0.2.8"),
        (iface("eth0"), &[], "192.0.2.7"),
        ((regex(r"192\.0\.2\.(7|8)"), host.clone()), &in_use, "192.0.2.8"),
        ((regex(r"192\.0\.2\.7"), host.clone()), &in_use, "192.0.2.7"),
        (reaching("192.0.2.7"), &in_use, "192.0.2.8"),
        (reaching("192.0.2.8"), &[], "192.0.2.8"),
        (reaching("192.0.2.200"), &[], "192.0.2.7"),
    ] {
        assert_eq!(local(choose(std::slice::from_ref(&selector), &host, Family::V4, used)), chosen, "{selector:?}");
    }
}

/// One look at a host: after so many seconds it has these addresses, and this is chosen, or said.
type Look = (u64, &'static str, &'static str);

async fn hold_down(lease: Option<&str>, looks: &[Look]) {
    let mut hold_down = HoldDown::default();
    let mut lease: Option<IpAddr> = lease.map(|ip| ip.parse().expect(ip));
    for (seconds, addresses, told) in looks {
        tokio::time::advance(Duration::from_secs(*seconds)).await;
        let family = if addresses.contains("::") { Family::V6 } else { Family::V4 };
        let chosen = hold_down.choose(&[], &eth0(addresses, None, None), family, lease, None);
        // The lease follows what is chosen.
        lease = chosen.as_ref().map_or(lease, |underlay| Some(underlay.local));
        let said = chosen.map_or_else(|error| error.to_string(), |underlay| underlay.local.to_string());
        assert!(said.contains(told), "{looks:?}: {addresses}: {said}");
    }
}

#[tokio::test(start_paused = true)]
async fn virtual_address_never_takes_the_place_of_one_that_is_away() {
    let only = "looks like a virtual address that moves between hosts";
    for [own, vip, both, vip_first] in [
        ["192.0.2.7/24", "192.0.2.200/32", "192.0.2.7/24 192.0.2.200/32", "192.0.2.200/32 192.0.2.7/24"],
        ["2001:db8::7/64", "2001:db8::200/128", "2001:db8::7/64 2001:db8::200/128", "2001:db8::200/128 2001:db8::7/64"],
        ["2001:db8::7/64", "~2001:db8::200/128", "2001:db8::7/64 ~2001:db8::200/128", "2001:db8::7/64"],
    ] {
        let ip = own.split_once('/').expect("a prefix").0;
        hold_down(
            None,
            &[(0, own, ip), (1, both, ip), (1, vip, only), (3600, vip, only), (1, vip_first, ip), (1, own, ip)],
        )
        .await;
    }
    let words = "the underlay address 192.0.2.7 of this node is gone from eth0, and 192.0.2.200, which is left there, looks \
                 like a virtual address that moves between hosts (it is a /32 inside 192.0.2.0/24); put 192.0.2.7 back, or \
                 if 192.0.2.200 is this node's own from now on, start fabricd with --iface 192.0.2.200";
    hold_down(None, &[(0, "192.0.2.7/24", "192.0.2.7"), (0, "192.0.2.200/32", words)]).await;
}

#[tokio::test(start_paused = true)]
async fn another_lasting_address_is_taken_at_once_and_a_doubtful_one_after_a_grace_period() {
    // As an operator renumbers a node.
    hold_down(None, &[(0, "192.0.2.7/24", "192.0.2.7"), (1, "192.0.2.8/24", "192.0.2.8")]).await;
    // To an address of host length in another network.
    hold_down(None, &[(0, "192.0.2.7/24", "192.0.2.7"), (1, "203.0.113.8/32", "203.0.113.8")]).await;
    let waits = "if it does not come back within 30 s, 2001:db8::bad is taken";
    hold_down(
        None,
        &[
            (0, "2001:db8::7/64 ~2001:db8::bad/64", "2001:db8::7"),
            (1, "~2001:db8::bad/64", waits),
            (29, "~2001:db8::bad/64", waits),
            (1, "~2001:db8::bad/64", "2001:db8::bad"),
        ],
    )
    .await;
    // After a start nobody knows the prefix that the address in the lease had.
    let waits = "the underlay address 192.0.2.7 of this node is gone from eth0; if it does not come back within 30 s, 192.0.2.200";
    hold_down(Some("192.0.2.7"), &[(0, "192.0.2.200/32", waits), (9, "192.0.2.200/32 192.0.2.7/24", "192.0.2.7")])
        .await;
    hold_down(Some("192.0.2.7"), &[(0, "192.0.2.200/32", waits), (30, "192.0.2.200/32", "192.0.2.200")]).await;
    hold_down(Some("192.0.2.7"), &[(0, "192.0.2.8/24", "192.0.2.8")]).await;
    hold_down(None, &[(0, "192.0.2.8/32", "192.0.2.8")]).await;
}

#[test]
fn interface_is_judged_before_the_network_is_known() {
    assert_eq!(judge(&[], &host()), Ok(()));
    assert_eq!(judge(&[Selector::Iface("eth2".into())], &host()), Ok(()));
    let told = judge(&[Selector::Iface("eth7".into())], &host()).expect_err("no such one").to_string();
    assert!(
        told.starts_with("no interface fits --iface eth7; this host has lo (no address), eth0 (10.0.2.15"),
        "{told}"
    );
}
