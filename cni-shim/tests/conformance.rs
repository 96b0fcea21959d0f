//! The spec as a table, over every version and both delegates, and the conflists that are shown and shipped, run as a
//! runtime runs them.

mod common;

use std::fs;
use std::path::Path;

use common::{Host, PLUGINS, on_a_host, on_a_host_with_each_delegate, run};
use serde_json::{Value, json};

/// Versions of the spec, oldest first.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// From which version on a verb exists (spec 1.1.0, appendix "Changelog" and section 2).
const SINCE: [(&str, usize); 6] = [("VERSION", 0), ("ADD", 0), ("DEL", 0), ("CHECK", 2), ("GC", 4), ("STATUS", 4)];

#[test]
fn every_verb_of_every_version_does_what_the_spec_says() {
    on_a_host_with_each_delegate(|host| {
        host.ready_on_both();
        for (age, version) in VERSIONS.into_iter().enumerate() {
            run("ip netns add pod-1");
            let mut added = Value::Null;
            for (verb, since) in SINCE {
                let mut conf = host.conf(version);
                match verb {
                    "CHECK" => conf["prevResult"] = added.clone(),
                    "GC" => conf["cni.dev/valid-attachments"] = json!([{ "containerID": "pod-1", "ifname": "eth0" }]),
                    _ => {}
                }
                let answer = if verb == "DEL" { Ok(Value::Null) } else { host.ask(verb, "pod-1", &conf) };
                match answer {
                    Ok(result) => {
                        assert!(age >= since, "{verb} of {version} is answered");
                        match verb {
                            "VERSION" => assert_eq!(result["supportedVersions"], json!(VERSIONS)),
                            "ADD" => {
                                is_a_result(&result, version, age);
                                added = result;
                            }
                            _ => assert_eq!(result, Value::Null, "{verb} of {version} prints nothing"),
                        }
                    }
                    Err(told) => {
                        assert!(age < since, "{verb} of {version}: {told}");
                        assert_eq!((&told["code"], &told["cniVersion"]), (&1.into(), &version.into()), "{told}");
                    }
                }
            }
            // GC named it, so it is still there.
            assert_eq!(host.addresses().len(), 2, "{version}");
            let mut without = host.conf(version);
            for (verb, since) in [("CHECK", 2), ("GC", 4)] {
                let told = host.ask(verb, "pod-1", &without).expect_err("it lacks what it is about");
                assert_eq!(told["code"], if age < since { 1 } else { 7 }, "{verb} of {version}: {told}");
            }
            without["prevResult"] = added;
            for _ in 0..2 {
                assert_eq!(host.ask("DEL", "pod-1", &without).expect("DEL succeeds"), Value::Null);
            }
            host.assert_clean();
            run("ip netns del pod-1");
        }
    });
}

/// The form of a success, by the spec's section 5 of that version.
fn is_a_result(result: &Value, version: &str, age: usize) {
    assert_eq!(result["cniVersion"], version, "{result}");
    knows_only(result, &["cniVersion", "interfaces", "ips", "routes", "dns"], &[], age);
    for interface in result["interfaces"].as_array().expect("interfaces") {
        knows_only(interface, &["name", "mac", "sandbox"], &["mtu", "socketPath", "pciID"], age);
    }
    for route in result["routes"].as_array().expect("routes") {
        knows_only(route, &["dst", "gw"], &["mtu", "advmss", "priority", "table", "scope"], age);
    }
    // A plugin may leave it out.
    knows_only(result.get("dns").unwrap_or(&json!({})), &["nameservers", "domain", "search", "options"], &[], age);
    let interfaces = result["interfaces"].as_array().expect("interfaces");
    let eth0 = interfaces.iter().position(|i| i["name"] == "eth0").expect("the pod's own");
    assert_eq!(interfaces[eth0]["sandbox"], "/run/netns/pod-1");
    assert!(interfaces.iter().all(|i| i["mac"].as_str().is_some_and(|mac| mac.len() == 17)), "{result}");
    let ips = result["ips"].as_array().expect("ips");
    assert_eq!(ips.len(), 2, "{result}");
    for ip in ips {
        knows_only(ip, &["interface", "address", "gateway", "version"], &[], age);
        let gateway = ip["gateway"].as_str().expect("a gateway");
        assert!(gateway.parse::<std::net::IpAddr>().is_ok(), "{result}");
        let is_v4 = ip["address"].as_str().expect("an address").contains('.');
        assert_eq!(ip["interface"], eth0);
        // Until 1.0.0 it said of which family it is.
        let family = if age >= 3 { Value::Null } else { if is_v4 { "4" } else { "6" }.into() };
        assert_eq!(ip["version"], family, "{version}: {result}");
    }
    assert!(result["routes"].as_array().expect("routes").iter().all(|route| route["dst"].is_string()), "{result}");
}

/// Members that the spec names, some of them since 1.1.0.
fn knows_only(object: &Value, members: &[&str], newest: &[&str], age: usize) {
    let known = |name: &str| members.contains(&name) || (age >= 4 && newest.contains(&name));
    for name in object.as_object().expect("an object").keys() {
        assert!(known(name), "{name} is no member of {object} in {}", VERSIONS[age]);
    }
}

#[test]
fn conflists_that_are_shown_and_shipped_work() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let page = fs::read_to_string(root.join("docs/cni.md")).expect("the page");
    let blocks = page.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix("json\n"));
    let shown = blocks.flat_map(|block| serde_json::Deserializer::from_str(block).into_iter::<Value>());
    let mut conflists: Vec<Value> = shown.map(|value| conflist(value.expect("JSON"))).collect();
    assert!(conflists.len() >= 6, "the page shows {}", conflists.len());
    let examples =
        fs::read_dir(root.join("examples/cni")).expect("the examples").map(|file| file.expect("a file").path());
    for file in examples.chain([root.join("deploy/cni/10-fabric.conflist")]) {
        let text = fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        conflists.push(serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display())));
    }

    for conflist in conflists {
        on_a_host("bridge", move |host| {
            println!("{conflist}");
            host.ready_on_both();
            // What macvlan stands on.
            run("ip link add uplink type bridge");
            run("ip link set uplink up");
            run("ip netns add pod-1");
            run("ip -n pod-1 link set lo up");
            let plugins: Vec<Value> = conflist["plugins"].as_array().expect("plugins").clone();
            let mut result = Value::Null;
            for plugin in &plugins {
                result = call(host, "ADD", &conflist, plugin, &result);
            }
            assert_eq!(result["cniVersion"], conflist["cniVersion"]);
            assert!(result["ips"][0]["address"].as_str().expect("an address").starts_with("10.244.3."));
            let published = plugins.iter().any(|plugin| plugin["type"] == "portmap");
            assert_eq!(run("nft list ruleset").contains("8080"), published);
            // Of Debian's 1.1.1 two fail their own CHECK: portmap looks for its IPv4 rules in the IPv6 table, tuning for a
            // sysctl of the interface "IFNAME".
            for plugin in plugins.iter().filter(|plugin| plugin["type"] != "portmap" && plugin["type"] != "tuning") {
                call(host, "CHECK", &conflist, plugin, &result);
            }
            for plugin in plugins.iter().rev() {
                call(host, "DEL", &conflist, plugin, &result);
            }
            assert!(!run("nft list ruleset").contains("8080"), "the published port stays");
            common::wait_until("bandwidth's device is gone", || run("ip -o link show type ifb").is_empty());
            host.assert_clean();
        });
    }
}

/// What is shown is a whole conflist, or a plugin in the place of ours.
fn conflist(shown: Value) -> Value {
    if shown["plugins"].is_array() {
        shown
    } else {
        json!({ "cniVersion": "1.0.0", "name": "fabric", "plugins": [shown] })
    }
}

/// Calls a plugin of a conflist as a runtime does.
fn call(host: &Host, verb: &str, conflist: &Value, plugin: &Value, result: &Value) -> Value {
    let mut conf = plugin.clone();
    conf["cniVersion"] = conflist["cniVersion"].clone();
    conf["name"] = conflist["name"].clone();
    if !result.is_null() {
        conf["prevResult"] = result.clone();
    }
    if plugin["capabilities"]["portMappings"] == true {
        let port = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }]);
        conf["runtimeConfig"] = json!({ "portMappings": port });
    }
    if plugin["capabilities"]["bandwidth"] == true {
        let limits = json!({ "ingressRate": 10_000_000, "ingressBurst": 1_000_000 });
        conf["runtimeConfig"] = json!({ "bandwidth": limits });
    }
    let answer = if plugin["type"] == "fabric-cni" {
        // The test's own folders.
        for key in ["nodeFile", "stateDir", "dataDir"] {
            conf[key] = host.conf("1.0.0")[key].clone();
        }
        host.ask(verb, "pod-1", &conf)
    } else {
        let path = Path::new(PLUGINS).join(plugin["type"].as_str().expect("a type"));
        host.call(&path, verb, "pod-1", "eth0", &conf)
    };
    answer.unwrap_or_else(|told| panic!("{verb} by {plugin}: {told}"))
}
