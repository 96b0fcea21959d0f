//! The Lab, proved on itself: without fabricd, by the plain bridge plugin and with overlays made by hand.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::containerd::Containerd;
use fabric_tests::lab::packet::Packet;
use fabric_tests::lab::page::Page;
use fabric_tests::lab::spaces::Spaces;
use fabric_tests::lab::{Capture, Connection, Families, Lab, Matrix, Stream, binaries, http, wait_until};

#[test]
fn a_stopped_lab_leaves_no_process_mount_namespace_or_link() -> Result<()> {
    let host_before = Host::look()?;
    let lab = Lab::builder().nodes(2).plain().start()?;
    lab.node("node-1")?.add_pod("a")?;
    let machines = [lab.underlay().machine.pid()?, lab.node("node-1")?.pid()?, lab.node("node-2")?.pid()?];
    let folder = lab.dir().to_owned();
    drop(lab);

    assert_eq!(Host::look()?, host_before);
    for pid in machines {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is still there");
    }
    assert_eq!(processes_mentioning(&folder.display().to_string())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_lab_ends_with_the_process_that_started_it_even_when_that_is_killed() -> Result<()> {
    // This very test, as another process that starts a lab and waits to be killed.
    let name = "lab_self.orphan";
    if std::env::var_os("LAB_SELF_ORPHAN").is_some() {
        let _lab = Lab::builder().name(name).plain().start()?;
        std::thread::sleep(Duration::from_secs(60));
        return Ok(());
    }
    let this_test = "a_lab_ends_with_the_process_that_started_it_even_when_that_is_killed";
    let mut other = Command::new(std::env::current_exe()?)
        .args(["--exact", this_test])
        .env("LAB_SELF_ORPHAN", "1")
        .stdout(Stdio::null())
        .spawn()?;
    let folder = binaries::labs()?.join(name).display().to_string();
    wait_until("the other process has its node", Duration::from_secs(20), || {
        ensure!(processes_mentioning(&format!("{folder}/node-1"))?.len() >= 2, "not yet");
        Ok(())
    })?;
    other.kill()?;
    other.wait()?;
    wait_until("all its processes have ended", Duration::from_secs(10), || {
        let left = processes_mentioning(&folder)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
}

#[test]
fn two_labs_run_side_by_side_with_the_same_addresses() -> Result<()> {
    let one = Lab::builder().plain().start()?;
    let two = Lab::builder().plain().name("lab_self.the_other_of_two").start()?;
    let in_one = one.node("node-1")?.add_pod("a")?;
    let in_two = two.node("node-1")?.add_pod("a")?;

    assert_eq!(in_one.ips(), in_two.ips());
    one.etcd().ctl(&["put", "/only/here", "1"])?;
    assert_eq!(two.etcd().ctl(&["get", "/only/here"])?, "");
    Ok(())
}

#[test]
fn pods_reach_each_other_unchanged_in_every_family() -> Result<()> {
    for (families, pairs) in Families::ALL.into_iter().zip([6, 6, 12]) {
        let lab = Lab::builder().nodes(2).families(families).plain().start()?;
        for (node, pod) in [("node-1", "a"), ("node-1", "b"), ("node-2", "a")] {
            lab.node(node)?.add_pod(pod)?.check()?;
        }
        let matrix = Matrix::of(&lab.pods()?)?;
        assert!(matrix.is_perfect(), "{matrix}");
        assert_eq!(matrix.cells().len(), pairs);
    }
    Ok(())
}

#[test]
fn the_page_of_a_node_is_reached_from_this_machine() -> Result<()> {
    let lab = Lab::builder().start()?;
    let node = lab.node("node-1")?;
    let page = Page::open(node, 0)?;
    let address = page.address()?;
    assert!(address.ip().is_loopback(), "{address}");
    std::thread::spawn(move || page.serve());
    let here = Spaces::own();
    wait_until("it is the page of node-1, live", Duration::from_secs(20), || {
        let state = http::get(&here, address, "/page.json")?;
        ensure!(state.status == 200 && state.body.contains(r#""node":"node-1""#), "{state:?}");
        Ok(())
    })?;
    assert!(http::get(&here, address, "/")?.body.contains("<title>fabricd</title>"));
    Ok(())
}

/// Whoever knows the gateway, or an etcd, by a MAC address that is no more loses packets to it.
#[test]
fn nodes_that_go_leave_the_underlay_its_mac_address() -> Result<()> {
    let lab = Lab::builder().nodes(3).plain().start()?;
    let mac = || lab.underlay().machine.run(&["cat", "/sys/class/net/br0/address"]);
    let before = mac()?;
    for node in lab.nodes() {
        node.power_off()?;
        assert_eq!(mac()?, before, "without {}", node.name);
    }
    Ok(())
}

#[test]
fn a_stream_between_two_pods_of_a_node_loses_nothing() -> Result<()> {
    let lab = Lab::builder().plain().start()?;
    let node = lab.node("node-1")?;
    let (a, b) = (node.add_pod("a")?, node.add_pod("b")?);

    let stream = Stream::start(&a, &b)?;
    let connection = Connection::start(&a, &b)?;
    stream.wait_for(500, Duration::from_secs(5))?;

    let report = stream.stop()?;
    assert_eq!((report.lost, report.duplicated, report.refused), (0, 0, 0), "{report:?}");
    assert_eq!(report.sources, BTreeSet::from([a.ip(Family::V4)?]));
    let report = connection.stop()?;
    assert_eq!(report.broken, None);
    Ok(())
}

#[test]
fn a_stream_notices_a_cable_that_was_unplugged() -> Result<()> {
    let lab = Lab::builder().nodes(2).plain().start()?;
    let (a, b) = (lab.node("node-1")?.add_pod("a")?, lab.node("node-2")?.add_pod("a")?);

    let stream = Stream::start(&a, &b)?;
    lab.underlay().unplug("node-2")?;
    let (sent, received) = (stream.sent(), stream.received());
    wait_until("300 more packets are sent", Duration::from_secs(5), || {
        ensure!(stream.sent() >= sent + 300, "{} of them", stream.sent() - sent);
        Ok(())
    })?;
    lab.underlay().plug("node-2")?;
    stream.wait_for(100, Duration::from_secs(10))?;

    let report = stream.stop()?;
    assert!(report.lost > 0 && report.received > received, "{report:?}");
    assert!(report.longest_gap > Duration::from_millis(200), "{report:?}");
    Ok(())
}

#[test]
fn a_capture_shows_what_is_outside_and_inside_of_a_vxlan_packet() -> Result<()> {
    for (family, families) in [(Family::V4, Families::V4), (Family::V6, Families::V6)] {
        let lab = Lab::builder().nodes(2).families(families).plain().start()?;
        let (one, two) = (lab.node("node-1")?, lab.node("node-2")?);
        for (node, peer, inner) in [(one, two, "192.0.2.1/24"), (two, one, "192.0.2.2/24")] {
            let (local, remote) = (node.underlay_ip(family).to_string(), peer.underlay_ip(family).to_string());
            let vxlan = ["type", "vxlan", "id", "42", "dstport", "8472", "local", &local, "remote", &remote];
            node.run(&[&["ip", "link", "add", "hand.42"], vxlan.as_slice()].concat())?;
            node.run(&["ip", "address", "add", inner, "dev", "hand.42"])?;
            node.run(&["ip", "link", "set", "hand.42", "up"])?;
        }

        let at_the_port = lab.underlay().capture("node-1")?;
        let inside = Capture::start(&two.network()?, "hand.42")?;
        one.run(&["ping", "-c", "1", "-W", "2", "192.0.2.2"])?;

        let is_ping = |packet: &Packet| packet.protocol == 1 && packet.target.to_string() == "192.0.2.2";
        let outside = at_the_port
            .wait_for("the ping in VXLAN", Duration::from_secs(2), |packet| packet.inner().is_some_and(is_ping))?;
        assert_eq!((outside.source, outside.target), (one.underlay_ip(family), two.underlay_ip(family)));
        assert_eq!(outside.ports.context("UDP has ports")?.1, 8472);
        assert_eq!(outside.vxlan.context("it is VXLAN")?.vni, 42);
        let decapsulated = inside.wait_for("the ping itself", Duration::from_secs(2), is_ping)?;
        assert_eq!((decapsulated.source.to_string().as_str(), decapsulated.vxlan), ("192.0.2.1", None));
    }
    Ok(())
}

#[test]
fn etcd_survives_the_loss_of_one_member_of_three_and_answers_again_after_a_freeze() -> Result<()> {
    let lab = Lab::builder().nodes(1).etcd_members(3).plain().start()?;
    let etcd = lab.etcd();
    etcd.ctl(&["put", "/key", "before"])?;
    etcd.end_member(1, nix::sys::signal::Signal::SIGKILL)?;
    wait_until("two members agree", Duration::from_secs(10), || etcd.ctl(&["put", "/key", "after"]))?;
    etcd.start_member(1, &[])?;
    etcd.wait_healthy(1)?;

    etcd.freeze()?;
    assert!(etcd.ctl(&["--command-timeout=300ms", "get", "/key"]).is_err());
    etcd.thaw()?;
    wait_until("etcd answers again", Duration::from_secs(10), || etcd.ctl(&["get", "/key"]))?;
    etcd.stop()?;
    etcd.start()?;
    assert_eq!(etcd.ctl(&["get", "--print-value-only", "/key"])?, "after\n");
    Ok(())
}

#[test]
fn a_node_that_is_cut_off_from_etcd_reaches_it_again_when_healed() -> Result<()> {
    let lab = Lab::builder().plain().start()?;
    let node = lab.node("node-1")?;
    let health = ["etcdctl", "--command-timeout=500ms", "--dial-timeout=500ms", "get", "/"];
    node.run(&health)?;
    node.cut_off("10.99.0.2".parse()?)?;
    assert!(!node.exec(&health)?.success());
    node.heal()?;
    node.run(&health)?;
    Ok(())
}

#[test]
fn a_rebooted_node_keeps_its_disk_and_address_but_not_its_memory() -> Result<()> {
    let mut lab = Lab::builder().nodes(2).plain().start()?;
    let node = lab.node("node-1")?.clone();
    node.add_pod("a")?;
    node.run(&["touch", "/run/in-memory", "/var/lib/on-disk"])?;
    let eth0 = node.run(&["ip", "-br", "link", "show", "eth0"])?;

    node.power_off()?;
    assert!(node.run(&["true"]).is_err());
    lab.boot_again(&node)?;

    assert!(node.pods()?.is_empty());
    assert!(!node.path("/run/in-memory")?.exists());
    assert!(node.path("/var/lib/on-disk")?.exists());
    let mac = |shown: &str| shown.split_whitespace().nth(2).map(str::to_owned);
    assert_eq!(mac(&node.run(&["ip", "-br", "link", "show", "eth0"])?), mac(&eth0));
    lab.remove_node("node-1")?;
    assert_eq!(lab.nodes().count(), 1);
    assert_eq!(lab.add_node()?.name, "node-3");
    Ok(())
}

#[test]
fn a_service_that_has_ended_is_told_with_its_exit_status_or_signal() -> Result<()> {
    let lab = Lab::builder().plain().start()?;
    let node = lab.node("node-1")?;
    for (name, last, how) in [("failed", "exit 3", "exit status 3"), ("killed", "kill -BUS $$", "killed by SIGBUS")] {
        let script = format!("until [ -e /run/{name} ]; do sleep 0.05; done; echo it has run; {last}");
        let process = node.start_service(name, &["sh", "-c", &script], &[])?;
        node.running_service(name)?;
        fs::write(node.path(&format!("/run/{name}"))?, "")?;
        process.wait_gone(Duration::from_secs(20))?;
        let told = node.running_service(name).map_or_else(|error| error.to_string(), |_| "it runs".into());
        assert!(told.contains(&format!("{name} has ended on node-1 ({how})")) && told.contains("it has run"), "{told}");
    }
    Ok(())
}

#[test]
fn environment_of_a_service_is_not_that_of_the_shell_that_starts_it() -> Result<()> {
    let lab = Lab::builder().plain().start()?;
    let node = lab.node("node-1")?;
    // A library that can't be loaded is complained about by every program that is to load it.
    let env = [("LD_PRELOAD", "/run/none.so"), ("WORD", "two words")];
    node.start_service("one", &["sh", "-c", "echo $WORD; exec sleep 60"], &env)?;
    wait_until("it says both", Duration::from_secs(20), || {
        let log = node.log("one");
        ensure!(log.contains("two words"), "{log}");
        Ok(())
    })?;
    let log = node.log("one");
    assert!(log.contains("/run/none.so") && !log.contains("setsid") && !log.contains("timeout"), "{log}");
    Ok(())
}

#[test]
fn a_pod_that_can_not_be_attached_is_an_error_with_the_code_of_the_plugin() -> Result<()> {
    let lab = Lab::builder().plain().start()?;
    let node = lab.node("node-1")?;
    fs::write(
        node.path("/etc/cni/net.d/00-first.conflist")?,
        r#"{"cniVersion":"9.9.9","name":"x","plugins":[{"type":"bridge"}]}"#,
    )?;
    let error = node.add_pod("a").err().context("there is no such version")?;
    let error = error.downcast_ref::<fabric_tests::lab::cni::CniError>().context("a CNI error")?;
    assert_eq!(error.code, 1);
    assert_eq!(node.run(&["ip", "netns", "list"])?, "");
    Ok(())
}

#[test]
fn a_container_of_containerd_is_reachable_from_a_pod_of_another_node() -> Result<()> {
    let lab = Lab::builder().nodes(2).plain().start()?;
    let containerd = Containerd::start(lab.node("node-1")?)?;
    let container = containerd.run("busybox")?;
    let pod = lab.node("node-2")?.add_pod("a")?;

    let matrix = Matrix::of(&[pod, container.clone()])?;
    assert!(matrix.is_perfect(), "{matrix}");

    containerd.kill(container)?;
    assert_eq!(fs::read_dir(lab.node("node-1")?.path("/var/lib/cni/networks/plain")?)?.filter(is_address).count(), 0);
    Ok(())
}

fn is_address(entry: &std::io::Result<fs::DirEntry>) -> bool {
    entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("10."))
}

/// What a lab could leave behind on the host.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    mounts: Vec<String>,
    links: BTreeSet<String>,
    named_namespaces: BTreeSet<String>,
}

impl Host {
    fn look() -> Result<Self> {
        Ok(Self {
            mounts: fs::read_to_string("/proc/self/mounts")?.lines().map(str::to_owned).collect(),
            links: names_in("/sys/class/net"),
            named_namespaces: names_in("/run/netns"),
        })
    }
}

fn names_in(folder: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// The command lines that contain `text`, of all processes of this machine.
fn processes_mentioning(text: &str) -> Result<Vec<String>> {
    let mut found = vec![];
    for entry in fs::read_dir("/proc")? {
        let Ok(command) = fs::read(entry?.path().join("cmdline")) else { continue };
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        if command.contains(text) {
            found.push(command);
        }
    }
    Ok(found)
}
