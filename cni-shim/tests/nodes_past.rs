//! What earlier pods leave on a node, and what is made of it: freed, re-addressed, or let alone.

mod common;

use std::fs;

use common::{Host, eventually, ip, on_a_host_with_each_delegate, run};
use serde_json::json;

const NETWORK: &str = "10.244.0.0/16";

fn ready_with(host: &Host, subnet: &str) {
    host.ready(Some((NETWORK, subnet)), None);
}

#[test]
fn first_pod_after_a_reboot_finds_all_addresses_free_whatever_state_files_survived() {
    on_a_host_with_each_delegate(|host| {
        ready_with(host, "10.244.3.0/29");
        let pods = ["pod-1", "pod-2", "pod-3", "pod-4", "pod-5"];
        pods.iter().for_each(|pod| drop(host.add(pod)));
        let state = |pod: &str| host.path(&format!("state/fabric/{pod}@eth0.json"));
        fs::write(state("pod-2"), "").expect("a file");
        fs::write(state("pod-3"), "{\"containerID\":\"pod-3\",\"ifn").expect("a file");
        fs::remove_file(state("pod-4")).expect("removed");
        // As a kill between creating and writing leaves it, or a power cut.
        fs::write(host.path("addresses/fabric/10.244.3.6"), "").expect("a file");
        assert!(!host.addresses().is_empty());
        host.reboot(&pods);

        for number in 11..=15 {
            host.add(&format!("pod-{number}"));
        }
        assert_eq!(host.addresses().len(), 5);
    });
}

#[test]
fn address_and_id_are_free_after_a_reboot_though_another_namespace_has_the_path_of_its_pods() {
    on_a_host_with_each_delegate(|host| {
        ready_with(host, "10.244.3.0/29");
        let pods = ["pod-1", "pod-2", "pod-3", "pod-4", "pod-5"];
        for pod in pods {
            host.add(pod);
            let file = host.path(&format!("state/fabric/{pod}@eth0.json"));
            let (now, before) = (run("cat /proc/sys/kernel/random/boot_id"), run("cat /proc/sys/kernel/random/uuid"));
            let saved = fs::read_to_string(&file).expect("saved");
            assert!(saved.contains(now.trim()), "{saved}");
            fs::write(&file, saved.replace(now.trim(), before.trim())).expect("written");
        }
        host.reboot(&pods);
        pods.iter().skip(1).for_each(|pod| drop(run(&format!("ip netns add {pod}"))));
        host.add("pod-6");
        // As `ctr` does with an ID that a person gave.
        host.add("pod-1");
    });
}

#[test]
fn addresses_of_dead_pods_are_freed_when_they_are_needed_while_others_live() {
    on_a_host_with_each_delegate(|host| {
        ready_with(host, "10.244.3.0/29");
        for number in 1..=5 {
            host.add(&format!("pod-{number}"));
        }
        // Its runtime never says DEL.
        run("ip netns del pod-3");
        common::wait_until("its veth is gone", || run("ip -o link show type veth").lines().count() == 4);
        let result = host.add("pod-6");
        assert_eq!(result["ips"][0]["address"], "10.244.3.4/29");
        eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.3.4");
    });
}

#[test]
fn nothing_of_a_living_pod_is_swept_even_if_its_namespace_has_no_name_or_its_state_is_lost() {
    on_a_host_with_each_delegate(|host| {
        ready_with(host, "10.244.3.0/29");
        for number in 1..=5 {
            host.add(&format!("pod-{number}"));
        }
        // A process keeps the namespace alive whose file is gone.
        let mut inside = std::process::Command::new("ip")
            .args(["netns", "exec", "pod-1", "sleep", "1000"])
            .spawn()
            .expect("a process in the pod");
        common::wait_until("it is inside", || run("ip netns pids pod-1").lines().count() == 1);
        run("ip netns del pod-1");
        fs::remove_file(host.path("state/fabric/pod-2@eth0.json")).expect("removed");

        run("ip netns add pod-6");
        let told = host.ask("ADD", "pod-6", &host.conf("1.0.0")).expect_err("no address is left");
        assert!(told["msg"].as_str().expect("msg").contains("no IP addresses available"), "{told}");
        assert_eq!(host.addresses().len(), 5);
        inside.kill().expect("killed");
        inside.wait().expect("ended");
    });
}

#[test]
fn gc_frees_what_the_runtime_does_not_name_whatever_is_left_to_tell_of_it() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        for number in 1..=5 {
            host.add(&format!("pod-{number}"));
        }
        let state = |pod: &str| host.path(&format!("state/fabric/{pod}@eth0.json"));
        fs::remove_file(state("pod-2")).expect("removed");
        fs::write(state("pod-3"), "").expect("a file");
        fs::write(state("pod-4"), "{\"containerID\":\"pod-4\",\"ifn").expect("a file");
        run("ip netns del pod-5");
        // The daemon is dead, and the node was booted since it last wrote.
        fs::remove_file(host.path("node.json")).expect("removed");
        let mut conf = host.conf("1.1.0");
        conf["cni.dev/valid-attachments"] = json!([{"containerID": "pod-1", "ifname": "eth0"}]);
        host.ask("GC", "", &conf).expect("GC succeeds");
        let mut left = host.addresses();
        left.sort();
        assert_eq!(left, ["10.244.3.2", "fd00:10:244:3::2"]);
        assert!(!state("pod-3").exists() && !state("pod-4").exists() && !state("pod-5").exists());
        eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.3.1");
    });
}

#[test]
fn other_networks_addresses_are_nobodys_to_sweep() {
    on_a_host_with_each_delegate(|host| {
        ready_with(host, "10.244.3.0/24");
        let foreign = host.path("addresses/other");
        fs::create_dir_all(&foreign).expect("a folder");
        fs::write(foreign.join("192.0.2.7"), "c1\r\neth0").expect("a file");
        host.add("pod-1");
        host.reboot(&["pod-1"]);
        host.add("pod-2");
        assert!(foreign.join("192.0.2.7").exists());
    });
}

#[test]
fn bridge_of_an_earlier_subnet_is_readdressed_when_no_pod_uses_it() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some((NETWORK, "10.244.9.0/24")), Some(("fd00:10:244::/48", "fd00:10:244:9::/64")));
        host.add("pod-1");
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        run("ip address add 2001:db8::1/64 dev cni0");

        host.ready_on_both();
        host.add("pod-2");
        let addresses = ip("address show dev cni0 scope global");
        let addresses = addresses[0]["addr_info"].as_array().expect("addresses").clone();
        let mut addresses: Vec<_> = addresses.iter().filter_map(|a| a["local"].as_str()).collect();
        addresses.sort_unstable();
        assert_eq!(addresses, ["10.244.3.1", "2001:db8::1", "fd00:10:244:3::1"]);
        eventually("ip netns exec pod-2 ping -c 1 -W 2 10.244.3.1");
    });
}

#[test]
fn bridge_of_an_earlier_subnet_that_pods_use_is_left_alone_and_the_pods_are_named() {
    on_a_host_with_each_delegate(|host| {
        ready_with(host, "10.244.9.0/24");
        host.add("pod-1");
        host.add("pod-2");
        ready_with(host, "10.244.3.0/24");
        run("ip netns add pod-3");
        let told = host.ask("ADD", "pod-3", &host.conf("1.0.0")).expect_err("the bridge is in use");
        let msg = told["msg"].as_str().expect("msg");
        for word in ["cni0", "10.244.9.1/24", "10.244.3.1/24", "pod-1 (veth", "pod-2 (veth"] {
            assert!(msg.contains(word), "{word} in {msg}");
        }
        assert_eq!(told["code"], 11);
        eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.9.1");
        assert_eq!(host.addresses().len(), 2);

        for pod in ["pod-1", "pod-2"] {
            host.ask("DEL", pod, &host.conf("1.0.0")).expect("DEL succeeds");
        }
        host.ask("ADD", "pod-3", &host.conf("1.0.0")).expect("ADD succeeds");
    });
}
