//! The pods' addresses in the Lab: unique on a node whatever CNI networks it has, freed when nothing accounts for them, and
//! left alone by a cleanup as long as their pods run.

use std::fs;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Lab, Node, Pod, cni, wait_until};
use serde_json::{Value, json};

/// host-local's files, and the attachments.
const ADDRESSES: &str = "/var/lib/cni/networks/fabric";
const ATTACHMENTS: &str = "/var/lib/cni/fabric/fabric";

/// How long the daemon may take to follow a change; the machine may be busy.
const SOON: Duration = Duration::from_secs(30);

/// A pod beside those that the Lab keeps: its CNI network is another one.
struct Other {
    container: &'static str,
    config: Value,
}

impl Other {
    fn add(node: &Node, container: &'static str, network: &str, delegate: Value) -> Result<(Self, IpAddr)> {
        node.run(&["ip", "netns", "add", container])?;
        let mut config = json!({ "cniVersion": "1.0.0", "name": network, "type": "fabric-cni" });
        config["delegate"] = delegate;
        let pod = Self { container, config };
        let result: Value = serde_json::from_str(&pod.call(node, "ADD")?)?;
        let ip = cni::addresses(&result)?.into_iter().next().context("an address")?;
        Ok((pod, ip))
    }

    fn call(&self, node: &Node, verb: &str) -> Result<String> {
        let netns = format!("/run/netns/{}", self.container);
        let attachment = cni::Attachment { container: self.container, netns: &netns, args: "" };
        cni::call(node, verb, &attachment, "fabric-cni", &self.config.to_string())?.ok()
    }
}

fn reaches(pod: &Pod, target: IpAddr) -> Result<()> {
    pod.run(&["ping", "-c", "3", "-i", "0.2", "-W", "3", &target.to_string()]).map(drop)
}

/// What doctor's check of the addresses says.
fn addresses_check(node: &Node) -> Result<Value> {
    let output = node.exec(&["fabricctl", "doctor", "-o", "json"])?;
    let checks = output.stdout.lines().map(serde_json::from_str::<Value>).collect::<Result<Vec<_>, _>>()?;
    checks.into_iter().find(|check| check["id"] == "addresses").with_context(|| format!("no such check in {output:?}"))
}

fn taken(node: &Node, folder: &str) -> Result<usize> {
    let entries = match fs::read_dir(node.path(folder)?) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        entries => entries?,
    };
    let names = entries.map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>>>()?;
    Ok(names.iter().filter(|name| name.to_str().is_some_and(|name| name.parse::<IpAddr>().is_ok())).count())
}

/// Two nodes, and a pod on the second to look from.
fn two_nodes() -> Result<(Lab, Arc<Node>, Pod)> {
    let lab = Lab::builder().nodes(2).start()?;
    let (node, witness) = (Arc::clone(lab.node("node-1")?), lab.node("node-2")?.add_pod("b")?);
    Ok((lab, node, witness))
}

#[test]
fn pods_of_several_cni_networks_have_addresses_of_their_own() -> Result<()> {
    let (_lab, node, witness) = two_nodes()?;
    let first = node.add_pod("a")?;
    let (second, its) = Other::add(&node, "m1", "net2", json!({ "type": "bridge" }))?;
    let (third, ours) = Other::add(&node, "m2", "net3", json!({ "type": "fabric-bridge" }))?;
    let rightful = first.ip(Family::V4)?;
    ensure!(its != rightful && ours != rightful && its != ours, "{rightful} {its} {ours}");
    // A newcomer's first packet is when a pod with the same address was cut off.
    node.run(&["ip", "netns", "exec", "m1", "ping", "-c1", "-W3", &witness.ip(Family::V4)?.to_string()])?;
    for target in [rightful, its, ours] {
        reaches(&witness, target)?;
    }
    let check = addresses_check(&node)?;
    ensure!(check["result"] == "ok" && check["evidence"].to_string().contains("3 attached pods"), "{check}");

    second.call(&node, "DEL")?;
    third.call(&node, "DEL")?;
    ensure!(taken(&node, ADDRESSES)? == 1, "DEL of one network frees its own alone");
    reaches(&witness, rightful)
}

#[test]
fn leaked_addresses_are_told_apart_freed_by_the_fix_and_after_a_reboot_by_the_first_pod() -> Result<()> {
    let (lab, node, witness) = two_nodes()?;
    let pod = node.add_pod("a")?;
    let subnet = pod.ip(Family::V4)?.to_string();
    let (prefix, own) = subnet.rsplit_once('.').context("an address")?;
    let leak = || -> Result<()> {
        for folder in [ADDRESSES, "/var/lib/cni/networks/cbr0"] {
            fs::create_dir_all(node.path(folder)?)?;
        }
        for number in (2..=254).filter(|number| number.to_string() != own) {
            let folder = if number % 2 == 0 { ADDRESSES } else { "/var/lib/cni/networks/cbr0" };
            fs::write(node.path(&format!("{folder}/{prefix}.{number}"))?, format!("gone-{number}\r\neth0"))?;
        }
        Ok(())
    };
    leak()?;
    let check = addresses_check(&node)?;
    let evidence = check["evidence"].to_string();
    ensure!(
        check["result"] == "warning" && evidence.contains("1 attached pods") && evidence.contains("252 leaked"),
        "{check}"
    );
    let refused = node.exec(&["fabricctl", "lease", "renumber"])?;
    ensure!(!refused.success() && refused.stderr.contains("1 attached pod"), "{}", refused.stderr);
    ensure!(refused.stderr.contains("252 more addresses there are leaked"), "{}", refused.stderr);

    node.run(&["sh", "-c", check["fix"].as_str().context("a fix")?])?;
    ensure!(addresses_check(&node)?["result"] == "ok", "the fix frees them");
    reaches(&witness, pod.ip(Family::V4)?)?;

    leak()?;
    // The node's own uplink is a veth, as is that of every node that is a container.
    let uplink = node.run(&["ip", "-d", "link", "show", "dev", "eth0"])?;
    ensure!(uplink.contains("veth"), "{uplink}");
    node.power_off()?;
    node.boot()?;
    node.start_fabricd()?;
    node.wait_ready()?;
    let pods = ["c", "d", "e"].map(|name| node.add_pod(name));
    for pod in pods {
        reaches(&witness, pod?.ip(Family::V4)?)?;
    }
    let left = (taken(&node, ADDRESSES)?, taken(&node, "/var/lib/cni/networks/cbr0")?);
    ensure!(left == (3, 0), "{left:?}");
    drop(lab);
    Ok(())
}

#[test]
fn cleanup_leaves_the_files_of_running_pods_alone_however_often_it_is_run() -> Result<()> {
    let (_lab, node, _) = two_nodes()?;
    let pod = node.add_pod("a")?;
    let (other, _) = Other::add(&node, "m1", "net2", json!({ "bridge": "br-pods" }))?;
    let files = || -> Result<(usize, bool, bool)> {
        let saved = |file: String| Ok::<_, anyhow::Error>(node.path(&file)?.exists());
        let own = fs::read_dir(node.path(ATTACHMENTS)?)?.count() == 1;
        Ok((taken(&node, ADDRESSES)?, own, saved("/var/lib/cni/fabric/net2/m1@eth0.json".into())?))
    };
    let had = (2, true, true);
    // The node moves on to another subnet, which the pods don't have.
    node.run(&["fabricctl", "lease", "renumber", "--force"])?;
    node.stop_fabricd()?;
    for state_dir in ["/var/lib/cni/fabric", "/var/lib/cni/fabric", "/tmp/no-attachments-here"] {
        let told = node.run(&["fabricd", "--cleanup", "--cni-state-dir", state_dir])?;
        ensure!(told.contains("attached; when they are gone: fabricd --cleanup"), "{state_dir}: {told}");
        ensure!(files()? == had, "{state_dir}: {:?}", files()?);
    }
    // One pod is left, and its port is off the bridge: its namespace tells.
    pod.del()?;
    let port = node.run(&["sh", "-c", "ip -o link show master br-pods | cut -d: -f2 | cut -d@ -f1"])?;
    node.run(&["ip", "link", "set", port.trim(), "nomaster"])?;
    let told = node.run(&["fabricd", "--cleanup"])?;
    ensure!(told.contains("1 pods are attached") && taken(&node, ADDRESSES)? == 1, "{told}");

    other.call(&node, "DEL")?;
    let told = node.run(&["fabricd", "--cleanup"])?;
    ensure!(told.contains("ip link delete cni0\n"), "{told}");
    let left = [ADDRESSES, ATTACHMENTS].map(|folder| node.path(folder).is_ok_and(|path| path.exists()));
    ensure!(left == [false, false], "{left:?}");
    let told = node.run(&["fabricd", "--cleanup"])?;
    ensure!(told.contains("0 kernel entries removed"), "{told}");
    // As in the pod of the cleanup manifest: told of no datastore, it neither waits for one nor warns.
    let told = node.run(&["sh", "-c", "env -i PATH=\"$PATH\" fabricd --cleanup --config /dev/null 2>&1"])?;
    ensure!(told.contains("no datastore is named") && !told.contains("WARN"), "{told}");
    Ok(())
}

#[test]
fn pods_on_a_bridge_of_another_name_are_guarded_and_explained() -> Result<()> {
    let (_lab, node, witness) = two_nodes()?;
    let (pod, ip) = Other::add(&node, "m1", "fabric", json!({ "bridge": "br-pods" }))?;
    let rules = || node.run(&["nft", "list", "table", "inet", "fabric"]);
    wait_until("the filter judges what comes from br-pods", SOON, || {
        ensure!(rules()?.contains("iifname \"br-pods\" jump pods"));
        Ok(())
    })?;
    let port = node.run(&["sh", "-c", "ip -o link show master br-pods | cut -d: -f2 | cut -d@ -f1"])?;
    wait_until("the pod's port is known", SOON, || {
        ensure!(node.run(&["nft", "list", "set", "bridge", "fabric", "known"])?.contains(port.trim()));
        Ok(())
    })?;
    reaches(&witness, ip)?;
    // Under another's address nothing leaves it.
    let target = witness.ip(Family::V4)?.to_string();
    let spoof =
        "ip address add 10.244.255.9/32 dev eth0; ! ping -c 2 -W 1 -I 10.244.255.9 TARGET".replace("TARGET", &target);
    node.run(&["ip", "netns", "exec", "m1", "sh", "-c", &spoof])?;
    let filter = node.run(&["nft", "list", "table", "bridge", "fabric"])?;
    let dropped = |line: &str| line.contains("drop") && line.contains("packets") && !line.contains("packets 0 ");
    ensure!(filter.lines().any(dropped), "{filter}");

    let explained = node.exec(&["fabricctl", "explain", &ip.to_string(), &target])?.stdout;
    for words in ["br-pods up", &format!("{}, of container m1", port.trim()), "iif br-pods"] {
        ensure!(explained.contains(words), "{words}: {explained}");
    }
    let report = node.exec(&["fabricctl", "doctor"])?.stdout;
    ensure!(!report.contains("there is no cni0") && !report.contains("FAILED bridge"), "{report}");
    // A packet passes by the bridge of its own pod, however many bridges there are.
    let beside = node.add_pod("beside")?.ip(Family::V4)?;
    let theirs =
        "table inet theirs {\nchain forward {\ntype filter hook forward priority 0\niifname \"br-pods\" drop\n}\n}\n";
    node.command(&["nft", "-f", "-"])?.stdin(theirs).run()?;
    for (from, passes) in [(ip, false), (beside, true)] {
        wait_until("explain follows it by its bridge", SOON, || {
            let explained = node.exec(&["fabricctl", "explain", &from.to_string(), &target])?.stdout;
            let passed = format!("{from} to {target} passes the chains of others");
            ensure!(explained.contains(&passed) == passes, "{explained}");
            ensure!(explained.contains("dropped by inet theirs forward") != passes, "{explained}");
            Ok(())
        })?;
    }
    pod.call(&node, "DEL").map(drop)
}
