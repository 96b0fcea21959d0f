//! The checks of `fabricctl doctor` on a node that is broken in one way each: what the kernel has and the files of the
//! host are made up here. What takes a real kernel is in `lab_see.rs` and `lab_mesh.rs`.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use fabric_core::diff::diff;
use fabric_core::firewall::{self, TableKind};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::leases::{Entry, LeaseSet};
use fabric_core::model::{Family, Vni};
use fabric_core::plan::Desired;
use fabric_core::state::nft::FoundTable;
use fabric_core::state::nft::TableKey;
use fabric_core::state::{ForeignLink, Routing, VxlanLink};
use fabric_tests::certificates::Certificates;
use fabric_tests::served::view;
use fabricd::diagnosis::checks;
use fabricd::diagnosis::finding::Finding;
use fabricd::diagnosis::{Outcome, Places, Scene, Sections};
use fabricd::host::underlay::{DefaultRoute, HostLink};
use fabricd::kernel::Observed;
use fabricd::kernel::routing::fib::{Action, Fib, PolicyRule, Route};
use fabricd::mesh::Mesh;
use fabricd::policy::drops::DropLog;
use fabricd::policy::status::PolicyView;
use fabricd::reconcile::Snapshot;
use fabricd::status::section::SectionStatus;
use fabricd::status::view::{PeerTrouble, View};
use tempfile::TempDir;
use tokio::sync::watch;

/// A node that is well, to be broken.
struct Node {
    root: TempDir,
    view: View,
    wanted: Routing,
    observed: Observed,
    fib: Fib,
    certificates: Vec<PathBuf>,
    sections: Sections,
    policy: Option<PolicyView>,
}

impl Node {
    fn well() -> Result<Self> {
        let view = view(&[2])?;
        let end = view.vteps[0].clone();
        let link = VxlanLink {
            vni: Vni::try_from(1)?,
            port: 8472,
            gbp: false,
            mac: end.vtep.mac,
            local: end.vtep.local,
            mtu: 1450,
            learning: false,
            up: true,
        };
        let wanted = Routing { links: [(end.device, link)].into(), ..Routing::default() };
        let bridge = ("127.1.1.1".parse()?, "127.1.1.0/24".parse()?);
        let host_link = |name: &str, mtu, addresses| -> Result<HostLink> {
            Ok(HostLink { index: 7, name: name.parse()?, mtu, up: true, loopback: false, addresses, passing: vec![] })
        };
        let mut observed = Observed { ours: wanted.clone(), nexthop_objects: true, ..Observed::default() };
        observed.host.links = vec![
            host_link("eth0", 1500, vec![])?,
            host_link("cni0", 1450, vec![bridge])?,
            host_link("veth1", 1450, vec![])?,
        ];
        observed.bridges = [("cni0".parse()?, ["veth1".parse()?].into())].into();
        observed.filter.insert(
            TableKey::Fabric,
            FoundTable { chains: [("postrouting".to_owned(), Arc::default())].into(), ..FoundTable::default() },
        );
        let fib = Fib { rules: vec![rule(32766, 254)], routes: vec![route("127.1.2.0/24", "fabric.1", true)] };
        let node = Self {
            root: tempfile::tempdir()?,
            view,
            wanted,
            observed,
            fib,
            certificates: vec![],
            sections: Sections::default(),
            policy: None,
        };
        for (file, content) in [
            ("proc/sys/kernel/osrelease", "6.1.0-amd64"),
            ("proc/sys/net/ipv4/ip_forward", "1"),
            ("proc/sys/net/bridge/bridge-nf-call-iptables", "1"),
            ("proc/sys/net/netfilter/nf_conntrack_count", "9"),
            ("proc/sys/net/netfilter/nf_conntrack_max", "1000"),
            ("sys/class/net/fabric.1/ifindex", "5"),
            ("run/systemd/netif/state", ""),
            ("run/systemd/netif/links/5", "ADMIN_STATE=unmanaged"),
            ("etc/systemd/networkd.conf.d/x.conf", "[Network]\nManageForeignRoutes=no\nManageForeignNextHops=no\n"),
            ("run/NetworkManager/devices/5", "[device]\nmanaged=false"),
            ("sys/class/net/cni0/ifindex", "6"),
            ("sys/class/net/veth1/ifindex", "7"),
            ("sys/class/net/veth1/carrier", "1"),
            ("etc/cni/net.d/10-fabric.conflist", r#"{"plugins":[{"type":"fabric-cni"}]}"#),
            ("etc/cni/net.d/99-loopback.conf", "{}"),
            ("var/lib/cni/networks/fabric/127.1.1.2", "c1\r\neth0"),
            (
                "var/lib/cni/fabric/fabric/c1@eth0.json",
                "{\"netns\":\"/run/netns/c1\"}\n{\"ports\":[\"veth1\"],\"bridge\":\"cni0\",\"ips\":[\"127.1.1.2\"]}\n",
            ),
        ] {
            node.has(file, content)?;
        }
        Ok(node)
    }

    /// A file of the host.
    fn has(&self, file: &str, content: &str) -> Result<()> {
        let path = self.root.path().join(file);
        fs::create_dir_all(path.parent().context("a folder")?)?;
        Ok(fs::write(path, content)?)
    }

    fn lacks(&self, file: &str) -> Result<()> {
        Ok(fs::remove_file(self.root.path().join(file))?)
    }

    /// It is switched on, and stands like this.
    fn section(status: SectionStatus) -> Option<watch::Receiver<Arc<SectionStatus>>> {
        Some(watch::channel(Arc::new(status)).1)
    }

    fn check(&self, id: &str) -> Result<Finding> {
        let wanted = Desired { state: self.wanted.clone(), ..Desired::default() };
        let places = Places {
            addresses: self.root.path().join("var/lib/cni/networks"),
            attachments: self.root.path().join("var/lib/cni/fabric"),
            root: self.root.path().into(),
            certificates: self.certificates.clone(),
            cni_conf: self.root.path().join("etc/cni/net.d"),
            kubernetes: false,
        };
        let snapshot = Snapshot {
            wanted: Some(Arc::new(wanted)),
            observed: Some(Arc::new(self.observed.clone())),
            left: Some(Arc::new(diff(&self.wanted, &self.observed.ours))),
            last: None,
            blocked: String::new(),
        };
        let (view, mesh, fib) = (Arc::new(self.view.clone()), Arc::new(Mesh::default()), Arc::new(self.fib.clone()));
        let sections = self.sections.clone();
        let scene = Scene { view, snapshot, mesh, places, fib, sections, policy: self.policy.clone() };
        let (_, _, check) = checks::ALL.iter().find(|(name, ..)| *name == id).context("no such check")?;
        Ok(check(&scene))
    }
}

/// Network policies that are put in force, as they stand.
fn policies(ready: Result<(), String>, warnings: &[&str]) -> PolicyView {
    let warnings = warnings.iter().map(|warning| (*warning).to_owned()).collect();
    let status = watch::channel(Arc::new(SectionStatus { ready, warnings })).1;
    PolicyView { status, in_force: watch::channel(None).1, drops: DropLog::default() }
}

/// The chains that kube-router makes with iptables.
fn kube_router() -> firewall::Firewall {
    let chains = ["FORWARD", "KUBE-ROUTER-FORWARD"].map(|name| (name.to_owned(), firewall::Chain::default())).into();
    let (kind, name) = (TableKind::Iptables, "filter".to_owned());
    let table = firewall::Table { kind, name, chains, sets: Default::default() };
    firewall::Firewall { tables: vec![table], ..firewall::Firewall::default() }
}

fn rule(priority: u32, table: u32) -> PolicyRule {
    PolicyRule {
        family: Family::V4,
        priority,
        from: None,
        to: None,
        iif: None,
        mark: None,
        other: false,
        invert: false,
        action: Action::Table(table),
        suppress: None,
    }
}

fn route(dst: &str, device: &str, ours: bool) -> Route {
    Route {
        dst: dst.parse().expect("a prefix"),
        table: 254,
        kind: if device.is_empty() { "blackhole" } else { "unicast" }.into(),
        metric: 0,
        device: Some(device.to_owned()).filter(|device| !device.is_empty()),
        gateway: None,
        protocol: if ours { "250" } else { "bird" }.into(),
        ours,
    }
}

type Breakage = fn(&mut Node) -> Result<()>;

/// Each check, how it is broken, and what it says then.
const BROKEN: &[(&str, Breakage, Outcome, &str)] = &[
    (
        "services",
        |n| {
            let ready = Err("kube-proxy runs on this node".to_owned());
            n.sections.services = Node::section(SectionStatus { ready, warnings: vec![] });
            Ok(())
        },
        Outcome::Failed,
        "kube-proxy runs on this node",
    ),
    (
        "network-policies",
        |n| {
            let warnings = vec!["the API server is away".to_owned()];
            n.sections.policy = Node::section(SectionStatus { ready: Ok(()), warnings });
            Ok(())
        },
        Outcome::Warning,
        "the API server is away",
    ),
    (
        "ready",
        |n| {
            n.view.readiness = Readiness::NotReady { code: NotReady::Starting, reason: "no lease".into() };
            Ok(())
        },
        Outcome::Failed,
        "no lease",
    ),
    (
        "lease",
        |n| {
            n.view.holding.trouble = Some((NotReady::Quarantine, "somebody wrote over it".into()));
            Ok(())
        },
        Outcome::Failed,
        "in quarantine: somebody",
    ),
    (
        "lease",
        |n| {
            n.view.holding.own = None;
            Ok(())
        },
        Outcome::Failed,
        "none is held",
    ),
    ("kernel-version", |n| n.has("proc/sys/kernel/osrelease", "4.15.0-20-generic"), Outcome::Failed, "4.15.0"),
    (
        "kernel-version",
        |n| {
            n.observed.nexthop_objects = false;
            Ok(())
        },
        Outcome::Warning,
        "no nexthop objects",
    ),
    (
        "kernel-state",
        |n| {
            n.observed.ours = Routing::default();
            Ok(())
        },
        Outcome::Failed,
        "steps are left",
    ),
    (
        "udp-port",
        |n| {
            n.observed.ours = Routing::default();
            n.has("proc/net/udp", "  sl  local_address\n 8541: 00000000:2118 00000000:0000 07\n")
        },
        Outcome::Failed,
        "another program has UDP port 8472",
    ),
    (
        "underlay-mtu",
        |n| {
            n.observed.host.links[0].mtu = 1499;
            Ok(())
        },
        Outcome::Failed,
        "become 1500 bytes long, eth0 takes 1499",
    ),
    (
        "mac",
        |n| {
            n.observed
                .ours
                .links
                .values_mut()
                .for_each(|link| link.mac = "02:00:00:00:00:99".parse().expect("a MAC address"));
            Ok(())
        },
        Outcome::Failed,
        "fabric.1 has 02:00:00:00:00:99, 02:42:00:00:00:01 is published",
    ),
    (
        "peers",
        |n| {
            let peer = n.view.peers().next().context("there is one")?.key;
            n.view.troubles.insert(peer, PeerTrouble::Pending("the kernel is full".into()));
            Ok(())
        },
        Outcome::Failed,
        "the kernel is full",
    ),
    ("forwarding", |n| n.has("proc/sys/net/ipv4/ip_forward", "0"), Outcome::Failed, "not forwarded"),
    (
        "rp-filter",
        |n| {
            n.view.network.as_mut().context("a network")?.vxlan.direct_routing = true;
            n.has("proc/sys/net/ipv4/conf/eth0/rp_filter", "1")
        },
        Outcome::Warning,
        "eth0 filters strictly",
    ),
    ("br-netfilter", |n| n.has("proc/sys/net/bridge/bridge-nf-call-iptables", "0"), Outcome::Warning, "is 0"),
    ("br-netfilter", |n| n.lacks("proc/sys/net/bridge/bridge-nf-call-iptables"), Outcome::Warning, "not loaded"),
    ("conntrack", |n| n.has("proc/sys/net/netfilter/nf_conntrack_count", "901"), Outcome::Failed, "901 of 1000"),
    (
        "networkd",
        |n| {
            n.has("run/systemd/netif/links/5", "ADMIN_STATE=configured\nNETWORK_FILE=/etc/systemd/network/zz.network\n")
        },
        Outcome::Failed,
        "it manages fabric.1 by /etc/systemd/network/zz.network",
    ),
    (
        "networkd",
        |n| {
            for (link, file) in [("7", "zz-all"), ("6", "zz-all"), ("5", "10-vxlan")] {
                let file = format!("ADMIN_STATE=configuring\nNETWORK_FILE=/etc/systemd/network/{file}.network\n");
                n.has(&format!("run/systemd/netif/links/{link}"), &file)?;
            }
            n.observed.bridges.clear();
            Ok(())
        },
        Outcome::Failed,
        "2: it manages fabric.1 by /etc/systemd/network/10-vxlan.network; it manages 2: cni0; veth1 by \
         /etc/systemd/network/zz-all.network",
    ),
    (
        "networkd",
        |n| n.has("etc/systemd/network/zz-default.network", "[Match]\nName=*\n\n[Network]\nDHCP=yes\n"),
        Outcome::Warning,
        "/etc/systemd/network/zz-default.network matches 4: cni0; fabric.1; veth1; veths of pods",
    ),
    ("networkd", |n| n.lacks("etc/systemd/networkd.conf.d/x.conf"), Outcome::Warning, "ManageForeignRoutes is on"),
    (
        "networkd",
        |n| n.has("etc/systemd/networkd.conf.d/x.conf", "[Network]\nManageForeignRoutes=no\n"),
        Outcome::Warning,
        "ManageForeignNextHops is on",
    ),
    (
        "networkmanager",
        |n| {
            n.has("run/NetworkManager/devices/5", "managed=true")?;
            n.has("run/NetworkManager/devices/7", "managed=true")
        },
        Outcome::Failed,
        "it manages 2: fabric.1; veth1",
    ),
    (
        "udev",
        |n| n.has("etc/systemd/network/10.link", "[Match]\nDriver=vxlan\n[Link]\nMACAddressPolicy=persistent\n"),
        Outcome::Failed,
        "10.link",
    ),
    (
        "bridge",
        |n| {
            n.observed.host.links[1].addresses.clear();
            Ok(())
        },
        Outcome::Failed,
        "cni0 has no address of 127.1.1.0/24",
    ),
    (
        "bridge",
        |n| {
            n.observed.host.links[1].addresses = vec![("10.244.9.1".parse()?, "10.244.9.0/24".parse()?)];
            n.observed.host.links[1].up = false;
            Ok(())
        },
        Outcome::Failed,
        "2: cni0 is down; cni0 has addresses of 10.244.9.0/24, this node's subnet is 127.1.1.0/24",
    ),
    (
        "pod-ports",
        |n| {
            n.observed.bridges.clear();
            Ok(())
        },
        Outcome::Failed,
        "veth1 of container c1 (127.1.1.2) is not on cni0",
    ),
    (
        "pod-ports",
        |n| n.has("sys/class/net/veth1/carrier", "0"),
        Outcome::Failed,
        "veth1 of container c1 (127.1.1.2) has no carrier: the pod's eth0 is down",
    ),
    (
        "pod-ports",
        |n| {
            n.observed.host.links[2].up = false;
            Ok(())
        },
        Outcome::Failed,
        "veth1 of container c1 (127.1.1.2) is down",
    ),
    (
        "egress",
        |n| {
            n.observed.filter.clear();
            n.observed.host.default_routes =
                vec![DefaultRoute { family: Family::V4, dev: "eth0".parse()?, metric: 0, source: None, gateway: None }];
            Ok(())
        },
        Outcome::Warning,
        "masquerade is off: packets that leave 10.244.0.0/16 keep the pods' addresses",
    ),
    (
        "cni-config",
        |n| {
            n.has("etc/cni/net.d/05-cilium.conflist", "{}")?;
            n.has("etc/cni/net.d/00-multus.conf", r#"{"type": "multus"}"#)?;
            n.has("etc/cni/net.d/10-calico.conflist", "{}")
        },
        Outcome::Failed,
        "10-calico.conflist sorts before 10-fabric.conflist",
    ),
    ("cni-config", |n| n.lacks("etc/cni/net.d/10-fabric.conflist"), Outcome::Warning, "names fabric-cni"),
    (
        "cni-config",
        |n| n.has("opt/cni/bin/bridge", "").and_then(|()| n.has("usr/lib/cni/bridge", "")),
        Outcome::Warning,
        "the plugin fabric-cni is not in /opt/cni/bin or /usr/lib/cni",
    ),
    (
        "bridge-mtu",
        |n| {
            n.observed.host.links[2].mtu = 1500;
            Ok(())
        },
        Outcome::Failed,
        "veth1 takes 1500 bytes",
    ),
    (
        "addresses",
        |n| {
            n.observed.host.links.pop();
            Ok(())
        },
        Outcome::Warning,
        "0 attached pods, 0 addresses; 1 leaked, such as",
    ),
    (
        "addresses",
        |n| {
            let pod = "{}\n{\"ports\":[\"veth1\"],\"ips\":[\"127.1.1.2\"]}\n";
            n.has("var/lib/cni/fabric/fabric/c1@eth0.json", pod)?;
            n.has("var/lib/cni/fabric/net2/c2@eth0.json", pod)
        },
        Outcome::Failed,
        "127.1.1.2 is the address of eth0 of container c1 (fabric) and of eth0 of container c2 (net2)",
    ),
    (
        "addresses",
        |n| {
            let told = r#"{"config":{"ipam":{"ranges":[[{"subnet":"127.1.1.0/24"}]]}}}"#;
            let pod = format!("{told}\n{{\"ports\":[\"veth1\"],\"ips\":[\"127.1.1.3\"]}}\n");
            n.has("var/lib/cni/fabric/fabric/c1@eth0.json", &pod)
        },
        Outcome::Failed,
        "127.1.1.3 of eth0 of container c1 (fabric) is free by",
    ),
    (
        "addresses",
        |n| {
            let mut other = n.observed.host.links[1].clone();
            other.name = "br-other".parse()?;
            n.observed.host.links.push(other);
            n.has("var/lib/cni/networks/other/127.1.1.9", "c9\r\neth0")
        },
        Outcome::Warning,
        "127.1.1.9 of this node's subnet is taken by another plugin's network other",
    ),
    (
        "foreign-vxlan",
        |n| {
            let flannel = ForeignLink { kind: "vxlan".into(), vxlan: Some((1, 8472, Family::V4)) };
            n.observed.foreign.links.insert("flannel.1".parse()?, flannel);
            Ok(())
        },
        Outcome::Warning,
        "flannel.1 (flannel) with VNI 1",
    ),
    (
        "overlap",
        |n| {
            n.fib.routes.push(route("10.244.9.0/24", "eth1", false));
            Ok(())
        },
        Outcome::Warning,
        "10.244.9.0/24 dev eth1 proto bird leads into the network",
    ),
    (
        "policy-controllers",
        |n| {
            n.policy = Some(policies(Ok(()), &[]));
            n.observed.firewall = Arc::new(kube_router());
            Ok(())
        },
        Outcome::Warning,
        "kube-router has rules for NetworkPolicies here",
    ),
    (
        "certificates",
        |n| {
            let file = n.root.path().join("ca.pem");
            n.certificates = vec![file];
            n.has("ca.pem", "nonsense")
        },
        Outcome::Failed,
        "no certificate in it",
    ),
    (
        "warnings",
        |n| {
            n.view.warnings = vec!["look here".into()];
            Ok(())
        },
        Outcome::Warning,
        "look here",
    ),
    (
        "fast-path",
        |n| {
            (n.view.fast_path.asked, n.view.fast_path.reason) = (true, "there is no bpffs; mount it with: …".into());
            Ok(())
        },
        Outcome::Warning,
        "take the kernel's path: there is no bpffs",
    ),
];

#[test]
fn every_check_is_fine_until_it_is_broken_and_says_then_what_to_do() -> Result<()> {
    for (id, damage, outcome, evidence) in BROKEN {
        let mut node = Node::well()?;
        let before = node.check(id)?;
        assert!(
            before.fix.is_empty() && matches!(before.outcome, Outcome::Fine | Outcome::Skipped),
            "{id}: {before:?}"
        );
        damage(&mut node)?;
        let found = node.check(id)?;
        assert_eq!(found.outcome, *outcome, "{id}: {found:?}");
        assert!(found.evidence.contains(evidence), "{id}: {found:?}");
        assert!(!found.fix.is_empty(), "{id}: {found:?}");
    }
    Ok(())
}

#[test]
fn device_of_another_overlay_on_our_port_is_the_cause_and_what_follows_is_not_told_as_one() -> Result<()> {
    let mut node = Node::well()?;
    node.observed.ours = Routing::default();
    let cilium = ForeignLink { kind: "vxlan".into(), vxlan: Some((0, 8472, Family::V4)) };
    let idle = ForeignLink { kind: "vxlan".into(), vxlan: Some((7, 4789, Family::V4)) };
    node.observed.foreign.links.insert("a.7".parse()?, idle);
    node.observed.foreign.links.insert("cilium_vxlan".parse()?, cilium);
    let found = node.check("foreign-vxlan")?;
    assert_eq!(found.outcome, Outcome::Failed, "{found:?}");
    assert!(found.evidence.starts_with("2: cilium_vxlan (Cilium) has our UDP port (0, 8472)"), "{found:?}");
    assert!(found.fix.contains("\nip link del cilium_vxlan\n"), "{found:?}");
    for consequence in ["udp-port", "mac"] {
        assert_eq!(node.check(consequence)?.outcome, Outcome::Skipped, "{consequence}");
    }
    assert_eq!(checks::ALL[0].0, "foreign-vxlan", "the cause is shown first");
    Ok(())
}

#[test]
fn of_several_routes_into_the_network_those_that_hide_a_subnet_come_first() -> Result<()> {
    let mut node = Node::well()?;
    let space = node.view.network.as_mut().and_then(|network| network.spaces.slot(Family::V4).as_mut());
    space.context("a network")?.network = "127.0.0.0/8".parse()?;
    node.fib.routes.push(route("127.200.0.0/26", "eth1", false));
    node.fib.routes.push(route("127.1.0.0/16", "eth1", false));
    node.fib.routes.push(route("127.1.2.0/26", "", false));
    // Nobody looks into this table.
    node.fib.routes.push(Route { table: 77, ..route("127.1.2.0/27", "", false) });
    let found = node.check("overlap")?;
    assert_eq!(found.outcome, Outcome::Failed, "{found:?}");
    assert!(
        found.evidence.starts_with("3: blackhole 127.1.2.0/26 proto bird hides 127.1.2.0/24 of node-2; "),
        "{found:?}"
    );
    assert!(found.fix.starts_with("ip route del blackhole 127.1.2.0/26\n"), "{found:?}");
    Ok(())
}

/// As that of a VPN client whose other end announces a network that the pods' is a part of.
#[test]
fn shorter_route_hides_a_subnet_where_a_policy_rule_has_its_table_looked_up_first() -> Result<()> {
    let mut node = Node::well()?;
    let space = node.view.network.as_mut().and_then(|network| network.spaces.slot(Family::V4).as_mut());
    space.context("a network")?.network = "127.0.0.0/8".parse()?;
    node.fib.routes.push(Route { table: 52, ..route("127.1.0.0/16", "tun0", false) });
    node.fib.rules.push(rule(32767, 52));
    let found = node.check("overlap")?;
    assert!(found.outcome == Outcome::Warning && found.evidence.contains("which ours hides"), "{found:?}");

    node.fib.rules.push(rule(5270, 52));
    let found = node.check("overlap")?;
    assert_eq!(found.outcome, Outcome::Failed, "{found:?}");
    assert!(
        found.evidence.contains("127.1.0.0/16 dev tun0 proto bird table 52 hides 127.1.2.0/24 of node-2"),
        "{found:?}"
    );
    assert_eq!(found.fix, "ip route del 127.1.0.0/16 dev tun0 table 52");
    Ok(())
}

#[test]
fn without_a_device_or_a_table_nothing_is_said_of_them() -> Result<()> {
    let mut node = Node::well()?;
    node.observed.filter.clear();
    assert_eq!(node.check("filter-drops")?.outcome, Outcome::Skipped);
    assert_eq!(node.check("egress")?.outcome, Outcome::Skipped, "there is no way out at all");
    Ok(())
}

#[test]
fn program_that_puts_policies_in_force_where_fabricd_does_not_is_named_and_fine() -> Result<()> {
    let mut node = Node::well()?;
    node.observed.firewall = Arc::new(kube_router());
    let found = node.check("policy-controllers")?;
    assert_eq!(found, Finding::fine("NetworkPolicies are put in force by kube-router"));
    Ok(())
}

#[test]
fn disk_is_judged_before_the_first_pod_has_made_the_plugins_folder() -> Result<()> {
    let node = Node::well()?;
    fs::remove_dir_all(node.root.path().join("var"))?;
    let found = node.check("disk")?;
    assert!(found.outcome == Outcome::Fine && found.evidence.contains(" MiB at "), "{found:?}");
    Ok(())
}

#[test]
fn titles_are_nouns_that_read_well_before_any_finding() {
    for (id, title, _) in checks::ALL {
        assert!(!title.contains([':', ',']) && !title.starts_with("the "), "{id}: {title}");
        for word in [" is ", " are ", " has ", " no ", " not ", "nobody", "nothing"] {
            assert!(!format!(" {title} ").contains(word), "{id}: {title}");
        }
    }
}

#[test]
fn two_nodes_with_one_address_are_both_named() -> Result<()> {
    let mut node = Node::well()?;
    let double = |n: u16| {
        Entry {
        value: format!(
            r#"{{"PublicIP":"198.18.0.9","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:42:00:00:00:0{n}"}},"Fabric":{{"v":1,"node":"node-{n}","boot":"b","netns":1,"epoch":1}}}}"#
        )
        .into_bytes(),
        key: format!("127.9.{n}.0-24"),
        create_revision: 1,
        mod_revision: 1,
    }
    };
    node.view.leases = Some(Arc::new(LeaseSet::snapshot(&LeaseSet::default(), vec![double(3), double(4)], 7)));
    let found = node.check("duplicates")?;
    assert_eq!(found.outcome, Outcome::Failed, "{found:?}");
    for part in ["node-3", "node-4", "address 198.18.0.9"] {
        assert!(found.evidence.contains(part), "{found:?}");
    }
    Ok(())
}

#[test]
fn certificate_that_ends_within_two_weeks_is_told() -> Result<()> {
    let mut node = Node::well()?;
    // They last a day.
    let certificates = Certificates::create()?;
    node.certificates = vec![certificates.server().0];
    let found = node.check("certificates")?;
    assert_eq!(found.outcome, Outcome::Warning, "{found:?}");
    assert!(found.evidence.contains("expires in"), "{found:?}");
    Ok(())
}

#[test]
fn every_check_has_been_broken_somewhere() {
    // In the Lab: what the kernel must say itself, the mesh, the disk. Beside its code: the clock, which is the machine's.
    let elsewhere = ["duplicates", "mesh", "foreign-input", "foreign-forward", "filter-drops", "clock", "disk"];
    for (id, ..) in checks::ALL {
        assert!(elsewhere.contains(&id) || BROKEN.iter().any(|(broken, ..)| *broken == id), "{id} is never broken");
    }
}
