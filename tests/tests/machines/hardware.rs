//! What happens to a machine's hardware, and what else its kernel does.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use fabric_core::model::Family;
use fabric_tests::lab::{Families, Lab, wait_until};
use fabric_tests::machines::{Machines, Plugin, Spec, Vm, VmPod};
use serde_json::Value;

/// What a machine may take to see a change, and to act on it.
const SOON: Duration = Duration::from_secs(180);

/// Five pings a second from a pod, each answer a line.
struct Pings<'a>(&'a Vm);

impl<'a> Pings<'a> {
    fn start(vm: &'a Vm, pod: &VmPod, to: IpAddr) -> Result<Self> {
        pod.exec(&format!("ping -i 0.2 -W 10 {to} >/run/pings 2>&1 </dev/null & echo $! >/run/pings.pid"))?;
        Ok(Self(vm))
    }

    /// The numbers of those that were answered.
    fn answered(&self) -> Result<Vec<u32>> {
        let shown = self.0.run("cat /run/pings")?;
        let number = |line: &str| line.split_once("seq=")?.1.split(' ').next()?.parse().ok();
        Ok(shown.lines().filter_map(number).collect())
    }

    /// Waits for so many answers more.
    fn go_on(&self, more: usize) -> Result<()> {
        let before = self.answered()?.len();
        wait_until("pings are answered", SOON, || {
            let now = self.answered()?.len();
            ensure!(now >= before + more, "{} more", now - before);
            Ok(())
        })
    }

    /// Ends it. What was lost was lost at one moment, and is counted.
    fn lost_at_most_once(self) -> Result<()> {
        self.0.run("kill -INT $(cat /run/pings.pid)")?;
        let answered = self.answered()?;
        let gaps: Vec<u32> =
            answered.windows(2).map(|two| two[1].saturating_sub(two[0] + 1)).filter(|gap| *gap > 0).collect();
        println!("{} pings were answered; lost one after the other: {gaps:?}", answered.len());
        ensure!(gaps.len() <= 1, "lost at {} moments: {answered:?}", gaps.len());
        Ok(())
    }
}

#[test]
fn a_network_interface_that_is_replaced_is_used_again() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(1).families(Families::Dual))?;
    let vm = machines.add(&[Spec::kernel("newest")])?.remove(0);
    vm.start_fabricd("")?;
    vm.wait_ready()?;
    let outside = machines.lab.node("node-1")?.add_pod("outside")?;
    let pod = vm.add_pod("a", Plugin::Bridge)?;
    pod.reaches(outside.ip(Family::V4)?)?;

    vm.unplug_nic(0)?;
    let told = wait_until("not ready without a network interface", SOON, || {
        let status = vm.status()?;
        ensure!(status["ready"] == false, "it is ready");
        Ok(status["reason"].as_str().unwrap_or_default().to_owned())
    })?;
    ensure!(told.contains("interface"), "the interface is not named: {told}");
    vm.plug_nic(0)?;
    let (v4, v6) = (vm.underlay_ip(Family::V4), vm.underlay_ip(Family::V6));
    vm.run(&format!(
        "until [ -e /sys/class/net/eth0 ]; do sleep 0.2; done\n\
         ip address add {v4}/16 dev eth0; ip address add {v6}/64 dev eth0 nodad; ip link set eth0 up\n\
         ip route add default via 10.99.0.1; ip -6 route add default via fd00:99::1"
    ))?;
    vm.wait_ready()?;
    pod.reaches(outside.ip(Family::V4)?)?;
    pod.reaches(outside.ip(Family::V6)?)?;
    machines.have_passed()
}

#[test]
fn a_vlan_on_a_bond_fails_over_and_pods_reach_each_other_again() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(0).families(Families::V4))?;
    let vms = machines.add(&[Spec { nics: 2, ..Spec::kernel("6.12") }, Spec::kernel("newest")])?;
    let (bonded, plain) = (&vms[0], &vms[1]);
    let vlan = |vm: &Vm, below: &str| {
        let ip = vm.underlay_ip(Family::V4).to_string().replace("10.99.0.", "198.51.100.");
        format!(
            "modprobe 8021q; ip link add link {below} name {below}.100 type vlan id 100\n\
             ip link set {below} up; ip link set {below}.100 up; ip address add {ip}/24 dev {below}.100"
        )
    };
    bonded.run(
        "modprobe bonding max_bonds=0\n\
         ip link add bond0 type bond mode active-backup miimon 100\n\
         address=$(ip -o -4 address show dev eth0 | sed 's/.*inet \\([^ ]*\\).*/\\1/')\n\
         for nic in eth0 eth1; do ip link set $nic down; ip link set $nic master bond0; done\n\
         ip link set bond0 up; ip address flush dev eth0; ip address add $address dev bond0\n\
         ip route add default via 10.99.0.1",
    )?;
    bonded.run(&vlan(bonded, "bond0"))?;
    plain.run(&vlan(plain, "eth0"))?;
    bonded.start_fabricd("--iface bond0.100")?;
    plain.start_fabricd("--iface eth0.100")?;
    let mut pods = vec![];
    for vm in [bonded, plain] {
        vm.wait_ready()?;
        pods.push(vm.add_pod("a", Plugin::Bridge)?);
    }
    pods[0].reaches(pods[1].ip(Family::V4)?)?;
    let active = || bonded.run("cat /sys/class/net/bond0/bonding/active_slave");
    let before = active()?;
    let pings = Pings::start(bonded, &pods[0], pods[1].ip(Family::V4)?)?;
    pings.go_on(10)?;
    bonded.set_cable(before.trim().trim_start_matches("eth").parse()?, false)?;
    wait_until("the bond uses its other cable", SOON, || {
        ensure!(active()? != before, "it uses {before}");
        Ok(())
    })?;
    pings.go_on(20)?;
    pings.lost_at_most_once()?;
    pods[0].reaches(pods[1].ip(Family::V4)?)?;
    pods[1].reaches(pods[0].ip(Family::V4)?)?;
    machines.have_passed()
}

#[test]
fn loss_and_delay_of_the_underlay_are_told() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(1).families(Families::Dual))?;
    let vm = machines.add(&[Spec::kernel("6.12")])?.remove(0);
    vm.start_fabricd("")?;
    vm.wait_ready()?;
    vm.run("modprobe sch_netem; tc qdisc add dev eth0 root netem delay 60ms 10ms loss 30% reorder 20%")?;
    let mesh = wait_until("the mesh tells of the loss", SOON, || {
        let mesh = vm.exec("fabricctl mesh")?.stdout;
        ensure!(mesh.contains("lossy"), "{mesh}");
        Ok(mesh)
    })?;
    println!("{mesh}");
    let doctor = vm.exec("fabricctl doctor")?.stdout;
    ensure!(!doctor.contains("fsync"), "etcd's disk is blamed for what the underlay loses:\n{doctor}");
    vm.run("tc qdisc del dev eth0 root")?;
    // 64 probes, two each 5 s, forget what was lost.
    wait_until("the mesh is fine again", 2 * SOON, || {
        let mesh = vm.exec("fabricctl mesh")?.stdout;
        ensure!(!mesh.contains("lossy"), "{mesh}");
        Ok(())
    })?;
    machines.have_passed()
}

#[test]
fn ipvs_beside_the_fabric_changes_nothing() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(1).families(Families::Dual))?;
    let vm = machines.add(&[Spec::kernel("6.1")])?.remove(0);
    vm.run("modprobe -a ip_vs ip_vs_rr br_netfilter wireguard esp4 dummy")?;
    vm.start_fabricd("")?;
    vm.wait_ready()?;
    let outside = machines.lab.node("node-1")?.add_pod("outside")?;
    vm.add_pod("a", Plugin::Bridge)?.reaches(outside.ip(Family::V4)?)?;
    machines.have_passed()
}

/// A network namespace can neither load a module nor change the size of the connection tracking table.
#[test]
fn fixes_that_only_a_host_can_run_clear_what_doctor_printed_them_for() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(0).families(Families::V4).masquerade(true))?;
    let vm = machines.add(&[Spec::kernel("6.1")])?.remove(0);
    vm.start_fabricd("")?;
    vm.wait_ready()?;
    vm.run("modprobe -r br_netfilter")?;
    wait_for_check(&vm, "br-netfilter", "warning")?;
    vm.run(&command_of(&vm, "br-netfilter", "modprobe ")?)?;
    wait_for_check(&vm, "br-netfilter", "ok")?;

    wait_for_check(&vm, "conntrack", "ok")?;
    vm.run(
        "ping -c 1 -W 5 10.99.0.1 || true
         cat /proc/sys/net/netfilter/nf_conntrack_count >/proc/sys/net/netfilter/nf_conntrack_max",
    )?;
    wait_for_check(&vm, "conntrack", "failed")?;
    vm.run(&command_of(&vm, "conntrack", "sysctl ")?)?;
    wait_for_check(&vm, "conntrack", "ok")?;
    machines.have_passed()
}

fn wait_for_check(vm: &Vm, id: &str, result: &str) -> Result<()> {
    wait_until(&format!("{id} is {result}"), SOON, || {
        let check = check(vm, id)?;
        ensure!(check["result"] == result, "{check:#}");
        Ok(())
    })
}

fn check(vm: &Vm, id: &str) -> Result<Value> {
    let checks = vm.exec("fabricctl doctor -o json")?.stdout;
    let mut checks = checks.lines().map(serde_json::from_str::<Value>);
    checks.find_map(|check| check.ok().filter(|check| check["id"] == id)).with_context(|| format!("no check {id}"))
}

/// The line of a check's fix that begins so.
fn command_of(vm: &Vm, id: &str, program: &str) -> Result<String> {
    let check = check(vm, id)?;
    let fix = check["fix"].as_str().unwrap_or_default();
    fix.lines().find(|line| line.starts_with(program)).map(str::to_owned).with_context(|| format!("{check:#}"))
}
