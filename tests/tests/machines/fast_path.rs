//! The fast path on each kernel: TCP between pods by eBPF programs, where the kernel has a hook for them.

use std::time::Duration;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::wait_until;
use fabric_tests::machines::{Vm, VmPod};
use serde_json::Value;

use crate::fabric::{Fabric, forged_packets_are_dropped_and_counted};

/// What loading programs and an audit may take.
const SOON: Duration = Duration::from_secs(180);
/// Enough for some dozen segments.
const FILE: u32 = 1 << 20;

/// Starts fabricd anew with it on each machine, and waits until it is as the kernel lets it be.
pub fn is_switched_on(fabric: &Fabric) -> Result<()> {
    for vm in &fabric.vms {
        vm.end_fabricd("TERM")?;
        vm.start_fabricd("--fast-path=on")?;
    }
    for vm in &fabric.vms {
        vm.wait_ready()?;
        let expected = hook_of(vm)?;
        wait_until(&format!("the fast path of {} by {expected:?}", vm.name), SOON, || {
            let fast_path = &vm.status()?["fast_path"];
            // Two pods and two peers, both of two families.
            let whole = number(&fast_path["pods"]) == 4 && number(&fast_path["peers"]) == 2;
            let told = fast_path["reason"].as_str().is_some_and(|reason| !reason.is_empty());
            ensure!(if expected.is_some() { whole } else { told }, "{fast_path}");
            let found = found_on(vm)?;
            ensure!(found == expected, "the programs are attached by {found:?}: {fast_path}");
            Ok(())
        })?;
    }
    Ok(())
}

/// The hook for programs that this kernel has: links of tcx came with Linux 6.6, filters of tc can encapsulate since 5.13.
pub fn hook_of(vm: &Vm) -> Result<Option<&'static str>> {
    let mut numbers = vm.spec.kernel.split('.').map(str::parse::<u32>);
    let version = (numbers.next().transpose()?, numbers.next().transpose()?);
    Ok(match version {
        _ if version >= (Some(6), Some(6)) => Some("tcx"),
        _ if version >= (Some(5), Some(13)) => Some("clsact"),
        _ => None,
    })
}

/// The hook that is used.
fn found_on(vm: &Vm) -> Result<Option<&'static str>> {
    if vm.status()?["fast_path"]["on"] != true {
        return Ok(None);
    }
    Ok(Some(if vm.run("tc qdisc show")?.contains("clsact") { "clsact" } else { "tcx" }))
}

/// The hook, or why there is none.
pub fn in_words(vm: &Vm) -> Result<String> {
    let status = vm.status()?;
    // Which step was refused, and its errno, come before.
    let reason =
        status["fast_path"]["reason"].as_str().and_then(|reason| reason.rsplit("): ").next()).unwrap_or_default();
    Ok(found_on(vm)?.map_or_else(|| format!("none: {reason}"), str::to_owned))
}

/// The node is ready, and its pods are reached as before.
pub fn without_a_fast_path_the_node_is_ready_and_says_why(fabric: &Fabric, vm: &Vm, pods: &[VmPod]) -> Result<()> {
    let status = vm.status()?;
    ensure!(status["ready"] == true, "{}", status["reason"]);
    let warned = status["warnings"].to_string();
    ensure!(warned.contains("the kernel's path, not the fast one"), "no warning tells of it: {warned}");
    ensure!(warned.contains("before Linux 5.13; see: uname -r"), "why is not told: {warned}");
    Family::ALL.into_iter().try_for_each(|family| pods[0].reaches(fabric.outside.ip(family)?))
}

/// From the machine to another one and to a node in namespaces, and back.
pub fn pods_take_the_fast_path_and_files_arrive_whole(fabric: &Fabric, vm: &Vm, pods: &[VmPod]) -> Result<()> {
    let (pod, outside) = (&pods[0], &fabric.outside);
    let other = fabric.pods.iter().find(|pod| pod.vm.name != vm.name).expect("two machines");
    let before = Taken::by(vm)?;
    let file = pod.serves_a_file(FILE)?;
    let served = format!(
        "mkdir -p /run/served; head -c {FILE} /dev/urandom >/run/served/file; sha256sum </run/served/file\n\
         busybox netstat -ltn | grep -q :8080 || busybox httpd -p '[::]:8080' -h /run/served </dev/null >/dev/null 2>&1"
    );
    let outsides = outside.run(&["sh", "-ec", &served])?;
    for family in Family::ALL {
        let (here, there) = (pod.ip(family)?, outside.ip(family)?);
        let url = format!("http://{}/file", std::net::SocketAddr::new(here, 8080));
        let fetch = format!("timeout 100 busybox wget -q -O - {url} | sha256sum");
        ensure!(outside.run(&["sh", "-ec", &fetch])? == file, "other bytes arrive at node-1 over {family:?}");
        ensure!(other.fetches_from(here)? == file, "other bytes arrive at {} over {family:?}", other.vm.name);
        ensure!(pod.fetches_from(there)? == outsides, "other bytes arrive at {} over {family:?}", vm.name);
    }
    wait_until("packets of both families on the fast path", SOON, || {
        let now = Taken::by(vm)?;
        let more = [now.sent4 - before.sent4, now.sent6 - before.sent6, now.received - before.received];
        ensure!(more.iter().all(|packets| *packets > 20), "{more:?} packets of IPv4 and IPv6 sent, and received");
        Ok(())
    })
}

/// As without.
pub fn forged_packets_are_dropped_beside_the_fast_path(fabric: &Fabric, pods: &[VmPod]) -> Result<()> {
    forged_packets_are_dropped_and_counted(fabric, pods)
}

/// Packets that the programs have taken: segments that travel together are one.
struct Taken {
    /// By the tunnel that a program makes.
    sent4: u64,
    /// By the device, which IPv6 needs.
    sent6: u64,
    received: u64,
}

impl Taken {
    fn by(vm: &Vm) -> Result<Self> {
        let status = vm.status()?;
        let counts = status["fast_path"]["counts"].as_array().cloned().unwrap_or_default();
        let of = |program: &str, reason: &str| {
            let count = counts.iter().find(|count| count["program"] == program && count["reason"] == reason);
            count.map_or(0, |count| number(&count["packets"]))
        };
        Ok(Self { sent4: of("pod_out", "tunnel"), sent6: of("pod_out", "device"), received: of("wire_in", "tunnel") })
    }
}

/// JSON of protocol buffers has 64 bits as text.
fn number(value: &Value) -> u64 {
    value.as_u64().or_else(|| value.as_str()?.parse().ok()).unwrap_or_default()
}
