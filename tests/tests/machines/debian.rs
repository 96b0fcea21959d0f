//! What Vagrant's users get, without Vagrant: three Debians with systemd, the package, and `deploy/vagrant/provision`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fabric_tests::lab::{Families, Lab, wait_until};
use fabric_tests::machines::debian::{IMAGE, UPGRADE};
use fabric_tests::machines::{Machines, Spec, Vm};
use serde_json::Value;

/// What a machine may take for anything but a boot: some seconds, and minutes where others compile.
const PATIENCE: Duration = Duration::from_secs(600);
const ETCD: &str = "192.168.56.11";
/// The NAT's own address, outside of all networks of the fabric.
const OUTSIDE: &str = "10.0.2.2";
/// It exits by another code where something needs attention, as a peer that starts.
const STATUS: &str = "fabricctl status || true";
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";

#[test]
fn vagrants_nodes_run_pods_reboot_upgrade_and_remove_the_package() -> Result<()> {
    let began = Instant::now();
    let shown = |what: &str| println!("{:>4} s  {what}", began.elapsed().as_secs());
    let mut machines = Machines::start(Lab::builder().nodes(0).families(Families::V4))?;
    let nodes = machines.add(&[Spec::debian(), Spec::debian(), Spec::debian()])?;
    shown("three Debians have booted");
    let nodes: Vec<Node> = (1..).zip(nodes).map(|(number, vm)| Node { number, vm }).collect();
    each(&nodes, Node::as_vagrant_makes_it)?;
    // Vagrant takes one after another. Side by side is sooner, and two of them start without etcd.
    each(&nodes, Node::provision)?;
    each(&nodes, Node::is_ready)?;
    shown("all are provisioned, by their addresses on eth1");
    each(&nodes, |node| {
        node.run(&format!("ctr image import /media/busybox.tar >/dev/null; {}", run_pod("pod"))).map(drop)
    })?;
    pods_reach_each_other_and_the_outside(&nodes)?;
    nodes[0].vagrantfiles_container_pings(&nodes[1].pod_ip()?)?;
    shown("pods of containerd reach each other, and the outside");
    each(&nodes, Node::is_as_it_should_be)?;
    shown("nothing has failed, and networkd leaves our devices alone");
    reboots_without_network_and_without_etcd(&nodes)?;
    shown("node-1 has rebooted, node-2 lost its power and booted without network and etcd");
    pods_do_not_notice_an_upgrade(&nodes[2], &nodes[1])?;
    shown("the package is upgraded");
    the_network_outlives_the_package(&nodes[2], &nodes[1])?;
    shown("the package is removed and purged");
    machines.have_passed()
}

/// Detached, so that it runs until it is killed.
fn run_pod(name: &str) -> String {
    format!("ctr run --detach --cni {IMAGE} {name}")
}

/// One of Vagrant's machines.
struct Node {
    number: u8,
    vm: Arc<Vm>,
}

/// Side by side, since each has a processor of its own.
fn each(nodes: &[Node], does: impl Fn(&Node) -> Result<()> + Sync) -> Result<()> {
    let does = &does;
    thread::scope(|scope| {
        let running: Vec<_> = nodes.iter().map(|node| (node, scope.spawn(move || does(node)))).collect();
        running.into_iter().try_for_each(|(node, thread)| {
            let done = thread.join().map_err(|_| anyhow!("a thread has panicked"))?;
            done.with_context(|| format!("node-{}", node.number))
        })
    })
}

impl Node {
    fn address(&self) -> String {
        format!("192.168.56.1{}", self.number)
    }

    fn run(&self, script: &str) -> Result<String> {
        let answer = self.vm.exec_within(script, PATIENCE)?;
        ensure!(answer.code == 0, "`{script}`: exit code {}\n{}{}", answer.code, answer.stdout, answer.stderr);
        Ok(answer.stdout)
    }

    /// With the log of our units.
    fn with_log<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let log = "fabricctl status; journalctl --no-pager --boot --unit fabricd --unit fabric-cni --unit etcd";
            error.context(
                self.vm.exec(&format!("{log} | tail -n 60")).map_or_else(|e| e.to_string(), |told| told.stdout),
            )
        })
    }

    /// Host name, the private network, and the synced folder.
    fn as_vagrant_makes_it(&self) -> Result<()> {
        let (number, address) = (self.number, self.address());
        self.run(&format!(
            "hostnamectl set-hostname node-{number}; echo '127.0.1.1 node-{number}' >>/etc/hosts\n\
             printf '[Match]\\nName=eth1\\n\\n[Network]\\nAddress={address}/24\\n' >/etc/systemd/network/20-eth1.network\n\
             networkctl reload; until ip address show dev eth1 | grep -q {address}; do sleep 0.2; done\n\
             cp -r /media/packages /"
        ))?;
        Ok(())
    }

    fn provision(&self) -> Result<()> {
        let provision = format!("bash /media/provision {} {} {ETCD}", self.number, self.address());
        self.with_log(self.run(&provision).map(drop))
    }

    fn is_ready(&self) -> Result<()> {
        let ready = wait_until("a ready node", PATIENCE, || {
            let status = self.run(STATUS)?;
            ensure!(status.contains("State     ready"), "{status}");
            ensure!(status.contains(&format!(", {} on eth1", self.address())), "not by eth1: {status}");
            // The runtime has something to call from now on.
            self.run("ls /etc/cni/net.d/10-fabric.conflist")
        });
        self.with_log(ready.map(drop))
    }

    fn subnets(&self) -> Result<Value> {
        Ok(self.vm.status()?["lease"]["subnets"].clone())
    }

    fn in_pod(&self, command: &str) -> Result<String> {
        self.run(&format!(
            "nsenter --net --target $(ctr task ls | sed -n 's/^[^ ]* *\\([0-9]*\\) *RUNNING/\\1/p') -- {command}"
        ))
    }

    fn pod_ip(&self) -> Result<String> {
        let shown = self.in_pod("ip -4 -o address show dev eth0")?;
        let address = shown.split_whitespace().find_map(|word| word.strip_suffix("/24"));
        Ok(address.with_context(|| format!("an address in {shown}"))?.to_owned())
    }

    /// By packets of the full size, which may not be cut.
    fn pod_reaches(&self, ip: &str) -> Result<()> {
        let pinged = self.in_pod(&format!("ping -q -M do -s 1422 -i 0.5 -c 3 -W 30 {ip}"))?;
        ensure!(pinged.contains(" 3 received"), "{pinged}");
        Ok(())
    }

    /// As the Vagrantfile says it, without a terminal. Its address is free when it has ended.
    fn vagrantfiles_container_pings(&self, ip: &str) -> Result<()> {
        let addresses = "ls /var/lib/cni/networks/fabric";
        let before = self.run(addresses)?;
        let pinged = self.run(&format!("ctr run --cni --rm {IMAGE} a ping -c 1 -W 30 {ip}"))?;
        ensure!(pinged.contains("1 packets received"), "{pinged}");
        ensure!(
            self.run(&format!("{addresses} | grep -vx last_reserved_ip.0"))?
                == before.replace("last_reserved_ip.0\n", "")
        );
        Ok(())
    }

    /// What systemd, udev and networkd make of our units and devices.
    fn is_as_it_should_be(&self) -> Result<()> {
        let failed = self.run("systemctl --failed --no-legend --plain")?;
        ensure!(failed.is_empty(), "failed: {failed}");
        let told = self.run("journalctl --no-pager --boot --output cat --unit fabricd --unit fabric-cni")?;
        ensure!(!["EROFS", "EACCES", "EPERM", "not permitted"].iter().any(|refused| told.contains(refused)), "{told}");
        let links = self.run("networkctl --no-legend --no-pager")?;
        for name in ["fabric.1", "cni0", "veth"] {
            let mut of_this_name =
                links.lines().filter(|line| line.split_whitespace().any(|word| word.starts_with(name)));
            ensure!(
                of_this_name.next().is_some_and(|link| link.contains("unmanaged")),
                "networkd manages {name}:\n{links}"
            );
        }
        for name in ["fabric.1", "cni0"] {
            let link =
                self.run(&format!("udevadm info --query property /sys/class/net/{name} | grep ID_NET_LINK_FILE"))?;
            ensure!(link.trim().ends_with("/00-fabricd.link"), "udev names and numbers {name} by {link}");
        }
        let checks = self.run("fabricctl doctor -o json || true")?;
        let of_time = |id: &str| ["mesh", "store", "log"].contains(&id); // what others compile meanwhile is theirs
        for check in checks.lines().map(serde_json::from_str::<Value>) {
            let check = check.context(checks.clone())?;
            ensure!(check["result"] != "failed" || of_time(check["id"].as_str().unwrap_or_default()), "{check:#}");
        }
        let restarts = self.run("systemctl show --property NRestarts --value fabricd fabric-cni")?;
        ensure!(restarts == "0\n\n0\n", "our units have ended by themselves: {restarts}");
        let repaired =
            self.run("busybox wget -q -O - http://127.0.0.1:9472/metrics | grep '^fabricd_repairs_total' || true")?;
        ensure!(repaired.is_empty(), "it has repaired what nobody of ours changed: {repaired}");
        Ok(())
    }

    /// After the network, and after the modules, which systemd loads.
    fn has_started_in_order(&self) -> Result<()> {
        let at = |unit: &str, property: &str| -> Result<u64> {
            let shown = self.run(&format!("systemctl show --value --property {property}TimestampMonotonic {unit}"))?;
            shown.trim().parse().with_context(|| format!("when {unit} had its {property}: {shown:?}"))
        };
        let started = at("fabricd.service", "ExecMainStart")?;
        for unit in ["systemd-modules-load.service", "network-online.target"] {
            let active = at(unit, "ActiveEnter")?;
            ensure!(active > 0 && active < started, "fabricd started at {started} us, {unit} at {active} us");
        }
        Ok(())
    }
}

fn pods_reach_each_other_and_the_outside(nodes: &[Node]) -> Result<()> {
    let ips = nodes.iter().map(Node::pod_ip).collect::<Result<Vec<_>>>()?;
    each(nodes, |node| {
        for (number, ip) in (1..).zip(&ips) {
            if number != node.number {
                node.pod_reaches(ip).with_context(|| format!("its pod does not reach node-{number}'s"))?;
            }
        }
        // The NAT knows no route to pods: it answers who asks by the node's address.
        node.in_pod(&format!("ping -q -c 1 -W 30 {OUTSIDE}")).map(drop)
    })
}

/// node-1 has etcd. It is told to reboot; node-2's plug is pulled, and it boots before its cable is in and etcd is there.
fn reboots_without_network_and_without_etcd(nodes: &[Node]) -> Result<()> {
    let (first, second) = (&nodes[0], &nodes[1]);
    let before = [first, second].map(|node| Ok::<_, anyhow::Error>((node.run(BOOT_ID)?, node.subnets()?)));
    // systemd waits 90 s for what doesn't end by SIGTERM, and the first process of a container doesn't.
    first.run("ctr task kill --signal KILL pod; (sleep 1; systemctl reboot) >/dev/null 2>&1 &")?;
    second.vm.power_off()?;
    second.vm.switch_on()?;
    // Before its kernel looks.
    wait_until("QEMU answers", PATIENCE, || second.vm.set_cable(1, false))?;
    first.vm.wait_off()?;
    // The agent answers before anything waits for the network.
    wait_until("node-2 runs commands", PATIENCE, || second.run("systemctl is-active basic.target"))?;
    let states = second.vm.exec("systemctl is-active network-online.target fabricd.service")?.stdout;
    ensure!(states == "inactive\ninactive\n", "without network, network-online.target and fabricd are {states}");

    second.vm.set_cable(1, true)?;
    second.vm.wait_up()?;
    let told = wait_until("node-2 says that there is no etcd", PATIENCE, || {
        let status = second.run(STATUS)?;
        ensure!(status.contains(&format!("cannot reach the store at http://{ETCD}:2379")), "{status}");
        Ok(status)
    });
    second.with_log(told)?;
    first.vm.boot()?;
    for (node, before) in [first, second].into_iter().zip(before) {
        let (boot, subnets) = before?;
        node.is_ready()?;
        ensure!(node.run(BOOT_ID)? != boot, "node-{} has the boot id of before", node.number);
        ensure!(node.subnets()? == subnets, "node-{} had {subnets}: {}", node.number, node.subnets()?);
        node.has_started_in_order()?;
        // The pod died with the boot, and nobody has called DEL: its id can't be used again.
        node.run(&run_pod("another"))?;
    }
    pods_reach_each_other_and_the_outside(nodes)?;
    each(&nodes[..2], Node::is_as_it_should_be)
}

fn pods_do_not_notice_an_upgrade(node: &Node, other: &Node) -> Result<()> {
    let units = "systemctl show --property MainPID --value fabricd fabric-cni";
    let device = "cat /sys/class/net/fabric.1/ifindex /sys/class/net/fabric.1/address";
    let (running, before) = (node.run(units)?, node.run(device)?);
    let ip = other.pod_ip()?;
    node.in_pod(&format!("sh -c 'ping -i 0.5 -W 30 {ip} >/run/pinged 2>&1 & echo $! >/run/ping.pid'"))?;
    node.run("DEBIAN_FRONTEND=noninteractive apt-get install -q=2 -y /media/upgrade/*.deb")?;
    node.is_ready()?;
    let pinged = node.run(
        "kill -INT $(cat /run/ping.pid); until grep -q received /run/pinged; do sleep 0.2; done; cat /run/pinged",
    )?;
    // Those still on their way when ping ended are missing at the end.
    let answered = |line: &str| line.split_once("icmp_seq=")?.1.split(' ').next()?.parse::<usize>().ok();
    let answered: Vec<usize> = pinged.lines().filter_map(answered).collect();
    ensure!(answered.last() == Some(&answered.len()), "lost meanwhile:\n{pinged}");
    let version = node.run("dpkg-query --show --showformat '${Version}' fabricd")?;
    ensure!(version == UPGRADE, "{version}");
    let now = node.run(units)?;
    let (mut then, mut now) = (running.split_whitespace(), now.split_whitespace());
    ensure!(then.clone().count() == 2 && then.all(|pid| now.next().is_some_and(|now| now != pid && now != "0")));
    ensure!(node.run(device)? == before, "fabric.1 was made anew");
    Ok(())
}

fn the_network_outlives_the_package(node: &Node, other: &Node) -> Result<()> {
    let ip = other.pod_ip()?;
    node.run("DEBIAN_FRONTEND=noninteractive apt-get remove -q=2 -y fabricd")?;
    node.run("! pidof fabricd; ls /run/fabric/node.json /etc/fabric/fabricd.toml /var/lib/fabric/lease.state")?;
    node.pod_reaches(&ip)?;
    node.run("DEBIAN_FRONTEND=noninteractive apt-get purge -q=2 -y fabricd")?;
    node.run("! ls -d /etc/fabric /etc/default/fabricd /var/lib/fabric /usr/lib/fabricd 2>/dev/null")?;
    let failed =
        node.run("systemctl --failed --no-legend --plain; systemctl list-unit-files --no-legend 'fabric*' || true")?;
    ensure!(failed.is_empty(), "the package leaves units: {failed}");
    node.pod_reaches(&ip)
}
