//! Our tables of nftables in the real kernel, with `nft` as an independent witness.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use fabric_core::diff::diff;
use fabric_core::model::{PerFamily, Subnet};
use fabric_core::network::NetworkConfig;
use fabric_core::plan::filter::{FilterInputs, FilterOptions, Member, Pod, ruleset};
use fabric_core::state::nft::{Ruleset, TableKey};
use fabric_tests::conformance::kernel::{look, settle, v, woken};
use fabric_tests::netns::{in_netns, in_netns_async, ip, run};
use fabricd::kernel::netlink::Netlink;
use fabricd::kernel::{Kernel as _, Options, kube_proxy};

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
            "add element inet fabric prefixes4 { 198.18.0.9 . 10.64.0.0/12 }",
            "add element inet fabric prefixes4 { 198.18.0.9 . 10.64.0.3-10.64.0.5 }",
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
        let (usual, odd) = (found.sets["members4"].elements.len(), found.sets["prefixes4"].elements.len());
        assert_eq!((usual + odd, odd), (10_002, 19), "addresses that end in 0");
    });
}

/// A daemon that knows nothing but what the kernel tells it.
fn kernel_anew() -> Netlink {
    kernel()
}

/// Rules of iptables in which kube-proxy's are among those of others, and the same without what is kube-proxy's.
const BESIDE_KUBE_PROXY: &str = "
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-A - [0:0]
:LAST - [0:0]
[3:180] -A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
[5:300] -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
[1:60] -A PREROUTING -p tcp
[7:420] -A PREROUTING -j LAST
[0:0] -A OUTPUT -j KUBE-SERVICES
[0:0] -A OUTPUT ! -d 127.0.0.0/8 -j DOCKER
[0:0] -A POSTROUTING -j KUBE-POSTROUTING
[2:120] -A POSTROUTING -s 198.51.100.0/24 -j MASQUERADE
[0:0] -A DOCKER -i docker0 -j RETURN
[0:0] -A DOCKER -p tcp -m tcp --dport 8080 -j DNAT --to-destination 198.51.100.2:80
[0:0] -A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
[0:0] -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
[0:0] -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
[0:0] -A KUBE-POSTROUTING -j MASQUERADE
[0:0] -A KUBE-SEP-A -p tcp -j DNAT --to-destination 192.0.2.7:8080
[9:540] -A KUBE-SERVICES -d 203.0.113.10/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A
[0:0] -A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
[0:0] -A KUBE-SVC-A ! -s 192.0.2.0/24 -j KUBE-MARK-MASQ
[0:0] -A KUBE-SVC-A -m statistic --mode random --probability 0.5 -j KUBE-SEP-A
[0:0] -A LAST -d 192.0.2.1/32 -j DOCKER
[4:240] -A LAST -g DOCKER
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
[0:0] -A INPUT -j KUBE-FIREWALL
[0:0] -A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
[0:0] -A FORWARD -j KUBE-FORWARD
[0:0] -A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -j DROP
[0:0] -A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
COMMIT
";

/// Loads it as rules of a family, with its counters.
fn restore(program: &str, rules: &str) {
    let mut child = Command::new(program).args(["--counters", "--wait"]).stdin(Stdio::piped()).spawn().expect(program);
    child.stdin.take().expect("piped").write_all(rules.as_bytes()).expect("it reads");
    assert!(child.wait().expect("it ends").success(), "{program}");
}

#[test]
fn rules_of_kube_proxy_in_iptables_legacy_go_and_those_of_others_stay_with_their_counters() {
    in_netns(|| {
        assert!(kube_proxy::found().is_empty());
        let v6 = |rules: &str| {
            [("192.0.2.", "2001:db8::"), ("198.51.100.2:80", "[2001:db8::2]:80"), ("127.0.0.0/8", "::1/128")]
                .into_iter()
                .fold(rules.replace("198.51.100.0/24", "2001:db8:1::/48"), |rules, (v4, v6)| rules.replace(v4, v6))
                .replace("203.0.113.10/32", "2001:db8:2::10/128")
                .replace("2001:db8::7:8080", "[2001:db8::7]:8080")
                .replace("2001:db8::0/24", "2001:db8::/64")
                .replace("2001:db8::1/32", "2001:db8::1/128")
        };
        restore("iptables-legacy-restore", BESIDE_KUBE_PROXY);
        restore("ip6tables-legacy-restore", &v6(BESIDE_KUBE_PROXY));
        let saved = |program: &str| -> Vec<String> {
            let all = run(program, "-c");
            // Packets of the namespace's own count against policies.
            let lines = all.lines().filter(|line| !line.starts_with('#'));
            lines
                .map(|line| if line.starts_with(':') { line.split(" [").next().unwrap() } else { line }.to_owned())
                .collect()
        };
        let is_its = |line: &String| {
            let of_kubelet = ["KUBE-MARK-DROP", "KUBE-FIREWALL"].iter().any(|chain| line.contains(chain));
            line.contains("KUBE-") && !of_kubelet
        };
        let programs = ["iptables-legacy-save", "ip6tables-legacy-save"];
        let before = programs.map(saved);
        assert!(before.iter().all(|rules| rules.iter().filter(|rule| is_its(rule)).count() > 15), "{before:?}");
        assert_eq!(kube_proxy::found(), ["iptables-legacy"]);
        let removed = kube_proxy::remove().expect("removed");
        let of = |program: &str| [format!("6 chains of {program} nat"), format!("1 chains of {program} filter")];
        assert_eq!(removed, [of("iptables-legacy"), of("ip6tables-legacy")].concat());
        for (program, mut before) in programs.into_iter().zip(before) {
            before.retain(|line| !is_its(line));
            assert_eq!(saved(program), before);
        }
        assert!(kube_proxy::found().is_empty());
        assert!(kube_proxy::remove().expect("nothing to do").is_empty());
    });
}

/// What kube-proxy leaves in IPVS mode but for the virtual servers: this kernel may have no IPVS.
#[test]
fn interface_and_sets_of_kube_proxy_in_ipvs_mode_go_and_those_of_others_stay() {
    in_netns(|| {
        ip("link add kube-ipvs0 type bridge");
        ip("address add 203.0.113.10/32 dev kube-ipvs0");
        ip("link add other type bridge");
        run("ipset", "create KUBE-CLUSTER-IP hash:ip,port");
        run("ipset", "create KUBE-6-CLUSTER-IP hash:ip,port family inet6");
        run("ipset", "create others hash:ip");
        let chains = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\n\
            -A KUBE-SERVICES -m set --match-set KUBE-CLUSTER-IP dst,dst -j ACCEPT\nCOMMIT\n";
        restore("iptables-legacy-restore", chains);
        assert_eq!(kube_proxy::found(), ["iptables-legacy", "IPVS"]);
        let removed = kube_proxy::remove().expect("removed").join(", ");
        assert_eq!(removed, "1 chains of iptables-legacy nat, interface kube-ipvs0, 2 sets of ipset");
        assert_eq!(run("ipset", "list -n").trim(), "others");
        let links = ip("-br link show type bridge");
        assert!(links.contains("other") && !links.contains("kube-ipvs0"), "{links}");
    });
}
