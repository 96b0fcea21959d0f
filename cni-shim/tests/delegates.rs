//! `fabric-bridge` beside `bridge`, other delegates, other IPAM plugins, and the plugins that run after us in a chain.

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::{DELEGATES, Host, PLUGINS, eventually, ip, on_a_host, on_a_host_with_each_delegate, run};
use serde_json::{Value, json};

const OURS: &str = env!("CARGO_BIN_EXE_fabric-bridge");

/// The configuration that both plugins take.
fn bridge_conf(host: &Host, version: &str) -> Value {
    json!({
        "cniVersion": version, "name": "direct", "type": "bridge", "isGateway": true, "isDefaultGateway": true,
        "hairpinMode": true, "mtu": 1430,
        "ipam": {
            "type": "host-local", "dataDir": host.path("addresses"),
            "ranges": [[{"subnet": "10.244.3.0/24"}], [{"subnet": "fd00:10:244:3::/64"}]],
            "routes": [{"dst": "10.244.0.0/16"}, {"dst": "fd00:10:244::/48", "gw": "fd00:10:244:3::1"}],
        },
    })
}

/// A result without what is random in it: names of veths, hardware addresses.
fn comparable(mut result: Value) -> Value {
    for interface in result["interfaces"].as_array_mut().expect("interfaces") {
        let interface = interface.as_object_mut().expect("an object");
        assert!(interface.remove("mac").is_some_and(|mac| mac.as_str().is_some_and(|mac| mac.len() == 17)));
        if interface["name"].as_str().expect("a name").starts_with("veth") {
            interface["name"] = "veth".into();
        }
    }
    let routes = result["routes"].as_array_mut().expect("routes");
    routes.sort_by_key(ToString::to_string);
    // `bridge` prints an empty one or, since 1.4, none.
    if result["dns"] == json!({}) {
        result.as_object_mut().expect("an object").remove("dns");
    }
    result
}

/// Addresses and routes of a pod, as the kernel shows them.
fn wiring(pod: &str) -> Vec<String> {
    let routes = |family: &str| {
        let mut routes: Vec<_> = run(&format!("ip -n {pod} {family} route show")).lines().map(str::to_owned).collect();
        routes.retain(|route| !route.starts_with("fe80"));
        routes.sort();
        routes
    };
    let link = &ip(&format!("-n {pod} -d address show dev eth0"))[0];
    let addresses = link["addr_info"].as_array().expect("addresses").iter();
    let mut seen: Vec<String> = addresses
        .filter(|a| a["scope"] == "global")
        .map(|a| format!("{}/{} {} {}", a["local"], a["prefixlen"], a["broadcast"], a["tentative"]))
        .collect();
    seen.push(format!("mtu {} {}", link["mtu"], link["operstate"]));
    seen.extend(routes("-4"));
    seen.extend(routes("-6"));
    seen
}

#[test]
fn fabric_bridge_answers_and_wires_as_bridge_does() {
    let of = |plugin: &'static str| {
        let (sender, seen) = std::sync::mpsc::channel();
        on_a_host("bridge", move |host| {
            run("ip netns add pod-1");
            let plugin = if plugin == "bridge" { Path::new(PLUGINS).join("bridge") } else { OURS.into() };
            let result = host.call(&plugin, "ADD", "pod-1", "eth0", &bridge_conf(host, "1.0.0")).expect("ADD succeeds");
            let bridge = &ip("-d address show dev cni0")[0];
            let mut gateways: Vec<_> = bridge["addr_info"].as_array().expect("addresses").iter().collect();
            gateways.retain(|address| address["scope"] == "global");
            let gateways: Vec<_> = gateways.iter().map(|a| format!("{}/{}", a["local"], a["prefixlen"])).collect();
            let forwarding =
                ["ipv4.ip_forward", "ipv6.conf.all.forwarding"].map(|name| run(&format!("sysctl -n net.{name}")));
            let port = run("bridge -d link show").contains("hairpin on");
            let seen = (comparable(result), wiring("pod-1"), gateways, bridge["mtu"].clone(), forwarding, port);
            sender.send(seen).expect("heard");
        });
        seen.recv().expect("told")
    };
    assert_eq!(of("fabric-bridge"), of("bridge"));
}

#[test]
fn plugins_can_be_swapped_under_running_pods() {
    on_a_host("bridge", |host| {
        host.ready_on_both();
        let with = |delegate: &str| {
            let mut conf = host.conf("1.0.0");
            conf["delegate"]["type"] = delegate.into();
            conf
        };
        for (number, delegate) in DELEGATES.into_iter().cycle().take(6).enumerate() {
            run(&format!("ip netns add pod-{number}"));
            host.ask("ADD", &format!("pod-{number}"), &with(delegate)).expect("ADD succeeds");
        }
        assert_eq!(host.addresses().iter().collect::<BTreeSet<_>>().len(), 12);
        for number in 1..6 {
            eventually(&format!("ip netns exec pod-0 ping -c 1 -W 2 10.244.3.{}", number + 2));
        }
        // Each pod is taken down by the plugin that did not make it, without a state file to say who did.
        std::fs::remove_dir_all(host.path("state")).expect("removed");
        for (number, delegate) in DELEGATES.into_iter().rev().cycle().take(6).enumerate() {
            host.ask("DEL", &format!("pod-{number}"), &with(delegate)).expect("DEL succeeds");
        }
        host.assert_clean();
    });
}

#[test]
fn neighbours_learn_that_an_address_has_a_new_owner() {
    on_a_host("fabric-bridge", |host| {
        host.ready_on_both();
        host.add("pod-1");
        for address in ["10.244.3.3", "fd00:10:244:3::3"] {
            run(&format!("ip -n pod-1 neigh add {address} lladdr 02:00:5e:00:53:99 dev eth0 nud reachable"));
        }
        let result = host.add("pod-2");
        let mac = result["interfaces"][2]["mac"].as_str().expect("a MAC address");
        common::wait_until("both neighbours have changed", || {
            run("ip -n pod-1 neigh show").lines().filter(|line| line.contains(mac)).count() == 2
        });
    });
}

#[test]
fn first_packet_of_a_new_pod_arrives() {
    on_a_host("fabric-bridge", |host| {
        host.ready_on_both();
        for number in 1..=10 {
            host.add(&format!("pod-{number}"));
            for gateway in ["10.244.3.1", "fd00:10:244:3::1"] {
                run(&format!("ip netns exec pod-{number} ping -c 1 -W 10 {gateway}"));
            }
        }
    });
}

#[test]
fn fabric_bridge_takes_over_where_bridge_is_not_installed() {
    on_a_host("bridge", |host| {
        host.ready_on_both();
        run(&format!("mount -t tmpfs tmpfs {PLUGINS}"));
        let result = host.add("pod-1");
        assert_eq!(result["ips"][0]["address"], "10.244.3.2/24");
        host.ask("STATUS", "", &host.conf("1.1.0")).expect("STATUS succeeds");
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        host.assert_clean();
    });
}

#[test]
fn fabric_bridge_alone_serves_every_verb_in_every_version() {
    on_a_host("fabric-bridge", |host| {
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            run("ip netns add pod-1");
            let mut conf = bridge_conf(host, version);
            let ask = |verb: &str, conf: &Value| host.call(Path::new(OURS), verb, "pod-1", "eth0", conf);
            let result = ask("ADD", &conf).expect("ADD succeeds");
            assert_eq!(result["cniVersion"], version);
            assert_eq!(ask("ADD", &conf).expect_err("attached already")["code"], 103);
            conf["prevResult"] = result;
            conf["cni.dev/valid-attachments"] = json!([{"containerID": "pod-1", "ifname": "eth0"}]);
            for (verb, since) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
                match ask(verb, &conf) {
                    Ok(_) => assert!(version >= since, "{verb} {version}"),
                    Err(told) => assert!(version < since && told["code"] == 1, "{verb} {version}: {told}"),
                }
            }
            let port = conf["prevResult"]["interfaces"][1]["name"].as_str().expect("a name").to_owned();
            run(&format!("ip link set {port} nomaster"));
            if version >= "0.4.0" {
                assert_eq!(ask("CHECK", &conf).expect_err("not attached")["code"], 104);
            }
            run(&format!("ip link set {port} master cni0"));
            run("ip -n pod-1 address flush dev eth0");
            if version >= "0.4.0" {
                assert_eq!(ask("CHECK", &conf).expect_err("no address")["code"], 104);
            }
            for _ in 0..3 {
                ask("DEL", &conf).expect("DEL succeeds");
            }
            run("ip netns del pod-1");
        }
        assert_eq!(run("ip -o link show type veth"), "");
    });
}

#[test]
fn fabric_bridge_by_the_name_of_loopback_answers_and_raises_lo_as_loopback_does() {
    on_a_host("fabric-bridge", |host| {
        let ours = host.path("loopback");
        std::os::unix::fs::symlink(OURS, &ours).expect("a link");
        for version in ["0.3.1", "1.0.0"] {
            let mut answers = vec![];
            for plugin in [&Path::new(PLUGINS).join("loopback"), &ours] {
                run("ip netns add pod-1");
                let mut conf = json!({"cniVersion": version, "name": "cni-loopback", "type": "loopback"});
                let ask = |verb: &str, conf: &Value| host.call(plugin, verb, "pod-1", "lo", conf);
                let result = ask("ADD", &conf).expect("ADD succeeds");
                let shown = run("ip -n pod-1 -o address show dev lo");
                assert!(shown.contains("127.0.0.1/8") && shown.contains("::1/128"), "{shown}");
                conf["prevResult"] = result.clone();
                if version >= "0.4.0" {
                    ask("CHECK", &conf).expect("CHECK succeeds");
                    run("ip -n pod-1 link set lo down");
                    ask("CHECK", &conf).expect_err("lo is down");
                }
                ask("DEL", &conf).expect("DEL succeeds");
                run("ip netns del pod-1");
                ask("DEL", &conf).expect("the namespace is gone");
                let addresses: Vec<_> =
                    result["ips"].as_array().into_iter().flatten().map(|ip| ip["address"].clone()).collect();
                answers.push((result["cniVersion"].clone(), result["interfaces"].clone(), addresses));
            }
            assert_eq!(answers[0], answers[1], "{version}");
        }
    });
}

#[test]
fn wishes_for_a_pod_are_met_or_refused() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(("10.244.0.0/16", "10.244.3.0/24")), None);
        let mut conf = host.conf("1.0.0");
        conf["runtimeConfig"] = json!({"ips": ["10.244.3.77/24"], "mac": "02:00:5e:00:53:07"});
        conf["capabilities"] = json!({"ips": true, "mac": true});
        conf["dns"] = json!({"nameservers": ["192.0.2.53"]});
        run("ip netns add pod-1");
        let result = host.ask("ADD", "pod-1", &conf).expect("ADD succeeds");
        assert_eq!(result["ips"][0]["address"], "10.244.3.77/24");
        assert_eq!(result["interfaces"][2]["mac"], "02:00:5e:00:53:07");
        assert_eq!(result["dns"]["nameservers"][0], "192.0.2.53");

        run("ip netns add pod-2");
        let told = host.ask("ADD", "pod-2", &conf).expect_err("the address is taken");
        assert!(told["msg"].as_str().expect("msg").contains("10.244.3.77"), "{told}");
        assert_eq!(host.addresses(), ["10.244.3.77"]);
    });
}

#[test]
fn what_the_runtimes_user_adds_in_cni_args_reaches_the_delegate() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(("10.244.0.0/16", "10.244.3.0/24")), None);
        run("ip netns add pod-1");
        let args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;IP=10.244.3.99;MAC=02:00:5e:00:53:09";
        let result = host.ask_with_args(args, "ADD", "pod-1", &host.conf("1.0.0")).expect("ADD succeeds");
        assert_eq!(result["ips"][0]["address"], "10.244.3.99/24");
        assert_eq!(ip("-n pod-1 link show dev eth0")[0]["address"], "02:00:5e:00:53:09");
        host.ask_with_args(args, "DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");

        let told = host.ask_with_args("IgnoreUnknown=1;IP=x", "ADD", "pod-1", &host.conf("1.0.0"));
        assert!(told.as_ref().expect_err("no address")["msg"].is_string(), "{told:?}");
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        host.assert_clean();
    });
}

#[test]
fn gc_by_fabric_bridge_alone_takes_addresses_and_cables_of_those_not_named() {
    on_a_host("fabric-bridge", |host| {
        let mut conf = bridge_conf(host, "1.1.0");
        let ask = |verb: &str, pod: &str, conf: &Value| host.call(Path::new(OURS), verb, pod, "eth0", conf);
        for pod in ["pod-1", "pod-2", "pod-3"] {
            run(&format!("ip netns add {pod}"));
            ask("ADD", pod, &conf).expect("ADD succeeds");
        }
        conf["cni.dev/valid-attachments"] = json!([{"containerID": "pod-2", "ifname": "eth0"}]);
        ask("GC", "", &conf).expect("GC succeeds");
        let files = std::fs::read_dir(host.path("addresses/direct")).expect("IPAM state");
        let mut held: Vec<_> =
            files.map(|file| file.expect("a file").file_name().into_string().expect("text")).collect();
        held.retain(|name| name.parse::<std::net::IpAddr>().is_ok());
        held.sort();
        assert_eq!(held, ["10.244.3.3", "fd00:10:244:3::3"]);
        assert_eq!(run("ip -o link show type veth").lines().count(), 1);
        eventually("ip netns exec pod-2 ping -c 1 -W 2 10.244.3.1");
    });
}

#[test]
fn what_fabric_bridge_cannot_do_is_refused_by_name() {
    on_a_host("fabric-bridge", |host| {
        run("ip netns add pod-1");
        run("ip link add cni0 type vxlan id 9 dstport 4790");
        for (key, value, code, word) in [
            ("ipMasq", json!(true), 2, "ipMasq"),
            ("vlan", json!(7), 2, "vlan"),
            ("ipam", json!({"type": "dhcp"}), 2, "dhcp"),
            ("ipam", json!({"type": "host-local", "ranges": []}), 7, "no subnet"),
            ("mtu", json!(1430), 7, "not a bridge"),
        ] {
            let mut conf = bridge_conf(host, "1.0.0");
            conf[key] = value;
            let told = host.call(Path::new(OURS), "ADD", "pod-1", "eth0", &conf).expect_err(word);
            assert_eq!(told["code"], code, "{told}");
            assert!(told["msg"].as_str().expect("msg").contains(word), "{told}");
        }
        assert_eq!(run("ip -o link show type veth"), "");
    });
}

#[test]
fn pods_on_other_delegates_and_other_ipam_plugins_come_and_go() {
    on_a_host("ptp", |host| {
        host.ready_on_both();
        host.add("pod-1");
        host.add("pod-2");
        for target in ["10.244.3.3", "fd00:10:244:3::3"] {
            eventually(&format!("ip netns exec pod-1 ping -c 1 -W 2 {target}"));
        }
        for pod in ["pod-1", "pod-2"] {
            host.ask("DEL", pod, &host.conf("1.0.0")).expect("DEL succeeds");
        }
        host.assert_clean();
    });
    on_a_host("macvlan", |host| {
        host.ready_on_both();
        run("ip link add uplink type bridge");
        run("ip link set uplink up");
        let mut conf = host.conf("1.0.0");
        conf["delegate"]["master"] = "uplink".into();
        run("ip netns add pod-1");
        host.ask("ADD", "pod-1", &conf).expect("ADD succeeds");
        assert_eq!(host.addresses().len(), 2);
        host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
        host.assert_clean();
    });
    on_a_host("bridge", |host| {
        host.ready_on_both();
        let mut conf = host.conf("1.0.0");
        conf["delegate"]["ipam"] =
            json!({"type": "static", "addresses": [{"address": "10.244.3.77/24", "gateway": "10.244.3.1"}]});
        run("ip netns add pod-1");
        let result = host.ask("ADD", "pod-1", &conf).expect("ADD succeeds");
        assert_eq!(result["ips"][0]["address"], "10.244.3.77/24");
        host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
        host.assert_clean();
    });
}

#[test]
fn plugins_of_a_chain_build_on_our_result() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(("10.244.0.0/16", "10.244.3.0/24")), None);
        let chain = [
            json!({
                "type": "portmap", "capabilities": {"portMappings": true},
                "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
            }),
            json!({
                "type": "bandwidth", "capabilities": {"bandwidth": true},
                "runtimeConfig": {"bandwidth": {
                    "ingressRate": 10_000_000, "ingressBurst": 1_000_000,
                    "egressRate": 20_000_000, "egressBurst": 1_000_000,
                }},
            }),
            json!({"type": "firewall"}),
            json!({"type": "tuning", "sysctl": {"net.ipv4.conf.IFNAME.arp_filter": "1"}}),
        ];
        let result = host.add("pod-1");
        let mut results = vec![result];
        let with = |plugin: &Value, result: &Value| {
            let mut conf = plugin.clone();
            conf["cniVersion"] = "1.0.0".into();
            conf["name"] = "fabric".into();
            conf["prevResult"] = result.clone();
            conf
        };
        let call = |verb: &str, plugin: &Value, result: &Value| {
            let path = Path::new(PLUGINS).join(plugin["type"].as_str().expect("a type"));
            host.call(&path, verb, "pod-1", "eth0", &with(plugin, result))
        };
        for plugin in &chain {
            let result = results.last().expect("one").clone();
            results.push(call("ADD", plugin, &result).unwrap_or_else(|told| panic!("{plugin}: {told}")));
        }
        let last = results.last().expect("one");
        assert_eq!(last["ips"], results[0]["ips"]);
        let queues = run("tc qdisc show");
        assert!(queues.contains("rate 10Mbit") && queues.contains("rate 20Mbit"), "{queues}");
        eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.3.1");
        let loopback = json!({"cniVersion": "1.0.0", "name": "lo", "type": "loopback"});
        let plugin = Path::new(PLUGINS).join("loopback");
        host.call(&plugin, "ADD", "pod-1", "lo", &loopback).expect("loopback succeeds");

        // CHECK gets the last result, whatever later plugins have added to it.
        let mut conf = host.conf("1.0.0");
        conf["prevResult"] = last.clone();
        host.ask("CHECK", "pod-1", &conf).expect("CHECK succeeds");
        for plugin in chain.iter().rev() {
            call("DEL", plugin, last).unwrap_or_else(|told| panic!("{plugin}: {told}"));
        }
        host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
        common::wait_until("bandwidth's device is gone", || run("ip -o link show type ifb").is_empty());
        host.assert_clean();
    });
}
