//! What another program changes of ours in the kernel is restored, and leaves a trace; what a peer or a start changes is no
//! repair.

use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_tests::lab::{Lab, Node, wait_until};

/// How long a change may take on a busy machine.
const SOON: Duration = Duration::from_secs(40);

/// The messages of the events of repairs, the oldest first.
fn repairs(node: &Node) -> Result<Vec<String>> {
    let events = node.run(&["fabricctl", "events"])?;
    let of_repairs =
        events.lines().filter_map(|line| line.split_once("repaired").map(|(_, said)| said.trim().to_owned()));
    Ok(of_repairs.collect())
}

fn repaired(node: &Node, table: &str) -> Result<bool> {
    let line = format!("fabricd_repairs_total{{table=\"{table}\"}} ");
    Ok(node.http_get(9472, "/metrics")?.body.lines().any(|shown| shown.starts_with(&line)))
}

fn until_told(node: &Node, words: &str, table: &str) -> Result<()> {
    wait_until(&format!("the repair: {words}"), SOON, || {
        let told = repairs(node)?;
        ensure!(told.iter().any(|line| line.contains(words)), "{told:?}");
        ensure!(repaired(node, table)?, "no counter of {table}");
        Ok(())
    })
}

#[test]
fn what_another_program_deletes_comes_back_with_an_event_a_counter_and_a_line_of_the_log() -> Result<()> {
    let mut lab = Lab::builder().nodes(2).start()?;
    let node = lab.node("node-1")?.clone();
    let peer = lab.node("node-2")?.subnet()?;
    node.stop_fabricd()?;
    node.start_fabricd()?;
    node.wait_ready()?;
    lab.add_node()?;
    wait_until("the third node is a peer", SOON, || {
        ensure!(node.routes()? == 2);
        Ok(())
    })?;
    ensure!(repairs(&node)?.is_empty(), "a start and a peer that comes repair nothing: {:?}", repairs(&node)?);

    node.run(&["ip", "route", "del", &peer])?;
    until_told(&node, &format!("route {peer} was deleted by another program, restored"), "route")?;
    node.run(&["nft", "delete", "table", "inet", "fabric"])?;
    until_told(&node, "table inet fabric of the packet filter was deleted by another program, restored", "filter")?;
    wait_until("it is what was written last", SOON, || {
        let plan = node.run(&["fabricctl", "plan"])?;
        ensure!(plan.contains("+ nft add set inet fabric members4") && plan.contains("In sync"), "{plan}");
        Ok(())
    })?;
    node.run(&["ip", "link", "del", "fabric.1"])?;
    until_told(&node, "link fabric.1 was deleted by another program, restored; with it 1 address", "link")?;
    node.run(&["sysctl", "-qw", "net.ipv4.ip_forward=0"])?;
    until_told(&node, "setting net/ipv4/ip_forward was changed by another program, restored", "sysctl")?;
    let log = node.log("fabricd");
    let lines = log.lines().filter(|line| line.contains("restored what another program changed")).count();
    ensure!((1..=3).contains(&lines), "{lines} lines\n{log}");
    Ok(())
}
