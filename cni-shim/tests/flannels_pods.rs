//! Pods that flannel's plugin attached on this node before it was taken over: the runtime goes on under the network's name,
//! and DEL, CHECK and GC are `fabric-cni`'s to answer.

mod common;

use std::fs;
use std::path::Path;

use common::{Host, PLUGINS, eventually, on_a_host, run, wait_until};
use serde_json::{Value, json};

/// What flannel's plugin tells `bridge`, and remembers. With `ipMasq` where flanneld runs without `--ip-masq`.
fn told(host: &Host, masquerade: bool) -> Value {
    json!({
        "cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "mtu": 1450, "hairpinMode": true, "ipMasq": masquerade,
        "isDefaultGateway": true, "isGateway": true,
        "ipam": {
            "type": "host-local", "dataDir": host.path("addresses"),
            "ranges": [[{ "subnet": "10.244.3.0/24" }]], "routes": [{ "dst": "10.244.0.0/16" }],
        },
    })
}

/// A pod as flannel's plugin makes it: its delegate called, what that was told written down.
fn add_as_flannel(host: &Host, pod: &str, masquerade: bool) -> Value {
    run(&format!("ip netns add {pod}"));
    run(&format!("ip -n {pod} link set lo up"));
    let config = told(host, masquerade);
    let added = host.call(&Path::new(PLUGINS).join("bridge"), "ADD", pod, "eth0", &config).expect("ADD succeeds");
    fs::create_dir_all(host.path("flannel")).expect("a folder");
    fs::write(host.path("flannel").join(pod), config.to_string()).expect("a file");
    added
}

/// Our configuration, under the name that flannel's had.
fn conf(host: &Host, version: &str) -> Value {
    let mut conf = host.conf(version);
    conf["name"] = "cbr0".into();
    conf["flannelDir"] = json!(host.path("flannel"));
    conf
}

fn chains() -> usize {
    run("iptables -w -t nat -S").lines().filter(|line| line.starts_with("-N CNI-")).count()
}

fn ready(host: &Host) {
    host.ready(Some(("10.244.0.0/16", "10.244.3.0/24")), None);
}

#[test]
fn del_frees_address_file_and_masquerade_chain_and_may_be_said_twice() {
    for masquerade in [false, true] {
        on_a_host("bridge", move |host| {
            ready(host);
            let results = ["pod-1", "pod-2"].map(|pod| add_as_flannel(host, pod, masquerade));
            assert_eq!(host.addresses_in("cbr0"), ["10.244.3.2", "10.244.3.3"]);
            assert_eq!(chains(), if masquerade { 2 } else { 0 });
            let mut conf = conf(host, "1.0.0");
            conf["prevResult"] = results[0].clone();
            for _ in 0..2 {
                host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
                assert_eq!(host.addresses_in("cbr0"), ["10.244.3.3"]);
                assert!(!host.path("flannel/pod-1").exists() && host.path("flannel/pod-2").exists());
                assert_eq!(chains(), usize::from(masquerade));
            }
            eventually("ip netns exec pod-2 ping -c 1 -W 2 10.244.3.1");
        });
    }
}

#[test]
fn del_frees_the_address_of_a_pod_whose_namespace_is_gone_and_of_one_whose_file_is_spoiled() {
    on_a_host("bridge", |host| {
        ready(host);
        for pod in ["pod-1", "pod-2"] {
            add_as_flannel(host, pod, false);
        }
        run("ip netns del pod-1");
        fs::write(host.path("flannel/pod-2"), "{\"cniVersion\":").expect("a file");
        for pod in ["pod-1", "pod-2"] {
            host.ask("DEL", pod, &conf(host, "1.0.0")).expect("DEL succeeds");
        }
        assert_eq!(host.addresses_in("cbr0"), [""; 0]);
        wait_until("their veths are gone", || run("ip -o link show type veth").is_empty());
    });
}

#[test]
fn check_asks_the_delegate_that_attached_it() {
    on_a_host("bridge", |host| {
        ready(host);
        let mut conf = conf(host, "1.0.0");
        conf["prevResult"] = add_as_flannel(host, "pod-1", false);
        host.ask("CHECK", "pod-1", &conf).expect("CHECK succeeds");
        run("ip -n pod-1 route del default");
        let told = host.ask("CHECK", "pod-1", &conf).expect_err("a route is missing");
        assert!(told["msg"].as_str().expect("msg").starts_with("bridge CHECK: "), "{told}");
    });
}

#[test]
fn new_pods_get_no_address_in_use_and_gc_frees_what_the_runtime_does_not_name() {
    on_a_host("bridge", |host| {
        ready(host);
        for pod in ["pod-1", "pod-2"] {
            add_as_flannel(host, pod, false);
        }
        run("ip netns add pod-3");
        let added = host.ask("ADD", "pod-3", &conf(host, "1.0.0")).expect("ADD succeeds");
        assert_eq!(added["ips"][0]["address"], "10.244.3.4/24");

        let mut gc = conf(host, "1.1.0");
        let named = ["pod-2", "pod-3"].map(|pod| json!({ "containerID": pod, "ifname": "eth0" }));
        gc["cni.dev/valid-attachments"] = json!(named);
        run("ip netns del pod-1");
        host.ask("GC", "", &gc).expect("GC succeeds");
        assert_eq!(host.addresses_in("cbr0"), ["10.244.3.3"]);
        assert!(!host.path("flannel/pod-1").exists() && host.path("flannel/pod-2").exists());
        eventually("ip netns exec pod-2 ping -c 1 -W 2 10.244.3.4");
    });
}
