//! Several CNI networks on one node, as with Multus, podman beside containerd, or a conflist that was renamed while pods
//! ran: the subnet is the node's, so is its IPAM state.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use common::{Host, all, eventually, ip, on_a_host_with_each_delegate, run, wait_until};
use serde_json::{Value, json};

const SHIM: &str = env!("CARGO_BIN_EXE_fabric-cni");
const V4: (&str, &str) = ("10.244.0.0/16", "10.244.3.0/24");
const SMALL: (&str, &str) = ("10.244.0.0/16", "10.244.3.0/29");

fn address(result: &Value) -> String {
    result["ips"][0]["address"].as_str().expect("an address").split('/').next().expect("one").to_owned()
}

/// An address that another plugin, or an earlier release, gave away under another network's name.
fn taken(host: &Host, folder: &str, ip: &str, container: &str) {
    let folder = host.path("addresses").join(folder);
    fs::create_dir_all(&folder).expect("a folder");
    fs::write(folder.join(ip), format!("{container}\r\neth0")).expect("a file");
}

/// Makes of an attachment what a release before would have saved: its network's own folder of addresses.
fn as_before(host: &Host, network: &str, pod: &str, ip: &str) {
    let file = host.path(&format!("state/{network}/{pod}@eth0.json"));
    let content = fs::read_to_string(&file).expect("an attachment");
    let (first, second) = content.split_once('\n').expect("two lines");
    let mut first: Value = serde_json::from_str(first).expect("JSON");
    first["config"]["name"] = network.into();
    first.as_object_mut().expect("an object").remove("checksum");
    fs::write(file, format!("{first}\n{second}")).expect("written");
    fs::remove_file(host.path("addresses/fabric").join(ip)).expect("an address");
    taken(host, network, ip, pod);
}

fn gc(host: &Host, network: &str, valid: &[&str]) {
    let mut conf = host.conf("1.1.0");
    conf["name"] = network.into();
    let valid: Vec<_> = valid.iter().map(|pod| json!({"containerID": pod, "ifname": "eth0"})).collect();
    conf["cni.dev/valid-attachments"] = valid.into();
    host.ask("GC", "", &conf).expect("GC succeeds");
}

#[test]
fn pods_of_two_networks_never_get_one_address_and_reach_each_other() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        let given = [host.add("pod-1"), host.add_to("net2", "pod-2"), host.add_to("cbr0", "pod-3")];
        let given = given.map(|result| address(&result));
        assert_eq!(given, ["10.244.3.2", "10.244.3.3", "10.244.3.4"]);
        for target in &given {
            eventually(&format!("ip netns exec pod-1 ping -c 1 -W 2 {target}"));
        }
        let mut conf = host.conf_of("net2");
        conf["prevResult"] = host.ask("ADD", "pod-2", &conf).expect_err("attached already");
        assert_eq!(conf["prevResult"]["code"], 103);

        let networks = ["fabric", "net2"];
        let names: Vec<String> = (10..30).map(|number| format!("pod-{number}")).collect();
        names.iter().for_each(|pod| drop(run(&format!("ip netns add {pod}"))));
        let started = names.iter().zip(networks.into_iter().cycle());
        let results = all(started.map(|(pod, network)| host.start("ADD", pod, &host.conf_of(network))).collect());
        let given: BTreeSet<String> =
            results.into_iter().map(|result| address(&result.expect("ADD succeeds"))).collect();
        assert_eq!(given.len(), 20);
        assert_eq!(host.addresses().len(), 23);
    });
}

#[test]
fn one_container_has_an_interface_in_each_of_two_networks_and_del_takes_one_alone() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        host.add("pod-1");
        let conf = host.conf_of("net2");
        let ask = |verb: &str, conf: &Value| host.call(Path::new(SHIM), verb, "pod-1", "net1", conf);
        ask("ADD", &conf).expect("ADD succeeds");
        assert_eq!(host.addresses().len(), 4);
        for _ in 0..2 {
            ask("DEL", &conf).expect("DEL succeeds");
            assert_eq!(host.addresses(), ["10.244.3.2", "fd00:10:244:3::2"]);
            eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.3.1");
        }
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        host.assert_clean();
    });
}

#[test]
fn same_container_and_interface_name_in_two_networks_are_two_attachments() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        host.add("pod-1");
        run("ip netns add pod-2");
        // The container ID of pod-1, in a namespace of its own.
        let ask = |verb: &str| host.ask_in("pod-2", verb, "pod-1", &host.conf_of("net2"));
        ask("ADD").expect("ADD succeeds");
        assert_eq!(host.addresses(), ["10.244.3.2", "10.244.3.3"]);
        for _ in 0..2 {
            ask("DEL").expect("DEL succeeds");
            assert_eq!(host.addresses(), ["10.244.3.2"]);
        }
        eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.3.1");
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        host.assert_clean();
    });
}

#[test]
fn gc_of_one_network_leaves_the_pods_of_another_alone() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        host.add("pod-1");
        host.add("pod-2");
        host.add_to("net2", "pod-3");
        host.add_to("net2", "pod-4");
        // Nothing is left to tell of these but their addresses.
        fs::remove_file(host.path("state/fabric/pod-2@eth0.json")).expect("removed");
        fs::remove_file(host.path("state/net2/pod-4@eth0.json")).expect("removed");
        gc(host, "net2", &["pod-3"]);
        assert_eq!(host.addresses(), ["10.244.3.2", "10.244.3.3", "10.244.3.4"]);
        gc(host, "other", &[]);
        assert_eq!(host.addresses().len(), 3);
        gc(host, "fabric", &["pod-1"]);
        assert_eq!(host.addresses(), ["10.244.3.2", "10.244.3.4"]);
        for pod in ["pod-1", "pod-3"] {
            eventually(&format!("ip netns exec {pod} ping -c 1 -W 2 10.244.3.1"));
        }
    });
}

#[test]
fn pod_of_a_conflist_that_was_renamed_goes_under_either_name() {
    on_a_host_with_each_delegate(|host| {
        for name in ["cbr0", "fabric"] {
            host.ready(Some(V4), None);
            host.add_to("cbr0", "pod-1");
            host.add("pod-2");
            host.ask("DEL", "pod-1", &host.conf_of(name)).expect("DEL succeeds");
            assert_eq!(host.addresses(), ["10.244.3.3"], "DEL under {name}");
            assert!(!host.path("state/cbr0/pod-1@eth0.json").exists());
            host.ask("DEL", "pod-2", &host.conf("1.0.0")).expect("DEL succeeds");
            host.assert_clean();
            run("ip netns del pod-1");
            run("ip netns del pod-2");
            fs::remove_dir_all(host.path("addresses")).expect("removed");
        }
    });
}

#[test]
fn address_of_a_pod_of_before_is_not_given_again_and_goes_with_its_pod() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        for pod in ["pod-1", "pod-2", "pod-3"] {
            let ip = address(&host.add_to("cbr0", pod));
            as_before(host, "cbr0", pod, &ip);
        }
        assert_eq!((host.addresses().len(), host.addresses_in("cbr0").len()), (0, 3));
        // As if all had been given once, so that the search begins anew.
        let _ = fs::remove_file(host.path("addresses/fabric/last_reserved_ip.0"));
        assert_eq!(address(&host.add_to("cbr0", "pod-4")), "10.244.3.5");
        host.ask("DEL", "pod-1", &host.conf_of("cbr0")).expect("DEL succeeds");
        // Its file is lost, and of the next all but the address.
        fs::write(host.path("state/cbr0/pod-2@eth0.json"), "").expect("written");
        host.ask("DEL", "pod-2", &host.conf_of("cbr0")).expect("DEL succeeds");
        fs::remove_file(host.path("state/cbr0/pod-3@eth0.json")).expect("removed");
        gc(host, "cbr0", &["pod-4"]);
        assert_eq!((host.addresses_in("cbr0"), host.addresses()), (vec![], vec!["10.244.3.5".to_owned()]));
        for pod in ["pod-1", "pod-2"] {
            assert!(!run(&format!("ip -n {pod} link show")).contains("eth0"), "{pod} is still attached");
        }
    });
}

#[test]
fn addresses_of_another_plugin_are_respected_and_freed_by_del_under_todays_name() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(SMALL), None);
        taken(host, "cbr0", "10.244.3.2", "flannels-1");
        taken(host, "cbr0", "10.244.3.4", "flannels-2");
        taken(host, "other", "192.0.2.7", "flannels-1");
        // Its pods are on the bridge.
        run("ip link add cni0 type bridge");
        run("ip link add veth-f type veth peer name veth-p");
        run("ip link set veth-f master cni0");
        let given = ["pod-1", "pod-2", "pod-3"].map(|pod| address(&host.add(pod)));
        assert_eq!(given, ["10.244.3.3", "10.244.3.5", "10.244.3.6"]);
        run("ip netns add pod-4");
        let told = host.ask("ADD", "pod-4", &host.conf("1.0.0")).expect_err("none is left");
        assert!(told["msg"].as_str().expect("msg").contains("no IP addresses available"), "{told}");
        assert_eq!(host.addresses_in("cbr0").len(), 2, "its pods live");

        host.ask("DEL", "flannels-1", &host.conf("1.0.0")).expect("DEL succeeds");
        assert_eq!((host.addresses_in("cbr0").len(), host.addresses_in("other").len()), (1, 1));
        assert_eq!(address(&host.ask("ADD", "pod-4", &host.conf("1.0.0")).expect("one is free")), "10.244.3.2");
    });
}

#[test]
fn subnet_that_another_plugin_has_used_up_is_named_with_the_folder() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(("10.244.0.0/16", "10.244.3.0/30")), None);
        taken(host, "cbr0", "10.244.3.2", "flannels");
        run("ip link add cni0 type bridge");
        run("ip link add veth-f type veth peer name veth-p");
        run("ip link set veth-f master cni0");
        run("ip netns add pod-1");
        let told = host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect_err("none is left");
        let msg = told["msg"].as_str().expect("msg");
        assert!(told["code"] == 11 && msg.contains("no address of 10.244.3.0/30 is free"), "{told}");
        assert!(msg.contains(&host.path("addresses/cbr0").display().to_string()), "{told}");
        assert!(!host.path("state/fabric/pod-1@eth0.json").exists());
    });
}

#[test]
fn first_pod_after_a_reboot_finds_leaked_addresses_free_where_the_uplink_is_a_veth() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(SMALL), None);
        // As in kind and LXC; and a container of Docker's that starts with the host.
        run("ip link add uplink type veth peer name its-peer");
        run("ip address add 192.0.2.1/24 dev uplink");
        run("ip link add docker0 type bridge");
        run("ip link add veth-d type veth peer name veth-e");
        run("ip link set veth-d master docker0");
        host.add("pod-1");
        host.add_to("net2", "pod-2");
        fs::remove_file(host.path("state/fabric/pod-1@eth0.json")).expect("removed");
        taken(host, "fabric", "10.244.3.4", "gone");
        taken(host, "cbr0", "10.244.3.5", "flannels");
        taken(host, "cbr0", "10.244.9.5", "of another subnet");
        taken(host, "fabric", "10.244.3.6", "");
        host.reboot(&["pod-1", "pod-2"]);
        let given: BTreeSet<String> = (11..16).map(|number| address(&host.add(&format!("pod-{number}")))).collect();
        assert_eq!(given.len(), 5);
        assert_eq!(host.addresses_in("cbr0"), ["10.244.9.5"]);
        assert!(!host.path("state/net2/pod-2@eth0.json").exists());
    });
}

#[test]
fn leaked_addresses_are_freed_when_they_are_needed_while_pods_live_that_are_all_known() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(SMALL), None);
        host.add("pod-1");
        host.add_to("net2", "pod-2");
        for ip in ["10.244.3.4", "10.244.3.5", "10.244.3.6"] {
            taken(host, "fabric", ip, "gone");
        }
        assert_eq!(address(&host.add("pod-3")), "10.244.3.4");
        assert_eq!(host.addresses(), ["10.244.3.2", "10.244.3.3", "10.244.3.4"]);
    });
}

#[test]
fn second_network_on_a_bridge_of_its_own_takes_nothing_from_the_first() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        host.add("pod-1");
        host.add("pod-2");
        fs::remove_file(host.path("state/fabric/pod-2@eth0.json")).expect("removed");
        let mut conf = host.conf_of("net2");
        conf["delegate"]["bridge"] = "br-pods".into();
        conf["delegate"]["isGateway"] = false.into();
        conf["delegate"]["isDefaultGateway"] = false.into();
        run("ip netns add pod-3");
        let result = host.ask("ADD", "pod-3", &conf).expect("ADD succeeds");
        assert_eq!(address(&result), "10.244.3.4");
        assert_eq!(host.addresses().len(), 3);
        let saved = fs::read_to_string(host.path("state/net2/pod-3@eth0.json")).expect("saved");
        assert!(saved.lines().nth(1).is_some_and(|line| line.contains(r#""bridge":"br-pods""#)), "{saved}");
        let port = result["interfaces"][1]["name"].as_str().expect("a name");
        assert_eq!(ip(&format!("link show dev {port}"))[0]["master"], "br-pods");
    });
}

#[test]
fn second_folder_of_addresses_and_a_container_id_like_another_networks_are_refused() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        let file = host.path("node.json");
        let mut node: Value = serde_json::from_slice(&fs::read(&file).expect("a file")).expect("JSON");
        node["cni_data_dir"] = json!(host.path("elsewhere"));
        fs::write(&file, node.to_string()).expect("written");
        run("ip netns add pod-1");
        let told = host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect_err("two folders");
        let msg = told["msg"].as_str().expect("msg");
        assert!(told["code"] == 7 && msg.contains("take dataDir out") && msg.contains("--cni-data-dir"), "{told}");
        assert_eq!(host.ask("STATUS", "", &host.conf("1.1.0")).expect_err("two folders")["code"], 50);
        // The same by another path.
        fs::create_dir_all(host.path("addresses")).expect("a folder");
        std::os::unix::fs::symlink(host.path("addresses"), host.path("elsewhere")).expect("a link");
        host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect("ADD succeeds");

        run("ip netns add 4.net2.pod-1");
        let told = host.ask("ADD", "4.net2.pod-1", &host.conf("1.0.0")).expect_err("ambiguous");
        assert!(told["code"] == 7 && told["msg"].as_str().expect("msg").contains("network net2"), "{told}");
        run("ip netns del 4.net2.pod-1");
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        wait_until("nothing is left", || run("ip -o link show type veth").is_empty());
        host.assert_clean();
    });
}
