//! Modules that a kernel lacks, one after another: each is named by status and doctor, and the command that is told for it
//! helps as soon as the module is there. It is kept away by a modprobe that finds nothing, as where it is in a package that
//! isn't installed.

use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use fabric_tests::fake_api::FakeApi;
use fabric_tests::kubernetes::Nodes as _;
use fabric_tests::lab::{Families, Lab, wait_until};
use fabric_tests::machines::{Machines, Plugin, Spec, Vm};
use fabric_tests::policies::{NAMESPACES, namespace, pod, pods_of, policies_of, policy};
use fabric_tests::services::{SERVICES, V1, service, slice, slices_of};
use serde_json::{Value, json};

/// What a machine may take to load modules, and for a pass.
const SOON: Duration = Duration::from_secs(180);

/// Every module that may be there because of us, by what `/proc/modules` calls it.
const OURS: &str = "vxlan|ip6_udp_tunnel|udp_tunnel|bridge|br_netfilter|stp|llc|veth|nf_tables|nft_[a-z_0-9]+|nf_nat|\
                    nf_conntrack[a-z_]*|nf_reject_ipv[46]|nfnetlink_log|sch_ingress|cls_bpf";

/// Modules without which a node isn't ready, and the one by which they are named: itself, or what takes it along.
const OF_THE_NODE: [(&str, &str); 8] = [
    ("vxlan", "vxlan"),
    ("udp_tunnel", "vxlan"),
    ("nf_tables", "nf_tables"),
    ("nft_ct", "nft_ct"),
    ("nft_chain_nat", "nft_chain_nat"),
    ("nft_masq", "nft_masq"),
    ("nft_meta_bridge", "nft_meta_bridge"),
    ("bridge", "nft_meta_bridge"),
];

/// Modules without which Services or policies aren't applied, and the check that fails.
const OF_KUBERNETES: [(&str, &str); 5] = [
    ("nft_nat", "services"),
    ("nft_numgen", "services"),
    ("nft_hash", "services"),
    ("nft_reject_inet", "services"),
    ("nft_fib_inet", "network-policies"),
];

/// Modules by which dropped packets are shown.
const OF_DROPS: [&str; 3] = ["nft_log", "nft_limit", "nfnetlink_log"];

#[test]
fn every_module_of_a_node_that_is_missing_is_named_until_it_is_there() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(0).families(Families::V4).masquerade(true))?;
    let vms = machines.add(&["5.10", "6.1", "newest"].map(Spec::kernel))?;
    let began = Instant::now();
    thread::scope(|scope| {
        let running: Vec<_> = vms.iter().map(|vm| scope.spawn(move || those_of_a_node(vm, began))).collect();
        running.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread has panicked"))?)
    })?;
    machines.have_passed()
}

/// The oldest kernel has one that the others don't: it is enough for it.
fn those_of_a_node(vm: &Arc<Vm>, began: Instant) -> Result<()> {
    let all = if vm.spec.kernel == "5.10" { &[("nft_counter", "nft_counter")][..] } else { &OF_THE_NODE };
    for &(module, named) in all {
        is_kept_away(vm, module)?;
        vm.start_fabricd("")?;
        node_names_it(vm, named).with_context(|| format!("without {module} on {}", vm.name))?;
        println!("{:>4} s  {}: without {module}", began.elapsed().as_secs(), vm.name);
    }
    is_kept_away(vm, "veth")?;
    vm.start_fabricd("")?;
    vm.wait_ready()?;
    for plugin in [Plugin::Bridge, Plugin::FabricBridge] {
        let added = vm.add_pod("early", plugin).map(drop).map_err(|error| format!("{error:#}"));
        let told = added.err().unwrap_or_default();
        ensure!(told.contains("veth"), "{plugin:?} does not tell of veth on {}: {told}", vm.name);
        vm.run("ip netns del early")?;
    }
    Ok(())
}

#[test]
fn every_module_of_services_policies_and_the_fast_path_is_named_until_it_is_there() -> Result<()> {
    let mut machines = Machines::start(Lab::builder().nodes(0).families(Families::V4).masquerade(true))?;
    let api = machines.lab.underlay().machine.network()?.run(|| FakeApi::start(([10, 99, 0, 2], 6443).into()))?;
    let kubeconfig = fs::read_to_string(api.kubeconfig(machines.lab.dir())?)?;
    let vm = machines.add(&[Spec::kernel("6.1")])?.remove(0);
    fill(&api, &vm.name);
    vm.run(&format!("cat >/run/kubeconfig <<'END'\n{kubeconfig}\nEND"))?;
    let began = Instant::now();
    let shown = |module: &str| println!("{:>4} s  {}: without {module}", began.elapsed().as_secs(), vm.name);
    let kubernetes = "--services on --network-policy on --policy-own-node allow --kubeconfig /run/kubeconfig";
    for (module, section) in OF_KUBERNETES {
        is_kept_away(&vm, module)?;
        vm.start_fabricd(kubernetes)?;
        section_names_it(&vm, module, section).with_context(|| format!("without {module}"))?;
        shown(module);
    }
    is_kept_away(&vm, "nf_conntrack_netlink")?;
    vm.start_fabricd(kubernetes)?;
    wait_until("nf_conntrack_netlink is named", SOON, || {
        let checks = doctor(&vm)?;
        let named = |check: &&Value| check.to_string().contains("modprobe nf_conntrack_netlink");
        ensure!(checks.iter().any(|check| check["result"] == "warning" && named(&check)), "{checks:?}");
        Ok(())
    })?;
    shown("nf_conntrack_netlink");
    for module in OF_DROPS {
        is_kept_away(&vm, module)?;
        vm.start_fabricd(kubernetes)?;
        vm.wait_ready()?;
        wait_until(&format!("{module} is named"), SOON, || {
            let told = vm.exec("timeout 10 fabricctl drops --follow")?;
            ensure!(told.code != 0 && told.stderr.contains("modprobe") && told.stderr.contains(module), "{told:?}");
            Ok(())
        })?;
        shown(module);
    }
    for module in ["sch_ingress", "cls_bpf"] {
        is_kept_away(&vm, module)?;
        vm.start_fabricd("--fast-path=on")?;
        vm.wait_ready()?;
        vm.add_pod("fast", Plugin::Bridge)?;
        wait_until(&format!("{module} is named"), SOON, || {
            let warned = vm.status()?["warnings"].to_string();
            ensure!(warned.contains("modprobe -a sch_ingress cls_bpf"), "{warned}");
            Ok(())
        })?;
        shown(module);
    }
    machines.have_passed()
}

/// Services that take each way to choose an endpoint, one without endpoints, and a policy.
fn fill(api: &FakeApi, node: &str) {
    api.add_node(node, &[]);
    let endpoints = [("10.244.99.2", "elsewhere"), ("10.244.99.3", "elsewhere")];
    for (number, name) in (10..).zip(["random", "hashed", "nobody"]) {
        let mut object = service(name, &[&format!("10.96.0.{number}")], &json!({}));
        if name == "hashed" {
            object["metadata"]["annotations"] = json!({"fabric.io/lb-algorithm": "source-hash"});
        }
        api.create(SERVICES, object);
        if name != "nobody" {
            api.create(&slices_of(V1), slice(name, name, &endpoints));
        }
    }
    api.create(NAMESPACES, namespace("default", &json!({})));
    api.create(&pods_of("default"), pod("default", "web", &["10.244.99.9"], &json!({})));
    api.create(
        &policies_of("default"),
        policy("default", "closed", &json!({"podSelector": {}, "policyTypes": ["Ingress"]})),
    );
}

/// Ends fabricd, takes away what it and pods have made, unloads every module, and keeps one away.
fn is_kept_away(vm: &Vm, module: &str) -> Result<()> {
    vm.run(&format!(
        "if [ -e /run/fabricd.pid ]; then
             pid=$(cat /run/fabricd.pid); kill $pid; while kill -0 $pid 2>/dev/null; do sleep 0.1; done; rm /run/fabricd.pid
             fabricd --cleanup >/run/cleaned 2>&1
         fi
         for space in $(ip netns list | cut -d' ' -f1); do ip netns del $space; done
         ! [ -e /sys/class/net/cni0 ] || ip link del cni0
         ! grep -q '^nf_tables ' /proc/modules || nft flush ruleset
         there() {{ cut -d' ' -f1 /proc/modules | grep -xE '{OURS}'; }}
         tries=0
         while there >/run/there; do
             for one in $(cat /run/there); do rmmod $one 2>/dev/null || true; done
             tries=$((tries + 1)); [ $tries -lt 300 ]
         done
         mkdir -p /etc/modprobe.d; echo 'install {module} false' >/etc/modprobe.d/missing.conf
         modprobe -qa $(grep -v '^#' /usr/lib/modules-load.d/fabricd.conf) || true"
    ))?;
    Ok(())
}

/// The node isn't ready and says so; doctor tells nothing that follows from it as a cause of its own; and what is told is
/// run, once the module can be found.
fn node_names_it(vm: &Vm, named: &str) -> Result<()> {
    let told = wait_until(&format!("{named} is named"), SOON, || {
        let status = vm.status()?;
        let reason = status["reason"].as_str().unwrap_or_default().to_owned();
        let command = reason.split_once("Load it with: ").map(|(_, command)| command.to_owned());
        let command = command.filter(|command| command.split(' ').any(|word| word == named));
        ensure!(status["ready"] == false, "it is ready");
        command.with_context(|| reason.clone())
    })?;
    for check in doctor(vm)?.iter().filter(|check| check["result"] == "failed") {
        match check["id"].as_str().unwrap_or_default() {
            "ready" => {
                let evidence = check["evidence"].as_str().unwrap_or_default();
                ensure!(evidence.ends_with(&told), "doctor says another reason: {check}");
            }
            // What isn't written is counted, and says that it waits; the other machines lack a module as well.
            "kernel-state" | "peers" | "mesh" => {}
            _ => bail!("a consequence is told as a cause: {check}"),
        }
    }
    vm.run(&format!("rm /etc/modprobe.d/missing.conf\n{told}"))?;
    vm.wait_ready()
}

/// What Services or policies wait for is told by their check.
fn section_names_it(vm: &Vm, module: &str, section: &str) -> Result<()> {
    let told = wait_until(&format!("{module} is named"), SOON, || {
        let checks = doctor(vm)?;
        let check = checks.iter().find(|check| check["id"] == section).context("no such check")?;
        let evidence = check["evidence"].as_str().unwrap_or_default();
        let command = evidence.split_once("Load it with: ").map(|(_, command)| command.to_owned());
        let command = command.with_context(|| check.to_string())?;
        ensure!(check["result"] == "failed" && command.contains(module), "{check}");
        Ok(command)
    })?;
    vm.run(&format!("rm /etc/modprobe.d/missing.conf\n{told}"))?;
    vm.wait_ready()
}

fn doctor(vm: &Vm) -> Result<Vec<Value>> {
    let told = vm.exec("fabricctl doctor -o json")?;
    told.stdout.lines().map(|line| serde_json::from_str(line).with_context(|| format!("{told:?}"))).collect()
}
