//! The shim with Debian's bridge and host-local, and with our own delegate, in namespaces of its own. It runs as root, or fails.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::Duration;

use common::{Host, all, eventually, ip, on_a_host_with_each_delegate, run};
use serde_json::{Value, json};

const V4: (&str, &str) = ("10.244.0.0/16", "10.244.3.0/24");
const V6: (&str, &str) = ("fd00:10:244::/48", "fd00:10:244:3::/64");

/// Family, network, its address for pods and gateway: what a pod must see.
const FAMILIES: [(&str, &str, &str, &str); 2] = [
    ("-4", "10.244.0.0/16", "10.244.3.2/24", "10.244.3.1"),
    ("-6", "fd00:10:244::/48", "fd00:10:244:3::2/64", "fd00:10:244:3::1"),
];

fn pod_is_on_the_network(host: &Host, families: &[(&str, &str, &str, &str)]) {
    let result = host.add("pod-1");
    let given: Vec<_> = result["ips"].as_array().expect("ips").iter().map(|ip| ip["address"].clone()).collect();
    assert_eq!(given, families.iter().map(|family| family.2).collect::<Vec<_>>());

    let eth0 = &ip("-n pod-1 addr show dev eth0")[0];
    assert_eq!(eth0["mtu"], 1450);
    for (family, network, address, gateway) in families {
        let addresses = eth0["addr_info"].as_array().expect("addresses");
        let seen = |a: &Value| format!("{}/{}", a["local"].as_str().unwrap_or(""), a["prefixlen"]);
        assert!(addresses.iter().any(|a| seen(a) == *address), "{address} in {addresses:?}");
        let routes = ip(&format!("-n pod-1 {family} route show"));
        for dst in [network, "default"] {
            let there = |route: &Value| route["dst"] == dst && route["gateway"] == *gateway;
            let route = routes.as_array().expect("routes").iter().find(|route| there(route));
            let route = route.unwrap_or_else(|| panic!("{dst} via {gateway} in {routes}"));
            // IPv6's tunnel takes less than the interface.
            let mtu = if *family == "-6" { json!([{"mtu": 1430}]) } else { Value::Null };
            assert_eq!(route["metrics"], mtu, "{route}");
        }
        eventually(&format!("ip netns exec pod-1 ping -c 1 -W 2 {gateway}"));
    }
    let port = run("bridge -d link show").lines().any(|line| line.contains("hairpin on"));
    assert!(port, "{}", run("bridge -d link show"));

    let mut conf = host.conf("1.0.0");
    conf["prevResult"] = result;
    host.ask("CHECK", "pod-1", &conf).expect("CHECK succeeds");
    run("ip -n pod-1 route del default");
    if families.iter().any(|family| family.0 == "-4") {
        let told = host.ask("CHECK", "pod-1", &conf).expect_err("a route is missing");
        let by = format!("{} CHECK: ", host.delegate);
        assert!(told["msg"].as_str().expect("msg").starts_with(&by), "{told}");
    }
    host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
    host.assert_clean();
}

#[test]
fn pod_has_address_routes_mtu_and_gateway_on_ipv4() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        pod_is_on_the_network(host, &FAMILIES[..1]);
    });
}

#[test]
fn pod_has_address_routes_mtu_and_gateway_on_dual_stack() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), Some(V6));
        pod_is_on_the_network(host, &FAMILIES);
    });
}

#[test]
fn pod_has_address_routes_mtu_and_gateway_on_ipv6() {
    on_a_host_with_each_delegate(|host| {
        host.ready(None, Some(V6));
        let result = host.add("pod-1");
        assert_eq!(result["ips"][0]["address"], FAMILIES[1].2);
        eventually("ip netns exec pod-1 ping -c 1 -W 2 fd00:10:244:3::1");
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        host.assert_clean();
    });
}

#[test]
fn two_pods_and_a_pod_with_itself_talk_over_the_bridge() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        host.add("pod-1");
        host.add("pod-2");
        for target in ["10.244.3.2", "10.244.3.3", "fd00:10:244:3::2", "fd00:10:244:3::3"] {
            eventually(&format!("ip netns exec pod-1 ping -c 1 -W 2 {target}"));
        }
    });
}

#[test]
fn every_version_is_served_by_plugins_whatever_they_speak() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        for version in ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            run("ip netns add pod-1");
            let mut conf = host.conf(version);
            let result = host.ask("ADD", "pod-1", &conf).expect(version);
            assert_eq!(result["cniVersion"], version);
            for (index, family) in ["4", "6"].into_iter().enumerate() {
                let want = (version < "1.0.0").then(|| Value::from(family));
                assert_eq!(result["ips"][index].get("version"), want.as_ref(), "{version}");
            }
            conf["prevResult"] = result;
            match host.ask("CHECK", "pod-1", &conf) {
                Ok(_) => assert!(version >= "0.4.0", "{version}"),
                Err(told) => assert!(version < "0.4.0" && told["code"] == 1, "{version}: {told}"),
            }
            host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
            host.assert_clean();
            run("ip netns del pod-1");
        }
    });
}

#[test]
fn node_that_is_not_ready_refuses_and_leaves_nothing() {
    on_a_host_with_each_delegate(|host| {
        run("ip netns add pod-1");
        let told = host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect_err("no node file");
        assert_eq!((&told["code"], &told["cniVersion"]), (&11.into(), &"1.0.0".into()), "{told}");
        host.assert_clean();
        assert!(!host.path("state").exists());
        host.ready_on_both();
        host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect("ADD succeeds");
    });
}

#[test]
fn hundred_pods_at_once_have_addresses_of_their_own() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        let pods: Vec<_> = (1..=100).map(|number| format!("pod-{number}")).collect();
        pods.iter().for_each(|pod| drop(run(&format!("ip netns add {pod}"))));
        let conf = host.conf("1.0.0");
        let start_all = |verb| all(pods.iter().map(|pod| host.start(verb, pod, &conf)).collect());

        let results: Vec<_> = start_all("ADD").into_iter().map(|result| result.expect("ADD succeeds")).collect();
        let addresses: BTreeSet<_> = results.iter().map(|result| result["ips"][0]["address"].to_string()).collect();
        assert_eq!(addresses.len(), 100);
        assert_eq!(host.addresses().len(), 100);
        start_all("DEL").into_iter().for_each(|result| drop(result.expect("DEL succeeds")));
        host.assert_clean();
    });
}

#[test]
fn second_add_is_refused_and_the_first_pod_keeps_talking() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        host.add("pod-1");
        let told = host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect_err("attached already");
        assert_eq!(told["code"], 103, "{told}");
        eventually("ip netns exec pod-1 ping -c 1 -W 2 10.244.3.1");
        assert_eq!(host.addresses(), ["10.244.3.2"]);
    });
}

#[test]
fn del_frees_everything_whatever_is_missing() {
    type Loss = fn(&Host);
    let losses: [(&str, Loss); 6] = [
        ("nothing", |_| ()),
        ("namespace", |_| drop(run("ip netns del pod-1"))),
        ("namespace, its file left", |_| drop(run("umount /run/netns/pod-1"))),
        ("state file", |host| fs::remove_dir_all(host.path("state")).expect("removed")),
        ("state file's content", |host| fs::write(host.path("state/fabric/pod-1@eth0.json"), "").expect("a file")),
        ("all of it", |host| {
            run("ip netns del pod-1");
            fs::remove_dir_all(host.path("state")).expect("removed");
        }),
    ];
    for (missing, lose) in losses {
        on_a_host_with_each_delegate(move |host| {
            host.ready_on_both();
            host.add("pod-1");
            assert_eq!(host.addresses().len(), 2);
            fs::remove_file(host.path("node.json")).expect("removed");
            lose(host);
            for _ in 0..3 {
                host.ask("DEL", "pod-1", &host.conf("1.0.0")).unwrap_or_else(|told| panic!("{missing}: {told}"));
            }
            host.assert_clean();
        });
    }
}

#[test]
fn add_killed_at_any_moment_is_cleaned_up_by_del() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        let conf = host.conf("1.0.0");
        for step in 0..30 {
            run("ip netns add pod-1");
            let mut shim = host.start("ADD", "pod-1", &conf);
            #[expect(clippy::disallowed_methods, reason = "the moment of the kill is what is tried")]
            thread::sleep(Duration::from_micros(1000 * step));
            shim.kill().expect("killed");
            shim.wait().expect("ended");
            // At once, as a runtime does, while bridge may still be at work.
            host.ask("DEL", "pod-1", &conf).unwrap_or_else(|told| panic!("step {step}: {told}"));
            host.assert_clean();
            run("ip netns del pod-1");
        }
    });
}

#[test]
fn exhausted_subnet_says_so_and_recovers() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(("10.244.0.0/16", "10.244.3.0/29")), None);
        for number in 1..=5 {
            host.add(&format!("pod-{number}"));
        }
        run("ip netns add pod-6");
        let told = host.ask("ADD", "pod-6", &host.conf("1.0.0")).expect_err("no address is left");
        assert!(told["msg"].as_str().expect("msg").contains("no IP addresses available"), "{told}");
        assert_eq!(host.addresses().len(), 5);
        host.ask("DEL", "pod-1", &host.conf("1.0.0")).expect("DEL succeeds");
        host.ask("ADD", "pod-6", &host.conf("1.0.0")).expect("ADD succeeds");
    });
}

#[test]
fn gc_after_a_reboot_frees_all() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        host.add("pod-1");
        host.add("pod-2");
        // A reboot takes namespaces and /run, and leaves the files on disk.
        run("ip netns del pod-1");
        run("ip netns del pod-2");
        fs::remove_file(host.path("node.json")).expect("removed");
        let mut conf = host.conf("1.1.0");
        conf["cni.dev/valid-attachments"] = json!([]);
        host.ask("GC", "", &conf).expect("GC succeeds");
        assert_eq!(host.addresses(), [""; 0]);
    });
}

#[test]
fn full_disk_refuses_the_add_and_recovers() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        run("ip netns add pod-1");
        fs::create_dir(host.path("state")).expect("a folder");
        let state = host.path("state");
        run(&format!("mount -t tmpfs -o size=16k tmpfs {}", state.display()));
        let filler = state.join("filler");
        while fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&filler)
            .is_ok_and(|mut file| std::io::Write::write_all(&mut file, &[0; 512]).is_ok())
        {}
        let told = host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect_err("the disk is full");
        assert_eq!(told["code"], 5, "{told}");
        host.assert_clean();
        fs::remove_file(filler).expect("removed");
        host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect("ADD succeeds");
        run(&format!("umount -l {}", state.display()));
    });
}

#[test]
fn full_disk_of_addresses_refuses_the_add_and_leaves_no_address_that_is_nobodys() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        run("ip netns add pod-1");
        let addresses = host.path("addresses");
        fs::create_dir(&addresses).expect("a folder");
        // So few inodes that there is room for the folder and the lock, but for nothing else.
        run(&format!("mount -t tmpfs -o nr_inodes=3 tmpfs {}", addresses.display()));
        host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect_err("the disk is full");
        host.assert_clean();
        run(&format!("mount -o remount,nr_inodes=100 {}", addresses.display()));
        host.ask("ADD", "pod-1", &host.conf("1.0.0")).expect("ADD succeeds");
        run(&format!("umount -l {}", addresses.display()));
    });
}

#[test]
fn add_without_enough_descriptors_fails_cleanly_or_succeeds() {
    on_a_host_with_each_delegate(|host| {
        host.ready(Some(V4), None);
        let conf = host.conf("1.0.0");
        let mut failed = 0;
        for limit in 3..16 {
            run("ip netns add pod-1");
            let outcome = host.ask_with_descriptors(limit, "ADD", "pod-1", &conf);
            if let Err(told) = outcome {
                assert!(told["msg"].is_string() || told.is_null(), "{told}");
                failed += 1;
            }
            host.ask("DEL", "pod-1", &conf).expect("DEL succeeds");
            host.assert_clean();
            run("ip netns del pod-1");
        }
        assert!(failed > 0, "the limits were too generous to show anything");
    });
}

#[test]
fn pods_that_come_while_others_go_have_addresses_of_their_own() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        let conf = host.conf("1.0.0");
        let names = |from: usize| (from..from + 50).map(|n| format!("pod-{n}")).collect::<Vec<_>>();
        let (first, second) = (names(0), names(50));
        first.iter().chain(&second).for_each(|pod| drop(run(&format!("ip netns add {pod}"))));
        all(first.iter().map(|pod| host.start("ADD", pod, &conf)).collect())
            .into_iter()
            .for_each(|result| drop(result.expect("ADD succeeds")));

        let pairs = first.iter().zip(&second);
        let turns = pairs.flat_map(|(old, new)| [host.start("DEL", old, &conf), host.start("ADD", new, &conf)]);
        let results = all(turns.collect()).into_iter().map(|result| result.expect("it succeeds"));
        let given: BTreeSet<_> = results.filter(|result| !result.is_null()).map(|r| r["ips"].to_string()).collect();
        assert_eq!(given.len(), 50);
        assert_eq!(host.addresses().len(), 100);
    });
}
