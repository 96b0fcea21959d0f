//! Findings that tell more than that one thing is broken: causes and consequences, several at once, what is nobody's fault.

use std::fs;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use fabric_core::leases::{Entry, LeaseSet};
use fabric_core::model::Family;
use fabric_core::state::{ForeignLink, Routing};
use fabric_tests::certificates::Certificates;
use fabricd::diagnosis::finding::Finding;
use fabricd::diagnosis::{Outcome, checks};
use fabricd::kernel::routing::fib::Route;

use crate::node::{Node, kube_router, route, rule};

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
fn program_that_enforces_policies_where_fabricd_does_not_is_named_and_fine() -> Result<()> {
    let mut node = Node::well()?;
    node.observed.firewall = Arc::new(kube_router());
    let found = node.check("policy-controllers")?;
    assert_eq!(found, Finding::fine("NetworkPolicies are enforced by kube-router"));
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
