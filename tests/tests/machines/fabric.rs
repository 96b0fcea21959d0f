//! What a fabric promises, on two machines with different kernels and a node in namespaces, dual stack.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::packet::VXLAN_PORT;
use fabric_tests::lab::{Families, Forged, Lab, Pod, addresses};
use fabric_tests::machines::{Machines, Plugin, Spec, Vm, VmPod};

use crate::fast_path::{
    self, forged_packets_are_dropped_beside_the_fast_path, pods_take_the_fast_path_and_files_arrive_whole,
    without_a_fast_path_the_node_is_ready_and_says_why,
};

/// Where nobody in a pod listens; packets to it are counted on their way in.
const COUNTED_PORT: u16 = 7777;

/// The lab, its pods, and who asks whom.
pub struct Fabric {
    pub machines: Machines,
    /// The machines, in the order of their kernels.
    pub vms: Vec<Arc<Vm>>,
    /// Two pods on each machine: one by each plugin.
    pub pods: Vec<VmPod>,
    /// The pod on the node in namespaces.
    pub outside: Pod,
}

impl Fabric {
    /// Brings all of it up.
    pub fn of(kernels: [&str; 2]) -> Result<Self> {
        let builder = Lab::builder().nodes(1).families(Families::Dual).masquerade(true);
        let mut machines = Machines::start(builder)?;
        let specs = kernels.map(str::parse::<Spec>);
        let specs = specs.into_iter().collect::<Result<Vec<_>>>()?;
        let vms = machines.add(&specs)?;
        vms.iter().try_for_each(|vm| vm.start_fabricd(""))?;
        vms.iter().try_for_each(|vm| vm.wait_ready())?;
        let outside = machines.lab.node("node-1")?.add_pod("outside")?;
        let mut pods = vec![];
        for vm in &vms {
            pods.push(vm.add_pod("standard", Plugin::Bridge)?);
            pods.push(vm.add_pod("ours", Plugin::FabricBridge)?);
        }
        Ok(Self { machines, vms, pods, outside })
    }
}

/// All that is promised, one after another, each noted for the kernels that showed it.
pub fn keeps_its_promises(kernels: [&str; 2]) -> Result<()> {
    let began = Instant::now();
    let shown = |vms: &[Arc<Vm>], what: &str| {
        let names: Vec<&str> = vms.iter().map(|vm| vm.name.as_str()).collect();
        println!("{:>4} s  {}: {}", began.elapsed().as_secs(), names.join(", "), what.replace('_', " "));
        vms.iter().try_for_each(|vm| vm.has_shown(what))
    };
    /// Calls a function and notes its name.
    macro_rules! show {
        ($vms:expr, $promise:ident($($argument:expr),*)) => {{
            $promise($($argument),*)?;
            shown($vms, stringify!($promise))?;
        }};
    }
    let fabric = Fabric::of(kernels)?;
    let vms = fabric.vms.clone();
    println!("{:>4} s  the fabric of {} is ready", began.elapsed().as_secs(), kernels.join(" and "));
    show!(&vms, pods_reach_each_other(&fabric));
    show!(&vms, pods_reach_the_outside_by_their_nodes_address(&fabric));
    show!(&vms, nothing_is_repaired_since_nobody_changed_anything(&fabric));
    for (at, vm) in vms.iter().enumerate() {
        let (only, pods) = (std::slice::from_ref(vm), &fabric.pods[2 * at..2 * at + 2]);
        show!(only, routes_go_by_nexthop_objects(vm));
        show!(only, forged_packets_are_dropped_and_counted(&fabric, pods));
        show!(only, a_restart_writes_nothing(vm));
        show!(only, rules_that_are_deleted_come_back(vm));
    }
    fast_path::is_switched_on(&fabric)?;
    for (at, vm) in vms.iter().enumerate() {
        let (only, pods) = (std::slice::from_ref(vm), &fabric.pods[2 * at..2 * at + 2]);
        if fast_path::hook_of(vm)?.is_none() {
            show!(only, without_a_fast_path_the_node_is_ready_and_says_why(&fabric, vm, pods));
            continue;
        }
        show!(only, pods_take_the_fast_path_and_files_arrive_whole(&fabric, vm, pods));
        show!(only, forged_packets_are_dropped_beside_the_fast_path(&fabric, pods));
    }
    for vm in &vms {
        note_paths(vm)?;
    }
    show!(&vms, a_power_off_keeps_the_subnet_under_another_boot_id(fabric));
    Ok(())
}

/// Every pod on a machine pings every other pod, and the one in namespaces, and is pinged by it.
fn pods_reach_each_other(fabric: &Fabric) -> Result<()> {
    for family in Family::ALL {
        let outside = fabric.outside.ip(family)?;
        for pod in &fabric.pods {
            pod.reaches(outside)?;
            let ip = pod.ip(family)?.to_string();
            fabric.outside.run(&["ping", "-q", "-c1", "-W10", &ip])?;
        }
        for (from, to) in fabric.pods.iter().zip(fabric.pods.iter().cycle().skip(2)) {
            from.reaches(to.ip(family)?)?;
        }
    }
    Ok(())
}

/// By what fabricd took there, in the kernel's own words.
fn note_paths(vm: &Vm) -> Result<()> {
    let lines = |script: &str| Ok::<_, anyhow::Error>(vm.run(script)?.lines().map(str::to_owned).collect::<Vec<_>>());
    let routes = if vm.run("ip -4 route show proto 250")?.contains("nhid") { "nexthop objects" } else { "gateways" };
    let fast_path = fast_path::in_words(vm)?;
    let tables = lines("nft list tables | grep fabric | sed 's/^table //'")?.join(", ");
    let pattern = "vxlan|udp_tunnel|ip6_udp_tunnel|bridge|veth|nf_|nft_|nfnetlink|cls_bpf|sch_";
    let modules = lines(&format!("cut -d' ' -f1 /proc/modules | grep -E '^({pattern})'"))?;
    vm.note(|seen| {
        routes.clone_into(&mut seen.routes);
        seen.fast_path = fast_path;
        seen.packet_filter = tables;
        seen.modules = modules.into_iter().collect();
    })
}

/// What the kernel tells of its tables is understood: else the daemon would write again and again what is there.
fn nothing_is_repaired_since_nobody_changed_anything(fabric: &Fabric) -> Result<()> {
    for vm in &fabric.vms {
        let told = vm.run("wget -q -O - http://127.0.0.1:9472/metrics | grep '^fabricd_repairs_total' || true")?;
        ensure!(told.is_empty(), "{} has repaired what nobody changed: {told}", vm.name);
    }
    Ok(())
}

/// The underlay has no route to pods, so an answer means that it was asked by an address of the underlay.
fn pods_reach_the_outside_by_their_nodes_address(fabric: &Fabric) -> Result<()> {
    for pod in &fabric.pods {
        for family in Family::ALL {
            let ip = pod.ip(family)?.to_string();
            let route = fabric.machines.lab.underlay().machine.exec(&["ip", "route", "get", &ip])?;
            ensure!(
                !route.success(),
                "the underlay has a route to pods, so an answer proves nothing: {}",
                route.stdout
            );
            pod.reaches(addresses::gateway(family))?;
        }
    }
    Ok(())
}

/// IPv4 alone has them, and all of these kernels do: they came with Linux 5.3.
fn routes_go_by_nexthop_objects(vm: &Vm) -> Result<()> {
    for (family, mark) in [("-4", "nhid"), ("-6", "via")] {
        let routes = vm.run(&format!("ip {family} route show proto 250"))?;
        let fit = routes.lines().filter(|line| line.contains(mark)).count();
        ensure!(fit == 2, "two peers, so two routes with {mark} on {}:\n{routes}", vm.name);
    }
    Ok(())
}

/// Attacks 1 to 4 on the first of a machine's pods: a stranger's packet that has the right VNI and MAC address, one that a pod
/// of the machine makes, a peer's that has somebody else's source, and a pod's under another address. Beside them what a peer
/// and a pod may send, which gets through.
pub fn forged_packets_are_dropped_and_counted(fabric: &Fabric, pods: &[VmPod]) -> Result<()> {
    let (pod, neighbour) = (&pods[0], &pods[1]);
    let rule = format!("udp dport {COUNTED_PORT} counter");
    let hook = "type filter hook input priority -300;";
    let script = format!(
        "nft -f - <<END\ntable inet seen\ndelete table inet seen\n\
         table inet seen {{ chain in {{ {hook}\n{rule}\n}}\n}}\nEND"
    );
    ensure!(pod.exec(&script)?.code == 0, "the pod on {} takes no rules", pod.vm.name);
    let peer = &fabric.outside;
    let (stranger, peer_node) = (fabric.machines.lab.underlay().machine.network()?, peer.node.network()?);
    for (family, device) in [(Family::V4, "fabric.1"), (Family::V6, "fabric6.1")] {
        let (node, target) = (pod.vm.underlay_ip(family), SocketAddr::new(pod.ip(family)?, COUNTED_PORT));
        let vtep = pod.vm.run(&format!("cat /sys/class/net/{device}/address"))?.trim().parse()?;
        let of_peer = Forged { vtep, vni: 1, source: peer.ip(family)?, size: 100 };
        let other: IpAddr = if target.is_ipv4() { "10.244.255.9".parse()? } else { "fd00:10:244:ffff::9".parse()? };
        let of_nobody = Forged { source: other, ..of_peer.clone() };
        let seen = || -> Result<u64> { count(&pod.exec("nft list chain inet seen in")?.stdout) };

        let before = seen()?;
        for _ in 0..3 {
            of_peer.send(&stranger, node, target)?;
            of_nobody.send(&peer_node, node, target)?;
        }
        neighbour.send_udp(None, SocketAddr::new(node, VXLAN_PORT), &of_peer.packet(target)?)?;
        neighbour.send_udp(Some(other), target, b"as nobody")?;
        of_peer.send(&peer_node, node, target)?;
        neighbour.send_udp(None, target, b"as itself")?;
        // What was sent later has arrived, so what was sent before would have.
        peer.run(&["ping", "-q", "-c2", "-i0.5", "-W10", &target.ip().to_string()])?;
        let got = seen()? - before;
        ensure!(
            got == 2,
            "what the peer and the pod may send is to arrive alone, over {family:?} on {}: {got} packets have",
            pod.vm.name
        );
    }
    let rules = pod.vm.run("nft list table inet fabric; nft list table bridge fabric")?;
    for reason in ["from no peer", "source is not in the peer's subnet", "does not speak VXLAN", "claims an address"] {
        let counted = rules.lines().any(|rule| rule.contains(reason) && !rule.contains("packets 0 "));
        ensure!(counted, "nothing is counted as {reason:?} on {}:\n{rules}", pod.vm.name);
    }
    Ok(())
}

/// The packets of the only counter in a chain.
fn count(chain: &str) -> Result<u64> {
    let words: Vec<&str> = chain.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "packets");
    let count = at.and_then(|at| words.get(at + 1)).and_then(|count| count.parse().ok());
    count.ok_or_else(|| anyhow::anyhow!("no counter in {chain}"))
}

/// Neither the tables of routing nor those of the packet filter, by what the kernel tells iproute2 and nft.
fn a_restart_writes_nothing(vm: &Vm) -> Result<()> {
    vm.run(
        "ip monitor link address route neigh nexthop >/run/heard.ip 2>&1 & echo $! >/run/heard.pids\n\
         nft monitor >/run/heard.nft 2>&1 & echo $! >>/run/heard.pids\n\
         ip link add heard type dummy 2>/dev/null || ip link add heard type bridge\n\
         nft add table ip heard\n\
         until grep -q heard /run/heard.ip && grep -q heard /run/heard.nft; do sleep 0.2; done\n\
         ip link del heard; nft delete table ip heard",
    )?;
    vm.end_fabricd("TERM")?;
    vm.start_fabricd("")?;
    vm.wait_ready()?;
    let heard =
        vm.run("kill $(cat /run/heard.pids); grep -hE 'fabric|proto 250' /run/heard.ip /run/heard.nft || true")?;
    ensure!(heard.is_empty(), "a restart on {} wrote:\n{heard}", vm.name);
    Ok(())
}

fn rules_that_are_deleted_come_back(vm: &Vm) -> Result<()> {
    vm.run(
        "nft delete table inet fabric\n\
         end=$(($(date +%s) + 60))\n\
         until nft list table inet fabric 2>/dev/null | grep -q 'from no peer'; do\n\
             [ $(date +%s) -lt $end ]; sleep 0.2\n\
         done",
    )?;
    Ok(())
}

/// What was promised before the power went holds after it: this is the only real boot id in the tests.
fn a_power_off_keeps_the_subnet_under_another_boot_id(mut fabric: Fabric) -> Result<()> {
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let before: Vec<_> = fabric
        .vms
        .iter()
        .map(|vm| Ok((vm.run(boot_id)?, vm.status()?["lease"]["subnets"].clone())))
        .collect::<Result<_>>()?;
    for vm in &fabric.vms {
        vm.power_off()?;
        vm.boot()?;
        vm.start_fabricd("")?;
    }
    fabric.pods.clear();
    for (vm, (boot, subnets)) in fabric.vms.iter().zip(before) {
        vm.wait_ready()?;
        ensure!(vm.run(boot_id)? != boot, "{} has the boot id of before", vm.name);
        ensure!(vm.status()?["lease"]["subnets"] == subnets, "{} had {subnets}: {}", vm.name, vm.status()?["lease"]);
        // The addresses of pods that died with the machine are free again.
        fabric.pods.push(vm.add_pod("standard", Plugin::Bridge)?);
        fabric.pods.push(vm.add_pod("ours", Plugin::FabricBridge)?);
    }
    pods_reach_each_other(&fabric)
}
