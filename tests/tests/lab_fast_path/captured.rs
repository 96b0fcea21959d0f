//! `fabricctl capture` sees the packets of both paths.

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::Stream;

use crate::{OFF, ON, pods_of_two_nodes, restart, settled};

#[test]
fn capture_of_a_pod_or_a_node_sees_fast_and_slow_packets() -> Result<()> {
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let node = &b.node;
    let capture = |whom: &str, more: &[&str]| {
        node.run(&[&["timeout", "60", "fabricctl", "capture", whom, "--", "-c", "20"], more].concat())
    };
    let (from, to) = (a.ip(Family::V4)?.to_string(), b.ip(Family::V4)?.to_string());
    let stream = Stream::start(&a, &b)?;
    for flag in [ON, OFF] {
        if flag == OFF {
            restart(node, flag)?;
            settled(node, flag)?;
        }
        let of_pod = capture(&to, &["udp"])?;
        ensure!(of_pod.lines().filter(|line| line.contains(&format!("IP {from}."))).count() >= 20, "{flag}: {of_pod}");
        let of_node = capture("node-1", &[])?;
        ensure!(of_node.contains(".8472: ") && of_node.contains(&format!("IP {from}.")), "{flag}: {of_node}");
    }
    let told = node.run(&["fabricctl", "capture", &to, "--print"])?;
    ensure!(told.starts_with("nsenter --net=") && told.contains("tcpdump -n -i eth0"), "{told}");
    let nobody = node.exec(&["fabricctl", "capture", "node-9"])?;
    ensure!(nobody.status.code() == Some(1) && nobody.stderr.contains("neither a pod of this node"), "{nobody:?}");
    ensure!(stream.stop()?.lost == 0);
    Ok(())
}
