//! Each check with what breaks it, and what it says then.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use fabric_core::handoff::{NotReady, Readiness};
use fabric_core::model::Family;
use fabric_core::state::{ForeignLink, Routing};
use fabricd::diagnosis::{Outcome, checks};
use fabricd::host::underlay::DefaultRoute;
use fabricd::status::section::SectionStatus;
use fabricd::status::view::PeerTrouble;

use crate::node::{Node, kube_router, policies, route};

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
fn every_check_has_been_broken_somewhere() {
    // In the Lab: what the kernel must say itself, the mesh, the disk. Beside its code: the clock, which is the machine's.
    let elsewhere = ["duplicates", "mesh", "foreign-input", "foreign-forward", "filter-drops", "clock", "disk"];
    for (id, ..) in checks::ALL {
        assert!(elsewhere.contains(&id) || BROKEN.iter().any(|(broken, ..)| *broken == id), "{id} is never broken");
    }
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
