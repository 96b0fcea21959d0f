//! The daemon is replaced under a stream: stopped, killed, and by one with other programs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Node, Stream, binaries, wait_until};

use crate::{ON, SOON, pods_of_two_nodes};

/// Where nodes have it.
const OTHER: &str = "/var/lib/other-fabricd";
/// What starts it.
const START_OTHER: &str = "/var/lib/start-other-fabricd";
/// An instruction of eBPF.
const INSTRUCTION: usize = 8;
/// `r |= 0xc000`, for registers of 32 and 64 bits: from where on the source ports are that flows are spread over. Here half as
/// many.
const OR: [u8; 2] = [0x44, 0x47];
const FIRST_PORT: [u8; 4] = 0xc000_u32.to_le_bytes();
const OTHER_PORT: [u8; 4] = 0xe000_u32.to_le_bytes();

/// Another build of fabricd: the same, but for an instruction of its programs.
fn other_build() -> Result<Vec<u8>> {
    let path = binaries::folder()?.join("fabricd");
    let mut build = fs::read(&path).with_context(|| path.display().to_string())?;
    let object = fabric_bpf::OBJECT;
    let start = build.windows(object.len()).position(|window| window == object).context("its programs are others")?;
    let programs = build[start..start + object.len()].chunks_exact_mut(INSTRUCTION);
    let ports = programs.filter(|step| OR.contains(&step[0]) && step[2..4] == [0, 0] && step[4..] == FIRST_PORT);
    let changed = ports.map(|step| step[4..].copy_from_slice(&OTHER_PORT)).count();
    ensure!(changed > 0, "no program spreads flows over ports");
    Ok(build)
}

fn programs(node: &Node) -> Result<String> {
    node.run(&["sh", "-ec", "ls /sys/fs/bpf/fabric/*/programs"])
}

/// Ready, on the fast path, and with programs that are `others` than they were, or the same.
fn is_replaced(node: &Node, before: &str, others: bool) -> Result<()> {
    node.wait_ready()?;
    wait_until(&format!("the fast path of {}", node.name), SOON, || {
        let status = node.status()?;
        ensure!(status["fast_path"]["on"] == true, "{}", status["fast_path"]);
        let now = programs(node)?;
        ensure!(
            (now != before) == others && now.lines().count() == fabricd::kernel::fast_path::programs().len(),
            "{before}{now}"
        );
        Ok(())
    })
}

#[test]
fn replacements_of_the_daemon_under_five_thousand_packets_a_second_lose_none() -> Result<()> {
    let replacements = std::env::var("REPLACEMENTS").ok().and_then(|count| count.parse().ok()).unwrap_or(6);
    let (_lab, a, b) = pods_of_two_nodes([ON, ON])?;
    let build = other_build()?;
    for pod in [&a, &b] {
        let start = format!("#!/bin/sh\nexec {OTHER} {ON}\n");
        for (path, content) in [(OTHER, build.as_slice()), (START_OTHER, start.as_bytes())] {
            let path = pod.node.path(path)?;
            fs::write(&path, content)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
    }
    let mut other = [false; 2];
    let stream = Stream::start_with(&a, &b, Family::V4, 5_000)?;
    for number in 0..replacements {
        let at = number / 3 % 2;
        let node = [&a.node, &b.node][at];
        let before = programs(node)?;
        let upgrade = number % 3 == 2;
        if number % 3 == 1 { node.kill_fabricd() } else { node.stop_fabricd() }?;
        other[at] ^= upgrade;
        if other[at] { node.start_this_fabricd(START_OTHER) } else { node.start_fabricd_with(&[ON], &[]) }?;
        is_replaced(node, &before, upgrade).with_context(|| format!("replacement {number}"))?;
    }
    let report = stream.stop()?;
    println!("{replacements} replacements, {} packets, {} lost", report.sent, report.lost);
    ensure!(report.lost == 0 && report.duplicated == 0, "{report:?}");
    Ok(())
}
