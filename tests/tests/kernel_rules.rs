//! Our tables of nftables in the real kernel, with `nft` as an independent witness.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::diff;
use fabric_core::model::{PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::{FilterInputs, FilterOptions, Member, Pod, ruleset};
use fabric_core::state::nft::{Ruleset, TableKey};
use fabric_tests::conformance::kernel::{look, settle, v, woken};
use fabric_tests::netns::{in_netns_async, run};
use fabricd::kernel::netlink::Netlink;
use fabricd::kernel::{Kernel as _, Options};

const CONFIG: &str = r#"{"EnableIPv6":true,"Network":"10.64.0.0/12","IPv6Network":"2001:db8::/48",
                         "Backend":{"Type":"vxlan","VNI":7}}"#;

fn rules(peers: u32) -> Ruleset {
    let member = |underlay: u32, subnet: u32| Member {
        underlay: Ipv4Addr::from_bits(0xc612_0000 + underlay).into(),
        subnet: Subnet::holding(Ipv4Addr::from_bits(0x0a40_0000 + (subnet << 8)).into(), 24).expect("valid"),
    };
    let mut members: BTreeSet<Member> = (2..2 + peers).map(|peer| member(peer, peer)).collect();
    members.insert(Member { underlay: v("2001:db8:ff::2"), subnet: v("2001:db8:0:2::/64") });
    let own: PerFamily<Subnet> = PerFamily { v4: Some(v("10.64.1.0/24")), v6: Some(v("2001:db8:0:1::/64")) };
    let options = FilterOptions {
        masquerade: true,
        no_masquerade_to: vec![v("203.0.113.0/25")],
        no_masquerade_to_nodes: true,
        senders: vec![v("198.51.100.7/32")],
        ..FilterOptions::default()
    };
    ruleset(&FilterInputs {
        network: &NetworkConfig::decode(CONFIG.as_bytes()).expect("valid"),
        own: &own,
        members: &members,
        bridges: &[v("cni0")].into(),
        ports: &["veth1", "veth2"].map(v).into(),
        pods: &[(v("veth1"), Pod { mac: v("02:00:00:00:00:07"), ips: [v("10.64.1.7"), v("2001:db8:0:1::7")].into() })]
            .into(),
        pod_subnets: &own.values().copied().collect(),
        tracked: false,
        options: &options,
    })
}

fn kernel() -> Netlink {
    Netlink::new(Options::default()).expect("netlink opens")
}

/// What `nft` shows, handles included: they change when anything is made anew.
fn shown() -> String {
    run("nft", "-a -n list ruleset")
}

/// The same in a fixed order, and as a table shows that was made anew.
fn without_handles() -> Vec<String> {
    let list = |family| run("nft", &format!("-n list table {family} fabric"));
    let all = list("inet") + &list("bridge");
    // A set has no order.
    let is_separator = |c| matches!(c, ',' | '=' | '{' | '}' | '\n');
    let mut lines: Vec<String> = all.split(is_separator).map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

#[test]
fn nft_shows_what_was_written_and_it_is_found_again() {
    in_netns_async(|| async {
        let (mut first, want) = (kernel(), rules(2));
        let written = settle(&mut first, &want).await;
        assert!(
            written.ends_with(
                "~ nft replace chains of table inet fabric: forward, input, output, pods, postrouting, prerouting, senders\n\
                 ~ nft replace chains of table bridge fabric: advertised, forward, pods, prerouting\n"
            ),
            "{written}"
        );
        let listed = shown();
        for line in [
            "type nat hook postrouting priority 99; policy accept;",
            "type filter hook prerouting priority -300; policy accept;",
            "elements = { 198.18.0.2 . 10.64.2.0",
            "elements = { 2001:db8:ff::2 . 2001:db8:0:2::",
            "elements = { \"veth1\"",
            "elements = { \"veth1\" . 02:00:00:00:00:07 . 10.64.1.7 }",
            "elements = { \"veth1\" . 02:00:00:00:00:07 . 2001:db8:0:1::7 }",
            "iifname . ether saddr . arp saddr ip @pods4 return",
            "icmpv6 type 136 jump advertised",
            "iifname . ether saddr . @th,64,128 @pods6 return",
            "@th,96,24 0x7 jump senders comment \"encapsulated [",
            "@th,96,24 0x7 @th,224,16 0x800 ip saddr . @th,336,32 & 0xffffff00 @members4 accept",
            "iifname . ether saddr . ip saddr @pods4 accept",
            "@th,224,16 0x86dd ip6 saddr . @th,304,128 & 0xffffffffffffffff0000000000000000 @members6 accept",
            "exthdr frag 1 udp dport 8472 counter",
            "udp dport 8472 @th,96,24 0x7 notrack",
            "meta mark & 0x00004000 == 0x00004000 return",
            "ip saddr 10.64.0.0/12 ip daddr 203.0.113.0/25 return",
            "ip saddr 10.64.0.0/12 masquerade fully-random",
            "ip6 saddr 2001:db8::/48 ip6 daddr ff00::/8 return",
            "iifname \"cni0\" jump pods comment \"from a pod [",
            "udp dport 8472 counter packets 0 bytes 0 drop comment \"a pod does not speak VXLAN [",
            "arp saddr ip != 10.64.1.0/24",
        ] {
            assert!(listed.contains(line), "{line}\nis not in\n{listed}");
        }
        let mut restarted = kernel();
        for (family, table) in &want {
            assert_eq!(look(&mut restarted).await.filter[family], table.found());
        }
        assert_eq!(settle(&mut restarted, &want).await, "");
        assert_eq!(shown(), listed);
    });
}

#[test]
fn peer_that_comes_or_goes_changes_elements_alone() {
    in_netns_async(|| async {
        let mut kernel = kernel();
        settle(&mut kernel, &rules(2)).await;
        let before = shown();
        assert_eq!(settle(&mut kernel, &rules(3)).await.lines().count(), 1);
        assert!(shown().contains("198.18.0.4 . 10.64.4.0"));
        assert_eq!(settle(&mut kernel, &rules(3)).await, "", "what was written is known");
        settle(&mut kernel, &rules(2)).await;
        assert_eq!(shown(), before);
    });
}

#[test]
fn whatever_is_done_to_our_tables_wakes_and_is_put_right() {
    in_netns_async(|| async {
        let (mut kernel, want) = (kernel(), rules(1));
        settle(&mut kernel, &want).await;
        let before = without_handles();
        for deed in [
            "flush ruleset",
            "flush table inet fabric",
            "flush chain inet fabric senders",
            "delete table bridge fabric",
            "delete element inet fabric members4 { 198.18.0.2 . 10.64.2.0 }",
            "add element inet fabric odd4 { 198.18.0.9 . 10.64.0.0/12 }",
            "add element inet fabric odd4 { 198.18.0.9 . 10.64.0.3-10.64.0.5 }",
            "flush set inet fabric members4",
            "insert rule inet fabric input accept",
            "add chain inet fabric extra",
            "add set inet fabric extra { type mark; }",
            "add table inet fabric { flags dormant; }",
            "chain inet fabric input { policy drop; }",
        ] {
            run("nft", deed);
            woken(&mut kernel).await;
            assert_ne!(settle(&mut kernel, &want).await, "", "{deed}");
            assert!(without_handles() == before, "after {deed} there is\n{}", shown());
        }
    });
}

#[test]
fn tables_of_others_stay_as_they_are_and_those_that_only_translate_wake_nobody() {
    in_netns_async(|| async {
        let mut kernel = kernel();
        settle(&mut kernel, &rules(2)).await;
        let before = look(&mut kernel).await;
        run("nft", "add table ip nat");
        run("nft", "add chain ip nat PREROUTING { type nat hook prerouting priority -100; }");
        run("nft", "add rule ip nat PREROUTING ip daddr 192.0.2.7 dnat to 192.0.2.8");
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(Arc::ptr_eq(&before, &look(&mut kernel).await));
        run("nft", "add table inet other");
        run("nft", "add chain inet other fabric { type filter hook input priority 0; policy drop; }");
        run("nft", "add table ip fabric");
        woken(&mut kernel).await;
        let others = || ["inet other", "ip fabric"].map(|table| run("nft", &format!("-a list table {table}")));
        let listed = others();
        run("nft", "delete table inet fabric");
        // What was written to others' tables before is told in between.
        while look(&mut kernel).await.filter.contains_key(&TableKey::Fabric) {
            woken(&mut kernel).await;
        }
        settle(&mut kernel, &rules(5)).await;
        settle(&mut kernel, &Ruleset::new()).await;
        assert_eq!(others(), listed);
    });
}

#[test]
fn five_thousand_peers_are_a_few_transactions_and_one_more_costs_little() {
    in_netns_async(|| async {
        let mut kernel = kernel();
        settle(&mut kernel, &rules(5_000)).await;
        let more = diff(&rules(5_001), &look(&mut kernel).await.filter);
        let lines: Vec<_> = more.to_string().lines().map(str::to_owned).collect();
        assert!(lines.len() <= 4 && lines.iter().all(|line| line.starts_with("+ nft add element")), "{lines:?}");
        assert!(kernel.apply(more.ops()).await.iter().all(Result::is_ok));
        let found = &look(&mut kernel_anew()).await.filter[&TableKey::Fabric];
        let (usual, odd) = (found.sets["members4"].elements.len(), found.sets["odd4"].elements.len());
        assert_eq!((usual + odd, odd), (10_002, 19), "addresses that end in 0");
    });
}

/// A daemon that knows nothing but what the kernel tells it.
fn kernel_anew() -> Netlink {
    kernel()
}
