//! What refuses that a node changes hands between flannel and fabricd: it is told, with the way out, and nothing is changed.

use anyhow::{Context as _, Result, ensure};
use fabric_tests::handover::{
    Cluster, MASQUERADE, SOON, give_back, hand_to_fabricd, mac, nothing_of_ours_is_left, record, take_over,
    the_record_is_flannels,
};
use fabric_tests::lab::flannel::{CONFLIST, Flannel, Options};
use fabric_tests::lab::{Families, Node, wait_until};
use serde_json::{Value, json};

/// A cluster in which the first flannel node's daemon is ended and fabricd waits beside it, with foreign rules.
fn waiting() -> Result<Cluster> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    hand_to_fabricd(&cluster.flannels[0])?;
    Ok(cluster)
}

/// What a refusal must not change: devices, routes, rules, files, and the store.
fn state(node: &Node) -> Result<Vec<String>> {
    let shown =
        "ip -d -o link show type vxlan; ip route; iptables-save -t nat; iptables-save -t filter; nft list tables
        find /etc/cni/net.d /var/lib/cni -type f
        etcdctl get --prefix /coreos.com/network/subnets/; true";
    let all = node.run(&["sh", "-c", shown])?;
    // Counters, and times.
    let is_said = |line: &&str| !line.starts_with(['#', ':']);
    Ok(all.lines().filter(is_said).map(str::to_owned).collect())
}

/// It is refused with these words, and nothing changes.
fn is_refused(flannel: &Flannel, args: &[&str], words: &str) -> Result<()> {
    let before = state(&flannel.node)?;
    let output = flannel.fabricd(args)?.output()?;
    ensure!(!output.success() && output.stderr.contains(words), "{words}: {output:?}");
    ensure!(state(&flannel.node)? == before, "something was changed: {:#?}", state(&flannel.node)?);
    Ok(())
}

/// The network config with another value for what is on a line of it.
fn config_with(cluster: &Cluster, change: impl Fn(&mut Value)) -> Result<()> {
    const CONFIG: &str = "/coreos.com/network/config";
    let node = &cluster.ours;
    let mut config: Value = serde_json::from_str(&node.run(&["etcdctl", "get", "--print-value-only", CONFIG])?)?;
    change(&mut config);
    node.run(&["etcdctl", "put", CONFIG, &config.to_string()]).map(drop)
}

/// The config says another backend, VNI or port than the node has; there is none; it is no config.
#[test]
fn a_node_that_does_not_fit_the_network_config_is_refused() -> Result<()> {
    let cluster = waiting()?;
    let flannel = &cluster.flannels[0];
    type Change = fn(&mut Value);
    let rows: [(Change, &str); 5] = [
        (
            |config| config["Backend"]["Type"] = "host-gw".into(),
            "the network config at /coreos.com/network/config can't be used",
        ),
        (|config| config["Backend"] = json!({ "Type": "vxlan", "VNI": 7 }), "there is no flannel.7, nor fabric.7"),
        (
            |config| config["Backend"] = json!({ "Type": "vxlan", "Port": 4789 }),
            "flannel.1 has VNI 1 and UDP port 8472, the network config says VNI 1, port 4789",
        ),
        (|config| config["Network"] = "10.244.0.0/33".into(), "can't be used"),
        (|config| *config = Value::Null, "can't be used"),
    ];
    // Without a daemon: it would follow the config itself.
    flannel.node.stop_fabricd()?;
    let config = cluster.ours.run(&["etcdctl", "get", "--print-value-only", "/coreos.com/network/config"])?;
    for (change, words) in rows {
        config_with(&cluster, change)?;
        is_refused(flannel, &["takeover"], words)?;
        cluster.ours.run(&["etcdctl", "put", "/coreos.com/network/config", config.trim()])?;
    }
    cluster.ours.run(&["etcdctl", "del", "/coreos.com/network/config"])?;
    is_refused(flannel, &["takeover"], "there is no network config at /coreos.com/network/config")?;
    cluster.ours.run(&["etcdctl", "put", "/coreos.com/network/config", config.trim()])?;
    take_over(flannel, None)
}

/// Devices, addresses and records that don't belong together, each put right again.
#[test]
fn a_device_and_a_lease_that_do_not_belong_together_are_refused() -> Result<()> {
    let cluster = waiting()?;
    let flannel = &cluster.flannels[0];
    let node = &flannel.node;
    let sh = |script: &str| node.run(&["sh", "-c", script]);
    let own = record(node)?;
    let (key, value) = own.split_once('\n').context("key and value")?;
    let mac = mac(node, "flannel.1")?;
    let put = |value: &str| node.run(&["etcdctl", "put", key, value]);

    // A record of somebody else, with this node's address; another MAC address; none.
    let owner = r#","Fabric":{"v":1,"node":"node-9","boot":"b","netns":1,"epoch":1}}"#;
    let others = format!("{}{owner}", value.strip_suffix('}').context("an object")?);
    for (value, words) in [
        (others.as_str(), "is that of node-9, this node is called node-1"),
        (&value.replace(&mac, "02:42:c0:00:02:99"), "peers can't reach this node; restart its daemon first"),
    ] {
        put(value)?;
        is_refused(flannel, &["takeover"], words)?;
    }
    node.run(&["etcdctl", "del", key])?;
    is_refused(flannel, &["takeover"], "the store has no lease with the public address")?;
    put(value)?;

    // The first address of the subnet is missing; an address that the host hasn't got; a device of another kind, and both.
    let base = key.rsplit('/').next().and_then(|subnet| subnet.split('-').next()).context("a subnet")?;
    sh(&format!("ip address del {base}/32 dev flannel.1"))?;
    is_refused(flannel, &["takeover"], "flannel.1 hasn't got")?;
    sh(&format!("ip address add {base}/32 dev flannel.1"))?;
    sh("ip link add fabric.1 type vxlan id 99 local 10.99.0.11 dstport 8472")?;
    is_refused(flannel, &["takeover"], "flannel.1 and fabric.1 are both there")?;
    sh("ip link del fabric.1")?;
    sh("ip link add fabric.1 type bridge")?;
    let refused = flannel.fabricd(&["takeover"])?.output()?;
    ensure!(!refused.success() && refused.stderr.contains("fabric.1"), "{refused:?}");
    ensure!(sh("ip -o link show flannel.1").is_ok(), "the device has its name still");
    sh("ip link del fabric.1")?;
    take_over(flannel, None)
}

/// Services and network policies are what flannel doesn't do: as long as fabricd's tables for them are there nothing is given
/// back, and a start without them removes them.
#[test]
fn what_flannel_would_not_do_is_ended_before_a_giveback() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    let options = Options { masquerade: true, ..Options::default() };
    let flannel = Flannel::install_on(&cluster.lab, &cluster.ours, options)?;
    let node = &flannel.node;
    node.stop_fabricd()?;
    let tables = [
        ("fabric-services", "start kube-proxy, then fabricd with --services off"),
        ("fabric-policy", "start fabricd with --network-policy off"),
    ];
    for (table, words) in tables {
        node.run(&["nft", "add", "table", "inet", table])?;
        is_refused(&flannel, &["giveback"], words)?;
    }
    hand_to_fabricd(&flannel)?;
    node.wait_ready()?;
    wait_until("both tables are gone", SOON, || {
        let tables = node.run(&["nft", "list", "tables"])?;
        ensure!(!tables.contains("fabric-"), "{tables}");
        Ok(())
    })?;
    give_back(&flannel)?;
    nothing_of_ours_is_left(node)?;
    the_record_is_flannels(node)
}

/// Asked too early, in the middle, or of the wrong node, it says why and changes nothing.
#[test]
fn what_refuses_a_takeover_is_told_and_nothing_is_changed() -> Result<()> {
    let cluster = Cluster::start(Families::V4, Options { masquerade: true, ..Options::default() })?;
    let (flannel, node) = (&cluster.flannels[0], &cluster.flannels[0].node);
    is_refused(flannel, &["takeover"], "flanneld runs; end it so that it can't come back: kill ")?;
    is_refused(flannel, &["takeover", "--dry-run"], "flanneld runs")?;
    // A fabricd beside it writes nothing, and waits.
    node.start_fabricd_with(&[], MASQUERADE)?;
    wait_until("fabricd tells what is in its way", SOON, || {
        let told = node.run(&["cat", "/run/fabric/node.json"])?;
        ensure!(told.contains("flannel.1 already uses VNI 1"), "{told}");
        Ok(())
    })?;
    is_refused(flannel, &["takeover"], "flanneld runs")?;
    flannel.stop()?;
    is_refused(flannel, &["takeover", "--bin-dir", "/nowhere"], "fabricd install-cni --only plugins")?;
    cluster.lab.etcd().freeze()?;
    let output = node.exec(&["fabricd", "takeover"])?;
    ensure!(!output.success() && output.stderr.contains("the store does not answer"), "{output:?}");
    cluster.lab.etcd().thaw()?;

    // flanneld that comes back in the middle ends without its device, and leaves what has begun as it is.
    node.run(&["fabricd", "takeover", "--steps", "1"])?;
    node.wait_ready()?;
    let (was, peers) = (record(node)?, node.run(&["ip", "route", "show", "proto", "250"])?);
    ensure!(flannel.start().is_err() && !flannel.is_running(), "flanneld runs without its device");
    ensure!(
        record(node)? == was && node.run(&["ip", "route", "show", "proto", "250"])? == peers,
        "it has changed something"
    );
    node.run(&["fabricd", "takeover"])?;
    ensure!(node.exec(&["ls", &format!("/etc/cni/net.d/{CONFLIST}")]).is_ok_and(|output| !output.success()));
    Ok(())
}
