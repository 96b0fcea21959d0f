//! Real container runtimes, and both delegates, on nodes of the Lab: their pods talk across nodes, stop, and leave
//! nothing behind.

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_tests::lab::containerd::Containerd;
use fabric_tests::lab::cri::Cri;
use fabric_tests::lab::podman::Podman;
use fabric_tests::lab::{Families, Lab, Matrix, Node, Pod, cni, wait_until};
use serde_json::json;

/// How long the kernel and a runtime may take to clear up after a pod.
const SOON: Duration = Duration::from_secs(10);

#[test]
fn containers_of_containerd_talk_across_nodes_and_leave_nothing() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let runtimes = lab.nodes().map(Containerd::start).collect::<Result<Vec<_>>>()?;
    let pods = runtimes.iter().map(|runtime| runtime.run("busybox")).collect::<Result<Vec<_>>>()?;
    let matrix = Matrix::of(&pods)?;
    assert!(matrix.is_perfect(), "{matrix}");
    runtimes.iter().zip(pods).try_for_each(|(runtime, pod)| runtime.kill(pod))?;
    lab.nodes().try_for_each(|node| nothing_is_left(node))
}

#[test]
fn pods_of_containerds_cri_talk_across_nodes_and_leave_nothing() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let runtimes = lab.nodes().map(Cri::start).collect::<Result<Vec<_>>>()?;
    let sandboxes = runtimes.iter().map(|runtime| runtime.run("pod")).collect::<Result<Vec<_>>>()?;
    let pods: Vec<_> = sandboxes.iter().map(|sandbox| sandbox.pod.clone()).collect();
    let matrix = Matrix::of(&pods)?;
    assert!(matrix.is_perfect(), "{matrix}");
    runtimes.iter().zip(sandboxes).try_for_each(|(runtime, sandbox)| runtime.remove(sandbox))?;
    lab.nodes().try_for_each(|node| nothing_is_left(node))
}

#[test]
fn containers_of_podman_talk_across_nodes_and_leave_nothing() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let runtimes = lab.nodes().map(Podman::set_up).collect::<Result<Vec<_>>>()?;
    let pods = runtimes.iter().map(|runtime| runtime.run("busybox")).collect::<Result<Vec<_>>>()?;
    let matrix = Matrix::of(&pods)?;
    assert!(matrix.is_perfect(), "{matrix}");
    runtimes.iter().zip(pods).try_for_each(|(runtime, pod)| runtime.kill(pod))?;
    lab.nodes().try_for_each(|node| nothing_is_left(node))
}

#[test]
fn pods_on_fabric_bridge_talk_across_nodes_with_those_on_bridge() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    let first = lab.node("node-1")?;
    let mut conflist = cni::fabric_conflist();
    conflist["plugins"][0]["delegate"] = json!({ "type": "fabric-bridge" });
    fs::write(first.path("/etc/cni/net.d/00-ours.conflist")?, conflist.to_string())?;
    for node in lab.nodes() {
        node.add_pod("a")?.check()?;
        node.add_pod("b")?.check()?;
    }
    let pods = lab.pods()?;
    let matrix = Matrix::of(&pods)?;
    assert!(matrix.is_perfect(), "{matrix}");
    pods.into_iter().try_for_each(Pod::del)?;
    lab.nodes().try_for_each(|node| nothing_is_left(node))
}

#[test]
fn install_cni_makes_a_node_that_pods_can_be_added_to_and_uninstall_undoes_it() -> Result<()> {
    let lab = Lab::builder().nodes(2).families(Families::Dual).start()?;
    for node in lab.nodes() {
        node.run(&["sh", "-c", "rm /etc/cni/net.d/* /opt/cni/bin/fabric-*"])?;
        node.run(&["fabricd", "install-cni"])?;
        node.add_pod("a")?.check()?;
    }
    let pods = lab.pods()?;
    let matrix = Matrix::of(&pods)?;
    assert!(matrix.is_perfect(), "{matrix}");
    pods.into_iter().try_for_each(Pod::del)?;
    for node in lab.nodes() {
        node.run(&["fabricd", "install-cni", "--uninstall"])?;
        assert_eq!(node.run(&["sh", "-c", "ls /etc/cni/net.d; ls /opt/cni/bin | grep fabric || true"])?, "");
        nothing_is_left(node)?;
    }
    Ok(())
}

/// No cable, no address, no saved attachment.
fn nothing_is_left(node: &Node) -> Result<()> {
    wait_until(&format!("nothing is left on {}", node.name), SOON, || {
        let cables = node.run(&["ip", "-o", "link", "show", "type", "veth"])?;
        // The node's own port on the underlay is one.
        let cables: Vec<_> = cables.lines().filter(|line| line.contains("master cni0")).collect();
        ensure!(cables.is_empty(), "cables: {cables:?}");
        for folder in ["/var/lib/cni/networks/fabric", "/var/lib/cni/fabric/fabric"] {
            let names =
                fs::read_dir(node.path(folder)?)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let left: Vec<_> = names.filter(|name| name != "lock" && !name.starts_with("last_reserved_ip")).collect();
            ensure!(left.is_empty(), "files in {folder}: {left:?}");
        }
        Ok(())
    })
}
