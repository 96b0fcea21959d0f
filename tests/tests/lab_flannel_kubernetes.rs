//! A node changes hands in a cluster whose leases are Nodes: flannel's kube subnet manager, fabricd's `--store kubernetes`.

use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::fake_api::{FakeApi, NODES};
use fabric_tests::handover::{
    SOON, Traffic, add_foreign_rules, all_addresses_differ, foreign_rules, give_back, hand_to_fabricd, mac,
    nothing_of_ours_is_left, take_over,
};
use fabric_tests::kubernetes::{DUAL_STACK, PREFIX, add_dual_stack_node, api_on_underlay, lease_settings};
use fabric_tests::lab::flannel::{CONFLIST, Flannel, Options, Registry};
use fabric_tests::lab::{Families, Lab, Pod, wait_until};
use serde_json::Value;

/// Two nodes of flannel.
struct Cluster {
    /// Ends with this.
    lab: Lab,
    api: Arc<FakeApi>,
    flannels: [Flannel; 2],
}

impl Cluster {
    fn start() -> Result<Self> {
        let mut lab = Lab::builder().families(Families::Dual).masquerade(true).create()?;
        let api = api_on_underlay(&lab)?;
        let api = Arc::new(api);
        let mut settings = lease_settings(&lab, &api, DUAL_STACK)?;
        settings.push(("FABRICD_IP_MASQ", "true".to_owned()));
        let nodes = [lab.boot_node()?, lab.boot_node()?];
        nodes.iter().for_each(|node| add_dual_stack_node(&api, node));
        let options = Options { masquerade: true, ..Options::default() };
        let start = |node| {
            let mut flannel = Flannel::start_with(&lab, node, options, Registry::Nodes(Arc::clone(&api)))?;
            flannel.settings = settings.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
            anyhow::Ok(flannel)
        };
        let flannels = [start(&nodes[0])?, start(&nodes[1])?];
        flannels[0].follow()?;
        Ok(Self { lab, api, flannels })
    }
}

/// The first is taken over and given back, twice: its annotations say the same all the while, and its peer, whose flanneld
/// lives on, needs nothing. As by the manifests flannel's conflist is written anew whenever flanneld starts.
#[test]
fn a_node_whose_lease_is_its_node_changes_hands() -> Result<()> {
    let Cluster { lab, api, flannels: [flannel, peer] } = Cluster::start()?;
    let node = &flannel.node;
    add_foreign_rules(node, true)?;
    let foreign = foreign_rules(node)?;
    let (pods, far) = ([node.add_pod("a")?, node.add_pod("a2")?], [peer.node.add_pod("b")?]);
    let traffic = Traffic::start(&lab, &pods, &far)?;
    let said = || -> Result<Value> {
        let node = api.get(NODES, &node.name).context("the Node")?;
        Ok(node["metadata"]["annotations"].clone())
    };
    let (annotations, was) = (said()?, mac(node, "flannel.1")?);
    ensure!(annotations[format!("{PREFIX}/public-ip")] == node.underlay_ip(Family::V4).to_string(), "{annotations}");

    for round in 1..=2 {
        take_over(&flannel, None)?;
        traffic.is_masqueraded()?;
        ensure!(said()? == annotations && mac(node, "fabric.1")? == was, "{}", said()?);
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        let of_ours = node.add_pod(&format!("n{round}"))?;
        all_addresses_differ([&pods[0], &pods[1], &of_ours])?;

        // Its DaemonSet's init container writes it before flanneld starts.
        flannel.write_conflist()?;
        give_back(&flannel)?;
        traffic.is_masqueraded()?;
        ensure!(said()? == annotations && mac(node, "flannel.1")? == was, "{}", said()?);
        ensure!(foreign_rules(node)? == foreign, "{:#?}", foreign_rules(node)?);
        nothing_of_ours_is_left(node)?;
        let conflists = node.run(&["ls", "/etc/cni/net.d"])?;
        ensure!(conflists.trim() == CONFLIST, "{conflists}");
        let new = node.add_pod(&format!("f{round}"))?;
        all_addresses_differ([&pods[0], &pods[1], &of_ours, &new])?;
        of_ours.del()?;
        new.del()?;
    }
    traffic.stop()
}

/// With `--network-policy on` pods that flannel's plugin attached go on beside a fabricd that waits, and on a node that is taken
/// over. Nothing is given back before the policies are off.
#[test]
fn network_policies_close_no_pod_of_flannels_plugin() -> Result<()> {
    let Cluster { lab: _lab, flannels: [mut flannel, peer], .. } = Cluster::start()?;
    let node = Arc::clone(&flannel.node);
    let (pod, far) = (node.add_pod("a")?, peer.node.add_pod("b")?);
    let reaches = |pod: &Pod| {
        let ip = far.ip(Family::V4)?.to_string();
        wait_until("a new connection is let through", SOON, || pod.run(&["ping", "-c", "1", "-W", "5", &ip]))
    };
    let policies = ("FABRICD_NETWORK_POLICY".to_owned(), "on".to_owned());
    flannel.settings.push(policies.clone());
    hand_to_fabricd(&flannel)?;
    wait_until("fabricd waits", SOON, || {
        let log = node.log("fabricd");
        let waits = ["flannel.1 already uses VNI 1", "this node has no subnet yet"];
        ensure!(waits.iter().all(|why| log.contains(why)), "{log}");
        Ok(())
    })?;
    let tables = node.run(&["nft", "list", "tables"])?;
    ensure!(!tables.contains("fabric"), "it writes nothing: {tables}");
    reaches(&pod)?;

    take_over(&flannel, None)?;
    let table = ["nft", "list", "table", "inet", "fabric-policy"];
    wait_until("network policies are applied", SOON, || node.run(&table))?;
    reaches(&pod)?;
    reaches(&node.add_pod("new")?)?;

    node.stop_fabricd()?;
    let refused = flannel.fabricd(&["giveback"])?.output()?;
    ensure!(!refused.success() && refused.stderr.contains("fabricd with --network-policy off"), "{refused:?}");
    flannel.settings.retain(|setting| *setting != policies);
    hand_to_fabricd(&flannel)?;
    wait_until("the table of policies is gone", SOON, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("fabric-policy"), "{tables}");
        Ok(())
    })?;
    give_back(&flannel)?;
    nothing_of_ours_is_left(&node)
}
