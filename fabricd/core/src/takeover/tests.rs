use super::*;
use crate::leases::Entry;

const DUAL: &str =
    r#"{"EnableIPv6":true,"Network":"10.244.0.0/16","IPv6Network":"fd00:10:244::/48","Backend":{"Type":"vxlan"}}"#;
const V4: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

fn v<T: std::str::FromStr<Err: fmt::Debug>>(text: &str) -> T {
    text.parse().expect(text)
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
}

fn leases(own: &str) -> LeaseSet {
    let entry = |(number, (key, value)): (usize, (&str, &str))| {
        let revision = i64::try_from(number).expect("few") + 1;
        Entry {
            key: key.to_owned(),
            value: value.as_bytes().to_vec(),
            create_revision: revision,
            mod_revision: revision,
        }
    };
    let peer =
        r#"{"PublicIP":"192.0.2.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:02"}}"#;
    let own_key = if own.contains("PublicIPv6") { "10.244.1.0-24&fd00:10:244:1::-64" } else { "10.244.1.0-24" };
    let entries = [(own_key, own), ("10.244.2.0-24", peer)].into_iter().enumerate().map(entry).collect();
    LeaseSet::snapshot(&LeaseSet::default(), entries, 9)
}

/// What flannel wrote for this node.
const OWN: &str =
    r#"{"PublicIP":"192.0.2.1","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"}}"#;
const OWN_DUAL: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"vxlan",
    "BackendData":{"VNI":1,"VtepMAC":"02:42:c0:00:02:01"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:42:c0:00:06:01"}}"#;

/// A node of flannel's whose flanneld was ended, with iptables rules and a conflist.
fn flannel_node(config: &str) -> Facts {
    let network = NetworkConfig::decode(config.as_bytes()).expect("valid");
    let is_dual = network.spaces.v6.is_some();
    let device = |name: &str, local: &str, mac: &str, base: &str| Device {
        name: v(name),
        altnames: vec![],
        vni: 1,
        port: 8472,
        local: v(local),
        mac: v(mac),
        addresses: vec![v(base)],
    };
    let mut devices = vec![device("flannel.1", "192.0.2.1", "02:42:c0:00:02:01", "10.244.1.0")];
    devices.extend(is_dual.then(|| device("flannel-v6.1", "2001:db8::1", "02:42:c0:00:06:01", "fd00:10:244:1::")));
    let route =
        |dst: &str, gateway: &str, dev: &str| Route { dst: v(dst), gateway: v(gateway), dev: v(dev), ours: false };
    let rules = Iptables {
        nat: lines(
            r#"-P POSTROUTING ACCEPT
            -N FLANNEL-POSTRTG
            -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
            -A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
            -A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE"#,
        ),
        filter: lines(
            r#"-P FORWARD DROP
            -N FLANNEL-FWD
            -A FORWARD -j DOCKER-USER
            -A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
            -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
            -A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#,
        ),
    };
    let conflist = |file: &str| Some(Conflist { file: file.into(), network: "cbr0".into() });
    Facts {
        node: v("node-1"),
        network,
        leases: Arc::new(leases(if is_dual { OWN_DUAL } else { OWN })),
        devices,
        addresses: vec![v("192.0.2.1"), v("2001:db8::1")],
        public_ips: PerFamily::default(),
        routes: vec![
            route("10.244.2.0/24", "10.244.2.0", "flannel.1"),
            route("10.244.38.0/24", "10.244.38.0", "flannel.1"),
            route("198.51.100.0/24", "198.51.100.0", "flannel.1"),
            route("10.244.39.0/24", "192.0.2.9", "eth0"),
        ],
        naming: Naming::Rename,
        keep_name: false,
        flanneld: None,
        flanneld_wrote_subnet_env: false,
        fabricd: None,
        ready: None,
        masquerades: None,
        masquerade_wanted: true,
        masquerade_waived: false,
        flannels_masquerade: false,
        iptables: PerFamily { v4: Some(rules), v6: None },
        flannel_tables: PerFamily::default(),
        assigned: false,
        ours: vec![],
        fast_path: vec![],
        services: false,
        policies: false,
        cni: Cni {
            dir: "/etc/cni/net.d".into(),
            our_file: "10-fabric.conflist".into(),
            flannels: conflist("10-flannel.conflist"),
            ..Cni::default()
        },
    }
}

fn told(steps: Result<Vec<Step>, Vec<Refusal>>) -> String {
    match steps {
        Ok(steps) => steps.iter().map(|step| format!("{step}\n")).collect(),
        Err(refusals) => refusals.iter().map(|refusal| format!("refused: {refusal}\n")).collect(),
    }
}

#[test]
fn takeover_of_a_flannel_node_in_the_words_of_its_tools() {
    let expected = r#"ip link set dev flannel.1 name fabric.1
# fabricd claims the lease and replaces flannel's routes; start it if it doesn't run
ip route del 10.244.38.0/24 via 10.244.38.0 dev fabric.1
write /etc/cni/net.d/10-fabric.conflist (network cbr0)
mv /etc/cni/net.d/10-flannel.conflist /etc/cni/net.d/10-flannel.conflist.before-fabricd
iptables-restore --noflush --wait <<EOF
*filter
-I FORWARD 2 -s 10.244.0.0/16 -m comment --comment "fabricd: forward" -j ACCEPT
-I FORWARD 2 -d 10.244.0.0/16 -m comment --comment "fabricd: forward" -j ACCEPT
-D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-F FLANNEL-FWD
-X FLANNEL-FWD
COMMIT
EOF
iptables-restore --noflush --wait <<EOF
*nat
-D POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-F FLANNEL-POSTRTG
-X FLANNEL-POSTRTG
COMMIT
EOF
"#;
    assert_eq!(told(takeover(&flannel_node(V4))), expected);
}

#[test]
fn each_family_has_its_device_and_nftables_are_one_table_each() {
    let mut facts = flannel_node(DUAL);
    facts.iptables = PerFamily::default();
    facts.flannel_tables = PerFamily { v4: Some(()), v6: Some(()) };
    facts.routes.clear();
    let expected = "ip link set dev flannel.1 name fabric.1
ip link set dev flannel-v6.1 name fabric6.1
# fabricd claims the lease and replaces flannel's routes; start it if it doesn't run
write /etc/cni/net.d/10-fabric.conflist (network cbr0)
mv /etc/cni/net.d/10-flannel.conflist /etc/cni/net.d/10-flannel.conflist.before-fabricd
nft delete table ip flannel-ipv4
nft delete table ip6 flannel-ipv6
";
    assert_eq!(told(takeover(&facts)), expected);
}

/// A node that fabricd has after a takeover.
fn taken_over() -> Facts {
    let mut facts = flannel_node(V4);
    facts.devices[0].name = v("fabric.1");
    facts.fabricd = Some("systemctl disable --now fabricd.service".into());
    facts.ready = LeaseKey::new(PerFamily { v4: Some(v("10.244.1.0/24")), v6: None });
    facts.masquerades = Some(true);
    facts.iptables = PerFamily::default();
    facts.routes = vec![Route { dst: v("10.244.2.0/24"), gateway: v("10.244.2.0"), dev: v("fabric.1"), ours: true }];
    let owner = r#","Fabric":{"v":1,"node":"node-1","boot":"b","netns":1,"epoch":1}}"#;
    facts.leases = Arc::new(leases(&OWN.replacen("}}", &format!("}}{owner}"), 1)));
    let cni = &mut facts.cni;
    cni.aside = cni.flannels.take().map(|file| Conflist { file: format!("{}{ASIDE}", file.file), ..file });
    cni.ours = Some(Conflist { file: "10-fabric.conflist".into(), network: "cbr0".into() });
    facts.ours = vec!["ip nexthop flush proto 250".into(), "nft delete table inet fabric".into()];
    facts
}

#[test]
fn of_a_node_that_is_taken_over_nothing_is_left_to_take() {
    assert_eq!(told(takeover(&taken_over())), "");
}

#[test]
fn giveback_waits_for_flanneld_before_anything_of_ours_goes() {
    let mut facts = taken_over();
    assert!(
        told(giveback(&facts)).contains("fabricd runs; end it so that it can't come back: systemctl disable --now")
    );
    facts.fabricd = None;
    facts.cni.pods = vec![Pod { network: "cbr0".into(), container: "c1".into(), ifname: "eth0".into() }];
    let expected = "ip link set dev fabric.1 name flannel.1
# flanneld takes device and lease over and replaces fabricd's routes; start it if it doesn't run
ip nexthop flush proto 250
nft delete table inet fabric
rm node.json
write /var/lib/cni/flannel/c1 and its addresses in cbr0
mv /etc/cni/net.d/10-flannel.conflist.before-fabricd /etc/cni/net.d/10-flannel.conflist
rm /etc/cni/net.d/10-fabric.conflist
";
    assert_eq!(told(giveback(&facts)), expected);
    facts.devices[0].name = v("flannel.1");
    assert!(told(giveback(&facts)).starts_with("# flanneld takes"));
    // It runs, has its record and has made its rules, but not yet its route.
    facts.flanneld = Some("kill 7".into());
    facts.leases = Arc::new(leases(OWN));
    facts.flanneld_wrote_subnet_env = true;
    assert!(told(giveback(&facts)).starts_with("# flanneld takes"), "a route of ours leads to a peer");
    facts.routes[0].ours = false;
    assert!(told(giveback(&facts)).starts_with("ip nexthop flush"));
    facts.flanneld_wrote_subnet_env = false;
    assert!(told(giveback(&facts)).starts_with("# flanneld takes"), "it has been started, and not more");
}

#[test]
fn the_fast_path_goes_first_and_what_flannel_would_not_do_refuses_a_giveback() {
    let mut facts = taken_over();
    facts.fabricd = None;
    facts.fast_path = vec!["- fast path: link at ingress of interface 7".into()];
    let steps = told(giveback(&facts));
    assert!(steps.starts_with("- fast path: link at ingress of interface 7\nip link set dev fabric.1 name"), "{steps}");
    (facts.services, facts.policies) = (true, true);
    let refused = told(giveback(&facts));
    for words in ["start kube-proxy, then fabricd with --services off", "start fabricd with --network-policy off"] {
        assert!(refused.contains(words), "{refused}");
    }
    assert!(told(takeover(&facts)).starts_with("# fabricd claims"), "neither is in the way of a takeover");
}

#[test]
fn a_device_that_cannot_be_renamed_gets_our_name_beside_its_own() {
    let mut facts = flannel_node(DUAL);
    facts.iptables = PerFamily::default();
    facts.keep_name = true;
    let asked_for = told(takeover(&facts));
    (facts.keep_name, facts.naming) = (false, Naming::Altname);
    let expected = "ip link property add dev flannel.1 altname fabric.1
ip link property add dev flannel-v6.1 altname fabric6.1
# fabricd claims the lease and replaces flannel's routes; start it if it doesn't run
ip route del 10.244.38.0/24 via 10.244.38.0 dev flannel.1
write /etc/cni/net.d/10-fabric.conflist (network cbr0)
mv /etc/cni/net.d/10-flannel.conflist /etc/cni/net.d/10-flannel.conflist.before-fabricd
";
    assert_eq!((told(takeover(&facts)).as_str(), asked_for.as_str()), (expected, expected));

    let mut facts = taken_over();
    facts.naming = Naming::Altname;
    (facts.devices[0].name, facts.devices[0].altnames) = (v("flannel.1"), vec![v("fabric.1")]);
    facts.routes[0].dev = v("flannel.1");
    assert_eq!(told(takeover(&facts)), "", "it is ours");
    facts.fabricd = None;
    let steps = told(giveback(&facts));
    assert!(steps.starts_with("ip link property del dev flannel.1 altname fabric.1\n# flanneld takes"), "{steps}");
    facts.devices[0].altnames = vec![v("enp-of-others")];
    assert!(told(giveback(&facts)).starts_with("# flanneld takes"), "it is flannel's again");

    let mut facts = taken_over();
    (facts.fabricd, facts.naming) = (None, Naming::Altname);
    assert!(told(giveback(&facts)).contains("fabric.1 has to be renamed, and this kernel is older than 6.2"));
}

/// A node that fabricd had from the start, with a pod, given back until after the rename.
fn born_with_us() -> Facts {
    let mut facts = taken_over();
    let cni = &mut facts.cni;
    (cni.flannels, cni.aside) =
        (cni.aside.take().map(|file| Conflist { file: "10-flannel.conflist".into(), ..file }), None);
    cni.ours = Some(Conflist { file: "10-fabric.conflist".into(), network: "fabric".into() });
    cni.pods = vec![Pod { network: "fabric".into(), container: "c1".into(), ifname: "eth0".into() }];
    facts
}

#[test]
fn a_giveback_that_is_turned_round_keeps_our_networks_name_until_a_pod_was_handed_over() {
    let mut facts = born_with_us();
    let moved = "mv /etc/cni/net.d/10-flannel.conflist /etc/cni/net.d/10-flannel.conflist.before-fabricd\n";
    let kept = format!("write /etc/cni/net.d/10-fabric.conflist (network fabric)\n{moved}");
    assert_eq!(told(takeover(&facts)), kept);
    facts.cni.has_flannels_pods = true;
    let handed = format!(
        "write /var/lib/cni/flannel/c1 and its addresses in cbr0\n\
         write /etc/cni/net.d/10-fabric.conflist (network cbr0)\n{moved}"
    );
    assert_eq!(told(takeover(&facts)), handed);
}

#[test]
fn a_conflist_that_flannels_daemonset_has_written_anew_makes_the_one_aside_superfluous() {
    let mut facts = taken_over();
    facts.fabricd = None;
    facts.cni.flannels = born_with_us().cni.flannels;
    assert!(
        told(giveback(&facts))
            .ends_with("rm /etc/cni/net.d/10-fabric.conflist\nrm /etc/cni/net.d/10-flannel.conflist.before-fabricd\n")
    );
}

#[test]
fn pods_of_an_earlier_network_name_are_handed_over_too() {
    let mut facts = taken_over();
    facts.fabricd = None;
    facts.cni.pods = vec![Pod { network: "fabric".into(), container: "c1".into(), ifname: "eth0".into() }];
    assert!(told(giveback(&facts)).contains("write /var/lib/cni/flannel/c1 and its addresses in cbr0"));
}

/// Of a node that is taken over: fabricd was ended, flanneld has the device, the lease and the routes.
fn flanneld_is_back() -> Facts {
    let mut facts = taken_over();
    (facts.fabricd, facts.flanneld, facts.flanneld_wrote_subnet_env) = (None, Some("kill 7".into()), true);
    facts.devices[0].name = v("flannel.1");
    facts.leases = Arc::new(leases(OWN));
    facts.routes[0].ours = false;
    facts
}

#[test]
fn giveback_waits_for_flannels_masquerade_before_ours_goes() {
    let mut facts = flanneld_is_back();
    facts.flannels_masquerade = true;
    assert!(told(giveback(&facts)).starts_with("ip nexthop flush"), "nobody can look at its rules");
    facts.iptables.v4 = Some(Iptables::default());
    assert!(told(giveback(&facts)).starts_with("# flanneld takes"));
    facts.flannel_tables.v4 = Some(());
    assert!(told(giveback(&facts)).starts_with("ip nexthop flush"));
    facts.flannel_tables = PerFamily::default();
    facts.iptables = flannel_node(V4).iptables;
    assert!(told(giveback(&facts)).starts_with("ip nexthop flush"));
    facts.iptables.v4.as_mut().expect("there").nat.retain(|rule| !rule.starts_with("-A FLANNEL-POSTRTG"));
    assert!(told(giveback(&facts)).contains("# flanneld takes"), "its chain is empty");
}

const WITH_OURS: &str = r#"iptables-restore --noflush --wait <<EOF
*filter
-I FORWARD 2 -s 10.244.0.0/16 -m comment --comment "fabricd: forward" -j ACCEPT
-I FORWARD 2 -d 10.244.0.0/16 -m comment --comment "fabricd: forward" -j ACCEPT
COMMIT
EOF
"#;

const WITHOUT_OURS: &str = r#"iptables-restore --noflush --wait <<EOF
*filter
-D FORWARD -s 10.244.0.0/16 -m comment --comment "fabricd: forward" -j ACCEPT
-D FORWARD -d 10.244.0.0/16 -m comment --comment "fabricd: forward" -j ACCEPT
COMMIT
EOF
"#;

/// Rules of ours in `FORWARD`, as `iptables -S` shows them.
fn our_forward_rules() -> Vec<String> {
    WITHOUT_OURS.lines().filter_map(|line| Some(format!("-A{}", line.strip_prefix("-D")?))).collect()
}

#[test]
fn our_forward_rules_go_once_flannels_are_there() {
    let mut facts = flanneld_is_back();
    facts.ours.clear();
    let filter = [vec!["-P FORWARD DROP".to_owned()], our_forward_rules()].concat();
    facts.iptables.v4 = Some(Iptables { nat: vec![], filter });
    assert!(!told(giveback(&facts)).contains("iptables"), "flanneld makes no such rules");
    let rules = &mut facts.iptables.v4.as_mut().expect("there").filter;
    rules.extend(flannel_node(V4).iptables.v4.expect("there").filter);
    let mut halfway = facts.clone();
    assert!(told(giveback(&facts)).starts_with(WITHOUT_OURS));
    halfway.iptables.v4.as_mut().expect("there").filter.pop();
    assert!(!told(giveback(&halfway)).contains("iptables"), "the second of flannel's two rules is missing");
}

/// A takeover that is turned round before flannel's rules went: flanneld empties its chain when it starts.
#[test]
fn our_forward_rules_are_there_before_flanneld_can_start_and_go_when_it_has_made_its_own() {
    let mut facts = flannel_node(V4);
    facts.devices[0].name = v("fabric.1");
    facts.routes.clear();
    let rest = format!(
        "ip link set dev fabric.1 name flannel.1
# flanneld takes device and lease over and replaces fabricd's routes; start it if it doesn't run
{WITHOUT_OURS}"
    );
    assert_eq!(told(giveback(&facts)), format!("{WITH_OURS}{rest}"));
    facts.iptables.v4.as_mut().expect("there").filter.extend(our_forward_rules());
    assert_eq!(told(giveback(&facts)), rest);
    // A node that is flannel's and always was.
    let mut facts = flannel_node(V4);
    (facts.flanneld, facts.flanneld_wrote_subnet_env) = (Some("kill 7".into()), true);
    assert_eq!(told(giveback(&facts)), "");
}

#[test]
fn where_nothing_else_decides_about_forwarded_packets_no_rule_of_ours_is_needed() {
    let mut facts = flannel_node(V4);
    let rules = facts.iptables.v4.as_mut().expect("there");
    rules.filter.retain(|line| !line.contains("DROP") && !line.contains("DOCKER-USER"));
    let steps = told(takeover(&facts));
    assert!(!steps.contains("-I FORWARD") && steps.contains("-D FORWARD"), "{steps}");
}

#[test]
fn whatever_does_not_fit_is_refused_with_the_way_out() {
    type Change = fn(&mut Facts);
    let cases: [(Change, &str); 12] = [
        (|f| f.devices.clear(), "there is no flannel.1, nor fabric.1"),
        (
            |f| f.devices[0].port = 4789,
            "flannel.1 has VNI 1 and UDP port 4789, the network config says VNI 1, port 8472",
        ),
        (|f| f.devices[0].local = v("192.0.2.77"), "flannel.1 sends from 192.0.2.77, which is no address of this host"),
        (|f| f.devices[0].mac = v("02:42:c0:00:02:99"), "flannel.1 has 02:42:c0:00:02:99: peers can't reach this node"),
        (|f| f.devices[0].addresses.clear(), "flannel.1 hasn't got 10.244.1.0"),
        (|f| f.leases = Arc::default(), "the store has no lease with the public address 192.0.2.1"),
        (
            |f| f.devices.push(Device { name: v("fabric.1"), ..f.devices[0].clone() }),
            "flannel.1 and fabric.1 are both there",
        ),
        (|f| f.flanneld = Some("kill 7".into()), "flanneld runs; end it so that it can't come back: kill 7"),
        (|f| f.naming = Naming::Fixed, "older than 5.5"),
        (|f| f.masquerade_wanted = false, "start fabricd with --ip-masq, or say --no-masquerade"),
        (|f| (f.masquerades, f.ready) = (Some(false), taken_over().ready), "start fabricd with --ip-masq"),
        (|f| f.cni.plugin_missing = Some("/opt/cni/bin".into()), "fabricd install-cni --only plugins"),
    ];
    for (change, words) in cases {
        let mut facts = flannel_node(V4);
        change(&mut facts);
        let refused = told(takeover(&facts));
        assert!(refused.starts_with("refused: ") && refused.contains(words), "{words}: {refused}");
    }
    let mut facts = taken_over();
    facts.node = v("node-9");
    assert!(told(takeover(&facts)).contains("is that of node-1, this node is called node-9"));
    let mut facts = taken_over();
    (facts.fabricd, facts.cni.aside) = (None, None);
    assert!(
        told(giveback(&facts))
            .contains("put flannel's conflist there, under a name that sorts behind 10-fabric.conflist")
    );
}
