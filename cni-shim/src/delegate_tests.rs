use serde_json::json;

use crate::testing::{NO_BRIDGE, Node};

#[test]
fn delegate_is_told_subnets_routes_and_mtu_of_both_families() {
    let node = Node::new();
    node.add();
    assert_eq!(
        node.last_config(),
        json!({
            "cniVersion": "1.0.0",
            "name": "fabric",
            "type": "bridge",
            "bridge": NO_BRIDGE,
            "isGateway": true,
            "isDefaultGateway": true,
            "hairpinMode": true,
            "ipMasq": false,
            "mtu": 1430,
            "ipam": {
                "type": "host-local",
                "dataDir": node.path("addresses"),
                "ranges": [[{"subnet": "10.244.3.0/24"}], [{"subnet": "fd00:10:244:3::/64"}]],
                "routes": [
                    {"dst": "10.244.0.0/16", "gw": "10.244.3.1"},
                    {"dst": "fd00:10:244::/48", "gw": "fd00:10:244:3::1"},
                ],
            },
        })
    );
}

#[test]
fn users_keys_win_and_the_runtimes_go_along() {
    let node = Node::new();
    let mut conf = node.conf("1.0.0");
    conf["dataDir"] = "/run/addresses".into();
    conf["delegate"] = json!({"bridge": NO_BRIDGE, "mtu": 1300, "promiscMode": true});
    conf["runtimeConfig"] = json!({"mac": "02:42:c0:00:02:09"});
    conf["args"] = json!({"cni": {}});
    conf["dns"] = json!({"nameservers": ["192.0.2.53"]});
    conf["capabilities"] = json!({"mac": true});
    conf["unknown"] = true.into();
    conf["prevResult"] = json!({"ips": [{"address": "192.0.2.9/24"}]});
    node.ask("ADD", &conf).expect("ADD succeeds");
    let told = node.last_config();
    for key in ["runtimeConfig", "args", "dns", "capabilities"] {
        assert_eq!(told[key], conf[key], "{key}");
    }
    assert_eq!((&told["mtu"], &told["promiscMode"]), (&1300.into(), &true.into()));
    assert_eq!(told["ipam"]["dataDir"], "/run/addresses");
    assert_eq!(told["prevResult"]["ips"][0]["address"], "192.0.2.9/24");
    assert!(told.get("unknown").is_none() && told.get("stateDir").is_none());
}

#[test]
fn delegate_that_is_not_there_is_named_with_the_folders_searched() {
    let node = Node::new();
    let mut conf = node.conf("1.0.0");
    conf["delegate"] = json!({"type": "macvlan"});
    let error = node.ask("ADD", &conf).expect_err("no macvlan").to_string();
    assert!(error.contains("macvlan") && error.contains(&*node.path("bin").to_string_lossy()), "{error}");
    node.assert_clean();
}

#[test]
fn delegate_is_asked_for_its_versions_once_and_again_after_an_upgrade() {
    let node = Node::new();
    let asked = || node.bridge.seen.borrow().iter().filter(|seen| seen.verb == "VERSION").count();
    for _ in 0..3 {
        node.add();
        node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
    }
    assert_eq!(asked(), 1);
    std::fs::write(node.path("bin/bridge"), "newer").expect("a file");
    node.add();
    assert_eq!(asked(), 2);
}

#[test]
fn broken_cache_of_versions_is_passed_over_and_replaced() {
    let node = Node::new();
    let cache = node.path("state/.versions/bridge.json");
    node.add();
    let whole = std::fs::read(&cache).expect("a cache");
    std::fs::write(&cache, &whole[..whole.len() / 2]).expect("a file");
    node.ask("DEL", &node.conf("1.0.0")).expect("DEL succeeds");
    assert_eq!(std::fs::read(&cache).expect("a cache"), whole);
}

#[test]
fn users_keys_for_host_local_are_added_and_another_ipam_plugin_gets_only_the_users() {
    let node = Node::new();
    let mut conf = node.conf("1.0.0");
    conf["delegate"]["ipam"] = json!({"routes": [], "resolvConf": "/etc/resolv.conf"});
    node.ask("ADD", &conf).expect("ADD succeeds");
    let ipam = node.last_config()["ipam"].clone();
    assert_eq!((&ipam["routes"], &ipam["resolvConf"]), (&json!([]), &"/etc/resolv.conf".into()));
    assert_eq!(ipam["ranges"][0][0]["subnet"], "10.244.3.0/24");

    let of_their_own = json!({"type": "static", "addresses": [{"address": "10.244.3.77/24"}]});
    conf["delegate"]["ipam"] = of_their_own.clone();
    node.ask_about("c2", "ADD", &conf).expect("ADD succeeds");
    assert_eq!(node.last_config()["ipam"], of_their_own);
    node.ask_about("c2", "DEL", &conf).expect("DEL succeeds");
    assert_eq!(node.last_config()["ipam"], of_their_own);
}

#[test]
fn delegate_without_a_bridge_gets_its_default_route_from_the_routes() {
    let node = Node::new();
    std::fs::write(node.path("bin/ptp"), "").expect("a file");
    let mut conf = node.conf("1.0.0");
    conf["delegate"]["type"] = "ptp".into();
    node.ask("ADD", &conf).expect("ADD succeeds");
    let routes = node.last_config()["ipam"]["routes"].to_string();
    assert!(routes.contains(r#""0.0.0.0/0""#) && routes.contains(r#""::/0""#), "{routes}");
}
