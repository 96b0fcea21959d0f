//! What Vagrant's users get, without Vagrant: three Debians with systemd, the package, and `deploy/vagrant/provision`.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use fabric_tests::lab::{Families, Lab, wait_until};
use fabric_tests::machines::debian::IMAGE;
use fabric_tests::machines::{Machines, Spec, Vm};
use serde_json::Value;

/// What a machine may take for anything but a boot: some seconds, and minutes where others compile.
const PATIENCE: Duration = Duration::from_secs(600);
const ETCD: &str = "192.168.56.11";
/// The NAT's own address, outside of all networks of the fabric.
const OUTSIDE: &str = "10.0.2.2";
/// It exits by another code where something needs attention, as a peer that starts.
const STATUS: &str = "fabricctl status || true";

#[test]
fn vagrants_nodes_are_provisioned_and_run_pods() -> Result<()> {
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
    each(&nodes, |node| node.run(&format!("ctr image import /media/busybox.tar >/dev/null; {}", run_pod())).map(drop))?;
    pods_reach_each_other_and_the_outside(&nodes)?;
    nodes[0].vagrantfiles_container_pings(&nodes[1].pod_ip()?)?;
    shown("pods of containerd reach each other, and the outside");
    each(&nodes, Node::is_as_it_should_be)?;
    shown("nothing has failed, and networkd leaves our devices alone");
    Ok(())
}

/// Detached, so that it runs until it is killed.
fn run_pod() -> String {
    format!("ctr run --detach --cni {IMAGE} pod")
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
